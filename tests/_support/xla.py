"""How XLA compiles the tests, for eight devices and quickly, and what came of it.

Most of the time goes into making loops fast that run once. What a program consists of
does not depend on it, and numbers only in their last bits; `.ci/run` tests these again
as users compile them, with `XLA_FLAGS=--xla_backend_optimization_level=3`.
"""

import os
import re
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count=8"
_LEVEL = "--xla_backend_optimization_level"
_QUICK = (
    f"{_LEVEL}=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def _are_known(*flags: str) -> bool:
    """XLA ends a process that has a flag of another version."""
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(command, env=env, capture_output=True).returncode


def configure() -> None:
    """Sets `XLA_FLAGS`, for this process and those that it starts."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not any(flag.startswith(_LEVEL) for flag in flags):
        flags += _QUICK if _are_known(*_QUICK) else filter(_are_known, _QUICK)
    if DEVICES not in flags:
        flags.append(DEVICES)
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # A device waits in one collective while others wait for it in another that does not
    # depend on it: XLA:CPU keeps no order of them, and would wait for ever where there
    # are no more threads than devices.
    os.environ.setdefault("NPROC", "32")


def own_devices() -> dict[str, str]:
    """The environment of a process that asks for devices itself."""
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(DEVICES, "")}


def number_of(collective: str, text: str) -> int:
    """Collectives in a compiled program, but for those in `out_of_range` loops.

    By the loop that they are in, not by where they come from: XLA moves some out of it.
    """
    loops = re.findall(r" while\(.*/out_of_range/.*", text)
    aside = {
        x for loop in loops for x in re.findall(r"(?:body|condition)=%?([\w.-]+)", loop)
    }
    number, computation = 0, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*{$", line):
            computation = head[1]
        elif re.search(rf" {collective}(?:-start)?\(", line):
            number += computation not in aside
    return number
