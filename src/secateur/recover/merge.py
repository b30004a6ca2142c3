"""`merge`: an adapter into its pruned base, with the mask kept or dropped, tensor by tensor."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.packing import training_windows
from secateur.calibration.windows import Windows
from secateur.collect.model_windows import model_evaluation_windows
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.models.weights.conversion import TensorGroup
from secateur.models.weights.inverse import Inverse
from secateur.record.manifest import read_manifest
from secateur.record.versions import run_facts
from secateur.recover.adapters import Adapter, check_base, merged_weight, read_adapter, require_peft
from secateur.recover.settings import MergeSettings
from secateur.recover.written import finish_trained, write_trained
from secateur.runs.events import named
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction


class MergedCheckpoint(Checkpoint):
    """A pruned checkpoint seen through an adapter: its tensors, each merged in float32 when it is read.

    With `keep`, what is zero in the base stays zero.
    """

    def __init__(self, folder: Path, opened: OpenedModel, adapter: Adapter, *, keep: bool) -> None:
        """`folder` is that of the pruned checkpoint, and `opened` the model in it."""
        super().__init__(folder)
        self.adapter = adapter
        self.keep = keep
        self._skeleton = opened.skeleton
        self._inverse = Inverse(opened.skeleton)
        self._modules = dict(opened.skeleton.model.named_modules(remove_duplicate=False))
        self._groups: dict[str, TensorGroup] = {}
        for module in adapter.modules:
            if module not in self._modules:
                raise CheckpointError(
                    f"{module}: has an adapter in {adapter.folder}, and the base model has no such layer. Is the "
                    "adapter for another model, or of a fused stack of experts? Those cannot be merged."
                )
            groups = self._skeleton.conversion.making([f"{module}.weight"])
            if not groups or not self._inverse.possible(groups[0]):
                raise CheckpointError(
                    f"{module}: its weight is not a tensor of its own in the base checkpoint (it is tied to another, "
                    "or converted while loading), so nothing can be merged into it."
                )
            self._groups |= dict.fromkeys(groups[0].names, groups[0])
        self.merged = [name for name in self.names if name in self._groups]  # what the adapter changes

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor: float32 where it is merged."""
        return torch.float32 if name in self._groups else super().dtype(name)

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, merged where the adapter changes them."""
        plain = super().read([name for name in names if name not in self._groups], pin=pin)
        return {name: plain[name] if name in plain else self._merge(name) for name in names}

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, in flat parts where it is not merged."""
        if name in self._groups:
            yield self._merge(name).reshape(-1)
        else:
            yield from super().parts(name)

    def _merge(self, name: str) -> Tensor:
        group = self._groups[name]
        tensors = super().read(group.names)
        parameters = dict(self._skeleton.conversion.convert(group, tensors))
        for parameter, weight in parameters.items():
            module = parameter.removesuffix(".weight")
            if module in self.adapter.modules:
                parameters[parameter] = merged_weight(self.adapter, module, weight, type(self._modules[module]))
        merged = self._inverse.tensors(group, parameters)[name]
        return torch.where(tensors[name] != 0, merged, 0) if self.keep else merged


