"""Files of gradients: refused wherever they do not belong, and otherwise as good as gradients taken on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
import tiny
from secateur.collect.gradient_file import GradientFile, GradientWriter, model_digest
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution, chain
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError, CheckpointError, NumericalError, SecateurError
from secateur.files.checkpoint import read_header
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.gblm import gblm, gradient
from secateur.methods.magnitude import magnitude
from secateur.methods.pruner_zero import pruner_zero
from secateur.methods.wanda import wanda
from secateur.methods.wanda_plus import wanda_plus
from secateur.pruning.engine import prune
from secateur.record.manifest import read_manifest
from secateur.record.verify import verify
from secateur.runs.events import Event

FIRST = "model.layers.0.mlp.down_proj.weight"
SAMPLES, LENGTH = 4, 12


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


def take(model: Any, output: Path, ids: Tensor, **options: Any) -> GradientFile:
    return secateur.gradients(model, output, **{"calibration": ids, "norms": ["l1", "l2"], "device": "cpu"} | options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_weights(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def masks_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor != 0 for name, tensor in tensors.items() if name.startswith("model.layers.") and tensor.dim() == 2
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("gradient_file") / "llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tiny.tokens(samples=SAMPLES, length=LENGTH)


@pytest.fixture(scope="module")
def file(llama: Path, ids: Tensor) -> GradientFile:
    return take(llama, llama.parent / "gradients.safetensors", ids)


# The file


def test_safetensors_itself_reads_it(llama, ids, file):
    shapes = {f"{norm}:{name}": shape for name, shape in shapes_of(llama).items() for norm in ("l1", "l2")}
    with safe_open(file.path, "pt") as opened:
        assert set(opened.keys()) == set(shapes)
        for key, shape in shapes.items():
            norm, _, name = key.partition(":")
            tensor = opened.get_tensor(key)
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, shape)
            assert torch.equal(tensor, file.read(name, GradientKind(norm)).total)
            assert bool((tensor >= 0).all())
        metadata = opened.metadata()
    held = json.loads(metadata["secateur_gradients"])
    assert len(held.pop("digest")) == 64
    assert held == file.provenance
    assert json.loads(metadata["secateur_digests"]) == {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in load_file(file.path).items()
    }
    assert metadata["format"] == "pt"


def shapes_of(folder: Path) -> dict[str, tuple[int, int]]:
    """The matrices of the blocks, by safetensors itself."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.") and tensor.dim() == 2
    }


def test_what_it_tells_of_itself(llama, ids, file):
    held = file.provenance
    assert {key: held[key] for key in ("format", "norms", "granularity", "scope", "samples", "length", "dtype")} == {
        "format": 2,
        "norms": ["l1", "l2"],
        "granularity": "sample",
        "scope": "model",
        "samples": SAMPLES,
        "length": LENGTH,
        "dtype": "float32",
    }
    assert held["model"]["path"] == str(llama)
    assert set(file.matrices) == set(shapes_of(llama))
    assert set(held["source_tensors"]) == set(load_file(llama / "model.safetensors"))
    assert held["model_digest"] == model_digest(held["source_tensors"])
    assert held["versions"]["secateur"] == secateur.__version__
    statistic = file.read(FIRST, GradientKind("l2"))
    assert (statistic.samples, statistic.tokens, statistic.kind) == (SAMPLES, SAMPLES * LENGTH, GradientKind("l2"))
    assert isinstance(statistic, GradientNorm)


def test_digests_are_those_of_the_manifest(llama, ids, file, tmp_path):
    manifest = prune(llama, method=wanda(), calibration=ids, output=tmp_path / "out")
    assert manifest.calibration is not None
    assert manifest.calibration["digest"] == file.provenance["tokens_digest"]
    assert manifest.source_tensors.items() <= file.provenance["source_tensors"].items()


def test_experts_have_an_entry_each(tmp_path):
    source = tiny.save("gpt_oss", tmp_path / "source")
    file = take(source, tmp_path / "gradients", tiny.tokens(samples=8, length=16), norms=["l1"])
    experts = [name for name in file.matrices if ".experts." in name]
    assert len(experts) == tiny.BLOCKS * 2 * 4
    held = load_file(tmp_path / "gradients")
    stored = load_file(source / "model.safetensors")
    for name in experts:
        tensor, _, number = name.rpartition(".")
        assert number.isdecimal()
        assert held[f"l1:{name}"].shape == stored[tensor][0].t().shape, "(out, in), however it is stored"


