"""Output of a run: the metric keys, metrics.jsonl, TensorBoard events, samples.

    <run>/metrics.jsonl              per rollout step a JSON object: step, updates, draws, metrics
    <run>/tensorboard/               the same scalars
    <run>/samples/step_000012.jsonl  some responses of a step

In a bucket metrics.jsonl and the TensorBoard file are uploaded whole with every line.
"""

import contextlib
import json
import math
import re
import resource
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from dapo_jax.runtime import files
from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import AppendFile, Folder, as_path
from dapo_jax.types import InputError

# Metrics that depend on the clock and the machine. No other does.
VOLATILE = ("time/", "throughput/", "memory/")

METRICS: Mapping[str, str] = {
    # "Sampled" groups are those completed in this step: sampled in it or, with
    # dapo.partial_rollouts, begun earlier. Responses without a verdict only count where named.
    "reward/mean": "mean of score + overlong penalty over the sampled groups",
    "reward/accuracy": "share of correct responses in the sampled groups, before filtering",
    "reward/accuracy_kept": "share of correct responses in the groups trained on",
    "reward/overlong_penalty_mean": "mean overlong penalty over the sampled groups, in [-1, 0]",
    "reward/errors": "responses without a verdict because the reward failed, time-outs aside",
    "reward/no_answer_fraction": "share of responses in which the verifier found no answer",
    "reward/timeouts": "responses without a verdict because the reward timed out",
    # Dynamic sampling
    "filter/kept_fraction": "share of the sampled groups that are informative",
    "filter/all_correct": "share of the sampled groups that are all-correct",
    "filter/all_wrong": "share of the sampled groups that are all-incorrect",
    "filter/carried_groups": "groups trained on that were left over from earlier steps",
    "filter/surplus_groups": "informative groups beyond what this step needs",
    "filter/open_groups": "groups that dapo.partial_rollouts leaves unfinished for the next step",
    "filter/trained_informative": "share of the groups trained on that are informative",
    "filter/wasted_tokens": "response tokens not trained on: in dropped groups or unjudged",
    # Sampling
    "rollout/generation_batches": "prompts sampled, in units of dapo.prompts_per_draw, rounded up",
    "rollout/prompts": "prompts sampled in this step, those of open groups included",
    "rollout/response_len_mean": "mean response length in the sampled groups, tokens",
    "rollout/response_len_max": "longest response in the sampled groups, tokens",
    "rollout/truncated_fraction": "share of truncated responses in the sampled groups",
    "rollout/tokens": "response tokens sampled in this step, those of open groups included",
    "rollout/decode_steps": "decode steps in this step, each of all live slots",
    "rollout/suspended": "times that a sequence was suspended for lack of cache, and resumed",
    # The policy, over the response tokens of the step's applied updates
    "policy/loss": "mean loss of the step's updates",
    "policy/entropy": "mean entropy of the next-token distribution, nats",
    "policy/token_prob_mean": "mean probability of the sampled tokens",
    "policy/approx_kl": "KL(pi_old || pi): mean of r - 1 - log r (k3), r = pi / pi_old, nats",
    "policy/clip_fraction_low": "share of tokens whose ratio is clipped from below",
    "policy/clip_fraction_high": "share of tokens whose ratio is clipped from above",
    "policy/clip_fraction_dual": "share of tokens whose loss is capped by the dual clip",
    "policy/importance_capped_fraction": "share of tokens with weight dapo.importance_cap",
    "policy/token_masked_fraction": "share of tokens that dapo.token_mask takes out of the loss",
    "policy/sequence_masked_fraction": "share of responses that dapo.sequence_mask takes out",
    "policy/sequence_vetoed_fraction": "share of responses that dapo.sequence_veto takes out",
    "policy/upclipped_prob_mean": "mean probability of the tokens clipped from above",
    "policy/router_entropy": "mean entropy of the routers of a mixture of experts, nats",
    "policy/expert_load_max": "tokens of the busiest expert over the mean, in a micro-batch",
    "policy/advantage_rms": "root mean square of the advantages of the responses trained on",
    "policy/long_share": "share of sum |weight x advantage| on the longest quarter of responses",
    "policy/sampler_gap_mean": "mean |log-prob of trainer - of sampler| before any update, nats",
    # Of the same tokens; the ratio of the first update where dapo.old_logprobs is sampler
    "policy/sampler_ratio_tight": "share of tokens with pi_trainer / pi_sampler in [0.999, 1.002]",
    "policy/sampler_ratio_one_percent": "share of tokens with the ratio in [0.99, 1.01]",
    "policy/sampler_ratio_five_percent": "share of tokens with the ratio in [0.95, 1.05]",
    "policy/sampler_ratio_max": "largest ratio of any token (dapo.old_logprobs: recompute only)",
    # A policy version is that of one rollout step: partial rollouts continue under the next.
    "policy/token_age_mean": "mean age of the trained tokens: rollout steps since their sampling",
    "policy/token_age_max": "age of the oldest trained token, rollout steps",
    "policy/versions_mean": "mean number of policy versions that sampled a trained response",
    "policy/versions_max": "most policy versions that sampled a trained response",
    # Optimization
    "optim/grad_norm": "global gradient norm before clipping, mean of the step's updates",
    "optim/lr": "learning rate of the step's updates",
    "optim/skipped_updates": "updates skipped because loss or gradient was non-finite",
    "optim/underfilled_updates": "updates on fewer groups than a mini-batch (dapo.on_cap: train)",
    "optim/rollbacks": "rollbacks of the run so far (optim.rollback_steps)",
    "pack/efficiency": "share of the positions of training rows that hold a token",
    # Cost
    "time/rollout_s": "seconds of sampling",
    "time/reward_s": "seconds in which decoding waited for verification",
    "time/old_logprobs_s": "seconds of recomputing the log-probs of pi_old",
    "time/update_s": "seconds of updates",
    "time/eval_s": "seconds of evaluation",
    "time/save_s": "seconds for which checkpoints blocked the run since the line before",
    "time/step_s": "seconds of the whole step, the evaluation and save after it aside",
    "throughput/rollout_tokens_per_s": "response tokens per second of sampling, all devices",
    "throughput/train_tokens_per_s": "prompt and response tokens per second of updates",
    "memory/peak_bytes": "peak device memory so far; of the process if a device reports none",
    # Held-out problems
    "eval/<set>/avg": "avg@k: share of correct responses, mean over problems",
    "eval/<set>/avg_se": "standard error of avg@k over problems",
    "eval/<set>/pass": "pass@k: share of problems with a correct response",
    "eval/<set>/pass_se": "standard error of pass@k over problems",
    "eval/<set>/cons": "cons@k: share of problems whose majority answer is correct (strict)",
    "eval/<set>/cons_se": "standard error of cons@k over problems",
    "eval/<set>/pass_at_<k>": "unbiased pass@k: mean of 1 - C(n - c, k) / C(n, k), c of n correct",
    "eval/<set>/pass_at_<k>_se": "standard error of pass_at_<k> over problems",
    "eval/<set>/no_verdict": "responses without a verdict; they count as incorrect",
    "eval/<set>/response_len_mean": "mean response length, tokens",
    "eval/<set>/truncated_fraction": "share of truncated responses",
    "eval/<set>/no_answer_fraction": "share of responses in which the verifier found no answer",
    "eval/<set>/digest": "SHA-256 of the problems, text; accuracies compare where it is equal",
}


