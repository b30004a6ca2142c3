"""Models of speech: recordings through the model's own feature extractor, and what is said in them to the decoder."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperFeatureExtractor,
)

import secateur
from plain_forwards import as_transformers_loads_it
from secateur.errors import CalibrationError
from secateur.files.checkpoint import Checkpoint
from secateur.record.verify import verify
from speech_files import record, save_whisper

SAID = ["a bed", "a bed sat", "a bed sat at the desk", "desk"]


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    return save_whisper(tmp_path / "whisper")


@torch.no_grad()
def test_recordings_and_transcripts_are_what_both_stacks_see(whisper: Path, tmp_path: Path) -> None:
    """Statistics by hooks on the plain model, with the pruned blocks before each block in place."""
    folder, out = tmp_path / "sound", tmp_path / "out"
    folder.mkdir()
    extractor, batches = WhisperFeatureExtractor.from_pretrained(whisper), []
    for number, text in enumerate(SAID):
        sound = record(folder / f"{number}.wav", 9000 + 1000 * number, number, channels=1 + number % 2)
        (folder / f"{number}.txt").write_text(text + "\n")
        features = extractor(sound, sampling_rate=16000, return_tensors="pt").input_features
        words = ["a", "bed", "sat", "at", "the", "desk"]
        # Behind the start; the last word is only predicted.
        ids = [1, *(4 + words.index(word) for word in text.split()[:-1])]
        batches.append({"input_features": features, "decoder_input_ids": torch.tensor([ids])})
    settings: dict[str, Any] = {"method": "wanda", "calibration": f"audio:{folder}", "samples": 4}
    planned = secateur.estimate(whisper, **settings)
    manifest = secateur.prune(whisper, output=out, **settings)
    assert set(planned.plan) == set(manifest.matrices)
    assert verify(out, Checkpoint(whisper)).ok
    assert manifest.calibration is not None
    assert (manifest.calibration["samples"], manifest.calibration["transcripts_written"]) == (4, 0)
    model, pruned = as_transformers_loads_it(whisper), dict(as_transformers_loads_it(out).named_parameters())
    blocks = [f"model.encoder.layers.{number}" for number in range(3)]
    blocks += [f"model.decoder.layers.{number}" for number in range(2)]
    seen = set()
    for block in blocks:
        sums: dict[str, torch.Tensor] = {}

        def add(module: nn.Module, args: tuple[torch.Tensor], name: str, sums: dict[str, torch.Tensor] = sums) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

        names = {own: f"{block}.{name}.weight" for name, own in model.get_submodule(block).named_modules()}
        linears = [own for own in names if isinstance(own, nn.Linear)]
        hooks = [own.register_forward_pre_hook(partial(add, name=names[own])) for own in linears]
        for batch in batches:
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for own in linears:
            score = own.weight.abs() * sums[names[own]].sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
            mask = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
            assert torch.equal(pruned[names[own]] != 0, mask), names[own]
            own.weight.mul_(mask)
            seen.add(names[own])
    assert seen == set(manifest.matrices)
    # The same inputs by name, of those samples that have one shape.
    given = {name: torch.cat([batches[0][name]] * 2) for name in batches[0]}
    (same,) = secateur.agreement(whisper, [whisper], given)
    assert (same.kl, same.tokens) == (0, 2)  # of the last token nobody says what follows
    (found,) = secateur.agreement(whisper, [out], f"audio:{folder}")
    dense, sparse = (as_transformers_loads_it(path) for path in (whisper, out))
    divergences = []
    for batch in batches:
        p, q = (own(**batch, use_cache=False).logits.double().log_softmax(-1) for own in (dense, sparse))
        divergences.append((p.exp() * (p - q)).sum(-1).flatten())
    assert found.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)


def test_gradients_of_what_is_said(whisper: Path, tmp_path: Path) -> None:
    """Of the loss of each transcript, through the decoder into the encoder."""
    folder = tmp_path / "sound"
    folder.mkdir()
    model = as_transformers_loads_it(whisper)
    expected = {name: torch.zeros_like(own) for name, own in model.named_parameters()}
    words = ["a", "bed", "sat", "at", "the", "desk"]
    for number, text in enumerate(SAID):
        sound = record(folder / f"{number}.wav", 9000 + 1000 * number, number)
        (folder / f"{number}.txt").write_text(text)
        extractor = WhisperFeatureExtractor.from_pretrained(whisper)
        features = extractor(sound, sampling_rate=16000, return_tensors="pt").input_features
        labels = torch.tensor([[4 + words.index(word) for word in text.split()]])
        model.zero_grad()
        model(input_features=features, labels=labels).loss.backward()
        for name, own in model.named_parameters():
            if own.grad is not None:
                expected[name] += own.grad.abs()
    file = secateur.gradients(
        whisper, tmp_path / "g", calibration=f"audio:{folder}", samples=4, norms=["l1"], device="cpu"
    )
    assert any("encoder" in name for name in file.matrices)
    for name in file.matrices:
        found = file.read(name, secateur.GradientKind("l1")).total
        assert float((found - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name


def test_residual_targets_are_found_in_both_stacks(whisper: Path, tmp_path: Path) -> None:
    """Those of Whisper's layers that its code adds to the hidden states, in a run and in its dry run."""
    for number, text in enumerate(SAID):
        record(tmp_path / f"{number}.wav", 9000 + 1000 * number, number)
        (tmp_path / f"{number}.txt").write_text(text + "\n")
    settings: dict[str, Any] = {"method": "sparsegpt", "within": "site", "targets": "residual"}
    settings["calibration"] = f"audio:{tmp_path}"
    assert secateur.estimate(whisper, **settings).plan
    manifest = secateur.prune(whisper, output=tmp_path / "out", **settings)
    encoding, decoding = {"self_attn.out_proj", "fc2"}, {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"}
    for block in manifest.blocks:
        added = {name.removeprefix(f"{block['path']}.").removesuffix(".weight") for name in block["residual_writers"]}
        assert added == (encoding if ".encoder." in block["path"] else decoding), block["path"]


def test_what_is_said_is_written_by_the_model_where_nobody_has(
    whisper: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "sound"
    folder.mkdir()
    record(folder / "some.wav", 9000, 0)
    settings: dict[str, Any] = {"method": "wanda", "calibration": f"audio:{folder}", "output": tmp_path / "out"}
    with caplog.at_level(logging.WARNING, "secateur"):
        manifest = secateur.prune(whisper, **settings)
    assert "1 of 1 recordings have no transcript" in caplog.text
    assert manifest.calibration is not None
    assert manifest.calibration["transcripts_written"] == 1
    settings["output"] = tmp_path / "none"
    record(folder / "other.wav", 9000, 0, rate=8000)
    with pytest.raises(CalibrationError, match=r"other.wav: has 8,000 values per second, and the model hears 16,000"):
        secateur.prune(whisper, **settings)
    (folder / "other.wav").write_bytes(b"RIFF, not at all")
    with pytest.raises(CalibrationError, match=r"other.wav: cannot be read as sound"):
        secateur.prune(whisper, **settings)
    with pytest.raises(CalibrationError, match=r"nowhere: no such folder. Give a folder of .wav and .flac files"):
        secateur.prune(whisper, **{**settings, "calibration": "audio:nowhere"})
    with pytest.raises(CalibrationError, match=r"WhisperForConditionalGeneration hears recordings"):
        secateur.prune(whisper, **{**settings, "calibration": "c4"})
    given = {"input_features": torch.zeros(2, 16, 100), "decoder_input_ids": torch.ones(3, 4, dtype=torch.int64)}
    with pytest.raises(CalibrationError, match=r"expected tensors that all have the same number of samples"):
        secateur.prune(whisper, **{**settings, "calibration": given})


def test_an_encoder_of_sound(tmp_path: Path) -> None:
    """Recordings of two lengths: nothing is padded."""
    source, folder = tmp_path / "wav2vec2", tmp_path / "sound"
    layers: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **layers, num_conv_pos_embedding_groups=4)).save_pretrained(source)
    Wav2Vec2FeatureExtractor().save_pretrained(source)
    folder.mkdir()
    for number, values in enumerate((800, 1000)):
        record(folder / f"{number}.wav", values, number)
    manifest = secateur.prune(source, method="wanda", calibration=f"audio:{folder}", output=tmp_path / "out")
    frames = sum((((values - 10) // 5 + 1) - 8) // 4 + 1 for values in (800, 1000))
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {frames}
    (found,) = secateur.similarity(source, [tmp_path / "out"], f"audio:{folder}")
    assert 0 < found.cosine < 1
    assert found.tokens == frames
