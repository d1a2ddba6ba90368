"""What a run reports: the table of metric keys, metrics.jsonl, TensorBoard, samples for people.

<run>/metrics.jsonl             a JSON object a rollout step: step, updates, draws, then metrics; finite numbers only
<run>/tensorboard/              the same scalars
<run>/samples/step_000012.jsonl some responses of a step

`runtime/tracker.py` may have a copy of the scalars. In a bucket metrics.jsonl and the TensorBoard
file are sent whole with every line (`runtime/files.py`).
"""

import contextlib
import json
import math
import re
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from dapo_jax.runtime import files
from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import AppendFile, Folder, as_path, writing
from dapo_jax.types import InputError

VOLATILE = (
    "time/",
    "throughput/",
    "memory/",
)  # areas of metrics that depend on the clock and the machine; no other does

METRICS: Mapping[str, str] = {
    # Judged responses; those without a verdict are in no metric but the counts of them. A group is
    # completed in the step that draws it, or, with dapo.partial_rollouts, perhaps in a later one
    "reward/mean": "mean of score + overlong penalty over the responses of the groups completed in this step",
    "reward/accuracy": "share of correct responses among those of all groups completed in this step, before filtering",
    "reward/accuracy_kept": "share of correct responses among those trained on, after filtering",
    "reward/overlong_penalty_mean": "mean overlong penalty over the responses of the groups completed in this step, in [-1, 0]",
    "reward/errors": "responses left out of their group, without a verdict, because the reward failed; time-outs not among them",
    "reward/no_answer_fraction": "share of the responses judged in this step in which the verifier found no answer, if it can tell",
    "reward/timeouts": "responses left out of their group, without a verdict, because the reward took too long",
    # Dynamic sampling
    "filter/kept_fraction": "share of the groups completed in this step that are neither all correct nor all wrong",
    "filter/all_correct": "share of the groups completed in this step without a wrong response",
    "filter/all_wrong": "share of the groups completed in this step without a correct response",
    "filter/carried_groups": "groups trained on that earlier steps had left over",
    "filter/surplus_groups": "informative groups beyond what this step needs",
    "filter/open_groups": "groups that dapo.partial_rollouts leaves to the next step, unfinished or after an unfinished one",
    "filter/trained_informative": "share of the groups trained on that are neither all correct nor all wrong: the batch that teaches",
    "filter/wasted_tokens": "response tokens of groups that are never trained on",
    # Sampling
    "rollout/generation_batches": "prompts drawn in this step in units of dapo.prompts_per_draw, rounded up",
    "rollout/prompts": "prompts drawn in this step, those of groups that are left open included",
    "rollout/response_len_mean": "mean response length in the groups completed in this step, tokens",
    "rollout/response_len_max": "longest response there, tokens",
    "rollout/truncated_fraction": "share of the responses there that hit the length limit",
    "rollout/tokens": "response tokens sampled in this step, those of groups that are left open included",
    # The policy, over the response tokens of all updates of the step that were not skipped
    "policy/loss": "mean loss of the step's updates",
    "policy/entropy": "mean entropy of the next-token distribution, nats",
    "policy/token_prob_mean": "mean probability of the sampled tokens",
    "policy/approx_kl": "KL(pi_old || pi) by the k3 estimator, mean of r - 1 - log r with r = pi / pi_old, nats",
    "policy/clip_fraction_low": "share of tokens whose ratio is clipped from below",
    "policy/clip_fraction_high": "share of tokens whose ratio is clipped from above",
    "policy/clip_fraction_dual": "share of tokens whose loss the dual clip caps",
    "policy/importance_capped_fraction": "share of tokens whose importance weight dapo.importance_cap caps",
    "policy/upclipped_prob_mean": "mean probability of the tokens clipped from above",
    "policy/long_share": "share of the loss's weight, sum of |w A| over tokens, on the longest quarter of an update's responses",
    "policy/sampler_gap_mean": "mean |log-prob of the trainer - of the sampler|, nats, on tokens of the policy that the step starts from",
    # Optimisation
    "optim/grad_norm": "global gradient norm before clipping, mean of the step's updates",
    "optim/lr": "learning rate of the step's updates",
    "optim/skipped_updates": "updates skipped because loss or gradient was not finite",
    "optim/underfilled_updates": "updates on fewer groups than fill one, of a step that dapo.on_cap: train lets train on too few",
    "optim/rollbacks": "times that optim.rollback_steps has taken the run back so far",
    "pack/efficiency": "share of the positions of the training rows that hold a token",
    # Cost
    "time/rollout_s": "seconds of sampling",
    "time/reward_s": "seconds in which verification held decoding up",
    "time/old_logprobs_s": "seconds of recomputing the log-probs of pi_old",
    "time/update_s": "seconds of updates",
    "time/eval_s": "seconds of evaluation",
    "time/save_s": "seconds that saving the last checkpoint held the run up",
    "time/step_s": "seconds of the whole step",
    "throughput/rollout_tokens_per_s": "response tokens sampled a second of rollout, all devices",
    "throughput/train_tokens_per_s": "prompt and response tokens trained on a second of update, all devices",
    "memory/peak_bytes": "most device memory in use so far, or memory of the process where a device does not tell",
    # Held-out problems
    "eval/<set>/avg": "avg@k: share of correct responses, mean over problems",
    "eval/<set>/avg_se": "standard error of avg@k over problems",
    "eval/<set>/pass": "pass@k: share of problems with a correct response",
    "eval/<set>/pass_se": "standard error of pass@k over problems",
    "eval/<set>/cons": "cons@k: share of problems whose most frequent answer is correct, where the verifier is strict",
    "eval/<set>/cons_se": "standard error of cons@k over problems",
    "eval/<set>/pass_at_<k>": "pass@k by the unbiased estimator 1 - C(n - c, k) / C(n, k) from c right ones of n, mean over problems",
    "eval/<set>/pass_at_<k>_se": "standard error of pass_at_<k> over problems",
    "eval/<set>/no_verdict": "responses without a verdict; they count as incorrect",
    "eval/<set>/response_len_mean": "mean response length, tokens",
    "eval/<set>/truncated_fraction": "share of responses that hit the length limit",
    "eval/<set>/no_answer_fraction": "share of responses in which the verifier found no answer",
    "eval/<set>/digest": "SHA-256 of the problems, text: accuracies of runs are compared where it is the same",
}


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


