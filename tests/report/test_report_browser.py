"""Reports in Chromium: nothing fails, nothing is fetched, every control works, and everybody can use it."""

from __future__ import annotations

import base64
import io
import shutil
import time

import numpy as np
import pytest
from lxml import etree
from PIL import Image
from test_report import stored

import secateur
import tiny
from secateur.record.manifest import read_manifest
from secateur.report.checkpoint_page import build
from secateur.report.sweep_page import build_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

LIGHT, DARK = (np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in pair]) for pair in (
    ("#f1e9d6", "#123c34"), ("#1c2426", "#a9dccb"),
))  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    tiny.save("llama", folder / "source")
    secateur.prune(
        folder / "source",
        method=secateur.wanda(),
        pattern=secateur.Unstructured(0.4, "matrix"),
        calibration=tiny.tokens(),
        output=folder / "out",
    )
    return folder / "out"


@pytest.fixture(scope="module")
def page_file(pruned):
    ids = tiny.tokens(4, 24)
    (beside,) = secateur.agreement(pruned.parent / "source", [pruned], ids)
    own = secateur.perplexity(pruned, ids)
    known = [("perplexity", own), ("agreement", beside)]
    return build(pruned, [{"kind": kind, "key": "", "result": result.to_json()} for kind, result in known])


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("sweep")
    figures = [{"perplexity": 20.0 + i, "perplexity_error": 1.0, "window_nats": []} for i in range(4)]
    cells = [
        {
            "method": m,
            "pattern": f"{s}%",
            "sparsity": s / 100,
            "seconds": 1,
            "folder": f"cells/{m}-{s}",
            "status": "done",
            "figures": {"c4": figures[i]},
        }
        for i, (m, s) in enumerate((m, s) for m in ("wanda", "gblm") for s in (50, 60))
    ]
    settings = {"seed": 0, "data": ["c4"], "methods": {}, "digests": {}, "agreement": False}
    dense = {"c4": {"perplexity": 10.0, "window_nats": [], "windows": 8, "length": 64}}
    content = {"model": "m", "dense": dense, "settings": settings, "cells": cells}
    (folder / "sweep.json").write_text(json.dumps(content))
    return build_sweep(folder)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture
