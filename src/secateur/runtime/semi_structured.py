"""2:4 on NVIDIA GPUs: torch's semi-structured kernels for the matrices that they are measured to make faster."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import SecateurError

Kernel = Literal["cusparselt", "cutlass"]
Times = Mapping[str, Mapping[int, Sequence[float]]]
ROWS = (1, 512)  # a token that is decoded, a prompt that is read
LEAST_CAPABILITY = (8, 0)
# What torch's kernels divide a weight into: multiples of (out, in).
MULTIPLES: dict[Kernel, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {torch.float16: (16, 16), torch.bfloat16: (16, 16)},
    "cutlass": {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)},
}
WARM_UPS, MEASURED = 5, 20


@dataclass(frozen=True)
class Choice:
    """What became of the 2:4 matrices of one shape: `kernel` is "dense", "cusparselt" or "cutlass".

    `times` holds milliseconds by kernel and by rows of input, repetition by repetition; `refused` says by kernel why it
    was not measured.
    """

    out_features: int
    in_features: int
    dtype: str
    matrices: int
    kernel: str
    times: dict[str, dict[int, list[float]]]
    refused: dict[str, str]


def convert(module: nn.Module, rows: Sequence[int] = ROWS) -> list[Choice]:
    """Measure the 2:4 linear layers of a model on a GPU, and make those semi-structured that this makes faster.

    One layer of each shape is timed, dense and by each kernel that takes it, with each number of `rows` of input. See
    `choose` for which one is taken. A layer whose weight another parameter shares stays as it is. Raises
    `SecateurError` where the model is not on a GPU that has such kernels: see `why_not`.
    """
    check_rows(rows)
    layers = list(two_four_layers(module))
    if layers and (reason := why_not(layers[0].weight.device)):
        raise SecateurError(f"2:4 kernels: {reason}.")
    by_shape: dict[tuple[torch.Size, torch.dtype], list[nn.Linear]] = {}
    for layer in layers:
        by_shape.setdefault((layer.weight.shape, layer.weight.dtype), []).append(layer)
    return [_convert_alike(alike, rows) for alike in by_shape.values()]


def why_not(device: torch.device) -> str | None:
    """Why torch has no 2:4 kernels for a device; None where it has."""
    if device.type != "cuda":
        return f"they run on NVIDIA GPUs, and the model lies on {device}"
    if torch.version.cuda is None:
        return "they run on NVIDIA GPUs, and this torch is built for another maker's"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, they need {needed}"
    return None


def check_rows(rows: Sequence[int]) -> None:
    """Raise `SecateurError` unless these are numbers of rows of input."""
    if not rows or any(count < 1 for count in rows):
        raise SecateurError(f"rows: got {list(rows)}, expected numbers from 1, such as [1, 512].")


def two_four_layers(module: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers with at most two non-zeros in each four inputs whose weight is theirs alone."""
    uses: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for part in module.modules():
        if type(part) is nn.Linear and uses[id(part.weight)] == 1 and is_two_four(part.weight):
            yield part


def is_two_four(weight: Tensor) -> bool:
    """Whether each four consecutive inputs of a row have at most two non-zeros."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).view(-1, 4).sum(dim=1) <= 2).all())


def refusal(kernel: Kernel, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a kernel does not take a matrix of this (out, in) shape and dtype; None where it does."""
    known = MULTIPLES[kernel]
    name = str(dtype).removeprefix("torch.")
    if dtype not in known:
        return f"takes {', '.join(str(one).removeprefix('torch.') for one in known)}, not {name}"
    height, width = known[dtype]
    if shape[0] % height or shape[1] % width:
        return f"takes multiples of {height} x {width} in {name}, not {shape[0]} x {shape[1]}"
    return None


def choose(times: Times) -> str:
    """The kernel that is faster than "dense" beyond the spread with some number of rows, and slower so with none.

    Beyond the spread: the third quartile of the one's times is below the first of the other's. Of several, the one with
    the greatest gain over all rows (the geometric mean), which has to be above 1.
    """
    best, best_gain = "dense", 1.0
    dense = times["dense"]
    for kernel, own in times.items():
        if kernel == "dense" or own.keys() != dense.keys():
            continue
        gains = [statistics.median(dense[rows]) / statistics.median(own[rows]) for rows in dense]
        gain = math.prod(gains) ** (1 / len(gains))
        faster = any(_below(own[rows], dense[rows]) for rows in dense)
        slower = any(_below(dense[rows], own[rows]) for rows in dense)
        if faster and not slower and gain > best_gain:
            best, best_gain = kernel, gain
    return best


