"""Quantised checkpoints seen as plain ones: common formats are dequantised as they are read, others are refused."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.files.checkpoint import MODELOPT_FILE, Checkpoint, Layout, shard_names
from secateur.files.reading import read_json
from secateur.models.opening.configuration import CONFIGURATION, PACKING_ENTRIES, read_configuration
from secateur.models.shape.skeleton import Skeleton
from secateur.models.weights.bitmask import FORMATS as SPARSE_FORMATS
from secateur.models.weights.bitmask import SparseBitmaskCheckpoint, open_expanded
from secateur.models.weights.packing import block_sizes, scaled, unpacked_mxfp4

PLAIN = torch.bfloat16  # what codes become
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
METHODS = ("fp8", "finegrained_fp8", "fbgemm_fp8", "mxfp4", "modelopt", "compressed-tensors")
ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN")  # ModelOpt's names
FORMATS = ("dense", "naive-quantized", "int-quantized", "float-quantized", *SPARSE_FORMATS)  # compressed-tensors' names
SCALE_ENDINGS = ("_scale", "_scale_inv")  # after the name of a weight
# Scales of inputs, outputs and caches: without quantised activations nothing needs them.
OF_ACTIVATIONS = re.compile(
    r"(^|[._])(input|output|activation|prob_output)_(scale|zero_point|global_scale|scale_ub)$|(^|\.)(k|v|q|kv)_scale$"
)
LEFT_SCALE = re.compile(r"[._](scale|scale_inv|scales|scale_2|zero_point|g_idx|pre_quant_scale)$")
# The last part of names that only packed formats have.
FOREIGN = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "packed 4-bit weights of compressed-tensors",
    "weight_global_scale": "NVFP4",
    "weight_scale_2": "NVFP4",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes, 4 bits",
    "W_q": "HQQ",
    "weight_scales": "EETQ",
    "_data": "quanto",
}


@dataclass(frozen=True)
class Packed:
    """How one weight is stored: the tensors that hold it, and the shape that it has when it is plain."""

    codes: str
    scales: str
    zero_points: str | None
    shape: tuple[int, ...]
    grid: tuple[int, ...]  # the shape of the scales, with as many dimensions as the codes
    blocks: tuple[int, ...]  # codes along each dimension that share a scale; none for MXFP4
    format: str  # in words

    @property
    def parts(self) -> list[str]:
        """Names of the tensors that hold it."""
        return [name for name in (self.codes, self.scales, self.zero_points) if name is not None]


class DequantisedCheckpoint:
    """A quantised checkpoint seen as the plain one: each weight is dequantised to bfloat16 when it is read."""

    def __init__(self, checkpoint: Checkpoint, packed: Mapping[str, Packed], left_out: Sequence[str]) -> None:
        """`packed` holds the weights by their plain names, `left_out` names the scales of activations."""
        self.checkpoint = checkpoint
        self.folder = checkpoint.folder
        self.packed = packed
        self.left_out = left_out
        parts = {part for one in packed.values() for part in one.parts}
        plain_names = {one.codes: name for name, one in packed.items()}
        hidden = (parts | set(left_out)) - set(plain_names)
        self._names = {plain_names.get(name, name): name for name in checkpoint.names if name not in hidden}

    @property
    def names(self) -> list[str]:
        """Tensor names, without scales."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of a quantised one when it is plain."""
        return self.packed[name].shape if name in self.packed else self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor: bfloat16 where it is stored quantised."""
        return PLAIN if name in self.packed else self.checkpoint.dtype(name)

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, in host memory."""
        return {
            name: self._read(self.packed[name], pin)
            if name in self.packed
            else self.checkpoint.read([name], pin=pin)[name]
            for name in names
        }

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, as flat tensors; of a quantised one all at once."""
        if name in self.packed:
            yield self._read(self.packed[name], pin=False).view(-1)
        else:
            yield from self.checkpoint.parts(name)

    def _read(self, packed: Packed, pin: bool) -> Tensor:
        tensors = self.checkpoint.read(packed.parts)
        codes, scales = tensors[packed.codes], tensors[packed.scales]
        out = torch.empty(packed.shape, dtype=PLAIN, pin_memory=pin)
        if not packed.blocks:
            return unpacked_mxfp4(codes, scales, out)
        offsets = None if packed.zero_points is None else tensors[packed.zero_points].view(packed.grid)
        return scaled(codes, scales.view(packed.grid), packed.blocks, offsets, out)

    def layout(self) -> Layout:
        """The shards of an output with the plain tensors, each in the shard where its codes were."""
        own = {stored: name for name, stored in self._names.items()}
        shards = [
            [(own[name], self.dtype(own[name]), self.shape(own[name])) for name, _, _ in tensors if name in own]
            for _, tensors in self.checkpoint.layout()
        ]
        shards = [shard for shard in shards if shard]
        return list(zip(shard_names(len(shards)), shards, strict=True))

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest says of it: the formats with the number of weights, the dtype, what was left out."""
        formats = Counter(one.format for one in self.packed.values())
        return {"formats": dict(formats), "dtype": str(PLAIN).removeprefix("torch."), "left_out": len(self.left_out)}


