"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) as it ships, on our models.

Prompts, answers, metrics and their standard errors are the harness's. What is here hands it a model in memory, keeps
its warnings, and takes its results apart.
"""

import contextlib
import functools
import hashlib
import io
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from secateur.errors import CalibrationError, NumericalError
from secateur.evaluate.task_data import reading_quietly
from secateur.evaluate.task_results import Metric, TaskResult
from secateur.models.opening.bars import without_bars
from secateur.models.opening.whole import WholeModel

CPU_BATCH = 8


@functools.cache
def stock_manager() -> Any:
    """The harness's index of tasks, which takes seconds to make. Raises `CalibrationError` without the harness."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CalibrationError(
            f'tasks need lm-evaluation-harness, which cannot be imported ({error}). Run: pip install "secateur[tasks]"'
        ) from None
    with _listening():
        return TaskManager()


def wrapped(whole: WholeModel, batch_size: int | None) -> Any:
    """The model as the harness wants it; instead of drawing bars it calls `report` with requests done and in all."""
    from lm_eval.models.huggingface import HFLM

    class Reporting(HFLM):  # type: ignore[misc]  # which mypy does not see
        report: Callable[[int, int], None] = staticmethod(lambda done, total: None)
        done = total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._reported(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._reported(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._reported(super().generate_until, requests)

        def _reported(self, answer: Callable[..., Any], requests: Any) -> Any:
            self.done, self.total = 0, len(requests)
            self.report(0, self.total)
            answers = answer(requests, disable_tqdm=True)
            self.report(self.total, self.total)
            return answers

        def _model_call(self, inps: Any, *others: Any, **named: Any) -> Any:
            return self._counted(len(inps), super()._model_call(inps, *others, **named))

        def _model_generate(self, context: Any, *others: Any, **named: Any) -> Any:
            return self._counted(len(context), super()._model_generate(context, *others, **named))

        def _counted(self, rows: int, output: Any) -> Any:
            # Requests that share their context are answered from one row; those show at the end.
            self.done = min(self.done + rows, self.total)
            self.report(self.done, self.total)
            return output

    default = CPU_BATCH if whole.device.type == "cpu" else "auto"
    with _listening():  # to what has no effect on a model in memory
        return Reporting(
            pretrained=whole.module,
            tokenizer=whole.tokenizer,
            backend="causal",
            batch_size=batch_size or default,
        )


def run_task(
    model: Callable[[], Any],
    manager: Any,
    name: str,
    *,
    limit: int | None,
    shots: int | None,
    local: bool,
    report: Callable[[int, int], None],
) -> tuple[TaskResult, ...]:
    """All results of one name: of a task, or of all tasks and means of a group.

    It is set up as `lm_eval.simple_evaluate` does, which would also look for a git repository and list the system's
    packages. `model()` returns what `wrapped` made; it is called once the data has been read.

    Raises `CalibrationError` for data that cannot be used, and `NumericalError` for likelihoods that are no numbers.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    with _harness_seeds(), _listening() as heard:
        try:
            with reading_quietly() if local else ExitStack():
                loaded = manager.load([name])
        except Exception as error:  # whatever the transport or the reader of the files raises
            advice = (
                "Compare its fields with those of the data set that the task comes with"
                if local
                else "Run it once with network, or give local files with --task-data DIR"
            )
            cause = f"{error.__cause__ or error}".strip()
            raise CalibrationError(f"{name}: its data cannot be used ({cause}). {advice}.") from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False):
                raise CalibrationError(
                    f"{name}: runs programs that the model writes. Use lm_eval's own command for it, in a sandbox."
                )
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        harness = model()
        harness.report = report
        heard.clear()
        evaluation = evaluate(lm=harness, task_dict=loaded, limit=limit)
    for task, samples in evaluation["samples"].items():
        _check_numbers(task, samples)
    results = [
        _result(task, figures, evaluation, loaded["groups"].get(task), local)
        for task, figures in evaluation["results"].items()
    ]
    *shown, last = [result for result in results if result.metrics]
    notes = tuple(f"{texts[0]} (and {len(texts) - 1} more)" if texts[1:] else texts[0] for texts in heard.values())
    return (*shown, replace(last, notes=notes))


def _result(
    task: str, figures: Mapping[str, Any], evaluation: Mapping[str, Any], group: Any, local: bool
) -> TaskResult:
    """One entry of the harness's results; a group that has no mean has no metrics."""
    samples = evaluation["samples"].get(task, ())
    metrics, scores = {}, {}
    for key, value in figures.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = name if filtered == "none" else f"{name} ({filtered})"
        error = figures.get(f"{name}_stderr,{filtered}")
        metrics[label] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
        own = [sample[name] for sample in samples if sample["filter"] == filtered and name in sample]
        if own and all(isinstance(score, int | float) for score in own):
            scores[label] = [float(score) for score in own]
    members = _weights(group, evaluation) if group is not None else {}
    shots = {evaluation["n-shot"].get(name) for name in members or (task,)}
    stock = evaluation["configs"].get(task, {})
    dataset = (str(stock["dataset_path"]), str(stock.get("dataset_name") or "default")) if samples else None
    identity = "\n".join(f"{s['doc_hash']} {s['prompt_hash']} {s['target_hash']}" for s in samples)
    return TaskResult(
        task=task,
        shots=shots.pop() if len(shots) == 1 else None,
        documents=int(figures.get("sample_len", 0)),
        metrics=metrics,
        scores=scores,
        members=members,
        digest=hashlib.sha256(identity.encode()).hexdigest() if samples else "",
        dataset=None if local else dataset,
    )


def _weights(group: Any, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each task of a group in its mean: by its number of documents, or the same for all."""
    if not group.aggregate_metric_list:
        return {}
    names = [task.task_name for task in group.get_all_tasks()]
    sizes = {name: evaluation["n-samples"][name]["effective"] for name in names}
    if not group.aggregate_metric_list[0].weight_by_size:
        sizes = dict.fromkeys(names, 1)
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def _check_numbers(task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    likelihoods = ([answer[0] for answer in chain(*sample["resps"]) if isinstance(answer, tuple)] for sample in samples)
    if bad := sum(any(isinstance(one, float) and math.isnan(one) for one in own) for own in likelihoods):
        raise NumericalError(
            f"{task}: {bad} of {len(samples)} documents have likelihoods that are not numbers. "
            "The model overflows or is damaged; try --dtype float32."
        )


@contextmanager
def _harness_seeds() -> Iterator[None]:
    """The seeds that the harness sets before it loads tasks, and the generators' own state afterwards."""
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        numpy.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


@contextmanager
def _listening() -> Iterator[dict[str, list[str]]]:
    """The harness's warnings, kept instead of printed; those that differ only in numbers are kept together.

    What it prints to standard output and its bars are dropped.
    """
    heard: dict[str, list[str]] = {}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                text = record.getMessage()
                heard.setdefault(re.sub(r"\d+", "", text), []).append(text)

    logger, listener = logging.getLogger("lm_eval"), Listener()
    before = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(io.StringIO()), without_bars():
            yield heard
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before[0])
        logger.propagate = before[1]
