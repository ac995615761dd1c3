"""What MkDocs needs to make one site of Markdown files that also read well where they lie in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# pages that lie outside docs/: from their path in the repository to the one in the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "config/README.md": "configuration.md",
    **{
        f"benchmarks/{path.parent.name}/README.md": f"benchmarks/{path.parent.name}.md"
        for path in sorted(ROOT.glob("benchmarks/*/README.md"))
    },
}
_PATH_IN_REPOSITORY = {place: path for path, place in OUTSIDE.items()}
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")
_EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Make the links of the repository those of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(_PATH_IN_REPOSITORY.get(here, f"docs/{here}"))

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        place = OUTSIDE.get(path, path.removeprefix("docs/"))
        if place != path:
            return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return found[0]  # for MkDocs to complain
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})" if config.repo_url else text

    return _LINK.sub(link, markdown)


class Docstrings(griffe.Extension):
    """Reads docstrings as Markdown, without the roles of Sphinx and with examples as code; and defaults without their bounds."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Show ``_number(0.0, minimum=0.0)``, a field with bounds, as its default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_number":
            attr.value = next((each for each in value.arguments if not isinstance(each, griffe.ExprKeyword)), None)

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change one docstring."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
