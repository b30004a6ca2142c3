"""Agreement with the dense model: streamed figures against both models in memory."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.evaluate.agreement import agreement
from secateur.models.flow import stream

NAMES = ["llama", "gemma2", "gpt2", "mixtral", "gemma3n_text", "mamba"]


@pytest.fixture
def ids():
    return tiny.tokens(samples=5, length=24)


def pruned(source, folder):
    secateur.prune(source, method=secateur.magnitude(), pattern=secateur.Unstructured(0.6), output=folder)
    return folder


def logits_of(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()[:, :-1]


@pytest.mark.parametrize("name", NAMES)
def test_streamed_equals_in_memory(name, ids, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    other = pruned(source, tmp_path / "pruned")
    (result,) = agreement(source, [other], ids, batch_size=2)
    dense, sparse = logits_of(source, ids), logits_of(other, ids)
    p, q = dense.softmax(-1), sparse.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.kl_99 == pytest.approx(sorted(kl.flatten().tolist())[math.ceil(0.99 * kl.numel()) - 1], rel=1e-4)
    assert result.window_kl == pytest.approx(kl.mean(dim=1).tolist(), rel=1e-4)
    assert result.kl_error == pytest.approx(float(kl.mean(dim=1).std() / math.sqrt(5)), rel=1e-3)
    same = dense.argmax(-1) == sparse.argmax(-1)
    assert result.window_top1 == pytest.approx(same.double().mean(dim=1).tolist(), abs=1e-7)
    assert result.top1 == pytest.approx(float(same.double().mean()))
    assert (result.windows, result.length, result.tokens) == (5, 24, 5 * 23)
    assert 0 < result.top1 < 1
    assert result.kl > 0
    # And the losses are those of the evaluation by itself.
    for folder, nats, perplexity in (
        (source, result.window_nats_dense, result.perplexity_dense),
        (other, result.window_nats, result.perplexity),
    ):
        alone = secateur.perplexity(folder, ids)
        assert nats == pytest.approx(alone.window_nats, rel=1e-5)
        assert perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        assert result.digest == alone.digest


def test_a_model_agrees_with_itself(ids, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    (result,) = agreement(source, [source], ids)
    assert (result.kl, result.kl_99, result.kl_error, result.top1, result.top1_error) == (0, 0, 0, 1, 0)
    assert result.window_nats == result.window_nats_dense


def test_several_models_in_their_order(ids, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    other = pruned(source, tmp_path / "pruned")
    seen = []
    results = agreement(source, [other, source, other], ids, progress=lambda stage, done, total: seen.append(stage))
    assert [result.model for result in results] == [str(other), str(source), str(other)]
    assert results[0].window_kl == results[2].window_kl
    assert results[1].kl == 0
    assert set(seen) == {"dense: record", "dense: blocks"} | {
        f"pruned {number}: {stage}" for number in (1, 2, 3) for stage in ("record", "blocks", "head")
    }


def test_the_size_of_a_chunk_changes_nothing(ids, tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    other = pruned(source, tmp_path / "pruned")
    (whole,) = agreement(source, [other], tiny.tokens(samples=2, length=33))
    monkeypatch.setattr(stream, "LOGITS_BYTES", 1)  # 16 tokens at a time, of which the last one predicts nothing
    (parts,) = agreement(source, [other], tiny.tokens(samples=2, length=33))
    assert parts.window_kl == pytest.approx(whole.window_kl, rel=1e-5)
    assert parts.window_nats == pytest.approx(whole.window_nats, rel=1e-6)


def test_as_json(ids, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    (result,) = agreement(source, [source], ids[:1])
    value = result.to_json()
    assert value["kl_error"] is None
    assert value["top1_error"] is None
    assert value["perplexity"] == result.perplexity


def test_what_cannot_be_compared(ids, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    small = tiny.build("llama")
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"small: has a vocabulary of 100 tokens, the dense model has 128\."):
        agreement(source, [tmp_path / "small"], ids)
    with pytest.raises(CalibrationError, match="outside the vocabulary"):
        agreement(source, [source], ids + 1000)
    broken = tiny.build("llama")
    broken.lm_head.weight.data[5] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericalError, match=r"^5 of 5 windows have a loss that is not finite in the pruned model\."):
        agreement(source, [tmp_path / "broken"], ids)
    assert [path.name for path in tmp_path.iterdir() if "states" in path.name] == []


def test_a_module_in_memory_is_given_back_as_it_was(ids):
    model = tiny.build("llama").train()
    (result,) = agreement(model, [model], ids)
    assert result.kl == 0
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
