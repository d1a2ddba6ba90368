"""What a rollout step writes: metrics, a console line, samples, a checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dapo_jax.config import DapoSection, TrainSection
from dapo_jax.dapo.groups import RATIO_RANGES, is_informative, removed_responses, step_advantages
from dapo_jax.dapo.update import summarize
from dapo_jax.reward.pool import error_counts, no_answer_fraction
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import StepTable
from dapo_jax.runtime.files import Folder
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.metrics import VOLATILE, MetricsLog, peak_memory, timed, write_samples
from dapo_jax.training.dynamic_sampling import Drawn
from dapo_jax.training.samples import sample_rows, shown_answer
from dapo_jax.training.setup import Policy
from dapo_jax.training.state import RunState, RunStore
from dapo_jax.training.step import Updates
from dapo_jax.types import Group, Params, RunError


def draw_metrics(drawn: Drawn, prompts_per_draw: int) -> dict[str, float]:
    """Sampling metrics of one step, without timings; `runtime/metrics.py` defines each."""
    timeouts, errors = error_counts(drawn.verdicts)
    metrics: dict[str, float] = {
        "reward/timeouts": timeouts,
        "reward/errors": errors,
        "reward/no_answer_fraction": no_answer_fraction(drawn.verdicts),
        "rollout/generation_batches": math.ceil(drawn.draws / prompts_per_draw),
        "rollout/prompts": drawn.draws,
        "rollout/tokens": drawn.tokens,
        "rollout/decode_steps": drawn.decode_steps,
        "rollout/suspended": drawn.suspended,
        "filter/wasted_tokens": drawn.unjudged_tokens,
    }
    judged = [g for g in drawn.groups if g.responses]
    if not judged:  # carried groups may fill the step
        return metrics
    responses = [r for g in judged for r in g.responses]
    lengths = np.array([len(r.tokens) for r in responses])
    return metrics | {
        "reward/mean": float(np.concatenate([g.reward for g in judged]).mean()),
        "reward/overlong_penalty_mean": float(np.concatenate([g.penalty for g in judged]).mean()),
        "reward/accuracy": float(np.concatenate([g.correct for g in judged]).mean()),
        "filter/kept_fraction": float(np.mean([is_informative(g.correct) for g in judged])),
        "filter/all_correct": float(np.mean([g.correct.all() for g in judged])),
        "filter/all_wrong": float(np.mean([not g.correct.any() for g in judged])),
        "rollout/response_len_mean": float(lengths.mean()),
        "rollout/response_len_max": int(lengths.max()),
        "rollout/truncated_fraction": float(np.mean([r.truncated for r in responses])),
    }


def update_metrics(
    step: Updates, sums: Sequence[Mapping[str, float]], algo: DapoSection
) -> dict[str, float]:
    """Training metrics of one step, without timings. sums: metric sums of each update.

    `policy/` metrics and the gradient norm leave out skipped updates, which may be non-finite.
    """
    applied, (kept, counts) = [s for s in sums if not s["skipped"]], step[:2]
    advantages = np.concatenate(step_advantages([g.reward for g in kept], algo))
    full = algo.responses_per_update // algo.responses_per_prompt
    metrics = {
        "reward/accuracy_kept": float(np.concatenate([g.correct for g in kept]).mean()),
        "filter/carried_groups": min(counts.carried_in, counts.kept),
        "filter/surplus_groups": counts.surplus,
        "filter/wasted_tokens": counts.wasted_tokens,
        "filter/trained_informative": float(np.mean([is_informative(g.correct) for g in kept])),
        "policy/long_share": float(np.mean([p.long_share for p in step.packed])),
        "policy/advantage_rms": float(np.sqrt(np.mean(advantages**2))),
        "optim/lr": step.rate,
        "optim/skipped_updates": len(sums) - len(applied),
        "optim/underfilled_updates": sum(size < full for size in step.sizes),
        "pack/efficiency": float(np.mean([p.efficiency for p in step.packed])),
    }
    if applied:
        metrics |= summarize({name: sum(s[name] for s in applied) for name in applied[0]})
        metrics["policy/loss"] = float(np.mean([s["loss"] for s in applied]))
        metrics["optim/grad_norm"] = float(np.mean([s["grad_norm"] for s in applied]))
    if algo.sequence_mask is not None or algo.sequence_veto is not None:
        removed = np.concatenate([removed_responses(g, algo) for g in kept], axis=1).mean(axis=1)
        metrics["policy/sequence_masked_fraction"] = float(removed[0])
        metrics["policy/sequence_vetoed_fraction"] = float(removed[1])
    # Sampler and trainer are compared on tokens that this step's policy sampled, before an update.
    if algo.old_logprobs == "recompute":
        gaps = [
            old - r.behavior_logprobs
            for g in kept
            if g.draw >= step.first_draw
            for old, r in zip(g.old_logprobs, g.responses, strict=True)
        ]
        if gaps:
            gap = np.concatenate(gaps)
            ratio = np.exp(gap)
            metrics["policy/sampler_gap_mean"] = float(np.abs(gap).mean())
            metrics["policy/sampler_ratio_max"] = float(ratio.max())
            for name, (low, high) in RATIO_RANGES.items():
                inside = (ratio >= low) & (ratio <= high)
                metrics[f"policy/sampler_ratio_{name}"] = float(inside.mean())
    elif applied and (count := applied[0]["gap_tokens"]):
        metrics["policy/sampler_gap_mean"] = applied[0]["sampler_gap"] / count
        for name in RATIO_RANGES:
            metrics[f"policy/sampler_ratio_{name}"] = applied[0][f"ratio_{name}"] / count
    return metrics


def age_metrics(groups: Sequence[Group], step: int) -> dict[str, float]:
    """The age of the tokens that rollout step `step` trains on, and their policies."""
    policies = [r.policies for group in groups for r in group.responses if r.policies]
    if not policies:
        return {}
    ages, counts = np.array([(step - at, n) for p in policies for at, n in p]).T
    versions = [len(p) for p in policies]
    return {
        "policy/token_age_mean": float(np.average(ages, weights=counts)),
        "policy/token_age_max": int(ages.max()),
        "policy/versions_mean": float(np.mean(versions)),
        "policy/versions_max": max(versions),
    }


def throughput(
    sampled_tokens: float, trained_tokens: int, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second of sampling (response tokens) and of updates (prompts too), if any."""
    rates = {}
    if trained_tokens:
        rates["throughput/train_tokens_per_s"] = trained_tokens / seconds["time/update_s"]
    if sampled_tokens and seconds["time/rollout_s"]:
        rates["throughput/rollout_tokens_per_s"] = sampled_tokens / seconds["time/rollout_s"]
    return rates


