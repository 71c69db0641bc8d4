"""Training steps compiled for TPUs, which need not be here: libtpu is what compiles."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiers import in_tiers

from benchmarks._programs import (
    MATRICES,
    METHODS,
    MODELS,
    PLAIN,
    Shape,
    compiled,
    decoder_of_examples,
    facts,
    of_examples,
)
from clipfx._core import reductions
from clipfx.per_example.engine import target

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs: clipfx[accelerators]")

# Of norms alone, and those that do more.
BY_NORMS = ["global", "layer", "zclip", "autoclip", "quantile_clip", "adagc",
            "clip_by_snr"]  # fmt: skip
OTHERS = [x for x in METHODS if x not in (*BY_NORMS, *MATRICES, *PLAIN)]
USUAL = {"global", "layer", "agc"}


@functools.cache
def chips() -> list:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by other workers
    return topologies.get_topology_desc("v5e:2x2", "tpu").devices


@functools.cache
def program(model: str, method: str, number: int = 1, width: int = 0) -> str:
    """The text of a compiled step in bfloat16, with masters in float32."""
    mesh = Mesh(np.array(chips()[:number]), ("data",))
    small = MODELS[model](width or 2048, 4, mesh)
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        # As in a process with so many devices.
        patch.setattr(reductions, "forced_device", "one" if number == 1 else "mesh")
        step, _ = compiled(small, METHODS[method](), jnp.dtype("bfloat16"), mesh)
    return step.as_text()


@pytest.mark.parametrize("method", in_tiers([*BY_NORMS, *OTHERS], USUAL))
def test_nothing_waits(method):
    """No loop, no branch, nothing on the host, no copy of a gradient."""
    text, plain = program("mlp", method), program("mlp", "optax")
    assert (facts(text).loops, facts(text).branches) == (0, 0)
    assert " while(" not in text  # of known length neither: the model has none
    assert not re.search(r" (?:infeed|outfeed|send|recv)\(", text)
    called = lambda text: {*re.findall(r'custom_call_target="(.*?)"', text)}
    assert called(text) <= called(plain)  # what XLA itself puts there
    copies = lambda text: len(re.findall(r"\[2048,2048\]\S* copy\(", text))
    assert copies(text) <= copies(plain)


@pytest.mark.parametrize("method", in_tiers(BY_NORMS, USUAL))
def test_norms_cost_what_those_of_optax_cost(method):
    """The sum of squares is taken where the gradient is made."""
    ours, plain = (facts(program("mlp", x)).cycles for x in (method, "optax"))
    assert ours <= 1.02 * plain


@pytest.mark.parametrize("method", in_tiers(["global", "layer"], {"global"}))
def test_a_mesh_takes_one_all_reduce_more(method):
    """Of a decoder whose layers run in a scan, split as FSDP splits it."""
    ours, plain = (
        facts(program("decoder", x, 4, 256)).collectives for x in (method, "none")
    )
    number, size = ours.pop("all-reduce")
    least, bytes_ = plain.pop("all-reduce")
    assert number == least + 1
    assert size - bytes_ <= 3 * 4 * 8  # three sums of each group
    assert ours == plain


def test_a_mesh_takes_no_loop_for_other_norms():
    """The largest element is looked for first, as on one device."""
    found = facts(program("decoder", "ord_3", 4, 256))
    assert (found.loops, found.branches) == (0, 0)
    least, _ = facts(program("decoder", "none", 4, 256)).collectives["all-reduce"]
    assert found.collectives["all-reduce"][0] == least + 2


def test_examples_of_a_rematerialized_decoder(monkeypatch):
    """Nothing waits, and no gradient of an example is larger than activations."""
    monkeypatch.setattr(target, "forced", "tpu")
    shape = Shape(layers=2, width=256, length=64, size=8, vocabulary=512)
    model = decoder_of_examples(shape, "remat")
    whole = NamedSharding(Mesh(np.array(chips()[:1]), ("data",)), PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    args = jax.tree.map(place, (model.params, model.batch))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours, plain = (
            jax.jit(of_examples(model, groups)).lower(*args).compile()
            for groups in ("global", None)
        )
    found = facts(ours.as_text())
    assert (found.loops, found.branches) == (0, 0)
    flops = lambda step: step.cost_analysis()["flops"]
    assert flops(ours) < 1.55 * flops(plain)
    table = 512 * 256
    shapes = re.findall(r"(?:f32|bf16)\[8,([\d,]+)\]", ours.as_text())
    assert max(np.prod([int(n) for n in s.split(",")]) for s in shapes) <= table
