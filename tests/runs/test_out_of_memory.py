"""A device with too little memory: runs go on with smaller batches, or say what takes less."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
import tiny
from secateur.collect.gradient_pass import ChunkSizes
from secateur.errors import CheckpointError
from secateur.models.flow import backward as backward_module
from secateur.models.flow.calls import Call
from secateur.models.shape.structure import Block
from secateur.record.manifest import cautions, read_manifest
from secateur.runs.events import Event

TOLD = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB."


def small_device(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """Blocks have memory for so many samples at once."""
    of = Call.of

    def limited(self: Call, module: nn.Module, states: torch.Tensor) -> Any:
        if states.shape[0] > fits:
            raise torch.OutOfMemoryError(TOLD)
        return of(self, module, states)

    monkeypatch.setattr(Call, "of", limited)


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options", [{"method": "wanda"}, {"method": "sparsegpt", "within": "site"}, {"method": "gblm"}], ids=str
)
def test_a_run_goes_on_with_half_the_samples_at_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options = {"calibration": tiny.tokens(8), **options}
    secateur.prune(model, output=tmp_path / "two", batch_size=2, **options)
    small_device(monkeypatch, 2)
    with caplog.at_level(logging.WARNING):
        manifest = secateur.prune(model, output=tmp_path / "out", batch_size=8, **options)
    assert caplog.messages == [f"CUDA out of memory. Going on with {size} samples at a time." for size in (4, 2)]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "two")
    assert (manifest.settings["batch_size"], manifest.settings["batch_size_at_first"]) == (2, 8)
    told = cautions(read_manifest(tmp_path / "out"))
    assert told == [
        "The device had too little memory for 8 samples at once, and the run went on with 2: --batch-size 8 "
        "may give other last bits."
    ]
    assert told[0] in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "two", "out"}
    assert secateur.verify(tmp_path / "out").ok


@pytest.mark.parametrize("asked", [4, None])
def test_finished_blocks_are_kept_and_a_later_run_goes_on(
    asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out at the second block, and the power fails at the third."""
    model = tiny.save("llama", tmp_path / "model")
    options: dict[str, Any] = {"calibration": tiny.tokens(4), "batch_size": asked}
    whole, out = tmp_path / "whole", tmp_path / "out"
    first, second, third = (Watch(cut_at) for cut_at in (None, 2, None))
    with monkeypatch.context() as patch:
        first.fail_once(patch)
        secateur.prune(model, output=whole, on_event=first, **options)
    with monkeypatch.context() as patch:
        second.fail_once(patch)
        with pytest.raises(KeyError):
            secateur.prune(model, output=out, on_event=second, **options)
    with pytest.raises(CheckpointError, match=f"settings batch_size was {asked or 'auto'} and is 1"):
        secateur.prune(model, output=out, resume=True, **{**options, "batch_size": 1})
    secateur.prune(model, output=out, resume=True, on_event=third, **options)
    assert [watch.failed for watch in (first, second, third)] == [True, True, False]
    assert first.solved == second.solved + third.solved
    assert len(set(first.solved)) == len(first.solved), "nothing is solved twice"
    assert bytes_of(out) == bytes_of(whole)
    settings = [read_manifest(folder).settings for folder in (out, whole)]
    assert settings[0] == settings[1]
    assert settings[0]["batch_size"] == 2


class Watch:
    """Notes what is solved, lacks memory once in the second block, and ends a run when it reads a certain block."""

    def __init__(self, cut_at: int | None) -> None:
        self.cut_at, self.failed = cut_at, False
        self.solved: list[str | None] = []

    def __call__(self, event: Event) -> None:
        if event.stage == "solve":
            self.solved.append(event.matrix)
        if event.stage == "read" and event.block == self.cut_at:
            raise KeyError

    def fail_once(self, patch: pytest.MonkeyPatch) -> None:
        of = Call.of

        def limited(call: Call, module: nn.Module, states: torch.Tensor) -> Any:
            if module.self_attn.layer_idx == 1 and states.shape[0] == 4 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError(TOLD)
            return of(call, module, states)

        patch.setattr(Call, "of", limited)


def test_gradients_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.save("llama", tmp_path / "model")
    expected = secateur.gradients(model, tmp_path / "one", calibration=tiny.tokens(4), batch_size=1)
    small_device(monkeypatch, 1)
    made = secateur.gradients(model, tmp_path / "out", calibration=tiny.tokens(4), batch_size=4)
    assert caplog.messages == [
        f"CUDA out of memory. Going on with {size} at a time." for size in ("2 samples", "1 sample")
    ]
    first, second = load_file(expected.path), load_file(made.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("asked", [None, 5])
def test_parts_of_the_samples_stay_the_same_whatever_the_batch(
    asked: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the last block but one, so that its sums of half the samples are on the disk."""
    model = tiny.save("llama", tmp_path / "model")
    options: dict[str, Any] = {"calibration": tiny.tokens(8), "dtype": "float64"}
    expected = secateur.gradients(model, tmp_path / "one", batch_size=1, **options)
    monkeypatch.setattr("secateur.collect.gradient_pass.chunk_sizes", lambda *_: ChunkSizes(5, 0, None))
    failed: list[int] = []
    once = backward_module.backward

    def limited(stream: Any, block: Block, batch: int, *rest: Any) -> None:
        if block.index == 1 and len(stream.batches[batch]) > 2:
            failed.append(len(stream.batches[batch]))
            raise torch.OutOfMemoryError(TOLD)
        once(stream, block, batch, *rest)

    monkeypatch.setattr("secateur.collect.block_gradients.backward", limited)
    made = secateur.gradients(model, tmp_path / "out", batch_size=asked, **options)
    assert failed == ([5] if asked else [5, 4])
    first, second = load_file(expected.path), load_file(made.path)
    assert all(torch.allclose(first[name], second[name], rtol=1e-9) for name in first)


def test_where_one_sample_is_too_much_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("llama", tmp_path / "model")
    small_device(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(4), batch_size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_memory_that_a_solver_lacks_is_no_matter_of_batches(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    calls: list[str] = []

    def score(problem: Any) -> torch.Tensor:
        calls.append(problem.name)
        raise torch.OutOfMemoryError(TOLD)

    with pytest.raises(MemoryError, match=r"^model\.layers\.0\.\S+: CUDA out of memory while it was solved$"):
        secateur.prune(model, output=tmp_path / "out", method=secateur.select("hungry", score), batch_size=4)
    assert len(calls) == 1
