"""What `secateur.json` may hold, as types: whoever reads a manifest can index it without looking twice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from secateur.core.histogram import BINS
from secateur.core.patterns import pattern_from_json
from secateur.errors import CheckpointError, PatternError
from secateur.files.reading import checked

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]


class Scores(TypedDict):
    """How the scores of a matrix spread: as `core.histogram` counts them."""

    scale: Literal["logarithmic", "linear"]
    low: float
    high: float
    kept: Annotated[list[Count], Meta(min_length=BINS, max_length=BINS)]
    pruned: Annotated[list[Count], Meta(min_length=BINS, max_length=BINS)]


class MatrixEntry(TypedDict):
    """The record of one pruned matrix."""

    block: Count
    kind: str
    shape: Annotated[list[Size], Meta(min_length=2, max_length=2)]
    tensor: str
    index: Count | None
    transposed: bool
    pattern: dict[str, Any]
    sparsity: float
    zeros: Count
    kept_identical: bool
    notes: dict[str, float | bool]
    scores: NotRequired[Scores | None]
    tokens: Count | None


class BlockEntry(TypedDict):
    """The record of one block."""

    output_change: NotRequired[float | None]


class UnmaskedEntry(TypedDict):
    """A matrix that was merged without its mask."""

    zeros_before: Count
    zeros: Count
    weights: Size


class BaseEntry(TypedDict):
    """The checkpoint that was trained."""

    path: str
    digest: str


class TunedBlock(TypedDict):
    """A block that was tuned."""

    before: float
    after: float


class CurvePoint(TypedDict):
    """A moment of training."""

    perplexity: float | None


class Recovery(TypedDict):
    """A section on what was done to the weights after pruning, and on what was done before that."""

    method: NotRequired[str]
    base: NotRequired[BaseEntry]
    trained: NotRequired[dict[str, str]]
    masks: NotRequired[dict[str, str]]
    unmasked: NotRequired[dict[str, UnmaskedEntry]]
    blocks: NotRequired[list[TunedBlock] | None]
    curve: NotRequired[list[CurvePoint] | None]
    perplexity: NotRequired[dict[str, float] | None]
    command: NotRequired[list[str] | None]
    data: NotRequired[dict[str, Any] | None]
    calibration: NotRequired[dict[str, Any] | None]
    earlier: NotRequired["Recovery | None"]


class Origin(TypedDict):
    """Where the dense model came from."""

    path: NotRequired[str | None]
    revision: NotRequired[str | None]
    card: NotRequired[dict[str, Any]]
    not_copied: NotRequired[list[str]]


class RunSettings(TypedDict):
    """The settings of a pruning."""

    dtype: str
    statistics: NotRequired[list[str]]
    options: NotRequired[dict[str, Any]]


class Versions(TypedDict):
    """Versions of libraries."""

    secateur: str


class Totals(TypedDict):
    """Sums over all matrices."""

    weights: Count
    zeros: Count
    sparsity: float


class ManifestFile(TypedDict):
    """The whole file."""

    format: int
    digest: str
    versions: Versions
    method: str
    source: Origin
    settings: RunSettings
    plan: dict[str, dict[str, Any]]
    left_out: list[dict[str, Any]]
    command: list[str] | None
    calibration: dict[str, Any] | None
    matrices: dict[str, MatrixEntry]
    blocks: list[BlockEntry]
    totals: Totals
    seconds: dict[str, float]
    tensors: dict[str, str]
    source_tensors: dict[str, str]
    headers: dict[str, str]
    files: dict[str, str]
    created: str
    recovery: NotRequired[Recovery | None]


def check_manifest(value: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` that names the first entry of a manifest that cannot be."""
    checked(value, file, ManifestFile)
    for name in value:
        if name not in ManifestFile.__annotations__:
            raise CheckpointError(f"{file}: damaged: has the entry {name}, which no manifest has.")
    patterns = {f"plan of {name}": pattern for name, pattern in value["plan"].items()}
    patterns |= {name: entry["pattern"] for name, entry in value["matrices"].items()}
    for name, pattern in patterns.items():
        try:
            pattern_from_json(pattern)
        except PatternError as error:
            raise CheckpointError(f"{file}: damaged: {name}: {error}") from None
