"""Allocations that look at names alone: one pattern for all matrices, or one for each glob."""

from collections.abc import Mapping, Sequence

from secateur.core.choices import Group
from secateur.core.patterns import Pattern, with_group
from secateur.errors import PatternError
from secateur.plans.plan import Plan, Shapes, matches, matching, nearest


def uniform(
    shapes: Shapes, pattern: Pattern, *, only: Sequence[str] = (), skip: Sequence[str] = (), per: Group = "row"
) -> Plan:
    """The plan with one pattern for every matrix that some `only` glob matches (all, without one) and no `skip` glob.

    Globs match whole names, with or without a final ".weight". `per` is the comparison group for an unstructured
    pattern that leaves it open. Raises `PatternError` for a glob that matches nothing and for an empty plan.
    """
    return by_glob(shapes, {"*": pattern}, only=only, skip=skip, per=per)


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
            raise PatternError(f'pattern "{glob}" matches none of {len(shapes)} matrices.{nearest(glob, shapes)}')
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