@cache
def _warn_once(text: str) -> None:
    logging.getLogger("secateur").warning(text)


def open_checkpoint(folder: Path) -> Checkpoint | DequantisedCheckpoint:
    """The weights of a folder, expanded where they are packed, and dequantised from FP8, int8 or MXFP4 with scales.

    Warns once, through the logger "secateur", that they become bfloat16. Raises `CheckpointError` for weights packed in
    any other format, and for scales that do not fit or that nothing uses.
    """
    checkpoint = open_expanded(folder)
    announced = list(_announced(folder))
    sizes = [size for where, entry in announced for size in _check_announced(folder, where, entry)]
    for name in checkpoint.names:
        ending = name.rpartition(".")[2]
        if ending in FOREIGN:
            raise _refused(folder, FOREIGN[ending], f"{name} is stored as {checkpoint.dtype(name)}")
    sparse = isinstance(checkpoint, SparseBitmaskCheckpoint)
    for where, entry in announced:
        if _sparse_format(entry) is not None and not sparse:
            raise _refused(folder, f"{_sparse_format(entry)}, of which no tensor is there", where)
    packed = _find_packed(checkpoint, sizes)
    _check_pairs(checkpoint, packed)
    if not packed:
        if not all(_says_dense(entry) or _says_sparse(entry) for _, entry in announced):
            raise _refused(folder, announced[0][0], "no tensor has codes and scales of a known format")
        return checkpoint
    used = {part for one in packed.values() for part in one.parts}
    left_out = [name for name in checkpoint.names if OF_ACTIVATIONS.search(name) and name not in used]
    found = DequantisedCheckpoint(checkpoint, packed, left_out)
    formats = " and ".join(found.origin["formats"])
    left = f" {len(left_out)} scales of activations are left out." if left_out else ""
    _warn_once(
        f"{folder}: {len(packed)} weights are stored as {formats}; they are dequantised to bfloat16 as they are read, "
        f"and what is written is bfloat16.{left}"
    )
    return found


def _find_packed(checkpoint: Checkpoint, sizes: Sequence[Sequence[int]]) -> dict[str, Packed]:
    found: dict[str, Packed] = {}
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        if dtype in (*FP8, torch.int8):
            scales = next((name + ending for ending in SCALE_ENDINGS if name + ending in checkpoint.tensors), None)
            if scales is not None:
                found[name] = _with_scales(checkpoint, name, scales, sizes)
        elif dtype == torch.uint8 and name.endswith("_blocks"):
            plain = name.removesuffix("_blocks")
            if f"{plain}_scales" in checkpoint.tensors:
                found[plain] = _mxfp4(checkpoint, name, f"{plain}_scales")
    return found


