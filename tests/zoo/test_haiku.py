"""A convolutional and a recurrent network in Haiku."""

import jax
import jax.numpy as jnp
import pytest
from zoo import LABELS, WIDTH, B, T, check, cross_entropy, lenient, vectors

hk = pytest.importorskip("haiku", reason="Haiku is in the extra zoo")


def convolutions(image):
    x = hk.Conv2D(16, 3, stride=2)(image)
    x = jax.nn.relu(hk.GroupNorm(4)(x[None])[0])
    x = jax.nn.relu(hk.Conv2D(128, 3, stride=2)(x))
    return hk.Linear(B)(x.mean((0, 1)))


def recurrent(x):
    core = hk.DeepRNN([hk.LSTM(WIDTH), jnp.tanh, hk.GRU(WIDTH)])
    h, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
    return hk.Linear(B)(h[-1])


@pytest.mark.parametrize(
    ("model", "x", "formed"),
    [
        (convolutions, vectors(8, 8, 3), ["conv2_d/w"]),
        (recurrent, vectors(T, WIDTH), []),
    ],
    ids=["convolutions", "recurrent"],
)
def test_haiku(model, x, formed):
    model = hk.without_apply_rng(hk.transform(model))

    def loss(params, example):
        x, label = example
        return cross_entropy(model.apply(params, x), label)

    with lenient():
        params = model.init(jax.random.key(0), jnp.float32(x[0]))
        check(loss, params, (x, LABELS), formed=formed)
