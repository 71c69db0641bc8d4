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
# each layer's clipped.

# %%
# Where Colab installs clipfx from: the address that you opened this notebook at.
REPOSITORY = "https://github.com/OWNER/clipfx"  # @param {type:"string"}

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
        d for d in (here, *here.parents) if (d / "examples/char_rnn.py").exists()
    )
sys.path.insert(0, str(root))

# %%
import io
import os

import jax
import optax
from IPython.display import Image

import clipfx
from examples import _common, char_rnn

platform = jax.devices()[0].platform
quick = platform == "cpu" or "CLIPFX_QUICK" in os.environ
print(f"JAX runs on {platform.upper()}; training is {'short' if quick else 'long'}.")

# %% [markdown]
# ## Train
#
# The learning rate is one at which training without clipping explodes.

# %%
if quick:
    settings = char_rnn.Settings(steps=100, hidden=128)
else:
    settings = char_rnn.Settings(steps=2000)

text = char_rnn.load_text()
histories = [char_rnn.train(text, clip, settings) for clip in char_rnn.DEFAULT]
print(_common.format_table([char_rnn.summarize(history) for history in histories]))

# %%
picture = io.BytesIO()
char_rnn.plot(histories, picture)
Image(picture.getvalue())

# %% [markdown]
# What the best of them writes:

# %%
best = min(histories, key=lambda history: history.held_out)
print(char_rnn.sample(best))

# %% [markdown]
# ## In your own chain
#
# A clip is an Optax transform, to be put before the optimizer. `clipfx.metrics.read`
# finds its numbers in any optimizer state.

# %%
params = {"encoder": jax.numpy.ones((4, 4)), "decoder": jax.numpy.ones(4)}
tx = optax.chain(clipfx.clip_by_global_norm(1.0), optax.adamw(3e-4))
state = tx.init(params)
grads = params  # yours are from jax.grad
updates, state = tx.update(grads, state, params)
params = optax.apply_updates(params, updates)
clipfx.metrics.read(state)
