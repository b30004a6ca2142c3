"""`compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli.app import Config, Json, command
from secateur.cli.display import (
    evaluation_progress,
    print_json,
    print_tables,
    quiet_libraries,
    write_csv,
)
from secateur.cli.store import evaluation_store, keep, say_reused
from secateur.collect.settings import DtypeSettings
from secateur.evaluate.settings import AgreementSettings, CompareSettings, TaskSettings
from secateur.runs.options import shared

if TYPE_CHECKING:
    from secateur.evaluate.agreement import Agreement
    from secateur.evaluate.generations import Generation
    from secateur.evaluate.task_differences import TaskComparison
    from secateur.evaluate.task_results import TaskResults


@command(
    "secateur compare ./llama ./pruned --data wikitext2",
    "secateur compare ./llama ./wanda ./gblm --data wikitext2 --data c4 --windows 40 --csv table.csv",
    "secateur compare ./llama ./wanda --tasks boolq,hellaswag --limit 500 --prompts prompts.txt",
)
def compare(settings: CompareSettings, config: Config = None, as_json: Json = False) -> None:
    """Compare pruned models with the dense one: on the same tokens, the same tasks, the same prompts.

    Differences are paired, window by window or document by document. The models run one after the other: texts in the
    memory of one block, tasks and prompts with one whole model in memory.
    """
    names, prompts = settings.names, settings.prompts
    dense, pruned = settings.dense, list(settings.pruned)
    answers: list[TaskComparison] = []
    written: list[list[Generation]] = []
    if names or prompts is not None:
        with quiet_libraries():
            from secateur.evaluate.generations import generations, read_prompts
            from secateur.evaluate.task_differences import task_differences
            from secateur.evaluate.tasks import tasks as run_tasks
            from secateur.models.opening.whole import WholeModel
            from secateur.runs.events import named

            texts = read_prompts(Path(prompts)) if prompts is not None else []
            answered: list[TaskResults] = []
            for name in (dense, *pruned):
                with WholeModel(name, **shared(settings, DtypeSettings)) as whole:
                    if names:
                        with evaluation_progress() as show:
                            answered.append(
                                run_tasks(
                                    whole,
                                    **shared(settings, TaskSettings),
                                    batch_size=settings.batch_size,
                                    store=evaluation_store(),
                                    progress=named(show, Path(name).name),
                                )
                            )
                        say_reused(answered[-1])
                    if texts:
                        with evaluation_progress() as show:
                            progress = named(show, Path(name).name)
                            written.append(generations(whole, texts, new_tokens=settings.new_tokens, progress=progress))
            answers = [row for own in answered[1:] for row in task_differences(answered[0], own)]
    agreements: list[list[Agreement]] = []
    if settings.data or not (names or prompts is not None):
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.agreement import agreement

            own = shared(settings, AgreementSettings)
            agreements = [
                agreement(**own | {"data": text, "progress": show}) for text in settings.data or ["wikitext2"]
            ]
        for row, name in ((row, name) for text in agreements for row, name in zip(text, pruned, strict=True)):
            key = {"dense": dense, "data": row.data, "length": row.length, "digest": row.digest}
            key |= {"dtype": settings.dtype, "bos": row.provenance.get("bos", {}).get("used")}
            keep(name, None, "agreement", key, row.to_json())
    if settings.csv is not None:
        write_csv(Path(settings.csv), [*_text_rows(agreements), *map(_task_row, answers)])
    if as_json:
        print_json(
            {
                "dense": dense,
                "results": [row.to_json() for text in agreements for row in text],
                "tasks": [row.to_json() for row in answers],
                "generations": [_prompt(outputs) for outputs in zip(*written, strict=True)],
            }
        )
    else:
        from secateur.report.terminal import comparison_table, generations_table, task_comparison_table

        if agreements:
            print_tables(comparison_table(agreements))
        if answers:
            print_tables(task_comparison_table(answers))
        if written:
            print_tables(generations_table(list(zip(*written, strict=True))))


def _text_rows(agreements: "Sequence[Sequence[Agreement]]") -> list[dict[str, Any]]:
    return [
        {"model": row.model, "kind": "text", "name": row.data, **row.to_json()} for text in agreements for row in text
    ]


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
