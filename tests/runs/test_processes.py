"""Runs that several processes share: the same bytes for any number of them, and one end for all."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import RUNS, contents

import secateur
import tiny
from command_line import process
from process_groups import die_at, group
from pruned_blocks import pruned_model
from secateur.collect.exempt import Exempt
from secateur.collect.survey import computing
from secateur.errors import CalibrationError, CheckpointError, NumericalError, PatternError, ProcessError
from secateur.launched import Launched, launched
from secateur.models.opening.opened import choose_device
from secateur.runs.events import Event
from secateur.runs.processes import ALONE, Processes
from tuned_blocks import OPTIONS, samples

EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts, block by block": ("qwen3_moe", {"method": "sparsegpt"}),
    "experts and gradients": ("mixtral", {"method": "gblm"}),
    "experts and residual targets": ("qwen3_moe", {"method": "alps", "within": "site", "targets": "residual"}),
    "unseen experts": ("qwen3_moe", {"method": "wanda", "unseen": "magnitude", "samples": 5, "batch_size": 1}),
}
CASES = {**RUNS, **EXPERTS}


def ids(samples: int = 9) -> torch.Tensor:
    return tiny.tokens(samples=samples, length=12)


def prune(model: Path, output: Path, **options: Any) -> Any:
    samples = options.pop("samples", 9)
    options = {"batch_size": 1 if options.get("method") in ("gblm", "wanda_plus") else 2, **options}
    return secateur.prune(model, output=output, calibration=ids(samples), **options)


@pytest.fixture
def short_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process says nothing however long the others wait for it."""
    monkeypatch.setattr("secateur.runs.processes._LAST_WORDS", 0.5)


