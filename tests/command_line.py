"""The command line in this process, in a fork of it, in a new one and on a terminal, and a tiny model for it."""

import importlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from real_data import byte_pair_tokenizer, some_docs
from secateur import cli

FIRST = "model.layers.0.mlp.down_proj.weight"
CALIBRATION = ["--calibration", some_docs(), "--sampling", "concat", "--samples", "4", "--length", "32"]


def save_model(folder: Path) -> Path:
    """A tiny random LLaMA with a tokenizer, which takes windows of up to 256 tokens."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_pair_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cli") / "model")


def process(
    *arguments: Any, cwd: Path | None = None, before: Callable[[], Any] = lambda: None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, its output in files; `before` is done in it first.

    A fork of this process, which has imported already what takes a new interpreter seconds. Where that start matters,
    or what libraries read at import, tests start an interpreter: `interpreter`. Signals do what they do in a new one,
    whatever this process makes of them.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.chdir(cwd or ".")
            _reset_signals()
            before()
            _run_forked([os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno()], arguments)
        code = ended(child)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(list(arguments), code, out.read().decode(), err.read().decode())


def _reset_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def forked(action: Callable[[], Any]) -> int:
    """The process id of a fork of this process that does something and ends, with 0 where nothing was raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _run_forked(streams: Sequence[int], arguments: Sequence[Any]) -> NoReturn:
    """In a child: what a new interpreter does with its streams, `main`, and the end of the process."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's
        importlib.reload(warnings)  # which pytest records
        os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
        sys.argv = ["secateur", *map(str, arguments)]
        sys.path.insert(0, "")
        sys.dont_write_bytecode = True
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(child: int, patience: float = 300) -> int:
    """The exit code of a child, minus the signal that ended it; it is killed where it does not end."""
    deadline = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def interpreter(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a new interpreter, with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "secateur", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def message(self) -> str:
        """What was said on stderr, without frames and line breaks."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.err).split())

    @property
    def said(self) -> list[str]:
        """The lines on stderr, without the times in front of them."""
        return untimed(self.err)


def untimed(text: str) -> list[str]:
    """Lines without the times in front of them."""
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]


Call = Callable[..., Result]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(*arguments)`: the command in this process, through `main`, as the console script runs it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "300")  # a narrow box breaks long paths anywhere

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        for own in (cli.app, *(cli.app[name] for name in cli.app)):
            monkeypatch.setattr(own, "_fallback_console", None)  # which keeps the width that it was made with
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        captured = capfd.readouterr()
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def terminal(*arguments: Any) -> tuple[int, str]:
    """(exit code, everything shown) of the command in a fork of this process, on a pseudo-terminal 100 wide."""
    import fcntl
    import pty
    import struct
    import termios

    child, descriptor = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color")
        os.environ.pop("COLUMNS", None)
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):  # set by commands without a terminal
            os.environ.pop(name, None)
        _run_forked(range(3), arguments)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = io.BytesIO()
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        shown.write(part)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.getvalue().decode()
