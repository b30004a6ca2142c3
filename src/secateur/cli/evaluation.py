"""`eval`."""

from typing import Annotated, Any

import typer

from secateur.cli.app import app, epilog
from secateur.cli.display import evaluation_progress, print_json, print_tables, quiet_libraries
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
    ModelArgument,
    OffloadOption,
    RevisionOption,
    ShotsOption,
    TaskDataOption,
    TasksOption,
    TrustOption,
    WindowsOption,
)
from secateur.cli.store import evaluation_store, keep, say_reused, task_names


@app.command(
    name="eval",
    epilog=epilog(
        "secateur eval HuggingFaceTB/SmolLM2-135M --data wikitext2 --length 2048",
        "secateur eval ./pruned --data my.txt --length 1024 --windows 40",
        "secateur eval ./pruned --data python-docs --length 512 --json",
        "secateur eval ./pruned --tasks commonsense7 --task-data ./files",
        "secateur eval ./pruned --tasks mmlu --shots 5 --limit 100",
    ),
)
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="wikitext2, c4, python-docs (its held-out part), hf:NAME..., or a file "
            "[default: wikitext2, unless --tasks is given].",
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
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    offload_states: OffloadOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity in the convention of the pruning papers, in the memory of one block, and run tasks.

    Tasks are lm-evaluation-harness's own; for them the whole model is loaded. Results are kept in $SECATEUR_CACHE
    (~/.cache/secateur), and tasks are not run twice.
    """
    names = task_names(tasks)
    shown: list[Any] = []
    values: dict[str, Any] = {}
    how = {"batch_size": batch_size, "device": device, "dtype": dtype, "revision": revision}
    if names:
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.tasks import tasks as run_tasks
            from secateur.report.terminal import tasks_table

            answered = run_tasks(
                model,
                names,
                limit=limit,
                shots=shots,
                task_data=task_data,
                trust_remote_code=trust_remote_code,
                store=evaluation_store(),
                fresh=fresh,
                progress=show,
                **how,  # type: ignore[arg-type]
            )
        say_reused(answered)
        values["tasks"] = answered.to_json()
        shown.append(tasks_table(answered))
    if data is not None or not names:
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.perplexity import perplexity
            from secateur.report.terminal import perplexity_table

            result = perplexity(
                model,
                data or "wikitext2",
                length=length,
                windows=windows,
                bos=bos,
                offload_states=offload_states,
                trust_remote_code=trust_remote_code,
                progress=show,
                **how,  # type: ignore[arg-type]
            )
        values |= result.to_json()
        key = {"data": result.data, "length": result.length, "digest": result.digest, "dtype": dtype}
        key |= {"bos": result.provenance.get("bos", {}).get("used")}
        keep(model, revision, "perplexity", key, result.to_json())
        shown.append(perplexity_table(result))
    if as_json:
        print_json(values)
    else:
        for table in shown:
            print_tables(table)
