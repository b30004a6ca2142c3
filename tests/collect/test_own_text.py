"""Text that a model writes for its own calibration: drawn as stated, kept, packed, and used by every run."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import secateur
from command_line import Call, call, model  # noqa: F401 - fixtures
from real_data import STORIES, byte_pair_tokenizer, some_docs
from secateur.calibration.own_text import OwnText, Written, own_windows
from secateur.calibration.text import Text
from secateur.calibration.windows import Windows
from secateur.collect import author
from secateur.collect.model_windows import model_windows
from secateur.collect.settings import CalibrationSettings
from secateur.errors import CalibrationError, CheckpointError
from secateur.models.opening.opened import open_model

SIZE = ["--samples", "4", "--length", "32"]
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kept texts for each test."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def drawn(source: Any, **options: Any) -> Windows:
    how: dict[str, Any] = {"calibration": "self", "samples": 4, "length": 32, **options}
    return model_windows(open_model(source), CalibrationSettings(**how), progress=lambda done, total: None)


def by_hand(folder: Path, text: int, length: int, seed: int = 0) -> list[int]:
    """A text of the model, token by token: a forward over all of it each time, and a number on the line of chances."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    numbers = random.Random(f"{seed} text {text}")
    ids = [module.config.bos_token_id]
    for place in range(length):
        with torch.no_grad():
            logits = module(torch.tensor([ids])).logits[0, -1].double()
        logits[module.generation_config.eos_token_id] = float("-inf")
        chances = (logits / max(1.0, 2.0 - place / 10)).softmax(dim=0).tolist()
        number, token = numbers.random(), -1
        while number >= 0:
            token += 1
            number -= chances[token]
        ids.append(token)
    return ids


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not on this machine")
def test_what_a_model_writes_is_drawn_from_its_predictions() -> None:
    found = drawn(STORIES, length=24, sampling="document", seed=3, bos="papers")
    assert found.input_ids.tolist() == [by_hand(STORIES, text, 24, seed=3)[:24] for text in range(4)]
    words = AutoTokenizer.from_pretrained(STORIES).decode(found.input_ids.flatten())
    assert " a " in words  # they are stories


def test_the_same_seed_the_same_tokens(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    first = drawn(model)
    (source,) = first.provenance["sources"]
    assert source["corpus"] == "self"
    assert source["temperature"] == {"first": 2.0, "last": 1.0, "falling_tokens": 10}
    assert source["tokens"] >= 4 * 32
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "another"))
    assert drawn(model).digest == first.digest
    assert drawn(model, seed=1).digest != first.digest
    module = AutoModelForCausalLM.from_pretrained(model)
    before = module.generation_config
    assert drawn(module, tokenizer=AutoTokenizer.from_pretrained(model)).digest == first.digest
    assert module.generation_config is before


def test_text_is_written_once(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    first = drawn(model)
    caplog.clear()
    again = drawn(model)
    assert again.digest == first.digest
    (said,) = caplog.messages
    assert re.fullmatch(r"self: the text that this model wrote on \d{4}-\d\d-\d\d is used again\.", said)
    # A copy is the same model; one with another weight is not.
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    caplog.clear()
    drawn(copy)
    assert len(caplog.messages) == 1
    module = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        module.model.norm.weight *= 5
    module.save_pretrained(copy)
    caplog.clear()
    assert drawn(copy).digest != first.digest
    assert not any("is used again" in message for message in caplog.messages)
    for file in (tmp_path / "cache" / "texts").glob("*/*.json"):
        file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"It holds no kept texts, or is damaged: remove it\."):
        drawn(model)