@tiny.pairs_by_turns("name, count", CASES, (2, 3, 4))
def test_any_number_of_processes_makes_the_same_bytes(name: str, count: int, tmp_path: Path) -> None:
    architecture, options = CASES[name]
    model = tiny.save(architecture, tmp_path / "model")
    prune(model, tmp_path / "1", **options)
    results = group(count, lambda rank: prune(model, tmp_path / str(count), **options).method)
    assert results == [results[0]] * count, results
    assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"targets": "pruned", "batch_size": 1, "only": ["*.mlp.*"]}),
        pytest.param("mixtral", {"batch_size": 1}, marks=pytest.mark.slow),
        ("gpt2", {"batch_size": 1, "minutes": 1000}),
    ],
    ids=["one batch in a step", "targets of the same inputs", "experts", "minutes"],
)
def test_recovery_block_by_block(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    pruned = pruned_model(architecture, tmp_path)
    options = {**OPTIONS, "batch_size": 4, **options, "calibration": samples()}

    def recover(rank: int, output: Path) -> list[Any]:
        manifest = secateur.reconstruct(pruned, output=output, **options)
        assert manifest.recovery is not None
        return [{**block, "seconds": 0} for block in manifest.recovery["blocks"]]

    expected = recover(0, tmp_path / "1")
    assert any(block["after"] < block["before"] for block in expected)
    count = 3 if architecture == "mixtral" else 2
    found = group(count, lambda rank: recover(rank, tmp_path / str(count)))
    if "minutes" not in options:  # with them the learning rate falls with the clock
        assert found == [expected] * count
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    assert found == [found[0]] * count


@pytest.mark.usefixtures("short_last_words")
@pytest.mark.parametrize("counts", [pytest.param((2, 1), marks=pytest.mark.slow), (1, 3)], ids=str)
def test_recovery_goes_on_with_any_number(counts: tuple[int, int], tmp_path: Path) -> None:
    pruned = pruned_model("llama", tmp_path)
    options = {**OPTIONS, "batch_size": 1, "calibration": samples()}
    secateur.reconstruct(pruned, output=tmp_path / "whole", **options)
    victim = die_at(lambda event: event.block == 2 and event.stage == "tune")

    def run(rank: int) -> None:
        last = rank == counts[0] - 1
        secateur.reconstruct(
            pruned, output=tmp_path / "out", on_event=victim if last else lambda event: None, **options
        )

    *others, killed = group(counts[0], run, forks=True)
    assert killed == -signal.SIGKILL
    assert all("ended or hung without a word" in str(error) for error in others)

    def go_on(rank: int) -> set[int]:
        tuned: set[int] = set()

        def on_event(event: Event) -> None:
            if event.stage == "tune" and event.block is not None:
                tuned.add(event.block)

        secateur.reconstruct(pruned, output=tmp_path / "out", resume=True, on_event=on_event, **options)
        return tuned

    assert all(0 not in tuned and tuned for tuned in group(counts[1], go_on))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_every_process_knows_the_whole_manifest(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    one, other = group(2, lambda rank: prune(model, tmp_path / "out", method="sparsegpt").matrices)
    assert one == other
    assert one == json.loads((tmp_path / "out" / "secateur.json").read_text())["matrices"]


@pytest.mark.parametrize("scope", ["model", "block"])
def test_gradients(scope: Any, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")

    def take(rank: int, output: Path) -> dict[str, torch.Tensor]:
        file = secateur.gradients(
            model, output=output, calibration=ids(), norms=["l1", "l2"], scope=scope, batch_size=2
        )
        kinds = [secateur.GradientKind(norm, "sample", scope) for norm in ("l1", "l2")]
        return {f"{name} {kind}": file.read(name, kind).total for name in file.matrices for kind in kinds}

    expected = take(0, tmp_path / "alone")
    for count in (2, 3):
        for found in group(count, lambda rank, count=count: take(rank, tmp_path / str(count))):
            assert isinstance(found, dict), found
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_slow_process_finds_its_gradients(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")

    def take(rank: int) -> Any:
        add = Exempt.add

        def late(exempt: Exempt, found: Any) -> None:
            time.sleep(0.5)
            add(exempt, found)

        if rank:
            Exempt.add = late  # type: ignore[method-assign]
        return secateur.gradients(model, output=tmp_path / "out", calibration=ids(), batch_size=2).matrices

    one, other = group(2, take)
    assert one == other


def test_evaluations(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    prune(model, tmp_path / "pruned")

    def measure(rank: int) -> tuple[Any, Any]:
        found = secateur.perplexity(model, data=ids(), batch_size=2)
        (beside,) = secateur.agreement(model, [tmp_path / "pruned"], data=ids(), batch_size=2)
        return found.window_nats, (beside.window_kl, beside.kl_99, beside.top1, beside.difference)

    expected = measure(0)
    for count in (2, 3):
        assert group(count, measure) == [expected] * count


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("wanda", (2, 3)),
        pytest.param("wanda", (1, 2), marks=pytest.mark.slow),
        pytest.param("residual targets", (3, 1), marks=pytest.mark.slow),
        ("gradients first", (2, 3)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("short_last_words")
def test_a_killed_process_ends_all_and_any_number_goes_on(name: str, counts: tuple[int, int], tmp_path: Path) -> None:
    architecture, options = RUNS[name]
    model = tiny.save(architecture, tmp_path / "model")
    prune(model, tmp_path / "whole", **options)
    last = counts[0] - 1
    victim = die_at(lambda event: event.block == 2 and event.stage == "solve")  # the first one is written by then

    def run(rank: int) -> Any:
        on_event = victim if rank == last else lambda event: None
        return prune(model, tmp_path / "out", on_event=on_event, **options)

    *others, killed = group(counts[0], run, forks=True)
    assert killed == -signal.SIGKILL
    for error in others:
        assert isinstance(error, ProcessError)
        assert f"process {last} of {counts[0]} ended or hung without a word" in str(error)
    finished = [json.loads(line).get("name") for line in (tmp_path / "out.partial" / "journal.jsonl").open()]
    assert "block 0" in finished

    def go_on(rank: int) -> list[str]:
        solved = []

        def on_event(event: Event) -> None:
            if event.stage == "solve" and event.matrix is not None:
                solved.append(event.matrix)

        prune(model, tmp_path / "out", resume=True, on_event=on_event, **options)
        return solved

    for solved in group(counts[1], go_on):
        assert not any(matrix.startswith("model.layers.0.") for matrix in solved)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_of_one_is_an_error_of_all(tmp_path: Path) -> None:
    """Here of a matrix that one of them solves: all raise what it raises."""
    model = tiny.save("llama", tmp_path / "model")

    def own(problem: Any) -> Any:
        raise NumericalError(f"{problem.name}: cannot be solved")

    method = secateur.Method("own", own, frozenset({secateur.SquaredNorm}))
    found = group(2, lambda rank: prune(model, tmp_path / "out", method=method))
    assert [type(error) for error in found] == [NumericalError] * 2
    assert {str(error) for error in found} == {str(found[0])}
    assert "cannot be solved" in str(found[0])
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_middle_of_the_samples_is_told(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")

    def cut(event: Event) -> None:
        if event.stage == "statistics" and event.block == 2:
            raise OSError("the disk is on fire")

    def run(rank: int) -> Any:
        return prune(model, tmp_path / "out", on_event=cut if rank == 1 else lambda event: None)

    first, second = group(2, run)
    assert isinstance(second, OSError)
    assert isinstance(first, ProcessError)
    assert str(first) == "process 1 of 2 ended the run: OSError: the disk is on fire"


def test_an_interruption_of_one_is_one_of_all(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")

    def interrupt(event: Event) -> None:
        if event.stage == "statistics" and event.block == 2:
            raise KeyboardInterrupt

    def run(rank: int) -> str:
        try:
            prune(model, tmp_path / "out", on_event=interrupt if rank == 1 else lambda event: None)
        except KeyboardInterrupt as end:
            return f"interrupted: {end}"
        return "finished"

    first, second = group(2, run)
    assert first.startswith("interrupted: ")
    assert "2 of 3 blocks of an unfinished run are kept there" in first
    assert second == "interrupted: "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "plan model.layers.0.mlp.down_proj.weight .* in process 0 and .* in process 1"),
        ({"method": "sparsegpt"}, "settings .* is .* in process 0 and .* in process 1"),
        ({"samples": 8}, "tokens is .* in process 0 and .* in process 1"),
        ({"model": "other"}, "model configuration .* in process 1"),
    ],
    ids=["pattern", "method", "tokens", "model"],
)
def test_processes_that_differ_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    models = [tiny.save("llama", tmp_path / name) for name in ("model", "other")]
    config = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    model = models["model" in options]
    options.pop("model", None)

    def run(rank: int) -> Any:
        return prune(model if rank else models[0], tmp_path / "out", **(options if rank else {}))

    for error in group(2, run):
        with pytest.raises(ProcessError, match=f"processes of this run differ: .*{message}"):
            raise error
    assert not (tmp_path / "out").exists()


def test_processes_that_read_other_weights_are_refused(tmp_path: Path) -> None:
    models = [tiny.save("llama", tmp_path / name) for name in ("model", "other")]
    tensors = load_file(models[1] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, models[1] / "model.safetensors", {"format": "pt"})
    for error in group(2, lambda rank: prune(models[rank], tmp_path / "out")):
        with pytest.raises(ProcessError, match=r"up_proj.weight: has the digest .* different models"):
            raise error


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "wanda_iterative", "option": {"weighting": "published"}, "batch_size": 1},
            PatternError,
            "depend on the order of the samples",
        ),
        ({"batch_size": 9}, ProcessError, "2 processes cannot share 1 batch of"),
    ],
    ids=["order", "batches"],
)
def test_what_processes_cannot_share(options: Any, error: Any, message: str, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for found in group(2, lambda rank: prune(model, tmp_path / "out", **options)):
        with pytest.raises(error, match=message):
            raise found


def test_an_output_that_exists_is_refused_by_all(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    for found in group(2, lambda rank: prune(model, tmp_path / "out")):
        assert isinstance(found, CheckpointError)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (1, 3, 4, 4, 4), (5, 1, 1, 1, 1, 1), (1,) * 7], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_whole_batches_in_order(sizes: tuple[int, ...], count: int) -> None:
    batches = list(torch.arange(sum(sizes)).unsqueeze(1).split(sizes))
    for probe in (False, True):
        shares = [Processes(rank, count).share(batches, probe=probe) for rank in range(count)]
        counted = [share.batches[number] for share in shares for number in share.counted]
        assert [id(batch) for batch in counted] == [id(batch) for batch in batches]
        for share in shares:
            assert share.before == int(share.batches[share.counted.start][0, 0])
            assert (share.samples, share.tokens) == (sum(sizes), sum(sizes))
            assert share.probe == (probe and share.before > 0)
            assert share.batches[0] is batches[0] or not share.probe
    if count > 1:
        most = max(sum(len(share.batches[number]) for number in share.counted) for share in shares)
        assert most <= sum(sizes) / count + max(sizes)


def test_too_few_batches() -> None:
    with pytest.raises(ProcessError, match=r"4 processes cannot share 3 batches.* Use more samples"):
        Processes(0, 4).share(list(torch.zeros(3, 1).split(1)))


def test_work_is_dealt_out_by_cost() -> None:
    costs = {"down": 48.0, "gate": 17.0, "up": 17.0, "o": 7.0, "q": 7.0, "k": 2.0, "v": 2.0}
    taker = Processes(0, 2).deal(costs)
    loads = [sum(cost for name, cost in costs.items() if taker[name] == rank) for rank in range(2)]
    assert max(loads) <= 52
    assert set(ALONE.deal(costs).values()) == {0}


def test_the_command_starts_a_process_for_each_device(tmp_path: Path) -> None:
    from command_line import CALIBRATION, save_model

    model = save_model(tmp_path / "model")
    common = ["prune", model, *CALIBRATION, "--method", "sparsegpt", "--batch-size", "1"]
    alone = process(*common, "-o", tmp_path / "1")
    assert alone.returncode == 0, alone.stderr
    both = process(*common, "-o", tmp_path / "2", "--device", "cpu,cpu", "--log-dir", tmp_path / "logs")
    assert both.returncode == 0, both.stderr
    assert len(both.stdout.splitlines()) == len(alone.stdout.splitlines())
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()
    for rank in range(2):
        log = (tmp_path / "logs" / f"process-{rank}.log").read_text()
        assert f"process {rank} of 2: secateur prune" in log
        assert "solve, block 3 of 3" in log


def test_commands_of_one_process_are_refused_in_several(tmp_path: Path) -> None:
    def start() -> None:
        os.environ.update(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")

    found = process("inspect", tmp_path, before=start)
    assert found.returncode == 2
    assert "secateur inspect runs in one process, and a launcher has started 2" in found.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "first", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, "beside RANK=first"),
    ],
    ids=["incomplete", "no number"],
)
def test_what_a_launcher_should_have_set(variables: dict[str, str], message: str, monkeypatch: Any) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=message):
        launched()


