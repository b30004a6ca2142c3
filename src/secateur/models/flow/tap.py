"""The inputs that matrices multiply, tapped at the multiplication itself.

Hooks on modules miss products that a module performs with a bare parameter, such as those of fused experts. A weight
that is multiplied is recognised by its storage instead, whichever module or function does it.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.gram import CrossGram
from secateur.core.statistics import Statistic
from secateur.errors import CalibrationError, ModelStructureError
from secateur.models.shape.matrices import Matrix

MULTIPLICATIONS = {"linear", "addmm", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm"}


class Enough(Exception):  # noqa: N818 - not an error: it ends a forward that has nothing more to tell
    """Raised inside a block's forward when every statistic of the block has been taken."""


@dataclass(frozen=True)
class Product:
    """One multiplication with a parameter, or with a part of one."""

    name: str
    parameter: nn.Parameter
    transposed: bool  # the module stores (in, out)
    weight: Tensor  # what was multiplied: the parameter, a slice of it, or a transposed view
    contracted: int  # the dimension of `weight` that runs over the inputs
    x: Tensor  # (..., in)
    is_left: bool  # weight @ x.T rather than x @ weight

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
    """Finds the multiplications with given parameters while it is active."""

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, bool]]) -> None:
        """`parameters`: name -> (parameter, whether the module stores it (in, out))."""
        super().__init__()
        self._targets: dict[int, list[tuple[str, nn.Parameter, bool]]] = {}
        for name, (parameter, transposed) in parameters.items():
            self._targets.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter, transposed))

    def product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
        """The multiplication that a torch function performs with one of the parameters, if it does.

        Raises `ModelStructureError` when it does not run along the parameter's inputs.
        """
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

    def _target(self, weight: Tensor) -> tuple[str, nn.Parameter, bool] | None:
        for target in self._targets.get(weight.untyped_storage().data_ptr(), ()):
            start = target[1].storage_offset()
            if start <= weight.storage_offset() < start + target[1].numel():
                return target
        return None


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


def by_expert(product: Product) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
    """The tokens of a product, (tokens, in), for each (parameter, expert) that it multiplies."""
    x = product.x.detach()  # Memory: a statistic must not hold on to the graph of a forward that has one
    if not product.batched:
        yield (product.name, product.expert), x.reshape(-1, x.shape[-1])
        return
    for expert in range(product.parameter.shape[0]):
        rows = x[expert] if x.dim() == 3 else x
        # A batched product multiplies every expert with every token; those routed elsewhere are all zero.
        yield (product.name, expert), rows[(rows != 0).any(dim=-1)]


@dataclass(frozen=True)
class InputStatistics:
    """The statistics of the inputs of parameters, by (parameter, expert); `leader` is the one that has a matrix's."""

    leader: Mapping[tuple[str, int | None], tuple[str, int | None]]
    by_leader: Mapping[tuple[str, int | None], Mapping[type[Statistic], Statistic]]

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

    def only(self, kinds: frozenset[type[Statistic]]) -> "InputStatistics":
        """The statistics of these kinds alone."""
        kept = {key: {k: own for k, own in found.items() if k in kinds} for key, found in self.by_leader.items()}
        return InputStatistics(self.leader, kept)


