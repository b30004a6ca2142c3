"""Checkpoints that are damaged, incomplete or none at all are refused in one sentence."""

# ruff: noqa: F811 - fixtures of another file

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from refused_runs import (
    FIRST,
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    configure,
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.core.problem import Method
from secateur.errors import CheckpointError, SecateurError
from secateur.files.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune


@pytest.fixture
def sharded(models: Path, tmp_path: Path) -> Path:
    """A model of the test's own, in several shards."""
    return Path(shutil.copytree(models / "sharded", tmp_path / "model"))


# Damaged checkpoints


def test_garbage_in_the_place_of_a_header(model: Path, refused: Refused) -> None:
    file = model / SINGLE_FILE
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 100 + data[108:])
    refused(
        CheckpointError,
        re.compile(
            re.escape(f"{file}: the safetensors header: not JSON ('utf-8' codec can't decode")
            + r".*\)\. Download it again\."
        ),
        model,
    )
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(
        CheckpointError,
        f"{file}: not a safetensors file, or cut short: the header claims {struct.unpack('<Q', b'version ')[0]} bytes, "
        "the file has 56. Download or copy it again.",
        model,
    )


def test_a_truncated_shard(sharded: Path, refused: Refused) -> None:
    file = Checkpoint(sharded).files[1]
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    refused(
        CheckpointError,
        f"{file}: truncated or damaged: the header describes {size} bytes, the file has {size - 1000}. "
        "Download or copy it again.",
        sharded,
    )


@pytest.mark.parametrize("size", [0, 5, 7])
def test_a_shard_shorter_than_its_first_number(size: int, sharded: Path, refused: Refused) -> None:
    file = Checkpoint(sharded).files[-1]
    os.truncate(file, size)
    refused(
        CheckpointError,
        f"{file}: cut short: the file has {size} bytes, and the length of a safetensors header alone takes 8. "
        "Download or copy it again.",
        sharded,
    )


def test_a_missing_shard(sharded: Path, refused: Refused) -> None:
    files = Checkpoint(sharded).files
    files[2].unlink()
    refused(
        CheckpointError,
        f"{files[2]}: the shard is missing, and {INDEX_FILE} lists it ({len(files)} shards expected). "
        "Download the checkpoint again.",
        sharded,
    )


def test_an_index_that_names_an_absent_tensor(sharded: Path, refused: Refused) -> None:
    index = sharded / INDEX_FILE
    value = json.loads(index.read_text())
    file = value["weight_map"][FIRST]
    value["weight_map"]["absent"] = file
    index.write_text(json.dumps(value))
    refused(
        CheckpointError,
        f"{index}: lists the tensor absent in {file}, which does not hold it. "
        "Index and shards do not belong together; download the checkpoint again.",
        sharded,
    )


def test_an_index_that_is_not_json(sharded: Path, refused: Refused) -> None:
    (sharded / INDEX_FILE).write_text("<html>404</html>")
    refused(
        CheckpointError,
        f"{sharded / INDEX_FILE}: not JSON (Expecting value: line 1 column 1 (char 0)). Download it again.",
        sharded,
    )
    (sharded / INDEX_FILE).write_text("[]")
    refused(
        CheckpointError,
        f"{sharded / INDEX_FILE}: damaged, or not what its name says: Expected `object`, got `array`. "
        "Download it again.",
        sharded,
    )


@pytest.mark.parametrize("method", [wanda, magnitude])
@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_parameter_without_a_tensor(name: str, method: Callable[[], Method], model: Path, refused: Refused) -> None:
    tensors = load_file(model / SINGLE_FILE)
    del tensors[name]
    save_file(tensors, model / SINGLE_FILE)
    refused(
        CheckpointError,
        f"{model}: no tensor for the parameter {name} of LlamaForCausalLM. "
        "Is the checkpoint complete, and does its config.json belong to it?",
        model,
        method=method(),
    )


def test_a_block_too_many_in_the_configuration(model: Path, refused: Refused) -> None:
    configure(model, num_hidden_layers=4)
    refused(
        CheckpointError,
        f"{model}: no tensor for the parameter model.layers.3.self_attn.q_proj.weight (and 8 more) of "
        "LlamaForCausalLM. Is the checkpoint complete, and does its config.json belong to it?",
        model,
    )


