"""For authors of methods: whether a method keeps its word, tried on small problems before a long run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.arguments import calling
from secateur.core.checks import solved
from secateur.core.fingerprint import fingerprint
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.gram import CrossGram
from secateur.core.needs import Drift
from secateur.core.patterns import NM, Pattern, Unstructured, removed_count, with_group
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import MethodError, SecateurError
from secateur.pruning.named import as_method, as_pattern

PATTERNS = (Unstructured(0.5), Unstructured(0.3, "row"), Unstructured(0.7, "matrix"), NM(2, 4), NM(4, 8))
DTYPES = (torch.bfloat16, torch.float16, torch.float64)
SHAPE, TOKENS = (12, 32), 48
SLACK = 0.05  # share of the weights by which a method may remove more than was asked, as searched thresholds do
SHOWN = 4  # further problems that a fault names


@dataclass(frozen=True)
class Checked:
    """What a method was tried on, all of which it solved as it should."""

    name: str
    problems: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"{self.name} solved {len(self.problems)} small problems as it should: {', '.join(self.problems)}.",
                "It writes to nothing that it is given, does the same twice, and can be told from others in a sweep.",
            ]
        )


@calling
def check_method(method: Any, *, patterns: Sequence[Any] | None = None, device: str | None = None) -> Checked:
    """What a method was tried on, and its `repr` says so in two lines; `MethodError` lists all that is wrong with it.

    `method` is what `prune` takes: a `Method`, the function that makes it, or its name ("my_methods.py:mine"). It is
    given small made-up problems: a few patterns, or those in `patterns` alone where it is meant for no others; weights
    of every dtype that checkpoints have; weights and inputs that are all alike, so that scores tie; an input that is
    always zero; fewer tokens than inputs, and a matrix of one row. Each is solved on the CPU, and one on a GPU too
    where there is one, or on `device`.

    Every solution must be one: a weight of the problem's shape, dtype and device, finite, with zeros where its mask
    says, in the pattern, and without far more zeros than asked for. Nothing that was given may be written to, the same
    problem must have the same solution again, whatever the global random numbers, and it must be possible to record
    what the method depends on, so that a sweep does not take it for another one.
    """
    made = as_method(method)
    asked = PATTERNS if patterns is None else [as_pattern(pattern) for pattern in patterns]
    wanted = [with_group(pattern, made.per) for pattern in asked]
    faults, names = _Faults(), []
    with torch.random.fork_rng(devices=[]):
        for problem in _problems(made, wanted, device):
            names.append(problem.name)
            for fault in _wrong(made, problem):
                faults.add(problem.name, fault, problem.pattern)
    try:
        fingerprint(made)
    except SecateurError as error:
        faults.add("in a sweep", str(error).removeprefix(f"{made.name}: "))
    if faults.found:
        raise MethodError(f"{made.name} does not keep its word:\n" + "\n".join(faults.lines()))
    return Checked(made.name, tuple(names))


class _Faults:
    """What is wrong, each fault once with the problems that show it."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, list[str]]] = {}

    def add(self, problem: str, fault: str, pattern: Pattern | None = None) -> None:
        """Note a fault; those that differ in numbers, dtypes and the pattern alone are the same."""
        alike = re.sub(r"\d+|torch\.\w+", "", fault.replace(str(pattern), ""))
        self.found.setdefault(alike, (fault, []))[1].append(problem)

    def lines(self) -> Iterator[str]:
        """A line for each fault."""
        for fault, (first, *others) in self.found.values():
            more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            also = f" (Also: {', '.join(others[:SHOWN])}{more}.)" if others else ""
            yield f"- {first}: {fault}{also}"


