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
# type), on GPUs, or on a CPU that plays eight devices.

# %%
# Where Colab installs clipfx from: the address that you opened this notebook at.
REPOSITORY = "https://github.com/OWNER/clipfx"  # @param {type:"string"}

import os
import pathlib
import sys

if "google.colab" in sys.modules:
    assert "OWNER" not in REPOSITORY, "Fill in the address of the repository above."
    # %pip install -q "clipfx-jax[examples] @ git+$REPOSITORY"
    # !test -d clipfx || git clone -q --depth=1 $REPOSITORY clipfx
    root = pathlib.Path("clipfx").resolve()
else:
    here = pathlib.Path.cwd()
    root = next(
        d for d in (here, *here.parents) if (d / "examples/_common.py").exists()
    )
sys.path.insert(0, str(root))

if "XLA_FLAGS" not in os.environ:  # for CPUs; to be set before JAX is imported
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

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

import clipfx
from examples import _common

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


images, labels = _common.load_digits()
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
# Under `jit` arrays are whole, and nothing is to be done, with Auto or Explicit axes.
# In `shard_map` nothing either: JAX knows which leaf varies over which axes, and the
# squares are summed over those. `pmap` knows nothing of the kind, so there `axis_name`
# says what all leaves are split over.

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
    read = clipfx.metrics.read(state)
    gap = lambda x, y: float(np.abs(x.reshape(y.shape) - y).max())
    gaps = jax.tree.map(gap, updates, results["one device"][0])
    return {
        "way": way,
        **{f"norm {k}": float(read[f"clip0/norm/{k}"]) for k in grads},
        **{f"factor {k}": float(read[f"clip0/factor/{k}"]) for k in grads},
        "difference": max(jax.tree.leaves(gaps)),
        "all-reduces": len(programs[way]),
    }


print(_common.format_table([describe(way) for way in WAYS]))

# %% [markdown]
# The difference is that of the element furthest from one device: rounding, or nothing.
# With Auto axes the compiler places the all-reduces: one if leaves are split over one
# axis, more if some are split over two. Elsewhere it is always one, with a number for
# each layer. This is it, in the compiled program:

# %%
for line in programs["shard_map"]:
    print(line.split(",")[0].strip())

# %% [markdown]
# ## The trap
#
# In `shard_map` a clip that sums up what it sees takes the norm of a shard for that of
# the gradient. Nothing fails, but the result is too long, by up to the root of the
# number of devices, and points elsewhere.

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


print(_common.format_table([measure(name) for name in CLIPS]))

# %% [markdown]
# ## Training
#
# The step is the one you know. Parameters are placed on the mesh, `tx.init` lays Adam's
# moments out like them, and the batch is split over `data`. `zclip` finds its threshold
# by itself, and every fifteenth batch, with wrong labels, stands out.

# %%
tx = optax.chain(clipfx.zclip(decay=0.9, warmup_steps=10), optax.adam(2e-3))


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
clip_state, (adam_state, _) = opt_state
moment = adam_state.mu["in"]["kernel"]
print("Adam's moment of a kernel:", moment.shape)
print("On each device:", moment.sharding.shard_shape(moment.shape))
print("Norms are on every device:", clip_state.metrics.norm.is_fully_replicated)

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
for key, color in {"norm": "tab:blue", "threshold": "tab:orange"}.items():
    one, many = ([read[f"clip0/{key}/global"] for read in h] for h in (alone, split))
    axes.plot(one, color=color, lw=6, alpha=0.3, label=f"{key}, one device")
    axes.plot(many, "--", color=color, label=f"{key}, mesh of {len(devices)}")
axes.set(yscale="log", xlabel="step", title="zclip, on one device and on the mesh")
_common.plain_ticks(axes)
axes.legend()
plt.show()

# %% [markdown]
# At the end of the mesh's training, as `clipfx.metrics.read` has it:

# %%
{name: value.item() for name, value in split[-1].items()}
