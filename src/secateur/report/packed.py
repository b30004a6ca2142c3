"""Packed checkpoints as tables in a terminal."""

from collections import Counter

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from secateur.report.terminal import _table
from secateur.runs.events import seconds_text
from secateur.runtime.bench import Bench, Speed
from secateur.runtime.pack import Packing
from secateur.runtime.semi_structured import table as choices_text
from secateur.runtime.unpack import Unpacking


def packing_tables(result: Packing) -> RenderableType:
    """Sizes before and after, and the tensors that stayed dense, by reason."""
    sizes = _table("", "before", "after", "after / before", "bits per weight")
    for label, before, after, bits in (
        (f"{result.matrices} packed matrices", result.bytes_before, result.bytes_after, f"{result.bits:.2f}"),
        ("all tensors", result.total_before, result.total_after, ""),
    ):
        sizes.add_row(label, decimal(before), decimal(after), f"{after / before:.3f}", bits)
    parts: list[RenderableType] = [sizes, ""]
    if result.dense:
        left = _table("stayed dense", "tensors", "for example")
        for reason, count in Counter(result.dense.values()).most_common():
            example = next(name for name, own in result.dense.items() if own == reason)
            left.add_row(reason, str(count), example)
        parts += [left, ""]
    if result.errors:
        errors = sorted(result.errors.values())
        worst = max(result.errors, key=lambda name: result.errors[name])
        parts.append(
            Text(
                f"Rounded to int8: relative error {sum(errors) / len(errors):.4f} on average, at most "
                f"{errors[-1]:.4f} ({worst})."
            )
        )
    parts += [Text(f"{name} keeps its values: {reason}.", style="yellow") for name, reason in result.same.items()]
    kept = f"{result.kept / result.weights:.1%} of {result.weights:,} weights are kept"
    if result.output is None:
        return Group(*parts, Text(f"{kept}. Nothing was written."))
    return Group(*parts, Text(f"{kept}; packed into {result.output} in {seconds_text(result.seconds)}."))


def unpacking_tables(result: Unpacking) -> RenderableType:
    """What was unpacked, in a sentence."""
    return Text(
        f"{result.matrices} matrices unpacked into {result.output} in {seconds_text(result.seconds)}: "
        f"{decimal(result.bytes_before)} became {decimal(result.bytes_after)}, "
        + (
            f"{result.rounded} matrices with the values that their int8 codes stand for."
            if result.rounded
            else "every tensor as it was packed."
        )
    )


def bench_tables(result: Bench) -> RenderableType:
    """Sizes and loading; speeds by batch, with their spread and the gain over the fastest dense row of the model."""
    sizes = _table("model", "weights", "computed in", "files", "memory", "loaded in", "of the read bandwidth")
    speeds = _table("model", "weights", "computed in", "batch", "prefill, tokens/s", "gain", "decode, tokens/s", "gain")
    for row in result.rows:
        what = [row.model, row.backend, row.dtype]
        share = "" if row.read_share is None else f"{row.read_share:.2f}"
        sizes.add_row(*what, decimal(row.file_bytes), decimal(row.memory_bytes), seconds_text(row.load_seconds), share)
        for number, (prefill, decode) in enumerate(zip(row.prefill, row.decode, strict=True)):
            gains = [_gain(result.gain(row, stage, number), row.sparse_matrices) for stage in ("prefill", "decode")]
            speeds.add_row(*what, str(prefill.batch), _rate(prefill), gains[0], _rate(decode), gains[1])
        if row.decode_by_mv is not None:
            what = [row.model, f"{row.backend}, by torch.mv", row.dtype]
            speeds.add_row(*what, "1", "", "", _rate(row.decode_by_mv), "")
    parts: list[RenderableType] = [sizes, "", speeds, ""]
    parts += [Text(f"{model}: {choices_text(choices)}\n") for model, choices in result.choices.items() if choices]
    parts += [Text(note) for note in result.notes]
    threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    return Group(
        *parts,
        Text(
            f"{threads}, memory that is read at {result.bandwidth / 1e9:.1f} GB/s; {result.prompt} "
            f"tokens of prompt, {result.decoded} decoded, {result.repetitions} repetitions: median (lowest to "
            "highest). A gain is over the fastest dense row of the same model; dense rows are as large and as fast as "
            "the model was before pruning."
        ),
    )


def _rate(speed: Speed) -> str:
    return f"{speed.median:.1f} ({speed.lowest:.1f} to {speed.highest:.1f})"


def _gain(ratio: float | None, sparse: int) -> str:
    if not sparse:
        return ""
    return "within the spread" if ratio is None else f"{ratio:.2f} x"