@dataclass(frozen=True)
class Merge:
    """The result of `merge`: zeros are those of all planned weights, counted on the files."""

    output: str
    mask: str
    tensors: int
    weights: int
    zeros_before: int
    zeros: int
    nudged: int
    seconds: float
    base: Perplexity | None
    unmerged: Perplexity | None
    merged: Perplexity | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields, and the sparsities before and after; perplexities as `eval` prints them."""
        sparsity = {"sparsity_before": self.zeros_before / self.weights, "sparsity": self.zeros / self.weights}
        fields = vars(self) | sparsity
        return {name: value.to_json() if isinstance(value, Perplexity) else value for name, value in fields.items()}


@taking(MergeSettings)
def merge(settings: MergeSettings) -> Merge:
    """Merge a LoRA adapter into a pruned checkpoint, written to `output`; returns what that did.

    `mask="keep"` writes (W + s BA) ⊙ M with the mask M of the base, so that the zeros are exactly those of the base
    and its manifest still holds. The cost of that projection is measured: the perplexity of the base, of base and
    adapter unmerged, and of the output, on the same windows of `data` (by default those that were held out when the
    adapter was trained, or wikitext2). `mask="drop"` writes W + s BA: zeros are lost, and the manifest no longer
    promises a pattern for those matrices. peft computes the products, in float32. Tensors are read and written one by
    one, and those without an adapter are the base's, byte for byte.

    Raises `CheckpointError` when the adapter belongs to another base, `PatternError` for a mask dropped from an
    adapter that was trained with one, and `CalibrationError` for a text that cannot be measured on.
    """
    started = time.perf_counter()
    require_peft("merge")
    folder, mask, progress = Path(settings.base), settings.mask, settings.tell
    manifest = read_manifest(folder)
    found = read_adapter(settings.adapter)
    notes = check_base(found, manifest, folder)
    if mask == "drop" and found.masked:
        raise PatternError(
            f"--mask drop: {found.folder} was trained with its product masked (sparse-lora); without the mask it is "
            "another model, which nobody trained. Use --mask keep, which is exact."
        )
    target = check_output(settings.output, folder, settings.overwrite)
    assert target is not None
    how: dict[str, Any] = {name: getattr(settings, name) for name in ("device", "dtype", "trust_remote_code")}
    with Transaction(target, settings.overwrite) as transaction:
        opened = open_model(folder, **how)
        source = MergedCheckpoint(folder, opened, found, keep=mask == "keep")
        windows = _windows(settings, found, opened) if settings.evaluate else None
        config, targets = found.config, found.config.target_modules
        merged = write_trained(
            transaction,
            opened,
            manifest,
            source.merged,
            lambda name: source.read([name])[name],
            keep=mask == "keep",
            section={
                "method": "merge",
                "mask": mask,
                "base": {"path": str(folder.resolve()), "digest": manifest.digest},
                "adapter": {
                    "path": str(found.folder.resolve()),
                    "configuration": {
                        "r": config.r,
                        "lora_alpha": config.lora_alpha,
                        "target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
                        "use_rslora": config.use_rslora,
                        "use_dora": config.use_dora,
                    },
                    "record": found.record,
                },
                **run_facts(settings.command, peft=True),
            },
            progress=lambda done, total: progress("merge", done, total),
        )
        results: dict[str, Perplexity] = {}
        recovery = merged.recoveries[0]
        if windows is not None:
            whole = MergedCheckpoint(folder, opened, found, keep=found.masked)
            for key, model in (
                ("base", opened),
                ("unmerged", opened.reading(whole)),
                ("merged", open_model(transaction.folder, **how)),
            ):
                results[key] = perplexity(
                    model, windows, batch_size=settings.batch_size, progress=named(progress, f"perplexity, {key}")
                )
            recovery["perplexity"] = {key: value.perplexity for key, value in results.items()}
            recovery["windows"] = dict(windows.provenance) | {"digest": windows.digest}
        checked = finish_trained(transaction, merged, progress=lambda done, total: progress("verify", done, total))
        transaction.commit()
    return Merge(
        output=str(settings.output),
        mask=mask,
        tensors=len(source.merged),
        weights=manifest.totals["weights"],
        zeros_before=recovery["zeros_before"],
        zeros=recovery["zeros"],
        nudged=recovery["nudged"],
        seconds=time.perf_counter() - started,
        base=results.get("base"),
        unmerged=results.get("unmerged"),
        merged=results.get("merged"),
        notes=[*checked.notes, *notes],
    )


def _windows(settings: MergeSettings, adapter: Adapter, opened: OpenedModel) -> Windows:
    """The windows to measure on: of the text asked for, else those held out while the adapter was trained.

    What was held out is cut anew where another length is asked for. Raises `CalibrationError` when it cannot be drawn
    again, or is too little.
    """
    length, windows, record = settings.length, settings.windows, adapter.record
    if settings.data is not None or record is None or record["data"]["name"] is None:
        data = "wikitext2" if settings.data is None else settings.data
        return model_evaluation_windows(opened, data, None, length=length, windows=windows)
    name, held = record["data"]["name"], record["held_out"]
    _, text = training_windows(
        name, opened.load_tokenizer(), samples=1, length=held["length"], held_out=held["samples"]
    )
    if text.digest != held["digest"]:
        raise CalibrationError(
            f"{name}: not the text any more that the adapter was trained on, so what was held out is not known. Give "
            "another text with --data, or --no-eval."
        )
    if text.attention_mask is not None and length not in (None, text.length):
        raise CalibrationError(
            f"--length: got {length}, and the rows of {name} that were held out differ in length. Leave it out, or "
            "give another text with --data."
        )
    if text.attention_mask is not None:
        return text.part(0, windows)
    ids = text.input_ids.flatten()
    length = length or text.length
    most = len(ids) // length
    if (windows or 1) > most:
        raise CalibrationError(
            f"--windows: got {windows or 1} of {length} tokens, and {len(ids)} tokens of {name} were held out, which "
            f"make {most}. Give fewer, or another text with --data."
        )
    count = windows or most
    provenance = {**text.provenance, "samples": count, "length": length}
    return Windows(ids[: count * length].reshape(count, length), provenance)
