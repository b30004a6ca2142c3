"""Whose an output's name is: nobody else's files go, nothing is left behind, and what is left by the dead is said."""

import errno
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import secateur
import tiny
from command_line import ended, forked, process
from secateur.errors import CheckpointError
from secateur.files import names
from secateur.methods.magnitude import magnitude
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(params=["atomic", "in steps"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2, and on systems that have none."""
    if request.param == "in steps":
        monkeypatch.setattr(names, "_renameat2", lambda: None)
    return str(request.param)


def write(scratch: Transaction, text: str = "result") -> None:
    if scratch.file:
        scratch.folder.write_text(text)
    else:
        (scratch.folder / "file").write_text(text)


def tree(folder: Path) -> dict[str, str | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# Names


def test_an_output_takes_its_name(tmp_path: Path, system: str) -> None:
    for file in (False, True):
        target = tmp_path / "new" / f"out-{file}"
        with Transaction(target, False, file=file) as scratch:
            write(scratch)
            scratch.place("states").mkdir()
            assert not target.exists()
            scratch.commit()
        assert (target if file else target / "file").read_text() == "result"
    assert tree(tmp_path) == {
        "new": None,
        "new/out-False": None,
        "new/out-False/file": "result",
        "new/out-True": "result",
    }


@pytest.mark.parametrize("stranger", ["file", "folder", "empty", "link"])
@pytest.mark.parametrize("file", [False, True])
def test_what_appears_during_the_run_stays(tmp_path: Path, system: str, stranger: str, file: bool) -> None:
    target = tmp_path / "out"
    with Transaction(target, overwrite=True, file=file) as scratch:
        write(scratch)
        if stranger == "file":
            target.write_text("precious")
        elif stranger == "link":
            target.symlink_to(tmp_path / "nowhere")
        else:
            target.mkdir()
            if stranger == "folder":
                (target / "thesis").write_text("precious")
        before = tree(tmp_path / "out") if target.is_dir() else None
        with pytest.raises(CheckpointError) as caught:
            scratch.commit()
    kept = tmp_path / "out.finished"
    assert str(caught.value) == (
        f"{target}: something has appeared there while the run was working, so it was left as it is. The finished "
        f"result is {kept}; move it where you want it."
    )
    assert (kept if file else kept / "file").read_text() == "result"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.finished"}
    assert {"file": target.is_file(), "link": target.is_symlink()}.get(stranger, tree(target) == before)


@pytest.mark.parametrize("change", ["added", "changed", "replaced"])
def test_what_is_to_be_overwritten_may_not_change_meanwhile(tmp_path: Path, system: str, change: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    (tmp_path / "out.finished").mkdir()
    with Transaction(target, True) as scratch:
        write(scratch)
        if change == "added":
            (target / "thesis").write_text("precious")
        elif change == "changed":
            (target / "old").write_text("precious")
        else:
            target.rename(tmp_path / "away")
            target.mkdir()
        before = tree(target)
        with pytest.raises(CheckpointError, match="something has changed what was there"):
            scratch.commit()
    assert tree(target) == before
    assert tree(tmp_path / "out.finished-2") == {"file": "result"}


def test_an_output_is_replaced(tmp_path: Path, system: str) -> None:
    target = tmp_path / "out"
    for number in range(3):
        with Transaction(target, overwrite=True) as scratch:
            write(scratch, str(number))
            if number == 2:
                (target / "file").unlink()  # gone on its own: nothing is in the way
                target.rmdir()
            scratch.commit()
        assert tree(tmp_path) == {"out": None, "out/file": str(number)}


def test_a_name_that_is_taken_between_the_look_and_the_exchange(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    real: Callable[..., None] = names.exchange

    def late(source: Path, to: Path, aside: Path) -> None:
        if not (to / "thesis").exists() and not (source / "thesis").exists():
            (to / "thesis").write_text("precious")
        real(source, to, aside)

    monkeypatch.setattr("secateur.runs.transaction.exchange", late)
    with Transaction(target, True) as scratch:
        write(scratch)
        with pytest.raises(CheckpointError, match="changed what was there"):
            scratch.commit()
    assert tree(tmp_path) == {
        "out": None,
        "out/thesis": "precious",
        "out.finished": None,
        "out.finished/file": "result",
    }


def test_a_rename_to_a_new_name_replaces_nothing(tmp_path: Path, system: str) -> None:
    for source, target in ((tmp_path / "a", tmp_path / "b"), (tmp_path / "c", tmp_path / "d")):
        for path in (source, target):
            path.mkdir() if source.name == "a" else path.write_text(path.name)
        with pytest.raises(FileExistsError):
            names.rename_new(source, target)
        assert source.exists()
        assert target.exists()
    with pytest.raises(OSError) as caught:
        names.rename_new(tmp_path / "nothing", tmp_path / "new")
    assert caught.value.errno == errno.ENOENT


# One run at a time


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Transaction(target, False) as first:
        write(first)
        message = (
            f"{target}: another run is writing it now (it holds {target}.partial/lock). Wait for it, or choose another "
            "output."
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"), Transaction(target, True):
            raise AssertionError
        first.commit()
    assert tree(tmp_path) == {"out": None, "out/file": "result"}


def test_many_runs_at_once_and_one_result(tmp_path: Path) -> None:
    """Names, locks and removals race here; whoever is told of success has written what is there."""

    def write_all(number: int) -> None:
        won = []
        for turn in range(40):
            try:
                with Transaction(tmp_path / "outputs" / str(turn), False) as scratch:
                    (scratch.folder / "who").write_text(str(number))
                    scratch.commit()
                won.append(turn)
            except CheckpointError:
                pass
        (tmp_path / f"won by {number}").write_text(" ".join(map(str, won)))

    runs = [forked(lambda number=number: write_all(number)) for number in range(3)]
    assert [ended(run, patience=120) for run in runs] == [0, 0, 0]
    told = {number: (tmp_path / f"won by {number}").read_text().split() for number in range(3)}
    assert {path.name: (path / "who").read_text() for path in (tmp_path / "outputs").iterdir()} == {
        turn: str(number) for number, turns in told.items() for turn in turns
    }
    assert sum(map(len, told.values())) >= 40 - 5  # two that meet may both stand back


def test_what_a_dead_run_left_is_named_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "out"

    def die() -> None:
        scratch = Transaction(target, False).__enter__()
        (scratch.folder / "weights").write_bytes(bytes(2_500_000))
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(die)) == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "result" / "weights").exists()
    with caplog.at_level(logging.WARNING), Transaction(target, False) as scratch:
        assert list(scratch.folder.iterdir()) == []
        write(scratch)
        scratch.commit()
    assert caplog.messages == [f"{target}.partial: left by a run that ended before it was complete (2.5 MB); removed."]
    assert tree(tmp_path) == {"out": None, "out/file": "result"}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_somebody_elses_partial_folder_stays(tmp_path: Path, kind: str) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    if kind == "folder":
        partial.mkdir()
        (partial / "thesis").write_text("precious")
    elif kind == "file":
        partial.write_text("precious")
    else:
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"out\.partial: is in the way"), Transaction(target, True):
        raise AssertionError
    assert tree(tmp_path) == before


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match="this file system has no locks"), Transaction(tmp_path / "out", False):
        raise AssertionError


# Links


def test_a_link_is_written_through(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        secateur.prune(model, method=magnitude(), output=tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert secateur.verify(tmp_path / "disk" / "real").ok
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_link_that_leads_nowhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for output, link, to in (("link", "link", "nowhere"), ("link/out", "link", "nowhere"), ("loop", "loop", "loop")):
        message = (
            f"{tmp_path / output}: {tmp_path / link} is a symbolic link to {to}, which does not exist. Make the folder "
            "that it points to, or choose another output."
        )
        for run in (
            lambda path: secateur.prune(model, method=magnitude(), output=path, overwrite=True),
            lambda path: secateur.gradients(model, path, calibration=tiny.tokens()),
        ):
            with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
                run(tmp_path / output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "loop"]


def test_gradients_go_through_a_link_to_their_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "g.safetensors"
    secateur.gradients(model, real, calibration=tiny.tokens())
    (tmp_path / "link").symlink_to(real)
    before = real.stat().st_ino
    secateur.gradients(model, tmp_path / "link", calibration=tiny.tokens(), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert real.stat().st_ino != before
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["g.safetensors"]


# Overwriting


def test_files_of_others_in_an_old_output_are_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    secateur.prune(model, method=magnitude(), output=out)
    (out / "notes").mkdir()
    (out / "notes" / "thesis.md").write_text("precious")
    with pytest.raises(CheckpointError) as caught:
        check_output(out, model, overwrite=True)
    assert str(caught.value) == (
        f"{out}: holds notes/thesis.md, which Secateur did not write; --overwrite would remove it. Move it away, or "
        "choose another folder."
    )
    (out / "notes" / "thesis.md").unlink()
    (out / "report").mkdir()
    (out / "report" / "index.html").write_text("")
    assert check_output(out, model, overwrite=True) == out
    (out / "secateur.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not known, so it is not overwritten\. Remove it yourself"):
        check_output(out, model, overwrite=True)


# What happens on the way


def test_the_folder_of_the_output_vanishes(tmp_path: Path, model: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()

    def remove(event: Any) -> None:
        if event.stage == "solve" and event.block == 1:
            shutil.rmtree(parent, ignore_errors=True)

    with pytest.raises(CheckpointError) as caught:
        secateur.prune(model, method=magnitude(), output=parent / "out", on_event=remove)
    assert str(caught.value) == (
        f"{parent}/out.partial: vanished while {parent}/out was being made in it, so there is no result. Nobody may "
        "remove it before the run is complete."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_hangup_that_is_ignored_stays_ignored(model: Path, tmp_path: Path) -> None:
    """In a process that was started so, as by nohup."""
    arguments = signalling(model, tmp_path, signal.SIGHUP)
    done = process(*arguments, cwd=tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert done.returncode == 0
    assert secateur.verify(tmp_path / "out").ok


def signalling(model: Path, place: Path, number: int) -> list[Any]:
    """A command that gets a signal in its second block."""
    (place / "signalling.py").write_text(
        "import os, secateur\n"
        "def method():\n"
        "    def score(problem):\n"
        "        if problem.name.startswith('model.layers.1.self_attn.q'):\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "        return problem.weight.abs()\n"
        "    return secateur.select('signalling', score, needs=frozenset())\n"
    )
    return ["prune", model, "-o", "out", "--method", "signalling:method"]


def test_files_of_others_in_a_report_stay(tmp_path: Path) -> None:
    from secateur.report.page import GENERATOR, report_folder

    (tmp_path / "report" / "masks").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text(GENERATOR)
    (tmp_path / "report" / "masks" / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"masks/thesis\.tex: no part of a report"), report_folder(tmp_path):
        raise AssertionError
    assert tree(tmp_path) == before
    (tmp_path / "report" / "masks" / "thesis.tex").unlink()
    with report_folder(tmp_path) as folder:
        (folder / "index.html").write_text("new")
    assert tree(tmp_path) == {"report": None, "report/index.html": "new"}
