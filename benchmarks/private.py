"""What a private or a fair step costs beside an ordinary one, the noise apart.

    python -m benchmarks.private
    python -m benchmarks.private --optimizer=adam
    python -m benchmarks.private --optimizer=adam --workload=transformer

A step is gradient, optimizer, new parameters, donated, on a workload of
`benchmarks.per_example`, by default the multilayer perceptron. Ratios are within one
run: the variants take turns, step by step, and each time is divided by that of the
ordinary step of the same turn; medians. `noise` draws for all parameters and does
nothing else. What a private step costs without it is `dp_grad` less `noise`, and
`dp_grad, z = 0`.

A second table compares draws with those of `jax.random`: ten million float32, added to
as many, minima of alternating turns; where ours end, and the chance of a variable of
the distribution to be farther out.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from absl import app, flags

from benchmarks.per_example import WORKLOADS, Workload
from clipfx import per_example, privacy
from clipfx.privacy import draws

_STEPS = flags.DEFINE_integer("steps", 40, "Timed steps of each variant.")
OPTIMIZERS = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-3)}
_OPTIMIZER = flags.DEFINE_enum("optimizer", "sgd", list(OPTIMIZERS), "Of the steps.")
_WORKLOAD = flags.DEFINE_enum("workload", "mlp", [*WORKLOADS], "What is trained.")


class Variant(NamedTuple):
    """`run(state, params, batch) -> gradient, state`, and the first state."""

    run: Callable
    state: Any = ()


def ordinary(work: Workload) -> Variant:
    """The gradient of the mean loss."""
    losses = jax.vmap(work.loss, (None, 0))
    grad = jax.grad(lambda params, batch: losses(params, batch).mean())
    return Variant(lambda state, params, batch: (grad(params, batch), state))


def private(
    work: Workload, noise: float, max_norm: Any = 1.0, **settings: Any
) -> Variant:
    """`clipfx.privacy.dp_grad`."""
    size = len(jax.tree.leaves(work.batch)[0])
    key = jax.random.key(0)
    grad = privacy.dp_grad(
        work.loss, max_norm=max_norm, noise_multiplier=noise, expected_batch_size=size,
        key=key, **settings,
    )  # fmt: skip
    run = lambda state, params, batch: grad(state, params, batch, where=None)[:2]
    return Variant(run, grad.init(work.params))


def noise(kind: Callable, implementation: str) -> Callable[[Workload], Variant]:
    """The draw alone."""

    def make(work: Workload) -> Variant:
        tx = kind(1.0, jax.random.key(0, impl=implementation))

        def run(state, params, batch):
            return tx.update(jax.tree.map(jnp.zeros_like, params), state)

        return Variant(run, tx.init(work.params))

    return make


def fair(work: Workload, count: int) -> Variant:
    """`clipfx.per_example.fair_grad`."""
    grad = per_example.fair_grad(work.loss, count, 2.0)
    ids = jnp.arange(len(jax.tree.leaves(work.batch)[0])) % count
    return Variant(lambda state, *args: (grad(*args, population_ids=ids)[0], state))


VARIANTS: dict[str, Callable[[Workload], Variant]] = {
    "ordinary": ordinary,
    "dp_grad": lambda work: private(work, 1.1),
    "dp_grad, z = 0": lambda work: private(work, 0.0),
    "dp_grad, quantile": lambda work: private(
        work, 1.1, max_norm=privacy.quantile(1.0, count_stddev=12.8)
    ),
    "dp_grad, 1-norm": lambda work: private(work, 1.1, ord=1),
    "dp_grad, second_moment": lambda work: private(
        work, 1.1, scale=privacy.second_moment(eps_root=1e-4)
    ),
    "dp_grad, every moment": lambda work: private(
        work, 1.1, scale=privacy.second_moment(eps_root=1e-4, factored=False)
    ),
    "noise": noise(privacy.add_gaussian_noise, "threefry2x32"),
    "noise, Laplace": noise(privacy.add_laplace_noise, "threefry2x32"),
    "noise, rbg": noise(privacy.add_gaussian_noise, "rbg"),
    "fair_grad, K = 2": lambda work: fair(work, 2),
    "fair_grad, K = 5": lambda work: fair(work, 5),
}


def compiled(work: Workload, make: Callable, tx: Any) -> tuple[Any, Any]:
    """A training step from learner to learner, and the first one."""
    run, state = make(work)

    def step(learner, batch):
        params, opt_state, state = learner
        grads, state = run(state, params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    first = jax.tree.map(jnp.copy, (work.params, tx.init(work.params), state))
    return jax.jit(step, donate_argnums=0).lower(first, work.batch).compile(), first


COUNT = 10_000_000
# By name: draws, the same of `jax.random`, and the law.
DRAWS: dict[str, tuple] = {
    "Gaussian": (draws.gaussian, jax.random.normal, scipy.stats.norm),
    "Laplace": (draws.laplace, jax.random.laplace, scipy.stats.laplace),
}


def compare_draws(turns: int) -> None:
    """Prints the second table."""
    programs, key, data = {}, jax.random.key(0), jax.random.key_data
    for name, (inverse, usual, _) in DRAWS.items():
        ours = lambda key, f=inverse: draws.draws(f, data(key), (COUNT,), jnp.float32)
        theirs = lambda key, f=usual: f(key, (COUNT,), jnp.float32)
        for text, draw in ((name, ours), (f"{name}, jax.random", theirs)):
            add = jax.jit(lambda key, x, draw=draw: x + draw(key), donate_argnums=1)
            programs[text] = add.lower(key, jnp.zeros(COUNT)).compile()
    best = dict.fromkeys(programs, math.inf)
    for _ in range(turns):
        for name, program in programs.items():
            x = jax.block_until_ready(jnp.zeros(COUNT))
            start = time.perf_counter()
            jax.block_until_ready(program(key, x))
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"\n{COUNT / 1e6:g}M draws")
    print(f"{'':24} {'ms':>8} {'MB':>8} {'end':>7} {'beyond':>9}")
    for name, program in programs.items():
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        text = f"{name:24} {1e3 * best[name]:8.1f} {memory:8.1f}"
        if name in DRAWS:
            inverse, _, law = DRAWS[name]
            none = jnp.zeros([], jnp.uint32)
            end = float(draws.of_words(inverse, none, none, jnp.float32))
            text += f" {end:7.2f} {2 * law.sf(end):9.1e}"
        print(text)


def main(argv: list[str]) -> None:
    """Prints two tables."""
    del argv
    work, tx = WORKLOADS[_WORKLOAD.value](), OPTIMIZERS[_OPTIMIZER.value]
    steps, learners = {}, {}
    for name, make in VARIANTS.items():
        steps[name], learners[name] = compiled(work, make, tx)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_STEPS.value + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            learners[name] = step(learners[name], work.batch)
            jax.block_until_ready(learners[name])
            times[name].append(time.perf_counter() - start)
    rows = {name: np.array(row[2:]) for name, row in times.items()}
    rows["dp_grad less noise"] = rows["dp_grad"] - rows["noise"]
    count = sum(x.size for x in jax.tree.leaves(work.params))
    print(
        f"{count / 1e6:.2f}M parameters, {len(jax.tree.leaves(work.batch)[0])} examples"
    )
    print(f"{'':24} {'ms':>8} {'ratio':>7} {'MB':>8}")
    for name, row in rows.items():
        ratio = np.median(row / rows["ordinary"])
        analysis: Any = steps[name].memory_analysis() if name in steps else None
        memory = f"{analysis.temp_size_in_bytes / 1e6:8.1f}" if analysis else ""
        print(f"{name:24} {1e3 * np.median(row):8.1f} {ratio:7.2f} {memory}")
    compare_draws(10)


if __name__ == "__main__":
    app.run(main)
