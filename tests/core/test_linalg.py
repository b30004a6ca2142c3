"""The linear algebra under the solvers, against slow references."""

import dataclasses
import weakref

import pytest
import torch

import reference
import reference_solvers
from layer_problems import correlated, gram_of, normal, problem
from secateur.core import linalg
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Unstructured, gradual_mask
from secateur.errors import NumericalError


def test_a_matrix_without_a_factor_has_no_shifted_inverse() -> None:
    with pytest.raises(NumericalError, match=r"^w: the damped Gram matrix of its inputs has no Cholesky factor with 0"):
        linalg.shifted_inverse("w", torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.5)


@pytest.mark.parametrize("size", [1, 2, 3, 511, 512, 513, 1100])
def test_a_triangle_is_inverted_by_halves(size: int) -> None:
    factor = (
        torch.tril(normal(size, size, 1).double(), -1) / size**0.5 + torch.diag(torch.linspace(1, 2, size)).double()
    )
    inverse = factor.clone()
    linalg.invert_triangle(inverse)
    torch.testing.assert_close(inverse @ factor, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-10)
    assert not bool(inverse.triu(1).any())


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 5), (40, 41)], ids=str)
def test_a_matrix_turned_around_in_place(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_TURNED", 7)
    matrix = normal(*shape, 1)
    turned = matrix.clone()
    linalg.turn_around(turned)
    assert torch.equal(turned, matrix.flip(0, 1))


def test_a_factor_with_more_damping_is_that_of_the_matrix_as_it_was() -> None:
    """The first attempt fails, and leaves nothing of itself in the next one."""
    half = correlated(300, 60).double()
    total = half.t() @ half
    total[5, 30] = total[30, 5] = 1.05 * (total[5, 5] * total[30, 30]).sqrt()
    with pytest.raises(torch.linalg.LinAlgError):
        reference_solvers.inverse_cholesky(total, 0.01)
    factor, used = linalg.inverse_factor("w", total, 0.01)
    assert used > 0.01
    torch.testing.assert_close(factor, reference_solvers.inverse_cholesky(total, used), rtol=1e-9, atol=1e-12)


def test_the_inverse_factor_is_the_published_one() -> None:
    total = correlated(300, 60, outliers=(3,)).double()
    total = total.t() @ total
    factor, used = linalg.inverse_factor("w", total, 0.01)
    torch.testing.assert_close(factor, reference_solvers.inverse_cholesky(total, 0.01), rtol=1e-9, atol=1e-12)
    assert used == 0.01


def test_matrices_of_the_same_inputs_share_a_factor_and_others_do_not() -> None:
    x, other = correlated(300, 60), correlated(300, 60, seed=1)
    query = problem(normal(30, 60, 1), x, Unstructured(0.5))
    key = dataclasses.replace(query, name="key", weight=normal(10, 60, 2))
    first, _ = linalg.factor_of_inputs(query, 0.01)
    assert linalg.factor_of_inputs(key, 0.01)[0] is first
    for changed, damping in ((key, 0.1), (problem(query.weight, other, query.pattern), 0.01)):
        expected, _ = linalg.inverse_factor("w", gram_of(changed), damping)
        assert torch.equal(linalg.factor_of_inputs(changed, damping)[0], expected)
    again, _ = linalg.factor_of_inputs(query, 0.01)
    query.statistic(Gram).update(other)  # in the same memory
    assert not torch.equal(linalg.factor_of_inputs(query, 0.01)[0], again)
    query.statistic(Gram).total.mul_(4)
    torch.testing.assert_close(
        linalg.factor_of_inputs(query, 0.01)[0], linalg.inverse_factor("w", gram_of(query), 0.01)[0]
    )


def test_a_factor_goes_with_the_last_of_its_inputs() -> None:
    own = problem(normal(30, 60, 1), correlated(300, 60), Unstructured(0.5))
    factor = weakref.ref(linalg.factor_of_inputs(own, 0.01)[0])
    assert factor() is not None
    del own
    assert factor() is None


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 700), (1100, 5), (1030, 520)])
def test_energy_is_the_squared_norm_of_the_outputs(rows: int, width: int) -> None:
    x, weight = normal(40, width, 1).double(), normal(rows, width, 2).double()
    expected = float((weight @ x.T).square().sum())
    assert linalg.energy(weight, x.T @ x) == pytest.approx(expected, rel=1e-10)
    assert linalg.energy(weight.float(), (x.T @ x).float()) == pytest.approx(expected, rel=1e-5)


def test_the_reconstruction_error_of_an_unchanged_and_of_an_empty_matrix() -> None:
    given = problem(normal(4, 24, 1), correlated(90, 24), NM(2, 4))
    assert linalg.reconstruction_error(given, given.weight) == 0
    assert linalg.reconstruction_error(given, torch.zeros(4, 24)) == pytest.approx(1, rel=1e-6)
    assert linalg.reconstruction_error(dataclasses.replace(given, weight=torch.zeros(4, 24)), torch.zeros(4, 24)) == 0


def test_normalised_coordinates_and_back() -> None:
    x = correlated(100, 20, outliers=(3,))
    x[:, 7] = 0
    given = problem(normal(5, 20, 1), x, NM(2, 4), torch.float64)
    scaled = linalg.normalise(given)
    torch.testing.assert_close(scaled.gram.diagonal(), torch.ones(20).double())
    assert not bool(scaled.weight[:, 7].any())
    torch.testing.assert_close(scaled.back(scaled.weight), given.weight)
    torch.testing.assert_close(scaled.right, scaled.weight @ scaled.gram)
    assert gram_of(given).data_ptr() != scaled.gram.data_ptr()


def test_a_mask_on_its_way_to_its_pattern() -> None:
    score = normal(8, 24, 1).abs()
    for pattern in (NM(2, 4), Unstructured(0.5, "matrix"), Unstructured(0.5, "row")):
        last = pattern.mask(score)
        for sparsity in (0.0, 0.1, 0.29, 0.49):
            mask = gradual_mask(pattern, score, sparsity)
            assert not bool((last & ~mask).any()), "what stays in the end stays on the way"
            groups = 8 if isinstance(pattern, Unstructured) and pattern.per == "row" else 1
            assert int((~mask).sum()) == groups * reference.removed_count(score.numel() // groups, sparsity)
        assert torch.equal(gradual_mask(pattern, score, 0.5), last)
