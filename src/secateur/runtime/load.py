"""`load`: a checkpoint as a model of transformers; what is packed on disk stays packed in memory."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from secateur.arguments import calling
from secateur.errors import CheckpointError, SecateurError
from secateur.files.ahead import ahead
from secateur.files.checkpoint import DTYPES, Checkpoint
from secateur.files.packed import PackedCheckpoint, ReadRoom
from secateur.models.flow.memory import trim
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.opening.whole import read_generation_config
from secateur.models.shape.skeleton import Skeleton
from secateur.runtime.layout import PackedWeight, Room, lay_out
from secateur.runtime.library import KINDS, PathName, chosen
from secateur.runtime.linear import PackedLinear
from secateur.runtime.semi_structured import ROWS, Choice, check_rows, convert, print_table, why_not
from secateur.runtime.settings import Backend


@calling
def load(
    model: "str | os.PathLike[str]",
    *,
    backend: Backend = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    rows: Sequence[int] = ROWS,
    on_choices: Callable[[list[Choice]], None] = print_table,
) -> Any:
    """The model of a folder, plain or packed, of a hub id or of a GGUF file, as transformers knows it, in eval mode.

    With `backend="packed"` the linear layers that a packed checkpoint holds packed stay so in memory and are multiplied
    by the kernel for packed weights, on the CPU, without gradients; everything else, stacks of experts for one, is
    expanded. "dense" expands everything. "auto" is "packed" where the checkpoint is packed and the device is the CPU.
    `dtype="auto"` is that of the checkpoint, as in transformers (elsewhere here it is float32 on a CPU): packed values
    keep theirs, and the kernel adds up in float32.

    On an NVIDIA GPU with `backend="auto"` the linear layers that are 2:4 are measured, one of each shape, dense and by
    torch's kernels for such weights, with `rows` rows of input: 1 is a token that is decoded, 512 a prompt of so many.
    Those become semi-structured that this makes faster for some of these numbers and slower for none, beyond the
    spread. `on_choices` is
    given the measurements; by default it prints them to standard error.

    Raises `CheckpointError` for what cannot be loaded, and for `backend="packed"` where nothing stays packed.
    """
    if backend not in get_args(Backend):
        raise SecateurError(f"backend: got {backend!r}, expected {', '.join(get_args(Backend))}.")
    check_rows(rows)
    name = os.fspath(model)
    dtype = "stored" if dtype == "auto" else dtype
    opened = open_model(name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    skeleton = opened.skeleton
    packed = {} if backend == "dense" or skeleton.device.type != "cpu" else packed_modules(skeleton)
    if backend == "packed" and not packed:
        raise CheckpointError(f"{model}: {_why_not(opened)}")
    module: Any = skeleton.model if skeleton.resident else skeleton.load_all(packed)
    if isinstance(skeleton.source, Checkpoint):
        read_generation_config(module, skeleton.source.folder)
    module = module.eval().requires_grad_(False)
    if backend == "auto" and why_not(skeleton.device) is None:
        choices = convert(module, rows)
        if choices:
            on_choices(choices)
    return module


def packed_modules(skeleton: Skeleton) -> Mapping[str, nn.Module]:
    """By path, what stands in for the linear layers of blocks whose weight is one packed tensor of the checkpoint.

    Weights that are shared, or that transformers joins or splits as it loads them, are left out.
    """
    source = skeleton.source
    if not isinstance(source, PackedCheckpoint):
        return {}
    layers: dict[str, tuple[nn.Linear, str]] = {}
    for block in skeleton.blocks:
        for group in skeleton.conversion.of(skeleton.block_tensors[block.index]):
            path, _, leaf = group.target.rpartition(".")
            module = skeleton.model.get_submodule(path)
            single = group.converter is None and len(group.names) == 1 and leaf == "weight"
            if not single or type(module) is not nn.Linear or skeleton.tied_to(group.target):
                continue
            name = group.names[0]
            matrix = source.record.matrices.get(name)
            if matrix is not None and tuple(matrix.shape) == tuple(module.weight.shape):
                layers[path] = module, name
    names = [name for _, name in layers.values()]
    path = chosen()
    if path == "torch":  # which keeps what is read
        weights = ahead(partial(_packed_weight, source, None, None), names)
    else:
        room = Room(sum(_room_needed(source, name, path) for name in names))
        weights = ahead(partial(_packed_weight, source, ReadRoom(), room), names)
    found = {
        path: PackedLinear(weight, module.bias, skeleton.dtype)
        for (path, (module, _)), weight in zip(layers.items(), weights, strict=True)
        if weight is not None
    }
    trim()  # Memory: what was read and laid out anew, before the dense tensors are read
    return found


def _room_needed(source: PackedCheckpoint, name: str, path: PathName) -> int:
    matrix = source.record.matrices[name]
    dtype = torch.int8 if matrix.values == "int8" else DTYPES[matrix.dtype]
    return Room.needed(matrix.shape[0], matrix.shape[1], matrix.kept, dtype, path) if dtype in KINDS else 0


def _packed_weight(
    source: PackedCheckpoint, read_room: ReadRoom | None, room: Room | None, name: str
) -> PackedWeight | None:
    """A packed tensor laid out for this processor; None for a dtype that the kernel does not know."""
    tensor = source.read_packed(name, read_room)
    if tensor.kept.dtype not in KINDS:
        return None
    return lay_out(tensor.mask, tensor.kept, tensor.shape[1], scales=tensor.scales, name=name, room=room)


def _why_not(opened: OpenedModel) -> str:
    if opened.skeleton.device.type != "cpu":
        return f"packed weights are computed with on the CPU, and not on {opened.skeleton.device}. Use --device cpu."
    if not isinstance(opened.skeleton.source, PackedCheckpoint):
        return "is not packed. Pack it first: secateur pack MODEL -o PACKED."
    return "none of its packed tensors is the weight of a linear layer of its own. Use --backend dense."


def memory_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = []
    for tensor in [*module.parameters(), *module.buffers()]:
        # Semi-structured tensors hold others, and have no storage of their own.
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        tensors += [getattr(tensor, name) for name in inner] or [tensor]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(len(storage) for storage in storages.values())


@torch.no_grad()
@calling
def pack_module(module: nn.Module, *, least_zeros: float = 0.1) -> int:
    """Replace the linear layers of a module in memory by packed ones where enough weights are zero; returns how many.

    A layer whose weight another parameter shares stays as it is, and so does one with a smaller share of zeros than
    `least_zeros`. It is the module on the CPU that changes; its gradients are gone.
    """
    from secateur.files.bitmask import pack_bits

    uses: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    count = 0
    for path, part in list(module.named_modules()):
        if type(part) is not nn.Linear or uses[id(part.weight)] > 1 or part.weight.dtype not in KINDS:
            continue
        weight = part.weight.detach()
        if weight.device.type != "cpu":
            raise SecateurError(f"{path}: lies on {weight.device}; packed weights are computed with on the CPU.")
        if float((weight == 0).float().mean()) < least_zeros:
            continue
        mask, kept = pack_bits(weight.contiguous())
        packed = PackedLinear(lay_out(mask, kept, weight.shape[1], name=path), part.bias)
        module.set_submodule(path, packed.train(part.training))
        count += 1
    return count
