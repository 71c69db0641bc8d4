"""What QK-Clip costs in a decoder's training step, and where.

    python -m benchmarks.attention
    python -m benchmarks.attention --topology=v5e:2x2   # compiled only, or h100

Every figure is a ratio within one run: steps take turns, and the median over the turns
is that of a step to the plain one of the same turn. `metrics` measures the largest
logits and does nothing with them, `qk_clip` rescales weights by them too, and `given`
rescales by logits that cost nothing, as those that a kernel gives.
Compiled for a device that is not there (see `_targets` for what that needs) a step is
measured by the cycles that XLA's cost model expects of a TPU, or by what a GPU moves
through memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import clipfx
from benchmarks._programs import print_costs
from benchmarks._timing import in_turns

_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU to compile for, or h100.")
_TURNS = flags.DEFINE_integer("turns", 21, "Timed steps of each variant.")
_WIDTH = flags.DEFINE_integer("width", 256, "Model width; heads have 64 features.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Blocks, stacked for scan.")
_LENGTHS = flags.DEFINE_list("lengths", ["128", "512"], "Sequence lengths.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens in a batch.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of activations.")

VARIANTS = ("plain", "metrics", "qk_clip", "given")


def make_params(width: int, layers: int) -> dict[str, Any]:
    """A decoder's blocks, a leaf for each kind of matrix."""
    heads = width // 64
    shapes = {
        "query": (width, heads, 64),
        "key": (width, heads, 64),
        "value": (width, heads, 64),
        "out": (heads, 64, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, (layers, *shape)) * width**-0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def block(x: jax.Array, w: Any, measure: bool) -> tuple[jax.Array, jax.Array]:
    """One block, and the largest logits of its heads."""
    w = jax.tree.map(lambda w: w.astype(x.dtype), w)
    norm = lambda x: x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", norm(x), w[name])
        for name in ("query", "key", "value")
    )
    seen = (
        clipfx.max_attention_logits(q, k, is_causal=True)
        if measure
        else jnp.full(q.shape[2], 200.0)
    )
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("btnh,nhd->btd", y, w["out"])
    return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], seen


def make_step(variant: str) -> tuple[Callable[..., Any], Any]:
    """A training step of params, state, a number and a batch; and its transform."""
    measure = variant in ("metrics", "qk_clip")
    rescale = variant in ("qk_clip", "given")
    adamw = optax.adamw(1e-4)
    tx = optax.chain(adamw, clipfx.qk_clip(layer_axis=0)) if rescale else adamw
    tx = optax.with_extra_args_support(tx)

    def loss(params, x):
        y, seen = jax.lax.scan(functools.partial(block, measure=measure), x, params)
        return jnp.square(y.astype(jnp.float32)).mean(), seen

    def step(params, state, total, x):
        grads, seen = jax.grad(loss, has_aux=True)(params, x)
        updates, state = tx.update(grads, state, params, max_logits=seen)
        return optax.apply_updates(params, updates), state, total + seen.max()

    return step, tx


def compiled_only() -> None:
    """Prints a table for each length, of steps compiled for the topology."""
    print(f"jax {jax.__version__}, optax {optax.__version__}, {_TOPOLOGY.value}")
    make = functools.partial(make_params, _WIDTH.value, _LAYERS.value)
    params, total = jax.eval_shape(make), jax.ShapeDtypeStruct((), jnp.float32)
    for length in map(int, _LENGTHS.value):
        shape = (_TOKENS.value // length, length, _WIDTH.value)
        print(f"\n{length} positions, {_TOKENS.value} tokens, {_DTYPE.value}")
        x = jax.ShapeDtypeStruct(shape, jnp.dtype(_DTYPE.value))
        steps = {}
        for variant in VARIANTS:
            step, tx = make_step(variant)
            args = params, jax.eval_shape(tx.init, params), total, x
            steps[variant] = jax.jit(step, donate_argnums=(0, 1)), args
        print_costs(_TOPOLOGY.value, steps)


def main(argv: list[str]) -> None:
    """Prints a row for each length."""
    del argv
    if _TOPOLOGY.value:
        compiled_only()
        return
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0]}")
    print(f"{'length':>8}{'plain ms':>10}" + "".join(f"{v:>10}" for v in VARIANTS[1:]))
    params = make_params(_WIDTH.value, _LAYERS.value)
    for length in map(int, _LENGTHS.value):
        shape = (_TOKENS.value // length, length, _WIDTH.value)
        x = jax.random.normal(jax.random.key(1), shape, _DTYPE.value)
        steps, carries = {}, {}
        for variant in VARIANTS:
            step, tx = make_step(variant)
            steps[variant] = jax.jit(step, donate_argnums=(0, 1))
            own = jax.tree.map(jnp.copy, params)
            carries[variant] = own, tx.init(own), jnp.zeros([])
        times = in_turns(steps, carries, x, _TURNS.value, 1)
        ratios = [np.median(times[v] / times["plain"]) for v in VARIANTS[1:]]
        plain = 1000 * np.median(times["plain"])
        print(
            f"{length:8}{plain:10.1f}" + "".join(f"{ratio:10.2f}" for ratio in ratios)
        )


if __name__ == "__main__":
    app.run(main)
