"""What exact sums cost: Gram matrices as integers beside the same products added up in float32.

    python benchmarks/exact_sums.py [--blocks 576/1536,2048/8192] [--tokens 2048] [--rounds 5]

A block is given by its hidden and its intermediate size: it has four inputs of which Gram matrices are taken, three of
the hidden size and one of the other. Both ways multiply one triangle in the same panels; they take turns, and the
fastest of the rounds count. `of a run` is the share of two forwards through the block and its exact Gram matrices that
exactness costs.
"""

import argparse
import time
from collections.abc import Callable

import torch

from secateur.core.gram import Gram, _panels


def plain(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add the products of tokens to the upper triangle, in float32."""
    for start, stop in _panels(len(total), len(total)):
        panel = total.narrow(0, start, stop - start).narrow(1, start, len(total) - start)
        panel.addmm_(x[:, start:stop].t(), x[:, start:])


def seconds(function: Callable[[], object]) -> float:
    """What a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def gram_seconds(width: int, tokens: int, rounds: int) -> tuple[float, float]:
    """(in float32, exact) seconds of the products of so many tokens."""
    x, total, gram = torch.randn(tokens, width), torch.zeros(width, width), Gram.empty(width)
    found = [(seconds(lambda: plain(total, x)), seconds(lambda: gram.update(x))) for _ in range(rounds + 1)][1:]
    return min(own for own, _ in found), min(own for _, own in found)


def main() -> None:
    """Print seconds of both for each block, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="576/1536,2048/8192,4096/11008")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens, {torch.get_num_threads()} threads, float32; seconds")
    print(f"{'block':>12}{'forward':>10}{'float32':>10}{'exact':>10}{'ratio':>8}{'of a run':>10}")
    for block in arguments.blocks.split(","):
        hidden, wide = map(int, block.split("/"))
        x, weight = torch.randn(arguments.tokens, hidden), torch.randn(hidden, hidden)
        once = min(seconds(lambda: x @ weight) for _ in range(arguments.rounds))  # noqa: B023
        forward = once * (4 + 3 * wide / hidden)
        narrow, broad = (gram_seconds(width, arguments.tokens, arguments.rounds) for width in (hidden, wide))
        in_float, exact = (3 * own + other for own, other in zip(narrow, broad, strict=True))
        share = (exact - in_float) / (2 * forward + exact)
        print(
            f"{block:>12}{forward:10.4f}{in_float:10.4f}{exact:10.4f}{exact / in_float:8.2f}{share:10.1%}", flush=True
        )


if __name__ == "__main__":
    main()
