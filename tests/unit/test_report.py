"""Test the report in a browser, on a phone, by keyboard and in print; and its links to runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from PIL import Image

from benchmarks.__main__ import cli
from benchmarks.harness import base as paths
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.page import duration_text
from benchmarks.harness.report.presentation import with_runs
from benchmarks.harness.report.table import RUNS_COLUMN, Column, Table
from tests import fake_runs
from tests.drawn import undraw
from tests.planned import plan

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SHOWN = ["glue", "modularity"]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="module")
def page_file(shared_here: Path) -> Iterator[Path]:
    """Write the report of two benchmarks of mini, of made-up runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.OVERRIDES, '{"benchmarks": ["glue", "modularity"], "suite": "mini"}')
        if CHROMIUM is None:
            undraw(patch)
        suite = load_suite({"suite": "mini", "benchmarks": SHOWN})
        fake_runs.write_runs(suite.runs)
        fake_runs.collect(suite)
        for name in SHOWN:
            cli(["tables", "--suite", "mini", "--benchmark", name], standalone_mode=False)
        cli(["claims", "--suite", "mini", "--write"], standalone_mode=False)
        file = Path("results/mini/report.html")
        cli(["report", "--suite", "mini", "--output", str(file)], standalone_mode=False)
        yield shared_here / file


def test_each_row_links_to_the_runs_that_it_averages(page_file: Path) -> None:
    text = page_file.read_text()
    rows = pd.read_csv(page_file.parent / "tables/glue_results.csv")
    named = [cell.split() for cell in rows[RUNS_COLUMN]]
    task_of = {run.folder: run.spec["task"]["name"] for run in plan(["glue"], "mini")}
    assert [len(runs) for runs in named] == list(rows["n"])
    for row, runs in zip(rows.itertuples(), named, strict=True):
        assert {task_of[run] for run in runs} == {row.task}
        assert all((page_file.parents[1] / "runs" / run).is_dir() for run in runs)
        assert f'data-runs="{" ".join(runs)}"' in text
    assert 'data-runs-folder="../runs"' in text


def test_links_hold_in_a_page_one_folder_up(page_file: Path) -> None:
    above = page_file.parents[1] / "report.html"
    cli(["report", "--suite", "mini", "--output", str(above)], standalone_mode=False)
    for page, runs in ((page_file, "../runs"), (above, "runs")):
        text = page.read_text()
        targets = set(re.findall(r'href="([^"#]+)"', text))
        assert len(targets) > 40
        assert [target for target in targets if not (page.parent / unescape(target)).exists()] == []
        assert f'data-runs-folder="{runs}"' in text
        assert 'href="#glue"' in text


def test_claims_come_first_and_each_benchmark_has_one_open_table(page_file: Path) -> None:
    text = page_file.read_text()
    assert text.index('id="claims"') < text.index('id="glue"') < text.index('id="costs"')
    glue = text[text.index('<section id="glue">') : text.index('<section id="modularity">')]
    shown = re.sub(r'<details class="item">.*?</table>.*?</details>', "", glue, flags=re.DOTALL)
    assert shown.count("<table") == 1
    assert 'id="glue_results"' in shown
    assert '<a href="paper/figure_4a.png">figure_4a.png</a>' in text
    assert (
        page_file.parent / "paper/figure_5b.png"
    ).exists()  # for the workflow: only the paper has its numbers
    assert ("figure_5b.png" in text, '<figure id="glue_settings"><img' in text) == (False, False)
    assert "<p>Without data in this suite: " in glue
    assert "`" not in re.sub(
        r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL
    )  # code in captions is marked


def test_a_telephone_gets_the_narrow_figure_of_the_claims(
    browser: Browser, page_file: Path
) -> None:
    for width, name in ((390, "claims_narrow"), (1280, "claims")):
        page, _ = opened(browser, page_file, width)
        image = page.locator("#claims picture img")
        size = image.evaluate("(image) => [image.naturalWidth, image.naturalHeight]")
        with Image.open(page_file.parent / f"figures/{name}.png") as written:
            assert tuple(size) == written.size
        assert image.bounding_box()["width"] <= width  # type: ignore[index]


