"""Cells of a benchmark: each runs in a process of its own, for its peak memory, and becomes one line of a JSON file."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import secateur


def results(
    script: str, cells: Sequence[dict[str, Any]], file: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each cell with its figures: from the file, where it has them, else as `script --cell CELL` prints them."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for cell in cells:
        result = next((old for old in done if all(old.get(key) == value for key, value in cell.items())), None)
        if result is None:
            command = [sys.executable, script, "--cell", json.dumps(cell)]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            with file.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
        yield cell, result


def perplexities(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """The perplexity of a model on every text of a cell, by the last part of the text's name."""
    return {
        Path(data).name: secateur.perplexity(folder, data, length=cell["window"], windows=cell["windows"]).to_json()
        for data in cell["data"]
    }
