"""The model as the author of its calibration text: what it is given to begin with, how it is sampled, what is kept."""

import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
from rich.filesize import decimal
from torch import Tensor

from secateur.calibration.own_text import OwnText, Written, is_chat
from secateur.calibration.windows import Progress, Windows, check_fits
from secateur.collect.kept_texts import KeptTexts
from secateur.errors import CalibrationError, CheckpointError, SecateurError
from secateur.files.reading import read_json
from secateur.models.opening.configuration import reason
from secateur.models.opening.opened import OpenedModel
from secateur.models.opening.whole import WholeModel, free_bytes
from secateur.models.shape.causality import check_predicts
from secateur.runs.events import seconds_text
from secateur.runs.stopping import safe_point

# Williams et al., 2024, section 3: a temperature above one lets the first tokens differ from text to text.
FIRST_TEMPERATURE, FALLING_TOKENS = 2.0, 10
QUESTION_TOKENS = 256  # of what the model asks itself in a chat
AT_ONCE = {"cpu": 16, "cuda": 64}  # texts that are written side by side
FORECAST_AFTER = 8  # tokens of each
_PLACE = "⁂"  # stands for a user's message while a chat template is looked at

_log = logging.getLogger("secateur")


def temperature(token: int) -> float:
    """The temperature at which a token of a text is drawn: it falls in equal steps and stays at one."""
    return max(1.0, FIRST_TEMPERATURE - (FIRST_TEMPERATURE - 1) * token / FALLING_TOKENS)


@dataclass(frozen=True)
class Beginning:
    """What texts begin with, as token ids.

    `prompts` are whole prompts. Where the model asks itself, they are the one beginning of a question, and `after` is
    what comes between a question and its answer.
    """

    begins: str  # in words
    prompts: Sequence[Sequence[int]]
    after: Sequence[int]
    ends: frozenset[int]  # that end a text
    question_ends: frozenset[int]
    chat: bool
    given: bool  # whether somebody has given the prompts

    @property
    def asks(self) -> bool:
        """Whether the model writes the questions, too."""
        return bool(self.after)


