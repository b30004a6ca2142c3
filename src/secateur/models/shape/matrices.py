"""Every prunable weight as an (out, in) matrix.

What is prunable is read off the module: linear layers, transposed `Conv1D`, fused expert tensors, one matrix per
expert, and convolutions of one and two dimensions, (out, in * places of the kernel), which multiply the patches of
their input.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from secateur.models.shape.structure import Block
from secateur.models.weights.conversion import Placement

# Facts that a module does not tell about itself. Everything else is found out.
TRANSPOSED_CLASSES = {"Conv1D", "Llama4TextExperts"}  # store (in, out)
ROUTER_NAMES = {"gate", "classifier", "wg", "shared_expert_gate"}  # last part of a router's path, beside "router"


@dataclass(frozen=True, kw_only=True)
class Matrix(Placement):
    """One prunable matrix as the checkpoint names it; the name of an expert in a fused tensor ends in its number."""

    name: str
    shape: tuple[int, int]  # (out, in)
    block: int
    tensor: str  # the checkpoint tensor that holds it
    index: int | None  # which slice of a 3-D tensor it is

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix as an (out, in) view of its checkpoint tensor."""
        value = tensors[self.tensor]
        value = value if self.index is None else value[self.index]
        value = value.flatten(1)
        return value.t() if self.transposed else value

    def of_parameter(self, value: Tensor, transposed: bool) -> Tensor:
        """The (out, in) part of a tensor laid out like the parameter, which stores (in, out) when `transposed`."""
        value = (value if self.expert is None else value[self.expert]).flatten(1)
        value = value.t() if transposed else value
        value = value if self.rows is None else value[self.rows.to(value.device)]
        return value if self.columns is None else value[:, self.columns.to(value.device)]

    def place(self, value: Tensor, parameter: Tensor, transposed: bool) -> None:
        """Write an (out, in) value where `of_parameter` reads it from a tensor laid out like the parameter."""
        part = parameter if self.expert is None else parameter[self.expert]
        part = part.view(len(part), -1)
        part = part.t() if transposed else part
        if self.rows is None and self.columns is None:
            part.copy_(value)
            return
        rows = torch.arange(part.shape[0]) if self.rows is None else self.rows
        columns = torch.arange(part.shape[1]) if self.columns is None else self.columns
        part[rows.to(part.device).unsqueeze(1), columns.to(part.device)] = value.to(part)

    @property
    def routed(self) -> bool:
        """Whether it is an expert, which sees only the tokens that a router sends to it."""
        return self.expert is not None or ".experts." in self.name

    @property
    def site(self) -> str:
        """The parameter's name, the same for all experts of a mixture."""
        return re.sub(r"(experts?\.)\d+\.", r"\1*.", self.parameter)

    @property
    def kind(self) -> str:
        """The name without numbers: `model.layers.*.mlp.up_proj.weight` for every block."""
        return matrix_kind(self.name)


def matrix_kind(name: str) -> str:
    """A matrix's name with a star for every number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def prunable_parameters(block: nn.Module, experts: int | None) -> tuple[dict[str, bool], dict[str, str]]:
    """Which parameters of a block are linear matrices ({name: stored (in, out)}), and why each other one is not.

    `experts` is the number of experts that the configuration names, to tell a router from a projection.
    """
    planned: dict[str, bool] = {}
    left_out: dict[str, str] = {}
    for module_name, module in block.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            class_name = type(module).__name__
            if parameter.dim() < 2 or leaf.endswith("bias"):
                left_out[name] = "bias or norm"
            elif _is_router(module_name, module, parameter, experts):
                left_out[name] = "router"
            elif isinstance(module, nn.Linear) and leaf == "weight":
                planned[name] = False
            elif is_plain_convolution(module) and leaf == "weight":
                if module.groups == 1:
                    planned[name] = False
                else:  # such as depthwise ones: each group has inputs of its own, few of them
                    left_out[name] = "convolution in groups"
            elif class_name in TRANSPOSED_CLASSES and leaf == "weight":
                planned[name] = True
            elif parameter.dim() == 3 and (hasattr(module, "is_transposed") or "expert" in class_name.lower()):
                planned[name] = getattr(module, "is_transposed", class_name in TRANSPOSED_CLASSES)
            elif isinstance(module, nn.Embedding):
                left_out[name] = "embedding"
            elif "Norm" in class_name:
                left_out[name] = "bias or norm"
            else:
                left_out[name] = f"not a linear matrix ({class_name}.{leaf})"
    return planned, left_out


def by_block(matrices: Iterable[Matrix]) -> dict[int, list[Matrix]]:
    """The matrices of each block that has some."""
    result: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        result.setdefault(matrix.block, []).append(matrix)
    return result


def tapped(block: Block, matrices: Sequence[Matrix]) -> tuple[dict[str, tuple[Tensor, bool]], dict[str, bool]]:
    """The parameters of a block that make the given matrices, and for each whether it is stored (in, out).

    They are views of what the block multiplies with: (out, in * places of the kernel) where it convolves.
    """
    layout, _ = prunable_parameters(block.module, None)
    prefix = len(block.path) + 1
    stored = {name: layout[name[prefix:]] for name in sorted({matrix.parameter for matrix in matrices})}
    return {name: (_as_multiplied(block.module, name[prefix:]), stored[name]) for name in stored}, stored


def _as_multiplied(block: nn.Module, name: str) -> Tensor:
    parameter = block.get_parameter(name)
    return parameter.detach().flatten(1) if is_kernel(block, name) else parameter


def is_kernel(module: nn.Module, name: str) -> bool:
    """Whether the parameter of this name is the weight of a convolution, whose first dimension counts no experts."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and is_plain_convolution(module.get_submodule(path))


def _is_router(module_name: str, module: nn.Module, parameter: nn.Parameter, experts: int | None) -> bool:
    if any(word in type(module).__name__ for word in ("Router", "TopK", "Gating")) or "router" in module_name:
        return True
    # A plain linear layer called `gate` may be a projection; a router has one output per expert.
    is_plain = isinstance(module, nn.Linear) and parameter.shape[0] not in (1, experts)
    return module_name.rpartition(".")[2] in ROUTER_NAMES and not is_plain


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Whether a module convolves with its weight as it is, in one or two dimensions: some standardise it first."""
    own: Any = type(module)
    return any(
        isinstance(module, kind) and own.forward is kind.forward and own._conv_forward is kind._conv_forward
        for kind in (nn.Conv1d, nn.Conv2d)
    )


def numbered_experts(config: Any) -> int | None:
    """The number of experts that a configuration names, under any of the names in use."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
