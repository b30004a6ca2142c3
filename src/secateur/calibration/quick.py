"""Calibration windows for a dry run: drawn where that is quick, otherwise checked as far as that is quick."""

from collections.abc import Callable, Sequence
from typing import Any

from secateur.calibration.corpora import load_corpus, quick_to_read
from secateur.calibration.drawing import CHARACTERS_PER_TOKEN, DEFAULT_LENGTH, calibration_windows, text_corpora
from secateur.calibration.own_text import OwnText, Written, is_own_text
from secateur.calibration.windows import Windows

MOST_BYTES = 64 * 2**20  # of a corpus that is read
MOST_CHARACTERS = 2_000_000  # that are tokenised: a second or so


class _Enough(Exception):  # noqa: N818 - not an error: it ends a drawing that takes too long
    """More text than is tokenised for a dry run."""


class _Unwritten(Exception):  # noqa: N818 - not an error either
    """Text that the model would first have to write."""


class _Tokenizer:
    """A tokenizer that stops after so many characters, and remembers the longest text and tokens that it saw."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._left = MOST_CHARACTERS
        self.longest_text = 0
        self.most_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest_text = max(self.longest_text, len(text))
        self._left -= len(text)
        if self._left < 0:
            raise _Enough
        encoded = self._tokenizer(text, **options)
        self.most_tokens = max(self.most_tokens, len(encoded["input_ids"]))
        return encoded


def quick_windows(
    source: Any,
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    sampling: Any,
    bos: Any,
    kept: Callable[[OwnText], Written | None],
) -> tuple[Windows | None, Sequence[str]]:
    """Return the windows of `calibration_windows` where drawing is quick, else None; and what was not checked.

    `kept` returns text of the model's own that was written before: none is written here.

    Errors: those of `calibration_windows`, as far as they show.
    """
    mixed = text_corpora(source, tokenizer, samples, length, sampling)
    specs = [spec for spec in mixed if not is_own_text(spec)]
    reasons = {spec: quick_to_read(spec, MOST_BYTES) for spec in specs}
    for spec in specs if len(mixed) > 1 else ():
        if reasons[spec] is None:
            load_corpus(spec, "calibration")
    if slow := [f"{spec}: not read, because {reason}." for spec, reason in reasons.items() if reason is not None]:
        return None, slow

    def write(asked: OwnText) -> Written:
        if (found := kept(asked)) is None:
            raise _Unwritten
        return found

    limited = None if tokenizer is None else _Tokenizer(tokenizer)
    try:
        options = {"samples": samples, "length": length, "seed": seed, "sampling": sampling, "bos": bos}
        return calibration_windows(source, limited, write=write, **options), ()
    except _Unwritten:
        return None, ()
    except _Enough:
        assert limited is not None
        wanted = length or DEFAULT_LENGTH
        if limited.most_tokens > wanted or limited.longest_text > CHARACTERS_PER_TOKEN * wanted:
            return None, ()  # some text has, or surely has, more tokens than a window
        return None, [
            f"{', '.join(map(str, specs))}: not checked to the end; none of the first documents has more than {wanted} "
            "tokens."
        ]
