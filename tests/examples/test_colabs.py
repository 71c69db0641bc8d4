import importlib.util
import pathlib
import re
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
    # As it was run, from its first cell to its last, without an error or a warning.
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    shown = [output for cell in code for output in cell.outputs]
    assert not [
        x for x in shown if x.output_type == "error" or x.get("name") == "stderr"
    ]
    assert any("image/png" in x.get("data", {}) for x in shown)
    assert not re.search(r"/(home|root|tmp|work|usr)/", str(shown))


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("where", ["checkout", "elsewhere", "filled in", "installed"])
def test_notebook_installs_what_is_missing(name, where, monkeypatch, tmp_path):
    """As it is, from the checkout that it is in or from the index; or as filled in."""
    cells = read(COLABS / f"{name}.ipynb").cells
    install = next(cell.source for cell in cells if cell.cell_type == "code")
    assert "assert" not in install and "OWNER" not in install
    assert install.count('SOURCE = ""') == 1
    if where == "filled in":
        install = install.replace('SOURCE = ""', 'SOURCE = "git+https://a.b/c"')
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
    assert command[1:4] == ["-m", "pip", "install"]
    extras = r"\[plots(,privacy)?\]"
    source = re.escape(str(ROOT)) if where == "checkout" else "clipfx-jax"
    filled_in = r" @ git\+https://a\.b/c" if where == "filled in" else ""
    assert re.fullmatch(f"{source}{extras}{filled_in}", command[5])
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
