"""Judges answers in the background; no answer can stop the caller or outlive its deadline.

The strict rule is cheap and bounded, and runs in the caller's process. math-verify and custom
functions run in worker processes (`runtime/sandbox.py`), each owned by one thread. A worker that
misses a deadline, crashes, exceeds its memory or sends malformed data is replaced, and only the
answer it was judging goes without a verdict.
"""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

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
from dapo_jax.runtime import sandbox
from dapo_jax.types import InputError, Message, Problem, SharedError, Verdict

_RETRY_S = 1.0  # pause after a worker that could not start
_MAX_FAILED_STARTS = 3  # in a row, each worker's last included, before answers are given up
_BATCH = 16  # answers sent together
_MAX_LINE_BYTES = 1 << 16  # of a verdict
_TIMED_OUT = "timed out"
# Errors that reward.memory_mb causes.
_OUT_OF_MEMORY = ("MemoryError", "Cannot allocate memory", "can't start new thread")


class RewardItem(NamedTuple):
    """An answer to judge."""

    problem: Problem
    text: str  # the decoded response
    response_len: int  # tokens, the end token included


class PendingVerdicts:
    """The verdicts of one submission: a future each, in the order of the items."""

    def __init__(self, count: int) -> None:
        self.futures: list[Future[Verdict]] = [Future() for _ in range(count)]

    def wait(self, seconds: float) -> bool:
        """Waits at most `seconds`; returns whether `result` would then not wait."""
        return not wait(self.futures, seconds).not_done

    def result(self) -> list[Verdict]:
        """Waits for all verdicts. Raises RuntimeError if the pool was closed before."""
        return [future.result() for future in self.futures]


class _Task(NamedTuple):
    item: RewardItem
    verdict: Future[Verdict]


class RewardPool(contextlib.AbstractContextManager):
    """Judges answers by the verifier of the config; a context manager.

    `submit` may be called from any thread. source: `function_source` of `section.function`, if the
    caller has read it; every worker runs this text, also after the file has changed.

    Raises InputError if the verifier cannot be loaded in a worker.
    """

    def __init__(self, section: RewardSection, source: str | None = None) -> None:
        source = function_source(section.function) if source is None else source
        self._queue: _Queue | None = None
        self._workers: list[_Worker] = []
        if section.verifier == "strict":
            return
        if missing := [name for name in section.environment if name not in os.environ]:
            raise InputError(
                f"reward.environment: {missing[0]} is not set; set it before the start, "
                "or leave it out"
            )
        self._queue = _Queue(section.workers)
        self._workers = [_Worker(self._queue, section, source) for _ in range(section.workers)]
        for worker in self._workers:
            worker.start()
        try:
            starts = [worker.first_start for worker in self._workers]
            if error := wait(starts, return_when=FIRST_COMPLETED).done.pop().result():
                raise InputError(error)
        except BaseException:
            self.close()
            raise

    def submit(self, items: Sequence[RewardItem]) -> PendingVerdicts:
        """Judges the items, in the background where workers do it.

        Raises RuntimeError if the pool is closed.
        """
        pending = PendingVerdicts(len(items))
        if self._queue is not None:
            self._queue.put([*map(_Task, items, pending.futures)])
        else:
            for item, future in zip(items, pending.futures, strict=True):
                future.set_result(_judge_strict(*item))
        return pending

    def judge(self, items: Sequence[RewardItem]) -> list[Verdict]:
        """Judges the items and waits for the verdicts."""
        return self.submit(items).result()

    def close(self) -> None:
        """Ends the workers; answers without a verdict get none."""
        if self._queue is not None:
            self._queue.close(RuntimeError("no verdicts: the reward pool was closed"))
        for worker in self._workers:
            worker.join()

    def __exit__(self, *exception: object) -> None:
        self.close()


def no_answer_fraction(verdicts: Sequence[Verdict]) -> float:
    """The share of verdicts, errors excluded, whose verifier found no answer in the response."""
    judged = [verdict.answered for verdict in verdicts if verdict.error is None]
    return 1 - sum(judged) / len(judged) if judged else 0.0


def error_counts(verdicts: Sequence[Verdict]) -> tuple[int, int]:
    """How many answers have no verdict: (time-outs, other errors)."""
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    timeouts = sum(error.startswith(_TIMED_OUT) for error in errors)
    return timeouts, len(errors) - timeouts


