"""Training a pruned checkpoint: it gets better, keeps its zeros, says what it did, and goes on where it stopped."""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from real_data import STORIES, byte_pair_tokenizer, some_stories
from recoveries import IDS, pruned, tensors, tune
from secateur.calibration.packing import training_windows
from secateur.errors import CalibrationError, CheckpointError, PatternError, SecateurError
from secateur.models.opening.opened import open_source
from secateur.record.manifest import read_manifest
from secateur.recover.masked_lora import masked
from secateur.recover.training import last_checkpoint

NAME = "model.layers.0.mlp.down_proj.weight"


def nats(model: Any, ids: Tensor) -> float:
    """The mean loss over windows, by transformers' own loss."""
    with torch.no_grad():
        return float(torch.stack([model.eval()(input_ids=row[None], labels=row[None]).loss for row in ids]).mean())


# A real model on real text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of stories."""
    if not STORIES.exists():
        pytest.skip(f"no {STORIES}")
    return some_stories(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def stories(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K with half of its weights gone, chosen by Wanda; perplexity goes from 4 to about 18."""
    folder = tmp_path_factory.mktemp("stories") / "pruned"
    secateur.prune(
        STORIES,
        method=secateur.wanda(),
        calibration=text,
        sampling="concat",
        samples=32,
        length=256,
        output=folder,
    )
    return folder


REAL: dict[str, Any] = {
    "steps": 24,
    "eval_every": 12,
    "batch_size": 4,
    "length": 128,
    "held_out": 16,
    "lr": 4e-3,
}


@pytest.fixture(scope="module")
def trained(stories: Path, text: str) -> Callable[[str], tuple[Path, secateur.Recovery]]:
    """(folder, result) of a method on the pruned stories260K, trained once."""

    @cache
    def train(method: str) -> tuple[Path, secateur.Recovery]:
        folder, options = stories.with_name(method), REAL | ({"batch_size": 8} if method == "full" else {})
        return folder, secateur.fine_tune(stories, folder, data=text, method=method, **options)

    return train


Trained = Callable[[str], tuple[Path, secateur.Recovery]]


@pytest.mark.parametrize(
    ("method", "share"),
    [
        pytest.param("lora", 0.8, marks=pytest.mark.slow),
        ("sparse-lora", 0.8),
        pytest.param("full", 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_few_dozen_steps_help(stories: Path, text: str, trained: Trained, method: str, share: float) -> None:
    # Measured: 19.3 before; 13.5, 13.9 and 8.4 after.
    folder, result = trained(method)
    assert 17 < result.before.perplexity < 21
    assert result.after.perplexity < share * result.before.perplexity
    assert (result.sparsity_before, result.sparsity) == (0.5, 0.5)
    assert result.notes == []
    assert not folder.with_name(f"{method}.training").exists()
    # transformers and peft see the same improvement in what was written.
    model = AutoModelForCausalLM.from_pretrained(stories if method != "full" else folder)
    if method == "sparse-lora":
        model = PeftModel.from_pretrained(model, folder, config=masked(LoraConfig.from_pretrained(folder)))
    elif method == "lora":
        model = PeftModel.from_pretrained(model, folder)
    _, held = training_windows(text, AutoTokenizer.from_pretrained(stories), samples=1, length=128, held_out=16)
    assert result.after.digest == held.digest == result.record["held_out"]["digest"]
    assert nats(model, held.input_ids) == pytest.approx(result.after.nats, abs=1e-5)
    # The Trainer measured the same before it was written.
    best = [point["perplexity"] for point in result.record["curve"] if point["step"] == result.record["best_step"]]
    assert best == [pytest.approx(result.after.perplexity, rel=1e-5)]


def test_merging_what_was_trained(stories: Path, trained: Trained, tmp_path: Path) -> None:
    (lora, free), (sparse, bound) = trained("lora"), trained("sparse-lora")
    # Without options a merge is measured on the windows that were held out.
    cost = secateur.merge(lora, stories, tmp_path / "lora-merged")
    exact = secateur.merge(sparse, stories, tmp_path / "sparse-merged")
    for result, merged in ((free, cost), (bound, exact)):
        assert merged.base is not None
        assert merged.unmerged is not None
        assert merged.unmerged.digest == result.after.digest
        assert merged.base.nats == result.before.nats
        assert merged.unmerged.nats == pytest.approx(result.after.nats, abs=1e-6)
        assert merged.zeros == merged.zeros_before
    assert cost.merged is not None
    assert exact.merged is not None
    assert cost.merged.nats > free.after.nats + 0.01  # the projection costs something
    assert cost.merged.nats < free.before.nats  # less than the training gained
    assert exact.merged.nats == pytest.approx(bound.after.nats, abs=1e-6)
    with pytest.raises(PatternError, match=r"--mask drop: .* was trained with its product masked"):
        secateur.merge(sparse, stories, tmp_path / "out", mask="drop")
    other = tmp_path / "other"
    secateur.prune(STORIES, method=secateur.magnitude(), output=other)
    message = f"trained on {stories.resolve()} (digest {read_manifest(stories).digest[:12]}), and {other} is another"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        secateur.merge(lora, other, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_learning_from_the_dense_model(stories: Path, text: str, tmp_path: Path) -> None:
    # The loss is the divergence alone: text is read, and what comes next in it does not matter.
    options = REAL | {"steps": 12, "batch_size": 8, "held_out": 8, "distill_weight": 1.0}
    heard = secateur.fine_tune(stories, tmp_path / "out", data=text, method="full", distill=STORIES, **options)
    assert heard.after.perplexity < 0.6 * heard.before.perplexity
    pair = secateur.agreement(STORIES, [stories, tmp_path / "out"], text, length=128, windows=4)
    assert pair[1].kl < 0.5 * pair[0].kl


# Full training


def test_only_what_was_trained_changes(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    result = tune(base, tmp_path / "out", only=["*.mlp.*", "model.norm.weight"], skip=["*.0.mlp.up_proj*"])
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if (".mlp." in name or name == "model.norm.weight") and ".0.mlp.up_proj" not in name
    }
    for name in before:
        if name.endswith("_proj.weight"):
            assert torch.equal(before[name] == 0, after[name] == 0)
    # Counted by hand: eight matrices of 1536 half of whose weights are kept, and 32 of the norm.
    assert result.record["trainable"] == 8 * 768 + 32
    assert result.record["share"] == result.record["trainable"] / sum(value.numel() for value in before.values())
    companions = {path.name for path in base.iterdir()} - {"secateur.json", "README.md"}
    for name in companions - {"model.safetensors"}:
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_recovered_checkpoint_is_verified(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    tune(base, tmp_path / "out")
    for source in (None, tmp_path / "dense", base):
        found = secateur.verify(tmp_path / "out", None if source is None else open_source(str(source)))
        assert (found.problems, found.notes, found.sparsity) == ([], [], 0.5)
    # A tensor outside the plan that was trained has a record as well: another source is found out.
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    problems = secateur.verify(tmp_path / "out", open_source(str(other))).problems
    assert problems == [
        "model.norm.weight: the source is neither the dense model nor the pruned one; its bytes differ from the records"
    ]
    # Trained twice.
    tune(tmp_path / "out", tmp_path / "twice", only=["*.mlp.*"])
    for source in (None, tmp_path / "dense", base, tmp_path / "out"):
        found = secateur.verify(tmp_path / "twice", None if source is None else open_source(str(source)))
        assert found.problems == []
    manifest = read_manifest(tmp_path / "twice")
    assert manifest.recovery is not None
    assert manifest.recovery["earlier"]["base"]["digest"] == read_manifest(base).digest


def test_the_record(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    result = tune(base, tmp_path / "out", accumulation=2, eval_every=1, command=["secateur", "recover"])
    written = json.loads(
        (tmp_path / "out" / "secateur.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    record = written["recovery"]
    assert {key: record[key] for key in result.record} == json.loads(json.dumps(result.record))
    assert record["settings"]["lr"] == 0.01
    assert (record["method"], record["steps"], record["tokens"]) == ("full", 4, 4 * 2 * 2 * 16)
    assert (record["data"]["samples"], record["held_out"]["samples"]) == (16, 4)
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 4]
    assert all(point["loss"] > 0 and point["perplexity"] > 1 and point["seconds"] > 0 for point in record["curve"])
    assert record["perplexity"] == {"before": result.before.perplexity, "after": result.after.perplexity}
    assert record["base"]["digest"] == json.loads((base / "secateur.json").read_text())["digest"]
    assert record["versions"]["torch"] == torch.__version__
    assert written["method"] == "magnitude"  # what the pruning was is still there
    assert record["command"] == ["secateur", "recover"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    # Products in bfloat16, weights trained in float32, written as they came.
    base = pruned(tmp_path, dtype=dtype)
    seen = []
    result = tune(base, tmp_path / "out", dtype="bfloat16", gradient_checkpointing=True, announce=seen.append)
    assert result.record["dtype"] == "bfloat16"
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {value.dtype for value in after.values()} == {dtype}
    for name, value in after.items():
        assert not torch.equal(value, before[name])
        if name.endswith("_proj.weight"):
            assert torch.equal(value == 0, before[name] == 0)
    (forecast,) = seen
    parameters = sum(value.numel() for value in before.values())
    memory = forecast.memory
    assert memory["weights"] == memory["gradients"] == memory["moments"] // 2 == 4 * parameters
    assert 0 < forecast.seconds < 60


def test_kept_weights_too_small_for_the_dtype_are_not_lost(tmp_path: Path) -> None:
    base = pruned(tmp_path, dtype=torch.float16)
    # Decay so strong that weights are halved in every step, and gradients that hardly matter.
    result = tune(
        base,
        tmp_path / "out",
        optimizer="adamw_torch",
        lr=1e-9,
        weight_decay=5e8,
        schedule="constant",
        steps=30,
        eval_every=30,
    )
    before, after = tensors(base), tensors(tmp_path / "out")
    planned = [name for name in before if name.endswith("_proj.weight")]
    smallest = 2.0**-24
    tiny_ones = sum(int((after[name].abs() == smallest).sum()) for name in planned)
    assert tiny_ones > 100
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in planned)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.recovery is not None
    assert 0 < manifest.recovery["nudged"] <= tiny_ones
    assert f"{manifest.recovery['nudged']} kept weights were too small for the checkpoint's dtype" in result.notes[0]
    assert secateur.verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    "name", ["llama_tied", "mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3"))]
)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    base = pruned(tmp_path, name)
    result = tune(base, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    frozen = [key for key in before if torch.equal(before[key], after[key])]
    assert [key for key in frozen if "gate" not in key] == []  # a router may get no gradient
    assert result.record["trainable"] + sum(int((before[key] == 0).sum()) for key in read_manifest(base).plan) == sum(
        value.numel() for value in before.values()
    )
    # What was written is what had been trained: names, transposition, fused experts and ties all went both ways.
    best = next(point["perplexity"] for point in result.record["curve"] if point["step"] == result.record["best_step"])
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert math.exp(nats(written, IDS[:4])) == pytest.approx(best, rel=1e-4)
    assert secateur.verify(tmp_path / "out", open_source(str(base))).problems == []


def test_experts_of_one_stack_are_trained_together(tmp_path: Path) -> None:
    base = pruned(tmp_path, "mixtral")
    with pytest.raises(PatternError, match="are one parameter in memory"):
        tune(base, tmp_path / "out", only=["*.experts.0.*"])


# Adapters


def test_the_adapter_folder(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    seen: list[Any] = []
    options: dict[str, Any] = {"targets": ("all-linear",), "rank": 3, "alpha": 6, "dropout": 0.1}
    result = tune(base, tmp_path / "out", method="lora", announce=seen.append, **options)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "secateur_adapter.json", "README.md"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], len(config["target_modules"])) == (3, 6, 0.1, 7)
    assert config["base_model_name_or_path"] == str(base.resolve())
    learnt = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in learnt.values()} == {torch.float32}
    assert sum(value.numel() for value in learnt.values()) == result.record["trainable"] == seen[0].way.trainable
    assert "fills the zeros of the base" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "secateur_adapter.json").read_text())["method"] == "lora"
    # The base is untouched, and the output may be made anew.
    assert secateur.verify(base).ok
    with pytest.raises(CheckpointError, match="exists already"):
        tune(base, tmp_path / "out", method="lora", **options)
    tune(base, tmp_path / "out", method="sparse-lora", overwrite=True, **options)
    assert "**Loading it with plain peft" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("lora", "gpt2"),
        ("sparse-lora", "opt"),
        ("sparse-lora", "mixtral"),
        pytest.param("lora", "mixtral", marks=pytest.mark.slow),
        pytest.param("lora", "opt", marks=pytest.mark.slow),
        pytest.param("sparse-lora", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_other_architectures(tmp_path: Path, name: str, method: str) -> None:
    # Stored across, with biases, beside experts.
    base = pruned(tmp_path, name)
    result = tune(base, tmp_path / "out", method=method, alpha=16.0)
    learnt = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(value.numel() for value in learnt.values()) == result.record["trainable"] > 0
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert repr(config.lora_alpha) == "16"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = masked(config) if method == "sparse-lora" else config
    assert nats(PeftModel.from_pretrained(model, tmp_path / "out", config=config), IDS[:4]) == pytest.approx(
        result.after.nats, abs=1e-5
    )
    merged = secateur.merge(tmp_path / "out", base, tmp_path / "merged", data=IDS[:4])
    assert merged.zeros == merged.zeros_before
    if method == "sparse-lora":
        assert merged.merged is not None
        assert merged.merged.nats == pytest.approx(result.after.nats, abs=1e-6)


def test_a_masked_adapter_is_trained_under_the_mask(tmp_path: Path) -> None:
    base = pruned(tmp_path)
    result = tune(base, tmp_path / "out", method="sparse-lora", targets=("all-linear",), lr=3e-2, dropout=0.0)
    merged = secateur.merge(tmp_path / "out", base, tmp_path / "merged", data=IDS[:4])
    assert merged.merged is not None
    assert merged.merged.nats == pytest.approx(result.after.nats, abs=1e-6)
    best = [point["perplexity"] for point in result.record["curve"] if point["step"] == result.record["best_step"]]
    assert best == [pytest.approx(math.exp(merged.merged.nats), rel=1e-5)]
    assert {matrix.pattern for matrix in secateur.inspect(tmp_path / "merged").matrices} == {"2:4"}


# Optimizers and memory


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        ("sgd", "momentum=0.9"),
        ("torch.optim:SGD", "momentum=0.9, nesterov=True"),
        ("torch.optim:NAdam", "betas=(0.9,0.99)"),
        ("torch.optim:RMSprop", None),
    ],
)
def test_any_optimizer_of_torch(base: Path, tmp_path: Path, optimizer: str, arguments: str | None) -> None:
    result = tune(base, tmp_path / "out", optimizer=optimizer, optimizer_args=arguments)
    assert result.record["settings"]["optimizer_args"] == arguments
    assert (result.sparsity_before, result.sparsity) == (0.5, 0.5)
    assert secateur.verify(tmp_path / "out", open_source(str(base))).problems == []
    before, after = tensors(base), tensors(tmp_path / "out")
    assert not torch.equal(before[NAME], after[NAME])


def test_arguments_reach_the_optimizer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    step = torch.optim.SGD.step

    def spy(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        seen.append({key: optimizer.param_groups[0][key] for key in ("momentum", "nesterov", "lr", "weight_decay")})
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    options: dict[str, Any] = {"schedule": "constant", "weight_decay": 0.1, "lr": 1e-3}
    tune(base, tmp_path / "out", optimizer="torch.optim:SGD", optimizer_args="momentum=0.8,nesterov=True", **options)
    assert seen == [{"momentum": 0.8, "nesterov": True, "lr": 1e-3, "weight_decay": 0.1}] * 4


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sparse-lora", "full"))]
)
def test_gradient_checkpointing_changes_memory_alone(base: Path, tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "dropout": None if method == "full" else 0.0}
    plain = tune(base, tmp_path / "plain", **options)
    result = tune(base, tmp_path / "out", gradient_checkpointing=True, **options)
    assert result.after.nats == pytest.approx(plain.after.nats, abs=1e-6)
    assert result.after.nats < result.before.nats


# Mistakes


MISTAKES: dict[str, tuple[dict[str, Any], type[SecateurError], str]] = {
    "method": ({"method": "qlora"}, PatternError, '--method: got "qlora", expected lora, sparse-lora, full or block.'),
    "preset": ({"preset": "long"}, PatternError, '--preset: got "long", expected paper or short.'),
    "other method": ({"rank": 4}, PatternError, "--rank: has no meaning for --method full; lora and sparse-lora would"),
    "globs": ({"method": "lora", "only": ["*"]}, PatternError, "--only: has no meaning for --method lora; full would"),
    "both": ({"minutes": 1.0}, PatternError, "--steps and --minutes were both given"),
    "steps": ({"steps": 0}, CalibrationError, "--steps: got 0, expected at least 1."),
    "rate": ({"lr": 0.0}, PatternError, "--lr: got 0, expected a positive number."),
    "dropout": ({"method": "lora", "dropout": 1.0}, PatternError, "--dropout: got 1, expected at least 0 and below 1."),
    "weight": ({"distill_weight": 1.5}, PatternError, "--distill-weight: got 1.5, expected at least 0 and at most 1."),
    "dtype": ({"dtype": "float16"}, CheckpointError, '--dtype: got "float16", expected auto, float32 or bfloat16.'),
    "glob": ({"only": ["*.up_pro"]}, PatternError, '--only "*.up_pro" matches none of 30 matrices. Did you mean'),
    "nothing": ({"skip": ["*"]}, PatternError, "nothing is left to train: --only and --skip leave none"),
    "targets": ({"method": "lora", "targets": ["qkv"]}, PatternError, '--targets "qkv" matches none of the matrices.'),
    "optimizer": (
        {"optimizer": "adamm"},
        CheckpointError,
        "transformers' Trainer refuses these settings: adamm is not a valid",
    ),
    "optimizer class": ({"optimizer": "torch.optim:Adamm"}, PatternError, '--optimizer "torch.optim:Adamm": module'),
    "optimizer arguments": (
        {"optimizer": "sgd", "optimizer_args": "momentum"},
        PatternError,
        '--optimizer-args "momentum": expected name=value with commas between, such as momentum=0.9',
    ),
    "schedule": (
        {"schedule": "slow"},
        CheckpointError,
        "transformers' Trainer refuses these settings: slow is not a valid",
    ),
    "clock": (
        {"schedule": "reduce_lr_on_plateau", "steps": None, "minutes": 1.0},
        PatternError,
        "--schedule reduce_lr_on_plateau: cannot go by the clock.",
    ),
    "resume": ({"resume": True}, CheckpointError, "no checkpoint to resume from. Start without --resume."),
    "rows": (
        {"held_out": 24},
        CalibrationError,
        "24 windows, of which 24 are held out, and training needs one at least.",
    ),
    "tokens": ({"data": IDS + 1000}, CalibrationError, "is outside the vocabulary of"),
    "text": ({"data": IDS.float()}, CalibrationError, "expected (samples, length), not empty, in an integer type"),
    "dense model": ({"distill": "nowhere"}, CheckpointError, "nowhere: no such folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(base: Path, tmp_path: Path, mistake: str) -> None:
    options, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=re.escape(message)):
        tune(base, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(tmp_path / "out.training") is None


def test_a_checkpoint_that_nobody_pruned(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only checkpoints that Secateur wrote have one"):
        tune(base.parent / "dense", tmp_path / "out")


def test_a_dense_model_with_other_tokens(base: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(base).config
    config.vocab_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"--distill .*: has a vocabulary of 96 tokens, the pruned model has"):
        tune(base, tmp_path / "out", distill=tmp_path / "other")


def test_zeros_that_are_not_those_of_the_manifest(base: Path, tmp_path: Path) -> None:
    # The weights were changed behind the manifest's back.
    changed = Path(shutil.copytree(base, tmp_path / "changed"))
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, :4] = 1.0
    model.save_pretrained(changed)
    with pytest.raises(PatternError, match=rf"{re.escape(NAME)}: 76\d zeros of \[32, 48\] in the model, expected 768"):
        tune(changed, tmp_path / "out")


# Text


def test_windows_held_out_and_trained_on_do_not_overlap(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n<|endoftext|>\n".join(f"Story {number} is about the number {number * 7919}." for number in range(300))
    )
    tokenizer = byte_pair_tokenizer(300)
    train, held = training_windows(str(text), tokenizer, samples=20, length=16, held_out=5)
    documents = text.read_text().split("\n<|endoftext|>\n")
    ids = [token for document in documents for token in tokenizer(document)["input_ids"]]
    assert held.input_ids.flatten().tolist() == ids[: 5 * 16]
    assert train.input_ids.flatten().tolist() == ids[5 * 16 : 25 * 16]
    assert (train.provenance["samples"], train.provenance["first_window"]) == (20, 5)
    # What is held out does not depend on how much is trained on; a text too short gives what it has.
    everything, same = training_windows(str(text), tokenizer, samples=10**6, length=16, held_out=5)
    assert same.digest == held.digest
    assert everything.samples == len(ids) // 16 - 5
    with pytest.raises(CalibrationError, match=r"\d+ tokens in windows of 2048: \d+ windows, of which 5 are held out"):
        training_windows(str(text), tokenizer, samples=1, length=2048, held_out=5)
