"""The engine against the published loops of Wanda and magnitude pruning, transcribed on their own.

Transcribed from a description of the published code: one sample at a time, running means in float32, forward hooks
on every `nn.Linear` of a block, weights zeroed in place, and the pruned block run once more for the next one's inputs.
Nothing of Secateur is used in the transcription.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tiny
from secateur.collect.gradient_pass import gradients as gradients_to
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method
from secateur.methods.gblm import gblm
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda, wanda_variant
from secateur.pruning.engine import prune

ROOT = Path(__file__).resolve().parents[2]
DATA = next((folder for folder in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data") if folder.is_dir()), None)


# The published loops


class WrappedLayer:
    """Mean over samples of the sum of squares of each input coordinate, updated sample by sample."""

    def __init__(self, layer: nn.Linear) -> None:
        self.scaler_row = torch.zeros(layer.weight.shape[1])
        self.nsamples = 0

    def add_batch(self, inp: Tensor) -> None:
        if inp.dim() == 2:
            inp = inp.unsqueeze(0)
        added = inp.shape[0]
        inp = inp.reshape(-1, inp.shape[-1]).t()
        self.scaler_row *= self.nsamples / (self.nsamples + added)
        self.nsamples += added
        self.scaler_row += torch.norm(inp.float(), p=2, dim=1) ** 2 / self.nsamples


def find_layers(module: nn.Module, skip: str | None = None) -> dict[str, nn.Linear]:
    named = module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, nn.Linear) and name.split(".")[-1] != skip}


class CaughtError(Exception):
    pass


class Catcher(nn.Module):
    """Stands in for block 0: keeps its inputs, and the arguments of the last sample."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], cache: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.inputs, self.cache = module, inputs, cache

    def forward(self, inp: Tensor, **kwargs: Any) -> None:
        self.inputs.append(inp)
        self.cache.update(kwargs)
        raise CaughtError


def return_given_alpha(alpha: float, sorted_metric: Tensor, metric: Tensor, sums: Tensor, total: Tensor) -> Any:
    threshold_cumsum = total * alpha
    under = sums <= threshold_cumsum.reshape((-1, 1))
    counts = under.sum(dim=1, keepdim=True) - 1
    threshold = torch.gather(sorted_metric, dim=1, index=counts)
    mask = metric <= threshold
    return mask, float((mask == True).sum()) / mask.numel()  # noqa: E712


def wanda_mask(metric: Tensor, ratio: float, n: int, m: int, variant: bool) -> Tensor:
    """True at the weights to remove."""
    mask = torch.zeros_like(metric) == 1
    if n != 0:
        for column in range(metric.shape[1]):
            if column % m == 0:
                part = metric[:, column : column + m].float()
                mask.scatter_(1, column + torch.topk(part, n, dim=1, largest=False)[1], True)
        return mask
    sorted_metric, order = torch.sort(metric, dim=-1, stable=True)
    if not variant:
        return mask.scatter_(1, order[:, : int(metric.shape[1] * ratio)], True)
    sums, total = torch.cumsum(sorted_metric, dim=1), metric.sum(dim=1)
    alpha, bounds = 0.4, [0.0, 0.8]
    mask, achieved = return_given_alpha(alpha, sorted_metric, metric, sums, total)
    while (torch.abs(torch.tensor(achieved - ratio)) > 0.001) and (bounds[1] - bounds[0] >= 0.001):
        if achieved > ratio:
            bounds, alpha = [bounds[0], alpha], (alpha + bounds[0]) / 2.0
        else:
            bounds, alpha = [alpha, bounds[1]], (alpha + bounds[1]) / 2.0
        mask, achieved = return_given_alpha(alpha, sorted_metric, metric, sums, total)
    return mask


