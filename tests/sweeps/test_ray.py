"""Sweeps on Ray: the tables of a sweep without it, also where workers are lost."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import secateur
from secateur.errors import SecateurError
from secateur.sweeps.cells import SweepEvent
from secateur.sweeps.folder import Cell
from secateur.sweeps.on_ray import RETRIES
from sweep_runs import HALF, METHODS, MORE, TWO_OF_FOUR, Run


def test_without_ray_it_says_what_to_install(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    with pytest.raises(SecateurError, match=r'--ray needs Ray.*pip install "secateur\[ray\]"'):
        run(ray=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    """A Ray of this process, with room for two cells at once."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray==2.60.0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("table.md", "table.csv")}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.usefixtures("two_workers")
def test_the_tables_are_those_without_ray(run: Run, tmp_path: Path) -> None:
    broken = secateur.select("broken", lambda problem: problem.weight[0])
    options: dict[str, Any] = {"methods": [secateur.magnitude(), secateur.wanda(), broken], "keep": "best"}
    options["patterns"] = [HALF]
    serial = run(**options)
    events: list[SweepEvent] = []
    found = run(**options, output=tmp_path / "ray", ray=True, ray_cpus=1, on_event=events.append)
    assert tables(tmp_path / "ray") == tables(tmp_path / "out")
    assert names(tmp_path / "ray") == names(tmp_path / "out")
    assert [cell.status for cell in found.cells] == [cell.status for cell in serial.cells]
    assert [cell.error for cell in found.failed] == [cell.error for cell in serial.failed] != []
    assert [event.finished for event in events if event.kind == "cell"] == [1, 2, 3]
    # It goes on as another would: with the failed cells alone, on Ray or not.
    for ray in (True, False):
        again: list[SweepEvent] = []
        run(**options, output=tmp_path / "ray", ray=ray, on_event=again.append)
        assert [event.cell.method for event in again if event.kind == "cell" and event.cell] == ["broken"]
    assert tables(tmp_path / "ray") == tables(tmp_path / "out")


def deadly(times: int, folder: Path) -> secateur.Method:
    """Magnitude pruning that kills its worker in the last block, as a machine that fails would, this often."""
    driver = os.getpid()

    def score(problem: secateur.Problem) -> Any:
        killed = len(list(folder.glob("killed-*")))
        if ".2.mlp.down_proj" in problem.name and killed < times and os.getpid() != driver:
            (folder / f"killed-{killed}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return problem.weight.abs()

    return secateur.select("deadly", score)


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers")
def test_a_lost_worker_is_tried_again_and_in_the_end_fails_alone(run: Run, tmp_path: Path) -> None:
    for times in (RETRIES, RETRIES + 1):
        place = tmp_path / f"{times}"
        place.mkdir()
        out, events = place / "out", list[SweepEvent]()
        plain = secateur.select("plain", lambda problem: problem.weight.abs())
        methods = [plain, deadly(times, place)]
        found = run(methods=methods, patterns=[HALF], output=out, ray=True, ray_cpus=1, on_event=events.append)
        lost = [(event.cell.name, event.stage) for event in events if event.kind == "lost" and event.cell]
        assert [name for name, _ in lost] == ["deadly 50%"] * RETRIES
        assert "worker died" in lost[0][1]
        first, second = found.cells
        assert first.status == "done"
        if times == RETRIES:
            assert nats(second) == nats(first)
        else:
            assert second.status == "failed"
            assert "its worker was lost 3 times, at last so: The worker died" in (second.error or "")
            found = run(methods=methods, patterns=[HALF], output=out, ray=True)
            assert nats(found.cells[1]) == nats(first)
        assert not list(out.rglob("*.partial"))


def nats(cell: Cell) -> list[Any]:
    return [figures["window_nats"] for figures in cell.figures.values()]


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers")
def test_an_interruption_ends_the_workers_and_the_sweep_goes_on_later(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "ray"

    def interrupt(event: SweepEvent) -> None:
        if event.kind == "cell":
            assert workers()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(output=out, ray=True, ray_cpus=1, on_event=interrupt)
    assert not workers()
    assert not [path for path in out.rglob("*") if path.suffix in (".partial", ".old")]
    found = run(output=out, ray=True)
    assert [cell.status for cell in found.cells] == ["done"] * 4
    run()
    assert tables(out) == tables(tmp_path / "out")


def workers() -> list[psutil.Process]:
    """The processes that run a cell; Ray names them after their tasks, and we name tasks after cells: wanda 50%."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if re.fullmatch(r"ray::\w+ \S+", process.cmdline()[0].strip()):
                found.append(process)
    return found


def pruning(process: psutil.Process) -> bool:
    """Whether a process has a checkpoint half written."""
    with suppress(psutil.Error):
        return any("checkpoint.partial" in file.path for file in process.open_files())
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_twelve_cells_on_two_workers_one_of_which_is_killed(run: Run, tmp_path: Path, propagate: str) -> None:
    """With dense inputs, the others then read statistics that one of them has taken."""
    chosen = ("magnitude", "wanda", "gblm", "sparsegpt")
    options: dict[str, Any] = {
        "methods": {name: METHODS[name] for name in chosen},
        "patterns": [HALF, MORE, TWO_OF_FOUR],
        "propagate": propagate,
        "agreement": True,
    }
    run(**options)
    out, killed, events = tmp_path / "ray", list[int](), list[SweepEvent]()

    def kill(event: SweepEvent) -> None:
        events.append(event)
        if event.kind != "cell" or event.finished < 2 or killed:
            return
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in filter(pruning, workers()):
                process.kill()
                killed.append(process.pid)
                break

    run(**options, output=out, ray=True, ray_cpus=1, on_event=kill)
    assert len(killed) == 1
    assert [event.kind for event in events].count("lost") == 1
    assert [event.kind for event in events].count("cell") == 12
    assert tables(out) == tables(tmp_path / "out")
    assert names(out) == names(tmp_path / "out")
