"""States are what checkpoints hold: their paths, shapes and dtypes do not change.

`states.txt` is the record. A change here is one for CHANGELOG.md, since it keeps old
checkpoints from being restored; then `python tests/core/test_states.py` writes it anew.
"""

import pathlib

import jax
import jax.numpy as jnp

import clipfx
from clipfx import privacy, states

RECORD = pathlib.Path(__file__).with_name("states.txt")


def all_states():
    from methods import METHODS

    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    bias, kernel = shape(2), shape(3, 2)
    tree = {"decoder": {"kernel": kernel}, "encoder": {"bias": bias, "kernel": kernel}}
    stacked = {"w": shape(4, 3)}
    transforms = {name: row.make(**row.args) for name, row in METHODS.items()}
    transforms["clip_fair_groups"] = clipfx.clip_fair_groups(2.0, reference="ema")
    transforms["record_norms"] = clipfx.record_norms(groups="layer")
    transforms["clip_per_example"] = clipfx.per_example.clip_per_example(1.0)
    key = jax.random.key(0)
    transforms["add_gaussian_noise"] = privacy.add_gaussian_noise(1.0, key)
    made = {name: jax.eval_shape(tx.init, tree) for name, tx in transforms.items()}
    each = clipfx.per_stacked_layer(clipfx.zclip())
    made["per_stacked_layer"] = jax.eval_shape(each.init, stacked)
    grad = privacy.dp_grad(
        lambda w, x: jnp.vdot(w["w"], x),
        max_norm=privacy.quantile(1.0, count_stddev=1.0),
        noise_multiplier=1.0,
        expected_batch_size=2,
        key=key,
        scale=privacy.second_moment(eps_root=1.0),
    )
    made["dp_grad"] = jax.eval_shape(grad.init, {"w": shape(3)})
    return made


def record():
    lines = []
    for name, state in all_states().items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            where = jax.tree_util.keystr(path)
            lines.append(f"{name}{where}: {leaf.dtype}{list(leaf.shape)}")
        if not jax.tree.leaves(state):
            lines.append(f"{name}: nothing")
    return "\n".join(lines) + "\n"


def test_states_are_those_on_record():
    assert record() == RECORD.read_text()


def test_every_state_is_public_and_named():
    """Of the classes in a state all are in `clipfx.states`, but for Optax's."""

    def kinds(node):
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            yield type(node)
        if isinstance(node, tuple | list):
            for part in node:
                yield from kinds(part)
        elif isinstance(node, dict):
            for part in node.values():
                yield from kinds(part)

    found = {kind for state in all_states().values() for kind in kinds(state)}
    ours = {kind for kind in found if kind.__module__.startswith("clipfx")}
    assert {kind.__name__ for kind in ours} <= set(states.__all__)
    assert all(getattr(states, kind.__name__) is kind for kind in ours)
    assert len({kind.__name__ for kind in ours}) == len(ours)


if __name__ == "__main__":
    import sys

    sys.path.append(str(RECORD.parents[1] / "_support"))
    RECORD.write_text(record())
