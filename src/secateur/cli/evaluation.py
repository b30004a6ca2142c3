"""`eval`."""

from typing import Any

from secateur.cli.app import Config, Json, command
from secateur.cli.display import evaluation_progress, print_json, print_tables, quiet_libraries
from secateur.cli.store import evaluation_store, keep, say_reused
from secateur.collect.settings import ModelSettings
from secateur.evaluate.settings import EvalSettings, PerplexitySettings, TaskSettings
from secateur.runs.options import shared


@command(
    "secateur eval HuggingFaceTB/SmolLM2-135M --data wikitext2 --length 2048",
    "secateur eval ./pruned --data my.txt --length 1024 --windows 40",
    "secateur eval ./pruned --data python-docs --length 512 --json",
    "secateur eval ./pruned --tasks commonsense7 --task-data ./files",
    "secateur eval ./pruned --tasks mmlu --shots 5 --limit 100",
    name="eval",
)
def evaluate(settings: EvalSettings, config: Config = None, as_json: Json = False) -> None:
    """Measure perplexity in the convention of the pruning papers, in the memory of one block, and run tasks.

    Tasks are lm-evaluation-harness's own; for them the whole model is loaded. Results are kept in $SECATEUR_CACHE
    (~/.cache/secateur), and tasks are not run twice.
    """
    model = str(settings.model)
    shown: list[Any] = []
    values: dict[str, Any] = {}
    if settings.names:
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.tasks import tasks as run_tasks
            from secateur.report.terminal import tasks_table

            answered = run_tasks(
                **shared(settings, TaskSettings, ModelSettings),
                batch_size=settings.batch_size,
                store=evaluation_store(),
                progress=show,
            )
        say_reused(answered)
        values["tasks"] = answered.to_json()
        shown.append(tasks_table(answered))
    if settings.data is not None or not settings.names:
        with quiet_libraries(), evaluation_progress() as show:
            from secateur.evaluate.perplexity import perplexity
            from secateur.report.terminal import perplexity_table

            own = shared(settings, PerplexitySettings)
            result = perplexity(**own | {"data": settings.data or "wikitext2", "progress": show})
        values |= result.to_json()
        key = {"data": result.data, "length": result.length, "digest": result.digest, "dtype": settings.dtype}
        key |= {"bos": result.provenance.get("bos", {}).get("used")}
        keep(model, settings.revision, "perplexity", key, result.to_json())
        shown.append(perplexity_table(result))
    if as_json:
        print_json(values)
    else:
        for table in shown:
            print_tables(table)
