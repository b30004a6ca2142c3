"""Merging adapters: as peft does it, with the zeros of the base; what is promised afterwards; what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.errors import CheckpointError, PatternError
from secateur.files.checkpoint import Checkpoint, tensor_digest
from secateur.models.opening.opened import open_source
from secateur.record.manifest import read_manifest
from secateur.recover.adapters import find_targets
from secateur.recover.masked_lora import MaskedLinear, masked

IDS = tiny.tokens()
DOWN = "model.layers.0.mlp.down_proj.weight"


def pruned(root: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny.build(name, dtype=dtype).save_pretrained(root / "dense", max_shard_size="60KB")
    settings = {"method": secateur.magnitude(), "pattern": secateur.NM(2, 4), "output": root / "pruned"}
    secateur.prune(root / "dense", **settings | options)
    return root / "pruned"


def with_adapter(base: Path, config: LoraConfig, scale: float = 0.1) -> Any:
    """The base with a random adapter that does something."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def adapter(root: Path, base: Path, **options: Any) -> tuple[Path, Any]:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = with_adapter(base, LoraConfig(**settings | options))
    model.save_pretrained(root / "adapter")
    return root / "adapter", model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


# What is written


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama_tied", {"target_modules": ["up_proj", "down_proj"]}),
        ("llama", {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
        ("llama", {"use_dora": True}),
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"target_modules": r".*\.0\..*(q_proj|gate_proj)"}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("mixtral", {}),
    ],
    ids=[
        "q and v",
        "tied",
        "rank-stabilised",
        "DoRA",
        "one layer",
        "regular expression",
        "transposed",
        "experts beside",
    ],
)
def test_weights_are_those_of_peft_behind_the_mask(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    base = pruned(tmp_path, name)
    folder, model = adapter(tmp_path, base, **options)
    unmerged = logits(model)
    result = secateur.merge(folder, base, tmp_path / "kept", data=IDS)
    dropped = secateur.merge(folder, base, tmp_path / "dropped", mask="drop", evaluate=False)
    before, kept, dense = tensors(base), tensors(tmp_path / "kept"), tensors(tmp_path / "dropped")
    expected = model.merge_and_unload().state_dict()
    changed = [name for name in before if not torch.equal(before[name], dense[name])]
    assert len(changed) == result.tensors == dropped.tensors > 0
    for tensor, value in dense.items():
        if tensor in expected:  # stacks of experts have other names in memory
            torch.testing.assert_close(value, expected[tensor], rtol=1e-6, atol=1e-7)
    for tensor, value in kept.items():
        where = before[tensor] != 0
        if tensor in changed:
            assert torch.equal(value, torch.where(where, dense[tensor], 0))
        else:
            assert value.numpy().tobytes() == before[tensor].numpy().tobytes()
    # Whoever loads the merged checkpoint has the model that had been trained.
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")), unmerged, rtol=1e-4, atol=1e-5
    )
    assert result.unmerged is not None
    assert secateur.perplexity(tmp_path / "dropped", IDS).nats == pytest.approx(result.unmerged.nats, abs=1e-6)


def test_the_zeros_are_exactly_those_of_the_base(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base, target_modules="all-linear")
    result = secateur.merge(folder, base, tmp_path / "merged", data=IDS)
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert all(torch.equal(before[name] == 0, value == 0) for name, value in after.items())
    assert (
        result.zeros == result.zeros_before == sum(int((before[name] == 0).sum()) for name in read_manifest(base).plan)
    )
    assert {matrix.pattern for matrix in secateur.inspect(tmp_path / "merged").matrices} == {"2:4"}
    # An ordinary checkpoint in the same shards, with the same companions.
    files = {path.name for path in base.iterdir()}
    assert files == {path.name for path in (tmp_path / "merged").iterdir()}
    assert len(list(base.glob("*.safetensors"))) > 1
    assert Checkpoint(base).layout() == Checkpoint(tmp_path / "merged").layout()


