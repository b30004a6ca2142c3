"""The bars of libraries that know no switch for them."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def without_bars() -> Iterator[None]:
    """Without those that tqdm draws, in whatever library: transformers draws one for GGUF files, lm-eval several.

    tqdm's own switch, an environment variable, is read once, when it is imported.
    """
    whole = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(whole, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = whole
