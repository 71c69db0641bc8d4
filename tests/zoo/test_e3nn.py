"""An equivariant network of e3nn-jax, in Haiku; an example is a cloud of points."""

import jax
import jax.numpy as jnp
import pytest
from zoo import LABELS, B, T, check, cross_entropy, lenient, vectors

e3nn = pytest.importorskip("e3nn_jax", reason="e3nn-jax is in the extra zoo")
hk = pytest.importorskip("haiku", reason="Haiku is in the extra zoo")


def network(points):
    harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", points, True)
    x = e3nn.haiku.Linear("16x0e + 16x1o")(harmonics)
    x = e3nn.haiku.FullyConnectedTensorProduct("96x0e + 16x1o + 16x2e")(x, harmonics)
    x = e3nn.gate(x)
    x = e3nn.haiku.Linear("128x0e")(x)
    return hk.Linear(B)(jnp.mean(x.array, 0))


def test_e3nn():
    model = hk.without_apply_rng(hk.transform(network))

    def loss(params, example):
        points, label = example
        return cross_entropy(model.apply(params, points), label)

    points = vectors(T, 3)
    with lenient():
        params = model.init(jax.random.key(0), jnp.float32(points[0]))
        # Of 16 numbers, which are fewer than 12 positions of 17.
        check(loss, params, (points, LABELS), formed=("linear/w[1,1] 1x1o,16x1o",))
