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
# # Choosing a threshold
#
# From the gradient norms of a run to a setting: record them, look at them, ask what
# every method would have done with them, and check the advice by a sweep. The model is
# a small network on 8x8 digits, of which some batches are broken.

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
from clipfx import calibrate, plots

kind = "test" if "CLIPFX_QUICK" in os.environ else jax.devices()[0].platform
steps = {"test": 60, "cpu": 300}.get(kind, 3000)
SEEDS = range(1 if kind == "test" else 3)
print(f"JAX has found {jax.device_count()} x {jax.devices()[0].device_kind}.")

# %% [markdown]
# ## A training with outliers
#
# One batch in fifty has images that are thirty times too bright, as a broken sensor or
# a wrong unit gives them. Their gradients are large, and their direction is useless.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 8 - 1), np.int32(labels)
train_set, test_set = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def logits_of(params, images):
    x = jax.nn.relu(images @ params["in"]["kernel"] + params["in"]["bias"])
    x = jax.nn.relu(x @ params["mid"]["kernel"] + params["mid"]["bias"])
    return x @ params["out"]["kernel"]


def loss_fn(params, images, labels):
    logits = logits_of(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def init_params(seed):
    normal = np.random.default_rng(seed).normal
    params = {
        "in": {"bias": np.zeros(64), "kernel": normal(size=(64, 64)) / 8},
        "mid": {"bias": np.zeros(64), "kernel": normal(size=(64, 64)) / 8},
        "out": {"kernel": normal(size=(64, 10)) / 8},
    }
    return jax.tree.map(jnp.float32, params)


def batches(seed):
    draws = np.random.default_rng(seed + 100).integers(1400, size=(steps, 32))
    for number, rows in enumerate(draws, start=1):
        broken = number % 50 == 0
        yield train_set[0][rows] * (30 if broken else 1), train_set[1][rows]


# %% [markdown]
# ## Record
#
# `clipfx.record_norms` changes nothing and keeps the last norms in its state, under
# `jit` and on any mesh. It goes where the clip will go, here one number for each layer.
# The learning rate is that of the run to come.


# %%
def train(clip, rate=0.2, seed=0):
    tx = optax.named_chain(("clip", clip), ("sgd", optax.sgd(rate)))

    @jax.jit
    def step(params, opt_state, images, labels):
        value, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = init_params(seed)
    opt_state, losses = tx.init(params), []
    for batch in batches(seed):
        params, opt_state, value = step(params, opt_state, *batch)
        losses.append(value)
    right = jnp.argmax(logits_of(params, test_set[0]), -1) == test_set[1]
    return opt_state, np.array(losses), float(right.mean())


opt_state, losses, accuracy = train(clipfx.record_norms(steps))
norms = calibrate.history(opt_state)["clip/global"]
print(f"without a clip: held-out accuracy {accuracy:.3f}")

# %% [markdown]
# ## Look
#
# Most norms are close together, and a few stand out by a factor of ten or more. A
# threshold belongs between the two.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
plots.norms({"gradient": norms}, ax=axes[0])
plots.histogram(norms, ax=axes[1])
plt.show()

# %% [markdown]
# ## Ask
#
# `calibrate.suggest` describes the norms and replays every method on them: what would
# its clip rate have been, by which factor on average, and what is there to beware of?

# %%
suggestion = calibrate.suggest(norms)
stats = suggestion.stats[0]
print(
    f"median {stats.median:.3g}, spread {stats.spread:.2g}, {len(stats.spikes)} spikes"
)
print("threshold by clip rate:")
for rate, threshold in zip(suggestion.rates, suggestion.thresholds["global"]):
    print(f"  {rate:5.0%}  {threshold:.3g}")
print(suggestion.advice)
for warning in suggestion.warnings:
    print("Beware:", warning)

# %%
print(f"{'method':52}{'clip rate':>10}{'factor':>8}")
for found in suggestion.settings:
    print(f"{found.method:52}{found.clip_rate:10.1%}{found.mean_factor:8.2f}")

# %% [markdown]
# The same comes from files: `python -m clipfx.calibrate RUN` reads JSON lines, CSV,
# NumPy, TensorBoard, Weights & Biases and Orbax, and writes a page with `--html=FILE`.
#
# ## Replay one of your own
#
# Any transform can be replayed on recorded norms: the threshold it would have had at
# each step, and where it would have acted.

# %%
METHODS = {
    "autoclip(90)": clipfx.autoclip(90),
    "zclip()": clipfx.zclip(),
    "quantile_clip(0.9)": clipfx.quantile_clip(0.9),
}
replays = {name: calibrate.replay(tx, norms) for name, tx in METHODS.items()}
figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
plots.compare(norms, {k: r.threshold.ravel() for k, r in replays.items()}, ax=axes)
plt.show()

# %% [markdown]
# ## Check
#
# A sweep, with three seeds: held-out accuracy, mean and range. A
# threshold far below most norms makes the steps short, one above the spikes lets the
# broken batches through; in between the curve is flat.

# %%
median = float(np.median(norms))
sweep = {f"{k:g} x median": k * median for k in (0.1, 0.3, 1, 3, 10, 30)}
sweep["5% clipped"] = suggestion.thresholds["global"][1]
sweep["none"] = math.inf
for name, threshold in sweep.items():
    clip = clipfx.clip_by_global_norm(threshold)
    runs = [train(clip, seed=seed)[2] for seed in SEEDS]
    span = f"{np.mean(runs):.3f} ({min(runs):.3f} to {max(runs):.3f})"
    print(f"{name:20} {threshold:8.3g}  accuracy {span}")

# %% [markdown]
# Adaptive methods need no threshold, and follow norms that change over a run. The
# advice above is one of them, with a bound:

# %%
advised = {suggestion.begin: eval(f"clipfx.{suggestion.begin}")}
for name, clip in (METHODS | advised).items():
    runs = [train(clip, seed=seed)[2] for seed in SEEDS]
    span = f"{np.mean(runs):.3f} ({min(runs):.3f} to {max(runs):.3f})"
    print(f"{name:20} accuracy {span}")
