"""Distributions of scores: against numpy, and in the manifest."""

import json

import numpy as np
import pytest
import torch

import secateur
import tiny
from secateur.core import histogram as module
from secateur.core.histogram import edges, histogram


def numpy_counts(values, limits):
    """Counts in bins whose first one reaches down to everything."""
    return np.histogram(np.maximum(values, limits[0]), limits)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logarithmic_bins(dtype, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", 100)  # several chunks, the last one smaller
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37, 48, generator=generator).abs().mul(torch.rand(48, generator=generator)).to(dtype)
    values[3, 5] = 0
    mask = values > 0.2
    found = histogram(values, mask)
    limits = np.array(edges(found))
    assert len(limits) == 25
    assert limits[-1] == found["high"] == float(values.max())
    assert limits[0] == found["low"] == found["high"] / 4096
    assert limits[1:] / limits[:-1] == pytest.approx(np.full(24, 2**0.5))
    assert found["scale"] == "logarithmic"
    exact = values.double().numpy()
    for key, where in (("kept", mask.numpy()), ("pruned", ~mask.numpy())):
        counts = np.array(numpy_counts(exact[where], limits))
        # A value within rounding of an edge may fall to either side: bfloat16 has powers of two exactly there.
        assert np.abs(np.array(found[key]) - counts).sum() <= (2 if dtype != torch.bfloat16 else 60)
        assert sum(found[key]) == int(where.sum())
    json.dumps(found)


def test_values_below_zero_get_equal_bins():
    values = torch.linspace(-1, 1, 480).view(20, 24)
    found = histogram(values, values > 0)
    assert (found["scale"], found["low"], found["high"]) == ("linear", -1, 1)
    assert sum(found["kept"]) == sum(found["pruned"]) == 240
    assert found["kept"] == found["pruned"][::-1]
    assert edges(found) == pytest.approx(np.linspace(-1, 1, 25).tolist())


def test_values_that_are_all_the_same():
    for value in (0.0, 3.0, -2.0):
        found = histogram(torch.full((4, 4), value), torch.eye(4, dtype=torch.bool))
        assert (sum(found["kept"]), sum(found["pruned"])) == (4, 12)


def test_the_manifest_has_the_scores_of_methods_that_score(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    ids = tiny.tokens()
    run = {"pattern": secateur.Unstructured(0.5), "calibration": ids}
    for method in (secateur.wanda(), secateur.gblm(), secateur.magnitude()):
        manifest = secateur.prune(source, method=method, output=tmp_path / method.name, **run)
        for entry in manifest.matrices.values():
            assert sum(entry["scores"]["pruned"]) == entry["zeros"]
            assert sum(entry["scores"]["kept"]) == entry["shape"][0] * entry["shape"][1] - entry["zeros"]
    # Magnitude compares over the matrix, so no kept weight scores lower than a pruned one.
    for entry in manifest.matrices.values():
        kept, pruned = (np.flatnonzero(entry["scores"][key]) for key in ("kept", "pruned"))
        assert pruned.max() <= kept.min()
    for method in (secateur.sparsegpt(), secateur.chain(secateur.wanda(), secateur.least_squares())):
        manifest = secateur.prune(source, method=method, output=tmp_path / method.name, **run)
        assert {entry["scores"] for entry in manifest.matrices.values()} == {None}


def test_the_scores_are_wandas(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    seen = {}

    def spy(problem):
        norm = problem.statistic(secateur.SquaredNorm).norm()
        seen[problem.name] = (problem.weight.abs() * norm).double().numpy()
        return problem.weight.abs() * norm

    method = secateur.select("spy", spy, needs=frozenset({secateur.SquaredNorm}))
    manifest = secateur.prune(
        source, method=method, pattern=secateur.NM(2, 4), calibration=tiny.tokens(), output=tmp_path / "out"
    )
    for name, entry in manifest.matrices.items():
        both = np.array(entry["scores"]["kept"]) + entry["scores"]["pruned"]
        assert np.abs(both - numpy_counts(seen[name].ravel(), edges(entry["scores"]))).sum() <= 2
