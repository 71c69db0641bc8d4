"""Pieces of single-example programs, `[T, D]` to `[T, D]`, and losses made of them."""

import jax
import jax.numpy as jnp
import numpy as np

T, D, V = 3, 4, 5
PIECES = {}


def piece(**shapes):
    """Registers `apply(params, h, example) -> h`, or `h` and a term of the loss."""

    def add(apply):
        PIECES[apply.__name__] = (shapes, apply)
        return apply

    return add


def threes(names):
    """Pieces of one program: half of its time is that of any, whatever is in it."""
    names = [*names]
    some = [names[k : k + 3] for k in range(0, len(names), 3)]
    return {"+".join(x): x for x in some}


def constant(*shape):
    rng = np.random.default_rng(sum(shape))
    return rng.normal(size=shape) / np.sqrt(shape[0])


def fit(y):
    """Anything as `[T, D]`."""
    mix = jnp.asarray(constant(y.size, T * D), y.dtype)
    return jnp.tanh(y.reshape(-1) @ mix).reshape(T, D)


def rows(h, b):
    return h + jnp.broadcast_to(b, h.shape)


def turns(step, carry, xs, **kwargs):
    return jax.lax.scan(step, carry, xs, **kwargs)[1]


@piece(w=(D, D), b=(D,))
def dense(p, h, e):
    return jnp.tanh(rows(h @ p["w"], p["b"]))


@piece(w=(D, D), b=(D, 1))
def dense_left(p, h, e):
    return jnp.tanh(p["w"] @ h.T + p["b"]).T


