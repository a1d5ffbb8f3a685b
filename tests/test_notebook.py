"""The notebook of the documentation runs from top to bottom as it stands there."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_the_quick_start(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT / ".types")})
    assert (tmp_path / "exports/quickstart/model.safetensors").is_file()
    shown = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result")
    ]
    assert any("<caption>Pareto front of" in data.get("text/html", "") for data in shown)
    assert any("image/png" in data for data in shown), "the plot is shown"
