"""MkDocs hooks that build one site from Markdown files in the whole repository."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {
    f"benchmarks/{path.parent.name}/README.md": f"benchmarks/{path.parent.name}.md"
    for path in sorted(ROOT.glob("benchmarks/*/README.md"))
}
# pages that are no Markdown in docs/: from their path in the repository to the one in the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "config/README.md": "configuration.md",
    **BENCHMARKS,
    **{
        f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md"
        for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))
    },
}
_PATH_IN_REPOSITORY = {place: path for path, place in OUTSIDE.items()}
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")
_EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the benchmarks in the navigation."""
    (results,) = (entry["Results"] for entry in config.nav or [] if "Results" in entry)
    results[-1]["Benchmarks"] = list(BENCHMARKS.values())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and the notebooks."""
    for path, place in OUTSIDE.items():
        if path.endswith(".ipynb"):
            files.append(File.generated(config, place, content=notebook_page(ROOT / path)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def notebook_page(path: Path) -> str:
    """Write a notebook as Markdown: texts, code and outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", ())})
            kind = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data)
            text = "".join(data[kind]).rstrip()
            forms = {
                "image/png": f"![output](data:image/png;base64,{text})",
                "text/plain": f"```text\n{text}\n```",
            }
            parts.append(forms.get(kind, text))
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Convert repository links to site links."""
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
        return (
            f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
            if config.repo_url
            else text
        )

    return _LINK.sub(link, markdown)


class Docstrings(griffe.Extension):
    """Read docstrings as Markdown, without Sphinx's roles and with examples as code; show defaults without their bounds."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Show ``_number(0.0, at_least=0.0)``, a field with bounds, as its default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_number":
            attr.value = next(
                (each for each in value.arguments if not isinstance(each, griffe.ExprKeyword)), None
            )

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Edit one docstring."""
        if obj.docstring:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", text)
