"""Trees and training steps on meshes."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

WAYS = {
    "jit": AxisType.Auto,
    "jit, Explicit": AxisType.Explicit,
    "shard_map": AxisType.Auto,
}


class Layout(NamedTuple):
    """How layers are split over a mesh of `("data", "model")`.

    Attributes:
      name: Of the layout.
      model: Size of the second axis.
      kernels: Of even and of odd layers.
      bias: Of all.
    """

    name: str
    model: int
    kernels: tuple[P, P]
    bias: P


FSDP = Layout("FSDP", 1, (P("data"), P("data")), P("data"))
BOTH = Layout("data x model", 2, (P("data", "model"), P("model", "data")), P("model"))
WHOLE = Layout("replicated", 1, (P(), P()), P())


def mesh_of(layout: Layout, way: str, size: int | None = None) -> Mesh:
    """A mesh of the first devices, by default of all."""
    devices = jax.devices()[:size]
    model = layout.model if len(devices) % layout.model == 0 else 1
    shape = len(devices) // model, model
    return jax.make_mesh(shape, ("data", "model"), (WAYS[way],) * 2, devices=devices)


def tree_of(layout: Layout, mesh: Mesh, leaves: int, width: int) -> tuple[Any, Any]:
    """Shapes of layers, a bias and a kernel each, and their specs."""
    specs = {
        f"layer{i}": {"bias": layout.bias, "kernel": layout.kernels[i % 2]}
        for i in range(leaves // 2)
    }
    shapes = {"bias": (width,), "kernel": (width, width)}
    like = lambda path, spec: jax.ShapeDtypeStruct(
        shapes[path[-1].key], jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    return jax.tree.map_with_path(like, specs), specs


def compiled(
    tx: optax.GradientTransformation,
    mesh: Mesh,
    leaves: int,
    width: int,
    way: str = "jit",
) -> tuple[Any, Any, list[float]]:
    """A donating step, FSDP, of parameters and state, then gradients.

    Returns:
      The step, where parameters and state have to be, and CPU seconds to trace, lower
      and compile it.
    """
    params, specs = tree_of(FSDP, mesh, leaves, width)
    state = jax.eval_shape(tx.init, params)
    split = optax.tree.map_params(
        tx.init, lambda _, to: to, state, specs, transform_non_params=lambda _: P()
    )
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (specs, split))
    on = lambda place, part: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), part
    )
    state = jax.tree.map(on, places[1], state)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run: Callable = step
    if way == "shard_map":
        spread: dict = {"in_specs": (specs, split, specs), "out_specs": (specs, split)}
        run = jax.shard_map(step, mesh=mesh, **spread)
    jitted = jax.jit(run, donate_argnums=(0, 1), out_shardings=places)
    jax.clear_caches()
    clock = [time.process_time()]
    traced = jitted.trace(params, state, params)
    clock.append(time.process_time())
    lowered = traced.lower()
    clock.append(time.process_time())
    done = lowered.compile()
    clock.append(time.process_time())
    return done, places, [float(x) for x in np.diff(clock)]


def normal(key: Any, layers: int, width: int, places: Any) -> Any:
    """Normal numbers in the shape of `tree_of`."""

    def layer(i):
        own = jax.random.fold_in(key, i)
        shapes = {"bias": (width,), "kernel": (width, width)}
        return {k: jax.random.normal(own, shape) for k, shape in shapes.items()}

    draw = lambda: {f"layer{i}": layer(i) for i in range(layers)}
    return jax.jit(draw, out_shardings=places)()
