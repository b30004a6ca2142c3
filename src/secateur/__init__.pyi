"""The public names for type checkers, which read this file instead of `__init__.py`."""

import secateur.testing as testing  # noqa: F401 - public
from secateur.calibration.drawing import (
    calibration_windows as calibration_windows,
    evaluation_windows as evaluation_windows,
)
from secateur.calibration.windows import Windows as Windows
from secateur.collect.gradient_file import GradientFile as GradientFile
from secateur.collect.gradient_pass import gradients as gradients
from secateur.core.gradients import GradientKind as GradientKind, GradientNorm as GradientNorm
from secateur.core.gram import Gram as Gram
from secateur.core.patterns import (
    NM as NM,
    Pattern as Pattern,
    Unstructured as Unstructured,
    parse_pattern as parse_pattern,
)
from secateur.core.problem import (
    Method as Method,
    Problem as Problem,
    Refinement as Refinement,
    Solution as Solution,
    chain as chain,
    select as select,
    with_options as with_options,
)
from secateur.core.statistics import SquaredNorm as SquaredNorm, Statistic as Statistic
from secateur.errors import (
    CalibrationError as CalibrationError,
    CheckpointError as CheckpointError,
    MethodError as MethodError,
    ModelStructureError as ModelStructureError,
    NumericalError as NumericalError,
    PatternError as PatternError,
    ProcessError as ProcessError,
    SecateurError as SecateurError,
)
from secateur.evaluate.agreement import Agreement as Agreement, agreement as agreement
from secateur.evaluate.labelled import Labelled as Labelled, labelled as labelled
from secateur.evaluate.perplexity import Perplexity as Perplexity, perplexity as perplexity
from secateur.evaluate.results import Results as Results
from secateur.evaluate.similarity import Similarity as Similarity, similarity as similarity
from secateur.evaluate.task_results import (
    TaskComparison as TaskComparison,
    TaskResult as TaskResult,
    TaskResults as TaskResults,
    task_differences as task_differences,
)
from secateur.evaluate.tasks import tasks as tasks
from secateur.evaluate.verdict import Verdict as Verdict, verdict as verdict
from secateur.files.digest import model_digest as model_digest
from secateur.methods.admm import admm as admm
from secateur.methods.alps import alps as alps
from secateur.methods.gblm import gblm as gblm, gblm_inverse as gblm_inverse, gradient as gradient
from secateur.methods.least_squares import least_squares as least_squares
from secateur.methods.magnitude import magnitude as magnitude
from secateur.methods.obs_update import (
    magnitude_iterative as magnitude_iterative,
    obs_update as obs_update,
    wanda_iterative as wanda_iterative,
)
from secateur.methods.pruner_zero import pruner_zero as pruner_zero
from secateur.methods.ria import ria as ria
from secateur.methods.sparsegpt import sparsegpt as sparsegpt
from secateur.methods.swaps import swaps as swaps
from secateur.methods.wanda import wanda as wanda, wanda_variant as wanda_variant
from secateur.methods.wanda_plus import wanda_plus as wanda_plus
from secateur.plans.allocated import Allocated as Allocated
from secateur.plans.plan import Plan as Plan
from secateur.plans.uniform import uniform as uniform
from secateur.pruning.allocating import allocate as allocate
from secateur.pruning.engine import prune as prune
from secateur.pruning.forecast import Estimate as Estimate, estimate as estimate
from secateur.record.manifest import Manifest as Manifest
from secateur.record.verify import Verification as Verification, verify as verify
from secateur.recover.block import reconstruct as reconstruct
from secateur.recover.callback import SparsityCallback as SparsityCallback
from secateur.recover.fine_tuning import Recovery as Recovery, fine_tune as fine_tune
from secateur.recover.merge import Merge as Merge, merge as merge
from secateur.report.inspect import inspect as inspect
from secateur.report.push import Push as Push, push_to_hub as push_to_hub
from secateur.runs.events import Event as Event
from secateur.runtime.bench import Bench as Bench, bench as bench
from secateur.runtime.generate import Generated as Generated, generate as generate
from secateur.runtime.load import load as load, pack_module as pack_module
from secateur.runtime.pack import Packing as Packing, pack as pack
from secateur.runtime.unpack import Unpacking as Unpacking, unpack as unpack
from secateur.sweeps.folder import Sweep as Sweep
from secateur.sweeps.run import sweep as sweep
from secateur.sweeps.several import Sweeps as Sweeps, sweep_models as sweep_models

__version__: str
__all__: list[str]
