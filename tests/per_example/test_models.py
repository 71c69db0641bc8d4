"""Per-example clipping of models as people write them: Flax, Equinox, functions."""

import functools
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from per_example_oracle import (
    LIMIT,
    agrees,
    cast,
    each_gradient,
    exact,
    expected,
    methods,
    near,
)
from tiers import in_tiers

from clipfx import per_example

B, T, WIDTH, VOCABULARY = 3, 4, 6, 7


@pytest.fixture(autouse=True)
def as_libraries_expect():
    """Their layers add biases of lower rank."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def vectors(*shape):
    return np.random.default_rng(1).normal(size=(B, *shape)).astype(np.float32)


TOKENS = np.random.default_rng(2).integers(0, VOCABULARY, (B, T)).astype(np.int32)
LABELS = np.arange(B, dtype=np.int32)
TARGETS = TOKENS, TOKENS[:, ::-1]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def takes(found, **expected):
    """Every leaf whose name ends so has that method."""
    for end, method in expected.items():
        some = {k: v for k, v in found.items() if k.split("/")[-1] == end}
        assert some and set(some.values()) == {method}, some


# --------------------------------------------------------------------- Flax Linen


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.relu(nn.Dense(WIDTH)(x)))
        return nn.Dense(3)(nn.RMSNorm()(x))


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2)(x)))
        x = nn.Conv(4, (2, 2), feature_group_count=2, kernel_dilation=2)(x)
        x = nn.relu(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x))
        return nn.Dense(3)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(-1))


class Recurrent(nn.Module):
    cell: type
    reverse: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(5), reverse=self.reverse, keep_order=True)(x)
        return nn.Dense(3)(x[-1])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(T))
        attend = nn.MultiHeadDotProductAttention(2)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h)


class Transformer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + self.param(
            "position", nn.initializers.normal(1), (T, WIDTH)
        )
        block = nn.remat(Block) if self.remat else Block
        return embed.attend(nn.LayerNorm()(block()(x)))


class Scanned(nn.Module):
    """Layers by `nn.scan`, rematerialized."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        body = lambda block, x, _: (block(x), None)
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=2)  # fmt: skip
        x, _ = scan(nn.remat(Block)(), x, None)
        return nn.Dense(VOCABULARY)(x)


