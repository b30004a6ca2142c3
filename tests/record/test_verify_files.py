"""`verify` finds every file, shard and tensor that was added, renamed or removed after the run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from secateur.errors import CheckpointError
from secateur.files.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME, read_manifest
from secateur.record.verify import verify
from verified_runs import PLANNED, UNPLANNED, forge

# Files and tensors that come and go


def test_no_manifest(dense: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        verify(dense)
    assert str(caught.value) == (f"{dense}: no {FILE_NAME} in it; only checkpoints that Secateur wrote have one.")


def test_a_manifest_of_another_format(pruned: Path) -> None:
    value = json.loads((pruned / FILE_NAME).read_text())
    (pruned / FILE_NAME).write_text(json.dumps(value | {"format": 99}))
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value) == (f"{pruned / FILE_NAME}: format 99, expected 1; another version of Secateur wrote it.")


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"digest": "0"}', '"digest"'])
def test_a_manifest_that_is_none(text: str, pruned: Path) -> None:
    (pruned / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value).startswith(f"{pruned / FILE_NAME}: {'damaged' if text else 'not JSON'}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
def test_a_missing_file(name: str, pruned: Path) -> None:
    (pruned / name).unlink()
    assert verify(pruned).problems == [f"{name}: the file is missing"]


def test_a_changed_file(pruned: Path) -> None:
    (pruned / "config.json").write_text((pruned / "config.json").read_text() + "\n")
    assert verify(pruned).problems == ["config.json: the file differs from the one that was written"]


def test_a_model_card_may_be_added(pruned: Path) -> None:
    (pruned / "README.md").write_text("# Mine\n")
    assert verify(pruned).ok


def test_a_missing_shard(pruned: Path) -> None:
    shard = Checkpoint(pruned).files[1]
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value) == (
        f"{shard}: the shard is missing, and {INDEX_FILE} lists it ({len(read_manifest(pruned).headers)} shards "
        "expected). Download the checkpoint again."
    )


def test_a_missing_index(pruned: Path) -> None:
    (pruned / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no {SINGLE_FILE} and no {INDEX_FILE} in it"):
        verify(pruned)


def test_a_missing_index_of_a_shard_that_is_one_no_more(pruned: Path) -> None:
    """Without the index, a single file beside the shards would be taken for the model."""
    (pruned / INDEX_FILE).unlink()
    checkpoint = load_file(next(iter(sorted(pruned.glob("*.safetensors")))))
    save_file(checkpoint, pruned / SINGLE_FILE)
    problems = verify(pruned).problems
    assert f"{INDEX_FILE}: the file is missing" in problems
    assert f"{SINGLE_FILE}: a shard that was not written by the run" in problems
    assert f"{PLANNED}: the tensor is missing" in problems or f"{UNPLANNED}: the tensor is missing" in problems


def test_an_extra_shard(pruned: Path) -> None:
    save_file({"extra": torch.ones(2)}, pruned / "extra.safetensors")
    assert verify(pruned).problems == ["extra.safetensors: a shard that was not written by the run"]


def test_a_single_file_that_would_be_loaded_in_place_of_the_shards(pruned: Path) -> None:
    save_file({"extra": torch.ones(2)}, pruned / SINGLE_FILE, {"format": "pt"})
    result = verify(pruned)
    assert f"{SINGLE_FILE}: a shard that was not written by the run" in result.problems
    assert f"{PLANNED}: the tensor is missing" in result.problems
    assert "extra: its bytes differ from those that were written" in result.problems


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    prune(tmp_path / "dense", method=magnitude(), output=tmp_path / "out")
    assert verify(tmp_path / "out").ok
    (tmp_path / "out" / INDEX_FILE).write_text("{}")
    assert verify(tmp_path / "out").problems == [f"{INDEX_FILE}: an index that was not written by the run"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Rewrite the shard that holds PLANNED, with its index to match; returns its name."""
    file = Checkpoint(folder).tensors[PLANNED].file
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = json.loads((folder / INDEX_FILE).read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"].update(dict.fromkeys(tensors, file.name))
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return file.name


def test_a_renamed_tensor(pruned: Path, dense: Path) -> None:
    file = rewrite(pruned, lambda tensors: tensors.update(renamed=tensors.pop(PLANNED)))
    expected = [
        f"{file}: its header differs from the one that was written",
        f"{PLANNED}: the tensor is missing",
        f"{INDEX_FILE}: the file differs from the one that was written",
        "renamed: its bytes differ from those that were written",
    ]
    assert verify(pruned).problems == expected
    absent = [f"{PLANNED}: absent from the pruned checkpoint", "renamed: absent from the source"]
    assert verify(pruned, Checkpoint(dense)).problems == expected[:3] + absent + expected[3:]


def test_a_tensor_less(pruned: Path) -> None:
    file = rewrite(pruned, lambda tensors: tensors.pop(PLANNED) is None)
    assert verify(pruned).problems == [
        f"{file}: its header differs from the one that was written",
        f"{PLANNED}: the tensor is missing",
        f"{INDEX_FILE}: the file differs from the one that was written",
    ]


@pytest.mark.parametrize("change", [lambda t: t.t().contiguous(), lambda t: t[:, :6], lambda t: t.unsqueeze(0)])
def test_a_planned_matrix_of_another_shape(change: Callable[[Tensor], Tensor], pruned: Path, dense: Path) -> None:
    rewrite(pruned, lambda tensors: tensors.update({PLANNED: change(tensors[PLANNED]).contiguous()}))
    shape = tuple(Checkpoint(pruned).shape(PLANNED))
    problems = verify(pruned, Checkpoint(dense)).problems
    assert f"{PLANNED}: its bytes differ from those that were written" in problems or shape == (1, 48, 32)
    assert f"{PLANNED}: of shape {list(shape)}, the manifest records [48, 32]" in problems
    assert f"{PLANNED}: {shape} torch.float32, the source has (48, 32) torch.float32" in problems


def test_another_dtype_of_the_same_bytes(pruned: Path, dense: Path) -> None:
    rewrite(pruned, lambda tensors: tensors.update({UNPLANNED: tensors[UNPLANNED].view(torch.int32)}))
    forge(pruned)
    assert verify(pruned).ok  # nothing in the files tells; the source does
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{UNPLANNED}: (32, 32) torch.int32, the source has (32, 32) torch.float32"
    ]


