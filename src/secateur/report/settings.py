"""What `push` takes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from secateur.collect.settings import File
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, Settings

if TYPE_CHECKING:
    from secateur.evaluate.results import Results
else:
    Results = Any


@dataclass(frozen=True, kw_only=True, eq=False)
class PushSettings(Settings):
    """What goes to the hub, and where."""

    folder: Annotated[File, Option(ARGUMENTS, "A checkpoint that Secateur wrote.", name="output")] = field(
        kw_only=False
    )
    repository: Annotated[
        str, Option(ARGUMENTS, "The repository on the Hugging Face Hub, OWNER/NAME; made where it is missing.")
    ] = field(kw_only=False)
    base_model: Annotated[
        str | None,
        Option(OPTIONS, "The hub id of the dense model, for one that was pruned from a local folder or file."),
    ] = None
    private: Annotated[bool, Option(OPTIONS, "Make a new repository private.")] = False
    revision: Annotated[
        str | None, Option(OPTIONS, "The branch to write to, made where it is missing [default: main].")
    ] = None
    create_pr: Annotated[bool, Option(OPTIONS, "Open a pull request instead of writing to the branch.")] = False
    message: Annotated[str | None, Option(OPTIONS, "The message of the commit [default: what was pruned how].")] = None
    evaluations: Results | None = None
