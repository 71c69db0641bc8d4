"""What per-example clipping costs beside an ordinary gradient, and beside its peers.

    python -m benchmarks.per_example

Every figure is a ratio within one run: the variants take turns, call by call, and each
time is divided by that of the ordinary summed gradient of the same turn; medians.
Memory is what the compiled program takes for temporaries. `factored`, `formed` and
`instantiated` are the methods that the cost model chooses from, forced on every
parameter: no one of them should be much faster than the choice.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import _opacus
from clipfx import per_example
from clipfx._core.groups import group_leaves
from clipfx.per_example.engine import clip, trace

_TURNS = flags.DEFINE_integer("turns", 15, "Timed calls of each variant.")
_WORKLOADS = flags.DEFINE_list("workloads", None, "Names; by default all.")
_VARIANTS = flags.DEFINE_list("variants", None, "Names; by default all.")
_SLOW = flags.DEFINE_float("slow", 20.0, "Ratio from which one call has to do.")


_OPACUS = flags.DEFINE_bool("opacus", True, "Whether to run PyTorch's peer too.")


class Workload(NamedTuple):
    """A loss of one example, with parameters and a batch.

    Attributes:
      loss: Of parameters and one example `(x, y)`.
      params: A tree.
      batch: `(x, y)`.
      microbatch: Examples at a time for the variant that takes a few.
    """

    loss: Callable
    params: Any
    batch: Any
    microbatch: int


class Block(nn.Module):
    """A pre-norm block of a transformer."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of one example."""
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        attend: Callable = nn.MultiHeadDotProductAttention(self.heads)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        h = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(h))


class Transformer(nn.Module):
    """A decoder with learned positions."""

    layers: int
    width: int
    length: int
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits at each position."""
        embed = nn.Embed(self.vocabulary, self.width)
        position = self.param(
            "position", nn.initializers.normal(0.02), (self.length, self.width)
        )
        x = embed(tokens) + position
        for _ in range(self.layers):
            x = Block(self.width // 64)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


class Cnn(nn.Module):
    """Three convolutions, two of them with stride 2, and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of one example."""
        for k, width in enumerate((32, 64, 64)):
            x = nn.Conv(width, (3, 3), strides=2 if k else 1)(x)
            x = nn.relu(nn.GroupNorm(8)(x))
        return nn.Dense(10)(x.reshape(-1))


class Recurrent(nn.Module):
    """A recurrent layer and a linear one at its end."""

    cell: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of one example."""
        return nn.Dense(10)(nn.RNN(self.cell(256))(x)[-1])


class Normalized(nn.Module):
    """Three layers whose weights are normalised by column."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[T, D]` to `[10]`."""
        for _ in range(3):
            x = jnp.tanh(nn.WeightNorm(nn.Dense(512))(x))
        return nn.Dense(10)(x.mean(0))


def mlp() -> Workload:
    """784-1024-1024-1024-10."""
    return _dense((784, 1024, 1024, 1024, 10), 256)


def _dense(sizes: tuple[int, ...], size: int) -> Workload:
    """Plain functions."""
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    params = [
        {"w": jax.random.normal(key, (i, o)) / i**0.5, "b": jnp.zeros(o)}
        for key, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def loss(params, example):
        x, y = example
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return Workload(loss, params, _data((size, sizes[0]), (size,), 10), 16)


def _data(x: tuple, y: tuple, classes: int, tokens: bool = False) -> Any:
    keys = jax.random.split(jax.random.key(1))
    labels = jax.random.randint(keys[1], y, 0, classes)
    if tokens:
        return jax.random.randint(keys[0], x, 0, classes), labels
    return jax.random.normal(keys[0], x), labels


def _module(module: nn.Module, batch: Any, microbatch: int) -> Workload:
    params = jax.jit(module.init)(jax.random.key(0), batch[0][0])

    def loss(params, example):
        x, y = example
        logits: Any = module.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()

    return Workload(loss, params, batch, microbatch)


def _transformer(width: int, length: int, size: int, microbatch: int) -> Workload:
    batch = _data((size, length), (size, length), 256, tokens=True)
    return _module(Transformer(4, width, length), batch, microbatch)


def epoch(turns: int) -> None:
    """Prints the seconds of 20,000 digits, 64-128-128-10, in steps of SGD of 100."""
    sizes = (64, 128, 128, 10)
    work = _dense(sizes, 100)

    def train(grad: Callable) -> Callable:
        def step(params, batch):
            found = grad(params, batch)
            return jax.tree.map(lambda p, g: p - 1e-4 * g, params, found)

        return jax.jit(step)

    clip, plain = clipped(work), ordinary(work)
    steps = {
        "ordinary": train(lambda *args: plain(*args)[1]),
        "clipfx": train(lambda *args: clip(*args)[0]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns + 1):
        for name, step in steps.items():
            params, start = work.params, time.perf_counter()
            for _ in range(200):
                params = step(params, work.batch)
            jax.block_until_ready(params)
            times[name].append(time.perf_counter() - start)
    base = np.array(times["ordinary"][1:])
    print("\nepoch of 20,000 digits, batches of 100")
    for name, row in times.items():
        seconds = np.array(row[1:])
        print(f"{name:24} {np.median(seconds):7.2f} s {np.median(seconds / base):7.2f}")


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "transformer": lambda: _transformer(256, 64, 16, 4),
    "transformer T=512": lambda: _transformer(512, 512, 4, 1),
    "cnn": lambda: _module(Cnn(), _data((64, 32, 32, 3), (64,), 10), 8),
    "lstm": lambda: _module(
        Recurrent(nn.LSTMCell), _data((32, 128, 256), (32,), 10), 8
    ),
    "lstm optimized": lambda: _module(
        Recurrent(nn.OptimizedLSTMCell), _data((32, 128, 256), (32,), 10), 8
    ),
    "weight norm": lambda: _module(Normalized(), _data((16, 32, 512), (16,), 10), 4),
}


def ordinary(work: Workload) -> Callable:
    """The gradient of the summed loss."""
    total = lambda params, batch: jax.vmap(work.loss, (None, 0))(params, batch).sum()
    return jax.value_and_grad(total)


def every(work: Workload) -> Callable:
    """`vmap(grad)`, then clip and add up."""

    def run(params, batch):
        grads = jax.vmap(jax.grad(work.loss), (None, 0))(params, batch)
        norms = jax.vmap(optax.tree.norm)(grads)
        factor = jnp.minimum(1, 1 / norms)
        return jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), grads)

    return run


