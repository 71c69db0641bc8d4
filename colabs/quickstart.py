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
# # clipfx: a tour
#
# Gradient clipping for JAX as Optax transformations: what a clip does, a training that
# needs one, the numbers it records, how to choose one, thresholds that adapt, one
# threshold per layer or per example, and the devices of this machine. It takes a minute
# or two on a CPU, and runs on a TPU or GPU as it is.

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
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import clipfx
from clipfx import calibrate, per_example, plots

platform = jax.devices()[0].platform
kind = "test" if "CLIPFX_QUICK" in os.environ else platform
steps = {"test": 30, "cpu": 100}.get(kind, 2000)
print(f"JAX has found {jax.device_count()} x {jax.devices()[0].device_kind}.")

# %% [markdown]
# ## What clipping does
#
# A clip looks at the norm of the gradient. Up to the threshold it changes nothing;
# beyond, the gradient keeps its direction and gets the length of the threshold.

# %%
clip = clipfx.clip_by_global_norm(1.0)
grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
clipped, state = clip.update(grads, clip.init(grads))
print("norm before:", clipfx.global_norm(grads), " after:", clipfx.global_norm(clipped))
clipped

# %% [markdown]
# How the length depends on the norm is called the *response*. The hard one above is
# what everybody uses; smooth ones bend before the threshold.

# %%
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
plots.response_curves(ax=axes)
plt.show()

# %% [markdown]
# ## A training that needs it
#
# A character RNN on Python's own manual. Back through 100 steps of a recurrence the
# gradient may grow exponentially, and one step along such a gradient undoes what was
# learned before.

# %%
text = "\n".join(topics.values())
alphabet, ids = np.unique(list(text), return_inverse=True)
LENGTH, BATCH, HIDDEN = 100, 32, 128


def init_params(key):
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(HIDDEN)
    recurrence = jax.nn.initializers.orthogonal(0.9)(keys[1], (HIDDEN, HIDDEN))
    return {
        "embed": {"table": normal(keys[0], len(alphabet), HIDDEN)},
        "recurrent": {"kernel": recurrence, "bias": jnp.zeros(HIDDEN)},
        "readout": {"kernel": normal(keys[2], HIDDEN, len(alphabet))},
    }


def rnn_loss(params, passages):  # [batch, length + 1], in bits per character
    def advance(state, x):
        recurrent = params["recurrent"]
        pre = params["embed"]["table"][x] + state @ recurrent["kernel"]
        state = jnp.tanh(pre + recurrent["bias"])
        return state, state

    start = jnp.zeros((len(passages), HIDDEN))
    _, states = jax.lax.scan(advance, start, passages[:, :-1].T)
    logits = states @ params["readout"]["kernel"]
    after = passages[:, 1:].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    return losses.mean() / math.log(2)


# %% [markdown]
# A clip is an Optax transform, and goes before the optimizer. That is all: the step is
# an ordinary one. `named_chain` gives it a name to find its numbers by.


# %%
def train(clip, rate=0.2):
    tx = optax.named_chain(("clip", clip), ("sgd", optax.sgd(rate, momentum=0.9)))

    @jax.jit
    def step(params, opt_state, passages):
        value, grads = jax.value_and_grad(rnn_loss)(params, passages)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = init_params(jax.random.key(0))
    opt_state, rows = tx.init(params), []
    random = np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(len(ids) - LENGTH, size=(BATCH, 1))
        passages = ids[starts + np.arange(LENGTH + 1)]
        params, opt_state, value = step(params, opt_state, passages)
        rows.append({"loss": float(value)} | clipfx.metrics.read(opt_state))
    return opt_state, rows


column = lambda rows, name: np.array([row[name] for row in rows])
end = lambda rows: column(rows, "loss")[-10:].mean()

# %% [markdown]
# Three learning rates without a clip (a threshold that nothing exceeds), and with one.
# The comparison that counts is that of the best rates: here the larger rate is the
# faster one, and without a clip it cannot be used.

# %%
RATES = (0.02, 0.06, 0.2)
runs = {}
for rate in RATES:
    for name, threshold in {"none": math.inf, "clip": 1.0}.items():
        runs[name, rate] = train(clipfx.clip_by_global_norm(threshold), rate)[1]
print("bits per character at the end, by rate")
for name in ("none", "clip"):
    print(f"{name:5}", *(f"{rate:g}: {end(runs[name, rate]):6.2f} " for rate in RATES))

# %%
figure, axes = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
chosen = {f"{name}, rate {rate:g}": runs[name, rate]
          for name in ("none", "clip") for rate in RATES[1:]}  # fmt: skip
plots.lines({k: column(r, "loss") for k, r in chosen.items()}, ax=axes[0])
norms = {k: column(r, "clip/norm/global") for k, r in chosen.items()}
plots.norms(norms, 1.0, clipped={}, legend=False, ax=axes[1])
axes[0].set(xlabel="", ylabel="bits per character", yscale="log")
plt.show()

# %% [markdown]
# ## What a clip records
#
# Its state has the norm before clipping, the threshold, the factor, how often it acted,
# and how many steps were not finite. `clipfx.metrics.read` finds them in any optimizer
# state, as plain numbers for any logger.

