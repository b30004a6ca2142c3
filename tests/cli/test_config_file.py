"""`--config`: options from a file, which those of the command line overrule."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import FIRST, Call
from secateur.record.manifest import read_manifest

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
        (
            "flavour: vanilla\n",
            'unknown key "flavour". Known keys: allocation, allocation_option, alpha, batch_size, bos, calibration,',
        ),
        ("s: 0.5\n", 'unknown key "s". Known keys: '),
        ("config: other.yaml\n", 'unknown key "config".'),
        ("sparsity: [0.5\n", "run.yaml: not YAML: "),
        ("- sparsity\n", "run.yaml: expected keys and values, found a list."),
        ("sparsity\n", "run.yaml: expected keys and values, found text."),
        ("sparsity: half\n", '--sparsity: got "half", expected a number.'),
        ("samples: [1, 2]\n", 'run.yaml: "samples" holds a list, expected one text.'),
        ("skip: [[a], b]\n", 'run.yaml: "skip" holds a list, expected text or a list of texts.'),
        ("skip: {a: b}\n", 'run.yaml: "skip" holds keys and values, expected text or a list of texts.'),
        ("? [a]\n: b\n", "run.yaml: not YAML: "),
        ("a: &a [*a]\n", "run.yaml: not YAML: an alias stands inside what it names"),
        (f"only: {'[' * 2000}\n", "run.yaml: n"),
        (BOMB, "run.yaml: not YAML: more than 100,000 values once its aliases are written out"),
        ("overwrite: perhaps\n", '--overwrite: got "perhaps", expected true or false.'),
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
        (tmp_path / "latin.yaml", "latin.yaml, line 1: not UTF-8 text (byte 6"),
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


def test_a_file_cannot_ask_for_trust(call: Call, model: Path, config: Config) -> None:
    file = config("trust_remote_code: true\n")
    refused = call("plan", model, "--config", file)
    assert refused.code == 2
    assert '"trust_remote_code" is not taken from a file' in refused.err
    assert "--trust-remote-code there" in refused.err


def test_a_file_cannot_name_a_cluster(call: Call, model: Path, config: Config, tmp_path: Path) -> None:
    refused = call("sweep", model, "-o", tmp_path / "out", "--config", config("ray: ray://example.org:10001\n"))
    assert refused.code == 2
    assert '"ray" is not taken from a file: what a cluster answers can hold code' in refused.err
    assert not (tmp_path / "out").exists()


def test_several_runs(call: Call, model: Path, config: Config, tmp_path: Path) -> None:
    one, two, bad = (tmp_path / name for name in ("one", "two", "bad"))
    file = config(
        f"model: {model}\nmethod: magnitude\nskip: '*.up_proj'\nruns:\n"
        f"  - output: {one}\n"
        f"  - {{output: {bad}, sparsity: 2}}\n"
        f"  - {{output: {two}, pattern: {{'*.q_proj': '2:4', '*': 0.25}}, skip: '*.o_proj'}}\n"
    )
    result = call("prune", "--config", file, "--dtype", "float32")
    assert result.code == 2
    assert "Run 3 of 3: " in result.message
    assert "1 of 3 runs failed: " in result.message
    assert str(bad) in result.message.splitlines()[-1]
    assert not bad.exists()
    manifests = [read_manifest(folder) for folder in (one, two)]
    assert [sum(name.endswith(".up_proj.weight") for name in own.plan) for own in manifests] == [0, 3]
    assert [own for name, own in manifests[1].plan.items() if ".q_proj." in name] == [{"n": 2, "m": 4}] * 3
    # The command that is recorded stands for this run alone, and is enough to repeat it.
    again = tmp_path / "again"
    words = [str(again) if word == str(two) else word for word in manifests[1].command[1:]]
    assert "--config" not in words
    assert call(*words).code == 0
    assert read_manifest(again).tensors == manifests[1].tensors

    before = (one / "secateur.json").stat().st_mtime_ns
    result = call("prune", "--config", file, "--dtype", "float32")
    assert result.message.count("finished already by this command, and left alone") == 2
    assert (one / "secateur.json").stat().st_mtime_ns == before
    told = call("prune", "--config", file, "--dtype", "float32", "--json")  # which makes it no other command
    assert told.message.count("finished already by this command, and left alone") == 2
    manifest, _ = json.JSONDecoder().raw_decode(told.out)
    assert manifest["tensors"] == manifests[0].tensors
    result = call("prune", "--config", file, "--dtype", "float32", "--method", "wanda")
    assert result.message.count("exists already") == 2


def test_runs_that_are_no_list(call: Call, model: Path, config: Config) -> None:
    for text in ("runs: 3\n", "runs: []\n", "runs: [a]\n"):
        result = call("plan", model, "--config", config(text))
        assert result.code == 2
        assert '"runs" holds no list of runs' in result.message


def test_a_pattern_for_each_glob_on_the_command_line(call: Call, model: Path) -> None:
    plan = call("plan", model, "--method", "magnitude", "--pattern", '{"*.q_proj": "2:4"}', "--json").json["plan"]
    assert list(plan.values()) == [{"n": 2, "m": 4}] * 3
    assert "is no JSON" in call("plan", model, "--pattern", "{*.q_proj: 2:4}").message
