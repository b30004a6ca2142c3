"""The cells of a sweep as tasks of Ray, on the cores of this machine or on the machines of a cluster."""

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from secateur.arguments import command_line, speaks_of_options
from secateur.collect.survey import Survey
from secateur.errors import CheckpointError, SecateurError
from secateur.record.manifest import FILE_NAME
from secateur.record.versions import run_facts
from secateur.runtime.threads import threads
from secateur.sweeps.cells import CellRunner, ChangedModelError, SweepEvent
from secateur.sweeps.estimate import Task
from secateur.sweeps.folder import SWEEP_FILE, Cell
from secateur.sweeps.grid import grid

if TYPE_CHECKING:
    from secateur.sweeps.loop import SweepLoop

RETRIES = 2  # of a cell whose worker is lost
CONNECTING_SECONDS = 10
ENDING_SECONDS = 20  # for workers that are told to end


@dataclass(frozen=True)
class Place:
    """Where and with what a worker is to run a cell, so that it does what this process would do."""

    folder: str  # that relative paths start from
    path: Sequence[str]  # where modules are found
    versions: Mapping[str, str]
    cores: int
    typed: bool  # as a command, whose options errors speak of


def require_ray() -> None:
    """Raise `SecateurError` that says how to install Ray where it is missing. Fast: Ray is not imported for it."""
    if importlib.util.find_spec("ray") is None:
        raise SecateurError('--ray needs Ray, which is not installed. Run: pip install "secateur[ray]"')


