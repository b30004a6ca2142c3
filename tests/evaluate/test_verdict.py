"""The sentence that a comparison comes to, its thresholds, and the exit code of `compare`."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from lxml import html

import secateur
from command_line import (
    CALIBRATION,
    Call,
    call,  # noqa: F401 - a fixture
    process,
)
from real_data import STORIES
from secateur.evaluate.verdict import MAX_NATS, MIN_AGREEMENT, Change
from secateur.report.evaluations import read_evaluations, verdict_of

TEXT = ["--data", "python-docs", "--length", "32", "--windows", "4"]


def change(nats: float, agreement: float, data: str = "text") -> Change:
    return Change(data, nats, 0.012, agreement, 0.011)


def test_a_value_that_is_the_threshold_passes() -> None:
    for nats, agreement, missed in (
        (0.25, 0.75, []),
        (math.nextafter(0.25, 1), 0.75, ["max_nats"]),
        (0.25, math.nextafter(0.75, 0), ["min_agreement"]),
        (0.5, 0.5, ["max_nats", "min_agreement"]),
    ):
        found = secateur.verdict("m", [change(nats, agreement)], max_nats=0.25, min_agreement=0.75)
        assert (found.missed, found.passed) == (missed, not missed)
    # One that is given alone is judged by alone, and zero is one.
    assert secateur.verdict("m", [change(0.25, 0.1)], max_nats=0.25).passed
    assert not secateur.verdict("m", [change(1e-9, 1)], max_nats=0).passed
    # Without any, by the defaults.
    assert secateur.verdict("m", [change(MAX_NATS, MIN_AGREEMENT)]).passed
    assert not secateur.verdict("m", [change(MAX_NATS, math.nextafter(MIN_AGREEMENT, 0))]).passed
    assert not secateur.verdict("m", [change(math.nextafter(MAX_NATS, 1), MIN_AGREEMENT)]).passed


def test_sentences() -> None:
    figures = (
        "differs from the dense model in 42.0 ± 1.1 % of first choices, perplexity +61.0 % (+0.4762 ± 0.0120 nats)"
    )
    assert secateur.verdict("m", [change(0.4762, 0.58)]).sentence.startswith(
        f"m: {figures}: not a replacement. Try fewer zeros, a method that also updates the weights it keeps"
    )
    given = secateur.verdict("m", [change(0.4762, 0.58)], max_nats=0.5, min_agreement=0.6).sentence
    assert given.startswith(f"m: {figures}: misses --min-agreement 0.6. Try ")
    given = secateur.verdict("m", [change(0.4762, 0.58)], max_nats=0.5, min_agreement=0.5).sentence
    assert given == f"m: {figures}: within --max-nats 0.5 and --min-agreement 0.5."
    # The worst of several texts; a single window has no error; a perplexity that is many times as high.
    texts = [change(0.01, 0.95, "one"), Change("two", 3.0, math.nan, 0.97, math.nan)]
    assert secateur.verdict("m", texts).sentence.startswith(
        "m: differs from the dense model in 5.0 ± 1.1 % of first choices on one, perplexity 20.1 times as high "
        "(+3.0000 nats) on two: not a replacement."
    )
    value = secateur.verdict("m", texts).to_json()
    assert value["values"]["texts"][1] | {"nats": 3.0, "nats_error": None} == value["values"]["texts"][1]
    assert secateur.verdict("m", []).passed is None


@pytest.mark.skipif(not STORIES.exists(), reason=f"no trained model in {STORIES}")
def test_from_pruning_to_the_exit_code(call: Call, tmp_path: Path) -> None:  # noqa: F811
    model, pruned = Path(shutil.copytree(STORIES, tmp_path / "my model")), tmp_path / "it's pruned"
    done = call("prune", model, "-o", pruned, *CALIBRATION)
    (line,) = [line for line in done.out.splitlines() if line.startswith("Written to ")]
    assert shlex.split(line.partition("check it with: ")[2]) == ["secateur", "verify", str(pruned)]
    (line,) = [line for line in done.out.splitlines() if line.startswith("What it cost: ")]
    command = shlex.split(line.removeprefix("What it cost: "))
    assert command == ["secateur", "compare", str(model), str(pruned), "--length", "32"]
    arguments = [*command[1:], *TEXT]
    # The sentence comes last, and without thresholds it decides nothing.
    shown = call(*arguments)
    compared = call(*arguments, "--json")
    (own,) = compared.json["verdicts"]
    assert (shown.code, compared.code, own["passed"], own["given"]) == (0, 0, False, False)
    assert shown.out.splitlines()[-1] == own["sentence"].replace(str(pruned), pruned.name)
    (row,) = compared.json["results"]
    assert own["values"]["texts"] == [
        {
            "data": row["data"],
            "nats": row["difference"],
            "nats_error": row["difference_error"],
            "agreement": row["top1"],
            "agreement_error": row["top1_error"],
        }
    ]
    # The very numbers that were measured pass; what is missed is 3, from the process itself too, after all output.
    nats, agreement = row["difference"], row["top1"]
    kept = ["--max-nats", repr(nats), "--min-agreement", repr(agreement)]
    assert call(*arguments, *kept).code == 0
    missed = call(*arguments, *kept, "--max-nats", repr(math.nextafter(nats, 0)), "--json")
    assert (missed.code, missed.err) == (3, "")
    assert missed.json["verdicts"][0]["missed"] == ["max_nats"]
    assert missed.json["results"][0]["kl"] == row["kl"]
    ended = process(*arguments, *kept, "--min-agreement", repr(math.nextafter(agreement, 1)))
    assert ended.returncode == 3
    assert ": misses --min-agreement " in ended.stdout.splitlines()[-1]
    # The page begins with it, for what this machine has kept and for a file.
    page = html.fromstring((pruned / "report" / "index.html").read_text()) if call("report", pruned).code == 0 else None
    assert page is not None
    assert page.xpath("string(//header//p[@class='lead'])") == own["sentence"].replace(str(pruned), pruned.name)
    (tmp_path / "c.json").write_text(json.dumps(compared.json))
    read = verdict_of(str(pruned), read_evaluations(tmp_path / "c.json", pruned))
    assert read is not None
    assert read.to_json() == own


def test_mistakes_are_two(call: Call, tmp_path: Path) -> None:  # noqa: F811
    for arguments, message in (
        (["--max-nats", "-1"], "--max-nats: got -1, expected a number of nats, at least 0."),
        (["--max-nats", "nan"], "--max-nats: got nan, expected a number of nats, at least 0."),
        (
            ["--min-agreement", "90"],
            "got 90, expected a share of tokens from 0 to 1. Did you mean 0.9?",
        ),
        (["--tasks", "boolq", "--max-nats", "1"], "--max-nats: is measured on a text, and --tasks or --prompts alone"),
    ):
        result = call("compare", tmp_path / "dense", tmp_path / "pruned", *arguments)
        assert (result.code, result.out) == (2, "")
        assert message in result.message
