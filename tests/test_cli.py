"""The command line, as a person and as a program see it."""

import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer.main
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from secateur import cli
from secateur.errors import MethodError, NumericalError, PatternError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.methods import METHODS, REFINEMENTS
from test_trained import byte_pair_tokenizer

ROOT = Path(__file__).parents[1]
FIRST = "model.layers.0.mlp.down_proj.weight"
CALIBRATION = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "4", "--length", "32"]

WHAT = {"--method", "--norm", "--alpha", "--option", "--sparsity", "--pattern", "--per", "--only", "--skip"}
TEXT = {"--bos", "--calibration", "--samples", "--length", "--seed", "--sampling"}
PRUNING = {"--gradient", "--propagate", "--within", "--targets", "--correction", "--statistics-device"}
HOW = {"--batch-size", "--device", "--dtype", "--offload-states", "--revision", "--trust-remote-code"}
TASKS = {"--tasks", "--limit", "--shots", "--task-data", "--fresh"}
RECOVERY = {"--method", "--preset", "--targets", "--rank", "--alpha", "--dropout", "--only", "--skip", "--distill"}
RECOVERY |= {"--distill-weight", "--temperature", "--data", "--length", "--held-out", "--seed", "--steps", "--minutes"}
RECOVERY |= {
    "--batch-size",
    "--accumulation",
    "--lr",
    "--schedule",
    "--warmup",
    "--weight-decay",
    "--clip",
    "--optimizer",
    "--optimizer-args",
}
RECOVERY |= {"--eval-every", "--patience", "--resume", "--gradient-checkpointing", "--dense", "--samples", "--epochs"}
RECOVERY |= {"--bos"}
OPTIONS = {
    "plan": WHAT | TEXT | PRUNING | HOW | {"--output", "--overwrite", "--config", "--json"},
    "prune": WHAT | TEXT | PRUNING | HOW | {"--output", "--overwrite", "--config", "--json"},
    "gradients": TEXT
    | HOW
    | {"--norm", "--granularity", "--scope", "--only", "--skip", "--output", "--overwrite", "--config", "--json"},
    "sweep": (WHAT - {"--method", "--norm", "--alpha"})
    | TEXT
    | (PRUNING - {"--gradient"})
    | HOW
    | {"--methods", "--keep", "--data", "--eval-length", "--windows", "--agreement", "--again", "--dry-run"}
    | {"--output", "--config", "--json"},
    "recover": RECOVERY
    | {"--output", "--overwrite", "--config", "--json", "--device", "--dtype", "--trust-remote-code"},
    "merge": {"--base", "--output", "--mask", "--data", "--length", "--windows", "--no-eval", "--batch-size"}
    | {"--device", "--dtype", "--trust-remote-code", "--overwrite", "--config", "--json"},
    "eval": HOW | TASKS | {"--bos", "--data", "--length", "--windows", "--config", "--json"},
    "compare": (HOW - {"--revision"})
    | TASKS
    | {"--bos", "--data", "--length", "--windows", "--prompts", "--new-tokens", "--csv", "--config", "--json"},
    "report": {"--evaluation", "--open"},
    "inspect": {"--matrices", "--revision", "--trust-remote-code", "--json"},
    "verify": {"--source", "--json"},
}
HIDDEN = {"plan": {"--output", "--overwrite"}}  # checked there, but not written


def save_model(folder: Path) -> Path:
    """A tiny random LLaMA with a tokenizer, which takes windows of up to 256 tokens."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_pair_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cli") / "model")


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with pipes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "secateur", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        **options,
    )


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def message(self) -> str:
        """What was said on stderr, without frames and line breaks."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.err).split())