@piece(q=(D, 2, 3), k=(D, 2, 3), v=(D, 2, 3), o=(2, 3, D))
def attention(p, h, e):
    q, k, v = (jnp.einsum("td,dhk->thk", h, p[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return h + jnp.einsum("thk,hkd->td", jnp.einsum("hts,shk->thk", a, v), p["o"])


@piece(router=(D, 2), w=(2, D, 3), v=(3, 2, D))
def experts(p, h, e):
    gate = jax.nn.softmax(h @ p["router"])
    up = jnp.tanh(jnp.einsum("td,edf->tef", h, p["w"]))
    return jnp.einsum("tef,fed,te->td", up, p["v"], gate)


@piece(w=(D, T, D), v=(T, 2, 2, D))
def batched(p, h, e):
    h = jnp.tanh(jnp.einsum("te,etd->td", h, p["w"]))
    return jnp.einsum("tij,tijd->td", h.reshape(T, 2, 2), p["v"])


@piece(w=(D, D))
def mapped(p, h, e):
    return jnp.tanh(jax.vmap(lambda x: p["w"] @ x)(h))


@piece(w=(2, D, 2), v=(D, T))
def several(p, h, e):
    return jnp.einsum("tij,jdi->td", h.reshape(T, 2, 2), p["w"]) * (
        jnp.einsum("td,dt->", h, p["v"])
    )


@piece(a=(T, D), b=(1, D), c=(T, 1), d=())
def biases(p, h, e):
    h = jnp.sin(h + p["a"])
    return jnp.cos(jnp.sin(h + p["b"]) + p["c"]) + p["d"]


@piece(b=(T, D))
def bias_reshaped(p, h, e):
    return jnp.sin(h + p["b"]) + (fit(h).reshape(-1) + p["b"].reshape(-1)).reshape(T, D)


@piece(scale=(D,), bias=(D,))
def layer_norm(p, h, e):
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 0.01)
    return rows(h * jnp.broadcast_to(p["scale"], h.shape), p["bias"])


@piece(a=(T, D), b=(1, D), c=(T, 1), d=(), f=(2, D), g=(1,), i=(3,))
def scales(p, h, e):
    h = jnp.sin(h * p["a"]) / (2 + jnp.sin(h[:1])) - p["b"] * h[:, :1]
    h = p["d"] - jnp.cos(h * p["c"]) * p["f"][0][None] + p["f"][1][None] / (3 + h)
    return jnp.tanh(h * jnp.broadcast_to(jnp.concatenate([p["g"], p["i"]]), h.shape))


@piece(w=(D + 2, D), v=(2, T, D))
def scales_of_a_matrix(p, h, e):
    h = jnp.sin(h @ p["w"][:D] * p["w"][D : D + 1] - p["w"][D + 1][None])
    return p["v"][0] * h[0, 0] - p["v"][0] * h + h * p["v"][1]


@piece(a=(3, D), b=(D,))
def scales_in_loops(p, h, e):
    def layer(h, a):
        step = lambda c, x: (jnp.sin(c * p["b"] - x) * a, c / 2)
        return turns(step, jnp.ones_like(h[0]), h), None

    return jax.lax.scan(layer, h, p["a"])[0]


@piece(e=(V, D), f=(D, V), g=(2, V, D), s=(V, D))
def look_ups(p, h, e):
    ids = e["ids"]
    h = h + jax.vmap(lambda k: p["e"][k])(ids) * p["f"][:, ids].T
    h = h + p["g"][ids % 2, ids] * p["g"][e["k"] % 2, ids]
    far = lambda k, mode: p["f"].at[:, 2 * k].get(mode=mode, fill_value=0.5)
    h = (
        h
        + jax.vmap(lambda k: far(k, "fill"))(ids)
        + jax.vmap(lambda k: far(k, "clip"))(ids)
    )
    return jax.lax.scan(lambda c, k: (c, jnp.sin(c + p["s"][2 * k])), h[0], ids)[1] + h


@piece(e=(2, V, D))
def tied_pairs(p, h, e):
    h = jnp.tanh(h + p["e"][e["ids"] % 2, e["ids"]])
    return h + jnp.einsum("td,svd->tsv", h, p["e"]).reshape(T, -1)[:, :D]


@piece(e=(V, D), f=(V, D), g=(V, D))
def embed(p, h, e):
    h = h + p["e"][e["ids"]]
    h = h + jnp.take(p["f"], e["ids"] + 2, axis=0, mode="clip")
    far = jnp.take(p["g"], 2 * e["ids"], axis=0, mode="fill", fill_value=0.5)
    return jnp.tanh(h + far)


@piece(e=(V, D))
def tied(p, h, e):
    h = jnp.tanh(h + p["e"][e["ids"]])
    logits = h @ p["e"].T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), e["ids"][:, None] % V, 1)
    return h + jax.nn.softmax(logits) @ jnp.ones((V, D), h.dtype), -picked.sum()


@piece(w=(D, D))
def twice(p, h, e):
    return jnp.tanh(jnp.tanh(h @ p["w"]) @ p["w"])


@piece(w=(D, D), v=(D, D))
def transposed(p, h, e):
    h = jnp.tanh(h @ p["w"]) @ p["w"].T
    return jnp.tanh(h @ p["v"]) * (h.T @ h @ p["v"])[:T]


@piece(a=(D, 1), b=(D, 2), c=(D, 1), d=(2, D), f=(2, D), g=(1,), h=(3,))
def joined(p, h, e):
    h = h @ jnp.concatenate([p["a"], p["b"], p["c"]], 1)
    h = jnp.tanh(rows(h, jnp.concatenate([p["g"], p["h"]])))
    return h @ jnp.concatenate([p["d"], p["f"]], 0)


@piece(a=(D, 2), b=(T, 2), c=(D, 2))
def joined_constants(p, h, e):
    h = h @ jnp.concatenate([p["a"], jnp.ones((D, 2), h.dtype)], 1)
    h = jnp.tanh(h + jnp.concatenate([jnp.ones((T, 2), h.dtype), p["b"]], 1))
    return h @ jnp.concatenate([p["c"], p["c"]], 1)


