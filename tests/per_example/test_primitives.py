"""What the engine knows of JAX's primitives is what JAX does."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from clipfx import _compat
from clipfx.per_example.engine import primitives

X = jnp.ones((2, 3))
IDS = jnp.array([1, 0])
POLICY = jax.checkpoint_policies.dots_saveable


def equation(fun, *args, name):
    """The first equation of that name, in what JAX makes of a function today."""
    eqns = jax.make_jaxpr(fun)(*args).eqns
    names = [eqn.primitive.name for eqn in eqns]
    assert name in names, (
        f"JAX {jax.__version__} has no {name} where it had one, but {names}: change "
        "its name in clipfx/per_example/engine/primitives.py"
    )
    return eqns[names.index(name)]


def same(name, read, right):
    """That `read()` finds what was asked for."""
    try:
        found = read()
    except (AttributeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    assert found == right, (
        f"parameters of {name} in JAX {jax.__version__} do not say {right!r}, got "
        f"{found!r}: change how clipfx/per_example/engine/primitives.py reads them"
    )


def convolve(x, w):
    return lax.conv_general_dilated(
        x, w, (2,), [(1, 2)], (1,), (3,), ("NWC", "WIO", "NWC"), feature_group_count=3
    )


@jax.custom_vjp
def double(x):
    return 2 * x


double.defvjp(lambda x: (2 * x, None), lambda _, d: (2 * d,))

# How to make each, and what of it the engine reads.
READ = {
    "dot_general": (
        lambda x: jnp.dot(x, x.T, precision="highest"),
        lambda eqn: (primitives.dot_dimensions(eqn), primitives.precision(eqn) is None),
        ((((1,), (0,)), ((), ())), False),
    ),
    "conv_general_dilated": (
        lambda x: convolve(x[:, :, None].repeat(3, 2), jnp.ones((2, 1, 6))),
        primitives.convolution,
        ((0, 2, 1), (2, 1, 0), (0, 2, 1), (2,), ((1, 2),), (1,), (3,), 3, 1),
    ),
    "ragged_dot_general": (
        lambda x: lax.ragged_dot(x, jnp.ones((2, 3, 4)), IDS),
        primitives.ragged_dot,
        ((((1,), (1,)), ((), ())), (0,), (0,), None),
    ),
    "gather": (
        lambda x: x.at[IDS].get(mode="clip", wrap_negative_indices=False),
        primitives.gather,
        ((0,), (0,), (), (1,), (1, 3), True),
    ),
    "dynamic_slice": (
        lambda x: lax.dynamic_slice(x, (0, 1), (2, 1)),
        primitives.dynamic_slice,
        ((1,), (), (), (0, 1), (2, 1), True),
    ),
    "broadcast_in_dim": (
        lambda x: jnp.broadcast_to(x, (4, 2, 3)),
        primitives.broadcast_dimensions,
        (1, 2),
    ),
    "concatenate": (
        lambda x: jnp.concatenate([x, x], axis=1), primitives.concatenated, 1
    ),
    "slice": (
        lambda x: lax.slice(x, (0, 1), (2, 3), (1, 2)),
        primitives.cuts,
        [(0, 2, 1), (1, 3, 2)],
    ),
    "pad": (
        lambda x: lax.pad(x, 0.0, ((0, 1, 0), (2, 0, 1))),
        primitives.edges,
        [(0, 1, 0), (2, 0, 1)],
    ),
    "split": (lambda x: jnp.split(x, [1], 1), primitives.pieces, (1, [1, 2])),
    "transpose": (lambda x: x.T, primitives.permutation, (1, 0)),
    "jit": (jax.jit(jnp.sin), lambda eqn: _names(primitives.inner(eqn)), ["sin"]),
    "remat2": (
        jax.checkpoint(jnp.sin, prevent_cse=False, policy=POLICY),
        lambda eqn: (_names(primitives.inner(eqn)), primitives.remat_options(eqn)),
        (["sin"], {"prevent_cse": False, "policy": POLICY}),
    ),
    "cond": (
        lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
        lambda eqn: [_names(branch) for branch in primitives.branches(eqn)],
        [["cos"], ["sin"]],
    ),
    "scan": (
        lambda x: lax.scan(lambda c, r: (c + r.sum() + x[0, 0], c), 0.0, x,
                           reverse=True, unroll=2),
        lambda eqn: (primitives.scan_options(eqn), primitives.turns(eqn),
                     _compat.scan_sizes(eqn), "add" in _names(primitives.inner(eqn))),
        ({"length": 2, "reverse": True, "unroll": 2}, 2, (1, 1), True),
    ),
    "custom_vjp_call": (
        double,
        lambda eqn: (primitives.owner(eqn) is double.bwd, primitives.num_consts(eqn)),
        (True, 0),
    ),
}  # fmt: skip


def _names(closed):
    return [eqn.primitive.name for eqn in getattr(closed, "jaxpr", closed).eqns]


@pytest.mark.parametrize("name", READ)
def test_parameters(name):
    fun, read, right = READ[name]
    eqn = equation(fun, X, name=name)
    same(name, lambda: read(eqn), right)


@pytest.mark.parametrize("mode", ["clip", "fill", "promise_in_bounds"])
def test_of_another_table_the_same_is_taken(mode):
    eqn = equation(lambda x: x.at[:, IDS].get(mode=mode), X, name="gather")
    numbers = jnp.arange(6).reshape(2, 3)
    found = lambda: primitives.take(eqn, numbers, IDS[:, None]).tolist()
    same("gather", found, [[1, 0], [4, 3]])


def test_products_can_be_of_another_dtype():
    eqn = equation(lambda x: x @ x.T, X, name="dot_general")
    half = X.astype(jnp.bfloat16)
    out = eqn.primitive.bind(half, half.T, **primitives.in_dtype_of_inputs(eqn))
    same("dot_general", lambda: out.dtype, jnp.bfloat16)


def test_the_owner_of_what_vmap_has_changed_is_another():
    """A rule is for the shapes that the function was written for."""
    eqn = equation(jax.vmap(double), X, name=primitives.CUSTOM_VJP)
    same("custom_vjp_call", lambda: primitives.owner(eqn) is double.bwd, False)


def reshard(x):
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.sharding.reshard(
            x, jax.NamedSharding(mesh.abstract_mesh, jax.P("x"))
        )


def vary(x):
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    names = []

    def inside(x):
        names.extend(_names(jax.make_jaxpr(
            lambda x: _compat.vary(x, frozenset({"x"})))(x)))  # fmt: skip
        return x

    jax.shard_map(inside, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())(x)
    return names


# How to make each of those that only have a name.
NAMED = {
    "add": lambda x: x + x,
    "add_any": jax.grad(lambda x: (jnp.sin(x) + jnp.cos(x)).sum()),
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "copy": jnp.copy,
    "div": lambda x: x / 3,
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (0, 1), (2, 2)),
    "mul": lambda x: 3 * x,
    "name": lambda x: checkpoint_name(x, "kept"),
    "neg": lambda x: -x,
    "optimization_barrier": lax.optimization_barrier,
    "reshape": lambda x: x.reshape(6),
    "reshard": reshard,
    "rev": lambda x: lax.rev(x, (0,)),
    "select_n": lambda x: lax.select(x > 0, x, 2 * x),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "squeeze": lambda x: x[0],
    "stop_gradient": lax.stop_gradient,
    "sub": lambda x: x - 3,
}


@pytest.mark.parametrize("name", NAMED)
def test_names(name):
    equation(NAMED[name], X, name=name)


def test_varying_has_the_name():
    names = vary(X)
    assert names == ["pvary"], (
        f"JAX {jax.__version__} lets values vary over a mesh by {names}, not by pvary: "
        "add it to SAME in clipfx/per_example/engine/primitives.py"
    )


def test_all_names_are_tried():
    sets = [primitives.ADD, primitives.CALLS, primitives.SAME, primitives.RESHAPES,
            primitives.ARITHMETIC]  # fmt: skip
    known = {x for x in vars(primitives).values() if isinstance(x, str) and x.islower()}
    known = {x for x in known if x.isidentifier()}.union(*sets)
    assert known <= {*READ, *NAMED, "pvary"}
