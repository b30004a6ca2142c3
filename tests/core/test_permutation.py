"""Orders of channels for N:M patterns, against all orders of few channels and a transcription of the paper."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from secateur.core.patterns import NM
from secateur.core.permutation import arranged, assigned, best_order, kept_in, kept_share, serpentine

# SciPy is what assigns channels; it is an extra.
pytest.importorskip("scipy")


def scores(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, with channels of very different sizes, as scores are. (rows, channels)"""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(channels, generator=generator).mul(1.5).exp()
    return torch.randn(rows, channels, generator=generator).abs().pow(2) * size


def kept(score: Tensor, order: Tensor, pattern: NM) -> float:
    """Row by row and group by group."""
    total = 0.0
    for row in score[:, order].tolist():
        for start in range(0, len(row), pattern.m):
            total += sum(sorted(row[start : start + pattern.m])[-pattern.n :])
    return total


def test_totals_and_shares_are_those_of_the_pattern() -> None:
    for pattern in (NM(2, 4), NM(1, 4), NM(4, 8)):
        score = scores(5, 16)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        mask = pattern.mask(score[:, order])
        assert kept_in(score.t()[order], pattern) == pytest.approx(float(score[:, order][mask].sum()), rel=1e-6)
        assert kept_share(score[:, order], pattern) == pytest.approx(kept(score, order, pattern) / float(score.sum()))


def test_channels_are_dealt_out_from_the_highest_down_in_a_snake() -> None:
    total = torch.tensor([5.0, 1.0, 8.0, 3.0, 7.0, 2.0, 6.0, 4.0])
    # 8 7 to groups 0 1, 6 5 to groups 1 0, 4 3 to groups 0 1, 2 1 to groups 1 0.
    assert total[serpentine(total, 4)].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2)], ids=str)
def test_an_assignment_is_the_best_of_all(pattern: NM) -> None:
    for seed in range(4):
        score = scores(6, 4 * pattern.m, seed)
        start = torch.randperm(4 * pattern.m, generator=torch.Generator().manual_seed(seed))
        for position in range(pattern.m):
            groups = start.view(-1, pattern.m)
            others = []
            for own in permutations(range(4)):
                other = groups.clone()
                other[:, position] = groups[list(own), position]
                others.append(kept(score, other.flatten(), pattern))
            found = assigned(score.t().contiguous(), start, position, pattern)
            assert kept(score, found, pattern) == pytest.approx(max(others), rel=1e-6)


def test_of_eight_channels_nearly_the_best_of_all_orders_is_found() -> None:
    """There are 35 ways to make two groups of four; all 40,320 orders keep what one of these keeps."""
    pattern, gaps = NM(2, 4), []
    for seed in range(8):
        score = scores(8, 8, seed)
        every = [
            kept(score, torch.tensor([*one, *(c for c in range(8) if c not in one)]), pattern)
            for one in combinations(range(8), 4)
            if 0 in one
        ]
        given, found = torch.arange(8), arranged(score.t().contiguous(), pattern)
        assert sorted(found.tolist()) == list(range(8))
        assert kept(score, given, pattern) <= kept(score, found, pattern) * (1 + 1e-6) <= max(every) * (1 + 2e-6)
        gaps.append(1 - kept(score, found, pattern) / max(every))
    assert sum(gaps) / len(gaps) < 0.01
    assert sum(gap < 1e-6 for gap in gaps) >= 3


def paper_order(score: Tensor, n: int, m: int) -> list[int]:
    """Section 4.2, from its text: channels by their sums dealt out in turns, then for each position of a group a cost
    for every pair of a channel and a group, and the assignment that keeps most.
    """
    from scipy.optimize import linear_sum_assignment

    rows, channels = score.shape
    count = channels // m
    by_sum = sorted(range(channels), key=lambda channel: -float(score[:, channel].double().sum()))
    groups: list[list[int]] = [[] for _ in range(count)]
    for turn in range(m):
        dealt = by_sum[turn * count : (turn + 1) * count]
        for group, channel in enumerate(dealt if turn % 2 == 0 else dealt[::-1]):
            groups[group].append(channel)
    for position in range(m):
        taken = [group[position] for group in groups]
        gain = [
            [
                sum(
                    sum(sorted(float(score[row, c]) for c in [*group[:position], *group[position + 1 :], own])[-n:])
                    for row in range(rows)
                )
                for own in taken
            ]
            for group in groups
        ]
        _, chosen = linear_sum_assignment(gain, maximize=True)
        for group, own in zip(groups, chosen, strict=True):
            group[position] = taken[own]
    return [channel for group in groups for channel in group]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8)], ids=str)
def test_it_gains_at_least_what_the_paper_gains(pattern: NM) -> None:
    for seed in range(3):
        score = scores(6, 32, seed)
        given = torch.arange(32)
        paper = torch.tensor(paper_order(score, pattern.n, pattern.m))
        found = arranged(score.t().contiguous(), pattern)
        gained, published = (kept(score, order, pattern) - kept(score, given, pattern) for order in (found, paper))
        assert gained >= published * (1 - 1e-6) > 0


def test_units_move_within_their_orbits_and_together() -> None:
    """Two heads of eight share their values; eight more channels stand alone, and six do not fill groups of four."""
    pattern, score = NM(2, 4), scores(6, 32)
    shared = torch.stack([torch.arange(8), torch.arange(8, 16)], dim=1)
    alone, odd = torch.arange(16, 24).unsqueeze(1), torch.arange(24, 30).unsqueeze(1)
    order = best_order(score, pattern, [shared, alone, odd])
    assert order[24:].tolist() == list(range(24, 32))
    assert torch.equal(order[8:16], order[:8] + 8)
    assert sorted(order[:8].tolist()) == list(range(8))
    assert sorted(order[16:24].tolist()) == list(range(16, 24))
    assert kept(score, order, pattern) > kept(score, torch.arange(32), pattern)
    # The best of all orders of the shared units, both heads taken together.
    every = []
    for one in combinations(range(8), 4):
        groups = torch.tensor([*one, *(c for c in range(8) if c not in one)])
        every.append(kept(score[:, :16], torch.cat([groups, groups + 8]), pattern))
    assert kept(score[:, :16], order[:16], pattern) > max(every) * 0.99