def show(browser):
    """`show(file, ...)`: the file in a page of its own; at the end nothing may have failed or been fetched."""
    opened, faults, requests = [], [], []

    def run(file, width=1280, scheme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        page = context.new_page()
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        if page.locator("#picker").count():
            page.wait_for_selector("#mask[data-matrix]")
        opened.append((context, file.as_uri()))
        return page

    yield run
    for context, _ in opened:
        context.close()
    assert faults == []
    fetched = [url for url in requests if not url.startswith(("data:", "blob:"))]
    assert fetched == [uri for _, uri in opened]


def shown(page):
    return page.locator("#mask").get_attribute("data-matrix")


def wait_for(page, name):
    page.wait_for_selector(f'#mask[data-matrix="{name}"]')


def pixels(page):
    """The picture that is shown, one pixel a cell."""
    url = page.locator("#picture image").get_attribute("href")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")).astype(int)


def check_picture(page, pruned, colours):
    mask = stored(pruned, read_manifest(pruned).matrices[shown(page)])
    assert (pixels(page) == colours[mask.astype(int)]).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_is_the_mask(show, page_file, pruned, scheme):
    page = show(page_file, scheme=scheme)
    check_picture(page, pruned, LIGHT if scheme == "light" else DARK)


def test_picking_a_matrix(show, page_file, pruned):
    page, entries = show(page_file), read_manifest(pruned).matrices
    names = list(entries)
    assert shown(page) == names[0]
    seen = set()

    def state():
        parts = ("#picture .line >> nth=0", "#picture .line >> nth=1")
        profiles = [page.locator(part).get_attribute("d") for part in parts]
        return (
            *profiles,
            page.inner_text("#mask-facts"),
            page.inner_html("#values-drawn"),
            page.inner_text("#mask-caption"),
        )

    for action, expected in (
        (lambda: page.select_option("#matrix", "5"), names[5]),
        (lambda: page.click("#next"), names[6]),
        (lambda: page.click("#previous"), names[5]),
    ):
        action()
        wait_for(page, expected)
        check_picture(page, pruned, LIGHT)
        seen.add(state())
        assert expected in page.inner_text("#mask-caption")
        assert page.locator("#matrix").input_value() == str(names.index(expected))
        assert f"{100 * entries[expected]['sparsity']:.2f}" in page.inner_text("#mask-facts")
    assert len(seen) == 2  # every part differs between two matrices, and is the same again
    assert all(first != second for first, second in zip(*seen, strict=True))
    page.select_option("#matrix", "0")
    wait_for(page, names[0])
    page.click("#previous")
    wait_for(page, names[-1])


def test_picking_by_keyboard_and_from_the_table(show, page_file, pruned):
    page, names = show(page_file), list(read_manifest(pruned).matrices)
    page.focus("#next")
    page.keyboard.press("Enter")
    wait_for(page, names[1])
    page.focus("#matrix")
    page.keyboard.press("ArrowDown")
    wait_for(page, names[2])
    button = page.locator("#matrices tbody button").nth(9)
    button.focus()
    page.keyboard.press("Enter")
    wait_for(page, names[9])
    assert page.evaluate("document.activeElement.id") == "matrix"


def test_profiles_are_the_means_of_the_mask(show, page_file, pruned):
    page = show(page_file)
    mask = stored(pruned, read_manifest(pruned).matrices[shown(page)])
    image = {key: float(page.locator("#picture image").get_attribute(key)) for key in ("x", "y", "width", "height")}
    for place, sparsity in ((0, 1 - mask.mean(axis=0)), (1, 1 - mask.mean(axis=1))):
        path = page.locator("#picture .line").nth(place).get_attribute("d")
        points = np.array(path.strip("M").replace("L", " ").split(), float).reshape(-1, 2)[::2]
        heights = points[:, 1 - place]
        # Linear in sparsity, and along the side of the picture.
        fit = np.polyfit(sparsity, heights, 1)
        assert np.abs(np.polyval(fit, sparsity) - heights).max() < 0.02
        assert fit[0] * (-1 if place == 0 else 1) > 20
        along = "x" if place == 0 else "y"
        size = image["width" if place == 0 else "height"]
        assert points[:, place] == pytest.approx(
            image[along] + np.arange(len(sparsity)) / len(sparsity) * size, abs=0.02
        )


def test_reading_cells(show, page_file, pruned):
    page = show(page_file)
    mask = stored(pruned, read_manifest(pruned).matrices[shown(page)])
    page.focus("#picture")
    for key, (row, column) in (
        ("ArrowDown", (0, 0)),
        ("ArrowDown", (1, 0)),
        ("ArrowRight", (1, 1)),
        ("ArrowUp", (0, 1)),
    ):
        page.keyboard.press(key)
        word = "kept" if mask[row, column] else "pruned"
        assert page.inner_text("#reading") == f"row {row + 1}, column {column + 1}: {word}"
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.inner_text("#reading").startswith("row 1, column 1:")
    page.locator("#picture").scroll_into_view_if_needed()
    box = page.locator("#picture image").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] - 1)
    assert page.inner_text("#reading").startswith(f"row {mask.shape[0]}, column {mask.shape[1]}:")


def test_departure_from_chance(show, page_file):
    page = show(page_file)
    before = pixels(page)
    page.check("input[value=chance]")
    assert (pixels(page) != before).any()
    assert "fewer kept than chance" in page.inner_text("#scale")
    page.focus("input[value=chance]")
    page.keyboard.press("ArrowLeft")
    assert (pixels(page) == before).all()


