"""Per-example clipping of programs of every kind, against a loop over `jax.grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from per_example_oracle import (
    LIMIT,
    RESPONSES,
    cast,
    check,
    each_gradient,
    forced,
    methods,
)
from per_example_pieces import PIECES, around, draw, program, threes
from tiers import in_tiers
from trees import enable_x64

from clipfx import per_example
from clipfx.per_example.engine import trace

# What each leaf of a piece must take: a fast rule that stops matching shows here. The
# others are instantiated.
METHODS = {
    "dense": {"Gram": "w", "bias sum": "b"},
    "dense_left": {"Gram": "w", "bias sum": "b"},
    "attention": {"Gram": "k o q v"},
    "experts": {"Gram": "router v w"},
    "batched": {"outer product": "v w"},
    "mapped": {"Gram": "w"},
    "several": {"Gram": "w", "outer product": "v"},
    "biases": {"bias sum": "a b c d"},
    "layer_norm": {"bias sum": "bias scale"},
    "scales": {"bias sum": "a b c d f g i"},
    "scales_of_a_matrix": {"Gram": "w", "bias sum": "v"},
    "scales_in_loops": {"bias sum": "a b"},
    "look_ups": {"segment sum": "e f g s"},
    "tied_pairs": {"Gram": "e"},
    "embed": {"segment sum": "e f g"},
    "tied": {"Gram": "e"},
    "twice": {"Gram": "w"},
    "transposed": {"Gram": "v w"},
    "joined": {"Gram": "a b c d f", "bias sum": "g h"},
    "joined_constants": {"Gram": "a c", "bias sum": "b"},
    "sliced": {"Gram": "r v w", "bias sum": "b"},
    "reshaped": {"Gram": "a b c d"},
    "experts_by_id": {"Gram": "o v w"},
    "several_experts": {"Gram": "m u"},
    "experts_by_group": {"Gram": "v w", "bias sum": "u"},
    "scaled_experts": {"Gram": "m u v w", "segment sum": "o"},
    "experts_in_loops": {"Gram": "t u v w"},
    "experts_elsewhere": {"segment sum": "v w", "outer product": "u"},
    "rnn": {"Gram": "wh wx", "bias sum": "b"},
    "gated": {"Gram": "f4 fi i4 ii", "bias sum": "b"},
    "nested_scan": {"Gram": "u w wo", "bias sum": "b"},
    "nested_joined": {"Gram": "a b"},
    "layers": {"Gram": "w", "bias sum": "b s"},
    "remat_layers": {"Gram": "v w", "bias sum": "b"},
    "odd_derivative": {"Gram": "w"},
    "odd_parameter": {"Gram": "v"},
    "branches": {"Gram": "i v w"},
    "stopped": {"unused": "unused w", "bias sum": "b"},
    "nested_jit": {"Gram": "w"},
    "inner_gradient": {"Gram": "w"},
    "scaled": {"Gram": "u v w", "segment sum": "t", "bias sum": "b"},
    "scaled_and_tied": {"Gram": "e w", "bias sum": "b c s"},
    "scaled_by_vectors": {"Gram": "a e m v w", "outer product": "n"},
    "masked": {"segment sum": "t", "bias sum": "b"},
    "masked_at_one_position": {"outer product": "a u v w"},
    "permuted_and_padded": {"Gram": "u v w", "segment sum": "t", "bias sum": "b c"},
    "scaled_layers": {"Gram": "u w", "bias sum": "b"},
    "scaled_and_joined": {"Gram": "a c d g", "bias sum": "b"},
}
# Those that the engine takes in as many different ways.
UNLIKE = {"conv2", "experts_by_id", "look_ups", "nested_scan", "remat_layers",
          "scaled_and_tied", "scales_of_a_matrix"}  # fmt: skip
CALLED = [
    "attention",
    "embed",
    "joined",
    "remat_layers",
    "masked_at_one_position",
    "experts_by_group",
    "experts_by_id",
    "scaled_experts",
]
# Of the two forms below only the sums and norms are laid down.
ANY_METHOD = {"bias_reshaped", "dead_code", "indexed", "indexed_in_scan"}
CONVOLUTIONS = ("conv1", "conv2", "conv3")
FORMED = {"branches": "i", "gated": "f4 fi i4 ii", "nested_joined": "a b",
          "nested_scan": "u", "rnn": "wh wx", "scaled_layers": "r u"}  # fmt: skip


def methods_of(steps, force=None):
    """Of the leaves of the piece in the middle."""
    params, batch = draw(steps)
    params, batch = cast(params, "float32"), cast(batch, "float32")
    every = methods(program(steps), params, batch, force=force)
    return {k.removeprefix("1/"): v for k, v in every.items() if k.startswith("1/")}


def after_loops(steps, force):
    """Leaves of that piece that are instantiated after a loop, not by `jax.vmap`."""
    params, batch = draw(steps)
    args = cast(params, "float32"), cast(batch, "float32")
    signature = trace.Signature(program(steps), 0, 1, False)
    plan = trace.prepare(signature, args, {}, force=force).program.plan
    formed = lambda k: any(s.number in plan.formed for s, _ in plan.uses[k])
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(x, simple=True, separator="/") for x, _ in paths]
    return {x.removeprefix("1/") for k, x in enumerate(names) if x.startswith("1/")
            and plan.methods[k] == "instantiated" and formed(k)}  # fmt: skip


def assert_methods(name, found, table):
    expected = dict.fromkeys(found, "instantiated")
    for method, leaves in table.items():
        expected |= dict.fromkeys(leaves.split(), method)
    assert found == expected, name


@pytest.mark.parametrize("name", in_tiers(PIECES.keys(), UNLIKE))
def test_piece(name):
    steps = around(name)
    loss, (params, batch) = program(steps), draw(steps)
    default = methods_of(steps)
    if name not in ANY_METHOD:
        assert_methods(name, default, METHODS.get(name, {}))
    grads = each_gradient(loss, params, batch)
    seen = []
    for force in (None, "factored", "formed"):
        found = methods_of(steps, force)
        # Without loops it is `jax.vmap` that instantiates.
        late = after_loops(steps, force)
        if (found, late) in seen or (force == "formed" and not late):
            continue
        seen.append((found, late))
        run = forced(loss, force, "leaf")
        check(run, loss, params, batch, "float64", groups="leaf", grads=grads)


THREES = threes(x for x in PIECES if x not in {"layers", "sliced"})
FORCED = threes(sorted(UNLIKE | {"layers", "sliced"}))
IN_SLICES = {"layers+sliced-None": (["layers", "sliced"], None)}
IN_SLICES |= {f"{name}-None": (names, None) for name, names in THREES.items()}
IN_SLICES |= {f"{name}-{force}": (names, force) for name, names in FORCED.items()
              for force in ("factored", "formed")}  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(IN_SLICES, {"layers+sliced-None"}))
def test_pieces_with_a_group_for_each_slice(case):
    names, force = case
    steps = around(*names)
    loss, (params, batch) = program(steps), draw(steps)
    scalars = {path for path, x in params.items() if not np.ndim(x)}
    groups = {path: path + "/*" * (path not in scalars) for path in params}
    run = forced(loss, force, groups)
    check(run, loss, params, batch, "float64", groups=groups)


IN_THE_1_NORM = threes(PIECES)


@pytest.mark.parametrize("names", in_tiers(IN_THE_1_NORM, len(IN_THE_1_NORM) // 2))
def test_pieces_in_the_1_norm(names):
    """What is used once has a fast method, all else is instantiated or formed."""
    steps = around(*names)
    loss, (params, batch) = program(steps), draw(steps)
    run = forced(loss, None, "leaf", ord=1)
    check(run, loss, params, batch, "float64", groups="leaf", ord=1)


@pytest.mark.parametrize("name", in_tiers(CALLED, {"attention"}))
@pytest.mark.parametrize("wrapper", in_tiers(["remat", "saving"], {"saving"}))
def test_fast_methods_inside_calls(name, wrapper):
    """Norms of what rematerializes come from a backward pass of their own."""
    steps = around(name, wrapper=wrapper)
    assert_methods(name, methods_of(steps), METHODS[name])
    loss, (params, batch) = program(steps), draw(steps)
    check(forced(loss, None, "leaf"), loss, params, batch, "float64", groups="leaf")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_can_be_factored(name):
    found = methods_of(around(name), "factored")
    assert set(found.values()) == {"Gram"}


@pytest.mark.parametrize("name", FORMED)
def test_weights_in_loops_can_be_formed(name):
    assert {*FORMED[name].split()} <= after_loops(around(name), "formed")


INSTANTIATED = ["dense", "tied", "rnn", "joined", "biases"]


@pytest.mark.parametrize("name", in_tiers(INSTANTIATED, {"rnn", "biases"}))
def test_instantiated(name):
    steps = around(name)
    loss, (params, batch) = program(steps), draw(steps)
    run = forced(loss, "instantiated", "leaf")
    check(run, loss, params, batch, "float64", groups="leaf")


# -------------------------------------------------------------- losses of their own


def no_parameter(p, x):
    return jnp.sum(x)


def no_data(p, x):
    return jnp.sum(jnp.sin(p["w"]))


def only_a_parameter(p, x):
    return p["s"]


def decay_after(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"])) + 0.1 * (p["w"] ** 2).sum() + p["s"]


def scalar_added(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["s"]))


def scalar_added_twice(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["s"]) + jnp.sin(x @ p["v"] + p["s"]))


def empty_leaf(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"])) + (x[:, :0] @ p["empty"]).sum()


def no_turns(p, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=0)
    return jnp.sum(h @ p["w"] + x)


def dead_in_scan(p, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), h @ p["v"]), x, length=2)
    return jnp.sum(h)


def dead_in_remat(p, x):
    @jax.checkpoint
    def block(x):
        _ = x @ p["v"]
        return jnp.tanh(x @ p["w"])

    return jnp.sum(block(x))


def one_output_of_two(p, x):
    kept, _ = jax.jit(lambda x: (jnp.tanh(x @ p["w"]), x @ p["v"]))(x)
    return jnp.sum(kept)


def mapped_over_rows(p, x):
    return jnp.sum(jax.lax.map(lambda row: jnp.tanh(row @ p["w"]), x, batch_size=2))


LOSSES = [
    no_parameter,
    no_data,
    only_a_parameter,
    decay_after,
    scalar_added,
    scalar_added_twice,
    empty_leaf,
    no_turns,
    dead_in_scan,
    dead_in_remat,
    one_output_of_two,
    mapped_over_rows,
]


def small(length=5):
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4), "v": (4, 4), "s": (), "empty": (0, 3)}
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    return params, rng.normal(size=(3, length, 4))


@pytest.mark.parametrize("loss", in_tiers({x.__name__: x for x in LOSSES}, 3))
def test_loss(loss):
    check(forced(loss, None, "leaf"), loss, *small(), "float64", groups="leaf")


def test_gram_matrices_in_tiles():
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    params, batch = small(length=600)
    with enable_x64(True):
        assert methods(loss, params, batch, force="factored")["w"] == "Gram"
    check(forced(loss, "factored"), loss, params, batch, "float64")


@pytest.mark.parametrize("width", in_tiers(["float32", "float64"], {"float32"}))
def test_two_dtypes(width):
    """A sum is of the dtype of its parameter, norms are of the widest."""

    def loss(p, x):
        h = jnp.tanh(x @ p["w"].astype(x.dtype))
        half = jnp.tanh(h.astype(jnp.float32) @ p["w"].astype(jnp.float32))
        return jnp.sum(half.astype(x.dtype) @ p["v"].astype(x.dtype))

    params, batch = small()
    grads = None
    with enable_x64(True):
        params = {"w": jnp.asarray(params["w"], width), "v": jnp.asarray(params["v"])}
        batch = jnp.asarray(batch)
        sums, info = jax.jit(per_example.clipped_grad(loss, LIMIT))(params, batch)
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        grads = {k: np.asarray(g, np.float64) for k, g in grads.items()}
    assert (sums["w"].dtype, sums["v"].dtype) == (width, "float64")
    assert info.norm.dtype == "float64"
    norm = np.sqrt(sum((g**2).sum((1, 2)) for g in grads.values()))
    np.testing.assert_allclose(info.norm[:, 0], norm, 1e-6)
    for k, g in grads.items():
        total = np.tensordot(np.minimum(1, LIMIT / norm), g, 1)
        np.testing.assert_allclose(sums[k], total, 1e-5, 1e-6)


# ------------------------------------------------------------------ random programs


@st.composite
def programs(sample):
    """One to four pieces, plain or wrapped, some with the parameters of another."""
    steps = []
    for k in range(sample(st.integers(1, 4))):
        name = sample(st.sampled_from(sorted(PIECES)))
        kinds = ["plain", "plain", "jit", "remat", "saving", "layers", "remat layers"]
        wrapper, key = sample(st.sampled_from(kinds)), f"{k}"
        same = [s for s in steps if s[0] == name]
        if same and sample(st.booleans()):
            _, wrapper, key = same[0]
        steps.append((name, wrapper, key))
    return steps


@pytest.mark.full
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    steps=programs(),
    dtype=st.sampled_from(["float64", "float64", "float32"]),
    force=st.sampled_from([None, None, "factored", "formed", "instantiated"]),
    groups=st.sampled_from(["global", "leaf", "layer"]),
    response=st.sampled_from(sorted(RESPONSES)),
    size=st.sampled_from([None, 1, 2]),
    mask=st.sampled_from([None, (True, False, True), (False, False, True)]),
    seed=st.integers(0, 9),
    ord=st.sampled_from([2, 2, 1]),
)
def test_random_program(steps, dtype, force, groups, response, size, mask, seed, ord):
    loss, (params, batch) = program(steps), draw(steps, seed)
    # What float32 itself loses grows with depth, with every method.
    near = {"groups": groups, "ord": ord}
    if force is not None:
        check(forced(loss, force, groups, ord=ord), loss, params, batch, dtype, **near)
        return
    where = None if mask is None else np.array(mask)
    grad = per_example.clipped_grad(
        loss,
        LIMIT,
        groups=groups,
        response=RESPONSES[response][0],
        ord=ord,
        microbatch_size=size,
    )
    run = lambda params, batch: grad(params, batch, where=where)
    check(run, loss, params, batch, dtype, response=response, where=where, **near)
