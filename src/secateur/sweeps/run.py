"""`sweep`: a grid of prunings and their evaluation, in one folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from secateur.calibration import Windows, calibration_windows, check_bos
from secateur.calibration.corpora import is_token_file
from secateur.calibration.drawing import DEFAULT_LENGTH, DEFAULT_SAMPLES
from secateur.collect.model_windows import BOS_WORDS
from secateur.core.fingerprint import fingerprint
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.problem import Method
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, PatternError
from secateur.models.flow.memory import trim
from secateur.models.opening.opened import open_model
from secateur.pruning.preparation import chosen_correction
from secateur.sweeps.estimate import SweepEstimate, Task
from secateur.sweeps.folder import Cell, Sweep, SweepFolder
from secateur.sweeps.loop import SweepEvent, SweepLoop

KEEP = ("none", "best", "all")


def sweep(
    model: str | os.PathLike[str],
    *,
    methods: Sequence[Method] | Mapping[str, Method],
    patterns: Sequence[Pattern] = (Unstructured(0.5),),
    output: str | os.PathLike[str],
    data: str | Sequence[str] = "wikitext2",
    eval_length: int | None = None,
    windows: int | None = None,
    agreement: bool = False,
    keep: str = "none",
    calibration: str | Sequence[str] | Tensor | Windows = "c4",
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: str | None = None,
    bos: str = "auto",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    propagate: str = "pruned",
    within: str = "block",
    targets: str = "pruned",
    correction: float | None = None,
    statistics_device: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offload_states: str = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    again: Sequence[str] = (),
    dry_run: bool = False,
    command: Sequence[str] | None = None,
    on_estimate: Callable[[SweepEstimate], None] = lambda estimate: None,
    on_event: Callable[[SweepEvent], None] = lambda event: None,
) -> Sweep:
    """The grid of all `methods` with all `patterns`: every cell pruned, evaluated and recorded in the folder `output`.

    `methods` are named by their own names, or by the keys of a mapping: the same method with other options needs a
    name of its own. The dense model and every cell are evaluated on each data set of `data` in `windows` windows of
    `eval_length` tokens; with `agreement`, cells are also compared with the dense model's predictions. `keep` says
    which pruned checkpoints stay: "none", "best" (for each pattern the one with the lowest perplexity on the first data
    set) or "all".
    The other options are those of `prune`. With ``bos="auto"`` the dense model decides once for each text and for the
    calibration, and the sweep goes on with that.

    A sweep that is started again in its folder does not run finished cells again. Methods, patterns and data sets may
    be added; other settings may not change. A method that changed, its code and everything that it refers to included,
    is refused once a cell is finished with it: name it in `again` to run its cells anew. A cell that fails is recorded
    with its error, and tried again the next time.
    With `dry_run` it ends after `on_estimate`, and nothing is written.

    Raises `CheckpointError` for a folder of something else or of other settings, `PatternError` for a method whose
    identity cannot be recorded, and what `prune` and `perplexity` raise where that concerns every cell.
    """
    if isinstance(model, nn.Module):
        raise ModelStructureError(
            f"{type(model).__name__}: a sweep prunes one model many times, and a module in memory is pruned in place. "
            "Save it with save_pretrained, and give the folder."
        )
    check_bos(bos, BOS_WORDS)
    if keep not in KEEP:
        raise CheckpointError(f'--keep: got "{keep}", expected none, best or all.')
    only, skip, data, again = ([word] if isinstance(word, str) else list(word) for word in (only, skip, data, again))
    if not data:
        raise CalibrationError("--data: got none, expected at least one text to evaluate on.")
    folder = SweepFolder(output, model)
    what = {
        "only": only,
        "skip": skip,
        "propagate": propagate,
        "within": within,
        "targets": targets,
        "correction": chosen_correction(targets, correction),
    }
    opening: dict[str, Any] = {"device": device, "dtype": dtype}
    opening |= {"revision": revision, "trust_remote_code": trust_remote_code}
    running = {"statistics_device": statistics_device, "batch_size": batch_size}
    with ExitStack() as stack:
        opened = open_model(model, **opening)
        tasks = _grid(methods, patterns)
        unknown = set(again) - {task.cell.method for task in tasks}
        if unknown:
            known = ", ".join(dict.fromkeys(task.cell.method for task in tasks))
            raise PatternError(f"--again {min(unknown)}: is no method of this call; it has {known}.")
        if isinstance(calibration, Tensor | Windows):
            calibration = calibration_windows(calibration, None, samples=samples, length=length)
        settings = {
            "model": str(opened.origin.get("path")),
            "revision": revision,
            **what,
            **_calibration_settings(calibration, samples, length, seed, sampling),
            **running,
            "device": opened.skeleton.device.type,
            "dtype": str(opened.skeleton.dtype).removeprefix("torch."),
            "bos": bos,
            "bos_choices": {},
            "eval_length": eval_length or DEFAULT_LENGTH,
            "windows": windows,
            "keep": keep,
            "agreement": agreement,
            "data": list(dict.fromkeys(data)),
            "methods": {task.cell.method: _described(task.method) for task in tasks},
            "digests": {},
        }
        if not dry_run:
            stack.enter_context(folder.locked())
        loop = SweepLoop(
            folder=folder,
            model=model,
            tasks=tasks,
            settings=settings,
            options={**what, **running, **opening, "offload_states": offload_states},
            tokenizer=tokenizer or opened.load_tokenizer(),
            command=command,
            on_event=on_event,
            again=again,
        )
        loop.join(folder.found())
        loop.cut_texts(opened, decide=not dry_run)
        on_estimate(loop.estimate(opened, calibration))
        if not dry_run:
            loop.draw_calibration(opened, calibration)
            del opened
            trim()
            stack.callback(loop.close)
            loop.run()
        return loop.sweep


def _grid(methods: Sequence[Method] | Mapping[str, Method], patterns: Sequence[Pattern]) -> list[Task]:
    named = list(methods.items()) if isinstance(methods, Mapping) else [(method.name, method) for method in methods]
    tasks: dict[str, Task] = {}
    for label, method in named:
        for pattern in patterns:
            task = Task(Cell.of(label, pattern), method, pattern)
            other = tasks.setdefault(task.cell.folder, task)
            if other is not task:
                raise PatternError(
                    f"{task.cell.name} is in the grid twice. Give methods of the same name, with different options, "
                    "names of their own (methods={name: method}, or --methods NAME=METHOD)."
                )
    if not tasks:
        raise PatternError("the grid is empty: it needs at least one method and one pattern.")
    return list(tasks.values())


def _described(method: Method) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    options = {key: value if isinstance(value, plain) else str(value) for key, value in method.options.items()}
    return {"name": method.name, "options": options, "fingerprint": fingerprint(method)}


def _calibration_settings(
    calibration: str | Sequence[str] | Windows, samples: int | None, length: int | None, seed: int, sampling: str | None
) -> dict[str, Any]:
    if isinstance(calibration, Windows):
        own: dict[str, Any] = {"calibration": ["token ids"], "samples": calibration.samples}
        return {**own, "length": calibration.length, "seed": seed, "sampling": sampling}
    specs = [calibration] if isinstance(calibration, str) else [os.fspath(spec) for spec in calibration]
    if not all(map(is_token_file, specs)):
        samples, length = samples or DEFAULT_SAMPLES, length or DEFAULT_LENGTH
    return {"calibration": specs, "samples": samples, "length": length, "seed": seed, "sampling": sampling}
