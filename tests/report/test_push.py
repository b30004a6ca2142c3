"""Pushing to a hub on this machine: what arrives there is proved, and names no folder of this machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries, snapshot_download

import secateur
import tiny
from command_line import Call
from hub_server import Hub, Repository
from secateur.errors import CheckpointError
from secateur.evaluate.results import Results
from secateur.evaluate.task_results import Metric, TaskResult
from secateur.record.manifest import read_manifest
from secateur.record.publication import published_command
from verified_runs import flipped

BASE, MODEL = "somebody/dense", "somebody/sparse"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was pruned from a local folder, beside it."""
    root = tmp_path_factory.mktemp("alice")
    tiny.save("llama", root / "llama")
    secateur.prune(
        root / "llama",
        pattern="2:4",
        calibration=tiny.tokens(),
        output=root / "pruned",
        command=[
            "secateur",
            "prune",
            str(root / "llama"),
            "-o",
            f"{root}/pruned",
            "--calibration",
            f"c4:{root}/t.json",
        ],
    )
    return root / "pruned"


@pytest.fixture
def pruned(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "pruned"))


def test_a_push_and_what_is_fetched(hub: Hub, kept: Path, pruned: Path, tmp_path: Path, call: Call) -> None:
    hub.repositories[BASE] = Repository()
    hub.repositories[BASE].files()["README.md"] = b"---\nlicense: mit\n---\n"
    (pruned / "report").mkdir()
    (pruned / "report" / "index.html").write_text(str(kept))
    (pruned / "config.json").write_bytes((kept / "config.json").read_bytes())
    store = Results(tmp_path / "store")
    result = secateur.perplexity(pruned, tiny.tokens(6, 24))
    store.add(secateur.model_digest(pruned), "perplexity", {"data": result.data}, result.to_json())
    before = {path: path.read_bytes() for path in pruned.rglob("*") if path.is_file()}

    pushed = secateur.push_to_hub(pruned, MODEL, base_model=BASE, private=True, evaluations=store)
    assert (pushed.base_model, pushed.left_out, pushed.deleted, pushed.evaluations) == (BASE, ("report",), (), 1)
    assert {path: path.read_bytes() for path in pruned.rglob("*") if path.is_file()} == before
    there = hub.repositories[MODEL]
    assert there.private
    assert there.messages == ["somebody/dense, pruned with wanda"]
    assert set(there.files()) == set(pushed.files) == {path.name for path in kept.iterdir()}
    for name, content in there.files().items():
        assert str(kept.parent).encode() not in content, name
        assert kept.parent.name.encode() not in content, name

    card = ModelCard(there.files()["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.model_name) == (BASE, "mit", "sparse")
    assert card.data.get("base_model_relation") == "finetune"
    assert card.data.tags == ["pruned", "sparse", "sparsity", "2:4", "secateur", "wanda"]
    assert [metric.metric_value for metric in card.data.eval_results] == [result.perplexity]
    for words in (
        f"# {MODEL}\n",
        f'from_pretrained("{MODEL}")',
        f"secateur verify {MODEL}",
        f"secateur prune {BASE} -o pruned --calibration c4:t.json",
        f"[{BASE}](https://huggingface.co/{BASE})",
        f"{result.perplexity:.3f}",
    ):
        assert words in card.text
    assert "## Licence" not in card.text

    proof = call("verify", MODEL, "--json").json  # fetched from there
    assert (proof["ok"], proof["sparsity"], proof["problems"]) == (True, 0.5, [])
    fetched = Path(snapshot_download(MODEL))
    manifest, local = read_manifest(fetched), read_manifest(pruned)
    assert (manifest.source["path"], manifest.published_from) == (BASE, local.digest)
    assert (manifest.tensors, manifest.matrices) == (local.tensors, local.matrices)
    assert secateur.model_digest(fetched) == secateur.model_digest(pruned)


def test_results_as_the_hub_takes_them(hub: Hub, pruned: Path, tmp_path: Path) -> None:
    hub.repositories[BASE] = Repository()
    store, digest = Results(tmp_path / "store"), secateur.model_digest(pruned)
    text = secateur.perplexity(pruned, tiny.tokens(6, 24))
    for data, corpus in (("c4", "c4"), ("my.txt", "my.txt")):
        found = replace(text, data=data, provenance={"sources": [{"corpus": corpus}]})
        store.add(digest, "perplexity", {"data": data}, found.to_json() | {"digest": data})
    for task, dataset, limit in (
        ("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), None),
        ("boolq", None, None),  # from local files
        ("rte", ("nyu-mll/glue", "rte"), 20),
    ):
        answered = TaskResult(task, 0, 50, {"acc": Metric(0.25, 0.1), "acc_norm": Metric(0.5, 0.1)}, dataset=dataset)
        rows = json.loads(json.dumps([answered.to_json()]))
        store.add(digest, "tasks", {"task": task, "limit": limit}, {"model": "m", "results": rows})
    secateur.push_to_hub(pruned, MODEL, base_model=BASE, evaluations=store)
    file = hub.repositories[MODEL].files()[".eval_results/secateur.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(file))
    assert {(one.dataset_id, one.task_id, one.value, one.notes) for one in entries} == {
        ("allenai/c4", "en", text.perplexity, "perplexity, 6 windows of 24 tokens"),
        ("allenai/ai2_arc", "ARC-Easy", 0.25, "arc_easy of lm-evaluation-harness, acc, 0 shots, 50 documents"),
    }
    # Without results of the weights that are pushed, those of others do not stay.
    assert secateur.push_to_hub(pruned, MODEL, base_model=BASE).deleted == (".eval_results/secateur.yaml",)


def test_what_people_wrote_stays_and_what_was_there_before_goes(hub: Hub, pruned: Path) -> None:
    hub.repositories[BASE] = Repository()
    card = pruned / "README.md"
    card.write_text(
        card.read_text().replace("## Sparsity", "My own words.\n\n## Sparsity").replace("tags:", "x: y\ntags:")
    )
    old = {"secateur.json": b"{}", "model-00001-of-00002.safetensors": b"", "picture.png": b"", ".gitattributes": b""}
    hub.repositories[MODEL] = Repository(branches={"main": [old]})
    pushed = secateur.push_to_hub(pruned, MODEL, base_model=BASE, message="Again")
    assert pushed.deleted == ("model-00001-of-00002.safetensors",)
    files = hub.repositories[MODEL].files()
    assert {"picture.png", ".gitattributes", "model.safetensors"} <= set(files)
    text = files["README.md"].decode()
    assert "My own words." in text
    assert "x: y" in text
    assert f"secateur verify {MODEL}" in text
    assert hub.repositories[MODEL].messages == ["Again"]

    # The public form is a checkpoint like any other: pushed on, it stays what it is.
    again = Path(snapshot_download(MODEL))
    assert secateur.push_to_hub(again, "somebody/fork").base_model == BASE
    fork = json.loads(hub.repositories["somebody/fork"].files()["secateur.json"])
    assert fork["published_from"] == read_manifest(pruned).digest


def test_a_branch_and_a_pull_request(hub: Hub, pruned: Path, call: Call) -> None:
    hub.repositories[BASE] = there = Repository(branches={"main": [{"pytorch_model.bin": b"", "tokenizer.model": b""}]})
    options = (pruned, BASE, "--base-model", BASE)
    refused = call("push", *options)
    assert refused.code == 2
    assert refused.message == (
        f"Error: {BASE}: holds pytorch_model.bin and no secateur.json: weights that Secateur did not write. Name "
        "another repository, a new branch (--revision), or open a pull request (--create-pr)."
    )
    shown = call("push", *options, "--revision", "sparse")
    assert shown.out.startswith(f"Pushed to {BASE}: ")
    assert "Deleted there, since they belong to what was there before: pytorch_model.bin, tokenizer.model" in shown.out
    assert set(there.files("sparse")).isdisjoint({"pytorch_model.bin", "tokenizer.model"})
    assert call("verify", BASE, "--revision", "sparse").code == 0
    asked = call("push", *options, "--create-pr", "--json").json
    assert asked["pull_request"] == f"{hub.endpoint}/{BASE}/discussions/1"
    assert "model.safetensors" in there.pull_requests[0]
    assert set(there.files()) == {"pytorch_model.bin", "tokenizer.model"}  # the branch is as it was


def test_what_is_refused_leaves_nothing_there(hub: Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[BASE] = Repository()

    def refused(message: str, repository: str = MODEL, base: str | None = BASE) -> None:
        with pytest.raises(CheckpointError) as caught:
            secateur.push_to_hub(pruned, repository, base_model=base)
        assert message in str(caught.value)

    refused("was pruned from llama, which has no known name on the hub", base=None)
    refused("--base-model: got ./llama, expected the id of a model on the hub", base="./llama")
    refused("--base-model: got somebody/else, and the hub has no such model", base="somebody/else")
    refused("sparse: not a repository of the hub; expected OWNER/NAME.", "sparse")
    refused("others/sparse: the hub says: ", "others/sparse")
    with flipped(pruned / "model.safetensors", (pruned / "model.safetensors").stat().st_size - 9, 3):
        refused("is not what its manifest says, and was not pushed: model.")
    card = pruned / "README.md"
    own = card.read_text()
    card.write_text(f"{own}\nIt lies in {pruned}.\n")
    refused(f"README.md: names {pruned}, a folder of this machine. Nothing was pushed; delete it, and a new one")
    card.unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    refused("Sign in with a token that may write: hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(pruned / "none"))
    refused("nobody is signed in to the hub here. Run: hf auth login")
    assert set(hub.repositories) == {BASE}
    monkeypatch.setenv("HF_TOKEN", "hf_" + "t" * 34)
    secateur.push_to_hub(pruned, MODEL, base_model=BASE)
    assert "README.md" in hub.repositories[MODEL].files()


def test_pruned_and_pushed_from_the_hub(hub: Hub, kept: Path, tmp_path: Path, call: Call) -> None:
    files = {path.name: path.read_bytes() for path in (kept.parent / "llama").iterdir()}
    hub.repositories[BASE] = Repository(branches={"main": [files]})
    options = ("-o", tmp_path / "out", "--method", "magnitude", "--packed")
    local = call("prune", kept.parent / "llama", *options, "--push-to", MODEL)
    assert local.code == 2
    assert "has no known name on the hub" in local.message
    assert not (tmp_path / "out").exists()  # refused before any work
    done = call("prune", BASE, *options, "--push-to", MODEL)
    assert (done.code, f"Pushed to {MODEL}" in done.out) == (0, True)
    there = hub.repositories[MODEL].files()
    assert {"sparse_config.json", "packed.safetensors"} & set(there)
    assert f'secateur.load("{MODEL}")' in there["README.md"].decode()
    assert "- unstructured\n" in there["README.md"].decode()
    assert call("verify", MODEL).code == 0


@pytest.mark.parametrize(
    ("argument", "public"),
    [
        ("/home/alice/llama", "llama"),
        ("~alice/models/llama/", "llama"),
        ("../alice/llama", "llama"),
        ("C:\\Users\\alice\\llama", "llama"),
        ("0.7*/home/al ice/my.jsonl", "0.7*my.jsonl"),
        ("wikitext2:alice/wiki.test.raw", "wikitext2:wiki.test.raw"),
        ("--plan=/home/alice/plan.json", "--plan=plan.json"),
        ("hf:allenai/c4:en", "hf:allenai/c4:en"),
        ("hf:/home/alice/c4", "hf:c4"),
        ("https://example.com/a/b", "https://example.com/a/b"),
        ("2:4", "2:4"),
        ("*.down_proj", "*.down_proj"),
    ],
)
def test_paths_of_commands(argument: str, public: str) -> None:
    assert published_command(["secateur", argument], {"path": None}) == ["secateur", public]


def test_models_of_commands() -> None:
    command = ["secateur", "prune", "./llama", "-o", "out/llama"]
    shown = published_command(command, {"path": "/home/alice/llama"}, "meta/llama")
    assert shown == ["secateur", "prune", "meta/llama", "-o", "llama"]
    snapshot = "/home/alice/.cache/huggingface/hub/models--meta--llama/snapshots/0123"
    assert published_command([snapshot], {"path": snapshot}) == ["meta/llama"]
