"""The command line, as a person and as a program see it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command_line import CALIBRATION, FIRST, Call, interpreter, process, terminal, untimed
from secateur import cli
from secateur.errors import CheckpointError, NumericalError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.record.manifest import read_manifest


@pytest.fixture(scope="module")
def run_in_pipe(model: Path) -> subprocess.CompletedProcess[str]:
    """A run with --json and no terminal, which made the folder `pruned` beside the model."""
    return process("prune", model, "-o", model.parent / "pruned", "--pattern", "2:4", *CALIBRATION, "--json")


@pytest.fixture(scope="module")
def pruned(model: Path, run_in_pipe: subprocess.CompletedProcess[str]) -> Path:
    assert run_in_pipe.returncode == 0, run_in_pipe.stderr
    return model.parent / "pruned"


def test_how_much_is_said(call: Call, model: Path, pruned: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    options = ("prune", model, "-o", tmp_path / "out", *CALIBRATION, "--overwrite", "--log-file", log)
    quiet, loud = call("--quiet", *options), call(*options, "-v")
    assert (quiet.code, quiet.err) == (0, "")
    assert "sparsity 0.5000" in quiet.out
    assert {"drawing calibration samples", "block 1 of 3: statistics", f"block 1 of 3: {FIRST}"} <= set(loud.said)
    lines = untimed(log.read_text())
    assert lines[0].startswith("secateur --quiet prune ")
    assert lines.count("ended with 0") == 2
    assert sum(bool(re.match(r"block \d of 3 pruned, ", line)) for line in lines) == 6  # of both, also the quiet one
    wrong = call("inspect", tmp_path / "nowhere", f"--log-file={log}", "--quiet")
    assert wrong.code == 2
    assert untimed(log.read_text())[-2:] == [wrong.err.rstrip(), "ended with 2"]
    assert call("verify", pruned, "--quiet", "-v").message.startswith("Error: --quiet, -v: one asks for less")
    assert call("verify", pruned, "--log-file", tmp_path).message == (
        f"Error: --log-file {tmp_path}: cannot be written (Is a directory)."
    )
    assert call("verify", pruned, "--log-file").message == "Error: --log-file needs a value."


def test_what_was_pruned_or_zero_before(call: Call, pruned: Path, tmp_path: Path) -> None:
    again = call("prune", pruned, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.25")
    assert again.code == 0
    assert f"{pruned} was pruned already, with wanda, to sparsity 0.5000: its zeros count among those" in again.message
    assert "21 of 21 matrices have more zeros than were asked for" in " ".join(again.out.split())
    assert "these weights were zero before, and stay so." in " ".join(again.out.split())
    more = call("prune", pruned, "-o", tmp_path / "more", "--method", "magnitude", "--sparsity", "0.75")
    assert "more zeros than were asked for" not in more.out
    dense = read_manifest(pruned).source["path"]
    assert f"What it cost: secateur compare {dense} " in more.out  # with the dense model


def test_checkpoints_that_were_pruned_onto_each_other(call: Call, model: Path, tmp_path: Path) -> None:
    """Nobody knows the dense model any more, and the end of the run is reached all the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    for source, target in ((model, one), (one, other), (other, one)):
        done = call("prune", source, "-o", target, "--method", "magnitude", "--sparsity", "0.5", "--overwrite")
        assert done.code == 0
    assert "What it cost: secateur compare " in done.out


def test_zeros_beyond_a_pattern_are_told_one_by_one(call: Call, model: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(model, tmp_path / "dense"))
    tensors = load_file(dense / "model.safetensors")
    tensors[FIRST][3, :3] = 0
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    done = call("prune", dense, "-o", tmp_path / "out", "--method", "magnitude", "--pattern", "2:4")
    words = f"1 of 21 matrices have more zeros than were asked for, 1 in all, most {FIRST} (1): these weights were zero"
    assert words in " ".join(done.out.split())


def test_devices_that_are_not_there(call: Call, model: Path) -> None:
    for name in ("mps", "xpu"):
        refused = call("plan", model, "--device", name, *CALIBRATION)
        assert refused.code == 2
        assert len(refused.message) < 160
        assert re.fullmatch(
            rf'Error: device "{name}" cannot be used here \(.+\)\. Use --device cpu or auto\.', refused.message
        )


# What programs read


