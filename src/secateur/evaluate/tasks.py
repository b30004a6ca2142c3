"""Zero-shot and few-shot tasks, and the means over them that papers report."""

import difflib
import functools
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from secateur.arguments import calling
from secateur.errors import CalibrationError, CheckpointError
from secateur.evaluate.harness import run_task, stock_manager, wrapped
from secateur.evaluate.results import Results
from secateur.evaluate.task_data import LocalData
from secateur.evaluate.task_results import Metric, TaskResult, TaskResults
from secateur.files.digest import model_digest
from secateur.files.scratch import scratch_folder
from secateur.models.opening.whole import WholeModel
from secateur.runs.events import Progress
from secateur.shown import bar

COMMONSENSE = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# The means that papers report: Wanda's over seven tasks, GBLM-Pruner's without ARC-Challenge.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "commonsense7": COMMONSENSE,
    "commonsense6": tuple(task for task in COMMONSENSE if task != "arc_challenge"),
}
MEAN_OF = "acc"  # the metric that enters those means, as in the papers


@calling
def tasks(
    model: str | os.PathLike[str] | nn.Module | WholeModel,
    names: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    task_data: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    store: Results | None = None,
    fresh: bool = False,
    progress: Progress | bool | None = None,
) -> TaskResults:
    """The results of tasks or groups of lm-evaluation-harness, by its names, and of the groups "commonsense7" and
    "commonsense6".

    `limit` takes the first documents of each task only; `shots` replaces the number of examples in the prompt where a
    task does not fix it. `task_data` is a folder of local files (see `LocalData`), used for all tasks, with no network.
    Requests run in batches of `batch_size`, which is 8 on a CPU and found out by the harness on a GPU. What says how to
    open the model has no effect on a `WholeModel`.

    Every name is evaluated by itself, so that its result does not depend on what else was asked for. With a `store`,
    those whose model, settings and data are the same as before are taken from it, unless `fresh`.

    Raises `CalibrationError` for unknown tasks, for data that is missing, and without the harness; `NumericalError` for
    a model whose outputs are not numbers; and what opening the model raises.
    """
    started = time.perf_counter()
    wanted = check_names(names)
    manager = stock_manager()
    with ExitStack() as stack:
        tell = stack.enter_context(bar(progress)) or (lambda stage, done, total: None)
        data = dict.fromkeys(wanted, "hub")
        if task_data is not None:
            written = stack.enter_context(scratch_folder())
            local = LocalData(Path(task_data).expanduser(), written, manager.task_index)
            data = {name: local.configure(name, shots) for name in wanted}
            manager = type(manager)(include_path=str(written), include_defaults=False)
        if isinstance(model, WholeModel):
            whole = model
        else:
            own = {"tokenizer": tokenizer, "device": device, "dtype": dtype, "revision": revision}
            whole = stack.enter_context(WholeModel(model, **own, trust_remote_code=trust_remote_code))
        dtype, lm_eval = str(whole.dtype).removeprefix("torch."), version("lm_eval")
        how = {"limit": limit, "shots": shots, "dtype": dtype, "device": whole.device.type, "lm_eval": lm_eval}
        keys = {name: {"task": name, "data": data[name], **how} for name in wanted}
        path = None if store is None or tokenizer is not None else whole.path  # a module in memory has none
        digest = model_digest(path) if path is not None else None
        found: dict[str, tuple[TaskResult, ...]] = {}
        reused: dict[str, str] = {}
        if store is not None and digest is not None and not fresh:
            for name in wanted:
                if (record := store.find(digest, "tasks", keys[name])) is not None:
                    found[name] = tuple(map(TaskResult.from_json, record.result["results"]))
                    reused[name] = record.created
        missing = [name for name in wanted if name not in found]
        harness = functools.cache(lambda: wrapped(whole, batch_size))  # loaded once, when a task is ready to run
        for number, name in enumerate(missing):
            stage = f"{name} ({number + 1} of {len(missing)})" if len(missing) > 1 else name
            found[name] = run_task(
                harness,
                manager,
                name,
                limit=limit,
                shots=shots,
                local=task_data is not None,
                report=functools.partial(tell, stage),
            )
            if store is not None and digest is not None:
                rows = [result.to_json() for result in found[name]]
                try:
                    store.add(digest, "tasks", keys[name], {"model": whole.name, "results": rows})
                except CheckpointError as error:  # hours of evaluation are worth more than a place to keep them
                    warnings.warn(str(error), stacklevel=2)
        by_name = {result.task: result for name in wanted for result in found[name]}
        return TaskResults(
            model=whole.name,
            results=(
                *sorted(by_name.values(), key=lambda result: bool(result.members)),
                *(
                    mean(name, [by_name[task] for task in GROUPS[name]])
                    for name in dict.fromkeys(names)
                    if name in GROUPS
                ),
            ),
            limit=limit,
            dtype=dtype,
            lm_eval=lm_eval,
            reused=reused,
            seconds=time.perf_counter() - started,
        )


def check_names(names: Sequence[str]) -> list[str]:
    """The tasks that these names stand for. Raises `CalibrationError` for unknown ones, and without the harness."""
    manager = stock_manager()
    wanted = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    for name in wanted:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*GROUPS, *manager.all_tasks], 5)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise CalibrationError(
                f'unknown task "{name}".{hint} Known are {", ".join(GROUPS)} and what `lm-eval ls tasks` lists.'
            )
    return wanted


def mean(name: str, results: Sequence[TaskResult]) -> TaskResult:
    """The mean accuracy over tasks, each with the same weight, and its standard error for independent tasks."""
    values = [result.metrics[MEAN_OF] for result in results]
    errors = [metric.error for metric in values if metric.error is not None]
    error = math.sqrt(sum(error**2 for error in errors)) / len(values) if len(errors) == len(values) else None
    shots = {result.shots for result in results}
    return TaskResult(
        task=name,
        shots=shots.pop() if len(shots) == 1 else None,
        documents=sum(result.documents for result in results),
        metrics={MEAN_OF: Metric(math.fsum(metric.value for metric in values) / len(values), error)},
        members={result.task: 1 / len(values) for result in results},
    )