# What is refused


def other_weights(llama: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the model with some weights changed."""
    folder.mkdir()
    for part in llama.iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    tensors = load_file(llama / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", [gblm(), gradient(), pruner_zero()], ids=lambda method: method.name)
@pytest.mark.parametrize("block", [0, 2])
def test_other_weights_of_the_same_shape(method, block, llama, ids, file, tmp_path):
    name = f"model.layers.{block}.self_attn.k_proj.weight"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][0, 0] += 1e-3

    model = other_weights(llama, tmp_path / "other", change)
    with pytest.raises(CheckpointError) as caught:
        prune(model, method=method, calibration=ids, gradient=file.path, output=tmp_path / "out")
    held = file.provenance["source_tensors"][name]
    told, _, end = str(caught.value).partition(", expected ")
    assert told == f"{file.path}: belongs to another model ({llama}): {name} had the digest {held[:12]} there"
    assert re.fullmatch(r"[0-9a-f]{12}\. Make a file for this model\.", end)
    assert names(tmp_path) == (["other"] if block == 0 else ["other", "out.partial"])  # with the blocks before it


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_every_tensor_counts(llama, ids, file, tmp_path, name):
    """Gradients depend on all of a model, also on what is not pruned."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] += 1e-3

    model = other_weights(llama, tmp_path / "other", change)
    skip = ["*.2.self_attn.k_proj"]
    with pytest.raises(CheckpointError, match=rf": belongs to another model .*: {re.escape(name)} had the digest "):
        prune(model, method=gblm(), calibration=ids, gradient=file.path, skip=skip, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_that_were_taken_in_another_way(llama, ids, file, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.collect.gradient_file.REVISION", 3)
    told = rf"{file.path}: its gradients were taken in another way \(revision 2, expected 3\)\. Remove the file, and"
    with pytest.raises(CheckpointError, match=told):
        prune(llama, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "out")


def test_a_pruned_module_is_another_model(llama, ids, file):
    model = AutoModelForCausalLM.from_pretrained(llama)
    prune(model, method=gblm(), calibration=ids, gradient=file.path)
    with pytest.raises(CheckpointError, match=r": belongs to another model "):
        prune(model, method=gblm(), calibration=ids, gradient=file.path)


def test_other_tokens(llama, ids, file, tmp_path):
    other = ids.clone()
    other[-1, -1] = ids[-1, -1] % 100 + 5
    assert not torch.equal(other, ids)
    for tokens in (other, ids[:3], ids[:, :8], ids.flip(0)):
        with pytest.raises(CalibrationError) as caught:
            prune(llama, method=gblm(), calibration=tokens, gradient=file.path, output=tmp_path / "out")
        told, _, end = str(caught.value).partition(", expected ")
        digest = file.provenance["tokens_digest"][:12]
        assert told == f"{file.path}: its gradients are of other tokens: 4 samples of 12 with digest {digest}"
        assert re.fullmatch(
            rf"{len(tokens)} of {tokens.shape[1]} with [0-9a-f]{{12}}\. "
            r"Use the same --calibration, --samples, --length, --seed, --sampling and --bos for both, or make another "
            r"file\.",
            end,
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("taken", "method", "found", "expected"),
    [
        ({"norms": ["l1"]}, gblm("l2"), "norm l1", ("needs l2", "--norm l2")),
        ({"norms": ["l2"]}, gblm("l1"), "norm l2", ("needs l1", "--norm l1")),
        ({"granularity": "token"}, gblm(), "granularity token", ("needs sample", "--granularity sample")),
        ({"scope": "block"}, gblm(), "scope block", ("needs model", "--scope model")),
        ({}, wanda_plus(), "scope model", ("needs block", "--scope block")),
    ],
    ids=["no l2", "no l1", "of tokens", "of blocks", "of the model"],
)
def test_other_gradients(taken, method, found, expected, llama, ids, tmp_path):
    file = take(llama, tmp_path / "gradients", ids, **taken)
    message = (
        f"{file.path}: holds gradients with {found}, and the method {expected[0]}. "
        f"Make another file with secateur gradients {expected[1]}."
    )
    with pytest.raises(CalibrationError, match=pinned(message)):
        prune(llama, method=method, calibration=ids, gradient=file.path, output=tmp_path / "out")
    assert names(tmp_path) == ["gradients"]


def test_missing_matrices(llama, ids, tmp_path):
    file = take(llama, tmp_path / "gradients", ids, skip=["*.1.mlp.up_proj"])
    message = (
        f"{file.path}: holds no gradient of model.layers.1.mlp.up_proj.weight. It belongs to another model ({llama}), "
        "or was made with --only or --skip."
    )
    with pytest.raises(CheckpointError, match=pinned(message)):
        prune(llama, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "out")
    assert names(tmp_path) == ["gradients"]
    prune(llama, method=gblm(), calibration=ids, gradient=file.path, skip=["*.up_proj"], output=tmp_path / "out")


def test_other_shapes(ids, file, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.TABLE, "llama", {"intermediate_size": 64})
    wide = tiny.save("llama", tmp_path / "wide")
    message = (
        f"{file.path}: its gradient of {FIRST} is of shape (32, 48), expected (32, 64). It belongs to another model."
    )
    with pytest.raises(CheckpointError, match=pinned(message)):
        prune(wide, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "out")
    other = tiny.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r": holds no gradient of transformer\.h\.0\."):
        prune(other, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "out")


@pytest.mark.parametrize("method", [magnitude(), wanda()], ids=lambda method: method.name)
def test_a_method_that_uses_none(method, llama, ids, file, tmp_path):
    message = f"--gradient {file.path}: the method {method.name} uses no gradients. Leave it out."
    with pytest.raises(CalibrationError, match=pinned(message)):
        prune(llama, method=method, calibration=ids, gradient=file.path, output=tmp_path / "out")


def test_something_else(llama, file, tmp_path):
    weights = llama / "model.safetensors"
    message = f"{weights}: holds no gradients. Make such a file with secateur gradients MODEL -o FILE."
    with pytest.raises(CheckpointError, match=pinned(message)):
        GradientFile(weights)
    for number, content in enumerate(("not JSON", "[]", "3", '{"norms": ["l1"]}', "[" * 100_000)):
        other = tmp_path / f"other-{number}"
        save_file({"l1:w": torch.ones(2, 2)}, other, {"secateur_gradients": content})
        with pytest.raises(CheckpointError, match=rf"^{other}: .* Make a new file with secateur gradients\.$"):
            GradientFile(other)
    later = tmp_path / "later"
    save_file({"l1:w": torch.ones(2, 2)}, later, {"secateur_gradients": '{"format": 3}'})
    message = (
        f"{later}: format 3, expected 2; another version of Secateur wrote it. Make a new file with secateur gradients."
    )
    with pytest.raises(CheckpointError, match=pinned(message)):
        GradientFile(later)
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(missing))}: "):
            GradientFile(missing)