def test_the_merged_checkpoint_is_verified(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base)
    secateur.merge(folder, base, tmp_path / "merged", evaluate=False)
    for source in (None, tmp_path / "dense", base):
        found = secateur.verify(tmp_path / "merged", None if source is None else open_source(str(source)))
        assert (found.problems, found.notes, found.sparsity) == ([], [], 0.5)
    other = tiny.save("gemma", tmp_path / "other")
    assert not secateur.verify(tmp_path / "merged", open_source(str(other))).ok
    manifest = read_manifest(tmp_path / "merged")
    assert manifest.recovery is not None
    assert manifest.recovery["base"]["digest"] == read_manifest(base).digest
    assert len(manifest.recovery["trained"]) == len(manifest.recovery["masks"]) == 6
    # Merged once more, on what was merged.
    again, _ = adapter(tmp_path / "second", tmp_path / "merged", target_modules=["q_proj", "o_proj"])
    secateur.merge(again, tmp_path / "merged", tmp_path / "twice", evaluate=False)
    for source in (None, tmp_path / "dense", tmp_path / "merged", base):
        found = secateur.verify(tmp_path / "twice", None if source is None else open_source(str(source)))
        # Tensors that only the first merge trained are those of "merged", and not of the base.
        assert found.problems == []


@pytest.mark.parametrize("where", ["trained", "untouched", "moved"])
def test_verify_finds_what_was_changed_afterwards(tmp_path: Path, where: str) -> None:
    base = pruned(tmp_path, output=tmp_path / "pruned")
    folder, _ = adapter(tmp_path, base)
    secateur.merge(folder, base, tmp_path / "merged", evaluate=False)
    name = {"untouched": DOWN}.get(where, "model.layers.0.self_attn.q_proj.weight")
    record = Checkpoint(tmp_path / "merged").tensors[name]
    shard = load_file(record.file)
    if where == "moved":
        # The same counts in another place, and a manifest that has the new bytes: only the mask's digest tells.
        shard[name] = shard[name].roll(4, dims=1).contiguous()
        save_file(shard, record.file, {"format": "pt"})
        manifest = read_manifest(tmp_path / "merged")
        checkpoint = Checkpoint(tmp_path / "merged")
        manifest.headers = {file.name: header.digest for file, header in checkpoint.headers.items()}
        manifest.tensors[name] = tensor_digest(shard[name])
        manifest.write(tmp_path / "merged")
        (problem,) = secateur.verify(tmp_path / "merged").problems
        assert problem == f"{name}: its zeros are not where they were before training"
        return
    shard[name][shard[name] == 0] = 1e-8
    save_file(shard, record.file, {"format": "pt"})
    problems = secateur.verify(tmp_path / "merged").problems
    assert f"{name}: its bytes differ from those that were written" in problems
    assert any(problem.startswith(f"{name}: row 0, columns 0 to 3: 4 non-zeros") for problem in problems)


