"""Adapters: which matrices get one, how they are saved, and the record beside them that says what they belong to."""

import json
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from msgspec import Meta
from torch import Tensor, nn

from secateur.errors import CheckpointError, PatternError
from secateur.files.checkpoint import read_header, read_tensor
from secateur.files.reading import check_inside, checked, digest_of, read_json
from secateur.files.redaction import redacted
from secateur.files.writer import writing
from secateur.models.opening.configuration import reason
from secateur.models.shape.matrices import matrix_kind
from secateur.plans.plan import matches
from secateur.record.manifest import Manifest
from secateur.record.manifest_schema import BaseEntry
from secateur.recover.masks import matrix_parameters
from secateur.runs.output import ADAPTER_RECORD

CONFIGURATION = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor in an adapter that peft saved


_WITHOUT = "Remove it to merge the adapter without a record."


class _Data(TypedDict):
    name: str | None
    digest: str


class _HeldOut(TypedDict):
    samples: Annotated[int, Meta(ge=1)]
    length: Annotated[int, Meta(ge=1)]
    digest: str


class Record(TypedDict):
    """What is read of an adapter's record, and of an unfinished recovery."""

    method: str
    base: BaseEntry
    data: _Data
    held_out: _HeldOut


def require_peft(what: str) -> None:
    """Raise `CheckpointError` that says how to install peft where it is missing."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f'{what} needs peft, which is not installed. Run: pip install "secateur[recover]"'
        ) from None


def find_targets(model: nn.Module, asked: Sequence[str] = ()) -> list[str]:
    """The modules that get an adapter, as peft wants them: the last parts of names where they suffice, else full names.

    `asked` are names, last parts of names or globs, or "all-linear" for every prunable matrix; without any, peft's own
    choice for the architecture (q and v projections of most).

    Raises `PatternError` that lists the matrices there are when one matches nothing, or peft has no choice.
    """
    modules = adaptable(model)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if asked:
        globs = list(asked)
    else:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        known = KNOWN.get(kind, [])
        globs = [known] if isinstance(known, str) else list(known)
    chosen: list[str] = []
    for glob in globs:
        found = [
            name for name in modules if glob in ("all-linear", name) or name.endswith(f".{glob}") or matches(name, glob)
        ]
        if not found and asked:
            raise PatternError(f'--targets "{glob}" matches none of the matrices. {_choice(modules)}')
        chosen += [name for name in found if name not in chosen]
    if not chosen:
        raise PatternError(f'peft has no usual choice of matrices for "{kind}". {_choice(modules)}')
    leaves = {name.rpartition(".")[2] for name in chosen}
    everywhere = [name for name, module in model.named_modules() if name.rpartition(".")[2] in leaves]
    return sorted(leaves) if sorted(everywhere) == sorted(chosen) else sorted(chosen)


def adaptable(model: nn.Module) -> list[str]:
    """Names of the modules of prunable matrices that peft can wrap: layers, and not fused stacks of experts."""
    return [
        name.removesuffix(".weight")
        for name, (parameter, _) in matrix_parameters(model).items()
        if name.endswith(".weight") and parameter.dim() == 2
    ]


def _choice(modules: Sequence[str]) -> str:
    counts = Counter(map(matrix_kind, modules))
    kinds = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    return f"Choose with --targets, by the last part of a name, a glob or all-linear: {kinds or 'there are none'}."


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk: its configuration, its tensors by module, and our record, where there is one."""

    folder: Path
    config: Any
    modules: Mapping[str, Mapping[str, Tensor]]  # module -> name within the module -> tensor
    record: Mapping[str, Any] | None

    @property
    def masked(self) -> bool:
        """Whether it was trained with its product masked, and means nothing without the mask."""
        return self.record is not None and self.record["method"] == "sparse-lora"


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """The LoRA adapter in a folder, as peft saved it. Raises `CheckpointError` when it is none, or of another kind."""
    from peft import LoraConfig, PeftConfig

    path = Path(folder)
    if not (path / CONFIGURATION).exists():
        raise CheckpointError(
            f"{path}: no {CONFIGURATION} in it, so it is no adapter. Give the folder that peft saved."
        )
    for name in (CONFIGURATION, WEIGHTS, ADAPTER_RECORD):
        check_inside(path / name, path)
    for key in read_json(path / CONFIGURATION, dict[str, Any]):
        if not key.isprintable():  # peft warns of keys that it does not know, in the terminal
            raise CheckpointError(f"{path / CONFIGURATION}: the key {key!a} has characters that nobody can see.")
    tensors = {name: read_tensor(record) for name, record in read_header(path / WEIGHTS).tensors.items()}
    try:
        config = PeftConfig.from_pretrained(str(path))
    except Exception as error:  # whatever a class of peft's own raises for an entry of another kind than it expects
        raise CheckpointError(f"{path}/{CONFIGURATION}: peft cannot use it: {reason(error)}") from None
    if not isinstance(config, LoraConfig):
        raise CheckpointError(
            f"{path}: a {config.peft_type} adapter; only LoRA adapters are merged. Use peft for others."
        )
    initial = config.init_lora_weights
    if isinstance(initial, str) and initial not in ("gaussian", "orthogonal", "eva"):
        raise CheckpointError(
            f"{path}: init_lora_weights={initial} changes the base model's weights when it is loaded. Save it with "
            "peft's conversion to plain LoRA (path_initial_model_for_weight_conversion) and merge that."
        )
    _check_ranks(path, config, tensors)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, mark, leaf = name.removeprefix(PREFIX).rpartition(".lora_")
        if not mark or leaf.startswith("embedding") or leaf.endswith("bias"):
            raise CheckpointError(
                f"{path}: holds {name}, which is not a low-rank product of a matrix. Only such products can be merged "
                "one tensor at a time; use peft's merge_and_unload() for the whole model."
            )
        modules.setdefault(module, {})[f"lora_{leaf}"] = tensor
    return Adapter(path, config, modules, _record(path))