# %%
runs["clip", 0.2][-1]

# %% [markdown]
# ## Choosing a threshold
#
# Train for a while without a clip, look at the norms, and ask what each method would
# have done. `clipfx.record_norms` is a transform that changes nothing and remembers;
# here the metrics have the norms already, at the rate in the middle.

# %%
seen = column(runs["none", 0.06], "clip/norm/global")
suggestion = calibrate.suggest(seen)
print(suggestion.advice)
for method in suggestion.settings[:6]:
    print(f"{method.method:44} clips {method.clip_rate:6.1%} of the steps")

# %%
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
plots.histogram(seen, 1.0, ax=axes)
plt.show()

# %% [markdown]
# `choose_a_threshold.ipynb` goes on from here.
#
# ## Thresholds that adapt
#
# A fixed threshold is right for one scale of gradients. Adaptive ones follow the
# history of norms; all of them are used alike.

# %%
ADAPTIVE = {
    "autoclip": clipfx.autoclip(50),
    "quantile_clip": clipfx.quantile_clip(0.5),
    "zclip, bounded": optax.chain(clipfx.clip_by_global_norm(1.0), clipfx.zclip()),
    "adagc": clipfx.adagc(1.05),
}
adaptive = {name: train(clip)[1] for name, clip in ADAPTIVE.items()}
for name, rows in adaptive.items():
    print(f"{name:16} {end(rows):.2f} bits per character")

# %% [markdown]
# ## One threshold for each layer
#
# One layer with a large gradient scales all others down when the norm is global. By
# layer each has its own norm, and its own numbers.

# %%
_, by_layer = train(clipfx.clip_per_layer(0.5))
print(f"by layer: {end(by_layer):.2f} bits per character")
factors = ("embed", "recurrent", "readout")
for layer in factors:
    rate = by_layer[-1][f"clip/clip_rate/{layer}"]
    print(f"{layer:10} clipped in {rate:.0%} of the steps")

# %%
layers = {k: column(by_layer, f"clip/norm/{k}") for k in factors}
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
plots.norms(layers, 0.5, ax=axes)
plt.show()

# %% [markdown]
# ## One threshold for each example
#
# The gradient of a batch is a mean, and one wrong label in it can be most of the sum.
# `per_example.clipped_grad` takes the loss of one example, and clips the gradient of
# each before they are added up, without forming them. Here every tenth label of the
# digits is wrong.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 8 - 1), np.int32(labels)
is_wrong = np.random.default_rng(0).random(len(labels)) < 0.1
noisy = np.where(is_wrong, (labels + 3) % 10, labels).astype(np.int32)


def digit_loss(params, example):  # of one example
    x, y = example
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


keys = jax.random.split(jax.random.key(0))
digit_params = {
    "w1": jax.random.normal(keys[0], (64, 64)) / 8,
    "b1": jnp.zeros(64),
    "w2": jax.random.normal(keys[1], (64, 10)) / 8,
    "b2": jnp.zeros(10),
}
grad = per_example.clipped_grad(digit_loss, max_norm=0.5, reduce="mean")
adam = optax.adam(1e-2)


@jax.jit
def digit_step(params, opt_state, batch):
    grads, info = grad(params, batch)
    updates, opt_state = adam.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, info


opt_state = adam.init(digit_params)
for rows in np.random.default_rng(1).integers(len(labels), size=(200, 128)):
    batch = images[rows], noisy[rows]
    digit_params, opt_state, _ = digit_step(digit_params, opt_state, batch)

# %% [markdown]
# The norms of the examples tell which labels are wrong: those pull hardest.

# %%
measure = jax.jit(per_example.norms(digit_loss))
each = np.asarray(measure(digit_params, (images, noisy)).norm)[:, 0]
print(
    f"median norm: {np.median(each[~is_wrong]):.2g} where the label is right,", end=""
)
print(f" {np.median(each[is_wrong]):.2g} where it is wrong")
figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
by_label = {"right label": each[~is_wrong], "wrong label": each[is_wrong]}
plots.histogram(by_label, ax=axes)
axes.set(xlabel="norm of the gradient of one example", ylabel="examples")
plt.show()

# %% [markdown]
# How the norm of each parameter is found, what it costs, and why:

# %%
print(per_example.explain(digit_loss, digit_params, (images[0], noisy[0])))

# %% [markdown]
# ## On this machine's devices
#
# A gradient that is split over devices has one norm, that of the whole. Under `jit`
# nothing changes.

# %%
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
big = jax.device_put(np.ones((1024, 256), np.float32), rows)
clipped, _ = jax.jit(clip.update)({"w": big}, clip.init({"w": big}))
print(f"split over {mesh.size}:", clipped["w"].sharding.spec)
print("norm after the clip:", clipfx.global_norm(clipped))

# %% [markdown]
# ## Where to go on
#
# - `choose_a_threshold.ipynb`: from the norms of a run to a setting
# - `private_training.ipynb`: differential privacy in one call
# - `fair_groups.ipynb`: populations of examples, and what each contributes
# - `diffusion_snr.ipynb`: thresholds by the noise of the timestep
# - `sharding_on_tpu.ipynb`: every way that JAX splits arrays
