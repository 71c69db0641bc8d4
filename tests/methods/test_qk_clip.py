"""QK-Clip and the largest logits that it goes by."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from sentences import raises_one_sentence
from tiers import in_tiers
from trees import enable_x64

import clipfx

TAU = 5.0


def step(tx, params, updates=None, **kwargs):
    """Weights after one step, and the metrics."""
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    new, state = jax.jit(tx.update)(updates, tx.init(params), params, **kwargs)
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(new) == dtypes(updates)
    return optax.apply_updates(params, new), clipfx.metrics.read(state)


def heads(*shape):
    return {"layer": {"query": jnp.ones(shape), "key": jnp.ones(shape)}}


# -------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    "alpha, q, k",
    [
        (0.5, [1, 0.70711, 0.5], [1, 0.70711, 0.5]),
        (0.3, [1, 0.81225, 0.65975], [1, 0.61557, 0.37893]),
        (0.0, [1, 1, 1], [1, 0.5, 0.25]),
        (1.0, [1, 0.5, 0.25], [1, 1, 1]),
    ],
)
def test_golden_factors(alpha, q, k):
    tx = clipfx.qk_clip(100.0, alpha)
    new, seen = step(tx, heads(2, 3, 4), max_logits=jnp.array([50.0, 200, 400]))
    for role, want in (("query", q), ("key", k)):
        want = np.broadcast_to(np.array(want)[:, None], (2, 3, 4))
        np.testing.assert_allclose(new["layer"][role], want, rtol=1e-5)
    assert seen["clip0/norm/layer"] == 400
    assert seen["clip0/threshold/layer"] == 100
    assert seen["clip0/factor/layer"] == 0.25
    assert seen["clip0/target_norm/layer"] == 100
    assert seen["clip0/share/layer"] == pytest.approx(2 / 3)
    assert seen["clip0/clipped/layer"] == 1


def test_golden_groups_of_query_heads():
    params = {"query": jnp.ones((2, 4, 3)), "key": jnp.ones((2, 2, 3))}
    tx = clipfx.qk_clip(100.0, 0.0)
    new, _ = step(tx, params, max_logits=jnp.array([50.0, 200, 80, 90]))
    np.testing.assert_allclose(new["key"][0, :, 0], [0.5, 1])
    tx = clipfx.qk_clip(100.0, 1.0)
    new, _ = step(tx, params, max_logits=jnp.array([50.0, 200, 80, 90]))
    np.testing.assert_allclose(new["query"][0, :, 0], [0.5, 0.5, 1, 1])


def test_golden_update():
    params = {"query": jnp.array([[[4.0, -2.0]]]), "key": jnp.array([[[4.0, -2.0]]])}
    updates = jax.tree.map(lambda w: jnp.full_like(w, 0.5), params)
    tx = clipfx.qk_clip(100.0)
    new, _ = tx.update(updates, tx.init(params), params, max_logits=jnp.array([400.0]))
    np.testing.assert_array_equal(new["query"], [[[-1.75, 1.25]]])


def test_golden_example():
    """q = k = [10, 10]: a logit of 200 becomes one of 100."""
    params = {"query": jnp.full((1, 1, 2), 10.0), "key": jnp.full((1, 1, 2), 10.0)}

    def logits(params):
        q, k = params["query"][None], params["key"][None]
        return clipfx.max_attention_logits(q, k, scale=1.0)

    assert logits(params) == 200
    new, _ = step(clipfx.qk_clip(100.0), params, max_logits=logits(params))
    np.testing.assert_allclose(logits(new), 100, rtol=1e-6)


def rotated(x, base=10.0):
    """Rotary embedding of `[B, T, N, d]`."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** -(np.arange(half) / half)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def project(x, layer):
    return np.einsum("btd,dnh->btnh", x, layer["kernel"]) + layer["bias"]


def all_logits(q, k):
    """`[B, N, T, S]`, each group of query heads with its key head."""
    k = np.repeat(k, q.shape[2] // k.shape[2], 2)
    return np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])


def mha(p, x):
    return all_logits(rotated(project(x, p["query"])), rotated(project(x, p["key"])))


def mla_of(parts):
    """Latent attention; `parts` gives content and rotary queries and content keys."""

    def logits(p, x):
        q_nope, q_rope, k_nope = parts(p, x)
        shared = rotated(np.einsum("btd,dh->bth", x, p["shared"])[:, :, None])
        shared = np.broadcast_to(shared, q_rope.shape)
        q = np.concatenate([q_nope, rotated(q_rope)], -1)
        return all_logits(q, np.concatenate([k_nope, shared], -1))

    return logits


