"""What pruning large models would take on H100s, by arithmetic: nothing here is measured.

    python benchmarks/on_paper.py [--bfloat16 400] [--float32 40] [--solving 15] [--exchange 200] [--disk 6] [--link 50]

The work is counted as `secateur plan` counts it: two forwards of all tokens, a triangle of each Gram matrix, and for
SparseGPT a factor of each Gram matrix and six products of the weights with it. Rates are arguments: what a GPU reaches
in products of bfloat16 and of float32 and while it solves (TFLOP/s), what each process sends to the others, what a
machine reads from its disk and writes to it, and what reaches a GPU from its host (GB/s). Hidden states are in the
memory of the host. Memory is that of one GPU: two blocks in bfloat16, the sums of one block, and what solving its
widest matrix takes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import secateur
from secateur.core.gram import Gram
from secateur.pruning.preparation import solving_cost
from secateur.runs.processes import Processes

TOKENS = 128 * 2048


@dataclass(frozen=True)
class Input:
    """What some matrices of a block multiply: its width, how many rows they have in all, and the share of tokens."""

    name: str
    width: int
    rows: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Shape:
    """The prunable matrices of a model."""

    name: str
    blocks: int
    inputs: tuple[Input, ...]

    @property
    def block_weights(self) -> int:
        """Of one block."""
        return sum(own.width * sum(own.rows) for own in self.inputs)

    @property
    def used_weights(self) -> float:
        """Of one block, that a token is multiplied with."""
        return sum(own.width * sum(own.rows) * own.share for own in self.inputs)


def llama(name: str, blocks: int, hidden: int, middle: int, keys: int) -> Shape:
    """A dense decoder with grouped queries and a gated MLP."""
    return Shape(
        name,
        blocks,
        (
            Input("qkv", hidden, (hidden, keys, keys)),
            Input("o", hidden, (hidden,)),
            Input("gate and up", hidden, (middle, middle)),
            Input("down", middle, (hidden,)),
        ),
    )


def experts() -> Shape:
    """A mixture of 384 experts, of which a token is routed to 8, and one that all tokens see."""

    def each() -> Iterator[Input]:
        for number in range(385):
            share = 1.0 if number == 384 else 8 / 384
            yield Input(f"{number} gate and up", 7168, (2048, 2048), share)
            yield Input(f"{number} down", 2048, (7168,), share)

    attention = (Input("qkv", 7168, (1536, 576)), Input("up", 1536, (12288,)), Input("o", 8192, (7168,)))
    return Shape("1T, experts", 60, (*attention, *each()))


SHAPES = (
    llama("8B", 32, 4096, 14336, 1024),
    llama("70B", 80, 8192, 28672, 1024),
    llama("405B", 126, 16384, 53248, 1024),
    experts(),
)


@dataclass(frozen=True)
class Piece:
    """A matrix, as far as its cost goes."""

    name: str
    shape: tuple[int, int]


def parts(shape: Shape, name: str, count: int, rates: argparse.Namespace) -> dict[str, float]:
    """Seconds by part, bytes that each process sends, and bytes on each GPU."""
    method = getattr(secateur, name)()
    second_order = Gram in method.needs
    weights = shape.block_weights * shape.blocks
    found = {"forwards": 2 * 2 * shape.used_weights * shape.blocks * TOKENS / count / rates.bfloat16 / 1e12}
    products = sum((Gram.cost(own.width).products if second_order else own.width) * own.share for own in shape.inputs)
    found["statistics"] = 2 * products * shape.blocks * TOKENS / count / rates.float32 / 1e12
    costs = {
        f"{own.name} {number}": solving_cost(method, Piece(own.name, (rows, own.width)))  # type: ignore[arg-type]
        for own in shape.inputs
        for number, rows in enumerate(own.rows)
    }
    load = [0.0] * count
    for piece, rank in Processes(0, count).deal(costs).items():
        load[rank] += costs[piece]
    found["solving"] = 2 * max(load) * shape.blocks / rates.solving / 1e12
    sums = sum(4 * Gram.cost(own.width).numbers for own in shape.inputs) if second_order else 0
    found["sent"] = ((2 * (count - 1) / count * sums) + 2 * shape.block_weights) * shape.blocks if count > 1 else 0.0
    found["exchange"] = found["sent"] / rates.exchange / 1e9
    found["reading"] = 2 * weights * max(1 / rates.link, 2 / rates.disk) / 1e9  # the disk is read and written
    widest = max(own.width for own in shape.inputs)
    largest = max(own.width * max(own.rows) for own in shape.inputs)
    solving = 4 * (Gram.cost(widest).solving + 5 * largest) if second_order else 4 * largest
    found["memory"] = 2 * 2 * shape.block_weights + sums + solving
    busy = found["forwards"] + found["statistics"] + found["solving"] + found["exchange"]
    found["in all"] = max(busy, found["reading"])
    return found


def duration(seconds: float) -> str:
    """In a unit that leaves one to three digits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bfloat16", type=float, default=400.0)
    parser.add_argument("--float32", type=float, default=40.0)
    parser.add_argument("--solving", type=float, default=15.0)
    parser.add_argument("--exchange", type=float, default=200.0)
    parser.add_argument("--disk", type=float, default=6.0)
    parser.add_argument("--link", type=float, default=50.0)
    rates = parser.parse_args()
    columns = ("forwards", "statistics", "solving", "exchange", "reading")
    print(f"| model | method | H100s | {' | '.join(columns)} | in all | each sends | memory of a GPU |")
    print("|---|---|---:|" + "---:|" * (len(columns) + 3))
    for shape in SHAPES:
        for method in ("wanda", "sparsegpt"):
            for count in (1, 8, 64):
                own = parts(shape, method, count, rates)
                shown = " | ".join(duration(own[column]) for column in (*columns, "in all"))
                print(
                    f"| {shape.name} | {method} | {count} | {shown} | {own['sent'] / 1e9:,.0f} GB | "
                    f"{own['memory'] / 1e9:.1f} GB |"
                )


if __name__ == "__main__":
    main()
