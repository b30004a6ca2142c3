"""`eval` and `compare`, and where they keep what they find."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.app import Config, Json, command
from secateur.cli.display import print_json, print_tables, quiet_libraries, stage_progress, write_csv
from secateur.cli.processes import LogDir, alone, logged, started_for
from secateur.cli.voice import say
from secateur.collect.settings import DtypeSettings, ModelSettings
from secateur.errors import CalibrationError, CheckpointError
from secateur.evaluate.settings import (
    AgreementSettings,
    CompareSettings,
    EvalSettings,
    KeptTaskSettings,
    PerplexitySettings,
    VerdictSettings,
)
from secateur.launched import launched
from secateur.runs.options import shared

if TYPE_CHECKING:
    from secateur.evaluate.agreement import Agreement
    from secateur.evaluate.generations import Generation
    from secateur.evaluate.labelled import Labelled
    from secateur.evaluate.perplexity import Perplexity
    from secateur.evaluate.results import Kind, Results
    from secateur.evaluate.similarity import Similarity
    from secateur.evaluate.task_results import TaskComparison, TaskResults
    from secateur.runs.events import Progress

MISSED = 3  # the exit code where a model misses a threshold


@command(
    "secateur eval HuggingFaceTB/SmolLM2-135M --data wikitext2 --length 2048",
    "secateur eval ./pruned --data my.txt --length 1024 --windows 40",
    "secateur eval ./pruned --data python-docs --length 512 --json",
    "secateur eval ./pruned --tasks commonsense7 --task-data ./files",
    "secateur eval ./pruned --tasks mmlu --shots 5 --limit 100",
    name="eval",
    processes=True,
)
def evaluate(settings: EvalSettings, config: Config = None, as_json: Json = False, log_dir: LogDir = None) -> None:
    """Measure perplexity in the convention of the pruning papers, in the memory of one block, and run tasks.

    Tasks are lm-evaluation-harness's own; for them the whole model is loaded. Results are kept in $SECATEUR_CACHE
    (secateur in $XDG_CACHE_HOME or ~/.cache), and tasks are not run twice.
    """
    if settings.tasks:
        alone("eval --tasks")
    elif started_for(settings.device):
        return
    shown: list[Any] = []
    values: dict[str, Any] = {}
    if settings.tasks:
        with stage_progress() as show, quiet_libraries():
            from secateur.report.terminal import tasks_table

            answered = _answers(settings, show, **shared(settings, ModelSettings))
        values["tasks"] = answered.to_json()
        shown.append(tasks_table(answered))
    if settings.data is not None or not settings.tasks:
        with logged(log_dir) as log, stage_progress() as show, quiet_libraries():
            from secateur.calibration.hub import default_text
            from secateur.evaluate.perplexity import perplexity
            from secateur.report.terminal import perplexity_table

            own = shared(settings, PerplexitySettings)
            own |= {"data": settings.data or default_text("evaluation"), "progress": log.stages_beside(show)}
            result = perplexity(**own)
        values |= result.to_json()
        _keep(str(settings.model), settings.revision, "perplexity", result, {"dtype": settings.dtype})
        shown.append(perplexity_table(result))
    if as_json:
        print_json(values)
    else:
        for table in shown:
            print_tables(table)


@command(
    "secateur compare ./llama ./pruned --data wikitext2",
    "secateur compare ./llama ./wanda ./gblm --data wikitext2 --data c4 --windows 40 --csv table.csv",
    "secateur compare ./llama ./wanda --max-nats 0.05 --min-agreement 0.9",
    "secateur compare ./vit ./wanda --data images:FOLDER",
    "secateur compare ./llama ./wanda --tasks boolq,hellaswag --limit 500 --prompts prompts.txt",
    processes=True,
)
def compare(settings: CompareSettings, config: Config = None, as_json: Json = False, log_dir: LogDir = None) -> None:
    """Compare pruned models with the dense one: on the same tokens, the same tasks, the same prompts.

    Differences are paired, window by window or document by document. The models run one after the other: texts in the
    memory of one block, tasks and prompts with one whole model in memory. Ends with a sentence for each pruned model:
    whether it can take the dense one's place. Exits with 3 where one misses --max-nats or --min-agreement. Of models
    that predict no next token, such as encoders, it compares the last hidden states, without that sentence. Of models
    that choose between classes, of speech, and translators it shows what they get right beside labels.
    """
    if settings.tasks or settings.prompts is not None:
        alone("compare with --tasks or --prompts")
    elif started_for(settings.device):
        return
    dense, pruned = settings.dense, list(settings.pruned)
    answers: list[list[TaskComparison]] = []
    written: list[list[Generation]] = []
    if settings.tasks or settings.prompts is not None:
        with quiet_libraries():
            from secateur.evaluate.generations import generations, read_prompts
            from secateur.evaluate.task_results import task_differences
            from secateur.models.opening.whole import WholeModel
            from secateur.runs.events import named

            texts = read_prompts(Path(settings.prompts)) if settings.prompts is not None else []
            answered: list[TaskResults] = []
            for name in (dense, *pruned):
                with WholeModel(name, **shared(settings, DtypeSettings)) as whole, stage_progress() as show:
                    progress = named(show, Path(name).name)
                    if settings.tasks:
                        answered.append(_answers(settings, progress, model=whole))
                    if texts:
                        written.append(generations(whole, texts, new_tokens=settings.new_tokens, progress=progress))
            answers = [task_differences(answered[0], own) for own in answered[1:]]
    agreements: list[list[Agreement]] = []
    similarities: list[list[Similarity]] = []
    answers_to: list[list[Labelled]] = []
    if settings.texts:
        with logged(log_dir) as log, stage_progress() as show, quiet_libraries():
            from secateur.evaluate.agreement import agreement
            from secateur.evaluate.labelled import by_generation, labelled, with_states
            from secateur.evaluate.similarity import predicts_tokens

            own = shared(settings, AgreementSettings) | {"progress": log.stages_beside(show)}
            if predicts_tokens(AgreementSettings(**own)):
                writing = [text for text in settings.texts if by_generation(AgreementSettings(**own | {"data": text}))]
                answers_to = [labelled(**own | {"data": text}) for text in writing]
                agreements = [agreement(**own | {"data": text}) for text in settings.texts]
            else:
                check_no_limits(settings)
                for text in settings.texts:
                    similar, chosen = with_states(AgreementSettings(**own | {"data": text}))
                    similarities.append(similar)
                    answers_to += [chosen] if chosen else []
    rows = [row for text in agreements for row in text]
    compared = [row for text in similarities for row in text]
    task_rows = [row for own in answers for row in own]
    for row, name in zip(rows, pruned * len(agreements), strict=True):
        _keep(name, None, "agreement", row, {"dense": dense, "dtype": settings.dtype})
    answered_rows = [row for text in answers_to for row in text]
    for said, name in zip(answered_rows, pruned * len(answers_to), strict=True):
        how = {"dense": dense, "dtype": settings.dtype, "data": said.data, "digest": said.digest}
        _store(name, None, "labelled", how, said.to_json())
    prompts = [_prompt(outputs) for outputs in zip(*written, strict=True)]
    for place, name in enumerate(pruned, 1) if prompts else ():
        from secateur.report.evaluations import continued

        both = [continued(own["prompt"], own["outputs"][0], own["outputs"][place]) for own in prompts]
        key = {"dense": dense, "dtype": settings.dtype, "new_tokens": settings.new_tokens}
        _store(name, None, "continuations", key, {"rows": both})
    if settings.csv is not None and launched().rank == 0:
        on_texts = [{"model": row.model, "kind": "text", "name": row.data, **row.to_json()} for row in rows]
        states = [{"model": row.model, "kind": "states", "name": row.data, **row.to_json()} for row in compared]
        write_csv(
            Path(settings.csv),
            [*on_texts, *states, *map(_labelled_row, answered_rows), *map(_task_row, task_rows)],
        )
    from secateur.evaluate.verdict import verdict

    verdicts = [
        verdict(
            agreements[0][place].model if agreements else name,
            [text[place].change for text in agreements],
            answers[place] if answers else [],
            **shared(settings, VerdictSettings),
        )
        for place, name in enumerate(pruned)
        if not similarities
    ]
    if as_json:
        print_json(
            {
                "dense": dense,
                "results": [*(row.to_json() for row in rows), *(row.to_json() for row in compared)],
                "labelled": [row.to_json() for row in answered_rows],
                "tasks": [row.to_json() for row in task_rows],
                "generations": prompts,
                "verdicts": [own.to_json() for own in verdicts],
            }
        )
    else:
        from secateur.report.terminal import (
            comparison_table,
            generations_table,
            labelled_table,
            similarity_table,
            task_comparison_table,
            verdict_lines,
        )

        if similarities:
            print_tables(similarity_table(similarities))
        if agreements:
            print_tables(comparison_table(agreements))
        if answers_to:
            print_tables(labelled_table(answers_to))
        if answers:
            print_tables(task_comparison_table(task_rows))
        if written:
            print_tables(generations_table(list(zip(*written, strict=True))))
        if agreements or answers:
            print_tables(verdict_lines(verdicts))
    if any(own.given and not own.passed for own in verdicts):
        sys.exit(MISSED)


def check_no_limits(settings: CompareSettings) -> None:
    """Raise `CalibrationError` for limits of predictions, where a model makes none."""
    for name in ("max_nats", "min_agreement"):
        if getattr(settings, name) is not None:
            raise CalibrationError(
                f"--{name.replace('_', '-')}: is measured on predictions of the next token, and {settings.dense} makes "
                "none. Leave it out; --json has the cosine of the last hidden states."
            )


def _task_row(row: "TaskComparison") -> dict[str, Any]:
    """One row of the table: for every metric its value, the dense model's, their difference, and the flips."""
    cells: dict[str, Any] = {"model": row.model, "kind": "task", "name": row.task}
    cells |= {"shots": row.pruned.shots, "documents": row.pruned.documents}
    for metric, difference in row.differences.items():
        own, reference = row.pruned.metrics[metric], row.dense.metrics[metric]
        cells |= {
            metric: own.value,
            f"{metric}_error": own.error,
            f"{metric}_dense": reference.value,
            f"{metric}_dense_error": reference.error,
            f"{metric}_difference": difference.value,
            f"{metric}_difference_error": difference.error,
            f"{metric}_right_to_wrong": difference.right_to_wrong,
            f"{metric}_wrong_to_right": difference.wrong_to_right,
        }
    return cells