@dataclasses.dataclass
class Recorder:
    """Ends rollout steps: writes metrics, evaluates and saves on schedule."""

    run_dir: Folder
    log: MetricsLog
    info: Callable[[str], None]
    store: RunStore
    guard: Guard  # reached after a checkpoint, as `save`
    policy: Policy
    algo: DapoSection
    train: TrainSection
    eval_every: int  # 0: never
    evaluate: Callable[[Params], Mapping[str, Any]]  # weights → results by set
    publish_exact: Callable[[Params], Params] | None = None  # as in `TrainPrograms`

    def __post_init__(self) -> None:
        self._table = StepTable(self.train.steps)
        self._saving: dict[str, float] = {}
        self._saved_at = time.monotonic()

    def begin(self, run: RunState) -> None:
        times: dict[str, float] = {}
        if self.eval_every:
            metrics = self._evaluation(run, times)
            self.log.write(0, 0, 0, metrics | times)
        run.progress = run.progress._replace(begun=True)

    def commit(self, run: RunState, drawn: Drawn, groups: Sequence[Group]) -> None:
        """Ends the sampling of a step: writes samples, then calls `RunState.commit`."""
        algo, count = self.algo, self.train.samples_per_step
        if multihost.is_main():
            rows = sample_rows(drawn.groups, count, algo, self.policy)
            write_samples(self.run_dir, run.progress.step + 1, rows)
        metrics = draw_metrics(drawn, algo.prompts_per_draw)
        if (unread := metrics["reward/no_answer_fraction"]) > 0.5:
            none = "contain no answer that the verifier can read; see samples/"
            self.info(f"step {run.progress.step + 1}: {unread:.0%} of the responses {none}")
        run.commit(drawn, groups, metrics, algo.prompts_per_step if algo.on_cap == "error" else 1)
        self._save_if_due(run)

    def record(self, run: RunState, updates: Updates, times: dict[str, float]) -> None:
        """Ends the step: evaluation, the metrics line, a checkpoint. RunError if processes have
        diverged.

        The line is written first, so that a resumed run misses none; `time/save_s` is in the next
        one.
        """
        assert run.partial is not None
        step, drawn = run.progress.step + 1, run.partial.drawn
        trained_tokens = sum(p.tokens for p in updates.packed[updates.resumed :])
        metrics = drawn | update_metrics(updates, run.partial.sums, self.algo) | times
        metrics["filter/wasted_tokens"] += drawn["filter/wasted_tokens"]
        metrics |= age_metrics(updates.kept, run.draw.step)
        metrics["filter/open_groups"] = len(run.draw.open)
        metrics["optim/rollbacks"] = run.progress.rollbacks
        metrics |= throughput(drawn["rollout/tokens"], trained_tokens, times)
        self.info(self._table.line(step, metrics))
        if (kept := sum(sizes := updates.sizes)) < self.algo.prompts_per_step:
            full = self.algo.responses_per_update // self.algo.responses_per_prompt
            self.info(
                f"step {step}: dapo.on_cap: trained on {kept} of {self.algo.prompts_per_step} "
                f"groups, in {len(sizes)} updates of {min(sizes)} to {max(sizes)} groups "
                f"({full} fill one)"
            )
        last = step == self.train.steps
        evaluated = self.eval_every and (step % self.eval_every == 0 or last)
        if evaluated:
            metrics |= self._evaluation(run, times)
        run.end_step()
        check_agreement(run, metrics)
        metrics |= times | self._saving | {"memory/peak_bytes": peak_memory()}
        self._saving = {}
        self.log.write(step, run.progress.updates, run.draw.draws, metrics)
        if step % self.train.save_every == 0 or last or (evaluated and self.train.keep_best):
            self._save(run)
        else:
            self._save_if_due(run)

    def _save_if_due(self, run: RunState) -> None:
        """Saves after save_every_s, by process 0's clock, but no whole step: neither what a run
        rolls back to nor what it keeps may depend on a clock.
        """
        passed, every = time.monotonic() - self._saved_at, self.train.save_every_s
        if every is not None and multihost.from_main("due" if passed >= every else ""):
            self._save(run, whole=False)

    def _save(self, run: RunState, *, whole: bool = True) -> None:
        with timed(self._saving, "time/save_s"):
            self.store.save(run, whole=whole)
        self._saved_at = time.monotonic()
        self.guard.reach("save")

    def _evaluation(self, run: RunState, times: dict[str, float]) -> dict[str, Any]:
        with timed(times, "time/eval_s"):
            weights = self.publish_exact(run.state.params) if self.publish_exact else run.weights
            results = self.evaluate(weights)
        for result in results.values():
            self.info(shown_answer(result.answers[0], self.policy))
        return {
            f"eval/{name}/{key}": value
            for name, result in results.items()
            for key, value in result.metrics.items()
        }


def check_agreement(run: RunState, metrics: Mapping[str, float]) -> None:
    """RunError, on every process, unless all of them have the same numbers."""
    steady = {key: value for key, value in metrics.items() if not key.startswith(VOLATILE)}
    if differs := multihost.disagreement(run.counts() | steady):
        raise RunError(
            f"step {run.progress.step}: {differs}: the processes have diverged; nothing is saved; "
            "look for a faulty host, then start the same command again"
        )
