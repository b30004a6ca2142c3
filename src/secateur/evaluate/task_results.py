"""The results of tasks: metrics with their standard errors, and the scores of single documents."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
    `notes` are what the harness warned of while it ran.
    """

    task: str
    shots: int | None
    documents: int
    metrics: Mapping[str, Metric]
    scores: Mapping[str, list[float]] = field(default_factory=dict)
    members: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskResult":
        """The result whose fields were written as JSON."""
        metrics = {
            name: Metric(math.nan if metric["value"] is None else metric["value"], metric["error"])
            for name, metric in value["metrics"].items()
        }
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        return cls(**{"shots": None, **known, "metrics": metrics, "notes": tuple(value.get("notes", ()))})

    def to_json(self) -> dict[str, Any]:
        """All fields; a value that is not a number is None."""
        value = {**asdict(self), "notes": list(self.notes)}
        for metric in value["metrics"].values():
            if math.isnan(metric["value"]):  # JSON knows no NaN
                metric["value"] = None
        return value


@dataclass(frozen=True)
class TaskResults:
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
