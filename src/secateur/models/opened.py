"""Anything that names a model, opened for streaming: a folder, a hub id, a GGUF file, or a module in memory."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError, ModelStructureError
from secateur.models.checkpoint import CARD_FILE, Checkpoint, companion_files, file_digest, locate
from secateur.models.loaded import LoadedModel
from secateur.models.skeleton import Skeleton, Source
from secateur.models.structure import build_skeleton, prepare
from secateur.models.writer import writing

# Entries of config.json that describe how weights are packed; loaders refuse dense weights that carry them.
PACKING_ENTRIES = ("quantization_config", "sparsity_config", "compression_config")


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to be streamed.

    `origin` is the provenance for the manifest; `write_companions(folder)` writes configuration, tokenizer and
    licence beside new weights; `load_tokenizer()` gives the tokenizer, or None when there is none; `restore()` sets a
    module in memory back into the mode in which it was given.
    """

    skeleton: Skeleton
    origin: dict[str, Any]
    write_companions: Callable[[Path], None]
    load_tokenizer: Callable[[], Any]
    restore: Callable[[], None] = lambda: None

    def reading(self, source: Source) -> "OpenedModel":
        """The same model with its weights from elsewhere, under the same names and in the same shapes."""
        held = self.skeleton
        return replace(self, skeleton=Skeleton(held.model, source, device=held.device, dtype=held.dtype))


def choose_device(name: str, option: str = "--device") -> torch.device:
    """The device that a name asks for; "auto" is the first GPU, else the CPU.

    Raises `CheckpointError` that names the option where it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f'device "{name}" cannot be used here ({reason}). Use {option} cpu or auto.') from None
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in; "auto" is the checkpoint's on a GPU, and float32 for half precision on a CPU."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored
    if name not in names:
        raise CheckpointError(f'dtype must be auto, {", ".join(names)}; got "{name}".')
    return names[name]


def open_model(
    model: str | os.PathLike[str] | nn.Module | OpenedModel,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> OpenedModel:
    """The model opened; one that is open already stays as it is.

    Raises `CheckpointError` or `ModelStructureError` for anything that is not a model.
    """
    if isinstance(model, OpenedModel):
        return model
    chosen = choose_device(device)
    if isinstance(model, nn.Module):
        return _open_module(model, chosen if device != "auto" else None, dtype)
    name = os.fspath(model)
    if name.endswith(".gguf"):
        return _open_gguf(Path(name).expanduser(), chosen, dtype)
    folder = locate(name, revision)
    checkpoint = Checkpoint(folder)
    empty = build_skeleton(folder, trust_remote_code=trust_remote_code)
    stored = main_dtype(checkpoint)
    skeleton = Skeleton(empty, checkpoint, device=chosen, dtype=choose_dtype(dtype, chosen, stored))
    skeleton.check_complete()
    origin = {
        "kind": "checkpoint",
        "path": name if not Path(name).expanduser().is_dir() else str(folder.resolve()),
        "revision": revision or (folder.name if folder.parent.name == "snapshots" else None),
        "architecture": type(empty).__name__,
        "headers": {file.name: header.digest for file, header in checkpoint.headers.items()},
        "card": _card_facts(folder),
    }
    return OpenedModel(
        skeleton=skeleton,
        origin=origin,
        write_companions=lambda target: _copy_companions(folder, target),
        load_tokenizer=lambda: load_tokenizer(folder, trust_remote_code),
    )


def open_source(model: str, revision: str | None = None) -> Source:
    """The weights alone, under the names of the checkpoint; a GGUF file has to be dequantised for them."""
    if model.endswith(".gguf"):
        return open_model(model, device="cpu").skeleton.source
    return Checkpoint(locate(model, revision))


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the floating-point weights have."""
    sizes: dict[torch.dtype, int] = {}
    for name, record in checkpoint.tensors.items():
        dtype = checkpoint.dtype(name)
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + record.bytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def _open_module(model: nn.Module, device: torch.device | None, dtype: str) -> OpenedModel:
    if hasattr(model, "peft_config"):
        raise ModelStructureError(
            f"{type(model).__name__}: a model with adapters; merge them first with model = model.merge_and_unload()."
        )
    parameters = list(model.parameters())
    if not parameters:
        raise ModelStructureError(f"{type(model).__name__}: has no parameters.")
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None or getattr(model, "hf_device_map", None):
        raise ModelStructureError(
            f"{type(model).__name__}: its weights are offloaded or spread over devices (device_map"
            f"{f', {meta} is on meta' if meta else ''}). Give the folder or hub id instead; Secateur streams it."
        )
    if dtype != "auto" and choose_dtype(dtype, parameters[0].device, parameters[0].dtype) != parameters[0].dtype:
        raise ModelStructureError(
            f"{type(model).__name__}: in memory as {parameters[0].dtype}; a module is used as it is. "
            f"Convert it first, or leave dtype at auto (got {dtype})."
        )
    if device is not None:
        model.to(device)
    restore = prepare(model)
    source = LoadedModel(model)
    skeleton = Skeleton(model, source, device=parameters[0].device, dtype=parameters[0].dtype, resident=True)

    def write(target: Path) -> None:
        if not hasattr(model, "config"):
            raise ModelStructureError(
                f"{type(model).__name__}: has no config, so it cannot be written as a checkpoint."
            )
        _write_configuration(model, target)

    return OpenedModel(
        skeleton=skeleton,
        origin={
            "kind": "module",
            "path": getattr(model, "name_or_path", "") or None,
            "architecture": type(model).__name__,
        },
        write_companions=write,
        load_tokenizer=lambda: None,
        restore=restore,
    )


