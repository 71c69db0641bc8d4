"""What a private or a fair step costs beside an ordinary one, the noise apart.

    python -m benchmarks.private

A step is gradient, SGD, new parameters, donated, on the multilayer perceptron of
`benchmarks.per_example`. Ratios are within one run: the variants take turns, step by
step, and each time is divided by that of the ordinary step of the same turn; medians.
`noise` draws for all parameters and does nothing else. What a private step costs
without it is `dp_grad` less `noise`, and `dp_grad, z = 0`.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.per_example import Workload, mlp
from clipfx import per_example, privacy

_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps of each variant.")
RATE = 1e-3


def ordinary(work: Workload) -> Callable:
    """The gradient of the mean loss."""
    losses = jax.vmap(work.loss, (None, 0))
    return jax.grad(lambda params, batch: losses(params, batch).mean())


def private(
    work: Workload, noise: float, max_norm: Any = 1.0, ord: int = 2
) -> Callable:
    """`clipfx.privacy.dp_grad`, its state but for the step thrown away."""
    size = len(jax.tree.leaves(work.batch)[0])
    grad = privacy.dp_grad(
        work.loss,
        max_norm=max_norm,
        ord=ord,
        noise_multiplier=noise,
        expected_batch_size=size,
        key=jax.random.key(0),
    )
    state = grad.init(work.params)

    def run(params, batch, step):
        return grad(state._replace(step=step), params, batch, where=None)[0]

    return run


def noise(kind: Callable, implementation: str) -> Callable:
    """The draw alone."""

    def make(work: Workload) -> Callable:
        tx = kind(1.0, jax.random.key(0, impl=implementation))

        def run(params, batch, step):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return tx.update(zeros, privacy.NoiseState(step))[0]

        return run

    return make


def fair(work: Workload, count: int) -> Callable:
    """`clipfx.per_example.fair_grad`."""
    grad = per_example.fair_grad(work.loss, count, 2.0)
    group = jnp.arange(len(jax.tree.leaves(work.batch)[0])) % count
    return lambda params, batch, step: grad(params, batch, population_ids=group)[0]


VARIANTS: dict[str, Callable] = {
    "ordinary": lambda work: lambda p, b, _: ordinary(work)(p, b),
    "dp_grad": lambda work: private(work, 1.1),
    "dp_grad, z = 0": lambda work: private(work, 0.0),
    "dp_grad, quantile": lambda work: private(
        work, 1.1, max_norm=privacy.quantile(1.0, count_stddev=12.8)
    ),
    "dp_grad, 1-norm": lambda work: private(work, 1.1, ord=1),
    "noise": noise(privacy.add_gaussian_noise, "threefry2x32"),
    "noise, Laplace": noise(privacy.add_laplace_noise, "threefry2x32"),
    "noise, rbg": noise(privacy.add_gaussian_noise, "rbg"),
    "fair_grad, K = 2": lambda work: fair(work, 2),
    "fair_grad, K = 5": lambda work: fair(work, 5),
}


def compiled(work: Workload, make: Callable) -> Any:
    """A training step."""
    grad = make(work)

    def step(params, batch, number):
        grads = grad(params, batch, number)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    number = jnp.zeros([], jnp.int32)
    jitted = jax.jit(step, donate_argnums=0)
    return jitted.lower(work.params, work.batch, number).compile()


def main(argv: list[str]) -> None:
    """Prints one table."""
    del argv
    work = mlp()
    steps = {name: compiled(work, make) for name, make in VARIANTS.items()}
    params = {name: jax.tree.map(jnp.copy, work.params) for name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_STEPS.value + 2):
        counter = jnp.asarray(number, jnp.int32)
        for name, step in steps.items():
            start = time.perf_counter()
            params[name] = step(params[name], work.batch, counter)
            jax.block_until_ready(params[name])
            times[name].append(time.perf_counter() - start)
    rows = {name: np.array(row[2:]) for name, row in times.items()}
    rows["dp_grad less noise"] = rows["dp_grad"] - rows["noise"]
    count = sum(x.size for x in jax.tree.leaves(work.params))
    print(f"{count / 1e6:.2f}M parameters, {len(work.batch[0])} examples")
    print(f"{'':22} {'ms':>8} {'ratio':>7} {'MB':>8}")
    for name, row in rows.items():
        ratio = np.median(row / rows["ordinary"])
        analysis: Any = steps[name].memory_analysis() if name in steps else None
        memory = f"{analysis.temp_size_in_bytes / 1e6:8.1f}" if analysis else ""
        print(f"{name:22} {1e3 * np.median(row):8.1f} {ratio:7.2f} {memory}")


if __name__ == "__main__":
    app.run(main)
