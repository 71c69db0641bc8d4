"""A decoder of text on a mesh of devices, in one process or many; kill it, start again.

    python -m examples.transformer_fsdp
    python -m examples.transformer_fsdp --model=2 --clip=zclip --accumulate=4
    python -m examples.transformer_fsdp --processes=2 --out=out/two
    srun python -m examples.transformer_fsdp --coordinator=cluster --width=2048 ...

Parameters and the state of AdamW are float32 and split over both axes of the mesh: over
"data", as in FSDP, and over "model", by the columns and rows of the dense layers.
Gradients are taken, and clipped, in bfloat16. The clip needs no argument for any of it.

The same command resumes where it was stopped, for whatever reason: parameters, the
state of the clip, random keys and metrics become bit for bit what they would have been.
To that end a batch depends on seed and step alone, a checkpoint holds everything else,
and metrics of steps that no checkpoint has are written again. It also resumes on
another mesh, up to rounding.

Without an accelerator it runs on eight devices simulated by the CPU. On a TPU or GPU
pod start it once for each host, with `--coordinator=cluster`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from examples import _checkpoints, _common, _processes
from examples._clippers import CLIPPERS, check_clippers
from examples._log import Log
from examples._training import Settings, from_items, items_of, programs

# See diffusion_digits: imported, an example keeps its flags to itself.
FLAGS = flags.FLAGS if __name__ == "__main__" else flags.FlagValues()
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_float = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_string("text", None, "UTF-8 text file; by default Python's own manual.")
_string("clip", "global", f"Clipping method: {', '.join(CLIPPERS)}.")
_float("max_norm", 1.0, "Clipping threshold, if the method takes one.")
_integer("steps", 200, "Total training steps, including those before a resume.", 1)
_integer("save_every", 50, "Steps between checkpoints.", 1)
_integer("width", Settings.width, "Model width.", 1)
_integer("layers", Settings.layers, "Transformer layers.", 1)
_integer("heads", Settings.heads, "Attention heads.", 1)
_integer("length", Settings.length, "Sequence length, in bytes.", 1)
_integer("batch", Settings.batch, "Global batch size, in sequences.", 1)
_integer("accumulate", Settings.accumulate, "Gradient accumulation steps.", 1)
_float("dropout", Settings.dropout, "Dropout rate.", 0.0, 0.9)
flags.DEFINE_enum(
    "dtype",
    Settings.dtype,
    ["bfloat16", "float32"],
    "Compute dtype.",
    flag_values=FLAGS,
)
_float("learning_rate", Settings.learning_rate, "Peak learning rate of AdamW.")
_integer("warmup", Settings.warmup, "Warm-up steps.", 0)
_integer("seed", Settings.seed, "Random seed of weights, batches and dropout.", 0)
_integer("data", 0, "Data-parallel (FSDP) mesh size; 0 for all remaining devices.", 0)
_integer("model", 1, "Tensor-parallel mesh size; must divide --heads.", 1)
_integer("cpu_devices", 8, "Simulated devices in all, if there is only a CPU.", 1)
_integer("processes", 1, "Processes to start on this machine's CPU.", 1)
_string("coordinator", "", "`cluster`, or host:port of process 0.")
_integer("process_id", -1, "Index of this process, with --coordinator.")
flags.DEFINE_bool(
    "reset_clip_state",
    False,
    "Resume with another clipping method than the checkpoint's.",
    flag_values=FLAGS,
)
_string("out", "out/transformer_fsdp", "Output directory.")
for name in ("learning_rate", "max_norm"):
    flags.register_validator(name, lambda x: x > 0, "must be greater than 0", FLAGS)


# ------------------------------------------------------------------------------ data


def split_text(text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and the last tenth, kept apart; at least a passage of each."""
    ids = np.frombuffer(text.encode(), np.uint8)
    window = length + 1
    if len(ids) < 2 * window:
        raise ValueError(
            f"the text has {len(ids)} bytes, and at length {length} it takes "
            f"{2 * window}: give a longer text or a smaller length."
        )
    cut = len(ids) - max(len(ids) // 10, window)
    return ids[:cut], ids[cut:]


def passages_at(
    ids: np.ndarray, step: int, settings: Settings, sharding: NamedSharding
) -> jax.Array:
    """Passages `[batch, length + 1]` of a step; each process cuts out its own."""
    window = settings.length + 1
    order = np.random.default_rng([settings.seed, step])
    starts = order.integers(len(ids) - window + 1, size=settings.batch)

    def cut(index):
        rows = starts[index[0], None] + np.arange(window)[index[1]]
        return ids[rows].astype(np.int32)

    shape = (settings.batch, window)
    return jax.make_array_from_callback(shape, sharding, cut)


# ------------------------------------------------------------------------------ mesh


def make_mesh(settings: Settings, data: int, model: int) -> Mesh:
    """A mesh of `data` times `model` devices; `ValueError` if that cannot be."""
    there = jax.device_count()
    data = data or max(there // model, 1)
    if data * model > there:
        raise ValueError(
            f"a mesh of --data={data} times --model={model} takes {data * model} "
            f"devices, and there are {there}."
        )
    if data * model < there and jax.process_count() > 1:
        raise ValueError(
            f"a mesh of --data={data} times --model={model} leaves some of the {there} "
            f"devices of {jax.process_count()} processes out: give all of them work."
        )
    part = settings.batch // settings.accumulate
    for name, size, axis, by in (
        ("--batch", settings.batch, "--accumulate", settings.accumulate),
        ("--batch over --accumulate", part, "--data", data),
        ("--width", settings.width, "--data", data),
        ("--width", settings.width, "--heads", settings.heads),
        ("--heads", settings.heads, "--model", model),
        ("256 bytes", 256, "--model", model),
    ):
        if size % by:
            raise ValueError(f"{name} is {size}, which {axis}={by} does not divide.")
    kinds = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), kinds, devices=devices)