def test_where_nothing_can_be_kept(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file"))
    found = drawn(model)
    assert found.samples == 4
    assert any(message.startswith("Not kept: ") for message in caplog.messages)


# Chats and prompts


def chat_tokenizer() -> Any:
    tokenizer = byte_pair_tokenizer(280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|answer|>"], "eos_token": "<|end|>"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A random model of chats, which ends most texts early."""
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    module = LlamaForCausalLM(config)
    with torch.no_grad():  # the end is likely at times, and ids without a word are as well
        module.lm_head.weight[[tokenizer.eos_token_id, -5, -4, -3, -2, -1]] *= 40
    module.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_a_chat_is_written_through_its_template(chat: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat)
    turn, answer, end = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|answer|>", "<|end|>"])
    opened = open_model(chat)
    asked = OwnText("self", samples=4, length=64, seed=0, whole=False)
    written = author.Author(opened, tokenizer)(asked)
    assert written.chat
    assert written.facts["begins"] == "the user's turn of the chat template"
    assert written.facts["texts_ended"] == sum(ids[-1] == end for ids in written.texts) > 0
    for ids in written.texts:
        assert ids[0] == turn
        assert max(ids) < len(tokenizer)
        place = next(place for place in range(len(ids)) if ids[place : place + 2] == [end, answer])
        assert end not in ids[:place]  # the question has no end but the template's
        assert end not in ids[place + 2 : -1]
        assert ids[-1] == end or len(ids) == 65
    windows = drawn(chat, length=64)
    stream = [token for ids in written.texts for token in ids]
    assert windows.input_ids.flatten().tolist() == stream[: 4 * 64]
    with pytest.raises(CalibrationError, match=r"^self: --sampling document would need answers as long as a window"):
        drawn(chat, sampling="document")
    with pytest.raises(CalibrationError, match=r"takes 4 tokens, and windows have 4, .* Use a --length above 4\.$"):
        drawn(chat, length=4)


def test_prompts_are_answered(chat: Path, model: Path, tmp_path: Path) -> None:  # noqa: F811
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("What is a tree?\n\nName three.\n")
    rows.write_text("".join(json.dumps({"ask": text}) + "\n" for text in ("What is a tree?", "Name three.")))
    found = drawn(model, calibration=f"self:{lines}", seed=1)
    assert found.digest == drawn(model, calibration=f"self:{rows}:ask", seed=1).digest
    (source,) = found.provenance["sources"]
    assert (source["prompts_used"], source["prompts_in_all"]) == (2, 2)
    assert source["temperature"] == {"first": 1.0, "last": 1.0}
    assert source["prompts"]["file"] == str(lines)
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = OwnText(f"self:{lines}", samples=4, length=32, seed=1, whole=False)
    texts = author.Author(open_model(model), tokenizer)(asked).texts
    prompts = [tokenizer(text).input_ids for text in ("What is a tree?", "Name three.")]
    assert all(any(list(ids[: len(own)]) == own for own in prompts) for ids in texts)
    assert all(len(ids) > min(map(len, prompts)) for ids in texts)
    spoken = author.Author(open_model(chat), AutoTokenizer.from_pretrained(chat))(asked).texts
    own = [
        chat_tokenizer()(f"<|turn|>{text}<|end|><|answer|>").input_ids for text in ("What is a tree?", "Name three.")
    ]
    assert all(any(list(ids[: len(start)]) == start for start in own) for ids in spoken)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("self:{}/no.txt", None, r"no\.txt: no such file"),
        ("self:{}/p.txt", "\n", r"p\.txt: no prompt in it\. Write one a line\."),
        (
            "self:{}/p.txt",
            "one\n" + "two " * 30,
            r"prompt 2 has \d+ tokens, and windows have 32, .* or shorter prompts",
        ),
        ("self:{}/p.jsonl", '{"text": "a"}\n', r"p\.jsonl, line 1: no field 'prompt'; fields found: text"),
        ("self:{}/p.csv", "a", r"expected self:FILE\.txt, with a prompt a line, or self:FILE\.jsonl\[:FIELD\]"),
    ],
)
def test_prompts_that_cannot_be(spec: str, content: str | None, message: str, model: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = spec.format(tmp_path)
    if content is not None:
        Path(spec.removeprefix("self:")).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        drawn(model, calibration=spec)
    with pytest.raises(CalibrationError, match=message):
        secateur.estimate(model, calibration=spec, samples=4, length=32)


def test_a_tokenizer_that_begins_nothing(model: Path) -> None:  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token, tokenizer.eos_token = None, "a"
    found = drawn(model, tokenizer=tokenizer)
    assert found.provenance["sources"][0]["begins"] == "EOS, in the place of BOS"
    assert found.input_ids[0, 0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(
        CalibrationError, match=r"^self: the tokenizer \(\w+\) has neither a token .* self:PROMPTS\.txt"
    ):
        drawn(model, tokenizer=tokenizer)


# Windows


class Words:
    """A tokenizer of which only BOS is asked for."""

    bos_token_id = 1


def cut(bos: Any, *texts: list[int], ends: tuple[int, ...] = (2,), whole: bool = False, samples: int = 2) -> Tensor:
    asked = OwnText("self", samples=samples, length=4, seed=0, whole=whole)
    return own_windows(asked, Written(texts, False, ends, {}), Text(Words(), bos))


def test_where_bos_stands_in_windows() -> None:
    texts = ([1, 10, 11, 2], [1, 12, 13, 14, 15, 16], [1, 17, 18])
    assert cut("papers", *texts).tolist() == [[1, 10, 11, 2], [1, 12, 13, 14]]
    assert cut("never", *texts).tolist() == [[10, 11, 2, 12], [13, 14, 15, 16]]
    assert cut("always", *texts).tolist() == [[1, 10, 11, 2], [1, 12, 13, 14]]
    assert cut("always", *texts, samples=3).tolist()[2] == [1, 15, 16, 1]
    # One token that ends a text and begins the next is there once.
    shared = cut("papers", [1, 10, 1], [1, 11, 12, 1], [1, 13, 14], ends=(1,))
    assert shared.tolist() == [[1, 10, 1, 11], [12, 1, 13, 14]]
    whole = ([1, 10, 11, 12, 13], [1, 14, 15, 16, 17])
    assert cut("papers", *whole, whole=True).tolist() == [[1, 10, 11, 12], [1, 14, 15, 16]]
    assert cut("always", *whole, whole=True).tolist() == [[1, 10, 11, 12], [1, 14, 15, 16]]
    assert cut("never", *whole, whole=True).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]


# Runs


def test_every_run_takes_it(model: Path, call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    mixed = ["-c", "0.5*self", "-c", f"0.5*{some_docs()}", "--sampling", "concat", *SIZE]
    before = call("plan", model, *mixed, "--json")
    assert before.code == 0, before.err
    (note,) = [note for note in before.json["notes"] if note.startswith("self: ")]
    assert re.match(
        r"self: the model first writes 64 tokens, in about \d+\.\d s, for which all of it is in memory", note
    )
    assert not (tmp_path / "cache").exists()
    done = call("prune", model, "-o", tmp_path / "out", *mixed, "--json")
    assert done.code == 0, done.err
    assert [source["corpus"] for source in done.json["calibration"]["sources"]] == ["self", some_docs()]
    assert [source["samples"] for source in done.json["calibration"]["sources"]] == [2, 2]
    assert "of text that the model wrote itself, docs.txt" in (tmp_path / "out" / "README.md").read_text()
    after = call("plan", model, *mixed, "--json")
    assert not any("first writes" in note for note in after.json["notes"])
    assert after.json["tokens"] == 128
    taken = call("gradients", model, "-o", tmp_path / "gradients.safetensors", *mixed)
    assert taken.code == 0, taken.err
    assert "is used again" in caplog.messages[-1]
    told = call("eval", model, "--data", "self")
    assert told.code == 2
    assert told.message.startswith("Error: self: is text that a model writes itself, and only calibration text can be")
    with pytest.raises(CalibrationError, match=r"^self: is text that the model writes itself, and no model is known"):
        secateur.calibration_windows("self", AutoTokenizer.from_pretrained(model))


def test_a_sweep_writes_once(model: Path, call: Call, tmp_path: Path) -> None:  # noqa: F811
    evaluation = ["--data", some_docs(), "--eval-length", "32", "--windows", "2"]
    grid = ["sweep", model, "-o", tmp_path / "out", "-m", "magnitude,wanda", "-c", "self", *SIZE, *evaluation]
    dry = call(*grid, "--dry-run")
    assert "self: the model first writes 128 tokens" in dry.err + dry.out
    done = call(*grid)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "cache" / "texts").glob("*/*.json"))) == 1
