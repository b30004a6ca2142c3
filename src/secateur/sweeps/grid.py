"""The grid of a sweep: the cells that its methods and patterns make, from their names."""

from collections.abc import Iterable, Mapping, Sequence

from secateur.core.choices import Group
from secateur.core.patterns import Pattern
from secateur.core.problem import Method
from secateur.errors import CalibrationError, PatternError
from secateur.pruning.named import as_method, as_pattern, method_of
from secateur.pruning.settings import MethodOptions
from secateur.runs.options import listed, written
from secateur.sweeps.estimate import Task
from secateur.sweeps.folder import Cell
from secateur.sweeps.settings import Methods, Patterns, Sparsities, SweepSettings


def grid(settings: SweepSettings) -> list[Task]:
    """The cells to run: every method in every pattern, once for each draw of what it learns from."""
    tasks: dict[str, Task] = {}
    seeds = seeds_of(settings)
    patterns = patterns_of(settings.sparsity, settings.patterns, settings.per)
    for label, method in methods_of(settings.methods, settings.option):
        own: Sequence[int | None] = seeds if method.needs else [None]
        for pattern, seed in ((pattern, seed) for pattern in patterns for seed in own):
            task = Task(Cell.of(label, pattern, seed, settings.seed), method, pattern)
            if tasks.setdefault(task.cell.folder, task) is not task:
                raise PatternError(
                    f"{task.cell.name} is in the grid twice. Give methods of the same name, with different options, "
                    "names of their own (methods={name: method}, or --methods NAME=METHOD)."
                )
    if not tasks:
        raise PatternError("the grid is empty: it needs at least one method and one pattern.")
    return list(tasks.values())


def seeds_of(settings: SweepSettings) -> list[int]:
    """The draws of calibration samples. Raises `CalibrationError` for what is no seed."""
    found = []
    for text in listed(settings.seeds):
        try:
            seed = int(text)
        except ValueError:
            seed = -1
        if seed < 0:
            raise CalibrationError(f'--seeds: got "{text}", expected whole numbers from 0, such as 0,1,2.')
        found.append(seed)
    return list(dict.fromkeys(found)) or [settings.seed]


def methods_of(methods: Methods, option: MethodOptions = ()) -> list[tuple[str, Method]]:
    """The methods with their labels: those of a mapping, the names of methods, or NAME and LABEL=NAME."""
    methods = [methods] if isinstance(methods, str) else methods
    if isinstance(methods, Mapping):
        return [(label, as_method(method)) for label, method in methods.items()]
    if all(isinstance(method, str) for method in methods):
        return _named(listed(methods), list(written(option)))
    found = [as_method(method) for method in methods]
    return [(method.name, method) for method in found]


def _named(names: Sequence[str], options: Iterable[str]) -> list[tuple[str, Method]]:
    """The methods of a list of NAME and LABEL=NAME, with options such as "gblm.norm=l2"."""
    chosen: dict[str, str] = {}
    for text in names:
        label, _, name = (part.strip() for part in text.rpartition("="))
        label = label or name.replace("-", "_")
        if label in chosen:
            raise PatternError(f"--methods: {label} is named twice. Give them labels: --methods one={name},two={name}.")
        chosen[label] = name
    own: dict[str, list[str]] = {label: [] for label in chosen}
    for option in options:
        labels = [label for label in chosen if option.replace("-", "_").startswith(f"{label.replace('-', '_')}.")]
        if not labels:
            raise PatternError(f"--option {option}: expected METHOD.NAME=VALUE, of a method among {', '.join(chosen)}.")
        label = max(labels, key=len)
        own[label].append(option[len(label) + 1 :])
    return [(label, method_of(name, own[label])) for label, name in chosen.items()]


def patterns_of(sparsity: Sparsities, patterns: Patterns, per: Group | None) -> list[Pattern]:
    """The patterns that both name together, in this order; half the weights by default."""
    fractions = []
    for text in listed(sparsity):
        try:
            fractions.append(float(text))
        except ValueError:
            raise PatternError(f'--sparsity: got "{text}", expected numbers such as 0.5,0.6.') from None
    found = [as_pattern(None, fraction, per) for fraction in fractions]
    found += [as_pattern(own, None, None if fractions else per) for own in listed(patterns)]
    return found or [as_pattern(None, None, per)]
