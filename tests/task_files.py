"""Small files of questions for tasks, and the harness's index of a few folders: that of all takes twenty seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from secateur.evaluate import harness

FOLDERS = ("arc", "glue", "hellaswag", "mmlu/default", "openbookqa", "super_glue", "winogrande")
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "tree", "red", "blue", "class", "return", "import", "value"]


@pytest.fixture(scope="session")
def some_tasks() -> Iterator[None]:
    """An index that nobody restricts otherwise is of these folders, with the harness's own files."""
    from lm_eval import tasks

    stock = Path(tasks.__file__).parent
    whole = tasks.TaskManager

    class SomeTasks(whole):  # type: ignore[misc,valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if not arguments and not options:
                options = {"include_path": [str(stock / name) for name in FOLDERS], "include_defaults": False}
            super().__init__(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", SomeTasks)
        harness.stock_manager.cache_clear()
        yield
    harness.stock_manager.cache_clear()


def lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def boolq(draw: random.Random, count: int) -> list[dict[str, Any]]:
    return [
        {"question": words(draw, 5), "passage": words(draw, 12), "idx": n, "label": draw.randrange(2)}
        for n in range(count)
    ]


def arc(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Questions whose choices are of the same length every other time: shorter ones win with a random model."""
    return [
        {
            "id": str(n),
            "question": words(draw, 6),
            "choices": {
                "text": draw.sample("abcdefgh", 4) if n % 2 else [words(draw, draw.randint(1, 4)) for _ in range(4)],
                "label": list("ABCD"),
            },
            "answerKey": draw.choice("ABCD"),
        }
        for n in range(count)
    ]
