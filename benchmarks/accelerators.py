"""What a clip costs in whole training steps on a TPU or GPU, owning one or not.

    python -m benchmarks.accelerators                      # on the device here: times
    python -m benchmarks.accelerators --topology=v5e:2x2   # compiled only, for a TPU

Times are ratios to Optax's clip within one run, in which the variants take turns.
Compiled for a TPU that is not there (`pip install "clipfx[accelerators]"`), a step is
measured by the cycles that XLA's cost model expects of its instructions. They depend on
what XLA places in fast memory, which a changed instruction far away may change: a bare
multiply is the yardstick beside Optax.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx
from benchmarks._timing import floor, in_turns
from clipfx._core import reductions

_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU to compile for, as v5e:2x2.")
_MODELS = flags.DEFINE_list("models", ["mlp", "decoder"], "Of MODELS.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of activations.")
_METHODS = flags.DEFINE_list("methods", [], "Of METHODS; none for all.")
_AS = flags.DEFINE_list("as", [""], "Sums as on a cpu, gpu or tpu; none for its own.")
_WIDTH = flags.DEFINE_integer("width", 0, "Of the models; 0 for 2048 and 1024.")
_TURNS = flags.DEFINE_integer("turns", 9, "Timed turns of each variant.")
_CHAIN = flags.DEFINE_integer("steps", 10, "Steps in each turn.")


class Model(NamedTuple):
    """A loss, `loss(params, batch, dtype)`, and shapes of what it takes."""

    loss: Callable[..., Any]
    params: Any
    batch: Any


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(width: int) -> Model:
    """Four layers, whose gradients are at hand one after the other."""
    width = width or 2048

    def loss(params: Any, batch: Any, dtype: Any) -> Any:
        x, y = batch
        for k, layer in enumerate(params):
            x = jax.nn.relu(x) if k else x
            x = x.astype(dtype) @ layer["w"].astype(dtype) + layer["b"].astype(dtype)
        return jnp.mean((x.astype(jnp.float32) - y) ** 2)

    params = [{"w": _floats(width, width), "b": _floats(width)} for _ in range(4)]
    return Model(loss, params, (_floats(width // 2, width), _floats(width // 2, width)))


def decoder(width: int) -> Model:
    """Four blocks in a scan, rematerialized, table tied to the head."""
    width = width or 1024
    length, size, vocabulary, heads, layers = width, 8, 8 * width, width // 64, 4

    def block(x: Any, p: Any) -> Any:
        cast = lambda w: w.astype(x.dtype)
        y = _normed(x, p["norm1"]) @ cast(p["qkv"])
        q, k, v = jnp.split(y.reshape(*y.shape[:2], heads, -1), 3, axis=-1)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + y.reshape(x.shape) @ cast(p["out"])
        return x + jax.nn.gelu(_normed(x, p["norm2"]) @ cast(p["up"])) @ cast(p["down"])

    def loss(params: Any, batch: Any, dtype: Any) -> Any:
        table = params["table"].astype(dtype)
        turn = jax.checkpoint(lambda x, p: (block(x, p), None))
        x, _ = jax.lax.scan(turn, table[batch], params["blocks"])
        logits = (_normed(x, params["norm"]) @ table.T).astype(jnp.float32)
        labels = jnp.roll(batch, -1, axis=1)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(each)

    blocks = {
        "qkv": _floats(layers, width, 3 * width),
        "out": _floats(layers, width, width),
        "up": _floats(layers, width, 4 * width),
        "down": _floats(layers, 4 * width, width),
        "norm1": _floats(layers, width),
        "norm2": _floats(layers, width),
    }
    params = {
        "table": _floats(vocabulary, width),
        "blocks": blocks,
        "norm": _floats(width),
    }
    return Model(loss, params, jax.ShapeDtypeStruct((size, length), jnp.int32))


def _normed(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide / size * (1 + scale)).astype(x.dtype)


MODELS = {"mlp": mlp, "decoder": decoder}
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax": lambda: optax.clip_by_global_norm(1.0),
    "none": optax.identity,
    "floor": lambda: floor(1.0),
    "global": lambda: clipfx.clip_by_global_norm(1.0),
    "layer": lambda: clipfx.clip_per_layer(1.0),
    "ord_3": lambda: clipfx.clip_by_global_norm(1.0, ord=3),
    "value": lambda: clipfx.clip_by_value(1.0),
    "zclip": clipfx.zclip,
    "autoclip": clipfx.autoclip,
    "quantile_clip": clipfx.quantile_clip,
    "adagc": clipfx.adagc,
    "agc": clipfx.agc,
    "spamp": clipfx.spamp,
    "clip_spikes": clipfx.clip_spikes,
    "spam_clip": clipfx.spam_clip,
    "clip_by_params": clipfx.clip_by_params,
    "skip_spikes": lambda: clipfx.skip_spikes(optax.identity()),
    "error_feedback": lambda: clipfx.error_feedback(clipfx.clip_by_global_norm(1.0)),
}

_KNOWN = {"models": MODELS, "methods": METHODS, "as": ["", "cpu", "gpu", "tpu", "mesh"]}
for _flag, _names in _KNOWN.items():
    flags.register_validator(
        _flag,
        lambda chosen, names=_names: all(x in names for x in chosen),
        f"must be of {', '.join(filter(None, _names))}.",
    )


def compiled(model: Model, tx: Any, dtype: Any, sharding: Any) -> tuple[Any, Any]:
    """A compiled donating step `(params, state, batch)`, and shapes of its carry."""
    tx = optax.chain(tx, optax.adamw(1e-3))

    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(model.loss)(params, batch, dtype)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    carry = (model.params, jax.eval_shape(tx.init, model.params))
    carry, batch = jax.tree.map(place, (carry, model.batch))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*carry, batch).compile(), tx


def facts(text: str) -> str:
    """Of a compiled program: estimated cycles (TPU), loops and branches."""
    bodies = set(re.findall(r"body=(%[\w.\-]+)", text))
    computations = re.findall(
        r"^(ENTRY )?(%[\w.\-]+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.S | re.M
    )
    cycles = 0
    for entry, name, body in computations:
        if entry or name in bodies:
            cycles += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', body)))
    count = lambda op: len(re.findall(rf" {op}\(", text))
    known = f"{cycles / 1e3:10.0f}" if cycles else f"{'-':>10}"
    return f"{known}{count('while'):7}{count('conditional'):7}"


def drawn(shapes: Any) -> Any:
    """Small random numbers, on the device."""

    def draw(x: Any) -> jax.Array:
        rng = np.random.default_rng(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 256, x.shape), x.dtype)
        return jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(draw, shapes)


def measure(name: str, dtype: Any, sharding: Any) -> None:
    """Prints a row for each method, of one model in one dtype."""
    model = MODELS[name](_WIDTH.value)
    steps, carries, rows = {}, {}, {}
    for method in _METHODS.value or METHODS:
        for way in _AS.value if method not in ("optax", "none", "floor") else [""]:
            reductions.forced_device = way
            start = time.perf_counter()
            step, tx = compiled(model, METHODS[method](), dtype, sharding)
            seconds = time.perf_counter() - start
            temp = step.memory_analysis().temp_size_in_bytes / 1e6
            label = f"{method} as on {way}" if way else method
            rows[label] = f"{facts(step.as_text())}{temp:9.1f}{seconds:9.1f}"
            if not _TOPOLOGY.value:
                params = drawn(model.params)
                steps[label], carries[label] = step, (params, tx.init(params))
    print(f"\n{name}, {jnp.dtype(dtype).name}", flush=True)
    head = f"{'':28}{'kcycles':>10}{'while':>7}{'cond':>7}{'temp MB':>9}{'compile':>9}"
    print(head if _TOPOLOGY.value else f"{head}{'ms':>9}{'/optax':>8}")
    if not _TOPOLOGY.value:
        batch = drawn(model.batch)
        times = in_turns(steps, carries, batch, _TURNS.value, _CHAIN.value)
        base = times.get("optax", next(iter(times.values())))
        for label, ms in times.items():
            rows[label] += f"{1e3 * np.median(ms):9.3f}{np.median(ms / base):8.3f}"
    for label, row in rows.items():
        print(f"{label:28}{row}", flush=True)


def main(argv: Any) -> None:
    del argv
    sharding = None
    if _TOPOLOGY.value:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        from jax.experimental import topologies

        chip = topologies.get_topology_desc(_TOPOLOGY.value, "tpu").devices[0]
        sharding = NamedSharding(Mesh(np.array([chip]), ("data",)), P())
    device = _TOPOLOGY.value or jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, optax {optax.__version__}, {device}")
    for name in _MODELS.value:
        for dtype in _DTYPES.value:
            measure(name, jnp.dtype(dtype), sharding)


if __name__ == "__main__":
    app.run(main)
