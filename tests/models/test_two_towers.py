"""Models that read images and texts side by side: a tower for each, pruned one after the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessorPil,
)

import secateur
from secateur.errors import CalibrationError
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import open_model
from secateur.record.verify import verify

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def save(kind: type[PreTrainedModel], folder: Path) -> Path:
    """A model of random weights with its image processor and six words."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind is CLIPModel:
            model: PreTrainedModel = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
        else:
            model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 24}, vision_config=VISION))
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    words = ["[pad]", "<s>", "</s>", "[unk]", "a", "bed", "sat", "at", "the", "desk"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="[pad]").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
def test_masks_and_embeddings_are_those_of_the_plain_model(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    """By hooks on the plain model, with the pruned blocks before each block in place."""
    source, out = save(kind, tmp_path / "model"), tmp_path / "out"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 10, (5, 7), generator=generator)
    ids[:, -1] = 2
    given = {"input_ids": ids, "pixel_values": torch.randn(5, 3, 24, 24, generator=generator)}
    planned = secateur.estimate(source, method="wanda", calibration=given)
    manifest = secateur.prune(source, method="wanda", calibration=given, output=out)
    assert set(planned.plan) == set(manifest.matrices)
    assert verify(out, Checkpoint(source)).ok
    model, pruned = (kind.from_pretrained(folder).eval() for folder in (source, out))
    weights, skeleton = dict(pruned.named_parameters()), open_model(source).skeleton
    assert [stack.path.partition(".")[0] for stack in skeleton.stacks] == ["vision_model", "text_model"]
    for block in skeleton.blocks:
        sums: dict[str, torch.Tensor] = {}

        def add(module: nn.Module, args: tuple[torch.Tensor], name: str, sums: dict[str, torch.Tensor] = sums) -> None:
            sums[name] = args[0].flatten(0, -2).square().sum(0)

        linears = {name: own for name, own in model.named_modules() if name.startswith(f"{block.path}.")}
        linears = {f"{name}.weight": own for name, own in linears.items() if isinstance(own, nn.Linear)}
        hooks = [own.register_forward_pre_hook(partial(add, name=name)) for name, own in linears.items()]
        model(**given)
        for hook in hooks:
            hook.remove()
        for name, own in linears.items():
            score = own.weight.abs() * sums[name].sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
            own.weight.mul_(torch.ones_like(score).scatter(1, order, 0))
            assert torch.equal(weights[name], own.weight), name
    assert len(manifest.matrices) == 5 * 6
    (found,) = secateur.similarity(source, [out], given)
    dense, sparse = (own(**given) for own in (kind.from_pretrained(source).eval(), pruned))
    cosine = torch.nn.functional.cosine_similarity
    expected = [cosine(getattr(dense, name), getattr(sparse, name)) for name in ("image_embeds", "text_embeds")]
    assert found.cosine == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)
    assert found.tokens == 10


def test_images_of_a_folder_with_their_texts(tmp_path: Path) -> None:
    clip, folder = save(CLIPModel, tmp_path / "clip"), tmp_path / "pictures"
    folder.mkdir()
    settings: dict[str, Any] = {"method": "wanda", "output": tmp_path / "out", "only": "text_model.*"}
    for number, text in enumerate(["a bed", "a desk", "the desk at the bed", None]):
        noise = numpy.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=numpy.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        if text is not None:
            (folder / f"{number}.txt").write_text(f"{text} </s>")
    manifest = secateur.prune(clip, calibration=f"images:{folder}", **settings)
    # Texts of three, three and six tokens: nothing is padded, and the image without one is left out.
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {12}
    assert {name.partition(".")[0] for name in manifest.matrices} == {"text_model"}
    assert manifest.calibration is not None
    assert (manifest.calibration["samples"], manifest.calibration["images_there"]) == (3, 4)
    # What was trained on padded texts reads them so: eight tokens each.
    siglip = save(SiglipModel, tmp_path / "siglip")
    settings["output"] = tmp_path / "other"
    manifest = secateur.prune(siglip, calibration=f"images:{folder}", **settings)
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {24}
    settings["output"] = tmp_path / "none"
    with pytest.raises(
        CalibrationError, match=r"CLIPModel reads images and texts. Give it images:FOLDER, with NAME.txt"
    ):
        secateur.prune(clip, calibration="c4", **settings)
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(CalibrationError, match=r"4 images, and none of them with a text"):
        secateur.prune(clip, calibration=f"images:{folder}", **settings)
