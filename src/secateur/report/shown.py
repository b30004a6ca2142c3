"""Results as a few lines for a session of Python, and as the tables of the terminal in HTML for a notebook."""

import html as escaping
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from secateur.arguments import in_a_call, speaks_of_options
from secateur.evaluate.agreement import Agreement
from secateur.evaluate.labelled import Labelled
from secateur.evaluate.measured import FIGURES
from secateur.evaluate.perplexity import Perplexity, counted, plus_minus
from secateur.evaluate.settings import VerdictSettings
from secateur.evaluate.similarity import Similarity
from secateur.evaluate.task_results import TaskResults
from secateur.evaluate.verdict import Verdict
from secateur.plans.allocated import Allocated, told
from secateur.pruning.forecast import Estimate
from secateur.pruning.settings import PlanSettings
from secateur.record.manifest import Manifest, cautions
from secateur.record.verify import Verification
from secateur.report.inspect import Inspection
from secateur.report.terminal import (
    allocation_tables,
    comparison_table,
    estimate_tables,
    inspection_tables,
    labelled_table,
    manifest_tables,
    perplexity_table,
    similarity_table,
    sweep_table_groups,
    sweeps_table_groups,
    tasks_table,
    verdict_lines,
    verification_tables,
)
from secateur.runs.events import seconds_text
from secateur.runs.options import called_by_name
from secateur.shown import ShownList
from secateur.sweeps.folder import Sweep
from secateur.sweeps.several import Sweeps, models_tables
from secateur.sweeps.table import SweepTable, sweep_tables

PROBLEMS = 5  # that a verification shows in lines


def lines(result: Any) -> list[str]:
    """The lines of a result."""
    if isinstance(result, ShownList):
        return [line for one in result for line in lines(one)] or ["[]"]
    return [_said(line) for line in _of(result)[0](result)]


def _said(text: str) -> str:
    """A text in the words of a call."""
    return (
        text
        if speaks_of_options()
        else in_a_call(text, {**called_by_name(PlanSettings), **called_by_name(VerdictSettings)})
    )


def html(result: Any) -> str:
    """The tables of a result as HTML without scripts or styles of its own."""
    if not isinstance(result, ShownList):
        return "\n".join(_html(_of(result)[1](result)))
    tables: dict[type, Callable[[Any], Any]] = {
        Agreement: comparison_table,
        Similarity: similarity_table,
        Labelled: labelled_table,
    }
    return "\n".join(_html(tables[type(result[0])]([result])))


def _of(result: Any) -> tuple[Callable[[Any], Iterator[str]], Callable[[Any], Any]]:
    return next(own for kind, own in SHOWN.items() if isinstance(result, kind))


def _manifest(manifest: Manifest) -> Iterator[str]:
    totals = manifest.totals or dict.fromkeys(("zeros", "weights", "matrices", "sparsity", "asked"), 0)
    yield (
        f"Pruned with {manifest.method}: {totals['zeros']:,} of {totals['weights']:,} planned weights in "
        f"{totals['matrices']} matrices are zero, sparsity {totals['sparsity']:.4f} (asked {totals['asked']:.4f}); "
        f"{seconds_text(manifest.seconds.get('total', 0.0))}."
    )
    yield from cautions(manifest)


def _perplexity(result: Perplexity) -> Iterator[str]:
    yield (
        f"Perplexity {result.perplexity:.3f}{plus_minus(result.perplexity_error, '.3f')} on {_windows(result)}, "
        f"{result.nats:.4f}{plus_minus(result.standard_error, '.4f')} nats; {seconds_text(result.seconds)}."
    )


def _windows(result: Any) -> str:
    return f"{result.data}, {counted(result.windows, result.length, result.provenance)}"


def _agreement(result: Agreement) -> Iterator[str]:
    yield (
        f"{result.model} beside the dense model on {_windows(result)}: perplexity {result.perplexity:.3f} "
        f"(dense {result.perplexity_dense:.3f}), {result.difference:+.4f}{plus_minus(result.difference_error, '.4f')} "
        f"nats, KL {result.kl:.4f}{plus_minus(result.kl_error, '.4f')}, the same first choice for {result.top1:.1%} of "
        "tokens."
    )


def _similarity(result: Similarity) -> Iterator[str]:
    yield (
        f"{result.model} beside the dense model on {_windows(result)}: cosine of the last hidden states "
        f"{result.cosine:.4f}{plus_minus(result.cosine_error, '.4f')}, relative error {result.relative_error:.4f}."
    )


def _labelled(result: Labelled) -> Iterator[str]:
    figures = "".join(
        f"{FIGURES[name].heading} {FIGURES[name].cell(own.pruned, own.pruned_error)} "
        f"(dense {FIGURES[name].cell(own.dense, own.dense_error)}), "
        for name, own in result.figures.items()
    )
    kl = "" if result.kl is None else f", KL {result.kl:.4f}{plus_minus(result.kl_error or 0.0, '.4f')}"
    yield (
        f"{result.model} beside the dense model on {result.data}, {result.samples:,} samples: {figures}the same answer "
        f"for {result.agreement:.1%}{plus_minus(100 * result.agreement_error, '.1f')}{kl}."
    )


