"""Checkpoints that are never resumed wrongly, by Orbax.

A checkpoint is written under another name and renamed when it is whole, so one that
was cut short does not count. One that was damaged later is found by a checksum of
every number in it, taken on the devices when it was saved and again when it is read;
then the one before is taken. What it was trained with is saved beside it.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

FORMAT = "clipfx transformer_fsdp, 1"


@contextlib.contextmanager
def manager(directory: pathlib.Path, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """Saves in the background, keeps the last few, ends when all is saved."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    with ocp.CheckpointManager(directory.absolute(), options=options) as opened:
        yield opened


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A sum over the bits of every number and its place, the same on any mesh."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.uint32(2 * number + 1)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(40503) + 2 * index
        # Odd multiples of what is mixed, so that equal changes do not cancel.
        mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
        total += jnp.sum(mixed * (place | 1), dtype=jnp.uint32)
    return total


def save(manager: ocp.CheckpointManager, step: int, items: Any, about: Any) -> None:
    """Saves trees by name, and a dict about them; waits for nothing but the copy."""
    sums = {name: int(checksum(tree)) for name, tree in items.items()}
    about = {"format": FORMAT, "checksums": sums, **about}
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    saved = ocp.args.Composite(about=ocp.args.JsonSave(about), **trees)
    manager.save(step, args=saved)


def restore(
    manager: ocp.CheckpointManager,
    abstract: Mapping[str, Any],
    wanted: Callable[[dict], Sequence[str]],
    say: Callable[[str], None] = print,
) -> tuple[int, dict[str, Any]] | None:
    """The newest checkpoint that is whole, None if there is none at all.

    Args:
      manager: Of the directory.
      abstract: By name, trees of `jax.ShapeDtypeStruct` with shardings.
      wanted: From what was saved about the trees, the names of those to read; raises
        `ValueError` if they are not what this run goes on from.
      say: Told what was passed over.

    Raises:
      ValueError: If there are checkpoints and none can be read, or the newest that can
        is not of this run.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        foreign = ValueError(
            f"{manager.directory} holds checkpoints of another program (step {step}); "
            "give another --out."
        )
        if not (manager.directory / str(step) / "about").exists():
            raise foreign
        about, problem = _try(manager, step, about=ocp.args.JsonRestore())
        trees = {}
        if problem is None:
            if about["about"].get("format") != FORMAT:
                raise foreign
            names = wanted(about["about"])
            args = {k: ocp.args.StandardRestore(abstract[k]) for k in names}
            trees, problem = _try(manager, step, **args)
        if problem is None:
            sums = about["about"]["checksums"]
            wrong = [k for k, tree in trees.items() if int(checksum(tree)) != sums[k]]
            problem = f"the numbers of {wrong} are not those saved" if wrong else None
        if problem is None:
            return step, trees
        say(f"Checkpoint {step} cannot be read and is put aside: {problem}.")
        _put_aside(manager, step)
    if steps:
        raise ValueError(
            f"none of the checkpoints in {manager.directory} can be read (steps "
            f"{sorted(steps)}); start anew with another --out."
        )
    return None


def _try(
    manager: ocp.CheckpointManager, step: int, **items: Any
) -> tuple[dict[str, Any], str | None]:
    """The items of a checkpoint, or what is wrong with it for any of the processes."""
    found, problem = {}, ""
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**items))
        found = {name: restored[name] for name in items}
    except Exception as error:  # whatever a damaged file makes Orbax raise
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    good = multihost_utils.process_allgather(np.array([not problem]))
    return found, None if np.all(good) else problem or "another process cannot read it"


def _put_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Renames a checkpoint, so that its step can be saved again."""
    if jax.process_index() == 0:
        path = manager.directory / str(step)
        path.rename(manager.directory / f"damaged_{step}_{time.time_ns()}")
    multihost_utils.sync_global_devices("put aside")
    manager.reload()
