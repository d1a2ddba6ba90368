"""Several processes that decide alike: every process runs the same Python on the same numbers.

Work that may be shared (judging answers) is: each process does its own part, and the results are gathered, so that what
follows from them is decided on the same numbers everywhere.
"""

import glob
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dapo_jax.types import InputError, Verdict

_T = TypeVar("_T")

_HEARTBEAT_S = 10  # the others notice so many seconds after a process has died; jax waits 100
_ERROR_BYTES = 160  # of an error's text that travels


def initialize() -> None:
    """Joins the other processes of the job, before anything else touches a device. Nothing to do for a job of one.

    On a TPU VM the pod's metadata tell who the others are. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Raises InputError if these are incomplete.
    """
    if jax.distributed.is_initialized():
        return
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = (_environment_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        if not index < count:
            raise InputError(f"JAX_PROCESS_ID: is {index} of JAX_NUM_PROCESSES {count}; it counts from 0")
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_HEARTBEAT_S)
    elif on_tpu_vm():
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_S)


def on_tpu_vm() -> bool:
    """True where TPU chips are attached and jax is to use them. Opens no chip."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    attached = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(attached) and importlib.util.find_spec("libtpu") is not None


def _environment_number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise InputError(f"{name}: is {text!r}, but JAX_COORDINATOR_ADDRESS is set; give a whole number, or unset both")
    return int(text)


def is_main() -> bool:
    """True on the process that writes logs."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Device arrays as numpy, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda a: np.asarray(multihost_utils.process_allgather(a, tiled=True)), tree)


def share(items: Sequence[_T]) -> Sequence[_T]:
    """This process's part of the work: every process_count-th item."""
    return items[jax.process_index() :: jax.process_count()]


def gather_verdicts(own: Sequence[Verdict], total: int) -> list[Verdict]:
    """The verdicts of all processes on `total` items, in the items' order, from each process's verdicts on its `share`."""
    count = jax.process_count()
    if count == 1:
        return list(own)
    size = -(-total // count)  # arrays of one shape on every process
    correct, score, error = np.zeros(size, np.bool_), np.zeros(size, np.float32), np.zeros((size, _ERROR_BYTES), np.uint8)
    for i, verdict in enumerate(own):
        correct[i], score[i] = verdict.correct, verdict.score
        if verdict.error is not None:
            text = (verdict.error or " ").encode(errors="replace")[:_ERROR_BYTES]
            error[i, : len(text)] = np.frombuffer(text, np.uint8)
    gathered = multihost_utils.process_allgather((correct, score, error))
    verdicts = []
    for i in range(total):
        one_correct, one_score, text = (a[i % count, i // count] for a in gathered)
        said = np.asarray(text).tobytes().rstrip(b"\0").decode(errors="replace")
        verdicts.append(Verdict(bool(one_correct), float(one_score), said or None))
    return verdicts
