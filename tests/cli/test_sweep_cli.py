"""`secateur sweep` as a person and as a program see it."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur
from command_line import CALIBRATION, Call, process, terminal
from secateur.errors import PatternError
from secateur.sweeps.grid import methods_of, patterns_of

EVALUATION = ["--data", "python-docs", "--eval-length", "32", "--windows", "4"]


def test_in_a_pipe(model: Path, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = ["--methods", "magnitude,wanda", "--sparsity", "0.5,0.6", "--pattern", "2:4"]
    done = call("sweep", model, "-o", out, *grid, *CALIBRATION, *EVALUATION)
    assert done.code == 0, done.err
    cells = [f"{method} {pattern}" for method in ("magnitude", "wanda") for pattern in ("50%", "60%", "2:4")]
    lines = [line for line in done.said if ": perplexity" in line]
    assert len(lines) == 6
    for number, (cell, line) in enumerate(zip(cells, lines, strict=True)):
        left = [r"5", r"4", r"3", r"2", r"1"][number] if number < 5 else "0"
        end = rf"{left} of 6 cells left" + (r", about \d+\.\d s" if number < 5 else "")
        assert re.fullmatch(rf"{re.escape(cell)}: perplexity \d+\.\d\d, \d+\.\d s, {end}", line)
    assert "6 cells to run, 0 finished" in done.err
    assert re.search(r"^time +about \d", done.err, re.M)
    for line, method in zip(done.out.splitlines()[1:5], ("method", "dense", "magnitude", "wanda"), strict=True):
        assert line.startswith(method)
    assert re.search(r"^method +50% +60% +2:4$", done.out, re.M)
    assert "\x1b" not in done.out + done.err
    page = out / "report" / "index.html"
    assert done.said[-1] == f"Curves and sortable tables: {page}"
    shutil.rmtree(page.parent)
    # Once more, as a program: nothing is left to do.
    again = call("sweep", model, "-o", out, *grid, *CALIBRATION, *EVALUATION, "--json")
    assert again.code == 0
    assert "All 6 cells are finished already." in again.err
    assert again.json == {"format": 1, **json.loads((out / "sweep.json").read_text())}
    assert "<svg" in page.read_text()
    assert [cell["folder"] for cell in again.json["cells"]] == [
        f"cells/{method}-{pattern}" for method in ("magnitude", "wanda") for pattern in ("50", "60", "2of4")
    ]
    for cell in again.json["cells"]:
        assert list(cell) == [
            *("method", "pattern", "sparsity", "folder", "status", "seconds", "figures", "error", "seed", "tasks"),
        ]
    manifest = json.loads((out / "cells" / "wanda-50" / "secateur.json").read_text())
    assert manifest["command"][:3] == ["secateur", "sweep", str(model)]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal(model: Path, tmp_path: Path) -> None:
    arguments = ["sweep", str(model), "-o", str(tmp_path / "out"), "-m", "magnitude,wanda", *CALIBRATION, *EVALUATION]
    code, shown = terminal(*arguments)
    assert code == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"cells \S+ 2/2", plain)  # the bar counts cells, and ends complete
    assert re.search(r"wanda 50%: blocks \d/3", plain)  # and shows where in a cell
    assert plain.count("2 cells to run, 0 finished") == 1
    assert re.search(r"\r\x1b\[2K(\x1b\[1m)?2 cells to run", shown)  # above the bar, not into it
    values = {float(value): bold for bold, value in re.findall(r"(\x1b\[1m)?(\d+\.\d\d)(?:\x1b|\s|$)", shown)}
    best = min(float(value) for value in re.findall(r"(?:magnitude|wanda) +(\d+\.\d\d)", plain))
    assert values[best]


def test_a_dry_run(call: Call, model: Path, tmp_path: Path) -> None:
    arguments = ["sweep", model, "-o", tmp_path / "out", "--pattern", "2:4,3:7", *CALIBRATION, *EVALUATION, "--dry-run"]
    table = call(*arguments)
    assert (table.code, table.err) == (0, "")
    assert "6 cells to run, 0 finished" in table.out
    assert "sparsegpt 3:7 will fail: model.layers.0.mlp.down_proj.weight: 3:7 needs in_features" in table.out
    value = call(*arguments, "--json").json
    assert [cell["method"] for cell in value["cells"]] == ["magnitude"] * 2 + ["wanda"] * 2 + ["sparsegpt"] * 2
    assert [cell["refusal"] is None for cell in value["cells"]] == [True, False] * 3
    assert list(tmp_path.iterdir()) == []


def test_without_the_libraries_of_reports(call: Call, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("sweep", model, "-o", tmp_path / "out", "-m", "magnitude", *CALIBRATION, *EVALUATION)
    assert done.code == 0
    assert done.said[-1] == (
        'No page with curves was written: a report needs matplotlib: pip install "secateur[report]"'
    )


def test_a_failed_cell_is_one(call: Call, model: Path, tmp_path: Path) -> None:
    command = ["sweep", model, "-o", tmp_path / "out", "-m", "magnitude", *EVALUATION]
    result = call(*command, "-p", "2:4,3:7")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "1 of 2 cells failed: magnitude 3:7: model.layers.0.mlp.down_proj.weight: 3:7 needs" in result.message
    assert re.search(r"^magnitude +\d+\.\d\d +failed$", result.out, re.M)
    # It stays in the table, and the exit code says so.
    earlier = call(*command, "-p", "2:4")
    assert earlier.code == 1
    assert "1 of 2 cells failed: magnitude 3:7 (earlier, and not asked for this time): model.layers" in earlier.message
    assert re.search(r"^magnitude +\d+\.\d\d +failed$", earlier.out, re.M)


def test_a_finished_cell_that_is_not_asked_for_stays_finished(call: Call, model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "other.txt"
    text.write_text("Once upon a time there was a little girl who liked to read. " * 40)
    assert call("sweep", model, "-o", out, "-m", "magnitude,magnitude_too=magnitude", *EVALUATION).code == 0
    result = call("sweep", model, "-o", out, "-m", "magnitude", *EVALUATION, "--data", text)
    assert (result.code, "failed" in result.out + result.err) == (0, False), result.err
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert [(cell["method"], cell["status"], len(cell["figures"])) for cell in cells] == [
        *(("magnitude", "done", 2), ("magnitude_too", "done", 1)),
    ]


def test_a_method_of_ones_own_that_changed(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own each time, as from a shell."""
    source = (
        "import secateur\n"
        "def powered(power=0.5):\n"
        "    def score(problem):\n"
        "        return problem.weight.abs() * problem.statistic(secateur.SquaredNorm).norm() ** power\n"
        "    return secateur.select('powered', score, needs=frozenset({secateur.SquaredNorm}))\n"
    )
    mine = tmp_path / "mine.py"
    command = ["sweep", model, "-o", "out", "-m", "mine:powered", *CALIBRATION, *EVALUATION]

    def perplexity(text: str, *arguments: str) -> float | str:
        mine.write_text(text)
        done = process(*command, *arguments, cwd=tmp_path)
        found = re.search(r"^mine:powered +(\d+\.\d\d)$", done.stdout, re.M)
        return float(found[1]) if found else done.stderr

    first = perplexity(source)
    assert perplexity(source + "\ndef another():\n    return 1\n") == first
    refused = str(perplexity(source.replace("0.5", "0.05")))
    assert "power in mine.powered.<locals>.score was 0.5, is 0.05. Run them again with --again mine:powered" in refused
    again = perplexity(source.replace("0.5", "0.05"), "--again", "mine:powered")
    assert isinstance(again, float)
    assert again != first