class MetricsLog:
    """Context manager that appends a run's metrics to metrics.jsonl and TensorBoard.

    resume_step: the run goes on after this step, so lines of later steps are cut off; None starts
    afresh and cuts off all that an earlier attempt left. enabled: False does nothing, for processes
    other than the first. copy: gets (step, the numbers of its line) too.

    Raises InputError where the folder cannot be written, RunError where a bucket cannot.
    """

    def __init__(
        self,
        run_dir: str | Folder,
        *,
        resume_step: int | None = None,
        enabled: bool = True,
        copy: Callable[[int, Mapping[str, float]], None] = lambda step, numbers: None,
    ):
        self._path, self._copy = as_path(run_dir) / "metrics.jsonl", copy
        self._lines: AppendFile | None = None
        if enabled:
            self._open(-1 if resume_step is None else resume_step)

    def _open(self, last: int) -> None:
        with writing(self._path):
            self._lines = AppendFile(self._path, _until(self._path, last))
        self._board = (
            self._path.parent
            / "tensorboard"
            / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        )
        restart = SessionLog(
            status=SessionLog.START
        )  # hides the steps from here on of the files before
        with writing(self._board):
            self._events = AppendFile(
                self._board,
                _event(file_version="brain.Event:2") + _event(step=last + 1, session_log=restart),
            )

    def __enter__(self) -> "MetricsLog":
        return self

    def rollback(self, step: int) -> None:
        """Cuts off the lines of later steps."""
        if self._lines is not None:
            self.__exit__()
            self._open(step)

    def __exit__(self, *error: object) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def write(self, step: int, updates: int, draws: int, metrics: Mapping[str, Any]) -> None:
        """Appends a line.

        Values are numbers, scalar arrays, or texts, which are in the line alone; those that are not
        finite are left out, with a message.

        Raises ValueError for a key that METRICS does not define.
        """
        unknown = [key for key in metrics if definition(key) is None]
        if unknown:
            raise ValueError(
                f"metric {unknown[0]!r} is not in dapo_jax.runtime.metrics.METRICS; define it there"
            )
        if self._lines is None:
            return
        texts = {key: value for key, value in metrics.items() if isinstance(value, str)}
        numbers = {key: _number(value) for key, value in metrics.items() if key not in texts}
        finite = {key: number for key, number in numbers.items() if math.isfinite(number)}
        if lost := sorted(numbers.keys() - finite.keys()):
            print(f"step {step}: not finite, left out of metrics.jsonl: {', '.join(lost)}")
        counters = {"updates": int(updates), "draws": int(draws)}
        line = json.dumps({"step": int(step), **counters, **finite, **texts}) + "\n"
        with writing(self._path):
            self._lines.add(line.encode())
        values = [Summary.Value(tag=key, simple_value=number) for key, number in finite.items()]
        with writing(self._board):
            self._events.add(_event(step=step, summary=Summary(value=values)))
        self._copy(int(step), counters | finite)


