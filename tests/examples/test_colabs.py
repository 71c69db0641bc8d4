import importlib.util
import pathlib
import subprocess

import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
COLABS = ROOT / "colabs"
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
@pytest.mark.parametrize("where", ["checkout", "elsewhere", "installed"])
def test_notebook_installs_what_is_missing(name, where, monkeypatch, tmp_path):
    """As it is, from the checkout that it is in or from the index."""
    cells = read(COLABS / f"{name}.ipynb").cells
    install = next(cell.source for cell in cells if cell.cell_type == "code")
    assert "assert" not in install and "OWNER" not in install
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: commands.append((a[0], k)))
    if where != "installed":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(COLABS if where == "checkout" else tmp_path)
    exec(install, {})
    if where == "installed":
        assert not commands
        return
    ((command, options),) = commands
    source = ROOT if where == "checkout" else "clipfx-jax"
    assert command[1:4] == ["-m", "pip", "install"] and f"{source}[plots]" in command
    assert options == {"check": True}


@pytest.mark.full
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
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    assert sorted(COLABS.iterdir()) == before
