"""One file per paper. To add a method or a refinement: write its file, then add its row here."""

from collections.abc import Callable

from secateur.core.problem import Method, Refinement
from secateur.methods.admm import admm
from secateur.methods.alps import alps
from secateur.methods.gblm import gblm, gblm_inverse, gradient
from secateur.methods.least_squares import least_squares
from secateur.methods.magnitude import magnitude
from secateur.methods.obs_update import magnitude_iterative, obs_update, wanda_iterative
from secateur.methods.pruner_zero import pruner_zero
from secateur.methods.ria import ria
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.swaps import swaps
from secateur.methods.wanda import wanda, wanda_variant
from secateur.methods.wanda_plus import wanda_plus

METHODS: dict[str, Callable[[], Method]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "wanda_variant": wanda_variant,
    "ria": ria,
    "gblm": gblm,
    "gblm_inverse": gblm_inverse,
    "gradient": gradient,
    "wanda_plus": wanda_plus,
    "pruner_zero": pruner_zero,
    "sparsegpt": sparsegpt,
    "magnitude_iterative": magnitude_iterative,
    "wanda_iterative": wanda_iterative,
    "admm": admm,
    "alps": alps,
}

REFINEMENTS: dict[str, Callable[[], Refinement]] = {
    "least_squares": least_squares,
    "obs_update": obs_update,
    "swaps": swaps,
}
