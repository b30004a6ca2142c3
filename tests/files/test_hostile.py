"""What others hand over: links out of a folder, credentials, names that a terminal would obey, code, claimed sizes."""

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import tiny
from pruned_checkpoints import calibration
from secateur.cli.display import _console, _Visible
from secateur.cli.streams import visible
from secateur.collect.survey import Survey
from secateur.core.statistics import SquaredNorm
from secateur.errors import CheckpointError
from secateur.files.checkpoint import SINGLE_FILE, Checkpoint, read_header
from secateur.files.folders import companions
from secateur.files.redaction import redacted
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.models.opening.whole import load_whole
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME, read_manifest
from secateur.record.verify import verify
from secateur.recover.adapters import read_adapter

TOKEN = "hf_" + "aB3dE5gH7j" * 3


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", "generation_config.json"])
def test_a_file_that_is_a_link_out_of_the_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a symbolic link to .*elsewhere, outside .*source"):
        prune(source, method=magnitude(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Within the folder it may be one, and the folder itself may be.
    (source / name).unlink()
    (tmp_path / "elsewhere").rename(source / "real")
    (source / name).symlink_to("real")
    (tmp_path / "link").symlink_to(source)
    companions(tmp_path / "link")
    assert Checkpoint(tmp_path / "link").names


def test_a_manifest_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    prune(tiny.save("llama", tmp_path / "source"), method=magnitude(), output=tmp_path / "out")
    (tmp_path / "out" / FILE_NAME).rename(tmp_path / "elsewhere")
    (tmp_path / "out" / FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (TOKEN, "***"),
        (f"--token={TOKEN}", "--token=***"),
        ("--hf-token=short", "--hf-token=***"),
        ("https://me:secret@host/data.jsonl", "https://***@host/data.jsonl"),
        ("https://host/x?a=1&X-Amz-Signature=abc&b=2", "https://host/x?a=1&X-Amz-Signature=***&b=2"),
        ("HF_TOKEN=abcdef", "HF_TOKEN=***"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        # What only looks like one stays.
        ("--bos-token", "--bos-token"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("https://host/a@b.jsonl", "https://host/a@b.jsonl"),
        ("0" * 64, "0" * 64),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_credentials_are_hidden(text: str, hidden: str) -> None:
    assert redacted(text) == hidden
    assert redacted({"a": [text, 1, None]}) == {"a": [hidden, 1, None]}


def test_no_credential_reaches_the_files_of_an_output(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    command = ["secateur", "prune", "https://me:geheim@host/model", "--token", "geheim", f"--x={TOKEN}"]
    prune(source, method=magnitude(), output=tmp_path / "out", command=command)
    for file in (tmp_path / "out").iterdir():
        assert b"geheim" not in file.read_bytes(), file.name
        assert TOKEN.encode() not in file.read_bytes(), file.name
    hidden = [*command[:2], "https://***@host/model", "--token", "***", "--x=***"]
    assert read_manifest(tmp_path / "out").command == hidden
    assert verify(tmp_path / "out").ok


def test_tables_print_names_as_they_are() -> None:
    name = "[red]x[/red][link=http://a]:smile:\x1b]0;title\x07\x1b[2J\u202egnp"
    stream = io.StringIO()
    console = _console(file=stream, width=200)
    from rich.table import Table

    table = Table(box=None)
    table.add_column()
    table.add_row(name)
    console.print(_Visible(table))
    shown = stream.getvalue()
    assert "[red]x[/red][link=http://a]:smile:" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert isinstance(console, Console)
    assert visible("a\nb\tc é 漢\u200d") == "a\nb\tc é 漢\u200d"


@pytest.mark.parametrize("name", ["a\nok: verified", "a\x1b[2J", "a\u202eb"])
def test_names_of_tensors_that_hide_something(name: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2)}, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="characters in its name that nobody can see") as caught:
        read_header(tmp_path / SINGLE_FILE)
    assert name not in str(caught.value)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.target),)


def test_statistics_that_somebody_swapped_run_nothing(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    shared = Survey(tmp_path / "statistics", frozenset({SquaredNorm}))
    options: dict[str, Any] = {"method": wanda(), "calibration": calibration(), "statistics": shared}
    options["propagate"] = "dense"
    prune(source, **options, output=tmp_path / "first")
    for file in (tmp_path / "statistics").iterdir():
        file.write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        prune(source, **options, output=tmp_path / "second")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", {"": "somebody/kernel@main:go"}])
def test_a_configuration_that_names_a_kernel_of_the_hub(key: str, value: Any, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    for load in (lambda: open_model(source), lambda: load_whole(source, torch.float32, trust_remote_code=False)):
        with pytest.raises(CheckpointError, match="code from the hub that would be run here"):
            load()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    part = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{part}A.weight": torch.ones(2, 32), f"{part}B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "change",
    [{"r": 10**9}, {"r": 0}, {"r": "8"}, {"rank_pattern": {"q_proj": 10**9}}, {"peft_type": 3}],
)
def test_an_adapter_that_claims_what_it_does_not_hold(change: dict[str, Any], adapter: Path) -> None:
    assert read_adapter(adapter).modules
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError):
        read_adapter(adapter)


def test_an_adapter_whose_keys_would_steer_the_terminal(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({"\x1b[2J": 1} | json.loads(file.read_text())))
    with pytest.raises(CheckpointError, match="characters that nobody can see"):
        read_adapter(adapter)


def test_an_adapter_with_weights_elsewhere_or_too_deep(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        read_adapter(adapter)
    weights.unlink()
    weights.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(CheckpointError, match="the header claims"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="deep"):
        read_adapter(adapter)
