"""ALPS: ADMM on the pruning problem itself, with a penalty that grows as its mask settles, and then least squares.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
NeurIPS 2024, arXiv 2406.07831, algorithm 1 and section 3.2; published code for the constants that the paper leaves
open.
"""

import torch
from torch import Tensor

from secateur.core.gram import Gram, full_precision
from secateur.core.linalg import conjugate_gradients, finished, normalise, shifted_inverse
from secateur.core.patterns import with_group
from secateur.core.problem import Method, Problem, Solution, above_zero, at_least, with_options

EVERY = 3  # iterations between two looks at the mask
SETTLING = 30  # iterations before a mask that hardly changes is taken for settled
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of the kept weights more than this changed -> penalty times that
LEAST = 1e-4  # penalty; a first mask that stays in place even then is the answer


@with_options
def alps(
    *, damping: float = 0.01, penalty: float = 0.1, iterations: int = 300, polish: int = 10, settled: float = 0.0003
) -> Method:
    """The method that splits the problem into least squares weights W and pattern-obeying weights D, and joins them.

    In coordinates in which every input has norm one (`gram` H with `damping` on its diagonal, dense weights W₀):
    ``W = (W₀ H - V + rho D) (H + rho)⁻¹``; D keeps of ``W + V / rho`` what the pattern keeps of its absolute values;
    ``V += rho (W - D)``. Every 3 iterations rho grows by 1.3, 1.2 or 1.1, the more the mask has changed. It ends when
    the mask has not changed, or after 30 iterations by less than `settled` of the kept weights. The mask of the
    highest ``|W|`` is then refitted by `polish` conjugate gradient steps. Compared per matrix unless the pattern says
    otherwise.

    Paper: the damping is added after the inputs were scaled to norm one, and not before. One Cholesky factorisation
    per rho stands for one eigendecomposition: it is faster in single precision.

    Options: `damping` 0.01, the first `penalty` 0.1, at most 300 `iterations`, 10 `polish` steps, `settled` 0.0003.
    Notes: `damping`, `iterations`, the final `penalty`, `reconstruction_error`.
    """
    at_least(0, "alps", damping=damping, polish=polish, settled=settled)
    at_least(1, "alps", iterations=iterations)
    above_zero("alps", penalty=penalty)

    @full_precision()
    def solve(problem: Problem) -> Solution:
        pattern = with_group(problem.pattern, "matrix")
        scaled = normalise(problem)
        gram, right, used = scaled.damped(damping)
        mask = first_mask = pattern.mask(scaled.weight.abs())
        # Memory: `missing` is V / rho, which has entries only where `sparse`, D, has none.
        sparse, missing = scaled.weight * mask, torch.zeros_like(right)
        weight, sides = torch.empty_like(right), torch.empty_like(right)
        rho, moved, step = penalty, False, 0
        inverse: Tensor | None = None
        for step in range(1, iterations + 1):
            if inverse is None:
                inverse = shifted_inverse(problem.name, gram, rho)
            torch.add(right, sparse, alpha=rho, out=sides).sub_(missing, alpha=rho)
            torch.mm(sides, inverse, out=weight)
            missing += weight
            new_mask = pattern.mask(torch.abs(missing, out=sides))
            torch.mul(missing, new_mask.to(missing), out=sparse)
            missing -= sparse
            if step % EVERY:
                continue
            changed = int((new_mask ^ mask).count_nonzero()) / max(int(new_mask.count_nonzero()), 1)
            mask = new_mask
            if moved and (changed == 0 or (step >= SETTLING and changed < settled)):
                break
            if not moved and changed <= GROWTH[1][0] and rho < LEAST:
                break
            if changed > GROWTH[1][0] or moved:
                moved = True
                growth = next(factor for least, factor in GROWTH if changed > least)
                rho, missing = rho * growth, missing.div_(growth)
            else:
                # A penalty that holds the first mask in place from the start is too high: begin again with less.
                rho, mask, sparse = rho / 5, first_mask, scaled.weight * first_mask
                missing.zero_()
            inverse = None  # Memory: gone before the next one is made
        mask = pattern.mask(weight.abs())
        weight, _ = conjugate_gradients(gram, right, weight, mask, iterations=polish)
        return finished(problem, scaled.back(weight), mask, damping=used, iterations=float(step), penalty=rho)

    products = 100 * min(iterations, 35) / 35
    return Method("alps", solve, frozenset({Gram}), per="matrix", products=products, revision=2)
