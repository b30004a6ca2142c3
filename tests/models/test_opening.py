"""Models where they are opened: wrapped, bidirectional, named twice, or with a configuration that nobody can use."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
)

import tiny
from secateur.core.patterns import Unstructured
from secateur.errors import CheckpointError, ModelStructureError, SecateurError
from secateur.evaluate.perplexity import perplexity
from secateur.files.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import open_model
from secateur.models.shape.causality import sees_later_tokens
from secateur.pruning.engine import prune

TINY_ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ENCODERS = {
    "bert": (BertConfig, BertLMHeadModel),
    "roberta": (RobertaConfig, RobertaForCausalLM),
    "roformer": (RoFormerConfig, RoFormerForCausalLM),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Attention in both directions


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_with_the_head_of_a_decoder_has_no_perplexity(name: str, tmp_path: Path) -> None:
    config, kind = ENCODERS[name]
    kind(config(**TINY_ENCODER)).save_pretrained(tmp_path / "model")
    for model in (tmp_path / "model", kind(config(**TINY_ENCODER))):
        with pytest.raises(ModelStructureError, match="attends in both directions") as caught:
            perplexity(model, tiny.tokens())
        assert kind.__name__ in str(caught.value)
    prune(tmp_path / "model", method=magnitude(), output=tmp_path / "out")
    decoder = kind(config(**TINY_ENCODER, is_decoder=True)).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    with torch.no_grad():
        first, other = (decoder(torch.tensor([[5, second]])).logits[0, 0] for second in (6, 7))
    if torch.equal(first, other):
        assert perplexity(tmp_path / "decoder", tiny.tokens()).nats > 0
    else:  # RoFormer's decoder in transformers 5.10 to 5.14: its mask lets tokens see their successors
        with pytest.raises(ModelStructureError, match="attends in both directions"):
            perplexity(tmp_path / "decoder", tiny.tokens())


def test_attention_in_both_directions_that_says_nothing_of_itself() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY_ENCODER, attn_implementation="eager")).eval()
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda states, *args, forward=forward, **kwargs: forward(
            states, *args, **{**kwargs, "attention_mask": None}
        )
    with pytest.raises(ModelStructureError) as caught:
        perplexity(model, tiny.tokens())
    assert str(caught.value).startswith(
        "model.layers.0: LlamaForCausalLM attends in both directions (the first token's output depends on the second "
        "token), like an encoder."
    )


@tiny.by_turns(tiny.ARCHITECTURES, 1)
def test_a_decoder_does_not_depend_on_what_comes_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure is not just below its limit for decoders: there is no dependence, and a gradient is found."""
    monkeypatch.setattr("secateur.models.shape.causality.LEAK", 0.0)
    checked = []
    monkeypatch.setattr(
        "secateur.models.flow.probe.sees_later_tokens",
        lambda block, *given: checked.append(block.path) or sees_later_tokens(block, *given),
    )
    opened = open_model(tiny.build(name))
    try:
        Stream(opened.skeleton, [tiny.tokens(1, 4)], predicting=True).close()
    except ModelStructureError:  # for another reason: its blocks run several times
        assert name == "hrm_text"
    assert checked


# Wrapped modules


def block_compiled(model: nn.Module) -> nn.Module:
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for index, block in enumerate(layers):
        layers[index] = torch.compile(block)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers: Any = model.model.layers  # type: ignore[union-attr]
    for index, block in enumerate(layers):
        layers[index] = checkpoint_wrapper(block)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,  # type: ignore[dict-item]
    "blocks compiled": block_compiled,
    "compiled in place": compiled_in_place,
    "parallel": nn.DataParallel,
    "compiled and parallel": lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_module_is_pruned_under_its_plain_names(name: str, tmp_path: Path) -> None:
    plain, inner = tiny.build("llama"), tiny.build("llama")
    parameters = dict(inner.named_parameters())
    wrapped = WRAPPERS[name](inner)
    names = [path for path, _ in wrapped.named_modules()]
    how = {"method": wanda(), "pattern": Unstructured(0.5), "calibration": tiny.tokens()}
    prune(plain, **how)  # type: ignore[arg-type]
    prune(wrapped, **how, output=tmp_path / "out")  # type: ignore[arg-type]
    assert [path for path, _ in wrapped.named_modules()] == names
    expected = dict(plain.named_parameters())
    for path, parameter in parameters.items():
        assert torch.equal(parameter, expected[path]), path
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, expected[path]) for path, value in loaded.named_parameters())


def test_modules_that_cannot_be_unwrapped_say_what_to_do() -> None:
    from torch.nn.utils import parametrizations
    from torch.nn.utils import prune as torch_prune

    model = tiny.build("llama")
    projection = model.model.layers[0].mlp.up_proj
    torch_prune.l1_unstructured(projection, "weight", 0.5)
    with pytest.raises(ModelStructureError, match=r'up_proj: holds a mask .*prune\.remove\(module, "weight"\)'):
        perplexity(model, tiny.tokens())
    torch_prune.remove(projection, "weight")
    perplexity(model, tiny.tokens())
    parametrizations.weight_norm(projection)
    with pytest.raises(ModelStructureError, match=r"up_proj: its weights are parametrised .*remove_parametrizations"):
        perplexity(model, tiny.tokens())


