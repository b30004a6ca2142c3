"""Text that a model writes itself: what is asked of it, its prompts, and the windows that are cut from its texts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from secateur.calibration.documents import existing_file, file_provenance, file_text, jsonl_texts
from secateur.calibration.text import Text
from secateur.core.choices import Sampling
from secateur.errors import CalibrationError

PROMPT_FIELD = "prompt"
_OWN = re.compile(r"self(?::(?P<file>.*?)(?P<rows>\.jsonl(?::(?P<field>[^:/\\]+))?)?)?", re.IGNORECASE)


@dataclass(frozen=True)
class OwnText:
    """What a model is asked to write: texts that fill `samples` windows of `length` tokens.

    Where `whole`, each window is one text, which the model may not end. `spec` names the prompts that it answers.
    """

    spec: str
    samples: int
    length: int
    seed: int
    whole: bool

    @property
    def tokens(self) -> int:
        """How many are asked for, prompts included."""
        return self.samples * self.length

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts; none where the model begins by itself. Raises `CalibrationError` for a file without any."""
        return read_prompts(self.spec) if _file(self.spec) is not None else ()

    @property
    def provenance(self) -> dict[str, Any]:
        """The name of this text, and the file of its prompts."""
        file = _file(self.spec)
        return {"corpus": self.spec, **({} if file is None else {"prompts": file_provenance(existing_file(file))})}


@dataclass(frozen=True)
class Written:
    """Texts as the ids that a model read and wrote, prompts and ends included; and how they were written, as JSON.

    Each has at least one token more than windows take from it. `chat` says whether a chat template made the prompts,
    and `ends` are the tokens that end a text.
    """

    texts: Sequence[Sequence[int]]
    chat: bool
    ends: Sequence[int]
    facts: Mapping[str, Any]


Write = Callable[[OwnText], Written]


def is_own_text(spec: object) -> TypeGuard[str]:
    """Return whether `spec` asks for text of the model's own: `self`, or `self:PROMPTS`."""
    return isinstance(spec, str) and _OWN.fullmatch(spec.strip()) is not None


def own_text(spec: str, tokenizer: Any, samples: int, length: int, seed: int, sampling: Sampling | None) -> OwnText:
    """Return what a spec asks of the model.

    Raises CalibrationError for a sampling that it cannot have.
    """
    if sampling == "document" and (_file(spec) is not None or is_chat(tokenizer)):
        raise CalibrationError(
            f"{spec}: --sampling document would need answers as long as a window, and a model ends its answers where "
            "it likes. Leave --sampling out: answers are packed."
        )
    return OwnText(spec.strip(), samples, length, seed, sampling == "document")


def is_chat(tokenizer: Any) -> bool:
    """Return whether a tokenizer says how chats are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def read_prompts(spec: str) -> list[str]:
    """Return the prompts of `self:FILE`: one a line that is not blank, or a field of JSON lines (`:FIELD`, "prompt").

    Raises CalibrationError where there is none.
    """
    match = _OWN.fullmatch(spec.strip())
    file = _file(spec)
    assert match is not None
    assert file is not None
    file = existing_file(file)
    if match["rows"]:
        found: Iterable[str] = jsonl_texts(file, match["field"] or PROMPT_FIELD)
    else:
        found = (line.rstrip("\r") for line in file_text(file).split("\n"))
    prompts = [prompt for prompt in found if prompt.strip()]
    if not prompts:
        raise CalibrationError(f"{file}: no prompt in it. Write one a line.")
    return prompts


def _file(spec: str) -> Path | None:
    match = _OWN.fullmatch(spec.strip())
    if match is None or match["file"] is None:
        return None
    name = match["file"] + (match["rows"] or "").partition(":")[0]
    if not name.lower().endswith((".txt", ".jsonl")):
        raise CalibrationError(f"{spec}: expected self:FILE.txt, with a prompt a line, or self:FILE.jsonl[:FIELD].")
    return Path(name)


def own_windows(asked: OwnText, written: Written, text: Text) -> torch.Tensor:
    """Return the windows of texts that a model has written, every token once, in the order of the texts.

    Texts are laid end to end; an end that is the same token as the beginning of the next one is there once, as in
    packed training data. BOS is where the model had it; with "always" also in front of every window, with "never"
    not before a text, unless its chat template puts it there.
    """
    own = text.room(asked.length)
    bare = text.bos == "never" and not written.chat
    stream: list[int] = []
    starts: list[int] = []
    for ids in written.texts:
        twice = not asked.whole and stream and stream[-1] == ids[0] and ids[0] in written.ends
        starts.append(len(stream))
        stream += ids[1:] if twice or (bare and ids[0] == text.token) else ids
    rows: list[list[int]] = []
    position = 0
    for sample in range(asked.samples):
        if asked.whole:
            position = starts[sample]
        if text.bos == "always" and stream[position] == text.token:  # it is put in front of the window anyway
            position += 1
        rows.append(stream[position : position + own])
        position += own
    return text.begun(torch.tensor(rows, dtype=torch.int64))
