"""The notebook begins with the quickstart of the README, holds no outputs, and runs from the first cell to the last."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
QUICKSTART = 4  # code cells


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_begins_with_the_quickstart_of_the_readme():
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Quickstart\n")[2]
    block = section.partition("```python\n")[2].partition("```")[0]
    cells = ["".join(cell["source"]) for cell in code_cells()]
    assert "\n\n".join(cells[:QUICKSTART]) == block.strip()


def test_it_holds_no_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra dev: nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="needs the extra dev: ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(part.get("text", "") for part in cell.outputs) for cell in cells]
    assert "removes 4 of 10 decoder layers" in printed[2] and "pruned: 6 layers" in printed[3]
    assert printed[4].count("layer ") == 10 and "last loss" in printed[5]
    assert "6 layers after 30 steps" in printed[6]
    assert (tmp_path / "smaller-by-trainer" / "gradpruner.json").is_file()
