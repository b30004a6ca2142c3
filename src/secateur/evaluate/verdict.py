"""Whether a pruned model can take the dense one's place: one sentence, and the figures behind it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.arguments import calling
from secateur.evaluate.perplexity import exponential, plus_minus, without_nan
from secateur.evaluate.task_results import TaskComparison
from secateur.shown import Shown

MAX_NATS = 0.05  # perplexity 5 % higher
MIN_AGREEMENT = 0.9
ADVICE = (
    "Try fewer zeros, a method that also updates the weights it keeps (such as --method alps), or training afterwards "
    "(secateur recover)."
)


@dataclass(frozen=True)
class Change:
    """How far a pruned model is from the dense one on a text.

    `nats` is its mean loss minus the dense one's, `agreement` the share of tokens with the same first choice; errors
    are standard errors over windows, NaN for a single one.
    """

    data: str
    nats: float
    nats_error: float
    agreement: float
    agreement_error: float

    @property
    def perplexity_ratio(self) -> float:
        """The pruned model's perplexity over the dense one's."""
        return exponential(self.nats)

    @classmethod
    def from_json(cls, result: Mapping[str, Any]) -> "Change":
        """That of an agreement which was written as JSON."""
        errors = [result.get(name) for name in ("difference_error", "top1_error")]
        nats_error, agreement_error = (math.nan if error is None else error for error in errors)
        return cls(result["data"], result["difference"], nats_error, result["top1"], agreement_error)


@dataclass(frozen=True, repr=False)
class Verdict(Shown):
    """What the comparison of a pruned model with the dense one comes to.

    `thresholds` are those that it was judged by: `max_nats`, the highest `nats` that passes, and `min_agreement`, the
    lowest `agreement`; a measured value that is equal passes, and every text has to. `given` says that a user chose
    them. `passed` is None where no text was compared; tasks are told, not judged.
    """

    model: str
    thresholds: Mapping[str, float]
    given: bool
    changes: Sequence[Change]
    tasks: Sequence[TaskComparison] = ()

    @property
    def missed(self) -> list[str]:
        """The names of the thresholds that a text misses."""
        worst = {"max_nats": self._most_nats, "min_agreement": self._least_agreement} if self.changes else {}
        limits = {name: limit for name, limit in self.thresholds.items() if name in worst}
        return [
            name
            for name, limit in limits.items()
            if (worst[name].nats > limit if name == "max_nats" else worst[name].agreement < limit)
        ]

    @property
    def passed(self) -> bool | None:
        """Whether no threshold is missed."""
        return not self.missed if self.changes else None

    @property
    def sentence(self) -> str:
        """The verdict for a person: the worst figures, whether they will do, and what to do if not."""
        found = f"{self.model}: {', '.join([*self._of_texts(), *self._of_tasks()]) or 'compared on nothing'}"
        if self.passed is None:
            return f"{found}. Compare it on a text as well, to know whether it can replace the dense model."
        if self.given:
            asked = [_spoken(name, self.thresholds[name]) for name in self.missed or self.thresholds]
            return f"{found}: {'within' if self.passed else 'misses'} {' and '.join(asked)}." + (
                "" if self.passed else f" {ADVICE}"
            )
        if self.passed:
            return f"{found}: close enough to replace it here. Measure what you use it for as well."
        return f"{found}: not a replacement. {ADVICE}"

    @property
    def _most_nats(self) -> Change:
        return max(self.changes, key=lambda change: change.nats)

    @property
    def _least_agreement(self) -> Change:
        return min(self.changes, key=lambda change: change.agreement)

    def _of_texts(self) -> list[str]:
        if not self.changes:
            return []
        choices, loss = self._least_agreement, self._most_nats
        several = len(self.changes) > 1
        return [
            f"differs from the dense model in {100 * (1 - choices.agreement):.1f}"
            f"{plus_minus(100 * choices.agreement_error, '.1f')} % of first choices"
            + (f" on {choices.data}" if several else ""),
            f"perplexity {growth(loss.perplexity_ratio)} ({loss.nats:+.4f}{plus_minus(loss.nats_error, '.4f')} nats)"
            + (f" on {loss.data}" if several else ""),
        ]

    def _of_tasks(self) -> list[str]:
        answers = list(_answers(self.tasks))
        if not answers:
            return []
        flipped, asked = sum(row["flipped"] for row in answers), sum(row["documents"] for row in answers)
        worst = min(answers, key=lambda row: row["difference"])
        error = math.nan if worst["error"] is None else 100 * worst["error"]
        return [
            f"{flipped:,} of {asked:,} answers flipped",
            f"{worst['task']} {100 * worst['difference']:+.1f}{plus_minus(error, '.1f')} points"
            + (", the worst of the tasks" if len(answers) > 1 else ""),
        ]

    def to_json(self) -> dict[str, Any]:
        """Model, sentence, passed, thresholds with whether they were given, and the values that were measured."""
        return {
            "model": self.model,
            "sentence": self.sentence,
            "passed": self.passed,
            "missed": self.missed,
            "given": self.given,
            "thresholds": dict(self.thresholds),
            "values": {
                "texts": [without_nan(asdict(change)) for change in self.changes],
                "tasks": list(_answers(self.tasks)),
            },
        }


@calling
def verdict(
    model: str,
    changes: Sequence[Change],
    tasks: Sequence[TaskComparison] = (),
    *,
    max_nats: float | None = None,
    min_agreement: float | None = None,
) -> Verdict:
    """The verdict on a pruned model from what was measured of it on each text.

    It is judged by the thresholds that are given: `max_nats`, the highest mean increase of the loss in nats per token,
    and `min_agreement`, the lowest share of tokens with the dense model's first choice. Where none is, by `MAX_NATS`
    and `MIN_AGREEMENT`.
    """
    given = {"max_nats": max_nats, "min_agreement": min_agreement}
    chosen = {name: value for name, value in given.items() if value is not None}
    thresholds = chosen or {"max_nats": MAX_NATS, "min_agreement": MIN_AGREEMENT}
    return Verdict(model, thresholds, bool(chosen), tuple(changes), tuple(tasks))


def _answers(rows: Sequence[TaskComparison]) -> list[dict[str, Any]]:
    """Of each task that is no group, the first metric whose answers are right or wrong."""
    found = []
    for row in rows:
        for metric, difference in {} if row.pruned.members else row.differences.items():
            if difference.right_to_wrong is not None and difference.wrong_to_right is not None:
                found.append(
                    {
                        "task": row.task,
                        "metric": metric,
                        "documents": row.pruned.documents,
                        "flipped": difference.right_to_wrong + difference.wrong_to_right,
                        "difference": difference.value,
                        "error": difference.error,
                    }
                )
                break
    return found


def growth(ratio: float) -> str:
    """By how much a perplexity grew: +61.0 %, or 19.9 times as high."""
    return f"{ratio:.3g} times as high" if ratio >= 10 else f"{100 * (ratio - 1):+.1f} %"


def _spoken(threshold: str, value: float) -> str:
    return f"--{threshold.replace('_', '-')} {value:g}"
