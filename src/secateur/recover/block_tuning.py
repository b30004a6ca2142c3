"""Tunes the kept weights of one loaded block until its outputs come close to their targets.

The loss of a token is the squared distance of the output from its target over the squared length of the target: that is
what the next block sees, whose norm divides each token by its length. Its gradient goes no further than the block. Adam
works on float32 copies of the weights, whatever dtype the block computes in. Weights that are zero have no gradient and
no moments, and stay exactly zero.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.windows import Windows
from secateur.errors import CalibrationError, ModelStructureError, NumericalError
from secateur.models.flow.stream import HiddenStates, Stream
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block
from secateur.recover.masks import keep_from_zero
from secateur.recover.settings import BlockSettings

BETAS = (0.9, 0.95)  # of Adam: a few hundred steps are too few for an average over a thousand
WARM_UP = 0.05  # of all steps
LEAST_LENGTH = 1e-6  # of a token's target, squared, relative to the mean


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, in steps of whole batches; the rest, which come last, is held out."""

    batches: Sequence[Tensor]  # of token ids, in all
    steps: Sequence[range]  # of batches, each of which makes one step of Adam
    held_out: range  # of batches
    trained: int  # samples
    step: int
    batch_size: int

    @classmethod
    def of(cls, windows: Windows, held_out: float, step: int, batch_size: int) -> "Split":
        """Whole steps only: what does not fill one is held out too. A batch is the largest that steps divide into.

        Raises `CalibrationError` when there are too few samples to train on some and hold others out.
        """
        most = windows.samples - max(1, round(windows.samples * held_out))
        if most < 1:
            raise CalibrationError(
                f"{windows.samples} calibration sample{'s' if windows.samples > 1 else ''} with --held-out {held_out}: "
                "none is left to train on. Use more --samples (128 is usual)."
            )
        step = min(step, most)
        size = max(divisor for divisor in range(1, min(step, batch_size) + 1) if step % divisor == 0)
        batches: list[Tensor] = []
        ranges = []
        trained = most // step * step
        for first, last in [*((first, first + step) for first in range(0, trained, step)), (trained, None)]:
            own = windows.part(first, last).batches(size)
            ranges.append(range(len(batches), len(batches) + len(own)))
            batches += own
        return cls(batches, ranges[:-1], ranges[-1], trained, step, size)


@dataclass
class Targets:
    """The outputs that the block should have for each batch, with its number of tokens and the sum of their squares."""

    states: HiddenStates
    tokens: list[int] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that the forward took

    def add(self, states: Tensor) -> None:
        """Keep the targets of the next batch."""
        self.states.put(len(self.tokens), states)
        self.tokens.append(states[..., 0].numel())
        wide = torch.promote_types(states.dtype, torch.float32)
        self.squares.append(float(states.to(wide).square().sum(dtype=torch.float64)))


