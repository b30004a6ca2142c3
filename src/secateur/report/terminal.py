"""Results as tables for the terminal, which the command line prints."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from secateur.calibration.text import bos_text
from secateur.collect.gradient_file import GradientFile
from secateur.core.gradients import GradientKind
from secateur.errors import CheckpointError
from secateur.evaluate.agreement import Agreement
from secateur.evaluate.generations import Generation, shared_start
from secateur.evaluate.labelled import Labelled
from secateur.evaluate.measured import FIGURES
from secateur.evaluate.perplexity import Perplexity, counted, plus_minus
from secateur.evaluate.similarity import Similarity
from secateur.evaluate.task_results import Difference, Metric, TaskComparison, TaskResult, TaskResults
from secateur.evaluate.verdict import Verdict
from secateur.models.shape.matrices import matrix_kind
from secateur.plans.allocated import Allocated, told
from secateur.pruning.forecast import Estimate
from secateur.record.manifest import FILE_NAME, Manifest, cautions, order_line, read_manifest, sparsity
from secateur.record.verify import Verification
from secateur.report.inspect import Inspection, MatrixSparsity
from secateur.runs.events import BACKGROUND, about, seconds_text
from secateur.sweeps.best import best_lines
from secateur.sweeps.estimate import SweepEstimate
from secateur.sweeps.folder import Sweep
from secateur.sweeps.several import Sweeps, models_tables
from secateur.sweeps.table import SweepTable, sweep_tables

_BLOCKS = re.compile(r"^.+?\.\*\.")  # of a kind of matrices, the path of the blocks: model.layers.*.


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _called(models: Iterable[str]) -> dict[str, str]:
    """What tables call models: the last part of their path, or as many parts as tell them apart."""
    paths = {model: Path(model).parts for model in models}

    def ending(model: str, length: int) -> str:
        return str(Path(*paths[model][-length:]))

    found = {}
    for model, parts in paths.items():
        ours = range(1, len(parts) + 1)
        apart = (n for n in ours if sum(ending(other, n) == ending(model, n) for other in paths) == 1)
        found[model] = ending(model, next(apart, len(parts)))
    return found


def _within_block(kinds: Iterable[str]) -> dict[str, str]:
    """Kinds of matrices without what they all have: the path of the blocks, and that they are a weight."""
    names = list(kinds)
    paths = {_BLOCKS.match(name) for name in names}
    same = None not in paths and len({path.group() for path in paths if path is not None}) == 1
    return {name: (_BLOCKS.sub("", name) if same else name).removesuffix(".weight") for name in names}


def estimate_tables(estimate: Estimate) -> RenderableType:
    """The dry run: what would be pruned, what would not and why, and what it would take."""
    planned = _table(
        "matrices",
        "count",
        "out x in",
        "weights",
        "pattern",
        title=f"{estimate.architecture}, {estimate.blocks} blocks",
    )
    called = _within_block(row.kind for row in estimate.kinds)
    for row in estimate.kinds:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        partial = f" ({row.planned} of {row.matrices})" if 0 < row.planned < row.matrices else ""
        planned.add_row(
            called[row.kind], str(row.matrices), shape, f"{row.weights:,}", (row.pattern or "left out") + partial
        )
    left = _table("not pruned", "tensors", "weights", "for example")
    for reason in estimate.left_out:
        left.add_row(reason.reason, str(reason.tensors), f"{reason.weights:,}", reason.example)
    cost = _table("estimate", "")
    share = estimate.zeros / max(estimate.all_weights, 1)
    cost.add_row("planned weights", f"{estimate.planned_weights:,} of {estimate.all_weights:,}")
    cost.add_row("zeros afterwards", f"{estimate.zeros:,} ({share:.1%} of the model)")
    cost.add_row("computing on", f"{estimate.device}, {estimate.dtype}")
    cost.add_row("calibration", f"{estimate.tokens:,} tokens" if estimate.tokens else "none needed")
    cost.add_row("largest block", decimal(estimate.block_bytes))
    cost.add_row("hidden states", decimal(estimate.states_bytes))
    free = decimal(estimate.available_host_bytes)
    cost.add_row("host memory", f"about {decimal(estimate.host_bytes)} ({free} free)")
    if estimate.device_bytes:
        cost.add_row("device memory", f"about {decimal(estimate.device_bytes)}")
    cost.add_row("disk", decimal(estimate.disk_bytes))
    if estimate.packed_bytes is not None:
        cost.add_row("packed tensors", decimal(estimate.packed_bytes))
    cost.add_row("time", about(estimate.seconds))
    shared: list[RenderableType] = []
    if estimate.parts:
        parts = _table("time of", "one process", "each of several")
        for part in estimate.parts:
            parts.add_row(part.part, seconds_text(part.alone), seconds_text(part.shared))
        parts.add_row("sent by each", "", decimal(estimate.exchanged_bytes))
        shared = ["", parts]
    return Group(planned, "", left, "", cost, *shared, *(Text(note, style="yellow") for note in estimate.notes))


def manifest_tables(manifest: Manifest, output: str | None, loading: float = 0.0) -> RenderableType:
    """What a run did: by kind of matrix, how far the blocks moved, and where the time went.

    `loading` are seconds before the run, in which a command has loaded its libraries.
    """
    table = _table("matrices", "count", "sparsity", "tokens each", title=f"Pruned with {manifest.method}")
    called = _within_block(manifest.kinds)
    for kind, entries in manifest.kinds.items():
        tokens = [entry["tokens"] for entry in entries if entry["tokens"] is not None]
        seen = f"{min(tokens):,}" if tokens else "-"
        if tokens and min(tokens) != max(tokens):
            seen = f"{min(tokens):,} to {max(tokens):,}"
        table.add_row(called[kind], str(len(entries)), f"{sparsity(entries):.4f}", seen)
    totals = manifest.totals
    lines = [
        f"{totals['zeros']:,} of {totals['weights']:,} planned weights are zero: sparsity {totals['sparsity']:.4f} "
        f"(asked {totals['asked']:.4f})."
    ]
    changes = [block["output_change"] for block in manifest.blocks if block.get("output_change") is not None]
    if changes:
        worst = max(range(len(changes)), key=lambda index: changes[index])
        lines.append(
            f"Block outputs moved by {sum(changes) / len(changes):.3f} of their norm on average, most in block {worst} "
            f"({changes[worst]:.3f})."
        )
    seconds = {"load libraries": loading, **manifest.seconds}
    lines.append(time_line(seconds | {"total": seconds["total"] + loading}))
    if allocation := manifest.settings.get("allocation"):
        lines.append(told(allocation))
    if ordered := order_line(manifest):
        lines.append(ordered)
    if left := manifest.source.get("not_copied"):
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        lines.append(f"Not copied from the source: {', '.join(left[:8])}{more}.")
    commands = []
    if output is not None:
        commands = [
            f"Written to {output}; check it with: secateur verify {shlex.quote(output)}",
            f"What it cost: {shlex.join(_measuring(manifest, output))}",
        ]
    warnings = [Text(caution, style="yellow") for caution in cautions(manifest)]
    return Group(table, *map(Text, lines), *(Text(line, no_wrap=True) for line in commands), *warnings)


def time_line(seconds: Mapping[str, float]) -> str:
    """Where the time of a run went: parts that add up, and what was read and written meanwhile."""
    parts = {part: value for part, value in seconds.items() if part not in ("total", *BACKGROUND)}
    parts["other"] = max(0.0, seconds["total"] - sum(parts.values()))
    shown = [f"{part} {seconds_text(value)}" for part, value in parts.items() if value > 0.05]
    line = f"{seconds_text(seconds['total'])} in all" + (f": {', '.join(shown)}." if shown else ".")
    beside = [f"{part} {seconds_text(seconds[part])}" for part in BACKGROUND if seconds.get(part, 0.0) > 0.05]
    return line + (f" In the background: {', '.join(beside)}." if beside else "")


def allocation_tables(made: Allocated, output: str | None) -> RenderableType:
    """A plan by kind of matrix, and what the held-out windows say of it."""
    table = _table("matrices", "count", "mean", "lowest", "highest", title=f"Plan by {made.record.get('name', 'hand')}")
    kinds: dict[str, list[float]] = {}
    for name, pattern in made.plan.items():
        kinds.setdefault(matrix_kind(name), []).append(pattern.sparsity)
    called = _within_block(kinds)
    for kind, own in kinds.items():
        values = (sum(own) / len(own), min(own), max(own))
        table.add_row(called[kind], str(len(own)), *(f"{value:.4f}" for value in values))
    judged = Text(told(made.record), style="" if made.record.get("used", True) else "yellow")
    if output is None:
        return Group(table, judged)
    command = f"secateur prune MODEL -o OUT --plan {shlex.quote(output)}"
    return Group(table, judged, Text(f"Written to {output}; prune with it: {command}"))


def _dense_path(manifest: Manifest) -> str:
    """Where the dense model is, also for what was pruned from a pruned checkpoint."""
    path, seen = str(manifest.source.get("path")), set[str]()
    with suppress(CheckpointError):
        while path not in seen and (Path(path) / FILE_NAME).is_file():  # two may have been pruned onto each other
            seen.add(path)
            earlier = read_manifest(Path(path))
            if not earlier.removes or earlier.source.get("path") is None:
                break
            path = str(earlier.source["path"])
    return path


def _measuring(manifest: Manifest, output: str) -> list[str]:
    """The command that compares a pruned checkpoint with its source, on windows that the source is known to take."""
    command = ["secateur", "compare", _dense_path(manifest), output]
    calibration = manifest.calibration or {}
    prefix = {"images": "images", "recordings": "audio", "labelled texts": "labelled"}.get(
        str(calibration.get("source"))
    )
    if prefix is not None:
        files = [source["file"] for source in calibration.get("sources", [])]
        return [*command, "--data", f"{prefix}:{files[0] if files else 'FOLDER'}"]
    if calibration.get("source") == "named inputs":  # which only Python can give
        return command
    if any(source.get("corpus") == "python-docs" for source in calibration.get("sources", [])):
        command += ["--data", "python-docs"]  # which is there without a network
    length = calibration.get("length")
    return command if length is None else [*command, "--length", str(length)]


def perplexity_table(result: Perplexity) -> RenderableType:
    """Perplexity with its standard error, and what it was measured on."""
    table = _table("data", "windows", "tokens", "nats", "perplexity", "seconds")
    table.add_row(
        result.data,
        f"{result.windows} x {result.length}",
        f"{result.tokens:,}",
        f"{result.nats:.4f}{plus_minus(result.standard_error, '.4f')}",
        f"{result.perplexity:.3f}{plus_minus(result.perplexity_error, '.3f')}",
        f"{result.seconds:.1f}",
    )
    return Group(table, *_bos_lines(result.provenance))


def _bos_lines(provenance: Mapping[str, Any]) -> list[Text]:
    bos = bos_text(provenance)
    return [] if bos is None else [Text(f"{bos[0].upper()}{bos[1:]}.", style="dim")]


def inspection_tables(inspection: Inspection, every_matrix: bool = False) -> RenderableType:
    """Sparsity and pattern by kind and by block, or of every matrix."""
    if every_matrix:
        table = _table("matrix", "out x in", "sparsity", "pattern")
        for matrix in inspection.matrices:
            shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
            table.add_row(matrix.name, shape, f"{matrix.sparsity:.4f}", matrix.pattern)
        return table
    parts: list[RenderableType] = []
    if inspection.packed is not None:
        packed, stored, plain = (inspection.packed[key] for key in ("tensors", "bytes", "plain_bytes"))
        share = f"{decimal(stored)}, {stored / plain:.3f} of {decimal(plain)} when they are plain"
        how = f"{inspection.packed['values']} values" + (", compressed" if inspection.packed["compressed"] else "")
        parts += [Text(f"{packed} tensors are packed ({how}): {share}."), ""]
    for key in ("kind", "block"):
        table = _table(f"by {key}", "count", "sparsity", "pattern")
        groups = inspection.grouped(key)
        called = _within_block(map(str, groups))
        for value, matrices in groups.items():
            table.add_row(called[str(value)], str(len(matrices)), _sparsity(matrices), _patterns(matrices))
        parts += [table, ""]
    return Group(*parts, Text(f"Sparsity of all prunable matrices: {inspection.sparsity:.4f}", style="bold"))


def _sparsity(matrices: list[MatrixSparsity]) -> str:
    values = [matrix.sparsity for matrix in matrices]
    mean = sum(matrix.zeros for matrix in matrices) / sum(matrix.weights for matrix in matrices)
    spread = f" ({min(values):.4f} to {max(values):.4f})" if max(values) - min(values) > 5e-5 else ""
    return f"{mean:.4f}{spread}"


def _patterns(matrices: list[MatrixSparsity]) -> str:
    counts = Counter(matrix.pattern for matrix in matrices)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{pattern} ({count})" for pattern, count in counts.items())


def verification_tables(result: Verification) -> RenderableType:
    """The verdict, and every problem found."""
    lines = [
        Text(
            f"{result.tensors} tensors hashed, {result.matrices} matrices checked against their patterns, "
            f"sparsity {result.sparsity:.4f} of planned weights."
        )
    ]
    if result.packed:
        lines.append(
            Text(f"{result.packed} tensors are packed: hashed as they are stored, and as what they stand for.")
        )
    if result.compared_to:
        lines.append(Text(f"Compared with the source {result.compared_to}."))
    lines += [Text(note, style="yellow") for note in result.notes]
    if result.ok:
        return Group(*lines, Text("Verified.", style="bold green"))
    lines.append(Text(f"NOT verified: {len(result.problems)} problems.", style="bold red"))
    lines += [Text(f"  {problem}", style="red") for problem in result.problems[:20]]
    return Group(*lines, *([Text(f"  and {len(result.problems) - 20} more")] if len(result.problems) > 20 else []))


def sweep_estimate_tables(estimate: SweepEstimate) -> RenderableType:
    """What is left of a sweep to do, and what it would take."""
    if not estimate.cells:
        return Text(f"All {estimate.finished} cells are finished already.")
    table = _table("cell", "", "time", title=f"{len(estimate.cells)} cells to run, {estimate.finished} finished")
    for own in estimate.cells:
        what = "cannot be pruned" if own.refusal is not None else "prune, evaluate" if own.prune else "evaluate"
        table.add_row(own.cell.name, what, about(own.seconds) if own.refusal is None else "")
    cost = _table("estimate", "")
    if estimate.shared_seconds:
        cost.add_row("for all cells together", about(estimate.shared_seconds))
    cost.add_row("time", about(estimate.seconds))
    cost.add_row("disk", f"{decimal(estimate.disk_bytes)} ({decimal(estimate.free_disk_bytes)} free)")
    if estimate.host_bytes:
        free = decimal(estimate.available_host_bytes)
        cost.add_row("host memory to prune", f"about {decimal(estimate.host_bytes)} ({free} free)")
    return Group(table, "", cost, *(Text(note, style="yellow") for note in estimate.notes))


def sweep_table_groups(sweep: Sweep) -> RenderableType:
    """The tables of a sweep, the best of each column bold."""
    tex = ", table.tex" if (sweep.folder / "table.tex").exists() else ""
    csv = ", tasks.csv" if sweep.dense_tasks else ""
    written = f"Written to {sweep.folder}: sweep.json, table.md, table.csv{csv}{tex} and the cells."
    return Group(*_sweep_tables(sweep_tables(sweep)), Text(written), *map(Text, best_lines(sweep)))


def sweeps_table_groups(sweeps: Sweeps) -> RenderableType:
    """The tables of several models, the best of each column bold."""
    written = f"Written to {sweeps.folder}: table.md, and a sweep for each model: {', '.join(sweeps.sweeps)}."
    return Group(*_sweep_tables(models_tables(sweeps)), Text(written))


def _sweep_tables(tables: Sequence[SweepTable]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for own in tables:
        table = _table(own.first, *own.columns)
        for name, entries in own.rows:
            table.add_row(name, *(Text(entry.text, "bold" if entry.best else "") for entry in entries))
        # A title of the table itself would be folded to the table's width.
        parts += [Text(own.title, style="bold"), table, Text()]
    return parts


def gradient_table(file: GradientFile) -> RenderableType:
    """A file of gradients: its model and tokens, and how large gradients are in the matrices of each kind."""
    held = file.provenance
    head = _table(str(file.path), "")
    head.add_row("model", str(held["model"].get("path")))
    head.add_row("tokens", f"{held['samples']} samples of {held['length']}")
    head.add_row("gradients", f"per {held['granularity']}, of the {held['scope']}")
    rows = _table("matrices", "count", "norm", "mean", "largest", "zero")
    kinds: dict[str, list[str]] = {}
    for name in file.matrices:
        kinds.setdefault(matrix_kind(name), []).append(name)
    called = _within_block(kinds)
    for kind, names in kinds.items():
        for norm in held["norms"]:
            total, largest, zeros, weights = 0.0, 0.0, 0, 0
            for name in names:
                value = file.read(name, GradientKind(norm, held["granularity"], held["scope"])).norm()
                total, largest = total + float(value.double().sum()), max(largest, float(value.max()))
                zeros, weights = zeros + value.numel() - int(value.count_nonzero()), weights + value.numel()
            rows.add_row(
                called[kind],
                str(len(names)),
                norm,
                f"{total / weights:.2e}",
                f"{largest:.2e}",
                f"{zeros / weights:.1%}",
            )
    return Group(head, Text(), rows)


def comparison_table(results: Sequence[Sequence[Agreement]]) -> RenderableType:
    """One table for each text: the dense model first, then each pruned one; the best of each column is bold."""
    tables: list[RenderableType] = []
    called = _called(row.model for rows in results for row in rows)
    for rows in results:
        first = rows[0]
        title = f"{first.data}, {counted(first.windows, first.length, first.provenance)}"
        table = _table(
            "model", "perplexity", "nats - dense", "KL per token", "KL 99 %", "same first choice", title=title
        )
        table.add_row("dense", f"{first.perplexity_dense:.3f}", "", "", "", "")
        values = [(row.perplexity, row.difference, row.kl, row.kl_99, -row.top1) for row in rows]
        lowest = [min(column) for column in zip(*values, strict=True)]
        for row, own in zip(rows, values, strict=True):
            cells = [
                f"{row.perplexity:.3f}",
                f"{row.difference:+.4f}{plus_minus(row.difference_error, '.4f')}",
                f"{row.kl:.4f}{plus_minus(row.kl_error, '.4f')}",
                f"{row.kl_99:.3f}",
                f"{row.top1:.1%}{plus_minus(100 * row.top1_error, '.1f')}",
            ]
            bold = [len(rows) > 1 and value == best for value, best in zip(own, lowest, strict=True)]
            table.add_row(
                called[row.model], *(Text(cell, "bold" if b else "") for cell, b in zip(cells, bold, strict=True))
            )
        tables += [table, *_bos_lines(first.provenance), Text()]
    return Group(*tables[:-1])


def similarity_table(results: Sequence[Sequence[Similarity]]) -> RenderableType:
    """One table for each text: how close the hidden states of each pruned model are to the dense one's."""
    tables: list[RenderableType] = []
    called = _called(row.model for rows in results for row in rows)
    for rows in results:
        samples = counted(rows[0].windows, rows[0].length, rows[0].provenance)
        title = f"{rows[0].data}, {samples}: last hidden states"
        table = _table("model", "cosine of tokens", "cosine of means", "relative error", title=title)
        for row in rows:
            table.add_row(
                called[row.model],
                f"{row.cosine:.4f}{plus_minus(row.cosine_error, '.4f')}",
                f"{row.pooled_cosine:.4f}{plus_minus(row.pooled_cosine_error, '.4f')}",
                f"{row.relative_error:.4f}",
            )
        tables += [table, Text()]
    return Group(*tables[:-1])