def test_a_run_in_a_pipe(model: Path, pruned: Path, run_in_pipe: subprocess.CompletedProcess[str]) -> None:
    manifest = json.loads(run_in_pipe.stdout)
    assert manifest == json.loads((pruned / "secateur.json").read_text())
    assert manifest["command"] == [
        *("secateur", "prune", str(model), "-o", str(pruned), "--pattern", "2:4", *CALIBRATION, "--json")
    ]
    assert manifest["totals"]["sparsity"] == manifest["totals"]["asked"] == 0.5
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in run_in_pipe.stderr.splitlines())
    drawing, *blocks = untimed(run_in_pipe.stderr)
    assert drawing == "drawing calibration samples"
    assert [re.sub(r", \d+\.\d s$", "", line) for line in blocks] == [f"block {n} of 3 pruned" for n in (1, 2, 3)]


def test_plan_as_json(call: Call, model: Path) -> None:
    before = sorted(path.name for path in model.parent.iterdir())
    result = call("plan", model, "--pattern", "2:4", "--skip", "*.down_proj", *CALIBRATION, "--json")
    assert (result.code, result.err, result.json["format"]) == (0, "", 1)
    value = result.json
    assert (value["model"], value["architecture"], value["blocks"]) == (str(model), "LlamaForCausalLM", 3)
    assert (value["tokens"], value["method"]) == (128, "wanda")
    assert len(value["plan"]) == 18
    assert all(pattern == {"n": 2, "m": 4} for pattern in value["plan"].values())
    assert value["zeros"] * 2 == value["planned_weights"] == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 48 * 32)
    assert sorted(path.name for path in model.parent.iterdir()) == before


def test_eval_as_json(call: Call, pruned: Path) -> None:
    result = call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 6, "--json")
    assert (result.code, result.err) == (0, "")
    value = result.json
    assert (value["windows"], value["length"], value["tokens"]) == (6, 32, 6 * 31)
    assert len(value["window_nats"]) == 6
    assert 100 < value["perplexity"] < 900  # guessing among 300
    assert value["perplexity_error"] == pytest.approx(value["perplexity"] * value["standard_error"])
    one = call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 1, "--json").json
    assert (one["standard_error"], one["perplexity_error"]) == (None, None)


def test_inspect_as_json(call: Call, pruned: Path) -> None:
    result = call("inspect", pruned, "--json")
    assert (result.code, result.err) == (0, "")
    assert (result.json["model"], result.json["sparsity"]) == (str(pruned), 0.5)
    assert [row["pattern"] for row in result.json["matrices"]] == ["2:4"] * 21


def test_verify_as_json(call: Call, model: Path, pruned: Path) -> None:
    result = call("verify", pruned, "--source", model, "--json")
    assert (result.code, result.err) == (0, "")
    value = result.json
    assert (value["ok"], value["problems"], value["sparsity"]) == (True, [], 0.5)
    assert (value["folder"], value["compared_to"], value["matrices"]) == (str(pruned), str(model), 21)


# What people read


def test_tables_in_a_pipe(call: Call, model: Path, pruned: Path, tmp_path: Path) -> None:
    plan = call("plan", model, "--skip", "*.0.mlp.up_proj", *CALIBRATION).out
    assert "LlamaForCausalLM, 3 blocks" in plan
    assert re.search(r"^mlp\.up_proj +3 +48 x 32 .*\(2 of 3\)$", plan, re.MULTILINE)
    assert re.search(r"^calibration +128 tokens", plan, re.MULTILINE)
    assert plan.count("\n\n") == 2  # between the three tables
    out = tmp_path / "out"
    run = call("prune", model, "-o", out, "--method", "magnitude", "--sparsity", "0.25")
    assert run.code == 0
    assert "sparsity 0.2500 (asked 0.2500)" in run.out
    assert f"secateur verify {out}\n" in run.out
    assert run.out.rstrip().endswith(f"What it cost: secateur compare {model} {out}")
    assert [line.split(",")[0] for line in run.said] == [f"block {n} of 3 pruned" for n in (1, 2, 3)]
    evaluation = call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 6)
    assert re.search(r"^python-docs +6 x 32 +186 +\d\.\d{4} ± 0\.\d{4} +\d+\.\d{3} ± ", evaluation.out, re.MULTILINE)
    assert "nan" not in call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 1).out
    kinds = call("inspect", pruned).out
    assert re.search(r"^self_attn\.k_proj +3 +0\.5000 +2:4$", kinds, re.MULTILINE)
    assert "Sparsity of all prunable matrices: 0.5000" in kinds
    matrices = call("inspect", pruned, "--matrices").out
    assert re.search(rf"^{FIRST} +32 x 48 +0\.5000 +2:4$", matrices, re.MULTILINE)
    assert call("verify", pruned).out.rstrip().endswith("Verified.")
    for text in (plan, run.out, evaluation.out, kinds, matrices):
        assert "\x1b" not in text  # no colours in a pipe
        assert "…" not in text  # nothing cut


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_run_on_a_terminal(model: Path, tmp_path: Path) -> None:
    code, shown = terminal("prune", model, "-o", tmp_path / "out", *CALIBRATION)
    assert code == 0, shown
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"blocks \S+ 3/3", plain)  # the bar counts blocks, and ends complete
    assert "drawing calibration samples" not in plain  # that is for pipes
    assert "secateur verify" in " ".join(plain.split())
    assert "Traceback" not in plain
    assert (tmp_path / "out" / "secateur.json").exists()


