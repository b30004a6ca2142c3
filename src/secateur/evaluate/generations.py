"""What models write: greedy continuations of the same prompts, to be read side by side."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.errors import CalibrationError
from secateur.models.whole import WholeModel


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
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Generation]:
    """The greedy continuation of every prompt, of at most `new_tokens` tokens, one prompt at a time.

    Prompts go in as they are, without a chat template. Raises `CalibrationError` for one that leaves no room in the
    model's positions.
    """
    module, tokenizer = model.module, model.tokenizer
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
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
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file}: cannot be read ({getattr(error, 'strerror', 'not text')}).") from None
    if not lines:
        raise CalibrationError(f"{file}: no prompt in it. Write one a line.")
    if file.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            raise CalibrationError(f'{file}, line {number}: expected a JSON object with a "prompt".') from None
    return prompts