class Experts(nn.Module):
    """Two experts, each sees everything, mixed by a router."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(0.5)
        up = self.param("up", normal, (2, WIDTH, 4))
        down = self.param("down", normal, (2, 4, WIDTH))
        gate = jax.nn.softmax(nn.Dense(2, use_bias=False, name="router")(x))
        best = jnp.where(gate == gate.max(-1, keepdims=True), gate, 0)
        h = nn.silu(jnp.einsum("td,edf->tef", x, up))
        return jnp.einsum("te,tef,efd->td", best, h, down)


def linen(module, example, seed=0):
    return jax.jit(module.init)(jax.random.key(seed), example[0])


def linen_loss(module):
    def loss(params, example):
        x, labels = example
        return cross_entropy(module.apply(params, x), labels)

    return loss


LINEN = {
    "mlp": (Mlp(), (vectors(WIDTH), LABELS)),
    "cnn": (Cnn(), (vectors(6, 6, 2), LABELS)),
    "lstm": (Recurrent(nn.LSTMCell), (vectors(T, WIDTH), LABELS)),
    "lstm optimized": (Recurrent(nn.OptimizedLSTMCell), (vectors(T, WIDTH), LABELS)),
    "gru": (Recurrent(nn.GRUCell, reverse=True), (vectors(T, WIDTH), LABELS)),
    "transformer": (Transformer(), TARGETS),
    "transformer remat": (Transformer(remat=True), TARGETS),
    "scanned": (Scanned(), TARGETS),
    "experts": (Experts(), (vectors(T, WIDTH), TOKENS % WIDTH)),
}
# By the last part of a leaf's name; "" is for all of them.
LINEN_METHODS = {
    "mlp": {"kernel": "outer product"},
    "lstm": {"bias": "bias sum"},
    "lstm optimized": {"bias": "bias sum"},
    "transformer": {"embedding": "Gram", "kernel": "Gram", "position": "bias sum"},
    "scanned": {"embedding": "segment sum", "kernel": "Gram"},
    "experts": {"up": "Gram", "kernel": "Gram"},
}


@pytest.mark.parametrize("name", in_tiers(LINEN.keys(), {"lstm"}))
def test_linen(name):
    module, batch = LINEN[name]
    params = linen(module, jax.tree.map(lambda x: x[0], batch))
    found = agrees(linen_loss(module), params, batch)
    takes(found, **LINEN_METHODS.get(name, {}))
    if "lstm" in name or name == "gru":
        kernels = {v for k, v in found.items() if "Cell" in k and "kernel" in k}
        assert kernels == {"Gram"}


# ----------------------------------------------------------------------- Flax NNX


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.second = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.embed.attend(x + self.attend(self.norm(x)))


class NnxRnn(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(WIDTH, 5, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[-1])


NNX = {
    "mlp": (NnxMlp, (vectors(WIDTH), LABELS), {"kernel": "outer product"}),
    "transformer": (NnxTransformer, TARGETS, {"embedding": "Gram", "kernel": "Gram"}),
    "rnn": (NnxRnn, (vectors(T, WIDTH), LABELS), {}),
}


@pytest.mark.parametrize("name", in_tiers(NNX.keys(), {"transformer"}))
def test_nnx(name):
    make, batch, table = NNX[name]
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, example, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        return cross_entropy(model(example[0]), example[1])

    # Counters of random numbers are state: an argument like any other.
    found = agrees(loss, params, batch, rest)
    for end, method in table.items():
        some = {v for k, v in found.items() if end in k}
        assert some == {method}


# ------------------------------------------------------------------------- Equinox


class EqxGru(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(WIDTH, 5, key=first)
        self.head = eqx.nn.Linear(5, 3, key=second)

    def __call__(self, x):
        step = lambda h, x: (self.cell(x, h), None)
        return self.head(jax.lax.scan(step, jnp.zeros(5), x)[0])


EQUINOX = {
    "mlp": (
        functools.partial(eqx.nn.MLP, WIDTH, 3, 5, 2),
        vectors(WIDTH),
        {"weight": "outer product"},
    ),
    "gru": (EqxGru, vectors(T, WIDTH), {"weight_ih": "Gram", "weight_hh": "Gram"}),
}


@pytest.mark.parametrize("name", in_tiers(EQUINOX.keys(), {"gru"}))
def test_equinox(name):
    make, x, table = EQUINOX[name]
    params, static = eqx.partition(make(key=jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, example):
        model = eqx.combine(params, static)
        return cross_entropy(model(example[0]), example[1])

    takes(agrees(loss, params, (x, LABELS)), **table)


# ------------------------------------------------------------------ plain functions


def plain(layers=2):
    rng = np.random.default_rng(0)
    draw = lambda *s: (rng.normal(size=s) / s[0] ** 0.5).astype(np.float32)
    return [{"w": draw(WIDTH, WIDTH), "b": draw(WIDTH)} for _ in range(layers)]


def plain_loss(params, x, compute=None):
    dtype = compute or x.dtype
    h = x.astype(dtype)
    for layer in params:
        h = jnp.tanh(h @ layer["w"].astype(dtype) + layer["b"].astype(dtype))
    return jnp.sum(h.astype(jnp.float32) ** 2)


@pytest.mark.parametrize("remat", in_tiers([False, True], {True}))
@pytest.mark.parametrize("kept", in_tiers(["float32", "bfloat16"], {"bfloat16"}))
def test_bfloat16(remat, kept):
    """Sums are float32, and within the rounding of bfloat16 of exact ones."""
    params = cast(plain(), kept)
    loss = lambda p, x: plain_loss(p, x, jnp.bfloat16)
    loss = jax.checkpoint(loss) if remat else loss
    batch = jnp.asarray(vectors(T, WIDTH))
    sums, info = jax.jit(per_example.clipped_grad(loss, LIMIT))(params, batch)
    grads = each_gradient(plain_loss, params, batch)
    total, norm, _ = expected(grads, limit=LIMIT)
    np.testing.assert_allclose(info.norm, norm, 0.03)
    for x, y in zip(jax.tree.leaves(sums), jax.tree.leaves(total), strict=True):
        assert x.dtype == jnp.float32
        assert np.abs(x - y).max() <= 0.03 * np.abs(y).max()
    # Nearer to the gradients of the same program, whose leaves alone are rounded.
    grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    near(info.norm, expected(exact(grads))[1], 0.01)


def test_dropout_with_a_key_for_every_example():
    module = nn.Sequential([nn.Dense(8), nn.Dropout(0.5, deterministic=False)])
    x = vectors(WIDTH)
    params = module.init(jax.random.key(0), x[0])
    keys = jax.random.split(jax.random.key(2), B)
    loss = lambda p, x, key: (module.apply(p, x, rngs={"dropout": key}) ** 2).sum()
    for size in (None, 2):
        agrees(loss, params, x, keys, batch_argnums=(1, 2), microbatch_size=size)


def test_has_aux_and_several_arguments():
    """Parameters after the batch, in the order asked for, and arguments of neither."""

    def loss(scale, x, params, offset, *, power):
        h = jnp.tanh(x @ params["w"] + params["b"] + offset)
        value = (scale * h**power).sum()
        return value, {"hidden": h, "label": jnp.argmax(h), "none": None}

    params, x = plain(1)[0], vectors(WIDTH)
    scale, offset = np.ones(WIDTH, np.float32), np.float32(0.1)
    grad = per_example.clipped_grad(loss, LIMIT, argnums=(2, 0), has_aux=True)
    run = lambda s, x, p: grad(s, x, p, offset, power=2)
    (by_params, by_scale), info = jax.jit(run)(scale, x, params)
    one = jax.value_and_grad(loss, argnums=(2, 0), has_aux=True)
    (value, aux), grads = jax.vmap(
        lambda x: one(scale, x, params, offset, power=2)
    )(x)  # fmt: skip
    total, norm, _ = expected(exact(grads), limit=LIMIT)
    near(info.norm, norm)
    near(info.value, exact(value))
    near((by_params, by_scale), total)
    for a, b in zip(jax.tree.leaves(info.aux), jax.tree.leaves(aux), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, 1e-6)


def test_static_keyword_arguments():
    """As in `jax.grad`: what is not an array is not traced."""
    loss = lambda p, x, *, train: plain_loss(p, x) * (2.0 if train else 1.0)
    x = jnp.asarray(vectors(WIDTH))
    grad = jax.jit(per_example.clipped_grad(loss, LIMIT), static_argnames="train")
    twice, once = (grad(plain(), x, train=t)[1].norm for t in (True, False))
    np.testing.assert_allclose(twice, 2 * once, 1e-5)


# -------------------------------------------------------------- programs as compiled


def compiled(loss, params, batch):
    run = jax.jit(per_example.clipped_grad(loss, LIMIT))
    return run.lower(params, batch).compile()


def test_remat_goes_on_saving_memory():
    depth, width = 16, 16

    def loss_of(wrap):
        def block(h, layer):
            for k in range(4):
                h = h + jnp.tanh(h @ layer[k])
            return h

        body = lambda h, q: (wrap(block)(h, q), None)
        return lambda p, x: jax.lax.scan(body, x, p)[0].sum()

    params = [np.zeros((depth, width, width), np.float32)] * 4
    batch = np.zeros((32, 16, width), np.float32)
    with_remat, without = (
        compiled(loss_of(wrap), params, batch).memory_analysis().temp_size_in_bytes
        for wrap in (jax.checkpoint, lambda f: f)
    )
    assert with_remat < 0.5 * without


def test_gradients_are_formed_where_a_cache_holds_a_batch_of_them():
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w))
    w, example = jnp.zeros((64, 192)), (64, 64)
    few, many = (jnp.zeros((size, *example)) for size in (16, 256))
    assert set(methods(loss, w, few).values()) == {"instantiated"}
    assert set(methods(loss, w, many).values()) == {"Gram"}
    assert per_example.explain(loss, w, few[0]).rows[0].method == "Gram"


def test_no_gradient_of_an_example_is_formed():
    """No array of batch times weight."""
    size, wide = 11, 57
    rng = np.random.default_rng(0)
    params = [rng.normal(size=s).astype(np.float32) for s in ((wide, 43), (43, 37))]
    batch = rng.normal(size=(size, wide)).astype(np.float32)
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]))
    assert set(methods(loss, params, batch).values()) == {"outer product"}
    text = compiled(loss, params, batch).as_text()
    shapes = [
        tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert any(np.prod(s) == size * 43 for s in shapes)
    assert max(np.prod(s) for s in shapes) < size * 43 * 37


def normalized(params, x):
    """A dense layer, and one whose weight is normalised by column."""
    plain, v = params
    w = v / jnp.sqrt((v * v).sum(0))
    return jnp.tanh(jnp.tanh(x @ plain) @ w).sum()


def drawn_normalized():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return (draw(96, 64), draw(64, 128)), draw(32, 5, 96)


@pytest.mark.parametrize("bad", [False, True])
def test_what_is_formed_is_added_up_row_by_row(bad):
    params, x = drawn_normalized()
    x = x.at[2, 1].set(jnp.nan) if bad else x
    program = compiled(normalized, params, x)
    sums, info = program(params, x)
    rows = jax.vmap(jax.grad(normalized), (None, 0))(params, x)
    factor = jnp.where(jnp.isfinite(info.norm[:, 0]), info.factor[:, 0], 0)
    assert (factor[2] == 0) == bad and (factor > 0).sum() == 32 - bad
    for got, row in zip(sums, rows, strict=True):
        row = jnp.where((factor > 0)[:, None, None], row, 0)
        want = np.tensordot(factor, row, 1)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    # Of adding up with strides XLA would make one of these.
    text = program.as_text()
    assert not re.search(r"f32\[64,128\]\S* reduce\(", text)
    assert re.search(r"f32\[32,64,128\]", text)


def test_clip_per_example_keeps_no_copies_of_what_it_is_given():
    """Of layers that XLA would lay out with examples last, and add up with strides."""
    tx = per_example.clip_per_example(1.0)
    params, x = drawn_normalized()
    fun = lambda params, x: jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]).sum()

    def step(params, x):
        grads = jax.vmap(jax.grad(fun), (None, 0))(params, x)
        return tx.update(grads, tx.init(params))[0]

    program = jax.jit(step).lower(params, x).compile()
    assert not re.search(r"f32\[64,128\]\S* reduce\(", program.as_text())
    each = [32 * w.nbytes for w in params]
    most = sum(each) + max(each)  # one is laid out anew at a time
    if jax.__version_info__ < (0, 8):  # whose XLA does so with all
        most = 2 * sum(each)
    assert sum(each) < program.memory_analysis().temp_size_in_bytes < 1.1 * most


def test_what_lies_row_by_row_is_not_copied():
    tx = per_example.clip_per_example(1.0)
    params, x = drawn_normalized()
    stacked = jax.vmap(jax.grad(normalized), (None, 0))(params, x)
    update = lambda stacked: tx.update(stacked, tx.init(params))[0]
    program = jax.jit(update).lower(stacked).compile()
    most = min(x.nbytes for x in stacked) / 4
    if jax.__version_info__ < (0, 8):  # whose XLA writes out squares
        most += sum(x.nbytes for x in stacked)
    assert program.memory_analysis().temp_size_in_bytes < most
