"""Files that anybody may have written: every kind of damage is one clear error."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from secateur.errors import CalibrationError, CheckpointError
from secateur.files.reading import DEPTH, open_regular, parse_json, read_json, read_text, read_yaml


@dataclass
class Entry:
    name: str
    count: int
    parts: dict[str, list[int]] = field(default_factory=dict)


def test_a_json_file_becomes_its_type(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"name": "Ähre", "count": 3, "parts": {"x": [1]}, "later": true}', encoding="utf-8")
    assert read_json(file, Entry) == Entry("Ähre", 3, {"x": [1]})
    assert read_json(file) == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not JSON|deep"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"more than {DEPTH} deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, f"more than {DEPTH} deep"),
        ("{", "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[]", r"Expected `object`, got `array`"),
        ('{"name": 1, "count": 1}', r"Expected `str`, got `int` - at `\$.name`"),
        ('{"name": "a"}', "missing required field `count`"),
        ('{"name": "a", "count": 1, "parts": {"x": 3}}', r"\$.parts\[...\]"),
    ],
)
def test_damaged_json_is_an_error_that_names_file_and_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=words) as error:
        read_json(file, Entry, advice="Download it again.")
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith("Download it again.")


def test_json_may_be_as_deep_as_the_limit() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH, "here") is not None


def test_only_regular_files_within_the_limit_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a pipe, expected a regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_text(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text(Path("a\0b"))
    (tmp_path / "long").write_text("x" * 101)
    with pytest.raises(CalibrationError, match="has 101 bytes, and at most 100"):
        read_text(tmp_path / "long", limit=100, error=CalibrationError)
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r", line 1: not UTF-8 text \(byte 0"):
        read_text(tmp_path / "latin")


def test_yaml_values_stay_text_and_ordinary_aliases_work(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("pattern: 2:4\nfirst: &x [a, 1.50]\nsecond: *x\n")
    assert read_yaml(file) == {"pattern": "2:4", "first": ["a", "1.50"], "second": ["a", "1.50"]}
    file.write_text("")
    assert read_yaml(file) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "only:\n  - &a [x, x]\n"
            + "".join(f"  - &a{n} [*a{n - 1 if n else ''}, *a{n - 1 if n else ''}]\n" for n in range(40)),
            "aliases",
        ),
        ("a: &a [*a]\n", "inside what it names"),
        ("[" * 5000, "YAML|deep"),
        ("[" * 200 + "]" * 200, "deep"),
        ("a: b: c", "not YAML"),
        ("? [a]\n: 1\n", "not YAML"),
        ("a: *nothing", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a: 1\n--- \nb: 2\n", "not YAML"),
    ],
)
def test_hostile_yaml_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_yaml(file)
