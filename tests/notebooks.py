"""Execute the notebooks of the documentation. ``python -m tests.notebooks`` writes them with their new outputs."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

FOLDER = ROOT / "docs/notebooks"
# the picture of docs/library.md is the first that this one shows
PICTURE_OF, PICTURE = "convert_and_train", ROOT / "docs/routing.png"


def executed(notebook: Any, folder: Path) -> Any:
    """Execute a notebook as a reader of the checkout would, offline and in one thread; an error in a cell is raised.

    Args:
        notebook: the notebook, changed in place.
        folder: the working directory of its kernel.
    """
    settings = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with mock.patch.dict(os.environ, settings):
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if "outputs" in cell:  # warnings of libraries name the machine's paths
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


def shown(notebook: Any) -> list[list[str]]:
    """Return the outputs of each code cell as text; ``picture`` for a picture."""
    return [
        [
            output.text if output.output_type == "stream" else _text(output.data)
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _text(data: Any) -> str:
    return "picture" if "image/png" in data else str(data["text/plain"])


def without_numbers(text: str) -> str:
    """Replace all numbers and the space around them, because trained numbers differ between machines."""
    return re.sub(r"\s*[-+]?\d+(\.\d+)?\s*", " # ", text)


def pictures(notebook: Any) -> list[bytes]:
    """Return the pictures among the outputs of a notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [
        base64.b64decode(output.data["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        made = executed(nbformat.read(path, as_version=4), FOLDER)
        nbformat.write(made, path)
        if path.stem == PICTURE_OF:
            PICTURE.write_bytes(pictures(made)[0])