def test_a_telephone_shows_whole_tables_and_readable_figures(
    browser: Browser, page_file: Path
) -> None:
    page, _ = opened(browser, page_file, 390)
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    hidden = "(boxes) => boxes.filter((box) => box.scrollHeight > box.clientHeight + 1).length"
    assert page.locator(".wide").evaluate_all(hidden) == 0
    figure = page.locator("#glue img.readable").first
    name = figure.evaluate("(image) => image.closest('figure').id")
    with Image.open(page_file.parent / f"figures/{name}.png") as written:
        inches = written.width / written.info["dpi"][0]
    assert figure.bounding_box()["width"] == pytest.approx(120 * inches, abs=1)  # type: ignore[index]
    # a word without blanks, such as a commit, is not wider than its cell
    cells = "(cells) => cells.filter((cell) => cell.scrollWidth > cell.clientWidth + 1).length"
    assert page.locator("#environment td").evaluate_all(cells) == 0


@pytest.mark.parametrize("width", [1280, 390])
def test_headings_have_one_line(browser: Browser, page_file: Path, width: int) -> None:
    page, _ = opened(browser, page_file, width)
    heights = "(cells) => cells.map((cell) => cell.getBoundingClientRect().height)"
    assert max(page.locator("#glue_results thead th").evaluate_all(heights)) < 40


def test_costs_are_in_plain_words(page_file: Path) -> None:
    text = page_file.read_text()
    assert "Read next" not in text
    assert (
        "<h2>Full fine-tuning of text classifiers, in and out of domain</h2>\n<p>47 runs, 2 min of computing."
        in text
    )
    assert '<th scope="col">Typical run (s)</th>' in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.4, "59 s"), (59.7, "1 min"), (60, "1 min"), (3_570, "1 h 0 min"), (7_500, "2 h 5 min")],
)
def test_durations_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_runs_of_a_row_are_those_with_its_names() -> None:
    origins = pd.DataFrame(
        {
            "run_id": ["a", "b", "b", "c"],
            "model": "m",
            "method": ["x", "y", "y", "y"],
            "seed": [0, 0, 0, 1],
        }
    )
    frame = pd.DataFrame({"method": ["x", "y", "", "paper"], "seed_title": "", "accuracy": 0.5})
    table = with_runs(
        Table("T", "", {"method": "M"}, [Column("accuracy", "accuracy")], frame), origins, "glue"
    )
    assert list(table.frame[RUNS_COLUMN]) == ["glue/a", "glue/b glue/c", "glue/a glue/b glue/c", ""]
    assert "Runs" not in table.markdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


def opened(
    browser: Browser, file: Path, width: int = 1280, scheme: str = "light"
) -> tuple[Page, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else messages.append(request.url)
        ),
    )
    page.goto(file.as_uri())
    return page, messages


