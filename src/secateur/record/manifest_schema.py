"""What `secateur.json` may hold, as types: whoever reads a manifest can index it without looking twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from secateur.core.histogram import BINS
from secateur.core.patterns import pattern_from_json
from secateur.errors import CheckpointError, PatternError
from secateur.files.reading import checked
from secateur.record.reordered import ReorderedEntry

_Count = Annotated[int, Meta(ge=0)]
_Size = Annotated[int, Meta(ge=1)]


class _Scores(TypedDict):
    scale: Literal["logarithmic", "linear"]
    low: float
    high: float
    kept: Annotated[list[_Count], Meta(min_length=BINS, max_length=BINS)]
    pruned: Annotated[list[_Count], Meta(min_length=BINS, max_length=BINS)]


class KeptScores(TypedDict):
    """The share of all scores that a pattern keeps, before and after its inputs changed places."""

    before: float
    after: float


class _MatrixEntry(TypedDict):
    block: _Count
    kind: str
    shape: Annotated[list[_Size], Meta(min_length=2, max_length=2)]
    tensor: str
    index: _Count | None
    transposed: bool
    pattern: dict[str, Any]
    sparsity: float
    zeros: _Count
    kept_identical: bool
    notes: dict[str, float | bool]
    scores: NotRequired[_Scores | None]
    tokens: _Count | None
    method: NotRequired[str]  # where it is not the run's
    kept_scores: NotRequired[KeptScores]  # where its inputs have changed places


class _BlockEntry(TypedDict):
    index: NotRequired[_Count]
    not_reordered: NotRequired[dict[str, str]]
    output_change: NotRequired[float | None]
    usual_change: NotRequired[float]


class _UnmaskedEntry(TypedDict):
    zeros_before: _Count
    zeros: _Count
    weights: _Size


class _SkippedEntry(TypedDict):
    reason: str
    pattern: dict[str, Any]


class BaseEntry(TypedDict):
    """The checkpoint that was trained, or that an adapter was trained on."""

    path: str
    digest: str


class _TunedBlock(TypedDict):
    before: float
    after: float


class _CurvePoint(TypedDict):
    perplexity: float | None


class _Recovery(TypedDict):
    method: NotRequired[str]
    base: NotRequired[BaseEntry]
    trained: NotRequired[dict[str, str]]
    masks: NotRequired[dict[str, str]]
    unmasked: NotRequired[dict[str, _UnmaskedEntry]]
    blocks: NotRequired[list[_TunedBlock] | None]
    curve: NotRequired[list[_CurvePoint] | None]
    perplexity: NotRequired[dict[str, float] | None]
    command: NotRequired[list[str] | None]
    data: NotRequired[dict[str, Any] | None]
    calibration: NotRequired[dict[str, Any] | None]
    earlier: NotRequired["_Recovery | None"]


class _Origin(TypedDict):
    path: NotRequired[str | None]
    revision: NotRequired[str | None]
    card: NotRequired[dict[str, Any]]
    not_copied: NotRequired[list[str]]


class _RunSettings(TypedDict):
    dtype: str
    statistics: NotRequired[list[str]]
    options: NotRequired[dict[str, Any]]


class _Versions(TypedDict):
    secateur: str


class _Totals(TypedDict):
    weights: _Count
    zeros: _Count
    sparsity: float


class _ManifestFile(TypedDict):
    format: int
    digest: str
    versions: _Versions
    method: str
    source: _Origin
    settings: _RunSettings
    plan: dict[str, dict[str, Any]]
    left_out: list[dict[str, Any]]
    command: list[str] | None
    calibration: dict[str, Any] | None
    matrices: dict[str, _MatrixEntry]
    blocks: list[_BlockEntry]
    totals: _Totals
    seconds: dict[str, float]
    tensors: dict[str, str]
    source_tensors: dict[str, str]
    headers: dict[str, str]
    files: dict[str, str]
    created: str
    recovery: NotRequired[_Recovery | None]
    skipped: NotRequired[dict[str, _SkippedEntry]]
    published_from: NotRequired[str]
    reordered: NotRequired[ReorderedEntry]


def check_manifest(value: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` that names the first entry of a manifest that cannot be."""
    checked(value, file, _ManifestFile)
    for name in value:
        if name not in _ManifestFile.__annotations__:
            raise CheckpointError(f"{file}: damaged: has the entry {name}, which no manifest has.")
    for key in (name for part in value.values() if isinstance(part, dict) for name in part):
        if not key.isprintable():
            raise CheckpointError(f"{file}: damaged: the name {key!a} has characters that nobody can see.")
    patterns = {f"plan of {name}": pattern for name, pattern in value["plan"].items()}
    patterns |= {name: entry["pattern"] for name, entry in value["matrices"].items()}
    for name, pattern in patterns.items():
        try:
            pattern_from_json(pattern)
        except PatternError as error:
            raise CheckpointError(f"{file}: damaged: {name}: {error}") from None
