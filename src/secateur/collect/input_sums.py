"""Sums over the inputs of matrices: any class that keeps the contract of `Statistic`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.collect.collector import Collector, Cost, Evidence, Extent
from secateur.core.checks import first_nonfinite
from secateur.core.exact import Joinable
from secateur.core.gram import CrossGram
from secateur.core.statistics import SquaredNorm, Statistic, cost
from secateur.errors import CalibrationError, ModelStructureError, SecateurError
from secateur.models.flow.inputs import is_tokens
from secateur.models.flow.memory import LARGE_BYTES
from secateur.models.flow.tap import Key
from secateur.models.shape.matrices import Matrix, numbered_experts
from secateur.models.shape.skeleton import Skeleton
from secateur.runs.processes import Processes

if TYPE_CHECKING:
    from secateur.collect.survey import Survey


@dataclass(frozen=True)
class Sums:
    """Statistics of the inputs of some parameters; `leader` is the key under which those of another one are."""

    leader: Mapping[Key, Key]
    by_leader: dict[Key, dict[type[Statistic], Statistic]]

    def whole(self, matrix: Matrix) -> Mapping[type[Statistic], Statistic]:
        """The statistics of all inputs of a matrix's parameter; none when no token reached it."""
        leader = self.leader.get((matrix.parameter, matrix.expert))
        return self.by_leader[leader] if leader is not None else {}

    def of(self, matrix: Matrix) -> dict[type[Statistic], Statistic]:
        """The statistics of a matrix's inputs; none when no token reached it."""
        found = self.whole(matrix)
        if matrix.columns is None:
            return dict(found)
        return {kind: statistic.select(matrix.columns) for kind, statistic in found.items()}

    def read_by(self, matrices: Sequence[Matrix]) -> Sums:
        """The statistics of the inputs of these matrices alone."""
        leaders = {self.leader.get((matrix.parameter, matrix.expert)) for matrix in matrices}
        return Sums(self.leader, {key: found for key, found in self.by_leader.items() if key in leaders})

    def only(self, kinds: frozenset[type[Statistic]]) -> Sums:
        """The statistics of these kinds alone."""
        kept = {key: {k: own for k, own in found.items() if k in kinds} for key, found in self.by_leader.items()}
        return Sums(self.leader, kept)


