"""Hidden states on their way through the blocks.

The model runs once per batch with every block replaced by a stub that records the block's own call and hands the
hidden states on unchanged. Replaying each real block with its own recorded call, on the hidden states of the block
before it, is then exactly the model's forward, one block at a time, for any architecture.

Stacks are recorded one after the other. While one is, each stack before it gives what its last block has made: what a
decoder is called with are outputs of the pruned encoder.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batch import Batch, Named
from secateur.errors import CheckpointError, ModelStructureError
from secateur.files.writer import reserve
from secateur.models.flow.calls import Call, Finished, Run, Structure, replay, stubbed
from secateur.models.flow.inputs import PIXELS, forward, labelled, named, predicting, reading
from secateur.models.flow.memory import available_bytes
from secateur.models.flow.probe import Probe
from secateur.models.opening.configuration import reason
from secateur.models.shape.sequences import timm_part
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block, Stack, decoder_of, is_encoder_decoder

LOGITS_BYTES = 64 << 20  # of float32 logits that are computed at once


class HiddenStates:
    """The hidden states of every batch between two blocks, in host memory or in memory-mapped files.

    The files lie in `folder` and have no name, so that nothing is left of them when the process ends, however it does.
    """

    def __init__(self, batches: int, folder: Path | None, *, pin: bool = False) -> None:
        self._batches: list[Tensor | None] = [None] * batches
        self._folder = folder
        self._pin = pin
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: no folder for hidden states can be made ({error.strerror}). Name another one with "
                    "--offload-states."
                ) from None

    def put(self, batch: int, states: Tensor) -> None:
        """Keep the states of a batch, in place of earlier ones."""
        kept = self._batches[batch]
        if self._folder is None and not self._pin:
            self._batches[batch] = states.to("cpu")
            return
        if kept is None or kept.shape != states.shape:
            kept = self._batches[batch] = self._empty(states)
        # Exact: only page-locked memory takes part in the order of the GPU's work; other copies have to wait.
        kept.copy_(states, non_blocking=kept.is_pinned())

    def _empty(self, like: Tensor) -> Tensor:
        if self._folder is None:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        # Memory: the pages of a mapped file are the system's to write out and drop.
        try:
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                # A mapped file without room on the disk would end the process with a bus error, not an exception.
                reserve(stream.fileno(), like.nbytes)
                file = f"/dev/fd/{stream.fileno()}"
                return torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        except (OSError, RuntimeError) as error:  # the second from torch, where a file cannot be mapped
            why = error.strerror if isinstance(error, OSError) else reason(error)
            raise CheckpointError(
                f"{self._folder}: cannot hold {like.nbytes:,} bytes of hidden states ({why}). Free some "
                "space there, or name another folder with --offload-states."
            ) from None

    def get(self, batch: int, device: torch.device) -> Tensor:
        """The states of a batch, on the device."""
        states = self._batches[batch]
        if states is None:
            raise RuntimeError(f"batch {batch} has no hidden states yet")
        return states.to(device, non_blocking=self._pin)

    def close(self) -> None:
        """Forget the states; the room that their files took is free again."""
        self._batches = [None] * len(self._batches)


def states_folder(offload: str, bytes_needed: int, place: Path) -> Path | None:
    """Where hidden states go: None for host memory, else a folder for memory-mapped files.

    "auto" maps files in the folder `place` when the states would take more than half of the memory that is available
    now, "never" stays in memory, anything else names a folder.
    """
    if offload == "never":
        return None
    if offload == "auto":
        return place if bytes_needed > available_bytes() // 2 else None
    return Path(offload).expanduser()


def default_batch_size(length: int, device: torch.device) -> int:
    """Samples that run through a block at once: about 2,048 tokens on a CPU, 16,384 on a GPU."""
    return max(1, (16384 if device.type == "cuda" else 2048) // length)


class Stream:
    """Calibration samples at one block of the model, moved on block by block.

    Each of `batches` is what the model's forward takes: token ids of shape (samples, length), whose length may differ
    from batch to batch, images, or several inputs by name. `states` holds what goes into the next block, which has to
    be reached first. With `predicting`, next tokens will be asked for, and a model whose tokens see later ones is
    refused; `and_back` keeps what is needed to go back from one stack to those before it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        *,
        states_folder: Path | None = None,
        predicting: bool = False,
        and_back: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.device = skeleton.device
        self.batches = batches
        self._folder = states_folder
        self._in_calls = is_encoder_decoder(skeleton.model)  # what an encoder makes, for its decoder alone
        self._and_back = and_back
        self._made: list[HiddenStates] = []  # of each finished stack, by its last block
        self._calls: list[dict[int, Call]] = [{} for _ in batches]  # by the number of the block
        self._intern: dict[tuple[Any, ...], list[Tensor]] = {}
        self.states = self._no_states()
        try:
            with torch.no_grad():
                self._probe = Probe(skeleton, batches[0], predicting=predicting)
            self._record(skeleton.stacks[0], progress)
        except BaseException:
            self.close()
            raise

    def reach(self, block: Block) -> None:
        """Get ready to run a block, into which the states of all batches go.

        Before the first block of a further stack, its calls are recorded, with the tensors outside the blocks.
        """
        for stack in self.skeleton.stacks[len(self._made) + 1 : self.skeleton.stack_of(block) + 1]:
            self._made.append(self.states)
            self.states = self._no_states()
            with self.skeleton.outside():
                self._record(stack)
            if self._in_calls and not self._and_back:
                self._made[-1].close()  # Memory: the calls of the decoder hold it

    def _no_states(self) -> HiddenStates:
        return HiddenStates(len(self.batches), self._folder, pin=self.device.type == "cuda")

    @torch.no_grad()
    def _record(self, stack: Stack, progress: Callable[[int, int], None] | None = None) -> None:
        """Learn how the model calls the blocks of a stack for each batch; what goes into the first one is kept."""
        first = stack.blocks[0]
        with contextlib.ExitStack() as carrying:
            if first.index in self._probe.carriers:
                carrying.enter_context(loaded(self.skeleton, first, self.skeleton.read(first)))
            for number in range(len(self.batches)):
                self._record_batch(stack, number)
                if progress is not None:
                    progress(number + 1, len(self.batches))
        self._intern.clear()

    def _record_batch(self, stack: Stack, number: int) -> None:
        first, last = stack.blocks[0], stack.blocks[-1]
        interned: dict[int, tuple[Tensor, Tensor]] = {}
        carried: list[Structure] = []

        def run(index: int, states: Tensor, call: Call) -> Any:
            block = self.skeleton.blocks[index]
            if not first.index <= index <= last.index:
                return self._probe.structure(block).filled(self._made_of(number, block, states))
            self._calls[number][index] = call.mapped(lambda value: self._interned(value, interned))
            if block is first:
                self.states.put(number, states)
                if index in self._probe.carriers:
                    carried.append(Structure.of(call.with_copies().of(block.module, states), block))
            if block is last:
                raise Finished
            return (carried[0] if carried else self._probe.structure(block)).filled(states)

        with stubbed(self.skeleton, run), contextlib.suppress(Finished):
            try:
                forward(self.skeleton.model, named(self.skeleton.model, self.batches[number].to(self.device)))
            except (AttributeError, TypeError) as error:  # of None in the place of a tensor
                raise ModelStructureError(
                    f"{stack.path}: the model's forward needs more than the first tensor of what a block returns "
                    f"({reason(error)}). Such a model cannot be streamed block by block."
                ) from error

    def _made_of(self, batch: int, block: Block, states: Tensor) -> Tensor:
        """What a block of another stack gives for a batch: what its stack has made by then, or what it is given."""
        number = self.skeleton.stack_of(block)
        ended = number < len(self._made) and block is self.skeleton.stacks[number].blocks[-1]
        return self._made[number].get(batch, self.device) if ended else states

    def _interned(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """The same value, with tensors that equal those of an earlier batch or block replaced by those.

        Memory: masks and position embeddings are the same for every batch; this keeps one copy of each. Objects
        that blocks may write to (a dictionary of shared keys and values) stay the same object for all blocks.
        """
        if isinstance(value, Tensor):
            if id(value) not in seen:
                known = self._intern.setdefault((value.shape, value.dtype), [])
                match = next((other for other in known if torch.equal(other, value)), None)
                if match is None:
                    match = value
                    if len(known) < 8:
                        known.append(value)
                seen[id(value)] = (value, match)
            return seen[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(self._interned(item, seen) for item in value)
        if type(value) is dict and all(isinstance(item, Tensor | tuple) for item in value.values()) and value:
            return {key: self._interned(item, seen) for key, item in value.items()}
        return value

    def run(self, block: Block, batch: int, *, states: Tensor | None = None, aside: bool = False) -> Tensor:
        """The hidden states that a loaded block makes of a batch; what goes into it stays as it is.

        `states` are other inputs than those of the batch. With `aside`, what the block leaves for later blocks (shared
        keys and values) is forgotten.
        """
        call = self.call(block, batch)
        call = call.with_copies() if aside else call
        return self.replay(block, call, self.states.get(batch, self.device) if states is None else states)

    def call(self, block: Block, batch: int) -> Call:
        """How the model called a block for a batch."""
        return self._calls[batch][block.index]

    replay = staticmethod(replay)

    def release(self, block: Block) -> None:
        """Forget how a block was called; it will not run again."""
        for calls in self._calls:
            calls.pop(block.index, None)

    def chunk(self, batch: int) -> int:
        """How many tokens of each sample of a batch the head may see at once: `LOGITS_BYTES` of logits, 16 at least."""
        return max(16, LOGITS_BYTES // (4 * len(self.batches[batch]) * self.skeleton.vocabulary_size))

    @torch.no_grad()
    def logits(self, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(next tokens, logits) of a batch after the last block, `chunk` positions at a time, by the model's own head.

        Next tokens are (samples, tokens); logits are (samples, tokens, vocabulary) for them: none for the last token.
        """
        for states, ids, targets in self._parts(batch, chunk):
            yield targets, self._logits(states, ids, batch)[:, : targets.shape[1]]

    def losses(self, batch: int) -> Iterator[Tensor]:
        """The cross-entropy of each next token of a batch, in nats: float32 (samples, tokens), a few at a time."""
        for targets, logits in self.logits(batch, min(512, self.chunk(batch))):
            # Paper: the published code takes the loss in the logits' dtype, which newer transformers leave in half.
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            yield loss.view(targets.shape)

    def window_losses(self, batch: int) -> Tensor:
        """The mean cross-entropy of each window of a batch, in nats: float64, on the CPU."""
        total, predictions = torch.zeros(len(self.batches[batch]), dtype=torch.float64, device=self.device), 0
        for part in self.losses(batch):
            total += part.double().sum(dim=1)
            predictions += part.shape[1]
        return (total / predictions).cpu()

    @torch.enable_grad()
    def head(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(hidden states, next tokens, logits) of a batch, a few at a time; the logits' graph leads to these states."""
        for part, ids, targets in self._parts(batch, self.chunk(batch)):
            states = part.detach().requires_grad_()
            yield states, targets, self._logits(states, ids, batch)[:, : targets.shape[1]]

    @torch.enable_grad()
    def own_losses(self, batch: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """(hidden states, loss) of each sample of a batch: the model's own loss, whose graph leads to these states.

        They are what the last block of each stack has made. Raises `ModelStructureError` where samples cannot be told
        apart, or the model returns no loss.
        """
        name, given = type(self.skeleton.model).__name__, self.batches[batch]
        assert isinstance(given, Named)
        ends = [made.get(batch, self.device) for made in (*self._made, self.states)]
        for states, stack in zip(ends, self.skeleton.stacks, strict=True):
            if states.ndim < 3 or len(states) != len(given):
                raise ModelStructureError(
                    f"{stack.path}: its last block makes hidden states of shape {tuple(states.shape)}, expected "
                    f"({len(given)} samples, tokens, width), so that their losses can be told apart. Use a method "
                    "without gradients."
                )
        for number in range(len(given)):
            own = [states[number : number + 1].detach().requires_grad_() for states in ends]
            sample = labelled(self.skeleton.model, given[number : number + 1].to(self.device))
            with stubbed(self.skeleton, self._ending_in(own)):
                loss = getattr(forward(self.skeleton.model, sample), "loss", None)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise ModelStructureError(
                    f"{name}: returns no loss for {', '.join(sorted(sample))}. Use a method without gradients, or "
                    "--scope block."
                )
            yield own, loss

    @torch.enable_grad()
    def between(self, stack: Stack, batch: int) -> tuple[list[Tensor], Tensor, dict[int, Call]]:
        """(what the stacks before have made, what goes into the first block, the calls of all blocks) of a stack.

        The graph of the others leads to the first, which are leaves.
        """
        number = self.skeleton.stacks.index(stack)
        leaves = [made.get(batch, self.device).detach().requires_grad_() for made in self._made[:number]]
        ending, calls, entering = self._ending_in(leaves), {}, []

        def run(index: int, states: Tensor, call: Call) -> Any:
            block = self.skeleton.blocks[index]
            if self.skeleton.stack_of(block) == number:
                calls[index] = call
                entering.append(states)
                if block is stack.blocks[-1]:
                    raise Finished
            return ending(index, states, call)

        with stubbed(self.skeleton, run), contextlib.suppress(Finished):
            forward(self.skeleton.model, named(self.skeleton.model, self.batches[batch].to(self.device)))
        return leaves, entering[0], calls

    def _ending_in(self, made: Sequence[Tensor]) -> Run:
        """In the place of the blocks: the last ones of the first stacks give what is `made`, others what they get."""

        def run(index: int, states: Tensor, call: Call) -> Any:
            block = self.skeleton.blocks[index]
            number = self.skeleton.stack_of(block)
            ends = number < len(made) and block is self.skeleton.stacks[number].blocks[-1]
            # Exact: a copy, since the model may write into it.
            return self._probe.structure(block).filled(made[number].clone() if ends else states)

        return run

    def _parts(self, batch: int, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(hidden states, their tokens, the next tokens), of which the last part has one less."""
        # Memory: logits of a whole batch can be larger than the model; what follows the blocks is per token.
        ids, targets = predicting(self.skeleton.model, self.batches[batch].to(self.device))
        for number, states in enumerate(torch.split(self.states.get(batch, self.device), chunk, dim=-2)):
            first, last = number * chunk, (number + 1) * chunk
            yield states, ids[:, first:last], targets[:, first:last]

    def _logits(self, states: Tensor, ids: Tensor, batch: int) -> Tensor:
        given = reading(self.skeleton.model, ids, self.batches[batch].to(self.device))
        with stubbed(self.skeleton, self._giving(states)):
            logits: Tensor = forward(self.skeleton.model, given).logits
        return logits

    @torch.no_grad()
    def predictions(self, batch: int) -> Tensor:
        """The logits that the model returns for a batch after the last block, of whatever it predicts."""
        model: Any = self.skeleton.model
        giving = self._giving(self.states.get(batch, self.device), None if self._in_calls else batch)
        with stubbed(self.skeleton, giving), _without_padding(model):
            logits: Tensor = forward(model, named(model, self.batches[batch].to(self.device))).logits
        return logits

    @torch.no_grad()
    def last_hidden_states(self, batch: int) -> Tensor:
        """The hidden states of a batch that the model returns as the last, after the last block and a final norm."""
        model: Any = self.skeleton.model
        found: list[Tensor] = []

        def keep(module: nn.Module, args: object, output: Any) -> None:
            # Of images and texts side by side, what is compared is one embedding of each.
            both = [getattr(output, f"{kind}_embeds", None) for kind in ("image", "text")]
            found.append(output[0] if None in both else torch.stack([own for own in both if own is not None], dim=1))
            raise Finished

        part: Any = timm_part(model)
        if part is not None:
            return self._features(part, batch)
        # What transformers calls the base model is the one without a head.
        states = self.states.get(batch, self.device)
        bare = decoder_of(model) if self._in_calls else getattr(model, "base_model", model)
        hook = bare.register_forward_hook(keep)
        try:
            with (
                stubbed(self.skeleton, self._giving(states, None if self._in_calls else batch)),
                contextlib.suppress(Finished),
            ):
                forward(model, named(model, self.batches[batch].to(self.device)))
        finally:
            hook.remove()
        # Of an image some models return a map of channels, (samples, channels, height, width).
        return found[0].flatten(2).transpose(1, 2) if found[0].ndim == 4 else found[0]

    def _features(self, part: Any, batch: int) -> Tensor:
        """What a model of timm makes of a batch before its head, as hidden states."""
        images = named(self.skeleton.model, self.batches[batch].to(self.device))[PIXELS]
        with stubbed(self.skeleton, self._giving(self.states.get(batch, self.device), batch)):
            made = part.forward_features(images)
        states: Tensor = made if isinstance(made, Tensor) else made[0]
        if states.ndim == 4 and str(getattr(part, "output_fmt", "")).endswith("NHWC"):
            states = states.flatten(1, 2)
        # Of a map of channels, or of features of the whole image.
        return (
            states.flatten(2).transpose(1, 2) if states.ndim == 4 else states.reshape(len(states), -1, states.shape[-1])
        )

    def _giving(self, states: Tensor, batch: int | None = None) -> Run:
        """In the place of the blocks: the last one gives these states, the others hand on what they are given.

        Where stacks before it lead to what is asked for, their last blocks give what they have made of the `batch`.
        """
        last = self.skeleton.blocks[-1]

        def run(index: int, passed: Tensor, call: Call) -> Any:
            block = self.skeleton.blocks[index]
            given = passed if batch is None else self._made_of(batch, block, passed)
            return self._probe.structure(block).filled(states if block is last else given)

        return run

    def close(self) -> None:
        """Drop the hidden states and their files."""
        for states in (*self._made, self.states):
            states.close()


@contextlib.contextmanager
def _without_padding(model: Any) -> Iterator[None]:
    """A head that chooses by the last token that is no padding takes several samples, where no token is named for that.

    Nothing is padded here.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "pad_token_id", 0) is not None:
        yield
        return
    config.pad_token_id = -1  # no token
    try:
        yield
    finally:
        config.pad_token_id = None
