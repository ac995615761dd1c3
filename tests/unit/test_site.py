"""Links of the Markdown files lead to something, and the files make a site that needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

import emoe
from tests.conftest import ROOT

TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
# what a browser would fetch by itself: not links to follow, but scripts, styles, images and fonts
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*rel=\"?stylesheet[^>]*(?:https?:)?//|url\((?:https?:)?//"
)


def text_of(file: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(file: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub does."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(text_of(file)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{number}" if number else slug for slug, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", TRACKED.split())
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in (first or second for first, second in LINK.findall(text_of(ROOT / page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.resolve())):
            broken.append(link)
    assert broken == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does (`--quiet` would not count warnings)."""
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site is not built: pip install 'emoe[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder


def test_every_public_name_is_on_a_page_of_the_api(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    assert [name for name in (*emoe.__all__, "TrainerCallback") if f'id="emoe.{name}"' not in pages] == []
    assert ":class:" not in pages
    assert "_number" not in pages
    assert "<p>&gt;&gt;&gt;" not in pages
    assert "<blockquote>" not in pages


def test_it_is_read_without_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 25
    assert [page.name for page in pages if FETCHED.search(page.read_text())] == []
    assert "var __index" in (site / "search/search_index.js").read_text()


def test_files_that_are_no_pages_are_named_but_not_linked(site: Path) -> None:
    page = (site / "benchmarks/glue_ood.html").read_text()
    assert "<code>tasks.yaml</code>" in page
    assert 'href="../glue/tasks.yaml"' not in page
    assert 'href="glue.html#two-selections"' in (site / "benchmarks/glue_lora.html").read_text()
