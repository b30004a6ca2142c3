"""Reports: what a page holds is what the files hold, found again by other means."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from lxml import html
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer

import secateur
import secateur.record.card
import tiny
from command_line import (
    call,  # noqa: F401 - a fixture
    save_model,
)
from real_data import STORIES, some_stories
from secateur.errors import CheckpointError, SecateurError
from secateur.record.manifest import read_manifest
from secateur.report import charts, masks, pictures
from secateur.report.checkpoint_page import build
from secateur.report.evaluations import read_evaluations
from secateur.report.sweep_page import build_sweep

NAMES = ["llama", "gpt2", "mixtral", "gpt_oss"]  # plain; stored (in, out); experts; experts stored (in, out)


@pytest.fixture(autouse=True, scope="module")
def _charts_are_drawn_once(tmp_path_factory):
    """The same prunings have the same charts, which take most of the time of a page: earlier files are copied."""
    drawn, draw = {}, charts.Chart.draw

    def once(chart, folder):
        if repr(chart) not in drawn:
            kept = tmp_path_factory.mktemp("chart")
            drawn[repr(chart)] = kept, draw(chart, kept)
        kept, result = drawn[repr(chart)]
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts.Chart, "draw", once)
        yield


def make(name, folder, method=None, **options):
    source = tiny.save(name, folder / "source")
    options = {"pattern": secateur.Unstructured(0.5), "calibration": tiny.tokens(), "output": folder / "out"} | options
    secateur.prune(source, method=method or secateur.magnitude(), **options)
    return folder / "out"


def tree(page):
    return html.fromstring(page.read_text())


def data(page):
    (script,) = tree(page).xpath("//script[@type='application/json']")
    return {matrix["name"]: matrix for matrix in json.loads(script.text)["matrices"]}


def decode(matrix):
    """Cells (kept weights), and the lowest and highest number of zeros of columns and rows, read without our code."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(matrix["counts"])), np.uint8).reshape(4, -1)
    counts = (planes.astype(np.int64) * 256 ** np.arange(4)[:, None]).sum(axis=0)
    down, across = (-(-length // matrix["side"]) for length in matrix["shape"])
    cells, columns, rows = np.split(counts, [down * across, down * across + 2 * across])
    return cells.reshape(down, across), columns.reshape(2, across), rows.reshape(2, down)


def check_picture(matrix, mask):
    """A picture against a mask, by slicing."""
    side = matrix["side"]
    cells, columns, rows = decode(matrix)
    assert list(mask.shape) == matrix["shape"]
    for row, column in np.ndindex(cells.shape):
        part = mask[row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert cells[row, column] == part.sum()
    for found, zeros in ((columns, (~mask).sum(axis=0)), (rows, (~mask).sum(axis=1))):
        parts = [zeros[start : start + side] for start in range(0, len(zeros), side)]
        assert found.tolist() == [[part.min() for part in parts], [part.max() for part in parts]]


def stored(folder, entry):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        value = file.get_tensor(entry["tensor"])
    value = value if entry["index"] is None else value[entry["index"]]
    return (value.T if entry["transposed"] else value) != 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("gpt2", "mixtral") else ()) for name in NAMES]
)
def test_pictures_are_those_of_the_files(name, tmp_path):
    pruned = make(name, tmp_path)
    page = build(pruned)
    assert page == pruned / "report" / "index.html"
    found, entries = data(page), read_manifest(pruned).matrices
    assert list(found) == list(entries)
    for matrix, entry in entries.items():
        assert found[matrix]["side"] == 1
        check_picture(found[matrix], stored(pruned, entry))
        grey = np.asarray(Image.open(page.parent / "masks" / f"{matrix}.png"))
        times = grey.shape[0] // entry["shape"][0]
        assert (grey[::times, ::times] == np.where(stored(pruned, entry), 0, 255)).all()
    assert len({matrix["label"] for matrix in found.values() if matrix["block"] == 0}) == sum(
        entry["block"] == 0 for entry in entries.values()
    )
    assert secateur.verify(pruned, None).ok


