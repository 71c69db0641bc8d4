# ---
# jupyter:
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
# # Clipping by signal-to-noise ratio
#
# In diffusion the timestep decides how large a gradient is: a loss that is weighted by
# the signal-to-noise ratio (SNR) spans many decades, and one threshold for all
# timesteps fits few of them. `clip_by_snr` takes the SNR of the step and makes the
# threshold a function of it. A small model of 8x8 digits shows which rule does what.

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
import math
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import clipfx
from clipfx import per_example

kind = "test" if "CLIPFX_QUICK" in os.environ else jax.devices()[0].platform
STEPS = {"test": 50, "cpu": 1500}.get(kind, 6000)
print(f"JAX has found {jax.device_count()} x {jax.devices()[0].device_kind}.")

# %% [markdown]
# ## The schedule
#
# The SNR of the cosine schedule over its 1,000 timesteps, and thresholds as functions
# of it: inverse, as Min-SNR, and as its square root.

# %%
snr = np.asarray(clipfx.snr.cosine(1000))
WEIGHTS = {
    "inverse": clipfx.snr.inverse,
    "min_snr, gamma 5": lambda x: clipfx.snr.min_snr(x, 5.0),
    "inverse_sqrt": clipfx.snr.inverse_sqrt,
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
axes[0].plot(snr)
axes[0].set(yscale="log", xlabel="timestep", ylabel="SNR")
for name, weight in WEIGHTS.items():
    axes[1].plot(snr, np.asarray(weight(jnp.asarray(snr))), label=name)
axes[1].set(xscale="log", yscale="log", xlabel="SNR", ylabel="threshold, relative")
axes[1].legend()
plt.show()

# %% [markdown]
# ## A model
#
# Two hidden layers predict the digits behind the noise. The loss of a batch with one
# timestep is the squared error times SNR, which is the likelihood's weight: 24,000 at
# the first timestep, 2e-9 at the last.

# %%
digits = np.float32(load_digits().data / 8 - 1)
digits = np.random.default_rng(0).permutation(digits)
held_out, digits = digits[:300], jnp.asarray(digits[300:])
ratios = jnp.asarray(snr)
HIDDEN, BATCH = 192, 128


def init_params(key):
    keys = jax.random.split(key, 4)
    layer = lambda key, i, o: {
        "kernel": jax.random.normal(key, (i, o)) / math.sqrt(i), "bias": jnp.zeros(o)
    }  # fmt: skip
    return {
        "time": layer(keys[0], 64, HIDDEN),
        "enter": layer(keys[1], 64, HIDDEN),
        "mid": layer(keys[2], HIDDEN, HIDDEN),
        "leave": layer(keys[3], HIDDEN, 64),
    }


def predict(params, noisy, t):
    apply = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    angles = t * jnp.geomspace(1, 1e-4, 32)
    time = apply("time", jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]))
    x = apply("enter", noisy) + time
    x += apply("mid", jax.nn.silu(x))
    return apply("leave", jax.nn.silu(x))


def error(params, clean, t, key):  # not weighted
    ratio = ratios[t]
    noise = jax.random.normal(key, clean.shape)
    noisy = (jnp.sqrt(ratio) * clean + noise) / jnp.sqrt(1 + ratio)
    return jnp.mean((predict(params, noisy, t) - clean) ** 2)


# %% [markdown]
# ## How large gradients are
#
# The norm of the weighted gradient by timestep, at the first weights. No single
# threshold can be right at both ends.

# %%
params, key = init_params(jax.random.key(0)), jax.random.key(1)
norm_at = jax.jit(
    lambda t: clipfx.global_norm(jax.grad(error)(params, digits[:BATCH], t, key))
)
timesteps = np.unique(np.geomspace(1, 1000, 40).astype(int)) - 1
plain = np.array([norm_at(t) for t in timesteps])
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(timesteps + 1, plain, "o-", label="loss not weighted")
axes.plot(timesteps + 1, plain * snr[timesteps], "o-", label="loss weighted by SNR")
axes.set(xscale="log", yscale="log", xlabel="timestep + 1", ylabel="gradient norm")
axes.legend()
plt.show()

# %% [markdown]
# ## Four ways to train
#
# `clip_by_snr` is given the SNR of the batch as an extra argument of `update`, and goes
# *before* the weight: it clips the gradient of the loss that is not weighted.


