"""Test the links of the Markdown files, and the site, which needs no network."""

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

TRACKED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
# scripts, styles, images and fonts that a browser fetches, in contrast to links
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*rel=\"?stylesheet[^>]*(?:https?:)?//|url\((?:https?:)?//"
)


def text_of(file: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub names them."""
    last_of: dict[str, int] = {}
    for heading in HEADING.findall(text_of(file)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        last_of[slug] = last_of.get(slug, -1) + 1
    return {
        f"{slug}-{number}" if number else slug
        for slug, last in last_of.items()
        for number in range(last + 1)
    }


@pytest.mark.parametrize("page", TRACKED.split())
def test_links_have_targets(page: str) -> None:
    broken = []
    for link in (first or second for first, second in LINK.findall(text_of(ROOT / page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (
            anchor and file.suffix == ".md" and anchor not in anchors(file.resolve())
        ):
            broken.append(link)
    assert broken == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does (`--quiet` would not count warnings)."""
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site is not built: pip install 'emoe[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_public_name_is_on_a_page_and_no_page_needs_the_network(site: Path) -> None:
    pages = {page: page.read_text() for page in site.rglob("*.html")}
    api = "".join(text for page, text in pages.items() if page.parent.name == "api")
    assert [name for name in emoe.__all__ if f'id="emoe.{name}"' not in api] == []
    assert [page.name for page, text in pages.items() if FETCHED.search(text)] == []


NAVIGATION = re.compile(
    r'<a href="([\w/]+\.html)" class="md-nav__link[^"]*">\s*<span class="md-ellipsis">\s*(.*?)\s*</span>',
    re.DOTALL,
)
TITLE = re.compile(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", re.DOTALL)


def test_names_in_the_navigation_are_the_titles_of_the_pages(site: Path) -> None:
    names = dict(NAVIGATION.findall((site / "index.html").read_text()))
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert set(names) == pages - {"404.html"}
    titles = {page: TITLE.search((site / page).read_text()) for page in names}
    assert names == {page: title and title[1] for page, title in titles.items()}


def test_notebooks_are_pages(site: Path) -> None:
    page = (site / "notebooks/read_results.html").read_text()
    assert "load_suite" in page
    assert 'src="data:image/png;base64,' in page
    assert not list(site.rglob("*.ipynb"))
