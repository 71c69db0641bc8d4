"""A decoder of bytes in Flax NNX, and how its parameters are sharded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

BYTES = 256


class Attention(nnx.Module):
    """Causal attention over heads."""

    def __init__(self, width: int, heads: int, linear: Callable):
        layers = (linear(width, width, use_bias=False) for _ in range(4))
        self.heads = heads
        self.query, self.key, self.value, self.out = layers

    def __call__(self, x: jax.Array) -> jax.Array:
        cut = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        parts = (cut(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(self.mix(*parts).reshape(x.shape))

    def mix(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Means of values, weighted by attention; `[B, T, heads, features]` each."""
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)


class Block(nnx.Module):
    """Attention, then two dense layers, each beside the stream."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
        linear: Callable,
        attention: Callable,
    ):
        self.before_attention = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = attention(width, heads, linear)
        self.before_dense = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)
        x += drop(self.attention(self.before_attention(x)))
        return x + drop(self.down(nnx.gelu(self.up(self.before_dense(x)))))


class Decoder(nnx.Module):
    """Logits of the next byte, computed in `dtype` from parameters in float32.

    With a `rank`, every dense matrix W of a block becomes W + A B, where A has that
    many columns and B starts at zero: x W + (x A) B, without forming A B.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        length: int,
        dropout: float,
        dtype: Any,
        rngs: nnx.Rngs,
        rank: int = 0,
        attention: Callable = Attention,
    ):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        if rank:
            given = {"lora_rank": rank, "lora_dtype": dtype}
            linear = functools.partial(nnx.LoRALinear, dtype=dtype, rngs=rngs, **given)
        embed = lambda number: nnx.Embed(number, width, dtype=dtype, rngs=rngs)
        self.embed, self.position = embed(BYTES), embed(length)
        self.blocks = nnx.List(
            Block(width, heads, dropout, dtype, rngs, linear, attention)
            for _ in range(layers)
        )
        self.after = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.readout = nnx.Linear(width, BYTES, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Float32 logits `[B, T, 256]` for ids `[B, T]`; no dropout without `rngs`."""
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[1]))[None]
        for block in self.blocks:
            x = block(x, rngs)
        return self.readout(self.after(x)).astype(jnp.float32)


# Layers that are split by what comes out of them over "model", and by what goes in;
# the other axis is that of FSDP. So a block needs one sum over "model" for each half.
BY_COLUMN = {"query", "key", "value", "up", "readout"}
BY_ROW = {"out", "down", "embed"}


def spec_of(path: tuple) -> P:
    """The sharding of the leaf at a path of parameters; vectors are replicated."""
    words = [str(key.key) for key in path]
    leaf = words[-1]
    if leaf in ("bias", "scale"):
        return P()
    if leaf in ("lora_a", "lora_b"):  # the side that a factor has of its matrix
        into, out = spec_of(path[:-1])
        return P(into, None) if leaf == "lora_a" else P(None, out)
    layer = words[-2]
    if layer in BY_COLUMN:
        return P("data", "model")
    return P("model", "data") if layer in BY_ROW else P(None, "data")
