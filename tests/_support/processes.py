"""What each of two processes computes, and one alone; see `test_multiprocess.py`."""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx

STEPS = 4
SPECS = {
    "a": {"column": P(None, "model"), "whole": P()},
    "b": {"both": P("data", "model"), "fsdp": P("data")},
}
SHAPES = {"a": {"column": (3, 8), "whole": (5,)}, "b": {"both": (8, 4), "fsdp": (8, 3)}}
CLIPS = {
    "global": clipfx.clip_by_global_norm(0.5),
    "per_layer": clipfx.clip_per_layer(0.5),
    "zclip": clipfx.zclip(z_threshold=1.0, warmup_steps=1),
    "spamp": clipfx.spamp(0.9),
}
is_shape = lambda x: isinstance(x, tuple)


def tree_of(mesh, seed, lead=(), specs=SPECS):
    """A tree of which each process makes its shards alone."""
    rng = np.random.default_rng(seed)

    def make(shape, spec):
        data = rng.normal(size=(*lead, *shape)).astype(np.float32)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(data.shape, sharding, lambda i: data[i])

    return jax.tree.map(make, SHAPES, specs, is_leaf=is_shape)


def loss(params, x):
    """Of one example `[8]`."""
    h = jnp.tanh(params["b"]["both"].T @ x)
    y = jnp.concatenate([h, params["b"]["fsdp"].T @ x, params["a"]["column"] @ x])
    return (y**2).mean() + params["a"]["whole"].sum() * x[0]


def results(mesh) -> Iterator[tuple[str, object]]:
    """Every result by name, on a mesh of "data" times "model"."""
    grads = [tree_of(mesh, seed) for seed in range(STEPS)]
    for name, tx in CLIPS.items():
        ways = {
            "jit": tx.update,
            "shard_map": jax.shard_map(
                tx.update, mesh=mesh, in_specs=(SPECS, P()), out_specs=(SPECS, P())
            ),
        }
        for way, update in ways.items():
            update, state = jax.jit(update), jax.jit(tx.init)(grads[0])
            for step in range(STEPS):
                updates, state = update(grads[step], state)
            yield f"{name}/{way}", (updates, state)

    fair = clipfx.clip_fair_groups(1.2, num_populations=2)
    stacked = jax.tree.map(lambda spec: P(None, *spec), SPECS)
    parts = tree_of(mesh, 7, lead=(2,), specs=stacked)
    start = jax.jit(fair.init)(grads[0])
    yield "clip_fair_groups", jax.jit(fair.update)(parts, start)

    x = np.random.default_rng(8).normal(size=(16, 8)).astype(np.float32)
    rows = NamedSharding(mesh, P("data"))
    batch = jax.make_array_from_callback(x.shape, rows, lambda i: x[i])
    grad = clipfx.per_example.clipped_grad(loss, 0.5, groups="layer")
    like = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    sums = jax.jit(lambda p, b: grad(p, b)[0], out_shardings=like)
    yield "clipped_grad", sums(grads[0], batch)


def shards(tree) -> dict[str, np.ndarray]:
    """The parts of a tree that this process holds, by leaf and place."""
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        devices = list(x.sharding.mesh.devices.flat)
        for shard in x.addressable_shards:
            assert shard.data.shape == x.sharding.shard_shape(x.shape)
            start = [index.start or 0 for index in shard.index]
            where = f"at {start} on device {devices.index(shard.device)}"
            found[f"{jax.tree_util.keystr(path)} {where}"] = np.asarray(shard.data)
    return found


def mesh_of():
    axes = {"axis_types": (AxisType.Auto,) * 2}
    return jax.make_mesh((4, 2), ("data", "model"), **axes)


def main(port: str, number: str, out: str) -> None:
    """One process of two, with four devices."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    assert (jax.local_device_count(), jax.device_count()) == (4, 8)
    for name, tree in results(mesh_of()):
        np.savez(f"{out}/{number}_{name.replace('/', '_')}.npz", **shards(tree))


if __name__ == "__main__":
    main(*sys.argv[1:])
