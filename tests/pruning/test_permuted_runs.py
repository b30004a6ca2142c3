"""Channels that change places: the same function in another order, found in every architecture."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from pruned_checkpoints import load, read_tensors
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.gram import CrossGram, Gram
from secateur.core.needs import Drift
from secateur.core.patterns import NM
from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError
from secateur.files.checkpoint import Checkpoint
from secateur.pruning.engine import prune
from secateur.record.manifest import Manifest, cautions, order_line
from secateur.record.reordered import orders_of, reordered, restored
from secateur.record.verify import verify
from verified_runs import edit, forge

pytest.importorskip("scipy")

# Whose inputs can change places, read from the modelling files: what the outputs of other matrices are, one for one,
# but for a factor, a gate or an average over tokens. Fused ones are split by the model.
MOVED: dict[str, set[str]] = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},  # two query heads share the values of one
    "qwen2": {"self_attn.o_proj", "mlp.down_proj"},  # biases of q, k and v
    "gpt2": {"attn.c_proj", "mlp.c_proj"},  # stored (in, out), q, k and v fused, biases everywhere
    "phi3": {"self_attn.o_proj", "mlp.down_proj"},  # q, k and v fused, gate and up fused
    "opt": {"self_attn.out_proj", "fc2"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},  # q, k and v fused head by head
    "gemma2": {"self_attn.o_proj", "mlp.down_proj"},
    "falcon_new": {"self_attention.dense", "mlp.dense_4h_to_h"},  # fused by groups of heads
    "mixtral": {"self_attn.o_proj", "block_sparse_moe.experts.*.w2"},  # one order for each expert
    "gpt_oss": {"self_attn.o_proj", "mlp.experts.down_proj.*"},  # gate and up in turns, with biases; sinks
    "qwen3_next": {"self_attn.o_proj", "mlp.experts.*.down_proj", "mlp.shared_expert.down_proj"},  # attention is gated
    "deepseek_v3": {
        "self_attn.o_proj",
        "mlp.down_proj",
        "mlp.experts.*.down_proj",
        "mlp.shared_experts.down_proj",
    },
    "llama4_text": {
        "self_attn.o_proj",
        "feed_forward.down_proj",
        "feed_forward.experts.down_proj.*",
        "feed_forward.shared_expert.down_proj",
    },
    "bitnet": set(),  # norms come between
    "mamba": set(),  # every channel has a convolution of its own
}
FAST = ("llama", "qwen2", "gpt2", "phi3", "opt", "gpt_neox", "gemma2", "falcon_new", "mixtral", "gpt_oss", "bitnet")
REST = [name for name in tiny.ARCHITECTURES if name not in MOVED]
OTHERS = ("hrm_text", "gemma3n_text")  # not block by block; with a width that 4 does not divide


def permuted(name: str, folder: Path, **options: Any) -> tuple[Path, Path, Manifest]:
    """A model's folder, that of the pruned one, and its manifest."""
    source, out = tiny.save(name, folder / "source"), folder / "out"
    options = {"method": "wanda", "pattern": "2:4", "calibration": tiny.tokens(), "unseen": "magnitude", **options}
    return source, out, prune(source, output=out, permute=True, **options)


def in_order(source: Path, manifest: Manifest, folder: Path) -> Path:
    """The dense model in the order of channels that a manifest records."""
    tensors = load_file(source / "model.safetensors")
    moved = {name: reordered(own, orders_of(manifest.reordered, name, own.shape)) for name, own in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: own.contiguous() for name, own in moved.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(tiny.tokens(seed=7), use_cache=False).logits


def check(source: Path, out: Path, manifest: Manifest, folder: Path) -> set[str]:
    """Check that the order alone changes nothing and that all is recorded; returns what has moved, by its kind."""
    dense, other = logits(source), logits(in_order(source, manifest, folder / "order"))
    assert float((other - dense).abs().max()) <= 1e-5 * float(dense.abs().max())
    result = verify(out, Checkpoint(source))
    assert (result.problems, result.changed) == ([], 0)
    moved = {name: entry for name, entry in manifest.matrices.items() if "kept_scores" in entry}
    assert all(entry["kept_scores"]["after"] > entry["kept_scores"]["before"] for entry in moved.values())
    tensors = {} if manifest.reordered is None else manifest.reordered["tensors"]
    assert result.reordered == len(tensors)
    assert {entry["tensor"] for entry in moved.values()} <= tensors.keys()
    kinds = (re.sub(r"^.*?\.(layers|h|decoder\.layers|blocks)\.\*\.", "", entry["kind"]) for entry in moved.values())
    return {re.sub(r"\.weight(?=$|\.)", "", kind) for kind in kinds}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in MOVED])
