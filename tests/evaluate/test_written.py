"""What models write beside what should stand there: against transformers' own generation and plain distances."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import secateur
from command_line import Call, call  # noqa: F401
from secateur.errors import CalibrationError
from secateur.evaluate.written import normaliser
from speech_files import record, save_whisper

SAID = ["a bed", "A bed, sat!", "the desk sat at the desk", "bed", "at a desk"]
needs_jiwer = pytest.mark.skipif(find_spec("jiwer") is None, reason="word error rates need jiwer")
needs_sacrebleu = pytest.mark.skipif(find_spec("sacrebleu") is None, reason="chrF needs sacrebleu")


def plain(text: str) -> list[str]:
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter in " '").split()


def distance(one: list[str], other: list[str]) -> int:
    """Levenshtein's, in words."""
    row = list(range(len(other) + 1))
    for number, word in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, found in enumerate(other, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != found))
    return row[-1]


def recorded(folder: Path, said: list[str]) -> list[numpy.ndarray[Any, Any]]:
    folder.mkdir()
    for number, text in enumerate(said):
        (folder / f"{number}.txt").write_text(text + "\n")
    return [record(folder / f"{number}.wav", 9000 + 700 * number, number) for number in range(len(said))]


def check_word_errors(found: secateur.Labelled, dense: list[str], pruned: list[str]) -> None:
    """All figures, by hand; the errors by the textbook's jackknife with each sample left out in turn."""
    wanted = [plain(text) for text in SAID]
    texts = [[plain(text) for text in own] for own in (dense, pruned)]
    errors = numpy.array([[distance(*pair) for pair in zip(wanted, own, strict=True)] for own in texts])
    words = numpy.array([len(own) for own in wanted])
    rates = errors.sum(1) / words.sum()
    figure = found.figures["wer"]
    assert (figure.dense, figure.pruned) == pytest.approx(tuple(rates))
    assert figure.difference == pytest.approx(rates[1] - rates[0])
    left = (errors.sum(1, keepdims=True) - errors) / (words.sum() - words)
    for values, error in ((left[0], figure.dense_error), (left[1] - left[0], figure.difference_error)):
        count = len(wanted)
        assert error == pytest.approx(((count - 1) / count * ((values - values.mean()) ** 2).sum()) ** 0.5)
    assert found.agreement == pytest.approx(numpy.mean([one == other for one, other in zip(*texts, strict=True)]))
    assert found.provenance["judged_by"]["package"].startswith("jiwer ")


@needs_jiwer
def test_what_whisper_writes(tmp_path: Path) -> None:
    source, out, folder = save_whisper(tmp_path / "whisper"), tmp_path / "out", tmp_path / "sound"
    sounds = recorded(folder, SAID)
    secateur.prune(source, method="magnitude", output=out)
    (found,) = secateur.labelled(source, [out], f"audio:{folder}", batch_size=2)
    extractor, tokenizer = (
        WhisperFeatureExtractor.from_pretrained(source),
        PreTrainedTokenizerFast.from_pretrained(source),
    )
    texts = []
    for model in (source, out):
        module = WhisperForConditionalGeneration.from_pretrained(model).eval()
        features = [extractor(sound, sampling_rate=16000, return_tensors="pt").input_features for sound in sounds]
        ids = [module.generate(own, max_length=24, do_sample=False)[0] for own in features]
        texts.append([tokenizer.decode(own, skip_special_tokens=True) for own in ids])
    assert texts[0] != texts[1]
    check_word_errors(found, *texts)
    assert (found.kl, found.classes) == (None, None)
    shown = found._repr_html_()
    assert "word errors %" in shown
    assert "texts are normalised: lower case, no punctuation" in shown


@needs_jiwer
def test_what_ctc_hears(tmp_path: Path) -> None:
    source, out, folder = tmp_path / "wav2vec2", tmp_path / "out", tmp_path / "sound"
    sounds = recorded(folder, SAID)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abdehkst"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    layers: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [40, 8], "conv_kernel": [80, 16]}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Wav2Vec2Config(
            **sizes, **layers, num_conv_pos_embedding_groups=4, vocab_size=len(letters), initializer_range=0.5
        )
        Wav2Vec2ForCTC(config).save_pretrained(source)
    Wav2Vec2FeatureExtractor().save_pretrained(source)
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    tokenizer.save_pretrained(source)
    secateur.prune(source, method="magnitude", output=out)
    (found,) = secateur.labelled(source, [out], f"audio:{folder}")
    extractor, texts, divergences, logits = Wav2Vec2FeatureExtractor(), [], [], []
    for model in (source, out):
        module = Wav2Vec2ForCTC.from_pretrained(model).eval()
        with torch.no_grad():
            logits.append(
                [module(extractor(own, sampling_rate=16000, return_tensors="pt").input_values).logits for own in sounds]
            )
        texts.append([tokenizer.decode(own[0].argmax(-1), skip_special_tokens=True) for own in logits[-1]])
    for one, other in zip(*logits, strict=True):
        p, q = (own.double().log_softmax(-1) for own in (one, other))
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
    check_word_errors(found, *texts)
    assert found.kl == pytest.approx(numpy.mean(divergences), rel=1e-4)
    assert found.answers_dense == [" ".join(plain(text)) for text in texts[0]]