def column(page, table, place):
    return page.eval_on_selector_all(
        f"#{table} tbody tr",
        f"rows => rows.map(row => row.cells[{place}].dataset.value ?? row.cells[{place}].textContent)",
    )


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_sorting(show, page_file, by):
    page = show(page_file)
    for place in (3, 0):
        heading = page.locator(f"#matrices thead th >> nth={place}")
        original = column(page, "matrices", place)
        for direction in ("ascending", "descending"):
            if by == "mouse":
                heading.locator("button").click()
            else:
                heading.locator("button").focus()
                page.keyboard.press("Space")
            assert heading.get_attribute("aria-sort") == direction
            assert page.locator("#matrices th[aria-sort]").count() == 1
            found = column(page, "matrices", place)
            key = float if place == 3 else str
            assert found == sorted(original, key=key, reverse=direction == "descending")


def test_a_table_with_empty_cells_sorts_them_last(show, sweep_file):
    import json

    folder = sweep_file.parents[1]
    content = json.loads((folder / "sweep.json").read_text())
    content["cells"][1] |= {"status": "failed", "figures": {}}
    (folder / "sweep.json").write_text(json.dumps(content))
    page = show(build_sweep(folder))
    heading = page.locator("#grid-1 thead th >> nth=2 >> button")
    for _ in range(2):
        heading.click()
        assert column(page, "grid-1", 2)[-1] == ""


def test_saving_the_picture(show, page_file, pruned, tmp_path):
    page = show(page_file)
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == f"{shown(page)}.svg"
    download.value.save_as(tmp_path / "saved.svg")
    root = etree.parse(tmp_path / "saved.svg").getroot()
    (image,) = root.xpath("//*[local-name()='image']/@href")
    assert image == page.locator("#picture image").get_attribute("href")
    assert "var(" not in (tmp_path / "saved.svg").read_text()
    assert root.xpath("//*[@class='line']/@style")[0].count("rgb(")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("kind", ["checkpoint", "sweep"])
def test_the_page_never_scrolls_sideways(show, page_file, sweep_file, width, kind):
    page = show(page_file if kind == "checkpoint" else sweep_file, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".narrow" if width < 700 else ".wide").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["checkpoint", "sweep"])
def test_axe_finds_nothing_serious(show, page_file, sweep_file, scheme, width, kind):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = show(page_file if kind == "checkpoint" else sweep_file, width=width, scheme=scheme, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["target"]) for one in found if one["impact"] in ("serious", "critical")] == []


def test_focus_can_be_seen_on_every_control(show, page_file):
    page = show(page_file)
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "() => { const s = getComputedStyle(document.activeElement);"
            " return [document.activeElement.id || document.activeElement.tagName, s.outlineStyle, s.outlineWidth]; }"
        )
        stops.append(style[0])
        assert style[1] != "none", style
        assert style[2] != "0px", style
    assert {"matrix", "previous", "next", "picture", "save"} <= set(stops)


def test_print_is_light_whatever_the_screen(show, page_file, pruned):
    page = show(page_file, scheme="dark")
    check_picture(page, pruned, DARK)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    check_picture(page, pruned, LIGHT)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    check_picture(page, pruned, DARK)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(32, 38, 43)"
    assert len(page.pdf(format="A4")) > 10_000


def test_colours_follow_the_system_while_the_page_is_open(show, page_file, pruned):
    page = show(page_file)
    before = pixels(page).tolist()
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 10  # the page hears of it a little later
    while pixels(page).tolist() == before and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    check_picture(page, pruned, DARK)


def test_without_scripts_the_page_is_still_a_document(show, browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("#matrices tbody tr").count() == 21
    assert page.locator("noscript .warning").is_visible()
    assert not page.locator("#picker").is_visible()
    context.close()


def test_a_script_that_is_not_the_pages_own_does_not_run(browser, page_file, tmp_path):
    altered = tmp_path / "index.html"
    altered.write_text(page_file.read_text().replace("</main>", "<script>window.hacked = true</script></main>"))
    page = browser.new_page()
    page.goto(altered.as_uri())
    page.wait_for_selector("#mask[data-matrix]")
    assert page.evaluate("window.hacked") is None
    page.close()
