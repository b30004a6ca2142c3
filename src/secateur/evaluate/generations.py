"""Greedy continuations of the same prompts by several models, to be read side by side."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from secateur.errors import CalibrationError
from secateur.files.reading import json_lines, read_text
from secateur.models.opening.whole import WholeModel, positions_of
from secateur.runs.events import Progress


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt: its text, and its tokens."""

    model: str
    prompt: str
    text: str
    tokens: list[int]


@torch.no_grad()
def generations(
    model: WholeModel,
    prompts: Sequence[str],
    *,
    new_tokens: int = 64,
    progress: Progress = lambda stage, done, total: None,
) -> list[Generation]:
    """The greedy continuation of every prompt, of at most `new_tokens` tokens, one prompt at a time.

    Prompts go in as they are, without a chat template. Raises `CalibrationError` for one that leaves no room in the
    model's positions.
    """
    module, tokenizer = model.module, model.tokenizer
    positions = positions_of(module)
    found = []
    for number, prompt in enumerate(prompts):
        progress("generating", number, len(prompts))
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(module.device)
        length = inputs["input_ids"].shape[1]
        if positions is not None and length + new_tokens > positions:
            raise CalibrationError(
                f"prompt {number + 1}: {length} tokens and {new_tokens} new ones, and {model.name} has {positions} "
                "positions. Shorten it, or lower --new-tokens."
            )
        # What generation_config.json asks for beside greedy decoding (sampling, penalties) is switched off.
        output = module.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        tokens = output[0, length:].tolist()
        found.append(Generation(model.name, prompt, tokenizer.decode(tokens, skip_special_tokens=True), tokens))
    progress("generating", len(prompts), len(prompts))
    return found


def shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two continuations have in common before they part."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: one a line, or the field "prompt" of JSON lines (.jsonl). Blank lines are skipped.

    Raises `CalibrationError` when there is none.
    """
    with suppress(RuntimeError):  # nobody of that name
        file = file.expanduser()
    if file.suffix.lower() == ".jsonl":
        advice = 'Expected a JSON object with a "prompt".'
        prompts = [row["prompt"] for row, _ in json_lines(file, _Row, error=CalibrationError, advice=advice)]
    else:
        text = read_text(file, error=CalibrationError).removeprefix("\ufeff")
        prompts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise CalibrationError(f"{file}: no prompt in it. Write one a line.")
    return prompts


class _Row(TypedDict):
    prompt: str