def test_a_permuted_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    source, out, manifest = permuted(name, tmp_path)
    assert check(source, out, manifest, tmp_path) == MOVED[name]
    if not MOVED[name]:
        assert any(said.startswith("No inputs have changed places") for said in cautions(manifest))
        return
    said = order_line(manifest)
    assert said is not None
    assert said in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REST if name not in OTHERS])
def test_every_other_architecture(name: str, tmp_path: Path) -> None:
    check(*permuted(name, tmp_path), tmp_path)


@pytest.mark.parametrize("within", ["block", "site"])
@torch.no_grad()
def test_what_is_written_is_what_the_samples_ran_through(within: str, tmp_path: Path) -> None:
    """In the order it came with, the pruned model is the same; a module in memory becomes what a folder becomes."""
    options: dict[str, Any] = {"within": within, "method": "sparsegpt"}
    _, out, manifest = permuted("qwen2", tmp_path, **options)
    pruned = load(out)
    back = {
        name: restored(own, orders_of(manifest.reordered, name, own.shape)) for name, own in read_tensors(out).items()
    }
    model = tiny.build("qwen2")
    model.load_state_dict(back, strict=False)
    ids = tiny.tokens(seed=3)
    before, after = model(ids).logits, pruned(ids).logits
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    module = tiny.build("qwen2")
    prune(module, pattern="2:4", calibration=tiny.tokens(), unseen="magnitude", permute=True, **options)
    state = pruned.state_dict()
    assert all(torch.equal(own, state[name]) for name, own in module.state_dict().items())


def test_the_shares_of_scores_are_those_of_the_files(tmp_path: Path) -> None:
    source, out, manifest = permuted("phi3", tmp_path, method="magnitude", calibration=None)
    dense, pruned = read_tensors(source), read_tensors(out)
    moved = {name: entry["kept_scores"] for name, entry in manifest.matrices.items() if "kept_scores" in entry}
    assert len(moved) == 6
    for name, kept in moved.items():
        size = dense[name].abs()
        in_place = NM(2, 4).mask(size)
        assert kept["before"] == pytest.approx(float(size[in_place].sum() / size.sum()), rel=1e-5)
        assert kept["after"] == pytest.approx(float(pruned[name].abs().sum() / size.sum()), rel=1e-5)


