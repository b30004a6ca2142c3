"""Orders of input channels in which an N:M pattern keeps more of the scores.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (RIA), ICLR
2024, section 4.2: channels dealt out by their total scores, then assigned to groups one from each at a time.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.patterns import NM
from secateur.errors import PatternError

SWEEPS = 8  # over all positions of a group at most
GAIN = 1e-3  # a sweep that raises what is kept by a smaller share is the last one


def check_assignment() -> None:
    """Raise `PatternError` where what solves assignments is not installed."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise PatternError(
            '--permute needs SciPy, which is not installed. Run: pip install "secateur[permute]"'
        ) from None


def kept_share(score: Float[Tensor, "out in"], pattern: NM) -> float:
    """The share of the sizes of all scores that the pattern keeps, in the order in which the channels stand."""
    groups = score.double().view(score.shape[0], -1, pattern.m)
    kept = groups.topk(pattern.n, dim=2).values.sum()
    return float(kept / groups.abs().sum().clamp(min=torch.finfo(torch.float64).tiny))


def best_order(
    score: Float[Tensor, "out in"], pattern: NM, orbits: Sequence[Int[Tensor, "units together"]]
) -> Int[Tensor, " in"]:
    """The channel that takes each place, so that the pattern keeps a larger total of the scores.

    An orbit holds units of channels of which any may take the place of any other, each column for itself: heads that
    share their values have one order. Places are left alone where a group of the pattern does not lie in one orbit.
    """
    order = torch.arange(score.shape[1])
    for orbit in orbits:
        places = _whole_groups(orbit, pattern.m)
        if len(places) < 2 * pattern.m:
            continue
        own = orbit[places]
        # One row for each channel of a unit: (units, out * together).
        rows = score[:, own.flatten().to(score.device)].view(score.shape[0], len(own), -1)
        found = arranged(rows.permute(1, 0, 2).reshape(len(own), -1), pattern)
        order[own.flatten()] = own[found].flatten()
    return order


def _whole_groups(orbit: Int[Tensor, "units together"], m: int) -> Int[Tensor, " places"]:
    """Places of an orbit, group by group, whose groups lie in the orbit as a whole and are the same for all columns."""
    ordered = orbit[:, 0].argsort()
    _, group, count = torch.unique(orbit[ordered] // m, dim=0, return_inverse=True, return_counts=True)
    whole = count[group] == m
    places = ordered[whole]
    return places[group[whole].argsort(stable=True)]


def arranged(score: Float[Tensor, "channels rows"], pattern: NM) -> Int[Tensor, " channels"]:
    """The channel for each place, where each M consecutive places are a group of which every row keeps N.

    Starts with `serpentine`, or with the channels as they are where that keeps as much, and takes one position of
    every group after the other out, to assign their channels to the groups in the best way, until little is gained.

    Paper: one sweep. Later ones gain less than a tenth of what the first one does.
    """
    m = pattern.m
    given = torch.arange(len(score))
    start = serpentine(score.sum(dim=1, dtype=torch.float64), m)
    best, kept = given, kept_in(score, pattern)
    if (other := kept_in(score[start.to(score.device)], pattern)) > kept:
        best, kept = start, other
    for _ in range(SWEEPS if pattern.n < m else 0):
        before = kept
        for position in range(m):
            found = assigned(score, best, position, pattern)
            if (other := kept_in(score[found.to(score.device)], pattern)) > kept:
                best, kept = found, other
        if kept - before <= GAIN * before:
            break
    return best


def kept_in(score: Float[Tensor, "channels rows"], pattern: NM) -> float:
    """The total of the scores that the pattern keeps of groups of M consecutive channels."""
    groups = score.view(-1, pattern.m, score.shape[1])
    return sum(float(own.sum(dtype=torch.float64)) for own in _highest(groups, pattern.n))


def _highest(score: Float[Tensor, "groups channels rows"], count: int) -> list[Float[Tensor, "groups rows"]]:
    """The highest scores of the channels of a group in each row, from the highest down."""
    # Fast: a channel at a time is put in its place; selection along so few entries takes fifty times as long.
    highest: list[Tensor] = []
    for channel in score.unbind(dim=1):
        lower, placed = channel, []
        for own in highest:
            placed.append(torch.maximum(own, lower))
            lower = torch.minimum(own, lower)
        highest = [*placed, lower][:count]
    return highest


def serpentine(total: Float[Tensor, " channels"], m: int) -> Int[Tensor, " channels"]:
    """Channels dealt out to the groups from the highest total down, each round in the opposite direction."""
    dealt = total.cpu().argsort(descending=True, stable=True).view(m, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.t().reshape(-1)


def assigned(
    score: Float[Tensor, "channels rows"], order: Int[Tensor, " channels"], position: int, pattern: NM
) -> Int[Tensor, " channels"]:
    """The order in which the channels at one position of every group are assigned to the groups in the best way.

    A group whose other channels keep ``t`` as their lowest of N in a row keeps ``max(s, t) - t`` more of it with a
    channel of score ``s``. Since ``max(s, t) = (s + t + |s - t|) / 2``, and the sums of all ``s`` and all ``t`` are the
    same for every assignment, the best one has the largest total distance ``sum |s - t|``.
    """
    from scipy.optimize import linear_sum_assignment

    order = order.view(-1, pattern.m).clone()
    channels = order[:, position]
    rest = order[:, [other for other in range(pattern.m) if other != position]].to(score.device)
    # Of M - 1 channels the N-th highest, row by row.
    lowest = torch.cat([_highest(score[own], pattern.n)[-1] for own in torch.split(rest, 256)])
    distance = torch.cdist(lowest, score[channels.to(score.device)], p=1)
    _, taken = linear_sum_assignment(distance.cpu().numpy(), maximize=True)
    order[:, position] = channels[torch.from_numpy(taken)]
    return order.flatten()
