"""`fine_tune`: from a pruned checkpoint to an adapter for it, or to one with the same zeros and better weights."""

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from secateur.calibration.documents import Corpus
from secateur.calibration.hub import default_text
from secateur.calibration.packing import training_windows
from secateur.calibration.windows import check_fits, check_predictions
from secateur.collect.settings import AUTO
from secateur.errors import CheckpointError
from secateur.evaluate.perplexity import Perplexity, perplexity
from secateur.files.digest import model_digest
from secateur.files.folders import locate
from secateur.files.reading import checked, read_json
from secateur.files.writer import writing
from secateur.models.opening.opened import OpenedModel, choose_device, open_model
from secateur.models.opening.whole import load_whole
from secateur.record.manifest import read_manifest
from secateur.record.versions import run_facts
from secateur.recover.adapters import Record, require_peft
from secateur.recover.forecast import count_parameters, forecast
from secateur.recover.settings import RecoverSettings, require_one_process, with_preset
from secateur.recover.training import RecoveryTrainer, Rows, arguments, last_checkpoint
from secateur.recover.ways import Adapters, FullWeights, Way
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction

REVISION = 1  # of how recovery trains; raise it when a run that goes on would mix two ways
STATE = "recovery.json"  # in the folder of an unfinished run: what it was started with


@dataclass(frozen=True)
class Recovery:
    """The result of a recovery: its record, which the output holds as well, and the perplexity before and after."""

    output: str
    record: Mapping[str, Any]
    before: Perplexity
    after: Perplexity
    sparsity_before: float
    sparsity: float
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields; perplexities as `eval` prints them."""
        return {**vars(self), "before": self.before.to_json(), "after": self.after.to_json()}


@taking(RecoverSettings)
def fine_tune(settings: RecoverSettings) -> Recovery:
    """Train a pruned checkpoint that Secateur wrote, with the result in `output`; returns what training did.

    `method` is "lora" or "sparse-lora" (the output is an adapter, as peft saves it), or "full" (the output is a pruned
    checkpoint with the same zeros). What is left out comes from the `preset`. `data` is a corpus, texts or token ids as
    for `prune`; its first windows are held out. `distill` is a dense model to learn the predictions of as well.
    Products are computed in `dtype`, while trained weights and the optimizer are in float32. `announce` is called
    before anything long begins.

    While it runs, the folder `OUTPUT.training` keeps the Trainer's latest and best checkpoints; it is removed when the
    output is complete. After an interruption `resume` goes on from there.

    Raises `NumericalError` when training diverges, and `CheckpointError`, `PatternError` or `CalibrationError` for
    anything that cannot work.
    """
    asked_length, settings = settings.length, with_preset(settings)
    method, progress = settings.method, settings.tell
    data: Any = settings.data
    if isinstance(data, str) and data == AUTO:
        data = default_text("calibration")
    require_one_process()
    if method != "full":
        require_peft(f"--method {method}")
    base = Path(settings.pruned)
    manifest = read_manifest(base)
    target = check_output(settings.output, base, settings.overwrite)
    assert target is not None
    work = target.with_name(f"{target.name}.training")
    _check_work(work, settings.resume, settings.overwrite)
    with Transaction(target, settings.overwrite) as transaction:
        device = choose_device(settings.device)
        computing = _computing(settings.dtype, device)
        made = arguments(settings, work, device, computing)
        opened = open_model(base, device=settings.device, trust_remote_code=settings.trust_remote_code)
        text = isinstance(data, str | Corpus)
        if asked_length is None:
            settings = replace(settings, length=min(settings.length, opened.skeleton.positions or settings.length))
        per_step = settings.batch_size * settings.accumulation
        train, held = training_windows(
            data,
            opened.load_tokenizer() if text else None,
            samples=settings.windows if settings.steps is None else settings.steps * per_step,
            length=settings.length if text else asked_length,
            held_out=settings.held_out,
            progress=lambda done, total: progress("packing text", done, total, ""),
        )
        settings = replace(settings, length=train.length)
        for windows in (train, held):
            check_fits(windows, opened.skeleton.vocabulary_size, opened.skeleton.positions)
            check_predictions(windows)
        kind: type[Way] = FullWeights if method == "full" else Adapters
        way = kind(opened, manifest, base, settings)
        settings.announce(forecast(way, train, held, device, computing))
        distill = settings.distill
        asked = {
            "method": method,
            "settings": settings.to_json(),
            "dtype": str(computing).removeprefix("torch."),
            "revision": REVISION,
            "distill": None if distill is None else str(distill),
            "distill_digest": None if distill is None else model_digest(distill),
            "base": {"path": str(base.resolve()), "digest": manifest.digest},
            "data": {"name": data if isinstance(data, str) else None, **train.provenance, "digest": train.digest},
            "held_out": {**held.provenance, "digest": held.digest},
        }
        start = _start(work, asked, settings.resume)

        def measured(model: OpenedModel, name: str) -> Perplexity:
            return perplexity(
                model,
                held,
                batch_size=settings.batch_size,
                progress=lambda stage, done, total: progress(name, done, total, stage),
            )

        before = measured(opened, "perplexity before")
        dense = None if distill is None else _load_dense(settings, opened, computing, device)
        # What is trained is in float32, whatever products are computed in; the weights beside adapters are not trained.
        stored = torch.float32 if method == "full" else computing
        whole = load_whole(base.resolve(), stored, trust_remote_code=settings.trust_remote_code)
        set_seed(settings.seed)  # adapters are drawn at random before the Trainer sets it
        model, callbacks = way.prepare(whole)
        trainer = RecoveryTrainer(
            settings,
            dense,
            model=model,
            args=made,
            train_dataset=Rows(train),
            eval_dataset=Rows(held),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        done = trainer.record()
        result = way.write(model, transaction)
        # Memory: the model was written; a whole one less while the result is measured.
        del model, whole, dense, trainer
        gc.collect()
        after = measured(result, "perplexity after")
        parameters = count_parameters(opened.skeleton.source)
        record = {
            **asked,
            "preset": settings.preset,
            "targets": way.targets if method != "full" else None,
            **done,
            "trainable": way.trainable,
            "parameters": parameters,
            "share": way.trainable / parameters,
            "perplexity": {"before": before.perplexity, "after": after.perplexity},
            "perplexity_error": {
                key: value.to_json()["perplexity_error"] for key, value in (("before", before), ("after", after))
            },
            **run_facts(settings.command, peft=True),
        }
        way.finish(transaction, record, progress)
        transaction.commit()
    shutil.rmtree(work, ignore_errors=True)
    if after.nats >= before.nats:
        way.notes.append("The held-out perplexity did not fall. Try a lower --lr, more steps, or other data.")
    return Recovery(
        output=str(settings.output),
        record=record,
        before=before,
        after=after,
        sparsity_before=manifest.totals["sparsity"],
        sparsity=way.manifest.totals["sparsity"],
        notes=way.notes,
    )


def _load_dense(settings: RecoverSettings, opened: OpenedModel, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The dense model to learn from, frozen. Raises `CheckpointError` when its tokens are others."""
    name = str(settings.distill)
    dense: Any = load_whole(locate(name), dtype, trust_remote_code=settings.trust_remote_code)
    own, held = dense.get_input_embeddings().weight.shape[0], opened.skeleton.vocabulary_size
    if own != held:
        raise CheckpointError(
            f"--distill {name}: has a vocabulary of {own} tokens, the pruned model has {held}. Give the model that it "
            "was pruned from."
        )
    return dense.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


