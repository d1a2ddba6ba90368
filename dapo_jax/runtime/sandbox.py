"""One bounded, killable process for work on untrusted input: tables, chat templates, model output.

Endless loops, crashes, gigabytes of memory and forked children stay in the process: a fresh
interpreter with a memory limit, a deadline for each result and a few harmless variables of the
environment. Both directions carry lines of JSON; nothing is unpickled. It dies with its caller.
"""

import contextlib
import ctypes
import decimal
import importlib
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dapo_jax.types import InputError

START_S = 120.0  # for the process to import what it needs
_ALARM_S = 2.0  # beyond the deadline, when a process ends itself
_MAX_LINE_BYTES = 1 << 28  # of one result
_MARK = "DAPO_JAX_SANDBOX"  # environment variable: which sandbox a process comes from
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_BOOT = """
import json, sys
channel, sys.path[:], *limits = json.loads(sys.argv[1])
from dapo_jax.runtime.sandbox import serve
serve(channel, *limits)
"""
# What the process keeps of the caller's environment; the rest may hold secrets.
_ENVIRONMENT = """
    PATH HOME LANG LC_ALL LC_CTYPE LD_LIBRARY_PATH PYTHONHOME PYTHONPATH TMPDIR TZ VIRTUAL_ENV
""".split()
# BLAS threads count against the memory limit; results must not depend on the order of a set.
_SETTINGS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_SETTINGS["PYTHONHASHSEED"] = "0"


class ConfinedError(Exception):
    """Why the process gave no result, as part of a message."""


class OverMemoryError(ConfinedError):
    """A result needed more memory than the limit."""


