"""Every path against float64, on every dtype and width, forced one by one."""

import os
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from packed_weights import Packed, random_packed
from secateur.errors import CheckpointError, SecateurError
from secateur.runtime import kernels, library
from secateur.runtime.layout import expand, lay_out
from secateur.runtime.library import PathName

VALUES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
BATCHES = [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 48, 63, 64, 65, 70]
SHAPES = [(1, 1), (1, 40), (40, 1), (3, 7), (4, 8), (17, 33), (37, 129), (130, 300)]
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
many = settings(few, max_examples=1500)


def assert_close(y: Tensor, x: Tensor, packed: Packed, bias: Tensor | None = None) -> None:
    """Within float32 sums of exact products, rounded to the dtype of y."""
    exact, sizes = x.double() @ packed.exact.T, x.double().abs() @ packed.exact.abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    information = torch.finfo(y.dtype)
    allowed = (
        0.51 * information.eps * exact.abs() + sizes * (8 + packed.stored.shape[1] / 8) * 2**-24 + information.tiny
    )
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    overflowed = exact.abs() + allowed > information.max
    assert bool((((y.double() - exact).abs() <= allowed) | overflowed).all())


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        pytest.param(dtype, shape, marks=[] if (number + place) % 2 else pytest.mark.slow)
        for number, dtype in enumerate(VALUES)
        for place, shape in enumerate(SHAPES)
    ],
    ids=str,
)
def test_product(path: PathName, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, columns = shape
    for group_size in (None, 16) if dtype == torch.int8 else (None,):
        packed = random_packed(rows, columns, dtype, group_size=group_size)
        weight = packed.laid_out(path)
        for batch in BATCHES:
            for kind in INPUTS:
                x, bias = torch.randn(batch, columns).to(kind), torch.randn(rows).to(kind)
                assert_close(kernels.linear(x, weight, bias), x, packed, bias)
        assert_close(kernels.linear(x, weight), x, packed)


def check_any(path: PathName, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    dtype, kind = data.draw(st.sampled_from(VALUES)), data.draw(st.sampled_from(INPUTS))
    group_size = data.draw(st.sampled_from([None, 8, 24, 64])) if dtype == torch.int8 else None
    density, seed = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0])), data.draw(st.integers(0, 10**6))
    packed = random_packed(rows, columns, dtype, density=density, group_size=group_size, seed=seed)
    for row in data.draw(st.sets(st.integers(0, rows - 1), max_size=3)):
        packed.kept[row] = data.draw(st.booleans())
    packed.stored = torch.where(packed.kept, packed.stored, torch.zeros_like(packed.stored))
    weight, x = packed.laid_out(path), torch.randn(data.draw(st.integers(1, 70)), columns).to(kind)
    assert_close(kernels.linear(x, weight), x, packed)
    bitmask, values = packed.bitmask, packed.values
    assert torch.equal(expand(bitmask, values, columns), packed.stored)
    dense = weight.expand()
    assert torch.equal(dense, packed.stored if dtype != torch.int8 else packed.exact.float())


@few
@given(data=st.data())
def test_any_matrix(path: PathName, data: st.DataObject) -> None:
    check_any(path, data)


@pytest.mark.slow
@many
@given(data=st.data())
def test_many_matrices(path: PathName, data: st.DataObject) -> None:
    check_any(path, data)


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_not_less_exact_than_torch(path: PathName, batch: int) -> None:
    packed = random_packed(128, 1024, torch.bfloat16)
    x = torch.randn(batch, 1024).bfloat16()
    exact = x.double() @ packed.exact.T
    ours = (kernels.linear(x, packed.laid_out(path)).double() - exact).norm()
    dense = (functional.linear(x, packed.stored).double() - exact).norm()
    assert ours <= dense * 1.001


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_not_finite(path: PathName, batch: int) -> None:
    """Weights and inputs that are not finite give what a dense product gives."""
    packed = random_packed(20, 70, torch.bfloat16)
    kept = packed.kept.nonzero()
    for place, value in zip(kept[[0, 30, 200]], (float("nan"), float("inf"), float("-inf")), strict=True):
        packed.stored[place[0], place[1]] = value
    weight = packed.laid_out(path)
    assert torch.equal(weight.expand().view(torch.int16), packed.stored.view(torch.int16))
    x = torch.randn(batch, 70)
    x[-1, 3], x[-1, 50] = float("inf"), float("nan")
    for inputs in (x, x[:, :].nan_to_num(0, 1, 1)):
        torch.testing.assert_close(
            kernels.linear(inputs, weight), functional.linear(inputs, packed.stored.float()), equal_nan=True
        )


def test_special_bits_survive(path: PathName) -> None:
    """-0.0 that the mask keeps, subnormal numbers and payloads of NaN."""
    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.float32, torch.int32)):
        generator = torch.Generator().manual_seed(1)
        limits = torch.iinfo(bits)
        stored = torch.randint(limits.min, limits.max, (33, 45), generator=generator, dtype=bits).view(dtype)
        kept = torch.rand(33, 45, generator=generator) < 0.5
        packed = Packed(torch.where(kept, stored.view(bits), 0).to(bits).view(dtype), kept)
        assert torch.equal(packed.laid_out(path).expand().view(bits), packed.stored.view(bits))
        assert torch.equal(expand(packed.bitmask, packed.values, 45).view(bits), packed.stored.view(bits))


