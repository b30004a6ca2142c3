"""`pack` and `unpack`: every byte comes back, packed checkpoints are read as plain ones, and by nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
import tiny
from checkpoint_files import same_bytes
from command_line import CALIBRATION, Call
from pruned_checkpoints import assert_same_tensors, file_hashes
from real_data import STORIES
from secateur.errors import CheckpointError
from secateur.files.checkpoint import PACKED_FILE, SINGLE_FILE
from secateur.files.packed import PackedCheckpoint, record_text
from secateur.report.inspect import inspect
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack

# Fused stacks of experts, experts one by one, (in, out) storage, tied embeddings, biases.
ARCHITECTURES = ["llama", "llama_tied", "gpt2", "mixtral", "gpt_oss", "phi"]
PATTERNS = {"half": 0.5, "2:4": "2:4", "most": 0.9}


def pruned(
    folder: Path, name: str = "llama", pattern: object = 0.5, dtype: torch.dtype = torch.float32, **options: object
) -> Path:
    tiny.build(name, dtype=dtype).save_pretrained(folder / "model", **options)
    secateur.prune(folder / "model", method="magnitude", pattern=pattern, output=folder / "pruned")
    return folder / "pruned"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in several shards."""
    return pruned(tmp_path_factory.mktemp("pack"), max_shard_size="40KB")