@piece(w=(3, D, D), v=(D, 2 * D), r=(D, D), b=(2, D))
def sliced(p, h, e):
    for k in (2, 0):
        h = jnp.tanh(rows(h @ p["w"][k], p["b"][k // 2]))
    left, right = jnp.split(p["v"], 2, axis=1)
    return h @ left + jnp.tanh(h @ right) @ p["r"][:, ::-1]


@piece(w=(D, 2 * D))
def overlapping(p, h, e):
    return jnp.tanh(h @ p["w"][:, :D]) @ p["w"][:, 2 : 2 + D]


@piece(a=(D * D,), b=(2, D, 2), c=(1, D, D), d=(2, 2, D))
def reshaped(p, h, e):
    h = jnp.tanh(h @ p["a"].reshape(D, D))
    h = jnp.tanh(h @ p["b"].transpose(1, 2, 0).reshape(D, D))
    return h @ p["c"][0] + h @ p["d"].reshape(D, D).T


@piece(w=(3, D, D), v=(3, D, D))
def indexed(p, h, e):
    h = h @ jax.lax.dynamic_index_in_dim(p["w"], 1, keepdims=False)
    return h @ jax.lax.dynamic_index_in_dim(p["v"], e["k"], keepdims=False)


@piece(w=(3, D, D))
def indexed_in_scan(p, h, e):
    def body(h, k):
        w = jax.lax.dynamic_index_in_dim(p["w"], k, keepdims=False)
        return jnp.tanh(h @ w), None

    return jax.lax.scan(body, h, jnp.arange(3))[0]


@piece(w=(V, D, 3), v=(V, 3, D), o=(V, D, D))
def experts_by_id(p, h, e):
    ids = e["ids"]
    h = jnp.tanh(jnp.einsum("td,tdf->tf", h, p["w"][ids]))
    h = jnp.einsum("tf,tfd->td", h, jnp.take(p["v"], 2 * ids, axis=0, fill_value=0.5))
    expert = jax.jit(lambda x, w: jnp.tanh(w.T @ x) @ w)
    return jax.vmap(lambda x, k: expert(x, (2 * p["o"])[k]))(h, ids)


@piece(u=(2, V, D, D), m=(V, D, D))
def several_experts(p, h, e):
    ids = e["ids"]
    both = jnp.stack([ids, ids % 2], 1)
    h = jnp.tanh(jnp.einsum("td,tkdf->tkf", h, p["u"][ids[:, None] % 2, both]))
    far = jnp.take(p["m"], 2 * both, axis=0, mode="clip")
    return jnp.einsum("tkf,tkdf->td", h, far)


@piece(w=(2, D, 3), v=(2, 3, 3, D), u=(2, 3), c=(2, 3, 3))
def experts_by_group(p, h, e):
    """Of rows that are sorted, some of which no group takes."""
    sizes = jnp.stack([e["k"], jnp.where(e["flag"], 1, T - e["k"])])

    def layer(h, v):
        h = jnp.tanh(jax.lax.ragged_dot(jnp.tanh(h), p["w"], sizes) * p["u"][:1])
        h = jax.lax.ragged_dot(h, jnp.sin(p["c"]), sizes) + h
        frozen = jnp.ones((2, 3, 3), h.dtype) / 3
        h = jax.jit(jax.lax.ragged_dot)(h, frozen, sizes) + h
        return h @ v[2] + jax.lax.ragged_dot(h, v[:2], sizes), None

    return jax.lax.scan(layer, h, p["v"])[0]


@piece(w=(3, D, D), v=(2, V, D, 2, 2), u=(2, V, D, D), t=(V, D, D))
def experts_in_loops(p, h, e):
    def layer(h, q):
        h = jnp.tanh(h @ p["w"][e["k"]])
        rows = q["v"][e["ids"]]
        h = jnp.einsum("tjh,tdhk,td->tjk", h.reshape(T, 2, 2), rows, h)

        def step(c, x):
            x, k = x
            c = jnp.tanh(x @ q["u"][k] + c @ p["t"][k])
            return c, c

        h = h.reshape(T, D)
        return turns(step, jnp.zeros_like(h[0]), (h, e["ids"])), None

    return jax.lax.scan(layer, h, {k: p[k] for k in "vu"})[0]


@piece(u=(V, D, D), v=(2, V, D, D), w=(V, D, D), m=(D, D, V), o=(V, D, D))
def scaled_experts(p, h, e):
    """Rows times what differs between positions, rows and examples, but for `o`."""
    ids, gate = e["ids"], jnp.tanh(h[:, :1, None])
    size = numbers(h, V)[ids][:, None, None]
    h = jnp.tanh(jnp.einsum("td,tdf->tf", h, p["u"][ids] * 0.5 * gate / size))
    kept = (e["x"][:, :1] > 0)[:, :, None]
    v = jnp.where(kept, p["v"][ids % 2, ids] * numbers(h, 1, 1, D), 0)
    h = jnp.einsum("tf,tdf->td", h, v)
    expert = lambda x, k, s: jnp.tanh(x @ (p["w"][k] * (s[:, None] / np.sqrt(2.0))))
    h = jax.vmap(expert)(h, ids, e["x"])
    m = jnp.where(e["flag"], 0.5, p["m"][:, :, ids]) * numbers(h, D, 1, 1)
    h = jnp.einsum("d,dft->tf", h[0], m) + jnp.einsum("td,dft->f", h, m)[None]
    return jnp.einsum("td,tdf->tf", h, p["o"][ids] * numbers(h, 1, 1, D))


@piece(w=(V, D, D), v=(V, D, D), u=(V, D, D))
def experts_elsewhere(p, h, e):
    """Rows that are more than one product."""
    w, v = p["w"][e["ids"]], p["v"][e["ids"]]
    h = jnp.tanh(jnp.einsum("td,tdf->tf", h, w)) + jnp.sin(w).sum(1)
    h = h + jax.lax.cond(
        e["flag"], lambda h: jnp.einsum("td,tdf->tf", h, v), jnp.sin, h
    )
    u = p["u"][e["k"]]
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ u), None), h, length=2)[0]