@contextmanager
def connected(address: bool | str) -> Iterator[None]:
    """With Ray: a cluster, or one of this process that ends with it. A connection that the process has is used.

    Raises `SecateurError` where there is none.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"address": address}
    if address is True:
        # Memory: tokens alone go through the object store, for which Ray would otherwise take a third of the memory.
        options = {"address": "local", "include_dashboard": False, "object_store_memory": 2**29}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if isinstance(address, str):
            _check_answers(address)
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ImportError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "Ray cannot be started here" if address is True else f"--ray {address}: cannot connect"
        raise SecateurError(
            f"{where} ({_line(error)}). Expected --ray alone for the cores of this machine, or the address of a "
            "cluster that is running: --ray auto on one of its machines, --ray HOST:6379, or --ray ray://HOST:10001."
        ) from error
    finally:
        # Ray takes SIGTERM for itself; whoever has called us keeps it.
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise `OSError` where nobody listens at an address. Fast: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTING_SECONDS).close()


def cells_on_ray(loop: "SweepLoop", tasks: list[Task]) -> Generator[Cell, None, None]:
    """The cells of these tasks, each when it is finished, in whatever order that happens.

    Every cell is a task of Ray. Of cells that share statistics the first runs before the others, which then read what
    it has left in the sweep's folder. A cell whose worker is lost is tried again, `RETRIES` times; then it has failed.
    When the generator is closed, or an exception ends it, the tasks that Ray still has are ended.
    """
    import ray

    running: dict[Any, Task] = {}
    try:
        yield from _Cluster(ray, loop, len(tasks)).run(tasks, running)
    finally:
        if running:
            _end(ray, list(running))
            loop.folder.clean()


class _Cluster:
    """Submits cells to Ray with what each needs, and takes what comes back."""

    def __init__(self, ray: Any, loop: "SweepLoop", cells: int) -> None:
        self.ray = ray
        self.loop = loop
        self.lost = Counter[str]()  # how often, by the folder of the cell
        # Exact: what "auto" has become here, so that all cells are computed on the same kind of device. Of the GPUs of
        # its machine a worker sees its own alone.
        asked = replace(
            loop.asked,
            device=loop.settings["device"],
            calibration=(),
            data=tuple(loop.settings["data"]),
            tokenizer=None,
            on_event=_nothing,
            on_estimate=_nothing,
        )
        own = {entry.name: getattr(loop, entry.name) for entry in fields(CellRunner)}
        runner = CellRunner(**own | {"asked": asked, "statistics": {}})
        # Methods may be functions of a script, which Ray's pickle can take along; bytes, because a worker has to know
        # where modules are before it reads them.
        self.runner = ray.put(ray.cloudpickle.dumps(runner))
        self.gpus = 1 if loop.settings["device"] == "cuda" else 0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        able = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= self.gpus]
        if not able:
            raise SecateurError(
                f"--ray: no machine of the cluster offers {'a GPU and ' if self.gpus else ''}a core; it has "
                f"{', '.join(map(_offer, nodes)) or 'no machine'}. Start Ray with --num-gpus where GPUs are, or run on "
                "--device cpu."
            )
        cores = self._cores(able, cells)
        self.memory = int(max(node.get("memory", 0) for node in able if node["CPU"] >= cores))
        self.place = Place(os.getcwd(), list(sys.path), _versions(), cores, speaks_of_options())
        self.remote = ray.remote(_run)

    def _cores(self, nodes: Sequence[Mapping[str, float]], cells: int) -> int:
        """The cores of each cell: as asked for, or all cores shared out among the cells that can run at once."""
        largest, asked = int(max(node["CPU"] for node in nodes)), self.loop.asked.ray_cpus
        if asked is None:
            at_once = min(cells, int(sum(node["GPU"] for node in nodes))) if self.gpus else cells
            return max(1, min(largest, int(sum(node["CPU"] for node in nodes)) // at_once))
        if asked > largest:
            raise SecateurError(f"--ray-cpus: got {asked}, expected at most {largest}, which one machine of Ray has.")
        return asked

    def run(self, tasks: Sequence[Task], running: dict[Any, Task]) -> Iterator[Cell]:
        """The cells of these tasks as they finish; `running` holds those that Ray has at the moment."""
        waiting = list(tasks)
        while waiting or running:
            for task in list(waiting):
                if self._ready(task, running.values()):
                    waiting.remove(task)
                    running[self._submit(task)] = task
            # The time is limited, so that signals are noticed.
            finished, _ = self.ray.wait(list(running), num_returns=1, timeout=1.0)
            for reference in finished:
                task = running.pop(reference)
                try:
                    cell, survey = self.ray.get(reference)
                except _losses(self.ray) as error:
                    cell = self._lost(task, error)
                    if cell.status == "pending":
                        waiting.insert(0, replace(task, cell=cell))
                        continue
                except self.ray.exceptions.RayTaskError as error:
                    raise _reason(error) from None
                else:
                    if survey is not None:
                        self.loop.statistics[self.loop.sharing(task)] = survey
                    _check_source(self.loop, cell)
                yield cell

    def _ready(self, task: Task, running: Iterable[Task]) -> bool:
        """Whether a task can start: its statistics are there, or nobody else is taking them now."""
        survey = self.loop.survey_of(task)
        return survey is None or survey.complete or all(self.loop.survey_of(other) is not survey for other in running)

    def _submit(self, task: Task) -> Any:
        """Have Ray run a cell as soon as there is room for it."""
        loop, survey = self.loop, self.loop.survey_of(task)
        if task.cell.figures and not loop.pruned(task.cell):
            loop.tell(SweepEvent("again", task.cell))
        loop.tell(SweepEvent("stage", task.cell, "with Ray"))
        remote = self.remote.options(
            num_cpus=self.place.cores,
            num_gpus=self.gpus,
            # A forecast is rough: what needs more than any machine has runs alone on one, and may yet succeed.
            memory=min(loop.estimates[task.cell.folder].host_bytes, self.memory) or None,
            max_retries=0,  # they are counted, told and ended here
            name=task.cell.name,
        )
        held = None if survey is None else self.ray.cloudpickle.dumps(survey)
        return remote.remote(self.runner, task.cell, held, self.place)

    def _lost(self, task: Task, error: Exception) -> Cell:
        """The cell of a worker that was lost, as it left it: pending where it is to be tried again, failed if not."""
        folder = self.loop.folder
        cell = folder.cell(task.cell)
        self.lost[cell.folder] += 1
        times = self.lost[cell.folder]
        if times <= RETRIES:
            self.loop.tell(SweepEvent("lost", cell, _line(error)))
            return replace(cell, status="pending")
        cell = replace(cell, status="failed", error=f"its worker was lost {times} times, at last so: {_line(error)}")
        folder.write_cell(cell)
        return cell


def _run(runner: bytes, cell: Cell, survey: bytes | None, place: Place) -> tuple[Cell, Survey | None]:
    """Run a cell in a worker; returns it, and the statistics that it has taken for others, or None."""
    from ray import cloudpickle

    found = _versions()
    differing = [name for name, version in place.versions.items() if found[name] != version]
    if differing:
        what = ", ".join(f"{name} {found[name]} instead of {place.versions[name]}" for name in differing)
        raise SecateurError(f"{_host()} has {what}. Cells are compared: install the same versions on all machines.")
    with suppress(OSError):  # a cluster's machine may lack the folder; a path that starts there is then missed by name
        os.chdir(place.folder)
    sys.path.extend(entry for entry in place.path if entry not in sys.path)
    own: CellRunner = cloudpickle.loads(runner)
    if not (own.folder.path / SWEEP_FILE).exists():
        raise CheckpointError(
            f"{own.folder.path}: is not there on {_host()}, where Ray runs a cell. All machines of a cluster need the "
            "same folder: choose one on a shared disk."
        )
    (task,) = (task for task in grid(own.asked) if task.cell.folder == cell.folder)
    task = replace(task, cell=cell)
    shared: Survey | None = None if survey is None else cloudpickle.loads(survey)
    taken = shared is not None and not shared.complete
    if shared is not None:
        own.statistics[own.sharing(task)] = shared
    with threads(place.cores), command_line() if place.typed else nullcontext():
        done = own.run_cell(task)
    return done, shared if taken and shared is not None and shared.complete else None


def _check_source(loop: "SweepLoop", cell: Cell) -> None:
    """Raise `ChangedModelError` where a cell was made of other weights than the others, and forget its results."""
    try:
        loop.check_source(cell, loop.folder.source_tensors([cell]))
    except ChangedModelError:
        (loop.folder.path / cell.folder / FILE_NAME).unlink(missing_ok=True)
        loop.folder.write_cell(cell.fresh())
        raise


def _end(ray: Any, references: list[Any]) -> None:
    """End tasks that run or wait, and wait until they have ended, since they write into the sweep's folder."""
    for reference in references:
        ray.cancel(reference, force=True)
    ray.wait(references, num_returns=len(references), timeout=ENDING_SECONDS)


def _losses(ray: Any) -> tuple[type[Exception], ...]:
    """What Ray raises where a worker or its machine was lost, whatever the cell is."""
    errors = ray.exceptions
    return (
        errors.WorkerCrashedError,
        errors.NodeDiedError,
        errors.LocalRayletDiedError,
        errors.OutOfMemoryError,  # by Ray's own watch over the memory of its machines
        errors.ObjectLostError,
    )


def _reason(error: Any) -> Exception:
    """What a worker could not even begin a cell for, without Ray's traceback where it is an error of ours."""
    if isinstance(error.cause, SecateurError):
        return error.cause
    return SecateurError(
        f"a worker of Ray could not run a cell: {type(error.cause).__name__}: {_line(error.cause)}. Every machine "
        "needs the same installation of Secateur, and the same files of methods of your own."
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _offer(node: Mapping[str, float]) -> str:
    return f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs"


def _host() -> str:
    import platform

    return platform.node()


def _versions() -> dict[str, str]:
    found: dict[str, str] = run_facts(None)["versions"]
    return found


def _nothing(event: object) -> None:
    pass
