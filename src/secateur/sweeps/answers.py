"""Tasks in a sweep: what each cell answered beside the dense model, and means of that over draws."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from secateur.evaluate.task_results import TaskResult, TaskResults, task_differences
from secateur.sweeps.draws import Figure, drawn_cells

if TYPE_CHECKING:
    from secateur.sweeps.folder import Cell, Sweep

# By the name that was asked for, then by task: a group has those of its tasks and its mean.
Answers = Mapping[str, Mapping[str, Any]]

SHOWN = "acc"  # the metric that tables show, as papers do; the first one of tasks without it
CSV_COLUMNS = (
    *("method", "pattern", "sparsity", "seed", "draws", "task", "metric", "shots", "documents", "value", "error"),
    *("value_deviation", "difference", "difference_error", "difference_deviation", "right_to_wrong", "wrong_to_right"),
)


class _Value(TypedDict):
    value: float | None
    error: float | None


class _Change(_Value):
    right_to_wrong: int | None
    wrong_to_right: int | None


class Answered(TypedDict):
    """What is read of the results of one task."""

    shots: int | None
    documents: int
    members: list[str]  # of a mean over tasks
    metrics: dict[str, _Value]
    differences: NotRequired[dict[str, _Change]]


@dataclass(frozen=True)
class TaskMean:
    """A metric of a task for a method in a pattern, over the `draws` cells that have it.

    `value` is the metric, `difference` that of the dense model taken from it. The errors are those over documents: of
    several draws their mean, which the error of the mean over draws does not exceed.
    """

    method: str
    pattern: str
    sparsity: float
    task: str
    metric: str
    documents: int
    draws: int
    value: Figure
    difference: Figure


def dense_rows(found: TaskResults) -> dict[str, Any]:
    """What is kept of the dense model's results."""
    return {own.task: _facts(own) for own in found.results}


def cell_rows(dense: TaskResults, found: TaskResults) -> dict[str, Any]:
    """What is kept of a cell's results: also the paired differences from the dense model, and flipped answers."""
    return {
        own.task: _facts(own.pruned) | {"differences": own.to_json()["differences"]}
        for own in task_differences(dense, found)
    }


def _facts(result: TaskResult) -> dict[str, Any]:
    facts = {"shots": result.shots, "documents": result.documents, "members": list(result.members)}
    return facts | {"metrics": result.to_json()["metrics"]}


def by_task(answers: Answers) -> dict[str, Any]:
    """The results of all tasks, in whatever name they were asked for: single tasks before means over them."""
    rows = {task: row for own in answers.values() for task, row in own.items()}
    return dict(sorted(rows.items(), key=lambda item: bool(item[1]["members"])))


def shown(row: Mapping[str, Any]) -> str:
    """The metric of a task that tables show."""
    return SHOWN if SHOWN in row["metrics"] else next(iter(row["metrics"]))


def task_means(cells: "Sequence[Cell]") -> list[TaskMean]:
    """Every metric of every task for every method in every pattern, in the order of the cells."""
    found = []
    for (method, pattern), group in drawn_cells(cells).items():
        answers = [by_task(cell.tasks) for cell in group]
        metrics = [(task, metric) for own in answers for task, row in own.items() for metric in row["metrics"]]
        for task, metric in dict.fromkeys(metrics):
            rows = [own[task] for own in answers if task in own]
            value, difference = (
                _over_draws([row.get(part, {}).get(metric) for row in rows]) for part in ("metrics", "differences")
            )
            facts = (method, pattern, group[0].sparsity, task, metric, rows[0]["documents"], len(rows))
            found.append(TaskMean(*facts, value, difference))
    return found


def _over_draws(values: Sequence[Mapping[str, Any] | None]) -> Figure:
    known = [value["value"] for value in values if value is not None and value["value"] is not None]
    if not known or len(known) < len(values):
        return Figure()
    errors = [value["error"] for value in values if value is not None and value["error"] is not None]
    return Figure(
        fmean(known),
        stdev(known) if len(known) > 1 else None,
        fmean(errors) if len(errors) == len(known) else None,
    )


def tasks_csv(sweep: "Sweep") -> str:
    """One line for each metric of each task, of the dense model and of each cell.

    Cells of several draws are followed by their means, which have the number of `draws` and the deviations between
    them.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for task, row in by_task(sweep.dense_tasks).items():
        writer.writerows(_lines({"method": "dense", "sparsity": 0.0, "task": task}, row))
    for cell in sweep.cells:
        for task, row in by_task(cell.tasks).items():
            writer.writerows(_lines({**vars(cell), "task": task}, row))
    for mean in task_means(sweep.cells):
        if mean.draws > 1:
            value, difference = mean.value, mean.difference
            figures = {"value": value.mean, "error": value.error, "value_deviation": value.deviation}
            figures |= {"difference": difference.mean, "difference_error": difference.error}
            writer.writerow({**vars(mean), **figures, "difference_deviation": difference.deviation})
    return stream.getvalue()


def _lines(what: Mapping[str, Any], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for metric, value in row["metrics"].items():
        change = row.get("differences", {}).get(metric, {})
        own = {"difference": change.get("value"), "difference_error": change.get("error")}
        flips = {key: change.get(key) for key in ("right_to_wrong", "wrong_to_right")}
        facts = {"shots": row["shots"], "documents": row["documents"], "metric": metric}
        lines.append({**what, **facts, "value": value["value"], "error": value["error"], **own, **flips})
    return lines


def best(values: Sequence[float], metric: str) -> float:
    """The highest value of a metric of which more is better; no number where that is not known of it."""
    return max(values) if metric.startswith(SHOWN) and len(values) > 1 else math.nan