class MetricsLog:
    """Context manager that appends a run's metrics to metrics.jsonl and TensorBoard.

    resume_step: lines of later steps are dropped; None starts over. enabled: False writes nothing.
    copy: gets (step, the numbers of its line) too. Raises InputError where the folder cannot be
    written, RunError where a bucket cannot.
    """

    _lines: AppendFile | None = None
    _events: AppendFile | None = None

    def __init__(
        self,
        run_dir: str | Folder,
        *,
        resume_step: int | None = None,
        enabled: bool = True,
        copy: Callable[[int, Mapping[str, float]], None] = lambda step, numbers: None,
    ):
        self._path, self._enabled, self._copy = as_path(run_dir) / "metrics.jsonl", enabled, copy
        self.rollback(-1 if resume_step is None else resume_step)

    def rollback(self, step: int) -> None:
        """Drops the lines of later steps."""
        if not self._enabled:
            return
        self.__exit__()
        self._lines = AppendFile(self._path, _lines_until(self._path, step))
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        board = self._path.parent / "tensorboard" / name
        # A START event hides the later steps of earlier files.
        start = _event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._events = AppendFile(board, _event(file_version="brain.Event:2") + start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._lines, self._events):
            if file is not None:
                file.close()

    def write(self, step: int, updates: int, draws: int, metrics: Mapping[str, Any]) -> None:
        """Appends a line.

        metrics: numbers, scalar arrays, or texts, which only the line gets. Non-finite numbers are
        left out, with a message. Raises ValueError for a key that METRICS does not define.
        """
        if unknown := [key for key in metrics if definition(key) is None]:
            raise ValueError(f"metric {unknown[0]!r} is not defined in metrics.METRICS")
        if self._lines is None or self._events is None:
            return
        texts = {key: value for key, value in metrics.items() if isinstance(value, str)}
        numbers = {key: _number(value) for key, value in metrics.items() if key not in texts}
        finite = {key: number for key, number in numbers.items() if math.isfinite(number)}
        if lost := sorted(numbers.keys() - finite.keys()):
            print(f"step {step}: non-finite, left out of metrics.jsonl: {', '.join(lost)}")
        counters = {"updates": int(updates), "draws": int(draws)}
        line = {"step": int(step), **counters, **finite, **texts}
        self._lines.add(json.dumps(line).encode() + b"\n")
        values = [Summary.Value(tag=key, simple_value=number) for key, number in finite.items()]
        self._events.add(_event(step=step, summary=Summary(value=values)))
        self._copy(int(step), counters | finite)