# Files that were added


ADDED = (
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "pytorch_model.bin",
    "modeling_own.py",
    "tokenizer.model",
    "generation_config.json",
    "model.gguf",
    "deep/down/vocab.txt",
    "deep/config.json",
    "license.py",
    ".hidden.json",
    "mcmodel",
)


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added(name: str, pruned: Path) -> None:
    (pruned / name).parent.mkdir(parents=True, exist_ok=True)
    (pruned / name).unlink(missing_ok=True)
    (pruned / name).write_text("{}")
    if name in read_manifest(pruned).files:
        assert verify(pruned).problems == [f"{name}: the file differs from the one that was written"]
    else:
        problem = f"{name}: not written by the run, and it may change what is loaded; move it away"
        assert verify(pruned).problems == [problem]


def test_an_adapter_that_was_added_is_refused_as_every_command_does(pruned: Path) -> None:
    (pruned / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config.json, the adapter for elsewhere .*Move adapter_config"):
        verify(pruned)


def test_links_and_shards_that_were_added(pruned: Path, dense: Path) -> None:
    (pruned / "additional_chat_templates").symlink_to(dense)
    (pruned / "more").mkdir()
    shutil.copy(next(dense.glob("*.safetensors")), pruned / "more" / "adapter_model.safetensors")
    assert verify(pruned).problems == [
        "additional_chat_templates: not written by the run, and it may change what is loaded; move it away",
        "more/adapter_model.safetensors: a shard that was not written by the run",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "NOTES.md",
        "LICENSE-APACHE",
        "NOTICE.txt",
        ".gitattributes",
        ".git/config",
        "report/index.html",
        "report/matrices.csv",
        "images/a.png",
        ".cache/huggingface/download/x.metadata",
    ],
)
def test_a_harmless_file_that_was_added(name: str, pruned: Path) -> None:
    (pruned / name).parent.mkdir(parents=True, exist_ok=True)
    (pruned / name).write_text("{}")
    assert verify(pruned).problems == []


def test_a_file_that_became_a_pipe_is_not_waited_for(pruned: Path) -> None:
    (pruned / "tokenizer.json").unlink()
    os.mkfifo(pruned / "tokenizer.json")
    assert verify(pruned).problems == ["tokenizer.json: the file is missing"]