def test_dropping_the_mask_drops_the_promise(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base, target_modules="all-linear")
    partial, _ = adapter(tmp_path / "partial", base)
    secateur.merge(folder, base, tmp_path / "merged", mask="drop", evaluate=False)
    result = secateur.merge(partial, base, tmp_path / "half", mask="drop", evaluate=False)
    assert result.to_json()["sparsity"] < result.to_json()["sparsity_before"] == 0.5
    found = secateur.verify(tmp_path / "merged")
    assert found.ok  # it is what was written
    assert (found.matrices, found.sparsity) == (0, 0.0)
    assert found.notes == [
        "21 matrices were merged with an adapter without their masks: no pattern is promised for them. Their sparsity "
        "was 0.5000 and is 0.0000."
    ]
    rest = secateur.verify(tmp_path / "half", open_source(str(base)))
    assert (rest.problems, rest.matrices, rest.sparsity) == ([], 15, 0.5)
    assert rest.notes == result.notes
    assert secateur.inspect(tmp_path / "half").sparsity < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_every_kept_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    base = pruned(tmp_path, dtype=dtype)
    model = with_adapter(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    # Make the product cancel one kept weight exactly, and leave another too small for the dtype.
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = tensors(base)[name].float()
    row = int((weight != 0).any(dim=1).nonzero()[0])
    columns = weight[row].nonzero().squeeze(1)[:2]
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        down.zero_(), up.zero_()
        down[0, columns[0]] = -weight[row, columns[0]] / layer.scaling["default"]
        down[0, columns[1]] = (-weight[row, columns[1]] - 1e-42) / layer.scaling["default"]
        up[row, 0] = 1.0
    model.save_pretrained(tmp_path / "adapter")
    result = secateur.merge(tmp_path / "adapter", base, tmp_path / "merged", evaluate=False)
    assert result.nudged == 2
    merged = tensors(tmp_path / "merged")[name]
    assert merged.dtype == dtype
    assert torch.equal(merged == 0, weight == 0)
    assert 0 < float(merged[row, columns].abs().max()) < 1e-7
    assert secateur.verify(tmp_path / "merged").ok


def test_the_cost_is_measured_on_the_text_asked_for(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, model = adapter(tmp_path, base)
    result = secateur.merge(folder, base, tmp_path / "merged", data=tiny.tokens(samples=8), windows=6)
    assert result.base is not None
    assert result.unmerged is not None
    assert result.merged is not None
    ids = tiny.tokens(samples=8)[:6]
    for found, other in (
        (result.base, AutoModelForCausalLM.from_pretrained(base)),
        (result.unmerged, model),
        (result.merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
    ):
        with torch.no_grad():
            assert found.nats == pytest.approx(float(other(input_ids=ids, labels=ids).loss), abs=1e-5)
    recovery = json.loads((tmp_path / "merged" / "secateur.json").read_text())["recovery"]
    assert recovery["perplexity"]["merged"] == result.merged.perplexity


def test_an_adapter_without_a_record_that_names_another_base(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base)
    other = shutil.copytree(base, tmp_path / "other")
    assert secateur.merge(folder, base, tmp_path / "merged", evaluate=False).notes == []
    assert secateur.merge(folder, other, tmp_path / "elsewhere", evaluate=False).notes == [
        f"The adapter says that it was trained on {base}, and nothing proves that {other} is the same model."
    ]


# Adapters that are masked


def masked_adapter(root: Path, base: Path, **options: Any) -> tuple[Path, Any]:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = with_adapter(base, masked(LoraConfig(**settings | options)))
    model.save_pretrained(root / "masked")
    return root / "masked", model


@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn", "c_fc"])])
def test_merging_a_masked_adapter_is_exact(tmp_path: Path, name: str, targets: Any) -> None:
    base = pruned(tmp_path, name)
    folder, model = masked_adapter(tmp_path, base, target_modules=targets, fan_in_fan_out=name == "gpt2")
    assert any(isinstance(module, MaskedLinear) for module in model.modules())
    unmerged = logits(model)
    secateur.merge(folder, base, tmp_path / "merged", evaluate=False)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)  # float32: rounding alone
    # peft's own way gives the same weights, because the layer says what its product is.
    torch.testing.assert_close(logits(model.merge_and_unload()), unmerged, rtol=1e-5, atol=1e-5)
    # Without the mask it is another model.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert not any(isinstance(module, MaskedLinear) for module in plain.modules())
    assert (logits(plain) - unmerged).abs().max() > 0.1
    # With it, it is the one that was saved.
    config = masked(LoraConfig.from_pretrained(folder))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, config=config)
    assert torch.equal(logits(again), unmerged)


def test_a_masked_layer_learns_under_its_mask(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    _, model = masked_adapter(tmp_path, base)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    removed = layer.base_layer.weight == 0
    # Autograd of the formula itself.
    down, up = (
        value.weight.detach().clone().requires_grad_() for value in (layer.lora_A["default"], layer.lora_B["default"])
    )
    weight = layer.base_layer.weight.detach() + layer.scaling["default"] * (up @ down) * ~removed
    expected = x @ weight.t()
    expected.square().sum().backward()
    found = layer(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, down.grad)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, up.grad)
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), layer.base_layer(x))


