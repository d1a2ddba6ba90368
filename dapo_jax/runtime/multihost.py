"""Several processes that decide alike: every process runs the same Python on the same numbers.

Work that may be shared (judging answers) is: each process does its own part, and the results are
gathered, so that what follows from them is decided on the same numbers everywhere.
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

# Those that decide what a run samples, judges or computes, also where they come with another
# package or are optional.
DECIDING_PACKAGES = (
    *(
        "jax",
        "jaxlib",
        "libtpu",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorstore",
        "ml_dtypes",
        "numpy",
        "scipy",
    ),
    *(
        "transformers",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "regex",
        "jinja2",
        "PyYAML",
        "pydantic",
    ),
    *("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy", "mpmath"),
    *("pyarrow", "tensorflow-datasets", "array_record"),
)

_HEARTBEAT_S = 10  # the others notice so many seconds after a process has died; jax waits 100
_WAIT_S = 20.0  # before a process that waits for the others says so
_ALL_HOSTS = (
    "the same command has to run on every host at a time (tpu_scripts/run starts it on all)"
)
_FREE_IT = "end it (tpu_scripts/stop does, on every host), then start again"
_LAST_WORDS_S = 2.0
# A verdict as it travels, an error's text cut.
_VERDICT = np.dtype(
    [("correct", np.bool_), ("score", np.float32), ("error", "S160"), ("answered", np.bool_)]
)


def initialize() -> None:
    """Joins the other processes of the job, before anything else touches a device.

    Nothing to do for a job of one.

    On a TPU VM the pod's metadata tell who the others are. Elsewhere JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Raises InputError if they are
    wrong, and RunError if another process has the chips. Says so if it has to wait; after five
    minutes jax ends a process that the others have not joined.
    """
    if jax.distributed.is_initialized():
        return
    hint = threading.Timer(
        _WAIT_S,
        print,
        [f"waiting for the other processes; {_ALL_HOSTS}"],
        {"file": sys.stderr, "flush": True},
    )
    hint.daemon = True
    hint.start()
    try:
        _join()
        found = jax.devices()[0].platform
    except RuntimeError as e:
        if "already in use" not in str(e) and "libtpu_lockfile" not in str(e):
            raise
        raise RunError(
            f"the TPU is in use by another process of this host ({reason(e)}); {_FREE_IT}"
        ) from None
    finally:
        hint.cancel()
    if on_tpu_vm() and found != "tpu":  # jax falls back to the CPU without a word
        raise RunError(
            f"this host has TPU chips, but jax came up with {found}: most often another process has them; {_FREE_IT}"
        )


def _join() -> None:
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it would take SIGTERM and tell nobody; `guard` heeds it
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        port = re.fullmatch(r"[^:]+:(\d{1,5})|\[[^]]+\]:(\d{1,5})", address)
        if (
            not port or not 0 < int(port[1] or port[2]) < 2**16
        ):  # jax would wait for ever, or end with a fault of its C++
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS: is {address!r}; expected HOST:PORT of process 0, such as 10.0.0.2:8476"
            )
        count, index = (
            _environment_number(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        if not index < count:
            raise InputError(
                f"JAX_PROCESS_ID: is {index} of JAX_NUM_PROCESSES {count}; it counts from 0"
            )
        if index == 0:
            try:  # on a port that is in use jax may crash in its C++
                socket.create_server(("", int(port[1] or port[2]))).close()
            except OSError as e:
                message = f"process 0 cannot listen on the port of {address} ({os.strerror(e.errno or 0)}); give a free one"
                raise InputError(f"JAX_COORDINATOR_ADDRESS: {message}") from None
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
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise InputError(
            f"{name}: is {text!r}, but JAX_COORDINATOR_ADDRESS is set; give a whole number, or unset both"
        )
    return int(text)


def is_distributed() -> bool:
    """True in a job of several processes, once it has been joined."""
    return jax.distributed.is_initialized()


def who() -> str:
    """This process, for a line of several processes' output."""
    try:
        return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    except (RuntimeError, AssertionError):  # jax knows only once it has a device
        return socket.gethostname()


