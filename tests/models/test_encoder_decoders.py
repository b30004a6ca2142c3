"""Encoders and decoders in one model: two stacks, streamed one after the other, exactly, and pruned in that order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
import tiny
from plain_forwards import as_transformers_loads_it, block_outputs, streamed
from secateur.calibration.windows import Windows
from secateur.errors import CalibrationError, ModelStructureError
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import open_model
from secateur.record.verify import verify
from secateur.report.inspect import inspect

NOT_STREAMED = {"pegasus_x"}  # its encoder's blocks hand on a second stream, that of global tokens
NOT_PRUNED = NOT_STREAMED | {"longt5_global"}  # which multiplies k with q's input, and then with that of global tokens
# Experts that few tokens reach, and projections of global tokens, of which a window has none.
NEVER_SEEN = {"switch_transformers": "*experts*", "nllb-moe": "*experts*", "led": "*_global*"}
STARTS = {"t5": 0, "bart": 2, "marian": 2}


def halves(model: Any, ids: Tensor) -> dict[str, Any]:
    """The first half to the encoder; the rest to the decoder, behind the token that it starts with."""
    encoded = ids.shape[1] // 2
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.config.bos_token_id if start is None else start
    decoded = torch.cat([torch.full((len(ids), 1), start), ids[:, encoded:-1]], dim=1)
    return {"input_ids": ids[:, :encoded], "decoder_input_ids": decoded, "use_cache": False}


@tiny.by_turns([name for name in tiny.ENCODER_DECODERS if name not in NOT_STREAMED], 0)
def test_replay_is_the_forward_with_one_block_in_memory(name: str, tmp_path: Path) -> None:
    skeleton = open_model(tiny.save(name, tmp_path / "model")).skeleton
    model, ids = as_transformers_loads_it(tmp_path / "model"), tiny.tokens(samples=3, length=25)
    assert type(skeleton.model) is type(model)
    assert [len(stack.blocks) for stack in skeleton.stacks] == [tiny.BLOCKS, 2]
    batches = [ids[:2], ids[2:, :18]]
    paths = [block.path for block in skeleton.blocks]
    expected = [block_outputs(model, paths, **halves(model, batch)) for batch in batches]
    for block, batch, output in streamed(skeleton, batches):
        own = expected[batch][block.index]
        assert float((output - own).norm()) <= 1e-6 * float(own.norm()), block.path


@tiny.by_turns([name for name in tiny.ENCODER_DECODERS if name not in NOT_PRUNED], 1, of=12)
def test_prune_verify_inspect_and_plan(name: str, tmp_path: Path) -> None:
    source, out = tiny.save(name, tmp_path / "model"), tmp_path / "out"
    settings: dict[str, Any] = {"method": "wanda", "calibration": tiny.tokens(samples=6, length=24)}
    settings |= {"skip": NEVER_SEEN[name]} if name in NEVER_SEEN else {}
    planned = secateur.estimate(source, **settings)
    manifest = secateur.prune(source, output=out, **settings)
    assert set(planned.plan) == set(manifest.matrices)
    assert {entry["sparsity"] for entry in manifest.matrices.values()} == {0.5}
    assert [row["index"] for row in manifest.blocks] == list(range(tiny.BLOCKS + 2))
    report = verify(out, Checkpoint(source))
    assert report.ok, report.problems
    assert inspect(out).sparsity > 0.2
    kind = type(as_transformers_loads_it(out)).__name__
    assert f'\nmodel = {kind}.from_pretrained("out")\n' in (out / "README.md").read_text()


def wanda_by_hooks(model: nn.Module, stacks: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Masks of Wanda at half of each row, written down anew: block by block, on the model as it is.

    Score |W_ij| times the norm of input j over all tokens; in each row the lower half goes.
    """
    masks: dict[str, Tensor] = {}
    for path, block in ((f"{stack}.{n}", own) for stack in stacks for n, own in enumerate(model.get_submodule(stack))):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        sums = {name: torch.zeros(module.in_features) for name, module in linears.items()}

        def add(module: nn.Module, args: tuple[Tensor], total: Tensor) -> None:
            total += args[0].flatten(0, -2).square().sum(0)

        handles = [module.register_forward_pre_hook(partial(add, total=sums[name])) for name, module in linears.items()]
        for batch in batches:
            model(**halves(model, batch))
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            score = module.weight.abs() * sums[name].sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : module.in_features // 2]
            mask = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
            module.weight.mul_(mask)
            masks[f"{path}.{name}.weight"] = mask
    return masks


