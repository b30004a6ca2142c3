"""How a run that somebody wants to end stops: at the next point where nothing is half done.

Signals are global to a process, and so is this. Whoever handles signals calls `stop`; long work runs within
`at_safe_points` and calls `safe_point` between its steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_within = 0
_asked = False


def stop() -> bool:
    """Ask the work that is under way to stop at its next safe point; False where it has none, or was asked before."""
    global _asked
    asked, _asked = _asked, True
    return _within > 0 and not asked


@contextmanager
def at_safe_points() -> Iterator[None]:
    """Within it, `safe_point` will be called again and again; its end is one too."""
    global _within, _asked
    if _within == 0:
        _asked = False
    _within += 1
    try:
        yield
        safe_point()
    finally:
        _within -= 1


def safe_point() -> None:
    """Raise `KeyboardInterrupt` when somebody has asked to stop."""
    if _asked and _within:
        raise KeyboardInterrupt
