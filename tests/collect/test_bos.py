"""BOS before every window for models that want it, and as published for the others; and windows that run out."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import secateur
from command_line import process, untimed
from real_data import STORIES, some_stories
from secateur.calibration.drawing import evaluation_windows
from secateur.calibration.text import bos_text
from secateur.collect.gradient_pass import gradients
from secateur.errors import CalibrationError
from secateur.models.opening.opened import open_model
from secateur.record.manifest import read_manifest

VOCABULARY, LENGTH = 400, 32
HALF = secateur.Unstructured(0.5)


@functools.cache
def learnt() -> str:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(topics.values(), vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False)
    return str(trained._tokenizer.to_str())


def make_tokenizer(*, adds: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a BOS, which it puts before a text or not."""
    tokenizer = Tokenizer.from_str(learnt())
    if adds:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def make_text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics)[:8])


def reader_of_bos(ids: Tensor) -> LlamaForCausalLM:
    """A model that knows how frequent tokens are while it can look at BOS, and nothing without: all else is noise.

    Every position asks with dimension 3 for a key that BOS alone has; what it finds goes to dimension 2, which the head
    turns into the frequencies.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        initializer_range=0.02,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    counts = Counter(ids.tolist())
    frequency = torch.tensor([(counts[token] + 0.5) / len(ids) for token in range(VOCABULARY)]).log()
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, :4] = 0
        embeddings[:, 0] = 1.0
        embeddings[0] = 0
        embeddings[0, 1] = 1.0
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[3] = 0
        attention.q_proj.weight[3, 0] = 10.0
        attention.k_proj.weight[3] = 0
        attention.k_proj.weight[3, 1] = 10.0
        attention.v_proj.weight[:8] = 0
        attention.v_proj.weight[0, 1] = 1.0
        attention.o_proj.weight[2] = 0
        attention.o_proj.weight[2, 0] = 1.0
        model.lm_head.weight[:, 2] = (frequency - frequency.mean()) / 2
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wants`: a model that needs BOS; `random`: one that does not; a text."""
    folder = tmp_path_factory.mktemp("bos")
    tokenizer = make_tokenizer(adds=True)
    text = make_text()
    (folder / "text.txt").write_text(text)
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    model = reader_of_bos(ids)
    model.save_pretrained(folder / "wants")
    torch.manual_seed(1)
    LlamaForCausalLM(model.config).save_pretrained(folder / "random")
    for name in ("wants", "random"):
        tokenizer.save_pretrained(folder / name)
    return folder


