"""One-shot pruning of pretrained large language models, streamed block by block.

A name is loaded when it is first used, so that `import secateur` costs nothing; type checkers read `__init__.pyi`.
"""

import sys
from importlib import import_module

if sys.platform == "win32":
    raise ImportError(
        "Secateur runs on Linux, and on other systems of the POSIX family: files are locked and written in their way. "
        "On Windows, install it in the Windows Subsystem for Linux (WSL)."
    )

__version__ = "0.1.0"

_NAMES = {
    "calibration.drawing": ("calibration_windows", "evaluation_windows"),
    "calibration.windows": ("Windows",),
    "collect.gradient_file": ("GradientFile",),
    "collect.gradient_pass": ("gradients",),
    "core.gradients": ("GradientKind", "GradientNorm"),
    "core.gram": ("Gram",),
    "core.patterns": ("NM", "Pattern", "Unstructured", "parse_pattern"),
    "core.problem": ("Method", "Problem", "Refinement", "Solution", "chain", "select", "with_options"),
    "core.statistics": ("SquaredNorm", "Statistic"),
    "errors": (
        "CalibrationError",
        "CheckpointError",
        "MethodError",
        "ModelStructureError",
        "NumericalError",
        "PatternError",
        "ProcessError",
        "SecateurError",
    ),
    "evaluate.agreement": ("Agreement", "agreement"),
    "evaluate.labelled": ("Labelled", "labelled"),
    "evaluate.perplexity": ("Perplexity", "perplexity"),
    "evaluate.results": ("Results",),
    "evaluate.similarity": ("Similarity", "similarity"),
    "evaluate.task_results": ("TaskComparison", "TaskResult", "TaskResults", "task_differences"),
    "evaluate.tasks": ("tasks",),
    "evaluate.verdict": ("Verdict", "verdict"),
    "files.digest": ("model_digest",),
    "methods.admm": ("admm",),
    "methods.alps": ("alps",),
    "methods.gblm": ("gblm", "gblm_inverse", "gradient"),
    "methods.least_squares": ("least_squares",),
    "methods.magnitude": ("magnitude",),
    "methods.obs_update": ("magnitude_iterative", "obs_update", "wanda_iterative"),
    "methods.pruner_zero": ("pruner_zero",),
    "methods.ria": ("ria",),
    "methods.sparsegpt": ("sparsegpt",),
    "methods.swaps": ("swaps",),
    "methods.wanda": ("wanda", "wanda_variant"),
    "methods.wanda_plus": ("wanda_plus",),
    "plans.allocated": ("Allocated",),
    "plans.plan": ("Plan",),
    "plans.uniform": ("uniform",),
    "pruning.allocating": ("allocate",),
    "pruning.engine": ("prune",),
    "pruning.forecast": ("Estimate", "estimate"),
    "record.manifest": ("Manifest",),
    "record.verify": ("Verification", "verify"),
    "recover.block": ("reconstruct",),
    "recover.callback": ("SparsityCallback",),
    "recover.fine_tuning": ("Recovery", "fine_tune"),
    "recover.merge": ("Merge", "merge"),
    "report.inspect": ("inspect",),
    "report.push": ("Push", "push_to_hub"),
    "runs.events": ("Event",),
    "runtime.bench": ("Bench", "bench"),
    "runtime.generate": ("Generated", "generate"),
    "runtime.load": ("load", "pack_module"),
    "runtime.pack": ("Packing", "pack"),
    "runtime.unpack": ("Unpacking", "unpack"),
    "sweeps.folder": ("Sweep",),
    "sweeps.run": ("sweep",),
    "sweeps.several": ("Sweeps", "sweep_models"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)
# Commands that have another name in Python, for whoever types theirs.
_OF_COMMANDS = {
    "compare": "agreement",
    "eval": "perplexity",
    "plan": "estimate",
    "push": "push_to_hub",
    "recover": "fine_tune",
}


def __getattr__(name: str) -> object:
    if name == "testing":
        return import_module("secateur.testing")
    if name not in _HOMES:
        other = f"; the command {name} is secateur.{_OF_COMMANDS[name]}" if name in _OF_COMMANDS else ""
        raise AttributeError(f"module 'secateur' has no attribute '{name}'{other}")
    return getattr(import_module(f"secateur.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "testing"])
