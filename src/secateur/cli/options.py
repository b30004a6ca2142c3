"""The options that commands share, as typer wants them, and the YAML file that can give them."""

from pathlib import Path
from typing import Annotated, Any

import typer

METHOD_NAMES = (  # a test keeps this equal to secateur.methods.METHODS
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
)
REFINEMENT_NAMES = ("least_squares", "obs_update", "swaps")


def load_config(context: typer.Context, value: Path | None) -> Path | None:
    """Use a YAML file as defaults for the options that are not given. Unknown keys are errors."""
    if value is None:
        return None
    import difflib

    from secateur.errors import CheckpointError
    from secateur.files.reading import read_yaml

    try:
        content = read_yaml(value.expanduser())
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from None
    content = {} if content is None or content == "" else content
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text"
        raise typer.BadParameter(f"{value}: expected keys and values, found {kind}.")
    known = {
        max(parameter.opts, key=len).lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        if parameter.name not in ("config", "help")
    }
    defaults: dict[str, Any] = {}
    for key, item in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f' Did you mean "{near[0]}"?' if near else f" Known keys: {', '.join(sorted(known))}."
            raise typer.BadParameter(f'{value}: unknown key "{key}".{hint}')
        if item in ("", "null", "~"):
            continue
        parameter = known[name]
        multiple = getattr(parameter, "multiple", False) or parameter.nargs == -1
        defaults[str(parameter.name)] = _option(value, key, item, multiple)
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _option(file: Path, key: str, item: Any, multiple: bool) -> str | list[str]:
    """What a key of a YAML file gives to an option, with ~ written out as a shell would."""
    items = item if isinstance(item, list) and multiple else [item]
    for part in items:
        if not isinstance(part, str):
            kind = "a list" if isinstance(part, list) else "keys and values"
            expected = "text or a list of texts" if multiple else "one text"
            raise typer.BadParameter(f'{file}: "{key}" holds {kind}, expected {expected}.')
    texts = [str(Path(part).expanduser()) if part.startswith("~/") else part for part in items]
    return texts if multiple else texts[0]