def test_recordings_of_which_some_have_no_transcript(tmp_path: Path) -> None:
    source, folder = save_whisper(tmp_path / "whisper"), tmp_path / "sound"
    recorded(folder, SAID[:2])
    (folder / "1.txt").unlink()
    (found,) = secateur.labelled(source, [source], f"audio:{folder}")
    assert (found.agreement, found.figures, found.labels) == (1, {}, None)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = save_whisper(tmp_path / "whisper"), tmp_path / "sound"
    recorded(folder, SAID[:2])
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(CalibrationError, match=r'the package jiwer: pip install "secateur\[metrics\]"'):
        secateur.labelled(source, [source], f"audio:{folder}")


def test_texts_are_normalised_as_whispers_authors_do() -> None:
    class English:
        language, english_spelling_normalizer = "english", {"colour": "color"}
        normalize, basic_normalize = staticmethod(str.upper), staticmethod(str.lower)

    class WithoutFile(English):
        english_spelling_normalizer = None

    class German(English):
        language = "german"

    assert normaliser(None, English())[0] == "Whisper's for English"
    name, plain_text = normaliser(None, WithoutFile())
    assert "no normalizer.json" in name
    assert plain_text("Mr. Brown's colour, [music] it's 20!") == "mister brown is colour it is 20"
    assert normaliser(None, German())[1]("Ja") == "ja"
    assert normaliser(None, object())[1]("It's -- A_B!") == "it's a b"


@pytest.fixture
def marian(tmp_path: Path) -> Path:
    folder = tmp_path / "marian"
    words = ["<pad>", "</s>", "<unk>", "ein", "a", "Bett", "bed", "der", "the", "Tisch", "desk", "sat", "and", "never"]
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = MarianConfig(vocab_size=len(words), **sizes, **heads, **ids, init_std=0.5, num_beams=2)
        model = MarianMTModel(config)
        model.generation_config.max_length = 12
        model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


@needs_sacrebleu
def test_what_a_translator_writes(call: Call, marian: Path, tmp_path: Path) -> None:  # noqa: F811
    from sacrebleu import corpus_chrf

    sources = ["ein Bett", "der Tisch", "ein Tisch and der Tisch", "never ein Bett", "der Bett", "ein Tisch"]
    targets = ["a bed", "the desk", "a desk and the desk", "never a bed", "the bed", "a desk"]
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    rows = [{"source": one, "target": other} for one, other in zip(sources, targets, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    secateur.prune(marian, method="magnitude", output=out)
    (found,) = secateur.labelled(marian, [out], f"labelled:{file}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(marian)
    order = sorted(range(6), key=lambda number: -len(sources[number].split()))
    texts = []
    for model in (marian, out):
        module = MarianMTModel.from_pretrained(model).eval()
        given = [torch.tensor([tokenizer(sources[number])["input_ids"]]) for number in order]
        ids = [module.generate(own, do_sample=False)[0] for own in given]
        texts.append([tokenizer.decode(own, skip_special_tokens=True) for own in ids])
    wanted = [targets[number] for number in order]
    assert [found.answers_dense, found.answers, found.labels] == [*texts, wanted]
    scores = [corpus_chrf(own, [wanted]).score for own in texts]
    figure = found.figures["chrf"]
    assert (figure.dense, figure.pruned, figure.difference) == pytest.approx((*scores, scores[1] - scores[0]))
    left = [
        corpus_chrf([*texts[0][:place], *texts[0][place + 1 :]], [[*wanted[:place], *wanted[place + 1 :]]]).score
        for place in range(6)
    ]
    assert figure.dense_error == pytest.approx((5 / 6 * ((left - numpy.mean(left)) ** 2).sum()) ** 0.5)
    shown = call("compare", marian, out, "--data", f"labelled:{file}")
    assert shown.code == 0, shown.err
    assert "chrF" in shown.out
    # The decoder beside the dense one's on the same targets, each token from those before it.
    (row,) = secateur.agreement(marian, [out], f"labelled:{file}")
    divergences = []
    with torch.no_grad():
        for number in order:
            given = {
                "input_ids": torch.tensor([tokenizer(sources[number])["input_ids"]]),
                "labels": torch.tensor([tokenizer(targets[number])["input_ids"]]),
            }
            p, q = (
                MarianMTModel.from_pretrained(model).eval()(**given).logits.double().log_softmax(-1)
                for model in (marian, out)
            )
            divergences.append((p.exp() * (p - q)).sum(-1).flatten())
    assert row.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