def conv(h, w, strides=(1,), padding="SAME", **kwargs):
    letters = "XYZ"[: w.ndim - 2]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return jax.lax.conv_general_dilated(
        h[None], w, strides, padding, dimension_numbers=numbers, **kwargs
    )[0]


@piece(a=(2, D, D), b=(3, 2, D), c=(3, 1, 2 * D), d=(2, D, D))
def conv1(p, h, e):
    h = jnp.tanh(conv(h, p["a"]))
    h = jnp.tanh(conv(h, p["b"], feature_group_count=2))
    h = jnp.tanh(conv(h, p["c"], feature_group_count=D))
    h = jnp.tanh(conv(fit(h), p["d"], (2,), [(1, 2)], rhs_dilation=(2,)))
    return fit(h)


@piece(a=(2, 2, 1, 2), b=(2, 3, 2, 3))
def conv2(p, h, e):
    h = conv(h[..., None], p["a"], (1, 2), lhs_dilation=(2, 1), padding=[(1, 1)] * 2)
    return fit(conv(jnp.sin(h), p["b"], (2, 1), "VALID"))


@piece(a=(2, 1, 2, 1, 2), b=(2, 2, 2, 2))
def conv3(p, h, e):
    h = conv(h.reshape(T, 2, 2, 1), p["a"], (1, 1, 1))
    h = jnp.sin(h.reshape(T, 4, 2))
    return fit(jax.lax.conv_transpose(h[None], p["b"], (2, 1), "SAME"))


@piece(wx=(D, D), wh=(D, D), b=(D,))
def rnn(p, h, e):
    def step(c, x):
        c = jnp.tanh(x @ p["wx"] + c @ p["wh"] + p["b"])
        return c, c

    return turns(step, jnp.zeros_like(h[0]), h, reverse=True)


@piece(ii=(D, D), i4=(D, D), fi=(D, D), f4=(D, D), b=(2, D), h0=(D,))
def gated(p, h, e):
    def step(carry, x):
        c, y = carry
        z = x @ jnp.concatenate([p["ii"], p["fi"]], 1)
        z = z + y @ jnp.concatenate([p["i4"], p["f4"]], 1) + p["b"].reshape(-1)
        i, f = jnp.split(z, 2)
        c = jax.nn.sigmoid(f) * c + jnp.tanh(i)
        y = jnp.tanh(c)
        return (c, y), y

    return turns(step, (jnp.zeros_like(h[0]), p["h0"]), h)


