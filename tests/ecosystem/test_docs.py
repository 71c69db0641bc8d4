"""Pages run, their first block as pasted or all of them, and say what is so."""

import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import xla
from jax.sharding import PartitionSpec as P
from tiers import in_tiers

import clipfx
from benchmarks import numerics

ROOT = pathlib.Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
SHARDING = ROOT / "docs" / "sharding.md"
MANY_PROCESSES = "jax.distributed.initialize"  # see test_multiprocess
METHODS = [x for x in clipfx.__all__ if inspect.isfunction(getattr(clipfx, x))]
PAGES = {path.stem: path for path in (ROOT / "README.md", ROOT / "BUILD.md", *DOCS)}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)


# Adapters are for libraries that are not installed here, see tests/zoo/test_loops.py;
# the index has the README's block.
APART = ("BUILD", "adapters", "index")
CODE = {k: page for k, page in PAGES.items() if blocks(page) and k not in APART}
WHOLE = {"quickstart", "replace"}  # pages that are one program


@pytest.mark.parametrize("page", in_tiers(CODE, {"README"}))
def test_first_block_runs_as_pasted(page, tmp_path):
    """In a fresh interpreter, with the devices that the block itself asks for."""
    first = "\n".join(blocks(page)[: None if page.stem in WHOLE else 1])
    if "jax_privacy" in first and not importlib.util.find_spec("jax_privacy"):
        pytest.skip("jax_privacy is not installed")
    done = subprocess.run(
        [sys.executable, "-c", first],
        cwd=tmp_path,
        env={**xla.own_devices(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print(" not in first


def anchors(page):
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for link, anchor in links:
        assert (page.parent / link).exists(), link
        if anchor:
            assert anchor in anchors(page.parent / link if link else page), anchor


def test_site_lists_every_page_and_every_public_name():
    api = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    modules = re.findall(r"automodule:: clipfx\.(\w+)", api)
    listed = re.findall(r"auto(?:function|class):: (\w+)", api)
    states = {x for x in clipfx.__all__ if x in clipfx.states.__all__}
    assert {*listed, *modules, *states} == {*clipfx.__all__}
    index = (ROOT / "docs" / "index.md").read_text()
    entries = set(re.findall(r"^(?:[\w ]+<)?([a-z_/]+)>?$", index, re.M))
    pages = {path.stem for path in DOCS} - {"index"}
    notebooks = {f"notebooks/{x.stem}" for x in (ROOT / "colabs").glob("*.ipynb")}
    assert entries == pages | {"api/index"} | notebooks


def test_page_of_the_index_stands_alone():
    """It has the README's first block, and links to nothing that the index lacks."""
    page = ROOT / "DESCRIPTION.md"
    assert blocks(page) == blocks(ROOT / "README.md")[:1] == blocks(PAGES["index"])
    assert not re.search(r"\]\((?!https:)|<img", page.read_text())


TABLE = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (ROOT / "docs" / "numerics.md").read_text().splitlines()
    if line.startswith("| ") and "---" not in line
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in other libraries
@pytest.mark.parametrize("row", in_tiers({row[0]: row for row in TABLE[1:]}, 5))
def test_table_of_numerics_is_what_the_libraries_do(row):
    libraries = dict(zip(TABLE[0][2:], row[2:], strict=True))
    for library in ("clipfx", "Optax", "jax_privacy"):
        if importlib.util.find_spec(library.lower()):
            with jax.numpy_dtype_promotion("standard"):
                cell = numerics.cell(library.lower(), row[0])
            assert cell == libraries[library]


def test_table_of_numerics_is_whole():
    assert [row[0] for row in TABLE[1:]] == list(numerics.INPUTS)


@pytest.mark.parametrize("page", ["README", "choose"])
def test_papers_are_those_of_the_docstrings(page):
    """The choice of a method names every source, the README's table the first."""
    text = PAGES[page].read_text()
    for name in METHODS:
        doc = inspect.getdoc(getattr(clipfx, name))
        links = re.findall(r"<(https://[^>]+)>", doc.split("Reference:")[1])
        for link in links if page == "choose" else links[:1]:
            assert link in text, (name, link)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_sharding_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")  # what the page sets is taken back
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(SHARDING):
            if MANY_PROCESSES not in block:
                exec(compile(block, SHARDING.name, "exec"), names)
    assert len(blocks(SHARDING)) > 10
    # The last: the mean of 32 gradients of ones, of norm 16, each clipped to 1.
    np.testing.assert_allclose(names["mean"]["w"], 1 / 16, rtol=1e-5)
    assert names["mean"]["w"].sharding.spec == P("model")
