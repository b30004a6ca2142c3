"""`sweep --seeds`: each cell once for each draw of the calibration samples, and means with two kinds of error."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lxml import html

import secateur
import tiny
from command_line import CALIBRATION, Call, call, save_model  # noqa: F401 - fixtures
from secateur.errors import CalibrationError
from secateur.evaluate.verdict import ADVICE
from secateur.report.sweep_page import build_sweep
from secateur.sweeps.best import best_lines
from secateur.sweeps.cells import SweepEvent
from secateur.sweeps.folder import Cell, Sweep
from secateur.sweeps.table import latex, markdown, sweep_tables, table_csv
from sweep_runs import HALF, METHODS, Run

# Three draws on four windows, computed by hand.
NATS = {0: [1.0, 2.0, 3.0, 4.0], 1: [1.0, 2.0, 3.0, 6.0], 2: [1.0, 2.0, 3.0, 8.0]}
PERPLEXITY = {0: 10.0, 1: 12.0, 2: 17.0}  # mean 13, deviations -3, -1, 4: the root of 26 / 2


def by_hand(folder: Path) -> Sweep:
    def cell(method: str, seed: int | None, windows: list[float], perplexity: float) -> Cell:
        figures: dict[str, Any] = {"perplexity": perplexity, "window_nats": windows, "nats": sum(windows) / 4}
        figures |= {"perplexity_error": 0.5, "standard_error": 0.1, "difference": sum(windows) / 4 - 1.5}
        figures |= {"difference_error": 0.2, "windows": 4, "length": 32}
        place = f"cells/{method}-50" + (f"~seed{seed}" if seed else "")
        return Cell(method, "50%", 0.5, place, "done", 1.0, {"text": figures}, seed=seed)

    cells = [cell("wanda", seed, windows, PERPLEXITY[seed]) for seed, windows in NATS.items()]
    cells.append(cell("magnitude", None, [2.0] * 4, 20.0))
    dense = {"perplexity": 8.0, "perplexity_error": 0.25, "window_nats": [1.0, 1.0, 2.0, 2.0]}
    dense |= {"windows": 4, "length": 32}
    settings = {"data": ["text"], "methods": {}, "digests": {}, "agreement": False, "seed": 0}
    return Sweep(folder, "model_1", {"text": dense}, settings, cells)


def test_the_table_by_hand(tmp_path: Path) -> None:
    sweep = by_hand(tmp_path)
    # Windows on average over draws: 1, 2, 3, 6; less the dense ones: 0, 1, 1, 4, of mean 1.5 and variance 9 / 3.
    wanda, magnitude = sweep.means
    assert (wanda.draws, wanda.cells, magnitude.draws, magnitude.cells) == (3, 3, 1, 1)
    assert wanda.perplexity.mean == 13
    assert wanda.perplexity.deviation == pytest.approx(13**0.5)
    assert wanda.nats.mean == pytest.approx(3)
    assert wanda.nats.deviation == pytest.approx(0.5)  # 2.5, 3, 3.5
    assert wanda.nats.error == pytest.approx((14 / 3 / 4) ** 0.5)
    assert wanda.difference.mean == pytest.approx(1.5)
    assert wanda.difference.deviation == pytest.approx(0.5)
    assert wanda.difference.error == pytest.approx((9 / 3 / 4) ** 0.5)
    # Perplexity times nats, on average: 13, 26, 39 and (40 + 72 + 136) / 3; their standard error.
    scaled = [13.0, 26.0, 39.0, 248 / 3]
    centre = sum(scaled) / 4
    error = (sum((value - centre) ** 2 for value in scaled) / 3 / 4) ** 0.5
    assert wanda.perplexity.error == pytest.approx(error)
    shown = f"13.00 ± 3.61 ({error:.2f})"
    (table,) = sweep_tables(sweep)
    assert table.title.endswith(
        "mean ± standard deviation over 3 draws (seeds 0, 1, 2), in brackets the standard error over windows"
    )
    lines = markdown(sweep).splitlines()
    assert lines[4:7] == ["| dense | 8.00 (0.25) |", f"| wanda | **{shown}** |", "| magnitude | 20.00 (0.50) |"]
    assert f"\nwanda & \\textbf{{{shown.replace('±', '$' + chr(92) + 'pm$')}}} \\\\\n" in latex(sweep)
    assert "method & 50\\% \\\\\n\\midrule\ndense & 8.00 (0.25) \\\\\n" in latex(sweep)
    rows = list(csv.DictReader(table_csv(sweep).splitlines()))
    assert [(row["method"], row["seed"], row["draws"]) for row in rows] == [
        *(("dense", "", ""), ("wanda", "0", ""), ("wanda", "1", ""), ("wanda", "2", ""), ("wanda", "", "3")),
        ("magnitude", "", ""),
    ]
    assert float(rows[4]["perplexity_deviation"]) == pytest.approx(13**0.5)
    assert float(rows[4]["difference_error"]) == pytest.approx(0.75**0.5)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep.to_json()))
    assert json.loads((tmp_path / "sweep.json").read_text())["means"][0]["perplexity"]["mean"] == 13
    page = html.fromstring(build_sweep(tmp_path).read_text())
    cells = page.xpath("//table[@id='grid-1']/tbody/tr/td")
    assert [cell.text_content() for cell in cells] == [f"13.000 ± 3.606 ({error:.3f})", "20.000 (0.500)"]


def test_a_draw_that_failed_is_told(tmp_path: Path) -> None:
    sweep = by_hand(tmp_path)
    first, second, third, *_ = sweep.cells
    sweep = Sweep(tmp_path, sweep.model, sweep.dense, sweep.settings, [first, second, Cell(**vars(third.fresh()) | {
        "status": "failed", "error": "no"})])  # fmt: skip
    assert re.search(r"\| wanda \| 11\.00 ± 1\.41 \(\d+\.\d\d\), 2 of 3 draws \|", markdown(sweep))
    assert "- wanda 50%, seed 2 failed: no" in markdown(sweep)


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., Sweep]:
    """`drawn(...)`: a small sweep whose calibration is drawn from a text."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    if not model.exists():
        save_model(model)
        text.write_text(
            " ".join(f"Line {number} of a text that goes on for {number % 7} words." for number in range(400))
        )

    def start(**options: Any) -> Sweep:
        defaults: dict[str, Any] = {
            "methods": {name: METHODS[name] for name in ("magnitude", "gblm", "sparsegpt")},
            "patterns": [HALF],
            "calibration": str(text),
            "sampling": "concat",
            "samples": 3,
            "length": 16,
            "data": str(text),
            "eval_length": 16,
            "windows": 4,
            "output": tmp_path / "out",
        }
        return secateur.sweep(model, **defaults | options)

    return start


