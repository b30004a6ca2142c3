"""What a run of pruning is: each option once, with its type, its default and its help. Nothing heavy is imported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from secateur.collect.settings import (
    CALIBRATION,
    HOW,
    WHAT,
    BatchSettings,
    CalibrationSettings,
    ExemptSettings,
    File,
    ModelSettings,
    Resume,
    SelectionSettings,
)
from secateur.core.choices import Group, Norm
from secateur.pruning.presets import with_preset
from secateur.runs.options import OPTIONS, Option, ProgressSettings, Settings

MethodName = Literal[  # a test keeps this equal to secateur.methods.METHODS
    "magnitude",
    "wanda",
    "wanda_variant",
    "ria",
    "gblm",
    "gblm_inverse",
    "gradient",
    "wanda_plus",
    "pruner_zero",
    "sparsegpt",
    "magnitude_iterative",
    "wanda_iterative",
    "admm",
    "alps",
]
AllocationName = Literal["uniform", "owl", "dlp", "alpha", "sensitivity"]  # uniform, or of secateur.plans.ALLOCATIONS
Unit = Literal["block", "matrix", "kind"]  # equal to secateur.plans.allocation.Unit
PresetName = Literal["fast", "exact", "best"]  # equal to secateur.pruning.presets.PRESETS
RefinementName = Literal["least_squares", "obs_update", "swaps"]  # equal to secateur.methods.REFINEMENTS

if TYPE_CHECKING:
    from secateur.collect.survey import Survey
    from secateur.core.patterns import Pattern
    from secateur.core.problem import Method
    from secateur.plans.allocated import Allocated
    from secateur.plans.plan import Plan
    from secateur.runs.events import OnEvent, Progress

    MethodLike: TypeAlias = Method | str | Callable[[], Method]
    MethodOptions = Sequence[str] | Mapping[str, object]
    PatternLike = Pattern | Plan | Mapping[str, Pattern | float | str] | float | str | None
    PlanLike = Plan | Allocated | File | None
else:
    MethodLike = MethodName | str
    MethodOptions = tuple[str, ...]
    PatternLike = Any
    PlanLike = str | None
    Survey = OnEvent = Progress = Any

Propagate = Literal["pruned", "dense"]
Within = Literal["block", "site"]
Targets = Literal["pruned", "dense", "residual"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PatternSettings(Settings):
    """Where zeros may lie."""

    sparsity: Annotated[
        float | None, Option(WHAT, "Fraction of weights to remove, at least 0 and below 1 [default: 0.5].", "-s")
    ] = None
    pattern: Annotated[
        PatternLike,
        Option(
            WHAT,
            "N:M, such as 2:4: keep at most 2 of every 4 weights; or a sparsity, such as 50%; or one for each glob, as "
            'in {"*.down_proj": "4:8", "*": 0.5}.',
            "-p",
        ),
    ] = None
    per: Annotated[
        Group | None,
        Option(
            WHAT,
            "Compare weights within each row, the whole matrix, or by the row search of Wanda's variant "
            "[default: the method's].",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationSettings(Settings):
    """How the zeros of one pattern are divided among the matrices."""

    allocation: Annotated[
        AllocationName,
        Option(
            WHAT,
            "Give every matrix the same sparsity (uniform), or divide as many zeros by outliers among scores (owl), by "
            "their median (dlp), by spectra (alpha), or by what the loss feels (sensitivity).",
        ),
    ] = "uniform"
    unit: Annotated[
        Unit | None,
        Option(WHAT, "What has one sparsity: a block, a matrix, or a kind of matrices [default: the allocation's]."),
    ] = None
    allocation_option: Annotated[
        MethodOptions, Option(WHAT, "NAME=VALUE for the allocation, such as width=0.1; repeat it.")
    ] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodSettings(PatternSettings):
    """How to prune, and where zeros may lie."""

    method: Annotated[
        MethodLike,
        Option(
            WHAT,
            "A method, or MODULE:FUNCTION or FILE.py:FUNCTION for one of your own. With a plus, a refinement: "
            "wanda+least_squares.",
            "-m",
        ),
    ] = "wanda"
    norm: Annotated[
        Norm | None,
        Option(WHAT, "For methods of gradients: the norm over the calibration samples [default: the method's]."),
    ] = None
    alpha: Annotated[
        float | None,
        Option(WHAT, "For gblm and its kin: the weight of the gradient beside the input's norm [default: 100]."),
    ] = None
    option: Annotated[
        MethodOptions,
        Option(
            WHAT, "NAME=VALUE for the method, REFINEMENT.NAME=VALUE for a refinement, such as damping=0.02; repeat it."
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationSettings(Settings):
    """In which order a matrix has its inputs."""

    permute: Annotated[
        bool,
        Option(
            WHAT,
            "For N:M: let inputs of matrices change places, where the matrices that make them can change with them, so "
            "that the pattern keeps more.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, eq=False)
class StatisticsSettings(Settings):
    """Where statistics are kept."""

    statistics_device: Annotated[
        str | None,
        Option(HOW, "Keep statistics elsewhere: cpu, for wide models on a small GPU [default: with the inputs]."),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PropagationSettings(StatisticsSettings):
    """What a block sees of the blocks that were pruned before it, and what updated weights are fitted to."""

    propagate: Annotated[
        Propagate,
        Option(
            CALIBRATION,
            "Each block sees the outputs of the pruned blocks before it, as published, or of the dense ones.",
        ),
    ] = "pruned"
    within: Annotated[
        Within,
        Option(
            CALIBRATION,
            "Take the statistics of a block at once, as published, or input by input (site), each after what comes "
            "before it in the block was pruned: true sequential order.",
        ),
    ] = "block"
    targets: Annotated[
        Targets,
        Option(
            CALIBRATION,
            "Fit updated weights to the outputs on their own inputs (pruned), as published, to those of the dense "
            "model, or so that the residual stream comes closer to the dense model's (residual, with --within site).",
        ),
    ] = "pruned"
    correction: Annotated[
        float | None,
        Option(CALIBRATION, "Share of what the residual stream lacks that --targets residual adds [default: 0.5]."),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedSettings(ExemptSettings, BatchSettings, ModelSettings, PropagationSettings):
    """How a run goes, whatever its method, matrices and tokens are, in `prune` and in the cells of a sweep."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneSettings(
    ProgressSettings,
    SharedSettings,
    CalibrationSettings,
    SelectionSettings,
    AllocationSettings,
    PermutationSettings,
    MethodSettings,
):
    """What `prune` takes, and its dry run."""

    preset: Annotated[
        PresetName | None,
        Option(
            WHAT,
            "Options by what matters: little time (fast), every kept weight bit for bit (exact), or quality (best). "
            "What it stands for is printed and recorded.",
        ),
    ] = None
    gradient: Annotated[
        File | None,
        Option(
            CALIBRATION,
            "A file that secateur gradients wrote for this model and these samples [default: take them first].",
        ),
    ] = None
    plan: Annotated[
        PlanLike, Option(WHAT, "A file of secateur allocate: it says which matrix loses how many weights.")
    ] = None
    output: Annotated[File | None, Option(OPTIONS, "Folder for the pruned checkpoint.", "-o")] = None
    packed: Annotated[
        bool, Option(OPTIONS, "Leave the zeros out of the files, as secateur pack does; secateur unpack undoes it.")
    ] = False
    overwrite: Annotated[bool, Option(OPTIONS, "Replace an output that Secateur wrote.")] = False
    resume: Resume = False
    resumable: bool = True
    statistics: Survey | None = None
    command: Sequence[str] | None = None
    on_event: OnEvent = lambda event: None

    @classmethod
    def filled(cls, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the options of a preset."""
        return with_preset(keywords)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanSettings(PruneSettings):
    """What the dry run takes."""

    processes: Annotated[
        int,
        Option(HOW, "What the run would take if so many processes shared it, each on a device like this one.", least=1),
    ] = 1
    bandwidth: Annotated[
        str, Option(HOW, "What each process sends to the others in a second, for --processes: 25GB, 400GB, ...")
    ] = "10GB"
    device_memory: Annotated[
        str | None, Option(HOW, "Say whether a process fits into so much memory: 24GB, 80GB, ...")
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocateSettings(
    ProgressSettings,
    StatisticsSettings,
    ExemptSettings,
    BatchSettings,
    ModelSettings,
    CalibrationSettings,
    SelectionSettings,
    AllocationSettings,
    PatternSettings,
):
    """What `allocate` takes."""

    output: Annotated[File, Option(OPTIONS, "File for the plan.", "-o")] = "plan.json"
    overwrite: Annotated[bool, Option(OPTIONS, "Replace an existing file.")] = False
