"""How often the blocks of a model run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import secateur
import tiny
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune

HALF = secateur.Unstructured(0.5)


@contextmanager
def counted(name: str) -> Iterator[list[str]]:
    """The forwards of decoder blocks while it is active, by the class of the block."""
    blocks = open_model(tiny.build(name)).skeleton.blocks
    kinds = {type(block.module) for block in blocks}
    calls: list[str] = []
    originals = {kind: kind.forward for kind in kinds}
    for kind, forward in originals.items():

        def run(self: Any, *args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            calls.append(type(self).__name__)
            return _forward(self, *args, **kwargs)

        kind.forward = run  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for kind, forward in originals.items():
            kind.forward = forward  # type: ignore[method-assign]


def run(source: Path, out: Path, method: secateur.Method, **options: Any) -> dict[str, Any]:
    """What the manifest says of a run, without what differs from run to run."""
    prune(
        source,
        method=method,
        pattern=HALF,
        calibration=tiny.tokens(samples=8, length=12),
        batch_size=1,
        propagate="dense",
        output=out,
        **options,
    )
    value = json.loads((out / "secateur.json").read_text())
    for entry in value["matrices"].values():
        del entry["seconds"]
    return {key: item for key, item in value.items() if key not in ("created", "seconds", "digest")}
