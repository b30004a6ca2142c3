"""Windows drawn by document, from one long sequence and from mixtures: the published loops, token by token."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.calibration import drawing
from secateur.calibration.corpora import load_corpus
from secateur.calibration.drawing import calibration_windows, evaluation_windows
from secateur.errors import CalibrationError
from texts import sentences, shared, write_jsonl


def published_document_loop(documents, tokenizer, samples, length, seed):
    """The sampling of the published code, with the global generator, written anew from its description."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        ids = []
        while len(ids) <= length:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)], verbose=False).input_ids
        start = random.randint(0, len(ids) - length - 1)
        rows.append(ids[start : start + length])
    return torch.tensor(rows)


def published_concat_loop(text, tokenizer, samples, length, seed):
    random.seed(seed)
    ids = tokenizer(text, verbose=False).input_ids
    starts = [random.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.tensor([ids[start : start + length] for start in starts])


# Sampling by document


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize("length", [64, 777])
def test_document_sampling_is_the_published_loop(tokenizer, seed, length):
    documents = load_corpus("python-docs", "calibration").documents
    expected = published_document_loop(documents, tokenizer, 12, length, seed)
    found = calibration_windows("python-docs", tokenizer, samples=12, length=length, seed=seed, sampling="document")
    assert torch.equal(found.input_ids, expected)
    assert torch.equal(
        found.input_ids, calibration_windows("python-docs", tokenizer, samples=12, length=length, seed=seed).input_ids
    )


def test_document_sampling_of_real_c4(stories_tokenizer):
    file = shared("lm/c4_train_1000.jsonl")
    documents = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    expected = published_document_loop(documents, stories_tokenizer, 8, 2048, 0)
    found = calibration_windows(str(file), stories_tokenizer, samples=8)
    assert torch.equal(found.input_ids, expected)
    assert torch.equal(calibration_windows(f"c4:{file}", stories_tokenizer, samples=8).input_ids, expected)
    assert found.provenance["sources"][0]["draws"] > 8


def test_sampling_leaves_the_global_generators_alone(tokenizer):
    random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), torch.get_rng_state()
    calibration_windows(["python-docs", "python-docs"], tokenizer, samples=4, length=32)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_document_of_exactly_the_length_is_not_long_enough(tokenizer, tmp_path):
    text = "the pruning of trees"
    count = len(tokenizer(text).input_ids)
    (tmp_path / "x.txt").write_text(text)
    spec = str(tmp_path / "x.txt")
    with pytest.raises(CalibrationError, match=f"the longest has {count} tokens"):
        calibration_windows(spec, tokenizer, samples=1, length=count)
    found = calibration_windows(spec, tokenizer, samples=3, length=count - 1)
    assert found.input_ids.tolist() == [tokenizer(text).input_ids[:-1]] * 3


def test_giving_up_when_all_documents_are_known_to_be_short(tokenizer, tmp_path):
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(9, seed=1))
    with pytest.raises(
        CalibrationError,
        match=r"x\.jsonl: expected documents of more than 5000 tokens, gave up after \d+ draws with 0 of 2 windows; "
        r"9 of 9 documents tried, the longest has (\d+) tokens\. Use --sampling concat or a --length below \1\.$",
    ):
        calibration_windows(spec, tokenizer, samples=2, length=5000)


def test_giving_up_after_the_draws_are_spent(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "DRAWS_PER_SAMPLE", 5)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(200, seed=1))
    with pytest.raises(CalibrationError, match=r"gave up after 5 draws with 0 of 2 windows; 5 of 200 documents tried"):
        calibration_windows(spec, tokenizer, samples=2, length=5000)


def test_long_texts_are_tokenised_without_a_warning_and_without_touching_the_tokenizer(tokenizer):
    # The tokenizer notes in `deprecation_warnings` that it has warned of a text beyond its limit of 16 tokens.
    before = (tokenizer.model_max_length, dict(tokenizer.deprecation_warnings))
    calibration_windows("python-docs", tokenizer, samples=2, length=64)
    calibration_windows("python-docs", tokenizer, samples=2, length=64, sampling="concat")
    evaluation_windows("python-docs", tokenizer, length=64)
    assert (tokenizer.model_max_length, dict(tokenizer.deprecation_warnings)) == before
    tokenizer("the pruning of trees " * 9)
    assert dict(tokenizer.deprecation_warnings) != before[1], "the warning that must not be there is still made"
    tokenizer.deprecation_warnings.clear()


def test_progress_counts_every_window(tokenizer):
    seen = []
    calibration_windows(
        ["python-docs", "2*python-docs"], tokenizer, samples=6, length=32, progress=lambda *pair: seen.append(pair)
    )
    assert seen == [(done, 6) for done in range(1, 7)]


# Sampling from one long sequence


def test_concat_sampling_is_the_published_loop(tokenizer):
    corpus = load_corpus("python-docs", "calibration")
    expected = published_concat_loop("\n\n".join(corpus.documents), tokenizer, 9, 500, 3)
    found = calibration_windows("python-docs", tokenizer, samples=9, length=500, seed=3, sampling="concat")
    assert torch.equal(found.input_ids, expected)
    assert found.provenance["sources"][0]["whole_corpus"] is True


