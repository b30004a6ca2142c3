"""What a run has finished, part by part, in a file that outlives it: how an interrupted run goes on.

The first line says what the run is made of; each further line is a part that is on the disk, such as a block, with the
digests of its tensors. A line carries its own digest. One that a crash cut short is no part of the journal: what it
would have told is done again.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta

from secateur.errors import CheckpointError
from secateur.files.reading import TEXT_BYTES, checked, digest_of, parse_json, read_text
from secateur.files.writer import writing
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.structure import Block
from secateur.record.versions import run_facts

FORMAT = 1
OUTSIDE = "outside"  # the part with the tensors outside the blocks
TAKING = "taking gradients"  # begun
ALLOCATED = "allocated"  # the plan that a run has made first
GRADIENTS = "gradients"  # the part with those that a run takes first
SMALLER = "smaller batches"  # what a run has come down to that ran out of memory
SEALED = "sealed"  # what the complete output is, written before it gets its name
_ALONE_WORTHLESS = (OUTSIDE, TAKING, SMALLER)
_ANEW = "Start anew with --overwrite, and without --resume."
# Variables by which the libraries of matrix products choose other instructions or orders.
_ENVIRONMENT = ("MKL_", "ONEDNN_", "DNNL_", "ATEN_CPU_", "CUBLAS_", "NVIDIA_TF32", "TORCH_ALLOW_TF32")
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


@dataclass
class _Head:
    """The first line of a journal."""

    format: int
    digest: _Digest


@dataclass
class _Beginning:
    """What the first line of this format holds."""

    run: str
    parts: Annotated[int, Meta(ge=1)]
    facts: dict[str, Any]


@dataclass
class Part:
    """A part of a run that is finished and on the disk.

    `tensors` are the sha256 of what was written for it, `record` is what its run knows of it, `seconds` how long the
    run had taken by then, by stage.
    """

    name: str
    tensors: dict[str, _Digest] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class AnotherRunError(CheckpointError):
    """What an earlier process has left is of another run: another model, option, version or machine."""


class Journal:
    """The journal of a run: `run` says of what kind, `parts` how many blocks it has.

    `found` are the parts that an earlier process has finished, by name, and `finished` the names of all that are worth
    keeping.
    """

    def __init__(self, file: Path) -> None:
        """Reads what is there. Raises `CheckpointError` for a journal that is damaged, or of another version."""
        self.file = file
        self.run, self.parts = "", 0
        self.facts: dict[str, Any] = {}
        self.found: dict[str, Part] = {}
        self._begun = False
        self._added: list[str] = []
        self._valid_bytes = 0
        if file.is_symlink():
            raise CheckpointError(f"{file}: is a symbolic link, which Secateur never makes there. Remove it.")
        if file.exists():
            self._read()

    def _read(self) -> None:
        lines = read_text(self.file, limit=4 * TEXT_BYTES).splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            last = number == len(lines)
            try:
                value = self._line(line, number)
            except CheckpointError:
                if not last:  # only the line that was being written can be cut short
                    raise
                break
            if number == 1:
                begins = checked(value, f"{self.file}, line 1", _Beginning, advice=_ANEW)
                self.run, self.parts, self.facts = begins.run, begins.parts, begins.facts
            else:
                value.pop("digest")
                part = checked(value, f"{self.file}, line {number}", Part, advice=_ANEW)
                self.found[part.name] = part
            self._valid_bytes += len(line.encode())

    def _line(self, line: str, number: int) -> dict[str, Any]:
        where = f"{self.file}, line {number}"
        value: dict[str, Any] = parse_json(line, where, dict[str, Any], advice=_ANEW)
        if number == 1:
            version = checked(value, where, _Head, advice=_ANEW).format
            if version != FORMAT:
                raise CheckpointError(
                    f"{self.file}: format {version}, expected {FORMAT}; another version of Secateur began this run. "
                    f"Finish it with that one. {_ANEW}"
                )
        if value.get("digest") != digest_of(value) or not line.endswith("\n"):
            raise CheckpointError(f"{where}: damaged or altered since it was written. {_ANEW}")
        return value

    def begin(self, run: str, parts: int, facts: Mapping[str, Any]) -> None:
        """Start a run, or go on with the one that is there.

        `facts` are everything that its results depend on, as JSON. Raises `AnotherRunError` where the journal is of a
        run with others, naming the first that differs.
        """
        facts = json.loads(json.dumps(facts, default=str))
        self._begun = True
        if self.finished:
            if changed := difference({"run": self.run, **self.facts}, {"run": run, **facts}):
                raise AnotherRunError(
                    f"{self.file}: the unfinished run differs from this one: {changed}. Go on with the same command "
                    "and versions as before, or start anew with --overwrite."
                )
            with writing(self.file), self.file.open("r+b") as stream:
                stream.truncate(self._valid_bytes)
                os.fsync(stream.fileno())
            return
        self.run, self.parts, self.facts = run, parts, dict(facts)
        with writing(self.file):
            self.file.unlink(missing_ok=True)
            self._append({"format": FORMAT, "run": run, "parts": parts, "facts": facts})

    def add(self, part: Part) -> None:
        """Record a part whose tensors are on the disk; it is durable when this returns.

        Without `begin` nothing is recorded: the run keeps no journal.
        """
        if self._begun:
            self._append(vars(part))
            self._added.append(part.name)

    def forget(self) -> None:
        """Take it that nothing is worth keeping."""
        self.found.clear()
        self._added.clear()

    @property
    def finished(self) -> list[str]:
        """Names of the parts that are worth keeping."""
        return [name for name in [*self.found, *self._added] if name not in _ALONE_WORTHLESS]

    @property
    def seconds(self) -> dict[str, float]:
        """How long earlier processes took, by stage, as far as they got."""
        return next((part.seconds for part in reversed(self.found.values()) if part.seconds), {})

    def of_block(self, block: Block) -> Part | None:
        """What an earlier process has recorded of a block, or None where it did not get there."""
        return self.found.get(part_of(block))

    def told(self) -> str:
        """How much is finished: "3 of 30 blocks"."""
        finished = self.finished
        blocks = sum(name.startswith("block ") for name in finished)
        if blocks or GRADIENTS in finished:
            return f"{blocks} of {self.parts} blocks" if blocks else f"the {GRADIENTS}"
        taken = {name.partition(",")[0] for name in finished if name != ALLOCATED}
        return f"the gradients of {len(taken)} of {self.parts} blocks" if taken else "the plan"

    def _append(self, value: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps({**value, "digest": digest_of(value)}) + "\n").encode())
        with writing(self.file):
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def difference(
    before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "", told: str | None = None
) -> str | None:
    """In words, the first value in which two JSON objects differ, or None.

    `told` is a phrase with places for the name and both values, where they are not those of an earlier and a later run.
    """
    for key in [*before, *(key for key in now if key not in before)]:
        name, old, new = f"{inside}{key}", before.get(key), now.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return difference(old, new, f"{name} ", told)
        if isinstance(old, list) and isinstance(new, list):
            for own, other, has in ((old, new, "no longer has"), (new, old, "now has")) if told is None else ():
                if only := [item for item in own if item not in other]:
                    return f"{name} {has} {_spoken(only[0])}"
        return (told or "{0} was {1} and is {2}").format(name, _spoken(old), _spoken(new))
    return None


def _spoken(value: Any) -> str:
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def common_facts(opened: OpenedModel) -> dict[str, Any]:
    """What the last bit of every result depends on besides what was asked: model, versions and machine."""
    machine = _machine_facts(opened.skeleton.device)
    return {"model": opened.facts, "versions": run_facts(None)["versions"], "machine": machine}


def _machine_facts(device: torch.device) -> dict[str, Any]:
    """Of a machine: its processor, threads, and settings of libraries."""
    chosen = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)}
    facts: dict[str, Any] = {"environment": chosen} if chosen else {}
    if device.type == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(device), "tf32": torch.backends.cuda.matmul.allow_tf32}
    return facts | {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def part_of(block: Block) -> str:
    """What a block is called in the journal."""
    return f"block {block.index}"
