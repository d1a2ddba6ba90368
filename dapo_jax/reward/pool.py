"""Judges answers while the caller goes on; no answer can stop, slow beyond its deadline, or own the
caller.

The strict rule is cheap and bounded, and runs in the caller's process. math-verify and custom
functions run in worker processes: fresh interpreters that never run the caller's `__main__`, with
an environment of a few harmless variables, no output, a memory limit and a deadline for every
answer. Both ways a worker speaks lines of JSON over a socket: nothing that an answer could shape is
unpickled. A worker that misses a deadline, dies or outgrows its memory is replaced, and only the
answer it was judging goes without a verdict.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dapo_jax.config import RewardSection
from dapo_jax.reward.verify import (
    check_verdict,
    extract_answer,
    function_source,
    lenient_judgement,
    lenient_verify,
    load_function,
    one_line,
    strict_verify,
)
from dapo_jax.types import InputError, Message, Problem, SharedError, Verdict

_START_S = 120.0  # for a worker to import what it needs
_RETRY_S = 1.0  # pause after a worker that could not start
_MAX_FAILED_STARTS = 3  # in a row, with no worker alive, before answers are given up
_ALARM_S = 2.0  # beyond the deadline, when a worker whose caller is gone ends itself
_AHEAD = 16  # answers that a worker holds, the one it judges included
_READ_BYTES = 1 << 16  # above what a worker can have to say of the answers it holds
_READY = b"ready"
_MARK = "DAPO_JAX_REWARD_WORKER"  # environment variable: which worker a process comes from
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_TIMED_OUT = "timed out"
_OUT_OF_MEMORY = (
    "MemoryError",
    "Cannot allocate memory",
    "can't start new thread",
)  # each is reward.memory_mb's doing

# What a worker's environment keeps of the caller's. The rest may hold secrets.
_ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "TMPDIR",
    "VIRTUAL_ENV",
)
# Threads of BLAS libraries count against the memory limit; verdicts must not depend on the order of
# a set.
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
_BOOT = """
import json, sys
channel, sys.path[:] = json.loads(sys.argv[1])
from dapo_jax.reward.pool import work
work(channel)
"""


class RewardItem(NamedTuple):
    """An answer to be judged."""

    problem: Problem
    text: str  # the decoded response
    response_len: int  # tokens, the end token included


class PendingVerdicts:
    """The verdicts on one submission, under way."""

    def __init__(self, count: int) -> None:
        self._verdicts: list[Verdict | None] = [None] * count
        self._missing = count
        self._failure: BaseException | None = None
        self._done = threading.Event()
        if count == 0:
            self._done.set()

    def _settle(self, place: int, verdict: Verdict) -> None:
        self._verdicts[place] = verdict
        self._missing -= 1
        if self._missing == 0:
            self._done.set()

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Waits for all verdicts, so long at most; whether they are there (or never will be, as
        `result` then says).
        """
        return self._done.wait(seconds)

    def result(self) -> list[Verdict]:
        """Waits for all verdicts; they stand in the order of the items.

        Raises RuntimeError if the pool was closed before.
        """
        self._done.wait()
        if self._failure is not None:
            raise RuntimeError(f"no verdicts: {one_line(self._failure)}") from self._failure
        return [verdict for verdict in self._verdicts if verdict is not None]


