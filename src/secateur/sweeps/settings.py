"""What a sweep is: its grid, its evaluation, and the options of `prune` that all cells share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from secateur.collect.settings import (
    CALIBRATION,
    HOW,
    WHAT,
    CalibrationSettings,
    File,
    SelectionSettings,
)
from secateur.core.choices import Group
from secateur.errors import CheckpointError
from secateur.evaluate.settings import TaskSettings, Words
from secateur.pruning.settings import MethodLike, MethodOptions, SharedSettings
from secateur.runs.options import OPTIONS, Option, ProgressSettings, Settings

if TYPE_CHECKING:
    from secateur.core.patterns import Pattern
    from secateur.sweeps.cells import SweepEvent
    from secateur.sweeps.estimate import SweepEstimate

    Methods: TypeAlias = str | Sequence[MethodLike] | Mapping[str, MethodLike]
    Patterns: TypeAlias = Pattern | float | str | Sequence[Pattern | float | str]
    Seeds: TypeAlias = int | str | Sequence[int | str]
    Sparsities: TypeAlias = float | str | Sequence[float | str]
    Texts: TypeAlias = Words | Mapping[str, Any]
    OnEstimate: TypeAlias = Callable[[SweepEstimate], None]
    OnSweepEvent: TypeAlias = Callable[[SweepEvent], None]
else:
    Methods = Patterns = Seeds = Sparsities = Texts = tuple[str, ...]
    OnEstimate = OnSweepEvent = Any

EVALUATION = "Evaluation"
Keep = Literal["none", "best", "all"]


@dataclass(frozen=True, kw_only=True, eq=False)
class GridSettings(Settings):
    """Which methods in which patterns."""

    methods: Annotated[
        Methods,
        Option(
            WHAT,
            "Separated by commas, or repeated: methods as for prune, also MODULE:FUNCTION or FILE.py:FUNCTION, with a "
            "plus a refinement. LABEL=METHOD gives it another name.",
            "-m",
        ),
    ] = ("magnitude", "wanda", "sparsegpt")
    option: Annotated[
        MethodOptions,
        Option(WHAT, "METHOD.NAME=VALUE or METHOD.REFINEMENT.NAME=VALUE, such as sparsegpt.damping=0.02; repeat it."),
    ] = ()
    sparsity: Annotated[
        Sparsities,
        Option(WHAT, "Fractions of weights to remove, such as 0.5,0.6 [default: 0.5, without --pattern].", "-s"),
    ] = ()
    patterns: Annotated[
        Patterns, Option(WHAT, "N:M patterns, such as 2:4,4:8, beside the sparsities.", "-p", name="pattern")
    ] = ()
    per: Annotated[
        Group | None,
        Option(
            WHAT,
            "Compare weights within each row, the whole matrix, or by the row search of Wanda's variant "
            "[default: the method's].",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepSettings(
    ProgressSettings, TaskSettings, SharedSettings, CalibrationSettings, SelectionSettings, GridSettings
):
    """What `sweep` takes."""

    output: Annotated[File, Option(OPTIONS, "Folder for the tables and cells; started again there, goes on.", "-o")] = (
        field()
    )
    keep: Annotated[
        Keep,
        Option(
            WHAT,
            "Pruned checkpoints that stay: none, best (for each pattern, on the first data set), or all.",
            error=CheckpointError,
        ),
    ] = "none"
    seeds: Annotated[
        Seeds,
        Option(
            CALIBRATION,
            "Run each cell once for each of these draws of the calibration samples, such as 0,1,2; tables then have "
            "means and standard deviations over draws [default: --seed alone].",
        ),
    ] = ()
    data: Annotated[
        Texts,
        Option(
            EVALUATION,
            "As for eval; repeat it for several texts [default: wikitext2; python-docs where the hub does not answer "
            "and has left no copy here].",
            "-d",
        ),
    ] = ()
    eval_length: Annotated[
        int | None, Option(EVALUATION, "Tokens in each window of the evaluation [default: 2048].", least=2)
    ] = None
    windows: Annotated[int | None, Option(EVALUATION, "Use only the first windows [default: all].", "-w", least=1)] = (
        None
    )
    agreement: Annotated[
        bool,
        Option(EVALUATION, "Also compare predictions with the dense model's; takes two more forwards for each cell."),
    ] = False
    again: Annotated[
        Words, Option(HOW, "Run the cells of these methods again, whose code or options have changed.", words=True)
    ] = ()
    ray: Annotated[
        bool | str,
        Option(
            HOW,
            "Run cells side by side, as tasks of Ray: on this machine's cores, or, with an address (auto, HOST:6379, "
            "ray://HOST:10001), on a cluster.",
        ),
    ] = False
    ray_cpus: Annotated[
        int | None,
        Option(HOW, "Cores of each cell on Ray [default: all, shared out among the cells].", least=1),
    ] = None
    latex: Annotated[bool, Option(OPTIONS, "Also write the tables as LaTeX, table.tex.")] = False
    dry_run: Annotated[bool, Option(OPTIONS, "Show the cells and the estimate, and change nothing.")] = False
    command: Sequence[str] | None = None
    on_estimate: OnEstimate = lambda estimate: None
    on_event: OnSweepEvent = lambda event: None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.data, Mapping):
            from secateur.calibration.given import taken

            held = {name: taken(own, self.windows, f"data[{name!r}]") for name, own in self.data.items()}
            object.__setattr__(self, "data", held)
