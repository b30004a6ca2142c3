"""One file per paper. To add a method: write its file, then add its row here."""

from collections.abc import Callable

from secateur.core.problem import Method
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda, wanda_variant

METHODS: dict[str, Callable[[], Method]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "wanda-variant": wanda_variant,
}
