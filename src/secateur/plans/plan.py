"""What to prune and how, decided before anything changes: `Plan = {matrix name: Pattern}`."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from secateur.core.patterns import Pattern, pattern_from_json
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
                raise PatternError(f"{name}: no prunable matrix of this name in the model.{nearest(name, shapes)}")
            pattern.check(name, shapes[name])


def matching(
    shapes: Shapes, *, only: Sequence[str] = (), skip: Sequence[str] = (), purpose: str = "prune"
) -> list[str]:
    """The names that some `only` glob matches (all, without one) and no `skip` glob; `purpose` is for the message.

    Raises `PatternError` for a glob that matches nothing and when nothing is left.
    """
    for option, globs in (("--only", only), ("--skip", skip)):
        for glob in globs:
            if not any(matches(name, glob) for name in shapes):
                raise PatternError(f'{option} "{glob}" matches none of {len(shapes)} matrices.{nearest(glob, shapes)}')
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


def nearest(name: str, shapes: Shapes) -> str:
    """A sentence on the name or glob of a matrix that is most like this one, to follow one on what is wrong."""
    plain = name.replace("*", "")
    leaves = {part for known in shapes for part in known.split(".") if not part.isdigit() and part != "weight"}
    near = difflib.get_close_matches(name, list(shapes), 1) or [
        f"*.{leaf}" if any(matches(known, f"*.{leaf}") for known in shapes) else f"*{leaf}*"
        for part in plain.split(".")
        for leaf in difflib.get_close_matches(part, sorted(leaves), 1)
    ]
    return f' Did you mean "{near[-1]}"?' if near else f' They have names such as "{next(iter(shapes), "")}".'
