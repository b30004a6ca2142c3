"""Evaluation: one text, cut without overlap, of which a few windows need only the start."""

from pydoc_data.topics import topics

import pytest
import torch

from secateur.calibration import drawing
from secateur.calibration.drawing import evaluation_windows
from secateur.errors import CalibrationError
from texts import NAMES, sentences, shared, write_jsonl


def test_evaluation_is_one_call_cut_without_overlap(tokenizer):
    ids = tokenizer("\n\n".join(topics[name] for name in NAMES[::10]), verbose=False).input_ids
    found = evaluation_windows("python-docs", tokenizer, length=100)
    assert found.input_ids.shape == (len(ids) // 100, 100)
    assert found.input_ids.flatten().tolist() == ids[: len(ids) // 100 * 100]
    assert found.provenance["tokens_dropped"] == len(ids) % 100
    assert (found.input_ids == 0).sum() == 1, "one <s>, at the very start"
    assert torch.equal(
        evaluation_windows("python-docs", tokenizer, length=100, windows=3).input_ids, found.input_ids[:3]
    )
    assert evaluation_windows("python-docs", tokenizer, length=100, windows=10**6).digest == found.digest


@pytest.fixture(params=[200_000, pytest.param(None, marks=pytest.mark.slow)], ids=["start", "whole"])
def wikitext(request, tmp_path):
    """The official test file of WikiText-2, or its start."""
    file = tmp_path / "wiki.test.raw"
    text = shared("lm/wiki.test.raw").read_text(encoding="utf-8")[: request.param]
    file.write_text(text[: text.rindex("\n") + 1], encoding="utf-8")
    return file


def test_evaluation_of_the_official_wikitext_test_file(stories_tokenizer, wikitext):
    file = wikitext
    rows = [("" if not line.strip() else line + "\n") for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    ids = stories_tokenizer("\n\n".join(rows), verbose=False).input_ids
    found = evaluation_windows(f"wikitext2:{file}", stories_tokenizer, length=512)
    assert found.input_ids.flatten().tolist() == ids[: len(ids) // 512 * 512]
    plain = evaluation_windows(str(file), stories_tokenizer, length=512)
    assert plain.samples == len(stories_tokenizer(file.read_text(encoding="utf-8"), verbose=False).input_ids) // 512
    assert plain.samples < found.samples


def test_a_few_windows_of_a_long_text_need_only_its_start(stories_tokenizer, wikitext, monkeypatch):
    file = wikitext
    whole = evaluation_windows(str(file), stories_tokenizer, length=128)
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    part = evaluation_windows(str(file), stories_tokenizer, length=128, windows=9)
    assert torch.equal(part.input_ids, whole.input_ids[:9])
    assert part.provenance["sources"][0]["characters"] == 64 * 128 * 9


def test_a_start_of_few_tokens_is_not_trusted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    monkeypatch.setattr(drawing, "CHARACTERS_PER_TOKEN", 1)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(50, seed=4))
    found = evaluation_windows(spec, tokenizer, length=100, windows=2)
    ids = tokenizer("\n\n".join(sentences(50, seed=4)), verbose=False).input_ids
    assert found.input_ids.flatten().tolist() == ids[:200]


def test_c4_evaluation_gives_256_windows_unless_asked_otherwise(tokenizer, tmp_path):
    spec = f"c4:{write_jsonl(tmp_path / 'x.jsonl', sentences(1100, seed=5))}"
    assert evaluation_windows(spec, tokenizer, length=32).samples == 256
    assert evaluation_windows(spec, tokenizer, length=32, windows=300).samples == 300


def test_evaluation_errors(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    with pytest.raises(CalibrationError, match=r"x\.txt: the whole text has \d+ tokens, one window needs 64\. Use a"):
        evaluation_windows(str(tmp_path / "x.txt"), tokenizer, length=64)
    with pytest.raises(CalibrationError, match=r"evaluation: got list, expected one corpus, a tensor or Windows"):
        evaluation_windows(["python-docs", "python-docs"], tokenizer)
    with pytest.raises(CalibrationError, match=r"--windows: got 0, expected at least 1"):
        evaluation_windows("python-docs", tokenizer, windows=0)


def test_exact_fit_is_one_window(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    ids = tokenizer("a short text").input_ids
    assert evaluation_windows(str(tmp_path / "x.txt"), tokenizer, length=len(ids)).input_ids.tolist() == [ids]
