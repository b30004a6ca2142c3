"""`prune --packed`: what pruning and packing one after the other write, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
import tiny
from command_line import CALIBRATION, Call
from full_disks import small_disk
from pruned_checkpoints import file_hashes
from secateur.errors import CheckpointError, PatternError
from secateur.files.packed import PackedCheckpoint
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files that do not say when they were written, and under which name."""
    return {
        name: digest
        for name, digest in file_hashes(folder).items()
        if name not in ("secateur.json", "sparse_config.json", "README.md")
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_it_is_what_packing_afterwards_writes(tmp_path: Path, name: str) -> None:
    tiny.build(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    options = {"method": "magnitude", "pattern": 0.5}
    secateur.prune(tmp_path / "model", output=tmp_path / "pruned", **options)
    manifest = secateur.prune(tmp_path / "model", output=tmp_path / "direct", packed=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "model", "pruned"]
    pack(tmp_path / "pruned", tmp_path / "packed")
    assert contents(tmp_path / "direct") == contents(tmp_path / "packed")
    ours, theirs = PackedCheckpoint(tmp_path / "direct"), PackedCheckpoint(tmp_path / "packed")
    assert ours.record.matrices == theirs.record.matrices
    assert ours.record.dense == theirs.record.dense
    result = secateur.verify(tmp_path / "direct")
    assert result.ok
    assert result.matrices == len(manifest.matrices)
    unpack(tmp_path / "direct", tmp_path / "plain")
    assert contents(tmp_path / "plain") == contents(tmp_path / "pruned")
    assert secateur.verify(tmp_path / "plain").ok


def test_the_card_says_how_it_is_loaded(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    secateur.prune(tmp_path / "model", method="magnitude", output=tmp_path / "packed", packed=True)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert 'secateur.load("packed")' in card
    assert "AutoModelForCausalLM" not in card
    assert "not smaller" not in card
    unpack(tmp_path / "packed", tmp_path / "plain")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("packed")' in plain
    assert "secateur.load" not in plain
    # What somebody wrote there stays, and is not taken for ours.
    (tmp_path / "plain" / "README.md").write_text(plain.replace("from transformers import", "import"))
    pack(tmp_path / "plain", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (tmp_path / "plain" / "README.md").read_text()


def test_on_the_command_line(call: Call, model: Path, tmp_path: Path) -> None:
    dry = call("plan", model, "--packed", *CALIBRATION, "--json").json
    done = call("prune", model, "-o", tmp_path / "packed", "--packed", *CALIBRATION)
    assert done.code == 0
    packed = PackedCheckpoint(tmp_path / "packed")
    assert len(packed.record.matrices) == 21
    assert dry["packed_bytes"] == sum(record.bytes for record in packed.stored.values())
    assert dry["disk_bytes"] == call("plan", model, *CALIBRATION, "--json").json["disk_bytes"] + dry["packed_bytes"]
    assert "packed tensors" in call("plan", model, "--packed", *CALIBRATION).out
    assert call("verify", tmp_path / "packed", "--source", model).code == 0
    refused = call("prune", model, "-o", tmp_path / "none", "--packed", "--sparsity", "0.01", *CALIBRATION)
    assert refused.code == 2
    assert "no matrix would become smaller" in refused.message
    assert not (tmp_path / "none").exists()


def test_a_module_in_memory(tmp_path: Path) -> None:
    module = tiny.build("llama")
    with pytest.raises(CheckpointError, match="pack_module packs a module in memory"):
        secateur.prune(module, method="magnitude", packed=True)
    secateur.prune(module, method="magnitude", output=tmp_path / "packed", packed=True)
    assert isinstance(module.model.layers[0].mlp.up_proj, nn.Linear)
    assert secateur.verify(tmp_path / "packed").ok


def test_what_would_not_shrink_is_refused_by_the_dry_run_too(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    with pytest.raises(PatternError, match="no matrix would become smaller"):
        secateur.estimate(tmp_path / "model", method="magnitude", pattern=0.02, calibration=None, packed=True)


def test_a_disk_too_full_for_both_is_found_out_before_the_work(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    solved: list[str] = []
    packed = secateur.estimate(tmp_path / "model", method="magnitude", calibration=None, packed=True).packed_bytes
    with small_disk(tmp_path / "disk", (size + packed // 2) // 1000) as disk:
        with pytest.raises(CheckpointError, match="Free some space"):
            secateur.prune(
                tmp_path / "model",
                method="magnitude",
                output=disk / "packed",
                packed=True,
                on_event=lambda event: solved.append(event.stage),
            )
        assert "solve" not in solved
        assert list(disk.iterdir()) == []