@torch.no_grad()
def published_wanda(
    model: PreTrainedModel,
    samples: Tensor,
    *,
    ratio: float = 0.5,
    n: int = 0,
    m: int = 0,
    variant: bool = False,
    skip: str | None = None,
) -> None:
    layers = model.model.layers
    inputs: list[Tensor] = []
    cache: dict[str, Any] = {}
    first = layers[0]
    layers[0] = Catcher(first, inputs, cache)
    for sample in samples:
        try:
            model(sample.unsqueeze(0), use_cache=False)
        except CaughtError:
            continue
    layers[0] = first
    for layer in layers:
        subset = find_layers(layer, skip)
        wrapped = {name: WrappedLayer(linear) for name, linear in subset.items()}
        handles = [
            linear.register_forward_hook(lambda _, inp, out, into=wrapped[name]: into.add_batch(inp[0]))
            for name, linear in subset.items()
        ]
        for inp in inputs:
            layer(inp, **cache)
        for handle in handles:
            handle.remove()
        for name, linear in subset.items():
            metric = linear.weight.data.abs() * torch.sqrt(wrapped[name].scaler_row.reshape((1, -1)))
            linear.weight.data[wanda_mask(metric, ratio, n, m, variant)] = 0
        outputs = [layer(inp, **cache) for inp in inputs]
        inputs = [output if isinstance(output, Tensor) else output[0] for output in outputs]


@torch.no_grad()
def published_magnitude(
    model: PreTrainedModel, *, ratio: float = 0.5, n: int = 0, m: int = 0, skip: str | None = None
) -> dict[str, Tensor]:
    """Prune in place; returns what the published threshold would have removed ("<=": one weight more, and all ties)."""
    literal: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for name, linear in find_layers(layer, skip).items():
            metric = linear.weight.data.abs()
            if n != 0:
                mask = torch.zeros_like(metric) == 1
                for column in range(0, metric.shape[1], m):
                    part = metric[:, column : column + m].float()
                    mask.scatter_(1, column + torch.topk(part, n, dim=1, largest=False)[1], True)
            else:
                count = int(metric.numel() * ratio)
                flat, order = torch.sort(metric.flatten(), stable=True)
                literal[f"model.layers.{index}.{name}.weight"] = metric <= flat[count]
                # Paper: the published code removes `metric <= flat[count]`; here exactly `count` go.
                mask = (torch.zeros(metric.numel()) == 1).scatter(0, order[:count], True).view_as(metric)
            linear.weight.data[mask] = 0
    return literal


# The comparison


def stories_windows(samples: int, length: int) -> Tensor:
    """Windows of real stories, one after the other."""
    assert DATA is not None
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "stories260K")
    text = (DATA / "lm" / "tinystories_sample.txt").read_text()[:400_000]
    ids: list[int] = []
    for story in text.split("<|endoftext|>"):
        ids += tokenizer(story.strip())["input_ids"]
        if len(ids) >= samples * length:
            break
    return torch.tensor(ids[: samples * length]).view(samples, length)


@pytest.fixture(scope="module", params=["tiny", "stories260K"])
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """(folder of a model, calibration windows): random weights and tokens, or trained ones and real text."""
    if request.param == "tiny":
        folder = tiny.save("llama", tmp_path_factory.mktemp("published") / "llama")
        return folder, tiny.tokens(samples=12, length=40)
    if DATA is None or not (DATA / "models" / "stories260K" / "model.safetensors").exists():
        pytest.skip("shared/data/models/stories260K is not there")
    if not (DATA / "lm" / "tinystories_sample.txt").exists():
        pytest.skip("shared/data/lm/tinystories_sample.txt is not there")
    return DATA / "models" / "stories260K", stories_windows(samples=8, length=128)


def undividable(folder: Path, pattern: Pattern) -> str | None:
    """The kind of matrix whose width the pattern does not divide: the down projections of stories260K, 172 wide."""
    if not isinstance(pattern, NM):
        return None
    with safe_open(folder / "model.safetensors", "pt") as file:
        width = file.get_slice("model.layers.0.mlp.down_proj.weight").get_shape()[1]
    return "down_proj" if width % pattern.m else None


def compare(folder: Path, out: Path, reference: PreTrainedModel, planned: int, skip: str | None = None) -> None:
    """Bit-equal weights, hence bit-equal masks, of every matrix of every block."""
    got = load_file(out / "model.safetensors")
    names = [
        f"model.layers.{index}.{name}.weight"
        for index, layer in enumerate(reference.model.layers)
        for name in find_layers(layer, skip)
    ]
    assert len(names) == planned == (7 if skip is None else 6) * len(reference.model.layers)
    state = reference.state_dict()
    different = {name: int((got[name] != state[name]).sum()) for name in names}
    assert not any(different.values()), {name: count for name, count in different.items() if count}
    dense = load_file(folder / "model.safetensors")
    assert all((got[name] == 0).sum() > (dense[name] == 0).sum() for name in names)


