"""Which model and which calibration text a run sees, and on what machine: the options that all runs share.

Nothing heavy is imported, so that a command line shows them at once. Types that only Python code can give are known to
type checkers alone; to a command line they are text.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from secateur.core.choices import Bos, Granularity, Norm, OnNonfinite, Sampling, Scope, Unseen
from secateur.errors import CalibrationError
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, ProgressSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.calibration.documents import Corpus
    from secateur.calibration.windows import Windows
    from secateur.models.opening.opened import OpenedModel
    from secateur.runs.events import Progress

    File = str | os.PathLike[str]
    Globs = str | Sequence[str]
    Model = str | os.PathLike[str] | nn.Module | OpenedModel
    Norms = str | Sequence[Norm]
    Text = str | Sequence[str] | Tensor | Windows | Corpus | Iterable[Any] | None
else:
    File = Model = str
    Globs = Text = Norms = tuple[str, ...]
    Progress = Any

WHAT, CALIBRATION, HOW = "What to prune", "Calibration", "How to run"
Trust = Annotated[bool, Option(HOW, "Run the code that the model brings along.")]
Revision = Annotated[str | None, Option(HOW, "Branch, tag or commit on the hub.")]
Resume = Annotated[
    bool,
    Option(
        OPTIONS,
        "Go on with what an earlier run with the same options left unfinished, after the blocks that it has finished.",
    ),
]
BosChoice = Literal["auto", Bos]
BOS = (
    "Where windows of text have the token that begins a text: papers (before the first window alone), always (before "
    "every window), never, or auto: as papers, unless the model reads a window over 0.1 nats better with it in front."
)

AUTO = "auto"  # the text of the papers, where this machine has it or can fetch it


def take_in(settings: Settings, name: str, most: int | None) -> None:
    """Read texts or token ids that a field holds in memory, once and for all; `most` rows of those that are iterated.

    Raises `CalibrationError` for what is neither.
    """
    value = getattr(settings, name)
    several = value if isinstance(value, tuple) else (value,)
    if all(one is None or isinstance(one, str | os.PathLike) for one in several):
        return
    from secateur.calibration.given import taken

    object.__setattr__(settings, name, taken(value, most, name))


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceSettings(Settings):
    """What models run on."""

    device: Annotated[str, Option(HOW, "auto, cpu, cuda, cuda:1, ...; cuda:0,cuda:1 is a process on each.")] = "auto"
    trust_remote_code: Trust = False


@dataclass(frozen=True, kw_only=True, eq=False)
class DtypeSettings(DeviceSettings):
    """What models run on, and in which numbers."""

    dtype: Annotated[
        str,
        Option(HOW, "To compute in: auto, float32, bfloat16, float16, float64. The output keeps the source's."),
    ] = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSettings(DtypeSettings):
    """Which model, and what it runs on."""

    model: Annotated[Model, Option(ARGUMENTS, "A folder, a hub id, a GGUF file, or timm:NAME.")] = field(kw_only=False)
    revision: Revision = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSettings(Settings):
    """How many samples are computed at once, and where they wait."""

    batch_size: Annotated[
        int | None,
        Option(
            HOW,
            "Samples that run through a block, or requests of a task that run through the model, at once "
            "[default: auto].",
            least=1,
        ),
    ] = None
    offload_states: Annotated[str, Option(HOW, "Hidden states in memory-mapped files: auto, never, or a folder.")] = (
        "auto"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSettings(Settings):
    """Which tokens a run sees."""

    calibration: Annotated[
        Text,
        Option(
            CALIBRATION,
            "c4, wikitext2, python-docs, hf:NAME[:CONFIG][:SPLIT][:FIELD], a .txt, .jsonl[:FIELD], .json[:FIELD], "
            ".parquet[:FIELD] file, or .safetensors with input_ids (and attention_mask); self: text that the model "
            "writes itself, self:PROMPTS: its answers to the lines of a .txt or .jsonl[:FIELD]; images:FOLDER "
            "of .jpg and .png, or images:FILE.npy, for a model of images; audio:FOLDER of .wav and .flac for a model "
            "of speech, with what is said in NAME.txt beside NAME.wav; labelled:FILE.csv or .jsonl, a table of "
            "texts or pairs of texts, for an encoder. Repeat with weights to mix: 0.7*c4. auto is "
            "c4, or python-docs where the hub does not answer and has left no copy here.",
            "-c",
        ),
    ] = AUTO
    samples: Annotated[
        int | None, Option(CALIBRATION, "Calibration samples: token windows [default: 128].", "-n", least=1)
    ] = None
    length: Annotated[int | None, Option(CALIBRATION, "Tokens in each sample [default: 2048].", "-l", least=1)] = None
    seed: Annotated[int, Option(CALIBRATION, "Seed of the sampling.")] = 0
    sampling: Annotated[
        Sampling | None,
        Option(
            CALIBRATION,
            "document: windows within one long document, as in the papers; concat: within all text packed together "
            "[default: as in the papers; self is packed].",
            error=CalibrationError,
        ),
    ] = None
    bos: Annotated[BosChoice, Option(CALIBRATION, BOS, error=CalibrationError)] = "auto"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        take_in(self, "calibration", self.samples or 128)


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectionSettings(Settings):
    """Which matrices, by globs of their names."""

    only: Annotated[Globs, Option(WHAT, "Prune only matrices that this glob matches; may be repeated.")] = ()
    skip: Annotated[
        Globs, Option(WHAT, 'Leave matrices dense that this glob matches, such as "*.down_proj"; may be repeated.')
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("only", "skip"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])


@dataclass(frozen=True, kw_only=True, eq=False)
class ExemptSettings(Settings):
    """What becomes of matrices of which nothing can be known."""

    on_nonfinite: Annotated[
        OnNonfinite,
        Option(
            HOW, "What NaN or infinity in a matrix, or in what is known of it, does: end the run, or leave it dense."
        ),
    ] = "error"
    unseen: Annotated[
        Unseen,
        Option(
            HOW,
            "What becomes of a matrix that no calibration token reached, as happens to experts: end the run, prune it "
            "by magnitude, or leave it dense.",
        ),
    ] = "error"


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientSettings(
    ProgressSettings, ExemptSettings, BatchSettings, ModelSettings, CalibrationSettings, SelectionSettings
):
    """What `gradients` takes."""

    output: Annotated[File, Option(OPTIONS, "File for the gradients.", "-o")] = field(kw_only=False)
    norms: Annotated[
        Norms,
        Option(OPTIONS, "l1, l2, or both as l1,l2 (one pass makes both).", name="norm", words=True),
    ] = ("l1",)
    granularity: Annotated[
        Granularity,
        Option(OPTIONS, "A gradient for each sample, as published, or for each token.", error=CalibrationError),
    ] = "sample"
    scope: Annotated[
        Scope,
        Option(
            OPTIONS,
            "Of the model's loss, or of the output norm of each block: model or block.",
            error=CalibrationError,
        ),
    ] = "model"
    overwrite: Annotated[bool, Option(OPTIONS, "Replace an existing file.")] = False
    resume: Resume = False