def test_a_device_map_with_one_device(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    mapped = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert perplexity(mapped, tiny.tokens()).nats == perplexity(plain, tiny.tokens()).nats


# Names


def test_two_layouts_of_names(llama: Path) -> None:
    tensors = load_file(llama / SINGLE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name.removeprefix("model."): torch.zeros_like(tensors[name])}, llama / SINGLE_FILE)
    with pytest.raises(CheckpointError) as caught:
        open_model(llama)
    assert str(caught.value) == (
        f"{name.removeprefix('model.')} and {name}: both are the parameter {name} of the model, so that one of them "
        "would be lost. The checkpoint holds weights in two layouts of names; remove one of them."
    )


def test_two_layouts_of_experts(tmp_path: Path) -> None:
    folder = tiny.save("mixtral", tmp_path / "model")
    tensors = load_file(folder / SINGLE_FILE)
    name = next(name for name in tensors if "experts.0.w1" in name)
    save_file(tensors | {name.removeprefix("model."): torch.zeros_like(tensors[name])}, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"w1\.weight and model\..*w1\.weight: both are the parameter"):
        open_model(folder)


# Configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers is 1,000,000, and the names of its tensors count to 3 blocks",
        ),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is 1,000,000,000,000,000, and"),
        ({"hidden_size": 10**9}, "hidden_size is 1,000,000,000, and no side of its tensors is longer than 128."),
        ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000, and no side"),
        ({"intermediate_size": 10**7}, "asks for more than"),
        ({"head_dim": 10**7}, "asks for more than"),
    ],
    ids=str,
)
def test_a_configuration_of_a_far_larger_model(changes: dict[str, Any], message: str, llama: Path) -> None:
    configure(llama, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_model(llama)
    assert str(caught.value).startswith(f"{llama}/config.json: {message}")
    assert "The two do not belong together" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bf16"},
        {"num_hidden_layers": 5.0},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"num_attention_heads": 0},
        {"hidden_size": None},
        {"layer_types": ["nonsense"] * 3},
        {"quantization_config": 5},
        {"quantization_config": {"quant_method": []}},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_cannot_use(changes: dict[str, Any], llama: Path) -> None:
    configure(llama, **changes)
    with pytest.raises(SecateurError) as caught:
        perplexity(llama, tiny.tokens())
    assert str(caught.value).startswith((str(llama), "LlamaForCausalLM"))


def test_code_that_needs_a_package_that_is_missing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    configure(llama, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (llama / "c.py").write_text(
        'from transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = "mine"\n'
    )
    (llama / "m.py").write_text(
        "import some_fast_kernels\nfrom transformers import LlamaForCausalLM\nfrom .c import C\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    with pytest.raises(CheckpointError) as caught:
        open_model(llama, trust_remote_code=True)
    assert str(caught.value).startswith(f"{llama}: transformers cannot build its model: ")
    assert "pip install some_fast_kernels" in str(caught.value)


# Whatever else: files that somebody damaged, by accident or on purpose

VALUES: list[Any] = [None, True, -1, 0, 1, 2.5, 1e308, 10**12, -(10**20), "", "x", "../x", [], [[]], {}, {"a": {}}]
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE)


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one thing in it replaced, removed, repeated or added."""
    value = copy.deepcopy(value)
    spots: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        part = pending.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part))
        spots += [(part, key) for key in keys]
        pending += [part[key] for key in keys if isinstance(part[key], dict | list)]
    if not spots or chance.random() < 0.05:
        return chance.choice(VALUES)
    part, key = chance.choice(spots)
    action = chance.randrange(4)
    if action == 0:
        del part[key]
    elif action == 1 and isinstance(part, dict):
        part[chance.choice(["extra", "quantization_config", "text_config", "auto_map"])] = chance.choice(VALUES)
    elif action == 2:
        part[key] = [part[key]]
    else:
        part[key] = chance.choice(VALUES)
    return value


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with some of them changed, cut off, or repeated."""
    place = chance.randrange(max(1, len(data)))
    action = chance.randrange(4)
    if action == 0:
        return data[:place]
    if action == 1:
        return data[:place] + bytes(chance.randrange(256) for _ in range(4)) + data[place + 4 :]
    if action == 2:
        return data[:place] + data[place : place + 50] * 2 + data[place + 50 :]
    return data[:place] + b"[" * 3000 + data[place:]


def damage(folder: Path, chance: random.Random) -> str:
    """Damage one file of a model, and say which and how."""
    name = chance.choice([*FILES, SINGLE_FILE])
    file = folder / name
    if name == SINGLE_FILE:
        file = Checkpoint(folder).files[0]
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(mutated(json.loads(data[8 : 8 + size]), chance)).encode()
        if chance.random() < 0.3:
            header = damaged(data[8 : 8 + size], chance)
        length = len(header) if chance.random() < 0.9 else chance.choice([0, 1, 1 << 30, 1 << 63])
        file.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
    elif chance.random() < 0.3:
        file.write_bytes(damaged(file.read_bytes(), chance))
    else:
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), chance)))
    return name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, in shards."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tiny.save("llama", tmp_path_factory.mktemp("whole") / "model", max_shard_size="60KB")
    vocabulary = Tokenizer(WordLevel({f"w{number}": number for number in range(tiny.VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_damaged_model_is_used_or_refused(seed: int, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    for number in range(30):
        folder = Path(shutil.copytree(whole, tmp_path / "model"))
        what = damage(folder, chance)
        try:
            opened = open_model(folder)
            opened.load_tokenizer()
            perplexity(opened, tiny.tokens(1, 8))  # type: ignore[arg-type]
            prune(folder, method=magnitude(), output=tmp_path / "out")
        except SecateurError:
            pass
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {what}") from error
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
