"""Runs of `prune` that must be refused in just these words, and leave every file as it was."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from secateur.errors import SecateurError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.runs.journal import Journal

FIRST = "model.layers.0.mlp.down_proj.weight"  # the first matrix of the plan, and the first to be solved


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models on disk: `single` in one file, `sharded`, and `mixtral`."""
    root = tmp_path_factory.mktemp("models")
    tiny.save("llama", root / "single")
    tiny.save("llama", root / "sharded", max_shard_size="40KB")
    tiny.save("mixtral", root / "mixtral")
    return root


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A model of the test's own, in one file."""
    return Path(shutil.copytree(models / "single", tmp_path / "model"))


def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
    """Everything under a folder: {path: (mode, time of the last change, sha256)}."""
    files = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        readable = path.is_file() and os.access(path, os.R_OK)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if readable else ""
        files[str(path.relative_to(root))] = (facts.st_mode, facts.st_mtime_ns if path.is_file() else 0, digest)
    return files


Refused = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """`refused(kind, message, model, **changes)`: prune must raise just that, and leave every file as it was.

    `within` is a context for the call of prune alone. With `kept` there is one thing more afterwards: the finished
    blocks beside the output, which are then removed.
    """

    def check(
        kind: type[SecateurError],
        message: str | re.Pattern[str],
        model: Any,
        *,
        within: contextlib.AbstractContextManager[None] | None = None,
        kept: bool = False,
        **changes: Any,
    ) -> None:
        arguments = {"method": wanda(), "calibration": tiny.tokens(), "output": tmp_path / "out"} | changes
        before = snapshot(tmp_path)
        assert before or not isinstance(model, Path)
        with within or contextlib.nullcontext(), pytest.raises(SecateurError) as caught:
            prune(model, **arguments)
        text = str(caught.value)
        assert type(caught.value) is kind
        if isinstance(message, str):
            assert text == message
        else:
            assert message.fullmatch(text), text
        if kept:
            partial = Path(f"{arguments['output']}.partial")
            assert Journal(partial / "journal.jsonl").finished
            assert {path.name for path in partial.iterdir()} == {"journal.jsonl", "lock", "result"}
            shutil.rmtree(partial)
        assert snapshot(tmp_path) == before

    return check


def edit(folder: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    """Change one tensor of a single-file model."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors[name])
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


ADVICE = "Is the model itself sound? Try --dtype float32, and check the dense model with secateur eval."


@pytest.fixture(autouse=True)
def _no_trace_in_the_working_directory() -> Iterator[None]:
    yield
    assert not [name for name in os.listdir() if ".states" in name or ".partial" in name]