def _computing(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that products are computed in: as asked, or bfloat16 on a GPU that has units for it."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise CheckpointError(f'--dtype: got "{dtype}", expected auto, float32 or bfloat16.')
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if dtype == "bfloat16" or (dtype == "auto" and fast) else torch.float32


def _check_work(work: Path, resume: bool, overwrite: bool) -> None:
    """Raise `CheckpointError` when an unfinished run is in the way, or there is none to resume."""
    last = last_checkpoint(work)
    if resume and last is None:
        raise CheckpointError(f"{work}: no checkpoint to resume from. Start without --resume.")
    if work.exists() and not resume:
        if not (work / STATE).exists():
            raise CheckpointError(f"{work}: exists, and is no unfinished recovery. Choose another output.")
        if last is not None and not overwrite:
            raise CheckpointError(
                f"{work}: an unfinished recovery, saved at step {last.name.rpartition('-')[2]}. Go on with --resume, "
                "or start over with --overwrite."
            )


def _start(work: Path, asked: Mapping[str, Any], resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run, whose settings are noted down in place of an old one's."""
    state = work / STATE
    if not resume:
        with writing(state):
            if work.exists():
                shutil.rmtree(work)
            work.mkdir(parents=True)
            state.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        return None
    held: dict[str, Any] = read_json(state, dict[str, Any], advice="Start over with --overwrite.")
    checked(held, state, _State, advice="Start over with --overwrite.")
    before, now = _comparable(held), _comparable(json.loads(json.dumps(asked)))
    for key, value in now.items():
        if key != "lr" and value != before.get(key):
            raise CheckpointError(
                f"--resume: {key} was {before.get(key)!r} when {work} was begun, and is {value!r} now. Give the same "
                "options (only --lr may change), or start over with --overwrite."
            )
    return last_checkpoint(work)


def _comparable(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a run is resumed; models and texts by their digests."""
    digests = {key: asked[key]["digest"] for key in ("base", "data", "held_out")}
    return {**asked["settings"], **asked, **digests, "settings": None}


class _State(Record):
    """What is read of the settings of an unfinished run."""

    settings: dict[str, Any]
    dtype: str
    distill: str | None