class InputTap(ProductTap):
    """Collects statistics of what the given parameters multiply, while it is active.

    Matrices that read the same tensor (q, k, v; gate, up) share one statistic. A fused 3-D parameter has one per
    expert.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[nn.Parameter, bool]],  # name -> (parameter, stored (in, out))
        kinds: frozenset[type[Statistic]],
        device: torch.device | None = None,
    ) -> None:
        """`kinds` are collected where the inputs are, or on `device`."""
        super().__init__(parameters)
        self._device = device
        self._kinds = sorted(kinds, key=lambda kind: kind.__name__)
        self._count = len(parameters)
        self._can_stop = all(parameter.dim() == 2 for parameter, _ in parameters.values())
        self._statistics: dict[tuple[str, int | None], dict[type[Statistic], Statistic]] = {}
        self._leader: dict[tuple[str, int | None], tuple[str, int | None]] = {}
        # Memory: a few inputs are kept alive, just long enough for the other matrices that read the same one.
        self._recent: deque[tuple[Tensor, int, tuple[str, int | None]]] = deque(maxlen=4)
        self._updates: dict[tuple[str, int | None], int] = {}
        self._calls: dict[tuple[str, int | None], int] = {}
        self._samples = 0
        self._stop = False
        self._dense: Inputs | None = None

    def begin(self, samples: int, *, whole: bool, dense: "Inputs | None" = None) -> None:
        """Tell that the next forward is over `samples` further calibration samples.

        With `whole` it runs to the end; otherwise it may end with `Enough` after the last multiplication of interest.
        `dense` are the inputs of the same samples in the dense model, for statistics that pair them.
        """
        self._dense = dense
        self._samples += samples
        self._stop = self._can_stop and not whole
        self._calls.clear()
        self._recent.clear()

    def end(self) -> None:
        """Count the samples of the forward, and let go of the inputs that were kept for sharing."""
        self._recent.clear()
        # Exact: however often it multiplied, and whether or not a token was routed to it, a matrix has had them all.
        for statistics in self._statistics.values():
            for statistic in statistics.values():
                statistic.samples = self._samples
        # Exact: a forward may end early only where every matrix multiplies exactly once.
        self._can_stop = self._can_stop and len(self._calls) == self._count and set(self._calls.values()) <= {1}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = self.product(getattr(func, "__name__", ""), args, kwargs or {})
        if product is not None:
            self._take(product)
            if self._stop and len(self._calls) == self._count:
                raise Enough  # before the last product, whose result nobody needs
        return func(*args, **(kwargs or {}))

    def _take(self, product: Product) -> None:
        for key, rows in by_expert(product):
            self._add(key, rows, None if product.batched else product.x)

    def _add(self, key: tuple[str, int | None], x: Tensor, source: Tensor | None) -> None:
        self._calls[key] = self._calls.get(key, 0) + 1
        leader = self._leader.get(key)
        if source is not None:
            for recent, version, recent_key in self._recent:
                same = recent is source or (
                    recent.data_ptr() == source.data_ptr()
                    and recent.shape == source.shape
                    and recent.stride() == source.stride()
                )
                if (
                    same
                    and version == source._version
                    and (leader == recent_key or (leader is None and self._updates[recent_key] == 1))
                ):
                    self._leader[key] = recent_key
                    return
        if leader is not None and leader != key:
            raise ModelStructureError(f"{key[0]}: shared its input with {leader[0]} at first, and then did not.")
        if key not in self._leader:
            self._leader[key] = key
            place = self._device or x.device
            self._statistics[key] = {kind: kind.empty(x.shape[1], place) for kind in self._kinds}
        for statistic in self._statistics[key].values():
            if isinstance(statistic, CrossGram):
                statistic.update(x, dense=self._twin(key, x))
            else:
                statistic.update(x)
        self._updates[key] = self._updates.get(key, 0) + 1
        if source is not None:
            self._recent.append((source, source._version, key))

    def _twin(self, key: tuple[str, int | None], x: Tensor) -> Tensor:
        """The tokens `x` as the dense model has them."""
        seen = self._dense.get(key, []) if self._dense is not None else []
        position = self._calls[key] - 1
        if position >= len(seen) or seen[position].shape != x.shape:
            raise ModelStructureError(
                f"{key[0]}: multiplies {x.shape[0]} tokens behind the pruned blocks, and "
                f"{seen[position].shape[0] if position < len(seen) else 'none'} in the dense model: tokens are routed "
                "differently there. Use --targets pruned for this model, or leave its experts out with --skip."
            )
        return seen[position]

    def leaders(self) -> dict[tuple[str, int | None], str]:
        """For each (parameter, expert), in the order of the products, the parameter that read the same input first."""
        return {key: leader[0] for key, leader in self._leader.items()}

    @property
    def taken(self) -> InputStatistics:
        """The statistics so far."""
        return InputStatistics(self._leader, self._statistics)

    def check(self, matrices: Sequence[Matrix], samples: int) -> None:
        """Raise unless every matrix saw tokens, and only finite ones."""
        unseen = [matrix.name for matrix in matrices if not self._tokens(matrix)]
        if unseen:
            its, it = ("its", "it") if len(unseen) == 1 else ("their", "them")
            raise ModelStructureError(
                f"{_some(unseen)}: saw no token of the {samples} calibration samples, so nothing is known of {its} "
                f'inputs. Calibrate on more samples (--samples), or leave {it} dense with --skip "{unseen[0]}"'
                f"{' and so on' if len(unseen) > 1 else ''}."
            )
        # In the order of the forward, so that the first one named is where the trouble begins.
        order = {key: position for position, key in enumerate(self._leader)}
        sound: set[int] = set()  # statistics that other matrices share
        for matrix in sorted(matrices, key=lambda matrix: order[(matrix.parameter, matrix.expert)]):
            for statistic in self.taken.whole(matrix).values():
                if id(statistic) in sound:
                    continue
                if not statistic.is_finite():
                    raise CalibrationError(
                        f"{matrix.name}: its inputs on the calibration samples contain NaN or infinity. "
                        "Is the model itself sound? Try --dtype float32, and check the dense model with secateur eval."
                    )
                sound.add(id(statistic))

    def _tokens(self, matrix: Matrix) -> int:
        return max((statistic.tokens for statistic in self.taken.whole(matrix).values()), default=0)


Inputs = dict[tuple[str, int | None], list[Tensor]]
"""What was multiplied, by (parameter, expert), in the order of the products."""


class InputRecorder(ProductTap):
    """Keeps what the given parameters multiply in one forward: `inputs`, each (tokens, in).

    They are not copied. The end of the forward raises `ModelStructureError` where the model has written to one since.
    """

    def __init__(self, parameters: Mapping[str, tuple[nn.Parameter, bool]]) -> None:
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

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = self.product(getattr(func, "__name__", ""), args, kwargs or {})
        if product is not None:
            for key, rows in by_expert(product):
                self.inputs.setdefault(key, []).append(rows)
                self._versions.append((key[0], rows, rows._version))
        return func(*args, **(kwargs or {}))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