# ------------------------------------------------------------------------------ runs


def difference(saved: dict, now: dict, part: str) -> str:
    """What a checkpoint and this run disagree on, in a part of what is told of them."""
    names = [k for k, v in now[part].items() if saved[part].get(k) != v]
    flags_of = lambda about: " ".join(f"--{k}={about[part].get(k)}" for k in names)
    told = (
        f"the checkpoint was trained with {flags_of(saved)}, and this run has "
        f"{flags_of(now)}: give the same"
    )
    return told if names else ""


def items_to_read(saved: dict, now: dict, reset: bool) -> list[str]:
    """Of a checkpoint; `ValueError` if this run does not go on from there."""
    if told := difference(saved, now, "settings"):
        raise ValueError(f"{told}, or another --out.")
    told = difference(saved, now, "clip")
    if told and not reset:
        raise ValueError(
            f"{told} clipper, or --reset_clip_state to go on with the new one, whose "
            "state then starts afresh."
        )
    return ["model"] if told else ["model", "clip"]


def train(
    settings: Settings,
    text: str,
    out: pathlib.Path,
    *,
    clip: str = "global",
    max_norm: float = 1.0,
    steps: int = 200,
    save_every: int = 50,
    data: int = 0,
    model: int = 1,
    reset_clip_state: bool = False,
) -> dict[str, Any] | None:
    """Trains from where `out` stands; a row of results, None if nothing was left to do.

    Every process of a run calls it; the first of them writes and tells.
    """
    check_clippers([clip])
    ids, held_out = split_text(text, settings.length)
    mesh = make_mesh(settings, data, model)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    about = {
        "settings": {**dataclasses.asdict(settings), "text": digest},
        "clip": {"clip": clip, "max_norm": max_norm},
    }
    chief = jax.process_index() == 0
    say = tqdm.write if chief else lambda text: None

    start, step, loss, shapes = programs(settings, clip, max_norm, mesh)
    rows = NamedSharding(mesh, P("data"))
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(_checkpoints.manager(out / "checkpoints"))
        wanted = lambda saved: items_to_read(saved, about, reset_clip_state)
        found = _checkpoints.restore(manager, items_of(shapes), wanted, say)
        first, items = found or (0, {})
        if first >= steps:
            say(f"{out} has done {first} of --steps={steps} already.")
            return None
        state = from_items(shapes if "clip" in items else start(), items)
        if first:
            fresh = "" if "clip" in items else ", with a fresh clip state"
            say(f"Goes on after step {first} of {out}{fresh}.")
        log = None
        if chief:
            log = stack.enter_context(contextlib.closing(Log(out, first, steps)))
        waiting: list[tuple[int, dict]] = []

        def write(keep: int) -> None:
            while log and len(waiting) > keep:
                number, seen = waiting.pop(0)
                plain = {k: v.item() for k, v in jax.device_get(seen).items()}
                log.write({"step": number, **plain})

        begin, seen = time.perf_counter(), {}
        for number in range(first, steps):
            state, seen = step(state, passages_at(ids, number, settings, rows))
            if log:
                waiting.append((number, seen))
            write(keep=1)  # those of the step before, while this one runs
            if number == first:
                jax.block_until_ready(state)
                begin = time.perf_counter()  # compilation does not count
            if (number + 1) % save_every == 0 or number + 1 == steps:
                write(keep=0)
                if log:
                    log.sync()
                _checkpoints.save(manager, number + 1, items_of(state), about)
        seconds = time.perf_counter() - begin
        tests = (passages_at(held_out, k, settings, rows) for k in range(8))
        losses = [float(loss(state.params, passages)) for passages in tests]
    rates = [float(v) for k, v in seen.items() if "/clip_rate/" in k]
    return {
        "clip": clip,
        "mesh": f"{mesh.shape['data']} x {mesh.shape['model']}",
        "processes": jax.process_count(),
        "steps": steps,
        "bits/byte": float(np.mean(losses)) / math.log(2),
        "clip rate": sum(rates) / len(rates) if rates else math.nan,
        "bytes/s": int(
            (steps - first - 1) * settings.batch * settings.length / seconds
        ),
    }


