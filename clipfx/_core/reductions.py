"""One number per leaf becomes one per group, over leaves and mesh axes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from clipfx import _compat

# `jnp.add` or `jnp.maximum`.
_Op: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


class Layout(NamedTuple):
    """What of a tree is known while tracing; hashable."""

    index: tuple[int, ...]
    number: int
    dtype: Any
    axis_names: tuple[Any, ...]
    apart: frozenset[str]
    device: str = "mesh"


# Set by tests and benchmarks: "cpu", "gpu", "tpu" or "mesh" instead of what there is.
forced_device = ""


def device_of_programs() -> str:
    """One, or a mesh; of what kind one is, is known when a program is lowered."""
    return forced_device or ("mesh" if jax.device_count() > 1 else "one")


def by_device(ways: dict[str, Callable[..., Any]], device: str, *args: Any) -> Any:
    """Calls what suits one "cpu", "gpu" or "tpu", or a "mesh" of any.

    A program that is compiled for one platform has no branch for it.
    """
    if device in ways:
        return ways[device](*args)
    cpu, gpu, tpu = (ways[x] for x in ("cpu", "gpu", "tpu"))
    more = {} if gpu is tpu else {"cuda": gpu}  # or it would be traced twice
    return jax.lax.platform_dependent(*args, cpu=cpu, **more, default=tpu)


def on_one_cpu(
    one: Callable[..., Any], other: Callable[..., Any], device: str, *args: Any
) -> Any:
    """Calls `one` there, and `other` on everything else."""
    ways = {"cpu": one, "gpu": other, "tpu": other, "mesh": other}
    return by_device(ways, device, *args)


def layout_of(
    leaves: Sequence[jax.Array],
    index: tuple[int, ...],
    number: int,
    dtype: Any,
    axis_name: Any,
) -> Layout:
    """For leaves split as their types and `axis_name` say, but for axes `apart`."""
    split = stacked_axes_of_trees(varying(leaves, axis_name))
    return Layout(
        index, number, dtype, as_tuple(axis_name), split, device_of_programs()
    )


def apart(fun: Callable[..., Any], axes: Iterable[Any]) -> Callable[..., Any]:
    """Calls `fun` where these mesh axes of `shard_map` have trees of their own each.

    To be seen far below they are names of `vmap`, of nothing: the caches of `jit` know
    those, and would not know a variable.
    """
    for axis in axes:
        fun = jax.vmap(
            fun, in_axes=None, out_axes=None, axis_size=1, axis_name=_mark(axis)
        )
    return fun


def stacked_axes_of_trees(axes: Iterable[Any]) -> frozenset[Any]:
    """Those of the mesh axes that are `apart` around this trace."""
    return frozenset(axis for axis in axes if is_bound(_mark(axis)))


def _mark(axis: Any) -> str:
    return f"clipfx: trees apart over {axis}"


def is_bound(name: str) -> bool:
    """Whether a `shard_map`, `pmap` or `vmap` around this trace has that axis."""
    try:
        jax.lax.psum(1, name)  # nothing is computed
    except NameError:
        return False
    return True


def varying(leaves: Iterable[jax.Array], axis_name: Any = None) -> frozenset[Any]:
    """The mesh axes that leaves are split over, as types or a caller say."""
    types = frozenset[Any]().union(*map(_compat.varying_axes, leaves))
    return types | {*as_tuple(axis_name)}


def axes_apart(tree: Any, axis_name: Any, name: str, what: str) -> frozenset[str]:
    """The mesh axes that `what` is split over, which the type of a leaf does not tell.

    Raises:
      ValueError: If leaves are split in `shard_map` and `axis_name`, to users `name`,
        is None.
    """
    if axis_name is not None:
        return frozenset(as_tuple(axis_name))
    split = varying(jax.tree.leaves(tree))
    if split:
        raise ValueError(
            f"{name} must say over which mesh axes {what} are split, got nothing, "
            f"and updates are split over {sorted(split)}; name those, () for none."
        )
    return split


def combine(op: _Op, scalars: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """Combines one scalar per leaf into `[G]`, over leaves and mesh axes.

    Or one array per leaf, all `[B]`, into `[G, B]`. `op` is `jnp.add`, or `jnp.maximum`
    of what is not negative. One collective, whatever the number of groups and however
    leaves are split.
    """
    split = [
        (_compat.varying_axes(x) | {*layout.axis_names}) - layout.apart for x in scalars
    ]
    every = frozenset[Any]().union(*split)
    counted: list[jax.Array] = []
    for x, axes in zip(scalars, split, strict=True):
        x = x.astype(layout.dtype)
        # Of equal copies all but one count as zero.
        for axis in every - axes:
            x = jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x))
        counted.append(x)
    rows = by_group(counted, layout)
    if not rows:
        return jnp.zeros(0, layout.dtype)
    nothing = jnp.zeros(scalars[0].shape if scalars else (), layout.dtype)
    total = jnp.stack([pairwise(op, row) if row else nothing for row in rows])
    across = jax.lax.psum if op is jnp.add else jax.lax.pmax
    return across(total, tuple(sorted(every, key=str))) if every else total


def by_group(arrays: Sequence[jax.Array], layout: Layout) -> list[list[jax.Array]]:
    """Those of each group."""
    rows: list[list[jax.Array]] = [[] for _ in range(layout.number)]
    for x, i in zip(arrays, layout.index, strict=True):
        rows[i].append(x)
    return rows


def pairwise(op: _Op, row: list[jax.Array]) -> jax.Array:
    """Reduces in a balanced tree: the error grows with the log of the length."""
    while len(row) > 1:
        row = [op(*row[i : i + 2]) if row[i + 1 :] else row[i]
               for i in range(0, len(row), 2)]  # fmt: skip
    return row[0]


def per_shard(fun: Callable[[list[jax.Array]], Any], leaves: list[jax.Array]) -> Any:
    """Calls `fun`; where types say how leaves are split, on the shards.

    On a mesh with Explicit axes `combine` then needs one collective. Left to XLA it is
    one for every set of axes that leaves are split over, and for every 256 sums.
    """
    specs = [_compat.explicit_spec(x) or () for x in leaves]
    mesh = next(
        (_compat.mesh_of(x) for x, s in zip(leaves, specs, strict=True) if any(s)), None
    )
    if mesh is None or _compat.is_manual(mesh):  # no shard_map within another
        return fun(leaves)
    split = jax.shard_map(
        fun,
        mesh=mesh,
        in_specs=([jax.sharding.PartitionSpec(*spec) for spec in specs],),
        out_specs=jax.sharding.PartitionSpec(),
        axis_names=_compat.explicit_axes(mesh),
    )
    whole = jax.custom_batching.custom_vmap(split)

    @whole.def_vmap
    def mapped(
        axis_size: int, in_batched: Sequence[list[bool]], leaves: list[jax.Array]
    ) -> tuple[Any, Any]:
        # Under vmap a shard_map would gather what is split along the mapped axis.
        axes = [0 if batched else None for batched in in_batched[0]]
        out = jax.vmap(fun, in_axes=(axes,), axis_size=axis_size)(leaves)
        is_batched: Callable[[Any], bool] = lambda _: True
        return out, jax.tree.map(is_batched, out)

    return whole(leaves)


def as_tuple(axis_name: Any) -> tuple[Any, ...]:
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
