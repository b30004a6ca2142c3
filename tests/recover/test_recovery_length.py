"""How long training goes on: by steps, by minutes, until it gets no better, and after an interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
from recoveries import IDS, pruned, tensors, tune
from secateur.errors import CheckpointError, NumericalError, SecateurError
from secateur.recover.settings import PRESETS, RecoverSettings, with_preset
from secateur.recover.training import Budget, last_checkpoint


def test_the_published_settings() -> None:
    # finetune_lm.py and its README: defaults of LoRA, block_size, max_train_samples, learning_rate, one epoch.
    settings = with_preset(RecoverSettings("base", "out"))
    assert (settings.rank, settings.alpha, settings.dropout, settings.lr) == (8, 16, 0.05, 1e-4)
    assert (settings.length, settings.windows, settings.total_steps, settings.held_out) == (1024, 30_000, 30_000, 128)
    assert (settings.schedule, settings.warmup, settings.weight_decay, settings.clip) == ("linear", 0, 0, 1)
    assert with_preset(RecoverSettings("base", "out", batch_size=4, accumulation=2)).total_steps == 3750
    short = RecoverSettings("base", "out", method="full", preset="short", minutes=3)
    assert with_preset(short).total_steps is None
    assert all(set(preset) == {"lora", "sparse-lora", "full"} for preset in PRESETS.values())


def test_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pruned(tmp_path)
    rates = []

    class Spy(Budget):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            rates.append((self.share, kwargs["optimizer"].param_groups[0]["lr"]))

    monkeypatch.setattr("secateur.recover.training.Budget", Spy)
    result = tune(base, tmp_path / "out", steps=None, minutes=0.05)
    assert 3 <= result.record["seconds"] < 6
    assert result.record["steps"] == len(rates)
    shares, learning = zip(*rates, strict=True)
    assert shares[-1] == 1
    # Linear in the time spent; what is seen after a step was set after the one before.
    for before, rate in zip(shares[:-1], learning[1:], strict=True):
        assert rate == pytest.approx(1e-2 * (1 - before), abs=2e-5)
    measured = [point for point in result.record["curve"] if point["perplexity"] is not None]
    assert 2 <= len(measured) <= 11  # once each tenth


def test_patience_and_the_best_checkpoint(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    result = tune(base, tmp_path / "out", lr=0.3, steps=40, eval_every=1, patience=2, schedule="constant", seed=1)
    measured = [point["perplexity"] for point in result.record["curve"]]
    assert result.record["steps"] < 40
    assert result.record["best_step"] == measured.index(min(measured)) + 1 == result.record["steps"] - 2
    assert result.after.perplexity == pytest.approx(min(measured), rel=1e-4)


class StopHere(Exception):  # noqa: N818 - no error
    pass


def stopping(at: int) -> Any:
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "training" and done == at:
            raise StopHere

    return progress


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "sparse-lora", "full"])
def test_resuming_gives_what_an_unbroken_run_gives(tmp_path: Path, method: str) -> None:
    base = pruned(tmp_path)
    options: dict[str, Any] = {
        "method": method,
        "steps": 6,
        "eval_every": 2,
        "dropout": None if method == "full" else 0.1,
    }
    whole = tune(base, tmp_path / "whole", **options)
    with pytest.raises(StopHere):
        tune(base, tmp_path / "out", progress=stopping(5), **options)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.training" / "checkpoint-4").exists()
    with pytest.raises(CheckpointError, match=r"an unfinished recovery, saved at step 4\. Go on with --resume"):
        tune(base, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match=r"--resume: batch_size was 2 when .* was begun, and is 3 now"):
        tune(base, tmp_path / "out", resume=True, **options, batch_size=3)
    result = tune(base, tmp_path / "out", resume=True, **options)
    assert not (tmp_path / "out.training").exists()
    assert (result.record["steps"], len(result.record["curve"])) == (6, 6)
    assert result.after.nats == pytest.approx(whole.after.nats, abs=1e-6)
    ours, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])
    assert result.record["seconds"] > result.record["curve"][3]["seconds"]  # the clock went on, too


def test_a_dense_model_that_changed_is_another_run(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    dense = Path(shutil.copytree(base, tmp_path / "teacher"))
    with pytest.raises(StopHere):
        tune(base, tmp_path / "out", progress=stopping(3), distill=dense, eval_every=2)
    file = dense / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"--resume: distill_digest was '\w{64}' when .* was begun, and is"):
        tune(base, tmp_path / "out", resume=True, distill=dense, eval_every=2)


def test_a_run_that_failed_after_its_last_step(tmp_path: Path) -> None:
    # A full disk, say, while the result is written: what was trained is not lost.
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "perplexity after":
            raise StopHere

    base = pruned(tmp_path)
    with pytest.raises(StopHere):
        tune(base, tmp_path / "out", progress=progress)
    assert not list(tmp_path.glob("out.partial*"))
    result = tune(base, tmp_path / "out", resume=True)
    whole = tune(base, tmp_path / "whole")
    assert result.record["steps"] == 4
    assert result.after.nats == whole.after.nats


def test_a_lower_rate_after_a_diverging_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pruned(tmp_path)
    options: dict[str, Any] = {"steps": 8, "eval_every": 2, "schedule": "constant"}
    with pytest.raises(StopHere):
        tune(base, tmp_path / "out", progress=stopping(3), **options)
    message = r"step \d: the .*loss is (nan|inf): training diverged\. The last good checkpoint is .*checkpoint-\d"
    with pytest.raises(NumericalError, match=message) as caught:
        tune(base, tmp_path / "out", resume=True, **options | {"lr": 1e30})
    kept = last_checkpoint(tmp_path / "out.training")
    assert kept is not None
    assert str(kept) in str(caught.value)
    assert str(caught.value).endswith("Go on from there with --resume and a lower --lr (it was 1e+30).")
    assert all(bool(value.isfinite().all()) for value in tensors(kept).values())
    assert not (tmp_path / "out").exists()
    # The rate of the command is the one that counts, from the first step on, and not the one in the checkpoint.
    rates = []

    class Spy(Budget):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.extend(group["lr"] for group in kwargs["optimizer"].param_groups)

    monkeypatch.setattr("secateur.recover.training.Budget", Spy)
    result = tune(base, tmp_path / "out", resume=True, **options | {"lr": 1e-3})
    assert len(rates) >= 2 * 4
    assert rates == [pytest.approx(1e-3)] * len(rates)
    assert result.record["settings"]["lr"] == 1e-3
    assert result.record["steps"] == 8
    assert secateur.verify(tmp_path / "out").ok


def test_a_diverging_loss_before_anything_was_saved(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    with pytest.raises(NumericalError, match=r"No checkpoint had been saved yet\. Start again with a lower --lr"):
        tune(base, tmp_path / "out", lr=1e30, optimizer="sgd", clip=1e30, steps=40)
    tune(base, tmp_path / "out")  # nothing is in the way


def test_starting_over_with_a_mistake_loses_nothing(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    with pytest.raises(StopHere):
        tune(base, tmp_path / "out", progress=stopping(3), eval_every=1)
    kept = last_checkpoint(tmp_path / "out.training")
    assert kept is not None
    for mistake in ({"data": IDS + 1000}, {"only": ["*.up_pro"]}, {"optimizer": "adamm"}):
        with pytest.raises(SecateurError):
            tune(base, tmp_path / "out", overwrite=True, **mistake)
        assert last_checkpoint(tmp_path / "out.training") == kept
    assert tune(base, tmp_path / "out", overwrite=True).record["steps"] == 4
