"""What exact sums cost: Gram matrices as integers beside the same products added up in float32.

    python benchmarks/exact_sums.py [--widths 576,1536,2048,8192] [--tokens 2048] [--rounds 5]

Both multiply one triangle in the same panels; they take turns, and the fastest of the rounds count. `part of a run` is
what that adds to a forward through a block like LLaMA's with such a hidden size, and its four Gram matrices, which are
multiplied as well: the share of the time of both that exactness costs.
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


def main() -> None:
    """Print seconds of both for each width, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="576,1536,2048,8192")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens, {torch.get_num_threads()} threads, float32")
    print(f"{'width':>8}{'float32 s':>12}{'exact s':>12}{'ratio':>8}{'part of a run':>16}")
    for width in map(int, arguments.widths.split(",")):
        x = torch.randn(arguments.tokens, width)
        weight = torch.randn(width, width)
        total, gram = torch.zeros(width, width), Gram.empty(width)
        found = [
            (seconds(lambda: plain(total, x)), seconds(lambda: gram.update(x)), seconds(lambda: x @ weight))  # noqa: B023
            for _ in range(arguments.rounds + 1)
        ][1:]
        in_float, exact, product = (min(column) for column in zip(*found, strict=True))
        # A block with an intermediate size of 8/3 of the hidden size h: 11 h² weights, inputs of h, h, h and 8/3 h.
        forward, grams = 2 * 11 * product, 3 + (8 / 3) ** 2
        share = grams * (exact - in_float) / (forward + grams * exact)
        print(f"{width:8}{in_float:12.4f}{exact:12.4f}{exact / in_float:8.2f}{share:16.1%}", flush=True)


if __name__ == "__main__":
    main()