@pytest.mark.parametrize("cut", [1, 1000, -4, -1000])
def test_a_truncated_file(cut, llama, ids, file, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_bytes(file.path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(damaged))}: "):
        GradientFile(damaged)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(damaged))}: "):
        prune(llama, method=gblm(), calibration=ids, gradient=damaged, output=tmp_path / "out")
    assert names(tmp_path) == ["damaged"]


# Writing


def test_nothing_is_overwritten_unasked(llama, ids, tmp_path):
    target = tmp_path / "gradients"
    target.write_text("precious")
    message = f"{target}: exists already. Choose another name, or pass --overwrite."
    with pytest.raises(CheckpointError, match=pinned(message)):
        take(llama, target, ids)
    message = (
        f"{target}: exists and holds no gradients, so Secateur did not write it and will not overwrite it. "
        "Choose another name, or remove it yourself."
    )
    with pytest.raises(CheckpointError, match=pinned(message)):
        take(llama, target, ids, overwrite=True)
    assert target.read_text() == "precious"
    target.unlink()
    take(llama, target, ids, only=["*.0.*"])
    file = take(llama, target, ids, overwrite=True)
    assert len(file.matrices) == 21
    folder = tmp_path / "folder"
    folder.mkdir()
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(folder))}: (exists already|is a folder)"):
            take(llama, folder, ids, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=r": lies inside the model"):
        take(llama, llama / "gradients.safetensors", ids)
    assert names(tmp_path) == ["folder", "gradients"]


