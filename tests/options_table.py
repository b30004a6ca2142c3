"""The table of all options of prune, from its settings: `python tests/options_table.py > docs/options.md`."""

import inspect

from secateur.pruning.settings import PruneSettings
from secateur.runs.options import ARGUMENTS, Field, options

HEAD = """# Options of prune

`secateur prune` and `secateur plan` take these on the command line, as keys of the file that `--config` names, and as
keyword arguments of `secateur.prune` and `secateur.estimate` (with underscores: `batch_size`). Written from the code by
`python tests/options_table.py > docs/options.md`. `plan` has `--processes`, `--bandwidth` and `--device-memory` too:
see [many processes](distributed.md).

| option | default | what it does |
|---|---|---|
"""

PLAIN = {str(inspect.Parameter.empty): "required", "None": "none", "()": "none", "False": "off"}


def row(field: Field) -> str:
    """One option."""
    text, _, stated = field.option.help.partition(" [default: ")
    text = text.replace("][", "]\\[").replace("*", "\\*")  # [:CONFIG][:SPLIT] is no reference, and * no emphasis
    default = stated.removesuffix("].") or PLAIN.get(str(field.default), f"`{field.default}`")
    name = field.name.upper() if field.option.panel == ARGUMENTS else field.flag
    names = f"`{name}`" + (f", `{field.option.short}`" if field.option.short else "")
    words = f" One of {', '.join(f'`{word}`' for word in field.choices)}." if field.choices else ""
    return f"| {names} | {default} | {text}{'' if text.endswith('.') else '.'}{words} |"


def table() -> str:
    """The page."""
    return HEAD + "\n".join(map(row, options(PruneSettings))) + "\n"


if __name__ == "__main__":
    print(table(), end="")
