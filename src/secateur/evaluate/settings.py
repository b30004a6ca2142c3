"""What `eval` and `compare` take."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from secateur.collect.settings import BOS, BatchSettings, BosChoice, DtypeSettings, Model, ModelSettings, take_in
from secateur.errors import CalibrationError
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, ProgressSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.calibration.documents import Corpus
    from secateur.calibration.windows import Windows
    from secateur.runs.events import Progress

    OneText: TypeAlias = str | Tensor | Windows | Corpus | Iterable[Any]
    Words: TypeAlias = str | Sequence[str]
else:
    OneText = str
    Words = tuple[str, ...]
    Progress = Any

TASKS = "Tasks"
VERDICT = "Verdict"


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSettings(Settings):
    """Which windows of text."""

    length: Annotated[int | None, Option(OPTIONS, "Tokens in each window [default: 2048].", "-l", least=2)] = None
    windows: Annotated[int | None, Option(OPTIONS, "Use only the first windows [default: all].", "-w", least=1)] = None
    bos: Annotated[BosChoice, Option(OPTIONS, BOS, error=CalibrationError)] = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class PerplexitySettings(ProgressSettings, BatchSettings, ModelSettings, TextSettings):
    """What `perplexity` takes."""

    data: OneText = field(default="wikitext2", kw_only=False)
    tokenizer: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        take_in(self, "data", self.windows)


@dataclass(frozen=True, kw_only=True, eq=False)
class AgreementSettings(ProgressSettings, BatchSettings, DtypeSettings, TextSettings):
    """What `agreement` takes."""

    dense: Model = field(kw_only=False)
    pruned: Sequence[Model] = field(kw_only=False)
    data: OneText = field(default="wikitext2", kw_only=False)
    tokenizer: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        take_in(self, "data", self.windows)


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSettings(Settings):
    """Which tasks, and how they are asked."""

    tasks: Annotated[
        Words,
        Option(
            TASKS,
            "Tasks and groups of lm-evaluation-harness, with commas between them; also commonsense7 and commonsense6, "
            "the means of the papers.",
            "-t",
            words=True,
        ),
    ] = ()
    limit: Annotated[int | None, Option(TASKS, "Only the first documents of each task [default: all].", least=1)] = None
    shots: Annotated[
        int | None, Option(TASKS, "Examples in each prompt [default: the task's own, mostly 0].", least=0)
    ] = None
    task_data: Annotated[
        str | None, Option(TASKS, "A folder of local files TASK_SPLIT*.jsonl in the place of data sets from the hub.")
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptTaskSettings(TaskSettings):
    """Also whether results that are kept count."""

    fresh: Annotated[bool, Option(TASKS, "Run tasks again that have been run before.")] = False


@dataclass(frozen=True, kw_only=True, eq=False)
class VerdictSettings(Settings):
    """What a pruned model has to keep for its verdict; one that is missed ends `compare` with 3."""

    max_nats: Annotated[
        float | None,
        Option(
            VERDICT,
            "Exit with 3 where a pruned model loses more: its mean loss minus the dense model's in nats per token, "
            "such as 0.05 for a perplexity that is 5 % higher.",
        ),
    ] = None
    min_agreement: Annotated[
        float | None,
        Option(
            VERDICT,
            "Exit with 3 where fewer tokens than this share have the same first choice as in the dense model, such as "
            "0.9.",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_nats is not None and not 0 <= self.max_nats < math.inf:
            raise CalibrationError(f"--max-nats: got {self.max_nats:g}, expected a number of nats, at least 0.")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            hint = f" Did you mean {self.min_agreement / 100:g}?" if 1 < self.min_agreement <= 100 else ""
            raise CalibrationError(
                f"--min-agreement: got {self.min_agreement:g}, expected a share of tokens from 0 to 1.{hint}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalSettings(BatchSettings, ModelSettings, TextSettings, KeptTaskSettings):
    """What `eval` takes."""

    data: Annotated[
        str | None,
        Option(
            OPTIONS,
            "wikitext2, c4, python-docs (its held-out part), hf:NAME..., or a file "
            "[default: wikitext2, unless --tasks is given; python-docs where the hub does not answer and has left no "
            "copy here].",
            "-d",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CompareSettings(BatchSettings, DtypeSettings, TextSettings, KeptTaskSettings, VerdictSettings):
    """What `compare` takes."""

    dense: Annotated[str, Option(ARGUMENTS, "The dense model: folder, hub id, or GGUF file.")]
    pruned: Annotated[tuple[str, ...], Option(ARGUMENTS, "Pruned models to compare with it.")]
    data: Annotated[
        tuple[str, ...],
        Option(
            OPTIONS,
            "As for eval, or images:FOLDER, audio:FOLDER, labelled:FILE.jsonl or .csv; repeat it for several "
            "[default: wikitext2, unless --tasks or --prompts is given].",
            "-d",
        ),
    ] = ()
    prompts: Annotated[
        str | None,
        Option(
            OPTIONS,
            'Show how each model goes on from these prompts: a text file, one a line, or .jsonl with a "prompt".',
        ),
    ] = None
    new_tokens: Annotated[int, Option(OPTIONS, "Tokens to go on for, greedily.", least=1)] = 64
    csv: Annotated[str | None, Option(OPTIONS, "Also write a row for each model and text or task to this file.")] = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to compare on."""
        if self.data or self.tasks or self.prompts is not None:
            return self.data
        from secateur.calibration.hub import default_text

        return (default_text("evaluation"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_nats", "min_agreement"):
            alone = self.tasks or self.prompts is not None
            if getattr(self, name) is not None and alone and not self.data:
                raise CalibrationError(
                    f"--{name.replace('_', '-')}: is measured on a text, and --tasks or --prompts alone compare on "
                    "none. Add --data wikitext2, or another text."
                )
