"""A decoder in Flax Linen, and in NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from trees import enable_x64
from zoo import TOKENS, VOCABULARY, WIDTH, T, check, cross_entropy, lenient

# `.ci/run` has the zoo in an environment of its own.
pytestmark = pytest.mark.full


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, WIDTH)
        position = self.param("position", nn.initializers.normal(1), (T, WIDTH))
        x = embed(tokens) + position[: len(tokens)]
        attend = nn.MultiHeadDotProductAttention(4)
        x = x + attend(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        x = x + nn.Dense(WIDTH)(h)
        return embed.attend(nn.LayerNorm()(x))


def test_linen():
    model = Decoder()

    def loss(params, tokens):
        return cross_entropy(model.apply(params, tokens[:-1]), tokens[1:])

    with lenient():
        params = jax.jit(model.init)(jax.random.key(0), TOKENS[0])
        check(loss, params, TOKENS)


class NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        # What a layer computes in.
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        self.embed = nnx.Embed(VOCABULARY, WIDTH, **options)
        self.before = nnx.LayerNorm(WIDTH, **options)
        self.attend = nnx.MultiHeadAttention(4, WIDTH, decode=False, **options)
        self.after = nnx.LayerNorm(WIDTH, **options)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, **options)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, **options)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = nnx.make_causal_mask(tokens)
        x = x + self.attend(self.before(x), mask=mask)
        x = x + self.down(nnx.gelu(self.up(self.after(x))))
        return self.embed.attend(x)


def test_nnx():
    with enable_x64(True):
        graph, params, rest = nnx.split(NnxDecoder(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, tokens):
        model = nnx.merge(graph, params, rest, copy=True)
        return cross_entropy(model(tokens[:-1]), tokens[1:])

    with lenient():
        check(loss, params, TOKENS)
