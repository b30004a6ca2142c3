"""Text in files is UTF-8, whatever the system's locale is, and output that nobody takes is no fault of the program."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import secateur
from command_line import model  # noqa: F401

SOURCE = Path(secateur.__file__).parent
OPENING = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
BINARY = {"NamedTemporaryFile", "TemporaryFile"}  # where no mode is said
OTHERS = {"os.open", "Image.open", "webbrowser.open", "read_text"}  # which open no text, or are our own reader


def unnamed(file: Path) -> list[str]:
    """Where a file opens text without naming the encoding."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in OTHERS:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg in ("mode", None))]
        texts = [part.value for part in modes if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        binary = any("b" in text and len(text) <= 3 for text in texts)
        if name in BINARY and not modes:
            continue
        if name in OPENING and not binary and "encoding" not in {keyword.arg for keyword in node.keywords}:
            found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_every_file_of_text_is_opened_as_utf8() -> None:
    assert [place for file in sorted(SOURCE.rglob("*.py")) for place in unnamed(file)] == []


def run(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A line of shell, in which `secateur` is ours, in an interpreter of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    line = f'secateur() {{ "{sys.executable}" -m secateur "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, env=environment, encoding="utf-8", **options
    )


# One interpreter for many commands, in a locale of seven bits. Each command is a fork of it, made once what is slow to
# import is there: its streams lead elsewhere from then on, and it ends as an interpreter does, but for the seconds in
# which that would free every object of the libraries. A line of JSON asks for a command, and the exit code is the
# answer. A stream is a file, null where it is closed, or "broken", a pipe that nobody reads.
COMMANDS_OF_ONE_INTERPRETER = """
import atexit, json, os, sys, traceback
os.environ.update(TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
import accelerate, matplotlib.pyplot, PIL.Image, secateur.pruning.engine, secateur.pruning.forecast
import secateur.evaluate.agreement, secateur.evaluate.generations, secateur.report.checkpoint_page
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM
from secateur.cli import main

def lead(number, where):
    if where is None:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        return
    if where == "broken":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open(where, os.O_RDONLY if number == 0 else os.O_WRONLY)
    os.dup2(descriptor, number)
    os.close(descriptor)

def end_with(main):
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120
    os._exit(code)

questions, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
for line in questions:
    question = json.loads(line)
    child = os.fork()
    if child == 0:
        questions.close()
        answers.close()
        os.chdir(question["folder"])
        for number in range(3):
            lead(number, question["streams"][number])
        os.environ["SECATEUR_CACHE"] = question["cache"]
        sys.argv = ["secateur", *question["words"]]
        end_with(main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class Interpreter:
    """Runs commands, each in a fork of one interpreter in a locale of seven bits."""

    def __init__(self, cache: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.cache = str(cache)
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMANDS_OF_ONE_INTERPRETER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "LC_ALL": "C", "PYTHONUTF8": "0"},
            encoding="utf-8",
        )

    def run(
        self,
        command: str,
        folder: Path,
        stdin: str | None = os.devnull,
        stdout: str | None = "out.txt",
        stderr: str | None = "err.txt",
    ) -> subprocess.CompletedProcess[str]:
        """The exit code of a command, and what it wrote to files where its streams are none else."""
        for name in ("out.txt", "err.txt"):
            (folder / name).write_text("", encoding="utf-8")
        question = {"words": command.split(), "folder": str(folder), "streams": [stdin, stdout, stderr]}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({**question, "cache": self.cache}) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        out, err = ((folder / name).read_text(encoding="utf-8") for name in ("out.txt", "err.txt"))
        return subprocess.CompletedProcess(command, code, out, err)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    own = Interpreter(tmp_path_factory.mktemp("cache"))
    with own.process:
        yield own


@pytest.mark.slow
def test_in_a_locale_of_seven_bits(model: Path, interpreter: Interpreter, tmp_path: Path) -> None:  # noqa: F811
    text = "Il était une fois une petite fille – elle aimait lire. " * 40
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "run.yaml").write_text("# café\nsampling: concat\nsamples: 2\nlength: 16\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("Où est-elle ?\n", encoding="utf-8")
    for command in (
        f"prune {model} -o out --config run.yaml --calibration text.jsonl",
        "inspect out",
        "verify out",
        f"compare {model} out --prompts prompts.txt --new-tokens 2",
        f"compare {model} out --data text.jsonl --length 16 --windows 2 --csv figures.csv",
        "report out",
        "plan out --config run.yaml --calibration text.jsonl",
        "--help",
        "prune --help",
    ):
        done = interpreter.run(command, tmp_path)
        assert done.returncode == 0, done
        assert "Traceback" not in done.stderr


COMMANDS = ["inspect out", "inspect out --matrices --json", "--help"]


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("text")
    secateur.prune(model, method=secateur.magnitude(), output=folder / "out")
    return folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_nobody_takes(command: str, interpreter: Interpreter, place: Path) -> None:
    full = interpreter.run(command, place, stdout="/dev/full")
    told = "Error: standard output cannot be written (No space left on device).\n"
    assert (full.returncode, full.stderr) == (1, told)
    piped = interpreter.run(command, place, stdout="broken")
    assert (piped.returncode in (0, 141), piped.stderr) == (True, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_of_an_interpreter_that_nobody_takes(tmp_path: Path) -> None:
    full = run("secateur --help >/dev/full", cwd=tmp_path)
    told = "Error: standard output cannot be written (No space left on device).\n"
    assert (full.returncode, full.stderr) == (1, told)
    piped = run("secateur --help | true; exit ${PIPESTATUS[0]}", cwd=tmp_path)
    assert (piped.returncode in (0, 141), piped.stderr) == (True, "")


@pytest.mark.slow
def test_streams_that_are_closed(interpreter: Interpreter, place: Path, tmp_path: Path) -> None:
    """Also from the start, as files that an interpreter opens on its way may get the numbers of the streams."""
    options: dict[str, Any] = {"cwd": place, "env": {"SECATEUR_CACHE": str(tmp_path)}}
    closed = run("secateur --help >&-", **options)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert run("secateur --help >&- 2>&- <&-", **options).returncode == 0
    assert run("secateur inspect out >&- 2>&- <&-", **options).returncode == 0
    closed = interpreter.run("inspect out", place, stdout=None)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_errors_that_nobody_reads(interpreter: Interpreter, place: Path) -> None:
    for stream in ("/dev/full", None):
        assert interpreter.run("inspect nowhere", place, stderr=stream).returncode == 2
        found = interpreter.run("inspect out", place, stderr=stream)
        assert (found.returncode, "up_proj" in found.stdout) == (0, True)