def test_a_launcher_that_says_nothing_of_the_machine(monkeypatch: Any) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launched(1, 2, 0, None)
    assert choose_device("cpu,cpu").type == "cpu"


def test_an_environment_that_a_command_cannot_use(tmp_path: Path) -> None:
    def start() -> None:
        os.environ.update(WORLD_SIZE="2")

    assert process("--version", before=start).returncode == 0
    found = process("inspect", tmp_path, before=start)
    assert (found.returncode, found.stderr.count("Error: WORLD_SIZE=2 without RANK")) == (2, 1)


def test_which_of_several_equal_gpus_it_is_makes_no_difference() -> None:
    """Each process has one of its own, and what they compute with is compared."""
    places = [SimpleNamespace(device=torch.device("cuda", number), dtype=torch.float32) for number in range(2)]
    first, second = (computing(place, 1, place.device) for place in places)  # type: ignore[arg-type]
    assert first == second


def test_several_devices_need_a_process_each(tmp_path: Path) -> None:
    """The commands start them; a function, or another command, would take the first device and say nothing."""
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match='--device "cpu,cpu" names 2 devices, and one process runs here'):
        prune(model, tmp_path / "out", device="cpu,cpu")
    for error in group(2, lambda rank: prune(model, tmp_path / "out", device="cpu,cpu,cpu")):
        with pytest.raises(CheckpointError, match="names 3 devices, and 2 processes run here"):
            raise error