ModelArgument = Annotated[str, typer.Argument(help="A folder, a hub id, or a GGUF file.", show_default=False)]
MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help=f"{', '.join(METHOD_NAMES)}, or MODULE:FUNCTION or FILE.py:FUNCTION for a method of your own. "
        f"With a plus, a refinement: {', '.join(REFINEMENT_NAMES)}.",
        rich_help_panel="What to prune",
    ),
]
NormOption = Annotated[
    str | None,
    typer.Option(
        "--norm",
        help="For methods of gradients: l1 or l2, over the calibration samples [default: the method's].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        help="For gblm and its kin: the weight of the gradient beside the input's norm [default: 100].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
MethodOptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="NAME=VALUE for the method, REFINEMENT.NAME=VALUE for a refinement, such as damping=0.02; repeat it.",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
GradientOption = Annotated[
    Path | None,
    typer.Option(
        "--gradient",
        help="A file that secateur gradients wrote for this model and these samples [default: take them first].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        help="Fraction of weights to remove, at least 0 and below 1 [default: 0.5].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        "-p",
        help="N:M, such as 2:4: keep at most 2 of every 4 weights, instead of --sparsity.",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
PerOption = Annotated[
    str | None,
    typer.Option(
        "--per",
        help="Compare weights within each row, the whole matrix, or by the row search of Wanda's "
        "variant: row, matrix or search [default: the method's].",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Prune only matrices that this glob matches; may be repeated.",
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        help='Leave matrices dense that this glob matches, such as "*.down_proj"; may be repeated.',
        rich_help_panel="What to prune",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        "-c",
        help="c4, wikitext2, python-docs, hf:NAME[:CONFIG][:SPLIT][:FIELD], a .txt, .jsonl[:FIELD], .json[:FIELD], "
        ".parquet[:FIELD] file, or .safetensors with input_ids (and attention_mask). Repeat with weights to mix: "
        "0.7*c4 [default: c4].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        "-n",
        min=1,
        help="Calibration samples: token windows [default: 128].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
LengthOption = Annotated[
    int | None, typer.Option("--length", "-l", min=2, help="Tokens in each window [default: 2048].", show_default=False)
]
WindowsOption = Annotated[
    int | None,
    typer.Option("--windows", "-w", min=1, help="Use only the first windows [default: all].", show_default=False),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the sampling.", rich_help_panel="Calibration")]
SamplingOption = Annotated[
    str | None,
    typer.Option(
        "--sampling",
        help="document: windows within one long document, as in the papers; concat: within all "
        "text packed together [default: as in the papers].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
_BOS = (
    "Where windows of text have the token that begins a text: papers (before the first window alone), always (before "
    "every window), never, or auto: as papers, unless the model reads a window over 0.1 nats better with it in front."
)
BosOption = Annotated[str, typer.Option("--bos", help=_BOS, rich_help_panel="Calibration")]
EvaluationBosOption = Annotated[str, typer.Option("--bos", help=_BOS)]
PropagateOption = Annotated[
    str,
    typer.Option(
        "--propagate",
        help="Each block sees the outputs of the pruned blocks before it, as published, "
        "or of the dense ones: pruned or dense.",
        rich_help_panel="Calibration",
    ),
]
WithinOption = Annotated[
    str,
    typer.Option(
        "--within",
        help="Take the statistics of a block at once, as published, or of each input behind what was pruned before "
        "it in the block: block or site.",
        rich_help_panel="Calibration",
    ),
]
TargetsOption = Annotated[
    str,
    typer.Option(
        "--targets",
        help="Fit updated weights to the outputs on their own inputs, as published, to those of the dense model, or so "
        "that the residual stream comes closer to the dense model's (with --within site): pruned, dense or residual.",
        rich_help_panel="Calibration",
    ),
]
CorrectionOption = Annotated[
    float | None,
    typer.Option(
        "--correction",
        help="Share of what the residual stream lacks that --targets residual makes up for [default: 0.5].",
        rich_help_panel="Calibration",
        show_default=False,
    ),
]
StatisticsDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--statistics-device",
        help="Keep statistics elsewhere, such as cpu for wide models on a small GPU [default: with the inputs].",
        rich_help_panel="How to run",
        show_default=False,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Samples that run through a block, or requests of a task that run through the model, at once "
        "[default: auto].",
        rich_help_panel="How to run",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="How to run")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="To compute in: auto, float32, bfloat16, float16, float64. The output keeps the source's.",
        rich_help_panel="How to run",
    ),
]
OffloadOption = Annotated[
    str,
    typer.Option(
        "--offload-states",
        help="Hidden states in memory-mapped files: auto, never, or a folder.",
        rich_help_panel="How to run",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Branch, tag or commit on the hub.", rich_help_panel="How to run", show_default=False
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the code that the model brings along.", rich_help_panel="How to run"),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        "-t",
        help="Tasks and groups of lm-evaluation-harness, with commas between them; also commonsense7 and commonsense6, "
        "the means of the papers.",
        rich_help_panel="Tasks",
        show_default=False,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help="Only the first documents of each task [default: all].",
        rich_help_panel="Tasks",
        show_default=False,
    ),
]
ShotsOption = Annotated[
    int | None,
    typer.Option(
        "--shots",
        min=0,
        help="Examples in each prompt [default: the task's own, mostly 0].",
        rich_help_panel="Tasks",
        show_default=False,
    ),
]
TaskDataOption = Annotated[
    Path | None,
    typer.Option(
        "--task-data",
        help="A folder of local files TASK_SPLIT*.jsonl in the place of data sets from the hub.",
        rich_help_panel="Tasks",
        show_default=False,
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option("--fresh", help="Run tasks again that have been run before.", rich_help_panel="Tasks"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with these options as keys; options given here win over it.",
        callback=load_config,
        is_eager=True,
        show_default=False,
    ),
]
