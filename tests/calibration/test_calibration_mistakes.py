"""Calibration that does not fit the model is refused before anything is written."""

# ruff: noqa: F811 - fixtures of another file

import re
import shutil
from pathlib import Path

import torch

import tiny
from refused_runs import (
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError


def test_an_empty_corpus(model: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("")
    refused(
        CalibrationError,
        f"{file}: the file is empty, expected text. Was its download cut off?",
        model,
        calibration=str(file),
        tokenizer=object(),
    )
    file.write_text(" \n \n")
    refused(
        CalibrationError,
        f"{file}: no text in its 0 documents, expected at least one that is not blank.",
        model,
        calibration=str(file),
        tokenizer=object(),
    )


def test_text_without_a_tokenizer(model: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("Some words.\n" * 100)
    refused(
        CalibrationError,
        f"{file}: text needs a tokenizer, got None. Pass the model's tokenizer, or token ids: "
        "a (samples, length) tensor or a .safetensors file with the key 'input_ids'.",
        model,
        calibration=str(file),
    )


def test_a_tokenizer_that_is_damaged(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "corpus.txt").write_text("Some words.\n" * 100)
    (model / "tokenizer.json").write_text("{}")
    refused(
        CheckpointError,
        re.compile(re.escape(f"{model}: its tokenizer cannot be loaded: ") + ".+", re.DOTALL),
        model,
        calibration=str(tmp_path / "corpus.txt"),
    )


def test_token_ids_outside_the_vocabulary(model: Path, refused: Refused) -> None:
    ids = tiny.tokens()
    ids[2, 5], ids[3, 1] = 128, -1
    refused(
        CalibrationError,
        "sample 2, position 5: token id 128 is outside the vocabulary of 128 ids (2 such ids in all); "
        "does the tokenizer belong to this model?",
        model,
        calibration=ids,
    )


def test_windows_longer_than_the_positions(model: Path, refused: Refused) -> None:
    refused(
        CalibrationError,
        "windows of 65 tokens, and the model has 64 positions. Use --length 64 or less.",
        model,
        calibration=tiny.tokens(2, 65),
    )


def test_numbers_of_samples(model: Path, refused: Refused) -> None:
    refused(CalibrationError, "--samples: got 0, expected at least 1.", model, samples=0)
    refused(CalibrationError, "--length: got -1, expected at least 1.", model, length=-1)
    for size in (0, -1):
        refused(CalibrationError, f"--batch-size: got {size}, expected at least 1.", model, batch_size=size)


def test_experts_that_saw_no_token(models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(shutil.copytree(models / "mixtral", tmp_path / "model"))
    ids = tiny.tokens(1, 1)
    with torch.no_grad():
        routers = tiny.build("mixtral")(ids, output_router_logits=True, use_cache=False).router_logits
    unseen = sorted({0, 1, 2, 3} - set(routers[0].topk(2).indices.flatten().tolist()))
    experts = [f"model.layers.0.block_sparse_moe.experts.{expert}" for expert in unseen]
    one, other = experts
    refused(
        ModelStructureError,
        f"{one}.w1.weight, {one}.w3.weight, {other}.w1.weight and 3 more: saw no token of the 1 calibration samples, "
        "so nothing is known of their inputs. Calibrate on more samples (--samples), prune them by magnitude (--unseen "
        "magnitude), or leave them dense (--unseen skip).",
        folder,
        calibration=ids,
    )
    refused(
        ModelStructureError,
        f"{other}.w2.weight: saw no token of the 1 calibration samples, so nothing is known of its inputs. "
        "Calibrate on more samples (--samples), prune it by magnitude (--unseen magnitude), or leave it dense "
        "(--unseen skip).",
        folder,
        calibration=ids,
        only=[f"{other}.w2"],
    )
