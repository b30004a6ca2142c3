"""Recoveries and merges as tables for the terminal, which the command line prints."""

import shlex
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from secateur.evaluate.perplexity import Perplexity, plus_minus
from secateur.report.terminal import _table
from secateur.runs.events import about, seconds_text

if TYPE_CHECKING:
    from secateur.record.manifest import Manifest
    from secateur.recover.fine_tuning import Recovery
    from secateur.recover.forecast import Forecast
    from secateur.recover.merge import Merge


def forecast_table(forecast: "Forecast") -> RenderableType:
    """What will be trained, on what, and the memory that weights, gradients and moments take."""
    table, way, settings = _table("estimate", ""), forecast.way, forecast.way.settings
    share = way.trainable / forecast.parameters
    table.add_row("trained", f"{way.trainable:,} of {forecast.parameters:,} weights ({share:.2%})")
    if settings.method != "full":
        more = len(way.targets) - 8
        table.add_row("adapters on", ", ".join(way.targets[:8]) + (f" and {more} more" if more > 0 else ""))
    steps, tokens = settings.total_steps, settings.batch_size * settings.accumulation * settings.length
    budget = f"{settings.minutes:g} minutes" if steps is None else f"{steps:,} steps"
    table.add_row("budget", f"{budget}, {tokens:,} tokens each step")
    if forecast.seconds is not None:
        table.add_row("time", f"{about(forecast.seconds)}, and evaluations")
    passes = "" if forecast.passes is None else f", each seen {forecast.passes:.3g} times"
    if forecast.passes == 1:
        passes = ", each seen once"
    table.add_row("windows", f"{forecast.windows:,} of {settings.length} tokens{passes}; {forecast.held_out} held out")
    table.add_row("computing on", f"{forecast.device}, {forecast.dtype}")
    listed = ", ".join(f"{name} {decimal(size)}" for name, size in forecast.memory.items() if size)
    table.add_row("memory", f"{decimal(sum(forecast.memory.values()))} and activations: {listed}")
    return table


def recovery_tables(recovery: "Recovery") -> RenderableType:
    """Perplexity and sparsity before and after, and what it took."""
    record = recovery.record
    table = _table("", "before", "after", title=f"Recovered with {record['method']}")
    table.add_row("held-out perplexity", _measured(recovery.before), _measured(recovery.after))
    table.add_row("sparsity of planned weights", f"{recovery.sparsity_before:.4f}", f"{recovery.sparsity:.4f}")
    passed = f"{record['steps']:,} steps, {record['tokens']:,} tokens, {seconds_text(record['seconds'])}"
    best = record["best_step"]
    kept = f"; kept is step {best:,}, the best" if best and best != record["steps"] else ""
    lines = [
        f"{record['trainable']:,} of {record['parameters']:,} weights trained ({record['share']:.2%}); {passed}{kept}."
    ]
    quoted = shlex.quote(str(recovery.output))
    if record["method"] == "full":
        lines.append(f"Written to {recovery.output}; check it with: secateur verify {quoted}")
    else:
        lines.append(
            f"Written to {recovery.output}; merge it with: secateur merge {quoted} --base "
            f"{shlex.quote(str(record['base']['path']))} -o MERGED"
        )
    return Group(table, *(Text(line) for line in lines), *(Text(note, style="yellow") for note in recovery.notes))


def block_tables(manifest: "Manifest", output: str) -> RenderableType:
    """The loss of each block on held-out samples before and after it was tuned, and what it took."""
    record = manifest.recovery or {}
    settings = record["settings"]
    table = _table("block", "held-out loss", "tuned", "epochs", "seconds", title="Recovered block by block")
    for block in record["blocks"]:
        table.add_row(
            str(block["index"]),
            f"{block['before']:.4f}",
            f"{block['after']:.4f}",
            f"{block['epochs']:.3g}",
            f"{block['seconds']:.1f}",
        )
    lines = [
        f"{settings['matrices']} matrices tuned on {settings['samples_trained']} samples, judged on "
        f"{settings['samples_held_out']}; {record['forwards']:.1f} forwards of all samples, "
        f"{seconds_text(record['seconds']['total'])}.",
        f"Sparsity of planned weights: {manifest.totals['sparsity']:.4f}, as before.",
        f"Written to {output}; check it with: secateur verify {shlex.quote(output)}",
    ]
    blocks = record["blocks"]
    notes = [
        f"block {block['index']}: the loss was not finite in epoch {block['diverged']}, and the best weights until "
        "then were kept. Use a smaller --lr."
        for block in blocks
        if block.get("diverged")
    ]
    if late := [str(block["index"]) for block in blocks if not block["epochs"]]:
        notes.append(
            f"No time was left to tune blocks {', '.join(late)}; they stayed as they were. Use more --minutes."
        )
    return Group(table, *(Text(line) for line in lines), *(Text(note, style="yellow") for note in notes))


def merge_tables(merge: "Merge") -> RenderableType:
    """Perplexity and sparsity of base, base with adapter, and what was written."""
    title = f"{merge.tensors} tensors merged, mask {'kept' if merge.mask == 'keep' else 'dropped'}"
    table = _table("", "base", "with the adapter", "merged", title=title)
    before, after = merge.zeros_before / merge.weights, merge.zeros / merge.weights
    results = (merge.base, merge.unmerged, merge.merged)
    if merge.base is not None:
        table.add_row("perplexity", *(_measured(result) for result in results if result is not None))
    table.add_row("sparsity of planned weights", f"{before:.4f}", f"{before:.4f}", f"{after:.4f}")
    lines = []
    if merge.unmerged is not None and merge.merged is not None:
        cost = merge.merged.nats - merge.unmerged.nats
        share = merge.merged.perplexity / merge.unmerged.perplexity - 1
        lines.append(
            f"Merging cost {cost:+.4f} nats ({share:+.2%} perplexity), on {merge.merged.windows} windows of "
            f"{merge.merged.length} tokens."
        )
    if merge.nudged:
        lines.append(
            f"{merge.nudged} kept weights were too small for the dtype and became its smallest number, not zero."
        )
    lines.append(f"Written to {merge.output}; check it with: secateur verify {shlex.quote(str(merge.output))}")
    return Group(table, *(Text(line) for line in lines), *(Text(note, style="yellow") for note in merge.notes))


def _measured(result: Perplexity) -> str:
    return f"{result.perplexity:.3f}{plus_minus(result.perplexity_error, '.3f')}"
