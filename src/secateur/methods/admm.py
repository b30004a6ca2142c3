"""ADMM pruning with a gradual mask: the mask grows while the alternating directions update the weights.

Source: Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv 2401.02938,
algorithm 2; published code, unstructured pruning per row for the schedule.
"""

import torch

from secateur.core.gram import Gram, full_precision
from secateur.core.linalg import finished, normalise, shifted_inverse
from secateur.core.patterns import gradual_mask, with_group
from secateur.core.problem import Method, Problem, Solution, above_zero, at_least, with_options
from secateur.errors import PatternError


@with_options
def admm(*, damping: float = 0.1, penalty: float = 1.0, iterations: int = 20, growing: int = 15) -> Method:
    """The method that alternates between the least squares weights and the nearest ones with the pattern's zeros.

    In coordinates in which every input has norm one (`gram` A with ``damping`` on its diagonal, dense weights W₀),
    for t = 1, 2, ...: the mask M keeps the highest ``|W + U|``, at the sparsity ``s (1 - (1 - t / growing)³)`` until
    ``t = growing`` and fixed after; ``Z = (W + U) M``; ``U += W - Z``;
    ``W = (W₀ A + penalty (Z - U)) (A + penalty)⁻¹``. The result is the last Z. No step is guaranteed to lower the
    error. Compared per matrix unless the pattern says otherwise.

    Paper: the published code for whole matrices uses the final sparsity from the first step on.

    Options: `damping` 0.1, `penalty` 1 (both relative to the diagonal, which is 1), 20 `iterations`, of which the
    first 15 are `growing`: as published. Notes: `damping`, `penalty`, `iterations`, `reconstruction_error`.
    """
    at_least(0, "admm", damping=damping)
    at_least(1, "admm", iterations=iterations, growing=growing)
    if growing > iterations:
        raise PatternError(f"admm: growing must be at most iterations, {iterations}, got {growing}. Set both.")
    above_zero("admm", penalty=penalty)

    @full_precision()
    def solve(problem: Problem) -> Solution:
        pattern = with_group(problem.pattern, "matrix")
        scaled = normalise(problem)
        weight, dual = scaled.weight.clone(), torch.zeros_like(scaled.weight)
        gram, right, used = scaled.damped(damping)
        inverse = shifted_inverse(problem.name, gram, penalty)
        mask, target = torch.ones_like(weight, dtype=torch.bool), weight
        for step in range(1, iterations + 1):
            if step > 1:
                torch.mm(torch.sub(target, dual).mul_(penalty).add_(right), inverse, out=weight)
            dual += weight
            if step <= growing:
                reached = pattern.sparsity * (1 - (1 - step / growing) ** 3)
                mask = gradual_mask(pattern, dual.abs(), reached)
            target = dual * mask
            dual -= target
        return finished(problem, scaled.back(target), mask, damping=used, penalty=penalty, iterations=float(iterations))

    return Method("admm", solve, frozenset({Gram}), per="matrix", products=2.2 * iterations)