def read_metrics(run_dir: str | Folder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, without an unfinished last one. InputError if the file
    is missing or damaged."""
    path = as_path(run_dir) / "metrics.jsonl"
    fix = "give the folder of a run as --run-dir"
    with files.errors_as(InputError, path, "cannot read metrics", fix):
        records = [_record(line) for line in path.read_bytes().split(b"\n")]
    if records[-1] is None:
        records.pop()
    if None in records:
        number = records.index(None) + 1
        raise InputError(f"{path}: line {number} is not a JSON object with a step; remove the line")
    return [record for record in records if record is not None]


def held_out(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """avg@k of each evaluation set in a record, and its standard error."""
    names = sorted(key.split("/")[1] for key in record if re.fullmatch(r"eval/[^/]+/avg", key))
    keys = {name: f"eval/{name}/avg" for name in names}
    return {name: (record[key], record.get(f"{key}_se", 0.0)) for name, key in keys.items()}


def best_step(run_dir: str | Folder, steps: Collection[int]) -> int | None:
    """The one of `steps` with the highest held-out accuracy: avg@k, averaged over the sets. The
    earliest among equals; None if none was evaluated on the problems of the last evaluation."""
    problems: dict[int, Any] = {}
    accuracy: dict[int, float] = {}
    for record in read_metrics(run_dir):
        if found := held_out(record):
            step = record["step"]
            problems[step] = {name: record.get(f"eval/{name}/digest") for name in found}
            accuracy[step] = sum(average for average, _ in found.values()) / len(found)
    last = problems[max(problems)] if problems else None
    same = [step for step in sorted(steps) if problems.get(step, {}) == last]
    return max(same, key=lambda step: accuracy[step], default=None)


def last_accuracies(run_dir: str | Folder) -> str:
    """The last held-out accuracy of each set, as the end of the final message."""
    last = {key: value for record in read_metrics(run_dir) for key, value in record.items()}
    return "".join(f"; {name} {avg:.3f} ± {se:.3f}" for name, (avg, se) in held_out(last).items())


def write_samples(run_dir: str | Folder, step: int, rows: Sequence[Mapping[str, Any]]) -> Folder:
    """Writes samples/step_<step>.jsonl atomically, a JSON object per response."""
    path = as_path(run_dir) / "samples" / f"step_{step:06d}.jsonl"
    lines = [json.dumps(dict(row), ensure_ascii=False, default=np.generic.item) for row in rows]
    text = "".join(line + "\n" for line in lines)  # a lone surrogate becomes its JSON escape
    files.write_whole(path, text.encode("utf-8", errors="backslashreplace"))
    return path


def definition(key: str) -> str | None:
    """The definition of a metric key, None if there is none."""
    area, *rest = key.split("/")
    if area == "eval" and len(rest) == 2:
        name = re.sub(r"_at_[1-9][0-9]*", "_at_<k>", rest[1].replace("<", ""))
        key = f"eval/<set>/{name}"
    return METRICS.get(key)


def _event(**fields: Any) -> bytes:
    """An event as TensorBoard files hold it: length, its CRC, content, its CRC."""
    content = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, content))


def _number(value: Any) -> int | float:
    """A Python number: JSON writes no other."""
    array = np.asarray(value)
    return int(array) if array.dtype.kind in "biu" else float(array)


def _record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None if it is none or has no step."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _lines_until(path: Folder, last: int) -> bytes:
    """The complete lines of steps up to `last`. Warns of missing and damaged ones; keeps a copy."""
    content = files.read(path) or b""
    lines = content.split(b"\n")[:-1]  # after the last newline is nothing, or an unfinished line
    steps = [record["step"] if (record := _record(line)) else None for line in lines]
    if damaged := [n for n, step in enumerate(steps, start=1) if step is None]:
        files.write_whole(copy := files.free_name(path.with_name(f"bad-{path.name}")), content)
        warn(
            f"{path}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}; "
            f"the file as it was is {copy.name}"
        )
    if missing := sorted({*range(1, last + 1)} - {*steps}):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warn(f"{path}: has no line of step {missing[0]}{more} of the {last} steps that are done")
    kept = zip(lines, steps, strict=True)
    return b"".join(line + b"\n" for line, step in kept if step is not None and step <= last)


def peak_memory() -> int:
    """Peak bytes in use so far on the fullest local device; of this process if none reports any."""
    used = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        return max(used)
    own = process_memory("VmHWM")  # Linux passes getrusage's peak on from the parent process
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if own is None else own


def process_memory(field: str) -> int | None:
    """Bytes of host memory of this process: `VmRSS` in use, `VmHWM` peak. None if not reported."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.M)
    return 1024 * int(found[1]) if found else None


@contextlib.contextmanager
def timed(times: dict[str, float], key: str) -> Iterator[None]:
    """Adds the seconds spent inside to `times[key]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        times[key] = times.get(key, 0.0) + time.perf_counter() - start
