"""Two processes of four devices give what one process gives on eight."""

import pathlib
import socket
import subprocess
import sys

import numpy as np
import processes
import pytest
import xla

pytestmark = pytest.mark.full
NAMES = [f"{clip}/{way}" for clip in processes.CLIPS for way in ("jit", "shard_map")]
NAMES += ["clip_fair_groups", "clipped_grad"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the two processes hold, each under a name of its own."""
    out, port = tmp_path_factory.mktemp("processes"), str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, processes.__file__, port, str(number), str(out)],
            env=xla.own_devices(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for worker, text in zip(workers, said, strict=True):
        assert worker.returncode == 0, text[-3000:]
    return pathlib.Path(out)


@pytest.fixture(scope="module")
def one():
    return dict(processes.results(processes.mesh_of()))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(one, two, name):
    want, seen = processes.shards(one[name]), set()
    for number in range(2):
        with np.load(two / f"{number}_{name.replace('/', '_')}.npz") as held:
            assert not seen & set(held)  # each holds only its shards
            assert 2 * len(held) == len(want)
            for key, x in held.items():
                if x.dtype.kind == "f":
                    np.testing.assert_allclose(x, want[key], rtol=1e-6, atol=1e-7)
                else:
                    np.testing.assert_array_equal(x, want[key])
            seen |= set(held)
    assert seen == set(want)
