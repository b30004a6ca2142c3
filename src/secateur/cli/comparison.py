"""`compare`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import (
    evaluation_progress,
    print_json,
    print_tables,
    quiet_libraries,
    write_csv,
)
from secateur.cli.options import (
    BatchOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EvaluationBosOption,
    FreshOption,
    JsonOption,
    LengthOption,
    LimitOption,
    OffloadOption,
    ShotsOption,
    TaskDataOption,
    TasksOption,
    TrustOption,
    WindowsOption,
)
from secateur.cli.store import evaluation_store, keep, say_reused, task_names

if TYPE_CHECKING:
    from secateur.evaluate.agreement import Agreement
    from secateur.evaluate.generations import Generation
    from secateur.evaluate.task_differences import TaskComparison
    from secateur.evaluate.task_results import TaskResults


@app.command(
    epilog=epilog(
        "secateur compare ./llama ./pruned --data wikitext2",
        "secateur compare ./llama ./wanda ./gblm --data wikitext2 --data c4 --windows 40 --csv table.csv",
        "secateur compare ./llama ./wanda --tasks boolq,hellaswag --limit 500 --prompts prompts.txt",
    )
)
def compare(
    dense: Annotated[str, typer.Argument(help="The dense model: folder, hub id, or GGUF file.", show_default=False)],
    pruned: Annotated[list[str], typer.Argument(help="Pruned models to compare with it.", show_default=False)],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="As for eval; repeat it for several texts [default: wikitext2, unless --tasks or --prompts is given].",
            show_default=False,
        ),
    ] = None,
    length: LengthOption = None,
    windows: WindowsOption = None,
    bos: EvaluationBosOption = "auto",
    tasks: TasksOption = None,
    limit: LimitOption = None,
    shots: ShotsOption = None,
    task_data: TaskDataOption = None,
    fresh: FreshOption = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='Show how each model goes on from these prompts: a text file, one a line, or .jsonl with a "prompt".',
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to go on for, greedily.")] = 64,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv", help="Also write a row for each model and text or task to this file.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare pruned models with the dense one: on the same tokens, the same tasks, the same prompts.

    Differences are paired, window by window or document by document. The models run one after the other: texts in the
    memory of one block, tasks and prompts with one whole model in memory.
    """
    names = task_names(tasks)
    answers: list[TaskComparison] = []
    written: list[list[Generation]] = []
    if names or prompts is not None:
        with quiet_libraries():
            from secateur.evaluate.generations import generations, read_prompts
            from secateur.evaluate.task_differences import task_differences
            from secateur.evaluate.tasks import tasks as run_tasks
            from secateur.models.opening.whole import WholeModel

            texts = read_prompts(prompts) if prompts is not None else []
            answered: list[TaskResults] = []
            for name in (dense, *pruned):
                with WholeModel(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code) as whole:
                    if names:
                        with evaluation_progress() as show:
                            answered.append(
                                run_tasks(
                                    whole,
                                    names,
                                    limit=limit,
                                    shots=shots,
                                    task_data=task_data,
                                    batch_size=batch_size,
                                    store=evaluation_store(),
                                    fresh=fresh,
                                    progress=_named(show, name),
                                )
                            )
                        say_reused(answered[-1])
                    if texts:
                        with evaluation_progress() as show:
                            progress = _named(show, name)
                            written.append(generations(whole, texts, new_tokens=new_tokens, progress=progress))
            answers = [row for own in answered[1:] for row in task_differences(answered[0], own)]
    agreements: list[list[Agreement]] = []
    if data or not (names or prompts is not None):
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.agreement import agreement

            agreements = [
                agreement(
                    dense,
                    pruned,
                    text,
                    length=length,
                    windows=windows,
                    bos=bos,
                    batch_size=batch_size,
                    device=device,
                    dtype=dtype,
                    offload_states=offload_states,
                    trust_remote_code=trust_remote_code,
                    progress=show,
                )
                for text in data or ["wikitext2"]
            ]
        for row, name in ((row, name) for text in agreements for row, name in zip(text, pruned, strict=True)):
            key = {"dense": dense, "data": row.data, "length": row.length, "digest": row.digest, "dtype": dtype}
            key |= {"bos": row.provenance.get("bos", {}).get("used")}
            keep(name, None, "agreement", key, row.to_json())
    if csv is not None:
        write_csv(csv, [*_text_rows(agreements), *map(_task_row, answers)])
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


def _named(show: Callable[[str, int, int], None], model: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: show(f"{Path(model).name}: {stage}", done, total)


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
