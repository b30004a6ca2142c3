"""The structure of a model, found out rather than known: its stacks of blocks, and a skeleton to fill."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from secateur.errors import CheckpointError, ModelStructureError, SecateurError
from secateur.models.opening.classes import auto_classes
from secateur.models.opening.configuration import limited, load_configuration, reason
from secateur.models.shape.sequences import Modules, drop_weights, fill_buffers, sequences, timm_part

if TYPE_CHECKING:
    from secateur.models.shape.skeleton import Source


@dataclass(frozen=True)
class Block:
    """One block: its position among all blocks of the model, its path in the model, its module."""

    index: int
    path: str
    module: nn.Module


@dataclass(frozen=True)
class Stack:
    """A stack of blocks: its path in the model, and its blocks, each of which is called on what the one before made."""

    path: str
    blocks: Sequence[Block]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model in the order of its forward: of the encoder and the decoder, or the one that it has.

    A stack is the `ModuleList` with most parameters, or the lists and sequences in its stages; of a model of timm every
    sequence of blocks. Raises `ModelStructureError` where there is none.
    """
    stacks: list[Stack] = []
    for path, modules in _lists_of_blocks(model):
        first = sum(len(stack.blocks) for stack in stacks)
        blocks = [Block(first + number, f"{path}.{number}", module) for number, module in enumerate(modules)]
        stacks.append(Stack(path, blocks))
    return stacks


def _lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, Modules]]:
    part = timm_part(model)
    if part is None:
        for tower in towers_of(model):
            yield from _stages(tower, *_largest_list(model, tower))
        return
    found = list(sequences(part, "" if part is model else "timm_model"))
    if not found:
        children = ", ".join(name for name, _ in part.named_children())
        raise ModelStructureError(
            f"{type(part).__name__}: no sequence of blocks of one class (nn.Sequential, nn.ModuleList) found in it, "
            f"only {children}. Secateur prunes models of timm whose blocks lie in such sequences."
        )
    yield from found


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks of a model."""
    return [block for stack in find_stacks(model) for block in stack.blocks]


def _largest_list(model: nn.Module, tower: nn.Module) -> tuple[str, nn.ModuleList]:
    prefix = next((name for name, module in model.named_modules() if module is tower), "")
    candidates = {
        f"{prefix}.{name}".strip("."): module
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and not isinstance(module, ParametrizationList)
    }
    if not candidates:
        children = ", ".join(name for name, _ in tower.named_children())
        raise ModelStructureError(
            f"{type(model).__name__}: no stack of blocks (nn.ModuleList) found in it"
            f"{f', only {children}' if children else '; it has no submodules at all'}. "
            "Secateur prunes models whose blocks lie in such lists."
        )
    return max(candidates.items(), key=_size)


def _size(named: tuple[str, nn.Module]) -> int:
    return sum(parameter.numel() for parameter in named[1].parameters())


def _stages(tower: nn.Module, path: str, modules: nn.ModuleList) -> list[tuple[str, Modules]]:
    """The stacks in a list of stages, whose blocks differ in width (Swin, ConvNeXt); a list of blocks is one itself.

    Stages are those whose numbers of blocks are the `depths` that the configuration names.
    """
    depths = getattr(getattr(tower, "config", None), "depths", None)
    if not isinstance(depths, list | tuple) or len(depths) != len(modules):
        return [(path, modules)]
    found: list[tuple[str, Modules]] = []
    for number, depth in enumerate(depths):
        inside = [
            (f"{path}.{number}.{name}".strip("."), own)
            for name, own in modules[number].named_modules()
            if isinstance(own, nn.ModuleList | nn.Sequential) and len(own) == depth
        ]
        if not inside:
            return [(path, modules)]
        found.append(max(inside, key=_size))
    return found


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a decoder reads what an encoder makes of another text, or of sound."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len(towers_of(model)) > 1


def has_two_towers(model: nn.Module) -> bool:
    """Whether a model reads images and texts side by side, as CLIP does."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False) and len(towers_of(model)) > 1


def towers_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that have a stack each: encoder and decoder, towers of images and texts, or one of them."""
    config = getattr(model, "config", None)
    decoder = decoder_of(model)
    before: nn.Module | None = None
    if getattr(config, "is_encoder_decoder", False):
        before = _part(model, "get_encoder")
    elif hasattr(config, "vision_config") and not _continues(decoder):
        before = _part(model, "get_encoder", "image")
    # An encoder alone keeps the configuration of both, and names itself where it is asked for what it has not.
    if before is None or _inside(before, decoder) or _inside(decoder, before):
        return [decoder]
    return [before, decoder]


def _continues(decoder: Any) -> bool:
    """Whether a part goes on with what it has read before, as the language model of a multimodal decoder does."""
    return "past_key_values" in inspect.signature(decoder.forward).parameters


def _inside(part: nn.Module, whole: nn.Module) -> bool:
    return any(module is part for module in whole.modules())


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder inside a multimodal model or after an encoder, or the model itself."""
    decoder = _part(model, "get_decoder")
    return model if decoder is None else decoder


def _part(model: nn.Module, getter: str, *of: str) -> nn.Module | None:
    """The part that a method of the model returns, where that has blocks: some models call their head `decoder`."""
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        part = getattr(model, getter)(*of)
        if isinstance(part, nn.Module) and any(isinstance(module, nn.ModuleList) for module in part.modules()):
            return part
    return None


def build_skeleton(folder: Path, source: "Source", *, trust_remote_code: bool = False) -> nn.Module:
    """The model that a folder's config.json describes, in eval mode, its parameters on the meta device.

    `source` has the tensors that belong to it. Buffers that are computed (rotary frequencies, causal masks) are
    real. Raises `CheckpointError` when transformers cannot build it, or it is far larger than the tensors.
    """
    shapes = {name: source.shape(name) for name in source.names}
    config = load_configuration(folder, shapes, trust_remote_code=trust_remote_code)
    failure: Exception | None = None
    for auto in auto_classes(config):
        try:
            with limited(folder, shapes):
                model = _without_weights(auto, config, trust_remote_code)
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


def _without_weights(auto: Any, config: Any, trust_remote_code: bool) -> nn.Module:
    """The model that an automatic class builds, with parameters on the meta device and buffers that are real."""
    try:
        with weightless() as finish:
            model: nn.Module = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            finish(model)
        fill_buffers(model)
        return model
    except NotImplementedError:
        if config.model_type != "timm_wrapper":
            raise
    # Memory: some constructors of timm compute with their parameters. Those of all of the model are there for a moment.
    model = auto.from_config(config, dtype=torch.float32)
    return drop_weights(model)


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
        # Tables that are computed and never stored (Marian's positions) are like buffers, of which others know more.
        computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - set(model.all_tied_weights_keys)
        for name in computed & dict(model.named_parameters()).keys():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            module.register_buffer(leaf, torch.zeros(module._parameters.pop(leaf).shape), persistent=False)
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
