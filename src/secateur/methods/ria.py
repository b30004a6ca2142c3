"""RIA: relative importance and activations. A weight matters as much as its share of its column and of its row.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
section 4.1. The published code compares over the whole matrix unless told otherwise. The channel permutation of the
same paper, section 4.2, is not part of a method but of a run (`permute`).
"""

from secateur.core import scores
from secateur.core.problem import Method, at_least, select, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def ria(*, exponent: float = 0.5) -> Method:
    """The method with ``S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) ||X_j||₂ ** exponent``.

    Option: `exponent`, 0.5 as published; it damps the norm of the input.
    """
    at_least(0, "ria", exponent=exponent)
    return select("ria", lambda problem: scores.ria(problem, exponent), needs=frozenset({SquaredNorm}), per="matrix")