def test_the_file_may_be_relative_and_deep(llama, ids, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = take(llama, Path("a") / "b" / "gradients", ids)
    assert made.path == tmp_path / "a" / "b" / "gradients"
    assert names(tmp_path / "a" / "b") == ["gradients"]
    assert torch.equal(made.read(FIRST, GradientKind("l1")).total, file.read(FIRST, GradientKind("l1")).total)


def test_the_same_file_twice(llama, ids, file, tmp_path):
    again = take(llama, tmp_path / "again", ids)
    first, second = load_file(file.path), load_file(again.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    different = {key for key, value in file.provenance.items() if value != again.provenance[key]}
    assert different <= {"created"}


def test_a_file_goes_on_where_another_writer_ended(tmp_path):
    """Also where that one ended while it wrote the last header, of which anything may be there."""
    target = tmp_path / "gradients"
    shapes = {"one": (2, 3), "two": (1, 4)}
    facts = {"granularity": "sample", "scope": "model", "samples": 3, "length": 2, "tokens_digest": "t"}
    facts |= {"calibration": {}, "model": {}, "source_tensors": {}, "norms": ["l2", "l1"]}
    one = {("one", norm): torch.full((2, 3), value) for norm, value in (("l1", 0.5), ("l2", 0.25))}
    two = {("two", norm): torch.full((1, 4), value) for norm, value in (("l1", 1.5), ("l2", 0.75))}
    first = GradientWriter(target, shapes, ["l2", "l1"], facts)
    found = first.add(one)
    assert sorted(found) == ["l1:one", "l2:one"]
    first.abandon()
    second = GradientWriter(target, shapes, ["l2", "l1"], facts, found=found)
    assert torch.equal(second.read("one", "l2"), one["one", "l2"])
    found |= second.add(two)
    second.close()
    whole = target.read_bytes()
    for damage in (b"", b"\x00" * 300):
        target.write_bytes(whole[:100] + damage + whole[100 + len(damage) :])
        third = GradientWriter(target, shapes, ["l2", "l1"], facts, found=found)
        third.close()
        third.abandon()
        assert target.read_bytes() == whole
    assert names(tmp_path) == ["gradients"]
    assert torch.equal(load_file(target)["l2:two"], torch.full((1, 4), 0.75))
    assert sorted(GradientFile(target).matrices) == ["one", "two"]


def test_a_file_that_another_hand_changed_is_not_gone_on_with(tmp_path):
    target = tmp_path / "gradients"
    writer = GradientWriter(target, {"one": (2, 3), "two": (2, 3)}, ["l1"], {})
    found = writer.add({("one", "l1"): torch.ones(2, 3)})
    writer.abandon()
    with pytest.raises(CheckpointError, match="was changed since the run that wrote it ended"):
        GradientWriter(target, {"one": (2, 3), "two": (2, 3)}, ["l1"], {"other": 1}, found=found)
    raw = bytearray(target.read_bytes())
    raw[-48] ^= 1
    target.write_bytes(raw)
    again = GradientWriter(target, {"one": (2, 3), "two": (2, 3)}, ["l1"], {}, found=found)
    with pytest.raises(CheckpointError, match=r"l1:one was changed since it was written"):
        again.read("one", "l1")
    again.abandon()


# Pruning with it


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        (gblm(), Unstructured(0.5)),
        (gblm("l2", 1000.0), NM(2, 4)),
        (METHODS["gblm_inverse"](), Unstructured(0.5, "matrix")),
        (gradient("l2"), NM(4, 8)),
        (pruner_zero(), Unstructured(0.5, "search")),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_file_is_as_good_as_gradients_on_the_way(method, pattern, llama, ids, file, tmp_path, monkeypatch):
    options = {"method": method, "pattern": pattern, "calibration": ids}
    events: list[Event] = []
    own = prune(llama, **options, output=tmp_path / "own", on_event=events.append)
    given = prune(llama, **options, gradient=file.path, output=tmp_path / "given")
    assert_same_weights(tmp_path / "own", tmp_path / "given")
    assert names(tmp_path) == ["given", "own"], "no scratch file stays"
    assert any(event.stage == "gradients: backward" for event in events)
    assert "gradients" in own.seconds
    assert "gradients" not in given.seconds
    for manifest in (own, given):
        assert method.gradient is not None
        assert manifest.settings["gradient"] == vars(method.gradient)
        assert manifest.method == method.name
        assert manifest.calibration is not None
        assert manifest.calibration["digest"] == file.provenance["tokens_digest"]
    for folder in (tmp_path / "own", tmp_path / "given"):
        assert verify(folder).ok
        assert read_manifest(folder).settings["gradient"] == vars(method.gradient)

    # A module in memory is pruned in place, and what it needs on the way is gone as well.
    monkeypatch.chdir(tmp_path)
    expected = masks_of(load_file(tmp_path / "own" / "model.safetensors"))
    for path in (None, file.path):
        model = AutoModelForCausalLM.from_pretrained(llama)
        prune(model, **options, gradient=path)
        got = masks_of(dict(model.state_dict()))
        assert got.keys() == expected.keys()
        assert all(torch.equal(mask, expected[name]) for name, mask in got.items())
    assert names(tmp_path) == ["given", "own"]


@pytest.mark.parametrize("method", [gradient(), pruner_zero()], ids=lambda method: method.name)
def test_gradients_alone_need_no_calibration(method, llama, file, tmp_path, monkeypatch):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("calibration samples are drawn")

    monkeypatch.setattr("secateur.pruning.preparation.model_samples", never)
    monkeypatch.setattr("secateur.models.flow.stream.Stream.__init__", never)
    manifest = prune(llama, method=method, gradient=file.path, output=tmp_path / "out")
    expected = {**file.provenance["calibration"], "digest": file.provenance["tokens_digest"]}
    assert manifest.calibration == read_manifest(tmp_path / "out").calibration == expected
    assert manifest.totals["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert verify(tmp_path / "out").ok


def test_only_planned_matrices_are_taken(llama, ids, tmp_path, monkeypatch):
    seen: list[list[str]] = []
    collect = secateur.pruning.engine.collect

    def watch(opened: Any, windows: Any, target: Path, *rest: Any, **options: Any) -> GradientFile:
        made = collect(opened, windows, target, *rest, **options)
        seen.append(made.matrices)
        assert target.parent == tmp_path / "out.partial", "beside the output"
        return made

    monkeypatch.setattr("secateur.pruning.engine.collect", watch)
    prune(llama, method=gblm(), calibration=ids, only=["*.1.*", "*.2.self_attn.*"], output=tmp_path / "out")
    assert sorted(seen[0]) == sorted(name for name in shapes_of(llama) if re.search(r"\.1\.|\.2\.self_attn", name))


def failing_at(stage: str) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if event.stage == stage:
            raise KeyboardInterrupt

    return on_event


@pytest.mark.parametrize(
    "stage", ["gradients: record", "gradients: head", "gradients: backward", "statistics", "solve"]
)
@pytest.mark.parametrize("offload", [False, True])
def test_a_failure_leaves_finished_gradients_alone(stage, offload, llama, ids, tmp_path):
    (tmp_path / "fast").mkdir()
    options = {"offload_states": str(tmp_path / "fast")} if offload else {}
    with pytest.raises(KeyboardInterrupt):
        prune(llama, method=gblm(), calibration=ids, output=tmp_path / "out", on_event=failing_at(stage), **options)
    assert names(tmp_path / "fast") == []
    if stage in ("gradients: record", "gradients: head"):
        assert names(tmp_path) == ["fast"]
        return
    assert names(tmp_path) == ["fast", "out.partial"]
    assert names(tmp_path / "out.partial") == ["gradients.safetensors", "journal.jsonl", "lock", "result"]
    if stage != "gradients: backward":
        GradientFile(tmp_path / "out.partial" / "gradients.safetensors")


def test_a_method_that_fails_leaves_nothing(llama, ids, file, tmp_path):
    def solve(problem: Problem) -> Solution:
        assert problem.gradient_norm().samples == SAMPLES
        raise NumericalError(f"{problem.name}: no luck.")

    method = Method("failing", solve, frozenset({SquaredNorm, GradientKind("l2")}))
    for given in (None, file.path):
        with pytest.raises(NumericalError, match="no luck"):
            prune(llama, method=method, calibration=ids, gradient=given, output=tmp_path / "out", overwrite=True)
        assert names(tmp_path) == (["out.partial"] if given is None else [])  # the gradients that it took itself


def test_weights_that_are_not_finite(llama, ids, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST][1, 2] = float("nan")

    model = other_weights(llama, tmp_path / "other", change)
    with pytest.raises(SecateurError, match=re.escape(FIRST)):
        take(model, tmp_path / "gradients", ids)
    with pytest.raises(SecateurError, match=re.escape(FIRST)):
        prune(model, method=gblm(), calibration=ids, output=tmp_path / "out")
    assert names(tmp_path) == ["other"]


def test_a_dead_matrix_is_named(llama, ids, tmp_path):
    """Nothing flows through a matrix whose outputs are multiplied by zero."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()

    model = other_weights(llama, tmp_path / "other", change)
    message = (
        "model.layers.1.self_attn.k_proj.weight: its gradient is zero on all 4 calibration samples, so nothing is "
        "known of its weights. Calibrate on more samples (--samples), or leave it dense with --skip "
        '"model.layers.1.self_attn.k_proj.weight".'
    )
    with pytest.raises(CalibrationError, match=pinned(message)):
        take(model, tmp_path / "gradients", ids)
    assert names(tmp_path) == ["gradients.partial", "other"]
    take(model, tmp_path / "gradients", ids, overwrite=True, skip=[f"*.1.self_attn.{part}_proj" for part in "qkv"])


def test_chained_methods_use_it_too(llama, ids, file, tmp_path):
    method = chain(gblm(), REFINEMENTS["swaps"]())
    assert method.gradient == GradientKind("l1")
    for name, given in (("own", None), ("given", file.path)):
        prune(llama, method=method, calibration=ids, gradient=given, output=tmp_path / name)
    assert_same_weights(tmp_path / "own", tmp_path / "given")
    prune(llama, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "alone")
    swapped, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "alone"))
    assert any(not torch.equal(swapped[name], alone[name]) for name in alone)


# Digests of the numbers


@pytest.mark.parametrize("bit", [0, 6, 22, 31])
def test_one_flipped_bit_is_noticed(llama, ids, tmp_path, bit):
    file = take(llama, tmp_path / "gradients", ids, norms=["l1", "l2"], only=["*.1.mlp.*"])
    name = file.matrices[1]
    record = read_header(file.path).tensors[f"l2:{name}"]
    position = record.start + (record.bytes // 8) * 4 + bit // 8
    raw = bytearray(file.path.read_bytes())
    raw[position] ^= 1 << bit % 8
    file.path.write_bytes(raw)
    again = GradientFile(file.path)
    for matrix, norm in itertools.product(file.matrices, ("l1", "l2")):
        kind = GradientKind(norm)
        if (matrix, norm) == (name, "l2"):
            with pytest.raises(CheckpointError, match=rf"gradients l2:{re.escape(name)} have changed since"):
                again.read(matrix, kind)
        else:
            assert torch.equal(again.read(matrix, kind).total, load_file(file.path)[f"{norm}:{matrix}"])


def test_a_method_refuses_changed_gradients(llama, ids, tmp_path):
    file = take(llama, tmp_path / "gradients", ids, norms=["l1"])
    raw = bytearray(file.path.read_bytes())
    raw[-1000] ^= 0x40
    file.path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="have changed since they were written"):
        prune(llama, method=gblm(), calibration=ids, gradient=file.path, output=tmp_path / "out")
    assert names(tmp_path) == ["gradients", "out.partial"]  # the blocks before it


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda p: p.update(samples=8), "its header was altered since it was written"),
        (lambda p: p.update(samples="4"), r"Expected `int`, got `str` - at `\$\.samples`"),
        (lambda p: p.update(norms=[]), "norms"),
        (lambda p: p.update(model=[]), "model"),
        (lambda p: p.update(format=1), r"format 1, expected 2; another version of Secateur wrote it\."),
        (lambda p: p.update(format=[]), "format"),
        (lambda p: p.pop("tokens_digest"), "tokens_digest"),
    ],
)
def test_an_altered_header(llama, ids, tmp_path, change, what):
    file = take(llama, tmp_path / "gradients", ids, only=["*.1.mlp.*"])
    with safe_open(file.path, "pt") as stream:
        metadata = dict(stream.metadata())
    provenance = json.loads(metadata["secateur_gradients"])
    change(provenance)
    metadata["secateur_gradients"] = json.dumps(provenance)
    save_file(load_file(file.path), file.path, metadata)
    with pytest.raises(CheckpointError, match=rf"gradients: .*{what}.*Make a new file with secateur gradients\."):
        GradientFile(file.path)
