"""The structure of a model, found out rather than known: its stack of blocks, and a skeleton to fill."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import CheckpointError, ModelStructureError, SecateurError
from secateur.models.opening.classes import auto_classes
from secateur.models.opening.configuration import limited, load_configuration, reason

if TYPE_CHECKING:
    from secateur.models.shape.skeleton import Source


@dataclass(frozen=True)
class Block:
    """One block of the stack: its position, its path in the model, its module."""

    index: int
    path: str
    module: nn.Module


def find_blocks(model: nn.Module) -> tuple[str, list[Block]]:
    """The path of the block stack and its blocks: the `ModuleList` with most parameters, of a decoder if it has one.

    Raises `ModelStructureError` when there is none.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelStructureError(
            f"{type(model).__name__}: an encoder-decoder; Secateur prunes models with one stack of blocks."
        )
    decoder = decoder_of(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    candidates = {
        f"{prefix}.{name}".strip("."): module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not candidates:
        children = ", ".join(name for name, _ in decoder.named_children())
        raise ModelStructureError(
            f"{type(model).__name__}: no stack of blocks (nn.ModuleList) found in it"
            f"{f', only {children}' if children else '; it has no submodules at all'}. "
            "Secateur prunes models with one stack of blocks."
        )
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in candidates.items()}
    path = max(sizes, key=lambda name: sizes[name])
    return path, [Block(index, f"{path}.{index}", module) for index, module in enumerate(candidates[path])]


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder inside a multimodal model, or the model itself."""
    if hasattr(model, "get_decoder"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            getter: Any = model.get_decoder
            decoder = getter()
            # Some models call their head `decoder`; a decoder without blocks is not the one that is meant.
            if isinstance(decoder, nn.Module) and any(
                isinstance(module, nn.ModuleList) for module in decoder.modules()
            ):
                return decoder
    return model


def build_skeleton(folder: Path, source: "Source", *, trust_remote_code: bool = False) -> nn.Module:
    """The model that a folder's config.json describes, in eval mode, its parameters on the meta device.

    `source` has the tensors that belong to it. Buffers that are computed (rotary frequencies, causal masks) are
    real. Raises `CheckpointError` when transformers cannot build it, or it is far larger than the tensors.
    """
    shapes = {name: source.shape(name) for name in source.names}
    config = load_configuration(folder, shapes, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelStructureError(
            f"{folder}: {config.model_type} is an encoder-decoder; Secateur prunes models with one stack of blocks."
        )
    failure: Exception | None = None
    for auto in auto_classes(config):
        try:
            with limited(folder, shapes), weightless() as finish:
                model: nn.Module = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
                finish(model)
            break
        except SecateurError:
            raise
        except ValueError as error:
            failure = failure or error
        except Exception as error:
            raise CheckpointError(f"{folder}: transformers cannot build its model: {reason(error)}") from None
    else:
        raise CheckpointError(f"{folder}: transformers knows no model for it: {failure}")
    prepare(model)
    return model


@contextlib.contextmanager
def weightless() -> Iterator[Callable[[Any], None]]:
    """Build models of transformers in here with parameters on the meta device; hand each to the function that comes.

    transformers' own initialisation draws numbers for every parameter, which takes most of the time of building a
    model that has none. It is left out, and the function does the rest of it: buffers and ties.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    def finish(model: Any) -> None:
        model.tie_weights()
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # transformers' mark of what is not to be drawn
        model.initialize_weights()

    with init_empty_weights(include_buffers=False), no_init_weights():
        yield finish


def prepare(model: nn.Module) -> Callable[[], None]:
    """Set a model up for taking statistics, and return a function that sets it back.

    In eval mode, its parameters without gradients of their own, and with experts multiplied one by one: fused kernels
    hide which expert multiplies what, and the plain loop shows it to the input tap.
    """
    training = {name: module.training for name, module in model.named_modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_experts_implementation", None)
    model.eval()
    model.requires_grad_(False)
    _set_experts(model, "eager")

    def restore() -> None:
        for parameter in trained:
            parameter.requires_grad_()
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)
        if implementation not in (None, "eager"):
            _set_experts(model, implementation)

    return restore


def _set_experts(model: Any, implementation: str) -> None:
    with contextlib.suppress(ValueError, AttributeError):
        model.set_experts_implementation(implementation)


def embeddings_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What `get_input_embeddings` or `get_output_embeddings` of a model returns, or None where it has none."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        module = getattr(model, getter)()
        return module if isinstance(module, nn.Module) else None
    return None
