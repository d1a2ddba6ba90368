"""Between two pieces of work: has somebody asked to stop, and does the run still move?

`Guard.reach(place)` stands wherever a run may be left: after a segment of decoding, an update, a
set of verdicts. There

* a signal that any process has received stops all of them, at the same place, by raising Stopped;
* the watchdog hears that the run moves. If it hears nothing for too long, it prints every thread's
  stack and ends the process, for a host that sleeps or is gone leaves the others waiting in a
  collective, without any error.

Before the first such place there is nothing to save: there, a signal ends the process at once
(`signals_end`).
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

from dapo_jax.runtime import faults, multihost
from dapo_jax.types import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2  # the file descriptor: sys.stderr may be replaced
_LOOK_S = 0.2  # between looks for a signal while the run waits
_GRACE_S = 10.0  # beyond the time-out, when the interpreter itself is stuck and cannot say what
_UNWIND_S = 3.0  # from a signal that ends the process to the end of it


class Interrupted(KeyboardInterrupt):
    """A signal came while nothing could be saved.

    Exit status 128 + its number. No Exception, so that nobody takes it for an error.
    """

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def signals_end() -> Iterator[None]:
    """While inside, and until a Guard has its first place, SIGTERM or SIGINT raises Interrupted in
    the main thread.

    That thread may be in C++ code that returns late: waiting for other processes, compiling. The
    process then ends after `_UNWIND_S`.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # elsewhere Python sets no handlers
        yield
        return
    heard: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if heard:
            os._exit(128 + number)
        heard.append(number)
        raise Interrupted(number)

    def watch() -> None:
        with contextlib.suppress(OSError):  # closed: the verb has ended
            while number := awake.recv(1):
                if signal.getsignal(number[0]) is interrupt and not ended.wait(_UNWIND_S):
                    os.write(
                        2, f"dapo_jax: interrupted by {signal.Signals(number[0]).name}\n".encode()
                    )
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
    """Context manager around a run. To be made and used in the main thread, on every process alike.

    stall_timeout_s: seconds without a `reach` that end the process with status 1; None never does.
    Starts with the first `reach`, as does the heeding of signals.

    Attributes: doing: what the run is at, for the watchdog's message. asked: the signal that this
      process has received, or 0.
    """

    def __init__(self, stall_timeout_s: float | None):
        self.doing, self.asked = "start", 0
        self._timeout = stall_timeout_s
        self._moved: float | None = None
        self._done = threading.Event()
        self._before: dict[int, Any] = {}
        self._fault = faults.from_environment(jax.process_index())

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
        """The run has come to a place where it may be left.

        Raises Stopped, on every process, if any has been asked to stop.
        """
        if self._moved is None and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
            self._wakeup = signal.set_wakeup_fd(
                -1
            )  # the thread of `signals_end` is not to see what this one handles
        self._moved = time.monotonic()
        if self._timeout is not None:
            faulthandler.dump_traceback_later(self._timeout + _GRACE_S, exit=True, file=_STDERR)
        self._fault(place)
        if asked := _most(self.asked):
            raise Stopped(asked)

    def wait(self, done: Callable[[float], bool], place: str) -> None:
        """Waits until `done(seconds)`, which waits so long at most, or until this process is asked
        to stop; then `reach`.
        """
        while not self.asked and not done(_LOOK_S):
            pass
        self.reach(place)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """The first signal is heeded at the next `reach`; the second ends the process here and now."""
        name = signal.Signals(number).name
        if self.asked:
            os.write(2, f"\ndapo_jax: {name} again: leaving at once, without saving\n".encode())
            os._exit(128 + number)
        self.asked = number
        what = "saving a checkpoint after this segment or update, then exiting; signal again to exit immediately"
        os.write(2, f"\ndapo_jax: {name}: {what}\n".encode())

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._done.wait(min(1.0, self._timeout / 4)):
            if self._moved is not None and time.monotonic() - self._moved > self._timeout:
                print(
                    f"dapo_jax: {multihost.who()}: no progress for {self._timeout:g} s in {self.doing} (train.stall_timeout_s): another "
                    "process has gone, or a device hangs. Stacks follow; the same command goes on from the last checkpoint",
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
