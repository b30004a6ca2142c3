"""The measure of structure: its formula against simulation, its effect size against what was planted."""

import numpy as np
import pytest
import torch

from secateur.report import structure

DRAWS = 4000


def row_masks(zeros: torch.Tensor, width: int, draws: int, seed: int = 0) -> torch.Tensor:
    """Masks of shape (draws, rows, width) with so many zeros in each row, anywhere in it."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(draws, len(zeros), width, generator=generator).argsort(-1).argsort(-1)
    return ranks >= zeros[:, None]


def test_the_formula_by_hand():
    # Rows with 1, 2 and 4 zeros of 4: shares 1/4, 1/2, 1.
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    found = structure.columns(mask)
    assert found.expected == pytest.approx(1 / 4 * 3 / 4 + 1 / 2 * 1 / 2 + 0)
    assert found.observed == pytest.approx(np.var([3, 2, 1, 1]))
    assert (found.lines, found.length, found.empty, found.degrees) == (4, 3, 1, 3)
    assert found.ratio == pytest.approx(found.observed / found.expected)
    assert structure.rows(mask).empty == 1


@pytest.mark.parametrize("group", [None, 4])
def test_chance_gives_the_variance_that_is_expected_and_the_spread_of_the_ratio(group):
    rows, width = 40, 48
    if group is None:
        zeros = torch.randint(0, width + 1, (rows,), generator=torch.Generator().manual_seed(1))
        masks = row_masks(zeros, width, DRAWS)
    else:  # 1:4, every group by itself
        masks = row_masks(torch.full((rows * width // 4,), 3), 4, DRAWS).view(DRAWS, rows, width)
    found = [structure.columns(mask, group) for mask in masks]
    observed = np.array([one.observed for one in found])
    standard_error = observed.std() / np.sqrt(DRAWS)
    assert abs(observed.mean() - found[0].expected) < 4 * standard_error
    assert standard_error / found[0].expected < 0.01
    assert np.std([one.ratio for one in found]) == pytest.approx(found[0].ratio_error, rel=0.1)
    if group is not None:  # the hypergeometric variance of one place in a draw of 3 from 4
        assert found[0].expected == pytest.approx(rows * 3 / 4 * 1 / 4)


def test_a_fixed_total_gives_ratios_of_one_on_both_sides():
    masks = row_masks(torch.tensor([700]), 40 * 50, 1000).view(1000, 40, 50)
    for side in (structure.columns, structure.rows):
        ratios = np.array([side(mask).ratio for mask in masks])
        assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(len(ratios))


@pytest.mark.parametrize("rows", [100, 400, 6400])
def test_the_excess_is_what_was_planted_whatever_the_size(rows):
    generator = torch.Generator().manual_seed(rows)
    chance = 0.5 + 0.1 * torch.linspace(-1, 1, 512).sign() * torch.ones(512)  # columns of 40 % and of 60 %
    mask = torch.rand(rows, 512, generator=generator) >= chance
    assert structure.columns(mask).excess == pytest.approx(0.1, abs=0.006)
    # The ratio grows with the matrix, which is why it is not the effect size.
    assert structure.columns(mask).ratio == pytest.approx(1 + rows * 0.01 / 0.24, rel=0.15)
    assert structure.rows(mask).excess < 0.02


def test_rows_are_the_columns_of_the_transposed_mask():
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) > 0.3
    assert structure.rows(mask) == structure.columns(mask.t())


def test_rows_that_a_pattern_makes_equal_are_more_even_than_chance():
    mask = row_masks(torch.full((64,), 20), 40, 1)[0]
    found = structure.rows(mask)
    assert (found.observed, found.ratio, found.excess) == (0, 0, 0)


@pytest.mark.parametrize("value", [True, False])
def test_where_chance_has_no_choice_there_is_no_ratio(value):
    found = structure.columns(torch.full((6, 8), value))
    assert found.ratio is None
    assert found.excess == 0
    assert found.empty == (0 if value else 8)


def test_groups_must_divide_the_columns():
    with pytest.raises(ValueError, match=r"^groups of 4 do not divide 6 columns$"):
        structure.columns(torch.ones(2, 6, dtype=torch.bool), 4)


def test_matrices_together():
    generator = torch.Generator().manual_seed(3)
    chance = 0.5 + 0.2 * torch.linspace(-1, 1, 64)
    parts = [structure.columns(torch.rand(50, 64, generator=generator) >= chance) for _ in range(40)]
    whole = structure.pooled(parts)
    assert (whole.lines, whole.empty) == (40 * 64, sum(part.empty for part in parts))
    assert whole.excess == pytest.approx(float(chance.std(unbiased=False)), abs=0.003)
    assert whole.ratio == pytest.approx(sum(p.observed for p in parts) / sum(p.expected for p in parts))
    assert whole.ratio_error == pytest.approx(parts[0].ratio_error / np.sqrt(40))
    # No excess where there is none: single ones are clamped at 0, their mean would not vanish.
    none = [structure.columns(mask) for mask in row_masks(torch.full((50,), 32), 64, 200)]
    assert structure.pooled(none).excess < 0.01 < np.mean([part.excess for part in none])