separate = mla_of(
    lambda p, x: [project(x, p[n]) for n in ("q_nope", "q_rope", "k_nope")]
)


def _fused(p, x):
    q, k = project(x, p["q_b"]), project(x, p["kv_b"])
    return q[..., :6], q[..., 6:], k[..., :6]


def _flat(p, x):
    cut = lambda layer: {k: w.reshape(*w.shape[:-1], 4, -1) for k, w in layer.items()}
    return _fused({"q_b": cut(p["q_b"]), "kv_b": cut(p["kv_b"])}, x)


def projections(**shapes):
    return {
        name: {"kernel": shape, "bias": shape[1:]} for name, shape in shapes.items()
    }


MLA = {"query": "q_b", "key": "kv_b", "content_dim": 6}
MODELS = {
    "mha": (mha, projections(query=(8, 4, 6), key=(8, 4, 6)), {}),
    "gqa": (mha, projections(query=(8, 4, 6), key=(8, 2, 6)), {}),
    "mqa": (mha, projections(query=(8, 4, 6), key=(8, 1, 6)), {"alpha": 0.3}),
    "mla": (
        separate,
        projections(q_nope=(8, 4, 6), q_rope=(8, 4, 2), k_nope=(8, 4, 6)),
        {"query": "q_nope", "rotary_query": "q_rope", "key": "k_nope", "alpha": 0.3},
    ),
    "fused": (mla_of(_fused), projections(q_b=(8, 4, 8), kv_b=(8, 4, 11)), MLA),
    "flat": (mla_of(_flat), projections(q_b=(8, 32), kv_b=(8, 44)), MLA),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_same_data_are_bounded(name):
    """Float64, with biases and rotary embeddings, signed and by magnitude."""
    logits, shapes, kwargs = MODELS[name]
    shapes = {"block": shapes | {"shared": (8, 2)}}
    rng = np.random.default_rng(len(name))
    draw = lambda shape: rng.normal(size=shape)
    with enable_x64(True):
        params = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
        u = jax.tree.map(lambda w: 0.1 * draw(w.shape), params)
        x = draw((3, 7, 8))
        after = jax.tree.map(np.add, params, u)["block"]
        for size in (np.asarray, np.abs):
            seen = size(logits(after, x)).max((0, 2, 3))
            tau = np.sort(seen)[1]  # all but one or two of the heads exceed it
            tx = clipfx.qk_clip(tau, **kwargs)
            new, _ = step(tx, params, u, max_logits={"block": jnp.asarray(seen)})
            new = jax.tree.map(np.asarray, new)["block"]
            bounded = size(logits(new, x)).max((0, 2, 3))
            assert bounded.dtype == np.float64
            assert (bounded <= tau * (1 + 1e-6)).all()
            top = bounded.reshape(-1, 4 // (4 if name == "mqa" else 1)).max()
            np.testing.assert_allclose(top, tau, rtol=1e-9)  # and no more than needed
            np.testing.assert_array_equal(new["shared"], after["shared"])
            if name == "fused":
                values = new["kv_b"]["kernel"][..., 6:], new["kv_b"]["bias"][..., 6:]
                old = after["kv_b"]["kernel"][..., 6:], after["kv_b"]["bias"][..., 6:]
                jax.tree.map(np.testing.assert_array_equal, values, old)


def test_no_head_too_large_changes_nothing():
    params = heads(2, 3, 4)
    updates = jax.tree.map(lambda w: 1e-9 * jnp.ones_like(w), params)
    tx = clipfx.qk_clip(math.inf)
    new, _ = tx.update(updates, tx.init(params), params, max_logits=jnp.full(3, 3e38))
    jax.tree.map(np.testing.assert_array_equal, new, updates)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3.0, 0.0])