def test_wikitext2_is_concatenated_with_blanks_unless_asked_otherwise(tokenizer):
    file = shared("lm/wiki.valid.head.raw")
    rows = load_corpus(f"wikitext2:{file}", "calibration").documents
    expected = published_concat_loop(" ".join(rows), tokenizer, 5, 300, 0)
    found = calibration_windows(f"wikitext2:{file}", tokenizer, samples=5, length=300)
    assert torch.equal(found.input_ids, expected)
    assert found.provenance["sources"][0]["sampling"] == "concat"
    with pytest.raises(CalibrationError, match=r"wikitext2: expected documents of more than 3000 tokens"):
        calibration_windows(f"wikitext2:{file}", tokenizer, samples=5, length=3000, sampling="document")


def test_concat_of_a_huge_corpus_reads_a_bounded_seeded_part(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(500, seed=2))
    draw = lambda seed: calibration_windows(spec, tokenizer, samples=4, length=16, seed=seed, sampling="concat")  # noqa: E731
    facts = draw(0).provenance["sources"][0]
    assert facts["whole_corpus"] is False
    assert 64 * 4 * 16 - 2 <= facts["characters"] <= 64 * 4 * 16
    assert draw(0).digest == draw(0).digest != draw(1).digest


def test_concat_of_one_huge_document_takes_a_stretch_of_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    text = " ".join(sentences(400, seed=3))
    (tmp_path / "x.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "x.txt"), "calibration")
    stretch = drawing._random_text(corpus, 5000, seed=1)
    assert len(stretch) == 5000
    assert stretch in text
    assert not text.startswith(stretch)


def test_concat_too_short(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    with pytest.raises(
        CalibrationError,
        match=r"x\.txt: the whole text has \d+ tokens, a window of 100 needs at least 101\. Use a shorter --length or",
    ):
        calibration_windows(str(tmp_path / "x.txt"), tokenizer, samples=2, length=100, sampling="concat")


# Mixtures


def test_mixture_apportions_by_largest_remainder(tokenizer, tmp_path):
    specs = [write_jsonl(tmp_path / f"{name}.jsonl", sentences(40, seed)) for seed, name in enumerate("abc")]
    mixture = [f"0.5*{specs[0]}", f" 0.3 * {specs[1]}", f".2*{specs[2]}"]
    found = calibration_windows(mixture, tokenizer, samples=7, length=20, seed=5)
    sources = found.provenance["sources"]
    assert [source["samples"] for source in sources] == [4, 2, 1]
    assert [source["weight"] for source in sources] == [0.5, 0.3, 0.2]
    parts = [
        calibration_windows(spec, tokenizer, samples=count, length=20, seed=5 + position).input_ids
        for position, (spec, count) in enumerate(zip(specs, [4, 2, 1], strict=True))
    ]
    expected = torch.cat(parts)
    assert sorted(found.input_ids.tolist()) == sorted(expected.tolist())
    assert not torch.equal(found.input_ids, expected)
    assert found.digest == calibration_windows(mixture, tokenizer, samples=7, length=20, seed=5).digest


def test_mixture_of_equal_weights_and_of_one(tokenizer):
    alone = calibration_windows("python-docs", tokenizer, samples=5, length=32)
    assert calibration_windows(["3*python-docs"], tokenizer, samples=5, length=32).digest == alone.digest
    pair = calibration_windows(["python-docs", Path("python-docs")], tokenizer, samples=5, length=32)
    assert [source["samples"] for source in pair.provenance["sources"]] == [3, 2]
    assert len({tuple(row) for row in pair.input_ids.tolist()}) == 5


def test_mixture_with_token_ids(tokenizer, tmp_path):
    ids = torch.arange(4 * 32).reshape(4, 32)
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    spec = str(tmp_path / "x.safetensors")
    found = calibration_windows(["python-docs", spec], tokenizer, samples=6, length=32)
    assert sum(row in ids[:3].tolist() for row in found.input_ids.tolist()) == 3
    with pytest.raises(CalibrationError, match=r"x\.safetensors: 4 windows, expected 5 for its share of the mixture"):
        calibration_windows(["python-docs", spec], tokenizer, samples=10, length=32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"calibration: got no corpus, expected at least one"),
        (
            ["0*python-docs", "python-docs"],
            r"0\*python-docs: got the weight 0, expected a positive number, as in 0\.7\*c4",
        ),
        ("-1*python-docs", r"got the weight -1, expected a positive number"),
        (
            ["0.01*python-docs", "python-docs"],
            r"weight 0\.0099 of 8 samples is less than one window\. Raise the weight",
        ),
        (["python-docs", 3], r"calibration: got int, expected corpus specs, or alone a tensor or Windows"),
        (["python-docs", torch.ones(1, 4).long()], r"calibration: got Tensor, expected corpus specs"),
        (None, r"calibration: got NoneType, expected corpus specs"),
    ],
)
def test_wrong_mixtures(tokenizer, source, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(source, tokenizer, samples=8, length=32)
