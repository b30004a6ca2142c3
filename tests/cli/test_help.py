"""The help tells every option there is, and nothing heavy is loaded for it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts.argument import Argument

from command_line import Call
from secateur import cli

WHAT = {"--method", "--norm", "--alpha", "--option", "--sparsity", "--pattern", "--per", "--only", "--skip"}
TEXT = {"--bos", "--calibration", "--samples", "--length", "--seed", "--sampling"}
PRUNING = {"--gradient", "--propagate", "--within", "--targets", "--correction", "--statistics-device"}
WHERE = {"--allocation", "--allocation-option", "--unit"}
PRESET = {"--preset"}
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
    "plan": WHAT
    | PRESET
    | WHERE
    | {"--permute"}
    | TEXT
    | PRUNING
    | HOW
    | {"--processes", "--bandwidth", "--device-memory", "--plan"}
    | {"--on-nonfinite", "--unseen", "--resume", "--packed", "--output", "--overwrite", "--config", "--json"},
    "prune": WHAT
    | PRESET
    | WHERE
    | {"--permute"}
    | TEXT
    | PRUNING
    | HOW
    | {"--log-dir", "--plan", "--push-to"}
    | {"--on-nonfinite", "--unseen", "--resume", "--packed", "--output", "--overwrite", "--config", "--json"},
    "allocate": WHERE
    | (WHAT - {"--method", "--norm", "--alpha", "--option"})
    | TEXT
    | HOW
    | {"--statistics-device", "--on-nonfinite", "--unseen", "--output", "--overwrite", "--config", "--json"},
    "gradients": TEXT
    | HOW
    | {"--log-dir"}
    | {"--on-nonfinite", "--unseen", "--resume"}
    | {"--norm", "--granularity", "--scope", "--only", "--skip", "--output", "--overwrite", "--config", "--json"},
    "sweep": (WHAT - {"--method", "--norm", "--alpha"})
    | {"--on-nonfinite", "--unseen"}
    | TEXT
    | (PRUNING - {"--gradient"})
    | HOW
    | {"--methods", "--keep", "--data", "--eval-length", "--windows", "--agreement", "--again", "--dry-run"}
    | {"--ray", "--ray-cpus", "--seeds", "--latex", "--tasks", "--limit", "--shots", "--task-data"}
    | {"--output", "--config", "--json"},
    "recover": RECOVERY
    | {"--log-dir"}
    | {"--output", "--overwrite", "--config", "--json", "--device", "--dtype", "--trust-remote-code"},
    "merge": {"--base", "--output", "--mask", "--data", "--length", "--windows", "--no-eval", "--batch-size"}
    | {"--device", "--dtype", "--trust-remote-code", "--overwrite", "--config", "--json"},
    "pack": {"--output", "--values", "--compress", "--dry-run", "--revision", "--overwrite", "--config", "--json"},
    "unpack": {"--output", "--revision", "--overwrite", "--config", "--json"},
    "generate": {"--chat", "--max-tokens", "--temperature", "--seed", "--backend", "--threads", "--config", "--json"}
    | {"--device", "--dtype", "--revision", "--trust-remote-code"},
    "bench": {
        "--device",
        "--prompt",
        "--decode",
        "--batch",
        "--repetitions",
        "--dtypes",
        "--threads",
        "--trust-remote-code",
    }
    | {"--config", "--json"},
    "eval": HOW | TASKS | {"--log-dir", "--bos", "--data", "--length", "--windows", "--config", "--json"},
    "compare": (HOW - {"--revision"})
    | TASKS
    | {"--log-dir", "--max-nats", "--min-agreement"}
    | {"--bos", "--data", "--length", "--windows", "--prompts", "--new-tokens", "--csv", "--config", "--json"},
    "report": {"--evaluation", "--open"},
    "push": {"--base-model", "--private", "--revision", "--create-pr", "--message", "--config", "--json"},
    "inspect": {"--matrices", "--revision", "--trust-remote-code", "--json"},
    "verify": {"--source", "--revision", "--json"},
}
HIDDEN = {"plan": {"--output", "--overwrite", "--resume"}}  # checked there, but not written


def options(command: str) -> dict[str, Argument]:
    found = cli.app[command].assemble_argument_collection()
    return {argument.name: argument for argument in found if argument.name.startswith("--")}


def test_the_commands() -> None:
    assert [name for name in cli.app if not name.startswith("-")] == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options(command: str) -> None:
    found = options(command)
    assert set(found) == OPTIONS[command]
    assert {name for name, option in found.items() if not option.show} == HIDDEN.get(command, set())
    shorts = [short for option in found.values() for short in option.names if not short.startswith("--")]
    assert len(shorts) == len(set(shorts))


def test_plan_takes_every_option_of_prune() -> None:
    plan, prune = ({name: sorted(option.names) for name, option in options(c).items()} for c in ("plan", "prune"))
    assert set(plan) - set(prune) == {"--processes", "--bandwidth", "--device-memory"}
    assert set(prune) - set(plan) == {"--log-dir", "--push-to"}
    assert all(plan[name] == prune[name] for name in set(plan) & set(prune))


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help(call: Call, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = call(command, "--help")
    assert (result.code, result.err) == (0, "")
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    written = re.sub(r"[│\s]", "", text)
    for name, option in options(command).items():
        assert (f" {name} " in text) == option.show
        whole = re.sub(r"\s", "", (option.parameter.help or "").replace(r"\*", "*"))
        assert not option.show or whole.partition("[default:")[0] in written  # Markdown has eaten none of it
        assert (option.parameter.help or "").strip().endswith((".", "].", ".."))
    examples = text[text.index("Examples") :]
    assert len(re.findall(rf"^ *secateur {command} \S+", examples, re.MULTILINE)) >= 2
    assert call(command, "-h").out == result.out


@pytest.mark.parametrize("command", ["plan", "prune"])
def test_the_help_begins_with_what_most_runs_need(call: Call, command: str) -> None:
    text = call(command, "--help").out
    common = text[text.index("Common options") : text.index("─ Options ─")]
    first = [] if command == "plan" else ["--output"]
    expected = [
        *first,
        "--sparsity",
        "--pattern",
        "--preset",
        "--method",
        "--calibration",
        "--samples",
        "--length",
        "--device",
    ]
    assert re.findall(r"│ [ *]*(--[\w-]+)", common)[: len(expected)] == expected


@pytest.mark.parametrize("command", OPTIONS)
def test_the_examples_are_options_that_exist(command: str) -> None:
    epilog = cli.app[command].help_epilogue or ""
    examples = re.findall(r"`(secateur [^`]+)`", epilog)
    assert examples
    known = {name for option in options(command).values() for name in option.names}
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
    assert "cyclopts" in roots
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "accelerate", "tokenizers", "datasets"}
    assert heavy.isdisjoint(roots)


def test_nothing_asked_shows_the_help(call: Call) -> None:
    result = call()
    assert result.code == 2
    assert "Usage: secateur COMMAND" in result.out + result.err