def _check_pairs(checkpoint: Checkpoint, packed: Mapping[str, Packed]) -> None:
    """Raise `CheckpointError` for a weight in codes without scales, and for scales of a weight that is plain."""
    for name in checkpoint.names:
        if name in packed or not name.endswith("weight"):
            continue
        dtype = checkpoint.dtype(name)
        if not dtype.is_floating_point or dtype in FP8:
            raise _refused(checkpoint.folder, f"{dtype} without scales that belong to it", name)
        for ending in SCALE_ENDINGS:
            if name + ending in checkpoint.tensors:
                raise _refused(checkpoint.folder, "a scale that nothing uses", name + ending)


def _with_scales(checkpoint: Checkpoint, name: str, scales: str, sizes: Sequence[Sequence[int]]) -> Packed:
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(scales)
    if not (dtype == torch.uint8 or dtype == torch.float8_e8m0fnu or (dtype.is_floating_point and dtype not in FP8)):
        raise _refused(checkpoint.folder, f"scales of {dtype}", f"{scales} belongs to {name}")
    zero_points: str | None = f"{name}_zero_point"
    if zero_points not in checkpoint.tensors:
        zero_points = None
    elif checkpoint.shape(zero_points) != checkpoint.shape(scales):
        raise _misfit(checkpoint, name, zero_points)
    grid = _aligned_shape(checkpoint.shape(scales), len(shape))
    blocks = block_sizes(shape, grid, sizes) if grid is not None and shape and 0 not in shape else None
    if grid is None or blocks is None:
        raise _misfit(checkpoint, name, scales)
    kind = "int8" if checkpoint.dtype(name) == torch.int8 else "FP8"
    return Packed(name, scales, zero_points, shape, grid, blocks, f"{kind} with {_in_words(shape, blocks)}")


def _mxfp4(checkpoint: Checkpoint, name: str, scales: str) -> Packed:
    shape = checkpoint.shape(name)
    if len(shape) != 4 or shape[3] != 16 or checkpoint.shape(scales) != shape[:3]:
        raise _misfit(checkpoint, name, scales)
    if checkpoint.dtype(scales) != torch.uint8:
        raise _refused(checkpoint.folder, f"scales of {checkpoint.dtype(scales)}", f"{scales} belongs to {name}")
    return Packed(name, scales, None, (shape[0], 32 * shape[2], shape[1]), shape[:3], (), "MXFP4")


def _misfit(checkpoint: Checkpoint, name: str, scales: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: {name} is of shape {checkpoint.shape(name)}, and {scales} of shape "
        f"{checkpoint.shape(scales)}, which does not say which weights share a scale. Is weight_block_size missing in "
        f"{CONFIGURATION}? Download the checkpoint again, or use the unquantised one."
    )


def _in_words(shape: Sequence[int], blocks: Sequence[int]) -> str:
    if tuple(blocks) == tuple(shape):
        return "one scale each"
    if blocks[-1] == shape[-1]:
        return "a scale per row"
    return f"block scales of {' x '.join(map(str, blocks[-2:]))}"


def _aligned_shape(shape: Sequence[int], dimensions: int) -> tuple[int, ...] | None:
    """The shape of scales with as many dimensions as their weight has: fewer are the first ones. None for more."""
    if not any(size != 1 for size in shape):
        return (1,) * dimensions
    return (*shape, *(1,) * (dimensions - len(shape))) if len(shape) <= dimensions else None


def packing_entries(config: Mapping[str, Any], where: str = CONFIGURATION) -> Iterator[tuple[str, Any]]:
    """(where, entry) for every entry of a configuration, and of those inside it, on how weights are packed."""
    for key, value in config.items():
        if key in PACKING_ENTRIES and value:
            yield f"{where}: {key}", value
        elif key.endswith("_config") and isinstance(value, Mapping):
            yield from packing_entries(value, f"{where}: {key}")