def read_metrics(run_dir: str | Folder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order.

    A half last line, of a run that died or goes on, is left out.

    Raises InputError if the file is missing, or damaged elsewhere.
    """
    path = as_path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except files.errors(path) as e:
        raise InputError(
            f"{path}: cannot read metrics ({files.reason(e)}); give the folder of a run as --run-dir"
        ) from None
    if lines[-1] == b"":
        lines.pop()
    records = [_record(line) for line in lines]
    if records and records[-1] is None:
        records.pop()
    if None in records:
        raise InputError(
            f"{path}: line {records.index(None) + 1} is not a JSON object with a step; remove the line"
        )
    return [record for record in records if record is not None]


def write_samples(run_dir: str | Folder, step: int, rows: Sequence[Mapping[str, Any]]) -> Folder:
    """Writes samples/step_<step>.jsonl, a JSON object a response, whole or not at all.

    Raises as MetricsLog if it cannot.
    """
    path = as_path(run_dir) / "samples" / f"step_{step:06d}.jsonl"
    text = "".join(
        json.dumps(dict(row), ensure_ascii=False, default=np.generic.item) + "\n" for row in rows
    )
    with writing(path):
        files.write_whole(
            path, text.encode("utf-8", errors="backslashreplace")
        )  # a lone surrogate becomes its JSON escape
    return path


def definition(key: str) -> str | None:
    """What METRICS says of a key, None if it does not know it."""
    parts = key.split("/")
    if parts[0] == "eval" and len(parts) == 3:
        key = (
            f"eval/<set>/{re.sub(r'_at_[1-9][0-9]*', '_at_<k>', parts[2])}"
            if "<" not in parts[2]
            else ""
        )
    return METRICS.get(key)


def _event(**fields: Any) -> bytes:
    """An event of now, as a file of TensorBoard's holds it: length, its CRC, content, its CRC."""
    content = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc32c(length)),
            content,
            struct.pack("<I", masked_crc32c(content)),
        )
    )


def _number(value: Any) -> int | float:
    """A Python number: JSON writes no other."""
    array = np.asarray(value)
    return int(array) if array.dtype.kind in "biu" else float(array)


def _record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None if it holds none with a step."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _until(path: Folder, last: int) -> bytes:
    """The whole lines of steps up to `last`.

    Says which are missing; with damaged lines the file as it was is kept beside it.
    """
    content = files.read(path) or b""
    lines = content.split(b"\n")[:-1]  # behind the last line end there is nothing, or half a line
    steps = [record["step"] if (record := _record(line)) else None for line in lines]
    if damaged := [n for n, step in enumerate(steps, start=1) if step is None]:
        files.write_whole(copy := files.free_name(path.with_name(f"bad-{path.name}")), content)
        warn(
            f"{path}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}; the file as it was is {copy.name}"
        )
    if missing := sorted({*range(1, last + 1)} - {*steps}):
        shown = f"step {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        warn(f"{path}: has no line of {shown} of the {last} steps that are done")
    return b"".join(
        line + b"\n"
        for line, step in zip(lines, steps, strict=True)
        if step is not None and step <= last
    )


# --------------------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Most bytes in use so far on the fullest local device, or in this process where devices do not
    tell.
    """
    used = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        return max(used)
    # Linux hands the peak that getrusage tells down from the process that started this one.
    own = process_memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if own is None else own


def process_memory(field: str) -> int | None:
    """Bytes of host memory that this process uses, `VmRSS`, or used at most, `VmHWM`.

    None where the system does not tell.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return (
        1024 * int(found[1])
        if (found := re.search(rf"^{field}:\s*(\d+) kB$", status, re.M))
        else None
    )


@contextlib.contextmanager
def timed(times: dict[str, float], key: str) -> Iterator[None]:
    """Adds the seconds spent inside to `times[key]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        times[key] = times.get(key, 0.0) + time.perf_counter() - start
