"""Judges answers in the background; no answer can stop the caller or outlive its deadline.

The strict rule is bounded, and runs in the caller's process. math-verify and custom functions run
in worker processes (`runtime/sandbox.py`). A worker that misses a deadline, crashes, exceeds its
memory or sends malformed data is replaced, and only the answer it was judging gets no verdict.
"""

import contextlib
import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from dapo_jax.config import RewardSection
from dapo_jax.reward.verify import (
    check_verdict,
    described,
    extract_answer,
    function_source,
    lenient_judgement,
    lenient_verify,
    load_function,
    strict_verify,
)
from dapo_jax.runtime import sandbox
from dapo_jax.types import InputError, Message, Problem, SharedError, Verdict, one_line

_RETRY_S = 1.0  # pause after a worker that could not start
_MAX_FAILED_STARTS = 3  # in all, each worker's last included, before answers are given up
_MAX_LINE_BYTES = 1 << 16  # of a verdict
_TIMED_OUT = "timed out"
# Errors that reward.memory_mb causes.
_OUT_OF_MEMORY = ("MemoryError", "Cannot allocate memory", "can't start new thread")


class RewardItem(NamedTuple):
    problem: Problem
    text: str  # the decoded response
    response_len: int  # tokens, the end token included


class PendingVerdicts(NamedTuple):
    """The verdicts of one submission, in the order of the items."""

    futures: Sequence[Future[Verdict]]

    def wait(self, seconds: float) -> bool:
        """Waits at most `seconds`; returns whether `result` would then not wait."""
        return not wait(self.futures, seconds).not_done

    def result(self) -> list[Verdict]:
        """Waits for all verdicts. Raises RuntimeError if the pool was closed before."""
        return [future.result() for future in self.futures]


class RewardPool(contextlib.AbstractContextManager):
    """Judges answers by the verifier of the config; a context manager.

    `submit` may be called from any thread. source: `function_source` of `section.function`, if the
    caller has read it. Raises InputError if the verifier cannot be loaded in a worker.
    """

    def __init__(self, section: RewardSection, source: str | None = None) -> None:
        source = function_source(section.function) if source is None else source
        self._closed = threading.Event()
        self._given_up: str | None = None  # error of the answers that wait, if no worker starts
        self._workers: list[_Worker] = []
        self._idle = queue.SimpleQueue[_Worker]()
        if section.verifier == "strict":
            self._threads = ThreadPoolExecutor(1)
            return
        if missing := [name for name in section.environment if name not in os.environ]:
            raise InputError(
                f"reward.environment: {missing[0]} is not set; set it before the start, "
                "or leave it out"
            )
        self._threads = ThreadPoolExecutor(section.workers, "reward-worker")
        self._workers = [_Worker(section, source, self._closed) for _ in range(section.workers)]
        starts = [self._threads.submit(self._start, worker) for worker in self._workers]
        try:
            if error := wait(starts, return_when=FIRST_COMPLETED).done.pop().result():
                raise InputError(error)
        except BaseException:
            self.close()
            raise

    def submit(self, items: Sequence[RewardItem]) -> PendingVerdicts:
        """Judges the items in the background. Raises RuntimeError if the pool is closed."""
        self._check_open()
        self._given_up = None
        judge = self._judge if self._workers else _judge_strict
        return PendingVerdicts([self._threads.submit(judge, item) for item in items])

    def judge(self, items: Sequence[RewardItem]) -> list[Verdict]:
        return self.submit(items).result()

    def close(self) -> None:
        """Ends the workers; answers without a verdict get none."""
        self._closed.set()
        for worker in self._workers:
            worker.interrupt()
        self._threads.shutdown()
        for worker in self._workers:
            worker.discard()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, worker: "_Worker") -> str | None:
        try:
            return worker.start()
        finally:
            self._idle.put(worker)

    def _judge(self, item: RewardItem) -> Verdict:
        """The verdict of an idle worker: there are as many threads as workers."""
        worker = self._idle.get()
        try:
            while not worker.is_ready():
                self._check_open()
                if self._given_up is not None:
                    return Verdict(False, -1.0, self._given_up)
                if error := worker.start():
                    failed = [one.failed_starts for one in self._workers]
                    if all(failed) and sum(failed) >= _MAX_FAILED_STARTS:
                        self._given_up = error
                    else:
                        self._closed.wait(_RETRY_S)
            verdict = worker.judge(item)
            self._check_open()
            return verdict
        finally:
            self._idle.put(worker)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("no verdicts: the reward pool was closed")


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
    if error.startswith(_TIMED_OUT):
        return f"raise reward.timeout_s ({section.timeout_s:g})"
    if any(words in error for words in _OUT_OF_MEMORY):
        return f"raise reward.memory_mb ({section.memory_mb})"
    if section.verifier == "custom":
        return "fix reward.function: (problem, text, length) -> (correct, score)"
    return "look at the responses"


