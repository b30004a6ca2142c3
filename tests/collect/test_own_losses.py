"""Gradients of the loss that a model itself takes of labels: streamed, they are those of full autograd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2ForCTC

import secateur
import tiny
from full_autograd import InFloat64, distance, totals_of
from plain_forwards import as_transformers_loads_it
from secateur.errors import ModelStructureError
from secateur.models.opening.opened import open_model

SAMPLES, LENGTH = 4, 10


def tokens(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tiny.tokens(SAMPLES, LENGTH), "labels": labels}


def masked() -> dict[str, Tensor]:
    """A few tokens masked in each sample, which are its labels; one sample ends in padding."""
    ids, mask = tiny.tokens(SAMPLES, LENGTH), torch.ones(SAMPLES, LENGTH, dtype=torch.int64)
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen[:, 0], mask[2, 7:] = True, 0
    labels = ids.where(chosen & (mask == 1), -100)
    return {"input_ids": ids.masked_fill(chosen, 2), "attention_mask": mask, "labels": labels}


LABELLED: dict[str, dict[str, Tensor]] = {
    "bert_classifier": tokens(torch.tensor([0, 1, 1, 0])),
    "bert": masked(),
    "roberta": masked(),
    "modernbert": masked(),
    "distilbert": masked(),
    "vit_classifier": {"pixel_values": tiny.pixels(SAMPLES), "labels": torch.tensor([1, 0, 1, 1])},
    "llama": tokens(tiny.tokens(SAMPLES, LENGTH, seed=1).masked_fill(torch.arange(LENGTH) < 4, -100)),
}


def ctc(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    layers: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Wav2Vec2ForCTC(
            Wav2Vec2Config(**sizes, **layers, num_conv_pos_embedding_groups=4, vocab_size=12)
        ).save_pretrained(folder)
        return folder, {"input_values": torch.randn(2, 800), "labels": torch.tensor([[1, 2, 3], [4, 5, -100]])}


def by_autograd(model: PreTrainedModel, given: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """The sums over samples, each of which goes through the whole model alone, of the gradients of its loss."""
    totals = {name: torch.zeros_like(own) for name, own in model.named_parameters()}
    dtype = next(model.parameters()).dtype
    for number in range(len(given["labels"])):
        own = {name: value[number : number + 1] for name, value in given.items()}
        own = {name: value.to(dtype) if value.is_floating_point() else value for name, value in own.items()}
        model.zero_grad()
        model(**own).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.abs() if norm == "l1" else parameter.grad.square()
    return totals


def check(source: Path, given: dict[str, Tensor], folder: Path, **options: Any) -> None:
    with InFloat64():
        file = secateur.gradients(
            source, folder / "g", calibration=given, norms=["l1", "l2"], dtype="float64", device="cpu", **options
        )
        model = as_transformers_loads_it(source).double()
        expected = {norm: by_autograd(model, given, norm) for norm in ("l1", "l2")}
    found = totals_of(file)
    matrices = [matrix for matrix in open_model(source).skeleton.matrices if (matrix.name, "l1") in found]
    assert len(matrices) == len(file.matrices) > 5
    for matrix in matrices:
        for norm in ("l1", "l2"):
            own = expected[norm][matrix.parameter]
            assert distance(found[matrix.name, norm], own) <= 1e-12, matrix.name


@pytest.mark.parametrize("name", LABELLED)
def test_gradients_are_those_of_the_models_own_loss(name: str, tmp_path: Path) -> None:
    given = LABELLED[name]
    check(tiny.save(name, tmp_path / "source"), given, tmp_path, batch_size=3)


def test_of_recordings(tmp_path: Path) -> None:
    source, given = ctc(tmp_path / "source")
    check(source, given, tmp_path)


def test_gblm_takes_them_first(tmp_path: Path) -> None:
    """What `prune` takes on the way is what `gradients` writes; without gradients other weights are left."""
    source, given = tiny.save("bert_classifier", tmp_path / "source"), LABELLED["bert_classifier"]
    model, other, third = (as_transformers_loads_it(source) for _ in range(3))
    file = secateur.gradients(source, tmp_path / "g", calibration=given, norms=["l1"])
    secateur.prune(model, method="gblm", norm="l1", calibration=given)
    secateur.prune(other, method="gblm", norm="l1", calibration=given, gradient=file.path)
    secateur.prune(third, method="wanda", calibration=given)
    for name in file.matrices:
        parameter = next(own.parameter for own in open_model(model).skeleton.matrices if own.name == name)
        assert torch.equal(model.get_parameter(parameter), other.get_parameter(parameter))
    pairs = zip(model.parameters(), third.parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)


def refused(name: str, given: Any, message: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source")
    with pytest.raises(ModelStructureError, match=re.escape(message)):
        secateur.gradients(source, tmp_path / "g", calibration=given)
    with pytest.raises(ModelStructureError, match=re.escape(message)):
        secateur.prune(source, method="gblm", calibration=given, output=tmp_path / "out")


def test_what_is_refused(tmp_path: Path) -> None:
    given = tokens(torch.tensor([0, 1, 1, 0]))
    hint = "Its own loss is that of labels, which Python can give: calibration={'input_ids': ..., 'labels': ...}."
    refused("bert", tiny.tokens(), hint, tmp_path)
    refused("bert_embeddings", given, "BertModel: its forward takes no labels, so that the loss", tmp_path)
    stacks = "has 2 stacks of blocks (encoder.block, decoder.block), and the loss whose gradients"
    refused("t5", {**given, "labels": tiny.tokens(SAMPLES, 5)}, stacks, tmp_path)