def check_errors(verdicts: Sequence[Verdict], section: RewardSection) -> None:
    """Raises SharedError if more than `max_error_fraction` of the answers have no verdict."""
    timeouts, others = error_counts(verdicts)
    if timeouts + others <= section.max_error_fraction * len(verdicts):
        return
    by_remedy: dict[str, list[str]] = {}
    for error in (verdict.error for verdict in verdicts if verdict.error is not None):
        by_remedy.setdefault(remedy(error, section), []).append(error)
    what_to_do, errors = max(by_remedy.items(), key=lambda one: len(one[1]))
    raise SharedError(
        f"reward: {timeouts + others} of {len(verdicts)} answers got no verdict ({timeouts} "
        f"time-outs, {others} errors; most often: {one_line(errors[0])}); {what_to_do}, "
        f"or raise reward.max_error_fraction {section.max_error_fraction:g}"
    )


def remedy(error: str, section: RewardSection) -> str:
    """The remedy for an answer without a verdict."""
    if error.startswith(_TIMED_OUT):
        return f"raise reward.timeout_s ({section.timeout_s:g})"
    if any(words in error for words in _OUT_OF_MEMORY):
        return f"raise reward.memory_mb ({section.memory_mb})"
    if section.verifier == "custom":
        return "fix reward.function: (problem, text, length) -> (correct, score)"
    return "look at the responses"