@piece(w=(2, D, D), u=(D, D), b=(2, D), wo=(2, D, D))
def nested_scan(p, h, e):
    def layer(h, q):
        w, b, wo = q

        def step(c, x):
            c = jnp.tanh(x @ w + c @ p["u"] + b)
            return c, c @ wo

        return turns(step, jnp.zeros_like(h[0]), h), None

    return jax.lax.scan(layer, h, (p["w"], p["b"], p["wo"]))[0]


@piece(a=(2, 2 * D, 2), b=(2 * D, 2))
def nested_joined(p, h, e):
    def layer(h, a):
        def step(c, x):
            w = jnp.concatenate([a, p["b"]], 1)
            c = jnp.tanh(jnp.concatenate([x, c]) @ w)
            return c, c

        return turns(step, jnp.zeros_like(h[0]), h), None

    return jax.lax.scan(layer, h, p["a"])[0]


@piece(w=(3, D, D), b=(3, D), s=(3, D))
def layers(p, h, e):
    def body(h, q):
        return h + jnp.tanh(rows(h @ q["w"], q["b"])) * q["s"][None], None

    return jax.lax.scan(body, h, p)[0]


@piece(w=(3, D, D), b=(3, D), v=(D, D))
def remat_layers(p, h, e):
    @jax.checkpoint
    def block(h, w, b):
        return jnp.tanh(rows(h @ w, b))

    body = lambda h, q: (block(h, *q), None)
    h = jax.lax.scan(body, h, (p["w"], p["b"]))[0]
    save = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda h: jnp.sin(h @ p["v"]), policy=save)(h)


@jax.custom_vjp
def odd(x):
    return jnp.sin(x)


odd.defvjp(lambda x: (jnp.sin(x), x), lambda x, d: (d * (1 + x * x),))


@piece(w=(D, D), v=(D, D))
def odd_derivative(p, h, e):
    return odd(h @ p["w"]) @ odd(p["v"])


@jax.custom_vjp
def odd_matmul(x, w):
    return x @ w


odd_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, d: (2 * (d @ saved[1].T), jnp.sin(saved[0].T @ d)),
)


@piece(w=(D, D), v=(D, D))
def odd_parameter(p, h, e):
    return jnp.tanh(odd_matmul(jnp.tanh(h @ p["v"]), p["w"]))


@piece(v=(D, D), g=(D,), s=(D, D))
def computed(p, h, e):
    w = p["v"] / jnp.linalg.norm(p["v"], axis=0, keepdims=True) * p["g"][None]
    return jnp.tanh(h @ w) @ jnp.sin(p["s"])


@piece(w=(D, D), v=(D, D), i=(D, D), s=(T, D))
def branches(p, h, e):
    h = jax.lax.cond(e["flag"], lambda h: h @ p["w"], lambda h: jnp.sin(h @ p["v"]), h)
    h = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["i"]), h)
    return h - jnp.sort(jnp.where(h > 0, p["s"], h * p["s"]), axis=0)


@piece(w=(D, D), b=(D,), unused=(2, 3))
def stopped(p, h, e):
    h = rows(h @ jax.lax.stop_gradient(p["w"]), p["b"])
    return jax.lax.stop_gradient(h) * h


@piece(w=(D, D), b=(D,))
def decayed(p, h, e):
    term = 0.1 * (p["w"] ** 2).sum() + jnp.abs(p["b"]).sum()
    return rows(h @ p["w"], p["b"]), term


@piece(w=(D, D), v=(D, D))
def dead_code(p, h, e):
    _ = h @ p["w"]
    return jnp.tanh(h @ p["v"])


@piece(w=(D, D))
def nested_jit(p, h, e):
    block = jax.jit(lambda h, w: jnp.tanh(jax.jit(jnp.matmul)(h, w)))
    return block(block(h, p["w"]), p["w"])