@pytest.mark.parametrize("method", [wanda, magnitude])
def test_shapes_that_do_not_fit_the_configuration(method: Callable[[], Method], model: Path, refused: Refused) -> None:
    configure(model, intermediate_size=64)
    refused(
        CheckpointError,
        f"{model}: {FIRST} is of shape (32, 48), and config.json asks for (32, 64). "
        "The two do not belong together; download the checkpoint again.",
        model,
        method=method(),
    )


def test_a_vocabulary_that_does_not_fit_the_configuration(model: Path, refused: Refused) -> None:
    configure(model, vocab_size=256)
    refused(
        CheckpointError,
        f"{model}: lm_head.weight is of shape (128, 32), and config.json asks for (256, 32). "
        "The two do not belong together; download the checkpoint again.",
        model,
    )


# What is not a checkpoint that can be pruned


def test_no_configuration(model: Path, refused: Refused) -> None:
    (model / "config.json").unlink()
    refused(CheckpointError, f"{model}: no config.json in it. Give the folder of a whole checkpoint.", model)


def test_a_configuration_that_is_not_json(model: Path, refused: Refused) -> None:
    (model / "config.json").write_text("{")
    refused(
        CheckpointError, re.compile(re.escape(f"{model}/config.json: not JSON (Expecting property name") + ".+"), model
    )


def test_an_unknown_architecture(model: Path, refused: Refused) -> None:
    configure(model, model_type="nonsense")
    refused(
        CheckpointError,
        re.compile(re.escape(f"{model}/config.json: transformers cannot use it: ") + ".*nonsense.*", re.DOTALL),
        model,
    )


def test_a_folder_without_weights(model: Path, refused: Refused) -> None:
    (model / SINGLE_FILE).unlink()
    refused(
        CheckpointError,
        f"{model}: no {SINGLE_FILE} and no {INDEX_FILE} in it. Give a folder that save_pretrained wrote, a hub id, "
        "or a GGUF file.",
        model,
    )


def test_a_file_in_the_place_of_a_folder(model: Path, refused: Refused) -> None:
    file = model / SINGLE_FILE
    refused(CheckpointError, f"{file}: give the folder of the checkpoint, not one of its files.", file)


def test_weights_in_pytorch_files(model: Path, refused: Refused) -> None:
    torch.save(load_file(model / SINGLE_FILE), model / "pytorch_model.bin")
    (model / SINGLE_FILE).unlink()
    refused(
        CheckpointError,
        f"{model}: holds PyTorch .bin weights only, and Secateur reads safetensors. Convert it once with\n"
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{model}', dtype='auto').save_pretrained('{model}-safetensors'); "
        f"T.from_pretrained('{model}').save_pretrained('{model}-safetensors')\"",
        model,
    )


def test_a_folder_of_gguf_files(model: Path, refused: Refused) -> None:
    (model / SINGLE_FILE).rename(model / "model-q8.gguf")
    refused(
        CheckpointError, f"{model}: holds GGUF weights; give the file itself, such as {model / 'model-q8.gguf'}.", model
    )
    refused(CheckpointError, f"{model / 'other.gguf'}: no such file.", model / "other.gguf")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp4"])
def test_a_quantised_checkpoint(method: str, model: Path, refused: Refused) -> None:
    configure(model, quantization_config={"quant_method": method, "bits": 4})
    refused(
        CheckpointError,
        f"{model}: the weights are quantised ({method}; config.json: quantization_config), in a format that Secateur "
        "does not dequantise. Use the unquantised checkpoint, or load this one with transformers, dequantise it "
        "(model.dequantize()), save it, and use that.",
        model,
    )


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_id_without_a_network(
    name: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    refused(
        CheckpointError,
        f"{name}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no copy in "
        f"the cache. Give a local folder, or download it first: hf download {name}",
        name,
    )


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/at/all", "a/b/c", "no thing"])
def test_neither_a_folder_nor_a_hub_id(name: str, refused: Refused) -> None:
    refused(CheckpointError, f"{name}: no such folder, and not a hub id (owner/name) either.", name)


# open_model says the same


def test_open_model_refuses_what_prune_refuses(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX_FILE).write_text("")
    for bad in (sharded, tmp_path / "nothing", nn.Linear(2, 2)):
        with pytest.raises(SecateurError) as by_open:
            open_model(bad)
        with pytest.raises(SecateurError) as by_prune:
            prune(bad, method=magnitude(), output=tmp_path / "out")
        assert (type(by_open.value), str(by_open.value)) == (type(by_prune.value), str(by_prune.value))
