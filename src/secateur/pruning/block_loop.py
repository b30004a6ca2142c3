"""The one loop over the blocks: read, take statistics, solve, write, move on.

For each block: read it, run the calibration samples through it while statistics of the matrices' inputs are taken,
solve every matrix, write the block, and run the samples through the pruned block to make the next block's inputs. Site
by site the samples run only once: they wait in the middle of the block while matrices are solved. The next block is
read and the last one written while this one is computed.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.collect.collector import Collected, Place, reach_site, run_batches
from secateur.collect.dense_twin import DenseTwin
from secateur.collect.evidence import RunEvidence
from secateur.collect.sites import sites
from secateur.core import scores
from secateur.core.batch import Batch
from secateur.core.checks import check_weight, first_nonfinite, solved
from secateur.core.gram import Gram
from secateur.core.histogram import histogram
from secateur.core.own_code import blamed
from secateur.core.problem import Method, Problem, Solution, select
from secateur.core.statistics import SquaredNorm
from secateur.errors import NumericalError, ProcessError, SecateurError
from secateur.files.checkpoint import tensor_digest
from secateur.models.flow.inputs import tokens_in
from secateur.models.flow.stream import Stream, states_folder
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.shape.matrices import Matrix, by_block, tapped
from secateur.models.shape.skeleton import loaded
from secateur.models.shape.structure import Block
from secateur.pruning.preparation import Prepared, solving_cost
from secateur.pruning.reordering import Reordering, record_of
from secateur.record.far_blocks import mark_far_blocks
from secateur.record.manifest import Manifest
from secateur.record.reordered import ReorderedEntry, merged, orders_of, reordered, restored
from secateur.runs.checkpoint import check_source
from secateur.runs.conveyor import Conveyor, Finished
from secateur.runs.events import Event
from secateur.runs.processes import ALONE, Processes, Share


class BlockLoop:
    """One pass over the blocks."""

    def __init__(
        self,
        ready: Prepared,
        evidence: RunEvidence,
        manifest: Manifest,
        conveyor: Conveyor,
        states: Path,
        processes: Processes = ALONE,
    ) -> None:
        """For a prepared run whose `evidence` may have been added to; `states` is a folder for hidden states.

        Several `processes` share the samples and the matrices of each block; the first one writes.
        """
        self.ready, self.settings, self.evidence = ready, ready.settings, evidence
        self.skeleton, self.method, self.plan = ready.opened.skeleton, ready.method, ready.plan
        self.manifest, self.conveyor, self.states, self.clock = manifest, conveyor, states, conveyor.clock
        self.planned = by_block(ready.extent.matrices)
        self.last = max(self.planned)
        self.processes = processes
        self.finished = processes.gather(conveyor.finished())[0]
        self.share: Share | None = None
        self.stream: Stream | None = None  # the calibration samples between two blocks of the pruned model
        self.twin: DenseTwin | None = None  # and, where targets need it, of the dense one
        self.reordering: Reordering | None = None  # and what a few tokens show of orders of channels

    @torch.no_grad()
    def run(self) -> None:
        """Prune block by block, and write everything. Raises what the method and the checks raise."""
        try:
            if self.evidence.forwards and self.last not in self.finished:
                self._open_streams()
            if self.settings.permute and self.last not in self.finished:
                self.skeleton.load_outside(head=False)
                self.reordering = Reordering(self.skeleton, self.plan)
                self.skeleton.unload_outside()
            self.conveyor.carry(self._prune_block, read=self._read)
            self._record_exempt()
        finally:
            for opened in (self.stream, self.twin, self.reordering):
                if opened is not None:
                    opened.close()

    def _record_exempt(self) -> None:
        """Take the matrices that stayed dense out of the plan, and mark what else a reader should know."""
        skipped = self.evidence.exempt.skipped
        for name in [name for name in self.manifest.plan if name in skipped]:
            self.manifest.skipped[name] = {"reason": skipped[name], "pattern": self.manifest.plan.pop(name)}
        if not self.manifest.matrices:
            reason = next(iter(self.manifest.skipped.values()))["reason"]
            raise NumericalError(
                f"No matrix could be pruned, all {len(self.plan)} would stay dense. The first: {reason}"
            )
        # The thread that reads may be ahead of what finished blocks have added.
        digests, read = self.manifest.source_tensors, [matrix.tensor for own in self.planned.values() for matrix in own]
        read += [] if self.manifest.reordered is None else self.manifest.reordered["tensors"]
        self.manifest.source_tensors = {name: digests[name] for name in dict.fromkeys(read) if name in digests}
        mark_far_blocks(self.manifest.blocks)

    def _open_streams(self) -> None:
        assert self.ready.windows is not None
        started = time.perf_counter()
        self.skeleton.load_outside(head=False)
        batches: list[Batch] = list(self.ready.windows.batches(self.ready.extent.chosen_batch_size))
        if self.settings.within == "site" and len(batches[0]) > 1:
            # Fast: the first batch runs more often, to find out what the block multiplies. One sample shows it.
            batches = [batches[0][:1], batches[0][1:], *batches[1:]]
        if self.evidence.known:  # how far each block's output moves is left to find out, on the first batch alone
            batches = batches[:1]
        self.share = self.processes.share(
            batches, probe=self.settings.within == "site", length=self.ready.extent.length
        )
        batches = list(self.share.batches)
        # Memory: beside the pruned stream, what goes into a block of the dense model and what comes out of it.
        dense = self.evidence.beside_dense
        tokens = tokens_in(batches, self.ready.extent.length)
        needed = (3 if dense else 1) * tokens * self.skeleton.hidden_size * self.skeleton.dtype.itemsize
        folder = states_folder(self.settings.offload_states, needed, self.states)
        made = [
            Stream(
                self.skeleton,
                batches,
                states_folder=folder,
                progress=lambda done, total: self.conveyor.on_event(Event("record", 0, self.last + 1, done, total)),
            )
            for _ in range(1 + dense)
        ]
        self.skeleton.unload_outside()
        self.clock.add("record calls", started)
        self.stream, self.twin = made[0], DenseTwin(made[1], folder) if dense else None

    def _read(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """In the background: a block's checkpoint tensors, and its pruned ones where an earlier process made them.

        Planned matrices are checked and digested.
        """
        tensors, matrices = self.skeleton.read(block), self.planned.get(block.index, [])
        if block.index in self.finished:
            return tensors, self._read_finished(block, tensors)
        for matrix in matrices:
            try:
                check_weight(matrix.name, matrix.view(tensors))
            except NumericalError as error:
                self.evidence.exempt.nonfinite(matrix.name, error)
        gradients = self.evidence.gradients
        if self.conveyor.output is not None or gradients is not None or self.processes.count > 1:
            for name in dict.fromkeys(matrix.tensor for matrix in matrices):
                self.manifest.source_tensors[name] = tensor_digest(tensors[name])
        if gradients is not None:
            for name in self.skeleton.block_tensors[block.index]:
                digest = self.manifest.source_tensors.get(name) or tensor_digest(tensors[name])
                gradients.check_tensor(name, digest)
        return tensors, None

    def _read_finished(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pruned tensors of a finished block, as they are on the disk; the source's must be what they were."""
        output, part = self.conveyor.output, self.finished[block.index]
        changed = part.record["source_tensors"]
        for name in self.skeleton.block_tensors[block.index]:
            expected = changed.get(name) or part.tensors[name]
            check_source(Path(str(self.settings.output)), name, tensor_digest(tensors[name]), expected)
        if output is None:  # what the first process has read comes from there
            return {name: torch.empty_like(tensors[name]) for name in changed}
        return output.read(changed)

    def _replay(self, block: Block, tensors: dict[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
        """Bring the manifest and the streams to where they were after a finished block."""
        record = self.finished[block.index].record
        for name in sorted(pruned):
            self.processes.send(pruned[name], 0)
        self.manifest.source_tensors |= record["source_tensors"]
        self.manifest.matrices |= record["matrices"]
        self.evidence.exempt.skipped |= record["skipped"]
        self.manifest.blocks += record["blocks"]
        self._note_reordered(record["reordered"])
        matrices, dense = self.planned.get(block.index, []), self.settings.propagate == "dense"
        self._reach(block)
        if self.stream is not None or self.reordering is not None:
            with self.clock.timed("propagation forward"), loaded(self.skeleton, block, tensors):
                if self.twin is not None:
                    self.twin.enter(block)
                    self.twin.leave(block)
                if self.reordering is not None:
                    self.reordering.advance(block)
                if self.stream is not None:
                    # Exact: the same batches through the same weights, as they were when this block was pruned.
                    if not dense:
                        as_pruned = {
                            name: restored(own, orders_of(record["reordered"], name, own.shape))
                            for name, own in pruned.items()
                        }
                        self._update(matrices, as_pruned, tensors)
                    run = partial(self.stream.run, block)
                    self._pass_on(block, self.stream, run(0), run)
        if self.stream is not None:
            self.stream.release(block)
        if self.skeleton.resident:
            self._put(pruned, pruned, tensors)

    def _reach(self, block: Block) -> None:
        """Bring the streams to a block, which may be the first of a further stack."""
        with self.clock.timed("record calls"):
            for opened in (self.stream, self.twin, self.reordering):
                if opened is not None:
                    opened.reach(block)

    def _prune_block(self, block: Block, found: tuple[dict[str, Tensor], dict[str, Tensor] | None]) -> Finished | None:
        """The checkpoint tensors of the finished block; the streams have moved on to the next."""
        tensors, pruned = found
        if pruned is not None:
            self._replay(block, tensors, pruned)
            return None
        own = {name: tensors[name] for name in self.skeleton.block_tensors[block.index]}
        if block.index > self.last:
            return self._finished(own, [], [])
        matrices = self.planned.get(block.index, [])
        record: dict[str, Any] = {"index": block.index, "path": block.path, "matrices": len(matrices)}
        changed: dict[str, Tensor] = {}
        if self.stream is None and self.reordering is None:
            self._solve(block, matrices, tensors, None, changed)
        else:
            by_site = matrices and self.settings.within == "site"
            self._reach(block)
            with loaded(self.skeleton, block, tensors):
                if self.twin is not None:
                    self.twin.enter(block)
                if self.reordering is not None:
                    self.reordering.enter(block)
                if self.stream is None:
                    self._solve(block, matrices, tensors, None, changed)
                else:
                    prune = self._prune_by_site if by_site else self._prune_at_once
                    record |= prune(block, tensors, matrices, self.stream, changed)
        orders = self._carry_out_orders(matrices, tensors, changed, record)
        if self.skeleton.resident and (self.stream is None or orders is not None):
            self._put(changed, changed, tensors)
        self.manifest.blocks.append(record)
        return self._finished(own | changed, matrices, [record], orders)

    def _carry_out_orders(
        self,
        matrices: Sequence[Matrix],
        tensors: Mapping[str, Tensor],
        changed: dict[str, Tensor],
        record: dict[str, Any],
    ) -> ReorderedEntry | None:
        """Put the block's tensors into the orders of channels that were found; returns the record of them."""
        if self.reordering is None:
            return None
        if self.reordering.refused:
            record["not_reordered"] = dict(self.reordering.refused)
        pruned = [matrix.name for matrix in matrices if matrix.name in self.manifest.matrices]
        orders = self.reordering.of_tensors(pruned)
        for name in pruned:
            if name in self.reordering.gains:
                self.manifest.matrices[name]["kept_scores"] = self.reordering.gains[name]
        if not orders:
            return None
        for name, own in orders.items():
            if self.manifest.source_tensors and name not in self.manifest.source_tensors:
                self.manifest.source_tensors[name] = tensor_digest(tensors[name])
            changed[name] = reordered(changed.get(name, tensors[name]), own)
        entry = record_of(orders)
        self._note_reordered(entry)
        return entry

    def _note_reordered(self, entry: ReorderedEntry | None) -> None:
        if entry is not None:
            before = self.manifest.reordered
            self.manifest.reordered = merged([entry] if before is None else [before, entry])

    def _finished(
        self,
        tensors: dict[str, Tensor],
        matrices: Sequence[Matrix],
        blocks: list[dict[str, Any]],
        orders: ReorderedEntry | None = None,
    ) -> Finished:
        """A finished block with what the manifest says of it."""
        digests, entries, skipped = self.manifest.source_tensors, self.manifest.matrices, self.evidence.exempt.skipped
        names = {matrix.name for matrix in matrices}
        record = {
            "blocks": blocks,
            "matrices": {name: entry for name, entry in entries.items() if name in names},  # in the order of solving
            "skipped": {name: why for name, why in skipped.items() if name in names},
            "source_tensors": {
                name: digests[name]
                for name in (*(matrix.tensor for matrix in matrices), *(orders or {"tensors": ()})["tensors"])
                if digests
            },
            "reordered": orders,
        }
        return Finished(tensors, record)

    def _prune_at_once(
        self,
        block: Block,
        tensors: dict[str, Tensor],
        matrices: list[Matrix],
        stream: Stream,
        changed: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Collect evidence of all matrices, solve them, and run the samples once more; returns the record."""
        # Whether the outputs of the dense block are the next block's inputs, so that no second pass is needed.
        single = self.settings.propagate == "dense" or not matrices
        with self.clock.timed("statistics forward"):
            facts = self.evidence.enter(block, matrices, stream)
            place = self._place(block, matrices, stream)
            progress = partial(self.conveyor.tell, "statistics", block)
            collected = run_batches(place, self.evidence.at(place), keep_outputs=single, progress=progress)
        states, dense = collected.input, collected.output
        assert dense is not None
        self._solve(block, matrices, tensors, collected, changed)
        del collected  # Memory: Gram matrices are gone before the next forward
        self._update(matrices, changed, tensors)
        if self.twin is not None:
            self.twin.leave(block)
        change: float | None = None
        with self.clock.timed("propagation forward"):
            if matrices:
                pruned = stream.run(block, 0, states=states, aside=single)
                change = self._change(block, dense, pruned)
                if not single:
                    self._pass_on(block, stream, pruned, partial(stream.run, block))
            stream.release(block)
        return {"output_change": change, **facts}

    def _prune_by_site(
        self,
        block: Block,
        tensors: dict[str, Tensor],
        matrices: list[Matrix],
        stream: Stream,
        changed: dict[str, Tensor],
    ) -> dict[str, Any]:
        """One forward, which waits at every site until its matrices are solved; returns the record."""
        with self.clock.timed("statistics forward"):
            found, dense = sites(block, matrices, stream)
            facts = self.evidence.enter(block, matrices, stream)
        leader = {key: own for site in found for key, own in (site.leader or {}).items()}
        parameters, _ = tapped(block, matrices)
        progress = partial(self.conveyor.tell, "statistics", block)
        with WaitingForwards(
            block,
            stream,
            parameters,
            leader,
            watched=self.evidence.watched,
            offload=self.settings.offload_states,
            place=self.states,
        ) as forwards:
            for site in found:
                with self.clock.timed("statistics forward"):
                    place = self._place(block, site.matrices, stream)
                    collected = reach_site(place, self.evidence.at(place), site, forwards, progress=progress)
                self._solve(block, site.matrices, tensors, collected, changed)
                del collected  # Memory: Gram matrices are gone before the forwards go on
                self._update(site.matrices, changed, tensors)
                forwards.waits_at -= site.parameters
            if self.twin is not None:
                self.twin.leave(block)
            with self.clock.timed("propagation forward"):
                pruned = forwards.output(0)
                change = self._change(block, dense, pruned)
                self._pass_on(block, stream, pruned, forwards.output)
        stream.release(block)
        names = [[matrix.name for matrix in site.matrices] for site in found]
        return {"output_change": change, "sites": names, **facts}

    def _place(self, block: Block, matrices: Sequence[Matrix], stream: Stream) -> Place:
        return Place(block, matrices, stream, self.twin, self.evidence.device, self.processes, self.share)

    def _change(self, block: Block, dense: Tensor, pruned: Tensor) -> float | None:
        """How far the output of the first batch moved; None where it is not finite and the run goes on all the same."""
        self._check_output(block, 0, pruned)
        change = relative_change(dense, pruned)
        return change if math.isfinite(change) else None

    def _check_output(self, block: Block, batch: int, output: Tensor) -> None:
        """Raise `NumericalError` for NaN and infinity among the outputs of a block, unless matrices may be skipped.

        Where they may be, the matrices that read these outputs are found out one by one, and stay dense.
        """
        index = first_nonfinite(output) if self.evidence.exempt.on_nonfinite == "error" else None
        if index is None:
            return
        assert self.stream is not None
        assert self.share is not None
        before = self.share.before if batch in self.share.counted else 0
        within = [len(self.stream.batches[own]) for own in self.share.counted if own < batch]
        sample = before + sum(within) + (index[0] if len(index) == 3 else 0)
        raise NumericalError(
            f"{block.path}: its pruned output is not finite, first {float(output[index]):g} in sample {sample}, token "
            f"{index[-2]}, dimension {index[-1]}. Is the dense model sound in this dtype? Check it with secateur eval, "
            "and try --dtype float32."
        )

    def _pass_on(self, block: Block, stream: Stream, first: Tensor, output: Callable[[int], Tensor]) -> None:
        """Keep the pruned block's outputs of all batches, of which the `first` is at hand, for the next block."""
        if block.index < self.last:
            for batch in range(len(stream.batches)):
                states = first if batch == 0 else output(batch)
                self._check_output(block, batch, states)
                stream.states.put(batch, states)
                self.conveyor.tell("forward", block, batch + 1, len(stream.batches))

    def _update(self, matrices: Sequence[Matrix], changed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Put some matrices' changed tensors, and what makes one parameter with them, into the block's module."""
        self._put([matrix.tensor for matrix in matrices], changed, tensors)

    def _put(self, names: Iterable[str], changed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        groups = self.skeleton.conversion.of(names)
        names = [name for group in groups for name in group.names]
        self.skeleton.update({name: changed.get(name, tensors[name]) for name in names})

    def _solve(
        self,
        block: Block,
        matrices: list[Matrix],
        tensors: Mapping[str, Tensor],
        collected: Collected | None,
        changed: dict[str, Tensor],
    ) -> None:
        """Solve the matrices one by one; their pruned tensors go into `changed`.

        Several processes share them, and each receives what the others have made.
        """
        exempt, names = self.evidence.exempt, {matrix.name for matrix in matrices}
        if self.reordering is not None:
            self._choose_orders(self.reordering, block, matrices, {**tensors, **changed}, collected)
        taker = self.processes.deal({matrix.name: solving_cost(self.method, matrix) for matrix in matrices})
        made: dict[str, dict[str, Any]] = {}
        failure: Exception | None = None
        try:
            for number, matrix in enumerate(matrices):
                self.conveyor.tell("solve", block, number, len(matrices), matrix.name)
                # Memory: a Gram matrix is gone when the last matrix that reads it is solved, and at once in a process
                # that solves none of those.
                left = [own for own in matrices[number:] if taker[own.name] == self.processes.rank]
                for collector in collected.collectors if collected is not None else ():
                    collector.keep(left)
                if taker[matrix.name] == self.processes.rank:
                    record = self._solve_one(matrix, tensors, collected, changed)
                    made |= {} if record is None else {matrix.name: record}
        except (SecateurError, MemoryError) as error:
            if self.processes.count == 1:
                raise
            failure = error
        digests = {matrix.tensor: self.manifest.source_tensors.get(matrix.tensor) for matrix in matrices}
        found = self.processes.gather((made, exempt.to_json(names), digests), failure)
        for rank, (records, exempted, read) in enumerate(found):
            made |= records
            exempt.add(exempted)
            for name in (name for name in read if read[name] != digests[name]):
                raise ProcessError(
                    f"{name}: has the digest {str(digests[name])[:12]} in process {self.processes.rank}, and "
                    f"{str(read[name])[:12]} in process {rank}: they read different models."
                )
        for matrix in matrices:
            if matrix.name in made:
                pruned = matrix.view(self._changed(matrix, tensors, changed))
                self.processes.send(pruned, taker[matrix.name])
                self.manifest.matrices[matrix.name] = made[matrix.name]

    def _choose_orders(
        self,
        reordering: Reordering,
        block: Block,
        matrices: list[Matrix],
        tensors: Mapping[str, Tensor],
        collected: Collected | None,
    ) -> None:
        """Find the orders of the matrices' inputs, in the first process alone."""

        def score(matrix: Matrix) -> Tensor | None:
            problem = self._problem(matrix, tensors, collected)
            if problem is None:
                return None
            if matrix.name in self.evidence.exempt.by_magnitude:
                return scores.magnitude(problem)
            known = SquaredNorm in problem.evidence or Gram in problem.evidence
            own = self.method.score or (scores.wanda if known else scores.magnitude)
            with blamed(f"{matrix.name}: {self.method.name} failed with", own):
                found = own(problem)
            # What is wrong with others, the solving says.
            sound = isinstance(found, Tensor) and found.shape == problem.weight.shape and bool(found.isfinite().all())
            return found if sound else None

        chosen: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            with self.clock.timed("permutation"):
                chosen = reordering.choose(block, matrices, tensors, score) if self.processes.first else {}
        except (SecateurError, MemoryError) as error:
            failure = error
        reordering.take(self.processes.gather(chosen, failure)[0])

    def _problem(self, matrix: Matrix, tensors: Mapping[str, Tensor], collected: Collected | None) -> Problem | None:
        """The problem of a matrix with its evidence, or None where it stays dense."""
        exempt = self.evidence.exempt
        if matrix.name in exempt.skipped:
            return None
        weight = matrix.view(tensors).to(self.skeleton.device)
        evidence = {} if matrix.name in exempt.by_magnitude else self.evidence.of(matrix, collected, weight.device)
        if matrix.name in exempt.skipped:  # as its evidence has shown
            return None
        return Problem(
            matrix.name, weight, self.plan[matrix.name], {} if matrix.name in exempt.by_magnitude else evidence
        )

    def _changed(self, matrix: Matrix, tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """`changed`, with room for a matrix; where its tensor holds others too, they are as they were."""
        if matrix.tensor not in changed:
            original = tensors[matrix.tensor]
            pin = self.skeleton.device.type == "cuda"
            changed[matrix.tensor] = torch.empty(original.shape, dtype=original.dtype, pin_memory=pin)
            if matrix.index is not None:
                changed[matrix.tensor].copy_(original)
        return changed

    def _solve_one(
        self,
        matrix: Matrix,
        tensors: Mapping[str, Tensor],
        collected: Collected | None,
        changed: dict[str, Tensor],
    ) -> dict[str, Any] | None:
        """Solve a matrix into `changed`; its record, or None where it stays dense."""
        started = time.perf_counter()
        exempt = self.evidence.exempt
        problem = self._problem(matrix, tensors, collected)
        if problem is None:
            return None
        unseen = matrix.name in exempt.by_magnitude
        order = None if self.reordering is None else self.reordering.orders.get(matrix.name)
        problem = problem if order is None else problem.reordered(order)
        try:
            solution = solved(problem, magnitude(self.method) if unseen else self.method)
        except NumericalError as error:
            exempt.nonfinite(matrix.name, error)
            return None
        except torch.OutOfMemoryError as error:  # which smaller batches would not help
            raise MemoryError(f"{matrix.name}: {str(error).partition('. ')[0]} while it was solved") from error
        # Exact: `weight * mask` leaves -0.0 where a negative weight was; what is removed is +0.0.
        pruned = matrix.view(self._changed(matrix, tensors, changed))
        weight = solution.weight.masked_fill(~solution.mask, 0)
        pruned.copy_(weight if order is None else weight[:, order.argsort().to(weight.device)])
        return {
            **_record(matrix, problem, solution),
            "tokens": 0 if unseen else problem.tokens,
            "seconds": round(self.clock.add("solve", started), 6),
            **({"method": "magnitude"} if unseen else {}),
        }


def magnitude(method: Method) -> Method:
    """Pruning by magnitude, for matrices that a method would prune of whose inputs nothing is known."""
    return select("magnitude", scores.magnitude, per=method.per)


def _record(matrix: Matrix, problem: Problem, solution: Solution) -> dict[str, Any]:
    """The manifest's record of a solved matrix."""
    zeros = solution.weight.numel() - int(solution.weight.count_nonzero())
    return {
        "block": matrix.block,
        "kind": matrix.kind,
        "shape": list(matrix.shape),
        "tensor": matrix.tensor,
        "index": matrix.index,
        "transposed": matrix.transposed,
        "pattern": problem.pattern.to_json(),
        "sparsity": zeros / solution.weight.numel(),
        "zeros": zeros,
        "kept_identical": bool((solution.weight.eq(problem.weight) | ~solution.mask).all()),
        "notes": dict(solution.notes),
        "scores": None if solution.score is None else histogram(solution.score, solution.mask),
    }


def relative_change(dense: Tensor, pruned: Tensor) -> float:
    """``||pruned - dense|| / ||dense||`` in float32: 0 when nothing changed."""
    dense, pruned = dense.float(), pruned.float()
    return float((pruned - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float32).tiny))
