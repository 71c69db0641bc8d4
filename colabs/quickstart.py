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
# # clipfx in five minutes
#
# A character RNN is trained three times, from the same weights and on the same text:
# without clipping, with the norm of the whole gradient clipped, and with the norm of
# each layer's gradient clipped.

# %%
# Installs clipfx if it is missing: from the checkout that this notebook is in, or else
# from the package index.
import importlib
import importlib.util
import pathlib
import subprocess
import sys

if not all(map(importlib.util.find_spec, ("clipfx", "optax", "matplotlib"))):
    here = pathlib.Path.cwd()
    found = [d for d in (here, *here.parents) if (d / "clipfx/__init__.py").exists()]
    source = str(found[0]) if found else "clipfx-jax"
    command = [sys.executable, "-m", "pip", "install", "-q", f"{source}[plots]"]
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

import clipfx

platform = jax.devices()[0].platform
quick = platform == "cpu" or "CLIPFX_QUICK" in os.environ
steps, hidden = 100 if quick else 2000, 256
print(f"JAX runs on {platform.upper()}; {steps} steps of each run.")

# %% [markdown]
# ## Text and model
#
# Python's own manual, and one tanh recurrence between an embedding and a readout. Back
# through 100 steps of the recurrence the gradient may grow exponentially.

# %%
text = "\n".join(topics.values())
alphabet, ids = np.unique(list(text), return_inverse=True)
LENGTH, BATCH = 100, 32


def init_params(key):
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(hidden)
    recurrence = jax.nn.initializers.orthogonal(0.9)(keys[1], (hidden, hidden))
    return {
        "embed": {"table": normal(keys[0], len(alphabet), hidden)},
        "recurrent": {"kernel": recurrence, "bias": jnp.zeros(hidden)},
        "readout": {"kernel": normal(keys[2], hidden, len(alphabet))},
    }


def advance(params, state, x):
    recurrent = params["recurrent"]
    pre = params["embed"]["table"][x] + state @ recurrent["kernel"]
    state = jnp.tanh(pre + recurrent["bias"])
    return state, state @ params["readout"]["kernel"]


def loss(params, passages):  # [batch, length + 1], in bits per character
    start = jnp.zeros((len(passages), hidden))
    _, logits = jax.lax.scan(lambda *a: advance(params, *a), start, passages[:, :-1].T)
    after = passages[:, 1:].T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    return losses.mean() / math.log(2)


# %% [markdown]
# ## Train
#
# A clip is an Optax transform, placed before the optimizer. `clipfx.metrics.read` finds
# its numbers in any optimizer state. The learning rate is one at which training without
# clipping diverges.

# %%
CLIPS = {
    "none": clipfx.clip_by_global_norm(math.inf),
    "global": clipfx.clip_by_global_norm(1.0),
    "layer": clipfx.clip_per_layer(1.0),
}


def train(clip):
    tx = optax.named_chain(("guard", clip), ("sgd", optax.sgd(0.2, momentum=0.9)))

    @jax.jit
    def step(params, opt_state, passages):
        value, grads = jax.value_and_grad(loss)(params, passages)
        updates, opt_state = tx.update(grads, opt_state, params)
        norm = clipfx.global_norm(grads)
        return optax.apply_updates(params, updates), opt_state, (value, norm)

    params = init_params(jax.random.key(0))
    opt_state, history = tx.init(params), []
    random = np.random.default_rng(0)
    for _ in range(steps):
        starts = random.integers(len(ids) - LENGTH, size=(BATCH, 1))
        passages = ids[starts + np.arange(LENGTH + 1)]
        params, opt_state, seen = step(params, opt_state, passages)
        history.append(seen)
    return params, clipfx.metrics.read(opt_state), np.array(jax.device_get(history))


runs = {name: train(clip) for name, clip in CLIPS.items()}
for name, (_, _, history) in runs.items():
    bits, norms = history.T
    print(f"{name:8} {bits[-10:].mean():6.2f} bits per character at the end, ", end="")
    print(f"largest norm {norms.max():.3g}")

# %%
figure, axes = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
for name, (_, _, history) in runs.items():
    axes[0].plot(history[:, 0], lw=1)
    axes[1].plot(history[:, 1], lw=1, label=name)
axes[1].axhline(1.0, color="k", ls="--", lw=1, label="threshold")
axes[0].set(yscale="log", ylabel="bits per character")
axes[1].set(yscale="log", ylabel="gradient norm before clipping", xlabel="step")
axes[1].legend(ncols=4)
plt.show()

# %% [markdown]
# ## What the clip recorded
#
# Keys are the name in the chain, the number, and the group: here each layer.

# %%
runs["layer"][1]

# %% [markdown]
# ## What the model writes

# %%
params = min(runs.values(), key=lambda run: run[2][-10:, 0].mean())[0]


@jax.jit
def sample(params, key):
    def step(carry, key):
        state, logits = advance(params, *carry)
        x = jax.random.categorical(key, logits)
        return (state, x), x

    start = jnp.zeros(hidden), jnp.argmax(jnp.asarray(alphabet == "\n"))
    return jax.lax.scan(step, start, jax.random.split(key, 300))[1]


print("".join(alphabet[np.asarray(sample(params, jax.random.key(0)))]))
