"""Forwards that wait in the middle of a block, against modules whose every step is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
import tiny
from counted_forwards import counted
from mapped_files import mapped_files
from secateur.collect.sites import sites
from secateur.errors import ModelStructureError
from secateur.models.flow.stream import Stream
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block

WIDTH = 4


class TwoSteps(nn.Module):
    """``second(step(first(x) + other(x)))``."""

    def __init__(self, step: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.step(self.first(x) + self.other(x)))


class Batches:
    """As much of a stream as forwards need."""

    device = torch.device("cpu")

    def __init__(self, *batches: Tensor) -> None:
        self.batches = list(batches)

    def run(self, block: Block, batch: int, *, aside: bool = False) -> Tensor:
        result: Tensor = block.module(self.batches[batch])
        return result


def matrices(module: nn.Module) -> list[Matrix]:
    return [
        Matrix(
            name=f"b.0.{name}",
            shape=tuple(value.shape),
            block=0,
            tensor=f"b.0.{name}",
            index=None,
            transposed=False,
            parameter=f"b.0.{name}",
            expert=None,
        )
        for name, value in module.named_parameters()
    ]


@contextmanager
def waiting(module: nn.Module, *batches: Tensor, **options: Any) -> Iterator[tuple[WaitingForwards, list[set[str]]]]:
    """The forwards of these batches, and the names of the parameters of each site."""
    block, stream = Block(0, "b.0", module), Batches(*batches)
    found, _ = sites(block, matrices(module), stream)  # type: ignore[arg-type]
    leader = {key: own for site in found for key, own in (site.leader or {}).items()}
    with WaitingForwards(block, stream, tapped(block, matrices(module))[0], leader, **options) as forwards:  # type: ignore[arg-type]
        yield forwards, [site.parameters for site in found]


@torch.no_grad()
def test_every_batch_waits_at_every_site_and_goes_on_with_the_weights_as_they_are_then() -> None:
    module = TwoSteps()
    batches = [torch.randn(2, 3, WIDTH) for _ in range(3)]
    steps: list[Tensor] = []
    module.step = lambda x: steps.append(x) or torch.tanh(x)  # type: ignore[func-returns-value]
    with waiting(module, *batches) as (forwards, (first, second)):
        steps.clear()
        assert first == {"b.0.first.weight", "b.0.other.weight"}
        for number, x in enumerate(batches):
            product = forwards.reach(number, first)
            assert product is not None
            assert product.x is x
        assert not steps
        module.first.weight.mul_(2)
        module.other.weight.zero_()
        forwards.waits_at -= first
        for number, x in enumerate(batches):
            product = forwards.reach(number, second)
            assert product is not None
            assert torch.equal(product.x, torch.tanh(module.first(x) + module.other(x)))
        module.second.weight.neg_()
        forwards.waits_at -= second
        expected = [module(x) for x in batches]
        assert all(torch.equal(forwards.output(number), wanted) for number, wanted in enumerate(expected))
    assert len(steps) == 2 * len(batches), "once while they waited, once for the expected outputs"


@torch.no_grad()
def test_a_forward_that_is_not_wanted_any_more_ends_where_it_waits() -> None:
    ended: list[str] = []

    class Watched(TwoSteps):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            finally:
                ended.append("yes")

    with waiting(Watched(), torch.ones(1, 1, WIDTH), torch.ones(1, 1, WIDTH)) as (forwards, (first, _)):
        ended.clear()
        forwards.reach(0, first)
        assert not ended
    assert ended == ["yes"], "the other one had not begun"


@torch.no_grad()
def test_what_the_model_raises_arrives_and_the_others_end() -> None:
    def step(x: Tensor) -> Tensor:
        if x.shape[1] == 2:
            raise ZeroDivisionError("in the middle")
        return x

    def run_all() -> None:
        with waiting(TwoSteps(step), torch.ones(1, 1, WIDTH), torch.ones(1, 2, WIDTH)) as (forwards, (first, second)):
            for batch in range(2):
                forwards.reach(batch, first)
            forwards.waits_at -= first
            for batch in range(2):
                forwards.reach(batch, second)

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        run_all()


@torch.no_grad()
def test_switches_of_the_thread_stay_with_the_forward_that_flipped_them() -> None:
    class Switched(TwoSteps):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
                assert self.first(x).dtype == torch.bfloat16
                assert torch.is_grad_enabled()
            return self.second(x)

    module, batches = Switched(), [torch.ones(1, 1, WIDTH) for _ in range(2)]
    with waiting(module, *batches) as (forwards, (first, second)):
        for batch in range(2):
            assert forwards.reach(batch, first) is not None
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        forwards.waits_at -= first | second
        for batch in range(2):
            assert forwards.output(batch).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("again", r"^b\.0\.other\.weight: is multiplied more than once for batch 2, and once for the first one"),
        ("apart", r"^b\.0\.other\.weight: shared its input with b\.0\.first\.weight at first, and then did not"),
    ],
)
def test_a_batch_that_multiplies_in_another_way_than_the_first_is_refused(step: str, message: str) -> None:
    class Other(TwoSteps):
        def forward(self, x: Tensor) -> Tensor:
            odd = x.shape[1] == 2
            if odd and step == "again":
                return self.second(self.first(x) + self.other(x) + self.other(x))
            return self.second(self.first(x) + self.other(x + 1 if odd else x))

    def run_all() -> None:
        with waiting(Other(), torch.ones(1, 1, WIDTH), torch.ones(1, 2, WIDTH)) as (forwards, (first, _)):
            for batch in range(2):
                forwards.reach(batch, first)
            forwards.waits_at -= first
            for batch in range(2):
                forwards.reach(batch, set())

    with pytest.raises(ModelStructureError, match=message):
        run_all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gpt_neox"])
def test_site_by_site_every_batch_runs_through_every_block_once(name: str) -> None:
    """And the first one once more, to learn the sites and the outputs of the dense block."""
    model = tiny.build(name)
    ids = tiny.tokens(samples=6, length=12)
    with counted(name) as overhead:
        opened = open_model(model)
        Stream(opened.skeleton, list(ids.split(1))).close()
        opened.restore()
    before = len(overhead)
    blocks = len(opened.skeleton.blocks)
    with counted(name) as calls:
        secateur.prune(model, method="wanda", calibration=ids, within="site", batch_size=1)
    assert len(calls) == before + blocks * (len(ids) + 1)


def test_one_sample_alone_shows_the_sites_of_larger_batches() -> None:
    """Six samples, four at a time: the first one, the rest of its batch, the last two; and the first one once more."""
    model, ids = tiny.build("llama"), tiny.tokens(samples=6, length=12)
    with counted("llama") as overhead:
        opened = open_model(model)
        Stream(opened.skeleton, list(ids.split([1, 3, 2]))).close()
        opened.restore()
    before = len(overhead)
    with counted("llama") as calls:
        secateur.prune(model, method="wanda", calibration=ids, within="site", batch_size=4)
    assert len(calls) == before + tiny.BLOCKS * (3 + 1)


def test_residual_targets_take_one_forward_of_each_of_the_two_models() -> None:
    """And three of the first batch: for the sites, for the writers, and before the run, whether there is one."""
    model, ids = tiny.build("llama"), tiny.tokens(samples=6, length=12)
    with counted("llama") as overhead:
        opened = open_model(model)
        for batches in ([ids[:1]], *[list(ids.split(1))] * 2):
            Stream(opened.skeleton, batches).close()
        opened.restore()
    with counted("llama") as calls:
        secateur.prune(
            model, method="sparsegpt", calibration=ids, within="site", targets="residual", batch_size=1, pattern="2:4"
        )
    assert len(calls) == len(overhead) + 1 + tiny.BLOCKS * (2 * len(ids) + 2)


@torch.no_grad()
@pytest.mark.parametrize("offload", ["never", "folder"])
def test_what_waits_goes_to_files_where_a_folder_is_named(offload: str, tmp_path: Path) -> None:
    """Views, results that were written to and a tensor that is kept in a list come back as they were."""

    class Holding(TwoSteps):
        def forward(self, x: Tensor) -> Tensor:
            kept = [x * 2, (x + 1).transpose(1, 2)]
            kept[0].mul_(x).add_(1)
            inside = self.first(x) + self.other(x)
            self.sizes.append([own.untyped_storage().nbytes() for own in kept])
            left, right = (inside * 3).chunk(2, dim=-1)
            inside = torch.cat([right, left], dim=-1)
            return self.second(inside) + kept[0] + kept[1].transpose(1, 2)

    module, batches = Holding(), [torch.randn(2, 3, WIDTH) for _ in range(3)]
    module.sizes = []
    expected = [module(x) for x in batches]
    place = tmp_path / "waiting"
    with waiting(module, *batches, offload=str(tmp_path) if offload == "folder" else offload, place=place) as found:
        forwards, (first, second) = found
        for names in (first, second):
            for batch in range(3):
                assert forwards.reach(batch, names) is not None
                forwards.set_aside(batch)
            files = mapped_files(tmp_path)
            assert len(files) == (0 if offload == "never" else 3 * (2 if names == first else 4)), files
            forwards.waits_at -= names
        for batch, wanted in enumerate(expected):
            assert torch.equal(forwards.output(batch), wanted)
    assert mapped_files(tmp_path) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "mixtral", "gemma2"])
def test_files_change_no_bit(name: str, tmp_path: Path) -> None:
    states = []
    for folder in ("never", str(tmp_path)):
        model = tiny.build(name)
        ids = tiny.tokens(samples=6, length=12)
        secateur.prune(model, method="wanda", calibration=ids, within="site", batch_size=2, offload_states=folder)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert list(tmp_path.iterdir()) == []