def test_from_a_file(call: Call, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    value: dict[str, Any] = {
        "methods": ["magnitude", "l2=gblm"],
        "sparsity": [0.5, 0.25],
        "pattern": "2:4",
        "keep": "best",
    }
    value |= {"option": "l2.norm=l2", "output": str(tmp_path / "out"), "dry-run": True, "json": True}
    file.write_text(yaml.safe_dump(value))
    result = call("sweep", model, "--config", file, *CALIBRATION, *EVALUATION)
    assert result.code == 0, result.err
    assert [cell["cell"] for cell in result.json["cells"]] == [
        f"cells/{method}-{pattern}" for method in ("magnitude", "l2") for pattern in ("50", "25", "2of4")
    ]


def test_mistakes_are_two(call: Call, model: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--methods", "wanda,wnada"], 'unknown method "wnada". Did you mean "wanda"?'),
        (["--methods", "gblm,gblm"], "gblm is named twice. Give them labels: --methods one=gblm,two=gblm."),
        (["--option", "gblm.norm=l2"], "expected METHOD.NAME=VALUE, of a method among magnitude, wanda, sparsegpt."),
        (["--option", "sparsegpt.dampin=1"], "sparsegpt has no option dampin; it has damping."),
        (["--sparsity", "0.5,half"], '--sparsity: got "half", expected numbers such as 0.5,0.6.'),
        (["--sparsity", "50"], "Did you mean 0.5?"),
        (["--pattern", "4:2"], "Did you mean 2:4?"),
        (["--per", "row", "--pattern", "2:4"], "--per row has no meaning for --pattern 2:4"),
        (["--keep", "some"], '--keep: got "some", expected none, best or all.'),
        (["--sparsity", "0.5,0.5"], "magnitude 50% is in the grid twice"),
        (["--data", tmp_path / "nope.txt"], "nope.txt: no such file."),
        (["--eval-length", "512"], "and the model has 256 positions. Use --eval-length 256 or less."),
        (["--length", "512"], "and the model has 256 positions. Use --length 256 or less."),
    ):
        result = call("sweep", model, "-o", tmp_path / "out", *CALIBRATION, *EVALUATION, *arguments)
        assert (result.code, result.out) == (2, ""), result
        assert message in result.message
        assert "Traceback" not in result.err
        assert list(tmp_path.iterdir()) == []


def test_an_interruption_keeps_what_is_finished(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupting_sweep.py").write_text(
        "import os, signal, secateur\n"
        "def score(problem):\n"
        "    if not os.path.exists('again'):\n"
        "        open('again', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return problem.weight.abs()\n"
        "method = secateur.select('interrupting', score)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    command = ["sweep", model, "-o", "out", "-m", "magnitude,own=interrupting_sweep:method", *EVALUATION]
    result = call(*command)
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "Interrupted; nothing half-written was left behind."
    assert sorted(path.name for path in (tmp_path / "out" / "cells").rglob("*")) == [
        *("cell.json", "magnitude-50", "secateur.json"),
    ]
    again = call(*command)
    assert again.code == 0
    assert re.findall(r"^(\S+ 50%): perplexity", "\n".join(again.said), re.M) == ["own 50%"]
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    one, two = (cell["figures"]["python-docs"]["perplexity"] for cell in table["cells"])
    assert one != two  # compared in each matrix, and in each row


def test_methods_with_labels_and_options() -> None:
    names = ["magnitude, l2=gblm", "wanda+least-squares", "a-b=sparsegpt"]
    settings = ["l2.norm=l2", "wanda+least_squares.least_squares.damping=0.5", "a-b.damping=0.25"]
    methods = dict(methods_of(names, settings))
    assert list(methods) == ["magnitude", "l2", "wanda+least_squares", "a-b"]
    assert methods["l2"].gradient == secateur.GradientKind("l2")
    assert methods["wanda+least_squares"].options["least_squares.damping"] == 0.5
    assert methods["a-b"].options["damping"] == 0.25
    with pytest.raises(PatternError, match=r"--option wanda.damping=1: expected METHOD.NAME=VALUE"):
        methods_of(["wanda+least_squares"], ["wanda.damping=1"])


def test_patterns_of_lists() -> None:
    assert patterns_of([], [], None) == [secateur.Unstructured(0.5)]
    assert patterns_of(["0.5,0.6", "0.7"], ["2:4", "4:8"], None) == [
        *(secateur.Unstructured(sparsity) for sparsity in (0.5, 0.6, 0.7)),
        *(secateur.NM(2, 4), secateur.NM(4, 8)),
    ]
    assert patterns_of(["0.5"], ["2:4"], "matrix") == [secateur.Unstructured(0.5, "matrix"), secateur.NM(2, 4)]
    assert patterns_of([], [], "matrix") == [secateur.Unstructured(0.5, "matrix")]
