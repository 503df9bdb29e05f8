"""The report and the comparison in a real browser: nothing loaded, nothing broken, usable by every reader.

Screenshots are kept in ``runs/screenshots`` (or ``$POLCA_SCREENSHOTS``). Without chromium or playwright the
tests are skipped; ``.ci/run`` installs both.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from test_report import MEMBERS, SKILLS, TOKENS, make_run

from experiments.discover.records import (
    ClusterFile,
    ClusterRow,
    DiscoverResult,
    SignatureRecord,
    cluster_file,
    discovery_file,
)
from experiments.report.compare import compared, read_pair, write_comparison
from experiments.report.page import write_report
from polca_edit.artifacts import save_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the PATH; apt-get install chromium")

SHOTS = Path(os.environ.get("POLCA_SCREENSHOTS", "runs/screenshots"))
LOOKED_AT = {("report", "1280", "light"), ("report", "390", "dark"), ("compare", "390", "light")}
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> tuple[Path, Path]:
    """The report of a run with clusters of both kinds, and its comparison with a run of another config."""
    path = tmp_path_factory.mktemp("browser") / "first"
    path.mkdir()
    directory = make_run(path, {"hessian": True, "trajectory": True})
    row = ClusterRow("hessian", 0, 10, "10s digit", {"10s": 0.75}, {"10s": 0.51}, {"10s": 0.607})
    found = DiscoverResult((row,), (), (), {}, (), (0.1, 0.01), {"hessian": 0.2}, {}, False, 1.0)
    save_record(discovery_file(path), found)
    save_record(cluster_file(path, "hessian"), ClusterFile("hessian", (row,), 0.2, 20, ((20, 0.9),)))
    labels = torch.where(torch.as_tensor(MEMBERS[0, 0]), 0, -1)
    signed = SignatureRecord(
        torch.ones(2, TOKENS), ("hessian",) * 2, labels, labels.clone(), labels.clone(), ()
    )
    save_record(path / "discover" / "signatures-hessian.safetensors", signed)
    report = write_report(directory, lambda _: None)
    second = path.with_name("second")
    second.mkdir()
    make_run(second, {"hessian": True})
    (second / "config.yaml").write_text("breakthrough_delta: 30\n")
    pair = read_pair(path, second)
    return report, write_comparison(*pair, compared(*pair), path.with_name("compare.html"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, pages):
    """Opens a page; at the end nothing may have been said on the console, and nothing asked for."""
    contexts, said, asked = [], [], []

    def open_page(size=WIDE, scheme="light", page=pages[0]):
        context = browser.new_context(viewport=size, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        made = context.new_page()
        made.on("console", lambda message: said.append(message.text))
        made.on("pageerror", lambda error: said.append(str(error)))
        made.on("request", lambda request: asked.append(request.url))
        made.goto(page.as_uri())
        return made

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []


def shot(page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(SHOTS / f"{name}.png"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "size"), [("1280", WIDE), ("390", PHONE)])
def test_it_fits_the_screen_and_axe_finds_nothing(opened, pages, name, size, scheme) -> None:
    for kind, path in zip(("report", "compare"), pages, strict=True):
        page = opened(size, scheme, path)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], "nothing but tables and figures may scroll sideways"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        assert dark == (scheme == "dark")
        shot(page, f"{kind}-{name}-{scheme}")
        # The rules are slow on large pages: each page, width and theme is looked at once.
        if (kind, name, scheme) not in LOOKED_AT:
            continue
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        found = axe.Axe().run(page)
        told = [
            f"{v['id']}: {node['html'][:120]}" for v in found.response["violations"] for node in v["nodes"]
        ]
        assert told == []


def test_axe_would_say_no(opened) -> None:
    page = opened()
    bad = '<div id="bad"><img src="data:,"><button></button></div>'
    page.evaluate("bad => document.body.insertAdjacentHTML('beforeend', bad)", bad)
    found = {violation["id"] for violation in axe.Axe().run(page, context="#bad").response["violations"]}
    assert {"image-alt", "button-name"} <= found


def test_the_first_screen_answers(opened) -> None:
    page = opened()
    table = page.locator("table.first")
    assert table.bounding_box()["y"] < WIDE["height"]
    assert table.locator("tbody tr").count() == len(SKILLS)
    heads = table.locator("thead th").all_text_contents()
    assert heads[:4] == ["skill", "taken away by", "damage (nats)", "of headroom"]
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted > 0
    # The map and the curves begin on the same screen.
    assert page.locator("#fig-damage-overview").bounding_box()["y"] < WIDE["height"]
    assert "null" not in heads, "nothing was tested here, an empty column says nothing"


def test_the_first_table_lies_beside_nothing(opened) -> None:
    for size in (WIDE, PHONE):
        page = opened(size)
        bar = page.locator(".tools:has(+ .scroll .first)").bounding_box()
        table = page.locator("table.first").bounding_box()
        title = page.evaluate(
            "(() => { const r = document.createRange(), h = document.querySelector('h2.plain');"
            " r.selectNodeContents(h); const b = r.getBoundingClientRect(); return [b.right, b.bottom]; })()"
        )
        assert bar["y"] + bar["height"] <= table["y"] + 1
        assert bar["x"] >= title[0] or bar["y"] >= title[1]
        assert table["width"] > 0.9 * page.locator("main").bounding_box()["width"]


def test_a_long_list_of_clusters_begins_with_twelve(opened, pages) -> None:
    text = pages[0].read_text()
    start = text.index("<tbody>", text.index('class="sortable many"')) + len("<tbody>")
    end = text.index("</tbody>", start)
    long = pages[0].with_name("long.html")
    long.write_text(text[:end] + 2 * text[start:end] + text[end:])
    page = opened(page=long)
    table = page.locator("table.many").first
    rows, bar = (
        table.locator("tbody tr"),
        page.locator(".tools", has=page.locator("button[aria-expanded]")).first,
    )
    assert rows.count() == 21
    assert rows.locator("visible=true").count() == 12
    assert bar.locator(".told").text_content() == "showing 12 of 21"
    bar.locator("button[aria-expanded]").click()
    assert rows.locator("visible=true").count() == 21
    assert bar.locator(".told").text_content() == "showing 21 of 21"
    bar.locator("button[aria-expanded]").click()
    bar.locator("input").fill("interventional")
    assert rows.locator("visible=true").count() == 3
    bar.locator("input").fill("")
    table.locator("thead th button").last.click()
    assert rows.locator("visible=true").count() == 12


def test_sorting_by_mouse_and_by_keyboard(opened) -> None:
    page = opened()
    table = page.locator("#added-1 + div table.sortable", has_text="found by").first
    head = table.locator("thead th", has_text="tokens").last

    def sizes() -> list[int]:
        return [int(row.locator("td").nth(3).text_content()) for row in table.locator("tbody tr").all()]

    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert sizes() == sorted(sizes(), reverse=True)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert sizes() == sorted(sizes())
    # A table whose order did not change would pass both; the sizes differ.
    assert len(set(sizes())) > 1


def test_filtering_says_how_many_are_shown(opened) -> None:
    page = opened()
    table = page.locator("#added-1 + div table.sortable", has_text="found by").first
    bar = page.locator("#added-1 + div .tools", has=page.locator("input")).first
    rows = table.locator("tbody tr")
    assert rows.count() == 7
    bar.locator("input").fill("interventional")
    assert rows.locator("visible=true").count() == 1
    assert bar.locator(".told").text_content() == "showing 1 of 7"
    bar.locator("input").fill("no such cluster")
    assert rows.locator("visible=true").count() == 0
    bar.locator("input").fill("")
    assert rows.locator("visible=true").count() == 7


def test_a_cluster_opens_its_tokens(opened) -> None:
    page = opened()
    for place, damage in (("hessian v0·c0", "+0.300"), ("hessian i0", "+1.000")):
        button = page.locator("button.open", has_text=place).first
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-expanded") == "true"
        inside = page.locator("tr.opened").last
        assert inside.locator("td.context").count() == 10
        assert inside.locator("mark").first.is_visible()
        token = inside.locator("tr", has_text="<b>3&3").first
        assert token.locator("td").last.text_content() == damage
        button.click()
        assert page.locator("tr.opened").count() == 0


def test_hovering_tells_the_numbers(opened) -> None:
    page = opened()
    canvas = page.locator("#fig-damage-overview .canvas")
    canvas.scroll_into_view_if_needed()
    cell = canvas.locator("svg text", has_text="5.70").first  # vector 2 on the 10s
    value = cell.text_content()
    box = cell.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    told = page.locator("#tip").text_content()
    assert " × " in told
    assert float(told.split(": ")[1]) == pytest.approx(float(value), abs=0.006)
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_arrow_keys_read_a_curve(opened) -> None:
    page = opened()
    canvas = page.locator("#fig-training .canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator("#tip").text_content()
    assert "all tokens: 6" in first
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    last = page.locator("#tip").text_content()
    assert "optimiser step 100" in last
    assert "all tokens: 1" in last
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_figures_are_saved_as_svg_and_csv(opened) -> None:
    page = opened()
    figure = page.locator("#fig-training")
    with page.expect_download() as picture:
        figure.get_by_role("button", name="SVG of figure").click()
    text = Path(picture.value.path()).read_text()
    assert picture.value.suggested_filename == "training.svg"
    assert text.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in text
    with page.expect_download() as data:
        figure.get_by_role("button", name="CSV of figure").click()
    lines = Path(data.value.path()).read_text().splitlines()
    assert lines[0] == "panel,series,x,value"
    assert any(line.endswith("all tokens,100,1") for line in lines)


def test_print_shows_no_controls(opened) -> None:
    page = opened()
    page.emulate_media(media="print")
    assert page.locator(".tools").first.is_hidden()
    assert page.locator("table.first").is_visible()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.pdf(path=str(SHOTS / "report.pdf"), format="A4")
    assert (SHOTS / "report.pdf").read_bytes().startswith(b"%PDF")
