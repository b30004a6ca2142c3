"""What evaluations found, as tables. An evaluation is a mapping with `kind`, `key` and `result`, all plain JSON."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.calibration.text import bos_note
from secateur.errors import CheckpointError
from secateur.evaluate.measured import FIGURES, Form
from secateur.evaluate.results import RESULTS, Kind, Record
from secateur.evaluate.verdict import Change, Verdict, verdict
from secateur.files.reading import checked, read_json
from secateur.report.tables import Cell, Table, count, number, percent, text

Evaluation = Mapping[str, Any]


def read_evaluations(file: Path, pruned: Path) -> list[dict[str, Any]]:
    """The evaluations of a pruned checkpoint in a file that `eval --json` or `compare --json` printed.

    Results of other models are passed over. Raises `CheckpointError` for another kind of file, and where all results
    are of other models.
    """
    advice = f"Make a new one: {shlex.join(['secateur', 'eval', str(pruned), '--json'])} > {shlex.quote(str(file))}"
    content = read_json(file.expanduser(), advice=advice)
    try:
        found = list(_results(content))
    except (ValueError, TypeError, KeyError, AttributeError):
        found = []
    if not found:
        raise CheckpointError(f"{file}: not what secateur eval --json or compare --json prints. {advice}")
    own = [
        (kind, result) for model, kind, result in found if model is None or Path(model).resolve() == pruned.resolve()
    ]
    if not own:
        others = ", ".join(sorted({str(model) for model, _, _ in found}))
        raise CheckpointError(f"{file}: holds results of {others}, none of {pruned}. Give a file of this checkpoint.")
    for kind, result in own:
        checked({"results": [result]} if kind == "tasks" else result, file, RESULTS[kind], advice=advice)
    return [{"kind": kind, "key": file.name, "result": result} for kind, result in own]


def kept_evaluations(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A store's latest evaluation of a model on each text and task; an agreement replaces a perplexity on its text."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        for result in record.result["results"] if record.kind == "tasks" else [record.result]:
            what = ("task", "shots", "documents") if record.kind == "tasks" else ("data", "digest")
            name = (record.kind, *(result.get(field) for field in what))
            latest[name] = {"kind": record.kind, "key": dict(record.key), "result": result}
    return [item for name, item in latest.items() if ("agreement", *name[1:]) not in latest or name[0] == "agreement"]


def continued(prompt: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the two continuations of a prompt, which `compare --json` prints."""
    texts = {"prompt": prompt, "dense": dense["text"], "pruned": pruned["text"]}
    return texts | {"tokens_in_common": pruned["shared_with_dense"]}


def verdict_of(pruned: str, evaluations: Sequence[Evaluation]) -> Verdict | None:
    """The verdict on a checkpoint from its comparisons with the dense model on texts; None where there are none."""
    changes = [Change.from_json(item["result"]) for item in evaluations if item["kind"] == "agreement"]
    return verdict(pruned, changes) if changes else None


def with_dense(evaluations: Sequence[Evaluation], dense: Sequence[Record]) -> list[dict[str, Any]]:
    """The evaluations, each perplexity with the dense model's on the same windows where a store has it."""
    known = {
        (record.result["digest"], record.result["windows"], record.result["length"]): record.result["perplexity"]
        for record in dense
        if record.kind == "perplexity"
    }
    made = []
    for item in evaluations:
        result = item["result"]
        if item["kind"] == "perplexity" and "perplexity_dense" not in result:
            found = known.get((result.get("digest"), result["windows"], result["length"]))
            result = result if found is None else {**result, "perplexity_dense": found}
        made.append({**item, "result": result})
    return made


def _results(content: Mapping[str, Any]) -> Iterator[tuple[str | None, Kind, Mapping[str, Any]]]:
    """(model or None, kind, result) of everything in a file."""
    for row in content.get("results", [content]):
        if "kl" in row:
            yield row["model"], "agreement", row
        elif "window_nats" in row:
            yield row.get("model"), "perplexity", {key: value for key, value in row.items() if key != "tasks"}
    for row in content.get("labelled") or []:
        yield row["model"], "labelled", row
    tasks = content.get("tasks") or []
    for answered in [tasks] if isinstance(tasks, Mapping) else tasks:
        for result in answered.get("results", [answered]):  # compare prints one task after the other
            yield answered["model"], "tasks", result
    prompts = content.get("generations") or []
    for place in range(1, len(prompts[0]["outputs"]) if prompts else 0):
        rows = [continued(prompt["prompt"], prompt["outputs"][0], prompt["outputs"][place]) for prompt in prompts]
        yield prompts[0]["outputs"][place]["model"], "continuations", {"rows": rows}


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """A table for each kind of evaluation that there is."""
    made = []
    known = {
        "perplexity": _perplexity,
        "agreement": _agreement,
        "labelled": _labelled,
        "tasks": _tasks,
        "continuations": _continuations,
    }
    for kind in dict.fromkeys([*known, *(item["kind"] for item in evaluations)]):
        results = [item["result"] for item in evaluations if item["kind"] == kind]
        if results:
            made.append(known[kind](results) if kind in known else _rows(kind, results))
    return made