def tune(
    block: Block,
    matrices: Sequence[Matrix],
    tensors: Mapping[str, Tensor],
    stream: Stream,
    targets: Targets,
    split: Split,
    settings: BlockSettings,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a loaded block that tuning changes, and its record; block, inputs and `tensors` stay as they are.

    `tensors` are the block's checkpoint tensors. In the record `before` and `after` are the loss on held-out samples,
    `epochs` is how many were run, the last one perhaps in part, and `best_epoch` the one whose weights were kept (0:
    the weights as they were). `nudged` counts kept weights that would have been rounded to zero; `diverged` is the
    epoch whose loss was not finite, after which no more were run.

    After each epoch the weights are judged on the held-out samples as they would be written, rounded; the best ones
    are the result, those at the start included. With `seconds`, tuning ends when they are over at the latest, and the
    learning rate falls with them; it rises over the first twentieth of all steps and then falls linearly.

    Source: block reconstruction after pruning, as in EBFT (arXiv 2402.12419) and "Rethinking pruning large language
    models" (EMNLP 2024), with their Adam and linear decay. Raises `NumericalError` for a loss that is not finite at the
    start; where it becomes so, tuning ends with the best weights until then.
    """
    # Paper: they average squares over all tokens alike, with an absolute learning rate, and hold nothing out.
    copies = []
    for name, (parameter, transposed) in tapped(block, matrices)[0].items():
        own = [matrix for matrix in matrices if matrix.parameter == name]
        copies.append(_Copy(name[len(block.path) + 1 :], parameter, own, tensors, transposed))
    loss = _Loss(block, stream, targets, split.held_out)
    best = [copy.rounded() for copy in copies]
    before = after = loss.held_out(copies, best)
    if not math.isfinite(before):
        raise NumericalError(
            f"{block.path}: the loss on held-out samples is {before} before anything is tuned. Use --dtype float32, "
            "and check both models with secateur eval."
        )
    optimizer = torch.optim.Adam(
        [{"params": [copy.master], "lr": settings.learning_rate * copy.scale()} for copy in copies], betas=BETAS
    )
    began = time.perf_counter()
    total = settings.epochs * len(split.steps)
    rising = max(1, round(WARM_UP * total))

    def spent(steps: int) -> float:
        """How much of the budget is spent, in steps."""
        elapsed = time.perf_counter() - began
        share = 0.0 if seconds is None else elapsed / seconds if elapsed < seconds else 1.0
        return max(steps, share * total)

    def rate(step: int) -> float:
        """The factor of the learning rate after so many steps."""
        done = spent(step)
        return min((done + 1) / rising, (total - done) / max(total - rising, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(settings.seed)
    step = epoch = chosen = 0
    diverged = None
    while spent(step) < total and epoch - chosen < settings.patience:
        sums = []
        for number in torch.randperm(len(split.steps), generator=generator).tolist():
            sums.append(loss.backward(copies, split.steps[number]))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            progress(step, total)
            if spent(step) >= total:
                break
        epoch += 1
        if not math.isfinite(float(torch.stack(sums).sum())):
            diverged = epoch
            break
        states = [copy.rounded() for copy in copies]
        now = loss.held_out(copies, states)
        if now < after:
            best, after, chosen = states, now, epoch
    changed: dict[str, Tensor] = {}
    for copy, (state, _) in zip(copies, best, strict=True):
        if chosen:
            copy.write(state, tensors, changed)
    return changed, {
        "before": before,
        "after": after,
        "epochs": step / len(split.steps),
        "best_epoch": chosen,
        "nudged": sum(count for _, count in best) if chosen else 0,
        "diverged": diverged,
    }


class _Copy:
    """A parameter of the block while it is tuned: float32 weights, and which of them are free to change."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        matrices: Sequence[Matrix],
        tensors: Mapping[str, Tensor],
        transposed: bool,
    ) -> None:
        self.name = name
        self.dtype = parameter.dtype
        self._matrices = matrices
        self._transposed = transposed
        self._stored = tensors[matrices[0].tensor].dtype
        wide = torch.promote_types(torch.promote_types(self.dtype, self._stored), torch.float32)
        self.master = parameter.detach().to(wide, copy=True)
        self._free = torch.zeros_like(parameter, dtype=torch.bool)
        for matrix in matrices:
            weight = matrix.view(tensors).to(parameter.device)
            if not torch.equal(matrix.of_parameter(parameter, transposed), weight.to(parameter.dtype)):
                raise ModelStructureError(
                    f"{matrix.name}: transformers computes with other numbers than the checkpoint holds, so that tuned "
                    f'weights cannot be written back. Leave it as it is with --skip "{matrix.name}".'
                )
            # Exact: the computing dtype may be narrower than the checkpoint's.
            matrix.place(weight.to(self.master.dtype), self.master, transposed)
            matrix.place(weight != 0, self._free, transposed)
        self.master.requires_grad_()
        # What must stay as it is gets no gradient, so that Adam never moves it.
        self.master.register_hook(self._free.mul)  # type: ignore[no-untyped-call]

    def scale(self) -> float:
        """The root mean square of the free weights; 0 when there are none."""
        free = self.master.detach()[self._free]
        return float(free.square().mean().sqrt()) if free.numel() else 0.0

    def rounded(self) -> tuple[Tensor, int]:
        """The weights in the checkpoint's dtype, and how many free ones would have become zero there.

        As zero they would count as removed: the checkpoint would have more zeros than its plan asks for.
        """
        with torch.no_grad():
            rounded, count = keep_from_zero(self.master, self._free, self._stored)
            return torch.where(self._free, rounded, self.master.to(self._stored)), count

    def write(self, state: Tensor, tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
        """Put a rounded state into copies of the checkpoint tensors, at the weights that are not zero."""
        for matrix in self._matrices:
            if matrix.tensor not in changed:
                changed[matrix.tensor] = tensors[matrix.tensor].clone()
            weight = matrix.view(changed)
            new = matrix.of_parameter(state, self._transposed).to(weight.device, weight.dtype)
            weight.copy_(torch.where(weight != 0, new, weight))


class _Loss:
    """The loss of a block: the mean over tokens of |output - target|² / |target|²."""

    def __init__(self, block: Block, stream: Stream, targets: Targets, held_out: range) -> None:
        self._block, self._stream, self._targets, self._held_out = block, stream, targets, held_out
        # A token whose target is next to nothing does not outweigh all others.
        self._least = LEAST_LENGTH * sum(targets.squares) / sum(targets.tokens)

    def held_out(self, copies: Sequence[_Copy], states: Sequence[tuple[Tensor, int]]) -> float:
        """The loss on the held-out samples with rounded weights."""
        with torch.no_grad():
            weights = {copy.name: state.to(copy.dtype) for copy, (state, _) in zip(copies, states, strict=True)}
            return float(torch.stack([self._of(weights, batch, self._held_out) for batch in self._held_out]).sum())

    def backward(self, copies: Sequence[_Copy], step: range) -> Tensor:
        """The loss of a step, whose gradient is added to the copies; one batch in memory at a time."""
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        for batch in step:
            with torch.enable_grad():
                loss = self._of({copy.name: copy.master.to(copy.dtype) for copy in copies}, batch, step)
                if loss.requires_grad:  # not where the only tuned experts saw no token of the batch
                    loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _of(self, weights: dict[str, Tensor], batch: int, among: range) -> Tensor:
        """A batch's share of the loss of several batches."""

        def module(*args: Any, **kwargs: Any) -> Any:
            """The block's own with these weights instead; gradients flow to them."""
            return torch.func.functional_call(self._block.module, weights, args, kwargs)

        block = Block(self._block.index, self._block.path, module)  # type: ignore[arg-type]  # it is only called
        output = self._stream.run(block, batch, aside=True)
        target = self._targets.states.get(batch, self._stream.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        output, target = output.to(wide), target.to(wide)
        lengths = target.square().sum(dim=-1).clamp(min=self._least)
        tokens = sum(self._targets.tokens[number] for number in among)
        return ((output - target).square().sum(dim=-1) / lengths).sum() / tokens
