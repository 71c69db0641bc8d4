"""A decoder in Haliax."""

import equinox as eqx
import jax
import pytest
from zoo import TOKENS, VOCABULARY, WIDTH, T, check, cross_entropy, lenient

hax = pytest.importorskip("haliax", reason="Haliax is in the extra zoo")

Vocab, Embed = hax.Axis("vocabulary", VOCABULARY), hax.Axis("embed", WIDTH)
Heads, HeadSize = hax.Axis("heads", 4), hax.Axis("head_size", WIDTH // 4)
Pos = hax.Axis("position", T - 1)
KeyPos = Pos.alias("key_position")


class Decoder(eqx.Module):
    embed: hax.nn.Embedding
    before: hax.nn.LayerNorm
    qkv: list
    out: hax.nn.Linear
    after: hax.nn.LayerNorm
    mlp: hax.nn.MLP

    def __init__(self, key):
        a, b, c, *keys = jax.random.split(key, 6)
        self.embed = hax.nn.Embedding.init(Vocab, Embed, key=a)
        self.before = hax.nn.LayerNorm.init(Embed)
        linear = lambda key: hax.nn.Linear.init(Embed, (Heads, HeadSize), key=key)
        self.qkv = [linear(key) for key in keys]
        self.out = hax.nn.Linear.init((Heads, HeadSize), Embed, key=b)
        self.after = hax.nn.LayerNorm.init(Embed)
        self.mlp = hax.nn.MLP.init(Embed, Embed, 4 * WIDTH, 2, key=c)

    def __call__(self, tokens):
        x = self.embed(tokens)
        h = self.before(x)
        q, k, v = (f(h) for f in self.qkv)
        k, v = k.rename({Pos: KeyPos}), v.rename({Pos: KeyPos})
        mask = hax.arange(Pos).broadcast_axis(KeyPos) >= hax.arange(KeyPos)
        h = hax.nn.attention.dot_product_attention(KeyPos, HeadSize, q, k, v, mask)
        x = x + self.out(h)
        return self.embed.unembed(x + self.mlp(self.after(x)))


@pytest.mark.filterwarnings(
    "ignore:jax.core.is_constant_dim:DeprecationWarning:haliax.jax_utils"
)
def test_haliax():
    with lenient():
        model = Decoder(jax.random.key(0))
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(params, tokens):
            model = eqx.combine(params, static)
            logits = model(hax.named(tokens[:-1], Pos)).rearrange((Pos, Vocab))
            return cross_entropy(logits.array, tokens[1:])

        check(loss, params, TOKENS)
