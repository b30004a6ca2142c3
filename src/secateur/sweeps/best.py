"""What a sweep comes to: for each pattern the method that costs least, and whether the result can replace the model."""

import math
from typing import TYPE_CHECKING

from secateur.evaluate.verdict import ADVICE, MAX_NATS, MIN_AGREEMENT, growth
from secateur.sweeps.draws import Mean

if TYPE_CHECKING:
    from secateur.sweeps.folder import Sweep


def best_lines(sweep: "Sweep") -> list[str]:
    """A sentence for each pattern, and what to try where none of the pruned models can replace the dense one.

    A method is judged on the text where it costs most, by the limits of `verdict`: the increase of the loss, and the
    share of the same first choices where the sweep has measured it. Patterns without a finished cell have no sentence.
    """
    lines, replaced = [], False
    for pattern in dict.fromkeys(mean.pattern for mean in sweep.means):
        worst: dict[str, tuple[float, Mean]] = {}
        for mean in (own for own in sweep.means if own.pattern == pattern):
            level = sweep.dense[mean.data]["perplexity"]
            found = mean.perplexity.mean
            cost = math.log(found / level) if found is not None and level else math.inf
            if cost >= worst.get(mean.method, (-math.inf, mean))[0]:
                worst[mean.method] = cost, mean
        method, (cost, mean) = min(worst.items(), key=lambda item: item[1][0])
        if math.isinf(cost):
            continue
        same = min(
            (own.top1.mean for own in sweep.means if (own.method, own.pattern) == (method, pattern) and own.top1.mean),
            default=None,
        )
        will_do = cost <= MAX_NATS and (same is None or same >= MIN_AGREEMENT)
        replaced = replaced or will_do
        choices = "" if same is None else f", {100 * (1 - same):.1f} % of first choices differ"
        on = f" on {mean.data}" if len(sweep.dense) > 1 else ""
        end = "close enough to replace the dense model here" if will_do else "not a replacement"
        loss = f"perplexity {growth(math.exp(cost))} ({cost:+.4f} nats){on}"
        lines.append(f"{pattern}: {method} costs least, {loss}{choices}: {end}.")
    return [*lines, *([ADVICE] if lines and not replaced else [])]
