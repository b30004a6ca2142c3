"""Where the command line keeps evaluations, and what it says of them."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError

if TYPE_CHECKING:
    from secateur.evaluate.results import Kind, Results
    from secateur.evaluate.task_results import TaskResults


def evaluation_store() -> "Results":
    """The store in $SECATEUR_CACHE, or else in ~/.cache/secateur."""
    from secateur.evaluate.results import Results

    return Results(Path(os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser() / "evaluations")


def keep(model: str, revision: str | None, kind: "Kind", key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Keep an evaluation; one that cannot be kept is no failure of the evaluation, and said."""
    from secateur.evaluate.results import model_digest

    try:
        evaluation_store().add(model_digest(model, revision), kind, key, result)
    except CheckpointError as error:
        print(f"Not kept: {error}", file=sys.stderr)


def say_reused(results: "TaskResults") -> None:
    """Say which tasks were not run again."""
    if results.reused:
        since = min(results.reused.values())
        print(
            f"{results.model}: {', '.join(results.reused)} not run again: the same model, data and settings were "
            f"evaluated before (since {since}). --fresh runs them again.",
            file=sys.stderr,
        )