def violations(page: Page) -> list[tuple[str, str]]:
    """Return the rules of accessibility that a page breaks, each with the first element that breaks it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    rules = axe.Axe().run(page).response["violations"]
    return [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in rules]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_are_accessible_and_fit_every_width(
    browser: Browser, page_file: Path, width: int, scheme: str
) -> None:
    small = page_file.with_name(
        "modularity.html"
    )  # with nothing folded: axe takes its time over large tables
    cli(
        ["report", "--suite", "mini", "--benchmark", "modularity", "--output", str(small)],
        standalone_mode=False,
    )
    for file in (page_file, small):
        page, messages = opened(browser, file, width, scheme)
        assert violations(page) == []
        page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert messages == []
    assert violations(page) == []


def test_a_heading_sorts_by_the_number_and_the_keyboard_lists_runs(
    browser: Browser, page_file: Path
) -> None:
    page, _ = opened(browser, page_file)
    heading = page.locator("#glue_results thead button", has_text="ID (%)").first
    values = "[...document.querySelectorAll('#glue_results tbody tr')].map((row) => Number(row.cells[4].dataset.sort))"
    for order in (False, True):
        heading.click()
        shown = page.evaluate(values)
        assert shown == sorted(shown, reverse=order)
        assert len(set(shown)) > 1
    pressed = page.locator("#glue_results tbody button").first
    pressed.focus()
    page.keyboard.press("Enter")
    listed = page.locator("#glue_results tr.runs li")
    assert listed.count() == int(pressed.inner_text())
    href = listed.first.locator("a").first.get_attribute("href")
    assert (page_file.parent / str(href)).exists()
    assert listed.first.locator("code").inner_text().endswith("/metrics.json --config suite=mini")
    assert listed.first.inner_text().startswith(("minilm-tweets-", "minilm-amazon-"))
    page.keyboard.press("Enter")
    assert listed.count() == 0


def test_names_and_folders_of_runs_are_text_and_not_html(browser: Browser, page_file: Path) -> None:
    written = page_file.read_text()
    with_tag = written.replace('": "minilm-tweets-', '": "<b>minilm</b>-tweets-')
    with_quote = with_tag.replace('data-runs-folder="../runs"', 'data-runs-folder="it\'s/runs"')
    assert len({written, with_tag, with_quote}) == 3
    edited = page_file.with_name("edited.html")
    edited.write_text(with_quote)
    page, _ = opened(browser, edited)
    page.locator("#glue_results tbody button").first.click()
    item = page.locator("#glue_results tr.runs li").first
    assert item.inner_text().startswith("<b>minilm</b>-tweets-")
    assert str(item.locator("a").first.get_attribute("href")).startswith("it's/runs/glue/")


def test_a_single_run_is_counted_in_the_singular(page_file: Path) -> None:
    section_file = page_file.parent / "sections/modularity.json"
    written = section_file.read_text()
    section = json.loads(written)
    section["machines"][0]["runs"] = 1
    section_file.write_text(json.dumps(section))
    page = page_file.with_name("single.html")
    cli(
        ["report", "--suite", "mini", "--benchmark", "modularity", "--output", str(page)],
        standalone_mode=False,
    )
    section_file.write_text(written)
    assert "<summary>1 run</summary>" in page.read_text()


def test_a_column_with_thousands_is_sorted_by_number(browser: Browser, page_file: Path) -> None:
    page, _ = opened(browser, page_file)
    # made-up runs take no thousand minutes, so the cells get other numbers
    cells = "[...document.querySelectorAll('#costs tbody tr')].map((row) => row.cells[2])"
    page.evaluate(
        f"{cells}.forEach((cell, i) => (cell.textContent = ['1,234.5', '12.0', '7.0'][i]))"
    )
    page.locator("#costs thead button", has_text="All runs (min)").click()
    assert page.evaluate(f"{cells}.map((cell) => cell.textContent)") == ["7.0", "12.0", "1,234.5"]


@pytest.mark.parametrize("fragment", ["%", "%E0%A4%A", "nowhere"])
def test_a_damaged_link_leaves_the_page_working(
    fragment: str, browser: Browser, page_file: Path
) -> None:
    page, messages = opened(browser, page_file)
    page.goto("about:blank")
    page.goto(f"{page_file.as_uri()}#{fragment}")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert messages == []


def test_a_link_opens_its_folded_table_and_prints_are_white_and_complete(
    browser: Browser, page_file: Path
) -> None:
    page, _ = opened(browser, page_file, scheme="dark")
    assert not page.locator("#glue_tests").is_visible()
    page.evaluate("location.hash = '#glue_tests'")
    page.locator("#glue_tests").wait_for(state="visible")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 29, 31)"
