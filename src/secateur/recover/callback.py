"""The callback that keeps zeros zero in any Trainer."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor, nn
from transformers import TrainerCallback

from secateur.errors import ModelStructureError, PatternError
from secateur.recover.masks import matrix_parameters, planned_parameters


class SparsityCallback(TrainerCallback):
    """Keeps pruned weights at zero while a Trainer of transformers or TRL trains: `callbacks=[SparsityCallback()]`.

    What is zero in the prunable matrices when training begins stays zero. Gradients of pruned weights are zeroed as
    they arise, before they are clipped; the weights and the optimizer's moments once more after every step, whatever
    the optimizer does. It takes one byte for every weight of the sparse matrices that are trained. Frozen matrices
    are only counted. The count is checked whenever a checkpoint is saved and at the end.

    Raises `PatternError` when the model has no zeros to keep, or lost some, and `ModelStructureError` under DeepSpeed
    and FSDP, whose parameters are not the model's own.
    """

    def __init__(self) -> None:
        self.zeros = 0  # how many are kept, known once training has begun
        self._checkpoint: Path | None = None
        self._zeros: dict[str, tuple[nn.Parameter, int]] = {}
        self._removed: dict[str, Tensor] = {}  # where those that are trained are pruned
        self._hooks: list[Any] = []

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str]) -> "SparsityCallback":
        """The callback for the matrices that a pruned checkpoint's manifest plans, and with its counts of zeros."""
        callback = cls()
        callback._checkpoint = Path(folder)
        return callback

    def attach(self, model: nn.Module) -> None:
        """Take the zeros that a model has now as those to keep. Training does so itself when it begins."""
        self._detach()
        if self._checkpoint is None:
            parameters = {name: parameter for name, (parameter, _) in matrix_parameters(model).items()}
        else:
            parameters = planned_parameters(model, self._checkpoint)
        for name, parameter in parameters.items():
            removed = parameter.detach() == 0
            if zeros := int(removed.sum()):
                self._zeros[name] = (parameter, zeros)
            if zeros and parameter.requires_grad:
                self._removed[name] = removed
                hooked: Any = parameter
                self._hooks.append(hooked.register_post_accumulate_grad_hook(partial(self._mask_gradient, name)))
        if not self._zeros:
            raise PatternError(
                f"{type(model).__name__}: none of its {len(parameters)} prunable matrices has a zero, so there is no "
                "sparsity to keep. Was the pruned checkpoint loaded, and not the dense one?"
            )
        self.zeros = sum(count for _, count in self._zeros.values())

    @torch.no_grad()
    def check(self) -> None:
        """Raise `PatternError` when a weight is not zero that was when training began."""
        for name, (parameter, zeros) in self._zeros.items():
            if name in self._removed:
                lost = int(parameter.masked_select(self._removed_from(name)).count_nonzero())
                if lost:
                    raise PatternError(f"{name}: {lost} of {zeros} pruned weights are not zero any more.")
            found = parameter.numel() - int(parameter.count_nonzero())
            if found < zeros:
                raise PatternError(f"{name}: {found} zeros left of {zeros}.")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model, unless that was done before: a run that failed may have left another model's zeros."""
        kind = PartialState().distributed_type.value.lower()  # as `accelerate launch` says
        sharded = next((name for name in ("deepspeed", "fsdp") if getattr(args, name, None) or kind == name), "")
        if sharded:
            raise ModelStructureError(
                f"SparsityCallback: {sharded} keeps parameters in pieces of its own, which no callback sees. Train on "
                "one device or with plain data parallelism (torchrun)."
            )
        model = kwargs["model"]
        own = {id(parameter) for parameter in model.parameters()}
        if not self._zeros or any(id(parameter) not in own for parameter, _ in self._zeros.values()):
            self.attach(model)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero the pruned weights and whatever the optimizer keeps of them, after its step."""
        optimizer = kwargs["optimizer"]
        for name in self._removed:
            parameter, removed = self._zeros[name][0], self._removed_from(name)
            parameter.masked_fill_(removed, 0)
            for value in optimizer.state.get(parameter, {}).values():
                # Quantised moments are whole numbers that stand for others. With gradients of zero they are zero.
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    value.masked_fill_(removed, 0)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the zeros of what was saved."""
        self.check()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the zeros, and leave the model as it was found."""
        self.check()
        self._detach()

    def _removed_from(self, name: str) -> Tensor:
        """Where a parameter is pruned, on the device that it has moved to."""
        self._removed[name] = self._removed[name].to(self._zeros[name][0].device)
        return self._removed[name]

    def _mask_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(self._removed_from(name), 0)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._zeros, self._removed = [], {}, {}
