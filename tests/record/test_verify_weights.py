"""`verify` finds every weight that is not what the pattern and the source say."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from secateur.core.patterns import Unstructured
from secateur.files.checkpoint import Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.pruning.engine import prune
from secateur.record.verify import verify
from verified_runs import PLANNED, UNPLANNED, edit, forge


def first_zero(folder: Path, name: str) -> tuple[int, int]:
    row, column = Checkpoint(folder).read([name])[name].eq(0).nonzero()[5].tolist()
    return row, column


def test_a_zero_filled_by_a_value_breaks_the_pattern(pruned: Path, dense: Path) -> None:
    row, column = first_zero(pruned, PLANNED)
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].fill_(1e-20))
    start = column // 4 * 4
    pattern = f"{PLANNED}: row {row}, columns {start} to {start + 3}: 3 non-zeros, expected at most 2"
    zeros = f"{PLANNED}: 767 zeros, the manifest records 768"
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written", pattern, zeros]
    forge(pruned)
    assert verify(pruned).problems == [pattern, zeros]
    kept_weight = f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    assert verify(pruned, Checkpoint(dense)).problems == [pattern, zeros, kept_weight]


@pytest.mark.parametrize(
    ("per", "expected"),
    [("row", "row {row} has 15 zeros"), ("matrix", "the matrix has 767 zeros")],
)
def test_unstructured_patterns_count_their_zeros(per: str, expected: str, dense: Path, tmp_path: Path) -> None:
    prune(dense, method=magnitude(), pattern=Unstructured(0.5, per), output=tmp_path / "out")
    row, column = first_zero(tmp_path / "out", PLANNED)
    edit(tmp_path / "out", PLANNED, lambda tensor: tensor[row, column].fill_(1.0))
    forge(tmp_path / "out")
    first, second = verify(tmp_path / "out").problems
    assert first.startswith(f"{PLANNED}: {expected.format(row=row)}")
    assert second == f"{PLANNED}: 767 zeros, the manifest records 768"


def test_a_kept_weight_that_differs_in_its_last_bit(pruned: Path, dense: Path) -> None:
    row, column = Checkpoint(pruned).read([PLANNED])[PLANNED].nonzero()[7].tolist()
    edit(pruned, PLANNED, lambda tensor: tensor.view(torch.int32)[row, column].bitwise_xor_(1))
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written"]
    forge(pruned)
    assert verify(pruned).ok
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    ]


def test_one_zero_too_many(pruned: Path, dense: Path) -> None:
    row, column = Checkpoint(pruned).read([PLANNED])[PLANNED].nonzero()[7].tolist()
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].zero_())
    forge(pruned)
    assert verify(pruned, Checkpoint(dense)).problems == [f"{PLANNED}: 769 zeros, the manifest records 768"]


def test_a_negative_zero(pruned: Path, dense: Path) -> None:
    row, column = first_zero(pruned, PLANNED)
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].fill_(-0.0))
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written"]
    forge(pruned)
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    ]


def test_a_negative_zero_in_an_unplanned_tensor(pruned: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    edit(source, UNPLANNED, lambda tensor: tensor[0, 0].fill_(0.0))
    edit(pruned, UNPLANNED, lambda tensor: tensor[0, 0].fill_(-0.0))
    forge(pruned)
    assert verify(pruned, Checkpoint(source)).problems == [
        f"{UNPLANNED}: not planned, yet its bytes differ from the source"
    ]


def test_nan_compares_by_its_bits(pruned: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    for folder in (source, pruned):
        edit(folder, UNPLANNED, lambda tensor: tensor[0, 0].fill_(float("nan")))
    forge(pruned)
    assert verify(pruned, Checkpoint(source)).ok


@pytest.mark.parametrize("name", [PLANNED, UNPLANNED, "model.embed_tokens.weight", "model.norm.weight"])
def test_the_source_is_compared_tensor_by_tensor(name: str, kept: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    zero = (0,) * len(Checkpoint(source).shape(name))
    if name == PLANNED:
        zero = first_zero(kept, PLANNED)
    edit(source, name, lambda tensor: tensor[zero].add_(1.0))
    problem = (
        "the source is not the one that was pruned; its bytes differ from the record"
        if name == PLANNED
        else "not planned, yet its bytes differ from the source"
    )
    assert verify(kept, Checkpoint(source)).problems == [f"{name}: {problem}"]


def test_a_source_of_another_seed_differs_in_every_tensor(kept: Path, tmp_path: Path) -> None:
    tiny.build("llama", seed=1).save_pretrained(tmp_path / "other")
    result = verify(kept, Checkpoint(tmp_path / "other"))
    assert result.compared_to == str(tmp_path / "other")
    names = Checkpoint(kept).names
    assert {problem.partition(":")[0] for problem in result.problems} == set(names)
    planned = [name for name in names if ".mlp." in name]
    assert sum("the source is not the one that was pruned" in problem for problem in result.problems) == len(planned)


def test_a_source_in_another_dtype(kept: Path, dense: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    result = verify(kept, Checkpoint(tmp_path / "half"))
    assert len(result.problems) == result.tensors
    assert f"{PLANNED}: (48, 32) torch.float32, the source has (48, 32) torch.bfloat16" in result.problems


def test_a_source_of_another_architecture(kept: Path, tmp_path: Path) -> None:
    tiny.save("llama_tied", tmp_path / "tied")
    assert "lm_head.weight: absent from the source" in verify(kept, Checkpoint(tmp_path / "tied")).problems
    tiny.save("llama_bias", tmp_path / "bias")
    problems = verify(kept, Checkpoint(tmp_path / "bias")).problems
    assert "model.layers.0.mlp.up_proj.bias: absent from the pruned checkpoint" in problems


def test_a_planned_matrix_without_a_record(pruned: Path) -> None:
    forge(pruned, lambda manifest: manifest.matrices.pop(PLANNED) is None)
    assert verify(pruned).problems == [f"{PLANNED}: planned, but the manifest has no record of pruning it"]


def test_the_unplanned_experts_of_a_fused_tensor(tmp_path: Path) -> None:
    tiny.save("llama4_text", tmp_path / "dense")
    tensor = "model.layers.1.feed_forward.experts.down_proj"
    prune(tmp_path / "dense", method=magnitude(), only=[f"{tensor}.0", f"{tensor}.2"], output=tmp_path / "out")
    source = Checkpoint(tmp_path / "dense")
    assert verify(tmp_path / "out", source).ok
    edit(tmp_path / "out", tensor, lambda value: value[1, 3, 3].add_(1.0))
    forge(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", source).problems == [
        f"{tensor}.1: not planned, yet its bytes differ from the source"
    ]
