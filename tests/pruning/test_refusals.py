"""What `prune` refuses before its work starts, `plan` refuses as well: the same words, the same exit code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import secateur
import tiny
from command_line import (
    Call,
    call,  # noqa: F401 - `call` is a fixture
    save_model,
)
from secateur.calibration import quick
from secateur.errors import SecateurError
from secateur.pruning.forecast import estimate
from secateur.pruning.named import method_of

SITES = ("--within", "site", "--targets", "residual")


@dataclass(frozen=True)
class Place:
    """Where the models and files of these tests are."""

    folder: Path

    def ids(self, name: str, value: Tensor) -> Path:
        """A file of token ids."""
        save_file({"input_ids": value}, self.folder / f"{name}.safetensors")
        return self.folder / f"{name}.safetensors"

    def text(self, name: str, content: str) -> Path:
        """A file of text."""
        (self.folder / name).write_text(content)
        return self.folder / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("refusals")
    save_model(folder / "model")
    for name in ("llama", "gemma2", "gemma3_text", "mixtral"):
        tiny.save(name, folder / name)
    good = Place(folder).ids("good", tiny.tokens())
    secateur.gradients(folder / "llama", folder / "l1.safetensors", calibration=tiny.tokens(), only=["*.q_proj"])
    secateur.gradients(folder / "llama", folder / "all.safetensors", calibration=tiny.tokens())
    other = LlamaForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(folder / "other")
    assert good.exists()
    (folder / "kept").mkdir()
    (folder / "kept" / "mine.txt").write_text("mine")
    return Place(folder)


Arguments = Callable[[Place], Sequence[object]]

REFUSED: dict[str, tuple[str, Arguments, str]] = {
    # name: (model, further arguments, words of the refusal)
    "no such model": ("nowhere", lambda at: (), "no such folder"),
    "sparsity of a pattern": ("llama", lambda at: ("--pattern", "2:5", "-c", at.folder / "good.safetensors"), "2:5"),
    "a glob that matches nothing": ("llama", lambda at: ("--skip", "nothing"), "matches none of 21"),
    "residual targets, Gemma 2": (
        "gemma2",
        lambda at: ("-m", "sparsegpt", *SITES, "-c", at.folder / "good.safetensors"),
        "no matrix of model.layers.0 adds its outputs to the residual stream",
    ),
    "residual targets, Gemma 3": (
        "gemma3_text",
        lambda at: ("-m", "sparsegpt", *SITES, "-c", at.folder / "good.safetensors"),
        "no matrix of model.layers.0 adds its outputs to the residual stream",
    ),
    "residual targets, no writer planned": (
        "llama",
        lambda at: ("-m", "sparsegpt", *SITES, "-c", at.folder / "good.safetensors", "--only", "*.q_proj"),
        "none of the planned matrices writes to the residual stream",
    ),
    "dense targets, experts": (
        "mixtral",
        lambda at: ("-m", "sparsegpt", "--targets", "dense", "-c", at.folder / "good.safetensors"),
        "is an expert",
    ),
    "targets of a method that fits nothing": ("llama", lambda at: SITES, "changes no weights"),
    "a correction without use": ("llama", lambda at: ("--correction", "0.5"), "--correction is for"),
    "windows longer than positions": ("model", lambda at: ("-c", "python-docs", "-l", 4000), "positions. Use --length"),
    "token ids longer than positions": (
        "llama",
        lambda at: ("-c", at.ids("long", torch.full((2, 65), 5))),
        "the model has 64 positions",
    ),
    "another length than the ids have": (
        "llama",
        lambda at: ("-c", at.folder / "good.safetensors", "-l", 8),
        "expected --length 8",
    ),
    "ids outside the vocabulary": (
        "llama",
        lambda at: ("-c", at.ids("outside", torch.full((2, 8), 128))),
        "outside the vocabulary of 128",
    ),
    "ids of one dimension": ("llama", lambda at: ("-c", at.ids("flat", torch.arange(8))), "expected (samples, length)"),
    "ids that are no integers": ("llama", lambda at: ("-c", at.ids("floats", torch.ones(2, 8))), "an integer type"),
    "ids of length one for gradients": (
        "llama",
        lambda at: ("-m", "gblm", "-c", at.ids("single", torch.full((2, 1), 5))),
        "expected at least 2",
    ),
    "no such text": ("model", lambda at: ("-c", at.folder / "missing.txt"), "no such file"),
    "no such ids": ("llama", lambda at: ("-c", at.folder / "missing.safetensors"), "no such file"),
    "no such corpus": ("model", lambda at: ("-c", "c5"), "unknown corpus"),
    "a corpus of the hub, offline": ("model", lambda at: ("-c", "c4", "-l", 32), "needs the Hugging Face Hub"),
    "a data set of the hub, offline": ("model", lambda at: ("-c", "hf:some/where", "-l", 32), "hf:some/where"),
    "no tokenizer": ("llama", lambda at: ("-c", "python-docs"), "needs a tokenizer"),
    "text too short": ("model", lambda at: ("-c", at.text("short.txt", "a word"), "-l", 64), "the longest has"),
    "text too short, packed": (
        "model",
        lambda at: ("-c", at.text("short.txt", "a word"), "-l", 64, "--sampling", "concat"),
        "the whole text has",
    ),
    "rows without the field": (
        "model",
        lambda at: ("-c", at.text("rows.jsonl", '{"body": "words"}\n'), "-l", 16),
        "no field 'text'",
    ),
    "a share that is no window": (
        "model",
        lambda at: ("-c", "0.001*python-docs", "-c", at.text("more.txt", "some words " * 500), "-n", 4, "-l", 16),
        "less than one window",
    ),
    "batches where samples mix": (
        "mixtral",
        lambda at: ("-m", "gblm", "-c", at.folder / "good.safetensors", "--batch-size", 2),
        "routes tokens to experts",
    ),
    "no such gradients": (
        "llama",
        lambda at: ("-m", "gblm", "-c", at.folder / "good.safetensors", "--gradient", at.folder / "none.safetensors"),
        "no such file",
    ),
    "gradients without use": ("llama", lambda at: ("--gradient", at.folder / "all.safetensors"), "uses no gradients"),
    "gradients of another norm": (
        "llama",
        lambda at: (
            *("-m", "gblm", "--norm", "l2", "-c", at.folder / "good.safetensors"),
            *("--gradient", at.folder / "all.safetensors"),
        ),
        "with norm l1",
    ),
    "gradients of some matrices": (
        "llama",
        lambda at: (*("-m", "gblm", "-c", at.folder / "good.safetensors", "--gradient", at.folder / "l1.safetensors"),),
        "holds no gradient of",
    ),
    "gradients of other tokens": (
        "llama",
        lambda at: (
            *("-m", "gblm", "-c", at.ids("others", tiny.tokens(seed=1)), "--gradient", at.folder / "all.safetensors"),
        ),
        "are of other tokens",
    ),
    "gradients of another model": (
        "other",
        lambda at: (
            *("-m", "gblm", "-c", at.folder / "good.safetensors", "--gradient", at.folder / "all.safetensors"),
        ),
        "belongs to another model",
    ),
    "an output that is there": (
        "llama",
        lambda at: ("-c", at.folder / "good.safetensors", "-o", at.folder / "kept"),
        "exists already",
    ),
    "an output that is not ours": (
        "llama",
        lambda at: ("-c", at.folder / "good.safetensors", "-o", at.folder / "kept", "--overwrite"),
        "did not write it",
    ),
    "an output in the source": (
        "llama",
        lambda at: ("-c", at.folder / "good.safetensors", "-o", at.folder / "llama" / "out"),
        "lies inside it",
    ),
    "a device that is not there": ("llama", lambda at: ("--device", "cuda:99"), "cannot be used here"),
    "a place for statistics that is not there": (
        "llama",
        lambda at: ("-m", "sparsegpt", "--statistics-device", "cuda:99"),
        "--statistics-device",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_what_prune_refuses(
    name: str,
    place: Place,
    tmp_path: Path,
    call: Call,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, arguments, words = REFUSED[name]
    given = list(arguments(place))
    output = [] if "-o" in given else ["-o", tmp_path / "out"]
    pruned = call("prune", place.folder / model, *output, *given)
    planned = call("plan", place.folder / model, *given)
    assert words in pruned.message
    assert pruned.code == 2
    said = [line for line in pruned.said if line != "drawing calibration samples"]
    assert (planned.code, planned.said) == (pruned.code, said)
    assert not (tmp_path / "out").exists()


@tiny.pairs_by_turns(
    "name, method", ["llama", "gpt2", "mixtral", "gemma2", "qwen3_next"], ["magnitude", "wanda", "sparsegpt"]
)
def test_plan_accepts_what_prune_accepts(name: str, method: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    options = {"method": method_of(method), "calibration": tiny.tokens(16, 32)}
    assert estimate(folder, **options).planned_weights
    assert secateur.prune(folder, output=tmp_path / "out", **options).totals["weights"]


def test_a_plan_leaves_a_model_as_it_was() -> None:
    module = tiny.build("mixtral").train()
    module.requires_grad_(True)
    estimate(module, method=secateur.wanda(), calibration=tiny.tokens())
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(SecateurError):
        estimate(module, method=secateur.wanda(), calibration=tiny.tokens(), skip=["nothing"])
    assert module.training


# Text that is not read to its end


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_limits(size: int, characters: int) -> None:
        monkeypatch.setattr(quick, "MOST_BYTES", size)
        monkeypatch.setattr(quick, "MOST_CHARACTERS", characters)

    return set_limits


def notes(place: Place, *corpora: object, **options: object) -> list[str]:
    calibration = [str(corpus) for corpus in corpora]
    found = estimate(
        place.folder / "model",
        method=secateur.wanda(),
        calibration=calibration,
        samples=8,
        **options,  # type: ignore[arg-type]
    )
    assert found.tokens == 8 * int(options["length"])  # type: ignore[call-overload]
    return found.notes


def test_a_large_file_is_not_read(place: Place, limits: Callable[[int, int], None]) -> None:
    text = place.text("large.txt", "some words " * 2000)
    assert notes(place, text, length=16) == []
    limits(1000, 10**6)
    assert notes(place, text, length=16) == [f"{text}: not read, because its 0 MB take long to read."]
    with pytest.raises(SecateurError, match="no such file"):
        notes(place, text, place.folder / "missing.txt", length=16)


def test_only_some_text_is_tokenised(place: Place, limits: Callable[[int, int], None]) -> None:
    long = place.text("long.txt", "some words " * 2000)
    short = place.text("parts.txt", "<|endoftext|>\n".join(["a few words\n"] * 500))
    limits(10**6, 2000)
    assert notes(place, long, length=16) == [], "one text alone is long enough"
    assert notes(place, short, length=64, sampling="document") == [
        f"{short}: not checked to the end; none of the first documents has more than 64 tokens."
    ]
