"""One-shot pruning of pretrained large language models, streamed block by block.

Names are loaded when they are first used, so that `import secateur` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.calibration import Windows, calibration_windows, evaluation_windows
    from secateur.collect.gradient_file import GradientFile
    from secateur.collect.gradient_pass import gradients
    from secateur.core.gradients import GradientKind, GradientNorm
    from secateur.core.gram import Gram
    from secateur.core.patterns import NM, Pattern, Unstructured, parse_pattern
    from secateur.core.problem import Method, Problem, Refinement, Solution, chain, select, with_options
    from secateur.core.statistics import SquaredNorm, Statistic
    from secateur.errors import (
        CalibrationError,
        CheckpointError,
        MethodError,
        ModelStructureError,
        NumericalError,
        PatternError,
        SecateurError,
    )
    from secateur.evaluate.agreement import Agreement, agreement
    from secateur.evaluate.perplexity import Perplexity, perplexity
    from secateur.evaluate.results import Results, model_digest
    from secateur.evaluate.task_differences import TaskComparison, task_differences
    from secateur.evaluate.task_results import TaskResult, TaskResults
    from secateur.evaluate.tasks import tasks
    from secateur.methods.admm import admm
    from secateur.methods.alps import alps
    from secateur.methods.gblm import gblm, gblm_inverse, gradient
    from secateur.methods.least_squares import least_squares
    from secateur.methods.magnitude import magnitude
    from secateur.methods.obs_update import magnitude_iterative, obs_update, wanda_iterative
    from secateur.methods.pruner_zero import pruner_zero
    from secateur.methods.ria import ria
    from secateur.methods.sparsegpt import sparsegpt
    from secateur.methods.swaps import swaps
    from secateur.methods.wanda import wanda, wanda_variant
    from secateur.methods.wanda_plus import wanda_plus
    from secateur.plans.plan import Plan, uniform
    from secateur.pruning.engine import prune
    from secateur.pruning.forecast import Estimate, estimate
    from secateur.record.manifest import Manifest, Verification, verify
    from secateur.recover.block import reconstruct
    from secateur.recover.callback import SparsityCallback
    from secateur.recover.fine_tuning import Recovery, fine_tune
    from secateur.recover.merge import Merge, merge
    from secateur.report.inspect import inspect
    from secateur.runs.events import Event
    from secateur.sweeps.folder import Sweep
    from secateur.sweeps.run import sweep

_HOMES = {
    "Agreement": "evaluate.agreement",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "Estimate": "pruning.forecast",
    "Event": "runs.events",
    "GradientFile": "collect.gradient_file",
    "GradientKind": "core.gradients",
    "GradientNorm": "core.gradients",
    "Gram": "core.gram",
    "Manifest": "record.manifest",
    "Merge": "recover.merge",
    "Method": "core.problem",
    "MethodError": "errors",
    "ModelStructureError": "errors",
    "NM": "core.patterns",
    "NumericalError": "errors",
    "Pattern": "core.patterns",
    "PatternError": "errors",
    "Perplexity": "evaluate.perplexity",
    "Plan": "plans.plan",
    "Problem": "core.problem",
    "Recovery": "recover.fine_tuning",
    "Refinement": "core.problem",
    "Results": "evaluate.results",
    "SecateurError": "errors",
    "Solution": "core.problem",
    "SparsityCallback": "recover.callback",
    "SquaredNorm": "core.statistics",
    "Statistic": "core.statistics",
    "Sweep": "sweeps.folder",
    "TaskComparison": "evaluate.task_differences",
    "TaskResult": "evaluate.task_results",
    "TaskResults": "evaluate.task_results",
    "Unstructured": "core.patterns",
    "Verification": "record.manifest",
    "Windows": "calibration",
    "admm": "methods.admm",
    "agreement": "evaluate.agreement",
    "alps": "methods.alps",
    "calibration_windows": "calibration",
    "chain": "core.problem",
    "estimate": "pruning.forecast",
    "evaluation_windows": "calibration",
    "fine_tune": "recover.fine_tuning",
    "gblm": "methods.gblm",
    "gblm_inverse": "methods.gblm",
    "gradient": "methods.gblm",
    "gradients": "collect.gradient_pass",
    "inspect": "report.inspect",
    "least_squares": "methods.least_squares",
    "magnitude": "methods.magnitude",
    "magnitude_iterative": "methods.obs_update",
    "merge": "recover.merge",
    "model_digest": "evaluate.results",
    "obs_update": "methods.obs_update",
    "parse_pattern": "core.patterns",
    "perplexity": "evaluate.perplexity",
    "prune": "pruning.engine",
    "pruner_zero": "methods.pruner_zero",
    "reconstruct": "recover.block",
    "ria": "methods.ria",
    "select": "core.problem",
    "sparsegpt": "methods.sparsegpt",
    "swaps": "methods.swaps",
    "sweep": "sweeps.run",
    "task_differences": "evaluate.task_differences",
    "tasks": "evaluate.tasks",
    "uniform": "plans.plan",
    "verify": "record.manifest",
    "wanda": "methods.wanda",
    "wanda_iterative": "methods.obs_update",
    "wanda_plus": "methods.wanda_plus",
    "wanda_variant": "methods.wanda",
    "with_options": "core.problem",
}

__all__ = [  # noqa: RUF022 - sorted as a test checks, capitals first
    "Agreement",
    "CalibrationError",
    "CheckpointError",
    "Estimate",
    "Event",
    "GradientFile",
    "GradientKind",
    "GradientNorm",
    "Gram",
    "Manifest",
    "Merge",
    "Method",
    "MethodError",
    "ModelStructureError",
    "NM",
    "NumericalError",
    "Pattern",
    "PatternError",
    "Perplexity",
    "Plan",
    "Problem",
    "Recovery",
    "Refinement",
    "Results",
    "SecateurError",
    "Solution",
    "SparsityCallback",
    "SquaredNorm",
    "Statistic",
    "Sweep",
    "TaskComparison",
    "TaskResult",
    "TaskResults",
    "Unstructured",
    "Verification",
    "Windows",
    "admm",
    "agreement",
    "alps",
    "calibration_windows",
    "chain",
    "estimate",
    "evaluation_windows",
    "fine_tune",
    "gblm",
    "gblm_inverse",
    "gradient",
    "gradients",
    "inspect",
    "least_squares",
    "magnitude",
    "magnitude_iterative",
    "merge",
    "model_digest",
    "obs_update",
    "parse_pattern",
    "perplexity",
    "prune",
    "pruner_zero",
    "reconstruct",
    "ria",
    "select",
    "sparsegpt",
    "swaps",
    "sweep",
    "task_differences",
    "tasks",
    "uniform",
    "verify",
    "wanda",
    "wanda_iterative",
    "wanda_plus",
    "wanda_variant",
    "with_options",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(import_module(f"secateur.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