@pytest.fixture
def packed(checkpoint: Path, tmp_path: Path) -> Path:
    pack(checkpoint, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
def test_every_file_comes_back_byte_for_byte(tmp_path: Path, dtype: torch.dtype, pattern: object) -> None:
    source = pruned(tmp_path, pattern=pattern, dtype=dtype, max_shard_size="40KB")
    result = pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert file_hashes(tmp_path / "plain") == file_hashes(source)
    assert secateur.verify(tmp_path / "plain").ok
    share = {"2:4": 0.5, 0.5: 0.5, 0.9: 0.1}[pattern]  # of the weights is kept
    assert result.bits == pytest.approx(1 + share * 8 * dtype.itemsize, rel=0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back(tmp_path: Path, name: str) -> None:
    source = pruned(tmp_path, name)
    pack(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert file_hashes(tmp_path / "plain") == file_hashes(source)
    assert secateur.verify(tmp_path / "packed", source=tmp_path / "model").ok


@pytest.mark.skipif(not STORIES.exists(), reason="the small real model is not here")
def test_a_real_model_comes_back(tmp_path: Path) -> None:
    secateur.prune(STORIES, method="magnitude", pattern=0.6, output=tmp_path / "pruned")
    result = pack(tmp_path / "pruned", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert file_hashes(tmp_path / "plain") == file_hashes(tmp_path / "pruned")
    assert result.bits == pytest.approx(1 + 0.4 * 32, rel=0.02)


def test_sizes_are_those_of_the_files(checkpoint: Path, tmp_path: Path) -> None:
    counted, result = pack(checkpoint, dry_run=True), pack(checkpoint, tmp_path / "packed")
    assert counted.output is None
    assert {**vars(counted), "output": 0, "seconds": 0} == {**vars(result), "output": 0, "seconds": 0}
    stored = [
        tensor for file in sorted((tmp_path / "packed").glob("*.safetensors")) for tensor in load_file(file).items()
    ]
    assert result.total_after == sum(tensor.nbytes for _, tensor in stored)
    parts = [tensor for name, tensor in stored if name.endswith((".bitmask", ".compressed"))]
    assert result.bytes_after == sum(tensor.nbytes for tensor in parts)
    assert result.dense == {"model.embed_tokens.weight": "no zeros", "lm_head.weight": "no zeros"}


def test_what_would_not_shrink_stays_dense(tmp_path: Path) -> None:
    weights = {f"{share}.weight": torch.ones(64, 64).bfloat16() for share in (0, 4, 8, 100)}
    for name, weight in weights.items():
        weight.view(-1)[: len(weight.view(-1)) * int(name.split(".")[0]) // 100] = 0
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / SINGLE_FILE)
    (tmp_path / "plain" / "config.json").write_text("{}")
    result = pack(tmp_path / "plain", tmp_path / "packed")
    # A mask costs a bit for each of 16: zeros have to be more than one in 16, and pay for a few bytes of names.
    assert result.dense == {
        "0.weight": "no zeros",
        "4.weight": "4.0% zeros: it would not shrink",
        "8.weight": "8.0% zeros: it would not shrink",
    }
    unpack(tmp_path / "packed", tmp_path / "back")
    assert_same_tensors(tmp_path / "plain", tmp_path / "back")


def test_every_bit_of_unusual_values_comes_back(tmp_path: Path) -> None:
    nan = torch.full((16, 33), 0x7FC1, dtype=torch.int16).view(torch.bfloat16)
    weights = {
        "nan.weight": nan.masked_fill(torch.arange(33) % 2 == 0, 0),
        "negative.weight": torch.zeros(16, 33).masked_fill(torch.arange(33) % 3 == 0, -0.0),
        "zero.weight": torch.zeros(16, 33),
        "rows.weight": torch.ones(16, 33).masked_fill(torch.arange(16)[:, None] % 2 == 0, 0),
        "stack.experts": torch.ones(3, 16, 33).masked_fill(torch.arange(33) < 20, 0).half(),
        "fp8.weight": torch.ones(32, 64).masked_fill(torch.arange(64) % 4 > 0, 0).to(torch.float8_e4m3fn),
        "counts": torch.arange(32 * 32).view(32, 32) % 2,
        "bias": torch.zeros(64),
    }
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / SINGLE_FILE)
    result = pack(tmp_path / "plain", tmp_path / "packed")
    assert result.matrices == 7
    assert result.dense == {}
    packed = PackedCheckpoint(tmp_path / "packed")
    for name, weight in weights.items():
        assert same_bytes(packed.read([name])[name], weight), name
    unpack(tmp_path / "packed", tmp_path / "back")
    assert_same_tensors(tmp_path / "plain", tmp_path / "back")


def test_names_of_parts_that_are_taken_leave_a_tensor_dense(tmp_path: Path) -> None:
    zeros = torch.zeros(64, 64)
    weights = {"a": zeros, "a.weight": zeros.clone(), "b.weight": zeros.clone(), "b.bitmask": torch.zeros(1)}
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / SINGLE_FILE)
    result = pack(tmp_path / "plain", tmp_path / "packed")
    assert result.matrices == 1
    assert set(result.dense.values()) == {"the names of its parts are taken"}
    unpack(tmp_path / "packed", tmp_path / "back")
    assert_same_tensors(tmp_path / "plain", tmp_path / "back")


def test_plain_transformers_refuses_it(packed: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_it_opens_wherever_a_plain_one_does(checkpoint: Path, packed: Path, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=4, length=16)
    assert secateur.perplexity(packed, ids).perplexity == secateur.perplexity(checkpoint, ids).perplexity
    (agreement,) = secateur.agreement(checkpoint, [packed], ids)
    assert agreement.kl == 0
    found = inspect(packed)
    assert found.matrices == inspect(checkpoint).matrices
    assert found.packed is not None
    assert found.packed["tensors"] == 21
    assert secateur.model_digest(packed) != secateur.model_digest(checkpoint)
    for source in (checkpoint, packed):
        secateur.prune(source, method="magnitude", pattern=0.75, output=tmp_path / f"{source.name}-again")
    assert_same_tensors(tmp_path / "pruned-again", tmp_path / "packed-again")


# Verify


def test_both_digests_are_proved(packed: Path) -> None:
    result = secateur.verify(packed)
    assert result.ok
    assert result.packed == result.matrices == 21
    assert result.sparsity == pytest.approx(0.5, abs=0.001)


def last_byte_of(packed: Path, part: str) -> tuple[Path, int]:
    record = next(record for name, record in PackedCheckpoint(packed).stored.items() if name.endswith(part))
    return record.file, record.end - 1


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (".compressed", "the bytes of its compressed differ from those that were written"),
        (".bitmask", "its mask keeps"),
        ("norm.weight", "norm.weight: what it stands for differs from what was packed"),
    ],
)
def test_a_changed_byte_is_found_and_named(packed: Path, part: str, problem: str) -> None:
    file, place = last_byte_of(packed, part)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    result = secateur.verify(packed)
    assert any(problem in text for text in result.problems), result.problems
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(packed, packed.with_name("plain"))
    assert not packed.with_name("plain").exists()


def test_a_record_that_claims_another_tensor_is_found(packed: Path) -> None:
    record = json.loads((packed / PACKED_FILE).read_text())
    name = next(iter(record["matrices"]))
    record["matrices"][name]["sha256"] = "0" * 64
    (packed / PACKED_FILE).write_text(record_text(record))
    assert secateur.verify(packed).problems == [f"{name}: what it stands for differs from what was packed"]


def test_packed_weights_of_another_checkpoint_do_not_pass_for_those_of_the_manifest(
    checkpoint: Path, packed: Path, tmp_path: Path
) -> None:
    other = pruned(tmp_path / "other", pattern=0.6, max_shard_size="40KB")
    pack(other, tmp_path / "other-packed")
    shutil.copy(checkpoint / "secateur.json", tmp_path / "other-packed")
    problems = secateur.verify(tmp_path / "other-packed").problems
    assert any("its bytes differ from those that were written" in problem for problem in problems)


@pytest.mark.parametrize("name", ["model-extra.safetensors", "pytorch_model.bin", "modeling_x.py"])
def test_a_file_that_pack_did_not_write_is_found(packed: Path, name: str) -> None:
    (packed / name).write_bytes(b"x")
    assert any(problem.startswith(f"{name}: ") for problem in secateur.verify(packed).problems)


def test_without_a_manifest_the_packing_alone_is_proved(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "foreign")
    (tmp_path / "foreign" / "secateur.json").unlink()
    pack(tmp_path / "foreign", tmp_path / "packed")
    result = secateur.verify(tmp_path / "packed")
    assert result.ok
    assert (result.packed, result.matrices) == (21, 0)
    (tmp_path / "packed" / "config.json").write_text("{}")
    assert secateur.verify(tmp_path / "packed").problems == [
        "config.json: the file differs from the one that was written"
    ]
    pack(checkpoint, tmp_path / "packed", overwrite=True)
    assert secateur.verify(tmp_path / "packed").matrices == 21


# Refused


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match="no tensor in it would become smaller: none has enough zeros"):
        pack(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_checkpoint_that_was_changed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    file = sorted((tmp_path / "changed").glob("*.safetensors"))[0]
    with safe_open(file, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ from those that were written"):
        pack(tmp_path / "changed", tmp_path / "packed")


def test_packed_twice_and_unpacked_twice_are_refused(checkpoint: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is packed already"):
        pack(packed, tmp_path / "twice")
    with pytest.raises(CheckpointError, match="is not packed"):
        unpack(checkpoint, tmp_path / "twice")


def test_what_somebody_else_put_into_the_output_is_kept(checkpoint: Path, packed: Path) -> None:
    (packed / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, which Secateur did not write"):
        pack(checkpoint, packed, overwrite=True)


# Command line


def test_the_commands(call: Call, model: Path, tmp_path: Path) -> None:
    call("prune", model, "-o", tmp_path / "pruned", *CALIBRATION)
    result = call("pack", tmp_path / "pruned", "-o", tmp_path / "packed")
    assert result.code == 0
    assert "21 packed matrices" in result.out
    assert "no zeros" in result.out
    assert call("pack", tmp_path / "pruned", "--dry-run", "--json").json["matrices"] == 21
    assert call("verify", tmp_path / "packed").code == 0
    assert "21 tensors are packed" in call("inspect", tmp_path / "packed").out
    evaluated = [
        call("eval", tmp_path / name, "--data", "python-docs", "--length", "32", "--windows", "4", "--json").json
        for name in ("pruned", "packed")
    ]
    assert evaluated[0]["perplexity"] == evaluated[1]["perplexity"]
    assert call("report", tmp_path / "packed").code == 0
    assert call("unpack", tmp_path / "packed", "-o", tmp_path / "plain").code == 0
    plain, before = file_hashes(tmp_path / "plain"), file_hashes(tmp_path / "pruned")
    assert plain.pop("README.md") != before["README.md"]  # which has got the figures of the evaluation and the report
    assert plain.items() <= before.items()
    assert call("pack", tmp_path / "pruned").code == 2
