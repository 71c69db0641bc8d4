"""Layers of Keras on JAX, called as functions of their variables."""

import os

import pytest
from zoo import (
    LABELS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    B,
    check,
    cross_entropy,
    lenient,
    vectors,
)

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="Keras is in the extra zoo")

# Smaller than what their Gram matrices take.
KERNELS = "sequential/conv2d/kernel", "sequential/separable_conv2d/depthwise_kernel"


def classifier():
    layers = keras.layers
    return keras.Sequential([
        layers.Input((8, 8, 3)),
        layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
        layers.GroupNormalization(4),
        layers.SeparableConv2D(64, 3, padding="same", activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(256, activation="gelu"),
        layers.Dense(B),
    ])  # fmt: skip


def decoder():
    layers = keras.layers
    tokens = layers.Input((None,), dtype="int32")
    embed = layers.ReversibleEmbedding(VOCABULARY, WIDTH)
    x = embed(tokens)
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(4, WIDTH // 4)(h, h, use_causal_mask=True)
    h = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
    x = x + layers.Dense(WIDTH)(h)
    return keras.Model(tokens, embed(x, reverse=True))


def recurrent():
    layers = keras.layers
    return keras.Sequential([
        layers.Input((None,), dtype="int32"),
        layers.Embedding(VOCABULARY, WIDTH),
        layers.LSTM(WIDTH, return_sequences=True),
        layers.GRU(WIDTH, return_sequences=True),
        layers.Dense(VOCABULARY),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("model", "batch", "formed"),
    [
        (classifier, (vectors(8, 8, 3), LABELS), KERNELS),
        (decoder, (TOKENS[:, :-1], TOKENS[:, 1:]), ()),
        (recurrent, (TOKENS[:, :-1], TOKENS[:, 1:]), ()),
    ],
    ids=["classifier", "decoder", "recurrent"],
)
def test_keras(model, batch, formed):
    # Norms and attention are of float32, whatever dtype a layer is told.
    with lenient():
        keras.utils.clear_session()  # names have no numbers of models before
        model = model()
        fixed = [v.value for v in model.non_trainable_variables]

        def loss(params, example):
            x, labels = example
            params = [params[v.path] for v in model.trainable_variables]
            (outputs,), _ = model.stateless_call(params, fixed, x[None])
            return cross_entropy(outputs, labels)

        params = {v.path: v.value for v in model.trainable_variables}
        check(loss, params, batch, formed=formed, dtype="float32")
