"""Work on files that anyone may have written, in a process that can be stopped: with a memory
limit, and a deadline for each result.

Neither loops without end in native code, nor gigabytes of memory, nor crashes reach this process.
The other one is a fresh interpreter with an environment of a few harmless variables. Both ways go
lines of JSON. It ends with its caller, or soon after.
"""

import contextlib
import decimal
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dapo_jax.types import InputError

START_S = 120.0  # for the process to import what it needs
_NO_MEMORY = 3  # exit status
_ALARM_S = 2.0  # beyond the deadline, when a process whose caller is gone ends itself

_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "TZ",
)  # the rest may hold secrets
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dapo_jax.runtime.sandbox import serve; serve(*json.loads(sys.argv[2]))"


_END = object()


class ConfinedError(Exception):
    """Why the process gave no result; half a sentence."""


def results(
    work: str, orders: Iterable[Any], *, deadline_s: float, memory_bytes: int
) -> Iterator[Any]:
    """What `work` yields, in a process of its own.

    Args: work: "module:function" of a generator function. It is given an iterator of the orders.
      The first thing that it yields says that
        it has imported what it needs, and is dropped. Orders and results are JSON-able; what in a
        result is not becomes {}, a decimal text.
      deadline_s: for one result. memory_bytes: of address space, beyond what the process has by
      then.

    Raises InputError if `work` does, and ConfinedError if the process takes longer, or ends before
    `work` does.
    """
    with tempfile.TemporaryFile() as file:
        for order in orders:
            file.write(json.dumps(order).encode() + b"\n")
        file.seek(0)
        path = [os.path.abspath(entry) for entry in sys.path]
        with subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                _BOOT,
                json.dumps(path),
                json.dumps([work, deadline_s, memory_bytes]),
            ],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C is the caller's
        ) as process:
            try:
                lines = _lines(process, deadline_s)
                next(lines)  # it has started
                for result, refusal in map(json.loads, lines):
                    if refusal is not None:
                        raise InputError(refusal)
                    yield result
            finally:
                process.kill()


def _lines(process: subprocess.Popen, deadline_s: float) -> Iterator[bytes]:
    """The lines that the process writes until it ends, each within its time."""
    assert process.stdout is not None
    heard = select.poll()
    heard.register(process.stdout, select.POLLIN)
    limit, begun = START_S, b""
    while True:
        deadline, parts = time.monotonic() + limit, [begun]
        while b"\n" not in parts[-1]:
            if not heard.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise ConfinedError(f"no result within {limit:g} s")
            parts.append(os.read(process.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                if status := process.wait():
                    ended = (
                        "wanted too much memory"
                        if status == _NO_MEMORY
                        else f"ended with status {status}"
                    )
                    raise ConfinedError(f"its process {ended}")
                return
        *lines, begun = b"".join(parts).split(b"\n")
        limit = deadline_s
        yield from lines


def _plain(value: Any) -> Any:
    """A decimal as text, without zeros at its end; {} for what else JSON does not have."""
    if (
        not isinstance(value, decimal.Decimal)
        or not value.is_finite()
        or not -100 < int(value.as_tuple().exponent) < 100
    ):
        return {}
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def serve(work: str, deadline_s: float, memory_bytes: int) -> None:
    """The life of the process."""
    with open(os.dup(1), "wb") as out, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 1)  # whatever a library may print
        signal.signal(
            signal.SIGALRM, signal.SIG_DFL
        )  # the caller's disposition and mask are inherited
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        module, _, name = work.partition(":")
        worked = getattr(importlib.import_module(module), name)(map(json.loads, sys.stdin.buffer))
        result = next(worked)
        with contextlib.suppress(
            ValueError, OSError
        ):  # where there is no /proc, or a lower limit already
            limit = (
                int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                + memory_bytes
            )
            resource.setrlimit(
                resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1])
            )
        try:
            while True:
                out.write(json.dumps([result, None], default=_plain).encode() + b"\n")
                out.flush()
                signal.setitimer(
                    signal.ITIMER_REAL, deadline_s + _ALARM_S
                )  # the caller decides; this is for one that is gone
                if (result := next(worked, _END)) is _END:
                    return
                signal.setitimer(signal.ITIMER_REAL, 0)  # the caller may take its time
        except InputError as e:
            out.write(json.dumps([None, str(e)]).encode() + b"\n")
        except MemoryError:
            os._exit(_NO_MEMORY)