# Exit codes


def test_success_is_zero(call: Call) -> None:
    result = call("--version")
    assert result.code == 0
    assert re.fullmatch(r"secateur \d+\.\d+\.\d+\S*\n", result.out)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown method": (
        ["--method", "wnada"],
        'unknown method "wnada". Did you mean "wanda"? Known: magnitude, wanda, wanda_variant, ',
    ),
    "no method": (["--method", ":"], 'unknown method ":".'),
    "too sparse": (["--sparsity", "1.5"], "sparsity must be at least 0 and below 1, got 1.5."),
    "percent": (["--sparsity", "50"], "Did you mean 0.5?"),
    "not a number": (["--sparsity", "half"], "--sparsity"),
    "both": (["--sparsity", "0.5", "--pattern", "2:4"], "--sparsity 0.5 and --pattern 2:4 were both given"),
    "group of N:M": (["--per", "row", "--pattern", "2:4"], "--per row has no meaning for --pattern 2:4"),
    "unknown group": (["--per", "column"], '--per: got "column", expected row, matrix or search.'),
    "not N:M": (["--pattern", "half"], "For unstructured pruning use --sparsity 0.5."),
    "wrong way round": (["--pattern", "4:2"], "Did you mean 2:4?"),
    "no such matrix": (["--skip", "*.up_pro"], '--skip "*.up_pro" matches none of 21 matrices. Did you mean'),
    "unknown corpus": (["--calibration", "python-dosc"], "Did you mean python-docs?"),
    "too long": (["--length", "512"], "windows of 512 tokens, and the model has 256 positions. Use --length 256"),
    "no sample": (["--samples", "0"], "--samples"),
    "unknown sampling": (["--sampling", "random"], '--sampling: got "random", expected document or concat.'),
    "unknown inputs": (["--propagate", "sparse"], '--propagate: got "sparse", expected pruned or dense.'),
    "unknown device": (["--device", "gpu"], 'device "gpu" cannot be used here'),
    "unknown dtype": (["--dtype", "int8"], 'dtype must be auto, float32, bfloat16, float16, float64; got "int8".'),
    "option typo": (["--sparsty", "0.5"], "Error: Unknown option: --sparsty. Did you mean --sparsity?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_two(call: Call, model: Path, tmp_path: Path, mistake: str) -> None:
    arguments, message = MISTAKES[mistake]
    out = tmp_path / "out"
    result = call("prune", model, "-o", out, *CALIBRATION, *arguments)
    assert result.code == 2
    assert message in result.message
    assert result.out == ""
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_files_are_two(call: Call, model: Path, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for arguments, message in (
        (["prune", model, "-o", pruned, *CALIBRATION], "exists already. Choose another folder, or pass --overwrite."),
        (["prune", model, "-o", tmp_path / "mine", "--overwrite", "-m", "magnitude"], "holds no secateur.json"),
        (["prune", model, "-o", model, "-m", "magnitude"], "the output is the source"),
        (["prune", tmp_path / "nope", "-o", tmp_path / "out"], "nope: no such folder, and not a hub id"),
        (["prune", tmp_path / "nope.gguf", "-o", tmp_path / "out"], "nope.gguf: no such file."),
        (["prune", model, *CALIBRATION], "Error: --output is missing: Folder for the pruned checkpoint."),
        (["prune"], "Error: MODEL is missing: A folder, a hub id, a GGUF file, or timm:NAME."),
        (["plan", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["eval", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["eval", model, "--data", tmp_path / "nope.txt"], "nope.txt: no such file."),
        (["inspect", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["verify", tmp_path / "nope"], "nope: no such folder. Give one that"),
        (["verify", model], "no secateur.json in it; only checkpoints that Secateur wrote have one."),
        (["verify", pruned, "--source", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["prnue"], 'Unknown command "prnue". Did you mean "prune"?'),
    ):
        result = call(*arguments)
        assert (result.code, result.out) == (2, ""), result
        assert message in result.message
        assert "Traceback" not in result.err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine", "mine/thesis.tex"]


def test_overwriting_what_secateur_wrote(call: Call, model: Path, pruned: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(pruned, tmp_path / "out"))
    assert call("prune", model, "-o", out, "-m", "magnitude", "-s", "0.75", "--overwrite").code == 0
    assert json.loads((out / "secateur.json").read_text())["totals"]["sparsity"] == 0.75
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_verification_is_one(call: Call, pruned: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pruned, tmp_path / "damaged"))
    content = bytearray((damaged / SINGLE_FILE).read_bytes())
    content[-1] ^= 1
    (damaged / SINGLE_FILE).write_bytes(content)
    result = call("verify", damaged)
    assert result.code == 1
    assert "NOT verified: 1 problems." in result.out
    assert "its bytes differ from those that were written" in result.out
    as_json = call("verify", damaged, "--json")
    assert as_json.code == 1
    assert (as_json.json["ok"], len(as_json.json["problems"])) == (False, 1)


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    """A model with one weight that is not a number."""
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    tensors = load_file(folder / SINGLE_FILE)
    tensors[FIRST][0, 0] = float("nan")
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def test_damaged_weights_are_one(call: Call, damaged: Path, tmp_path: Path) -> None:
    result = call("prune", damaged, "-o", tmp_path / "out", "-m", "magnitude")
    assert (result.code, result.out) == (1, "")
    assert result.message.startswith(f"Error: {FIRST}: 1 of 1536 weights are NaN or infinite, first nan in row ")
    assert "Traceback" not in result.err
    evaluation = call("eval", damaged, "--data", "python-docs", "--length", 32, "--windows", 2)
    assert (evaluation.code, evaluation.out) == (1, "")
    assert "2 of 2 windows have a loss that is not finite" in evaluation.message
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("place", [0, -1], ids=["before the command", "at the end"])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, damaged: Path, tmp_path: Path, place: int) -> None:
    arguments = ["prune", str(damaged), "-o", str(tmp_path / "out"), "-m", "magnitude"]
    arguments.insert(place if place == 0 else len(arguments), "--debug")
    monkeypatch.setattr(sys, "argv", ["secateur", *arguments])
    with pytest.raises(NumericalError, match="NaN or infinite"):
        cli.main()


def test_debug_in_a_process(tmp_path: Path) -> None:
    arguments = ("plan", tmp_path, "--config", tmp_path / "nope.yaml")
    result = interpreter(*arguments, "--debug")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert f"{CheckpointError.__name__}: {tmp_path}/nope.yaml: no such file." in result.stderr.splitlines()[-1]
    result = process(*arguments)
    assert result.returncode == 2
    assert result.stderr == f"Error: {tmp_path}/nope.yaml: no such file.\n"


def test_an_interruption(call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interrupting.py").write_text(
        "import os, signal, secateur\n"
        "def method():\n"
        "    def score(problem):\n"
        "        if problem.name.startswith('model.layers.1.'):\n"
        f"            os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "        return problem.weight.abs()\n"
        "    return secateur.select('interrupting', score, needs=frozenset())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    result = call("prune", model, "-o", "out", "--method", "interrupting:method")
    assert (result.code, result.out) == (130, "")
    assert result.said[0].startswith("block 1 of 3 pruned")
    last = result.err.splitlines()[-1]
    assert last.startswith(f"Interrupted. {tmp_path}/out.partial: 1 of 3 blocks of an unfinished run are kept there (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interrupting.py", "out.partial"]


# Started in other ways


def test_as_a_module() -> None:
    result = interpreter("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("secateur ")


def script() -> str:
    found = shutil.which("secateur", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("the console script is not installed beside this Python")
    return found


def test_completion() -> None:
    def completed(*words: str) -> list[str]:
        """What bash offers for the last of these words."""
        line = " ".join(f"'{word}'" for word in words)
        text = (
            f'eval "$({script()} --show-completion bash)"; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; '
            '_secateur; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    shell = {**os.environ, "SHELL": "/usr/bin/zsh"}
    asked = [script(), "--show-completion"]
    named = subprocess.run([*asked, "zsh"], capture_output=True, text=True, timeout=60)
    assert subprocess.run(asked, env=shell, capture_output=True, text=True, timeout=60).stdout == named.stdout
    unknown = subprocess.run(asked, env={**shell, "SHELL": "/bin/dash"}, capture_output=True, text=True, timeout=60)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "Name one, of bash, zsh, fish, powershell." in unknown.stderr
    assert completed("secateur", "p") == ["plan", "prune", "pack", "push"]
    assert sorted(completed("secateur", "prune", "--sam")) == ["--samples", "--sampling"]
    assert completed("secateur", "prune", "--targets", "") == ["pruned", "dense", "residual"]
    assert completed("secateur", "prune", "--method", "wanda_") == ["wanda_variant", "wanda_plus", "wanda_iterative"]