def check(
    material: tuple[Path, Tensor], out: Path, method: Method, pattern: Pattern, published: dict[str, Any], batch: int
) -> PreTrainedModel:
    folder, windows = material
    skip = undividable(folder, pattern)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    published_wanda(reference, windows, skip=skip, **published)
    manifest = prune(
        folder,
        method=method,
        pattern=pattern,
        calibration=windows,
        batch_size=batch,
        skip=[f"*.{skip}"] if skip else [],
        output=out,
    )
    compare(folder, out, reference, len(manifest.matrices), skip)
    return reference


@tiny.pairs_by_turns(
    "pattern, published, batch",
    [
        (Unstructured(0.5), {"ratio": 0.5}),
        (Unstructured(0.6), {"ratio": 0.6}),
        (NM(2, 4), {"n": 2, "m": 4}),
        (NM(4, 8), {"n": 4, "m": 8}),
    ],
    [1, 4],
)
def test_wanda(material, pattern, published, batch, tmp_path):
    check(material, tmp_path / "out", wanda(), pattern, published, batch)


@tiny.pairs_by_turns("sparsity, batch", [0.5, 0.6], [1, 4])
def test_wanda_variant(material, sparsity, batch, tmp_path):
    published = {"ratio": sparsity, "variant": True}
    reference = check(material, tmp_path / "out", wanda_variant(), Unstructured(sparsity), published, batch)
    zeros = {name: (layer.weight == 0).sum(dim=1) for name, layer in find_layers(reference.model.layers[0]).items()}
    assert all(int(rows.max()) > int(rows.min()) for rows in zeros.values()), "rows differ in sparsity"


def test_wanda_variant_is_wanda_with_other_rows(material, tmp_path):
    folder, windows = material
    for name, method in {"plain": wanda(), "variant": wanda_variant()}.items():
        prune(folder, method=method, calibration=windows, output=tmp_path / name)
    plain, variant = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "variant"))
    assert any(not torch.equal(plain[name], variant[name]) for name in plain)


@pytest.mark.parametrize(
    ("pattern", "published"),
    [(Unstructured(0.5), {"ratio": 0.5}), (NM(2, 4), {"n": 2, "m": 4}), (NM(4, 8), {"n": 4, "m": 8})],
    ids=["0.5", "2:4", "4:8"],
)
def test_magnitude(material, pattern, published, tmp_path):
    folder, _ = material
    skip = undividable(folder, pattern)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    literal = published_magnitude(reference, skip=skip, **published)
    skipped = [f"*.{skip}"] if skip else []
    manifest = prune(folder, method=magnitude(), pattern=pattern, skip=skipped, output=tmp_path / "out")
    compare(folder, tmp_path / "out", reference, len(manifest.matrices), skip)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, removed in literal.items():
        assert bool(removed[got[name] == 0].all()), "the published rule removes all of ours"
        assert int(removed.sum()) > int((got[name] == 0).sum()), "and at least one more"


def test_propagation_through_pruned_blocks_is_what_was_published(material, tmp_path):
    """The comparison can tell: with dense propagation, later blocks come out differently."""
    folder, windows = material
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    published_wanda(reference, windows)
    prune(folder, method=wanda(), calibration=windows, propagate="dense", output=tmp_path / "out")
    got, state = load_file(tmp_path / "out" / "model.safetensors"), reference.state_dict()
    differ = {name for name in got if name in state and not torch.equal(got[name], state[name])}
    assert differ
    assert not any(name.startswith("model.layers.0.") for name in differ)


# GBLM-Pruner: gradients of the whole model first, then Wanda's loop with another metric