def test_a_plan_counts_the_processes_that_a_command_would_start(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    save_file({"input_ids": ids()}, tmp_path / "ids.safetensors")
    common = ["plan", model, "-c", tmp_path / "ids.safetensors", "--batch-size", "1", "--json"]
    one, two = (process(*common, "--device", device) for device in ("cpu", "cpu,cpu"))
    assert json.loads(one.stdout)["parts"] == []
    assert json.loads(two.stdout)["parts"]


def test_states_of_a_process_that_does_not_see_the_others_disk(tmp_path: Path, monkeypatch: Any) -> None:
    """Its files lie where its own machine keeps temporary ones, and nothing is made at the other one's path."""
    model = tiny.save("llama", tmp_path / "model")
    prune(model, tmp_path / "alone", method="sparsegpt")
    own_disk = tmp_path / "own disk"

    def run(rank: int) -> str:
        monkeypatch.setattr("secateur.models.flow.stream.available_bytes", lambda: 0)
        if rank:  # as on another machine
            is_dir = Path.is_dir
            monkeypatch.setattr(Path, "is_dir", lambda path: path.name != "out.partial" and is_dir(path))
            monkeypatch.setattr("tempfile.tempdir", str(own_disk))
        return prune(model, tmp_path / "out", method="sparsegpt").method

    assert group(2, run) == ["sparsegpt", "sparsegpt"]
    assert own_disk.is_dir()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_more_samples_are_asked_for(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for error in group(3, lambda rank: secateur.perplexity(model, data=ids(2), batch_size=1)):
        assert isinstance(error, ProcessError | CalibrationError)
