"""One-shot pruning of pretrained large language models, streamed block by block.

Names are loaded when they are first used, so that `import secateur` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from secateur.block_loop import Event
    from secateur.calibration import Windows, calibration_windows, evaluation_windows
    from secateur.core.gradients import GradientKind, GradientNorm
    from secateur.core.gram import Gram
    from secateur.core.patterns import NM, Pattern, Unstructured, parse_pattern
    from secateur.core.problem import Method, Problem, Refinement, Solution, chain, select, with_options
    from secateur.core.statistics import SquaredNorm, Statistic
    from secateur.engine import prune
    from secateur.errors import (
        CalibrationError,
        CheckpointError,
        ModelStructureError,
        NumericalError,
        PatternError,
        SecateurError,
    )
    from secateur.evaluate.agreement import Agreement, agreement
    from secateur.evaluate.perplexity import Perplexity, perplexity
    from secateur.forecast import Estimate, estimate
    from secateur.gradient_file import GradientFile
    from secateur.gradient_pass import gradients
    from secateur.manifest import Manifest, Verification, verify
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
    from secateur.plan import Plan, uniform
    from secateur.recover.block import reconstruct
    from secateur.report.inspect import inspect

_HOMES = {
    "Agreement": "evaluate.agreement",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "Estimate": "forecast",
    "Event": "block_loop",
    "GradientFile": "gradient_file",
    "GradientKind": "core.gradients",
    "GradientNorm": "core.gradients",
    "Gram": "core.gram",
    "Manifest": "manifest",
    "Method": "core.problem",
    "ModelStructureError": "errors",
    "NM": "core.patterns",
    "NumericalError": "errors",
    "Pattern": "core.patterns",
    "PatternError": "errors",
    "Perplexity": "evaluate.perplexity",
    "Plan": "plan",
    "Problem": "core.problem",
    "Refinement": "core.problem",
    "SecateurError": "errors",
    "Solution": "core.problem",
    "SquaredNorm": "core.statistics",
    "Statistic": "core.statistics",
    "Unstructured": "core.patterns",
    "Verification": "manifest",
    "Windows": "calibration",
    "admm": "methods.admm",
    "agreement": "evaluate.agreement",
    "alps": "methods.alps",
    "calibration_windows": "calibration",
    "chain": "core.problem",
    "estimate": "forecast",
    "evaluation_windows": "calibration",
    "gblm": "methods.gblm",
    "gblm_inverse": "methods.gblm",
    "gradient": "methods.gblm",
    "gradients": "gradient_pass",
    "inspect": "report.inspect",
    "least_squares": "methods.least_squares",
    "magnitude": "methods.magnitude",
    "magnitude_iterative": "methods.obs_update",
    "obs_update": "methods.obs_update",
    "parse_pattern": "core.patterns",
    "perplexity": "evaluate.perplexity",
    "prune": "engine",
    "pruner_zero": "methods.pruner_zero",
    "reconstruct": "recover.block",
    "ria": "methods.ria",
    "select": "core.problem",
    "sparsegpt": "methods.sparsegpt",
    "swaps": "methods.swaps",
    "uniform": "plan",
    "verify": "manifest",
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
    "Method",
    "ModelStructureError",
    "NM",
    "NumericalError",
    "Pattern",
    "PatternError",
    "Perplexity",
    "Plan",
    "Problem",
    "Refinement",
    "SecateurError",
    "Solution",
    "SquaredNorm",
    "Statistic",
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
    "gblm",
    "gblm_inverse",
    "gradient",
    "gradients",
    "inspect",
    "least_squares",
    "magnitude",
    "magnitude_iterative",
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