def _perplexity(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            text(data_name(result)),
            _windows(result),
            number(result["nats"], ".4f", result["standard_error"]),
            number(result["perplexity"], ".3f", result["perplexity_error"]),
        ]
        for result in results
    ]
    columns = ["text", "windows × tokens", "loss in nats", "perplexity"]
    return Table("perplexity", "Perplexity of the pruned model, with its standard error over windows", columns, rows)


def _windows(result: Mapping[str, Any]) -> Cell:
    note = bos_note(result.get("provenance") or {})
    return Cell(f"{result['windows']:,} × {result['length']:,}{note}", result["windows"])


def _agreement(results: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            text(data_name(result)),
            _windows(result),
            number(result["perplexity_dense"], ".3f"),
            number(result["perplexity"], ".3f"),
            number(result["difference"], "+.4f", result["difference_error"]),
            number(result["kl"], ".4f", result["kl_error"]),
            number(result["kl_99"], ".3f"),
            percent(result["top1"], 1),
        ]
        for result in results
    ]
    columns = ["text", "windows × tokens", "dense", "pruned", "difference, nats", "KL per token", "KL, 99 %"]
    caption = "Perplexity beside the dense model on the same tokens, paired window by window"
    return Table("agreement", caption, [*columns, "same choice"], rows)


def _labelled(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each figure of each data set; of one without labels, a row for the answers that are the same."""
    rows = []
    for result in results:
        for name, own in result["figures"].items() or [("", {})]:
            kind = FIGURES.get(name, Form(name, 1, ".4f"))
            values = [
                number(
                    _scaled(own.get(part), kind.scale), sign + kind.form, _scaled(own.get(f"{part}_error"), kind.scale)
                )
                for part, sign in (("dense", ""), ("pruned", ""), ("difference", "+"))
            ]
            same = number(100 * result["agreement"], ".1f", _scaled(result["agreement_error"], 100))
            kl = number(result["kl"], ".4f", result["kl_error"])
            rows.append([text(data_name(result)), count(result["samples"]), text(kind.heading), *values, same, kl])
    columns = ["data", "samples", "figure", "dense", "pruned", "difference", "same answer, %", "KL"]
    return Table(
        "labelled", "Answers beside the dense model's and beside labels, with errors over samples", columns, rows
    )


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _tasks(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each metric of each task."""
    rows = [
        [
            text(result["task"]),
            text(name),
            number(metric["value"], ".4f", metric["error"]),
            count(result.get("shots")),
            count(result["documents"]),
        ]
        for result in results
        for name, metric in result["metrics"].items()
    ]
    columns = ["task", "metric", "value", "shots", "documents"]
    return Table("tasks", "Tasks of the evaluation harness, pruned model", columns, rows, sortable=True)


def _continuations(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each prompt."""
    rows = [
        [text(row["prompt"]), text(row["dense"]), text(row["pruned"]), count(row["tokens_in_common"])]
        for result in results
        for row in result["rows"]
    ]
    columns = ["prompt", "dense", "pruned", "first tokens in common"]
    return Table("continuations", "How both models go on from a prompt, greedily", columns, rows, long=len(rows) > 16)


def _rows(kind: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """The `rows` of any other evaluation, as they are."""
    rows = [row for result in results for row in result["rows"]]
    keys = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list | dict)))
    numeric = {key: all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys}
    cells = [
        [
            number(row.get(key), ".4g") if numeric[key] else text("" if row.get(key) is None else str(row[key]))
            for key in keys
        ]
        for row in rows
    ]
    columns = [key.replace("_", " ") for key in keys]
    return Table(f"evaluation-{kind}", kind.capitalize(), columns, cells, sortable=True)


def data_name(result: Mapping[str, Any]) -> str:
    """What the text of an evaluation is called: a file by its name alone."""
    name = str(result["data"])
    return Path(name).name if "/" in name and not name.startswith("hf:") else name