@piece(w=(D, D), v=(D,))
def inner_gradient(p, h, e):
    energy = lambda h: (jnp.tanh(h @ p["w"]) @ p["v"]).sum()
    return h - jax.grad(energy)(h)


# ------------------------------------------------------- parameters times constants


def numbers(h, *shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), h.dtype)


def mask(*shape):
    return np.random.default_rng(0).random(shape) < 0.6


def kept(h, *shape):
    return mask(*shape).astype(h.dtype)


@piece(w=(D, D), v=(D, D), u=(D, 2, D), b=(D,), t=(V, D))
def scaled(p, h, e):
    h = jnp.tanh(h @ (p["w"] * 0.5) + (p["t"] * np.sqrt(D))[e["ids"]])
    h = jnp.tanh(h @ (-p["v"]).T / 3 + h @ (1 - p["u"][:, 1] / jnp.sqrt(3.0)))
    return h @ jax.jit(lambda w: 2 * (w + 1))(p["u"][:, 0]) + 2 * rows(h, -p["b"])


@piece(w=(D, D), b=(D,), e=(V, D), s=(), c=(T, 1))
def scaled_and_tied(p, h, e):
    h = jnp.tanh(h @ (2 * p["w"]) + rows(h, p["b"] * 2)) + (3 * p["e"])[e["ids"]]
    h = jnp.tanh(h @ (p["w"].T / -3) + rows(h, p["b"])) + h @ (0.1 * p["e"]).T @ p["e"]
    return h + jnp.sin(h + 3 * p["s"]) + jnp.sin(h + p["c"] * kept(h, T, 1))


@piece(w=(D, D), b=(D,), t=(V, D), k=(2, D, D), d=(D,))
def masked(p, h, e):
    h = jnp.tanh(h @ (p["w"] * kept(h, D, D)) + rows(h, p["b"] * numbers(h, D)))
    h = h + jnp.where(mask(V, D), p["t"], 0.5)[e["ids"]]
    h = h + jnp.broadcast_to(p["d"], (T, D)) * numbers(h, T, D)
    return jnp.tanh(conv(h, p["k"] * numbers(h, 2, 1, D)))


@piece(w=(D, D), v=(D, 2, 2), e=(2, D, D), m=(2, D, D), n=(D, D), a=(2, D, 1))
def scaled_by_vectors(p, h, e):
    w = p["w"] * numbers(h, 1, D) / (2 + kept(h, D, 1))
    h = jnp.tanh(h @ w + h.T[:T] @ h @ w.T)
    h = jnp.einsum("td,dhk->thk", h, p["v"] * numbers(h, 1, 2, 1)).reshape(T, D)
    h = jnp.einsum("etd,edf->etf", jnp.stack([h, -h]), p["e"] * numbers(h, 2, 1, D))[0]
    body = lambda h, w: (jnp.tanh(h @ w), None)
    h = jax.lax.scan(body, h, p["m"] * numbers(h, 2, 1, D))[0]
    joined = jnp.concatenate([p["a"], numbers(h, 2, D, 3)], 2) * numbers(h, 2, D, 1)
    h = jax.lax.scan(body, h, joined)[0]
    n = (p["n"].reshape(2, 2, D) * numbers(h, 1, 2, 1)).reshape(D, D)
    return rows(h, jnp.sin(h[0] @ n))


@piece(w=(T * D, 3), v=(2, 3), u=(3, T * D), a=(1, 3))
def masked_at_one_position(p, h, e):
    h = jnp.tanh(h.reshape(-1) @ jnp.tril(p["w"]))
    h = h + jnp.concatenate([p["a"], p["v"] * numbers(h, 2, 3)]) @ h
    return jnp.where(mask(3, T * D), 0.3, -p["u"]).T.dot(h).reshape(T, D)


