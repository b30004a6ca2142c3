"""What is trained: adapters beside the weights, or the weights themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import PatternError
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import OpenedModel
from secateur.models.weights.conversion import TensorGroup
from secateur.models.weights.inverse import Inverse
from secateur.plans.plan import matching
from secateur.record.manifest import Manifest
from secateur.recover.adapters import PREFIX, adaptable, find_targets, read_adapter, write_record
from secateur.recover.callback import SparsityCallback
from secateur.recover.merge import MergedCheckpoint
from secateur.recover.settings import RecoverSettings, TrainingProgress
from secateur.recover.written import finish_trained, write_trained
from secateur.runs.transaction import Transaction


@dataclass
class _Trained:
    """What both ways have: `manifest` and the folder `base` are those of the pruned checkpoint that `opened` reads."""

    opened: OpenedModel
    manifest: Manifest
    base: Path
    settings: RecoverSettings
    targets: list[str] = field(init=False)  # what gets an adapter, or the tensors that are trained
    trainable: int = field(init=False)  # weights that can change
    kept: int = 0  # weights beside them that are held at zero
    mask_bytes: int = 0  # the memory of their masks
    notes: list[str] = field(default_factory=list)


@dataclass
class Adapters(_Trained):
    """LoRA, with its product masked or not."""

    def __post_init__(self) -> None:
        model = self.opened.skeleton.model
        self.masked = self.settings.method == "sparse-lora"
        self.targets = find_targets(model, self.settings.targets)
        self.trainable = sum(
            self.settings.rank * sum(parameter.shape)
            for name, parameter in model.named_parameters()
            if name.endswith(".weight")
            and (name.removesuffix(".weight") in self.targets or name.split(".")[-2] in self.targets)
        )

    def prepare(self, model: nn.Module) -> tuple[nn.Module, list[Any]]:
        """The model wrapped by peft, with its adapters in float32, which alone are trainable; no callbacks.

        Raises `PatternError` where peft takes the names for stacks of experts, whose adapters could not be merged.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        alpha = self.settings.alpha
        stored_across = any(isinstance(module, Conv1D) for module in model.modules())
        config: Any = LoraConfig(
            r=self.settings.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # readers expect 16, not 16.0
            lora_dropout=self.settings.dropout,
            target_modules=self.targets,
            fan_in_fan_out=stored_across,
            bias="none",
            task_type="CAUSAL_LM",
        )
        if self.masked:
            from secateur.recover.masked_lora import masked

            config = masked(config)
        layers = set(adaptable(model))
        wrapped: Any = get_peft_model(model, config)
        adapters = (name.removeprefix(PREFIX) for name, _ in wrapped.named_parameters() if ".lora_" in name)
        if stacks := [name for name in adapters if name.partition(".lora_")[0] not in layers]:
            raise PatternError(
                f"peft puts adapters on fused stacks of experts for these targets ({stacks[0]}), and "
                "those cannot be merged. Leave out names that experts have as well, such as gate_proj and down_proj."
            )
        return wrapped, []

    def write(self, model: nn.Module, transaction: Transaction) -> OpenedModel:
        """Write the adapter as peft saves it; returns the model that base and adapter amount to, ready to evaluate."""
        trained: Any = model
        trained.peft_config["default"].base_model_name_or_path = str(self.base.resolve())
        trained.save_pretrained(transaction.folder)
        adapter = read_adapter(transaction.folder)
        return self.opened.reading(MergedCheckpoint(self.base, self.opened, adapter, keep=self.masked))

    def finish(self, transaction: Transaction, record: Mapping[str, Any], progress: TrainingProgress) -> None:
        """Write the record and the README beside the adapter."""
        write_record(transaction.folder, record)


@dataclass
class FullWeights(_Trained):
    """All weights, or those that the globs leave; zeros stay zero. After `write`, `manifest` is that of the result."""

    def __post_init__(self) -> None:
        skeleton, settings, source = self.opened.skeleton, self.settings, self.opened.skeleton.source
        self._inverse = Inverse(skeleton)
        parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
        possible: list[TensorGroup] = []
        converted: list[TensorGroup] = []
        for group in skeleton.conversion.groups.values():
            floating = all(source.dtype(name).is_floating_point for name in group.names)
            if floating and all(name in parameters for name in group.parameters):
                (possible if self._inverse.possible(group) else converted).append(group)
        shapes = {name: (0, 0) for group in possible for name in group.names}
        chosen = set(matching(shapes, only=settings.only, skip=settings.skip, purpose="train"))
        for group in possible:
            inside = [name for name in group.names if name in chosen]
            outside = [name for name in group.names if name not in chosen]
            if inside and outside:
                raise PatternError(
                    f"{inside[0]} and {outside[0]} are one parameter in memory ({group.target}): --only and --skip "
                    "must name both or neither."
                )
        if converted:
            self.notes.append(
                f"{len(converted)} parameters are made of several tensors by a conversion without an inverse, such as "
                f"{converted[0].target}; they were not trained."
            )
        self.groups = {name: group for group in possible for name in group.names if name in chosen}
        self.targets = [name for name in source.names if name in chosen]
        planned = [entry for entry in self.manifest.matrices.values() if entry["tensor"] in chosen]
        self.kept = sum(entry["zeros"] for entry in planned)
        self.mask_bytes = sum(entry["shape"][0] * entry["shape"][1] for entry in planned)
        self.trainable = sum(math.prod(source.shape(name)) for name in self.targets) - self.kept

    def prepare(self, model: nn.Module) -> tuple[nn.Module, list[Any]]:
        """The model with the chosen parameters trainable, and the callback that keeps its zeros."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        chosen = {id(parameters[name]) for group in self.groups.values() for name in group.parameters}
        for parameter in parameters.values():
            parameter.requires_grad_(id(parameter) in chosen)
        callback = SparsityCallback.from_checkpoint(self.base)
        # A weight that is zero by chance in a checkpoint that is resumed is not pruned; those of the base are.
        callback.attach(model)
        return model, [callback]

    def write(self, model: nn.Module, transaction: Transaction) -> OpenedModel:
        """Write the base's tensors and files with new values where they were trained; returns the written model."""
        parameters = {name: value.detach().cpu() for name, value in model.named_parameters(remove_duplicate=False)}

        def value(name: str) -> Tensor:
            return self._inverse.tensors(self.groups[name], parameters)[name]

        self.manifest = write_trained(transaction, self.opened, self.manifest, self.targets, value, section={})
        if nudged := self.manifest.recoveries[0]["nudged"]:
            self.notes.append(
                f"{nudged} kept weights were too small for the checkpoint's dtype; they were written as "
                "its smallest number rather than as zero."
            )
        return self.opened.reading(Checkpoint(transaction.folder))

    def finish(self, transaction: Transaction, record: Mapping[str, Any], progress: TrainingProgress) -> None:
        """Write the record into the manifest, verify the checkpoint, and write its card."""
        self.manifest.recovery = {**(self.manifest.recovery or {}), **record}
        finish_trained(transaction, self.manifest, progress=lambda done, total: progress("verifying", done, total, ""))


Way = Adapters | FullWeights
