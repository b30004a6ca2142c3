"""What to prune and how, decided before anything changes."""

from collections.abc import Callable

from secateur.plans.allocation import Allocation
from secateur.plans.alpha import alpha
from secateur.plans.dlp import dlp
from secateur.plans.owl import owl
from secateur.plans.sensitivity import sensitivity

ALLOCATIONS: dict[str, Callable[[], Allocation]] = {
    "owl": owl,
    "dlp": dlp,
    "alpha": alpha,
    "sensitivity": sensitivity,
}
