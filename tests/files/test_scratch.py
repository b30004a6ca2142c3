"""Scratch folders: gone at the end, and found after a kill."""

import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from secateur.errors import CheckpointError
from secateur.files.scratch import scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.errors import CheckpointError
from secateur.files.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(bytes(12_345))
    print(folder.parent, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def left_by_a_kill(place: Path) -> Path:
    """A folder that a killed process left some time ago."""
    command = [sys.executable, "-c", KILLED, place, "kill"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path(done.stdout.strip())
    assert (folder / "files" / "big").exists()
    os.utime(folder, (time.time() - 3600,) * 2)
    return folder


def test_a_scratch_folder_is_gone_at_the_end(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_folder(tmp_path) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with scratch_folder() as folder:
        assert folder.parent.parent == Path(tempfile.gettempdir())
    assert not folder.exists()


def test_what_a_kill_left_is_removed_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = left_by_a_kill(tmp_path)
    with caplog.at_level(logging.WARNING), scratch_folder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder.parent]
    assert caplog.messages == [f"{left}: left by a process that was killed (12.3 kB); removed."]


def test_folders_of_living_processes_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether their owner is this process or another; and one that is so young that it may not be locked yet."""
    young = left_by_a_kill(tmp_path)
    os.utime(young)
    command = [sys.executable, "-c", KILLED, tmp_path, "live"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        other = Path(living.stdout.readline().strip())
        with scratch_folder(tmp_path) as own:
            for folder in (own.parent, other):
                os.utime(folder, (time.time() - 3600,) * 2)
            with scratch_folder(tmp_path):
                pass
            assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name, own.parent.name}
        living.communicate("")
    assert not other.exists()
    assert caplog.messages == []


def test_folders_of_other_machines_stay(tmp_path: Path) -> None:
    """Locks of another machine may not be seen here."""
    left = left_by_a_kill(tmp_path)
    other = left.rename(tmp_path / left.name.replace(platform.node(), "another"))
    os.utime(other, (time.time() - 3600,) * 2)
    with scratch_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [other]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    message = r"^/proc: no folder for temporary files can be made there \(.*\)\. Run the command in another one\.$"
    with pytest.raises(CheckpointError, match=message), scratch_folder(Path("/proc")):
        pass


def test_names_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("mine")
    (tmp_path / f"secateur-scratch-{platform.node()}-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"secateur-scratch-{platform.node()}-file").write_text("mine")
    os.utime(tmp_path / f"secateur-scratch-{platform.node()}-file", (0, 0))
    os.utime(tmp_path / f"secateur-scratch-{platform.node()}-link", (0, 0), follow_symlinks=False)
    with scratch_folder(tmp_path):
        pass
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert (tmp_path / f"secateur-scratch-{platform.node()}-file").exists()