def figures(cell: Cell) -> Any:
    (own,) = cell.figures.values()
    return own["window_nats"]


@pytest.mark.parametrize("propagate", ["dense", pytest.param("pruned", marks=pytest.mark.slow)])
def test_a_draw_is_that_of_a_sweep_with_its_seed(drawn: Callable[..., Sweep], tmp_path: Path, propagate: str) -> None:
    drawn(propagate=propagate, methods={"gblm": METHODS["gblm"]})
    events: list[SweepEvent] = []
    found = drawn(propagate=propagate, seeds=[0, 2], latex=True, on_event=events.append)
    # What was there is kept, and what needs no samples runs once.
    assert [(cell.name, cell.seed) for cell in found.cells] == [
        *(("gblm 50%", 0), ("magnitude 50%", None), ("gblm 50%, seed 2", 2)),
        *(("sparsegpt 50%", 0), ("sparsegpt 50%, seed 2", 2)),
    ]
    assert [event.cell.name for event in events if event.kind == "cell" and event.cell] == [
        cell.name for cell in found.cells[1:]
    ]
    other = drawn(propagate=propagate, seed=2, output=tmp_path / "other")
    by_method = {cell.method: figures(cell) for cell in other.cells}
    for cell in found.cells:
        if cell.seed in (2, None):
            assert figures(cell) == by_method[cell.method]
        else:
            assert figures(cell) != by_method[cell.method]
    assert (tmp_path / "out" / "table.tex").read_text() == latex(found)
    assert not list((tmp_path / "out").glob("*.partial"))
    again: list[SweepEvent] = []
    assert drawn(propagate=propagate, seeds="0,2", on_event=again.append) == found
    assert not again