@pytest.mark.parametrize(
    ("name", "stacks"),
    [("t5", ["encoder.block", "decoder.block"]), ("bart", ["model.encoder.layers", "model.decoder.layers"])],
)
def test_masks_are_those_of_hooks_on_the_plain_model(name: str, stacks: list[str], tmp_path: Path) -> None:
    """The decoder sees the outputs of the pruned encoder. Samples have two lengths: padding runs through no model."""
    source, ids = tiny.save(name, tmp_path / name), tiny.tokens(samples=6, length=16)
    mask = torch.ones_like(ids)
    mask[4:, 9:] = 0
    batches = [ids[:2], ids[2:4], ids[4:, :9]]
    settings: dict[str, Any] = {"method": "wanda", "calibration": Windows(ids, {}, mask), "batch_size": 2}
    manifest = secateur.prune(source, output=tmp_path / "out", **settings)
    model = as_transformers_loads_it(source)
    assert model.config.decoder_start_token_id == STARTS[name]
    with torch.no_grad():
        expected = wanda_by_hooks(model, stacks, batches)
    pruned = dict(as_transformers_loads_it(tmp_path / "out").named_parameters())
    assert len(expected) == len(manifest.matrices) == 38
    for matrix, own in expected.items():
        assert torch.equal(pruned[matrix] != 0, own), matrix
    # In the encoder's half 4 x 8 and 2 x 4 tokens, 4 x 8 and 2 x 5 in the decoder's; keys and values read the former.
    read = {name: entry["tokens"] for name, entry in manifest.matrices.items()}
    keys = ".EncDecAttention.k" if name == "t5" else ".encoder_attn.k_proj"
    encoded = {count for matrix, count in read.items() if matrix.startswith(stacks[0]) or keys in matrix}
    decoded = {count for matrix, count in read.items() if matrix.startswith(stacks[1]) and "1.k" not in matrix}
    assert encoded == {40}
    assert decoded == {40, 42}
    again = secateur.prune(as_transformers_loads_it(source), output=tmp_path / "memory", **settings)
    assert again.plan == manifest.plan
    one, other = (as_transformers_loads_it(tmp_path / folder).state_dict() for folder in ("out", "memory"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "sparsegpt", "within": "site"},
        {"method": "sparsegpt", "targets": "dense"},
        {"method": "sparsegpt", "within": "site", "targets": "residual"},
        {"method": "wanda_plus"},
        {"method": "wanda", "pattern": "2:4", "permute": True},
        {"method": "wanda", "propagate": "dense", "only": "decoder.*"},
    ],
    ids=str,
)
def test_other_ways_to_prune(choices: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.save("t5", tmp_path / "model")
    manifest = secateur.prune(source, calibration=tiny.tokens(length=24), output=tmp_path / "out", **choices)
    assert len(manifest.matrices) == (20 if "only" in choices else 38)
    report = verify(tmp_path / "out", Checkpoint(source))
    assert report.ok, report.problems


@torch.no_grad()
def test_agreement_is_over_what_the_decoder_predicts(tmp_path: Path) -> None:
    source, ids = tiny.save("bart", tmp_path / "source"), tiny.tokens(samples=5, length=13)
    secateur.prune(source, method="magnitude", sparsity=0.6, output=tmp_path / "pruned")
    same, other = secateur.agreement(source, [source, tmp_path / "pruned"], ids, batch_size=2)
    dense, pruned = (as_transformers_loads_it(folder) for folder in (source, tmp_path / "pruned"))
    p, q = (model(**halves(model, ids)).logits.double().log_softmax(-1) for model in (dense, pruned))
    assert (same.kl, same.top1, same.tokens, other.tokens) == (0, 1, 35, 35)
    assert other.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    losses = torch.nn.functional.cross_entropy(q.flatten(0, 1), ids[:, 6:].flatten(), reduction="none").view(5, 7)
    assert other.window_nats == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    (states,) = secateur.similarity(source, [tmp_path / "pruned"], ids, batch_size=2)
    last = [model.model(**halves(model, ids)).last_hidden_state.double() for model in (dense, pruned)]
    cosine = torch.nn.functional.cosine_similarity(*last, dim=-1)
    assert states.cosine == pytest.approx(float(cosine.mean()), rel=1e-5)
    assert states.tokens == 35


def test_what_is_for_decoders_alone_is_refused_in_a_sentence(tmp_path: Path) -> None:
    source, ids, out = tiny.save("t5", tmp_path / "model"), tiny.tokens(length=24), tmp_path / "out"
    asked: dict[str, Callable[[], Any]] = {
        "a perplexity": lambda: secateur.perplexity(source, ids),
        "--allocation owl": lambda: secateur.estimate(source, method="wanda", allocation="owl", calibration=ids),
    }
    for wanted, run in asked.items():
        with pytest.raises(ModelStructureError) as caught:
            run()
        assert "T5ForConditionalGeneration: is an encoder-decoder" in str(caught.value)
        assert wanted in str(caught.value)
    with pytest.raises(CalibrationError, match=r"sample 0: has 1 token, expected at least 2: the encoder reads"):
        secateur.prune(source, method="wanda", calibration=ids[:, :1], output=out)
    bart = tiny.save("bart", tmp_path / "bart")
    with pytest.raises(CalibrationError, match=r"windows of 129 tokens, and the model has 128 positions"):
        secateur.prune(bart, method="wanda", calibration=tiny.tokens(length=129), output=out)
    if "pegasus_x" in tiny.ENCODER_DECODERS:
        folder = tiny.save("pegasus_x", tmp_path / "pegasus_x")
        with pytest.raises(ModelStructureError, match=r"model.encoder.layers.0: makes something of its hidden states"):
            secateur.prune(folder, method="wanda", calibration=ids, output=out)