def stacked(work: Workload) -> Callable:
    """`vmap(grad)`, then `clipfx.per_example.clip_per_example`."""
    tx = per_example.clip_per_example(1.0, reduce="sum")

    def run(params, batch):
        grads = jax.vmap(jax.grad(work.loss), (None, 0))(params, batch)
        return tx.update(grads, tx.init(params), params)[0]

    return run


def clipped(work: Workload) -> Callable:
    """`clipfx.per_example.clipped_grad`."""
    return per_example.clipped_grad(work.loss, 1.0)


def microbatched(work: Workload) -> Callable:
    """The same, a few examples at a time."""
    size = work.microbatch
    return per_example.clipped_grad(work.loss, 1.0, microbatch_size=size)


def forced(method: str) -> Callable:
    """The same with one method for every parameter."""

    def make(work: Workload) -> Callable:
        grad = per_example.clipped_grad(work.loss, 1.0)

        def run(params, batch):
            call = trace.prepare(grad.signature, (params, batch), {}, force=method)
            members = group_leaves("global", params)
            limit = jnp.ones((1, 1))
            return clip.bounded_sum(call, members, limit, grad.response, None)

        return run

    return make


def jax_privacy(microbatch: bool) -> Callable:
    """The peer."""

    def make(work: Workload) -> Callable | None:
        if importlib.util.find_spec("jax_privacy") is None:
            return None
        from jax_privacy import clipping

        return clipping.clipped_grad(
            work.loss,
            l2_clip_norm=1.0,
            batch_argnums=1,
            keep_batch_dim=False,
            microbatch_size=work.microbatch if microbatch else None,
        )

    return make


VARIANTS: dict[str, Callable] = {
    "ordinary": ordinary,
    "clipfx": clipped,
    "clipfx microbatch": microbatched,
    "factored": forced("factored"),
    "formed": forced("formed"),
    "instantiated": forced("instantiated"),
    "vmap(grad)": every,
    "clip_per_example": stacked,
    "jax_privacy": jax_privacy(False),
    "jax_privacy microbatch": jax_privacy(True),
}


def measure(work: Workload, names: list[str], turns: int, slow: float) -> None:
    """Prints one table."""
    steps, compile_seconds, memory = {}, {}, {}
    for name in names:
        run = VARIANTS[name](work)
        if run is None:
            print(f"{name:24} not installed")
            continue
        start = time.perf_counter()
        try:
            step = jax.jit(run).lower(work.params, work.batch).compile()
        except Exception as error:  # a peer may not work with this JAX
            print(f"{name:24} fails: {str(error).splitlines()[0][:100]}")
            continue
        compile_seconds[name] = time.perf_counter() - start
        analysis: Any = step.memory_analysis()
        memory[name] = analysis.temp_size_in_bytes
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    ratio = dict.fromkeys(steps, 1.0)
    for turn in range(turns + 1):
        for name, step in steps.items():
            if turn > 1 and ratio[name] > slow:
                continue
            start = time.perf_counter()
            jax.block_until_ready(step(work.params, work.batch))
            times[name].append(time.perf_counter() - start)
            ratio[name] = times[name][-1] / times["ordinary"][-1]
    base = np.array(times["ordinary"][1:])
    print(f"{'':24} {'ms':>9} {'ratio':>7} {'MB':>8} {'ratio':>7} {'compile s':>10}")
    for name in steps:
        row = np.array(times[name][1:])
        share = np.median(row / base[: len(row)])
        print(
            f"{name:24} {1e3 * np.median(row):9.1f} {share:7.2f} "
            f"{memory[name] / 1e6:8.1f} {memory[name] / memory['ordinary']:7.2f} "
            f"{compile_seconds[name]:10.1f}"
        )


def main(argv: list[str]) -> None:
    """Prints a table for each workload."""
    del argv
    names = list(_VARIANTS.value or VARIANTS)
    for name in _WORKLOADS.value or WORKLOADS:
        if name == "epoch":
            continue
        work = WORKLOADS[name]()
        count = sum(x.size for x in jax.tree.leaves(work.params))
        print(f"\n{name}: {count / 1e6:.2f}M parameters")
        measure(work, names, _TURNS.value, _SLOW.value)
        if _OPACUS.value and importlib.util.find_spec("opacus") is None:
            print(f"{'Opacus':24} not installed")
        elif _OPACUS.value:
            _opacus.measure(name, _TURNS.value)
    if _WORKLOADS.value is None or "epoch" in _WORKLOADS.value:
        epoch(_TURNS.value)


if __name__ == "__main__":
    app.run(main)
