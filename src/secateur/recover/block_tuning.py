"""Tunes the kept weights of one loaded block until its outputs come close to their targets.

The loss of a token is the squared distance of the output from its target over the squared length of the target: that is
what the next block sees, whose norm divides each token by its length. Its gradient goes no further than the block. Adam
works on float32 copies of the weights, whatever dtype the block computes in. Weights that are zero have no gradient and
no moments, and stay exactly zero.

Several processes share the batches of every step. Each takes the gradient of its own; all add up all of them in the
order of the batches, as one process does, and make the same step.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.windows import Windows
from secateur.errors import CalibrationError, ModelStructureError, NumericalError
from secateur.models.flow.stream import HiddenStates, Stream
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block
from secateur.recover.masks import keep_from_zero
from secateur.recover.settings import BlockSettings
from secateur.runs.processes import ALONE, Processes, too_few

BETAS = (0.9, 0.95)  # of Adam: a few hundred steps are too few for an average over a thousand
WARM_UP = 0.05  # of all steps
LEAST_LENGTH = 1e-6  # of a token's target, squared, relative to the mean


@dataclass(frozen=True)
class Split:
    """Which samples are trained on, in steps of whole batches; the rest, which come last, is held out."""

    batches: Mapping[int, Tensor]  # of token ids: those of this process, by their numbers among all
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
        return cls(dict(enumerate(batches)), ranges[:-1], ranges[-1], trained, step, size)

    def share(self, processes: Processes) -> "Split":
        """What is left to one of several processes, each of which has a batch of any as many that follow one another.

        Raises `ProcessError` where there are fewer batches than processes.
        """
        if len(self.batches) < processes.count:
            raise too_few(len(self.batches), processes.count, "more samples")
        own = {number: batch for number, batch in self.batches.items() if number % processes.count == processes.rank}
        return replace(self, batches=own)


@dataclass
class Targets:
    """The outputs that the block should have for each batch of this process.

    Of every batch, by its number, `tokens` has how many there are, and `squares` the sum of their squares.
    """

    states: HiddenStates
    tokens: dict[int, int] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0  # that the forward took

    def add(self, number: int, states: Tensor) -> None:
        """Keep the targets of the next batch, which has this number among all."""
        self.states.put(len(self.squares), states)
        self.tokens[number] = states[..., 0].numel()
        wide = torch.promote_types(states.dtype, torch.float32)
        self.squares[number] = float(states.to(wide).square().sum(dtype=torch.float64))

    def join(self, processes: Processes) -> None:
        """Learn the numbers of the batches of all processes."""
        for tokens, squares in processes.gather((self.tokens, self.squares)):
            self.tokens |= tokens
            self.squares |= squares


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
    processes: Processes = ALONE,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a loaded block that tuning changes, and its record; block, inputs and `tensors` stay as they are.

    `tensors` are the block's checkpoint tensors. In the record `before` and `after` are the loss on held-out samples,
    `epochs` is how many were run, the last one perhaps in part, and `best_epoch` the one whose weights were kept (0:
    the weights as they were). `nudged` counts kept weights that would have been rounded to zero; `diverged` is the
    epoch whose loss was not finite, after which no more were run. All `processes` that share the batches get the same.

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
    loss = _Loss(block, stream, targets, split, processes)
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
        if seconds is None:
            return steps
        elapsed = processes.gather(time.perf_counter() - began)[0]
        return max(steps, (elapsed / seconds if elapsed < seconds else 1.0) * total)

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
        if not all(processes.gather(math.isfinite(float(torch.stack(sums).sum())))):
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
        parameter: Tensor,
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

    def __init__(
        self, block: Block, stream: Stream, targets: Targets, split: Split, processes: Processes = ALONE
    ) -> None:
        self._block, self._stream, self._targets, self._split = block, stream, targets, split
        self._processes = processes
        self._own = {number: position for position, number in enumerate(split.batches)}
        # A token whose target is next to nothing does not outweigh all others.
        self._least = LEAST_LENGTH * math.fsum(targets.squares.values()) / sum(targets.tokens.values())

    def held_out(self, copies: Sequence[_Copy], states: Sequence[tuple[Tensor, int]]) -> float:
        """The loss on the held-out samples with rounded weights."""
        with torch.no_grad():
            weights = {copy.name: state.to(copy.dtype) for copy, (state, _) in zip(copies, states, strict=True)}
            among = self._split.held_out
            own = [self._of(weights, number, among) for number in among if number in self._own]
        # Exact: the same sum in any order.
        return math.fsum(chain(*self._processes.gather(torch.stack(own).tolist() if own else [])))

    def backward(self, copies: Sequence[_Copy], step: range) -> Tensor:
        """The loss of this process's part of a step; the gradient of all of it is added to the copies.

        One batch of each process is in memory at a time.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        at_once = self._processes.count
        for first in range(step.start, step.stop, at_once):
            part = range(first, min(first + at_once, step.stop))
            before = [copy.master.grad for copy in copies]
            if at_once > 1:
                for copy in copies:
                    copy.master.grad = None
            for number in part:
                if number not in self._own:
                    continue
                with torch.enable_grad():
                    loss = self._of({copy.name: copy.master.to(copy.dtype) for copy in copies}, number, step)
                    if loss.requires_grad:  # not where the only tuned experts saw no token of the batch
                        loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
            if at_once > 1:
                self._add_up(copies, before, part)
        return total

    def _add_up(self, copies: Sequence[_Copy], before: Sequence[Tensor | None], part: range) -> None:
        """Give each copy the gradient that it had and those of these batches, of which each process has one at most.

        Exact: they are added one by one, as autograd adds them in a process that has all of them. A batch that has no
        gradient, of experts that saw none of its tokens, adds none.
        """
        rank, count = self._processes.rank, self._processes.count
        there = self._processes.gather([copy.master.grad is not None for copy in copies])
        for position, (copy, total) in enumerate(zip(copies, before, strict=True)):
            own = copy.master.grad
            for sender in (number % count for number in part):
                if not there[sender][position]:
                    continue
                gradient = own if sender == rank else torch.empty_like(copy.master, requires_grad=False)
                assert gradient is not None
                self._processes.send(gradient, sender)
                total = gradient.clone() if total is None else total.add_(gradient)
            copy.master.grad = total

    def _of(self, weights: dict[str, Tensor], number: int, among: range) -> Tensor:
        """A batch's share of the loss of several batches."""

        def module(*args: Any, **kwargs: Any) -> Any:
            """The block's own with these weights instead; gradients flow to them."""
            own = {name: weight.view_as(self._block.module.get_parameter(name)) for name, weight in weights.items()}
            return torch.func.functional_call(self._block.module, own, args, kwargs)

        block = Block(self._block.index, self._block.path, module)  # type: ignore[arg-type]  # it is only called
        own = self._own[number]
        output = self._stream.run(block, own, aside=True)
        target = self._targets.states.get(own, self._stream.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        output, target = output.to(wide), target.to(wide)
        lengths = target.square().sum(dim=-1).clamp(min=self._least)
        tokens = sum(self._targets.tokens[other] for other in among)
        return ((output - target).square().sum(dim=-1) / lengths).sum() / tokens
