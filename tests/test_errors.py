"""Every mistake and every accident ends in one sentence that says where, what, and what to do, and leaves no trace."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import tiny
from secateur import errors
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm
from secateur.errors import (
    CalibrationError,
    CheckpointError,
    MethodError,
    ModelStructureError,
    NumericalError,
    PatternError,
    SecateurError,
)
from secateur.files.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.plans.plan import Plan
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME
from secateur.record.verify import verify
from test_checkpoint import file_size_limit, small_disk, unprivileged

FIRST = "model.layers.0.mlp.down_proj.weight"  # the first matrix of the plan, and the first to be solved


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models on disk: `single` in one file, `sharded`, and `mixtral`."""
    root = tmp_path_factory.mktemp("models")
    tiny.save("llama", root / "single")
    tiny.save("llama", root / "sharded", max_shard_size="40KB")
    tiny.save("mixtral", root / "mixtral")
    return root


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A model of the test's own, in one file."""
    return Path(shutil.copytree(models / "single", tmp_path / "model"))


@pytest.fixture
def sharded(models: Path, tmp_path: Path) -> Path:
    """A model of the test's own, in several shards."""
    return Path(shutil.copytree(models / "sharded", tmp_path / "model"))


def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
    """Everything under a folder: {path: (mode, time of the last change, sha256)}."""
    files = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        readable = path.is_file() and os.access(path, os.R_OK)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if readable else ""
        files[str(path.relative_to(root))] = (facts.st_mode, facts.st_mtime_ns if path.is_file() else 0, digest)
    return files


Refused = Callable[..., None]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """`refused(kind, message, model, **changes)`: prune must raise just that, and leave every file as it was.

    `within` is a context for the call of prune alone.
    """

    def check(
        kind: type[SecateurError],
        message: str | re.Pattern[str],
        model: Any,
        *,
        within: contextlib.AbstractContextManager[None] | None = None,
        **changes: Any,
    ) -> None:
        arguments = {"method": wanda(), "calibration": tiny.tokens(), "output": tmp_path / "out"} | changes
        before = snapshot(tmp_path)
        assert before or not isinstance(model, Path)
        with within or contextlib.nullcontext(), pytest.raises(SecateurError) as caught:
            prune(model, **arguments)
        text = str(caught.value)
        assert type(caught.value) is kind
        if isinstance(message, str):
            assert text == message
        else:
            assert message.fullmatch(text), text
        assert snapshot(tmp_path) == before

    return check


