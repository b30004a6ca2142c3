"""Statistics in host memory or on the device: the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import tiny
from secateur.core.gradients import GradientNorm
from secateur.core.gram import CrossGram, Gram
from secateur.core.harmonic import HarmonicNorm
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Problem, chain
from secateur.core.statistics import SquaredNorm
from secateur.errors import CheckpointError
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.sparsegpt import sparsegpt
from secateur.pruning.engine import prune
from second_order import ORDERS, RESIDUAL, assert_close, assert_verified, calibration, every_order


@every_order
def test_statistics_kept_where_they_are_anyway(within: str, targets: str) -> None:
    models = [tiny.build("mixtral"), tiny.build("mixtral")]
    skip = ["*experts*"] if targets == "dense" else []
    for model, device in zip(models, (None, "cpu"), strict=True):
        prune(
            model,
            method=sparsegpt(),
            calibration=calibration(),
            statistics_device=device,
            skip=skip,
            within=within,
            targets=targets,
        )
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", [SquaredNorm, HarmonicNorm, Gram, CrossGram])
def test_statistics_elsewhere_take_the_sums_there(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without content, but with devices, which refuse to meet as on a machine that has both."""
    monkeypatch.setattr("secateur.core.gram._longest", lambda x: 1.0)  # of tensors that have a content
    with FakeTensorMode():
        x = torch.empty(600, 8)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.zeros(8, device="cuda").add_(x[0])
        statistic = kind.empty(8, "cuda")
        statistic.update(x, 1, **({"dense": x} if kind is CrossGram else {}))
        if kind in (Gram, CrossGram):  # whose total is made of integers, which these tensors cannot show
            sums = statistic._products._sum._sums
            assert {part.device.type for own in sums for part in own.parts} == {"cuda"}
        else:
            assert statistic.total.device.type == "cuda"
        assert (statistic.tokens, statistic.samples) == (600, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*METHODS, *(f"wanda+{name}" for name in REFINEMENTS)])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("statistics_on", ["cuda", "cpu"])
def test_every_method_gives_the_same_on_a_gpu(name: str, pattern: Pattern, statistics_on: str) -> None:
    """In float64, statistics beside the weights or in host memory, against the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((48, 640), (900, 640)))
    first, _, refinement = name.partition("+")
    method = chain(METHODS[first](), REFINEMENTS[refinement]()) if refinement else METHODS[first]()
    solutions = []
    for device, kept_on in (("cpu", "cpu"), ("cuda", statistics_on)):
        taken: dict[Any, Any] = {}
        for kind in method.inputs | {Gram}:
            taken[kind] = kind.empty(640, kept_on)
            taken[kind].update(x.to(device), 4)
        if method.gradient is not None:
            total = torch.randn(48, 640, generator=torch.Generator().manual_seed(1), dtype=torch.float64).abs()
            taken[method.gradient] = GradientNorm(method.gradient, total.to(device), 900, 4)
        solutions.append(method.solve(Problem("w", weight.to(device), pattern, taken)))
    one, other = solutions
    assert other.weight.device.type == other.mask.device.type == "cuda"
    assert torch.equal(one.mask, other.mask.cpu())
    torch.testing.assert_close(one.weight, other.weight.cpu(), rtol=1e-9, atol=1e-9)


def test_a_device_for_statistics_that_is_none(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    with pytest.raises(CheckpointError, match=r'^device "nowhere" cannot be used here'):
        prune(
            source,
            method=sparsegpt(),
            calibration=calibration(),
            statistics_device="nowhere",
            output=tmp_path / "out",
        )
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("within", "targets"), [*ORDERS, RESIDUAL])
def test_statistics_in_host_memory_of_a_model_on_the_gpu(within: str, targets: str, tmp_path: Path) -> None:
    x, dense = torch.randn(300, 64, device="cuda"), torch.randn(300, 64, device="cuda")
    for kind, given in ((Gram, {}), (CrossGram, {"dense": dense})):
        here, there = kind.empty(64, "cpu"), kind.empty(64, "cuda")
        for part in (slice(0, 100), slice(100, 300)):
            for statistic in (here, there):
                statistic.update(x[part], **{name: value[part] for name, value in given.items()})
        assert here.total.device.type == "cpu"
        assert_close(here.total, there.total.cpu(), kind.__name__)

    source = tiny.save("llama", tmp_path / "source")
    results = {}
    for place, device in (("gpu", None), ("host", "cpu")):
        manifest = prune(
            source,
            method=sparsegpt(),
            calibration=calibration(),
            device="cuda",
            statistics_device=device,
            within=within,
            targets=targets,
            output=tmp_path / place,
        )
        assert_verified(tmp_path / place, source, manifest)
        results[place] = load_file(tmp_path / place / "model.safetensors")
    one, two = results["gpu"], results["host"]
    for name in manifest.matrices:
        assert float(((one[name] != 0) == (two[name] != 0)).double().mean()) > 0.98, name
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(one[first], two[first], rtol=1e-3, atol=1e-5)