Call = Callable[..., Result]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(*arguments)`: the command in this process, through `main`, as the console script runs it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "300")  # a narrow box breaks long paths anywhere

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        captured = capfd.readouterr()
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def run_in_pipe(model: Path) -> subprocess.CompletedProcess[str]:
    """A run with --json in a pipe, which made the folder `pruned` beside the model."""
    return process("prune", model, "-o", model.parent / "pruned", "--pattern", "2:4", *CALIBRATION, "--json")


@pytest.fixture(scope="module")
def pruned(model: Path, run_in_pipe: subprocess.CompletedProcess[str]) -> Path:
    assert run_in_pipe.returncode == 0, run_in_pipe.stderr
    return model.parent / "pruned"


# What programs read


def test_a_run_in_a_pipe(model: Path, pruned: Path, run_in_pipe: subprocess.CompletedProcess[str]) -> None:
    manifest = json.loads(run_in_pipe.stdout)
    assert manifest == json.loads((pruned / "secateur.json").read_text())
    assert manifest["command"] == [
        *("secateur", "prune", str(model), "-o", str(pruned), "--pattern", "2:4", *CALIBRATION, "--json")
    ]
    assert manifest["totals"]["sparsity"] == manifest["totals"]["asked"] == 0.5
    drawing, *blocks = run_in_pipe.stderr.splitlines()
    assert drawing == "drawing calibration samples"
    assert [re.sub(r", \d+\.\d s$", "", line) for line in blocks] == [f"block {n} of 3 pruned" for n in (1, 2, 3)]


def test_plan_as_json(call: Call, model: Path) -> None:
    before = sorted(path.name for path in model.parent.iterdir())
    result = call("plan", model, "--pattern", "2:4", "--skip", "*.down_proj", *CALIBRATION, "--json")
    assert (result.code, result.err) == (0, "")
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
    assert re.search(r"^model\.layers\.\*\.mlp\.up_proj\.weight +3 +48 x 32 .*\(2 of 3\)$", plan, re.MULTILINE)
    assert re.search(r"^calibration +128 tokens", plan, re.MULTILINE)
    assert plan.count("\n\n") == 2  # between the three tables
    out = tmp_path / "out"
    run = call("prune", model, "-o", out, "--method", "magnitude", "--sparsity", "0.25")
    assert run.code == 0
    assert "sparsity 0.2500 (asked 0.2500)" in run.out
    assert run.out.rstrip().endswith(f"secateur verify {out}")
    assert [line.split(",")[0] for line in run.err.splitlines()] == [f"block {n} of 3 pruned" for n in (1, 2, 3)]
    evaluation = call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 6)
    assert re.search(r"^python-docs +6 x 32 +186 +\d\.\d{4} ± 0\.\d{4} +\d+\.\d{3} ± ", evaluation.out, re.MULTILINE)
    assert "nan" not in call("eval", pruned, "--data", "python-docs", "--length", 32, "--windows", 1).out
    kinds = call("inspect", pruned).out
    assert re.search(r"^model\.layers\.\*\.self_attn\.k_proj\.weight +3 +0\.5000 +2:4$", kinds, re.MULTILINE)
    assert "Sparsity of all prunable matrices: 0.5000" in kinds
    matrices = call("inspect", pruned, "--matrices").out
    assert re.search(rf"^{FIRST} +32 x 48 +0\.5000 +2:4$", matrices, re.MULTILINE)
    assert call("verify", pruned).out.rstrip().endswith("Verified.")
    for text in (plan, run.out, evaluation.out, kinds, matrices):
        assert "\x1b" not in text  # no colours in a pipe
        assert "…" not in text  # nothing cut


def terminal(command: list[str]) -> tuple[int, str]:
    """(exit code, everything shown) of a command on a pseudo-terminal 100 wide."""
    import fcntl
    import pty
    import struct
    import termios

    child, descriptor = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        os.environ.pop("COLUMNS", None)
        try:
            os.execv(command[0], command)
        finally:
            os._exit(127)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = io.BytesIO()
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux: the other side has closed
            break
        if not part:
            break
        shown.write(part)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.getvalue().decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_run_on_a_terminal(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "secateur", "prune", str(model), "-o", str(tmp_path / "out"), *CALIBRATION]
    code, shown = terminal(command)
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
    "option typo": (["--sparsty", "0.5"], "No such option: --sparsty (Possible options: --sparsity)"),
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
        (["prune", model, *CALIBRATION], "Missing option '--output' / '-o'."),
        (["prune"], "Missing argument 'model'"),
        (["plan", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["eval", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["eval", model, "--data", tmp_path / "nope.txt"], "nope.txt: no such file."),
        (["inspect", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["verify", tmp_path / "nope"], "nope: no such folder. Give one that"),
        (["verify", model], "no secateur.json in it; only checkpoints that Secateur wrote have one."),
        (["verify", pruned, "--source", tmp_path / "nope"], "nope: no such folder, and not a hub id"),
        (["prnue"], "No such command 'prnue'. Did you mean 'prune'?"),
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
    assert result.message.startswith(f"Error: {FIRST}: 1 of 1536 weights are NaN or infinite.")
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
    arguments = ("prune", tmp_path, "-o", tmp_path / "out", "-m", "nope")
    result = process(*arguments, "--debug")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert f"{PatternError.__name__}: unknown method" in result.stderr.splitlines()[-1]
    result = process(*arguments)
    assert result.returncode == 2
    assert re.fullmatch(r'Error: unknown method "nope"\..*\n', result.stderr)


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
    assert result.err.splitlines()[0].startswith("block 1 of 3 pruned")
    assert result.err.splitlines()[-1] == "Interrupted; nothing half-written was left behind."
    assert [path.name for path in tmp_path.iterdir()] == ["interrupting.py"]


# --config


Config = Callable[[str], Path]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "run.yaml"

    return write


def test_options_win_over_the_file_and_the_file_over_defaults(call: Call, model: Path, config: Config) -> None:
    file = config("sparsity: 0.25\nsamples: 3\nlength: 16\ncalibration: python-docs\nsampling: concat\n")
    value = call("plan", model, "--config", file, "--samples", "5", "--json").json
    assert value["tokens"] == 5 * 16
    assert value["plan"][FIRST] == {"sparsity": 0.25, "per": "row"}
    assert value["method"] == "wanda"
    # The place of the option does not matter.
    assert call("plan", "--samples", "5", "--config", file, model, "--json").json["plan"] == value["plan"]


def test_keys_with_hyphens_and_underscores_lists_and_flags(call: Call, model: Path, config: Config) -> None:
    for key in ("batch-size", "batch_size"):
        result = call("plan", model, "--config", config(f"{key}: 0\n"))
        assert result.code == 2
        assert "--batch-size" in result.message
    file = config('json: true\nskip:\n  - "*.down_proj"\n  - "*.0.*"\nmethod: magnitude\nper:\n')
    value = call("plan", model, "--config", file).json
    assert len(value["plan"]) == 12
    assert {pattern["per"] for pattern in value["plan"].values()} == {"matrix"}
    given = call("plan", model, "--config", file, "--skip", "*.q_proj").json
    assert len(given["plan"]) == 18  # a list that is given replaces the file's
    one = call("plan", model, "--config", config('only: "*.q_proj"\nmethod: magnitude\n'), "--json").json
    assert len(one["plan"]) == 3


def test_a_pattern_in_the_file_stays_a_pattern(call: Call, model: Path, config: Config) -> None:
    # YAML 1.1 reads 2:4 as a number in base 60.
    value = call("plan", model, "--config", config("pattern: 2:4\nmethod: magnitude\n"), "--json").json
    assert value["plan"][FIRST] == {"n": 2, "m": 4}


def test_a_whole_run_from_a_file(call: Call, model: Path, config: Config, tmp_path: Path) -> None:
    file = config(
        f"model: {model}\noutput: {tmp_path / 'out'}\npattern: '2:4'\ncalibration: [0.5*python-docs, 0.5*python-docs]\n"
        "sampling: concat\nsamples: 4\nlength: 32\nseed: 7\nbatch-size: 2\n"
    )
    result = call("prune", "--config", file, "--json")
    assert result.code == 0, result.err
    value = result.json
    assert value["calibration"]["seed"] == 7
    assert [source["samples"] for source in value["calibration"]["sources"]] == [2, 2]
    assert value["settings"]["batch_size"] == 2
    assert call("eval", "--config", config(f"model: {tmp_path / 'out'}\ndata: python-docs\nlength: 32\n")).code == 0


BOMB = "only:\n- &a [x]\n" + "".join(
    f"- &{two} [{', '.join([f'*{one}'] * 10)}]\n" for one, two in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5\n", 'unknown key "sparsty". Did you mean "sparsity"?'),
        ("flavour: vanilla\n", 'unknown key "flavour". Known keys: alpha, batch_size, bos, calibration,'),
        ("s: 0.5\n", 'unknown key "s". Known keys: '),
        ("config: other.yaml\n", 'unknown key "config".'),
        ("sparsity: [0.5\n", "run.yaml: not YAML: "),
        ("- sparsity\n", "run.yaml: expected keys and values, found a list."),
        ("sparsity\n", "run.yaml: expected keys and values, found text."),
        ("sparsity: half\n", "Invalid value for '--sparsity'"),
        ("samples: [1, 2]\n", 'run.yaml: "samples" holds a list, expected one text.'),
        ("skip: [[a], b]\n", 'run.yaml: "skip" holds a list, expected text or a list of texts.'),
        ("skip: {a: b}\n", 'run.yaml: "skip" holds keys and values, expected text or a list of texts.'),
        ("? [a]\n: b\n", "run.yaml: not YAML: "),
        ("a: &a [*a]\n", "run.yaml: not YAML: an alias stands inside what it names"),
        (f"only: {'[' * 2000}\n", "run.yaml: n"),
        (BOMB, "run.yaml: not YAML: more than 100,000 values once its aliases are written out"),
        ("overwrite: perhaps\n", "Invalid value for '--overwrite'"),
    ],
)
def test_a_file_that_cannot_be_used(
    call: Call, model: Path, config: Config, tmp_path: Path, text: str, message: str
) -> None:
    result = call("prune", model, "-o", tmp_path / "out", "--config", config(text))
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there(call: Call, model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "latin.yaml").write_bytes("only: é\n".encode("latin-1"))
    for path, reason in (
        (tmp_path / "nope.yaml", "nope.yaml: no such file."),
        (tmp_path, "is a folder, expected a regular file."),
        (tmp_path / "pipe.yaml", "pipe.yaml: is a pipe, expected a regular file."),
        (tmp_path / "latin.yaml", "latin.yaml: not UTF-8 text (byte 6"),
    ):
        result = call("plan", model, "--config", path)
        assert result.code == 2
        assert reason in result.message


def test_the_home_folder_in_a_file(
    call: Call, model: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    text = tmp_path / "naïve.txt"
    text.write_text("Once upon a time there was a naïve girl who liked to read. " * 20, encoding="utf-8")
    file = config(
        "model: ~/model\noutput: ~/out\ncalibration: [~/naïve.txt]\nsampling: concat\nsamples: 2\nlength: 16\n"
    )
    result = call("prune", "--config", "~/" + file.name, "--json")
    assert result.code == 0, result.err
    assert result.json["calibration"]["sources"][0]["file"] == str(text)
    assert (tmp_path / "out" / "secateur.json").exists()


def test_an_empty_file(call: Call, model: Path, config: Config) -> None:
    text = ["--calibration", "python-docs", "--sampling", "concat", "--length", 32]
    assert call("plan", model, "--config", config(""), *text, "--json").json["tokens"] == 128 * 32


# --method module:function


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a module of methods."""
    (tmp_path / "own_methods.py").write_text(
        "import secateur\n"
        "def largest(problem):\n"
        "    return -problem.weight.abs()\n"
        "value = secateur.select('keep-smallest', largest, needs=frozenset())\n"
        "def factory():\n"
        "    return secateur.select('made', largest, needs=frozenset())\n"
        "number = 3\n"
        "def powered(power=1, scale=1.0, word=None):\n"
        "    def score(problem):\n"
        "        return problem.weight.abs() ** power * scale\n"
        "    return secateur.select(f'powered-{power}-{scale}-{word}', score)\n"
        "def nothing():\n"
        "    return None\n"
        "def broken():\n"
        "    raise ValueError('my own fault')\n"
        "def hungry():\n"
        "    import torch\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB.')\n"
    )
    (tmp_path / "broken_module.py").write_text("x = 1\nvalue = (\n")
    (tmp_path / "missing_module.py").write_text("import numpyy\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("own_methods", None)


@pytest.mark.parametrize(("attribute", "name"), [("value", "keep-smallest"), ("factory", "made")])
def test_a_method_of_ones_own(call: Call, model: Path, workplace: Path, attribute: str, name: str) -> None:
    result = call("prune", model, "-o", "out", "--method", f"own_methods:{attribute}", "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == name
    dense, sparse = load_file(model / SINGLE_FILE)[FIRST], load_file(workplace / "out" / SINGLE_FILE)[FIRST]
    assert dense[sparse == 0].abs().min() > dense[sparse != 0].abs().median()


@pytest.mark.parametrize("home", ["own_methods", "./own_methods.py", "~/own_methods.py"])
def test_options_reach_a_method_of_ones_own(
    home: str, call: Call, model: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    options = ["--option", "power=0.3", "--option", "scale=2", "--option", "word=some"]
    result = call("prune", model, "-o", "out", "--method", f"{home}:powered+swaps", *options, *CALIBRATION, "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == "powered-0.3-2.0-some+swaps"
    found = {key: value for key, value in result.json["settings"]["options"].items() if "." not in key}
    assert found == {"power": 0.3, "scale": 2.0, "word": "some"}


def test_a_method_of_ones_own_is_refined(call: Call, model: Path, workplace: Path) -> None:
    options = [*CALIBRATION, "--option", "least-squares.damping=0.5"]
    result = call("prune", model, "-o", "out", "--method", "own_methods:factory+least-squares", *options, "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == "made+least_squares"
    manifest = json.loads((workplace / "out" / "secateur.json").read_text())
    assert manifest["settings"]["options"]["least_squares.damping"] == 0.5
    assert not any(entry["kept_identical"] for entry in manifest["matrices"].values())


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        (
            "own_methods:factory",
            "damping=1",
            "--option damping=1: own_methods:factory has no option damping; it has none.",
        ),
        ("own_methods:factory+swaps", "limit=1", "factory has no option limit; it has none. Did you mean swaps.limit?"),
        ("own_methods:value", "power=1", "--option power=1: own_methods:value is a Method already, with its options."),
        ("own_methods:powered", "power=much", '--option power=much: got "much", expected a number.'),
        ("own_methods:powered", "powr=1", "own_methods:powered has no option powr; it has power, scale, word."),
        ("own_methods:factory+swaps", "swaps.limits=1", "--option swaps.limits=1: swaps has no option limits; it has"),
        ("own_methods:factory+swap", "swaps.limit=1", 'unknown refinement "swap". Did you mean "swaps"?'),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_options_of_a_method_of_ones_own(call: Call, model: Path, method: str, option: str, message: str) -> None:
    result = call("prune", model, "-o", "out", "--method", method, "--option", option)
    assert (result.code, result.out) == (2, "")
    assert message in result.message


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("own_methodz:value", "--method own_methodz:value: No module named 'own_methodz'. Looked in "),
        (
            "own_methods:values",
            'has no "values". Did you mean "value"? It has largest, value, factory, powered',
        ),
        ("./own_method.py:value", "own_method.py is no Python file. Did you mean own_methods.py?"),
        ("./own_methods.py:values", 'the module ./own_methods.py has no "values". Did you mean "value"?'),
        ("no_such_module:value", "and on the Python path. There are broken_module, missing_module, own_methods."),
        ("broken_module:value", "the module broken_module cannot be imported: SyntaxError: "),
        ("./broken_module.py:value", "broken_module.py:2). --debug shows the traceback."),
        (
            "missing_module:value",
            "the module missing_module cannot be imported: ModuleNotFoundError: No module nam",
        ),
        ("missing_module:value", "missing_module.py:1, in <module>). --debug shows the traceback."),
        ("own_methods:number", "--method own_methods:number: gives a int, expected a secateur.Method."),
        ("own_methods:nothing", "--method own_methods:nothing: gives a NoneType, expected a secateur.Method."),
        ("own_methods:largest", "or a function without arguments that returns one, and this one cannot be called so"),
        ("own_methods:", 'unknown method "own_methods:".'),
        (":value", 'unknown method ":value".'),
    ],
)
def test_a_method_that_is_none(call: Call, model: Path, workplace: Path, method: str, message: str) -> None:
    result = call("prune", model, "-o", "out", "--method", method)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (workplace / "out").exists()


@pytest.mark.usefixtures("workplace")
def test_an_error_inside_a_method_of_ones_own_is_told_with_its_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["secateur", "plan", str(model), "--method", "own_methods:broken"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"Error: --method own_methods:broken failed: ValueError: my own fault \(\S+own_methods\.py:\d+, in broken\)\. "
        r"--debug shows the traceback\.\n",
        told,
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--debug"])
    with pytest.raises(MethodError) as caught:
        cli.main()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("workplace")
def test_too_little_memory_is_told_without_a_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["secateur", "plan", str(model), "--method", "own_methods:hungry"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("Error: CUDA out of memory. What takes less: --batch-size 1, fewer")
    monkeypatch.setattr(sys, "argv", [*arguments, "--debug"])
    with pytest.raises(torch.OutOfMemoryError):
        cli.main()


def test_the_names_of_methods() -> None:
    assert tuple(METHODS) == cli.METHOD_NAMES
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text[text.index("| name |") : text.index("The lowest scores go.")]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(METHODS)
    for name, make in METHODS.items():
        assert make().name == name


def test_the_options_of_methods_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text[text.index("| option | of | default |") : text.index("`--option weighting=published`")]
    documented = {
        (option, owner): default
        for option, owners, default in re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|", table, re.MULTILINE)
        for owner in re.findall(r"`([^`]+)`", owners)
    }
    found = {
        (option, owner): str(parameter.default).lower().removesuffix(".0").replace("1e-04", "0.0001")
        for owner, make in {**METHODS, **REFINEMENTS}.items()
        for option, parameter in inspect.signature(make).parameters.items()
        if option not in ("alpha", "norm")  # options of the command line itself
    }
    assert documented == found


# Help


COMMANDS: dict[str, click.Command] = dict(vars(typer.main.get_command(cli.app))["commands"])


def options(command: str) -> dict[str, Any]:
    return {
        max(parameter.opts, key=len): parameter
        for parameter in COMMANDS[command].params
        if parameter.param_type_name == "option" and parameter.name != "help"
    }


def test_the_commands() -> None:
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options(command: str) -> None:
    found = options(command)
    assert set(found) == OPTIONS[command]
    assert {name for name, option in found.items() if option.hidden} == HIDDEN.get(command, set())
    shorts = [short for option in found.values() for short in option.opts if not short.startswith("--")]
    assert len(shorts) == len(set(shorts))


def test_plan_takes_every_option_of_prune() -> None:
    plan, prune = ({name: sorted(option.opts) for name, option in options(c).items()} for c in ("plan", "prune"))
    assert plan == prune


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help(call: Call, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERMINAL_WIDTH", "160")
    result = call(command, "--help")
    assert (result.code, result.err) == (0, "")
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    for name, option in options(command).items():
        assert (f" {name} " in text) == (not option.hidden)
        assert option.hidden or (option.help and option.help.strip().endswith((".", "].", "..")))
    examples = text[text.index("Examples") :]
    assert len(re.findall(rf"^ *secateur {command} \S+", examples, re.MULTILINE)) >= 2
    assert call(command, "-h").out == result.out


@pytest.mark.parametrize("command", OPTIONS)
def test_the_examples_are_options_that_exist(command: str) -> None:
    epilog = COMMANDS[command].epilog or ""
    examples = re.findall(r"`(secateur [^`]+)`", epilog)
    assert examples
    known = {name for option in COMMANDS[command].params for name in option.opts}
    for example in examples:
        assert example.split()[1] == command
        assert {word for word in example.split() if re.match(r"--?[a-z]", word)} <= known


def test_help_and_typos_load_nothing_heavy(tmp_path: Path) -> None:
    # torch and transformers take seconds to import; whoever asks for help or mistypes an option must not wait.
    commands = [["--help"], ["--version"], ["--versoin"], ["prnue"], ["prune"]]
    commands += [[command, "--help"] for command in OPTIONS]
    commands += [[command, "model", "--sparsty", "0.5"] for command in OPTIONS]
    (tmp_path / "run.yaml").write_text("sparsty: 0.5\n")
    commands += [["plan", "model", "--config", str(tmp_path / "run.yaml")]]
    script = (
        "import json, sys\nfrom secateur.cli import main\ncodes = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv[1:] = arguments\n"
        "    try:\n        main()\n    except SystemExit as end:\n        codes.append(end.code or 0)\n"
        "roots = sorted({name.split('.')[0] for name in sys.modules})\n"
        "open('result.json', 'w').write(json.dumps([codes, roots]))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    codes, roots = json.loads((tmp_path / "result.json").read_text())
    assert codes == [0, 0, 2, 2, 2] + [0] * len(OPTIONS) + [2] * len(OPTIONS) + [2]
    assert "typer" in roots
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate", "tokenizers", "datasets"}
    assert heavy.isdisjoint(roots)


def test_nothing_asked_shows_the_help(call: Call) -> None:
    result = call()
    assert result.code == 2
    assert "Usage: secateur [OPTIONS] COMMAND" in result.out + result.err


# Started in other ways


def test_as_a_module() -> None:
    result = process("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("secateur ")


def script() -> str:
    found = shutil.which("secateur", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("the console script is not installed beside this Python")
    return found


def test_completion() -> None:
    def shell(**environment: str) -> str:
        done = subprocess.run(
            [script(), "--show-completion", "bash"] if not environment.get("COMP_WORDS") else [script()],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "_SECATEUR_COMPLETE=complete_bash" in shell()
    words = {"_SECATEUR_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert shell(**words, COMP_WORDS="secateur p").split() == ["plan", "prune"]
    words["COMP_CWORD"] = "2"
    assert shell(**words, COMP_WORDS="secateur prune --sam").split() == ["--samples", "--sampling"]