def _open_gguf(file: Path, device: torch.device, dtype: str) -> OpenedModel:
    chosen = choose_dtype(dtype, device, torch.float32)
    model = load_gguf(file, chosen)
    model.to(device)
    prepare(model)

    def write(target: Path) -> None:
        _write_configuration(model, target)
        gguf_tokenizer(file).save_pretrained(target)

    return OpenedModel(
        skeleton=Skeleton(model, LoadedModel(model), device=device, dtype=chosen, resident=True),
        origin={
            "kind": "gguf",
            "path": str(file.resolve()),
            "revision": None,
            "architecture": type(model).__name__,
            "sha256": file_digest(file),
        },
        write_companions=write,
        load_tokenizer=lambda: gguf_tokenizer(file),
    )


def load_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF file, dequantised in host memory. Raises `CheckpointError` when that is not possible."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file.")
    try:
        import gguf  # noqa: F401 - transformers asks for it in the middle of loading
    except ImportError:
        raise CheckpointError(f'{file}: reading GGUF needs the gguf package: pip install "secateur[gguf]"') from None
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: transformers cannot dequantise it: {error}") from None


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file. Raises `CheckpointError` when transformers cannot convert it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # the converters raise whatever their tokenizer library does
        raise CheckpointError(f"{file}: transformers cannot convert its tokenizer: {error}") from None


def _write_configuration(model: Any, target: Path) -> None:
    model.config.save_pretrained(target)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(target)
    _clean_configuration(target / "config.json")


def _copy_companions(folder: Path, target: Path) -> None:
    for file in companion_files(folder):
        try:
            original = file.open("rb")
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
        with original, writing(target / file.name), (target / file.name).open("wb") as copy:
            shutil.copyfileobj(original, copy)
    _clean_configuration(target / "config.json")


def _card_facts(folder: Path) -> dict[str, Any]:
    """What the model card of a checkpoint says of its licence and languages; nothing where there is none to read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        found = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, YAMLError):  # also UnicodeDecodeError
        return {}
    return {key: found[key] for key in ("license", "license_name", "license_link", "language") if key in found}


def _clean_configuration(file: Path) -> None:
    """Drop packing entries from a copied config.json; without any, the file stays byte for byte as it was."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if any(entry in config for entry in PACKING_ENTRIES):
        kept = {k: v for k, v in config.items() if k not in PACKING_ENTRIES}
        file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint, or None when it has none. Raises `CheckpointError` for one that is damaged."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from None
