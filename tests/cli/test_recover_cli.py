"""`secateur recover` and `secateur merge`, as a person and as a program see them."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command_line import Call, forked, process, save_model, terminal
from real_data import some_docs
from secateur.recover.training import last_checkpoint

TEXT = ["--data", some_docs(), "--length", "32", "--held-out", "4"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli-recovery")
    model = save_model(root / "model")
    done = process("prune", model, "-o", root / "pruned", "--method", "magnitude", "--pattern", "2:4")
    assert done.returncode == 0, done.stderr
    return root / "pruned"


def test_in_a_pipe(call: Call, pruned: Path, tmp_path: Path) -> None:
    command = ("recover", pruned, "-o", tmp_path / "out", *TEXT, "--method", "full", "--steps", "4", "--lr", "1e-3")
    result = call(*command)
    assert result.code == 0, result.err
    assert "Recovered with full" in result.out
    assert re.search(r"^held-out perplexity +\d+\.\d{3} ± \d+\.\d{3} +\d+\.\d{3} ± \d+\.\d{3}$", result.out, re.M)
    assert re.search(r"^sparsity of planned weights +0\.5000 +0\.5000$", result.out, re.M)
    assert result.out.rstrip().endswith(f"secateur verify {tmp_path / 'out'}")
    # The estimate comes first, then a line for each evaluation.
    estimate, training = result.err.partition("training, ")[::2]
    assert re.search(r"^budget +4 steps, 32 tokens each step$", estimate, re.M)
    assert re.search(r"^time +(about [\d.]+ s|under 1 s), and evaluations$", estimate, re.M)
    assert re.search(r"^windows +4 of 32 tokens, each seen once; 4 held out$", estimate, re.M)
    assert re.search(r"^memory +.* and activations: weights .*, gradients .*, moments .*, masks ", estimate, re.M)
    assert re.match(r"1 of 4, loss \d\.\d+, held-out perplexity \d+\.\d+, \d+\.\d s\n", training)
    assert "Warning" not in result.err
    assert call("verify", tmp_path / "out", "--source", pruned).out.rstrip().endswith("Verified.")
    assert call("inspect", tmp_path / "out").out.count("2:4") > 5


def test_as_json(call: Call, pruned: Path, tmp_path: Path) -> None:
    adapter = call("recover", pruned, "-o", tmp_path / "out", *TEXT, "--steps", "2", "--lr", "1e-2", "--json").json
    assert adapter["record"]["command"][:2] == ["secateur", "recover"]
    assert adapter["record"]["targets"] == ["q_proj", "v_proj"]
    assert adapter["before"]["digest"] == adapter["after"]["digest"] == adapter["record"]["held_out"]["digest"]
    merged = call("merge", tmp_path / "out", "--base", pruned, "-o", tmp_path / "merged", "--json").json
    assert (merged["sparsity_before"], merged["sparsity"], merged["mask"]) == (0.5, 0.5, "keep")
    assert merged["unmerged"]["nats"] == pytest.approx(adapter["after"]["nats"], abs=1e-6)
    plain = call("merge", tmp_path / "out", "-b", pruned, "-o", tmp_path / "plain", "--mask", "drop", "--no-eval")
    assert re.search(r"^sparsity of planned weights +0\.5000 +0\.5000 +0\.\d{4}$", plain.out, re.M)
    assert "no pattern is promised for them" in plain.out
    shown = call("verify", tmp_path / "plain").out
    assert "no pattern is promised for them" in shown
    assert call("verify", tmp_path / "plain", "--json").json["notes"]


def test_merging_measures_on_what_was_held_out_and_nothing_else(call: Call, pruned: Path, tmp_path: Path) -> None:
    text, adapter = tmp_path / "text.txt", tmp_path / "adapter"
    text.write_text("Trees that are cut back in winter bear more fruit in the year that follows.\n" * 60)
    assert call("recover", pruned, "-o", adapter, *TEXT, "--data", text, "--steps", "1").code == 0
    merge = ("merge", adapter, "--base", pruned, "--overwrite", "-o", tmp_path / "merged", "--json")
    assert [call(*merge).json["merged"][key] for key in ("windows", "length")] == [4, 32]
    parts = call(*merge, "--length", "16", "--windows", "3").json["merged"]
    assert (parts["windows"], parts["length"]) == (3, 16)
    result = call(*merge, "--windows", "5")
    assert result.code == 2
    assert "--windows: got 5 of 32 tokens, and 128 tokens of" in result.message
    text.write_text(text.read_text()[7:])
    result = call(*merge)
    assert result.code == 2
    assert "not the text any more that the adapter was trained on" in result.message
    assert call(*merge, "--data", text, "--length", "32").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal(pruned: Path, tmp_path: Path) -> None:
    command = ["recover", str(pruned), "-o", str(tmp_path / "out"), *TEXT, "--steps", "4", "--seed", "3"]
    code, shown = terminal(*command)
    assert code == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "Traceback" not in plain
    assert re.search(r"training \S+ 4/4 ", plain)
    assert re.search(r"trained +\d[\d,]* of [\d,]+ weights", plain)
    assert "secateur merge" in " ".join(plain.split())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interruption_says_how_to_go_on(pruned: Path, tmp_path: Path) -> None:
    arguments = ["recover", pruned, "-o", f"{tmp_path / 'out'}/", *TEXT, "--steps", "400", "--eval-every", "2"]
    work = tmp_path / "out.training"

    def interrupt_at_a_checkpoint() -> None:
        run, patience = os.getpid(), time.monotonic() + 200

        def watch() -> None:
            while last_checkpoint(work) is None and os.getppid() == run and time.monotonic() < patience:
                time.sleep(0.05)
            os.kill(run, signal.SIGINT)

        forked(watch)

    done = process(*arguments, before=interrupt_at_a_checkpoint)
    out, err = done.stdout, done.stderr
    assert (done.returncode, out) == (130, ""), err
    assert re.search(r"^Interrupted\. .*checkpoint-\d+ is the last checkpoint; go on with the same command", err, re.M)
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    state = json.loads((last_checkpoint(work) / "trainer_state.json").read_text())  # type: ignore[operator]
    assert state["global_step"] >= 2


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "method": (["--method", "qlora"], '--method: got "qlora", expected lora, sparse-lora, full or block.'),
    "option of another": (["--method", "full", "--rank", "4"], "--rank: has no meaning for --method full"),
    "target": (["--targets", "qkv"], '--targets "qkv" matches none of the matrices. Choose with --targets'),
    "both budgets": (["--steps", "3", "--minutes", "1"], "--steps and --minutes were both given"),
    "too long": (["--length", "512"], "windows of 512 tokens, and the model has 256 positions. Use --length 256"),
    "no text": (["--data", "nope.txt"], "nope.txt: no such file."),
    "nothing to resume": (["--resume"], "no checkpoint to resume from. Start without --resume."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_two(call: Call, pruned: Path, tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    result = call("recover", pruned, "-o", tmp_path / "out", *TEXT, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_is_one(call: Call, pruned: Path, tmp_path: Path) -> None:
    arguments = ["--method", "full", "--lr", "1e30", "--steps", "9", "--optimizer", "sgd", "--clip", "1e30"]
    result = call("recover", pruned, "-o", tmp_path / "out", *TEXT, *arguments)
    assert (result.code, result.out) == (1, "")
    assert "training diverged" in result.message
    assert "a lower --lr" in result.message


def test_what_a_file_of_options_says(call: Call, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"pruned: {pruned}\noutput: {tmp_path / 'out'}\ndata: python-docs\nlength: 32\nheld-out: 4\nsteps: 1\n"
        'targets: ["*.down_proj", o_proj]\nrank: 2\n'
    )
    result = call("recover", "--config", tmp_path / "run.yaml", "--json")
    assert result.code == 0, result.err
    assert result.json["record"]["targets"] == ["down_proj", "o_proj"]
    assert result.json["record"]["settings"]["rank"] == 2
