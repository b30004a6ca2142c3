"""What the solvers cost on this machine, against the floor of SparseGPT and against SparseGPT.

    python benchmarks/solver_cost.py [--shapes 576x1536,2048x2048,4096x4096] [--rounds 3] [--pattern 0.5] [--only NAME]

The floor: one Cholesky factorisation of the (in, in) Gram matrix, measured, plus out * in * in multiply-adds at the
rate of a product of the matrix and its Gram matrix, measured. Everything in one run, in float32, on random weights and
correlated random inputs; the best of the rounds counts. The times hold what a user pays for, the reconstruction error
in the report included.
"""

import argparse
import time
from collections.abc import Callable

import torch

from secateur.core.gram import Gram
from secateur.core.patterns import Unstructured, parse_pattern
from secateur.core.problem import Method, Problem, chain
from secateur.methods.admm import admm
from secateur.methods.alps import alps
from secateur.methods.least_squares import least_squares
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda

METHODS: dict[str, tuple[Callable[[], Method], bool]] = {  # whether long, and so timed once
    "sparsegpt": (sparsegpt, False),
    "wanda+least_squares": (lambda: chain(wanda(), least_squares()), False),
    "admm": (admm, False),
    "alps": (alps, True),
}


def seconds(function: Callable[[], object], rounds: int) -> float:
    """The shortest of some calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def statistic(width: int) -> Gram:
    """The Gram matrix of twice as many correlated tokens as there are inputs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).rsqrt()
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    gram = Gram.empty(width)
    gram.update(torch.randn(2 * width, width, generator=generator).mul_(scale) @ mix, samples=1)
    return gram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="576x1536,2048x2048,4096x4096", help="OUTxIN, ...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pattern", default="0.5", help="a sparsity or N:M")
    parser.add_argument("--only", action="append", choices=[*METHODS], help="may be repeated")
    arguments = parser.parse_args()
    pattern = parse_pattern(arguments.pattern) if ":" in arguments.pattern else Unstructured(float(arguments.pattern))
    print(f"{pattern}, float32, {torch.get_num_threads()} threads, best of {arguments.rounds} (alps: once)")
    columns = ("seconds", "/ floor", "/ sparsegpt", "iterations")
    for text in arguments.shapes.split(","):
        rows, width = map(int, text.split("x"))
        gram = statistic(width)
        weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        problem = Problem("matrix", weight, pattern, {Gram: gram})
        damped = gram.total + 0.01 * gram.total.diagonal().mean() * torch.eye(width)
        product = seconds(lambda weight=weight, damped=damped: weight @ damped, arguments.rounds + 1)
        factor = seconds(lambda damped=damped: torch.linalg.cholesky(damped), arguments.rounds + 1)
        floor = product + factor
        rate = 2 * rows * width**2 / product / 1e9
        print(
            f"\n{rows} x {width}: floor {floor:.3f} s = factorisation {factor:.3f} + product {product:.3f} "
            f"({rate:.0f} GFLOP/s)\n{'method':<22}"
            + "".join(f"{column:>13}" for column in columns)
            + f"{'reconstruction error':>23}"
        )
        reference = None
        for name, (make, long) in METHODS.items():
            if arguments.only and name not in arguments.only:
                continue
            method, solution = make(), None

            def solve(method: Method = method, problem: Problem = problem) -> None:
                nonlocal solution
                solution = method.solve(problem)

            taken = seconds(solve, 1 if long else arguments.rounds)
            reference = taken if name == "sparsegpt" else reference
            assert solution is not None
            notes = solution.notes
            steps = notes.get("iterations", notes.get("least_squares_iterations"))
            print(
                f"{name:<22}{taken:>13.3f}{taken / floor:>13.2f}"
                + (f"{taken / reference:>13.2f}" if reference else f"{'':>13}")
                + (f"{steps:>13.0f}" if steps else f"{'':>13}")
                + f"{notes['reconstruction_error']:>23.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
