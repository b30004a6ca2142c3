"""Texts and token ids that Python code has in memory: the same windows in whatever they come."""
# ruff: noqa: E501 - one form, one mistake a line

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

import secateur
from command_line import model  # noqa: F401 - a fixture
from secateur.calibration.drawing import calibration_windows, evaluation_windows
from secateur.errors import CalibrationError
from texts import sentences, write_jsonl

ROWS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]])
MASK = (IDS != 0).long()
LEFT = {"input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10], [0, 11, 12, 13]]), "attention_mask": MASK.flip(1)}
TOKENS = secateur.Windows(IDS, {}, MASK)


def table(columns: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def endless(rows: list[Any]) -> Iterator[Any]:
    while True:
        yield from rows


class Rows(torch.utils.data.Dataset):
    """A data set as many scripts write it: it has items and a length, and nothing to iterate over."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor(ROWS[at]), "labels": torch.tensor(ROWS[at])}


GIVEN_TOKENS: dict[str, Callable[[], Any]] = {
    "rows": lambda: ROWS,
    "rows as tensors": lambda: [torch.tensor(row) for row in ROWS],
    "what a tokenizer returns": lambda: {"input_ids": ROWS},
    "padded": lambda: {"input_ids": IDS, "attention_mask": MASK},
    "padded on the left, as numpy": lambda: {key: value.numpy() for key, value in LEFT.items()},
    "dictionaries": lambda: [{"input_ids": row} for row in ROWS],
    "Dataset": lambda: table({"text": ["a"] * 3, "input_ids": ROWS}),
    "Dataset of tensors": lambda: table({"input_ids": ROWS}).with_format("torch"),
    "IterableDataset": lambda: table({"input_ids": ROWS}).to_iterable_dataset(),
    "DataLoader": lambda: DataLoader(
        table({k: v.tolist() for k, v in LEFT.items()}).with_format("torch"), batch_size=2
    ),
    "an endless stream": lambda: endless(ROWS),
    "DataFrame": lambda: pandas.DataFrame({"input_ids": ROWS}),
    "a data set of torch": lambda: Rows(),
}


@pytest.mark.parametrize("form", GIVEN_TOKENS)
def test_the_same_token_ids_in_whatever_they_come(form: str) -> None:
    found = calibration_windows(GIVEN_TOKENS[form](), None, samples=3)
    assert found.digest == TOKENS.digest
    assert found.lengths == [4, 2, 3]
    assert found.provenance["source"] == "rows"
    assert {key: found.provenance[key] for key in ("samples", "shortest", "tokens")} == {
        "samples": 3,
        "shortest": 2,
        "tokens": 9,
    }
    json.dumps(dict(found.provenance))


def test_batches_without_names_and_the_pairs_of_the_published_loaders() -> None:
    ids = torch.arange(5, 21).view(4, 4)
    expected = calibration_windows(ids, None).digest
    labels = torch.full((1, 4), -100)
    for given in (ids.numpy(), DataLoader(TensorDataset(ids), batch_size=3), [(row.view(1, 4), labels) for row in ids]):
        assert calibration_windows(given, None).digest == expected
    # Of what is iterated over as many rows as windows are usual; what is a list is there as a whole.
    many = torch.ones(200, 2, dtype=torch.int64)
    assert calibration_windows(DataLoader(many, batch_size=7), None).samples == 128
    assert calibration_windows(many.tolist(), None).samples == 200
    assert evaluation_windows(DataLoader(many, batch_size=7), None).samples == 200


TEXTS = sentences(30, 1)
GIVEN_TEXTS: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "mapping": lambda: {"text": TEXTS},
    "Dataset": lambda: table({"url": ["u"] * 30, "text": TEXTS}),
    "column": lambda: table({"content": TEXTS})["content"],
    "IterableDataset": lambda: table({"text": TEXTS}).to_iterable_dataset(),
    "DataLoader": lambda: DataLoader(table({"text": TEXTS}), batch_size=4),
    "DataFrame": lambda: pandas.DataFrame({"text": TEXTS}),
    "generator": lambda: (text for text in TEXTS),
}


@pytest.mark.parametrize("form", GIVEN_TEXTS)
def test_texts_in_memory_are_drawn_like_those_of_a_file(form: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    for how in ({"length": 40}, {"length": 25, "sampling": "concat", "seed": 3}):
        found, expected = (
            calibration_windows(source, tokenizer, samples=6, **how) for source in (GIVEN_TEXTS[form](), file)
        )
        assert found.digest == expected.digest
    found, expected = (evaluation_windows(source, tokenizer, length=50) for source in (GIVEN_TEXTS[form](), file))
    assert found.digest == expected.digest
    (source,) = found.provenance["sources"]
    assert "sha256" not in source
    assert source["tokens"] == expected.provenance["sources"][0]["tokens"]


def test_a_list_of_names_stays_one(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    mixed = calibration_windows([f"0.5*{file}", "0.5*python-docs"], tokenizer, samples=4, length=32)
    assert [source["corpus"] for source in mixed.provenance["sources"]] == [file, "python-docs"]
    with pytest.raises(CalibrationError, match=r"^unknown corpus 'wikitxt2'. Did you mean wikitext2\?"):
        calibration_windows(["wikitxt2"], tokenizer)
    odd = ["Please read the whole of readme.txt", *TEXTS]
    with pytest.raises(CalibrationError, match=re.escape("If all of them are texts, give source={'text': texts}.")):
        calibration_windows(odd, tokenizer)
    assert calibration_windows({"text": odd}, tokenizer, samples=2, length=32).samples == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "calibration: got int, expected the name of a corpus, a list of texts, token ids (a tensor, rows, Windows), a"),
        ([1, 2], "calibration: list, item 0: got token ids of shape () and torch.int64, expected (length,) or (samples,"),
        ([None], "calibration: list, item 0: got NoneType, expected a text or token ids."),
        (iter([]), "calibration: the list_iterator is empty, expected at least one text or row of token ids."),
        ([[1, 2], []], "calibration: list, item 1: has no tokens. Leave it out."),
        ([[0.5]], "calibration: list, item 0: got token ids of shape (1,) and torch.float32"),
        ({"labels": [1]}, "calibration: dict, item 0: no field 'text'; fields found: labels."),
        ([{"input_ids": [1]}, {"ids": [1]}], "calibration: list, item 1: no 'input_ids'; found: ids."),
        (
            [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}],
            "calibration: list, item 0: attention_mask: row 0, position 1: padding lies between tokens",
        ),
        ({"input_ids": IDS, "attention_mask": MASK[:2]}, "calibration: dict, item 0: attention_mask has 2 rows, expected 3 as in"),
        ([(torch.ones(1, 2), torch.ones(1, 2))], "item 0: got 2 tensors, and only token ids have no name. Give mappings"),
        (["two words", 3], "calibration: list, row 1: got int, expected text."),
        (table({"content": ["a"]}), "calibration: datasets.Dataset: no field 'text'; fields found: content. Name one of them"),
        (datasets.DatasetDict({"train": table({"text": ["a"]})}), "got datasets.DatasetDict with train. Give one of them, such as"),
        (table({"messages": [[{"role": "user", "content": "a"}]]}), "no field 'text', but 'messages'. Chats are not read as"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken(given: Any, message: str, model: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(CalibrationError, match=re.escape(message)):
        secateur.prune(model, method="wanda", calibration=given, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_call_takes_them(model: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each the same in memory and from a file: to the last bit where a checkpoint is made."""
    file, texts = write_jsonl(tmp_path / "texts.jsonl", TEXTS), {"text": TEXTS}
    how: dict[str, Any] = {"samples": 4, "length": 32, "sampling": "concat"}

    def pruned(name: str, calibration: Any, **options: Any) -> tuple[bytes, Any]:
        manifest = secateur.prune(model, method="wanda", calibration=calibration, output=tmp_path / name, **options)
        return (tmp_path / name / "model.safetensors").read_bytes(), manifest.calibration

    weights, record = pruned("of file", file, **how)
    own, own_record = pruned("of texts", table(texts), **how)
    assert own == weights
    assert own_record["digest"] == record["digest"]
    assert own_record["sources"][0]["corpus"] == "texts of a datasets.Dataset"
    drawn = calibration_windows(texts, AutoTokenizer.from_pretrained(model), **how)
    again, rows = pruned("of rows", DataLoader(TensorDataset(drawn.input_ids), batch_size=3), samples=4)
    assert again == weights
    assert (rows["digest"], rows["rows_of"], rows["samples"]) == (record["digest"], "DataLoader", 4)

    assert secateur.estimate(model, method="wanda", calibration=TEXTS, **how).tokens == 4 * 32
    held = secateur.gradients(model, tmp_path / "g.safetensors", calibration=(text for text in TEXTS), **how)
    assert held.provenance["tokens_digest"] == record["digest"]
    plan = secateur.allocate(model, allocation="owl", pattern="50%", calibration=TEXTS, output=tmp_path / "plan", **how)
    assert plan.record["held_out"]["windows"] == 1

    windows: dict[str, Any] = {"length": 32, "windows": 3}
    measured = [secateur.perplexity(model, text, **windows) for text in (file, TEXTS)]
    assert measured[0].window_nats == measured[1].window_nats
    assert (measured[0].data, measured[1].data) == (file, "texts of a list")
    (beside,) = secateur.agreement(model, [tmp_path / "of file"], table(texts), **windows)
    assert beside.window_nats_dense == pytest.approx(measured[0].window_nats, abs=1e-5)
    swept = secateur.sweep(
        model, methods=["wanda"], calibration=iter(TEXTS), data={"mine": TEXTS}, output=tmp_path / "sweep",
        eval_length=32, windows=3, **how,
    )  # fmt: skip
    assert swept.dense["mine"]["digest"] == measured[0].digest
    assert swept.settings["digests"]["calibration"] == record["digest"]
    assert not swept.failed
    tuned = secateur.reconstruct(
        tmp_path / "of file", model, epochs=1, calibration=TEXTS, output=tmp_path / "tuned", **how
    )
    assert tuned.recovery is not None
    assert tuned.recovery["calibration"]["digest"] == record["digest"]


def test_numbers_of_numpy_are_counted_as_tokens() -> None:
    found = calibration_windows(numpy.array([[1, 2], [3, 4]], dtype=numpy.uint16), None)
    assert found.input_ids.tolist() == [[1, 2], [3, 4]]
