"""Anything that names a model, opened for streaming: a folder, a hub id, a GGUF file, or a module in memory."""

import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError, ModelStructureError, SecateurError
from secateur.files.checkpoint import CARD_FILE, Checkpoint, file_digest
from secateur.files.folders import companions, copy_files, locate
from secateur.files.reading import read_json, read_text
from secateur.launched import devices_named, launched
from secateur.models.opening.bars import without_bars
from secateur.models.opening.configuration import CONFIGURATION, PACKING_ENTRIES, reason
from secateur.models.opening.timm_models import PREFIX as TIMM
from secateur.models.opening.timm_models import (
    architecture_of,
    configuration_of,
    made_by_name,
    of_timm,
    timm_image_processor,
    write_timm_configuration,
)
from secateur.models.opening.wrapped import plain_module
from secateur.models.shape.sequences import timm_part
from secateur.models.shape.skeleton import Skeleton, Source
from secateur.models.shape.structure import build_skeleton, prepare, weightless
from secateur.models.weights.loaded import LoadedModel
from secateur.models.weights.quantised import DequantisedCheckpoint, check_dtypes, open_checkpoint


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to be streamed.

    `origin` is the provenance for the manifest; `write_companions(folder)` writes configuration, tokenizer and
    licence beside new weights; `expected(folder)` builds, without weights, the model that the files written there
    must fill; `load_tokenizer()`, `load_image_processor()` and `load_feature_extractor()` return the tokenizer, what
    makes pixel values of images and what makes features of sound, or None when there is none; `restore()` puts a module
    in memory back into the mode it was in.
    """

    skeleton: Skeleton
    origin: dict[str, Any]
    write_companions: Callable[[Path], None]
    load_tokenizer: Callable[[], Any]
    expected: Callable[[Path], nn.Module]
    restore: Callable[[], None] = lambda: None
    load_image_processor: Callable[[], Any] = lambda: None
    load_feature_extractor: Callable[[], Any] = lambda: None

    @property
    def facts(self) -> dict[str, Any]:
        """What tells this model from another, besides its weights and wherever it lies: shapes, configuration, code."""
        model: Any = self.skeleton.model
        configuration = {key: value for key, value in configuration_of(model).items() if key != "_name_or_path"}
        written = json.dumps(configuration, sort_keys=True, default=str).encode()
        module = type(model).__module__
        code = None if module.startswith("transformers.") else getattr(sys.modules.get(module), "__file__", None)
        facts = {key: value for key, value in self.origin.items() if key != "path"}
        facts["configuration"] = hashlib.sha256(written).hexdigest()
        if code is not None:
            facts["code"] = hashlib.sha256(Path(code).read_bytes()).hexdigest()
        return facts

    def reading(self, source: Source) -> "OpenedModel":
        """The same model with its weights from elsewhere, under the same names and in the same shapes."""
        held = self.skeleton
        return replace(self, skeleton=Skeleton(held.model, source, device=held.device, dtype=held.dtype))


def _missing(name: str) -> str | None:
    """Why there is no such device, where that can be said in fewer words than torch's."""
    kind = name.partition(":")[0]
    if kind == "mps":
        if not torch.backends.mps.is_available():
            return "there is no Apple GPU, or this torch is built without it"
        return "Apple GPUs have no float64, in which statistics are summed"
    if kind == "xpu" and not torch.xpu.is_available():
        return "there is no Intel GPU, or this torch is built without it"
    return None


