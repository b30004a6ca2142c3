"""A store of evaluations, by the digest of the files of the model that was evaluated."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

import secateur
from secateur.files.cache import keep_json
from secateur.files.reading import checked, read_json

REVISION = 1  # of how evaluations are made; raise it when the same key leads to other figures

Kind = Literal["perplexity", "agreement", "labelled", "tasks", "continuations"]


_Count = Annotated[int, Meta(ge=0)]


# What is read of a kept result.
class _OnText(TypedDict):
    data: str
    digest: str
    windows: _Count
    length: _Count
    perplexity: float
    provenance: NotRequired[dict[str, Any]]


class _PerplexityResult(_OnText):
    nats: float
    standard_error: float | None
    perplexity_error: float | None
    window_nats: list[float]


class _AgreementResult(_OnText):
    perplexity_dense: float
    difference: float
    difference_error: float | None
    kl: float
    kl_error: float | None
    kl_99: float
    top1: float
    top1_error: NotRequired[float | None]


class _MeasuredFigure(TypedDict):
    dense: float | None
    dense_error: float | None
    pruned: float | None
    pruned_error: float | None
    difference: float | None
    difference_error: float | None


class _LabelledResult(TypedDict):
    data: str
    digest: str
    samples: _Count
    agreement: float
    agreement_error: float | None
    kl: float | None
    kl_error: float | None
    figures: dict[str, _MeasuredFigure]


class _MetricValue(TypedDict):
    value: float | None
    error: float | None


class _KeptTask(TypedDict):
    task: str
    shots: NotRequired[int | None]
    documents: _Count
    metrics: dict[str, _MetricValue]
    scores: NotRequired[dict[str, list[float]]]
    members: NotRequired[dict[str, float]]
    digest: NotRequired[str]
    notes: NotRequired[list[str]]
    dataset: NotRequired[tuple[str, str] | None]


class _TasksResult(TypedDict):
    results: list[_KeptTask]


class _Continued(TypedDict):
    prompt: str
    dense: str
    pruned: str
    tokens_in_common: _Count


class _ContinuationsResult(TypedDict):
    rows: list[_Continued]


RESULTS: dict[Kind, Any] = {
    "perplexity": _PerplexityResult,
    "agreement": _AgreementResult,
    "labelled": _LabelledResult,
    "tasks": _TasksResult,
    "continuations": _ContinuationsResult,
}


@dataclass(frozen=True)
class Record:
    """One evaluation: what kind, of what (`key`), its result as JSON, when (UTC) and with which versions."""

    kind: Kind
    key: Mapping[str, Any]
    result: Mapping[str, Any]
    created: str
    versions: Mapping[str, str]


class Results:
    """A folder of evaluations: one file each, in a folder for each model.

    Files appear whole, under their final name, so that several processes can share a store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, model_digest: str, kind: Kind, key: Mapping[str, Any]) -> Record | None:
        """The evaluation of that kind and key, made with the same versions of everything, or None.

        Raises `CheckpointError` for a damaged file.
        """
        file = self._file(model_digest, kind, key)
        record = _read(file) if file.exists() else None
        return record if record is not None and _deciding(record.versions) == _deciding(_versions()) else None

    def add(
        self,
        model_digest: str,
        kind: Kind,
        key: Mapping[str, Any],
        result: Mapping[str, Any],
    ) -> None:
        """Keep an evaluation, in the place of an earlier one of the same kind and key.

        Raises `CheckpointError` where it cannot be written.
        """
        file = self._file(model_digest, kind, key)
        record = Record(kind, key, result, datetime.now(UTC).isoformat(timespec="seconds"), _versions())
        keep_json(file, asdict(record), "the evaluation")

    def of(self, model_digest: str) -> list[Record]:
        """All evaluations of a model that were made as they are now, oldest first."""
        found = [_read(file) for file in (self.folder / model_digest).glob("*.json")]
        records = [record for record in found if record.versions.get("evaluation", "1") == str(REVISION)]
        return sorted(records, key=lambda record: (record.created, record.kind, json.dumps(record.key, sort_keys=True)))

    def _file(self, model_digest: str, kind: Kind, key: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / model_digest / f"{kind}-{name}.json"


def _versions() -> dict[str, str]:
    own = {"secateur": secateur.__version__, "evaluation": str(REVISION)}
    return own | {name: version(name) for name in ("torch", "transformers")}


def _deciding(versions: Mapping[str, str]) -> dict[str, str]:
    """The versions on which figures depend; of Secateur's own code that is `REVISION`."""
    return {"evaluation": "1", **{name: value for name, value in versions.items() if name != "secateur"}}


def _read(file: Path) -> Record:
    record: Record = read_json(file, Record, advice="It is no kept evaluation, or damaged: remove it.")
    checked(record.result, file, RESULTS[record.kind], advice="The kept evaluation is damaged: remove it.")
    return record
