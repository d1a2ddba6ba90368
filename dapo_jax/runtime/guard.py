"""Signals and the watchdog of a run.

A run calls `Guard.reach(place)` wherever it may be stopped: after a segment of decoding, an update,
a set of verdicts. There a signal that any process has received stops all of them by raising
Stopped, and the watchdog notes progress. Without progress for too long it prints every thread's
stack and ends the process, since a host that hangs leaves the others waiting in a collective.
Before the first place a signal ends the process at once (`signals_end`).
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dapo_jax.runtime import multihost
from dapo_jax.types import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2  # the file descriptor: sys.stderr may be replaced
_POLL_S = 0.2  # between checks for a signal while the run waits
_GRACE_S = 10.0  # beyond the time-out, if the interpreter itself hangs and cannot print a message
_UNWIND_S = 3.0  # from a signal that ends the process to its end


class Interrupted(KeyboardInterrupt):
    """A signal came while nothing could be saved. Not an Exception: error handlers ignore it."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """SIGTERM or SIGINT raises Interrupted in the main thread, until a Guard takes over.

    That thread may be in C++ code that returns late, or in a library that swallows the exception:
    the process then ends after `_UNWIND_S`.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets no handlers there
        yield
        return
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        raise Interrupted(number)

    def watch() -> None:
        with contextlib.suppress(OSError):  # closed: the verb has ended
            while number := awake.recv(1):
                if signal.getsignal(number[0]) is interrupt and not ended.wait(_UNWIND_S):
                    name = signal.Signals(number[0]).name
                    os.write(_STDERR, f"dapo_jax: interrupted by {name}\n".encode())
                    os._exit(128 + number[0])

    ended = threading.Event()
    awake, wake = socket.socketpair()
    wake.setblocking(False)
    with awake, wake:
        before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
        descriptor = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=watch, name="signals", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)


class Guard:
    """Context manager around a run, for the main thread of every process.

    stall_timeout_s: seconds without progress after which the process ends with status 1, or None.
    Both begin at the first `reach`.
    """

    def __init__(self, stall_timeout_s: float | None):
        self.doing = "start"  # for the watchdog's message
        self.asked = 0  # the signal that this process has received
        self._timeout, self._place = stall_timeout_s, ""
        self._reached: float | None = None
        self._done = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Guard":
        if self._timeout is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reach(self, place: str) -> None:
        """The run may be stopped here. Raises Stopped, on every process, if one got a signal."""
        self._note(place)
        if asked := _most(self.asked):
            raise Stopped(asked)

    def wait(self, done: Callable[[float], bool], place: str) -> None:
        """Waits until `done(seconds)` returns True or a signal arrives; then `reach`."""
        while not self.asked and not done(_POLL_S):
            pass
        self.reach(place)

    def _note(self, place: str) -> None:
        """Notes progress; at the first place, takes the signals over."""
        if self._reached is None and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
            self._wakeup = signal.set_wakeup_fd(-1)  # hides them from the thread of `signals_end`
        self._place, self._reached = place, time.monotonic()
        if self._timeout is not None:
            faulthandler.dump_traceback_later(self._timeout + _GRACE_S, exit=True, file=_STDERR)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The first signal stops the run at its next place; the second ends the process."""
        name = signal.Signals(number).name
        if self.asked:
            os.write(_STDERR, f"\ndapo_jax: {name} again: exiting without saving\n".encode())
            os._exit(128 + number)
        self.asked = number
        what = "saving a checkpoint after this segment or update, then exiting"
        more = "signal again to exit immediately"
        os.write(_STDERR, f"\ndapo_jax: {name}: {what}; {more}\n".encode())

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._done.wait(min(1.0, self._timeout / 4)):
            if self._reached is not None and time.monotonic() - self._reached > self._timeout:
                print(
                    f"dapo_jax: {multihost.who()}: no progress for {self._timeout:g} s in "
                    f"{self.doing} after {self._place} (train.stall_timeout_s): another process "
                    "has died, or a device hangs. Stacks follow; the same command resumes from "
                    "the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                os._exit(1)


def _most(asked: int) -> int:
    """The highest signal number that any process has received."""
    if jax.process_count() == 1:
        return asked
    return int(multihost_utils.process_allgather(np.int32(asked)).max())
