"""The results of tasks, and two models on the same tasks: differences with paired errors, and answers that flipped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from secateur.arguments import calling
from secateur.errors import CalibrationError
from secateur.shown import Shown


@dataclass(frozen=True)
class Metric:
    """A value and its standard error, which is None where the harness computes none."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task, or the mean over a group of tasks.

    `metrics` has the harness's names, with the name of the answer filter in brackets where the task has several.
    `scores` are the values of each metric document by document, for paired comparisons; `digest` is that of the
    documents, prompts and answers. A group has `members` instead: its tasks and their weights in the mean.
    `dataset` are the hub's name and configuration of its data set; None for local files, and for a group. `notes` are
    what the harness warned of while it ran.
    """

    task: str
    shots: int | None
    documents: int
    metrics: Mapping[str, Metric]
    scores: Mapping[str, list[float]] = field(default_factory=dict)
    members: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    notes: tuple[str, ...] = ()
    dataset: tuple[str, str] | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskResult":
        """The result whose fields were written as JSON."""
        metrics = {
            name: Metric(math.nan if metric["value"] is None else metric["value"], metric["error"])
            for name, metric in value["metrics"].items()
        }
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        dataset = tuple(value["dataset"]) if value.get("dataset") else None
        known |= {"metrics": metrics, "notes": tuple(value.get("notes", ())), "dataset": dataset}
        return cls(**{"shots": None, **known})

    def to_json(self) -> dict[str, Any]:
        """All fields; a value that is not a number is None."""
        value = {**asdict(self), "notes": list(self.notes)}
        for metric in value["metrics"].values():
            if math.isnan(metric["value"]):  # JSON knows no NaN
                metric["value"] = None
        return value


@dataclass(frozen=True, repr=False)
class TaskResults(Shown):
    """The tasks in the order in which they were asked for, then the groups.

    `reused` maps the names that were not run again to the time (UTC) at which they had been.
    """

    model: str
    results: tuple[TaskResult, ...]
    limit: int | None
    dtype: str
    lm_eval: str
    reused: Mapping[str, str]
    seconds: float

    def __getitem__(self, task: str) -> TaskResult:
        return next(result for result in self.results if result.task == task)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**vars(self), "results": [result.to_json() for result in self.results]}


@dataclass(frozen=True)
class Difference:
    """The pruned model's value of a metric minus the dense one's.

    `error` is the standard error of the mean of the documents' differences; None where the metric is no mean over
    documents. `right_to_wrong` and `wrong_to_right` count the documents whose answer flipped, for metrics that are 1 or
    0; else they are None.
    """

    value: float
    error: float | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None


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


@calling
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
        return Difference(value)
    change = after - before
    is_mean = math.isclose(float(change.mean()), value, abs_tol=1e-9)
    error = float(change.std() / math.sqrt(len(change))) if is_mean and len(change) > 1 else None
    if not bool(((after == 0) | (after == 1)).all() and ((before == 0) | (before == 1)).all()):
        return Difference(value, error)
    return Difference(value, error, int((change < 0).sum()), int((change > 0).sum()))


def _of_group(name: str, own: TaskResult, reference: TaskResult, rows: Mapping[str, TaskComparison]) -> Difference:
    """Of a weighted mean over tasks: the tasks' errors added as those of independent ones, their flips summed."""
    value = own.metrics[name].value - reference.metrics[name].value
    members = [rows[task].differences for task in own.members]
    if any(name not in differences for differences in members):  # a mean over some tasks; the weights are of all
        return Difference(value)
    parts = [differences[name] for differences in members]
    weighted = zip(own.members.values(), parts, strict=True)
    errors = [weight * part.error for weight, part in weighted if part.error is not None]
    error = math.sqrt(math.fsum(error**2 for error in errors)) if len(errors) == len(parts) else None
    return Difference(
        value, error, _sum([part.right_to_wrong for part in parts]), _sum([part.wrong_to_right for part in parts])
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
