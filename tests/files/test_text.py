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
    """A line of shell, in which `secateur` is ours."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    line = f'secateur() {{ "{sys.executable}" -m secateur "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, env=environment, encoding="utf-8", **options
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no such locale")
def test_in_a_locale_of_seven_bits(model: Path, tmp_path: Path) -> None:  # noqa: F811
    text = "Il était une fois une petite fille – elle aimait lire. " * 40
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "run.yaml").write_text("# café\nsampling: concat\nsamples: 2\nlength: 16\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Où est-elle ?\n", encoding="utf-8")
    done = run(
        f"secateur prune {model} -o out --config run.yaml --calibration text.jsonl && secateur inspect out && "
        f"secateur verify out && secateur compare {model} out --prompts prompts.txt --new-tokens 2 && "
        f"secateur compare {model} out --data text.jsonl --length 16 --windows 2 --csv figures.csv && "
        "secateur report out && secateur plan out --config run.yaml --calibration text.jsonl && secateur --help && "
        "secateur prune --help",
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "SECATEUR_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


COMMANDS = {
    "inspect": "secateur inspect out",
    "inspect as JSON": "secateur inspect out --matrices --json",
    "help": "secateur --help",
}


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("text")
    secateur.prune(model, method=secateur.magnitude(), output=folder / "out")
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_nobody_takes(command: str, place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cwd": place, "env": {"SECATEUR_CACHE": str(tmp_path)}}
    full = run(f"{COMMANDS[command]} >/dev/full", **options)
    assert full.returncode == 1, full.stderr
    assert full.stderr == "Error: standard output cannot be written (No space left on device).\n"
    closed = run(f"{COMMANDS[command]} >&-", **options)
    assert (closed.returncode, closed.stderr) == (0, "")
    piped = run(f"{COMMANDS[command]} | true; exit ${{PIPESTATUS[0]}}", **options)
    assert (piped.returncode in (0, 141), piped.stderr) == (True, "")
    assert run(f"{COMMANDS[command]} >&- 2>&- <&-", **options).returncode == 0


def test_errors_that_nobody_reads(place: Path) -> None:
    for end in ("2>/dev/full", "2>&-"):
        assert run(f"secateur inspect nowhere {end}", cwd=place).returncode == 2
        done = run(f"secateur inspect out {end}", cwd=place)
        assert (done.returncode, "up_proj" in done.stdout) == (0, True)
