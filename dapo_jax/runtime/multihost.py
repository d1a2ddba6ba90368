"""Multi-process jobs: every process runs the same code on the same numbers.

Each process does its share of the verification; the results are gathered, so that every decision
follows from the same numbers everywhere.
"""

import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dapo_jax.runtime.files import reason
from dapo_jax.types import InputError, RunError, Verdict

_T = TypeVar("_T")

# Packages that decide what a run samples, judges or computes, dependencies and options included.
DECIDING_PACKAGES = tuple(
    """
    jax jaxlib libtpu flax optax orbax-checkpoint tensorstore ml_dtypes numpy scipy
    transformers tokenizers sentencepiece safetensors regex jinja2 PyYAML pydantic
    math-verify latex2sympy2_extended antlr4-python3-runtime sympy mpmath
    pyarrow tensorflow-datasets array_record
    """.split()
)

_HEARTBEAT_S = 10  # after a process has died until the others notice; jax's default is 100
_POD_HEARTBEAT_S = 60  # the same on TPU VMs, which a live migration or maintenance can pause
_WAIT_S = 20.0  # until a process that waits for the others prints a hint
_LAST_WORDS_S = 2.0  # for the others' messages: they end with the first process
_ALL_HOSTS = "the same command must run on every host (tpu_scripts/run starts it on all)"
_FREE_IT = "end it (tpu_scripts/stop does, on every host), then start again"


def initialize() -> None:
    """Joins the other processes of the job; to be called before anything else touches a device.

    On a TPU VM the pod's metadata name the processes. Elsewhere JAX_COORDINATOR_ADDRESS (host:port
    of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do; without them the job is one process.
    Raises InputError if the variables are wrong, and RunError if another process has the chips.
    """
    if jax.distributed.is_initialized():
        return
    hint = f"waiting for the other processes; {_ALL_HOSTS}"
    timer = threading.Timer(_WAIT_S, lambda: print(hint, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        _join()
        found = jax.devices()[0].platform
    except RuntimeError as e:
        if "already in use" not in str(e) and "libtpu_lockfile" not in str(e):
            raise
        busy = f"the TPU is in use by another process of this host ({reason(e)}); {_FREE_IT}"
        raise RunError(busy) from None
    finally:
        timer.cancel()
    if on_tpu_vm() and found != "tpu":  # jax falls back to the CPU without a message
        busy = (
            f"this host has TPU chips, but jax uses {found}: another process has them; {_FREE_IT}"
        )
        raise RunError(busy)


def _join() -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from `guard`
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        if on_tpu_vm():
            jax.distributed.initialize(heartbeat_timeout_seconds=_POD_HEARTBEAT_S)
        return
    # jax would hang on a bad address, and may crash in its C++ on a port that is in use.
    found = re.fullmatch(r"(?:[^:]+|\[[^]]+\]):(\d{1,5})", address)
    port = int(found[1]) if found else 0
    if not 0 < port < 2**16:
        raise InputError(
            f"JAX_COORDINATOR_ADDRESS: is {address!r}; expected HOST:PORT of process 0, such as "
            "10.0.0.2:8476"
        )
    count, index = map(_environment_number, ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    if index >= count:
        counts = f"is {index} of JAX_NUM_PROCESSES {count}; it counts from 0"
        raise InputError(f"JAX_PROCESS_ID: {counts}")
    if index == 0:
        try:
            socket.create_server(("", port)).close()
        except OSError as e:
            why = f"the port of {address} ({os.strerror(e.errno or 0)}); give a free one"
            raise InputError(f"JAX_COORDINATOR_ADDRESS: process 0 cannot listen on {why}") from None
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_HEARTBEAT_S)


def _environment_number(name: str) -> int:
    text = os.environ.get(name, "")
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        fix = ", but JAX_COORDINATOR_ADDRESS is set; give a whole number, or unset both"
        raise InputError(f"{name}: is {text!r}{fix}")
    return int(text)


def on_tpu_vm() -> bool:
    """Whether TPU chips are attached and jax is to use them. Opens no chip."""
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    attached = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(attached) and importlib.util.find_spec("libtpu") is not None


def is_distributed() -> bool:
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes logs."""
    return jax.process_index() == 0


def who() -> str:
    """This process, as text for messages."""
    try:
        return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    except (RuntimeError, AssertionError):  # before jax has a device
        return socket.gethostname()


def leave(status: int) -> typing.NoReturn:
    """Ends this process at once: a normal exit waits for the others, which may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError, AssertionError):  # where jax has no device
        if is_main():
            time.sleep(_LAST_WORDS_S)
    os._exit(status)


def software() -> dict[str, str | None]:
    """Must be equal on all processes: package versions, and a digest of this process's code."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    versions = {name: version(name) for name in DECIDING_PACKAGES}
    return {"python": platform.python_version(), "code": code.hexdigest()[:16], **versions}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def disagreement(facts: Mapping[str, Any]) -> str | None:
    """The first of the facts (JSON-able) that differs between the processes, in words, or None."""
    if jax.process_count() == 1:
        return None
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return None
    first, *others = map(json.loads, gather_texts(json.dumps(facts, default=str)))
    return next(
        f"{key} is {other.get(key)!r} on process {index}, {first.get(key)!r} on process 0"
        for index, other in enumerate(others, start=1)
        for key in first | other
        if first.get(key) != other.get(key)
    )


def check_alike(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises InputError, on every process, unless all have the same facts (see `disagreement`)."""
    if jax.process_count() > 1 and (differs := disagreement(facts())):
        same = "; start every process with the same command, code, packages, model and data"
        raise InputError(differs + same)


def sync(name: str) -> None:
    """A barrier: waits until every process reaches it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Device arrays as numpy, whole, on every process."""

    def local(a: Any) -> Any:
        if not isinstance(a, jax.Array) or a.is_fully_addressable:
            return a
        if a.is_fully_replicated:
            return a.addressable_data(0)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.device_get(jax.tree.map(local, tree))


def from_main(text: str) -> str:
    return text if jax.process_count() == 1 else gather_texts(text)[0]


def on_all(function: Callable[[], _T]) -> _T:
    """`function()`. The InputError of the first process that raises one, all raise."""
    try:
        value, wrong = function(), ""
    except InputError as e:
        value, wrong = None, str(e)
    texts = [wrong] if jax.process_count() == 1 else gather_texts(wrong)
    if found := next(filter(None, texts), None):
        raise InputError(found)
    return typing.cast(_T, value)


def gather_texts(text: str) -> list[str]:
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def share(items: Sequence[_T], before: int = 0) -> Sequence[_T]:
    """This process's share: every process_count-th item; `before` items were shared earlier."""
    return items[(jax.process_index() - before) % jax.process_count() :: jax.process_count()]


def gather_shares(own: Sequence[_T], total: int, before: int = 0) -> list[_T]:
    """Results (JSON-able) on `total` items, in their order, from each process's on its `share`."""
    count = jax.process_count()
    if count == 1:
        return list(own)
    rows = [iter(json.loads(text)) for text in gather_texts(json.dumps(own))]
    return [next(rows[(before + n) % count]) for n in range(total)]


def gather_verdicts(own: Sequence[Verdict], total: int, before: int = 0) -> list[Verdict]:
    """The verdicts on `total` items, in their order, from each process's on its `share`."""
    return [Verdict(*verdict) for verdict in gather_shares(own, total, before)]
