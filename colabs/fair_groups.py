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
# # Populations, and what each contributes
#
# A gradient is a sum over populations of examples. If one is nine in ten, its
# contribution is most of every step. `fair_grad` bounds the contribution of each
# population by a multiple of the smallest. Here nine digits are common and one is rare;
# what that changes, and what it costs, is measured.

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
from clipfx import per_example, plots

kind = "test" if "CLIPFX_QUICK" in os.environ else jax.devices()[0].platform
STEPS, SEEDS = {"test": (5, 1), "cpu": (40, 5)}.get(kind, (200, 10))
print(f"JAX has found {jax.device_count()} x {jax.devices()[0].device_kind}.")

# %% [markdown]
# ## A rare population
#
# Population 1 is the digit 8, of which one training example in five is kept;
# population 0 is all others. The population is no input of the model.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 8 - 1), np.int32(labels)
population = np.int32(labels == 8)


def split(seed):
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    train, test = order[:1300], order[1300:]
    keep = (labels[train] != 8) | (random.random(len(train)) < 0.2)
    return train[keep], test


train_rows, _ = split(0)
count = np.bincount(labels[train_rows] == 8)
print(f"training examples: {count[0]} of population 0, {count[1]} of population 1")


# %%
def logits_of(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, example):  # of one example
    x, y = example
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y)


def init_params(seed):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }


# %% [markdown]
# ## What each contributes
#
# One call gives the sum of each population, from one backward pass:

# %%
by_population = per_example.population_grad(loss, num_populations=2)
rows = train_rows[:256]
batch = images[rows], labels[rows]
sums, _ = by_population(init_params(0), batch, population_ids=population[rows])
print("shape of one sum:", jax.tree.leaves(sums)[-1].shape)
print("examples in each:", np.bincount(population[rows]))
print("norm of each sum:", jax.vmap(clipfx.global_norm)(sums))

# %% [markdown]
# ## Train with a bound
#
# `max_ratio` says how many times the smallest contribution the largest may be.
# Infinity is ordinary training.


# %%
def train(max_ratio, seed):
    rows, test = split(seed)
    grad = per_example.fair_grad(loss, num_populations=2, max_ratio=max_ratio)
    adam, params = optax.adam(0.01), init_params(seed)

    @jax.jit
    def step(params, opt_state, batch, ids):
        sums, info = grad(params, batch, population_ids=ids)
        mean = jax.tree.map(lambda g: g / len(ids), sums)
        updates, opt_state = adam.update(mean, opt_state)
        return optax.apply_updates(params, updates), opt_state, (info.norm, info.factor)

    opt_state, history = adam.init(params), []
    random = np.random.default_rng(seed)
    for _ in range(STEPS):
        drawn = random.choice(rows, 256)
        batch = images[drawn], labels[drawn]
        params, opt_state, seen = step(params, opt_state, batch, population[drawn])
        history.append(seen)
    right = np.argmax(logits_of(params, images[test]), -1) == labels[test]
    rare = labels[test] == 8
    norms, factors = map(np.array, zip(*jax.device_get(history)))
    return right[rare].mean(), right[~rare].mean(), norms, factors


RATIOS = {"no bound": math.inf, "at most 3": 3.0, "at most 1": 1.0}
runs = {name: [train(x, seed) for seed in range(SEEDS)] for name, x in RATIOS.items()}
print(f"{'held-out accuracy':18}{'rare digit':>22}{'others':>22}")
for name, found in runs.items():
    cells = ""
    for k in (0, 1):
        values = [run[k] for run in found]
        span = f"({min(values):.3f} to {max(values):.3f})"
        cells += f"{np.mean(values):6.3f} {span:>15}"
    print(f"{name:18}{cells}")

# %% [markdown]
# ## What the bound does on the way
#
# Contributions to each step, without a bound and with one. Late in training population
# 1 has almost no gradient left; a floor, 0.05 of the whole sum, keeps it from stopping
# all others then.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
for axis, name in zip(axes, ("no bound", "at most 1")):
    norms, factors = runs[name][0][2:]
    bounded = {"population 0": norms[:, 0] * factors[:, 0],
               "population 1": norms[:, 1] * factors[:, 1]}  # fmt: skip
    plots.lines(bounded, ylabel="contribution to the step", ax=axis)
    axis.set(title=name, yscale="log")
plt.show()

# %% [markdown]
# The bound changes how fast each population is learned, and matters most early in
# training and where a population is rare. It is not a cure for unfair labels, and where
# two populations are equally far from being fitted it changes nothing:
# `python -m examples.fair_loans` is such a case.
#
# ## In an Optax chain
#
# The same as a transform of stacked contributions, with a moving average as the
# reference, and metrics of every population in the state:

# %%
tx = optax.chain(clipfx.clip_fair_groups(2.0, reference="ema"), optax.adam(0.01))
params = init_params(0)
contributions, _ = by_population(params, batch, population_ids=population[rows])
updates, opt_state = tx.update(contributions, tx.init(params), params)
metrics = clipfx.metrics.read(opt_state)
{key: value for key, value in metrics.items() if "norm" in key or "factor" in key}
