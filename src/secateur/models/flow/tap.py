"""The inputs that matrices multiply, tapped at the multiplication itself.

Hooks on modules miss products that a module performs with a bare parameter, such as those of fused experts. A weight
that is multiplied is recognised by its storage instead, whichever module or function does it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.exact import Joinable
from secateur.errors import ModelStructureError

MULTIPLICATIONS = {"linear", "addmm", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm"}


class Enough(Exception):  # noqa: N818 - not an error: it ends a forward that has nothing more to tell
    """Raised inside a block's forward when nothing further of it is wanted."""


Key = tuple[str, int | None]
"""A parameter's name, and which slice of it, where it holds several experts."""

Take = Callable[[Key, int, Tensor], None]
"""Takes an input: its key, how many products of this forward came before with the same key, and (tokens, in)."""


@dataclass(frozen=True)
class Product:
    """One multiplication with a parameter, or with a part of one."""

    name: str
    parameter: Tensor
    transposed: bool  # the module stores (in, out)
    weight: Tensor  # what was multiplied: the parameter, a slice of it, or a transposed view
    contracted: int  # the dimension of `weight` that runs over the inputs
    x: Tensor  # (..., in)
    is_left: bool  # weight @ x.T rather than x @ weight
    is_convolution: bool = False  # x is (samples, places, in): the patch that is multiplied at each place

    @property
    def batched(self) -> bool:
        """Whether all experts of a 3-D parameter are multiplied at once."""
        return self.parameter.dim() == 3 and self.weight.dim() == 3

    @property
    def expert(self) -> int | None:
        """Which slice of a 3-D parameter the weight is; None for a 2-D one."""
        if self.parameter.dim() != 3:
            return None
        return int(self.weight.storage_offset() - self.parameter.storage_offset()) // self.parameter.stride(0)


class ProductTap(TorchFunctionMode):
    """Finds the multiplications with given parameters while it is active, for `before` and `after`."""

    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]]) -> None:
        """`parameters`: name -> (parameter, whether the module stores it (in, out)).

        Those of convolutions are views of two dimensions, (out, in * places of the kernel).
        """
        super().__init__()
        self._targets: dict[int, list[tuple[str, Tensor, bool]]] = {}
        for name, (parameter, transposed) in parameters.items():
            target = (name, parameter.detach(), transposed)
            self._targets.setdefault(parameter.untyped_storage().data_ptr(), []).append(target)

    def before(self, product: Product) -> None:
        """Told of a multiplication that is about to be performed."""

    def after(self, product: Product, result: Tensor, factor: float) -> Tensor:
        """What the model is to get for the result of a multiplication, which is `factor` times the product."""
        return result

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = self.product(getattr(func, "__name__", ""), args, kwargs)
        if product is None:
            return func(*args, **kwargs)
        self.before(product)
        result = func(*args, **kwargs)
        if product.is_convolution:  # what it makes of a place is a row, as it is of a token
            channels = -3 if func.__name__ == "conv2d" else -2
            rows = self.after(product, result.flatten(channels + 1).transpose(-1, -2), 1.0)
            return rows.transpose(-1, -2).reshape(result.shape)
        return self.after(product, result, float(kwargs.get("alpha", 1)))

    def product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
        """The multiplication that a torch function performs with one of the parameters, if it does.

        Raises `ModelStructureError` when it does not run along the parameter's inputs.
        """
        if name in ("conv1d", "conv2d"):
            return self._convolution(*args, **kwargs)
        if name not in MULTIPLICATIONS:
            return None
        named = ("input", "mat1", "batch1", "mat2", "batch2", "other", "weight")
        operands = [*args, *(kwargs[key] for key in named if key in kwargs)]
        if name in ("addmm", "baddbmm"):
            operands = operands[1:]
        left, right = operands[0], operands[1]
        if name == "__rmatmul__":
            left, right = right, left
        for weight, x, is_left in ((right, left, False), (left, right, True)):
            if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.device.type == "meta":
                continue
            target = self._target(weight)
            if target is None:
                continue
            contracted = weight.dim() - 1 if is_left or name == "linear" else max(weight.dim() - 2, 0)
            turned = is_left and x.dim() > 1
            product = Product(*target, weight, contracted, x.transpose(-1, -2) if turned else x, is_left)
            _check_inputs(product)
            return product
        return None

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Product | None:
        target = None if weight.device.type == "meta" else self._target(weight)
        if target is None:
            return None
        samples = input if input.dim() == weight.dim() else input.unsqueeze(0)
        patches = _patches(samples.detach(), weight.shape[2:], stride, padding, dilation)
        return Product(*target, weight.flatten(1), 1, patches, is_left=False, is_convolution=True)

    def _target(self, weight: Tensor) -> tuple[str, Tensor, bool] | None:
        for target in self._targets.get(weight.untyped_storage().data_ptr(), ()):
            start = target[1].storage_offset()
            if start <= weight.storage_offset() < start + target[1].numel():
                return target
        return None


