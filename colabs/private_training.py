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
# # Differentially private training
#
# The gradient of every example is bounded, the bounded gradients are added up, and
# noise is added to the sum: what is learned then hardly depends on any single example,
# and `epsilon` says how much. Here a network learns 8x8 digits with a guarantee, with
# sampling by jax_privacy and accounting by dp-accounting.

# %%
# Takes clipfx from where SOURCE says; if it says nothing, from the checkout that this
# notebook is in, or else from the package index.
import importlib
import importlib.util
import pathlib
import subprocess
import sys

SOURCE = ""  # fill in, until the index has it: a folder, or git+https://...

NEEDED = ("clipfx", "optax", "matplotlib", "sklearn", "jax_privacy", "dp_accounting")
if not all(map(importlib.util.find_spec, NEEDED)):
    here = pathlib.Path.cwd()
    found = [d for d in (here, *here.parents) if (d / "clipfx/__init__.py").exists()]
    source, more = SOURCE or (str(found[0]) if found else "clipfx-jax"), "plots,privacy"
    what = f"clipfx-jax[{more}] @ {source}" if "://" in source else f"{source}[{more}]"
    command = [sys.executable, "-m", "pip", "install", "-q", what, "scikit-learn"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()

# %%
import os
import secrets

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax_privacy import batch_selection
from sklearn.datasets import load_digits

from clipfx import per_example, plots, privacy

kind = "test" if "CLIPFX_QUICK" in os.environ else jax.devices()[0].platform
STEPS = {"test": 10, "cpu": 200}.get(kind, 600)
print(f"JAX has found {jax.device_count()} x {jax.devices()[0].device_kind}.")

# %% [markdown]
# ## A loss of one example
#
# Everything starts from the loss of *one* example. The batch is mapped by clipfx, which
# finds the norms of all gradients without forming them.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 8 - 1), np.int32(labels)
order = np.random.default_rng(0).permutation(len(labels))
train_rows, test_rows = order[:1500], order[1500:]
x_train, y_train = images[train_rows], labels[train_rows]
x_test, y_test = images[test_rows], labels[test_rows]


def logits_of(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, example):
    x, y = example
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y)


def init_params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(keys[0], (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(keys[1], (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }


def accuracy(params):
    return float((jnp.argmax(logits_of(params, x_test), -1) == y_test).mean())


# %% [markdown]
# ## Where the threshold goes
#
# The noise is proportional to the threshold, so a threshold far above most norms buys
# noise, and one far below them turns all gradients into directions. Norms of the first
# weights (of private data they are private too: choose on public data, or take a rule
# that adapts, below):

# %%
measure = jax.jit(per_example.norms(loss))
norms = np.asarray(measure(init_params(), (x_train, y_train)).norm)[:, 0]
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
plots.histogram(norms, 1.0, ax=axes)
axes.set(xlabel="norm of the gradient of one example", ylabel="examples")
plt.show()

# %% [markdown]
# ## How much noise
#
# For a target epsilon, with every example in a batch with probability q:

# %%
EXPECTED, DELTA = 150, 1e-5
q = EXPECTED / len(y_train)
for epsilon in (1.0, 3.0, 8.0):
    z = privacy.noise_multiplier_for(epsilon, DELTA, STEPS, sampling_probability=q)
    print(f"epsilon {epsilon:g}: noise of {z:.2f} thresholds in every step")

# %% [markdown]
# ## Train
#
# `privacy.dp_grad` clips, sums, adds noise once and divides by the expected batch size.
# Batches are Poisson samples, so their size varies: they are padded, and `where` says
# what is padding. The key of the noise is a secret.


# %%
def train(epsilon, max_norm, rate, **options):
    z = privacy.noise_multiplier_for(epsilon, DELTA, STEPS, sampling_probability=q)
    grad = privacy.dp_grad(
        loss,
        max_norm=max_norm(z) if callable(max_norm) else max_norm,
        noise_multiplier=z,
        expected_batch_size=EXPECTED,
        key=jax.random.key(secrets.randbits(32)),
        **options,
    )
    optimizer, params = optax.adam(rate), init_params()
    state, opt_state = grad.init(params), optimizer.init(params)

    @jax.jit
    def step(params, opt_state, state, batch, mask):
        grads, state, _ = grad(state, params, batch, where=mask)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    draws = batch_selection.CyclicPoissonSampling(sampling_prob=q, iterations=STEPS)
    thresholds = []
    for rows in draws.batch_iterator(len(y_train), rng=secrets.randbits(64)):
        rows = batch_selection.pad_to_multiple_of(rows, 256)  # -1 is padding
        if not len(rows):  # nobody was drawn: a step of noise alone
            rows = np.full(256, -1)
        batch = x_train[rows], y_train[rows]
        params, opt_state, state = step(params, opt_state, state, batch, rows >= 0)
        thresholds.append(jnp.ravel(state.threshold)[0])
    spent = privacy.epsilon(grad.event(STEPS, sampling_probability=q), DELTA)
    return accuracy(params), spent, np.array(thresholds)


print("epsilon  spent  held-out accuracy")
for epsilon in (1.0, 3.0, 8.0):
    found, spent, _ = train(epsilon, 1.0, 0.01)
    print(f"{epsilon:7g}  {spent:5.2f}  {found:.3f}")

# %% [markdown]
# ## A threshold that adapts, privately
#
# A rule that looks at the norms has to pay for it: noised counts are released beside
# the gradient, and epsilon includes them. Starting a hundred times too high:


# %%
def median(z):
    return privacy.quantile(100.0, count_stddev=5 * z, quantile=0.5, step_size=0.2)


found, spent, thresholds = train(3.0, median, 0.01)
print(f"accuracy {found:.3f}, epsilon {spent:.2f}, threshold now {thresholds[-1]:.2f}")
fixed = train(3.0, 100.0, 0.01)[0]
print(f"with the threshold fixed at 100: accuracy {fixed:.3f}")
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
plots.lines({"threshold": thresholds}, ylabel="threshold", ax=axes)
axes.set(yscale="log")
plt.show()

# %% [markdown]
# ## What is guaranteed, and what is not
#
# Two datasets that differ in one example lead to nearly the same distribution of
# models: that is epsilon and delta. It holds for the weights and all that is computed
# from them. It does not hold for what you print on the way: losses and norms of private
# batches are private, and a learning rate chosen by looking at results has used the
# data once more. Accuracies above differ a little from run to run, since keys and
# batches are drawn anew.
