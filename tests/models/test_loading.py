"""What is written arrives whole, and loads; what would not is refused before it has its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
import tiny
from secateur.errors import CheckpointError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.files.folders import companions
from secateur.methods.magnitude import magnitude
from secateur.models.opening.loading import check_loads
from secateur.models.opening.opened import open_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# What lies beside the weights


def test_subfolders_arrive_and_the_rest_is_named(model: Path, tmp_path: Path) -> None:
    arriving = {
        "additional_chat_templates/rag.jinja": "{{ rag }}",
        "additional_chat_templates/deep/tool.jinja": "{{ tool }}",
        "1_Pooling/config.json": "{}",
        "qwen.tiktoken": "YQ== 0",
    }
    staying = {
        "original/params.json": "{}",
        "onnx/model.onnx": "",
        "checkpoint-5/optimizer.pt": "",
        "checkpoint-5/config.json": "{}",
        "pytorch_model.bin": "",
        "consolidated.safetensors": "",
        ".secret": "",
    }
    nobodys = {
        ".git/config": "",
        ".cache/huggingface/x": "",
        ".gitattributes": "",
        "__pycache__/a.pyc": "",
        "README.md": "",
    }
    for name, text in (arriving | staying | nobodys).items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    (model / "linked").symlink_to(tmp_path)
    out = tmp_path / "out"
    manifest = secateur.prune(model, method=magnitude(), output=out)
    assert {name: (out / name).read_text() for name in arriving} == arriving
    assert manifest.source["not_copied"] == [
        ".secret",
        "checkpoint-5/",
        "consolidated.safetensors",
        "linked/",
        "onnx/",
        "original/",
        "pytorch_model.bin",
    ]
    assert not files(out) & (set(staying) | set(nobodys)) - {"README.md"}
    assert set(arriving) <= set(manifest.files)
    assert secateur.verify(out).ok
    (out / "additional_chat_templates/rag.jinja").write_text("{{ changed }}")
    assert secateur.verify(out).problems == [
        "additional_chat_templates/rag.jinja: the file differs from the one that was written"
    ]


def test_a_plain_folder_leaves_nothing(model: Path, tmp_path: Path) -> None:
    assert "not_copied" not in secateur.prune(model, method=magnitude(), output=tmp_path / "out").source
    kept, left = companions(model)
    assert left == [SINGLE_FILE]
    assert [file.name for file in kept] == ["config.json", "generation_config.json"]


# What was written loads


def change(folder: Path, what: Any) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    what(tensors)
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 parameters would get no tensor \(model\.norm\.weight\)"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 tensors have no parameter \(extra\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight is of shape \(3,\), and .*\(32,\)",
        ),
    ],
)
def test_a_checkpoint_that_would_not_load(model: Path, tmp_path: Path, what: Any, message: str) -> None:
    opened = open_model(model)
    written = Path(shutil.copytree(model, tmp_path / "written"))
    check_loads(opened, written)
    change(written, what)
    with pytest.raises(CheckpointError, match=message):
        check_loads(opened, written)


def test_tensors_that_the_source_has_without_use_are_no_mistake(model: Path, tmp_path: Path) -> None:
    change(model, lambda tensors: tensors.update(extra=torch.ones(2)))
    secateur.prune(model, method=magnitude(), output=tmp_path / "out")
    assert "extra" in load_file(tmp_path / "out" / SINGLE_FILE)


def test_experts_that_are_fused_while_loading(tmp_path: Path) -> None:
    model = tiny.save("mixtral", tmp_path / "model")
    opened = open_model(model)
    check_loads(opened, model)
    name = next(name for name in load_file(model / SINGLE_FILE) if ".experts.1." in name)
    change(model, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(CheckpointError, match=r"^What was written would not load as MixtralForCausalLM: "):
        check_loads(opened, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_modules_in_memory(name: str, tmp_path: Path) -> None:
    module = tiny.build(name)
    secateur.prune(module, method=magnitude(), output=tmp_path / "out")
    assert secateur.verify(tmp_path / "out").ok


def test_a_module_that_is_not_what_its_configuration_says(tmp_path: Path) -> None:
    module: Any = tiny.build("llama")
    module.config.num_hidden_layers += 1
    with pytest.raises(
        CheckpointError, match=r"would not load as LlamaForCausalLM: \d+ parameters would get no tensor"
    ):
        secateur.prune(module, method=magnitude(), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_module_with_more_than_its_class_has(tmp_path: Path) -> None:
    module: Any = tiny.build("llama")
    module.score = nn.Linear(32, 2)
    with pytest.raises(CheckpointError, match=r"2 tensors have no parameter \(score\.bias, score\.weight\)"):
        secateur.prune(module, method=magnitude(), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# An adapter's record


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[" * 100_000,
        '{"a": 1}',
        '{"method": 3}',
        '{"method": "lora", "base": [], "data": {}, "held_out": {}}',
    ],
)
def test_a_damaged_record_of_an_adapter(text: str, tmp_path: Path) -> None:
    from secateur.files.reading import digest_of
    from secateur.recover.adapters import _record

    value = json.loads(text) if len(text) < 1000 else None
    if isinstance(value, dict):
        text = json.dumps({**value, "digest": digest_of(value)})
    (tmp_path / "secateur_adapter.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"secateur_adapter\.json: .*Remove it to merge the adapter without a record\."
    ):
        _record(tmp_path)
