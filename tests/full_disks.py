"""Disks that fill up, limits on the size of files, and a process without privileges."""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own with that much room, mounted on a new folder; needs root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no mount command here ({error})")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        if subprocess.run(["umount", str(folder)], check=False).returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            pytest.fail(f"a file on {folder} was left open")


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes; what the system then says is like a full disk, and needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def unprivileged(*folders: Path) -> Iterator[None]:
    """As a user who may do nothing but what everybody may; the folders above `folders` are opened for passing."""
    if os.geteuid() != 0:
        yield
        return
    above = {parent for folder in folders for parent in folder.resolve().parents}
    modes = {folder: folder.stat().st_mode for folder in above if not folder.stat().st_mode & 0o001}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o011)
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"root may not become another user here ({error})")
    try:
        yield
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)
