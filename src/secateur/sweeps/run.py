"""`sweep`: a grid of prunings and their evaluation, in one folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from secateur.calibration.documents import Corpus
from secateur.calibration.drawing import DEFAULT_LENGTH, DEFAULT_SAMPLES, calibration_windows
from secateur.calibration.hub import default_text
from secateur.calibration.windows import Windows
from secateur.collect.model_windows import is_text, with_default_text
from secateur.collect.settings import CalibrationSettings, ModelSettings
from secateur.core.fingerprint import fingerprint
from secateur.core.problem import Method
from secateur.errors import CalibrationError, ModelStructureError, PatternError
from secateur.evaluate.tasks import check_names
from secateur.models.flow.memory import trim
from secateur.models.opening.opened import OpenedModel, open_model
from secateur.pruning.preparation import chosen_correction
from secateur.runs.options import shared, taking
from secateur.sweeps.folder import Sweep, SweepFolder
from secateur.sweeps.grid import grid, seeds_of
from secateur.sweeps.loop import SweepLoop
from secateur.sweeps.on_ray import connected, require_ray
from secateur.sweeps.settings import SweepSettings


@taking(SweepSettings)
def sweep(settings: SweepSettings) -> Sweep:
    """The grid of all `methods` with all `patterns`: every cell pruned, evaluated and recorded in the folder `output`.

    `methods` are named by their own names ("wanda", "wanda+swaps"), or by the keys of a mapping: the same method with
    other options needs a name of its own. `patterns` are those of `prune`: 0.5, "2:4". The dense model and every cell
    are evaluated on each data set of `data` in `windows` windows of `eval_length` tokens; with `agreement`, cells are
    also compared with the dense model's predictions. `keep` says which pruned checkpoints stay: "none", "best" (for
    each pattern the one with the lowest perplexity on the first data set) or "all".
    `data` may also be a mapping from names to texts or token ids in memory.
    With several `seeds` each cell whose method learns from calibration samples is run once for each draw of them, and
    the tables have means, with the standard deviation between draws beside the standard error over windows. `latex`
    also writes them as LaTeX. With `tasks` the dense model and every cell also answer tasks of lm-evaluation-harness,
    as `secateur.tasks` does. The other options are those of `prune`. With ``bos="auto"`` the dense model decides once
    for each text and for the calibration, and the sweep goes on with that.

    A sweep that is started again in its folder does not run finished cells again. Methods, patterns and data sets may
    be added; other settings may not change. A method that changed, its code and everything that it refers to included,
    is refused once a cell is finished with it: name it in `again` to run its cells anew. A cell that fails is recorded
    with its error, and tried again the next time.
    With `ray` the cells are tasks of Ray, which run side by side with `ray_cpus` cores each: True starts Ray on this
    machine's cores, and an address ("auto", "HOST:6379", "ray://HOST:10001") connects to a cluster. The tables are the
    same.
    With `dry_run` it ends after `on_estimate`, and nothing is written.

    Raises `CheckpointError` for a folder of something else or of other settings, `PatternError` for a method whose
    identity cannot be recorded, and what `prune` and `perplexity` raise where that concerns every cell.
    """
    model = settings.model
    if isinstance(model, nn.Module | OpenedModel):
        raise ModelStructureError(
            f"{type(model).__name__}: a sweep prunes one model many times, and a module in memory is pruned in place. "
            "Save it with save_pretrained, and pass the folder."
        )
    if settings.ray is not False:
        require_ray()
    tasks = grid(settings)
    if settings.tasks:
        check_names(settings.tasks)
    folder = SweepFolder(settings.output, model)
    texts = _texts(settings, folder)
    correction = chosen_correction(settings)
    with ExitStack() as stack:
        opened = open_model(**shared(settings, ModelSettings))
        unknown = set(settings.again) - {task.cell.method for task in tasks}
        if unknown:
            known = ", ".join(dict.fromkeys(task.cell.method for task in tasks))
            raise PatternError(f"--again {min(unknown)}: is no method of this call; it has {known}.")
        settings = with_default_text(settings)
        calibration: Any = settings.calibration
        if isinstance(calibration, Tensor | Windows):
            calibration = calibration_windows(calibration, None, samples=settings.samples, length=settings.length)
        _check_draws(calibration, settings)
        recorded = {
            "model": str(opened.origin.get("path")),
            "revision": settings.revision,
            "only": list(settings.only),
            "skip": list(settings.skip),
            "propagate": settings.propagate,
            "within": settings.within,
            "targets": settings.targets,
            "correction": correction,
            **_calibration_settings(calibration, settings),
            "on_nonfinite": settings.on_nonfinite,
            "unseen": settings.unseen,
            "statistics_device": settings.statistics_device,
            "batch_size": settings.batch_size,
            "device": opened.skeleton.device.type,
            "dtype": str(opened.skeleton.dtype).removeprefix("torch."),
            "bos": settings.bos,
            "bos_choices": {},
            "eval_length": settings.eval_length or DEFAULT_LENGTH,
            "windows": settings.windows,
            "keep": settings.keep,
            "agreement": settings.agreement,
            "data": texts,
            "tasks": list(settings.tasks),
            **({"limit": settings.limit, "shots": settings.shots} if settings.tasks else {}),
            "methods": {task.cell.method: _described(task.method) for task in tasks},
            "digests": {},
        }
        if not settings.dry_run:
            stack.enter_context(folder.locked())
            if settings.ray is not False:  # before anything long, so that a wrong address shows at once
                stack.enter_context(connected(settings.ray))
        loop = SweepLoop(
            folder=folder,
            asked=settings,
            tasks=tasks,
            settings=recorded,
            drawing=CalibrationSettings(
                calibration=calibration,
                tokenizer=settings.tokenizer or opened.load_tokenizer(),
                **{name: recorded[name] for name in ("samples", "length", "seed", "sampling", "bos")},
            ),
        )
        loop.join(folder.found())
        loop.cut_texts(opened, decide=not settings.dry_run)
        settings.on_estimate(loop.estimate(opened))
        if not settings.dry_run:
            loop.draw_calibration(opened)
            del opened
            trim()
            stack.callback(loop.close)
            loop.run()
        return loop.sweep


def _texts(settings: SweepSettings, folder: SweepFolder) -> list[str]:
    """The texts to evaluate on: where none is given, those of the sweep that is there, or the default one."""
    if len(settings.data):
        return [settings.data] if isinstance(settings.data, str) else list(dict.fromkeys(settings.data))
    known = folder.found()
    return known.data if known is not None else [default_text("evaluation")]


def _check_draws(calibration: Any, settings: SweepSettings) -> None:
    """Raise `CalibrationError` for several draws of tokens that are taken as they are."""
    if len(seeds_of(settings)) > 1 and calibration not in ((), []) and not is_text(calibration):
        raise CalibrationError(
            f"--seeds: got {len(seeds_of(settings))} draws of token ids, which are taken as they are: all would be the "
            "same. Calibrate on a text, or leave --seeds out."
        )


def _described(method: Method) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    options = {key: value if isinstance(value, plain) else str(value) for key, value in method.options.items()}
    return {"name": method.name, "options": options, "fingerprint": fingerprint(method)}


def _calibration_settings(
    calibration: str | Corpus | Sequence[str] | Windows, settings: SweepSettings
) -> dict[str, Any]:
    samples, length = settings.samples, settings.length
    if isinstance(calibration, Windows):
        specs, samples, length = ["token ids"], calibration.samples, calibration.length
    else:
        specs = list(map(str, [calibration] if isinstance(calibration, str | Corpus) else calibration))
        if is_text(calibration):
            samples, length = samples or DEFAULT_SAMPLES, length or DEFAULT_LENGTH
    how = {"seed": settings.seed, "sampling": settings.sampling}
    return {"calibration": specs, "samples": samples, "length": length, **how}
