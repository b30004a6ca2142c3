"""Two models on the same tasks, document by document: differences with paired errors, and answers that flipped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.errors import CalibrationError
from secateur.evaluate.task_results import TaskResult, TaskResults


@dataclass(frozen=True)
class Difference:
    """The pruned model's value of a metric minus the dense one's.

    `error` is the standard error of the mean of the documents' differences; None where the metric is no mean over
    documents. `right_to_wrong` and `wrong_to_right` count the documents whose answer flipped, for metrics that are 1 or
    0; else they are None.
    """

    value: float
    error: float | None
    right_to_wrong: int | None
    wrong_to_right: int | None


@dataclass(frozen=True)
class TaskComparison:
    """A pruned model beside the dense one on one task or group."""

    model: str
    task: str
    dense: TaskResult
    pruned: TaskResult
    differences: Mapping[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """One object: the pruned model's metrics, the dense one's, and their differences."""
        return {
            "model": self.model,
            "task": self.task,
            "shots": self.pruned.shots,
            "documents": self.pruned.documents,
            "metrics": self.pruned.to_json()["metrics"],
            "dense": self.dense.to_json()["metrics"],
            "differences": {name: asdict(difference) for name, difference in self.differences.items()},
        }


def task_differences(dense: TaskResults, pruned: TaskResults) -> list[TaskComparison]:
    """Every task and group of a pruned model beside the dense one's.

    Raises `CalibrationError` when the two did not answer the same documents.
    """
    rows: dict[str, TaskComparison] = {}
    for own in pruned.results:
        reference = dense[own.task]
        if (own.digest, own.documents) != (reference.digest, reference.documents):
            raise CalibrationError(
                f"{own.task}: {pruned.model} answered other documents or prompts than {dense.model} (digest "
                f"{own.digest[:12]}, expected {reference.digest[:12]}). Evaluate both again with --fresh."
            )
        differences = {
            name: _of_group(name, own, reference, rows) if own.members else _of_task(name, own, reference)
            for name in own.metrics
        }
        rows[own.task] = TaskComparison(pruned.model, own.task, reference, own, differences)
    return list(rows.values())


def _of_task(name: str, own: TaskResult, reference: TaskResult) -> Difference:
    value = own.metrics[name].value - reference.metrics[name].value
    after, before = (torch.tensor(result.scores.get(name, ()), dtype=torch.float64) for result in (own, reference))
    if not len(after) or len(after) != len(before):
        return Difference(value, None, None, None)
    change = after - before
    is_mean = math.isclose(float(change.mean()), value, abs_tol=1e-9)
    error = float(change.std() / math.sqrt(len(change))) if is_mean and len(change) > 1 else None
    if not bool(((after == 0) | (after == 1)).all() and ((before == 0) | (before == 1)).all()):
        return Difference(value, error, None, None)
    return Difference(value, error, int((change < 0).sum()), int((change > 0).sum()))


def _of_group(name: str, own: TaskResult, reference: TaskResult, rows: Mapping[str, TaskComparison]) -> Difference:
    """Of a weighted mean over tasks: the tasks' errors added as those of independent ones, their flips summed."""
    value = own.metrics[name].value - reference.metrics[name].value
    parts = [
        (weight, rows[task].differences[name]) for task, weight in own.members.items() if name in rows[task].differences
    ]
    if len(parts) < len(own.members):  # a mean over some of its tasks; the weights are of all
        return Difference(value, None, None, None)
    errors = [weight * part.error for weight, part in parts if part.error is not None]
    error = math.sqrt(math.fsum(error**2 for error in errors)) if len(errors) == len(parts) else None
    return Difference(
        value,
        error,
        _sum([part.right_to_wrong for _, part in parts]),
        _sum([part.wrong_to_right for _, part in parts]),
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