def choose_device(name: str, option: str = "--device") -> torch.device:
    """The device that a name asks for; "auto" is a GPU, else the CPU.

    Of several names, separated by commas, and of several GPUs, each process that shares a run takes the one of its
    number on its machine.

    Raises `CheckpointError` that names the option where it cannot be used, or names another number of devices than
    there are processes on this machine.
    """
    place = launched()
    number = place.local_rank
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            return torch.device(name)
    names = devices_named(name)
    if len(names) > 1 and place.local_count not in (None, len(names)):
        running = "one process runs" if place.local_count == 1 else f"{place.local_count} processes run"
        raise CheckpointError(
            f'{option} "{name}" names {len(names)} devices, and {running} here. Name one device; the commands '
            "prune, gradients, eval, compare and recover --method block start a process for each of several."
        )
    name = names[number % len(names)]
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{number % torch.cuda.device_count()}"
    if (said := _missing(name)) is not None:
        raise CheckpointError(f'device "{name}" cannot be used here ({said}). Use {option} cpu or auto.')
    try:
        device = torch.device(name)
        if device.type == "cuda" and place.count > 1:
            torch.cuda.set_device(device)  # or libraries would take memory of the first GPU in every process
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f'device "{name}" cannot be used here ({reason}). Use {option} cpu or auto.') from None
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype to compute in; "auto" is "stored", the checkpoint's, on a GPU, and on a CPU not in half precision."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored
    if name == "stored":
        return stored
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
    if name.startswith(TIMM):
        return _open_module(made_by_name(name.removeprefix(TIMM)), chosen, dtype, name)
    folder = locate(name, revision)
    source = open_checkpoint(folder)
    empty = build_skeleton(folder, source, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(empty, source, device=chosen, dtype=choose_dtype(dtype, chosen, main_dtype(source)))
    check_dtypes(skeleton)
    skeleton.check_complete()
    checkpoint = source if isinstance(source, Checkpoint) else source.checkpoint
    origin: dict[str, Any] = {
        "kind": "checkpoint",
        "path": name if not Path(name).expanduser().is_dir() else str(folder.resolve()),
        "revision": revision or (folder.name if folder.parent.name == "snapshots" else None),
        "architecture": type(empty).__name__,
        "headers": {file.name: header.digest for file, header in checkpoint.headers.items()},
        "card": _card_facts(folder),
    }
    if left := [name for name in companions(folder)[1] if folder / name not in checkpoint.files]:
        origin["not_copied"] = left
    if isinstance(source, DequantisedCheckpoint):
        origin["dequantised"] = source.origin
    return OpenedModel(
        skeleton=skeleton,
        origin=origin,
        write_companions=lambda target: _copy_companions(folder, target),
        load_tokenizer=lambda: load_tokenizer(folder, trust_remote_code),
        load_image_processor=lambda: load_image_processor(folder, trust_remote_code),
        load_feature_extractor=lambda: load_feature_extractor(folder, trust_remote_code),
        expected=lambda target: _described(target, trust_remote_code),
    )


def open_source(model: str, revision: str | None = None) -> Source:
    """The weights alone, under the names of the checkpoint; a GGUF file has to be dequantised for them."""
    if model.endswith(".gguf"):
        return open_model(model, device="cpu").skeleton.source
    return open_checkpoint(locate(model, revision))


def main_dtype(source: Source) -> torch.dtype:
    """The dtype that most of the floating-point weights have, counted in bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for name in source.names:
        dtype = source.dtype(name)
        if dtype.is_floating_point:
            sizes[dtype] += dtype.itemsize * math.prod(source.shape(name))
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def _open_module(given: nn.Module, device: torch.device | None, dtype: str, name: str | None = None) -> OpenedModel:
    with ExitStack() as restoring:
        model, wrap = plain_module(given)
        restoring.callback(wrap)
        if hasattr(model, "peft_config"):
            raise ModelStructureError(
                f"{type(model).__name__}: a model with adapters; merge them first with "
                "model = model.merge_and_unload()."
            )
        first = first_parameter(model, dtype)
        if device is not None:
            model.to(device)
        restoring.callback(prepare(model))
        source = LoadedModel(model)
        skeleton = Skeleton(model, source, device=first.device, dtype=first.dtype, resident=True)
        check_dtypes(skeleton)

        def write(target: Path) -> None:
            if timm_part(model) is model:
                write_timm_configuration(model, target)
                return
            if not hasattr(model, "config"):
                raise ModelStructureError(
                    f"{type(model).__name__}: has no config, so it cannot be written as a checkpoint."
                )
            _write_configuration(model, target)

        return OpenedModel(
            skeleton=skeleton,
            origin={
                "kind": "module",
                "path": name or getattr(model, "name_or_path", "") or None,
                "architecture": architecture_of(model),
            },
            write_companions=write,
            load_tokenizer=lambda: None,
            load_image_processor=lambda: timm_image_processor(model),
            expected=lambda target: _same_class(model, target),
            restore=restoring.pop_all().close,
        )


def first_parameter(module: nn.Module, dtype: str) -> nn.Parameter:
    """The first parameter of a module in memory, whose dtype is the module's.

    Raises `ModelStructureError` where there is none, or another dtype is asked for: a module is used as it is.
    """
    first = next(module.parameters(), None)
    if first is None:
        raise ModelStructureError(f"{type(module).__name__}: has no parameters.")
    if dtype != "auto" and choose_dtype(dtype, first.device, first.dtype) != first.dtype:
        raise ModelStructureError(
            f"{type(module).__name__}: in memory as {first.dtype}; a module is used as it is. "
            f"Convert it first, or leave dtype at auto (got {dtype})."
        )
    return first


def _described(folder: Path, trust_remote_code: bool = False) -> nn.Module:
    """The model that the configuration in a written folder describes, without weights."""
    return build_skeleton(folder, Checkpoint(folder), trust_remote_code=trust_remote_code)


def _same_class(model: nn.Module, target: Path) -> nn.Module:
    """A model of the same class without weights, as the written configuration has it.

    For a module that is not one of transformers' models, what its configuration describes.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return _described(target)
    config = type(model.config).from_pretrained(target)
    with weightless() as finish:
        empty: nn.Module = type(model)(config)
        finish(empty)
    prepare(empty)
    return empty


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
        expected=_described,
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
        with without_bars():
            return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=dtype)
    except Exception as error:  # the reader of the format raises whatever a damaged file leads it to
        raise CheckpointError(f"{file}: transformers cannot dequantise it: {reason(error)}") from None


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file. Raises `CheckpointError` when transformers cannot convert it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # the converters raise whatever their tokenizer library does
        raise CheckpointError(f"{file}: transformers cannot convert its tokenizer: {error}") from None


