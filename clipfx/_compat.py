"""Every difference between JAX versions, and nothing else.

Features are detected, never inferred from a version string.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util as names


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Returns the mesh axes that `x` varies over inside `jax.shard_map`.

    Empty outside `shard_map`, and where its `check_vma=False` or `jax.pmap` keep no
    such types.
    """
    return axes_of_type(jax.typeof(x))


def axes_of_type(aval: Any) -> frozenset[str]:
    """The same from the type of a value."""
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.10
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", ()))


# Around one parameter, by the library whose they are. They are known by name: nothing
# of it is imported, and where it is not loaded no tree can hold its boxes.
_BOXES = {
    "flax": {"Variable", "AxisMetadata"},
    "haliax": {"NamedArray"},
    "paramax": {"AbstractUnwrappable"},
    "penzai": {"NamedArrayBase", "AbstractVariable", "AbstractVariableValue"},
}


def is_boxed(node: Any) -> bool:
    """Whether `node` is a library's box around one parameter.

    `nnx.Optimizer` shows boxes to `init` and bare arrays to `update`, so a path must
    end where the box begins, and a box is not a layer of its own.
    """
    return any(
        base.__name__ in _BOXES.get(base.__module__.partition(".")[0], ())
        for base in type(node).__mro__
    )


def is_sparse(node: Any) -> bool:
    """Whether `node` is a sparse array, the numbers of which are one of its leaves."""
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(node, sparse.JAXSparse)


def other_variable(node: Any) -> str | None:
    """The kind of a Flax NNX variable that `nnx.grad` would not differentiate."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(node, nnx.Variable) or isinstance(node, nnx.Param):
        return None
    return type(node).__name__


def refusing_batch_norm(error: Exception) -> contextlib.AbstractContextManager:
    """Raises `error` where Flax Linen's batch normalization takes means of a batch."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        return contextlib.nullcontext()

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, linen.BatchNorm) and context.method_name == "__call__":
            given = kwargs.get("use_running_average", args[1] if args[1:] else None)
            if not (module.use_running_average if given is None else given):
                raise error
        return call(*args, **kwargs)

    return linen.intercept_methods(intercept)


def is_literal(atom: Any) -> bool:
    """Whether an input of an equation is a constant written into the program."""
    return isinstance(atom, jax.extend.core.Literal)