class _Queue:
    """Tasks that wait for a worker, and what the workers' threads share."""

    def __init__(self, workers: int) -> None:
        self.processes: set[sandbox.Process] = set()  # alive
        self.failed_starts = 0  # in a row
        self.failing: set[threading.Thread] = set()  # workers whose last start failed
        self.closed: BaseException | None = None  # why
        self._tasks: deque[_Task] = deque()
        self._workers = workers
        self._changed = threading.Condition()  # guards _tasks and closed

    def put(self, tasks: Sequence[_Task]) -> None:
        with self._changed:
            if self.closed is not None:
                raise RuntimeError("the reward pool is closed")
            self._tasks.extend(tasks)
            self._changed.notify_all()

    def put_back(self, tasks: deque[_Task]) -> None:
        """Returns taken tasks, which go first."""
        with self._changed:
            self._tasks.extendleft(reversed(tasks))
            self._changed.notify_all()
        if self.closed is not None:
            self.close(self.closed)

    def wait(self) -> bool:
        """Waits for tasks; False if the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self.closed is not None)
            return self.closed is None

    def take(self) -> deque[_Task]:
        """A batch: fewer tasks towards the end, so that none waits behind a slow one."""
        with self._changed:
            count = min(_BATCH, max(1, len(self._tasks) // (4 * self._workers)))
            return deque(self._tasks.popleft() for _ in range(min(count, len(self._tasks))))

    def started(self) -> None:
        with self._changed:
            self.failed_starts = 0
            self.failing.discard(threading.current_thread())

    def start_failed(self, error: str) -> None:
        """Waits before the next start; gives the tasks up after several, if no worker can start."""
        with self._changed:
            self.failed_starts += 1
            self.failing.add(threading.current_thread())
            if self.failed_starts >= _MAX_FAILED_STARTS and len(self.failing) == self._workers:
                self.failed_starts = 0
                while self._tasks:
                    self._tasks.popleft().verdict.set_result(Verdict(False, -1.0, error))
            self._changed.wait_for(lambda: self.closed is not None, _RETRY_S)

    def close(self, reason: BaseException) -> None:
        with self._changed:
            self.closed = self.closed or reason
            while self._tasks:
                self._tasks.popleft().verdict.set_exception(self.closed)
            for process in [*self.processes]:
                process.interrupt()
            self._changed.notify_all()


class _Worker(threading.Thread):
    """Owns one process: sends it tasks, waits for the verdicts, replaces it."""

    def __init__(self, queue: _Queue, section: RewardSection, source: str | None) -> None:
        super().__init__(name="reward-worker", daemon=True)
        self.first_start: Future[str | None] = Future()  # its error
        self._queue, self._section = queue, section
        self._rule = [section.verifier, section.function, section.allowed_modules, source]
        self._environment = {name: os.environ[name] for name in section.environment}
        self._process: sandbox.Process | None = None

    def run(self) -> None:
        try:
            self._start()
            while self._queue.wait():
                if self._process is not None and not self._process.is_quiet():
                    self._discard()  # it died, or sent unexpected output
                if self._process is not None or self._start():
                    self._judge(self._queue.take())
        except BaseException as e:  # the caller must not wait forever
            self._queue.close(RuntimeError(f"no verdicts: {one_line(e)}"))
            if not self.first_start.done():
                self.first_start.set_result(f"reward: {one_line(e)}")
        finally:
            self._discard()

    def _start(self) -> bool:
        """Starts a process; after a failure, waits and returns False."""
        error = self._start_error()
        if not self.first_start.done():
            self.first_start.set_result(error)
        if error:
            self._discard()
            self._queue.start_failed(error)
        return not error

    def _start_error(self) -> str | None:
        try:
            self._process = sandbox.Process(
                f"{__name__}:work",
                deadline_s=self._section.timeout_s,
                memory_bytes=self._section.memory_mb << 20,
                environment=self._environment,
                max_line_bytes=_MAX_LINE_BYTES,
            )
            self._queue.processes.add(self._process)
            if self._queue.closed is not None:
                self._process.interrupt()
            self._process.send(self._rule)
            self._process.wait_ready()
            self._queue.started()
            return None
        except OSError as e:
            return f"reward: cannot start a worker ({one_line(e)}); free memory or file handles"
        except InputError as e:
            return _without_secrets(str(e), self._environment)
        except (sandbox.ConfinedError, EOFError) as e:
            key = "function" if self._section.verifier == "custom" else "verifier"
            return (
                f"reward.{key}: its worker could not start ({e}); check that what it imports works"
            )

    def _judge(self, tasks: deque[_Task]) -> None:
        """Settles the tasks, or the first without a verdict and returns the others."""
        assert self._process is not None
        error = "worker sent no verdict"
        try:
            self._process.send([_fields(task.item) for task in tasks])
            while tasks:
                verdict = check_verdict(Verdict(*self._process.receive()))
                if verdict.error is not None:
                    text = _without_secrets(verdict.error, self._environment)
                    verdict = verdict._replace(error=text)
                tasks.popleft().verdict.set_result(verdict)
        except sandbox.OverMemoryError:
            error = f"MemoryError: needs more than reward.memory_mb {self._section.memory_mb}"
        except sandbox.ConfinedError as e:
            error = str(e)
        except (InputError, EOFError, ValueError, TypeError):
            pass
        finally:
            if tasks:
                self._discard()
                if self._queue.closed is None:
                    tasks.popleft().verdict.set_result(Verdict(False, -1.0, error))
                self._queue.put_back(tasks)

    def _discard(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._queue.processes.discard(self._process)
            self._process = None


def _without_secrets(error: str, environment: Mapping[str, str]) -> str:
    """An error, perhaps truncated, without the values of `reward.environment` that it quotes."""
    for name, value in environment.items():
        for length in range(len(value), 3, -1):
            if length == len(value) or error.endswith(value[:length]):
                error = error.replace(value[:length], f"${name}")
    return error


def _fields(item: RewardItem) -> list[Any]:
    p = item.problem
    prompt = p.prompt if isinstance(p.prompt, str) else [[t.role, t.content] for t in p.prompt]
    return [p.id, prompt, p.answer, p.solution, p.source, item.text, int(item.response_len)]


def _item(fields: list[Any]) -> RewardItem:
    name, prompt, answer, solution, source, text, response_len = fields
    turns = prompt if isinstance(prompt, str) else tuple(Message(*turn) for turn in prompt)
    return RewardItem(Problem(name, turns, answer, solution, source), text, response_len)


# ------------------------------------------------------------------------------------- the process


def work(orders: Iterator[Any]) -> Iterator[Verdict | None]:
    """Judges, in a sandboxed process: an order that says how, then batches of items."""
    judge = _load_judge(*next(orders))
    yield None
    for batch in orders:
        for item in map(_item, batch):
            try:
                yield check_verdict(judge(*item))
            except MemoryError:
                raise
            except Exception as e:
                yield Verdict(False, -1.0, one_line(e))


def _load_judge(
    verifier: str, function: str, allowed_modules: Sequence[str], source: str | None
) -> Callable[[Problem, str, int], object]:
    if verifier == "custom":
        sys.path.append(os.getcwd())
        return load_function(function, allowed_modules, source)
    try:  # loads and compiles what the first answer would wait for
        lenient_verify(r"Answer: $\frac{1}{3}$", "1/2")
    except ImportError as e:
        raise InputError(
            f"reward.verifier: lenient needs math-verify ({one_line(e)}); "
            "pip install math-verify, or use strict"
        ) from None
    return _judge_lenient


def _judge_lenient(problem: Problem, text: str, response_len: int) -> Verdict:
    correct, answered = lenient_judgement(text, problem.answer)
    return Verdict(correct, 1.0 if correct else -1.0, None, answered)


def _judge_strict(problem: Problem, text: str, response_len: int) -> Verdict:
    correct = strict_verify(text, problem.answer)
    answered = correct or extract_answer(text) is not None
    return Verdict(correct, 1.0 if correct else -1.0, None, answered)