def leave(status: int) -> typing.NoReturn:
    """Ends this process at once.

    One that ended in the usual way would wait for the others, who may be waiting for it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError, AssertionError):  # where jax has no device
        if is_main():  # the others end with the first process, and may have something to say before
            time.sleep(_LAST_WORDS_S)
    os._exit(status)


def is_main() -> bool:
    """True on the process that writes logs."""
    return jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Device arrays as numpy, whole, on every process."""

    def here(a: Any) -> Any:
        whole = not isinstance(a, jax.Array) or a.is_fully_addressable
        return (
            a
            if whole
            else a.addressable_data(0)
            if a.is_fully_replicated
            else multihost_utils.process_allgather(a, tiled=True)
        )

    return jax.device_get(jax.tree.map(here, tree))


def from_main(text: str) -> str:
    """The first process's text, on every process."""
    if jax.process_count() == 1:
        return text
    return gather_texts(text)[0]


def disagreement(facts: Mapping[str, Any]) -> str | None:
    """The first of the facts that differs between the processes, in words, or None. facts:
    JSON-able.
    """
    if jax.process_count() == 1:
        return None
    text = json.dumps(facts, sort_keys=True, default=str)
    digests = multihost_utils.process_allgather(
        np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    )
    if (digests == digests[0]).all():
        return None
    first, *others = (json.loads(said) for said in gather_texts(json.dumps(facts, default=str)))
    return next(
        f"{key} is {other.get(key)!r} on process {index}, {first.get(key)!r} on process 0"
        for index, other in enumerate(others, start=1)
        for key in first | other
        if first.get(key) != other.get(key)
    )


def check_alike(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises InputError, on every process, unless all find the same facts (as `disagreement` takes
    them). A single process finds none.
    """
    if jax.process_count() > 1 and (differs := disagreement(facts())):
        raise InputError(
            f"{differs}; start every process with the same command, code, packages, model and data"
        )


def software() -> dict[str, str | None]:
    """What has to be the same on every process: versions, None where a package is missing, and a
    digest of this package's own code.
    """
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    return {"python": platform.python_version(), "code": code.hexdigest()[:16]} | {
        name: version(name) for name in DECIDING_PACKAGES
    }


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gather_texts(text: str) -> list[str]:
    """Every process's text, by process."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(data)] = data
    return [
        row[:n].tobytes().decode()
        for row, n in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


def share(items: Sequence[_T], before: int = 0) -> Sequence[_T]:
    """This process's part of the work: every process_count-th item, of which there were so many
    before these.
    """
    return items[(jax.process_index() - before) % jax.process_count() :: jax.process_count()]


def gather_shares(own: np.ndarray, total: int, before: int = 0) -> np.ndarray:
    """Rows on `total` items from all processes, in the items' order, from each process's rows on
    its `share`.
    """
    count = jax.process_count()
    if count == 1:
        return own
    padded = np.zeros(
        (-(-total // count), *own.shape[1:]), own.dtype
    )  # arrays of one shape on every process
    padded[: len(own)] = own
    by_process = np.roll(
        multihost_utils.process_allgather(padded), -before, axis=0
    )  # that of the first item first
    return by_process.swapaxes(0, 1).reshape(-1, *own.shape[1:])[:total]


def gather_verdicts(own: Sequence[Verdict], total: int, before: int = 0) -> list[Verdict]:
    """The verdicts of all processes on `total` items, in the items' order, from each process's
    verdicts on its `share`.
    """
    if jax.process_count() == 1:
        return list(own)
    rows = [
        (
            v.correct,
            v.score,
            b"" if v.error is None else (v.error or " ").encode(errors="replace"),
            v.answered,
        )
        for v in own
    ]
    packed = np.array(rows, _VERDICT).view(np.uint8).reshape(len(rows), _VERDICT.itemsize)
    gathered: list[Any] = gather_shares(packed, total, before).reshape(-1).view(_VERDICT).tolist()
    return [
        Verdict(correct, score, error.decode(errors="replace") or None, answered)
        for correct, score, error, answered in gathered
    ]
