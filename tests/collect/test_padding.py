"""Padded samples: what a mask leaves out is no part of any figure, statistic, gradient or loss."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
import tiny
from full_autograd import InFloat64
from pruned_blocks import block_outputs, distance, pruned_model
from pruned_checkpoints import bits, read_tensors, recording
from secateur.calibration.windows import Windows
from secateur.collect.gradient_pass import gradients
from secateur.errors import CalibrationError
from secateur.models.opening.opened import open_model
from secateur.record.manifest import read_manifest
from secateur.recover.training import Rows

LENGTHS = [9, 16, 16, 5, 12, 12]  # neighbours of one length run as one batch
NAMES = ["llama", "gpt2", "mixtral", "gemma2", "mamba"]
HALF = secateur.Unstructured(0.5)


def rows() -> list[Tensor]:
    return [row[:length] for row, length in zip(tiny.tokens(len(LENGTHS), max(LENGTHS)), LENGTHS, strict=True)]


def padded(side: str = "right", width: int = 20) -> dict[str, Tensor]:
    """The rows as a tokenizer pads them, with an id that is not in the vocabulary in the place of nothing."""
    ids = torch.full((len(LENGTHS), width), 9999)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for number, row in enumerate(rows()):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, where], mask[number, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def windows(side: str = "right") -> Windows:
    own = padded(side)
    return Windows(own["input_ids"], {"source": "test"}, own["attention_mask"])


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


# Windows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_lies_behind_the_tokens_and_is_as_short_as_can_be(side: str) -> None:
    found = windows(side)
    assert (found.samples, found.length, found.lengths, found.tokens) == (6, 16, LENGTHS, sum(LENGTHS))
    assert found.attention_mask is not None
    assert found.input_ids[~found.attention_mask].unique().tolist() == [0]
    assert [batch.shape for batch in found.batches(2)] == [(1, 9), (2, 16), (1, 5), (2, 12)]
    assert [batch.shape for batch in found.batches(1)] == [(1, length) for length in LENGTHS]
    for got, expected in zip([row for batch in found.batches(2) for row in batch], rows(), strict=True):
        assert torch.equal(got, expected)
    assert found.part(1, 3).attention_mask is None  # both are of 16 tokens
    assert found.part(3, None).shape == {"samples": 3, "length": 12, "shortest": 5, "tokens": 29}


def test_the_digest_is_that_of_the_tokens_alone() -> None:
    assert windows("left").digest == windows("right").digest
    ids = tiny.tokens(4, 10)
    plain = hashlib.sha256(struct.pack("<2q", 4, 10) + ids.numpy().tobytes()).hexdigest()
    assert Windows(ids, {}).digest == Windows(ids, {}, torch.ones_like(ids)).digest == plain
    wide = torch.cat([torch.full((4, 3), 7), ids, torch.full((4, 5), 7)], dim=1)
    mask = torch.tensor([0] * 3 + [1] * 10 + [0] * 5).expand(4, -1)
    assert Windows(wide, {}, mask).digest == plain
    # A zero at the end of a sample is not the padding of a shorter one.
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    shorter = Windows(ids, {}, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert torch.equal(shorter.input_ids, ids)
    assert shorter.digest != Windows(ids, {}).digest


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1]], r"attention_mask: got the shape \(1, 3\), expected that of input_ids, \(2, 3\)\."),
        ([[1, 1, 1], [1, 2, 0]], r"attention_mask: row 1, position 1: got 2, expected 1 at a token or 0 at padding\."),
        ([[1.0, 1, 1], [0.5, 1, 1]], r"attention_mask: row 1, position 0: got 0\.5, expected 1 at a token"),
        ([[1, 1, 1], [0, 0, 0]], r"attention_mask: row 1 is all padding\. Leave it out\."),
        ([[1, 0, 1], [1, 1, 1]], r"attention_mask: row 0, position 1: padding lies between tokens, expected it before"),
    ],
)
def test_masks_that_say_nothing_clear(mask: Any, message: str, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(CalibrationError, match=f"^{message}"):
        Windows(ids, {}, torch.tensor(mask))
    file = tmp_path / "rows.safetensors"
    save_file({"input_ids": ids, "attention_mask": torch.tensor(mask)}, file)
    with pytest.raises(CalibrationError, match=f"^{re.escape(str(file))}: {message}"):
        secateur.calibration_windows(str(file), None)


def test_a_file_of_padded_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    save_file(padded("left"), file)
    found = secateur.calibration_windows(str(file), None, length=20)
    assert found.digest == windows().digest
    shape = {"samples": 6, "length": 16, "shortest": 5, "tokens": sum(LENGTHS)}
    assert {name: found.provenance[name] for name in shape} == shape
    first = secateur.calibration_windows(str(file), None, samples=1)
    assert (first.length, first.attention_mask) == (9, None)
    with pytest.raises(CalibrationError, match=r"windows of 20 tokens, expected --length 16\."):
        secateur.calibration_windows(str(file), None, length=16)
    twice = secateur.calibration_windows([str(file), str(file)], None, samples=12, length=20, seed=3)
    assert sorted(twice.lengths) == sorted(2 * LENGTHS)
    assert twice.provenance["tokens"] == 2 * sum(LENGTHS)


def test_a_loss_needs_two_tokens(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    own = Windows(tiny.tokens(2, 4), {}, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0]]))
    message = r"^sample 1: has 1 token beside its padding, expected at least 2"
    with pytest.raises(CalibrationError, match=message):
        secateur.perplexity(source, own)
    with pytest.raises(CalibrationError, match=message):
        secateur.agreement(source, [source], own)
    with pytest.raises(CalibrationError, match=message):
        gradients(source, tmp_path / "gradients.safetensors", calibration=own)
    secateur.prune(source, method=secateur.wanda(), calibration=own, output=tmp_path / "out")  # which takes no loss


# Statistics and masks


def test_padded_rows_prune_as_the_rows_without_padding(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    ids = tiny.tokens(5, 12)
    behind, before = torch.full((5, 9), 99), torch.full((5, 2), 98)
    save_file({"input_ids": ids}, tmp_path / "plain.safetensors")
    wide = torch.cat([before, ids, behind], dim=1)
    mask = torch.tensor([0] * 2 + [1] * 12 + [0] * 9).repeat(5, 1)
    save_file({"input_ids": wide, "attention_mask": mask}, tmp_path / "padded.safetensors")
    for name in ("plain", "padded"):
        for method in (secateur.sparsegpt(), secateur.gblm(), secateur.wanda_plus()):
            secateur.prune(
                source,
                method=method,
                calibration=str(tmp_path / f"{name}.safetensors"),
                output=tmp_path / f"{name}-{method.name}",
            )
    for name in ("sparsegpt", "gblm", "wanda_plus"):
        plain, other = (read_tensors(tmp_path / f"{kind}-{name}") for kind in ("plain", "padded"))
        assert all(torch.equal(bits(plain[key]), bits(other[key])) for key in plain)
        digests = [read_manifest(tmp_path / f"{kind}-{name}").calibration for kind in ("plain", "padded")]
        assert digests[0] is not None
        assert digests[1] is not None
        assert digests[0]["digest"] == digests[1]["digest"]


@tiny.pairs_by_turns("name, propagate", NAMES, ["pruned", "dense"])
def test_statistics_are_those_of_the_tokens_alone(name: str, propagate: str, tmp_path: Path) -> None:
    """Each row by itself, added up: for experts too, which see the tokens of a batch as one."""
    source = tiny.save(name, tmp_path / "source")
    skip = [] if name != "mixtral" else ["*experts*"]  # a row may send no token to an expert
    expected: dict[str, tuple[Tensor, int]] = {}
    for number, row in enumerate(rows()):
        seen: dict[str, tuple[Tensor, int, int]] = {}
        secateur.prune(
            source,
            method=recording(seen),
            pattern=secateur.Unstructured(0.0),  # so that what is propagated is the same for all
            propagate=propagate,
            calibration=row.unsqueeze(0),
            skip=skip,
            output=tmp_path / str(number),
        )
        for matrix, (total, tokens, _) in seen.items():
            before = expected.get(matrix, (torch.zeros_like(total), 0))
            expected[matrix] = (before[0] + total, before[1] + tokens)
    found: dict[str, tuple[Tensor, int, int]] = {}
    manifest = secateur.prune(
        source,
        method=recording(found),
        pattern=secateur.Unstructured(0.0),
        propagate=propagate,
        calibration=windows("left"),
        batch_size=2,
        skip=skip,
        output=tmp_path / "padded",
    )
    assert found.keys() == expected.keys()
    for matrix, (total, tokens, samples) in found.items():
        assert (tokens, samples) == (sum(LENGTHS), len(LENGTHS))
        torch.testing.assert_close(total, expected[matrix][0], rtol=1e-5, atol=0)
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {sum(LENGTHS)}
    assert manifest.calibration is not None
    assert manifest.calibration["tokens"] == sum(LENGTHS)


def test_experts_see_no_padding(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "source")
    found: dict[str, tuple[Tensor, int, int]] = {}
    secateur.prune(
        source,
        method=recording(found),
        calibration=windows(),
        pattern=secateur.Unstructured(0.0),
        output=tmp_path / "o",
    )
    gates = [seen[1] for name, seen in found.items() if "layers.0." in name and re.search(r"(w1|gate_proj)", name)]
    assert sum(gates) == 2 * sum(LENGTHS)  # two experts for each token


# Gradients


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_are_those_of_full_autograd_with_a_mask(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source")
    own = windows("right")
    with InFloat64():
        file = gradients(source, tmp_path / "g.safetensors", norms=["l1", "l2"], calibration=own, dtype="float64")
    assert file.provenance["tokens"] == sum(LENGTHS)
    model = load(source, torch.float64)
    parameters = dict(model.named_parameters())
    l1: dict[str, Tensor] = {}
    for ids, mask in zip(padded()["input_ids"], padded()["attention_mask"], strict=True):
        model.zero_grad()
        with InFloat64():
            logits = model(
                input_ids=ids.where(mask == 1, 0).unsqueeze(0), attention_mask=mask.unsqueeze(0), use_cache=False
            ).logits[0]
            counted = mask[1:] == 1
            torch.nn.functional.cross_entropy(logits[:-1][counted], ids[1:][counted]).backward()
        for key, parameter in parameters.items():
            if parameter.grad is not None:
                l1[key] = l1.get(key, torch.zeros_like(parameter)) + parameter.grad.abs()
    kind = secateur.GradientKind("l1")
    compared = 0
    for matrix in open_model(source).skeleton.matrices:
        if matrix.name in l1:
            found = file.read(matrix.name, kind)
            assert (found.tokens, found.samples) == (sum(LENGTHS), len(LENGTHS))
            expected = l1[matrix.name].t() if matrix.transposed else l1[matrix.name]
            torch.testing.assert_close(found.total, expected, rtol=1e-7, atol=1e-12)  # rotary tables are float32
            compared += 1
    assert compared >= 12


def test_parts_of_padded_samples_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save("llama", tmp_path / "source")
    whole = gradients(source, tmp_path / "whole.safetensors", calibration=windows(), dtype="float64", batch_size=2)
    from secateur.collect import gradient_pass

    sizes = gradient_pass.ChunkSizes(2, 0, None)
    monkeypatch.setattr(gradient_pass, "chunk_sizes", lambda *args: sizes)
    stages: list[str] = []
    parts = gradients(
        source,
        tmp_path / "parts.safetensors",
        calibration=windows(),
        dtype="float64",
        batch_size=2,
        progress=lambda stage, done, total: stages.append(stage),
    )
    assert {stage for stage in stages if stage.startswith("head")} == {f"head {n}/3" for n in (1, 2, 3)}
    kind = secateur.GradientKind("l1")
    for name in whole.matrices:
        torch.testing.assert_close(parts.read(name, kind).total, whole.read(name, kind).total, rtol=1e-12, atol=0)


# Evaluation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_transformers_with_a_mask(name: str, side: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source")
    found = secateur.perplexity(source, windows(side), batch_size=2)
    model, own = load(source), padded("right")
    ids, mask = own["input_ids"].where(own["attention_mask"] == 1, 0), own["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    expected = (losses * mask[:, 1:]).sum(dim=1) / mask[:, 1:].sum(dim=1)
    assert found.window_nats == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.nats == pytest.approx(float(expected.mean()), rel=1e-5)
    assert (found.windows, found.length, found.tokens) == (6, 16, sum(LENGTHS) - 6)


def test_agreement_leaves_padding_out(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    secateur.prune(source, method=secateur.magnitude(), pattern=HALF, output=tmp_path / "pruned")
    (found,) = secateur.agreement(source, [tmp_path / "pruned"], windows("left"), batch_size=2)
    alone = [secateur.agreement(source, [tmp_path / "pruned"], row.unsqueeze(0))[0] for row in rows()]
    for name in ("window_kl", "window_top1", "window_nats", "window_nats_dense"):
        assert getattr(found, name) == pytest.approx([getattr(one, name)[0] for one in alone], rel=1e-5, abs=1e-9)
    weights = [length - 1 for length in LENGTHS]
    assert found.tokens == sum(weights)
    kl = sum(one.kl * weight for one, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert found.kl == pytest.approx(kl, rel=1e-5)


# Recovery


def test_blocks_are_tuned_on_tokens_alone(tmp_path: Path) -> None:
    pruned = pruned_model("llama", tmp_path)
    ids = tiny.tokens(8, 20, seed=1)
    lengths = [20, 7, 7, 12, 20, 20, 9, 15]
    mask = (torch.arange(20) < torch.tensor(lengths).unsqueeze(1)).long()
    own = Windows(ids, {"source": "test"}, mask)
    options: dict[str, Any] = {"epochs": 1, "step": 3, "held_out": 0.25, "learning_rate": 0.01}
    manifest = secateur.reconstruct(pruned, calibration=own, output=tmp_path / "tuned", **options)
    assert manifest.recovery is not None
    assert manifest.recovery["settings"]["samples_trained"] == 6
    before = [record["before"] for record in manifest.recovery["blocks"]]
    # The first block sees the same inputs in both models: its loss at the start is that of ordinary forwards.
    models = [load(tmp_path / name) for name in ("pruned", "dense")]
    outputs = [[block_outputs(model, ids[n : n + 1, : lengths[n]])[0] for n in (6, 7)] for model in models]
    expected = distance(*(torch.cat([part.flatten(0, 1) for part in own]) for own in outputs))
    assert before[0] == pytest.approx(expected, rel=1e-4)
    assert secateur.verify(tmp_path / "tuned").problems == []


def test_labels_of_padding_do_not_count() -> None:
    own = Rows(windows())
    for number, length in enumerate(LENGTHS):
        row = own[number]
        assert row["attention_mask"].tolist() == [1] * length + [0] * (16 - length)
        assert row["labels"].tolist() == [-100, *rows()[number][1:].tolist(), *[-100] * (16 - length)]
    assert "attention_mask" not in Rows(Windows(tiny.tokens(2, 4), {}))[0]