@pytest.mark.parametrize("shape", [(70, 130), (1, 500), (129, 7)])
@pytest.mark.parametrize("side", [1, 3, 8, 64, 1024])
def test_cells_that_do_not_divide_the_matrix(shape, side):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    picture = pictures.draw(mask, side)
    check_picture({"shape": list(shape), "side": side, "counts": picture.code}, mask.numpy())
    assert picture.shares()[-1, -1] == pytest.approx(
        mask[(shape[0] - 1) // side * side :, (shape[1] - 1) // side * side :].double().mean()
    )


@pytest.mark.parametrize("kind", ["random", "columns", "patches"])
def test_a_picture_of_a_large_matrix_keeps_to_its_size(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (1376, 4096)  # a slice of LLaMA-7B's up_proj
    if kind == "random":
        chance = torch.tensor(0.5)
    elif kind == "columns":
        chance = torch.rand(shape[1], generator=generator)
    else:  # every cell of the picture another share: nothing to compress
        chance = torch.rand(43, 128, generator=generator).repeat_interleave(32, 0).repeat_interleave(32, 1)
    mask = torch.rand(shape, generator=generator) >= chance
    size = masks.ALL_PICTURES // 224
    picture = pictures.draw_within(mask, size)
    assert size / 3 < len(picture.code) <= size
    check_picture({"shape": list(shape), "side": picture.side, "counts": picture.code}, mask.numpy())


def test_the_smallest_room_gives_one_cell():
    picture = pictures.draw_within(torch.ones(300, 200, dtype=torch.bool), 1)
    assert picture.kept.tolist() == [[60000]]


@pytest.mark.slow
def test_a_page_of_32_blocks_with_7_matrices_stays_under_5_megabytes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=448, num_hidden_layers=32,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    secateur.prune(tmp_path / "source", method=secateur.magnitude(), output=tmp_path / "out")
    page = build(tmp_path / "out")
    found = data(page)
    assert len(found) == 224
    # The rest of the page, and pictures as large as they may be.
    rest = page.stat().st_size - sum(len(matrix["counts"]) for matrix in found.values())
    assert max(len(matrix["counts"]) for matrix in found.values()) <= masks.ALL_PICTURES // 224
    assert page.stat().st_size < 5_000_000
    assert rest + masks.ALL_PICTURES < 5_000_000


def test_of_very_many_matrices_some_have_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "PICTURES", 7)
    pruned = make("mixtral", tmp_path)
    page = build(pruned)
    entries = read_manifest(pruned).matrices
    shown = list(data(page))
    assert 4 <= len(shown) <= 7 < len(entries)
    assert f"Pictured are {len(shown)} of {len(entries)} matrices" in page.read_text()
    with (page.parent / "matrices.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == list(entries)


def test_the_numbers_of_every_matrix(tmp_path):
    pruned = make("llama", tmp_path, secateur.wanda(), pattern=secateur.NM(2, 4))
    page = build(pruned)
    entries = read_manifest(pruned).matrices
    with (page.parent / "matrices.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(entries)
    shown = {row.xpath("string(th)"): row for row in tree(page).xpath("//table[@id='matrices']/tbody/tr")}
    for row in rows:
        mask = stored(pruned, entries[row["name"]])
        assert int(row["zeros"]) == (~mask).sum()
        zeros = (~mask).sum(axis=0)
        expected = mask.shape[0] / 4  # 2:4 gives every weight a chance of a half
        assert float(row["columns_ratio"]) == pytest.approx(np.mean((zeros - mask.shape[0] / 2) ** 2) / expected)
        assert int(row["columns_empty"]) == (zeros == mask.shape[0]).sum()
        assert float(row["rows_excess"]) == 0
        cells = shown[row["name"]].xpath("td")
        assert cells[1].text_content() == "50.00\u00a0%"
        assert float(cells[2].get("data-value")) == float(row["columns_excess"])


def evaluations(source, pruned):
    ids = tiny.tokens(5, 24)
    (beside,) = secateur.agreement(source, [pruned], ids)
    return [
        {"kind": "perplexity", "key": "a", "result": secateur.perplexity(pruned, ids).to_json()},
        {"kind": "agreement", "key": "b", "result": beside.to_json()},
        {
            "kind": "tasks",
            "key": "c",
            "result": {
                "task": "boolq",
                "shots": 0,
                "documents": 3270,
                "metrics": {"acc": {"value": 0.625, "error": 0.0085}, "f1": {"value": None, "error": None}},
            },
        },
        {"kind": "latency", "key": "d", "result": {"rows": [{"batch size": 1, "device": "cpu", "ms": 12.5}]}},
    ]


def cells(page, table):
    rows = tree(page).xpath(f"//table[@id='{table}']/tbody/tr")
    return [[cell.text_content() for cell in row.xpath("th|td")] for row in rows]


def test_evaluations(tmp_path):
    pruned = make("llama", tmp_path)
    known = evaluations(tmp_path / "source", pruned)
    page = build(pruned, known)
    own, beside = known[0]["result"], known[1]["result"]
    assert cells(page, "perplexity") == [
        [
            "token ids",
            "5 × 24",
            f"{own['nats']:.4f} ± {own['standard_error']:.4f}",
            f"{own['perplexity']:.3f} ± {own['perplexity_error']:.3f}",
        ]
    ]
    (row,) = cells(page, "agreement")
    assert row[2:5] == [
        f"{beside['perplexity_dense']:.3f}",
        f"{beside['perplexity']:.3f}",
        f"{beside['difference']:+.4f} ± {beside['difference_error']:.4f}",
    ]
    assert row[7] == f"{100 * beside['top1']:.1f}\u00a0%"
    assert cells(page, "tasks") == [
        ["boolq", "acc", "0.6250 ± 0.0085", "0", "3,270"],
        ["boolq", "f1", "", "0", "3,270"],
    ]
    assert cells(page, "evaluation-latency") == [["1", "cpu", "12.5"]]


def test_one_window_has_no_error(tmp_path):
    pruned = make("llama", tmp_path)
    result = secateur.perplexity(pruned, tiny.tokens(1, 24)).to_json()
    page = build(pruned, [{"kind": "perplexity", "key": "", "result": result}])
    assert cells(page, "perplexity")[0][2:] == [f"{result['nats']:.4f}", f"{result['perplexity']:.3f}"]


def test_files_of_evaluations(tmp_path):
    pruned = make("llama", tmp_path)
    known = [item["result"] for item in evaluations(tmp_path / "source", pruned)]
    file = tmp_path / "e.json"

    def read(content):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return [(item["kind"], item["result"]) for item in read_evaluations(file, pruned)]

    other = known[1] | {"model": "elsewhere"}
    assert read(known[0]) == [("perplexity", known[0])]
    assert read({"dense": "d", "results": [other, known[1]]}) == [("agreement", known[1])]
    answered = {"model": str(pruned), "results": [known[2]]}
    assert read({**known[0], "tasks": answered}) == [("perplexity", known[0]), ("tasks", known[2])]
    assert read({"tasks": answered}) == [("tasks", known[2])]
    with pytest.raises(CheckpointError, match=r"e.json: holds results of elsewhere, none of .*out\. Give a file"):
        read({"dense": "d", "results": [other]})
    for broken in ("no JSON", "[]", "{}", "3", '{"results": 5}', '{"results": [1]}', "[" * 100_000):
        with pytest.raises(CheckpointError, match=r"e.json: (not|lists and) .*Make a new one: secateur eval"):
            read(broken)
    for number, name in ((0, "perplexity"), (0, "windows"), (1, "kl_99")):
        with pytest.raises(CheckpointError, match=rf"e.json: damaged, or not what .* - at `\$.{name}`"):
            read(known[number] | {name: ["much"]})
    with pytest.raises(CheckpointError, match=r"e.json: damaged, .* Expected `float \| null`, got `str`"):
        read({"tasks": {**answered, "results": [known[2] | {"metrics": {"acc": {"value": "high", "error": None}}}]}})
    with pytest.raises(CheckpointError, match=r"gone.json: no such file"):
        read_evaluations(tmp_path / "gone.json", pruned)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def test_everything_from_outside_is_escaped(tmp_path):
    pruned = make("llama", tmp_path, command=["secateur", "prune", HOSTILE])
    result = secateur.perplexity(pruned, tiny.tokens(2, 24)).to_json() | {"data": HOSTILE}
    rows = [{HOSTILE: HOSTILE}]
    page = build(
        pruned, [{"kind": k, "key": "", "result": r} for k, r in (("perplexity", result), (HOSTILE, {"rows": rows}))]
    )
    root = tree(page)
    assert len(root.xpath("//script")) == 2
    assert not root.xpath("//img")
    assert HOSTILE.split("/")[-1] in page.read_text() or "onerror=alert" in root.text_content()


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    page = build(make("llama", tmp_path, secateur.sparsegpt()))
    text, root = page.read_text(), tree(page)
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert not root.xpath("//link|//iframe|//script[@src]")
    assert not [link for link in root.xpath("//@href|//@src") if not link.startswith("#")]
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = root.xpath("//@id")
    assert len(ids) == len(set(ids))
    for reference in root.xpath("//@aria-labelledby|//@aria-describedby|//@for"):
        assert set(reference.split()) <= set(ids)
    for link in root.xpath("//@href"):
        assert link[1:] in ids
    for picture in root.xpath("//*[local-name()='svg']"):
        assert picture.get("role") == "img"
        assert picture.xpath("*[local-name()='title']")[0].text
        assert picture.xpath("*[local-name()='desc']")[0].text
    # Charts take the page's colours: none of their own is left.
    drawn = "".join(html.tostring(picture, encoding="unicode") for picture in root.xpath("//*[local-name()='svg']"))
    assert "var(--series-1)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn)
    levels = [int(heading.tag[1]) for heading in root.xpath("//h1|//h2|//h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_charts_beside_the_page(tmp_path):
    page = build(make("llama", tmp_path, secateur.sparsegpt(), skip=["*.1.*"]))
    for name in ("output-change", "reconstruction-error", "column-structure"):
        assert Image.open(page.parent / f"{name}.png").size[0] > 1000
        assert html.fromstring((page.parent / f"{name}.svg").read_bytes()).tag == "svg"
    manifest = read_manifest(page.parents[1])
    shown = cells(page, "output-change-numbers")
    assert shown == [[str(b["index"]), f"{b['output_change']:.4g}"] for b in manifest.blocks if b["output_change"]]
    assert [row[0] for row in cells(page, "reconstruction-error-numbers")] == ["0", "2"]


def test_a_chart_of_uneven_sparsity(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    plan = secateur.Plan({name: secateur.Unstructured(0.25 * (i + 1)) for i, name in enumerate(names)})
    secateur.prune(source, method=secateur.magnitude(), pattern=plan, output=tmp_path / "out")
    page = build(tmp_path / "out")
    assert cells(page, "sparsity-numbers") == [["0", "0.25"], ["1", "0.5"], ["2", "0.75"]]
    assert "From 25.00\u00a0% in model.layers.0.mlp.up_proj.weight to 75.00\u00a0%" in page.read_text()


def test_scores_or_magnitudes(tmp_path):
    page = build(make("llama", tmp_path / "a", secateur.wanda()))
    entries = read_manifest(tmp_path / "a" / "out").matrices
    for name, matrix in data(page).items():
        assert matrix["scored"]
        assert matrix["values"] == entries[name]["scores"]
    pruned = make("llama", tmp_path / "b", secateur.sparsegpt())
    for name, matrix in data(build(pruned)).items():
        assert not matrix["scored"]
        assert matrix["values"]["pruned"] is None
        with safe_open(pruned / "model.safetensors", "numpy") as file:
            weight = np.abs(file.get_tensor(name))
        assert sum(matrix["values"]["kept"]) == np.count_nonzero(weight)
        assert matrix["values"]["high"] == weight.max()


def test_files_that_were_changed_are_shown_as_they_are_with_a_warning(tmp_path):
    from safetensors.torch import load_file, save_file

    pruned = make("llama", tmp_path)
    tensors = load_file(pruned / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    page = build(pruned)
    words = tree(page).xpath("string(//header)")
    assert f"1 of 21 matrices hold other numbers of zeros than the manifest records, first {name}" in words
    assert f"1 matrices are zero from end to end, first {name}" in words
    assert data(page)[name]["columns"]["ratio"] is None


def test_a_recovery(tmp_path):
    pruned = make("llama", tmp_path)
    manifest = read_manifest(pruned)
    curve = [{"step": 1, "loss": 3.0, "perplexity": None}, *({"step": s, "perplexity": 20.0 - s} for s in (5, 10))]
    command = ["secateur", "recover", "out"]
    figures = {"before": 20.5, "after": 10.0}
    manifest.recovery = {"method": "full", "steps": 10, "curve": curve, "perplexity": figures, "command": command}
    manifest.recovery |= {"trained": {"a": "0"}}
    manifest.write(pruned)
    page = build(pruned)
    assert cells(page, "recovery-numbers") == [["5", "15"], ["10", "10"]]
    assert [row[1] for row in cells(page, "recovered")] == ["20.500", "10.000", "full", "10", "secateur recover out"]
    (pruned / "README.md").unlink()
    secateur.record.card.refresh_card(pruned, manifest, [])
    words = (pruned / "README.md").read_text()
    assert "The kept weights were trained; the zeros stayed" in words
    assert "\nsecateur recover out\n" in words


def test_a_recovery_block_by_block(tmp_path):
    pruned, tokens = make("llama", tmp_path), tiny.tokens()
    found = secateur.reconstruct(pruned, calibration=tokens, epochs=2, output=tmp_path / "tuned")
    assert found.recovery is not None
    page = build(tmp_path / "tuned")
    blocks = found.recovery["blocks"]
    assert [[float(cell) for cell in row] for row in cells(page, "block-loss-numbers")] == [
        [block["index"], *(pytest.approx(block[when], rel=1e-3) for when in ("before", "after"))] for block in blocks
    ]
    assert len(blocks) == tiny.BLOCKS


def test_when_no_pruned_matrix_is_left(tmp_path):
    pruned = make("llama", tmp_path)
    manifest = read_manifest(pruned)
    manifest.matrices.clear()
    manifest.write(pruned)
    with pytest.raises(CheckpointError, match=r"no pruned matrix is left to report on"):
        build(pruned)


def test_an_earlier_report_is_replaced_and_nothing_else_is(tmp_path):
    pruned = make("llama", tmp_path)
    page = build(pruned)
    (page.parent / "old.png").write_text("old")
    assert build(pruned) == page
    assert not (page.parent / "old.png").exists()
    page.write_text("somebody else's page")
    with pytest.raises(
        CheckpointError, match=r"report: exists and is no report of Secateur, so it will not be replaced"
    ):
        build(pruned)
    assert page.read_text() == "somebody else's page"
    assert [path.name for path in pruned.iterdir() if "partial" in path.name or "old" in path.name] == []


def test_a_failure_leaves_the_earlier_report(tmp_path, monkeypatch):
    pruned = make("llama", tmp_path)
    before = build(pruned).read_text()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(charts.Chart, "draw", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        build(pruned)
    assert (pruned / "report" / "index.html").read_text() == before
    assert not list(pruned.glob("report.*"))


def test_what_is_no_pruned_checkpoint(tmp_path):
    tiny.save("llama", tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"no secateur.json in it"):
        build(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"no such folder"):
        build(tmp_path / "nothing")


def test_without_the_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SecateurError, match=r'a report needs matplotlib: pip install "secateur\[report\]"'):
        build(tmp_path)


def test_labels():
    kinds = ["model.layers.*.mlp.up_proj.weight", "model.layers.*.self_attn.q_proj.weight"]
    assert list(masks.short_kinds(kinds).values()) == ["mlp.up_proj", "self_attn.q_proj"]
    assert list(masks.short_kinds(kinds[:1]).values()) == ["mlp.up_proj"]
    assert list(masks.short_kinds(["h.*.fc.weight", "h.*.fc.deep.weight"]).values()) == ["fc", "fc.deep"]


# The command


def test_the_command(tmp_path, call, monkeypatch):  # noqa: F811
    pruned = make("llama", tmp_path)
    ids = tiny.tokens(4, 24)
    (beside,) = secateur.agreement(tmp_path / "source", [pruned], ids)
    (tmp_path / "c.json").write_text(json.dumps({"dense": "d", "results": [beside.to_json()]}))
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url))  # None: no browser could be started
    result = call("report", pruned, "--evaluation", tmp_path / "c.json", "--open")
    page = pruned / "report" / "index.html"
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == f"Report: {page}"
    assert result.out.splitlines()[1] == "No browser could be started here; open the page yourself."
    assert opened == [page.as_uri()]
    assert f"{beside.perplexity:.3f}" in cells(page, "agreement")[0]
    assert f"| {beside.perplexity:.3f} |" in (pruned / "README.md").read_text()
    assert secateur.verify(pruned, None).ok
    (pruned / "README.md").write_text("My own.")
    result = call("report", pruned, "--evaluation", tmp_path / "c.json")
    assert result.out.splitlines()[1] == "README.md has no place for figures any more and was left as it is."
    assert (pruned / "README.md").read_text() == "My own."


def test_the_command_knows_what_was_evaluated(tmp_path, call, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "store"))
    model, pruned = save_model(tmp_path / "model"), tmp_path / "pruned"
    assert call("prune", model, "-o", pruned, "--method", "magnitude").code == 0
    text = ("--data", "python-docs", "--length", "32", "--windows", "4")
    alone = call("eval", pruned, *text, "--json").json
    page = pruned / "report" / "index.html"
    call("report", pruned)
    assert [row[0] for row in cells(page, "perplexity")] == ["python-docs"]
    assert f"{alone['perplexity']:.3f}" in (pruned / "README.md").read_text()
    # The same tokens beside the dense model say more, and stand in its place.
    (beside,) = call("compare", model, pruned, *text, "--json").json["results"]
    call("report", pruned)
    assert "perplexity" not in {table.get("id") for table in html.parse(page).iter("table")}
    assert f"{beside['perplexity_dense']:.3f}" in cells(page, "agreement")[0]
    # Other weights are another model.
    assert call("prune", model, "-o", pruned, "--overwrite", "--method", "magnitude", "--sparsity", "0.3").code == 0
    call("report", pruned)
    assert "None recorded yet" in (pruned / "README.md").read_text()


def test_mistakes(tmp_path, call):  # noqa: F811
    pruned = make("llama", tmp_path)
    for arguments, message in (
        (["report", tmp_path / "source"], "no secateur.json in it"),
        (["report", pruned, "-e", tmp_path / "gone.json"], "gone.json: no such file."),
    ):
        result = call(*arguments)
        assert result.code == 2
        assert message in result.message
    (tmp_path / "sweep.json").write_text("{}")
    result = call("report", tmp_path, "-e", tmp_path / "sweep.json")
    assert result.code == 2
    assert "is a sweep; its sweep.json has the figures of every run" in result.message


# Sweeps


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of stories260K with real figures, as `secateur sweep` writes it."""
    if not STORIES.is_dir():
        pytest.skip("shared/data/models/stories260K is not there")
    folder, data = tmp_path_factory.mktemp("sweep"), some_stories(tmp_path_factory.mktemp("text"))
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids = secateur.evaluation_windows(data, tokenizer, length=64, windows=10).input_ids
    calibration, held_out = ids[:4], ids[4:]
    settings = {"samples": 4, "seed": 0, "data": [data], "methods": {}, "digests": {}, "agreement": False}
    found = {"model": str(STORIES), "settings": settings, "cells": []}
    found["dense"] = {data: secateur.perplexity(STORIES, held_out).to_json()}
    for name, method in (("magnitude", secateur.magnitude()), ("wanda", secateur.wanda())):
        for text, pattern in (
            ("30%", secateur.Unstructured(0.3)), ("50%", secateur.Unstructured(0.5)), ("2:4", secateur.NM(2, 4)),
        ):  # fmt: skip
            out = folder / "cells" / f"{name}-{text[:-1]}".replace(":", "of")
            secateur.prune(STORIES, method=method, pattern=pattern, output=out, calibration=calibration)
            figure = secateur.perplexity(out, held_out).to_json()
            cell = {"method": name, "pattern": text, "sparsity": pattern.sparsity, "seconds": 1.5}
            cell["folder"] = f"cells/{out.name}"
            found["cells"].append(cell | {"status": "done", "figures": {data: figure}})
    failed = {"method": "wanda", "pattern": "70%", "sparsity": 0.7, "folder": "cells/wanda-70"}
    found["cells"].append(failed | {"status": "failed", "figures": {}})
    (folder / "sweep.json").write_text(json.dumps(found))
    return folder


def test_a_sweep(sweep):
    page = build_sweep(sweep)
    content = json.loads((sweep / "sweep.json").read_text())
    ((text, dense),) = content["dense"].items()
    figures = {(c["method"], c["pattern"]): c["figures"].get(text) for c in content["cells"]}

    def shown(method, pattern):
        figure = figures.get((method, pattern))
        return "" if figure is None else f"{figure['perplexity']:.3f} ± {figure['perplexity_error']:.3f}"

    assert cells(page, "grid-1") == [
        [method, *(shown(method, pattern) for pattern in ("30%", "50%", "2:4", "70%"))]
        for method in ("magnitude", "wanda")
    ]
    curve = cells(page, "perplexity-1-numbers")
    assert [row[0] for row in curve] == ["30", "50"]  # N:M is no point of the curve
    assert curve[1][1:] == [f"{figures[m, '50%']['perplexity']:.4g}" for m in ("magnitude", "wanda")]
    words = tree(page).xpath("string(//header)")
    assert "6 of 7 prunings" in words
    assert "1 runs are not done: wanda 70% (failed)" in words
    assert f"{dense['perplexity']:.3f}" in words
    assert (page.parent / "perplexity-1.svg").exists()
    assert len(cells(page, "every-run")) == 7


def test_a_damaged_sweep(tmp_path):
    cell = '{"method": "wanda", "pattern": "50%", "status": "done", "sparsity": 0.5, "seconds": 1, "figures": 3}'
    for content in (
        *("no JSON", "{}", "[]", '{"model": "m", "dense": {}, "cells": [{"method": "wanda"}]}'),
        f'{{"model": "m", "dense": {{}}, "cells": [{cell}]}}',
        "[" * 100_000,
    ):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(
            CheckpointError, match=r"sweep.json\S*: (damaged|not JSON|lists and).* Remove \S+ to start again"
        ):
            build_sweep(tmp_path)
    assert not (tmp_path / "report").exists()
