"""A neural ODE in Diffrax, its steps fixed or adaptive, and by two adjoints."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from zoo import LABELS, WIDTH, B, check, cross_entropy, lenient, vectors

diffrax = pytest.importorskip("diffrax", reason="Diffrax is in the extra zoo")

INPUTS = 512
WEIGHTS = ["field/layers/0/weight", "field/layers/1/weight"]
BIASES = ["field/layers/0/bias", "field/layers/1/bias"]


class Ode(eqx.Module):
    first: eqx.nn.Linear
    field: eqx.nn.MLP
    head: eqx.nn.Linear
    options: dict = eqx.field(static=True)

    def __init__(self, key, **options):
        a, b, c = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(INPUTS, WIDTH, key=a)
        self.field = eqx.nn.MLP(WIDTH, WIDTH, 64, 1, jnp.tanh, key=b)
        self.head = eqx.nn.Linear(WIDTH, B, key=c)
        self.options = options

    def __call__(self, x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, field: field(x)),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=0.25,
            y0=self.first(x),
            args=self.field,
            max_steps=8,
            **self.options,
        )
        return self.head(solution.ys[0])


ADAPTIVE = diffrax.PIDController(rtol=1e-3, atol=1e-4)
ODES = {
    # By default steps are a loop with a derivative of its own, which forms gradients.
    "fixed": ({}, WEIGHTS + BIASES),
    "adaptive": ({"stepsize_controller": ADAPTIVE}, WEIGHTS + BIASES),
    # Here they are a scan, of many positions: its weights are small beside them.
    "direct": ({"adjoint": diffrax.DirectAdjoint()}, WEIGHTS),
}


@pytest.mark.parametrize("name", ODES)
def test_diffrax(name):
    options, formed = ODES[name]
    ode = Ode(jax.random.key(0), **options)
    params, static = eqx.partition(ode, eqx.is_inexact_array)

    def loss(params, example):
        x, label = example
        return cross_entropy(eqx.combine(params, static)(x), label)

    with lenient():
        check(loss, params, (vectors(INPUTS), LABELS), formed=formed)