def _write_configuration(model: Any, target: Path) -> None:
    config = copy(model.config)
    if not getattr(config, "architectures", None):  # by which other engines choose their code
        config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    file = target / CONFIGURATION
    written = read_json(file, dict[str, Any])
    rotation = written.get("rope_parameters")
    if isinstance(rotation, dict) and "rope_theta" in rotation:  # the older name, which others still read alone
        written = {"rope_theta": rotation["rope_theta"], **written}
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(target)
    clean_configuration(target / "config.json")


def _copy_companions(folder: Path, target: Path) -> None:
    copy_files(folder, companions(folder)[0], target)
    clean_configuration(target / "config.json")


def _card_facts(folder: Path) -> dict[str, Any]:
    """Licence and languages as the model card of a checkpoint states them; empty where there is none to read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = read_text(folder / CARD_FILE, limit=1 << 20)
        found = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except (SecateurError, ValueError, TypeError, RecursionError, YAMLError):
        return {}
    facts = {key: found.get(key) for key in ("license", "license_name", "license_link", "language")}
    return {
        key: value
        for key, value in facts.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    }


def clean_configuration(file: Path) -> None:
    """Drop packing entries from a copied config.json; without any, the file stays byte for byte as it was."""
    config = read_json(file, dict[str, Any])
    plain = _without_packing(config)
    if plain != config:
        file.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _without_packing(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without packing entries, also in those inside it."""
    return {
        key: _without_packing(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in PACKING_ENTRIES
    }


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a checkpoint, or None when it has none. Raises `CheckpointError` for one that is damaged."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the tokenizer's own library, or code beside the weights raises
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason(error)}") from None


def load_image_processor(folder: Path, trust_remote_code: bool) -> Any:
    """The image processor of a checkpoint, or None when it has none. Raises `CheckpointError` for a damaged one."""
    return _load_processor(folder, trust_remote_code, "AutoImageProcessor", "image processor")


def load_feature_extractor(folder: Path, trust_remote_code: bool) -> Any:
    """The feature extractor of a checkpoint, or None when it has none. Raises `CheckpointError` for a damaged one."""
    return _load_processor(folder, trust_remote_code, "AutoFeatureExtractor", "feature extractor")


def _load_processor(folder: Path, trust_remote_code: bool, kind: str, name: str) -> Any:
    if not (folder / "preprocessor_config.json").exists() and not of_timm(folder):
        return None
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers, or code beside the weights raises
        raise CheckpointError(f"{folder}: its {name} cannot be loaded: {reason(error)}") from None
