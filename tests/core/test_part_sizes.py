"""The largest of many sizes, and how many of them are too large."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import METHODS
from trees import assert_same, enable_x64, sample

from clipfx._core import reductions
from clipfx._core.part_sizes import in_one_pass, in_two_passes


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (40, 33), (3, 2, 5)])
def test_one_pass_finds_what_two_do(shape, dtype):
    """Of which a process with one CPU device takes the one."""
    rng = np.random.default_rng(0)
    with enable_x64(dtype == "float64"):
        x = np.abs(rng.normal(size=shape)).astype(dtype)
        sizes = [x, np.zeros(2, "float32"), x[None]]
        layout = reductions.layout_of(sizes, (0,) * 3, 1, jnp.dtype(dtype), None)
        one = jax.jit(functools.partial(in_one_pass, layout=layout))
        two = jax.jit(functools.partial(in_two_passes, layout=layout))
        for special in (None, 0.0, np.finfo(dtype).tiny, np.inf, np.nan):
            x = np.abs(rng.normal(size=shape)).astype(dtype)
            if special is not None and x.size:
                x.flat[x.size // 2] = special
            limit = jnp.asarray(0.7, dtype)
            sizes = [jnp.asarray(x), jnp.asarray([0.1, 0.8], "float32"), x[None] / 2]
            peak, count = one(sizes, limit)
            right = two(sizes, limit)
            np.testing.assert_array_equal(peak, right[0])
            np.testing.assert_array_equal(count, right[1])
            np.testing.assert_array_equal(one(sizes)[0], right[0])
            np.testing.assert_array_equal(one(sizes)[1], two(sizes)[1])
            assert (peak.dtype, count.dtype) == (dtype, "float32")
            whole = np.where(np.isnan(x), np.inf, x).max(initial=np.float32(0.8))
            np.testing.assert_array_equal(peak[0], whole)
            assert float(count[0]) == (x > 0.7).sum() + (x / 2 > 0.7).sum() + 1


@pytest.mark.parametrize("name", ["clip_by_value", "grad_power", "spam_clip"])
def test_metrics_on_one_device_are_those_on_several(name, monkeypatch):
    row, tree = METHODS[name], sample()
    tx = row.make(**row.args)
    step = lambda tree: tx.update(tree, tx.init(tree), tree)
    several = jax.jit(lambda tree: step(tree))(tree)
    monkeypatch.setattr(reductions, "forced_device", "one")
    assert_same(jax.jit(lambda tree: step(tree))(tree), several)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()
    split = jax.shard_map(step, mesh=mesh, in_specs=whole, out_specs=whole)
    assert_same(jax.jit(split)(tree), several)
    twice = jax.jit(jax.vmap(step))(jax.tree.map(lambda x: jnp.stack([x, x]), tree))
    assert_same(jax.tree.map(lambda x: x[1], twice), several)
