"""Where a result goes: checked and locked beforehand, made in a folder of its own, and named when it is complete.

While OUT is being made there is `OUT.partial` beside it, which holds the result, whatever else the run keeps on the
disk, a journal of what is finished, and a lock. Who holds the lock owns the name OUT. A folder `OUT.partial` whose lock
is free is what an earlier run left: with finished parts in its journal it can be resumed, otherwise it is removed. No
process id decides anything: the same one may live in two containers that share a volume.
"""

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from rich.filesize import decimal

from secateur.errors import CheckpointError, SecateurError
from secateur.files.names import exchange, rename_new, unique
from secateur.files.scratch import bytes_below, delete, entries_below
from secateur.files.writer import writing
from secateur.runs.journal import SEALED, Journal, Part

_LOCK, _RESULT, _JOURNAL, _REPLACED = "lock", "result", "journal.jsonl", "replaced"

CHOICES = "The same command with --resume goes on after them; with --overwrite it starts anew."

logger = logging.getLogger(__name__)


class Transaction:
    """The folder `OUT.partial`, in which an output is made, and the right to give the output its name.

    `folder` is what becomes the output: a folder that is made here, or with `file=True` a file that the run makes.
    `place(name)` is for what the run needs on the disk meanwhile. All of it is removed at the end, but for two things:
    a run that keeps a `journal` and does not get to its end leaves what it has finished, for `resume`; and a finished
    result whose name was taken meanwhile is kept under a name that the error tells.

    With `resume` a run goes on with what an earlier one left in the folder, where there is something; whether it is the
    same run, `journal.begin` finds out.
    """

    def __init__(self, target: Path, overwrite: bool, *, file: bool = False, resume: bool = False) -> None:
        self.target = target
        self.overwrite = overwrite
        self.resume = resume
        self.file = file
        self.partial = partial_of(target)
        self.folder = self.partial / _RESULT
        self.journal: Journal
        self.goes_on: Callable[[BaseException | None], bool] = lambda error: False  # after it, so that nothing is said
        self._lock = self.partial / _LOCK
        self._committed = False
        self._descriptor: int | None = None
        self._made: list[Path] = []  # parents that did not exist, innermost first
        self._found: object = None

    def place(self, name: str) -> Path:
        """Where something lies that goes with the run; not made yet."""
        return self.partial / name

    def __enter__(self) -> "Transaction":
        self._made = [folder for folder in self.target.parents if not folder.exists()]
        try:
            self._claim()
            self._put_back()
            self._open_journal()
            self._found = _listing(self.target)
            if self._found is not None and not self.overwrite:  # since it was checked
                raise CheckpointError(f"{self.target}: exists already. Choose another folder, or pass --overwrite.")
            if not self.file:
                self.folder.mkdir(exist_ok=True)
        except BaseException as error:
            self._end(keep=(self.partial / _JOURNAL).exists())
            if isinstance(error, SecateurError) or not isinstance(error, OSError):
                raise
            raise CheckpointError(
                f"{self.target}: no folder can be made beside it ({error.strerror}). Choose another output folder."
            ) from None
        return self

    def _claim(self) -> None:
        """Make the folder and hold its lock. Raises `CheckpointError` while another process does."""
        for _ in range(100):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.partial.mkdir()
            self._check_partial()
            try:
                descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # its owner has just finished
                continue
            try:
                self._take(descriptor)
                held, there = os.fstat(descriptor), os.stat(self._lock)
            except FileNotFoundError:  # as above
                os.close(descriptor)
                continue
            except BaseException:
                os.close(descriptor)
                raise
            if os.path.samestat(held, there):
                self._descriptor = descriptor
                return
            os.close(descriptor)
        raise CheckpointError(f"{self.partial}: comes and goes; another process works on {self.target}. Wait for it.")

    def _check_partial(self) -> None:
        """Raise `CheckpointError` for something else under the name of the folder."""
        with suppress(FileNotFoundError):
            mode = self.partial.lstat().st_mode
            names = set(os.listdir(self.partial)) if stat.S_ISDIR(mode) else {""}
            if names and _LOCK not in names:
                raise CheckpointError(
                    f"{self.partial}: is in the way: {self.target} is made under that name, and Secateur did not write "
                    "what is there. Move it away, or choose another output."
                )

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.target}: another run is writing it now (it holds {self._lock}). Wait for it, or choose another "
                "output."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            raise CheckpointError(
                f"{self._lock}: this file system has no locks ({error.strerror}), so two runs could write the same "
                "output. Choose an output on another file system."
            ) from None

    def _put_back(self) -> None:
        """Give an old output its name again: where names cannot be exchanged in one step, it may have lost it."""
        replaced = self.partial / _REPLACED
        if os.path.lexists(replaced) and not os.path.lexists(self.target):
            replaced.rename(self.target)

    def _open_journal(self) -> None:
        """Look at what an earlier run left: go on with it, refuse to touch it, or remove it with a word."""
        file = self.partial / _JOURNAL
        if self.overwrite and not self.resume:
            self._remove_leftovers()
        self.journal = Journal(file)
        sealed = self.journal.found.get(SEALED)
        if sealed is not None and sealed.record == _as_json(_listing(self.target)):
            self._remove_leftovers("left by a run that ended when the output had its name already")
            self.journal = Journal(file)
        elif not self.journal.finished:
            self._remove_leftovers()
            self.journal = Journal(file)
        elif not self.resume:
            raise CheckpointError(f"{self._unfinished()} {CHOICES}")

    def _remove_leftovers(self, how: str = "left by a run that ended before it was complete") -> None:
        left = [entry for entry in self.partial.iterdir() if entry.name != _LOCK]
        if not left:
            return
        size = bytes_below(self.partial)
        for entry in left:
            delete(entry)
        logger.warning("%s: %s (%s); removed.", self.partial, how, decimal(size))

    def commit(self) -> None:
        """Give the finished result its name; what is overwritten goes only then.

        Raises `CheckpointError` when something has taken the name, or changed what is there, since the start: the
        result is then kept under another name, which the error says.
        """
        with writing(self.target):
            found = _listing(self.target)
            if found is not None and found != self._found:
                raise self._keep()
            flush(self.folder)
            self.journal.add(Part(SEALED, record=_as_json(_listing(self.folder))))
            try:
                if found is None:
                    rename_new(self.folder, self.target)
                else:
                    self._replace()
            except FileExistsError:
                raise self._keep() from None
            self._committed = True
            flush_names(self.target.parent)

    def _replace(self) -> None:
        """Put the result in the place of what was there at the start, which then lies in `OUT.partial`."""
        aside = self.partial / _REPLACED
        try:
            exchange(self.folder, self.target, aside)
        except FileExistsError:  # the name was taken between two steps
            if os.path.lexists(aside):
                aside.rename(self.target.with_name(unique(f"{self.target.name}.replaced")))
            raise
        if _listing(self.folder) != self._found:  # changed between the look and the exchange
            exchange(self.folder, self.target, aside)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target))

    def _keep(self) -> CheckpointError:
        for number in count(1):
            kept = self.target.with_name(f"{self.target.name}.finished" + (f"-{number}" if number > 1 else ""))
            with suppress(FileExistsError):
                rename_new(self.folder, kept)
                break
        self._committed = True  # as far as that goes: there is nothing to resume
        what = "has appeared there" if self._found is None else "has changed what was there"
        return CheckpointError(
            f"{self.target}: something {what} while the run was working, so it was left as it is. The finished result "
            f"is {kept}; move it where you want it."
        )

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        vanished = not self._lock.exists()
        kept = not self._committed and not vanished and bool(self.journal.finished)
        self._end(keep=kept)
        if kept and isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (f"{self._unfinished()} {CHOICES}",)
        elif kept and not self.goes_on(error):
            logger.warning("%s %s", self._unfinished(), CHOICES)
        ours = isinstance(error, SecateurError) and not isinstance(error, CheckpointError)
        if vanished and isinstance(error, Exception) and not ours:
            raise CheckpointError(
                f"{self.partial}: vanished while {self.target} was being made in it, so there is no result. Nobody may "
                "remove it before the run is complete."
            ) from error

    def _unfinished(self) -> str:
        return _told(self.partial, self.journal)

    def _end(self, *, keep: bool = False) -> None:
        """Let go of the folder: remove it, if it is ours, and the parents that were made for it.

        With `keep` what an unfinished run has left stays there, but for what it makes again anyway.
        """
        if self._descriptor is not None:
            with suppress(OSError):
                for entry in list(self.partial.iterdir()):
                    if entry.name != _LOCK and not (keep and not made_again(entry.name)):
                        delete(entry)
                if not keep:
                    self._lock.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):
            self.partial.rmdir()
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def unfinished(target: Path) -> str | None:
    """What an unfinished run has left beside an output, and how to go on, in two sentences; None where there is none.

    Raises `CheckpointError` for a journal that is damaged.
    """
    partial = partial_of(target)
    with suppress(OSError):
        descriptor = os.open(partial / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{target}: another run is writing it now."
        finally:
            os.close(descriptor)
    journal = Journal(partial / _JOURNAL)
    return f"{_told(partial, journal)} {CHOICES}" if journal.finished else None


def partial_of(target: Path) -> Path:
    """The folder in which an output is made."""
    return target.with_name(f"{target.name}.partial")


def _told(partial: Path, journal: Journal) -> str:
    size = decimal(bytes_below(partial))
    return f"{partial}: {journal.told()} of an unfinished run are kept there ({size})."


def made_again(name: str) -> bool:
    """Whether a run that is resumed makes something of that name again: a file that is not whole."""
    return name.endswith(".partial")


def flush(entry: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk. Raises `OSError`."""
    for one in (*entries_below(entry), entry) if entry.is_dir() else (entry,):
        if not one.is_symlink():
            _flush_one(one)


def flush_names(folder: Path) -> None:
    """Force the names in a folder to the disk, where the file system has a way to."""
    with suppress(OSError):
        _flush_one(folder)


def _flush_one(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(listing: dict[str, tuple[int, int, int]] | None) -> dict[str, list[int]]:
    return {name: list(facts) for name, facts in (listing or {}).items()}


def _listing(target: Path) -> dict[str, tuple[int, int, int]] | None:
    """What is under a name, and in it, by facts that change when somebody writes there; None where nothing is."""
    if not os.path.lexists(target):
        return None
    inside = {file.relative_to(target).as_posix(): file for file in entries_below(target)}
    listing = {}
    for name, file in {".": target, **inside}.items():
        with suppress(FileNotFoundError):
            facts = file.lstat()
            # A folder's own time changes with the names in it, which are listed, and with a rename of itself.
            listing[name] = (facts.st_ino, *((0, 0) if file.is_dir() else (facts.st_size, facts.st_mtime_ns)))
    return listing
