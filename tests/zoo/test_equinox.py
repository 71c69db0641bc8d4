"""A decoder and a recurrent network in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import LABELS, TOKENS, VOCABULARY, WIDTH, B, T, check, cross_entropy, vectors

# `.ci/run` has the zoo in an environment of its own.
pytestmark = pytest.mark.full


class Decoder(eqx.Module):
    embed: eqx.nn.Embedding
    attend: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=a)
        self.attend = eqx.nn.MultiheadAttention(4, WIDTH, key=b)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=c)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, use_bias=False, key=d)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        h = jax.vmap(self.norm)(x)
        x = x + self.attend(h, h, h, mask=np.tri(len(tokens), dtype=bool))
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))
        return jax.vmap(self.head)(x)


class Lstm(eqx.Module):
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(WIDTH, WIDTH, key=first)
        self.head = eqx.nn.Linear(WIDTH, B, key=second)

    def __call__(self, x):
        start = jnp.zeros(WIDTH, x.dtype), jnp.zeros(WIDTH, x.dtype)
        (h, _), _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, x)
        return self.head(h)


def test_decoder():
    params, static = eqx.partition(Decoder(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, tokens):
        model = eqx.combine(params, static)
        return cross_entropy(model(tokens[:-1]), tokens[1:])

    check(loss, params, TOKENS)


def test_lstm():
    params, static = eqx.partition(Lstm(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, example):
        x, label = example
        return cross_entropy(eqx.combine(params, static)(x), label)

    check(loss, params, (vectors(T, WIDTH), LABELS))