def _problems(method: Method, patterns: Sequence[Pattern], device: str | None) -> Iterator[Problem]:
    """Small problems with what the method needs, named for what is special about them."""
    weight, x = _normal(SHAPE, 0), _inputs(TOKENS, SHAPE[1])
    first = patterns[0]

    def made(
        name: str, weight: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype = torch.float32, where: str = "cpu"
    ) -> Problem:
        wide = torch.promote_types(dtype, torch.float32)
        evidence = _evidence(method, tuple(weight.shape), x.to(where, wide))
        return Problem(name, weight.to(where, dtype, copy=True), pattern, evidence)

    for pattern in patterns:
        yield made(f"pattern {pattern}", weight, x, pattern)
    for dtype in DTYPES:
        yield made(str(dtype).removeprefix("torch."), weight, x, first, dtype)
    alike = torch.ones(SHAPE)
    for pattern in patterns[:1] if len(patterns) == 1 else (first, patterns[-1]):
        yield made(f"all alike in {pattern}", alike, torch.ones(TOKENS, SHAPE[1]), pattern)
    silent = x.clone()
    silent[:, 3] = 0
    yield made("an input that is always zero", weight, silent, first)
    yield made("fewer tokens than inputs", weight, x[:5], first)
    yield made("a matrix of one row", weight[:1], x, first)
    elsewhere = device or ("cuda" if torch.cuda.is_available() else None)
    if elsewhere is not None:
        yield made(f"on {elsewhere}", weight, x, first, where=elsewhere)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _inputs(tokens: int, width: int) -> Tensor:
    """Inputs of different sizes, which have something to do with each other."""
    mixed = torch.eye(width) + 0.3 * _normal((width, width), 1)
    return _normal((tokens, width), 2) @ mixed * torch.linspace(0.2, 2, width)


def _evidence(method: Method, shape: tuple[int, ...], x: Tensor) -> Mapping[Any, Any]:
    """What a run would have collected for each need of the method, from two samples."""
    evidence: dict[Any, Any] = {}
    samples = x.chunk(2)
    for need in method.needs:
        if isinstance(need, GradientKind):
            own = evidence[need] = GradientNorm.empty(need, (shape[0], shape[1]), x.device, x.dtype)
            for number, sample in enumerate(samples):
                own.update(_normal(shape, 3 + number).to(x), samples=1, tokens=len(sample))
        elif isinstance(need, Drift):
            evidence[need] = need.share * _normal(shape, 5).to(x)
        elif isinstance(need, type):
            kind: Any = need
            own = evidence[need] = kind.empty(shape[1], x.device)
            for sample in samples:
                own.update(sample, samples=1, **({"dense": sample * 1.01} if issubclass(need, CrossGram) else {}))
            getattr(own, "finish", lambda: None)()
        else:
            raise MethodError(
                f"needs: {method.name} asks for {need!r}, which is not collected. Ask for a class with the contract of "
                "secateur.Statistic, or for a secateur.GradientKind."
            )
    return evidence


def _wrong(method: Method, problem: Problem) -> Iterator[str]:
    """What is wrong with how the method solves a problem, in sentences."""
    before = _copies(problem)
    try:
        torch.manual_seed(1)
        solution = solved(problem, method)
        torch.manual_seed(2)
        again = solved(problem, method)
    except SecateurError as error:
        yield _sentence(error, problem)
    else:
        yield from _too_many(problem, solution)
        if not (torch.equal(solution.mask, again.mask) and torch.equal(solution.weight, again.weight)):
            yield (
                "solving it twice gives two solutions. Take random numbers from a torch.Generator that is seeded, and "
                "keep nothing between calls."
            )
    for what, now in _tensors(problem).items():
        if not torch.equal(before[what], now):
            yield f"it writes to the problem's {what}, which others read after it. Write to a clone()."


def _sentence(error: SecateurError, problem: Problem) -> str:
    """What an error says, without the name of the problem and without advice for a run."""
    text = str(error).replace(f"{problem.name}: ", "")
    return text.partition(" Use more damping, if")[0]


def _too_many(problem: Problem, solution: Solution) -> Iterator[str]:
    pattern, mask = problem.pattern, solution.mask
    removed = int((~mask).sum())
    if isinstance(pattern, Unstructured):
        groups = 1 if pattern.per == "matrix" else mask.shape[0]
        asked = groups * removed_count(mask.numel() // groups, pattern.sparsity)
    else:
        asked = round(mask.numel() * pattern.sparsity)
    if removed - asked > SLACK * mask.numel():
        yield f"it removes {removed} of {mask.numel()} weights, and {pattern} asks for {asked}."


def _copies(problem: Problem) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in _tensors(problem).items()}


def _tensors(problem: Problem) -> dict[str, Tensor]:
    """All tensors that a problem is made of, by what they are."""
    found = {"weight": problem.weight}
    for need, own in problem.evidence.items():
        name = getattr(need, "__name__", type(need).__name__)
        parts = {"": own} if isinstance(own, Tensor) else {f".{part}": value for part, value in vars(own).items()}
        found |= {f"{name}{part}": value for part, value in parts.items() if isinstance(value, Tensor)}
    return found
