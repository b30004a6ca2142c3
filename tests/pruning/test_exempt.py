"""Runs that go on without some matrices: what is not finite stays dense, experts that saw nothing go by magnitude."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import secateur
import tiny
from pruned_checkpoints import bits, calibration, read_tensors, same_bytes
from secateur.core.gradients import GradientKind
from secateur.core.patterns import Unstructured
from secateur.core.problem import Problem, Solution
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.files.checkpoint import SINGLE_FILE, Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.record.far_blocks import mark_far_blocks
from secateur.record.manifest import Manifest, cautions, read_manifest
from secateur.record.verify import verify


def edited(folder: Path, name: str, change: Any) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors[name])
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def damaged(source: Path, out: Path, **options: Any) -> Manifest:
    return prune(source, calibration=calibration(), output=out, **{"method": wanda(), **options})


@pytest.mark.parametrize("within", ["block", "site"])
def test_a_weight_that_is_nan_spoils_only_what_it_reaches(within: str, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"  # of the last block: nothing is computed from it
    source = edited(tiny.save("llama", tmp_path / "source"), name, lambda tensor: tensor[1, 2].fill_(float("nan")))
    found = damaged(source, tmp_path / "out", on_nonfinite="skip-matrix", within=within)
    assert list(found.skipped) == [name]
    assert "first nan in row 1, column 2" in found.skipped[name]["reason"]
    assert found.settings["on_nonfinite"] == "skip-matrix"
    assert name not in found.plan
    assert len(found.matrices) == len(found.plan) == 20
    assert same_bytes(read_tensors(tmp_path / "out")[name], read_tensors(source)[name])
    assert any("1 of 21 planned matrices were left dense, first model.layers.2" in text for text in cautions(found))
    again = read_manifest(tmp_path / "out")
    assert again.skipped == found.skipped
    assert verify(tmp_path / "out", Checkpoint(source)).ok


def test_inputs_that_are_not_finite_leave_what_reads_them_dense(tmp_path: Path) -> None:
    name = "model.layers.2.post_attention_layernorm.weight"
    source = edited(tiny.save("llama", tmp_path / "source"), name, lambda tensor: tensor[5].fill_(float("inf")))
    found = damaged(source, tmp_path / "out", on_nonfinite="skip-matrix")
    left = {f"model.layers.2.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert set(found.skipped) == left
    assert "in sample 0, token 0, input 5" in found.skipped["model.layers.2.mlp.gate_proj.weight"]["reason"]
    assert verify(tmp_path / "out", Checkpoint(source)).ok


def test_a_sample_that_spoils_the_inputs_is_named(tmp_path: Path) -> None:
    ids = calibration()
    odd = tiny.VOCABULARY - 1
    ids[ids == odd] = 0
    ids[5, 3] = odd
    name = "model.embed_tokens.weight"
    source = edited(tiny.save("llama", tmp_path / "source"), name, lambda tensor: tensor[odd].fill_(float("nan")))
    with pytest.raises(secateur.CalibrationError, match="first nan in sample 5, token 3, input 0"):
        prune(source, method=wanda(), calibration=ids, batch_size=3, output=tmp_path / "out")


def test_a_block_whose_pruned_output_is_not_finite_is_named(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")

    def huge(problem: Problem) -> Solution:
        mask = torch.ones_like(problem.weight, dtype=torch.bool)
        return Solution(torch.full_like(problem.weight, 3e38), mask)

    method = secateur.Method("huge", huge, wanda().needs)
    with pytest.raises(NumericalError, match=r"layers\.0: its pruned output is not finite, first .* in sample 0"):
        damaged(source, tmp_path / "out", method=method, pattern=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_method_that_fails_on_a_matrix_leaves_it_dense(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    name = "model.layers.1.self_attn.v_proj.weight"

    def solve(problem: Problem) -> Solution:
        solution = wanda().solve(problem)
        return Solution(solution.weight / 0, solution.mask) if problem.name == name else solution

    method = secateur.Method("fails", solve, wanda().needs)
    with pytest.raises(NumericalError, match="NaN or infinite, first"):
        damaged(source, tmp_path / "out", method=method)
    found = damaged(source, tmp_path / "out", method=method, on_nonfinite="skip-matrix", overwrite=True)
    assert list(found.skipped) == [name]
    assert same_bytes(read_tensors(tmp_path / "out")[name], read_tensors(source)[name])


def test_a_run_that_could_prune_nothing_is_an_error(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    source = edited(tiny.save("llama", tmp_path / "source"), name, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(NumericalError, match="No matrix could be pruned, all 21 would stay dense"):
        damaged(source, tmp_path / "out", on_nonfinite="skip-matrix")


@pytest.mark.parametrize("within", ["block", "site"])
def test_experts_that_saw_no_token(within: str, tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(1, 1)
    with pytest.raises(secateur.ModelStructureError, match="--unseen magnitude"):
        prune(source, method=wanda(), calibration=ids, within=within, output=tmp_path / "out")
    made = {
        unseen: prune(source, method=wanda(), calibration=ids, unseen=unseen, within=within, output=tmp_path / unseen)
        for unseen in ("magnitude", "skip")
    }
    by_magnitude = {name for name, entry in made["magnitude"].matrices.items() if entry.get("method") == "magnitude"}
    assert by_magnitude
    assert all(made["magnitude"].matrices[name]["tokens"] == 0 for name in by_magnitude)
    assert not made["magnitude"].skipped
    # In the first block both runs see the same: whatever one skips there, the other prunes by magnitude.
    first = {name for name in by_magnitude if ".layers.0." in name}
    assert first == {name for name in made["skip"].skipped if ".layers.0." in name}
    plain = prune(source, method=magnitude(), pattern=Unstructured(0.5, "row"), output=tmp_path / "plain")
    one, other = read_tensors(tmp_path / "magnitude"), read_tensors(tmp_path / "plain")
    dense, left = read_tensors(source), read_tensors(tmp_path / "skip")
    for name in by_magnitude:
        entry = plain.matrices[name]
        assert torch.equal(bits(one[entry["tensor"]]), bits(other[entry["tensor"]])), name
    for name in first:
        assert same_bytes(left[name], dense[name])
    assert any("saw no calibration token and were pruned by magnitude" in text for text in cautions(made["magnitude"]))
    for unseen in ("magnitude", "skip"):
        assert verify(tmp_path / unseen, Checkpoint(source)).ok


@pytest.mark.parametrize("method", ["gradient", "gblm"])
def test_gradients_of_experts_that_saw_no_token(method: str, tmp_path: Path) -> None:
    """A file holds zeros for them; every run that is given it decides what that means."""
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(1, 2)
    file = tmp_path / "gradients"
    with pytest.raises(CalibrationError, match="its gradient is zero on all 1 calibration samples"):
        secateur.gradients(source, file, calibration=ids)
    made = secateur.gradients(source, file, calibration=ids, unseen="skip", overwrite=True)
    zero = {name for name in made.matrices if not made.read(name, GradientKind("l1")).total.any()}
    assert zero
    options = {"method": method, "calibration": ids, "only": ["*.layers.0.*"]}
    zero = {name for name in zero if ".layers.0." in name}
    for given in (file, None):
        taken = {} if given is None else {"gradient": given}
        with pytest.raises((CalibrationError, secateur.ModelStructureError)):
            prune(source, output=tmp_path / "out", overwrite=True, **options, **taken)
        kinds = {}
        for unseen in ("skip", "magnitude"):
            out = tmp_path / f"{unseen}-{given is None}"
            kinds[unseen] = prune(source, output=out, unseen=unseen, **options, **taken)
        assert set(kinds["skip"].skipped) == zero
        entries = kinds["magnitude"].matrices
        assert {name for name, entry in entries.items() if entry.get("method") == "magnitude"} == zero
    for unseen in ("skip", "magnitude"):
        own, other = (read_tensors(tmp_path / f"{unseen}-{taken}") for taken in (True, False))
        assert all(same_bytes(own[name], other[name]) for name in own)


@pytest.mark.parametrize("run", ["prune", "gradients"])
def test_nan_in_an_expert_that_nothing_reaches_where_gradients_are_taken(run: str, tmp_path: Path) -> None:
    source, ids = tiny.save("mixtral", tmp_path / "source"), tiny.tokens(1, 2)
    found = secateur.gradients(source, tmp_path / "before", calibration=ids, unseen="skip")
    unseen = [name for name in found.matrices if not found.read(name, GradientKind("l1")).total.any()]
    edited(source, unseen[0], lambda tensor: tensor[0].fill_(float("nan")))
    with pytest.raises(NumericalError, match=unseen[0]):
        secateur.gradients(source, tmp_path / "out", calibration=ids, unseen="skip")
    options = {"calibration": ids, "unseen": "skip", "on_nonfinite": "skip-matrix"}
    if run == "gradients":
        assert secateur.gradients(source, tmp_path / "out", **options).matrices == found.matrices
        return
    manifest = prune(source, method="gblm", output=tmp_path / "out", **options)
    assert "NaN" in manifest.skipped[unseen[0]]["reason"]
    assert list(manifest.skipped) == [name for name in found.matrices if name in manifest.skipped], "in their order"


def test_a_sweep_goes_on_without_them_too(tmp_path: Path) -> None:
    source = tiny.save("mixtral", tmp_path / "source")
    save_file({"input_ids": tiny.tokens(1, 2)}, tmp_path / "few.safetensors")
    save_file({"input_ids": tiny.tokens(2, 16)}, tmp_path / "tokens.safetensors")
    options = {"methods": ["wanda", "gblm"], "calibration": str(tmp_path / "few.safetensors")}
    options |= {"data": [str(tmp_path / "tokens.safetensors")], "eval_length": 16}
    for unseen, expected in (("error", "failed"), ("magnitude", "done")):
        made = secateur.sweep(source, output=tmp_path / unseen, unseen=unseen, **options)
        assert {cell.status for cell in made.cells} == {expected}
    with pytest.raises(CheckpointError, match="--unseen"):
        secateur.sweep(source, output=tmp_path / "magnitude", unseen="skip", **options)


def changes(*values: float | None) -> list[dict[str, Any]]:
    return [{"index": index, "output_change": value} for index, value in enumerate(values)]


def test_a_block_that_moved_far_is_marked_and_one_that_is_a_little_worse_is_not() -> None:
    usual = [0.10, 0.12, 0.11, 0.13, 0.12, 0.14, 0.12, 0.13]
    blocks = changes(*usual)
    mark_far_blocks(blocks)
    assert not any("usual_change" in block for block in blocks)
    blocks = changes(*usual[:4], 0.9, *usual[4:])
    mark_far_blocks(blocks)
    assert [block["index"] for block in blocks if "usual_change" in block] == [4]
    assert blocks[4]["usual_change"] == pytest.approx(0.12, abs=0.01)
    for few in (changes(0.1, 0.9, 0.1), changes(None, 0.0, 0.0, 0.0, 0.0, 0.5)):  # nothing to compare with
        mark_far_blocks(few)
        assert not any("usual_change" in block for block in few)
    steady = changes(*[0.02 * 1.3**index for index in range(10)])  # that blocks move more and more is no fault
    mark_far_blocks(steady)
    assert not any("usual_change" in block for block in steady)


def test_a_block_with_damaged_weights_is_flagged(tmp_path: Path) -> None:
    config = tiny.build("llama").config
    config.num_hidden_layers, config.layer_types = 8, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = tmp_path / "source"
        LlamaForCausalLM(config).save_pretrained(source)

    def solve(problem: Problem) -> Solution:
        solution = wanda().solve(problem)
        wrong = ".layers.3." in problem.name
        return Solution(solution.weight * (4 if wrong else 1), solution.mask)

    found = damaged(source, tmp_path / "out", method=secateur.Method("damaging", solve, wanda().needs), pattern=0.2)
    assert [block["index"] for block in found.blocks if "usual_change" in block] == [3]
    assert any(text.startswith("The output of block 3 moved by ") for text in cautions(found))
    assert read_manifest(tmp_path / "out").blocks[3]["usual_change"] < found.blocks[3]["output_change"] / 3
