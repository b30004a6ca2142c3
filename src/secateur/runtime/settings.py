"""What `pack` and `unpack` take. Nothing heavy is imported."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from secateur.collect.settings import File, Revision
from secateur.runs.options import ARGUMENTS, OPTIONS, Option, Settings

if TYPE_CHECKING:
    from secateur.runs.events import Progress
else:
    Progress = Any

OVERWRITE = Option(OPTIONS, "Replace an output that Secateur wrote.")
Values = Literal["same", "int8"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackSettings(Settings):
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
    dry_run: Annotated[
        bool, Option(OPTIONS, "Count what would be packed and how large it would be; write nothing.")
    ] = False
    revision: Revision = None
    overwrite: Annotated[bool, OVERWRITE] = False
    progress: Progress = lambda stage, done, total: None


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpackSettings(Settings):
    """What `unpack` takes."""

    model: Annotated[File, Option(ARGUMENTS, "A packed checkpoint: a folder or a hub id.", name="packed")] = field(
        kw_only=False
    )
    output: Annotated[File, Option(OPTIONS, "Folder for the plain checkpoint.", "-o")] = field(kw_only=False)
    revision: Revision = None
    overwrite: Annotated[bool, OVERWRITE] = False
    progress: Progress = lambda stage, done, total: None