def _announced(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) for every entry in the files of a folder on how its weights are packed."""
    entries: list[tuple[str, Any]] = []
    if (folder / CONFIGURATION).exists():
        entries += packing_entries(read_configuration(folder))
    if (folder / MODELOPT_FILE).exists():
        described = read_json(folder / MODELOPT_FILE, dict[str, Any])
        entries.append((MODELOPT_FILE, {"quant_method": "modelopt", **_mapping(described.get("quantization"))}))
    for where, entry in entries:
        if where.endswith("sparsity_config"):
            continue  # often left from before; what is packed that way has tensors called bitmask
        if not isinstance(entry, dict):
            raise CheckpointError(f"{folder}/{where}: is {type(entry).__name__}, expected an object.")
        yield where, entry


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _check_announced(folder: Path, where: str, entry: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The sizes of blocks that an entry names. Raises `CheckpointError` for a format that is not dequantised."""
    own = "compressed-tensors" if where.endswith("compression_config") else "unknown"
    method = str(entry.get("quant_method") or own)
    if method not in METHODS:
        raise _refused(folder, method, where)
    if method == "modelopt":
        algorithm = entry.get("quant_algo")
        if algorithm is not None and algorithm not in ALGORITHMS:
            raise _refused(folder, f"ModelOpt {algorithm}", where)
    groups = [_mapping(group) for group in _mapping(entry.get("config_groups")).values()]
    sparse = _mapping(entry.get("sparsity_config"))
    for part in (entry, sparse, *groups):
        if part.get("format") is not None and part["format"] not in FORMATS:
            raise _refused(folder, f"{method}, {part['format']}", where)
    if entry.get("transform_config"):
        raise _refused(folder, f"{method} with transforms of the activations", where)
    weights = [_mapping(group.get("weights")) for group in groups]
    named = [entry.get("weight_block_size"), *(one.get("block_structure") for one in weights)]
    named += [[1, one["group_size"]] for one in weights if isinstance(one.get("group_size"), int)]
    return [
        tuple(size) for size in named if isinstance(size, list) and all(type(side) is int and side > 0 for side in size)
    ]


def _says_dense(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is about something else than packed weights: sparsity, or caches alone."""
    return entry.get("format") == "dense" or ("quant_algo" in entry and entry["quant_algo"] is None)


def _says_sparse(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is about weights that are sparse and not quantised."""
    return not entry.get("config_groups") and _sparse_format(entry) is not None


def _sparse_format(entry: Mapping[str, Any]) -> str | None:
    """The sparse format that an entry names, or None."""
    found = _mapping(entry.get("sparsity_config")).get("format")
    return found if found in SPARSE_FORMATS else None


def _refused(folder: Path | str, packing: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the weights are quantised ({packing}; {what}), in a format that Secateur does not dequantise. Use "
        "the unquantised checkpoint, or load this one with transformers, dequantise it (model.dequantize()), save it, "
        "and use that."
    )


def check_dtypes(skeleton: Skeleton) -> None:
    """Raise `CheckpointError` for codes in place of a float parameter, and for scales that nothing uses."""
    source = skeleton.source
    where = str(getattr(source, "folder", type(skeleton.model).__name__))
    parameters: dict[str, nn.Parameter] = dict(skeleton.model.named_parameters(remove_duplicate=False))
    for group in skeleton.conversion.groups.values():
        if not any(name in parameters for name in group.parameters):
            continue
        for name in group.names:
            dtype = source.dtype(name)
            if not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize < 2:
                raise _refused(where, f"{dtype} without scales that belong to it", name)
    names = set(source.names)
    for name in skeleton.conversion.unused:
        stem = LEFT_SCALE.sub("", name)
        if stem != name and (stem in names or f"{stem}.weight" in names):
            raise _refused(where, "a scale that nothing uses", name)
