"""Blocks whose outputs moved far more than those of their neighbours: something went wrong in them."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

NEIGHBOURS = 4  # on each side
FEWEST = 4  # neighbours that say what is usual
TIMES = 3.0  # the median of the neighbours, at least
SPREADS = 5.0  # above it on a logarithmic scale, at least


def mark_far_blocks(blocks: Sequence[dict[str, Any]]) -> None:
    """Give the record of every block that moved far the entry `usual_change`: the median of its neighbours' changes.

    A block moved far when the logarithm of its `output_change` lies above the median of the logarithms of up to four
    neighbours on each side by more than five times their spread (1.4826 times the median distance from the median, as
    for a normal distribution), and by more than the logarithm of three: changes of neighbours are often nearly equal,
    and their spread then means nothing. Neighbours whose output did not move do not count.
    """
    changes = [block.get("output_change") or 0.0 for block in blocks]
    for index, change in enumerate(changes):
        around = changes[max(0, index - NEIGHBOURS) : index] + changes[index + 1 : index + 1 + NEIGHBOURS]
        logarithms = [math.log(other) for other in around if other > 0]
        if change <= 0 or len(logarithms) < FEWEST:
            continue
        middle = median(logarithms)
        spread = 1.4826 * median(abs(value - middle) for value in logarithms)
        if math.log(change) - middle > max(SPREADS * spread, math.log(TIMES)):
            blocks[index]["usual_change"] = math.exp(middle)