class InputSums(Collector):
    """All statistics of inputs that a run needs, in the same forwards; matrices that read the same input share one.

    With a `survey` that another run has completed they are read there instead; one that is not is filled on the way.
    """

    def __init__(self, kinds: frozenset[type[Statistic]], survey: Survey | None = None) -> None:
        self.needs = kinds
        self.kinds = kinds
        self.survey = survey
        self.known = survey is not None and survey.complete

    def batch_size(self, skeleton: Skeleton, length: int, batch_size: int | None) -> int | None:
        """One sample where a statistic goes by samples. Raises `CalibrationError` when more are asked for."""
        ordered = [kind.__name__ for kind in self.kinds if getattr(kind, "one_sample_at_a_time", False)]
        if ordered and batch_size not in (None, 1):
            raise CalibrationError(f"--batch-size: got {batch_size}, expected 1: {ordered[0]} goes by samples.")
        return 1 if ordered else batch_size

    def cost(self, extent: Extent) -> Cost:
        """A sum for every input of a block, and its products with every token that is routed there."""
        # The share of a layer's experts that a token is routed to; 1 without experts.
        configuration = extent.skeleton.text_config
        share = getattr(configuration, "num_experts_per_tok", None) or 1
        share /= numbered_experts(configuration) or 1
        sums: dict[int, int] = {}
        products = joined = 0.0
        batches = math.ceil(extent.samples / extent.chosen_batch_size)
        for matrix, inputs in inputs_of(extent.matrices):
            for kind in self.kinds:
                own = cost(kind, matrix.shape[1])
                held = inputs * extent.number_bytes * own.numbers
                # Memory: measured. Many buffers that are too small to be given back at once leave holes of their size.
                holes = held if matrix.expert is not None and held < LARGE_BYTES else 0
                sums[matrix.block] = sums.get(matrix.block, 0) + held + holes
                products += inputs * extent.tokens * own.products * (1 if matrix.expert is None else share)
                # Of a Gram matrix one triangle, of vectors the terms of all batches, 8 bytes for each number.
                whole = 8 * own.numbers if kind is CrossGram else 4 * own.numbers
                joined += inputs * (whole or 8 * batches * matrix.shape[1])
        return Cost(held=max(sums.values(), default=0), products=products, joined=joined)

    def solving(self, in_features: int) -> int:
        """As the statistics say."""
        return sum(cost(kind, in_features).solving for kind in self.kinds)

    def start(self) -> None:
        """Begin with empty sums."""
        self.sums = Sums(self.place.inputs.leader, {})
        self._widths: dict[Key, int] = {}
        self._samples = 0
        self._batch = 0
        self._first: dict[Key, str] = {}  # where the inputs of a parameter are first not finite, in words
        taken = self.kinds if self.survey is None else self.survey.kinds
        self._taken = sorted(taken, key=lambda kind: kind.__name__)
        if not self.known:
            self.place.inputs.takers.append(self._take)

    def begin(self, batch: int, *, stop: bool) -> None:
        """Remember which batch it is."""
        self._batch = batch

    def _take(self, key: Key, number: int, x: Tensor) -> None:
        if key not in self.sums.by_leader:
            device = self.place.device or x.device
            self._begin(key, x.shape[1], device)
        for statistic in self.sums.by_leader[key].values():
            self.add(statistic, key, number, x)
        # Fast: NaN and infinity stay in a sum, and a sum is smaller than what was added to it.
        if key not in self._first and not next(iter(self.sums.by_leader[key].values())).is_finite():
            self._first[key] = self._where(x)

    def _begin(self, key: Key, width: int, device: torch.device) -> None:
        self._widths[key] = width
        self.sums.by_leader[key] = own = {kind: kind.empty(width, device) for kind in self._taken}
        for statistic in own.values() if self.place.processes.count > 1 else ():
            if isinstance(statistic, SquaredNorm):
                statistic.keep_terms()

    def _where(self, x: Tensor) -> str:
        """Where inputs that spoil a sum come from, in words."""
        index, batches = first_nonfinite(x), self.place.stream.batches
        if index is None:
            return "all of them finite, but not the sum of their squares"
        share = self.place.share
        assert share is not None
        ids = batches[self._batch]
        before = share.before + sum(len(batches[batch]) for batch in share.counted if batch < self._batch)
        value = f"first {float(x[index]):g}"
        if is_tokens(ids) and x.shape[0] == ids.numel():
            sample, token = divmod(index[0], ids.shape[1])
            return f"{value} in sample {before + sample}, token {token}, input {index[1]}"
        samples = f"sample {before}" if len(ids) == 1 else f"samples {before} to {before + len(ids) - 1}"
        return f"{value} in {samples}, row {index[0]} of what reaches the matrix, input {index[1]}"

    def add(self, statistic: Statistic, key: Key, number: int, x: Tensor) -> None:
        """Add the inputs of a product; `number` counts the products of this forward with that key, from 0."""
        statistic.update(x)

    def end(self, batch: int, output: Tensor | None) -> None:
        """Count the samples of the batch."""
        self._samples += len(self.place.stream.batches[batch])
        # Exact: however often it multiplied, and whether or not a token was routed to it, a matrix has had them all.
        for statistics in self.sums.by_leader.values():
            for statistic in statistics.values():
                statistic.samples = self._samples

    def join(self, processes: Processes) -> None:
        """Agree on which inputs there are, which tokens reached only some of the processes, and join their sums."""
        if processes.count == 1 or self.known:
            return
        device = self.place.device or self.place.stream.device
        found = processes.gather((dict(self.sums.leader), dict(self._widths), self._first, self._samples))
        for leader, widths, first, _ in found:
            for key, leads in leader.items():
                if self.place.inputs.leader.setdefault(key, leads) != leads:
                    raise ModelStructureError(f"{key[0]}: shares its input with {leads[0]} for some samples only.")
            for key, width in widths.items():
                if key not in self.sums.by_leader:
                    self._begin(key, width, device)
            for key, where in first.items():
                self._first.setdefault(key, where)
        self._samples = sum(samples for *_, samples in found)
        # Exact: in one order in all processes, whichever inputs each has seen first.
        sums = [self.sums.by_leader[key] for key in sorted(self.sums.by_leader, key=str)]
        every = [own[kind] for own in sums for kind in self._taken]
        processes.join([own for own in every if isinstance(own, Joinable)])
        for own in sums:
            for kind in self._taken:
                if not isinstance(own[kind], Joinable):
                    own[kind], *rest = processes.gather(own[kind])
                    for other in rest:
                        own[kind].merge(other)
                own[kind].samples = self._samples

    def finished(self) -> None:
        """Raise unless every matrix saw tokens, and only finite ones; exchange the sums with the survey."""
        for own in self.sums.by_leader.values():
            for statistic in own.values():
                finish: Callable[[], None] | None = getattr(statistic, "finish", None)
                if finish is not None:
                    finish()
        index, matrices = self.place.block.index, self.place.matrices
        if self.survey is not None and self.known:
            self.sums = self.survey.block(index, self.kinds) if matrices else self.sums
            self._check()
            return
        self._check()
        if self.survey is not None:
            self.survey.put(index, matrices, self.sums)
            # Exact: a method must not see what it did not ask for; the diagonal of a Gram matrix is no SquaredNorm.
            self.sums = self.sums.only(self.kinds)

    def keep(self, matrices: Sequence[Matrix]) -> None:
        """Let go of the sums that only other matrices read."""
        self.sums = self.sums.read_by(matrices)

    def of(self, matrix: Matrix, device: torch.device) -> Evidence:
        """The statistics of a matrix's inputs."""
        return self.sums.of(matrix)

    def _check(self) -> None:
        sums, matrices = self.sums, self.place.matrices
        unseen = [matrix.name for matrix in matrices if not any(own.tokens for own in sums.whole(matrix).values())]
        if unseen:
            some = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
            its, it = ("its", "it") if len(unseen) == 1 else ("their", "them")
            error: SecateurError = ModelStructureError(
                f"{some}: saw no token of the {self.place.samples} calibration samples, so nothing is known "
                f"of {its} inputs. Calibrate on more samples (--samples), prune {it} by magnitude (--unseen "
                f"magnitude), or leave {it} dense (--unseen skip)."
            )
            self.exempt.no_token(unseen, error)
        # In the order of the forward, so that the first one named is where the trouble begins.
        order = {key: position for position, key in enumerate(sums.leader)}
        sound: set[int] = set()  # statistics that other matrices share
        seen = [matrix for matrix in matrices if (matrix.parameter, matrix.expert) in order]
        for matrix in sorted(seen, key=lambda matrix: order[(matrix.parameter, matrix.expert)]):
            for statistic in sums.whole(matrix).values():
                if id(statistic) in sound:
                    continue
                if not statistic.is_finite():
                    where = self._first.get(sums.leader[(matrix.parameter, matrix.expert)])
                    error = CalibrationError(
                        f"{matrix.name}: its inputs on the calibration samples contain NaN or infinity"
                        f"{'' if where is None else f', {where}'}. Is the model itself sound? Try --dtype float32, and "
                        "check the dense model with secateur eval."
                    )
                    self.exempt.nonfinite(matrix.name, error)
                    break
                sound.add(id(statistic))


def inputs_of(matrices: Sequence[Matrix]) -> list[tuple[Matrix, int]]:
    """One matrix for all that read the same input, and how many such inputs of its width its module has.

    Matrices of a module that are equally wide read the same one (q, k and v; gate and up), but for the last of four or
    more (o).
    """
    alike: dict[tuple[int, str, int | None, int], list[Matrix]] = {}
    for matrix in matrices:
        module = matrix.name.removesuffix(".weight").rpartition(".")[0]
        alike.setdefault((matrix.block, module, matrix.expert, matrix.shape[1]), []).append(matrix)
    return [(found[0], 2 if len(found) > 3 else 1) for found in alike.values()]
