"""Text as token ids, and where BOS, the token that begins a text, stands in the windows that are cut from them."""

from collections.abc import Mapping
from typing import Any, get_args

import torch

from secateur.core.choices import Bos
from secateur.errors import CalibrationError


def check_bos(bos: str) -> None:
    """Raise CalibrationError for a word that is no placement of BOS."""
    if bos not in (known := get_args(Bos)):
        raise CalibrationError(f'--bos: got "{bos}", expected {", ".join(known[:-1])} or {known[-1]}.')


class Text:
    """A tokenizer, and where the windows that are cut from its texts have BOS (see `evaluation_windows`)."""

    def __init__(self, tokenizer: Any, bos: Bos) -> None:
        check_bos(bos)
        self.tokenizer, self.bos = tokenizer, bos
        self.token: int | None = getattr(tokenizer, "bos_token_id", None)
        if bos == "always" and self.token is None:
            raise CalibrationError(
                f"--bos always: the tokenizer ({type(tokenizer).__name__}) has no token that begins a text. "
                "Leave --bos out."
            )

    def room(self, length: int) -> int:
        """How many tokens of the text a window of that length has."""
        if self.bos != "always":
            return length
        if length < 2:
            raise CalibrationError(f"--length: got {length}, expected at least 2 with --bos always.")
        return length - 1

    def ids(self, text: str) -> torch.Tensor:
        """The token ids of a text with the default special tokens; BOS is among them with "papers" alone."""
        # `verbose=False` silences "Token indices sequence length is longer than ...": long texts are the purpose here.
        ids = torch.tensor(self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]).long()
        return ids[1:] if self.bos != "papers" and len(ids) and int(ids[0]) == self.token else ids

    def begun(self, windows: torch.Tensor) -> torch.Tensor:
        """A copy of windows of text, with BOS in front of each where it is to be there."""
        if self.bos != "always":
            return windows.clone()
        return torch.cat([torch.full((len(windows), 1), int(self.token or 0)), windows], dim=1)

    @property
    def provenance(self) -> dict[str, Any]:
        """The record: where BOS was put, its id, and whether the tokenizer puts it before a text by itself."""
        first = [] if self.tokenizer is None else self.tokenizer("a", return_attention_mask=False)["input_ids"][:1]
        return {"used": self.bos, "token": self.token, "added": bool(first) and list(first) == [self.token]}


def bos_note(provenance: Mapping[str, Any]) -> str:
    """What to add to the windows of an evaluation where BOS does not stand as published; nothing where it does."""
    used = (provenance.get("bos") or {}).get("used")
    return {"always": ", BOS before each", "never": ", no BOS"}.get(str(used), "")


def bos_text(provenance: Mapping[str, Any]) -> str | None:
    """Where BOS stands in windows of text with this provenance, in words; None for windows of given token ids."""
    bos = provenance.get("bos")
    if bos is None:
        return None
    papers = "BOS before the first window alone" if bos["added"] else "no BOS, which the tokenizer leaves out"
    where = {"always": "BOS before every window", "never": "no BOS", "papers": papers}[bos["used"]]
    if bos.get("nats_with") is None:
        return where
    return f"{where} (one window reads {bos['nats_with']:.4f} nats with BOS, {bos['nats_without']:.4f} without)"
