"""Gradients of the loss that a model itself takes of labels: streamed, they are those of full autograd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    PvtConfig,
    PvtForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

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
            own = expected[norm][matrix.parameter].flatten(1)
            assert distance(found[matrix.name, norm], own) <= 1e-12, matrix.name


@tiny.by_turns(LABELLED, 0)
def test_gradients_are_those_of_the_models_own_loss(name: str, tmp_path: Path) -> None:
    given = LABELLED[name]
    check(tiny.save(name, tmp_path / "source"), given, tmp_path, batch_size=3)


def test_of_recordings(tmp_path: Path) -> None:
    source, given = ctc(tmp_path / "source")
    check(source, given, tmp_path)


def translated() -> dict[str, Tensor]:
    """Pairs of texts, one side of one of which is padded, and the other side of another one."""
    mask, labels = torch.ones(SAMPLES, LENGTH, dtype=torch.int64), tiny.tokens(SAMPLES, 7, seed=1)
    mask[2, 6:], labels[1, 5:] = 0, -100
    return {"input_ids": tiny.tokens(SAMPLES, LENGTH), "attention_mask": mask, "labels": labels}


@tiny.by_turns(["t5", "bart", "marian", "mt5", "t5gemma", "pegasus", "longt5", "m2m_100", "blenderbot"], 0, of=5)
def test_through_a_decoder_into_its_encoder(name: str, tmp_path: Path) -> None:
    check(tiny.save(name, tmp_path / "source"), translated(), tmp_path, batch_size=3)


@tiny.by_turns(["t5", "bart"], 0)
def test_of_windows_of_text(name: str, tmp_path: Path) -> None:
    """The encoder reads one half, and the other half are the labels."""
    windows, source = tiny.tokens(SAMPLES, 12), tiny.save(name, tmp_path / "source")
    with InFloat64():
        file = secateur.gradients(source, tmp_path / "g", calibration=windows, norms=["l1"], dtype="float64")
        model = as_transformers_loads_it(source).double()
        expected = by_autograd(model, {"input_ids": windows[:, :6], "labels": windows[:, 6:]}, "l1")
    found = totals_of(file)
    for matrix in open_model(source).skeleton.matrices:
        assert distance(found[matrix.name, "l1"], expected[matrix.parameter]) <= 1e-12, matrix.name


STAGES: dict[str, tuple[type[PreTrainedModel], Any, int]] = {
    "convnext": (ConvNextForImageClassification, ConvNextConfig(**tiny.MAPS, num_stages=3), 3),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"),
        3,
    ),
    "pvt": (
        PvtForImageClassification,
        PvtConfig(**tiny.REDUCED, sequence_reduction_ratios=[4, 2, 1], patch_sizes=[4, 2, 2], strides=[4, 2, 2]),
        3,
    ),
    "swin": (SwinForImageClassification, SwinConfig(**tiny.WINDOWS), 1),  # windows of all images are one batch
}


@tiny.by_turns(STAGES, 1)
def test_from_stage_to_stage(name: str, tmp_path: Path) -> None:
    """Of matrices and of convolutions, through what lies between the stages."""
    kind, config, batch_size = STAGES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key or key.endswith("running_var"):
                value.data.copy_(torch.rand(value.shape) + 0.5)
    model.save_pretrained(tmp_path / "source")
    given = {"pixel_values": tiny.pixels(SAMPLES, size=32), "labels": torch.tensor([1, 0, 1, 1])}
    check(tmp_path / "source", given, tmp_path, batch_size=batch_size)


def test_from_some_block_on(tmp_path: Path) -> None:
    """The way back ends in the encoder, or before it."""
    source, given = tiny.save("t5", tmp_path / "source"), translated()
    whole = totals_of(secateur.gradients(source, tmp_path / "whole", calibration=given))
    for number, only in enumerate((["decoder.block.1.*"], ["encoder.block.2.*", "decoder.block.0.*"])):
        some = totals_of(secateur.gradients(source, tmp_path / str(number), calibration=given, only=only))
        assert 0 < len(some) < len(whole)
        assert all(torch.equal(total, whole[key]) for key, total in some.items())


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
    with pytest.raises(ModelStructureError, match="T5ForConditionalGeneration: has several stacks of blocks, whose"):
        secateur.gradients(tiny.save("t5", tmp_path / "t5"), tmp_path / "g", calibration=translated(), dtype="float16")
    part = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text, vision = {**part, "vocab_size": 128}, {**part, "image_size": 24, "patch_size": 8}
    pair = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    both = {"input_ids": tiny.tokens(2, 6), "pixel_values": tiny.pixels(2), "labels": torch.tensor([0, 1])}
    with pytest.raises(ModelStructureError, match="CLIPModel: its loss compares samples with each other"):
        secateur.gradients(pair, tmp_path / "g", calibration=both)
