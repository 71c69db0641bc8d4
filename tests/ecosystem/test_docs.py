"""The page about meshes is one program."""

import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "sharding.md"
MANY_PROCESSES = "jax.distributed.initialize"  # see test_multiprocess


@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_sharding_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            if MANY_PROCESSES not in block:
                exec(compile(block, PAGE.name, "exec"), names)
    assert len(blocks) > 10
    # The last: the mean of 32 gradients of ones, of norm 16, each clipped to 1.
    np.testing.assert_allclose(names["mean"]["w"], 1 / 16, rtol=1e-5)
    assert names["mean"]["w"].sharding.spec == P("model")