def published_gradients(model: PreTrainedModel, samples: Tensor, norm: str, scale: float = 100.0) -> dict[str, Tensor]:
    """The gradient file of the published code: `scale` times every gradient, its norm over samples, in float32.

    Paper: the published code loads the model in float16 and adds |g| up in float16.
    """
    model.train()
    layers = model.model.layers
    linears = {
        f"{index}.{name}": linear for index, layer in enumerate(layers) for name, linear in find_layers(layer).items()
    }
    gradients = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01)
    optimizer.zero_grad()
    for sample in samples:
        outputs = model(input_ids=sample.unsqueeze(0), labels=sample.unsqueeze(0))
        outputs.loss.backward()
        for name, linear in linears.items():
            assert linear.weight.requires_grad
            gradient = linear.weight.grad.detach().clone().to(torch.float32) * scale
            gradients[name] = gradients[name] + (torch.abs(gradient) if norm == "l1" else gradient**2)
        optimizer.zero_grad()
    if norm == "l2":
        gradients = {name: torch.sqrt(total) for name, total in gradients.items()}
    model.eval()
    return gradients


@pytest.fixture(scope="module")
def found_gradients(material: tuple[Path, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Those of both norms."""
    folder, windows = material
    return {
        norm: published_gradients(AutoModelForCausalLM.from_pretrained(folder), windows, norm) for norm in ("l1", "l2")
    }


@torch.no_grad()
def published_gblm(
    model: PreTrainedModel,
    samples: Tensor,
    gradients: dict[str, Tensor],
    *,
    ratio: float = 0.5,
    n: int = 0,
    m: int = 0,
    skip: str | None = None,
) -> None:
    layers = model.model.layers
    inputs: list[Tensor] = []
    cache: dict[str, Any] = {}
    first = layers[0]
    layers[0] = Catcher(first, inputs, cache)
    for sample in samples:
        try:
            model(sample.unsqueeze(0), use_cache=False)
        except CaughtError:
            continue
    layers[0] = first
    for index, layer in enumerate(layers):
        subset = find_layers(layer, skip)
        wrapped = {name: WrappedLayer(linear) for name, linear in subset.items()}
        handles = [
            linear.register_forward_hook(lambda _, inp, out, into=wrapped[name]: into.add_batch(inp[0]))
            for name, linear in subset.items()
        ]
        for inp in inputs:
            layer(inp, **cache)
        for handle in handles:
            handle.remove()
        for name, linear in subset.items():
            metric = torch.abs(linear.weight.data) * torch.sqrt(wrapped[name].scaler_row.reshape((1, -1)))
            metric_of_gradient = torch.abs(linear.weight.data) * torch.abs(gradients[f"{index}.{name}"])
            metric = metric + metric_of_gradient
            linear.weight.data[wanda_mask(metric, ratio, n, m, variant=False)] = 0
        outputs = [layer(inp, **cache) for inp in inputs]
        inputs = [output if isinstance(output, Tensor) else output[0] for output in outputs]


@tiny.pairs_by_turns(
    "pattern, published, norm",
    [(Unstructured(0.5), {"ratio": 0.5}), (NM(2, 4), {"n": 2, "m": 4}), (NM(4, 8), {"n": 4, "m": 8})],
    ["l1", "l2"],
)
def test_gblm(material, found_gradients, pattern, norm, published, tmp_path):
    folder, windows = material
    skip = undividable(folder, pattern)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    published_gblm(reference, windows, found_gradients[norm], skip=skip, **published)
    manifest = prune(
        folder,
        method=gblm(norm),
        pattern=pattern,
        calibration=windows,
        skip=[f"*.{skip}"] if skip else [],
        output=tmp_path / "out",
    )
    compare(folder, tmp_path / "out", reference, len(manifest.matrices), skip)


def test_gblm_is_not_wanda(material, tmp_path):
    """The comparison can tell: without its gradients, and with the other norm's, the weights are others."""
    folder, windows = material
    file = gradients_to(folder, tmp_path / "gradients", norms=["l1", "l2"], calibration=windows)
    for name, method in {"wanda": wanda(), "l1": gblm("l1"), "l2": gblm("l2")}.items():
        given = file.path if method.gradient else None
        prune(folder, method=method, calibration=windows, gradient=given, output=tmp_path / name)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("wanda", "l1", "l2")]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert any(not torch.equal(weights[one][name], weights[two][name]) for name in weights[0])