class RewardPool:
    """Judges answers as the config section says.

    A context manager; `submit` may be called from any thread.

    source: `function_source` of `section.function`, for a caller that has read it. Every worker
    runs this text, also one that is started after the file has changed. Raises InputError at
    construction if the verifier cannot be loaded in a worker.
    """

    def __init__(self, section: RewardSection, source: str | None = None) -> None:
        source = function_source(section.function) if source is None else source
        self._manager = None if section.verifier == "strict" else _Manager(section, source)
        if self._manager is None:
            return
        try:
            self._manager.start()
        except BaseException:
            self._manager.stop()
            raise

    def submit(self, items: Sequence[RewardItem]) -> PendingVerdicts:
        """Has the items judged, in the background where workers do it.

        Raises RuntimeError if the pool is closed.
        """
        pending = PendingVerdicts(len(items))
        if self._manager is not None:
            self._manager.add([_Task(pending, place, item) for place, item in enumerate(items)])
            return pending
        for place, item in enumerate(items):
            correct = strict_verify(item.text, item.problem.answer)
            answered = correct or extract_answer(item.text) is not None
            pending._settle(place, Verdict(correct, 1.0 if correct else -1.0, None, answered))
        return pending

    def judge(self, items: Sequence[RewardItem]) -> list[Verdict]:
        """Has the items judged and waits for the verdicts."""
        return self.submit(items).result()

    def close(self) -> None:
        """Ends the workers. What is under way gets no verdict."""
        if self._manager is not None:
            self._manager.stop()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def no_answer_fraction(verdicts: Sequence[Verdict]) -> float:
    """The share of the verdicts, errors left out, whose verifier found no answer in the response."""
    judged = [verdict.answered for verdict in verdicts if verdict.error is None]
    return 1 - sum(judged) / len(judged) if judged else 0.0


