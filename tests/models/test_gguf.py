"""GGUF files: dequantised by transformers, pruned in memory, written as ordinary safetensors."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import secateur
from command_line import interpreter, process, save_model
from gguf_files import gguf, write_gguf
from secateur.errors import CheckpointError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.models.opening.opened import open_source
from secateur.pruning.forecast import estimate

NOTE = "The whole model is in memory: it was given as a module, or dequantised from GGUF."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder."""
    return save_model(tmp_path_factory.mktemp("gguf") / "model")


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["F32", "F16"])
def file(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a GGUF file, alone in its folder."""
    path = tmp_path_factory.mktemp("file") / "tiny.gguf"
    write_gguf(model, path, request.param)
    return path


def tokens() -> torch.Tensor:
    return torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(0))


def expected(model: Path, file: Path) -> dict[str, torch.Tensor]:
    """The dense weights that the file stands for."""
    half = gguf.GGUFReader(file).tensors[0].tensor_type == gguf.GGMLQuantizationType.F16
    weights = load_file(model / SINGLE_FILE)
    return {name: (value.half().float() if half and value.dim() > 1 else value) for name, value in weights.items()}


def test_a_file_is_pruned(model: Path, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    pattern = secateur.NM(2, 4)
    manifest = secateur.prune(
        file, method=secateur.wanda(), pattern=pattern, calibration=tokens(), output=tmp_path / "out"
    )
    assert file.read_bytes() == before
    assert (manifest.source["kind"], manifest.source["path"]) == ("gguf", str(file))
    assert manifest.totals["matrices"] == 21
    assert manifest.totals["sparsity"] == 0.5
    # Tensor by tensor: the dense weights, with zeros in the plan only.
    dense, sparse = expected(model, file), load_file(tmp_path / "out" / SINGLE_FILE)
    assert sparse.keys() == dense.keys()
    for name, value in sparse.items():
        assert value.dtype == torch.float32
        if name in manifest.matrices:
            assert torch.equal(value, dense[name] * (value != 0))
            assert pattern.violation(value != 0) is None
        else:
            assert torch.equal(value, dense[name])
    # An ordinary checkpoint, without a word of quantisation.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {key for key in config if "quant" in key or "gguf" in key or "compress" in key}
    # Other engines choose their code by the first, and some know the second by its older name alone.
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values())
    assert torch.isfinite(loaded(tokens()).logits).all()
    # And the proof.
    result = secateur.verify(tmp_path / "out", open_source(str(file)))
    assert result.problems == []
    assert result.compared_to == str(file)
    # The manifest names the file as the dense model of a recovery.
    recovered = secateur.reconstruct(tmp_path / "out", calibration=tokens(), epochs=1, output=tmp_path / "recovered")
    assert recovered.recovery is not None
    assert recovered.recovery["dense"] == str(file)
    assert secateur.verify(tmp_path / "recovered", open_source(str(file))).problems == []


def test_the_masks_are_those_of_the_folder(model: Path, file: Path, tmp_path: Path) -> None:
    options: Any = {"method": secateur.wanda(), "pattern": secateur.NM(2, 4), "calibration": tokens()}
    reference: Any = LlamaForCausalLM.from_pretrained(model)
    reference.load_state_dict(expected(model, file), strict=False)
    secateur.prune(reference, **options)
    secateur.prune(file, **options, output=tmp_path / "out")
    sparse = load_file(tmp_path / "out" / SINGLE_FILE)
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in sparse.items())


def test_its_tokenizer_is_used_and_written(model: Path, file: Path, tmp_path: Path) -> None:
    secateur.prune(
        file,
        method=secateur.wanda(),
        calibration="python-docs",
        sampling="concat",
        samples=4,
        length=32,
        output=tmp_path / "out",
    )
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(model)
    text = "The import statement: 'from x import *', é 中 \t\n"
    assert ours(text)["input_ids"][-20:] == theirs(text)["input_ids"][-20:]
    assert ours.decode(theirs(text)["input_ids"]) == text
    result = secateur.perplexity(tmp_path / "out", "python-docs", length=32, windows=4)
    assert 100 < result.perplexity < 900


def test_plan_says_that_the_whole_model_is_in_memory(file: Path) -> None:
    result = estimate(file, method=secateur.wanda(), calibration=None, length=32)
    assert result.notes == [NOTE]
    assert (result.blocks, len(result.plan), result.model) == (3, 21, str(file))


def test_plan_draws_no_bars_in_a_pipe(model: Path, tmp_path: Path) -> None:
    """In a fresh process, because transformers reads the switch of its progress bars when it is imported."""
    file = tmp_path / "tiny.gguf"
    write_gguf(model, file, torch.float32)
    done = interpreter("plan", file, "--length", 32, "--calibration", "python-docs", "--sampling", "concat")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith(NOTE)


def test_verify_notices_another_source(file: Path, tmp_path: Path) -> None:
    secateur.prune(file, method=secateur.magnitude(), output=tmp_path / "out")
    other = save_model(tmp_path / "other")
    weights = load_file(other / SINGLE_FILE)
    weights["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(weights, other / SINGLE_FILE, {"format": "pt"})
    write_gguf(other, tmp_path / "other.gguf", torch.float32)
    problems = secateur.verify(tmp_path / "out", open_source(str(tmp_path / "other.gguf"))).problems
    assert "model.norm.weight: not planned, yet its bytes differ from the source" in problems


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"not a model\n" * 99), ("cut", file.read_bytes()[:20000])):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name}\.gguf: transformers cannot dequantise it"):
            estimate(path, method=secateur.wanda())
    with pytest.raises(CheckpointError, match=r"holds GGUF weights; give the file itself, such as .*cut\.gguf\."):
        estimate(tmp_path, method=secateur.wanda())


def test_without_the_package(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    hidden = {name: None for name in ("gguf", *sys.modules) if name.split(".")[0] == "gguf"}
    done = process("plan", tmp_path / "tiny.gguf", before=lambda: sys.modules.update(hidden))
    assert (done.returncode, done.stdout) == (2, "")
    needed = f'Error: {tmp_path}/tiny.gguf: reading GGUF needs the gguf package: pip install "secateur[gguf]"\n'
    assert done.stderr == needed
