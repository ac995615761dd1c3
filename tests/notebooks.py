"""Execute the notebooks of the documentation.

``python -m tests.notebooks`` writes them with their new outputs.
"""

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
# docs/library.md shows the first picture of this notebook
NOTEBOOK_OF_PICTURE = "convert_and_train"
PICTURE = ROOT / "docs/routing.png"


def executed(notebook: Any, folder: Path) -> Any:
    """Execute a notebook as a reader of the checkout would, offline and in one thread.

    Args:
        notebook: The notebook, changed in place.
        folder: The working directory of its kernel.

    Raises:
        CellExecutionError: A cell fails.
    """
    settings = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with mock.patch.dict(os.environ, settings):
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            # on a busy machine, printed text may arrive in several pieces
            coalesce_streams=True,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()

    # remove what differs between machines and calls
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if "outputs" in cell:
            # warnings of libraries name the machine's paths
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    return notebook


def shown(notebook: Any) -> list[list[str]]:
    """Return the outputs of each code cell as text; ``picture`` for a picture."""
    texts_of_cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts_of_cells.append([_text(output) for output in cell.outputs])
    return texts_of_cells


def _text(output: Any) -> str:
    """Return one output of a cell as text."""
    if output.output_type == "stream":
        return str(output.text)
    if "image/png" in output.data:
        return "picture"
    return str(output.data["text/plain"])


def without_numbers(text: str) -> str:
    """Replace all numbers and the blanks around them by ``#``.

    Trained numbers differ between machines.
    """
    return re.sub(r"\s*[-+]?\d+(\.\d+)?\s*", " # ", text)


def pictures(notebook: Any) -> list[bytes]:
    """Return the pictures among the outputs of a notebook."""
    found = []
    for cell in notebook.cells:
        # only code cells have outputs, and printed outputs have no data
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                found.append(base64.b64decode(data["image/png"]))
    return found


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        made = executed(nbformat.read(path, as_version=4), FOLDER)
        nbformat.write(made, path)
        if path.stem == NOTEBOOK_OF_PICTURE:
            PICTURE.write_bytes(pictures(made)[0])
