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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_jax.types import InputError, one_line

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
    """A sandboxed process that answers one order at a time; a context manager that kills it. Not
    thread-safe, except `interrupt`.

    work: "module:function" of a function that takes `setup` as its arguments and returns one from
    an order to its result. Orders and results are JSON-able (a decimal becomes text). deadline_s:
    for one result. memory_bytes: address space beyond what it has after `start`. Raises OSError if
    no process can be started.
    """

    def __init__(
        self,
        work: str,
        setup: Sequence[Any] = (),
        *,
        deadline_s: float,
        memory_bytes: int,
        environment: Mapping[str, str] | None = None,
        max_line_bytes: int = _MAX_LINE_BYTES,
    ):
        self._setup, self._deadline_s, self._max_line_bytes = setup, deadline_s, max_line_bytes
        self._patience_s = START_S  # deadline_s once it has started
        self._mark = secrets.token_hex(8)
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

    def start(self) -> None:
        """Waits until `work` has returned its function; raises as `call` does."""
        self.call(self._setup)
        self._patience_s = self._deadline_s

    def call(self, order: Any) -> Any:
        """The result of an order. Raises InputError if `work` does, else ConfinedError."""
        self.send(order)
        return self.receive()

    def send(self, order: Any) -> None:
        """Sends an order, whose result `receive` returns; raises as `call` does."""
        with self._failures():
            self._channel.settimeout(self._patience_s)
            # ASCII, so that lone surrogates survive too
            self._channel.sendall(json.dumps(order).encode() + b"\n")

    def receive(self) -> Any:
        """Waits for the result of the order that was sent."""
        line, deadline = bytearray(), time.monotonic() + self._patience_s
        with self._failures():
            while not line.endswith(b"\n") and len(line) <= self._max_line_bytes:
                self._channel.settimeout(max(0.001, deadline - time.monotonic()))
                if not (data := self._channel.recv(1 << 18)):
                    raise ConnectionResetError
                line += data
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
            case "failed":
                raise ConfinedError(one_line(value))
        raise ConfinedError("worker sent malformed data")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ConfinedError(f"timed out after {self._patience_s:g} s") from None
        except OSError:
            raise self._ended() from None

    def is_quiet(self) -> bool:
        """Whether the process lives and has sent nothing that no order asked for."""
        try:
            self._channel.settimeout(0)
            self._channel.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def interrupt(self) -> None:
        """Makes a `call` of another thread raise at once."""
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
    module, _, name = work.partition(":")
    process, limit, answer = os.getpid(), START_S, None

    def send(kind: str, value: Any = None) -> None:
        if os.getpid() != process:  # a forked child must not answer
            os._exit(0)
        channel.sendall(json.dumps([kind, value], default=_plain).encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)  # no deadline while the caller works

    try:
        for line in channel.makefile("rb"):
            # In case the caller no longer enforces the deadline.
            signal.setitimer(signal.ITIMER_REAL, limit + _ALARM_S)
            if answer is not None:
                send("result", answer(json.loads(line)))
                continue
            answer = getattr(importlib.import_module(module), name)(*json.loads(line))
            _limit_memory(memory_bytes)
            limit = deadline_s
            send("result")
    except InputError as e:
        send("refused", str(e))
    except MemoryError:
        send("memory")
    except Exception as e:
        send("failed", one_line(e))


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
