"""Pages run: their first block as pasted, the page about meshes from top to bottom."""

import importlib.util
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

ROOT = pathlib.Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
SHARDING = ROOT / "docs" / "sharding.md"
MANY_PROCESSES = "jax.distributed.initialize"  # see test_multiprocess
PAGES = {path.stem: path for path in (ROOT / "README.md", ROOT / "BUILD.md", *DOCS)}


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)


CODE = {name: page for name, page in PAGES.items() if blocks(page) and name != "BUILD"}


@pytest.mark.parametrize("page", in_tiers(CODE, {"README"}))
def test_first_block_runs_as_pasted(page, tmp_path):
    """In a fresh interpreter, with the devices that the block itself asks for."""
    first, *_ = blocks(page)
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


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), links


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
