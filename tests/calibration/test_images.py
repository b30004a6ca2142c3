"""Images of folders and arrays, through the model's own image processor, for a model that reads pixels."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

import secateur
import tiny
from secateur.calibration.images import read_images
from secateur.errors import CalibrationError
from secateur.pruning.forecast import estimate
from secateur.report import terminal


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    folder = tiny.save("vit", tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of several sizes and modes, and files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = numpy.random.default_rng(0)
    for number, (mode, ending) in enumerate(
        [("RGB", "png"), ("L", "jpg"), ("RGBA", "png"), ("RGB", "JPEG"), ("P", "png")]
    ):
        pixels = random.integers(0, 256, (30 + number, 40, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{number}.{ending}")
    (folder / "notes.txt").write_text("none")
    return folder


def test_pictures_go_through_the_models_processor(vit: Path, pictures: Path, tmp_path: Path) -> None:
    """Pruning on a folder is pruning on what the processor makes of its pictures, drawn with the seed."""
    settings: dict[str, Any] = {"method": "wanda", "seed": 3}
    spec = f"images:{pictures}"
    planned = estimate(vit, calibration=spec, samples=4, **settings)
    found = secateur.prune(vit, calibration=spec, samples=4, output=tmp_path / "out", **settings)
    assert planned.tokens == 4 * 10
    assert {entry["tokens"] for entry in found.matrices.values()} == {4 * 10}  # nine patches and one more
    record = found.calibration
    assert record is not None
    assert (record["samples"], record["length"], record["images_there"], record["seed"]) == (4, 10, 5, 3)
    assert terminal._measuring(found, "out") == ["secateur", "compare", str(vit), "out", "--data", spec]
    assert "4 images of 10 tokens of pictures" in (tmp_path / "out" / "README.md").read_text()

    processor = ViTImageProcessorPil.from_pretrained(vit)
    pixels, _, chosen = read_images(str(pictures), processor, 4, 3)
    files = sorted(file for file in pictures.iterdir() if file.suffix != ".txt")
    each = [processor(images=Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0] for file in files]
    assert pixels.shape == (4, 3, 24, 24)
    assert torch.equal(pixels[0], each[files.index(chosen[0])])
    assert all(any(torch.equal(own, value) for value in each) for own in pixels)
    again = secateur.prune(vit, calibration=pixels, output=tmp_path / "again", **settings)
    assert again.calibration is not None
    assert again.calibration["digest"] == record["digest"]
    assert secateur.verify(tmp_path / "out").ok
    names = found.matrices
    assert [found.tensors[name] for name in names] == [again.tensors[name] for name in names]


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays(vit: Path, tmp_path: Path, ending: str) -> None:
    """Whole numbers are pictures for the processor, floating-point ones pixel values."""
    pictures = numpy.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=numpy.uint8)
    processor = ViTImageProcessorPil.from_pretrained(vit)
    values = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    save = numpy.save if ending == "npy" else numpy.savez
    save(tmp_path / f"pictures.{ending}", pictures)
    save(tmp_path / f"values.{ending}", values.numpy())
    found = [
        read_images(str(tmp_path / f"{name}.{ending}"), processor, None, None)[0] for name in ("pictures", "values")
    ]
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], values)


def test_compare_on_images(vit: Path, pictures: Path, tmp_path: Path) -> None:
    secateur.prune(vit, method="magnitude", output=tmp_path / "out")
    (row,) = secateur.similarity(vit, [tmp_path / "out"], f"images:{pictures}", batch_size=2)
    assert (row.windows, row.length, row.tokens) == (5, 10, 50)
    assert 0 < row.cosine < 1
    assert f"{pictures}, 5 images of 10 places:" in repr(row)
    assert "5 images of 10 places: last hidden states" in row._repr_html_()
    (row,) = secateur.similarity(vit, [tmp_path / "out"], tiny.pixels(1))
    assert "pixel values, 1 image of 10 places:" in repr(row)


def test_within_a_site_and_residual_targets(vit: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"calibration": tiny.pixels(4), "within": "site", "targets": "residual"}
    estimate(vit, method="sparsegpt", **settings)
    secateur.prune(vit, method="sparsegpt", output=tmp_path / "out", **settings)
    assert secateur.verify(tmp_path / "out").ok


def test_what_cannot_be_given_is_said(
    vit: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, model: Path = vit, **settings: Any) -> None:
        for run in (
            lambda: secateur.prune(model, output=tmp_path / "out", **settings),
            lambda: estimate(model, **settings),
        ):
            with pytest.raises(CalibrationError, match=match):
                run()

    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG none")
    numpy.save(tmp_path / "flat.npy", numpy.zeros((3, 4)))
    refused(r"^ViTModel reads images, and no text. Give it some: images:FOLDER.", calibration="c4")
    refused("--length: an image has as many tokens", calibration=f"images:{pictures}", length=16)
    refused("no such folder or array", calibration="images:nowhere")
    refused("no image in it", calibration=f"images:{tmp_path / 'empty'}")
    refused(r"a\.png: cannot be read", calibration=f"images:{tmp_path / 'bad'}")
    refused(r"got an array of shape \(3, 4\) and float64", calibration=f"images:{tmp_path / 'flat.npy'}")
    refused("BertForMaskedLM reads tokens", tiny.save("bert", tmp_path / "bert"), calibration=f"images:{pictures}")
    real = builtins.__import__

    def without_pillow(name: str, *arguments: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(CalibrationError, match=r'pip install "secateur\[images\]"'):
        read_images(str(pictures), object(), 1, 0)
    monkeypatch.undo()
    (vit / "preprocessor_config.json").unlink()
    refused("it has no preprocessor_config.json", calibration=f"images:{pictures}")
