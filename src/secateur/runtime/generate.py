"""`generate`: text by a model, plain or packed."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError, SecateurError
from secateur.models.opening.whole import WholeModel, positions_of
from secateur.models.shape.causality import check_predicts
from secateur.models.shape.structure import find_blocks
from secateur.runs.options import taking
from secateur.runtime.load import load
from secateur.runtime.settings import GenerateSettings
from secateur.runtime.threads import threads


@dataclass(frozen=True)
class Generated:
    """What a model made of a prompt: the text, its tokens, and seconds to the first of them and for the rest."""

    model: str
    prompt: str
    text: str
    prompt_tokens: int
    tokens: list[int]
    load_seconds: float
    first_seconds: float
    rest_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there is only one."""
        return (len(self.tokens) - 1) / self.rest_seconds if len(self.tokens) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """All fields, and the tokens per second."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@taking(GenerateSettings)
def generate(settings: GenerateSettings) -> Generated:
    """The continuation of a prompt, of at most `max_tokens` tokens; `on_text` is called with its pieces as they come.

    With `temperature` 0, the likeliest token is taken each time; what generation_config.json asks for beside that
    (sampling, penalties) is not done, so that plain and packed checkpoints can be compared. Raises `CheckpointError`
    for a model without tokenizer, or with `chat` without a chat template, and `SecateurError` for a prompt that leaves
    no room in the model's positions.
    """
    if settings.prompt is None:
        raise SecateurError("prompt: got none. Give the text to continue.")
    if settings.temperature < 0:
        raise SecateurError(f"--temperature: got {settings.temperature:g}, expected 0 or more.")
    started = time.perf_counter()
    module, tokenizer, name = _opened(settings)
    check_predicts(module, find_blocks(module), "a text that goes on")
    loaded = time.perf_counter() - started
    inputs = _inputs(tokenizer, settings, name).to(module.device)
    length = inputs["input_ids"].shape[1]
    _check_room(module, name, length, settings.max_tokens)
    drawn = settings.temperature > 0
    clock = _Clock(tokenizer, settings)
    with threads(settings.threads), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        output = module.generate(
            **inputs,
            max_new_tokens=settings.max_tokens,
            do_sample=drawn,
            num_beams=1,
            temperature=settings.temperature if drawn else None,
            top_p=None,
            top_k=0 if drawn else None,
            repetition_penalty=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=clock,
        )
    tokens = output[0, length:].tolist()
    return Generated(
        model=name,
        prompt=settings.prompt,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        prompt_tokens=length,
        tokens=tokens,
        load_seconds=loaded,
        first_seconds=clock.first - clock.started,
        rest_seconds=clock.last - clock.first,
    )


def _opened(settings: GenerateSettings) -> tuple[Any, Any, str]:
    """The module, its tokenizer and its name."""
    options = {name: getattr(settings, name) for name in ("device", "dtype", "revision", "trust_remote_code")}
    with WholeModel(settings.model, tokenizer=settings.tokenizer, **options) as whole:  # type: ignore[arg-type]
        tokenizer = whole.tokenizer
        if isinstance(settings.model, nn.Module):
            return whole.module, tokenizer, whole.name
    return load(whole.name, backend=settings.backend, **options), tokenizer, whole.name


def _inputs(tokenizer: Any, settings: GenerateSettings, name: str) -> Any:
    if not settings.chat:
        return tokenizer(settings.prompt, return_tensors="pt", return_token_type_ids=False)
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(f"{name}: has no chat template. Leave --chat out, or take the instruct model.")
    messages = [{"role": "user", "content": settings.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _check_room(module: Any, name: str, length: int, new_tokens: int) -> None:
    positions = positions_of(module)
    if length == 0:
        raise SecateurError("prompt: has no tokens. Give the text to continue.")
    if positions is not None and length + new_tokens > positions:
        raise SecateurError(
            f"prompt: {length} tokens and {new_tokens} new ones, and {name} has {positions} positions. Shorten it, or "
            "lower --max-tokens."
        )


class _Clock:
    """A streamer of transformers that notes when tokens come, and hands on their text."""

    def __init__(self, tokenizer: Any, settings: GenerateSettings) -> None:
        from transformers import TextStreamer

        class Pieces(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                settings.on_text(text)

        self._pieces = Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._calls = 0
        self.started = self.first = self.last = time.perf_counter()

    def put(self, value: Any) -> None:
        """The prompt, then one token after another."""
        self.last = time.perf_counter()
        if self._calls == 1:
            self.first = self.last
        self._calls += 1
        self._pieces.put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """No more will come."""
        self._pieces.end()  # type: ignore[no-untyped-call]
