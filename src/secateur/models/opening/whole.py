"""A model that transformers loads as a whole, for what cannot be streamed: generation and evaluation harnesses."""

import gc
import math
import os
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError, ModelStructureError
from secateur.files.checkpoint import Checkpoint
from secateur.files.folders import locate
from secateur.files.scratch import scratch_folder
from secateur.models.flow.memory import available_bytes, trim
from secateur.models.opening.configuration import check_no_code, read_configuration, reason
from secateur.models.opening.opened import (
    choose_device,
    choose_dtype,
    first_parameter,
    gguf_tokenizer,
    load_gguf,
    load_tokenizer,
    main_dtype,
    open_model,
)
from secateur.models.shape.causality import check_predicts, encoder_decoder
from secateur.models.shape.skeleton import Source
from secateur.models.shape.structure import find_blocks
from secateur.models.weights.quantised import DequantisedCheckpoint, open_checkpoint

WANTED = "text or a loss of the next token"
WORKING_SHARE = 1.2  # of the weights' size must be free for a model to be loaded onto one device


class WholeModel:
    """A model and its tokenizer, loaded when they are first asked for, and let go of by `close`.

    `name` is what it was called, `path` its folder or GGUF file (None for a module in memory), `device` and `dtype`
    where and in what it computes. A checkpoint that does not fit into the device's free memory is spread by accelerate
    over what there is: other GPUs, host memory, and at last the disk. Use it in a `with` block.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | nn.Module",
        *,
        tokenizer: Any = None,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device_name, self._trust = device, trust_remote_code
        self._given_tokenizer = tokenizer
        self._offloaded = ExitStack()
        self.device = choose_device(device)
        self.path: Path | None = None
        self._module: nn.Module | None = None
        if isinstance(model, nn.Module):
            self._module, self.name = model, getattr(model, "name_or_path", "") or type(model).__name__
            first = first_parameter(model, dtype)
            self.dtype = first.dtype
            self._training = {name: part.training for name, part in model.named_modules()}
            if device == "auto":
                self.device = first.device
            else:
                model.to(self.device)
            return
        self.name = os.fspath(model)
        self._checkpoint: Checkpoint | DequantisedCheckpoint | None = None
        if self.name.endswith(".gguf"):
            self.path = Path(self.name).expanduser()
            self.dtype = choose_dtype(dtype, self.device, torch.float32)
        else:
            self.path = locate(self.name, revision)
            self._checkpoint = open_checkpoint(self.path)
            self.dtype = choose_dtype(dtype, self.device, main_dtype(self._checkpoint))

    @cached_property
    def module(self) -> Any:
        """The model, in eval mode. Raises `CheckpointError` when transformers cannot load it."""
        if self._module is None:
            self._module = self._load()
        return self._module.eval()

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer. Raises `CheckpointError` when it has none."""
        if self._given_tokenizer is not None:
            return self._given_tokenizer
        if self.path is None:
            raise CheckpointError(f"{self.name}: a module in memory has no tokenizer; pass one with tokenizer=.")
        found = gguf_tokenizer(self.path) if self._checkpoint is None else load_tokenizer(self.path, self._trust)
        if found is None:
            raise CheckpointError(f"{self.path}: no tokenizer in it. Copy the tokenizer of the dense model there.")
        return found

    def _load(self) -> nn.Module:
        assert self.path is not None
        if self._checkpoint is None:
            return load_gguf(self.path, self.dtype).to(self.device)
        placement = self._placement(self._checkpoint)
        if type(self._checkpoint) is not Checkpoint:
            return self._read_here(self._checkpoint, fits=not placement)
        module = load_whole(self.path, self.dtype, trust_remote_code=self._trust, **placement)
        return module if placement else module.to(self.device)

    def _read_here(self, source: Checkpoint | DequantisedCheckpoint, *, fits: bool) -> nn.Module:
        """The model with the weights as they are read here: transformers dequantises some formats and expands none."""
        if not fits:
            raise CheckpointError(
                f"{source.folder}: as plain weights it does not fit into the free memory of {self.device}, and only "
                "plain checkpoints are spread over devices. Choose another device, or fewer other programs."
            )
        dtype = str(self.dtype).removeprefix("torch.")
        opened = open_model(source.folder, device=str(self.device), dtype=dtype, trust_remote_code=self._trust)
        module: Any = opened.skeleton.load_all()
        read_generation_config(module, source.folder)
        return module  # type: ignore[no-any-return]

    def _placement(self, source: Source) -> dict[str, Any]:
        """Nothing for a model that fits onto its device, else how accelerate is to spread it."""
        weights = sum(self.dtype.itemsize * math.prod(source.shape(name)) for name in source.names)
        free = free_bytes(self.device)
        if weights * WORKING_SHARE <= free:
            return {}
        folder = self._offloaded.enter_context(scratch_folder())
        placement: dict[str, Any] = {"device_map": "auto", "offload_folder": str(folder)}
        if self.device.type == "cpu":
            placement["max_memory"] = {"cpu": int(free / WORKING_SHARE)}
        elif self._device_name != "auto":
            host = int(free_bytes(torch.device("cpu")) / WORKING_SHARE)
            placement["max_memory"] = {self.device.index or 0: int(free / WORKING_SHARE), "cpu": host}
        return placement

    def close(self) -> None:
        """Let go of the model and free its memory; a module that was passed in stays its owner's, in its own mode."""
        if self.path is None and self._module is not None:
            for name, part in self._module.named_modules():
                part.training = self._training.get(name, part.training)
        self.__dict__.pop("module", None)
        self.__dict__.pop("tokenizer", None)
        self._module = None
        gc.collect()
        torch.cuda.empty_cache()
        trim()
        self._offloaded.close()

    def __enter__(self) -> "WholeModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load_whole(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool, **placement: Any) -> nn.Module:
    """The model in a folder as transformers loads it, a multimodal one included.

    Raises `CheckpointError` when transformers cannot.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    found = read_configuration(folder)
    if not trust_remote_code:
        check_no_code(folder, found)
    config: Any = None
    with suppress(Exception):  # which the loading will meet again
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):  # whose decoder transformers would load alone
        raise encoder_decoder(next(iter(config.architectures or ()), config.model_type), WANTED)
    failure: Exception | None = None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            module: nn.Module = auto.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # of other formats, some are pickles
                **placement,
            )
            check_predicts(module, find_blocks(module), WANTED)
            return module
        except (MemoryError, torch.OutOfMemoryError, ModelStructureError):
            raise
        except Exception as error:  # whatever transformers, or code beside the weights raises
            failure = failure or error
    assert failure is not None
    raise CheckpointError(f"{folder}: transformers cannot load it: {reason(failure)}") from None


def positions_of(module: Any) -> int | None:
    """The longest sequence that a model's configuration allows for, or None when it names no limit."""
    found: int | None = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    return found


def read_generation_config(module: Any, folder: Path) -> None:
    """Give the model the generation_config.json of its folder, where there is one."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            module.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{folder}/generation_config.json: {reason(error)}") from None


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