class Process(contextlib.AbstractContextManager):
    """A sandboxed process; a context manager that kills it. Not thread-safe, except `interrupt`.

    work: "module:function" of a generator function of an iterator of orders. Its first yield means
      that it is ready, the others are JSON-able results (a decimal becomes text).
    deadline_s: for one result. memory_bytes: address space beyond what it has when it is ready.

    Raises OSError if no process can be started.
    """

    def __init__(
        self,
        work: str,
        *,
        deadline_s: float,
        memory_bytes: int,
        environment: Mapping[str, str] | None = None,
        max_line_bytes: int = _MAX_LINE_BYTES,
    ):
        self._deadline_s, self._max_line_bytes = deadline_s, max_line_bytes
        self._patience_s = START_S  # deadline_s once it is ready
        self._mark = secrets.token_hex(8)
        self._inbox = bytearray()
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        path = [os.path.abspath(entry) for entry in sys.path]
        self._channel, theirs = socket.socketpair()
        with theirs:
            order = [theirs.fileno(), path, work, deadline_s, memory_bytes]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, json.dumps(order)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**kept, **(environment or {}), **_SETTINGS, _MARK: self._mark},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # no Ctrl-C, and a process group to kill
            )

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def send(self, order: Any) -> None:
        """Sends a JSON-able order. Raises ConfinedError if the process does not take it."""
        self._channel.settimeout(self._patience_s)
        try:  # ASCII, so that lone surrogates survive too
            self._channel.sendall(json.dumps(order).encode() + b"\n")
        except TimeoutError:
            raise ConfinedError(f"timed out after {self._patience_s:g} s") from None
        except OSError:
            raise self._ended() from None

    def wait_ready(self) -> None:
        """Waits until the process has imported what it needs; raises as `receive` does."""
        self.receive()
        self._patience_s = self._deadline_s

    def receive(self) -> Any:
        """Waits for the next result.

        Raises InputError if `work` does, EOFError if it is done, else ConfinedError; kill it then.
        """
        line = self._line()
        try:
            kind, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            kind = "malformed"
        match kind:
            case "result":
                return value
            case "refused":
                raise InputError(" ".join(str(value).split()))
            case "memory":
                raise OverMemoryError("out of memory")
            case "done":
                raise EOFError("worker is done")
        raise ConfinedError("worker sent malformed data")

    def _line(self) -> bytes:
        deadline, searched = time.monotonic() + self._patience_s, 0
        while (end := self._inbox.find(b"\n", searched)) < 0:
            if (searched := len(self._inbox)) > self._max_line_bytes:
                raise ConfinedError("worker sent malformed data")
            self._channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._channel.recv(1 << 18)
            except TimeoutError:
                raise ConfinedError(f"timed out after {self._patience_s:g} s") from None
            except OSError:
                data = b""
            if not data:
                raise self._ended()
            self._inbox += data
        line = bytes(self._inbox[:end])
        del self._inbox[: end + 1]
        return line

    def is_quiet(self) -> bool:
        """Whether the process lives and has sent nothing that was not received."""
        try:
            self._channel.settimeout(0)
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._inbox
        except OSError:
            pass
        return False

    def interrupt(self) -> None:
        """Makes a `send` or `receive` of another thread raise at once."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def kill(self) -> int | None:
        """Kills it and all that it started; its exit status, negative for a signal."""
        self._channel.close()
        if self._process.returncode is None:  # not reaped, so the group is still its own
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        _kill_marked(self._mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        return self._process.returncode

    def _ended(self) -> ConfinedError:
        status = self.kill()
        if status == -signal.SIGALRM:  # its own alarm: this process was stopped meanwhile
            return ConfinedError(f"timed out after {self._deadline_s:g} s")
        if status is None or status >= 0:
            return ConfinedError(f"worker exited with status {status}")
        names = {number.value: number.name for number in signal.Signals}
        return ConfinedError(f"worker killed by {names.get(-status, f'signal {-status}')}")


def _kill_marked(mark: str) -> None:
    """Kills processes that left the process group: their environment still has the mark (/proc)."""
    entry = f"{_MARK}={mark}\0".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if entry in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


def results(
    work: str, orders: Iterable[Any], *, deadline_s: float, memory_bytes: int
) -> Iterator[Any]:
    """The results of `work` on a few orders, which are all sent first (see `Process`).

    Raises InputError if `work` does, and ConfinedError if the process fails.
    """
    with Process(work, deadline_s=deadline_s, memory_bytes=memory_bytes) as process:
        process.wait_ready()
        for order in orders:
            process.send(order)
        with contextlib.suppress(EOFError):
            while True:
                yield process.receive()


# ------------------------------------------------------------------------------ inside the process


def serve(descriptor: int, work: str, deadline_s: float, memory_bytes: int) -> None:
    """Runs `work` to the end of the process, which closes the socket."""
    channel, status = socket.socket(fileno=descriptor), 1
    try:
        _serve(channel, work, deadline_s, memory_bytes)
        status = 0
    except SystemExit as e:  # a custom function may call sys.exit
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        os._exit(status & 0xFF)


def _serve(channel: socket.socket, work: str, deadline_s: float, memory_bytes: int) -> None:
    # Only the caller ends it, also where a scheduler signals every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # dispositions and mask are inherited
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":  # the kernel kills it when its caller dies
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel.set_inheritable(False)
    process, limit = os.getpid(), START_S

    def alarm(seconds: float) -> None:  # in case the caller no longer enforces the deadline
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def orders() -> Iterator[Any]:
        with channel.makefile("rb") as lines:
            while True:
                alarm(0)
                if not (line := lines.readline()):
                    return
                alarm(limit + _ALARM_S)
                yield json.loads(line)

    def send(kind: str, value: Any = None) -> None:
        if os.getpid() != process:  # a forked child must not answer
            os._exit(0)
        alarm(0)  # no deadline while the caller works
        channel.sendall(json.dumps([kind, value], default=_plain).encode() + b"\n")

    try:
        module, _, name = work.partition(":")
        for n, result in enumerate(getattr(importlib.import_module(module), name)(orders())):
            if n == 0:
                _limit_memory(memory_bytes)
                limit = deadline_s
            send("result", result)
            alarm(limit + _ALARM_S)
        send("done")
    except InputError as e:
        send("refused", str(e))
    except MemoryError:
        send("memory")


def _plain(value: Any) -> Any:
    """A decimal as text, without trailing zeros; {} for what else JSON does not have."""
    if not isinstance(value, decimal.Decimal) or not value.is_finite():
        return {}
    if not -100 < int(value.as_tuple().exponent) < 100:
        return {}
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _limit_memory(extra_bytes: int) -> None:
    """Limits the address space to its present size and `extra_bytes`; needs /proc."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
