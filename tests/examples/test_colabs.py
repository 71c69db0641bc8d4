import pathlib

import jupytext
import nbclient
import nbformat
import pytest

COLABS = pathlib.Path(__file__).parents[2] / "colabs"
NOTEBOOKS = sorted(path.stem for path in COLABS.glob("*.py"))


def read(path):
    return jupytext.read(path) if path.suffix == ".py" else nbformat.read(path, 4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_agrees_with_its_text(name):
    text, notebook = (read(COLABS / f"{name}{suffix}") for suffix in (".py", ".ipynb"))
    cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
    assert cells(text) == cells(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_top_to_bottom(name, monkeypatch):
    monkeypatch.setenv("CLIPFX_QUICK", "1")
    notebook = read(COLABS / f"{name}.ipynb")
    before = sorted(COLABS.iterdir())
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(COLABS)}},
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert sorted(COLABS.iterdir()) == before
