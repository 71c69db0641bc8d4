"""Whole training steps compiled, for devices that need not be here, and read."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clipfx
from benchmarks._collectives import sizes
from benchmarks._targets import branches as branches_of
from benchmarks._targets import computations, devices, moved, platform_of
from benchmarks._targets import loops as loops_of
from benchmarks._timing import floor
from clipfx import per_example


class Model(NamedTuple):
    """A loss, `loss(params, batch, dtype)`, and shapes of what it takes."""

    loss: Callable[..., Any]
    params: Any
    batch: Any


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(width: int, layers: int, mesh: Mesh | None) -> Model:
    """Layers whose gradients are at hand one after the other."""
    width = width or 2048

    def loss(params: Any, batch: Any, dtype: Any) -> Any:
        x, y = batch
        for k, layer in enumerate(params):
            x = jax.nn.relu(x) if k else x
            x = x.astype(dtype) @ layer["w"].astype(dtype) + layer["b"].astype(dtype)
        return jnp.mean((x.astype(jnp.float32) - y) ** 2)

    params = [{"w": _floats(width, width), "b": _floats(width)} for _ in range(layers)]
    rows = _floats(_chips(mesh) * width // 2, width)
    return Model(loss, params, (rows, rows))


def decoder(width: int, layers: int, mesh: Mesh | None) -> Model:
    """Blocks in a scan, rematerialized, table tied to the head."""
    width = width or 1024
    length, size = min(width, 1024), 8 * _chips(mesh)

    def split(x: Any) -> Any:
        if mesh is None or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))

    def loss(params: Any, batch: Any, dtype: Any) -> Any:
        table = params["table"].astype(dtype)
        turn = jax.checkpoint(lambda x, p: (split(_block(x, p)), None))
        x, _ = jax.lax.scan(turn, split(table[batch]), params["blocks"])
        logits = (_normed(x, params["norm"]) @ table.T).astype(jnp.float32)
        labels = jnp.roll(batch, -1, axis=1)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(each)

    params = _decoder_params(width, layers, 8 * width)
    return Model(loss, params, jax.ShapeDtypeStruct((size, length), jnp.int32))


def _block(x: Any, p: Any) -> Any:
    """Attention with heads of 64, and a layer of four times the width."""
    cast = lambda w: w.astype(x.dtype)
    y = _normed(x, p["norm1"]) @ cast(p["qkv"])
    heads = y.reshape(*y.shape[:-1], x.shape[-1] // 64, 192)
    q, k, v = jnp.split(heads, 3, axis=-1)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + y.reshape(x.shape) @ cast(p["out"])
    return x + jax.nn.gelu(_normed(x, p["norm2"]) @ cast(p["up"])) @ cast(p["down"])


def _decoder_params(width: int, layers: int, vocabulary: int) -> Any:
    blocks = {
        "qkv": _floats(layers, width, 3 * width),
        "out": _floats(layers, width, width),
        "up": _floats(layers, width, 4 * width),
        "down": _floats(layers, 4 * width, width),
        "norm1": _floats(layers, width),
        "norm2": _floats(layers, width),
    }
    table = _floats(vocabulary, width)
    return {"table": table, "blocks": blocks, "norm": _floats(width)}


class Shape(NamedTuple):
    """Of a decoder for per-example clipping."""

    layers: int
    width: int
    length: int
    size: int
    vocabulary: int


def decoder_of_examples(shape: Shape, kind: str) -> Model:
    """The decoder, with the loss of one example in bfloat16.

    Args:
      shape: Of the decoder and the batch.
      kind: `kept` in a scan, `remat` in a scan, or `unrolled` with remat.
    """
    block = _block if kind == "kept" else jax.checkpoint(_block)

    def loss(params: Any, tokens: Any) -> Any:
        table = params["table"].astype(jnp.bfloat16)
        x = table[tokens]
        if kind == "unrolled":
            for k in range(shape.layers):
                x = block(x, jax.tree.map(lambda w: w[k], params["blocks"]))  # noqa: B023
        else:
            x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        logits = (_normed(x, params["norm"]) @ table.T).astype(jnp.float32)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.roll(tokens, -1)
            )
        )

    params = _decoder_params(shape.width, shape.layers, shape.vocabulary)
    batch = jax.ShapeDtypeStruct((shape.size, shape.length), jnp.int32)
    return Model(loss, params, batch)


# Groups by name; blocks are stacked.
_GROUPS: dict[str, Any] = {
    "global": "global",
    "leaf": "leaf",
    "weight": lambda path: "/".join(path) + "/*" * (path[0] == "blocks"),
    "block": lambda path: path[0] + "/*" * (path[0] == "blocks"),
}


def of_examples(model: Model, groups: str | None) -> Callable[[Any, Any], Any]:
    """The sum of clipped gradients; of gradients as they are without groups."""
    if groups is None:
        each = jax.vmap(model.loss, (None, 0))
        return lambda params, batch: jax.grad(lambda p: each(p, batch).sum())(params)
    clipped = per_example.clipped_grad(model.loss, 1.0, groups=_GROUPS[groups])
    return lambda params, batch: clipped(params, batch)[0]


def _chips(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape["data"]


def _normed(x: Any, scale: Any) -> Any:
    wide = x.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide / size * (1 + scale)).astype(x.dtype)


MODELS = {"mlp": mlp, "decoder": decoder}


def least(more: str) -> optax.GradientTransformation:
    """A bare multiply of what a rule has to read besides the updates.

    Args:
      more: `weights`; what is read `again`, when the norm of the updates is known; or a
        `memory`, the norm of which is then asked for, and that of what is let through.
    """
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
    times = lambda tree, factor: jax.tree.map(lambda x: x * factor, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if more == "memory":
            updates = jax.tree.map(jnp.add, updates, state)
        factor = 1 / jnp.maximum(1, norm(updates))
        if more == "weights":
            return times(updates, jnp.minimum(factor, norm(params))), state
        changed = times(updates, factor)
        if more == "again":
            return times(changed, 1 / norm(changed)), state
        left = jax.tree.map(jnp.subtract, updates, changed)
        return changed, times(left, jnp.minimum(1, norm(changed) / norm(left)))

    zeros = lambda params: optax.tree.zeros_like(params) if more == "memory" else ()
    return optax.GradientTransformation(zeros, update)


def given(tx: Any, **extra: float) -> optax.GradientTransformation:
    """A transform that gets these extra arguments in every step."""
    extra = {name: jnp.float32(value) for name, value in extra.items()}
    update = functools.partial(tx.update, **extra)
    return optax.GradientTransformation(tx.init, update)


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax": lambda: optax.clip_by_global_norm(1.0),
    "none": optax.identity,
    "floor": lambda: floor(1.0),
    "floor weights": lambda: least("weights"),
    "floor again": lambda: least("again"),
    "floor memory": lambda: least("memory"),
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
    "clip_by_snr": lambda: given(clipfx.clip_by_snr(1.0), snr=7.0),
    "limit_norm_growth": clipfx.limit_norm_growth,
    # Each around Adam beside that of every step; `adam` is one more alone.
    "adam": optax.scale_by_adam,
    "clip_update_rms": lambda: clipfx.clip_update_rms(optax.scale_by_adam(), b2=0.999),
    "sign": optax.scale_by_sign,
    "dual_norm_gate": lambda: clipfx.dual_norm_gate(optax.scale_by_sign(), 1.0),
    # Matrix products, as many as Muon's or more.
    "muon": lambda: optax.contrib.muon(1e-3),
    "spectrum rescale": lambda: clipfx.clip_spectrum(1.0, response="rescale"),
    "spectrum soft": lambda: clipfx.clip_spectrum(1.0),
    "spectrum hard": lambda: clipfx.clip_spectrum(1.0, response="hard"),
    "spectrum soft in one pass": lambda: clipfx.clip_spectrum(1.0, precision="default"),
    "clip_by_curvature": lambda: clipfx.clip_by_curvature(1e-3),
    "skip_spikes": lambda: clipfx.skip_spikes(optax.identity()),
    "error_feedback": lambda: clipfx.error_feedback(clipfx.clip_by_global_norm(1.0)),
}


# Of these nothing is ours.
PLAIN = [x for x in METHODS if x in ("optax", "none", "adam", "sign", "muon")
         or x.startswith("floor")]  # fmt: skip
# Matrix products beyond the model's; the spectral clips have a branch, in a loop.
MATRICES = [x for x in METHODS if x == "muon" or x.startswith("spectrum")]


def compiled(model: Model, tx: Any, dtype: Any, mesh: Mesh | None) -> tuple[Any, Any]:
    """A compiled donating step `(params, state, batch)`, and its optimizer."""
    tx = optax.chain(tx, optax.adamw(1e-3))

    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(model.loss)(params, batch, dtype)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    carry, batch = (model.params, jax.eval_shape(tx.init, model.params)), model.batch
    out = None
    if mesh is not None:
        place = placing(mesh)
        carry = jax.tree.map(lambda x: place(x, False), carry)
        batch = jax.tree.map(lambda x: place(x, True), batch)
        out = jax.tree.map(lambda x: x.sharding, carry)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
    return step.lower(*carry, batch).compile(), tx


class Facts(NamedTuple):
    """Of a compiled program, what is in a loop as often as it turns.

    Attributes:
      cycles: That XLA's cost model expects, for TPUs; of all branches.
      loops: Besides those of known length, which are the model's.
      branches: Conditionals.
      collectives: Number of each kind, and bytes of what comes out of them.
    """

    cycles: int
    loops: int
    branches: int
    collectives: dict[str, tuple[int, int]]


# As they stand in a line, behind the shape of the result. Behind that of a start there
# may be its operand, too.
_COLLECTIVES = {
    "all-reduce": r"all-reduce(-start)?\(",
    "all-gather": r"all-gather(-start)?\(",
    "reduce-scatter": r"(?:reduce-scatter\(|fusion\(.*?calls=%all-reduce-scatter())",
    "all-to-all": r"all-to-all(-start)?\(",
    "permute": r"collective-permute(-start)?\(",
}


def facts(text: str) -> Facts:
    """Reads the text of a compiled program."""
    entries, bodies = computations(text)
    cycles, loops, branches = 0, 0, 0
    found: dict[str, tuple[int, int]] = {}
    todo = [(name, 1) for name in entries]
    while todo:
        name, times = todo.pop()
        body = bodies[name]
        cycles += times * sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', body)))
        branches += len(re.findall(r" conditional\(", body))
        todo += [(inside, times) for inside in branches_of(body)]
        for inside, turns in loops_of(body, bodies):
            loops += turns is None
            todo.append((inside, times * (turns or 1)))
        for kind, pattern in _COLLECTIVES.items():
            for shape, start in re.findall(rf"= (\S.*?) {pattern}", body):
                number, size = found.get(kind, (0, 0))
                one = max(sizes(shape)) if start else sum(sizes(shape))
                found[kind] = number + times, size + times * one
    return Facts(cycles, loops, branches, found)


# What a step costs is counted in, by platform.
COSTS = {"tpu": "kcycles", "gpu": "moved MB"}


def cost_and_temporaries(step: Any, platform: str) -> tuple[float, float]:
    """Of a compiled step the cost, in the unit of COSTS, and temporaries in MB."""
    text = step.as_text()
    cost = moved(text) / 1e6 if platform == "gpu" else facts(text).cycles / 1e3
    return cost, step.memory_analysis().temp_size_in_bytes / 1e6


def on_a_chip(topology: str, tree: Any) -> Any:
    """Shapes that lie whole on the first chip of a topology."""
    chip = Mesh(np.array(devices(topology)[:1]), ("data",))
    whole = NamedSharding(chip, P())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    return jax.tree.map(shape, tree)


def print_costs(topology: str, steps: dict[str, tuple[Any, Any]]) -> None:
    """Prints a row for each jitted step, compiled for its arguments.

    Cost and temporaries stand beside their ratio to the first; loops are those of
    unknown length.
    """
    platform, base = platform_of(topology), None
    heads = "".join(f"{x:>18}" for x in (COSTS[platform], "temp MB"))
    print(f"{'':10}{heads}{'while':>7}{'cond':>6}")
    for name, (step, args) in steps.items():
        step = step.lower(*on_a_chip(topology, args)).compile()
        row = np.array(cost_and_temporaries(step, platform))
        base = row if base is None else base
        each = [
            f"{x:.1f} ({x / b:.3f})" if b else f"{x:.1f}"
            for x, b in zip(row, base, strict=True)
        ]
        found = facts(step.as_text())
        cells = "".join(f"{x:>18}" for x in each)
        print(f"{name:10}{cells}{found.loops:7}{found.branches:6}", flush=True)


def placing(mesh: Mesh) -> Callable[[Any, bool], Any]:
    """How parameters and batches are split over a mesh of a pod.

    The longest axis over `data`, as FSDP does, the next over `model`; batches over
    `data`.
    """

    def place(x: Any, is_batch: bool) -> Any:
        spec: list[str | None] = [None] * len(x.shape)
        free = sorted(range(len(spec)), key=lambda axis: -x.shape[axis])
        for name in mesh.axis_names[: 1 if is_batch else None]:
            fits = (k for k in free if x.shape[k] % mesh.shape[name] == 0)
            axis = 0 if is_batch else next(fits, None)
            if axis is not None and mesh.size > 1:
                spec[axis] = name
                free.remove(axis)
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return place
