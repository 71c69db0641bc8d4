"""Examples as their commands run them, also killed, and what they leave behind."""

import json
import pathlib
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import xla

from clipfx.calibrate.reading import read_run
from examples import _run


def launch(example, given):
    """As the command does, in this process; returns the lines of `metrics.jsonl`."""
    text = lambda x: ",".join(map(str, x)) if isinstance(x, tuple | list) else x
    given = {name: text(x) for name, x in given.items() if x is not None}
    arguments = [f"--{name}={x}" for name, x in given.items()]
    _run.launch(example.run, example.Settings, arguments)
    lines = (pathlib.Path(given["out"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def without_norms(folder, runs=1):
    """Lines of `metrics.jsonl` without a norm; calibrate reads the others, by run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    seen = [read_run(folder, number=k + 1).norms["norm"] for k in range(runs)]
    norms = [row["norm"] for row in rows if "norm" in row]
    assert norms and [len(x) for x in seen] == [len(norms) // runs] * runs
    np.testing.assert_array_equal(np.concatenate(seen), norms)
    return [row for row in rows if "norm" not in row]


def environment(cache):
    """Own devices; what one run compiled the next one finds."""
    return {
        **xla.own_devices(),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def numbers_of(checkpoints, step):
    """All arrays of a checkpoint by name, as they lie on disk."""
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for path in sorted((checkpoints.absolute() / str(step)).iterdir()):
            if not (path / "d").exists():
                continue
            about = checkpointer.metadata(path).item_metadata
            like = {name: np.zeros(x.shape, x.dtype) for name, x in about.items()}
            tree = checkpointer.restore(path, like)
            found |= {f"{path.name}/{name}": x for name, x in tree.items()}
    return found


def assert_same_numbers(got, want):
    """Bit for bit."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def kill_when(condition, process):
    """SIGKILL as soon as a condition holds, which it does before the run ends."""
    until = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
