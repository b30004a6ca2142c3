"""The configuration of a checkpoint: read within limits, compared with the shards, made into transformers' own."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import CheckpointError
from secateur.files.reading import check_inside, read_json

CONFIGURATION = "config.json"
CONFIGURATION_BYTES = 16 << 20
# Entries that describe how weights are packed; loaders refuse dense weights that carry them.
PACKING_ENTRIES = ("quantization_config", "sparsity_config", "compression_config")

DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size")
MANY_BLOCKS = 256  # so many are built in any case: some models repeat their blocks
LARGER = 16  # a model so many times larger than its shards does not belong to them
SMALL_MODEL = 1 << 24  # weights; building them takes no time

Shapes = Mapping[str, tuple[int, ...]]


def read_configuration(folder: Path) -> dict[str, Any]:
    """What config.json holds, as it is. Raises `CheckpointError` where there is none, or no JSON object in it."""
    if not (folder / CONFIGURATION).exists():
        raise CheckpointError(f"{folder}: no {CONFIGURATION} in it. Give the folder of a whole checkpoint.")
    check_inside(folder / CONFIGURATION, folder)
    found: dict[str, Any] = read_json(folder / CONFIGURATION, dict[str, Any], limit=CONFIGURATION_BYTES)
    return found


def load_configuration(folder: Path, shapes: Shapes, *, trust_remote_code: bool = False) -> Any:
    """Transformers' configuration of a folder, without its entries about packed weights.

    Raises `CheckpointError` where it cannot be that of tensors of these shapes, or transformers cannot use it.
    """
    found = read_configuration(folder)
    if not trust_remote_code:
        check_no_code(folder, found)
    compare_with_shards(folder, found, shapes)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers, a validator of it, or code beside the weights raises
        raise CheckpointError(f"{folder}/{CONFIGURATION}: transformers cannot use it: {reason(error)}") from None
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        for entry in PACKING_ENTRIES:
            if hasattr(part, entry):
                delattr(part, entry)
    return config


def check_no_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a configuration that names a kernel of the hub, which transformers would run.

    Those are entries such as `attn_implementation`, at any depth, with the id of a repository. Code beside the weights
    needs no check here: transformers asks for trust itself.
    """
    names = ("_implementation", "_implementation_internal")
    for key, value in config.items():
        asked = list(value.values()) if isinstance(value, Mapping) else [value]
        for name in asked if key.endswith(names) else ():
            if isinstance(name, str) and "/" in name:
                raise CheckpointError(
                    f"{folder}/{CONFIGURATION}: {key} is {name[:200]}, code from the hub that would be run here. "
                    "Remove the entry; with --trust-remote-code it is downloaded and run."
                )
        if isinstance(value, Mapping):
            check_no_code(folder, value)


def compare_with_shards(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise `CheckpointError` for a model far larger than tensors of these shapes, before any of it is built."""
    numbered = [part for name in shapes for part in name.split(".") if part.isdigit() and len(part) < 9]
    blocks = 1 + max(map(int, numbered), default=0)
    widest = max((size for shape in shapes.values() for size in shape), default=0)
    for where, name, value in _numbers(config):
        if name in DEPTHS and value > max(MANY_BLOCKS, 4 * blocks):
            raise _other_model(folder, f"{where} is {value:,}", f"the names of its tensors count to {blocks:,} blocks")
        if name in WIDTHS and value > LARGER * widest:
            raise _other_model(folder, f"{where} is {value:,}", f"no side of its tensors is longer than {widest:,}")


def _numbers(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, int]]:
    """The whole numbers of a configuration and of those inside it: where, name, value."""
    for name, value in config.items():
        if type(value) is int:
            yield f"{path}{name}", name, value
        elif isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}.")


def _other_model(folder: Path, configured: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}/{CONFIGURATION}: {configured}, and {found}. The two do not belong together; download the checkpoint "
        "again."
    )


@contextlib.contextmanager
def limited(folder: Path, shapes: Shapes) -> Iterator[None]:
    """While a model is built, raise `CheckpointError` as soon as it is far larger than tensors of these shapes."""
    held = sum(math.prod(shape) for shape in shapes.values())
    most, built = LARGER * held + SMALL_MODEL, 0
    register = nn.Module.register_parameter

    def count(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal built
        built += 0 if param is None else param.numel()
        if built > most:
            raise _other_model(folder, f"asks for more than {built:,} weights", f"its tensors hold {held:,}")
        register(module, name, param)

    nn.Module.register_parameter = count  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def reason(error: BaseException) -> str:
    """The message of another library's exception, in one line; for a missing module, the package to install."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"it needs the package {package}, which is not installed here: pip install {package}"
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