def edit(folder: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    """Change one tensor of a single-file model."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors[name])
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# The tree


def test_the_tree_is_as_drawn() -> None:
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r" [├└]─ (\w+) \((\w+)\)", line):
            kind, builtin = match.groups()
            assert issubclass(getattr(errors, kind), (SecateurError, __builtins__[builtin]))
            assert issubclass(getattr(errors, kind), __builtins__[builtin])


# Patterns and plans


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, "sparsity must be at least 0 and below 1, got 1."),
        (-0.1, "sparsity must be at least 0 and below 1, got -0.1."),
        (50, "sparsity must be at least 0 and below 1, got 50. Did you mean 0.5?"),
        (float("nan"), "sparsity must be at least 0 and below 1, got nan."),
        (float("inf"), "sparsity must be at least 0 and below 1, got inf."),
    ],
)
def test_sparsity_out_of_range(sparsity: float, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        Unstructured(sparsity)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (4, 2, "N:M keeps N of every M weights, so 1 <= N <= M; got 4:2. Did you mean 2:4?"),
        (0, 4, "N:M keeps N of every M weights, so 1 <= N <= M; got 0:4."),
        (-2, 4, "N:M keeps N of every M weights, so 1 <= N <= M; got -2:4."),
        (2, 0, "N:M keeps N of every M weights, so 1 <= N <= M; got 2:0."),
    ],
)
def test_n_of_m_out_of_range(n: int, m: int, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        NM(n, m)
    assert str(caught.value) == message


def test_a_width_that_does_not_divide(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        f"{FIRST}: 2:5 needs in_features divisible by 5, got 48. "
        f'Skip it with --skip "{FIRST}" or choose an unstructured pattern.',
        model,
        pattern=NM(2, 5),
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    refused(
        PatternError,
        f"{name}: 3:48 needs in_features divisible by 48, got 32. "
        f'Skip it with --skip "{name}" or choose an unstructured pattern.',
        model,
        pattern=NM(3, 48),
    )


def test_globs_that_match_nothing(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        '--skip "*.up_pro" matches none of 21 matrices. Did you mean "*.up_proj"?',
        model,
        skip=["*.up_pro"],
    )
    refused(
        PatternError,
        '--only "lm_head" matches none of 21 matrices. They have names such as "model.layers.0.mlp.down_proj.weight".',
        model,
        only=["*.up_proj", "lm_head"],
    )


def test_nothing_left_to_prune(model: Path, refused: Refused) -> None:
    message = "nothing is left to prune: --only and --skip leave none of 21 matrices."
    refused(PatternError, message, model, skip=["*"])
    refused(PatternError, message, model, only=["*.up_proj"], skip=["*.mlp.*"])
    refused(
        PatternError, "the plan is empty: it names no matrix, so nothing is left to prune.", model, pattern=Plan({})
    )


def test_plans_that_do_not_fit(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        f'{FIRST}x: no prunable matrix of this name in the model. Did you mean "{FIRST}"?',
        model,
        pattern=Plan({FIRST + "x": NM(2, 4)}),
    )
    refused(
        PatternError,
        "a whole plan already says which matrices to prune; leave out only and skip.",
        model,
        pattern=Plan({FIRST: NM(2, 4)}),
        skip=["*.q_proj"],
    )


def test_propagate_is_spelled_wrong(model: Path, refused: Refused) -> None:
    refused(PatternError, '--propagate: got "prunned", expected pruned or dense.', model, propagate="prunned")


# Damaged checkpoints


def test_garbage_in_the_place_of_a_header(model: Path, refused: Refused) -> None:
    file = model / SINGLE_FILE
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"\xff" * 100 + data[108:])
    refused(
        CheckpointError,
        re.compile(
            re.escape(f"{file}: the safetensors header: not JSON ('utf-8' codec can't decode")
            + r".*\)\. Download it again\."
        ),
        model,
    )
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(
        CheckpointError,
        f"{file}: not a safetensors file, or cut short: the header claims {struct.unpack('<Q', b'version ')[0]} bytes, "
        "the file has 56. Download or copy it again.",
        model,
    )


def test_a_truncated_shard(sharded: Path, refused: Refused) -> None:
    file = Checkpoint(sharded).files[1]
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    refused(
        CheckpointError,
        f"{file}: truncated or damaged: the header describes {size} bytes, the file has {size - 1000}. "
        "Download or copy it again.",
        sharded,
    )


@pytest.mark.parametrize("size", [0, 5, 7])
def test_a_shard_shorter_than_its_first_number(size: int, sharded: Path, refused: Refused) -> None:
    file = Checkpoint(sharded).files[-1]
    os.truncate(file, size)
    refused(
        CheckpointError,
        f"{file}: cut short: the file has {size} bytes, and the length of a safetensors header alone takes 8. "
        "Download or copy it again.",
        sharded,
    )


def test_a_missing_shard(sharded: Path, refused: Refused) -> None:
    files = Checkpoint(sharded).files
    files[2].unlink()
    refused(
        CheckpointError,
        f"{files[2]}: the shard is missing, and {INDEX_FILE} lists it ({len(files)} shards expected). "
        "Download the checkpoint again.",
        sharded,
    )


def test_an_index_that_names_an_absent_tensor(sharded: Path, refused: Refused) -> None:
    index = sharded / INDEX_FILE
    value = json.loads(index.read_text())
    file = value["weight_map"][FIRST]
    value["weight_map"]["absent"] = file
    index.write_text(json.dumps(value))
    refused(
        CheckpointError,
        f"{index}: lists the tensor absent in {file}, which does not hold it. "
        "Index and shards do not belong together; download the checkpoint again.",
        sharded,
    )


def test_an_index_that_is_not_json(sharded: Path, refused: Refused) -> None:
    (sharded / INDEX_FILE).write_text("<html>404</html>")
    refused(
        CheckpointError,
        f"{sharded / INDEX_FILE}: not JSON (Expecting value: line 1 column 1 (char 0)). Download it again.",
        sharded,
    )
    (sharded / INDEX_FILE).write_text("[]")
    refused(
        CheckpointError,
        f"{sharded / INDEX_FILE}: damaged, or not what its name says: Expected `object`, got `array`. "
        "Download it again.",
        sharded,
    )


@pytest.mark.parametrize("method", [wanda, magnitude])
@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.o_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
)
def test_a_parameter_without_a_tensor(name: str, method: Callable[[], Method], model: Path, refused: Refused) -> None:
    tensors = load_file(model / SINGLE_FILE)
    del tensors[name]
    save_file(tensors, model / SINGLE_FILE)
    refused(
        CheckpointError,
        f"{model}: no tensor for the parameter {name} of LlamaForCausalLM. "
        "Is the checkpoint complete, and does its config.json belong to it?",
        model,
        method=method(),
    )


def test_a_block_too_many_in_the_configuration(model: Path, refused: Refused) -> None:
    configure(model, num_hidden_layers=4)
    refused(
        CheckpointError,
        f"{model}: no tensor for the parameter model.layers.3.self_attn.q_proj.weight (and 8 more) of "
        "LlamaForCausalLM. Is the checkpoint complete, and does its config.json belong to it?",
        model,
    )


@pytest.mark.parametrize("method", [wanda, magnitude])
def test_shapes_that_do_not_fit_the_configuration(method: Callable[[], Method], model: Path, refused: Refused) -> None:
    configure(model, intermediate_size=64)
    refused(
        CheckpointError,
        f"{model}: {FIRST} is of shape (32, 48), and config.json asks for (32, 64). "
        "The two do not belong together; download the checkpoint again.",
        model,
        method=method(),
    )


def test_a_vocabulary_that_does_not_fit_the_configuration(model: Path, refused: Refused) -> None:
    configure(model, vocab_size=256)
    refused(
        CheckpointError,
        f"{model}: lm_head.weight is of shape (128, 32), and config.json asks for (256, 32). "
        "The two do not belong together; download the checkpoint again.",
        model,
    )


# What is not a checkpoint that can be pruned


def test_no_configuration(model: Path, refused: Refused) -> None:
    (model / "config.json").unlink()
    refused(CheckpointError, f"{model}: no config.json in it. Give the folder of a whole checkpoint.", model)


def test_a_configuration_that_is_not_json(model: Path, refused: Refused) -> None:
    (model / "config.json").write_text("{")
    refused(
        CheckpointError, re.compile(re.escape(f"{model}/config.json: not JSON (Expecting property name") + ".+"), model
    )


def test_an_unknown_architecture(model: Path, refused: Refused) -> None:
    configure(model, model_type="nonsense")
    refused(
        CheckpointError,
        re.compile(re.escape(f"{model}/config.json: transformers cannot use it: ") + ".*nonsense.*", re.DOTALL),
        model,
    )


def test_a_folder_without_weights(model: Path, refused: Refused) -> None:
    (model / SINGLE_FILE).unlink()
    refused(
        CheckpointError,
        f"{model}: no {SINGLE_FILE} and no {INDEX_FILE} in it. Give a folder that save_pretrained wrote, a hub id, "
        "or a GGUF file.",
        model,
    )


def test_a_file_in_the_place_of_a_folder(model: Path, refused: Refused) -> None:
    file = model / SINGLE_FILE
    refused(CheckpointError, f"{file}: give the folder of the checkpoint, not one of its files.", file)


def test_weights_in_pytorch_files(model: Path, refused: Refused) -> None:
    torch.save(load_file(model / SINGLE_FILE), model / "pytorch_model.bin")
    (model / SINGLE_FILE).unlink()
    refused(
        CheckpointError,
        f"{model}: holds PyTorch .bin weights only, and Secateur reads safetensors. Convert it once with\n"
        '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{model}', dtype='auto').save_pretrained('{model}-safetensors'); "
        f"T.from_pretrained('{model}').save_pretrained('{model}-safetensors')\"",
        model,
    )


def test_a_folder_of_gguf_files(model: Path, refused: Refused) -> None:
    (model / SINGLE_FILE).rename(model / "model-q8.gguf")
    refused(
        CheckpointError, f"{model}: holds GGUF weights; give the file itself, such as {model / 'model-q8.gguf'}.", model
    )
    refused(CheckpointError, f"{model / 'other.gguf'}: no such file.", model / "other.gguf")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp4"])
def test_a_quantised_checkpoint(method: str, model: Path, refused: Refused) -> None:
    configure(model, quantization_config={"quant_method": method, "bits": 4})
    refused(
        CheckpointError,
        f"{model}: the weights are quantised ({method}; config.json: quantization_config), in a format that Secateur "
        "does not dequantise. Use the unquantised checkpoint, or load this one with transformers, dequantise it "
        "(model.dequantize()), save it, and use that.",
        model,
    )


def test_an_encoder_decoder(tmp_path: Path, refused: Refused) -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=32)
    module = T5ForConditionalGeneration(config)
    module.save_pretrained(tmp_path / "t5")
    refused(
        ModelStructureError,
        f"{tmp_path / 't5'}: t5 is an encoder-decoder; Secateur prunes decoder-only language models.",
        tmp_path / "t5",
    )
    refused(
        ModelStructureError,
        "T5ForConditionalGeneration: an encoder-decoder; Secateur prunes decoder-only language models.",
        module,
    )


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_id_without_a_network(
    name: str, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    refused(
        CheckpointError,
        f"{name}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no copy in "
        f"the cache. Give a local folder, or download it first: hf download {name}",
        name,
    )


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/at/all", "a/b/c", "no thing"])
def test_neither_a_folder_nor_a_hub_id(name: str, refused: Refused) -> None:
    refused(CheckpointError, f"{name}: no such folder, and not a hub id (owner/name) either.", name)


# Modules in memory


def test_modules_without_a_block_stack(refused: Refused) -> None:
    end = "Secateur prunes decoder-only language models."
    refused(
        ModelStructureError,
        f"Sequential: no stack of decoder blocks (nn.ModuleList) found in it, only 0, 1. {end}",
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    )
    refused(
        ModelStructureError,
        f"Linear: no stack of decoder blocks (nn.ModuleList) found in it; it has no submodules at all. {end}",
        nn.Linear(4, 4),
    )
    refused(ModelStructureError, "ReLU: has no parameters.", nn.ReLU())


def test_a_module_with_adapters(refused: Refused) -> None:
    module = tiny.build("llama")
    module.peft_config = {"default": None}
    refused(
        ModelStructureError,
        "LlamaForCausalLM: a model with adapters; merge them first with model = model.merge_and_unload().",
        module,
    )


def test_a_module_on_the_meta_device(refused: Refused) -> None:
    with torch.device("meta"):
        module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
    refused(
        ModelStructureError,
        "ModuleDict: its weights are offloaded or spread over devices (device_map, blocks.0.weight is on meta). "
        "Give the folder or hub id instead; Secateur streams it.",
        module,
    )
    loaded = tiny.build("llama")
    loaded.hf_device_map = {"": "disk"}
    refused(
        ModelStructureError,
        "LlamaForCausalLM: its weights are offloaded or spread over devices (device_map). "
        "Give the folder or hub id instead; Secateur streams it.",
        loaded,
    )


def test_a_module_in_another_dtype(refused: Refused) -> None:
    refused(
        ModelStructureError,
        "LlamaForCausalLM: in memory as torch.float32; a module is used as it is. "
        "Convert it first, or leave dtype at auto (got bfloat16).",
        tiny.build("llama"),
        dtype="bfloat16",
    )


def test_a_module_is_left_as_it_was(refused: Refused) -> None:
    module = tiny.build("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refused(
        CalibrationError,
        "sample 0, position 0: token id 128 is outside the vocabulary of 128 ids (64 such ids in all); "
        "does the tokenizer belong to this model?",
        module,
        calibration=torch.full((4, 16), 128),
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


# Devices and dtypes


def test_an_unknown_device(model: Path, refused: Refused) -> None:
    for device in ("gpu", "cuda:99", "meta"):
        refused(
            CheckpointError,
            re.compile(rf'device "{device}" cannot be used here \(.+\)\. Use --device cpu or auto\.'),
            model,
            device=device,
        )


def test_an_unknown_dtype(model: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        'dtype must be auto, float32, bfloat16, float16, float64; got "int8".',
        model,
        dtype="int8",
    )


# Numbers that are none


@pytest.mark.parametrize("method", [wanda, magnitude])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(value: str, method: Callable[[], Method], model: Path, refused: Refused) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(model, name, lambda tensor: tensor[3, 4:7].fill_(float(value)))
    refused(
        NumericalError,
        f"{name}: 3 of 1536 weights are NaN or infinite. The checkpoint is damaged; download it again, "
        f'or leave this matrix out with --skip "{name}".',
        model,
        method=method(),
    )
    manifest = prune(model, method=magnitude(), skip=[name], output=model.parent / "out")
    assert name not in manifest.matrices


def test_weights_of_a_later_block_that_are_not_finite(model: Path, refused: Refused) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    edit(model, name, lambda tensor: tensor.fill_(float("nan")))
    refused(
        NumericalError,
        f"{name}: 1024 of 1024 weights are NaN or infinite. The checkpoint is damaged; download it again, "
        f'or leave this matrix out with --skip "{name}".',
        model,
    )


def test_weights_in_integers(model: Path, refused: Refused) -> None:
    tensors = load_file(model / SINGLE_FILE)
    tensors[FIRST] = torch.ones(32, 48, dtype=torch.int8)
    save_file(tensors, model / SINGLE_FILE)
    refused(
        CheckpointError,
        f"{model}: the weights are quantised (torch.int8 without scales that belong to it; {FIRST}), in a format "
        "that Secateur does not dequantise. Use the unquantised checkpoint, or load this one with transformers, "
        "dequantise it (model.dequantize()), save it, and use that.",
        model,
        method=magnitude(),
    )


ADVICE = "Is the model itself sound? Try --dtype float32, and check the dense model with secateur eval."


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_statistics_that_are_not_finite(name: str, first: str, value: str, model: Path, refused: Refused) -> None:
    edit(model, name, lambda tensor: tensor.fill_(float(value)))
    refused(
        CalibrationError,
        f"{first}: its inputs on the calibration samples contain NaN or infinity. {ADVICE}",
        model,
    )


def test_half_precision_that_overflows(model: Path, refused: Refused) -> None:
    edit(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.mul_(3e4))
    refused(
        CalibrationError,
        f"{FIRST}: its inputs on the calibration samples contain NaN or infinity. {ADVICE}",
        model,
        dtype="float16",
    )


# Calibration


def test_an_empty_corpus(model: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("")
    refused(
        CalibrationError,
        f"{file}: the file is empty, expected text. Was its download cut off?",
        model,
        calibration=str(file),
        tokenizer=object(),
    )
    file.write_text(" \n \n")
    refused(
        CalibrationError,
        f"{file}: no text in its 0 documents, expected at least one that is not blank.",
        model,
        calibration=str(file),
        tokenizer=object(),
    )


def test_text_without_a_tokenizer(model: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("Some words.\n" * 100)
    refused(
        CalibrationError,
        f"{file}: text needs a tokenizer, got None. Pass the model's tokenizer, or token ids: "
        "a (samples, length) tensor or a .safetensors file with the key 'input_ids'.",
        model,
        calibration=str(file),
    )


def test_a_tokenizer_that_is_damaged(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "corpus.txt").write_text("Some words.\n" * 100)
    (model / "tokenizer.json").write_text("{}")
    refused(
        CheckpointError,
        re.compile(re.escape(f"{model}: its tokenizer cannot be loaded: ") + ".+", re.DOTALL),
        model,
        calibration=str(tmp_path / "corpus.txt"),
    )


def test_token_ids_outside_the_vocabulary(model: Path, refused: Refused) -> None:
    ids = tiny.tokens()
    ids[2, 5], ids[3, 1] = 128, -1
    refused(
        CalibrationError,
        "sample 2, position 5: token id 128 is outside the vocabulary of 128 ids (2 such ids in all); "
        "does the tokenizer belong to this model?",
        model,
        calibration=ids,
    )


def test_windows_longer_than_the_positions(model: Path, refused: Refused) -> None:
    refused(
        CalibrationError,
        "windows of 65 tokens, and the model has 64 positions. Use --length 64 or less.",
        model,
        calibration=tiny.tokens(2, 65),
    )


def test_numbers_of_samples(model: Path, refused: Refused) -> None:
    refused(CalibrationError, "--samples: got 0, expected at least 1.", model, samples=0)
    refused(CalibrationError, "--length: got -1, expected at least 1.", model, length=-1)
    for size in (0, -1):
        refused(CalibrationError, f"--batch-size: got {size}, expected at least 1.", model, batch_size=size)


def test_experts_that_saw_no_token(models: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(shutil.copytree(models / "mixtral", tmp_path / "model"))
    ids = tiny.tokens(1, 1)
    with torch.no_grad():
        routers = tiny.build("mixtral")(ids, output_router_logits=True, use_cache=False).router_logits
    unseen = sorted({0, 1, 2, 3} - set(routers[0].topk(2).indices.flatten().tolist()))
    experts = [f"model.layers.0.block_sparse_moe.experts.{expert}" for expert in unseen]
    one, other = experts
    refused(
        ModelStructureError,
        f"{one}.w1.weight, {one}.w3.weight, {other}.w1.weight and 3 more: saw no token of the 1 calibration samples, "
        "so nothing is known of their inputs. Calibrate on more samples (--samples), or leave them dense with "
        f'--skip "{one}.w1.weight" and so on.',
        folder,
        calibration=ids,
    )
    refused(
        ModelStructureError,
        f"{other}.w2.weight: saw no token of the 1 calibration samples, so nothing is known of its inputs. "
        f'Calibrate on more samples (--samples), or leave it dense with --skip "{other}.w2.weight".',
        folder,
        calibration=ids,
        only=[f"{other}.w2"],
    )


# The output


def test_no_output(model: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        f"{model}: no output folder given; the source is never changed. Add -o OUT.",
        model,
        output=None,
    )


def test_an_output_that_exists(model: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    message = f"{out}: exists already. Choose another folder, or pass --overwrite."
    out.mkdir()
    refused(CheckpointError, message, model)
    (out / "thesis.tex").write_text("years of work")
    refused(CheckpointError, message, model)


def test_an_output_that_is_not_ours(model: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    message = (
        f"{out}: exists and holds no {FILE_NAME}, so Secateur did not write it and will not overwrite it. "
        "Choose another folder, or remove it yourself."
    )
    out.write_text("a file")
    refused(CheckpointError, message, model, overwrite=True)
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refused(CheckpointError, message, model, overwrite=True)


def test_an_earlier_output_outlives_a_failure(model: Path, tmp_path: Path, refused: Refused) -> None:
    prune(model, method=magnitude(), output=tmp_path / "out")
    edit(model, "model.layers.2.self_attn.q_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    name = "model.layers.2.self_attn.q_proj.weight"
    refused(
        NumericalError,
        f"{name}: 1024 of 1024 weights are NaN or infinite. The checkpoint is damaged; download it again, "
        f'or leave this matrix out with --skip "{name}".',
        model,
        overwrite=True,
    )
    assert verify(tmp_path / "out").ok
    prune(model, method=magnitude(), skip=[name], output=tmp_path / "out", overwrite=True)
    assert name not in verify_plan(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def verify_plan(folder: Path) -> set[str]:
    assert verify(folder).ok
    return set(json.loads((folder / FILE_NAME).read_text())["plan"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_the_source(overwrite: bool, model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "pruned", model / "a" / "b", tmp_path / "link", model / ".." / "model"):
        refused(
            CheckpointError,
            f"{out}: the output is the source, or lies inside it. Choose another folder.",
            model,
            output=out,
            overwrite=overwrite,
        )


def test_an_output_that_holds_the_source(model: Path, tmp_path: Path, refused: Refused) -> None:
    """With --overwrite it would be removed, with the source in it."""
    prune(model, method=magnitude(), output=tmp_path / "out")
    model = model.rename(tmp_path / "out" / "model")
    refused(
        CheckpointError,
        f"{tmp_path / 'out'}: the output holds the source ({model}). Choose another folder.",
        model,
        overwrite=True,
    )


@pytest.mark.parametrize("out", ["out", "new/folders/out"])
def test_no_permission_on_the_parent(out: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    refused(
        CheckpointError,
        f"{parent / out}: cannot be made in {parent} (no permission to write there). Choose another output folder.",
        model,
        output=parent / out,
        within=unprivileged(parent),
    )


def test_a_parent_that_is_a_file(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(
        CheckpointError,
        f"{tmp_path / 'file' / 'out'}: cannot be made in {tmp_path / 'file'} (it is not a folder). "
        "Choose another output folder.",
        model,
        output=tmp_path / "file" / "out",
    )


def test_folders_on_the_way_are_removed_again(model: Path, tmp_path: Path, refused: Refused) -> None:
    edit(model, "model.layers.2.self_attn.q_proj.weight", lambda tensor: tensor.fill_(float("nan")))
    refused(
        NumericalError,
        re.compile(r"model\.layers\.2\.self_attn\.q_proj\.weight: 1024 of 1024 weights .*"),
        model,
        output=tmp_path / "new" / "folders" / "out",
    )
    refused(
        PatternError,
        '--propagate: got "x", expected pruned or dense.',
        model,
        propagate="x",
        output=tmp_path / "new" / "out",
    )


def test_a_relative_output_and_source(model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        CheckpointError,
        "./model: the output is the source, or lies inside it. Choose another folder.",
        "model",
        output="./model",
    )


ROOM = "Free some space or choose another output folder."


def partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial") / "result"


def test_no_room_for_the_weights(model: Path, tmp_path: Path, refused: Refused) -> None:
    size = (model / SINGLE_FILE).stat().st_size
    with small_disk(tmp_path / "disk", size // 2048) as disk:
        refused(
            CheckpointError,
            re.compile(
                re.escape(f"{partial(disk / 'out') / SINGLE_FILE}: cannot reserve ")
                + rf"[\d,]+ bytes \(No space left on device\)\. {ROOM}"
            ),
            model,
            output=disk / "out",
        )
        assert list(disk.iterdir()) == []


def test_a_limit_on_the_size_of_files(model: Path, tmp_path: Path, refused: Refused) -> None:
    refused(
        CheckpointError,
        re.compile(
            re.escape(f"{partial(tmp_path / 'out') / SINGLE_FILE}: cannot reserve ")
            + rf"[\d,]+ bytes \(File too large\)\. {ROOM}"
        ),
        model,
        within=file_size_limit(50_000),
    )


def test_no_room_for_the_files_beside_them(model: Path, tmp_path: Path, refused: Refused) -> None:
    (model / "LICENSE").write_bytes(b"x" * 100_000)
    size = (model / SINGLE_FILE).stat().st_size
    with small_disk(tmp_path / "disk", size // 1024 + 50) as disk:
        refused(
            CheckpointError,
            f"{partial(disk / 'out') / 'LICENSE'}: cannot be written (No space left on device). {ROOM}",
            model,
            output=disk / "out",
        )
        assert list(disk.iterdir()) == []


def test_a_file_beside_the_weights_that_may_not_be_read(model: Path, tmp_path: Path, refused: Refused) -> None:
    prune(model, method=wanda(), calibration=tiny.tokens(), output=tmp_path / "before")  # everything is imported now
    (model / "LICENSE").write_text("")
    for file in model.iterdir():
        file.chmod(0 if file.name == "LICENSE" else 0o644)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused(
        CheckpointError,
        f"{model / 'LICENSE'}: cannot be read (Permission denied).",
        model,
        output=tmp_path / "open" / "out",
        within=unprivileged(model),
    )


def test_no_room_for_the_manifest(model: Path, tmp_path: Path, refused: Refused) -> None:
    prune(model, method=wanda(), calibration=tiny.tokens(), output=tmp_path / "before")
    pages = [-(-file.stat().st_size // 4096) for file in (tmp_path / "before").iterdir() if file.name != FILE_NAME]
    assert (tmp_path / "before" / FILE_NAME).stat().st_size > 3 * 4096
    with small_disk(tmp_path / "disk", 4 * (sum(pages) + 2)) as disk:
        refused(
            CheckpointError,
            f"{partial(disk / 'out') / FILE_NAME}: cannot be written (No space left on device). {ROOM}",
            model,
            output=disk / "out",
        )
        assert list(disk.iterdir()) == []


def test_no_room_for_the_hidden_states(model: Path, tmp_path: Path, refused: Refused) -> None:
    """A mapped file without room behind it would end the process with a bus error."""
    with small_disk(tmp_path / "disk", 64) as disk:
        refused(
            CheckpointError,
            re.compile(
                rf"{re.escape(str(disk))}/out\.states-[0-9a-f]{{12}}/states-0\.bin: cannot be written "
                rf"\(No space left on device\)\. {ROOM}"
            ),
            model,
            calibration=tiny.tokens(16, 64),
            offload_states=str(disk),
        )
        assert list(disk.iterdir()) == []


def test_hidden_states_on_disk_are_removed_after_a_failure(model: Path, tmp_path: Path, refused: Refused) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit(model, name, lambda tensor: tensor.fill_(float("nan")))
    (tmp_path / "states").mkdir()
    refused(
        CalibrationError,
        "model.layers.1.self_attn.q_proj.weight: its inputs on the calibration samples contain NaN or infinity. "
        + ADVICE,
        model,
        offload_states=str(tmp_path / "states"),
    )
    assert list((tmp_path / "states").iterdir()) == []


def test_a_folder_for_hidden_states_that_cannot_be(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(
        CheckpointError,
        re.compile(
            rf"{re.escape(str(tmp_path / 'file'))}/out\.states-[0-9a-f]{{12}}: cannot hold hidden states "
            r"\(Not a directory\)\."
        ),
        model,
        offload_states=str(tmp_path / "file"),
    )


# Methods that do not keep their word


def method_of(change: Callable[[Solution], Solution], needs: bool = True) -> Method:
    """Wanda, whose solutions are changed before they are given back."""
    inner = wanda()
    return Method("mine", lambda problem: change(inner.solve(problem)), inner.needs if needs else frozenset())


EXPECTED = "expected torch.float32 and torch.bool, both of (32, 48)."
GAVE = f"{FIRST}: mine gave a torch.{{}} weight of shape {{}} and a torch.{{}} mask of {{}}, {EXPECTED}"
BAD_SOLUTIONS: dict[str, tuple[Callable[[Solution], Solution], type[SecateurError], str]] = {
    "transposed": (
        lambda solution: Solution(solution.weight.t(), solution.mask.t()),
        PatternError,
        GAVE.format("float32", "(48, 32)", "bool", "(48, 32)"),
    ),
    "mask of one row": (
        lambda solution: Solution(solution.weight, solution.mask[:1]),
        PatternError,
        GAVE.format("float32", "(32, 48)", "bool", "(1, 48)"),
    ),
    "half precision": (
        lambda solution: Solution(solution.weight.half(), solution.mask),
        PatternError,
        GAVE.format("float16", "(32, 48)", "bool", "(32, 48)"),
    ),
    "mask of numbers": (
        lambda solution: Solution(solution.weight, solution.mask.float()),
        PatternError,
        GAVE.format("float32", "(32, 48)", "float32", "(32, 48)"),
    ),
    "everything kept": (
        lambda solution: Solution(solution.weight, torch.ones_like(solution.mask)),
        PatternError,
        f"{FIRST}: the mask of mine breaks 2:4: row 0, columns 0 to 3: 4 non-zeros, expected at most 2.",
    ),
    "mask the wrong way round": (
        lambda solution: Solution(solution.weight, ~solution.mask),
        PatternError,
        f"{FIRST}: mine gave 768 non-zero weights where its own mask says that they are removed.",
    ),
    "NaN": (
        lambda solution: Solution(solution.weight.index_fill(0, torch.tensor([1]), float("nan")), solution.mask),
        NumericalError,
        f"{FIRST}: mine gave 48 of 1536 weights that are NaN or infinite, where the source has none. Use more "
        f'damping, if the method has any, or leave this matrix out with --skip "{FIRST}".',
    ),
    "infinity": (
        lambda solution: Solution(solution.weight / 0.0, solution.mask),
        NumericalError,
        f"{FIRST}: mine gave 1536 of 1536 weights that are NaN or infinite, where the source has none. Use more "
        f'damping, if the method has any, or leave this matrix out with --skip "{FIRST}".',
    ),
}


@pytest.mark.parametrize("kind", BAD_SOLUTIONS)
def test_solutions_that_are_none(kind: str, model: Path, refused: Refused) -> None:
    change, error, message = BAD_SOLUTIONS[kind]
    refused(error, message, model, method=method_of(change), pattern=NM(2, 4))


def test_a_mask_with_too_few_zeros(model: Path, refused: Refused) -> None:
    method = method_of(lambda solution: Solution(solution.weight, solution.mask | (torch.arange(48) < 4)))
    refused(
        PatternError,
        re.compile(
            re.escape(f"{FIRST}: the mask of mine breaks 0.5 unstructured per row: ")
            + r"row \d+ has \d+ zeros, expected at least 24\."
        ),
        model,
        method=method,
        pattern=Unstructured(0.5, "row"),
    )


def test_a_method_that_does_not_say_what_it_needs(model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(MethodError, match="SquaredNorm was not collected; list it in the needs of the method"):
        prune(model, method=method_of(lambda solution: solution, needs=False), output=tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_method_that_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def solve(problem: Problem) -> Solution:
        if problem.name.startswith("model.layers.2."):
            raise ZeroDivisionError(problem.name)
        return wanda().solve(problem)

    before = snapshot(tmp_path)
    with pytest.raises(MethodError, match="mine failed with ZeroDivisionError"):
        prune(
            model,
            method=Method("mine", solve, frozenset({SquaredNorm})),
            calibration=tiny.tokens(),
            output=tmp_path / "new" / "out",
        )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stage", ["calibrate", "record", "read", "statistics", "solve", "forward", "write"])
def test_an_interruption_at_any_stage_leaves_nothing(stage: str, model: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if event.stage == stage and event.block in (0, 1):
            raise KeyboardInterrupt

    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prune(model, method=wanda(), calibration=tiny.tokens(), output=tmp_path / "out", on_event=stop)
    assert snapshot(tmp_path) == before


# open_model says the same


def test_open_model_refuses_what_prune_refuses(sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX_FILE).write_text("")
    for bad in (sharded, tmp_path / "nothing", nn.Linear(2, 2)):
        with pytest.raises(SecateurError) as by_open:
            open_model(bad)
        with pytest.raises(SecateurError) as by_prune:
            prune(bad, method=magnitude(), output=tmp_path / "out")
        assert (type(by_open.value), str(by_open.value)) == (type(by_prune.value), str(by_prune.value))


@pytest.fixture(autouse=True)
def _no_trace_in_the_working_directory() -> Iterator[None]:
    yield
    assert not [name for name in os.listdir() if ".states" in name or ".partial" in name]