class Author:
    """Has a model write the calibration text that is asked for, unless it is kept from an earlier run.

    Reference: Williams, Chrysostomou and Aletras, 2024, "Self-calibration for language model quantization and pruning",
    arXiv 2410.17170; for chats the idea of Xu et al., 2024, arXiv 2406.08464: a model that is given the beginning of a
    user's turn writes it.
    """

    def __init__(self, opened: OpenedModel, tokenizer: Any, progress: Progress = lambda done, total: None) -> None:
        self._opened, self._tokenizer, self._progress = opened, tokenizer, progress
        self._kept = KeptTexts(opened)
        device = opened.skeleton.device.type
        self.at_once = AT_ONCE.get(device, AT_ONCE["cpu"])

    def kept(self, asked: OwnText) -> Written | None:
        """What an earlier run has kept of it. Raises everything that `__call__` raises before the model writes."""
        found = self._kept.find(self._key(asked, self.beginning(asked)))
        return None if found is None else found.written

    def __call__(self, asked: OwnText) -> Written:
        """The texts, and how they were written. Raises `CalibrationError` for what no text can be had for."""
        beginning = self.beginning(asked)
        key = self._key(asked, beginning)
        with self._kept.locked(key):
            found = self._kept.find(key)
            if found is not None:
                _log.warning("%s: the text that this model wrote on %s is used again.", asked.spec, found.created[:10])
                return found.written
            with _whole(self._opened) as module:
                positions = self._opened.skeleton.positions
                written = _Session(
                    module, self._tokenizer, asked, beginning, self.at_once, positions, self._progress
                ).write()
            try:
                self._kept.add(key, written)
            except CheckpointError as error:
                _log.warning("Not kept: %s", error)
        return written

    def beginning(self, asked: OwnText) -> Beginning:
        """What its texts begin with.

        Raises `CalibrationError` where there is nothing to begin with, or too little room after it.
        """
        skeleton, tokenizer = self._opened.skeleton, self._tokenizer
        check_predicts(skeleton.model, skeleton.blocks, f"text of its own ({asked.spec})")
        check_fits(
            Windows(torch.zeros(1, asked.length, dtype=torch.int64), {}), skeleton.vocabulary_size, skeleton.positions
        )
        ends = frozenset(_ends(self._opened, tokenizer))
        texts = asked.prompts
        chat = is_chat(tokenizer)
        if chat:
            before, after = _template(tokenizer, asked.spec)
            added = set(getattr(tokenizer, "added_tokens_decoder", ()))
            question_ends = ends | ({after[0]} & added)
            prompts = [_chat(tokenizer, text) for text in texts] or [before]
            begins = "prompts in the chat template" if texts else "the user's turn of the chat template"
            found = Beginning(begins, prompts, () if texts else after, ends, question_ends, chat, given=bool(texts))
        elif texts:
            prompts = [_plain(tokenizer, text, ends) for text in texts]
            found = Beginning("prompts", prompts, (), ends, frozenset(), chat, given=True)
        else:
            token, begins = getattr(tokenizer, "bos_token_id", None), "BOS"
            if token is None:  # what stands between the texts of its training data
                token, begins = getattr(tokenizer, "eos_token_id", None), "EOS, in the place of BOS"
            if token is None:
                raise CalibrationError(
                    f"{asked.spec}: the tokenizer ({type(tokenizer).__name__}) has neither a token that begins a text "
                    "nor one that ends it. Give the model prompts: self:PROMPTS.txt."
                )
            found = Beginning(begins, [[token]], (), ends, frozenset(), chat, given=False)
        longest = max(range(len(found.prompts)), key=lambda number: len(found.prompts[number]))
        taken = len(found.prompts[longest]) + len(found.after) + (1 if found.asks else 0)
        if taken >= asked.length:
            what = f"prompt {longest + 1} has" if texts else f"what a text begins with ({found.begins}) takes"
            raise CalibrationError(
                f"{asked.spec}: {what} {taken} tokens, and windows have {asked.length}, which leaves none to "
                f"the model. Use a --length above {taken}{', or shorter prompts' if texts else ''}."
            )
        return found

    def _key(self, asked: OwnText, beginning: Beginning) -> dict[str, Any]:
        """What the texts depend on besides the model's files."""
        skeleton, tokenizer = self._opened.skeleton, self._tokenizer
        words = json.dumps([sorted(tokenizer.get_vocab().items()), beginning.prompts, list(beginning.after)])
        return {
            **{name: getattr(asked, name) for name in ("samples", "length", "seed", "whole")},
            "begins": hashlib.sha256(words.encode()).hexdigest(),
            "ends": sorted(beginning.ends | beginning.question_ends),
            "temperature": [FIRST_TEMPERATURE, FALLING_TOKENS],
            "question_tokens": QUESTION_TOKENS if beginning.asks else None,
            "at_once": self.at_once,
            "device": skeleton.device.type,
            "dtype": str(skeleton.dtype).removeprefix("torch."),
        }


