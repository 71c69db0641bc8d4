"""One program in many processes: on this machine, or as a part of a cluster."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import jax

WITH_PARENT = "CLIPFX_END_WITH_PARENT"


def set_up(cpu_devices: int, processes: int, process_id: int, coordinator: str) -> None:
    """Joins the other processes, before anything else is asked of JAX.

    Args:
      cpu_devices: Of this process, if it has nothing better than a CPU.
      processes: How many there are.
      process_id: Which of them this is; the cluster knows.
      coordinator: Where the first of them listens, `host:port`; `"cluster"` asks the
        TPU pod, Slurm or Kubernetes that this runs on; empty for a single process.

    Raises:
      ValueError: If there is no such cluster.
    """
    if WITH_PARENT in os.environ:
        _end_with_parent()
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if cpu_devices > 1:
        # XLA:CPU keeps no order of collectives that do not depend on each other: with
        # no more threads than devices, two may wait for each other in different ones.
        threads = max(4 * cpu_devices, os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(threads))
    if not coordinator:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _keep_stdout()
    if coordinator != "cluster":
        jax.distributed.initialize(coordinator, processes, process_id)
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"there is no cluster that JAX can find: {error} Name it by --coordinator, "
            "--processes and --process_id."
        ) from None


def start(command: Sequence[str], processes: int) -> int:
    """Runs a command in several processes on this machine's CPU.

    The first that fails ends all. Each is given `--coordinator` and `--process_id`, and
    ends when this process does, however that ended. Returns the exit status.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [*command, f"--coordinator={coordinator}", f"--process_id={number}"],
            stdin=subprocess.PIPE,
            env={**os.environ, WITH_PARENT: "1", "JAX_PLATFORMS": "cpu"},
        )
        for number in range(processes)
    ]
    try:
        while True:
            ended = [worker.poll() for worker in workers]
            failed = [status for status in ended if status]
            if failed or None not in ended:
                break
            time.sleep(0.05)
        # What is wrong with one may be wrong with all: let them say so.
        with contextlib.suppress(subprocess.TimeoutExpired):
            for worker in workers:
                worker.wait(timeout=3)
        return failed[0] if failed else 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _keep_stdout() -> None:
    """For Python alone: Gloo writes there whom it is connected to."""
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)


def _end_with_parent() -> None:
    """Ends this process as soon as the one that holds its standard input is gone."""

    def wait() -> None:
        os.read(0, 1)  # nothing ever comes but the end
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
