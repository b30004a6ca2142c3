"""What to prune and how, decided before anything changes: `Plan = {matrix name: Pattern}`."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from secateur.core.choices import Group
from secateur.core.patterns import Pattern, pattern_from_json, with_group
from secateur.errors import PatternError

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Plan(Mapping[str, Pattern]):
    """A mapping from matrix names to patterns that can be printed, saved as JSON, and compared."""

    patterns: Mapping[str, Pattern]

    def __getitem__(self, name: str) -> Pattern:
        return self.patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    def to_json(self) -> dict[str, Any]:
        """One JSON object per matrix."""
        return {name: pattern.to_json() for name, pattern in self.patterns.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` wrote. Raises `PatternError`."""
        return cls({name: pattern_from_json(pattern) for name, pattern in value.items()})

    def __str__(self) -> str:
        return json.dumps(self.to_json(), indent=2)

    def check(self, shapes: Shapes) -> None:
        """Raise `PatternError` for an unknown matrix, or one that cannot hold its pattern."""
        for name, pattern in self.patterns.items():
            if name not in shapes:
                raise PatternError(f"{name}: no prunable matrix of this name in the model.{_nearest(name, shapes)}")
            pattern.check(name, shapes[name])


def uniform(
    shapes: Shapes, pattern: Pattern, *, only: Sequence[str] = (), skip: Sequence[str] = (), per: Group = "row"
) -> Plan:
    """The plan with one pattern for every matrix that some `only` glob matches (all, without one) and no `skip` glob.

    Globs match whole names, with or without a final ".weight". `per` is the comparison group for an unstructured
    pattern that leaves it open. Raises `PatternError` for a glob that matches nothing and for an empty plan.
    """
    plan = Plan(dict.fromkeys(matching(shapes, only=only, skip=skip), with_group(pattern, per)))
    plan.check(shapes)
    return plan


def by_glob(
    shapes: Shapes,
    patterns: Mapping[str, Pattern],
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    per: Group = "row",
) -> Plan:
    """The plan with the pattern of the first glob that matches a matrix; what no glob matches stays dense.

    `only`, `skip` and `per` are those of `uniform`. Raises `PatternError` for a glob that matches nothing, or nothing
    that earlier globs have left, and for an empty plan.
    """
    left = {name: shapes[name] for name in matching(shapes, only=only, skip=skip)}
    found: dict[str, Pattern] = {}
    for glob, pattern in patterns.items():
        if not any(matches(name, glob) for name in shapes):
            raise PatternError(f'pattern "{glob}" matches none of {len(shapes)} matrices.{_nearest(glob, shapes)}')
        own = [name for name in left if matches(name, glob)]
        if own and all(name in found for name in own):
            raise PatternError(f'pattern "{glob}": earlier globs match all of its matrices. Put it before them.')
        for name in own:
            found.setdefault(name, with_group(pattern, per))
    plan = Plan({name: found[name] for name in left if name in found})
    if not plan:
        raise PatternError(f"nothing is left to prune: no glob of the pattern matches any of {len(left)} matrices.")
    plan.check(shapes)
    return plan


def matching(
    shapes: Shapes, *, only: Sequence[str] = (), skip: Sequence[str] = (), purpose: str = "prune"
) -> list[str]:
    """The names that some `only` glob matches (all, without one) and no `skip` glob; `purpose` is for the message.

    Raises `PatternError` for a glob that matches nothing and when nothing is left.
    """
    for option, globs in (("--only", only), ("--skip", skip)):
        for glob in globs:
            if not any(matches(name, glob) for name in shapes):
                raise PatternError(f'{option} "{glob}" matches none of {len(shapes)} matrices.{_nearest(glob, shapes)}')
    names = [
        name
        for name in shapes
        if (not only or any(matches(name, glob) for glob in only)) and not any(matches(name, glob) for glob in skip)
    ]
    if not names:
        raise PatternError(f"nothing is left to {purpose}: --only and --skip leave none of {len(shapes)} matrices.")
    return names


def matches(name: str, glob: str) -> bool:
    """Whether a glob names a matrix, with or without the final ".weight"."""
    return fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)


def _nearest(name: str, shapes: Shapes) -> str:
    plain = name.replace("*", "")
    leaves = {part for known in shapes for part in known.split(".") if not part.isdigit() and part != "weight"}
    near = difflib.get_close_matches(name, list(shapes), 1) or [
        f"*.{leaf}" if any(matches(known, f"*.{leaf}") for known in shapes) else f"*{leaf}*"
        for part in plain.split(".")
        for leaf in difflib.get_close_matches(part, sorted(leaves), 1)
    ]
    return f' Did you mean "{near[-1]}"?' if near else f' They have names such as "{next(iter(shapes), "")}".'
