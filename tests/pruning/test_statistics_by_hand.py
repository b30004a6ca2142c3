"""Statistics of experts and of transposed matrices, against computations by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import tiny
from pruned_checkpoints import (
    LENGTH,
    PATTERNS,
    SAMPLES,
    calibration,
    load,
    moe_inputs,
    read_tensors,
    recording,
    squares,
)
from secateur.core.patterns import NM
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune


def wanda_masks(weight: Tensor, total: Tensor, sparsity: float = 0.5) -> Tensor:
    """True at the kept weights of an (out, in) matrix, by hand."""
    score = weight.abs() * total.to(weight).sqrt()
    mask = torch.ones_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        mask[row, score[row].argsort(stable=True)[: int(score.shape[1] * sparsity)]] = False
    return mask


def test_mixtral_experts_see_the_tokens_routed_to_them(tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    dense = read_tensors(source)
    taken: dict[str, tuple[Tensor, int, int]] = {}
    ids = calibration()
    manifest = prune(
        source, method=recording(taken), calibration=ids, output=tmp_path / "out", propagate="dense", batch_size=3
    )
    sparse = read_tensors(tmp_path / "out")
    model = load(source)
    for block in range(tiny.BLOCKS):
        x = moe_inputs(model, model.model.layers[block].mlp, ids)
        prefix = f"model.layers.{block}.block_sparse_moe"
        chosen = (x @ dense[f"{prefix}.gate.weight"].t()).softmax(dim=-1).topk(2, dim=-1).indices
        routed_tokens = 0
        for expert in range(4):
            rows = x[(chosen == expert).any(dim=-1)]
            routed_tokens += len(rows)
            w1, w2, w3 = (dense[f"{prefix}.experts.{expert}.w{number}.weight"] for number in (1, 2, 3))
            inner = F.silu(rows @ w1.t()) * (rows @ w3.t())
            for number, inputs, weight in ((1, rows, w1), (3, rows, w3), (2, inner, w2)):
                name = f"{prefix}.experts.{expert}.w{number}.weight"
                total, tokens, samples = taken[name]
                assert samples == SAMPLES
                assert tokens == manifest.matrices[name]["tokens"] == len(rows) > 0
                assert torch.allclose(total, squares(inputs), rtol=1e-4)
                assert torch.equal(sparse[name] != 0, wanda_masks(weight, total))
        assert routed_tokens == 2 * SAMPLES * LENGTH


def test_gpt2_stores_its_matrices_transposed(tmp_path):
    source = tiny.save("gpt2", tmp_path / "source")
    ids = calibration()
    model = load(source)
    dense = read_tensors(source)
    for pattern in PATTERNS.values():
        out = tmp_path / f"out-{pattern.sparsity}-{type(pattern).__name__}"
        prune(source, method=wanda(), pattern=pattern, calibration=ids, output=out)
        sparse = read_tensors(out)
        block = model.transformer.h[0]
        for leaf, module in {"attn.c_attn": block.attn.c_attn, "mlp.c_fc": block.mlp.c_fc}.items():
            name = f"transformer.h.0.{leaf}.weight"
            norm = squares(moe_inputs(model, module, ids)).sqrt()
            score = dense[name].abs() * norm[:, None].float()  # stored (in, out): inputs go down a column
            expected = torch.ones_like(score, dtype=torch.bool)
            for output in range(score.shape[1]):
                column = score[:, output]
                if isinstance(pattern, NM):
                    for start in range(0, 32, 4):
                        expected[start + column[start : start + 4].argsort()[:2], output] = False
                else:
                    expected[column.argsort()[:16], output] = False
            assert dense[name].shape[0] == 32 != dense[name].shape[1]
            assert torch.equal(sparse[name] != 0, expected), name


def test_gpt_oss_experts_are_stored_transposed(tmp_path):
    source, out = tiny.save("gpt_oss", tmp_path / "source"), tmp_path / "out"
    ids = calibration()
    manifest = prune(source, method=wanda(), calibration=ids, output=out)
    dense, sparse, model = read_tensors(source), read_tensors(out), load(source)
    x = moe_inputs(model, model.model.layers[0].mlp, ids)
    prefix = "model.layers.0.mlp"
    logits = x @ dense[f"{prefix}.router.weight"].t() + dense[f"{prefix}.router.bias"]
    chosen = logits.topk(2, dim=-1).indices
    for expert in range(4):
        rows = x[(chosen == expert).any(dim=-1)]
        gate_up_weight = dense[f"{prefix}.experts.gate_up_proj"][expert]  # (in, out)
        gate_up = rows @ gate_up_weight + dense[f"{prefix}.experts.gate_up_proj_bias"][expert]
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        for leaf, inputs in (("gate_up_proj", rows), ("down_proj", inner)):
            name = f"{prefix}.experts.{leaf}"
            expected = wanda_masks(dense[name][expert].t(), squares(inputs)).t()
            assert torch.equal(sparse[name][expert] != 0, expected), (leaf, expert)
            entry = manifest.matrices[f"{name}.{expert}"]
            assert entry["tokens"] == len(rows)
            assert entry["shape"] == [dense[name].shape[2], dense[name].shape[1]]


def test_llama4_experts_are_stored_transposed_and_see_scaled_tokens(tmp_path):
    source, out = tiny.save("llama4_text", tmp_path / "source"), tmp_path / "out"
    ids = calibration()
    manifest = prune(source, method=wanda(), calibration=ids, output=out, only=["*.experts.*"])
    dense, sparse, model = read_tensors(source), read_tensors(out), load(source)
    x = moe_inputs(model, model.model.layers[1].feed_forward, ids)  # the only mixture; block 0 is not planned
    prefix = "model.layers.1.feed_forward"
    logits = x @ dense[f"{prefix}.router.weight"].t()
    chosen = logits.topk(2, dim=-1).indices
    assert len(manifest.matrices) == 8
    for expert in range(4):
        routed = (chosen == expert).any(dim=-1)
        rows = x[routed] * torch.sigmoid(logits[routed, expert, None])
        gate, up = (rows @ dense[f"{prefix}.experts.gate_up_proj"][expert]).chunk(2, dim=-1)
        for leaf, inputs in (("gate_up_proj", rows), ("down_proj", up * F.silu(gate))):
            name = f"{prefix}.experts.{leaf}"
            expected = wanda_masks(dense[name][expert].t(), squares(inputs)).t()
            assert torch.equal(sparse[name][expert] != 0, expected), (leaf, expert)
            assert manifest.matrices[f"{name}.{expert}"]["tokens"] == len(rows)
