"""Models of timm: in memory, by name and in folders they are pruned as others are, and timm loads what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from plain_forwards import block_outputs, streamed
from secateur.errors import CheckpointError, ModelStructureError
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import open_model
from secateur.models.shape.sequences import sequences
from secateur.record.verify import verify

timm = pytest.importorskip("timm", reason="timm is not installed; pip install timm")

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    "convnext_tiny": {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
    },
    "resnet18": {"channels": (8, 16, 16, 32), "stem_width": 8},
    "mobilenetv3_small_050": {},
}
STACKS = {
    "vit_tiny_patch16_224": ["blocks"],
    "convnext_tiny": [f"stages.{number}.blocks" for number in range(4)],
    "swin_tiny_patch4_window7_224": ["layers.0.blocks", "layers.1.blocks"],
    "resnet18": [f"layer{number}" for number in range(1, 5)],
    "mobilenetv3_small_050": [f"blocks.{number}" for number in range(6)],
}


def made(name: str, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **SMALL[name], **options).eval()
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("running_var") or "gamma" in key:  # nothing is left of an image where all of them are new
                value.data.copy_(torch.rand(value.shape) + 0.5)
        return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_in_memory_and_on_the_disk(name: str, tmp_path: Path) -> None:
    model, dense, batch = made(name), made(name), images()
    opened = open_model(model)
    assert [stack.path for stack in opened.skeleton.stacks] == STACKS[name]
    opened.restore()
    settings: dict[str, Any] = {"method": "wanda", "calibration": batch, "batch_size": 2}
    planned = secateur.estimate(model, **settings)
    manifest = secateur.prune(model, output=tmp_path / "out", **settings)
    assert set(planned.plan) == set(manifest.matrices)
    assert verify(tmp_path / "out").ok
    assert "TimmWrapperForImageClassification.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(loaded(batch), model(batch))
    # The folder is a checkpoint like any other: with one block in memory it gives what the model gives.
    skeleton = open_model(tmp_path / "out").skeleton
    expected = block_outputs(loaded, [block.path.removeprefix("timm_model.") for block in skeleton.blocks], batch)
    for block, _, output in streamed(skeleton, [batch]):
        assert torch.equal(output, expected[block.index]), block.path
    again = secateur.prune(tmp_path / "out", output=tmp_path / "twice", **{**settings, "pattern": 0.75})
    assert set(again.matrices) == set(manifest.matrices)
    assert verify(tmp_path / "twice", Checkpoint(tmp_path / "out")).ok
    (found,) = secateur.similarity(dense, [tmp_path / "out"], batch)
    features = [own.forward_features(batch).double() for own in (dense, model)]
    if features[0].ndim == 4 and "swin" not in name:
        features = [own.flatten(2).transpose(1, 2) for own in features]
    cosine = nn.functional.cosine_similarity(*features, dim=-1)
    assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_tiny"])
def test_masks_are_those_of_wanda(name: str) -> None:
    """By hooks on the dense model, half of every row; of layers that are matrices alone."""
    model, dense, batch = made(name), made(name), images()
    manifest = secateur.prune(model, method="wanda", calibration=batch, propagate="dense", batch_size=2)
    sums: dict[str, Tensor] = {}
    for path, own in dense.named_modules():
        if isinstance(own, nn.Linear):
            own.register_forward_pre_hook(
                lambda module, args, path=path: sums.update({path: args[0].flatten(0, -2).square().sum(0)})
            )
    dense(batch)
    checked = 0
    for path in sums:
        if f"{path}.weight" not in manifest.matrices:
            continue
        weight = dense.get_parameter(f"{path}.weight")
        order = (weight.abs() * sums[path].sqrt()).sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
        expected = weight.scatter(1, order, 0.0)
        assert torch.equal(model.get_parameter(f"{path}.weight"), expected), path
        checked += 1
    assert checked == len(manifest.matrices) > 5


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm makes the model and fetches its weights; a picture goes through its own preprocessing."""
    image = pytest.importorskip("PIL.Image")
    asked: list[Any] = []
    own, make = made("vit_tiny_patch16_224"), timm.create_model

    def create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        if not pretrained:
            model: nn.Module = make(name, pretrained=False, **options)
            return model
        asked.append((name, pretrained))
        if name == "none":
            raise RuntimeError("Unknown model (none)")
        return own

    monkeypatch.setattr(timm, "create_model", create)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        image.fromarray((images(1)[0].permute(1, 2, 0) * 40 + 128).clamp(0, 255).byte().numpy()).resize(
            (50 + number, 40)
        ).save(folder / f"{number}.png")
    settings: dict[str, Any] = {"method": "wanda", "calibration": f"images:{folder}"}
    manifest = secateur.prune("timm:vit_tiny_patch16_224.tag", output=tmp_path / "out", **settings)
    assert asked == [("vit_tiny_patch16_224.tag", True)]
    assert manifest.source["path"] == "timm:vit_tiny_patch16_224.tag"
    assert manifest.calibration is not None
    assert (manifest.calibration["samples"], manifest.calibration["length"]) == (2, 17)
    from_folder = secateur.prune(tmp_path / "out", output=tmp_path / "twice", **settings)
    assert from_folder.calibration is not None
    assert from_folder.calibration["digest"] == manifest.calibration["digest"]
    with pytest.raises(CheckpointError, match=r"timm:none: timm cannot make it: .*Unknown model \(none\)"):
        secateur.prune("timm:none", output=tmp_path / "none", **settings)


def test_gradients_of_the_loss_of_classes(tmp_path: Path) -> None:
    """In a folder, which transformers opens with a loss; a module of timm has none."""
    model, labels = made("vit_tiny_patch16_224"), torch.tensor([0, 3, 1])
    given = {"pixel_values": images(), "labels": labels}
    secateur.prune(model, method="magnitude", pattern=0.3, output=tmp_path / "out")
    file = secateur.gradients(tmp_path / "out", tmp_path / "g", calibration=given, norms=["l1"])
    total = torch.zeros_like(model.blocks[0].mlp.fc1.weight)
    for number in range(3):
        loss = nn.functional.cross_entropy(
            model(given["pixel_values"][number : number + 1]), labels[number : number + 1]
        )
        total += torch.autograd.grad(loss, model.blocks[0].mlp.fc1.weight.requires_grad_())[0].abs()
    found = file.read("blocks.0.mlp.fc1.weight", secateur.GradientKind("l1")).total
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-7)
    with pytest.raises(ModelStructureError, match="VisionTransformer: its forward takes no labels"):
        secateur.prune(model, method="gblm", calibration=given)


def test_what_is_no_stack() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    assert [
        path for path, _ in sequences(nn.ModuleDict({"stem": blocks, "head": nn.Sequential(nn.Linear(4, 2))}))
    ] == []
    model = timm.create_model("regnety_002", pretrained=False)
    with pytest.raises(ModelStructureError, match=r"RegNet: no sequence of blocks of one class .*only stem, s1, s2"):
        secateur.prune(model, method="magnitude")