def labelled_table(results: Sequence[Sequence[Labelled]]) -> RenderableType:
    """One table for each data set: the dense model first, then what each pruned one answers beside it."""
    tables: list[RenderableType] = []
    called = _called(row.model for rows in results for row in rows)
    for rows in results:
        first = rows[0]
        kinds = [FIGURES[name] for name in first.figures]
        what = "what they write" if first.classes is None else f"choices of {first.classes:,} classes"
        title = f"{first.data}, {first.samples:,} samples: {what}"
        head = [column for kind in kinds for column in (kind.heading, "- dense")]
        last = ["same answer %", *(["KL"] if first.kl is not None else [])]
        table = _table("model", *head, *last, title=title)
        if first.figures:
            cells = [
                kind.cell(own.dense, own.dense_error) for kind, own in zip(kinds, first.figures.values(), strict=True)
            ]
            table.add_row("dense", *(cell for own in cells for cell in (own, "")), *("" for _ in last))
        for row in rows:
            figures = zip(kinds, row.figures.values(), strict=True)
            pairs = [
                (kind.cell(own.pruned, own.pruned_error), kind.cell(own.difference, own.difference_error, "+"))
                for kind, own in figures
            ]
            kl = [] if row.kl is None else [f"{row.kl:.4f}{plus_minus(row.kl_error or 0.0, '.4f')}"]
            same = f"{row.agreement:.1%}".removesuffix("%") + plus_minus(100 * row.agreement_error, ".1f")
            table.add_row(called[row.model], *(cell for pair in pairs for cell in pair), same, *kl)
        tables += [table, *_judged_lines(first.provenance), Text()]
    return Group(*tables[:-1])


