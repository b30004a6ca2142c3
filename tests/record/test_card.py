"""The model card: read back by the hub's own library, and untouched where people wrote into it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import secateur
import tiny
from secateur.errors import CheckpointError
from secateur.evaluate.results import Record
from secateur.methods import METHODS, REFINEMENTS
from secateur.plans import ALLOCATIONS
from secateur.record import card
from secateur.record.manifest import Manifest, read_manifest
from secateur.record.publication import base_model
from secateur.report.evaluations import with_dense

SOURCE_CARD = """---
license: other
license_name: some-licence
license_link: LICENSE
language:
- en
base_model: somebody/older
---
# The source's own words
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.save("llama", tmp_path_factory.mktemp("card") / "source")
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


@pytest.fixture
def pruned(source, tmp_path):
    secateur.prune(
        source,
        method=secateur.wanda(),
        pattern=secateur.NM(2, 4),
        calibration=tiny.tokens(),
        output=tmp_path / "my pruned",
        command=["secateur", "prune", "a model", "-o", "my pruned"],
    )
    return tmp_path / "my pruned"


def agreement(source, pruned):
    (result,) = secateur.agreement(source, [pruned], tiny.tokens(6, 24))
    return {"kind": "agreement", "key": "k", "result": result.to_json()}


def test_the_metadata_as_the_hub_reads_it(pruned):
    data = ModelCard.load(pruned / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["pruned", "sparse", "sparsity", "2:4", "secateur", "wanda"]
    # Of the source's card the licence and the languages, and nothing that is its own.
    assert (data.license, data.license_name, data.license_link, data.language) == (
        "other",
        "some-licence",
        "LICENSE",
        ["en"],
    )
    assert data.base_model is None  # a folder has no name on the hub
    assert data.eval_results is None


def test_the_words(pruned, source):
    text = ModelCard.load(pruned / "README.md").text
    manifest = read_manifest(pruned)
    assert "\n# my pruned\n" in text
    assert f"{manifest.totals['zeros']:,} of {manifest.totals['weights']:,} planned weights are zero (50.00 %)" in text
    assert "| `model.layers.*.mlp.up_proj.weight` | 3 | 2:4 | 0.5000 |" in text
    assert "secateur prune 'a model' -o 'my pruned'" in text
    assert "secateur verify 'my pruned'" in text
    assert "not smaller and not faster" in text
    assert "https://arxiv.org/abs/2306.11695" in text
    assert "The source's own words" not in text
    assert str(source) not in text  # a path says something of the machine and nothing of the model


def test_the_snippet_loads_the_model(pruned, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (pruned / "README.md").read_text(), re.S)
    monkeypatch.chdir(pruned.parent)
    found: dict = {}
    exec(code.replace("tokenizer =", "# "), found)
    assert type(found["model"]).__name__ == "LlamaForCausalLM"


def test_figures_are_put_in_and_replaced_and_nothing_else_changes(pruned, source):
    path = pruned / "README.md"
    before = path.read_text().replace("# my pruned", "# A better title\n\nMy own words.").replace("- en", "- en\n- de")
    path.write_text(before)
    evaluation = agreement(source, pruned)
    result = evaluation["result"]
    for _ in range(2):
        assert card.refresh_card(pruned, read_manifest(pruned), [evaluation])
    loaded = ModelCard.load(path)
    assert "My own words." in loaded.text
    assert loaded.data.language == ["en", "de"]
    (metric,) = loaded.data.eval_results
    assert (metric.metric_type, metric.task_type) == ("perplexity", "text-generation")
    assert metric.metric_value == result["perplexity"]
    assert loaded.data.model_name == "my pruned"
    row = f"| {result['perplexity_dense']:.3f} | {result['perplexity']:.3f} | {result['kl']:.4f} |"
    assert loaded.text.count(row) == 1

    def outside(text):
        return re.sub(f"{card.START}.*{card.END}", "", text.split("---\n", 2)[2], flags=re.S)

    assert outside(path.read_text()) == outside(before)
    assert secateur.verify(pruned, None).ok


def test_verification_does_not_mind_the_card(pruned):
    assert "README.md" not in read_manifest(pruned).files
    (pruned / "README.md").unlink()
    assert secateur.verify(pruned, None).ok
    # One that is gone is written again.
    assert card.refresh_card(pruned, read_manifest(pruned), [])
    assert "# my pruned" in (pruned / "README.md").read_text()


def test_a_card_without_a_place_for_figures_is_left_alone(pruned, source):
    path = pruned / "README.md"
    path.write_text("---\nlicense: mit\n---\nAll my own.\n")
    assert not card.refresh_card(pruned, read_manifest(pruned), [agreement(source, pruned)])
    assert path.read_text() == "---\nlicense: mit\n---\nAll my own.\n"


def test_a_card_that_cannot_be_read(pruned):
    (pruned / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(CheckpointError, match=r"README.md: its metadata cannot be read .* Repair it, or delete"):
        card.refresh_card(pruned, read_manifest(pruned), [])


@pytest.mark.parametrize("text", ["---\n: [\n---\n", "no metadata", "---\n- a list\n---\n", b"\xff\xfe\x00"])
def test_a_source_card_that_cannot_be_read_stops_nothing(text, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    (source / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    secateur.prune(source, method=secateur.magnitude(), output=tmp_path / "out")
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    assert loaded.data.license is None
    assert "## Licence" in loaded.text


def test_the_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    cases = {
        "meta-llama/Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
        "/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc": "Qwen/Qwen3-0.6B",
        "/home/me/llama": None,
        "models/mine": None,
        "gpt2": None,  # may be anything
        None: None,
    }
    for path, expected in cases.items():
        assert base_model({"path": path}) == expected
    manifest = Manifest(
        versions={"secateur": "0", "torch": "0"},
        method="gblm+swaps",
        source={"path": "meta-llama/Llama-2-7b-hf"},
        settings={},
        plan={},
        totals={"zeros": 1, "weights": 2, "sparsity": 0.5},
        calibration={
            "samples": 1,
            "length": 2,
            "digest": "0" * 64,
            "sources": [{"corpus": "c4"}, {"corpus": "hf:a/b:x"}],
        },
    )
    card.write_card(tmp_path, manifest, "out")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.base_model_relation) == ("meta-llama/Llama-2-7b-hf", "finetune")
    assert data.datasets == ["allenai/c4", "a/b"]
    assert data.tags == ["pruned", "sparse", "sparsity", "secateur", "gblm", "swaps"]


def test_every_method_with_a_paper_cites_it_as_the_documentation_does():
    docs = Path(__file__).parents[2] / "docs"
    known = "".join((docs / page).read_text() for page in ("methods.md", "allocations.md"))
    package = Path(secateur.__file__).parent
    homes = "".join(path.read_text() for room in ("methods", "plans") for path in package.glob(f"{room}/*.py"))
    assert set(card.PAPERS) == {*METHODS, *REFINEMENTS, *ALLOCATIONS} - {"magnitude", "sensitivity"}
    for _, title, number in card.PAPERS.values():
        assert number is None or (number in homes and (number in known or "SparseSwaps" in title))
        assert title.split(":")[0] in " ".join(homes.split()).replace('" ', "")


@pytest.mark.parametrize("method", ["full", "block"])
def test_a_recovered_checkpoint_says_so(method, tmp_path):
    tiny.save("llama", tmp_path / "dense")
    tokens = tiny.tokens(8, 24)
    secateur.prune(tmp_path / "dense", method=secateur.magnitude(), output=tmp_path / "pruned")
    if method == "full":
        settings = {"data": tokens, "length": 24, "held_out": 2, "steps": 2}
        secateur.fine_tune(tmp_path / "pruned", tmp_path / "out", method="full", **settings)
    else:
        secateur.reconstruct(tmp_path / "pruned", calibration=tokens, epochs=1, output=tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "# out\n" in text
    assert re.search(
        r"## After pruning\n\n- The kept weights were (trained|tuned block by block).*, on token ids\n", text
    )
    assert "embeddings, head, norms, biases" not in text


# Tasks, the dense figure, and what was dequantised

TASK = {
    "task": "boolq",
    "shots": 0,
    "documents": 20,
    "metrics": {"acc": {"value": 0.65, "error": 0.1094}, "odd": {"value": None, "error": None}},
}


def test_tasks_reach_the_card(pruned):
    assert card.refresh_card(pruned, read_manifest(pruned), [{"kind": "tasks", "key": "k", "result": TASK}])
    text = (pruned / "README.md").read_text()
    assert "| boolq | 0 | 20 | acc | 0.6500 ± 0.1094 |" in text
    assert "| boolq | 0 | 20 | odd |  |" in text
    assert "None recorded yet" not in text
    (row,) = ModelCard.load(pruned / "README.md").data.eval_results
    assert (row.dataset_type, row.metric_type, row.metric_value) == ("boolq", "acc", 0.65)
    assert secateur.verify(pruned).ok


def test_the_dense_perplexity_where_it_is_known(source, pruned):
    found = secateur.perplexity(pruned, tiny.tokens(6, 24)).to_json()
    dense = secateur.perplexity(source, tiny.tokens(6, 24)).to_json()
    other = secateur.perplexity(source, tiny.tokens(5, 24)).to_json()
    records = [Record("perplexity", {}, result, "", {}) for result in (other, dense)]
    (item,) = with_dense([{"kind": "perplexity", "key": "k", "result": found}], records)
    assert item["result"]["perplexity_dense"] == dense["perplexity"]
    card.refresh_card(pruned, read_manifest(pruned), [item])
    assert f"| {dense['perplexity']:.3f} | {found['perplexity']:.3f}" in (pruned / "README.md").read_text()
    (alone,) = with_dense([{"kind": "perplexity", "key": "k", "result": found}], records[:1])
    assert "perplexity_dense" not in alone["result"]


FP8 = {"formats": {"FP8": 3}, "dtype": "bfloat16", "left_out": 0}


@pytest.mark.parametrize(
    ("origin", "how"),
    [
        ({"kind": "gguf"}, "dequantised before it was pruned"),
        ({"kind": "checkpoint", "dequantised": FP8}, "with its quantised weights dequantised to bfloat16"),
    ],
)
def test_bytes_of_a_dequantised_base_are_not_claimed(pruned, origin, how):
    manifest = read_manifest(pruned)
    assert "byte for byte" in (pruned / "README.md").read_text()
    manifest.source |= origin
    card.write_card(pruned, manifest, "out")
    text = (pruned / "README.md").read_text()
    assert "byte for byte" not in text
    assert f"is that of the base model, {how}." in text
