"""Hidden states beside the dense model's: streamed figures against both models in memory, and what compare prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import secateur
import tiny
from command_line import Call, call  # noqa: F401
from secateur.errors import CheckpointError, NumericalError


def last_hidden_states(folder: Path, ids: Tensor) -> Tensor:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        states: Tensor = model.base_model(ids)[0]
    return states.double()


@pytest.mark.parametrize("name", ["bert", "bert_embeddings", "bert_classifier", "modernbert", "deberta-v2"])
def test_streamed_equals_in_memory(name: str, tmp_path: Path) -> None:
    """ModernBERT has a norm after its blocks; some have a head and some have none."""
    source, ids = tiny.save(name, tmp_path / "source"), tiny.tokens(samples=5, length=12)
    secateur.prune(source, method="magnitude", sparsity=0.6, output=tmp_path / "pruned")
    same, other = secateur.similarity(source, [source, tmp_path / "pruned"], ids, batch_size=2)
    assert (same.cosine, same.relative_error) == (pytest.approx(1), 0)
    dense, found = (last_hidden_states(folder, ids) for folder in (source, tmp_path / "pruned"))
    cosine = (dense * found).sum(-1) / dense.norm(dim=-1) / found.norm(dim=-1)
    means = [states.mean(1) / states.mean(1).norm(dim=-1, keepdim=True) for states in (dense, found)]
    assert other.window_cosine == pytest.approx(cosine.mean(1).tolist(), rel=1e-5)
    assert other.cosine == pytest.approx(float(cosine.mean()), rel=1e-5)
    assert other.cosine_error == pytest.approx(float(cosine.mean(1).std()) / 5**0.5, rel=1e-4)
    assert other.pooled_cosine == pytest.approx(float((means[0] * means[1]).sum(-1).mean()), rel=1e-5)
    assert other.relative_error == pytest.approx(float((found - dense).norm() / dense.norm()), rel=1e-5)
    assert (other.windows, other.length, other.tokens) == (5, 12, 60)
    assert 0 < other.cosine < 0.999


def test_models_of_other_widths(tmp_path: Path) -> None:
    source = tiny.save("bert", tmp_path / "source")
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CheckpointError, match=r"a width of 16, the dense model's of 32"):
        secateur.similarity(source, [tmp_path / "narrow"], tiny.tokens())


def test_hidden_states_that_are_all_zero(tmp_path: Path) -> None:
    model = tiny.build("bert_embeddings")
    with torch.no_grad():
        for parameter in model.encoder.layer[-1].output.LayerNorm.parameters():
            parameter.zero_()
    with pytest.raises(NumericalError, match=r"last hidden states of all 4 samples are zero"):
        secateur.similarity(model, [tiny.save("bert_embeddings", tmp_path / "pruned")], tiny.tokens())


def test_compare_of_encoders(call: Call, tmp_path: Path) -> None:  # noqa: F811
    source = tiny.save("bert", tmp_path / "source")
    secateur.prune(source, method="magnitude", output=tmp_path / "pruned")
    save_file({"input_ids": tiny.tokens()}, tmp_path / "ids.safetensors")
    models = [str(tmp_path / "source"), str(tmp_path / "pruned"), "--data", str(tmp_path / "ids.safetensors")]
    shown = call("compare", *models, "--csv", str(tmp_path / "table.csv"))
    assert shown.code == 0
    assert "cosine of tokens" in shown.out
    assert "replacement" not in shown.out
    printed = json.loads(call("compare", *models, "--json").out)
    assert printed["verdicts"] == []
    assert 0 < printed["results"][0]["cosine"] < 1
    assert (tmp_path / "table.csv").read_text().splitlines()[1].split(",")[1] == "states"
    refused = call("compare", *models, "--max-nats", "0.05")
    assert refused.code == 2
    assert "--max-nats: is measured on predictions of the next token" in refused.err