def _verification(result: Verification) -> Iterator[str]:
    problems = len(result.problems)
    wrong = f"NOT verified, {problems} {'problem' if problems == 1 else 'problems'}"
    yield (
        f"{'Verified' if result.ok else wrong}: {result.tensors} tensors and {result.matrices} matrices of "
        f"{result.folder}, sparsity {result.sparsity:.4f}."
    )
    yield from result.problems[:PROBLEMS]
    if problems > PROBLEMS:
        yield f"and {problems - PROBLEMS} more"
    yield from result.notes


def _inspection(result: Inspection) -> Iterator[str]:
    patterns = Counter(matrix.pattern for matrix in result.matrices)
    found = ", ".join(f"{count} {pattern}" for pattern, count in patterns.items())
    yield f"{result.model}: sparsity {result.sparsity:.4f} of {len(result.matrices)} prunable matrices ({found})."


def _sweep(sweep: Sweep) -> Iterator[str]:
    yield _cells(sweep)
    yield from _columns(sweep_tables(sweep))
    yield from (f"{cell.name} failed: {cell.error}" for cell in sweep.failed)


def _sweeps(sweeps: Sweeps) -> Iterator[str]:
    yield from (f"{name}: {_cells(own)}" for name, own in sweeps.sweeps.items())
    yield from _columns(models_tables(sweeps))
    yield from (f"{name}, {cell.name} failed: {cell.error}" for name, cell in sweeps.failed)


def _cells(sweep: Sweep) -> str:
    states = Counter(cell.status for cell in sweep.cells)
    return f"{len(sweep.cells)} cells in {sweep.folder}: {', '.join(f'{n} {state}' for state, n in states.items())}."


def _columns(tables: Sequence[SweepTable]) -> Iterator[str]:
    for table in tables:
        yield f"{table.title}:"
        for column, heading in enumerate(table.columns):
            yield f"  {heading}: " + ", ".join(f"{name} {entries[column].text}" for name, entries in table.rows)


def _allocated(made: Allocated) -> Iterator[str]:
    own = [pattern.sparsity for pattern in made.plan.values()]
    spread = f": sparsity {sum(own) / len(own):.4f} on average, {min(own):.4f} to {max(own):.4f}" if own else ""
    yield f"Plan by {made.record.get('name', 'hand')} for {len(own)} matrices{spread}."
    if made.record:
        yield told(made.record)


def _estimate(estimate: Estimate) -> Iterator[str]:
    yield (
        f"{estimate.method} would make {estimate.zeros:,} of the {estimate.all_weights:,} weights of {estimate.model} "
        f"zero ({estimate.architecture}, {estimate.blocks} blocks), in about {seconds_text(estimate.seconds)}, "
        f"{decimal(estimate.host_bytes)} of memory and {decimal(estimate.disk_bytes)} on the disk."
    )
    yield from estimate.notes


def _tasks(results: TaskResults) -> Iterator[str]:
    for result in results.results:
        found = ", ".join(
            f"{name} {metric.value:.4f}" + ("" if metric.error is None else f" ± {metric.error:.4f}")
            for name, metric in result.metrics.items()
        )
        yield f"{results.model}, {result.task}, {result.documents:,} documents: {found}."


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield verdict.sentence


SHOWN: dict[type, tuple[Callable[[Any], Iterator[str]], Callable[[Any], Any]]] = {
    Manifest: (_manifest, lambda manifest: manifest_tables(manifest, None)),
    Perplexity: (_perplexity, perplexity_table),
    Agreement: (_agreement, lambda result: comparison_table([[result]])),
    Similarity: (_similarity, lambda result: similarity_table([[result]])),
    Labelled: (_labelled, lambda result: labelled_table([[result]])),
    Verification: (_verification, verification_tables),
    Inspection: (_inspection, inspection_tables),
    Sweep: (_sweep, sweep_table_groups),
    Sweeps: (_sweeps, sweeps_table_groups),
    Allocated: (_allocated, lambda made: allocation_tables(made, None)),
    Estimate: (_estimate, estimate_tables),
    TaskResults: (_tasks, tasks_table),
    Verdict: (_verdict, lambda verdict: verdict_lines([verdict])),
}


# From what rich prints to HTML


def _html(content: Any) -> Iterator[str]:
    """The parts of what rich prints in a terminal, each as HTML."""
    if isinstance(content, Group):
        for part in content.renderables:
            yield from _html(part)
    elif isinstance(content, Table):
        yield _table(content)
    elif str(content):
        yield f"<p>{_marked(content, _said(str(content)))}</p>"


def _table(table: Table) -> str:
    title = "" if table.title is None else f"<caption>{_marked(table.title)}</caption>"
    head = "".join(_cell("th", column.header, column.justify) for column in table.columns)
    body = ""
    for row in zip(*(column.cells for column in table.columns), strict=True):
        cells = (_cell("td", cell, column.justify) for cell, column in zip(row, table.columns, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(tag: str, content: Any, justify: str) -> str:
    return f'<{tag} style="text-align: {justify}">{_marked(content)}</{tag}>'


def _marked(content: Any, text: str | None = None) -> str:
    text = escaping.escape(str(content) if text is None else text)
    return f"<strong>{text}</strong>" if isinstance(content, Text) and "bold" in str(content.style) else text
