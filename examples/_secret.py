"""A secret that keys of noise and of batches follow from."""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Secret:
    """What all keys follow from; nothing prints it.

    Every run has keys of its own, by all that it is, for two runs with the same noise
    give it away. A guess at private text cannot be tested by a `mark` without it.
    """

    def __init__(self, path: pathlib.Path):
        """Reads a file, or draws one that only its owner can read."""
        try:
            with contextlib.suppress(FileExistsError):
                new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(new, "w") as file:
                    file.write(secrets.token_hex(32))
            content = path.read_bytes().strip()
        except OSError as error:
            raise ValueError(f"cannot read {str(path)!r}: {error.strerror}.") from None
        if not content:
            raise ValueError(f"{str(path)!r} is empty, and should hold a secret.")
        self._derive = lambda *of: hmac.digest(
            content, json.dumps(of, sort_keys=True).encode(), "sha256"
        )

    def key(self, about: Any) -> jax.Array:
        """Of a run's noise."""
        words = np.frombuffer(self._derive("noise", about)[:8], np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")

    def rng(self, about: Any) -> np.random.Generator:
        """Of a run's batches."""
        number = int.from_bytes(self._derive("batches", about))
        return np.random.default_rng(number)

    def mark(self, content: bytes) -> str:
        """By which content, and this secret, are known again."""
        return self._derive("mark", hashlib.sha256(content).hexdigest()).hex()[:16]