def _judged_lines(provenance: Mapping[str, Any]) -> list[Text]:
    own = provenance.get("judged_by")
    if own is None:
        return []
    plain = f"; texts are normalised: {own['normaliser']}" if "normaliser" in own else ""
    return [Text(f"By {own['package']}{plain}.", style="dim")]


def verdict_lines(verdicts: Sequence[Verdict]) -> RenderableType:
    """A sentence for each pruned model: green where it may replace the dense one, red where not."""
    styles = {True: "bold green", False: "bold red", None: "bold"}
    called = _called(verdict.model for verdict in verdicts)
    named = [replace(verdict, model=called[verdict.model]) for verdict in verdicts]
    return Group(*(Text(verdict.sentence, styles[verdict.passed]) for verdict in named))


def tasks_table(results: TaskResults) -> RenderableType:
    """A row for each task, then the groups, with every metric and its standard error."""
    metrics = list(dict.fromkeys(name for result in results.results for name in result.metrics))
    limit = f", the first {results.limit} documents of each task" if results.limit else ""
    title = f"lm-evaluation-harness {results.lm_eval}, {results.dtype}{limit}"
    table = _table("task", "shots", "documents", *map(_unit, metrics), title=title)
    for result in results.results:
        cells = [_metric(name, result.metrics.get(name)) for name in metrics]
        shots = "" if result.shots is None else str(result.shots)
        table.add_row(result.task, shots, f"{result.documents:,}", *cells, style="bold" if result.members else "")
    return Group(table, *(Text(line, style="yellow") for line in _task_notes(results.results)))


