"""What `pack`, `unpack`, `generate` and `bench` take. Nothing heavy is imported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from secateur.collect.settings import HOW, File, Model, ModelSettings, Revision, Trust
from secateur.errors import SecateurError
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, ProgressSettings

if TYPE_CHECKING:
    from secateur.runs.events import Progress
else:
    Progress = Any

OVERWRITE = Option(OPTIONS, "Replace an output that Secateur wrote.")
Values = Literal["same", "int8"]
Backend = Literal["auto", "packed", "dense"]
Threads = Annotated[int | None, Option(HOW, "Threads to compute with [default: what torch takes].", least=1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackSettings(ProgressSettings):
    """What `pack` takes."""

    model: Annotated[File, Option(ARGUMENTS, "A pruned checkpoint: a folder or a hub id.", name="pruned")] = field(
        kw_only=False
    )
    output: Annotated[File | None, Option(OPTIONS, "Folder for the packed checkpoint.", "-o")] = field(
        default=None, kw_only=False
    )
    values: Annotated[
        Values, Option(OPTIONS, "same: every byte comes back; int8: rounded to 8 bits, with a scale for each row.")
    ] = "same"
    compress: Annotated[
        bool, Option(OPTIONS, "Compress the files as well, for transport; needs secateur[compress] here and there.")
    ] = False
    dry_run: Annotated[
        bool, Option(OPTIONS, "Count what would be packed and how large it would be; write nothing.")
    ] = False
    revision: Revision = None
    overwrite: Annotated[bool, OVERWRITE] = False


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpackSettings(ProgressSettings):
    """What `unpack` takes."""

    model: Annotated[File, Option(ARGUMENTS, "A packed checkpoint: a folder or a hub id.", name="packed")] = field(
        kw_only=False
    )
    output: Annotated[File, Option(OPTIONS, "Folder for the plain checkpoint.", "-o")] = field(kw_only=False)
    revision: Revision = None
    overwrite: Annotated[bool, OVERWRITE] = False


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerateSettings(ModelSettings):
    """What `generate` takes."""

    prompt: Annotated[
        str | None, Option(ARGUMENTS, "The text to continue [default: what standard input holds].", error=SecateurError)
    ] = field(default=None, kw_only=False)
    chat: Annotated[bool, Option(OPTIONS, "Put the prompt into the model's chat template, as a user's message.")] = (
        False
    )
    max_tokens: Annotated[int, Option(OPTIONS, "The most tokens to write.", "-n", least=1)] = 128
    temperature: Annotated[
        float, Option(OPTIONS, "0 takes the likeliest token each time, 1 draws as the model weighs them.")
    ] = 0.0
    seed: Annotated[int, Option(OPTIONS, "For drawing.", least=0)] = 0
    backend: Annotated[
        Backend,
        Option(HOW, "packed: packed matrices stay so in memory; dense: they are expanded; auto: packed on a CPU."),
    ] = "auto"
    threads: Threads = None
    tokenizer: Any = None
    on_text: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, kw_only=True, eq=False)
class BenchSettings(ProgressSettings):
    """What `bench` takes."""

    models: Annotated[Sequence[Model], Option(ARGUMENTS, "Folders, plain or packed, hub ids or GGUF files.")] = field(
        kw_only=False
    )
    prompt: Annotated[int, Option(OPTIONS, "Tokens of the prompt.", "-p", least=1)] = 512
    decode: Annotated[int, Option(OPTIONS, "Tokens that are decoded after it.", "-n", least=1)] = 128
    batch: Annotated[
        tuple[str, ...], Option(OPTIONS, "How many prompts at once, with commas between them.", "-b", words=True)
    ] = ("1",)
    repetitions: Annotated[int, Option(OPTIONS, "Of which the median counts.", "-r", least=2)] = 5
    dtypes: Annotated[
        tuple[str, ...],
        Option(
            HOW, "To compute in, with commas between them [default: that of the checkpoint, and float32].", words=True
        ),
    ] = ()
    device: Annotated[str, Option(HOW, "cpu, cuda, cuda:1, ...")] = "cpu"
    threads: Threads = None
    trust_remote_code: Trust = False

    @property
    def batches(self) -> list[int]:
        """The batch sizes. Raises `SecateurError` for what is no whole number above zero."""
        for text in map(str, self.batch):
            if not text.isdecimal() or int(text) < 1:
                raise SecateurError(f'--batch: got "{text}", expected whole numbers from 1, such as 1,4,16.')
        return [int(text) for text in self.batch]
