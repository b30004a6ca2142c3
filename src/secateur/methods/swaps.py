"""One-swap refinement of a mask: put back a removed weight and remove a kept one wherever that lowers the error.

Source: Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", arXiv 2512.10922, section 3.
"""

from secateur.core.exchange import exchange
from secateur.core.gram import Gram
from secateur.core.linalg import finished, right_hand_side, working_gram, working_weight
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Problem, Refinement, Solution, at_least, with_options
from secateur.errors import PatternError


@with_options
def swaps(*, limit: int = 100, candidates: int = 64) -> Refinement:
    """The refinement that exchanges kept and removed weights within rows while that lowers ``||(W - W') X||²``.

    Each step takes the best pair of every row at once, within the groups of M for N:M; rows keep their counts, so that
    every unstructured pattern still holds. No step raises the error of any row. All weights are the dense ones: an
    update by the method before is not kept.

    Options: at most `limit` swaps per row; in unstructured rows only the `candidates` best removals and the
    `candidates` best returns, each judged alone, are paired (0 for all pairs, of time ``in²`` per row and swap).
    Notes: `swaps` in all, `dropped_update` 1 where the method before had updated weights, `reconstruction_error`.
    Raises `PatternError` for other patterns: a swap may break them.
    """
    at_least(1, "swaps", limit=limit)
    at_least(0, "swaps", candidates=candidates)

    def refine(problem: Problem, solution: Solution) -> Solution:
        pattern = problem.pattern
        if not isinstance(pattern, Unstructured | NM):
            raise PatternError(f"{problem.name}: swaps needs an unstructured or N:M pattern, got {pattern}.")
        weight, gram = working_weight(problem), working_gram(problem)
        mask, count = exchange(
            weight,
            gram,
            right_hand_side(problem, gram, weight),
            solution.mask,
            group=pattern.m if isinstance(pattern, NM) else None,
            limit=limit,
            candidates=candidates,
        )
        updated = bool((solution.mask & solution.weight.ne(problem.weight)).any())
        return finished(problem, weight, mask, swaps=float(count), **({"dropped_update": 1.0} if updated else {}))

    return Refinement("swaps", refine, frozenset({Gram}), products=200)