def _labelled_row(row: "Labelled") -> dict[str, Any]:
    """One row of the table: what needs no labels, and of every figure both models' values and their difference."""
    value = row.to_json()
    cells = {"kind": "labelled", "name": row.data, "windows": row.samples}
    cells |= {name: value[name] for name in ("model", "agreement", "agreement_error", "kl", "kl_error")}
    for name, figure in value["figures"].items():
        own = {"pruned": name, "pruned_error": f"{name}_error"}
        cells |= {own.get(part, f"{name}_{part}"): number for part, number in figure.items()}
    return cells


def _prompt(outputs: "Sequence[Generation]") -> dict[str, Any]:
    from secateur.evaluate.generations import shared_start

    return {
        "prompt": outputs[0].prompt,
        "outputs": [
            {
                "model": output.model,
                "text": output.text,
                "tokens": output.tokens,
                "shared_with_dense": shared_start(outputs[0].tokens, output.tokens),
            }
            for output in outputs
        ],
    }


def evaluation_store() -> "Results":
    """The store of evaluations in the folder of what is kept between runs."""
    from secateur.evaluate.results import Results
    from secateur.files.cache import cache_folder

    return Results(cache_folder() / "evaluations")


def _keep(
    model: str, revision: str | None, kind: "Kind", result: "Perplexity | Agreement", how: Mapping[str, Any]
) -> None:
    """Store the evaluation of a text."""
    bos = result.provenance.get("bos", {}).get("used")
    key = {**how, "data": result.data, "length": result.length, "digest": result.digest, "bos": bos}
    _store(model, revision, kind, key, result.to_json())


def _store(model: str, revision: str | None, kind: "Kind", key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Store an evaluation. Where it cannot be stored, a line on standard error says so."""
    from secateur.files.digest import model_digest

    if launched().rank > 0:
        return
    try:
        evaluation_store().add(model_digest(model, revision), kind, key, result)
    except CheckpointError as error:
        say(f"Not kept: {error}")


def _answers(settings: EvalSettings | CompareSettings, progress: "Progress", **opening: Any) -> "TaskResults":
    """The results of all tasks. Those found in the store are not run again, and a line says so."""
    from secateur.evaluate.tasks import tasks

    own = shared(settings, KeptTaskSettings) | {"batch_size": settings.batch_size, "store": evaluation_store()}
    found = tasks(**opening, names=own.pop("tasks"), **own, progress=progress)
    if found.reused:
        since = min(found.reused.values())
        say(
            f"{found.model}: {', '.join(found.reused)} not run again: the same model, data and settings were "
            f"evaluated before (since {since}). --fresh runs them again."
        )
    return found