def _check_ranks(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for a rank that no tensor has: peft would make room for it before it compares."""
    widest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= widest:
            raise CheckpointError(
                f"{folder}/{CONFIGURATION}: names the rank {rank}, expected a number from 1 to {widest}, the longest "
                f"side of the tensors in {WEIGHTS}. The two do not belong together."
            )


def merged_weight(adapter: Adapter, module: str, weight: Tensor, kind: type[nn.Module]) -> Tensor:
    """The weight of a module, laid out as it is stored, merged with its adapter by peft, in float32.

    `kind` is the class of the module, `nn.Linear` or transformers' `Conv1D`. Raises `CheckpointError` for shapes that
    do not fit.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from transformers.pytorch_utils import Conv1D

    rows, columns = weight.shape
    make: Any = Conv1D if issubclass(kind, Conv1D) else nn.Linear
    with torch.device("meta"):
        root: nn.Module = make(columns, rows)
    root.weight = nn.Parameter(weight.float(), requires_grad=False)
    root.register_parameter("bias", None)
    # The layer stands alone under its own name, so that peft's rules by name find it as they would in the model.
    for part in reversed(module.split(".")):
        inner, root = root, nn.Module()
        root.add_module(part, inner)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that name other modules
            inject_adapter_in_model(adapter.config, root)
        tensors = {f"{module}.{name}": tensor for name, tensor in adapter.modules[module].items()}
        result: Any = set_peft_model_state_dict(root, tensors)
        if result.unexpected_keys:
            raise ValueError(f"unexpected tensors {', '.join(result.unexpected_keys)}")
        wrapped: Any = root.get_submodule(module)
        wrapped.merge(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{module}: the adapter {adapter.folder} does not fit the base's weight of shape {tuple(weight.shape)}: "
            f"{' '.join(str(error).split())} Is it for another model?"
        ) from None
    merged: Tensor = wrapped.get_base_layer().weight.detach()
    return merged


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of an adapter, with a digest over it, and a README beside it."""
    value = {"format": 1, **redacted(dict(record))}
    text = json.dumps({**value, "digest": digest_of(value)}, indent=1) + "\n"
    with writing(folder):
        (folder / ADAPTER_RECORD).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_readme(value), encoding="utf-8")


def _record(folder: Path) -> dict[str, Any] | None:
    file = folder / ADAPTER_RECORD
    if not file.exists():
        return None
    value: dict[str, Any] = read_json(file, dict[str, Any], advice=_WITHOUT)
    found = value.pop("digest", None)
    if found != digest_of(value):
        raise CheckpointError(f"{file}: altered since it was written. {_WITHOUT}")
    checked(value, file, Record, advice=_WITHOUT)
    return value


def check_base(adapter: Adapter, manifest: Manifest, base: Path) -> list[str]:
    """Notes on whether an adapter belongs to a base: one where it has no record, so that nothing proves it.

    Raises `CheckpointError` when its record says that it was trained on another checkpoint.
    """
    if adapter.record is None:
        named = adapter.config.base_model_name_or_path
        if not named or Path(named).resolve() == base.resolve():
            return []
        return [f"The adapter says that it was trained on {named}, and nothing proves that {base} is the same model."]
    trained_on = adapter.record["base"]
    if trained_on["digest"] not in (manifest.digest, manifest.published_from):
        raise CheckpointError(
            f"{adapter.folder}: trained on {trained_on['path']} (digest {trained_on['digest'][:12]}), and {base} is "
            f"another checkpoint (digest {manifest.digest[:12]}). Give the one that it was trained on as --base."
        )
    return []


def _readme(record: Mapping[str, Any]) -> str:
    before, after = (record["perplexity"][key] for key in ("before", "after"))
    held, text = record["held_out"], record["data"]["name"] or "token ids"
    masked = record["method"] == "sparse-lora"
    if masked:
        use = (
            "The product of this adapter was masked while it was trained: weights that are zero in the base stay zero. "
            "**Loading it with plain peft, vLLM or any other tool adds the product without the mask, which is another "
            "model.** Merge it first; that is exact:\n"
        )
    else:
        use = (
            "Load it with `peft.PeftModel.from_pretrained`, vLLM or anything else that reads LoRA adapters. Merging it "
            "with `merge_and_unload` fills the zeros of the base. To keep them:\n"
        )
    return (
        f"---\nbase_model: {record['base']['path']}\nlibrary_name: peft\ntags:\n- lora\n- secateur\n---\n\n"
        f"# Adapter for a pruned model\n\nTrained with `secateur recover --method {record['method']}` for "
        f"{record['steps']} steps on {text}. Perplexity on {held['samples']} held-out windows of {held['length']} "
        f"tokens: {before:.3f} before, {after:.3f} after.\n\n{use}\n"
        f"```\nsecateur merge ADAPTER --base {shlex.quote(str(record['base']['path']))} -o MERGED --mask keep\n```\n\n"
        f"`{ADAPTER_RECORD}` says how it was made.\n"
    )
