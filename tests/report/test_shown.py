"""Results in a session of Python and in a notebook: a few lines, and the terminal's tables as HTML."""
# ruff: noqa: E501 - lines of results

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import secateur
import tiny

NUMBER = r"\d+\.\d+"


class Tables(HTMLParser):
    """The tables of a page as rows of texts, what stands beside them, and the captions; any tag is opened and closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.lines: list[str] = []
        self.strong: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "strong" in self.open:
            self.strong.append(data)
        if "caption" in self.open:
            self.captions.append(data)
        elif "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif "p" in self.open:
            self.lines.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shown") / "<i>&"  # a name that has to be escaped
    model = tiny.save("llama", folder / "model")
    ids = tiny.tokens(samples=6, length=12)
    how: dict[str, Any] = {"calibration": ids}
    out = [folder / "magnitude", folder / "wanda"]
    pruned = [
        secateur.prune(model, method=name, pattern="2:4", output=target, **how)
        for name, target in zip(("magnitude", "wanda"), out, strict=True)
    ]
    sweep = secateur.sweep(
        model, methods=["magnitude", "wanda"], patterns=["2:4"], data={"ids": ids}, output=folder / "sweep", **how
    )
    return {
        "folder": folder,
        "manifest": pruned[1],
        "perplexity": secateur.perplexity(model, ids),
        "agreement": secateur.agreement(model, out, ids),
        "similarity": secateur.similarity(model, out[1:], ids),
        "verification": secateur.verify(out[1], model),
        "inspection": secateur.inspect(out[1]),
        "sweep": sweep,
        "plan": secateur.allocate(model, allocation="owl", sparsity=0.5, output=folder / "plan.json", **how),
        "estimate": secateur.estimate(model, method="wanda", pattern="2:4", **how),
    }


LINES = {
    "manifest": rf"Pruned with wanda: 11,520 of 23,040 planned weights in 21 matrices are zero, sparsity 0\.5000 \(asked "
    rf"0\.5000\); {NUMBER} s\.",
    "perplexity": rf"Perplexity {NUMBER} ± {NUMBER} on token ids, 6 windows of 12 tokens, {NUMBER} ± {NUMBER} nats; {NUMBER} s\.",
    "agreement": (
        rf"\S+magnitude beside the dense model on token ids, 6 windows of 12 tokens: perplexity {NUMBER} \(dense {NUMBER}\), "
        rf"[+-]{NUMBER} ± {NUMBER} nats, KL {NUMBER} ± {NUMBER}, the same first choice for {NUMBER}% of tokens\.\n"
        rf"\S+wanda beside .*"
    ),
    "similarity": r"\S+wanda beside the dense model on .*: cosine of the last hidden states 0\.\d+ ± .*, relative error .*\.",
    "verification": r"Verified: 30 tensors and 21 matrices of \S+wanda, sparsity 0\.5000\.",
    "inspection": r"\S+wanda: sparsity 0\.5000 of 21 prunable matrices \(21 2:4\)\.",
    "sweep": (
        r"2 cells in \S+sweep: 2 done\.\n"
        rf"Perplexity, ids, 6 windows of 12 tokens:\n"
        rf"  2:4: dense {NUMBER}, magnitude {NUMBER}, wanda {NUMBER}"
    ),
    "plan": (
        r"Plan by owl for 21 matrices: sparsity 0\.\d+ on average, 0\.\d+ to 0\.\d+\.\n"
        r"Zeros were divided by owl, by .* nats per token beside a uniform plan on 1 held-out window, both pruned by Wanda\..*"
    ),
    "estimate": r"wanda would make 11,520 of the [\d,]+ weights of \S+model zero \(LlamaForCausalLM, 3 blocks\), in about .* s, "
    r".* of memory and .* on the disk\.[^\n]*(\n[^\n]*){0,2}",
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_a_few_lines(name: str, made: dict[str, Any]) -> None:
    assert re.fullmatch(LINES[name], repr(made[name])), repr(made[name])


def test_tables_in_a_notebook(made: dict[str, Any]) -> None:
    shown = {name: Tables(made[name]._repr_html_()) for name in LINES}
    assert all(own.tables or name == "verification" for name, own in shown.items())
    (manifest,) = shown["manifest"].tables
    assert shown["manifest"].captions == ["Pruned with wanda"]
    assert manifest[0] == ["matrices", "count", "sparsity", "tokens each"]
    assert manifest[1] == ["mlp.down_proj", "3", "0.5000", "72"]
    assert not any("secateur verify" in line for line in shown["manifest"].lines)  # nobody knows where it was written
    ((head, row),) = shown["perplexity"].tables
    assert dict(zip(head, row, strict=True))["perplexity"] == (
        f"{made['perplexity'].perplexity:.3f} ± {made['perplexity'].perplexity_error:.3f}"
    )
    (agreement,) = shown["agreement"].tables  # one table for both models
    assert [row[0] for row in agreement] == ["model", "dense", "magnitude", "wanda"]
    assert shown["verification"].lines[-1] == "Verified."
    assert [table[0][0] for table in shown["inspection"].tables] == ["by kind", "by block"]
    (sweep,) = shown["sweep"].tables
    cells = {cell.name: f"{cell.figures['ids']['perplexity']:.2f}" for cell in made["sweep"].cells}
    assert sweep[2:] == [[name, cells[f"{name} 2:4"]] for name in ("magnitude", "wanda")]
    best = min(cells.values(), key=float)
    assert best in shown["sweep"].strong
    assert len(shown["plan"].tables[0]) == 8  # a head, and seven kinds
    assert {table[0][0] for table in shown["estimate"].tables} == {"matrices", "not pruned", "estimate"}
    assert "<i>" not in made["agreement"]._repr_html_()


def test_what_is_wrong_is_shown(made: dict[str, Any], tmp_path: Path) -> None:
    result = secateur.record.verify.Verification(
        tmp_path, tensors=2, problems=[f"tensor {n}: differs" for n in range(7)]
    )
    lines = repr(result).splitlines()
    assert lines[0] == f"NOT verified, 7 problems: 2 tensors and 0 matrices of {tmp_path}, sparsity 0.0000."
    assert lines[1:] == [*(f"tensor {n}: differs" for n in range(5)), "and 2 more"]
    verdict = made["agreement"][0].verdict(max_nats=0.0)
    assert repr(verdict) == verdict.sentence
    assert Tables(verdict._repr_html_()).strong == [verdict.sentence.replace(f"{made['folder']}/", "")]
    # A list of results stays one, and one result of it a result.
    assert repr(made["agreement"][1]) == repr(made["agreement"]).splitlines()[1]
    assert made["agreement"] == list(made["agreement"])