def error_counts(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """How many answers have no verdict: (time-outs, other errors)."""
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    timeouts = sum(error.startswith(_TIMED_OUT) for error in errors)
    return timeouts, len(errors) - timeouts


def check_errors(verdicts: Sequence[Verdict], section: RewardSection) -> None:
    """Raises SharedError if more than `section.max_error_fraction` of the answers have no verdict."""
    timeouts, others = error_counts(verdicts)
    if timeouts + others <= section.max_error_fraction * len(verdicts):
        return
    by_remedy: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.error is not None:
            by_remedy.setdefault(remedy(verdict.error, section), []).append(verdict.error)
    what_to_do, errors = max(by_remedy.items(), key=lambda one: len(one[1]))
    raise SharedError(
        f"reward: {timeouts + others} of {len(verdicts)} answers got no verdict ({timeouts} time-outs, {others} errors; most often: "
        f"{one_line(errors[0])}); {what_to_do}, or raise reward.max_error_fraction {section.max_error_fraction:g}"
    )


def remedy(error: str, section: RewardSection) -> str:
    """What to do about an answer without a verdict."""
    if error.startswith(_TIMED_OUT):
        return f"raise reward.timeout_s ({section.timeout_s:g})"
    if any(words in error for words in _OUT_OF_MEMORY):
        return f"raise reward.memory_mb ({section.memory_mb})"
    if section.verifier == "custom":
        return "fix reward.function: (problem, text, length) -> (correct, score)"
    return "look at the responses"


# --------------------------------------------------------------------------------------------------------------------
# The manager: one thread of the caller's process, which never waits for any one worker
# --------------------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    pending: PendingVerdicts
    place: int  # among the items of its submission
    item: RewardItem

    def settle(self, verdict: Verdict) -> None:
        self.pending._settle(self.place, verdict)

    def settle_error(self, error: str) -> None:
        self.settle(Verdict(False, -1.0, error))


@dataclasses.dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    mark: str  # in the environment of all that it starts
    channel: socket.socket  # non-blocking
    deadline: float  # of its start, then of the answer it judges; monotonic seconds
    ready: bool = False
    tasks: deque[_Task] = dataclasses.field(
        default_factory=deque
    )  # sent to it; it judges the first
    inbox: bytearray = dataclasses.field(default_factory=bytearray)
    outbox: bytearray = dataclasses.field(default_factory=bytearray)


class _Manager:
    """Feeds, watches and replaces the workers.

    Other threads only start, add and stop; all else belongs to its thread.
    """

    def __init__(self, section: RewardSection, source: str | None) -> None:
        self._section = section
        s = section
        limits = {"timeout_s": s.timeout_s, "memory_mb": s.memory_mb}
        settings = {
            "source": source,
            "verifier": s.verifier,
            "function": s.function,
            "allowed_modules": s.allowed_modules,
        } | limits
        self._first_line = json.dumps(settings).encode() + b"\n"
        if missing := [name for name in s.environment if name not in os.environ]:
            raise InputError(
                f"reward.environment: {missing[0]} is not set; set it before the start, or leave it out"
            )
        self._environment = {
            name: os.environ[name] for name in (*_ENVIRONMENT, *s.environment) if name in os.environ
        } | _SETTINGS
        self._blamed_key = "function" if section.verifier == "custom" else "verifier"
        self._path = [os.path.abspath(entry) for entry in [*sys.path, os.getcwd()]]
        self._lock = threading.Lock()  # of _queue's tail and _stopping
        self._queue: deque[_Task] = deque()
        self._stopping = False
        self._started = threading.Event()  # the first worker is ready, or could not be
        self._start_error: str | None = None
        self._failed_starts = 0
        self._retry_at = 0.0
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise InputError(self._start_error)

    def add(self, tasks: list[_Task]) -> None:
        with self._lock:
            if self._stopping:
                raise RuntimeError("the reward pool is closed")
            self._queue.extend(tasks)
        self._wake_up()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._wake_up()
        self._thread.join()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._wake.send(b"\0")

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the reward pool was closed")
        try:
            for _ in range(self._section.workers):
                self._start_worker()
            while not self._stopping:
                self._assign()
                for key, _ in self._selector.select(self._patience()):
                    if key.data is None:
                        self._woken.recv(4096)
                    else:
                        self._exchange(key.data)
                self._enforce_deadlines()
        except BaseException as e:  # the caller must hear of it rather than wait for ever
            failure = e
            self._start_error = f"reward: {one_line(e)}"
        finally:
            with self._lock:
                self._stopping = True
            for worker in list(self._workers):
                self._queue.extend(worker.tasks)
                self._discard(worker)
            for task in self._queue:
                task.pending._fail(failure)
            self._started.set()
            self._selector.close()
            self._wake.close()
            self._woken.close()

    def _patience(self) -> float | None:
        """Seconds until something must be done even if no worker speaks; None is for ever."""
        until = min((worker.deadline for worker in self._workers), default=math.inf)
        if self._queue and len(self._workers) < self._section.workers:
            until = min(until, self._retry_at)
        return None if until == math.inf else max(0.0, until - time.monotonic())

    def _assign(self) -> None:
        """Starts missing workers, and gives each ready one a few answers: fewer towards the end, so
        that none waits behind a slow one.
        """
        while (
            self._queue
            and len(self._workers) < self._section.workers
            and time.monotonic() >= self._retry_at
        ):
            self._start_worker()
        ahead = min(_AHEAD, max(1, len(self._queue) // (4 * self._section.workers)))
        for worker in self._workers:
            if not worker.ready or len(worker.tasks) >= ahead or not self._queue:
                continue
            if not worker.tasks:
                worker.deadline = time.monotonic() + self._section.timeout_s
            while self._queue and len(worker.tasks) < ahead:
                task = self._queue.popleft()
                worker.tasks.append(task)
                worker.outbox += _encode(task.item)
            self._flush(worker)

    def _start_worker(self) -> None:
        mark = secrets.token_hex(8)
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, json.dumps([theirs.fileno(), self._path])],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=self._environment | {_MARK: mark},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # no Ctrl-C; and a group of its own, killed with all that it starts
                )
        except OSError as e:
            self._start_failed(
                f"reward: cannot start a worker ({one_line(e)}); free memory or file handles"
            )
            return
        ours.setblocking(False)
        worker = _Worker(
            process,
            mark,
            ours,
            deadline=time.monotonic() + _START_S,
            outbox=bytearray(self._first_line),
        )
        self._selector.register(ours, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        self._flush(worker)

    def _start_failed(self, error: str) -> None:
        if not self._started.is_set():
            self._start_error = error
            self._started.set()
        self._failed_starts += 1
        self._retry_at = time.monotonic() + _RETRY_S
        if self._failed_starts >= _MAX_FAILED_STARTS and not self._workers:
            self._failed_starts = 0
            while self._queue:
                self._queue.popleft().settle_error(error)

    def _exchange(self, worker: _Worker) -> None:
        self._receive(worker)
        if worker in self._workers:
            self._flush(worker)

    def _flush(self, worker: _Worker) -> None:
        """Writes what the worker's socket takes; the rest goes when the selector says so."""
        try:
            while worker.outbox:
                del worker.outbox[: worker.channel.send(worker.outbox)]
        except BlockingIOError:
            pass
        except OSError:  # it has gone, which reading will tell
            worker.outbox.clear()
        self._selector.modify(
            worker.channel,
            selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0),
            worker,
        )

    def _receive(self, worker: _Worker) -> None:
        """Reads once what the worker has said.

        One that has ended, or talks nonsense, is discarded.
        """
        try:
            data = worker.channel.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._blame(worker, _ending(self._discard(worker), self._section.timeout_s))
            return
        worker.inbox += data
        *lines, rest = worker.inbox.split(b"\n")
        worker.inbox = rest
        for line in lines:
            if not self._hear(worker, line):
                return
        if len(rest) > _READ_BYTES:
            self._discard(worker)
            self._blame(worker, "worker sent no verdict")

    def _hear(self, worker: _Worker, line: bytearray) -> bool:
        """Acts on one line of a worker; False if the worker had to go."""
        if not worker.ready:
            return self._hear_start(worker, line)
        try:
            verdict = check_verdict(Verdict(*json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            verdict = None
        if verdict is None or not worker.tasks:
            self._discard(worker)
            self._blame(worker, "worker sent no verdict")
            return False
        if verdict.error is not None:
            verdict = verdict._replace(error=self._without_secrets(verdict.error))
        worker.tasks.popleft().settle(verdict)
        worker.deadline = time.monotonic() + self._section.timeout_s if worker.tasks else math.inf
        if verdict.error is not None and verdict.error.startswith(
            "MemoryError"
        ):  # it may keep what filled its memory
            self._discard(worker)
            self._requeue(worker)
            return False
        return True

    def _hear_start(self, worker: _Worker, line: bytearray) -> bool:
        if line != _READY:
            self._discard(worker)
            self._start_failed(self._without_secrets(line.decode(errors="replace")))
            return False
        worker.ready, worker.deadline = True, math.inf
        self._failed_starts = 0
        self._started.set()
        return True

    def _without_secrets(self, error: str) -> str:
        """An error, perhaps cut off, without the values of `reward.environment`, which a function
        may quote.
        """
        for name in self._section.environment:
            value = self._environment[name]
            for length in range(len(value), 3, -1):
                if length == len(value) or error.endswith(value[:length]):
                    error = error.replace(value[:length], f"${name}")
        return error

    def _enforce_deadlines(self) -> None:
        for worker in list(self._workers):
            if time.monotonic() >= worker.deadline:
                self._receive(worker)  # this thread may have been held up, not the worker
            if worker in self._workers and time.monotonic() >= worker.deadline:
                self._discard(worker)
                limit = self._section.timeout_s if worker.ready else _START_S
                self._blame(worker, f"{_TIMED_OUT} after {limit:g} s")

    def _discard(self, worker: _Worker) -> int | None:
        """Kills a worker and all that it started; returns its exit status, negative for a signal."""
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        worker.channel.close()
        with contextlib.suppress(OSError):  # not reaped yet, so the group is still its own
            os.killpg(worker.process.pid, signal.SIGKILL)
        _kill_marked(worker.mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return worker.process.wait(timeout=1.0)
        return None

    def _blame(self, worker: _Worker, error: str) -> None:
        """Gives the answer that a discarded worker was judging an error, and the others it held
        another worker.
        """
        if not worker.ready:
            self._start_failed(
                f"reward.{self._blamed_key}: its worker could not start ({error}); check that what it imports works"
            )
            return
        if worker.tasks:
            worker.tasks.popleft().settle_error(error)
        self._requeue(worker)

    def _requeue(self, worker: _Worker) -> None:
        self._queue.extendleft(reversed(worker.tasks))


def _kill_marked(mark: str) -> None:
    """Kills what has left the process group of a worker: its environment still names the worker.

    Needs /proc.
    """
    entry = f"{_MARK}={mark}\0".encode()
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if entry in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


def _ending(status: int | None, timeout_s: float) -> str:
    if status == -signal.SIGALRM:  # its own alarm: the caller's process was stopped meanwhile
        return f"{_TIMED_OUT} after {timeout_s:g} s"
    if status is None or status >= 0:
        return f"worker exited with status {status}"
    try:
        return f"worker killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"worker killed by signal {-status}"


def _encode(item: RewardItem) -> bytes:
    problem = item.problem
    prompt = (
        problem.prompt
        if isinstance(problem.prompt, str)
        else [[turn.role, turn.content] for turn in problem.prompt]
    )
    fields = (
        problem.id,
        prompt,
        problem.answer,
        problem.solution,
        problem.source,
        item.text,
        int(item.response_len),
    )
    return json.dumps(fields).encode() + b"\n"  # ASCII, so that lone surrogates survive too


def _decode(line: bytes) -> RewardItem:
    name, prompt, answer, solution, source, text, response_len = json.loads(line)
    turns = prompt if isinstance(prompt, str) else tuple(Message(*turn) for turn in prompt)
    return RewardItem(Problem(name, turns, answer, solution, source), text, response_len)


# --------------------------------------------------------------------------------------------------------------------
# The worker process
# --------------------------------------------------------------------------------------------------------------------


def work(descriptor: int) -> None:
    """The life of a worker, to the end of its process.

    The socket closes only then, so that its end tells the exit status.
    """
    channel = socket.socket(fileno=descriptor)
    status: object = 1
    try:
        _serve(channel)
        status = 0
    except SystemExit as e:  # a custom function may call sys.exit
        status = 0 if e.code is None else e.code
    finally:
        os._exit(status & 0xFF if isinstance(status, int) else 1)


def _serve(channel: socket.socket) -> None:
    """Hears what to judge by, loads it, says so, then answers each item with a verdict until the
    caller is gone.
    """
    # The caller alone decides when a worker ends, also where a scheduler signals every process of a
    # job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGALRM, signal.SIG_DFL
    )  # the caller's dispositions and mask are inherited
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if (
        sys.platform == "linux"
    ):  # the kernel kills this process when its caller dies, whatever a function has done to the alarm below
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel.set_inheritable(False)
    worker = os.getpid()
    lines = channel.makefile("rb")
    settings = json.loads(lines.readline())
    try:
        judge = _load_judge(settings)
    except InputError as e:
        channel.sendall(str(e).encode(errors="backslashreplace") + b"\n")
        return
    _limit_memory(settings["memory_mb"])
    channel.sendall(_READY + b"\n")
    for line in lines:
        item = _decode(line)
        # The caller enforces the deadline; this ends a worker that nobody waits for any more.
        signal.setitimer(signal.ITIMER_REAL, settings["timeout_s"] + _ALARM_S)
        try:
            verdict = check_verdict(judge(*item))
        except MemoryError:
            verdict = Verdict(
                False,
                -1.0,
                f"MemoryError: needs more than reward.memory_mb {settings['memory_mb']}",
            )
        except Exception as e:
            verdict = Verdict(False, -1.0, one_line(e))
        if os.getpid() != worker:  # the function has forked: the child must not answer too
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.sendall(json.dumps(verdict).encode() + b"\n")


def _load_judge(settings: dict) -> Callable[[Problem, str, int], object]:
    if settings["verifier"] == "custom":
        return load_function(settings["function"], settings["allowed_modules"], settings["source"])
    try:
        lenient_verify(
            r"Answer: $\frac{1}{3}$", "1/2"
        )  # loads and compiles what the first answer would wait for
    except ImportError as e:
        raise InputError(
            f"reward.verifier: lenient needs math-verify ({one_line(e)}); pip install math-verify, or use strict"
        ) from None
    return _judge_lenient


def _judge_lenient(problem: Problem, text: str, response_len: int) -> Verdict:
    correct, answered = lenient_judgement(text, problem.answer)
    return Verdict(correct, 1.0 if correct else -1.0, None, answered)


def _limit_memory(extra_mb: int) -> None:
    """Allows this process so much address space beyond what it has.

    Where there is no /proc, it stays unlimited.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + extra_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