@piece(w=(D, D), v=(D, 2), u=(2, D), b=(2,), t=(V, D), c=(T - 1, 2))
def permuted_and_padded(p, h, e):
    order = np.random.default_rng(0).permutation(D)
    h = jnp.tanh(h @ p["w"][jnp.asarray(order)][:, order[::-1]])
    right = h @ jnp.pad(jnp.roll(p["v"], 1, 0), ((0, 0), (1, 1)))
    h = jnp.tanh(right + rows(h, jnp.pad(p["b"][::-1], (2, 0))))
    h = jnp.sin(h + jnp.pad(p["c"], ((1, 0), (1, 1))))
    h = h + h @ jnp.pad(jnp.flip(p["u"]), ((1, 1), (0, 0)), constant_values=0.2)
    return h + jnp.take(p["t"], np.arange(V)[::-1], axis=0)[e["ids"]]


@piece(w=(2, D, D), m=(2, D, D), u=(D, D), b=(2, D), r=(D, D), s=(D, D))
def scaled_layers(p, h, e):
    scales = numbers(h, 2)

    def layer(h, q):
        w, b, m, scale, keep = q
        h = jnp.tanh(h @ (w * scale) + rows(h, b / (1 + keep[0])) + h @ (m * keep))

        def step(c, x):
            c = jnp.tanh(x @ (w * scale) + c @ (p["u"] * scales[1]))
            return c, c @ (0.5 * p["r"] * kept(h, D, D)) + c @ (scale * p["s"])

        return turns(step, jnp.zeros_like(h[0]), h), None

    xs = p["w"], p["b"], p["m"], scales, kept(h, 2, D, D)
    return jax.lax.scan(layer, h, xs)[0]


@piece(a=(D, 2), b=(T, 2), c=(D, 1), d=(D, 3), g=(2, D))
def scaled_and_joined(p, h, e):
    h = h @ jnp.concatenate([2 * p["a"], jnp.ones((D, 2), h.dtype)], 1)
    h = jnp.tanh(h + jnp.concatenate([jnp.ones((T, 2), h.dtype), p["b"] / 3], 1))
    h = jnp.tanh(h @ jnp.concatenate([p["c"], -p["d"]], 1))
    return h @ jnp.concatenate([p["g"], p["g"] * 3], 0)


def program(steps):
    """The loss of `(name, wrapper, params' name)` one after the other."""

    def loss(params, example):
        h, terms = example["x"], []
        for name, wrapper, key in steps:
            apply = lambda p, h, name=name: PIECES[name][1](p, h, example)
            out = WRAPPERS[wrapper](apply)(params[key], h)
            h, *more = out if isinstance(out, tuple) else (out,)
            terms += more
        return sum(terms, jnp.sum(h * jnp.asarray(constant(T, D), h.dtype)))

    return loss


def around(*names, wrapper="plain"):
    """Pieces between two layers: what precedes and follows them matters too."""
    kinds = [("dense", "plain"), *((x, wrapper) for x in names), ("dense", "plain")]
    return [(*kind, str(k)) for k, kind in enumerate(kinds)]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def stack(f):
    """Over layers, whose parameters have an axis in front."""
    return lambda p, h: jax.lax.scan(lambda h, q: (first(f(q, h)), None), h, p)[0]


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "saving": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "layers": stack,
    "remat layers": lambda f: stack(jax.checkpoint(f)),
}
LAYERS = 2


def draw(steps, seed=0, size=3):
    """Parameters and a batch."""
    rng = np.random.default_rng(seed)
    normal = lambda s: rng.normal(size=s) / np.sqrt(s[0] if s else 1)
    lead = lambda wrapper: (LAYERS,) if "layers" in wrapper else ()
    params = {
        key: {n: normal((*lead(wrapper), *s)) for n, s in PIECES[name][0].items()}
        for name, wrapper, key in steps
    }
    batch = {
        "x": rng.normal(size=(size, T, D)),
        "ids": rng.integers(-2, V, (size, T), np.int32),
        "flag": np.arange(size) % 2 == 0,
        "k": rng.integers(0, 3, size, np.int32),
    }
    return params, batch
