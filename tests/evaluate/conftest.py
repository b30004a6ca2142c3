"""The harness's index of tasks, of the folders that these tests ask for: that of all of them takes twenty seconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.evaluate import harness

FOLDERS = ("arc", "glue", "hellaswag", "mmlu/default", "openbookqa", "super_glue", "winogrande")


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