def table(choices: Sequence[Choice]) -> str:
    """The choices as lines of text, medians in milliseconds."""
    if not choices:
        return "2:4 kernels: no linear layer is 2:4; all stay dense."
    counts = sorted({rows for choice in choices for own in choice.times.values() for rows in own})
    lines = [
        "2:4 kernels of torch against dense products, milliseconds (median) by rows of input:",
        f"{'matrix':>16} {'dtype':>9} {'of them':>7}  {'kernel':<11}" + "".join(f"{rows:>10}" for rows in counts),
    ]
    for choice in choices:
        what = f"{f'{choice.out_features} x {choice.in_features}':>16} {choice.dtype:>9} {choice.matrices:>7}"
        for kernel, own in choice.times.items():
            cells = "".join(f"{statistics.median(own[rows]):>10.4f}" if rows in own else f"{'':>10}" for rows in counts)
            lines.append(f"{what}  {kernel:<11}{cells}{'  taken' if kernel == choice.kernel else ''}")
        lines += [f"{what}  {kernel:<11}  {reason}" for kernel, reason in choice.refused.items()]
    return "\n".join(lines)


def print_table(choices: Sequence[Choice]) -> None:
    """Print `table` to standard error."""
    print(table(choices), file=sys.stderr)


def _convert_alike(layers: Sequence[nn.Linear], rows: Sequence[int]) -> Choice:
    """Time the first of some layers of one shape, and convert all of them if it gains."""
    weight = layers[0].weight.detach()
    products: dict[str, Callable[[Tensor], Tensor]] = {"dense": lambda x: functional.linear(x, weight)}
    refused: dict[str, str] = {}
    for kernel in get_args(Kernel):
        reason = refusal(kernel, weight.shape, weight.dtype)
        if reason is None:
            try:
                converted = semi_structured(weight, kernel)
                reason = disagreement(converted, weight, max(rows))
                products[kernel] = lambda x, converted=converted: functional.linear(x, converted)  # type: ignore[misc]
            except (RuntimeError, NotImplementedError, ValueError) as error:
                reason = str(error).splitlines()[0]
        if reason is not None:
            refused[kernel] = reason
            products.pop(kernel, None)
    times = measure(products, weight, rows)
    chosen = choose(times)
    if chosen != "dense":
        for layer in layers:
            layer.weight = nn.Parameter(semi_structured(layer.weight.detach(), chosen), requires_grad=False)
    name = str(weight.dtype).removeprefix("torch.")
    return Choice(weight.shape[0], weight.shape[1], name, len(layers), chosen, times, refused)


def semi_structured(weight: Tensor, kernel: str) -> Tensor:
    """A 2:4 weight as torch's subclass of tensors whose products one of the kernels computes."""
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    converted: Any = classes[kernel].from_dense(weight.contiguous())
    return converted  # type: ignore[no-any-return]


def disagreement(converted: Tensor, weight: Tensor, rows: int) -> str | None:
    """What is wrong with the products of a converted weight, beside the dense ones; None within rounding."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(rows, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    dense, own = functional.linear(x, weight).double(), functional.linear(x, converted).double()
    error = float((own - dense).norm() / dense.norm().clamp_min(1e-30))
    # float32 goes through the tensor cores' 10 bits.
    allowed = 4 * torch.finfo(torch.float16 if weight.dtype == torch.float32 else weight.dtype).eps
    return (
        None if error <= allowed else f"its products differ from the dense ones by {error:.2g}, at most {allowed:.2g}"
    )


def measure(
    products: Mapping[str, Callable[[Tensor], Tensor]], weight: Tensor, rows: Sequence[int]
) -> dict[str, dict[int, list[float]]]:
    """Milliseconds of each product by rows of input, taken in turns."""
    times: dict[str, dict[int, list[float]]] = {name: {} for name in products}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, weight.shape[1], device=weight.device).to(weight.dtype)
            for repetition in range(WARM_UPS + MEASURED):
                for name, product in products.items():
                    taken = _milliseconds(product, x)
                    if repetition >= WARM_UPS:
                        times[name].setdefault(count, []).append(taken)
    return times


def _milliseconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of one product; on a GPU with the time that the host takes to start it, which decoding waits for too."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    product(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - started) * 1e3


def _below(times: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the third quartile of some times is below the first of others."""
    third = statistics.quantiles(times, n=4, method="inclusive")[2]
    return third < statistics.quantiles(others, n=4, method="inclusive")[0]