def test_all_that_is_known_of_a_matrix_takes_its_order() -> None:
    x, y, weight = torch.randn(40, 12), torch.randn(40, 12), torch.randn(6, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def evidence(x: Tensor, y: Tensor, columns: Tensor) -> dict[Any, Any]:
        norm, gram, cross = SquaredNorm.empty(12), Gram.empty(12), CrossGram.empty(12)
        norm.update(x, 2)
        gram.update(x, 2)
        cross.update(x, 2, dense=y)
        kind = GradientKind()
        gradients = GradientNorm(kind, weight.square()[:, columns], 40, 2)
        return {
            SquaredNorm: norm,
            Gram: gram,
            CrossGram: cross,
            kind: gradients,
            Drift(0.5): weight.abs()[:, columns],
        }

    whole = torch.arange(12)
    found = Problem("m", weight, NM(2, 4), evidence(x, y, whole)).reordered(order)
    expected = Problem("m", weight[:, order], NM(2, 4), evidence(x[:, order], y[:, order], order))
    assert torch.equal(found.weight, expected.weight)
    for need, own in expected.evidence.items():
        total, other = (getattr(value, "total", value) for value in (own, found.evidence[need]))
        torch.testing.assert_close(other, total)
        assert getattr(own, "samples", None) == getattr(found.evidence[need], "samples", None)


def test_orders_that_would_change_the_model_are_not_taken(tmp_path: Path) -> None:
    """In doge the values decide, beside the output, how much each token is attended to: both read them."""
    source, out, manifest = permuted("doge", tmp_path)
    assert check(source, out, manifest, tmp_path) == {"mlp.down_proj"}
    refused = [name for block in manifest.blocks for name in block["not_reordered"]]
    assert {name.rpartition("self_attn.")[2] for name in refused} == {"o_proj.weight", "dt_proj.weight"}
    (said,) = (said for said in cautions(manifest) if "keep their places" in said)
    assert f"The inputs of {len(refused)} matrices" in said
    assert "would not be the same numbers" in said


def test_verify_undoes_no_more_than_is_recorded(tmp_path: Path) -> None:
    source, out, manifest = permuted("llama", tmp_path, only=["*.layers.1.mlp.down_proj*"])
    gate, up, down = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    assert manifest.reordered is not None
    assert manifest.reordered["tensors"].keys() == {gate, up, down}  # the first two are not pruned
    dense = Checkpoint(source)
    assert verify(out, dense).ok

    def swap(tensor: Tensor) -> None:
        tensor[[0, 1]] = tensor[[1, 0]]

    edit(out, gate, swap)
    forge(out)
    assert verify(out, dense).problems == [
        f"{gate}: not planned, yet its bytes differ from the source in the recorded order"
    ]
    edit(out, gate, swap)
    key = manifest.reordered["tensors"][down][0]["columns"]

    def repeated(forged: Manifest) -> None:
        assert forged.reordered is not None
        forged.reordered["orders"][key] = "AAAA" + forged.reordered["orders"][key][4:]

    forge(out, repeated)
    assert verify(out, dense).problems == [
        f"{name}: the recorded order of its 48 {side} does not name each of them once"
        for name, side in ((down, "columns"), (gate, "rows"), (up, "rows"))
    ]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = tiny.build("llama"), {"calibration": tiny.tokens(), "permute": True}
    with pytest.raises(PatternError, match=r"^--permute: is for N:M patterns, and the plan has 0.5 unstructured"):
        prune(model, **options)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        PatternError, match=r'needs SciPy, which is not installed. Run: pip install "secateur\[permute\]"'
    ):
        prune(model, pattern="2:4", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trial_sees_a_bias_that_was_not_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that stays where it was would be added to other channels."""
    options: dict[str, Any] = {"pattern": "2:4", "only": ["*.o_proj*"], "calibration": tiny.tokens(), "permute": True}
    manifest = prune(tiny.build("qwen2", dtype=dtype), **options)
    assert manifest.reordered is not None
    assert any(name.endswith("v_proj.bias") for name in manifest.reordered["tensors"])
    monkeypatch.setattr("secateur.pruning.reordering.biases_of", lambda *arguments: [])
    manifest = prune(tiny.build("qwen2", dtype=dtype), **options)
    assert manifest.reordered is None
    assert len([why for block in manifest.blocks for why in block["not_reordered"].values()]) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gblm"},
        {"packed": True},
        {"propagate": "dense"},
        {"method": "sparsegpt+least_squares", "targets": "dense"},
        {"method": "alps", "within": "site", "targets": "residual"},
    ],
    ids=str,
)
def test_every_kind_of_run_takes_orders(options: dict[str, Any], tmp_path: Path) -> None:
    source, out, manifest = permuted("llama", tmp_path, calibration=tiny.tokens(8, 32), **options)
    result = verify(out, Checkpoint(source))
    updates = manifest.method.startswith(("sparsegpt", "alps"))
    assert (result.problems, result.changed) == ([], 21 if updates else 0)
    assert result.reordered == 15
    assert sum("kept_scores" in entry for entry in manifest.matrices.values()) == 6