class _Worker:
    """One process at a time that judges; used by one thread at a time, except `interrupt`."""

    def __init__(self, section: RewardSection, source: str | None, closed: threading.Event) -> None:
        self.failed_starts = 0  # in a row
        self._section, self._closed = section, closed
        self._rule = [section.verifier, section.function, section.allowed_modules, source]
        self._environment = {name: os.environ[name] for name in section.environment}
        self._process: sandbox.Process | None = None

    def is_ready(self) -> bool:
        return self._process is not None and self._process.is_quiet()

    def start(self) -> str | None:
        """Starts a new process, or returns why there is none."""
        self.discard()
        try:
            self._process = sandbox.Process(
                f"{__name__}:judging",
                self._rule,
                deadline_s=self._section.timeout_s,
                memory_bytes=self._section.memory_mb << 20,
                environment=self._environment,
                max_line_bytes=_MAX_LINE_BYTES,
            )
            if self._closed.is_set():
                self._process.interrupt()
            self._process.start()
            self.failed_starts = 0
            return None
        except OSError as e:
            error = f"reward: cannot start a worker ({described(e)}); free memory or file handles"
        except InputError as e:
            error = _without_secrets(str(e), self._environment)
        except sandbox.ConfinedError as e:
            key = "function" if self._section.verifier == "custom" else "verifier"
            what = f"reward.{key}: its worker could not start ({e})"
            error = f"{what}; check that what it imports works"
        self.failed_starts += 1
        self.discard()
        return error

    def judge(self, item: RewardItem) -> Verdict:
        """The verdict of its process, which is killed if it gives none."""
        order = [dataclasses.asdict(item.problem), item.text, int(item.response_len)]
        error = "worker sent no verdict"
        try:
            assert self._process is not None
            verdict = check_verdict(Verdict(*self._process.call(order)))
            if verdict.error is not None:
                text = _without_secrets(verdict.error, self._environment)
                verdict = verdict._replace(error=text)
            return verdict
        except sandbox.OverMemoryError:
            error = f"MemoryError: needs more than reward.memory_mb {self._section.memory_mb}"
        except sandbox.ConfinedError as e:
            error = str(e)
        except (InputError, ValueError, TypeError):
            pass
        self.discard()
        return Verdict(False, -1.0, error)

    def interrupt(self) -> None:
        """Makes `start` and `judge` of another thread fail at once."""
        if (process := self._process) is not None:
            process.interrupt()

    def discard(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


def _without_secrets(error: str, environment: Mapping[str, str]) -> str:
    """An error, perhaps truncated, without the values of `reward.environment` that it quotes."""
    for name, value in environment.items():
        for length in range(len(value), 3, -1):
            if length == len(value) or error.endswith(value[:length]):
                error = error.replace(value[:length], f"${name}")
    return error


def _judge_strict(item: RewardItem) -> Verdict:
    correct = strict_verify(item.text, item.problem.answer)
    answered = correct or extract_answer(item.text) is not None
    return Verdict(correct, 1.0 if correct else -1.0, None, answered)


# ------------------------------------------------------------------------------------- the process


def judging(
    verifier: str, function: str, allowed_modules: Sequence[str], source: str | None
) -> Callable[[tuple[dict[str, Any], str, int]], Verdict]:
    """In the process: a function from [problem, text, length] to the verdict."""
    if verifier == "custom":
        sys.path.append(os.getcwd())
        judge = load_function(function, allowed_modules, source)
    else:
        judge = _judge_lenient
        try:  # loads and compiles what the first answer would wait for
            lenient_verify(r"Answer: $\frac{1}{3}$", "1/2")
        except ImportError as e:
            raise InputError(
                f"reward.verifier: lenient needs math-verify ({described(e)}); "
                "pip install math-verify, or use strict"
            ) from None

    def answer(order: tuple[dict[str, Any], str, int]) -> Verdict:
        fields, text, response_len = order
        if not isinstance(fields["prompt"], str):
            fields["prompt"] = tuple(Message(**turn) for turn in fields["prompt"])
        try:
            return check_verdict(judge(Problem(**fields), text, response_len))
        except MemoryError:
            raise
        except Exception as e:
            return Verdict(False, -1.0, described(e))

    return answer


def _judge_lenient(problem: Problem, text: str, response_len: int) -> Verdict:
    correct, answered = lenient_judgement(text, problem.answer)
    return Verdict(correct, 1.0 if correct else -1.0, None, answered)