def _task_notes(results: Sequence[TaskResult]) -> list[str]:
    return [f"{result.task}: {note}" for result in results for note in result.notes]


def task_comparison_table(rows: Sequence[TaskComparison]) -> RenderableType:
    """For each task the dense model, then each pruned one; the best of each metric is bold.

    Under "flips" stand the answers that went from right to wrong and from wrong to right.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.differences))
    columns = [column for name in metrics for column in (_unit(name), "- dense", "flips")]
    table = _table("task", "documents", "model", *columns)
    table.columns[2].justify = "left"
    called = _called(row.model for row in rows)
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        dense = own[0].dense
        cells = [cell for name in metrics for cell in (_metric(name, dense.metrics.get(name)), "", "")]
        table.add_row(task, f"{dense.documents:,}", "dense", *cells)
        best = {name: max(row.pruned.metrics[name].value for row in own) for name in own[0].differences}
        for row in own:
            found: list[Text] = []
            for name in metrics:
                first = name in best and row.pruned.metrics[name].value == best[name]
                style = "bold" if first and len(own) > 1 and _is_share(name) else ""
                found += [Text(cell, style) for cell in _difference(name, row)]
            table.add_row("", "", called[row.model], *found)
    legend = Text("flips: answers that went from right to wrong (-) and from wrong to right (+)", style="dim")
    notes = dict.fromkeys(line for row in rows for line in _task_notes([row.dense, row.pruned]))
    return Group(table, legend, *(Text(line, style="yellow") for line in notes))


def _difference(name: str, row: TaskComparison) -> tuple[str, str, str]:
    """(value, its difference from the dense model's, flips) of a metric."""
    found = row.differences.get(name)
    if found is None:
        return "", "", ""
    flips = "" if found.right_to_wrong is None else f"-{found.right_to_wrong} +{found.wrong_to_right}"
    return _metric(name, row.pruned.metrics[name]), _metric(name, found, "+"), flips


def _metric(name: str, metric: Metric | Difference | None, sign: str = "") -> str:
    if metric is None:
        return ""
    scale, form = (100, ".2f") if _is_share(name) else (1, ".4f")
    return f"{scale * metric.value:{sign}{form}}" + (
        "" if metric.error is None else f" ± {scale * metric.error:{form}}"
    )


def _is_share(name: str) -> bool:
    """Whether a metric is a share of documents, shown in per cent; the more the better."""
    return name.startswith(("acc", "exact_match"))


def _unit(name: str) -> str:
    return f"{name} %" if _is_share(name) else name


def generations_table(prompts: Sequence[Sequence[Generation]]) -> RenderableType:
    """For each prompt, what the dense model and then each pruned one writes, and for how many tokens they agree."""
    parts: list[RenderableType] = []
    called = _called(output.model for outputs in prompts for output in outputs[1:])
    for outputs in prompts:
        table = _table("model", "same tokens", "continuation")
        table.title = Text(outputs[0].prompt, style="bold")
        table.columns[2].justify = "left"
        for number, output in enumerate(outputs):
            same = f"{shared_start(outputs[0].tokens, output.tokens)} of {len(output.tokens)}" if number else ""
            table.add_row(called[output.model] if number else "dense", same, Text(output.text.strip()))
        parts += [table, Text()]
    return Group(*parts[:-1])