def evaluate(eqn: Any, values: Sequence, literals: bool = True) -> list[Any]:
    """Runs one equation of a program, with its own derivative rules.

    Args:
      eqn: The equation.
      values: One per input.
      literals: Whether what is written into the program takes precedence.
    """
    array = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
    values = [v.val if literals and is_literal(v) else array(x)
              for x, v in zip(values, eqn.invars, strict=True)]  # fmt: skip
    given = eqn.primitive.get_bind_params(eqn.params)
    functions, params = given if isinstance(given, tuple) else ([], given)  # older JAX
    stack = names.current_name_stack() + eqn.source_info.name_stack
    with (
        names.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        outs = eqn.primitive.bind(*functions, *values, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Makes `x` vary over mesh axes of `jax.shard_map` that it does not vary over."""
    axes -= varying_axes(x)
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):  # newer JAX
        return jax.lax.pcast(x, tuple(sorted(axes)), to="varying")
    older: Any = jax.lax
    return older.pvary(x, tuple(sorted(axes)))


def explicit_spec(x: jax.Array) -> tuple | None:
    """The mesh axes of each dimension on a mesh with Explicit axes, None elsewhere."""
    return spec_of_type(jax.typeof(x))


def spec_of_type(aval: Any) -> tuple | None:
    """The same of a type."""
    sharding: Any = getattr(aval, "sharding", None)
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    if jax.sharding.AxisType.Explicit not in kinds:
        return None
    spec = tuple(sharding.spec)
    return spec + (None,) * (len(aval.shape) - len(spec))


def mesh_of(x: jax.Array) -> Any:
    """The mesh in the type of `x`."""
    sharding: Any = jax.typeof(x).sharding
    return sharding.mesh


def explicit_axes(mesh: Any) -> set[str]:
    """Those of its axes that types tell of."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit}


def is_manual(mesh: Any) -> bool:
    """Whether some of its axes belong to a `shard_map` that is being traced."""
    return jax.sharding.AxisType.Manual in mesh.axis_types


def reshard(x: jax.Array, spec: tuple | None) -> jax.Array:
    """`x` with these mesh axes, on a mesh with Explicit axes."""
    if spec is None or explicit_spec(x) == spec:
        return x
    return jax.sharding.reshard(x, sharding(x, spec))


def sharding(x: jax.Array, spec: Sequence) -> jax.sharding.NamedSharding:
    """These mesh axes, on the mesh in the type of `x`: there may be none around."""
    return jax.sharding.NamedSharding(mesh_of(x), jax.sharding.PartitionSpec(*spec))


def splits(x: jax.Array, told: Sequence = ()) -> tuple | None:
    """Its mesh axes, if a mesh splits it and no `shard_map` did.

    Args:
      x: Of which the type tells of Explicit axes.
      told: Of Auto axes, for each dimension a name, a tuple of names or None. What no
        mesh in the type of `x` has, or does not divide its size, does not count.
    """
    mesh, spec = mesh_of(x), explicit_spec(x)
    if is_manual(mesh):
        return None
    if spec is None and len(told) <= x.ndim:
        spec = tuple(
            names if _names(names) and _divides(mesh, names, size) else None
            for names, size in zip_longest(told, x.shape)
        )
    return spec if spec and any(spec) else None


def _divides(mesh: Any, names: Any, size: int) -> bool:
    """Whether a mesh has axes of these names, by which a size can be split."""
    known = isinstance(size, int) and {*_names(names)} <= {*mesh.axis_names}
    return known and size % math.prod(mesh.shape[name] for name in _names(names)) == 0


def _names(entry: Any) -> tuple:
    """Of one dimension in a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def left_to_xla(fun: Callable[..., Any], x: jax.Array, *rest: Any, like: bool) -> Any:
    """`fun(x, *rest)` with the Explicit axes that split `x`, if any, made Auto.

    Args:
      fun: From arrays to arrays.
      x: Split in any way.
      *rest: Whole.
      like: Whether what comes out is split as `x`; else it is whole.
    """
    axes = tuple(sorted(explicit_axes(mesh_of(x))))
    if not axes:
        return fun(x, *rest)
    out = sharding(x, (splits(x) or ()) if like else ())
    return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out)(x, *rest)


def on_shards(
    fun: Callable[..., Any], x: jax.Array, *rest: Any, spec: tuple, like: bool
) -> Any:
    """The same with `fun` on the parts of `x`, split so, in a `shard_map`."""
    mesh, whole = mesh_of(x), jax.sharding.PartitionSpec()
    split = jax.sharding.PartitionSpec(*spec)
    return jax.shard_map(
        fun,
        mesh=mesh,
        in_specs=(split, *[whole] * len(rest)),
        out_specs=split if like else whole,
        axis_names=explicit_axes(mesh) or {n for names in spec for n in _names(names)},
    )(x, *rest)


def as_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` with the mesh axes of `like`, of the same shape."""
    spec = explicit_spec(like)
    if spec is None or explicit_spec(x) == spec:
        return x
    if explicit_spec(x) is None:  # no mesh in its type: it takes that of another
        return _beside(x, _false(like))
    return reshard(x, spec)


def _false(like: jax.Array) -> jax.Array:
    """False, with the mesh in the type of `like`, which zeros like it need not have."""
    return (like != like) & False


def _beside(x: jax.Array, false: jax.Array) -> jax.Array:
    """`x`; a sum takes the mesh of the operand that has one in its type."""
    return x | false if x.dtype == bool else x + false.astype(x.dtype)


def rows_of(like: jax.Array, x: jax.Array) -> jax.Array:
    """`x` once for each row of `like`, split over a mesh as they are."""
    return as_rows_of(like, jnp.broadcast_to(x, (like.shape[0], *x.shape)))


def as_rows_of(like: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, whose rows are split over a mesh as those of `like` are."""
    spec, own = explicit_spec(like), explicit_spec(x)
    if spec is None or not spec[0]:
        return x
    if own is not None:
        return reshard(x, (spec[0], *own[1:]))
    # No mesh in its type: it takes that of another.
    row = _false(like).any(tuple(range(1, like.ndim)))
    return _beside(x, row.reshape(-1, *[1] * (x.ndim - 1)))


def stack(xs: Sequence[jax.Array]) -> jax.Array:
    """Stacks what may be split differently, on a mesh with Explicit axes."""
    if any(explicit_spec(x) is not None for x in xs):
        every = functools.reduce(jnp.add, xs)  # split as any of them, mapped axes too
        xs = [jnp.where(every == every, x, x) for x in xs]
    return jnp.stack(xs)


def lead_whole(x: jax.Array) -> jax.Array:
    """`x` with its first dimension not split, on a mesh with Explicit axes."""
    spec = explicit_spec(x)
    return reshard(x, spec and (None, *spec[1:]))


def whole(x: jax.Array) -> jax.Array:
    """`x` with no dimension split, on a mesh with Explicit axes; mapped ones may be."""
    return reshard(x, explicit_spec(x) and (None,) * x.ndim)


def scan_sizes(eqn: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    tree = eqn.params["ft_in"].update(list(eqn.invars))  # newer JAX
    consts, carry, _ = (len(list(part)) for part in tree.unpack())
    return consts, carry


def other_mesh(aval: Any) -> bool:
    """Whether a type knows a mesh whose axes are of another kind than those around."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    kinds = getattr(mesh, "axis_types", ())
    around = jax.sharding.get_abstract_mesh().axis_types
    return bool(kinds and around) and kinds != around
