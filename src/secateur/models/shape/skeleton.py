"""A model without weights, and the tensors of a checkpoint put into it block by block."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, ModelStructureError
from secateur.files.checkpoint import Layout
from secateur.models.shape.inventory import inventory, left_out
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.sequences import image_shape, timm_part
from secateur.models.shape.structure import Block, embeddings_of, find_stacks, is_encoder_decoder, towers_of
from secateur.models.weights.conversion import Conversion, TensorGroup


class Source(Protocol):
    """Where weights come from: a checkpoint on disk, or a module in memory seen as one."""

    @property
    def names(self) -> Sequence[str]:
        """Tensor names, as a checkpoint has them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, in host memory or where the module keeps them."""

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, as flat tensors of which one is in memory at a time where it can be."""

    def layout(self) -> Layout:
        """The shards of an output with the same tensors."""


class Skeleton:
    """A model and the source of its weights; blocks are loaded and dropped one at a time.

    `resident` says that the weights are in the module already (a model in memory): then nothing is loaded or dropped,
    and `update` writes into the parameters in place.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident: bool = False,
    ) -> None:
        self.model = model
        self.source = source
        self.device = device
        self.dtype = dtype
        self.resident = resident
        self._outside_loaded = False
        self._where = str(getattr(source, "folder", "the checkpoint"))
        self.stacks = find_stacks(model)
        self.blocks = [block for stack in self.stacks for block in stack.blocks]
        self.conversion = Conversion(model, {name: source.shape(name) for name in source.names})
        self._float32 = _float32_pattern(model, dtype)
        # The modules by path, once and for all: while a stream records, stubs stand in the place of the blocks.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {**{source: target for target, source in self._ties.items()}, **self._ties}

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the input embeddings know."""
        embeddings = embeddings_of(self.model, "get_input_embeddings")
        if embeddings is None or not hasattr(embeddings, "weight"):
            raise ModelStructureError(f"{type(self.model).__name__}: has no input embeddings.")
        weight: Any = embeddings.weight
        return int(weight.shape[0])

    @property
    def logits_per_token(self) -> int:
        """Number of logits that a head makes of each hidden state; without a vocabulary too few to count."""
        embeddings = embeddings_of(self.model, "get_input_embeddings")
        return self.vocabulary_size if hasattr(embeddings, "weight") else 0

    def trial_batch(self, samples: int, tokens: int) -> Tensor:
        """A batch that shows what a forward does, whatever is in it: some token ids, or images without anything."""
        part = timm_part(self.model)
        if part is not None:
            return torch.zeros(samples, *image_shape(part))
        config: Any = getattr(self.model, "config", None)
        size = getattr(config, "image_size", None) or 224
        if isinstance(embeddings_of(self.model, "get_input_embeddings"), nn.Embedding) or config is None:
            return (torch.arange(samples * tokens) + 3).view(samples, tokens) % self.vocabulary_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return torch.zeros(samples, getattr(config, "num_channels", 3), height, width)

    @property
    def positions(self) -> int | None:
        """The longest window that the configuration allows for, or None when it names no limit.

        Of an encoder-decoder both read a half.
        """
        value = getattr(self.text_config, "max_position_embeddings", None)
        if not isinstance(value, int) or value <= 0:
            return None
        tables = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        tokens = embeddings_of(self.model, "get_input_embeddings")
        # RoBERTa and its kin count positions from the one after that of padding.
        unused = (table.padding_idx for table in tables if table is not tokens and table.num_embeddings == value)
        each = value - max((last + 1 for last in unused if last is not None), default=0)
        return 2 * each if is_encoder_decoder(self.model) else each

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between blocks, by the configuration, or by the first layer of the first block."""
        known = getattr(self.text_config, "hidden_size", None)
        if isinstance(known, int):
            return known
        for layer in self.blocks[0].module.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        return 1024

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, also inside a multimodal one; None for a module without any."""
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @cached_property
    def block_tensors(self) -> list[list[str]]:
        """For each block, the names of the checkpoint tensors that make its own parameters and persistent buffers."""
        by_path = {block.path: block.index for block in self.blocks}
        names: list[list[str]] = [[] for _ in self.blocks]
        for group in self.conversion.groups.values():
            parts = group.target.split(".")
            for stack in self.stacks:
                index = by_path.get(".".join(parts[: stack.path.count(".") + 2]))
                if index is not None:
                    names[index].extend(group.names)
        return names

    def in_a_block(self, name: str) -> bool:
        """Whether a parameter, or a module, lies in one of the stacks."""
        return name.startswith(tuple(f"{stack.path}." for stack in self.stacks))

    def stack_of(self, block: Block) -> int:
        """The number of the stack that a block belongs to."""
        return next(number for number, stack in enumerate(self.stacks) if block.index <= stack.blocks[-1].index)

    @cached_property
    def shared_tensors(self) -> list[list[str]]:
        """For each block, the names of further tensors that it shares with an earlier block (Zamba does this)."""
        result = []
        for block, own in zip(self.blocks, self.block_tensors, strict=True):
            sources = (self.tied_to(f"{block.path}.{name}") for name, _ in block.module.named_parameters())
            groups = self.conversion.making(source for source in sources if self.in_a_block(source))
            result.append([name for group in groups for name in group.names if name not in own])
        return result

    @cached_property
    def outside_tensors(self) -> list[str]:
        """Names of the tensors outside the blocks that a forward needs: not those of stacks that it does not reach."""
        inside = {id(module) for tower in towers_of(self.model) for module in tower.modules()}
        other = tuple(
            f"{name}."
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and id(module) not in inside
        )
        return [
            name
            for group in self.conversion.groups.values()
            if not group.target.startswith(other) and not self.in_a_block(group.target)
            for name in group.names
        ]

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Every prunable matrix, block by block, in the order of the checkpoint's names."""
        return [matrix for block in self.blocks for matrix in self._inventory[block.index][0]]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Why each other tensor of two and more dimensions is not prunable: {tensor name: reason}."""
        return left_out(self, (reasons for _, reasons in self._inventory))

    def left_out_by_reason(self) -> list[dict[str, Any]]:
        """One row for each reason: reason, number of tensors and of weights, and an example; most weights first."""
        rows: dict[str, dict[str, Any]] = {}
        for name, reason in self.left_out.items():
            row = rows.setdefault(reason, {"reason": reason, "tensors": 0, "weights": 0, "example": name})
            row["tensors"] += 1
            row["weights"] += math.prod(self.source.shape(name))
        return sorted(rows.values(), key=lambda row: -row["weights"])

    @cached_property
    def _inventory(self) -> list[tuple[list[Matrix], dict[str, str]]]:
        return inventory(self)

    def tied_to(self, name: str) -> str:
        """The name of the parameter that a parameter is tied to; empty where there is none."""
        return str(self._tied.get(name, ""))

    @property
    def missing(self) -> list[str]:
        """Parameters without weights that no tensor makes, themselves or through what they are tied to."""
        pairs = [*self._ties.items(), *((source, target) for target, source in self._ties.items())]
        by_tie = {name for name, other in pairs if self.conversion.making([other])}
        return [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and name not in by_tie and not self.conversion.making([name])
        ]

    def check_complete(self) -> None:
        """Raise `CheckpointError` for parameters without a tensor, or with one of another shape, before the work."""
        parameters = dict(self.model.named_parameters())
        if missing := self.missing:
            raise self._missing(missing)
        for group in self.conversion.groups.values():
            for name, found in group.parameters.items():
                if name in parameters and found != parameters[name].shape:
                    raise self._misfit(
                        group.names[0] if group.converter is None else name, found, parameters[name].shape
                    )

    def _missing(self, names: Sequence[str]) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: no tensor for the parameter {names[0]}"
            + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            + f" of {type(self.model).__name__}. Is the checkpoint complete, and does its config.json belong to it?"
        )

    def _misfit(self, name: str, found: Sequence[int], expected: Sequence[int]) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {name} is of shape {tuple(found)}, and config.json asks for {tuple(expected)}. "
            "The two do not belong together; download the checkpoint again."
        )

    def load_outside(self, *, head: bool = True) -> None:
        """Load the embeddings, the final norm and the head; needed for any forward.

        Without `head`, one of its own (not tied to the embeddings) is not loaded: a forward can then run up to it.
        """
        self._outside_loaded = True
        if self.resident:
            return
        for group in self.conversion.of(self.outside_tensors):
            if head or not set(group.parameters) <= self.own_head:
                self._set_in_parts(group)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for target, source in self._ties.items():
            for absent, present in ((target, source), (source, target)):
                if absent not in parameters or parameters[present].is_meta:
                    continue
                # Without a tensor of its own it is tied anew, in case the model was filled from another source before.
                if parameters[absent].is_meta or not self.conversion.making([absent]):
                    self._assign(absent, parameters[present])
        self._buffers_to_device(self._outside)

    def load_all(self, replacements: Mapping[str, nn.Module] = MappingProxyType({})) -> nn.Module:
        """The model with all of its weights in it, on the device, in the computing dtype.

        `replacements` are modules of blocks, by path, that stand in for the model's own; they bring their weights.
        """
        for path, module in replacements.items():
            self.model.set_submodule(path, module)
            self._modules[path] = module
        brought = {
            name for group in self.conversion.making(f"{path}.weight" for path in replacements) for name in group.names
        }
        self.load_outside()
        for block in self.blocks:
            names = [*self.block_tensors[block.index], *self.shared_tensors[block.index]]
            self.load(block, self.source.read([name for name in names if name not in brought]))
        return self.model

    def unload_outside(self) -> None:
        """Drop what `load_outside` loaded, except what blocks share: nothing reads it once all calls are recorded."""
        self._outside_loaded = False
        if self.resident:
            return
        shared = {id(parameter) for block in self.blocks for parameter in block.module.parameters()}
        for module in self._outside:
            for leaf, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta and id(parameter) not in shared:
                    module._parameters[leaf] = _on_meta(parameter)

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """In here, what `load_outside` loads without the head is there, and at the end only where it was before."""
        there = self._outside_loaded
        if not there:
            self.load_outside(head=False)
        yield
        if not there:
            self.unload_outside()

    @property
    def _outside(self) -> list[nn.Module]:
        """The modules outside the stacks of blocks."""
        return [module for path, module in self._modules.items() if not self.in_a_block(f"{path}.")]

    @cached_property
    def own_head(self) -> set[str]:
        """Names of the parameters of a head that a module of its own computes, with weights of its own."""
        head = embeddings_of(self.model, "get_output_embeddings")
        path = next((path for path, module in self._modules.items() if module is head), None)
        if head is None or path is None or isinstance(head, nn.Embedding):  # whose rows are read as inputs too
            return set()
        names = {f"{path}.{leaf}" for leaf in head._parameters}
        elsewhere = {
            name
            for other, module in self._modules.items()
            if module is not head
            for leaf, parameter in module._parameters.items()
            if parameter is not None and any(parameter is own for own in head._parameters.values())
            for name in (f"{other}.{leaf}", f"{path}.{leaf}")
        }
        return set() if elsewhere or any(name in self._tied for name in names) else names

    def read(self, block: Block) -> dict[str, Tensor]:
        """The checkpoint tensors that `load` needs for a block."""
        names = self.block_tensors[block.index] + self.shared_tensors[block.index]
        return self.source.read(names, pin=self.device.type == "cuda" and not self.resident)

    def load(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Put the checkpoint tensors of a block into its module, on the device, in the computing dtype.

        `tensors` are those that `read` returned for it. Raises `CheckpointError` when a parameter has no tensor.
        """
        if self.resident:
            return
        for group in self.conversion.of(tensors):
            self._set(group, tensors)
        self._buffers_to_device(block.module.modules())
        for name, parameter in block.module.named_parameters():
            source = self.tied_to(f"{block.path}.{name}")
            if parameter.is_meta and self.in_a_block(source):
                path, _, leaf = source.rpartition(".")
                self._assign(f"{block.path}.{name}", self._modules[path]._parameters[leaf])
        missing = [f"{block.path}.{name}" for name, value in block.module.named_parameters() if value.is_meta]
        if missing:
            raise self._missing(missing)

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Write changed checkpoint tensors into the parameters of a loaded block, with the others of their groups.

        `tensors` must hold every tensor of each group that it touches. Parameters stay the same objects in the same
        memory, so that forwards that have begun go on with the new values.
        """
        for group in self.conversion.of(tensors):
            parts = {name: tensors[name].to(self.device, non_blocking=True) for name in group.names}
            for name, value in self.conversion.convert(group, parts).items():
                path, _, leaf = name.rpartition(".")
                parameter = self._modules[path]._parameters[leaf]
                assert parameter is not None
                if parameter.data_ptr() != value.data_ptr():
                    with torch.no_grad():
                        parameter.copy_(value)

    def unload(self, block: Block) -> None:
        """Drop a block's weights, and those of earlier blocks that it shared."""
        if self.resident:
            return
        shared = [self.tied_to(f"{block.path}.{name}") for name, _ in block.module.named_parameters()]
        owners = {path.rpartition(".")[0] for path in shared if self.in_a_block(path)}
        for module in [*block.module.modules(), *(self._modules[path] for path in owners)]:
            for leaf, parameter in module.named_parameters(recurse=False):
                module._parameters[leaf] = _on_meta(parameter)

    def _set_in_parts(self, group: TensorGroup) -> None:
        """As `_set` does, for a group whose tensors are still to be read."""
        name = group.names[0]
        shape, stored = self.source.shape(name), self.source.dtype(name)
        as_it_is = stored == self._computing(group.target) and self.device.type == "cpu"
        if group.converter is not None or not stored.is_floating_point or as_it_is:
            self._set(group, self.source.read(group.names))
            return
        # Memory: a large table is converted part by part, so that it is never there in both dtypes.
        whole = torch.empty(shape, dtype=self._computing(group.target), device=self.device)
        flat, done = whole.view(-1), 0
        for part in self.source.parts(name):
            flat[done : done + part.numel()].copy_(part)
            done += part.numel()
        self._assign(group.target, whole)

    def _computing(self, name: str) -> torch.dtype:
        """The dtype that a floating-point parameter is computed in."""
        return torch.float32 if self._float32 and self._float32.search(name) else self.dtype

    def _set(self, group: TensorGroup, tensors: Mapping[str, Tensor]) -> None:
        parts = {name: tensors[name].to(self.device, non_blocking=True) for name in group.names}
        for name, value in self.conversion.convert(group, parts).items():
            if value.is_floating_point():
                value = value.to(self._computing(name))
            self._assign(name, value)

    def _assign(self, name: str, value: Tensor | None) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._modules[path]
        if value is None or leaf in module._buffers:
            module._buffers[leaf] = value
            return
        expected = module._parameters[leaf]
        if expected is not None and expected.shape != value.shape:
            raise self._misfit(name, value.shape, expected.shape)
        module._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)
        )

    def _buffers_to_device(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)


def _on_meta(parameter: Tensor) -> nn.Parameter:
    """A parameter of the same shape without values."""
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _float32_pattern(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Parameters that transformers keeps in float32 when the rest is in half precision."""
    names: set[str] = set()
    if dtype == torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(rf"(^|\.){name.replace('*', '.*')}($|\.)" for name in sorted(names))) if names else None


@contextlib.contextmanager
def loaded(skeleton: Skeleton, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The block's module with its weights in it, dropped again at the end."""
    skeleton.load(block, tensors)
    try:
        yield block.module
    finally:
        skeleton.unload(block)
