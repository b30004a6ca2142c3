"""Text in files is UTF-8, whatever the system's locale is, and output that nobody takes is no fault of the program."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import secateur
from command_line import model  # noqa: F401

SOURCE = Path(secateur.__file__).parent
OPENING = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
OTHERS = {"os.open", "webbrowser.open", "read_text"}  # which open no text, or are our own reader


def unnamed(file: Path) -> list[str]:
    """Where a file opens text without naming the encoding."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in OTHERS:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        texts = [part.value for part in modes if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        binary = any("b" in text and len(text) <= 3 for text in texts)
        if name in OPENING and not binary and "encoding" not in {keyword.arg for keyword in node.keywords}:
            found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_every_file_of_text_is_opened_as_utf8() -> None:
    assert [place for file in sorted(SOURCE.rglob("*.py")) for place in unnamed(file)] == []


def run(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A line of shell, in which `secateur` is ours, and `secateurs` is several commands of ours between `--`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    line = (
        f'secateur() {{ "{sys.executable}" -m secateur "$@"; }}; '
        f'secateurs() {{ "{sys.executable}" -c \'{SEVERAL}\' "$@"; }}; {command}'
    )
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, env=environment, encoding="utf-8", **options
    )


# One interpreter for several commands, which starts with the streams and the locale that they are to meet. Each command
# is a fork of it, made once what is slow to import is there, and ends as every interpreter does. The exit codes go to
# a file.
SEVERAL = """
import itertools, json, os, sys
os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
import accelerate, secateur.pruning.engine, secateur.report.inspect
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM
from secateur.cli import main
codes = []
for separator, words in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
    if not separator:
        child = os.fork()
        if child == 0:
            sys.argv = ["secateur", *words]
            main()
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with open("codes.json", "w", encoding="utf-8") as file:
    json.dump(codes, file)
"""


def codes(folder: Path) -> list[int]:
    """How the commands of `secateurs` ended."""
    file = folder / "codes.json"
    found: list[int] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_in_a_locale_of_seven_bits(model: Path, tmp_path: Path) -> None:  # noqa: F811
    text = "Il était une fois une petite fille – elle aimait lire. " * 40
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "run.yaml").write_text("# café\nsampling: concat\nsamples: 2\nlength: 16\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Où est-elle ?\n", encoding="utf-8")
    done = run(
        f"secateurs prune {model} -o out --config run.yaml --calibration text.jsonl -- inspect out -- verify out -- "
        f"compare {model} out --prompts prompts.txt --new-tokens 2 -- "
        f"compare {model} out --data text.jsonl --length 16 --windows 2 --csv figures.csv -- "
        "report out -- plan out --config run.yaml --calibration text.jsonl -- --help -- prune --help",
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "SECATEUR_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert codes(tmp_path) == [0] * 9, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = ["inspect out", "inspect out --matrices --json", "--help"]


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("text")
    secateur.prune(model, method=secateur.magnitude(), output=folder / "out")
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_nobody_takes(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cwd": place, "env": {"SECATEUR_CACHE": str(tmp_path)}}
    full = run(f"secateurs {' -- '.join(COMMANDS)} >/dev/full", **options)
    assert codes(place) == [1, 1, 1], full.stderr
    assert full.stderr == "Error: standard output cannot be written (No space left on device).\n" * 3
    piped = run(f"secateurs {' -- '.join(COMMANDS)} | true", **options)
    assert (set(codes(place)) <= {0, 141}, piped.stderr) == (True, "")


@pytest.mark.parametrize("command", ["inspect out", "--help"])
def test_streams_that_are_closed(command: str, place: Path, tmp_path: Path) -> None:
    """In an interpreter each, as files that it opens on its way may get the numbers of the streams."""
    options: dict[str, Any] = {"cwd": place, "env": {"SECATEUR_CACHE": str(tmp_path)}}
    closed = run(f"secateur {command} >&-", **options)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert run(f"secateur {command} >&- 2>&- <&-", **options).returncode == 0


def test_errors_that_nobody_reads(place: Path) -> None:
    full = run("secateurs inspect nowhere -- inspect out 2>/dev/full", cwd=place)
    assert (codes(place), "up_proj" in full.stdout) == ([2, 0], True)
    assert run("secateur inspect nowhere 2>&-", cwd=place).returncode == 2
    closed = run("secateur inspect out 2>&-", cwd=place)
    assert (closed.returncode, "up_proj" in closed.stdout) == (0, True)
