# ---
# jupyter:
#   accelerator: TPU
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Clipping on a mesh
#
# A gradient that is split over devices has one norm, and it has to be the norm of the
# whole. Here one gradient is clipped in every way that JAX splits arrays, and then a
# model is trained with its optimizer split. It runs on a TPU (Runtime, Change runtime
# type), on GPUs, or on a CPU that simulates eight devices.

# %%
# Takes clipfx from where SOURCE says; if it says nothing, from the checkout that this
# notebook is in, or else from the package index.
import importlib
import importlib.util
import pathlib
import subprocess
import sys

SOURCE = ""  # fill in, until the index has it: a folder, or git+https://...

if not all(map(importlib.util.find_spec, ("clipfx", "optax", "matplotlib", "sklearn"))):
    here = pathlib.Path.cwd()
    found = [d for d in (here, *here.parents) if (d / "clipfx/__init__.py").exists()]
    source = SOURCE or (str(found[0]) if found else "clipfx-jax")
    what = f"clipfx-jax[plots] @ {source}" if "://" in source else f"{source}[plots]"
    command = [sys.executable, "-m", "pip", "install", "-q", what, "scikit-learn"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()

# %%
import os

if "XLA_FLAGS" not in os.environ:  # for CPUs; to be set before JAX is imported
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["NPROC"] = "32"  # threads: with one each, devices may wait for ever

# %%
import re
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import clipfx

# Matrix products as exact on accelerators as they are on a CPU.
jax.config.update("jax_default_matmul_precision", "float32")

# %% [markdown]
# ## A mesh over whatever there is
#
# `data` is for the batch and for FSDP; `model`, from four devices on, for tensor
# parallelism.

# %%
devices = jax.devices()[: 2 ** (jax.device_count().bit_length() - 1)]
model = 2 if len(devices) >= 4 else 1
shape = (len(devices) // model, model)


def mesh_of(kind):
    return jax.make_mesh(shape, ("data", "model"), (kind, kind), devices=devices)


mesh = mesh_of(AxisType.Auto)
print(f"{len(devices)} x {devices[0].device_kind}:", dict(mesh.shape))

# %% [markdown]
# ## A gradient, split
#
# Three layers on 8x8 digits. Kernels are split over both axes, or over one; a bias is
# split, another is on every device.

# %%
SPECS = {
    "in": {"bias": P("model"), "kernel": P("data", "model")},
    "mid": {"bias": P(), "kernel": P("model", "data")},
    "out": {"kernel": P("data")},
}


def place(tree, mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return jax.tree.map(put, tree, SPECS)


def loss(params, images, labels):
    x = jnp.tanh(images @ params["in"]["kernel"] + params["in"]["bias"])
    x = jnp.tanh(x @ params["mid"]["kernel"] + params["mid"]["bias"])
    logits = x @ params["out"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 8 - 1), np.int32(labels)
normal = np.random.default_rng(0).normal
params = {
    "in": {"bias": np.zeros(128), "kernel": normal(size=(64, 128)) / 8},
    "mid": {"bias": np.zeros(128), "kernel": normal(size=(128, 128)) / 11},
    "out": {"kernel": normal(size=(128, 10)) / 11},
}
params = jax.tree.map(jnp.float32, params)
grads = jax.jit(jax.grad(loss))(params, images[:64], labels[:64])
jax.tree.map(lambda x: x.shape, grads)

# %% [markdown]
# ## The same clip in every way
#
# Under `jit` arrays are whole, and no change is needed, with Auto or Explicit axes. Nor
# is it in `shard_map`: JAX knows which leaf varies over which axes, and the squares are
# summed over those. `pmap` does not know, so there `axis_name` names the axes that all
# leaves are split over.

# %%
clip = clipfx.clip_per_layer(0.3)
named = clipfx.clip_per_layer(0.3, axis_name="devices")
state = clip.init(grads)

spread = {"in_specs": (SPECS, P()), "out_specs": (SPECS, P())}
in_shards = jax.shard_map(clip.update, mesh=mesh, **spread)
rows = jax.tree.map(lambda x: x.reshape(len(devices), -1), grads)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # newer JAX prefers shard_map
    mapped = jax.pmap(named.update, "devices", in_axes=(0, None), devices=devices)

WAYS = {
    "one device": (jax.jit(clip.update), grads),
    "jit, Auto": (jax.jit(clip.update), place(grads, mesh)),
    "jit, Explicit": (jax.jit(clip.update), place(grads, mesh_of(AxisType.Explicit))),
    "shard_map": (jax.jit(in_shards), place(grads, mesh)),
    "pmap": (mapped, rows),
}

results, programs = {}, {}
for way, (update, split) in WAYS.items():
    compiled = update.lower(split, state).compile()
    results[way] = jax.device_get(compiled(split, state))
    programs[way] = re.findall(r".* all-reduce(?:-start)?\(.*", compiled.as_text())


# %%
def describe(way):
    updates, state = results[way]
    if way == "pmap":  # a row for each device, all alike
        state = jax.tree.map(lambda x: x[0], state)
    gap = lambda x, y: float(np.abs(x.reshape(y.shape) - y).max())
    gaps = jax.tree.map(gap, updates, results["one device"][0])
    return {
        "way": way,
        **{f"norm {k}": state.metrics.norm[i].item() for i, k in enumerate(grads)},
        **{f"factor {k}": state.metrics.factor[i].item() for i, k in enumerate(grads)},
        "difference": max(jax.tree.leaves(gaps)),
        "all-reduces": len(programs[way]),
    }


def print_table(rows):
    print(*(f"{name:>18}" for name in rows[0]))
    for row in rows:
        cells = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        print(*(f"{cell:>18}" for cell in cells))


print_table([describe(way) for way in WAYS])

# %% [markdown]
# The difference is the largest of any element from the result on one device: rounding,
# or zero.
# With Auto axes the compiler places the all-reduces: one if leaves are split over one
# axis, more if some are split over two. Otherwise there is always one, of a number for
# each layer. In the compiled program it is:

# %%
for line in programs["shard_map"]:
    print(line.split(",")[0].strip())

# %% [markdown]
# ## The trap
#
# In `shard_map` a clip that sums up what it sees takes the norm of a shard for that of
# the gradient. Nothing fails, but the result is too large, by up to the square root of
# the number of devices, and in the wrong direction.

# %%
EVERYWHERE = P(("data", "model"))  # FSDP over the whole mesh
CLIPS = {
    "clipfx": clipfx.clip_by_global_norm(0.3),
    "optax": optax.clip_by_global_norm(0.3),
}


def measure(name):
    tx = CLIPS[name]
    in_shards = jax.shard_map(
        lambda shards: tx.update(shards, tx.init(shards))[0],
        mesh=mesh,
        in_specs=EVERYWHERE,
        out_specs=EVERYWHERE,
    )
    clipped = jax.device_get(jax.jit(in_shards)(grads))
    norm = float(clipfx.global_norm(clipped))
    dot = optax.tree.vdot(clipped, grads)
    cosine = float(dot / (norm * clipfx.global_norm(grads)))
    return {"clipped to 0.3 by": name, "norm": norm, "cosine to gradient": cosine}


print_table([measure(name) for name in CLIPS])

# %% [markdown]
# ## Training
#
# The step is an ordinary one. Parameters are placed on the mesh, `tx.init` shards
# Adam's moments like them, and the batch is split over `data`. `zclip` adapts its
# threshold, and every fifteenth batch, with wrong labels, is an outlier.

# %%
zclip = clipfx.zclip(decay=0.9, warmup_steps=10)
tx = optax.named_chain(("zclip", zclip), ("adam", optax.adam(2e-3)))


@jax.jit
def step(params, opt_state, images, labels):
    grads = jax.grad(loss)(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(params, put, steps=70):
    opt_state, history = tx.init(params), []
    draws = np.random.default_rng(1).integers(len(images), size=(steps, 64))
    for number, rows in enumerate(draws, start=1):
        right = labels[rows]
        batch = put(images[rows]), put(right if number % 15 else 9 - right)
        params, opt_state = step(params, opt_state, *batch)
        history.append(clipfx.metrics.read(opt_state))
    return opt_state, history


_, alone = train(params, jnp.asarray)
with jax.set_mesh(mesh):
    by_batch = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
    opt_state, split = train(place(params, mesh), by_batch)

# %%
clip_state, (adam_state, _) = opt_state["zclip"], opt_state["adam"]
moment = adam_state.mu["in"]["kernel"]
print("Adam's moment of a kernel:", moment.shape)
print("On each device:", moment.sharding.shard_shape(moment.shape))
print("Norms are on every device:", clip_state.metrics.norm.is_fully_replicated)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for key, color in {"norm": "tab:blue", "threshold": "tab:orange"}.items():
    one, many = ([read[f"zclip/{key}/global"] for read in h] for h in (alone, split))
    axes.plot(one, color=color, lw=6, alpha=0.3, label=f"{key}, one device")
    axes.plot(many, "--", color=color, label=f"{key}, mesh of {len(devices)}")
axes.set(yscale="log", xlabel="step", title="zclip, on one device and on the mesh")
axes.legend()
plt.show()

# %% [markdown]
# At the end of the training on the mesh, as `clipfx.metrics.read` gives it:

# %%
split[-1]