def test_logits_that_say_nothing_leave_their_head_alone(value):
    new, seen = step(
        clipfx.qk_clip(100.0), heads(2, 2, 4), max_logits=jnp.array([value, 400.0])
    )
    want = np.broadcast_to(np.array([1, 0.5])[:, None], (2, 2, 4))
    np.testing.assert_allclose(new["layer"]["key"], want, rtol=1e-6)
    assert seen["clip0/factor/layer"] == 0.25
    assert seen["clip0/nonfinite/layer"] == (value not in (-math.inf, -3, 0))
    assert all(map(math.isfinite, seen.values()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    rng = np.random.default_rng(0)
    draw = lambda scale: jnp.asarray(scale * rng.normal(size=(16, 2, 4)), dtype)
    params = {"query": draw(1), "key": draw(1)}
    updates = {"query": draw(0.01), "key": draw(0.01)}
    tx = clipfx.qk_clip(100.0)
    logits = jnp.array([50.0, 300.0], jnp.bfloat16)
    new, _ = tx.update(updates, tx.init(params), params, max_logits=logits)
    w, u = (np.asarray(x["query"], np.float64) for x in (params, updates))
    factor = np.sqrt(np.minimum(1, 100 / np.asarray(logits, np.float64)))[:, None]
    want = factor * (w + u) - w
    got = np.asarray(new["query"], np.float64)
    eps = float(jnp.finfo(dtype).eps)
    assert (np.abs(got - want) <= 0.501 * eps * np.abs(want) + 1e-7).all()
    np.testing.assert_array_equal(new["query"][:, 0], updates["query"][:, 0])


# ------------------------------------------------------------------- layouts of leaves


def test_layouts_agree():
    """The same projection as DenseGeneral, matrices, Equinox and stacks have it."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3, 8, 4, 6)).astype(np.float32)  # [L, D, N, d]
    logits = jnp.array([[4, 2, 9, 1], [30, 3, 8, 1], [2, 40, 3, 4.0]])
    every = lambda fun: [
        {"query": fun(a), "key": fun(b)} for a, b in zip(q, k, strict=True)
    ]
    usual, _ = step(
        clipfx.qk_clip(TAU),
        every(jnp.asarray),
        max_logits=list(logits),
    )
    want = np.stack([layer["key"] for layer in usual])
    assert not np.allclose(want, k)

    flat = lambda x: jnp.asarray(x.reshape(8, 24))
    new, _ = step(clipfx.qk_clip(TAU), every(flat), max_logits=list(logits))
    for layer, x in zip(new, want, strict=True):
        np.testing.assert_array_equal(layer["key"], flat(x))

    new, _ = step(
        clipfx.qk_clip(TAU, head_axis=0),
        every(lambda x: flat(x).T),
        max_logits=list(logits),
    )
    for layer, x in zip(new, want, strict=True):
        np.testing.assert_array_equal(layer["key"], flat(x).T)

    first = lambda x: jnp.asarray(x.swapaxes(0, 1))  # [N, D, d]
    new, _ = step(
        clipfx.qk_clip(TAU, head_axis=0), every(first), max_logits=list(logits)
    )
    np.testing.assert_array_equal(new[2]["key"], first(want[2]))

    for axis in (0, 1):
        stacked = {n: jnp.asarray(np.moveaxis(x, 0, axis)) for n, x in
                   (("query", q), ("key", k))}  # fmt: skip
        new, seen = step(
            clipfx.qk_clip(TAU, layer_axis=axis), {"blocks": stacked}, max_logits=logits
        )
        new = np.moveaxis(np.asarray(new["blocks"]["key"]), axis, 0)
        np.testing.assert_array_equal(new, want)
        assert seen["clip0/norm/blocks/1"] == 30
        assert seen["clip0/share/blocks/0"] == 0.25

    joined = [
        jnp.concatenate([flat(a), flat(b), flat(b)], 1)
        for a, b in zip(q, k, strict=True)
    ]
    of = lambda index: (lambda path: f"layer_{path[0]}", index)
    tx = clipfx.qk_clip(TAU, query=of(np.s_[..., :24]), key=of(np.s_[..., 24:48]))
    new, _ = step(
        tx, joined, max_logits={f"layer_{i}": x for i, x in enumerate(logits)}
    )
    for x, y, old in zip(new, want, joined, strict=True):
        np.testing.assert_array_equal(x[:, 24:48], flat(y))
        np.testing.assert_array_equal(x[:, 48:], old[:, 48:])

    halves = [jnp.stack([a, b], 1) for a, b in zip(q, k, strict=True)]  # [D, 2, N, d]
    tx = clipfx.qk_clip(TAU, query=of(np.s_[:, 0]), key=of(np.s_[:, 1]))
    new, _ = step(
        tx, halves, max_logits={f"layer_{i}": x for i, x in enumerate(logits)}
    )
    np.testing.assert_array_equal(np.stack(new)[:, :, 1], want)


def test_flat_groups_and_stacked_biases():
    """K follows from the features of a query head; biases stack as kernels do."""
    params = {
        "query": {"kernel": jnp.ones((2, 8, 12)), "bias": jnp.ones((2, 12))},
        "key": {"kernel": jnp.ones((2, 8, 6)), "bias": jnp.ones((2, 6))},
    }
    logits = jnp.array([[1.0, 20, 3, 4], [1, 2, 3, 80]])
    new, _ = step(clipfx.qk_clip(TAU, 0.0, layer_axis=0), params, max_logits=logits)
    want = np.repeat([[0.25, 1], [1, 1 / 16]], 3, 1)
    np.testing.assert_allclose(new["key"]["bias"], want)
    np.testing.assert_allclose(new["key"]["kernel"][:, 5], want)
    np.testing.assert_array_equal(new["query"]["kernel"], 1)


def test_words_functions_and_trees_name_the_same_leaves():
    shape = jnp.ones((2, 2, 4))
    params = {"h": [{"a": {"q_proj": shape, "k_proj": shape, "v": shape}}] * 2}
    logits = jnp.array([1.0, 20.0])
    tree = lambda name: {"h": [{"a": {name: "first"}}, {"a": {name: "second"}}]}
    first = {"first": logits, "second": logits[::-1]}
    ways = [
        ({"query": "q_proj", "key": "k_proj"}, {"h": [{"a": logits}, logits[::-1]]}),
        (
            {"query": "a/q_proj", "key": "a/k_proj"},
            {"h/0": logits, "h.1": logits[::-1]},
        ),
        ({"query": tree("q_proj"), "key": tree("k_proj")}, first),
        (
            {
                "query": lambda path: name_if(path, "q_proj"),
                "key": lambda path: name_if(path, "k_proj"),
            },
            first,
        ),
    ]
    news = [step(clipfx.qk_clip(TAU, **k), params, max_logits=s)[0] for k, s in ways]
    for new in news:
        jax.tree.map(np.testing.assert_array_equal, new, news[0])
        np.testing.assert_array_equal(new["h"][0]["a"]["v"], shape)
        assert new["h"][0]["a"]["q_proj"][0, 1, 0] == 0.5
        assert new["h"][1]["a"]["q_proj"][0, 0, 0] == 0.5


def name_if(path, name):
    return ("first", "second")[int(path[1])] if path[-1] == name else None


def test_several_uses_of_a_layer_count_by_the_largest():
    used = {"layer": {"seen": (jnp.array([1.0, 20.0]), jnp.array([80.0, 2.0]))}}
    new, _ = step(clipfx.qk_clip(TAU, 1.0), heads(2, 2, 4), max_logits=used)
    np.testing.assert_allclose(new["layer"]["query"][0, :, 0], [1 / 16, 1 / 4])


# -------------------------------------------------------------------- in an optimizer


def test_scan_schedule_and_states_of_fixed_form():
    tx = optax.inject_hyperparams(clipfx.qk_clip)(
        tau=lambda count: jnp.where(count < 2, 100.0, 10.0), alpha=0.5
    )
    tx = optax.named_chain(("sgd", optax.sgd(0.0)), ("qk", tx))
    params = heads(2, 2, 4)
    logits = lambda w: jnp.sum(w["layer"]["query"] * w["layer"]["key"], (0, 2))

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.zeros_like, params)
        seen = 40 * logits(params) / 8
        updates, state = tx.update(grads, state, params, max_logits=seen)
        return (optax.apply_updates(params, updates), state), seen

    carry, seen = jax.lax.scan(body, (params, tx.init(params)), length=4)
    np.testing.assert_allclose(seen[:, 0], [40, 40, 40, 10], rtol=1e-6)
    metrics = clipfx.metrics.read(carry[1])
    assert metrics["qk/steps/layer"] == 4
    assert metrics["qk/clipped/layer"] == 1
    assert metrics["qk/threshold/layer"] == 10


def test_micro_batches_carry_the_largest():
    """`optax.MultiSteps` shows its transform the last micro-batch only."""
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.0), clipfx.qk_clip(TAU, 1.0)), 3)
    params = heads(2, 2, 4)
    grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    nothing = jnp.full(2, -jnp.inf)
    seen = nothing
    for new in ([1.0, 20.0], [10.0, 3.0], [1.0, 1.0]):
        seen = jnp.maximum(seen, jnp.array(new))
        with jax.numpy_dtype_promotion("standard"):  # which MultiSteps needs
            updates, state = tx.update(grads, state, params, max_logits=seen)
        params = optax.apply_updates(params, updates)
        seen = jnp.where(tx.has_updated(state), nothing, seen)
    np.testing.assert_allclose(params["layer"]["query"][0, :, 0], [0.5, 0.25])
    np.testing.assert_array_equal(seen, nothing)


def test_masked_trees_and_stand_ins():
    tx = optax.masked(clipfx.qk_clip(TAU), {"layer": True, "other": False})
    params = heads(2, 2, 4) | {"other": jnp.ones(3), "count": jnp.ones(2, jnp.int32)}
    params.pop("count")
    new, _ = step(tx, params, max_logits=jnp.array([20.0, 1.0]))
    assert new["layer"]["query"][0, 0, 0] == 0.5
    state = clipfx.qk_clip().init(params)
    again = optax.tree.map_params(clipfx.qk_clip(), lambda x: x, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)


# ------------------------------------------------------------------ models of Flax


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        dense = lambda name, n: linen.DenseGeneral((n, 4), name=name)(x)
        q, k, v = dense("query", 4), dense("key", 2), dense("value", 2)
        self.sow("max_logits", "seen", clipfx.max_attention_logits(q, k))
        y = jax.nn.dot_product_attention(q, k, v)
        return x + linen.DenseGeneral(8, (-2, -1), name="out")(y)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return LinenBlock(name="block_1")(LinenBlock(name="block_0")(x))


def test_linen_sows():
    x = 5 * jax.random.normal(jax.random.key(0), (2, 6, 8))
    model = LinenModel()
    params = model.init(jax.random.key(1), x)["params"]
    tx = optax.chain(optax.sgd(1e-4), clipfx.qk_clip(2.0))

    @jax.jit
    def train(params, state):
        def loss(params):
            y, sown = model.apply({"params": params}, x, mutable=["max_logits"])
            return jnp.square(y).mean(), sown["max_logits"]

        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=seen)
        return optax.apply_updates(params, updates), state, seen

    state, tops = tx.init(params), []
    for _ in range(2):
        params, state, seen = train(params, state)
        tops.append(max(x.max() for x in jax.tree.leaves(seen)))
    assert tops[0] > 3
    assert tops[1] < 2.2
    assert "clip0/norm/block_1" in clipfx.metrics.read(state)


class MaxLogits(nnx.Variable):
    """What attention has seen."""


def logged_attention(query, key, value, *, module=None, **_):
    """For `attention_fn=` of Flax; `sow_weights=True` shows it the module."""
    seen = clipfx.max_attention_logits(query, key)
    if isinstance(module, nnx.Module):
        module.sow(MaxLogits, "seen", seen)
    else:
        module.sow("max_logits", "seen", seen)
    return jax.nn.dot_product_attention(query, key, value)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List(
            nnx.MultiHeadAttention(
                4, 8, attention_fn=logged_attention, decode=False, rngs=rngs
            )
            for _ in range(2)
        )

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x, sow_weights=True)
        return x


def captured(model, x):
    """What the model gives, and what it has sown."""
    if hasattr(nnx, "capture"):
        return nnx.capture(model, MaxLogits)(x)
    return model(x), nnx.pop(model, MaxLogits)  # older versions of Flax


def test_nnx_sows_from_the_attention_of_flax():
    x = 5 * jax.random.normal(jax.random.key(0), (2, 6, 8))
    model = NnxModel(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(1e-4), clipfx.qk_clip(2.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            y, seen = captured(model, x)
            return jnp.square(y).mean(), seen

        grads, seen = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=seen)
        return seen

    tops = [max(x.max() for x in jax.tree.leaves(train(model, optimizer)))
            for _ in range(2)]  # fmt: skip
    assert tops[0] > 3
    assert tops[1] < 2.1
    assert "clip0/factor/blocks/1" in clipfx.metrics.read(optimizer.opt_state)


def test_linen_sows_from_the_attention_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    model = linen.MultiHeadDotProductAttention(4, attention_fn=logged_attention)
    params = model.init(jax.random.key(1), x, sow_weights=True)["params"]
    _, sown = model.apply(
        {"params": params}, x, sow_weights=True, mutable=["max_logits"]
    )
    new, _ = step(clipfx.qk_clip(1e-3), params, max_logits=sown["max_logits"])
    assert (
        abs(new["query"]["kernel"]).max() < 0.5 * abs(params["query"]["kernel"]).max()
    )


# -------------------------------------------------------------------------- the logits


def oracle(q, k, mask=None, scale=None, signed=True):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    logits = all_logits(q, k)
    if scale is not None:
        logits *= scale * math.sqrt(q.shape[-1])
    logits = logits if signed else np.abs(logits)
    mask = np.broadcast_to(True if mask is None else mask, logits.shape)
    return np.where(mask, logits, -np.inf).max((0, 2, 3))


IDS = np.array([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2, 2]])
CAUSAL = np.tril(np.ones((7, 7), bool))
SAME = (IDS[:, :, None] == IDS[:, None])[:, None]
PADDED = (np.arange(7) < np.array([[4], [6]]))[:, None, None]
LOGITS = {
    "all": ({}, None),
    "causal": ({"is_causal": True}, CAUSAL),
    "segments": ({"segment_ids": jnp.asarray(IDS), "is_causal": True}, SAME & CAUSAL),
    "two": ({"segment_ids": (jnp.asarray(IDS), jnp.asarray(IDS))}, SAME),
    "mask": ({"mask": jnp.asarray(PADDED)}, PADDED),
    "both": ({"mask": jnp.asarray(SAME), "is_causal": True}, SAME & CAUSAL),
    "matrix": ({"mask": jnp.asarray(CAUSAL.T)}, CAUSAL.T),
}


@pytest.mark.parametrize("block_size", [3, 256])
@pytest.mark.parametrize("name", in_tiers(LOGITS.keys(), {"causal", "both"}))
def test_logits_are_those_of_attention(name, block_size):
    kwargs, mask = LOGITS[name]
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[0], (2, 7, 4, 5))
    k = jax.random.normal(keys[1], (2, 7, 2, 5))
    got = clipfx.max_attention_logits(q, k, block_size=block_size, **kwargs)
    np.testing.assert_allclose(got, oracle(q, k, mask), rtol=1e-5)


def test_logits_of_half_precision_signs_and_scales():
    keys = jax.random.split(jax.random.key(0))
    draw = lambda key: jax.random.normal(key, (2, 9, 2, 64), jnp.bfloat16) - 1
    q, k = draw(keys[0]), -draw(keys[1])
    get = functools.partial(clipfx.max_attention_logits, q, k, block_size=4)
    assert get().dtype == jnp.float32
    np.testing.assert_allclose(get(), oracle(q, k), rtol=1e-5)
    assert (oracle(q, k) < 0).all()
    magnitudes = oracle(q, k, signed=False)
    np.testing.assert_allclose(get(signed=False), magnitudes, rtol=1e-5)
    np.testing.assert_allclose(get(scale=0.5), oracle(q, k, scale=0.5), rtol=1e-5)
    one = clipfx.max_attention_logits(q[0], k[0])
    np.testing.assert_allclose(one, oracle(q[:1], k[:1]), rtol=1e-5)
    assert (get(mask=jnp.zeros((1, 1), bool)) == -jnp.inf).all()


def test_logits_cost_nothing_backward():
    def loss(q):
        return clipfx.max_attention_logits(q, q, block_size=2).sum() + q.sum()

    q = jnp.ones((1, 4, 1, 2))
    np.testing.assert_array_equal(jax.grad(loss)(q), 1)
    forward = str(jax.make_jaxpr(loss)(q)).count("dot_general")
    assert str(jax.make_jaxpr(jax.grad(loss))(q)).count("dot_general") == forward


def test_logits_take_little_memory():
    q = jax.ShapeDtypeStruct((1, 2048, 4, 16), jnp.float32)
    get = functools.partial(clipfx.max_attention_logits, is_causal=True)
    compiled = jax.jit(get).lower(q, q).compile()
    whole = 4 * 2048 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 20
    assert len(jax.eval_shape(get, q, q).shape) == 1


def test_layers_in_a_scan_do_not_share_masks_of_all_blocks():
    """As JAX would, that computes before a scan what all its turns have in common."""

    def loss(w, x, measure):
        def layer(x, w):
            seen = clipfx.max_attention_logits(
                x, x, is_causal=True, segment_ids=jnp.ones((1, 4096), jnp.int32)
            )
            return jnp.sin(x * w), seen if measure else jnp.zeros(x.shape[2])

        x, seen = jax.lax.scan(layer, x, w)
        return x.sum(), seen

    w, x = jnp.ones(2), jax.ShapeDtypeStruct((1, 4096, 4, 16), jnp.float32)

    def memory(measure):
        get = jax.grad(functools.partial(loss, measure=measure), has_aux=True)
        compiled = jax.jit(get).lower(w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    masks = 4 * 4096 * 4096 / 2
    assert memory(True) - memory(False) < masks / 4


# -------------------------------------------------------------------------- on meshes


def attention_step(params, x, batch_axis_name=None, gather=lambda w: w):
    """Weights after one step, whose largest logits are of all of the batch."""
    q, k = (jnp.einsum("btd,dnh->btnh", x, gather(params[n])) for n in ("query", "key"))
    seen = clipfx.max_attention_logits(q, k, is_causal=True, block_size=4)
    tx = clipfx.qk_clip(0.5, batch_axis_name=batch_axis_name)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, max_logits=seen)
    return optax.apply_updates(params, updates), state.metrics


def meshed():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "query": jax.random.normal(keys[0], (8, 4, 6)),
        "key": jax.random.normal(keys[1], (8, 2, 6)),
    }
    return params, jax.random.normal(keys[2], (8, 10, 8))


SPECS = {"query": P(None, "model"), "key": P(None, "model")}


def in_jit(kind):
    params, x = meshed()
    mesh = mesh_of(kind)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(attention_step)(
            jax.tree.map(put, params, SPECS), put(x, P("data"))
        )


def in_shard_map(params_spec, data, batch_axis_name, check_vma=True, **kwargs):
    inside = functools.partial(
        attention_step, batch_axis_name=batch_axis_name, **kwargs
    )
    return jax.jit(
        jax.shard_map(
            inside,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(params_spec, data),
            out_specs=(params_spec, P()),
            check_vma=check_vma,
        )
    )(*meshed())


def fsdp(batch_axis_name):
    """Weights are split along D, over the mesh axis that splits the batch, too."""
    gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
    return in_shard_map(P("data"), P("data"), batch_axis_name, gather=gather)


WAYS = {
    "auto": functools.partial(in_jit, AxisType.Auto),
    "explicit": functools.partial(in_jit, AxisType.Explicit),
    "batch": functools.partial(in_shard_map, P(), P("data"), None),
    "both": functools.partial(in_shard_map, P(), P(("data", "model")), None),
    "named": functools.partial(
        in_shard_map, P(), P(("data", "model")), ("data", "model"), False
    ),
    "heads": functools.partial(in_shard_map, SPECS, P("data"), "data"),
    "fsdp": functools.partial(fsdp, "data"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_is_that_of_all_devices(way):
    want, seen = attention_step(*meshed())
    assert seen.factor < 0.2
    got, metrics = WAYS[way]()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    for a, b in zip(metrics[:9], seen[:9], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_heads_or_batch_is_asked():
    with pytest.raises(ValueError, match=r"batch_axis_name must say .*\['model'\]"):
        in_shard_map(SPECS, P("data"), None)
    with pytest.raises(ValueError, match=r"batch_axis_name must say .*\['data'\]"):
        fsdp(None)


@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_nan_of_one_device_is_seen_by_all():
    logits = jnp.array([[1.0, 4], [math.nan, 3], [2, 20], [1, 1]])
    params = heads(2, 2, 3)
    tx = clipfx.qk_clip(5.0, batch_axis_name="devices")
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = lambda x: tx.update(zeros, tx.init(params), params, max_logits=x)
    updates, state = jax.pmap(update, axis_name="devices")(logits)
    for k in range(4):
        factor = 1 + np.asarray(updates["layer"]["query"][k, 0, :, 0])
        np.testing.assert_allclose(factor, [1, 0.5])
    np.testing.assert_array_equal(state.metrics.nonfinite, 1)


# ------------------------------------------------------------------------------ errors


def updated(params=None, max_logits=None, **kwargs):
    params = heads(2, 3, 4) if params is None else params
    tx = clipfx.qk_clip(**kwargs)
    logits = jnp.ones(3) if max_logits is None else max_logits
    return tx.update(params, tx.init(params), params, max_logits=logits)


TWO = {"a": heads(2, 3, 4), "b": heads(2, 3, 4)}
FLAT = {"query": jnp.ones((2, 12)), "key": jnp.ones((2, 12))}
ERRORS = [
    (lambda: clipfx.qk_clip(0.0), ValueError, r"tau must be .*\(0, inf\], got 0.0"),
    (lambda: clipfx.qk_clip(-1.0), ValueError, "tau must be"),
    (lambda: clipfx.qk_clip(alpha=1.5), ValueError, r"alpha must be .*\[0, 1\]"),
    (lambda: clipfx.qk_clip(threshold=1.0), TypeError, "did you mean tau?"),
    (
        lambda: clipfx.qk_clip(axis_name="data"),
        TypeError,
        "did you mean batch_axis_name?",
    ),
    (
        lambda: optax.inject_hyperparams(clipfx.qk_clip)(layer_axis=0).init({}),
        TypeError,
        'layer_axis must be a static .*static_args="layer_axis"',
    ),
    (lambda: clipfx.qk_clip(content_dim=0), ValueError, "content_dim must be"),
    (lambda: clipfx.qk_clip(head_axis=0.5), TypeError, "head_axis must be"),
    (lambda: clipfx.qk_clip(query=None), TypeError, "query must be a word"),
    (lambda: clipfx.qk_clip(key=lambda x: "a"), TypeError, "key must be a word"),
    (
        lambda: clipfx.qk_clip().update({}, (), None, max_logits=1),
        TypeError,
        "params must be passed to qk_clip",
    ),
    (
        lambda: clipfx.qk_clip().update(heads(1, 1, 1), (), heads(1, 1, 1)),
        TypeError,
        "max_logits must be passed to qk_clip",
    ),
    (
        lambda: updated(query="q_proj"),
        ValueError,
        r"query must name leaves .*'q_proj'.*'layer/key', 'layer/query'",
    ),
    (
        lambda: updated({"a": {"query": jnp.ones((2, 3, 4))}} | heads(2, 3, 4)),
        ValueError,
        r"only those for \['query'\] in 'a'; let key",
    ),
    (lambda: updated(key="query"), ValueError, "a leaf must have one role"),
    (
        lambda: updated(
            {
                "query": {"kernel": jnp.ones((8, 4)), "lora_a": jnp.ones((8, 2))},
                "key": jnp.ones((8, 4)),
            }
        ),
        ValueError,
        "query must fit a kernel and at most one bias .*query/lora_a.*query/kernel",
    ),
    (
        lambda: updated(max_logits=jnp.ones(4)),
        ValueError,
        r"one number per query head, got 4 for 'layer/query' with shape \(2, 3, 4\)",
    ),
    (lambda: updated(FLAT, jnp.ones(5)), ValueError, r"got 5 for 'query'.*\(2, 12\)"),
    (
        lambda: updated({"query": jnp.ones((2, 3, 4)), "key": jnp.ones((2, 2, 4))}),
        ValueError,
        "2 whole key heads",
    ),
    (
        lambda: updated(max_logits=jnp.ones((2, 3))),
        ValueError,
        r"one per query head, got shape \(2, 3\); pass layer_axis=0",
    ),
    (
        lambda: updated(layer_axis=0),
        ValueError,
        r"\[L, N\] of stacked layers, got shape \(3,\)",
    ),
    (
        lambda: updated(heads(5, 2, 3, 4), jnp.ones((2, 3)), layer_axis=0),
        ValueError,
        "a row for each of 5 layers",
    ),
    (lambda: updated(layer_axis=3), ValueError, "layer_axis must be an axis"),
    (lambda: updated(head_axis=3), ValueError, "head_axis must be an axis"),
    (lambda: updated(content_dim=5), ValueError, "content_dim .* got 5 for 4"),
    (lambda: updated(TWO, jnp.ones(3)), ValueError, r"'\(root\)' for several layers"),
    (
        lambda: updated(TWO, {"a": jnp.ones(3)}),
        ValueError,
        r"none for 'b/layer' and some for \['a'\]",
    ),
    (
        lambda: updated(max_logits={"layer": jnp.ones(3), "other": jnp.ones(3)}),
        ValueError,
        r"one at 'other' for no layer; there are \['layer'\]",
    ),
    (
        lambda: updated(max_logits={"layer": {"a": jnp.ones(3), "b": jnp.ones(2)}}),
        ValueError,
        "must agree on the number of heads",
    ),
    (
        lambda: clipfx.max_attention_logits(
            jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 2, 4))
        ),
        ValueError,
        "query and key must be",
    ),
    (
        lambda: clipfx.max_attention_logits(
            jnp.ones((1, 2, 3, 4)), jnp.ones((1, 2, 3, 4)), block_size=0
        ),
        ValueError,
        "block_size must be",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)


def test_logits_that_grow_stay_below_tau_in_training():
    """Without it they grow on; with it they end at tau."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 5)), jnp.float32)
    draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(5, 2, 3)))
    params = {"query": {"kernel": draw(1)}, "key": {"kernel": draw(2)}}
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    project = lambda params, name: jnp.einsum(
        "btd,dnh->btnh", x, params[name]["kernel"]
    )
    both = lambda params: (project(params, "query"), project(params, "key"))

    def loss(params):  # each position wants to attend to itself alone
        q, k = both(params)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(3)
        return -jnp.diagonal(jax.nn.log_softmax(logits), 0, 2, 3).mean()

    def train(tx):
        def step(carry, _):
            params, state = carry
            seen = clipfx.max_attention_logits(*both(params))
            grads = jax.grad(loss)(params)
            more = {"max_logits": seen}
            updates, state = tx.update(grads, state, params, **more)
            params = optax.apply_updates(params, updates)
            return (params, state), clipfx.max_attention_logits(*both(params))

        start = params, tx.init(params)
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, None, 400)[1])())

    with jax.numpy_dtype_promotion("standard"):  # for Optax
        adam = optax.with_extra_args_support(optax.adam(0.01))
        free = train(adam).max(-1)
        clipped = train(optax.chain(adam, clipfx.qk_clip(8.0))).max(-1)
    assert free[-1] > 2 * 8
    assert np.all(np.diff(free[-50:]) > 0)
    # It knows the logits of before a step, so they exceed tau by what one step adds.
    growth = np.max(free[1:] / free[:-1])
    assert growth < 1.05
    assert 7 < clipped.max() <= 8 * growth
