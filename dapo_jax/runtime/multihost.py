"""Several processes that decide alike: every host runs the same Python on the same numbers."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize() -> None:
    """Joins the other processes of a TPU pod. Nothing to do on one host.

    A pod slice names its workers in the environment; a single TPU VM, a GPU or a laptop names none or one.
    """
    workers = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(workers) > 1 and not jax.distributed.is_initialized():
        jax.distributed.initialize()


def is_main() -> bool:
    """True on the process that writes logs."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Device arrays as numpy, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda a: np.asarray(multihost_utils.process_allgather(a, tiled=True)), tree)