# %%
def weigh():
    def update(updates, state, params=None, *, snr, **extra):
        return optax.tree.scale(snr, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


clip_by_snr = lambda c, **options: clipfx.clip_by_snr(c, low=0.0, **options)
VARIANTS = {
    "no clip": lambda: weigh(),
    "weight, then one threshold": lambda: optax.chain(
        weigh(), clipfx.clip_by_global_norm(0.1)
    ),
    "clip_by_snr, then weight": lambda: optax.chain(clip_by_snr(0.1), weigh()),
    "inverse, then weight": lambda: optax.chain(
        clip_by_snr(0.1, weight=clipfx.snr.inverse, high=math.inf), weigh()
    ),
}


def train(make, seed):
    rate = optax.cosine_decay_schedule(1e-3, STEPS)
    tx = optax.chain(make(), optax.adam(rate))

    def step(carry, key):
        params, opt_state = carry
        keys = jax.random.split(key, 3)
        t = jax.random.randint(keys[0], (), 0, len(ratios))
        rows = jax.random.randint(keys[1], (BATCH,), 0, len(digits))
        value, grads = jax.value_and_grad(error)(params, digits[rows], t, keys[2])
        updates, opt_state = tx.update(grads, opt_state, params, snr=ratios[t])
        return (optax.apply_updates(params, updates), opt_state), value

    params = init_params(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 100), STEPS)
    carry, losses = jax.lax.scan(step, (params, tx.init(params)), keys)
    return carry[0], losses


@jax.jit
def evaluate(params):  # geometric mean over timesteps: weights do not matter
    t = jnp.linspace(0, len(ratios) - 1, 50).astype(int)
    keys = jax.random.split(jax.random.key(7), len(t))
    each = lambda args: error(params, held_out, *args)
    return jnp.exp(jnp.log(jax.lax.map(each, (t, keys))).mean())


SEEDS, trained = range(1 if kind == "test" else 3), {}
for name, make in VARIANTS.items():
    run = jax.jit(lambda seed, make=make: train(make, seed)[0])
    trained[name] = [run(seed) for seed in SEEDS]
    errors = [float(evaluate(params)) for params in trained[name]]
    low, high = min(errors), max(errors)
    print(f"{name:28} error {np.mean(errors):.4f} ({low:.4f} to {high:.4f})")

# %% [markdown]
# Without a clip the first timesteps, with their gradients of thousands, set the scale
# of Adam's steps. After the weight, the inverse rule and one threshold are the same
# thing, `c SNR / SNR = c`; the default rule of `clip_by_snr`, `min_snr`, leaves the
# noisy timesteps alone.
#
# ## Samples
#
# From noise, through all timesteps:


# %%
@jax.jit
def sample(params, key):
    def step(x, inputs):  # x: digits + noise / sqrt(SNR)
        t, ratio, cleaner, key = inputs  # cleaner: the SNR to come
        guess = jnp.clip(predict(params, x * jnp.sqrt(ratio / (1 + ratio)), t), -1, 1)
        stay = ratio / cleaner
        noise = jnp.sqrt((1 - stay) / cleaner) * jax.random.normal(key, x.shape)
        return guess + stay * (x - guess) + noise, None

    cleaner = jnp.concatenate([jnp.full(1, jnp.inf), ratios[:-1]])
    keys = jax.random.split(key, len(ratios) + 1)
    x = jax.random.normal(keys[-1], (10, 64)) / jnp.sqrt(ratios[-1])
    inputs = jnp.arange(len(ratios)), ratios, cleaner, keys[:-1]
    return jax.lax.scan(step, x, inputs, reverse=True)[0]


rows = {"held-out digits": held_out[:10]}
rows |= {name: sample(found[0], jax.random.key(3)) for name, found in trained.items()}
figure, axes = plt.subplots(len(rows), figsize=(8, 5), layout="constrained")
for axis, (name, images) in zip(axes, rows.items()):
    strip = np.hstack([np.asarray(x).reshape(8, 8) for x in images])
    axis.imshow(strip, cmap="gray", vmin=-1, vmax=1)
    axis.set_title(name, fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Mixed timesteps
#
# `update` takes one SNR, so a batch with one timestep. Where each example has a
# timestep of its own, the gradient of each is clipped, with a threshold by its SNR:


# %%
def weighted(params, example):  # of one example
    clean, t, key = example
    return ratios[t] * error(params, clean[None], t, key)


keys = jax.random.split(jax.random.key(0), 33)
t = jax.random.randint(keys[0], (32,), 0, len(ratios))
limit = 0.1 * ratios[t] * clipfx.snr.min_snr(ratios[t])
grad = per_example.clipped_grad(weighted, math.inf)
sums, info = grad(params, (digits[:32], t, keys[1:]), max_norm=limit[:, None])
print("examples clipped:", int((info.factor < 1).sum()), "of 32")
