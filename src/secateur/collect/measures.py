"""What an allocation measures of the dense model, unit by unit, in the memory of one block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.calibration.windows import Windows
from secateur.collect.block_gradients import GradientPass
from secateur.collect.exempt import Exempt
from secateur.collect.input_sums import InputSums, Sums
from secateur.collect.survey import DensePass
from secateur.core.checks import check_weight
from secateur.core.gram import Gram
from secateur.core.needs import Need, OutputGradients, input_statistics
from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm
from secateur.errors import NumericalError, SecateurError
from secateur.models.flow.backward import drawn_tokens
from secateur.models.flow.output_gradients import OutputGradientTap
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.matrices import Matrix, by_block, tapped
from secateur.models.shape.structure import Block
from secateur.plans.allocation import Allocation, Measured, Unit
from secateur.plans.plan import Plan
from secateur.runs.events import Progress


@dataclass(frozen=True)
class Units:
    """The matrices of each unit, in the order of the rows of what was measured."""

    members: Sequence[Sequence[str]]
    found: Measured


def unit_of(matrix: Matrix, unit: Unit) -> str:
    """The name of the unit that a matrix belongs to."""
    return {"block": f"block {matrix.block}", "matrix": matrix.name, "kind": matrix.kind}[unit]


class Measuring:
    """Measures the matrices of an opened model for an allocation, under the patterns of a `uniform` plan."""

    def __init__(
        self,
        opened: OpenedModel,
        allocation: Allocation,
        unit: Unit,
        uniform: Plan,
        *,
        exempt: Exempt,
        statistics_device: torch.device | None = None,
        states_folder: Path | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.opened, self.allocation, self.unit, self.uniform = opened, allocation, unit, uniform
        self.matrices = [matrix for matrix in opened.skeleton.matrices if matrix.name in uniform]
        self.exempt, self.device, self.folder, self.progress = exempt, statistics_device, states_folder, progress
        self._values: dict[str, list[Tensor]] = {}  # by unit, one for each block
        self._members: dict[str, list[Matrix]] = {}
        self.gradients: dict[str, OutputGradients] = {}
        self.norms: dict[str, SquaredNorm] = {}  # of the inputs, for judging plans

    def run(self, windows: Windows, batch_size: int | None, seed: int) -> Units:
        """All measures: one forward through the model, after a pass back through it where the allocation needs that.

        Raises what `prune` raises for matrices of which nothing can be known.
        """
        if OutputGradients in self.allocation.needs:
            self._take_gradients(windows, batch_size, seed)
        kinds = input_statistics(self.allocation.needs)
        sums = InputSums(kinds if Gram in kinds else kinds | {SquaredNorm})
        sums.exempt = self.exempt
        one = DensePass(self.opened, self.matrices, sums, self.device, self.folder)

        def told(done: int, total: int) -> None:
            self.progress("measure", done, total)

        one.run(windows.batches(one.batch_size(windows, batch_size)), self._measure, told)
        names = list(self._values)
        weights = {m.name: m.shape[0] * m.shape[1] for m in self.matrices}
        sizes = [float(sum(weights[matrix.name] for matrix in self._members[name])) for name in names]
        blocks = [sorted({matrix.block for matrix in self._members[name]}) for name in names]
        return Units(
            [[matrix.name for matrix in self._members[name]] for name in names],
            Measured(
                torch.stack([torch.stack(self._values[name]).mean(dim=0) for name in names]),
                torch.tensor(sizes, dtype=torch.float64),
                torch.tensor([own[0] if len(own) == 1 else -1 for own in blocks]),
                next(iter(self.uniform.values())),
            ),
        )

    def _take_gradients(self, windows: Windows, batch_size: int | None, seed: int) -> None:
        skeleton, of_block = self.opened.skeleton, by_block(self.matrices)
        tokens = sum(length - 1 for length in windows.lengths)

        def take(block: Block, tap: OutputGradientTap) -> None:
            own = of_block.get(block.index, [])
            parameters, layout = tapped(block, own)
            for matrix in own:
                found = tap.sums.get((matrix.parameter, matrix.expert))
                if found is None:
                    continue
                parameter, transposed = parameters[matrix.parameter]
                # One number for each output, laid out like the parameter, whose rows the matrix may be a part of.
                whole = torch.zeros(parameter.shape[-2:], dtype=found.total.dtype, device=found.total.device)
                whole += found.total.unsqueeze(0 if transposed else 1)
                if matrix.expert is not None:
                    whole = whole.unsqueeze(0).expand(parameter.shape)
                mine = matrix.of_parameter(whole, layout[matrix.parameter])[:, 0].clone()
                self.gradients[matrix.name] = OutputGradients(mine, tokens)

        size = batch_size or default_batch_size(windows.length, skeleton.device)
        one = GradientPass(
            skeleton,
            lambda block: tapped(block, of_block.get(block.index, []))[0],
            take,
            OutputGradientTap,
            drawn_tokens(seed),
            min(of_block),
            progress=self.progress,
        )
        one.of_model(windows.batches(size), self.folder)

    @torch.no_grad()
    def _measure(self, block: Block, own: Sequence[Matrix], tensors: Mapping[str, Tensor], sums: Sums) -> None:
        by_unit: dict[str, list[Problem]] = {}
        for matrix in own:
            evidence: dict[Need, object] = dict(sums.of(matrix))
            if matrix.name in self.gradients:
                evidence[OutputGradients] = self.gradients[matrix.name]
            weight = matrix.view(tensors).to(self.opened.skeleton.device)
            try:
                check_weight(matrix.name, weight)
            except NumericalError as error:
                self.exempt.nonfinite(matrix.name, error)
            if matrix.name in self.exempt.skipped or matrix.name in self.exempt.by_magnitude:
                continue
            name = unit_of(matrix, self.unit)
            problem = Problem(matrix.name, weight, self.uniform[matrix.name], evidence)
            self.norms[matrix.name] = problem.statistic(SquaredNorm)
            by_unit.setdefault(name, []).append(problem)
            self._members.setdefault(name, []).append(matrix)
        for name, problems in by_unit.items():
            value = self.allocation.measure(problems)
            if not bool(value.isfinite().all()):
                raise _not_finite(name, self.allocation.name, value)
            self._values.setdefault(name, []).append(value)


def _not_finite(unit: str, allocation: str, value: Tensor) -> SecateurError:
    return NumericalError(
        f"{unit}: {allocation} measures {value.tolist()}, expected finite numbers. Is the model itself sound? Check it "
        "with secateur eval, and try --dtype float32."
    )