def _patches(
    samples: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> Tensor:
    """What a kernel multiplies at each place it takes: (samples, places, in * places of the kernel).

    A sample is (in, height, width), or (in, length), which is an image of one row.
    """
    is_image = len(kernel) == 2
    images, kernel = (samples, kernel) if is_image else (samples.unsqueeze(-2), (1, *kernel))
    stride, dilation = _pair(stride, is_image, 1), _pair(dilation, is_image, 1)
    if padding == "same":
        total = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        (above, left), (below, right) = [n // 2 for n in total], [n - n // 2 for n in total]
        images, padding = nn.functional.pad(images, (left, right, above, below)), 0
    around = _pair(0 if isinstance(padding, str) else padding, is_image, 0)
    if (*kernel, *stride, *around) == (1, 1, 1, 1, 0, 0):
        return images.flatten(2).transpose(1, 2)
    return nn.functional.unfold(images, tuple(kernel), dilation, around, stride).transpose(1, 2)


def _pair(value: int | Sequence[int], is_image: bool, of_one_row: int) -> tuple[int, int]:
    """What a convolution is told of rows and columns; of a sequence it is told nothing of rows."""
    first, second = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return (first if is_image else of_one_row), second


def _check_inputs(product: Product) -> None:
    parameter, weight, contracted = product.parameter, product.weight, product.contracted
    dimension = parameter.dim() - (2 if product.transposed else 1)
    width, stride = parameter.shape[dimension], parameter.stride(dimension)
    if weight.shape[contracted] != width or (width > 1 and weight.stride(contracted) != stride):
        raise ModelStructureError(
            f"{product.name}: multiplied along a dimension of {weight.shape[contracted]} (stride "
            f"{weight.stride(contracted)}), expected in_features {width} (stride {stride}). The module stores it "
            f"{'(in, out)' if not product.transposed else '(out, in)'}; skip it with --skip."
        )


class BackwardTap(ProductTap):
    """A tap that is active in a forward to learn something in the backward after it: `sums`."""

    sums: Mapping[Any, Joinable]

    def begin(self, samples: int, length: int, scale: float = 1.0) -> None:
        """Tell that the next forward and backward are over `samples` of `length` tokens, gradients times `scale`."""

    def end(self) -> None:
        """Add what is left after a backward."""


@contextmanager
def watched_inputs(block: nn.Module, paths: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see` with its path and the first tensor that goes into it, for some submodules of a block."""
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
                if found is not None:
                    see(path, found)

            stack.callback(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def by_expert(product: Product) -> Iterator[tuple[Key, Tensor]]:
    """The tokens of a product, (tokens, in), for each (parameter, expert) that it multiplies."""
    x = product.x.detach()  # Memory: what sees an input must not hold on to the graph of a forward that has one
    if not product.batched:
        yield (product.name, product.expert), x.reshape(-1, x.shape[-1])
        return
    for expert in range(product.parameter.shape[0]):
        rows = x[expert] if x.dim() == 3 else x
        # A batched product multiplies every expert with every token; those routed elsewhere are all zero.
        yield (product.name, expert), rows[(rows != 0).any(dim=-1)]


class InputTap(ProductTap):
    """Hands on what the given parameters multiply, while it is active.

    Of matrices that read the same tensor (q, k, v; gate, up) the first one leads: its input is handed on once, for all
    of them. A fused 3-D parameter has one input per expert.
    """

    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]]) -> None:
        super().__init__(parameters)
        self.takers: list[Take] = []
        self.leader: dict[Key, Key] = {}  # in the order of the products
        self.calls: dict[Key, int] = {}  # products of this forward
        self._count = len(parameters)
        self._can_stop = all(parameter.dim() != 3 for parameter, _ in parameters.values())
        # Memory: a few inputs are kept alive, just long enough for the other matrices that read the same one.
        self._recent: deque[tuple[Tensor, int, Key]] = deque(maxlen=4)
        self._updates: dict[Key, int] = {}
        self._stop = False

    def begin(self, *, stop: bool) -> None:
        """Expect another forward, which with `stop` may end with `Enough` after the last product of interest."""
        self._stop = self._can_stop and stop
        self.calls.clear()
        self._recent.clear()

    def end(self) -> None:
        """Let go of the inputs that were kept for sharing."""
        self._recent.clear()
        # Exact: a forward may end early only where every matrix multiplies exactly once.
        self._can_stop = self._can_stop and len(self.calls) == self._count and set(self.calls.values()) <= {1}

    def let_go(self, leader: Key) -> None:
        """Forget the input that was kept for those who share it with this one."""
        self._recent = deque((recent for recent in self._recent if recent[2] != leader), self._recent.maxlen)

    def before(self, product: Product) -> None:
        """Hand on the input, and end the forward where nothing more is wanted."""
        for key, rows in by_expert(product):
            self._add(key, rows, None if product.batched else product.x)
        if self._stop and len(self.calls) == self._count:
            raise Enough  # before the last product, whose result nobody needs

    def _add(self, key: Key, x: Tensor, source: Tensor | None) -> None:
        self.calls[key] = self.calls.get(key, 0) + 1
        leader = self.leader.get(key)
        if source is not None:
            for recent, version, recent_key in self._recent:
                same = _place(recent) == _place(source) and version == source._version
                if same and (leader == recent_key or (leader is None and self._updates[recent_key] == 1)):
                    self.leader[key] = recent_key
                    return
        if leader is not None and leader != key:
            raise ModelStructureError(f"{key[0]}: shared its input with {leader[0]} at first, and then did not.")
        self.leader[key] = key
        for take in self.takers:
            take(key, self.calls[key] - 1, x)
        self._updates[key] = self._updates.get(key, 0) + 1
        if source is not None:
            self._recent.append((source, source._version, key))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


Inputs = dict[Key, list[Tensor]]
"""What was multiplied, in the order of the products."""


class InputRecorder(ProductTap):
    """Keeps what the given parameters multiply in one forward: `inputs`, each (tokens, in).

    They are not copied. The end of the forward raises `ModelStructureError` where the model has written to one since.
    """

    def __init__(self, parameters: Mapping[str, tuple[Tensor, bool]]) -> None:
        super().__init__(parameters)
        self.inputs: Inputs = {}
        self._versions: list[tuple[str, Tensor, int]] = []

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        super().__exit__(kind, *rest)  # type: ignore[no-untyped-call]
        changed = [name for name, rows, version in self._versions if rows._version != version]
        if changed and kind in (None, Enough):
            raise ModelStructureError(
                f"{changed[0]}: the model overwrites its input after multiplying it, so it cannot be compared with the "
                "dense model's. Use --targets pruned, or leave this matrix out with --skip."
            )

    def before(self, product: Product) -> None:
        """Keep the input."""
        for key, rows in by_expert(product):
            self.inputs.setdefault(key, []).append(rows)
            self._versions.append((key[0], rows, rows._version))