def nats_of(folder: Path, ids: Tensor) -> Tensor:
    """The losses of the next tokens, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").double()


def both_numbers(folder: Path, own: Tensor) -> tuple[float, float]:
    """The losses of a text behind its first token, with BOS in front and without."""
    begun = torch.cat([torch.tensor([0]), own]).unsqueeze(0)
    return float(nats_of(folder, begun)[0, 1:].mean()), float(nats_of(folder, own.unsqueeze(0)).mean())


# Windows


@pytest.mark.parametrize("adds", [True, False])
def test_where_bos_stands(adds: bool, tmp_path: Path) -> None:
    tokenizer, text = make_tokenizer(adds=adds), make_text()
    (tmp_path / "text.txt").write_text(text)
    plain = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    published = torch.tensor(tokenizer(text, verbose=False).input_ids)
    assert len(published) == len(plain) + adds
    source, count = str(tmp_path / "text.txt"), len(plain) // LENGTH
    papers = evaluation_windows(source, tokenizer, length=LENGTH)
    assert torch.equal(papers.input_ids.flatten(), published[: papers.samples * LENGTH])
    never = evaluation_windows(source, tokenizer, length=LENGTH, bos="never")
    assert torch.equal(never.input_ids.flatten(), plain[: count * LENGTH])
    always = evaluation_windows(source, tokenizer, length=LENGTH, bos="always")
    assert always.length == LENGTH
    assert always.input_ids[:, 0].unique().tolist() == [0]
    assert torch.equal(always.input_ids[:, 1:].flatten(), plain[: always.samples * (LENGTH - 1)])
    assert always.samples == len(plain) // (LENGTH - 1)
    assert [own.provenance["bos"] for own in (papers, never, always)] == [
        {"used": used, "token": 0, "added": adds} for used in ("papers", "never", "always")
    ]
    assert bos_text(papers.provenance) == (
        "BOS before the first window alone" if adds else "no BOS, which the tokenizer leaves out"
    )
    few = evaluation_windows(source, tokenizer, length=LENGTH, windows=3, bos="always")
    assert torch.equal(few.input_ids, always.input_ids[:3])


@pytest.mark.parametrize("sampling", ["document", "concat"])
def test_calibration_windows_begin_with_bos(sampling: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds=True)
    (tmp_path / "text.txt").write_text(make_text())
    plain = tokenizer(make_text(), add_special_tokens=False, verbose=False).input_ids
    known = {tuple(plain[start : start + LENGTH - 1]) for start in range(len(plain))}
    how: dict[str, Any] = {"samples": 9, "length": LENGTH, "sampling": sampling}
    always = secateur.calibration_windows(str(tmp_path / "text.txt"), tokenizer, bos="always", **how)
    assert always.input_ids.shape == (9, LENGTH)
    assert always.input_ids[:, 0].unique().tolist() == [0]
    assert all(tuple(row[1:].tolist()) in known for row in always.input_ids)
    never = secateur.calibration_windows(str(tmp_path / "text.txt"), tokenizer, bos="never", **how)
    assert not bool((never.input_ids == 0).any())


def test_what_cannot_be_had(place: Path, tmp_path: Path) -> None:
    ids = torch.ones(3, 8, dtype=torch.int64)
    with pytest.raises(CalibrationError, match=r"^--bos always: token ids are taken as they are\. Leave --bos out\.$"):
        secateur.perplexity(place / "wants", ids, bos="always")
    with pytest.raises(CalibrationError, match=r'^--bos: got "first", expected auto, papers, always or never\.$'):
        secateur.perplexity(place / "wants", str(place / "text.txt"), bos="first")
    with pytest.raises(CalibrationError, match=r'^--bos: got "first", expected auto, papers, always or never\.$'):
        secateur.prune(place / "wants", method=secateur.magnitude(), bos="first", output=tmp_path / "out")
    with pytest.raises(CalibrationError, match=r'^--bos: got "auto", expected papers, always or never\.$'):
        evaluation_windows(str(place / "text.txt"), make_tokenizer(adds=True), bos="auto")  # type: ignore[arg-type]
    without = make_tokenizer(adds=False)
    without.bos_token = None
    with pytest.raises(
        CalibrationError, match=r"^--bos always: the tokenizer \(\w+\) has no token that begins a text\."
    ):
        evaluation_windows(str(place / "text.txt"), without, length=LENGTH, bos="always")
    with pytest.raises(CalibrationError, match=r"^--length: got 1, expected at least 2 with --bos always\.$"):
        secateur.calibration_windows(str(place / "text.txt"), make_tokenizer(adds=True), length=1, bos="always")


# The model's choice


def test_a_model_that_wants_bos_gets_it(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = str(place / "text.txt")
    found = secateur.perplexity(place / "wants", data, length=LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(place / "wants")
    plain = torch.tensor(tokenizer(make_text(), add_special_tokens=False, verbose=False).input_ids)
    own = plain[: len(plain) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
    begun = torch.cat([torch.zeros(len(own), 1, dtype=torch.int64), own], dim=1)
    assert found.window_nats == pytest.approx(nats_of(place / "wants", begun).mean(dim=1).tolist(), rel=1e-5)
    assert found.tokens == own.numel()  # every token is predicted
    bos = found.provenance["bos"]
    assert (bos["asked"], bos["used"]) == ("auto", "always")
    numbers = both_numbers(place / "wants", plain[: LENGTH - 1])
    assert (bos["nats_with"], bos["nats_without"]) == pytest.approx(numbers, rel=1e-5)
    assert numbers[0] + 0.1 < numbers[1]
    (said,) = caplog.messages
    assert said == (
        f"{data}: BOS before every window (one window reads {numbers[0]:.4f} nats with BOS, {numbers[1]:.4f} without). "
        "--bos papers is the published way."
    )
    papers = secateur.perplexity(place / "wants", data, length=LENGTH, bos="papers")
    assert papers.nats > found.nats + 0.5
    assert papers.provenance["bos"] == {"asked": "papers", "used": "papers", "token": 0, "added": True}
    assert secateur.perplexity(place / "wants", data, length=LENGTH, bos="always").digest == found.digest


def test_a_model_that_does_not_is_evaluated_as_published(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = str(place / "text.txt")
    found = secateur.perplexity(place / "random", data, length=LENGTH)
    papers = secateur.perplexity(place / "random", data, length=LENGTH, bos="papers")
    assert (found.digest, found.window_nats) == (papers.digest, papers.window_nats)
    bos = found.provenance["bos"]
    tokenizer = AutoTokenizer.from_pretrained(place / "random")
    first = torch.tensor(tokenizer(make_text(), verbose=False).input_ids[1:LENGTH])
    assert (bos["nats_with"], bos["nats_without"]) == pytest.approx(both_numbers(place / "random", first), rel=1e-5)
    assert bos["used"] == "papers"
    assert caplog.messages == []


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not on this machine")
def test_stories260k_keeps_its_published_figure(tmp_path: Path) -> None:
    text = some_stories(tmp_path)
    found = secateur.perplexity(STORIES, text, length=256, windows=12)
    papers = secateur.perplexity(STORIES, text, length=256, windows=12, bos="papers")
    assert (found.digest, found.window_nats) == (papers.digest, papers.window_nats)
    assert abs(found.provenance["bos"]["nats_with"] - found.provenance["bos"]["nats_without"]) < 0.1


def test_no_forward_where_nothing_is_to_be_decided(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.collect import model_windows as module

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a forward was run")

    monkeypatch.setattr(module, "after_the_last_block", refuse)
    data = str(place / "text.txt")
    without = make_tokenizer(adds=False)
    without.bos_token = None
    secateur.perplexity(place / "wants", data, length=LENGTH, windows=2, tokenizer=without)
    secateur.perplexity(place / "wants", torch.ones(2, 8, dtype=torch.int64))
    secateur.perplexity(place / "wants", data, length=LENGTH, windows=1)  # begins with BOS as it is
    with pytest.raises(AssertionError, match="a forward was run"):
        secateur.perplexity(place / "wants", data, length=LENGTH, windows=2)


# Pruning, comparing, sweeping


HOW: dict[str, Any] = {"samples": 4, "length": LENGTH, "sampling": "concat"}


def test_calibration_follows_the_model(place: Path, tmp_path: Path) -> None:
    data = str(place / "text.txt")
    how = {**HOW, "calibration": data}
    wants = secateur.prune(place / "wants", method=secateur.wanda(), output=tmp_path / "wants", **how)
    always = secateur.prune(place / "wants", method=secateur.wanda(), bos="always", output=tmp_path / "always", **how)
    assert wants.calibration is not None
    assert always.calibration is not None
    assert wants.calibration["bos"]["used"] == "always"
    assert wants.calibration["bos"]["nats_with"] + 0.1 < wants.calibration["bos"]["nats_without"]
    assert wants.calibration["digest"] == always.calibration["digest"]
    other = secateur.prune(place / "random", method=secateur.wanda(), output=tmp_path / "random", **how)
    papers = secateur.prune(place / "random", method=secateur.wanda(), bos="papers", output=tmp_path / "papers", **how)
    assert other.calibration is not None
    assert papers.calibration is not None
    assert other.calibration["digest"] == papers.calibration["digest"]
    assert other.tensors == papers.tensors
    # Gradients that were taken before, by the same choice.
    file = gradients(place / "wants", tmp_path / "gradients.safetensors", **how)
    assert file.provenance["calibration"]["bos"]["used"] == "always"
    secateur.prune(place / "wants", method=secateur.gblm(), gradient=file.path, output=tmp_path / "gblm", **how)
    with pytest.raises(CalibrationError, match=r"gradients are of other tokens.*--sampling and --bos for both"):
        secateur.prune(
            place / "wants", method=secateur.gblm(), gradient=file.path, bos="never", output=tmp_path / "x", **how
        )


def test_the_dense_model_chooses_for_all(place: Path, tmp_path: Path) -> None:
    data = str(place / "text.txt")
    smallest = secateur.select("smallest", lambda problem: -problem.weight.abs())  # keeps none of what looks at BOS
    secateur.prune(place / "wants", method=smallest, output=tmp_path / "pruned")
    alone = secateur.perplexity(tmp_path / "pruned", data, length=LENGTH, windows=4)
    assert alone.provenance["bos"]["used"] == "papers"
    (found,) = secateur.agreement(place / "wants", [tmp_path / "pruned"], data, length=LENGTH, windows=4)
    assert found.provenance["bos"]["used"] == "always"
    tuned = secateur.reconstruct(
        tmp_path / "pruned", calibration=data, epochs=1, samples=8, length=LENGTH, output=tmp_path / "tuned"
    )
    assert tuned.recovery is not None
    assert tuned.recovery["calibration"]["bos"]["used"] == "always"


def test_a_pruned_checkpoint_alone_reads_the_tokens_of_its_dense_model(place: Path, tmp_path: Path) -> None:
    data = str(place / "text.txt")
    pruned, alone = tmp_path / "pruned", tmp_path / "alone"
    secateur.prune(place / "wants", method=secateur.wanda(), pattern=HALF, output=pruned, calibration=data, **HOW)
    damaged = load_file(pruned / "model.safetensors")
    damaged["model.layers.0.self_attn.v_proj.weight"].zero_()  # nobody learns from BOS any more
    save_file(damaged, pruned / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(pruned, alone, ignore=shutil.ignore_patterns("secateur.json"))
    own = secateur.perplexity(alone, data, length=LENGTH)
    assert own.provenance["bos"]["used"] == "papers"
    found, dense = (secateur.perplexity(model, data, length=LENGTH) for model in (pruned, place / "wants"))
    assert found.provenance["bos"]["used"] == "always"
    assert found.digest == dense.digest != own.digest
    assert secateur.perplexity(pruned, data, length=LENGTH, bos="papers").digest == own.digest


def test_a_sweep_keeps_the_choice(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(place / "text.txt")
    options: dict[str, Any] = {
        "methods": [secateur.wanda()],
        "output": tmp_path / "sweep",
        "data": data,
        "calibration": data,
        "eval_length": LENGTH,
        "windows": 4,
        **HOW,
    }
    sweep = secateur.sweep(place / "wants", patterns=[HALF], **options)
    choices = sweep.settings["bos_choices"]
    assert choices.keys() == {f"data set {data}", "calibration"}
    assert {own["used"] for own in choices.values()} == {"always"}
    assert sweep.settings["bos"] == "auto"
    (cell,) = sweep.cells
    assert cell.figures[data]["provenance"]["bos"] == sweep.dense[data]["provenance"]["bos"]
    assert "BOS before every window" in (tmp_path / "sweep" / "table.md").read_text()
    manifest = json.loads((tmp_path / "sweep" / cell.folder / "secateur.json").read_text())
    assert manifest["calibration"]["bos"]["used"] == "always"
    from secateur.collect import model_windows as module

    def refuse(*args: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(module, "bos_nats", refuse)
    more = secateur.sweep(place / "wants", patterns=[HALF, secateur.Unstructured(0.6)], **options)
    assert [own.status for own in more.cells] == ["done", "done"]
    assert more.cells[1].figures[data]["provenance"]["bos"] == cell.figures[data]["provenance"]["bos"]
    dry = {**options, "output": tmp_path / "dry"}
    secateur.sweep(place / "wants", patterns=[HALF], dry_run=True, **dry)  # asks nothing either
    with pytest.raises(secateur.CheckpointError, match=r"started with --bos auto, got never"):
        secateur.sweep(place / "wants", patterns=[HALF], bos="never", **options)


def test_the_command_line(place: Path, tmp_path: Path) -> None:
    data = ["--data", str(place / "text.txt"), "--length", str(LENGTH), "--windows", "4"]
    done = process("eval", place / "wants", *data)
    assert done.returncode == 0, done.stderr
    assert "--bos papers is the published way." in done.stderr
    assert "BOS before every window (one window reads " in done.stdout
    done = process("eval", place / "wants", *data, "--bos", "never", "--json")
    assert json.loads(done.stdout)["provenance"]["bos"]["used"] == "never"
    done = process("compare", place / "wants", place / "wants", *data, "--bos", "papers")
    assert "BOS before the first window alone." in done.stdout
    done = process("plan", place / "wants", "--bos", "first")
    assert (done.returncode, 'got "first", expected auto, papers' in done.stderr) == (2, True)
    how = ["--calibration", str(place / "text.txt"), "--samples", "4", "--length", str(LENGTH)]
    done = process("prune", place / "wants", "-o", tmp_path / "out", *how, "--bos", "always")
    assert done.returncode == 0, done.stderr
    calibration = read_manifest(tmp_path / "out").calibration
    assert calibration is not None
    assert calibration["bos"]["asked"] == "always"


# Fewer than asked for


def test_fewer_windows_than_asked_for_are_said_and_recorded(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(place / "text.txt")
    found = secateur.perplexity(place / "random", data, length=LENGTH, windows=10_000, bos="papers")
    assert found.windows < 10_000
    assert found.provenance["windows_asked"] == 10_000
    assert caplog.messages == [f"{found.windows:,} of the 10,000 windows asked for: there are no more."]
    caplog.clear()
    ids = torch.ones(3, 8, dtype=torch.int64)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    for source in (ids, str(tmp_path / "ids.safetensors")):
        found = secateur.perplexity(place / "random", source, windows=5)
        assert (found.windows, found.provenance["windows_asked"]) == (3, 5)
        manifest = secateur.prune(
            place / "random",
            method=secateur.wanda(),
            calibration=source,
            samples=5,
            output=tmp_path / "o",
            overwrite=True,
        )
        assert manifest.calibration is not None
        assert (manifest.calibration["samples"], manifest.calibration["samples_asked"]) == (3, 5)
    said = ["3 of the 5 windows asked for: there are no more.", "3 of the 5 samples asked for: there are no more."]
    assert caplog.messages == said * 2
    caplog.clear()
    found = secateur.perplexity(place / "random", ids, windows=3)
    assert "windows_asked" not in found.provenance
    assert caplog.messages == []
    done = process("eval", place / "random", "--data", tmp_path / "ids.safetensors", "--windows", "87", "--json")
    assert untimed(done.stderr)[-1] == "3 of the 87 windows asked for: there are no more."
    assert json.loads(done.stdout)["provenance"]["windows_asked"] == 87


def test_the_choice_of_a_model_that_overflows_is_the_published_one(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "wants")
    with torch.no_grad():
        model.lm_head.weight[5] = math.inf
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer(adds=True).save_pretrained(tmp_path / "broken")
    from secateur.collect.model_windows import model_evaluation_windows

    opened = open_model(tmp_path / "broken")
    found = model_evaluation_windows(opened, str(place / "text.txt"), None, length=LENGTH, windows=4)
    assert found.provenance["bos"]["used"] == "papers"
    assert found.provenance["bos"]["nats_with"] is None
