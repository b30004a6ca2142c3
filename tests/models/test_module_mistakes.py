"""Modules, devices and dtypes that cannot be pruned with; a module is left as it was."""

# ruff: noqa: F811 - fixtures of another file

import re
from pathlib import Path

import torch
from torch import nn

import tiny
from refused_runs import (
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError

# Modules in memory


def test_modules_without_a_block_stack(refused: Refused) -> None:
    end = "Secateur prunes models whose blocks lie in such lists."
    refused(
        ModelStructureError,
        f"Sequential: no stack of blocks (nn.ModuleList) found in it, only 0, 1. {end}",
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    )
    refused(
        ModelStructureError,
        f"Linear: no stack of blocks (nn.ModuleList) found in it; it has no submodules at all. {end}",
        nn.Linear(4, 4),
    )
    refused(ModelStructureError, "ReLU: has no parameters.", nn.ReLU())


def test_a_module_with_adapters(refused: Refused) -> None:
    module = tiny.build("llama")
    module.peft_config = {"default": None}
    refused(
        ModelStructureError,
        "LlamaForCausalLM: a model with adapters; merge them first with model = model.merge_and_unload().",
        module,
    )


def test_a_module_on_the_meta_device(refused: Refused) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
    refused(
        ModelStructureError,
        "ModuleDict: its weights are offloaded or spread over devices (device_map, blocks.0.weight is on meta). "
        "Give the folder or hub id instead; Secateur streams it.",
        module,
    )
    loaded = tiny.build("llama")
    loaded.hf_device_map = {"": "disk"}
    refused(
        ModelStructureError,
        "LlamaForCausalLM: its weights are offloaded or spread over devices (device_map). "
        "Give the folder or hub id instead; Secateur streams it.",
        loaded,
    )


def test_a_module_in_another_dtype(refused: Refused) -> None:
    refused(
        ModelStructureError,
        "LlamaForCausalLM: in memory as torch.float32; a module is used as it is. "
        "Convert it first, or leave dtype at auto (got bfloat16).",
        tiny.build("llama"),
        dtype="bfloat16",
    )


def test_a_module_is_left_as_it_was(refused: Refused) -> None:
    module = tiny.build("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refused(
        CalibrationError,
        "sample 0, position 0: token id 128 is outside the vocabulary of 128 ids (64 such ids in all); "
        "does the tokenizer belong to this model?",
        module,
        calibration=torch.full((4, 16), 128),
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


# Devices and dtypes


def test_an_unknown_device(model: Path, refused: Refused) -> None:
    for device in ("gpu", "cuda:99", "meta"):
        refused(
            CheckpointError,
            re.compile(rf'device "{device}" cannot be used here \(.+\)\. Use --device cpu or auto\.'),
            model,
            device=device,
        )


def test_an_unknown_dtype(model: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        'dtype must be auto, float32, bfloat16, float16, float64; got "int8".',
        model,
        dtype="int8",
    )