# Targets


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("llama", [], ["q_proj", "v_proj"]),
        ("gpt2", [], ["c_attn"]),
        ("opt", [], ["q_proj", "v_proj"]),
        ("bloom", [], ["query_key_value"]),
        ("llama", ["o_proj"], ["o_proj"]),
        ("llama", ["*.1.mlp.*"], [f"model.layers.1.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")]),
        ("llama", ["*.q_proj", "*.k_proj"], ["k_proj", "q_proj"]),
        ("phi3", ["all-linear"], ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ],
)
def test_targets(name: str, asked: list[str], expected: list[str]) -> None:
    model = tiny.build(name)
    found = find_targets(model, asked)
    assert found == expected
    config = LoraConfig(r=1, target_modules=found, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    wrapped = {name for name, module in get_peft_model(model, config).named_modules() if hasattr(module, "lora_A")}
    assert all(any(name.endswith(target) for target in found) for name in wrapped)
    assert wrapped


def test_targets_that_are_not_there() -> None:
    kinds = "model.layers.*.self_attn.o_proj (3), model.layers.*.self_attn.qkv_proj (3)"
    with pytest.raises(
        PatternError, match=re.escape('peft has no usual choice of matrices for "phi3". Choose with --targets')
    ):
        find_targets(tiny.build("phi3"))
    with pytest.raises(PatternError, match=re.escape(kinds)):
        find_targets(tiny.build("phi3"), ["q_proj"])


# What is refused


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base)

    def refused(message: str, adapter: Path = folder, kind: type[Exception] = CheckpointError, **options: Any) -> None:
        with pytest.raises(kind, match=re.escape(message)):
            secateur.merge(adapter, options.pop("base", base), tmp_path / "out", **{"evaluate": False} | options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob("out*"))

    refused('--mask: got "both", expected keep or drop.', kind=PatternError, mask="both")
    refused("no adapter_config.json in it, so it is no adapter", base)
    refused("no secateur.json in it; only checkpoints that Secateur wrote have one.", base=tmp_path / "dense")
    other = pruned(tmp_path / "other", "qwen2")
    small, _ = adapter(
        tmp_path / "small", pruned(tmp_path / "small", "gpt2"), target_modules=["c_attn"], fan_in_fan_out=True
    )
    refused("transformer.h.0.attn.c_attn: has an adapter in", small)
    fits = secateur.merge(folder, other, tmp_path / "fits", evaluate=False)  # nothing says that it belongs elsewhere
    assert fits.tensors == 6
    shaped = Path(shutil.copytree(folder, tmp_path / "shaped"))
    values = load_file(shaped / "adapter_model.safetensors")
    save_file(
        {name: value[..., :16].contiguous() for name, value in values.items()}, shaped / "adapter_model.safetensors"
    )
    refused("does not fit the base's weight of shape (32, 32)", shaped)
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    refused("adapter_model.safetensors: cut short: the file has 7 bytes", damaged)
    heads, _ = adapter(tmp_path / "heads", base, modules_to_save=["lm_head"])
    refused("lm_head.weight, which is not a low-rank product", heads)
    tied = pruned(tmp_path / "tied", "llama_tied")
    head, _ = adapter(tmp_path / "tied", tied, target_modules=["lm_head"])
    refused("lm_head.base_layer.weight, which is not a low-rank product", head, base=tied)
    values = load_file(head / "adapter_model.safetensors")
    values = {name: value for name, value in values.items() if "base_layer" not in name}
    save_file(values, head / "adapter_model.safetensors")
    refused("lm_head: its weight is not a tensor of its own", head, base=tied)
    pissa, _ = adapter(tmp_path / "pissa", base, init_lora_weights="pissa")
    refused("init_lora_weights=pissa changes the base model's weights", pissa)


def test_a_base_that_was_changed(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    folder, _ = adapter(tmp_path, base)
    record = Checkpoint(base).tensors[DOWN]
    shard = load_file(record.file)
    shard[DOWN][0, 0] += 1
    save_file(shard, record.file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=re.escape(f"{DOWN}: its bytes in {base} differ from those that were written.")
    ):
        secateur.merge(folder, base, tmp_path / "out", evaluate=False)
    assert not list(tmp_path.glob("out*"))