@dataclass
class _Session:
    """The writing of one text after another, some side by side, until they fill the windows."""

    module: Any
    tokenizer: Any
    asked: OwnText
    beginning: Beginning
    at_once: int
    positions: int | None
    progress: Progress
    texts: list[list[int]] = field(default_factory=list)
    steps: int = 0
    began: float = 0.0

    @torch.no_grad()
    def write(self) -> Written:
        asked, beginning = self.asked, self.beginning
        rows = self._rows()
        order = list(range(len(beginning.prompts)))
        random.Random(asked.seed).shuffle(order)
        self.began = time.perf_counter()
        missing = asked.samples if asked.whole else asked.tokens
        while missing > 0:
            # Every text is written to its end: those that were cut short would make beginnings more frequent.
            each = 1.0 if asked.whole else max(1.0, self._room() / len(self.texts)) if self.texts else asked.length
            count = min(rows, math.ceil(missing / each))
            numbers = range(len(self.texts), len(self.texts) + count)
            self.texts += self._batch(numbers, [list(beginning.prompts[order[n % len(order)]]) for n in numbers])
            missing = asked.samples - len(self.texts) if asked.whole else asked.tokens - self._room()
        ended = sum(ids[-1] in beginning.ends for ids in self.texts)
        tokens = sum(map(len, self.texts))
        facts: dict[str, Any] = {
            "begins": beginning.begins,
            "temperature": {"first": FIRST_TEMPERATURE if self._falls else 1.0, "last": 1.0},
            "texts": len(self.texts),
            "texts_ended": ended,
            "tokens": tokens,
            "tokens_sha256": hashlib.sha256(json.dumps(self.texts).encode()).hexdigest(),
            "at_once": rows,
        }
        if self._falls:
            facts["temperature"]["falling_tokens"] = FALLING_TOKENS
        if beginning.given:
            facts |= {"prompts_used": min(len(order), len(self.texts)), "prompts_in_all": len(order)}
        return Written(self.texts, beginning.chat, sorted(beginning.ends), facts)

    @property
    def _falls(self) -> bool:
        """Whether the temperature is high at first: it is not in answers to prompts, which differ by themselves."""
        return not self.beginning.given

    def _room(self) -> int:
        """How many tokens of windows the texts fill: each but one, since two texts may share the token between them."""
        return sum(len(ids) - 1 for ids in self.texts)

    def _rows(self) -> int:
        """How many texts are written at once: as many as half of the free memory has room for, up to the usual."""
        config = vars(self.module.config.get_text_config())
        width, layers = (config.get(name) or 1 for name in ("hidden_size", "num_hidden_layers"))
        heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int):
            width = width * shared // heads
        token = 2 * layers * width
        token *= next(self.module.parameters()).dtype.itemsize
        fitting = free_bytes(self.module.device) // 2 // (token * self.asked.length)
        if fitting < 1:
            raise CalibrationError(
                f"{self.asked.spec}: the keys and values of {self.asked.length:,} tokens take "
                f"{decimal(token * self.asked.length)}, more than half of the memory that is free. Use a "
                "shorter --length."
            )
        return int(min(self.at_once, fitting))

    def _batch(self, numbers: range, prompts: list[list[int]]) -> list[list[int]]:
        """Texts from their prompts on, each with random numbers of its own."""
        asked, beginning = self.asked, self.beginning
        length = asked.length + 1  # one more than a window, in which its first token may be left out
        if beginning.asks:
            most = min(QUESTION_TOKENS, (asked.length - len(prompts[0]) - len(beginning.after)) // 2)
            asking = [random.Random(f"{asked.seed} question {number}") for number in numbers]
            written = self._continue(prompts, max(1, most), asking, beginning.question_ends, falls=True)
            prompts = [
                [*prompt, *(question[:-1] if question[-1] in beginning.question_ends else question), *beginning.after]
                for prompt, question in zip(prompts, written, strict=True)
            ]
        falls = self._falls and not beginning.asks
        drawing = [random.Random(f"{asked.seed} text {number}") for number in numbers]
        ends: frozenset[int] = frozenset() if asked.whole else beginning.ends
        lengths = [len(prompt) for prompt in prompts]
        most = length - min(lengths)
        if self.positions is not None:  # which the longest prompt would come to first
            most = min(most, self.positions + 1 - max(lengths))
        written = self._continue(prompts, most, drawing, ends, falls=falls)
        return [[*prompt, *ids][:length] for prompt, ids in zip(prompts, written, strict=True)]

    def _continue(
        self,
        prompts: list[list[int]],
        most: int,
        numbers: Sequence[random.Random],
        ends: frozenset[int],
        *,
        falls: bool,
    ) -> list[list[int]]:
        """What the model writes after each prompt, its end included: at most so many tokens."""
        from transformers import GenerationConfig, LogitsProcessorList

        device = self.module.device
        longest = max(map(len, prompts))
        padding = min(self.beginning.ends, default=0)
        ids = torch.tensor([[padding] * (longest - len(own)) + own for own in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts], device=device)
        banned = () if ends else tuple(self.beginning.ends)
        draw = _Draw(numbers, temperature if falls else (lambda token: 1.0), banned, len(self.tokenizer), self._step)
        usual = self.module.generation_config
        # What generation_config.json asks for (penalties, other sampling) would be no text of the model alone.
        own: dict[str, Any] = {"max_new_tokens": most, "do_sample": False, "pad_token_id": padding}
        self.module.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, **own)  # type: ignore[no-untyped-call]
        try:
            output = self.module.generate(
                input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([draw])
            )
        except (SecateurError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever transformers, or code beside the weights raises
            raise CheckpointError(
                f"{self.asked.spec}: {type(self.module).__name__} cannot write text in transformers: {reason(error)}. "
                "Calibrate on text: --calibration my.jsonl."
            ) from None
        finally:
            self.module.generation_config = usual
        found = []
        for row in output[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            found.append(row[: end + 1])
        return found

    def _step(self, rows: int, token: int) -> None:
        """Tell that each of so many texts goes on by this token."""
        safe_point()
        self.steps += 1
        so_far = len(self.texts) if self.asked.whole else self._room() // self.asked.length
        here = rows * token // self.asked.length
        self.progress(min(so_far + here, self.asked.samples - 1), self.asked.samples)
        if self.steps == FORECAST_AFTER:
            seconds = (time.perf_counter() - self.began) / FORECAST_AFTER * self.asked.tokens / rows
            _log.warning(
                "%s: the model writes %s tokens, %d texts at a time, in about %s.",
                self.asked.spec,
                f"{self.asked.tokens:,}",
                rows,
                seconds_text(seconds),
            )


class _Draw:
    """Draws the next token of every text: one random number each, at which the sum of the probabilities arrives.

    It stands in the place of transformers' sampling, whose random numbers depend on which texts are side by side.
    """

    def __init__(
        self,
        numbers: Sequence[random.Random],
        temperature: Callable[[int], float],
        banned: Sequence[int],
        known: int,
        step: Callable[[int, int], None],
    ) -> None:
        self._numbers, self._temperature, self._step = numbers, temperature, step
        self._banned, self._known = list(banned), known
        self._token = 0

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits of which only those of the drawn tokens are left."""
        # Exact: on the CPU, where a running sum is the same in every run.
        own = logits.detach().to("cpu", torch.float64) / self._temperature(self._token)
        own[:, self._banned] = -math.inf
        own[:, self._known :] = -math.inf  # ids beyond the tokenizer's, which fill the table up
        sums = own.softmax(dim=-1).cumsum(dim=-1)
        if not bool(sums[:, -1].isfinite().all()):
            raise CalibrationError("self: the model predicts NaN or infinity. Is it sound? Try --dtype float32.")
        drawn = torch.tensor([[number.random()] for number in self._numbers], dtype=torch.float64) * sums[:, -1:]
        tokens = torch.searchsorted(sums, drawn, right=True).clamp(max=sums.shape[1] - 1)
        self._token += 1
        self._step(len(self._numbers), self._token)
        return torch.full_like(logits, -math.inf).scatter(1, tokens.to(logits.device), 0.0)


@contextmanager
def _whole(opened: OpenedModel) -> Iterator[Any]:
    """The model as a whole: the one in memory, or loaded by transformers."""
    skeleton = opened.skeleton
    if skeleton.resident:
        module: Any = skeleton.model
        if not hasattr(module, "generate"):
            raise CalibrationError(
                f"self: {type(module).__name__} has no method generate, with which models of transformers write. "
                "Calibrate on text: --calibration my.jsonl."
            )
        yield module
        return
    with WholeModel(
        getattr(skeleton.source, "folder"),  # noqa: B009 - not every source has one
        device=str(skeleton.device),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        # Code that the model brings along was asked for when it was opened.
        trust_remote_code=not type(skeleton.model).__module__.startswith("transformers."),
    ) as whole:
        yield whole.module


class _Generation(TypedDict):
    """What is read of generation_config.json."""

    eos_token_id: NotRequired[int | list[int] | None]


def _ends(opened: OpenedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, of the tokenizer and of the model's generation_config.json."""
    configured = getattr(getattr(opened.skeleton.model, "generation_config", None), "eos_token_id", None)
    folder = getattr(opened.skeleton.source, "folder", None)
    if folder is not None and (folder / "generation_config.json").exists():
        generation: _Generation = read_json(folder / "generation_config.json", _Generation)
        configured = generation.get("eos_token_id")
    listed = configured if isinstance(configured, list) else [configured]
    found = {token for token in (*listed, getattr(tokenizer, "eos_token_id", None)) if token is not None}
    return sorted(token for token in found if 0 <= token < len(tokenizer))


def _template(tokenizer: Any, spec: str) -> tuple[list[int], list[int]]:
    """The tokens of a chat before a user's first message, and those between it and the answer."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # whatever the template raises
        raise CalibrationError(f"{spec}: the chat template cannot be filled: {error}. Calibrate on text.") from None
    before, found, after = str(text).partition(_PLACE)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    if not found or _PLACE in after or not all(parts):
        raise CalibrationError(
            f"{spec}: the chat template does not hold a user's message once, between other tokens, so that the model "
            "cannot write one. Give it prompts: self:PROMPTS.txt."
        )
    return parts[0], parts[1]


def _chat(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the user's turn of a chat, and the beginning of the answer."""
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def _plain(tokenizer: Any, prompt: str, ends: frozenset[int]) -> list[int]:
    """A prompt as it stands, with what the tokenizer puts in front of a text."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] in ends else ids