def main(argv: Sequence[str]) -> None:
    """Trains, or starts the processes that do."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every move
    given = FLAGS.flag_values_dict()
    pick = lambda names: {name: given[name] for name in names}
    settings = Settings(**pick(f.name for f in dataclasses.fields(Settings)))
    options = ("clip", "max_norm", "steps", "save_every", "data", "model")
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --.")
        check_clippers([FLAGS.clip])
        text = _common.load_text(FLAGS.text)
        out = _common.make_dir(FLAGS.out)
        if FLAGS.cpu_devices % FLAGS.processes:
            raise ValueError(
                f"--cpu_devices={FLAGS.cpu_devices} cannot be shared out evenly among "
                f"--processes={FLAGS.processes}."
            )
        if FLAGS.processes > 1 and not FLAGS.coordinator:
            command = [sys.executable, "-m", "examples.transformer_fsdp", *sys.argv[1:]]
            sys.exit(_processes.start(command, FLAGS.processes))
        _processes.set_up(
            FLAGS.cpu_devices // FLAGS.processes,
            FLAGS.processes,
            FLAGS.process_id,
            FLAGS.coordinator,
        )
        row = train(
            settings,
            text,
            out,
            **pick(options),
            reset_clip_state=FLAGS.reset_clip_state,
        )
    except ValueError as error:
        raise SystemExit(f"transformer_fsdp: {error}") from None
    if row and jax.process_index() == 0:
        print("\n" + _common.format_table([row]))
        print("\nbits/byte: on held-out text. clip rate: mean over groups.")
        print(f"Wrote {out / 'metrics.jsonl'}, {out / 'tensorboard'} and checkpoints.")


if __name__ == "__main__":
    app.run(main)
