"""`reconstruct` refuses what cannot work, says why, and leaves nothing behind."""

from __future__ import annotations

import io
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
import tiny
from pruned_blocks import pruned_model
from pruned_checkpoints import file_hashes
from secateur.errors import CalibrationError, CheckpointError, NumericalError, PatternError
from secateur.record.manifest import file_digests, read_manifest
from secateur.report.recovery import block_tables
from tuned_blocks import assert_only_tuned, assert_refused, losses, run, tuned


def changed(folder: Path, name: str, target: Path) -> Path:
    """A copy of a checkpoint in which one number of a tensor is another."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_another_dense_model_is_named(name, llama, tmp_path):
    other = changed(llama.parent / "dense", name, tmp_path / "other")
    message = rf"other: {re.escape(name)} is not what .*pruned was made from \(sha256 .*\(--dense\)\.$"
    assert_refused(CheckpointError, message, llama, tmp_path, dense=other)


def test_a_dense_model_of_another_shape(llama, tmp_path):
    tiny.save("llama_bias", tmp_path / "bias")
    tiny.save("gpt2", tmp_path / "gpt2")
    assert_refused(
        CheckpointError, r"gpt2: has no tensor \S+, which .*pruned has", llama, tmp_path, dense=tmp_path / "gpt2"
    )
    config = tiny.ARCHITECTURES["llama"]()
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    message = r"wide: model\.layers\.0\.mlp\.\S+ is \(\d+, \d+\) torch\.float32, and .*pruned has \(\d+, \d+\)"
    assert_refused(CheckpointError, message, llama, tmp_path, dense=tmp_path / "wide")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_pruned_checkpoint_that_was_altered(name, llama, tmp_path):
    altered = changed(llama, name, tmp_path / "altered")
    message = rf"^{re.escape(name)}: its bytes in .*altered differ from those that were written"
    assert_refused(CheckpointError, message, altered, tmp_path)


def test_a_dense_model_that_has_moved(tmp_path):
    pruned = pruned_model("llama", tmp_path)
    (tmp_path / "dense").rename(tmp_path / "elsewhere")
    assert_refused(
        CheckpointError, r"The manifest of .* names it as the dense model; if it has moved", pruned, tmp_path
    )
    tuned(pruned, dense=tmp_path / "elsewhere")


def test_a_module_in_memory_names_no_dense_model(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "dense")
    secateur.prune(model, method=secateur.magnitude(), output=tmp_path / "pruned")
    assert_refused(CheckpointError, r"was pruned from a module in memory", tmp_path / "pruned", tmp_path)
    manifest = tuned(tmp_path / "pruned", dense=tmp_path / "dense")
    assert all(after < before for before, after in losses(manifest))


def test_a_folder_that_was_not_pruned(llama, tmp_path):
    assert_refused(CheckpointError, r"no secateur\.json in it", llama.parent / "dense", tmp_path)


def test_an_output_that_is_the_dense_model(llama, tmp_path):
    dense = shutil.copytree(llama.parent / "dense", tmp_path / "dense")
    manifest = read_manifest(llama)
    manifest.files, manifest.headers = file_digests(dense), {file.name: "" for file in dense.glob("*.safetensors")}
    manifest.write(dense)  # as if Secateur had written it, which may be overwritten
    with pytest.raises(CheckpointError, match="the output is the source"):
        run(llama, dense, dense=dense, overwrite=True)


def test_a_block_that_diverges_keeps_its_best_weights(tmp_path):
    pruned = pruned_model("llama", tmp_path)
    manifest = tuned(pruned, learning_rate=1e38)
    assert manifest.recovery is not None
    assert [(record["diverged"], record["best_epoch"]) for record in manifest.recovery["blocks"]] == [(1, 0)] * 3
    console = Console(width=200, file=io.StringIO())
    console.print(block_tables(manifest, "out"))
    assert "block 2: the loss was not finite in epoch 1, and the best weights until then were kept" in (
        console.file.getvalue()  # type: ignore[attr-defined]
    )
    assert_only_tuned(tmp_path)


@pytest.mark.parametrize("existing", [False, True])
def test_a_loss_that_is_not_finite_before_anything_is_tuned(existing, llama, tmp_path, monkeypatch):
    if existing:
        run(llama, tmp_path / "out")
        kept = file_hashes(tmp_path / "out")
    before = set(tmp_path.iterdir())
    message = r"^model\.layers\.0: the loss on held-out samples is nan before anything is tuned\. Use --dtype float32"
    monkeypatch.setattr("secateur.recover.block_tuning._Loss.held_out", lambda self, copies, states: math.nan)
    with pytest.raises(NumericalError, match=message):
        run(llama, tmp_path / "out", overwrite=existing)
    assert set(tmp_path.iterdir()) == before
    assert not existing or file_hashes(tmp_path / "out") == kept


def test_a_dense_model_whose_outputs_are_not_finite(tmp_path):
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(math.inf)
    model.save_pretrained(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", method=secateur.magnitude(), output=tmp_path / "pruned")
    message = r"^model\.layers\.0: the dense model's own outputs are not finite"
    assert_refused(NumericalError, message, tmp_path / "pruned", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, r"^1 calibration sample with --held-out 0\.25: none is left to train on\. Use more --samples"),
        ({"epochs": 0}, r"^--epochs: got 0, expected at least 1"),
        ({"step": 0}, r"^--batch-size: got 0"),
        ({"patience": 0}, r"^--patience: got 0"),
        ({"batch_size": 0}, r"^--batch-size: got 0"),
        ({"learning_rate": 0.0}, r"^--lr: got 0, expected a positive number"),
        ({"learning_rate": math.nan}, r"^--lr: got nan"),
        ({"minutes": 0}, r"^--minutes: got 0, expected a positive number"),
        ({"held_out": 1.0}, r"^--held-out: got 1\.0, expected a share between 0 and 1"),
        ({"targets": "sparse"}, r'^--targets: got "sparse", expected dense or pruned'),
    ],
)
def test_settings_that_make_no_sense(changes, message, llama, tmp_path):
    assert_refused(CalibrationError, message, llama, tmp_path, **changes)


def test_a_glob_that_matches_nothing(llama, tmp_path):
    assert_refused(
        PatternError, r'--only "\*\.nothing" matches none of 21 matrices', llama, tmp_path, only=["*.nothing"]
    )


@pytest.mark.parametrize("stage", ["record", "dense", "tune", "forward", "write"])
def test_a_run_that_is_interrupted_leaves_finished_blocks(stage, llama, tmp_path):
    def interrupt(event: secateur.Event) -> None:
        if event.stage == stage:
            raise KeyboardInterrupt(stage)

    where = {"on_event": interrupt, "offload_states": str(tmp_path)}
    assert_refused(KeyboardInterrupt, stage, llama, tmp_path, kept=stage == "write", **where)