@pytest.mark.slow
def test_on_ray_the_table_is_the_same(drawn: Callable[..., Sweep], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray==2.60.0")
    options: dict[str, Any] = {"methods": {"sparsegpt": METHODS["sparsegpt"]}, "seeds": [0, 1], "propagate": "dense"}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    try:
        drawn(**options, output=tmp_path / "ray", ray=True, ray_cpus=1)
    finally:
        ray.shutdown()
    drawn(**options)
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_draws_of_token_ids_are_refused(run: Run, tmp_path: Path) -> None:
    for calibration in ({}, {"calibration": tiny.tokens(6, 16, 1)}):
        with pytest.raises(CalibrationError, match="--seeds: got 2 draws of token ids, which are taken as they are"):
            run(seeds=[0, 1], **calibration)
    for wrong in ("0,one", "-1", "0.5"):
        with pytest.raises(CalibrationError, match=r"--seeds: got \S+ expected whole numbers from 0, such as 0,1,2\."):
            run(seeds=wrong)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_no_more_has_not_failed(run: Run, tmp_path: Path) -> None:
    broken = secateur.select("broken", lambda problem: problem.weight[0])
    first = run(methods=[secateur.magnitude(), broken], patterns=[HALF])
    assert [cell.status for cell in first.cells] == ["done", "failed"]
    found = run(methods=[secateur.magnitude()], patterns=[HALF])
    assert found.cells == first.cells[:1]
    assert "broken" not in (tmp_path / "out" / "table.md").read_text()
    assert [cell.status for cell in run(methods=[broken], patterns=[HALF]).cells] == ["done", "failed"]  # tried again


def test_from_the_command_line(call: Call, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["sweep", save_model(tmp_path / "model"), "-o", tmp_path / "out", "-m", "wanda", "--seeds", "0,1"]
    arguments += ["--data", "python-docs", "--eval-length", "32", "--windows", "2", *CALIBRATION, "--latex"]
    done = call(*arguments)
    assert done.code == 0, done.err
    assert re.search(r"^wanda +\d+\.\d\d ± \d+\.\d\d \(\d+\.\d\d\)$", done.out, re.M)
    assert "table.csv, table.tex and the cells." in done.out
    assert re.search(r"^[-\d]+ [:\d]+ wanda 50%, seed 1: perplexity \d", done.err, re.M)
    assert [len(mean["perplexity"]) for mean in call(*arguments, "--json").json["means"]] == [3]


def test_what_a_sweep_comes_to(tmp_path: Path) -> None:
    """Mean perplexities of 13 and 20 beside 8: factors of 1.625 and 2.5."""
    sweep = by_hand(tmp_path)
    sentence, advice = best_lines(sweep)
    assert sentence == "50%: wanda costs least, perplexity +62.5 % (+0.4855 nats): not a replacement."
    assert advice == ADVICE
    assert f"- {sentence}\n- {advice}\n" in markdown(sweep)
    close = Sweep(tmp_path, "m", {"text": {**sweep.dense["text"], "perplexity": 12.7}}, sweep.settings, sweep.cells)
    assert best_lines(close) == [
        "50%: wanda costs least, perplexity +2.4 % (+0.0233 nats): close enough to replace the dense model here."
    ]
    alike = {"kl": 0.1, "top1": 0.75, "window_kl": [0.1] * 4, "window_top1": [0.75] * 4}
    # A method is judged where it costs most: on another text wanda is the worse one.
    for cell in sweep.cells:
        other = {"perplexity": 40.0 if cell.method == "wanda" else 21.0}
        cell.figures["other"] = {**cell.figures["text"], **other, "agreement": alike}
    dense = {**sweep.dense, "other": {**sweep.dense["text"], "perplexity": 10.0}}
    both = Sweep(tmp_path, "m", dense, {**sweep.settings, "data": ["text", "other"]}, sweep.cells)
    words = "perplexity +150.0 % (+0.9163 nats) on text, 25.0 % of first choices differ: not a replacement."
    assert best_lines(both)[0] == f"50%: magnitude costs least, {words}"
    pending = [Cell("wanda", "50%", 0.5, "cells/wanda-50")]
    assert best_lines(Sweep(tmp_path, "m", sweep.dense, sweep.settings, pending)) == []