def test_any_leading_shape(path: PathName) -> None:
    packed = random_packed(9, 20, torch.float32)
    weight = packed.laid_out(path)
    x = torch.randn(2, 3, 20)
    dense = functional.linear(x, packed.stored)
    torch.testing.assert_close(kernels.linear(x, weight), dense)
    torch.testing.assert_close(kernels.linear(x[0, 0], weight), dense[0, 0])
    torch.testing.assert_close(kernels.linear(x.transpose(0, 1), weight), dense.transpose(0, 1))
    assert kernels.linear(x[:0], weight).shape == (0, 3, 9)


def test_float16_rounds_as_torch_does() -> None:
    """Every float16, and ties between neighbours, through a matrix of one weight."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)[:, None]
    one = Packed(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).laid_out("plain")
    torch.testing.assert_close(kernels.linear(halves, one), halves, rtol=0, atol=0, equal_nan=True)
    for factor in (0.5, 0.75, 1 + 2**-11, 1 + 2**-11 + 2**-20, 3.0):
        weight = Packed(torch.full((1, 1), factor), torch.ones(1, 1, dtype=torch.bool)).laid_out("plain")
        expected = (halves.float() * factor).to(torch.float16)
        torch.testing.assert_close(kernels.linear(halves, weight), expected, rtol=0, atol=0, equal_nan=True)


def in_threads(function: Callable[[], None], count: int) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def _three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_concurrent_callers(path: PathName) -> None:
    packed = random_packed(300, 500, torch.bfloat16)
    weight, x = packed.laid_out(path), torch.randn(20, 500)
    expected = [kernels.linear(x[:batch], weight) for batch in range(1, 21)]

    def call() -> None:
        for batch in range(1, 21):
            assert torch.equal(kernels.linear(x[:batch], weight), expected[batch - 1])

    in_threads(call, 5)


@pytest.mark.usefixtures("_three_threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork(path: PathName) -> None:
    if path == "torch":
        pytest.skip("torch's own threads do not survive a fork")
    weight, x = random_packed(300, 500, torch.bfloat16).laid_out(path), torch.randn(1, 500)
    expected = kernels.linear(x, weight)
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(kernels.linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(kernels.linear(x, weight), expected)


def test_disagreements_are_refused(path: PathName) -> None:
    packed = random_packed(5, 13, torch.bfloat16)
    bitmask, values, columns = packed.bitmask, packed.values, 13
    count = len(values)
    damaged = bitmask.clone()
    damaged[2, 1] |= 0x80
    int8, scales = values.to(torch.int8), torch.ones(5)
    cases: list[tuple[str, dict[str, object]]] = [
        (rf"keeps {count} weights, but there are {count - 1} values", {"values": values[:-1]}),
        (rf"keeps {count} weights, but there are {count + 1} values", {"values": torch.cat([values, values[:1]])}),
        (r"beyond 13 in row 2", {"bitmask": damaged}),
        (r"expected uint8 \(rows, 3\) for 17 columns", {"columns": 17}),
        (r"expected uint8 \(rows, 2\)", {"bitmask": bitmask.to(torch.int16)}),
        (r"values are torch.float64", {"values": values.double()}),
        (r"values are .* \(1, ", {"values": values[None]}),
        (r"int8 values need scales", {"values": int8}),
        (r"values have no scales", {"scales": scales}),
        (r"expected float32 \(5, 1\)", {"values": int8, "scales": scales[:4]}),
        (r"expected float32 \(5, 2\)", {"values": int8, "scales": scales, "group_size": 8}),
        (r"expected a multiple of 8", {"values": int8, "scales": scales, "group_size": 12}),
    ]
    for message, changes in cases:
        arguments = {"bitmask": bitmask, "values": values, "columns": columns, "name": "down_proj", **changes}
        with pytest.raises(CheckpointError, match=r"down_proj: .*" + message):
            lay_out(**arguments)  # type: ignore[arg-type]


def test_wrong_inputs_are_refused(path: PathName) -> None:
    weight = random_packed(5, 13, torch.bfloat16).laid_out(path)
    for x in (torch.ones(2, 12), torch.ones(2, 13, dtype=torch.float64), torch.tensor(1.0)):
        with pytest.raises(SecateurError, match=r"expected \(\.\.\., 13\)"):
            kernels.linear(x, weight)
    with pytest.raises(SecateurError, match=r"expected \(5,\)"):
        kernels.linear(torch.ones(2, 13), weight, torch.ones(4))


def test_size_in_memory(path: PathName) -> None:
    for columns, most in ((2048, 0.57), (576, 0.58)):
        packed = random_packed(576, columns, torch.bfloat16)
        assert packed.laid_out(path).nbytes <= most * packed.stored.nbytes


def test_a_path_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_KERNEL", "avx1024")
    with pytest.raises(SecateurError, match=r"SECATEUR_KERNEL=avx1024: there is no such path\. Usable here: .*plain"):
        library.chosen()
    missing = [name for name, reason in library.available().items() if reason]
    if missing:
        monkeypatch.setenv("SECATEUR_KERNEL", missing[0])
        with pytest.raises(
            SecateurError, match=rf"SECATEUR_KERNEL={missing[0]}: (this processor|the kernel was compiled)"
        ):
            library.chosen()


def test_without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """The plain path of torch, and one warning."""
    monkeypatch.delenv("SECATEUR_KERNEL_LIBRARY")
    monkeypatch.setattr(library, "__file__", os.path.join(str(tmp_path), "library.py"))
    packed = random_packed(5, 13, torch.int8)
    with pytest.warns(UserWarning, match=r"plain torch.*does not exist\. Install") as warned:
        weight = lay_out(packed.bitmask, packed.values, 13, scales=packed.scales)
    assert len(warned) == 1
    x = torch.randn(3, 13)
    assert_close(kernels.linear(x, weight), x, packed)
    assert weight.path == "torch"
