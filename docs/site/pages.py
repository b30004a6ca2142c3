"""The pages of the site that are no file in docs/: those at the root of the repository, and what the code says.

mkdocs calls the functions `on_...` (`hooks` in mkdocs.yml).
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from cyclopts.docs.markdown import generate_markdown_docs
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import secateur
from secateur import cli
from secateur.cli.app import exit_code

ROOT = Path(__file__).parents[2]
AT_THE_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
ERROR = re.compile(r"^class \w+\(\w+Error\b", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and the pages that are made here."""
    for name, uri in AT_THE_ROOT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for uri, text in _made():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page whose links through the repository lead to pages of the site, or to the repository on the web."""
    uri = page.file.src_uri
    folder = "" if uri in AT_THE_ROOT.values() else "docs"

    def lead(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if path in AT_THE_ROOT:
            return AT_THE_ROOT[path]
        if path.startswith("docs/"):
            return path.removeprefix("docs/")
        return f"{config.extra['repository']}/blob/main/{path}" if (ROOT / path).exists() else match[1]

    return LINK.sub(lead, markdown) if "/" not in uri else markdown


def _made() -> Iterator[tuple[str, str]]:
    """The pages that are made of code: where each lies, and its text."""
    for name in cli.app:
        if not name.startswith("-"):
            yield f"commands/{name}.md", command_page(name)
    for room, names in public_names().items():
        if room != "errors":
            yield f"python/{room}.md", python_page(room, names)
    yield "errors.md", errors_page()


def command_page(name: str) -> str:
    """What `--help` says of a command, as a page."""
    text = generate_markdown_docs(
        cli.app, commands_filter=[name], heading_level=0, generate_toc=False, no_root_title=True
    )
    text = text.replace(" -m mkdocs", "", 1)  # which cyclopts takes for the name of the program
    text = text.replace("```console", "```")  # what is typed, and no output
    text = text.replace("][", "]\\[")  # [:CONFIG][:SPLIT] is no reference
    whole = f"{text.strip()}\n\n{cli.app[name].help_epilogue}\n"
    return f"# secateur {name}\n\n" + re.sub(r"^\*\*(.+?)\*\*:?$", r"## \1", whole, flags=re.MULTILINE)


def public_names() -> dict[str, list[str]]:
    """The public names by the room that they live in."""
    stub = ast.parse((ROOT / "src" / "secateur" / "__init__.pyi").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.setdefault(node.module.split(".")[1], []).extend(name.name for name in node.names)
    return found


def python_page(room: str, names: list[str]) -> str:
    """The public names of a room, which mkdocstrings fills in."""
    return "\n\n".join([_said(f"secateur.{room}"), *(f"::: secateur.{name}" for name in names)])


def errors_page() -> str:
    """All errors that are raised on purpose, as a table."""
    package = ROOT / "src" / "secateur"
    for path in package.rglob("*.py"):
        if ERROR.search(path.read_text(encoding="utf-8")):
            import_module(".".join(["secateur", *path.relative_to(package).with_suffix("").parts]))
    rows = [
        f"| `{kind.__name__}` | {', '.join(f'`{base.__name__}`' for base in kind.__bases__)} | {exit_code(kind)} | "
        f"{' '.join((kind.__doc__ or '').split())} |"
        for kind in _with_descendants(secateur.SecateurError)
    ]
    head = ["| error | is a | the command exits with | when |", "|---|---|---|---|"]
    intro = (
        "Everything that Secateur raises on purpose. A message says where (matrix or file), what was found, what was "
        "expected, and what to do next. Other exit codes, and what is kept after each fault, are in "
        "[reliability](reliability.md)."
    )
    return f"# Errors\n\n{intro}\n\n" + "\n".join([*head, *rows]) + "\n"


def _with_descendants(kind: type[secateur.SecateurError]) -> Iterator[type[secateur.SecateurError]]:
    yield kind
    for child in sorted(kind.__subclasses__(), key=lambda own: own.__name__):
        yield from _with_descendants(child)


def _said(module: str) -> str:
    return (import_module(module).__doc__ or "").strip()
