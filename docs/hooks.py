"""MkDocs hooks that build one site from Markdown files in the whole repository."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# from paths in the repository to paths in the site
BENCHMARKS = {
    f"benchmarks/{path.parent.name}/README.md": f"benchmarks/{path.parent.name}.md"
    for path in sorted(ROOT.glob("benchmarks/*/README.md"))
}
_NOTEBOOKS = {
    f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md"
    for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))
}
# all pages that are not Markdown in docs/
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "config/README.md": "configuration.md",
    **BENCHMARKS,
    **_NOTEBOOKS,
}
_PATH_IN_REPOSITORY = {place: path for path, place in OUTSIDE.items()}
# a link [text](target#anchor) within the repository, not an image
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# a role of Sphinx
_ROLE = re.compile(r":(?:class|func|meth|mod):`([^`]+)`")
# lines of a Python session, up to a blank line
_EXAMPLE = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the benchmarks in the navigation."""
    for section in config.nav or []:
        if "Results" in section:
            pages = section["Results"]
            # mkdocs.yml ends the section with an empty list of benchmarks
            pages[-1]["Benchmarks"] = list(BENCHMARKS.values())
            return config
    raise ValueError("mkdocs.yml has no section 'Results' in its navigation")


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
    notebook = json.loads(path.read_text(encoding="utf-8"))
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            blocks.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            blocks.append(_output_block(output))
    return "\n\n".join(blocks)


def _output_block(output: dict[str, Any]) -> str:
    """Write an output of a notebook's cell as Markdown: an image, else HTML, else text."""
    # printed text is not in "data"
    forms = output.get("data", {"text/plain": output.get("text", ())})
    if "image/png" in forms:
        return f"![output](data:image/png;base64,{_content(forms['image/png'])})"
    if "text/html" in forms:
        return _content(forms["text/html"])
    return f"```text\n{_content(forms['text/plain'])}\n```"


def _content(lines: Iterable[str]) -> str:
    """Join the lines of an output, which have their line breaks."""
    return "".join(lines).rstrip()


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Convert links between files of the repository to links of the site."""
    page_in_site = page.file.src_uri
    folder_in_site = posixpath.dirname(page_in_site) or "."
    page_in_repository = _PATH_IN_REPOSITORY.get(page_in_site, f"docs/{page_in_site}")
    folder_in_repository = posixpath.dirname(page_in_repository)

    def converted_link(found: re.Match[str]) -> str:
        text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(folder_in_repository, target))
        # a page of the site
        place = OUTSIDE.get(path, path.removeprefix("docs/"))
        if place != path:
            return f"[{text}]({posixpath.relpath(place, folder_in_site)}{anchor})"
        # a wrong link stays, so that MkDocs reports it
        if not (ROOT / path).exists():
            return found[0]
        # another file, which only the repository has
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"

    return _LINK.sub(converted_link, markdown)


class Docstrings(griffe.Extension):
    """An extension that makes Markdown of docstrings and shortens defaults.

    Names in roles of Sphinx and examples become code. Defaults lose their bounds.
    """

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Show ``_number(0.0, at_least=0.0)``, a field with bounds, as its default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_number":
            attr.value = None
            for argument in value.arguments:
                if not isinstance(argument, griffe.ExprKeyword):
                    attr.value = argument
                    break

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Make Markdown of one docstring."""
        if obj.docstring:
            without_roles = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", without_roles)
