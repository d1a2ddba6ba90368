"""The main job: prompts in, better policy out. Read `train` from top to bottom.

    python -m dapo_jax.train --config C --run-dir D [--set section.key=value ...]

Run the same command again to go on from the newest checkpoint.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.config import Config, ConfigError, dump_yaml, flatten, load_config, to_dict
from dapo_jax.dapo.buffer import DynamicSamplingBuffer, StarvedError, StepCounts
from dapo_jax.dapo.groups import group_advantages, informative_groups
from dapo_jax.dapo.packing import PackStats, TrainItem, build_batch, gather_targets, normalizer_weights
from dapo_jax.dapo.update import learning_rate, summarize
from dapo_jax.data.memory import PassMemory
from dapo_jax.data.problems import Cursor, load_problems, problems_digest
from dapo_jax.data.prompts import make_prompts
from dapo_jax.drawing import Drawn, OpenGroup, draw_groups, keep_rate_after, open_state, restore_open
from dapo_jax.evaluate import eval_sampling, evaluate_sets, load_sets
from dapo_jax.policy import describe, load_params, load_policy, make_engine, row_len
from dapo_jax.programs import microbatches, train_programs, train_sampling
from dapo_jax.reward.pool import RewardPool, error_counts
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import Checkpoints
from dapo_jax.runtime.curves import plot_curves
from dapo_jax.runtime.mesh import make_mesh, published_as_it_is, put_rows, row_shards
from dapo_jax.runtime.metrics import MetricsLog, header_line, peak_memory, progress, step_line, timed, write_samples
from dapo_jax.supervised import warm_up
from dapo_jax.types import Group, InputError, TrainBatch

# Config that may change between the runs of one run folder: how long, how watched, how spread; not what is learned.
_MAY_CHANGE = ("train.steps", "train.save_every", "train.keep_checkpoints", "train.samples_per_step", "eval.", "mesh.", "reward.workers")


_PHASES = ("time/rollout_s", "time/reward_s", "time/old_logprobs_s", "time/update_s")


class Progress(NamedTuple):
    """Where a run stands. Three counters, because they count three things (and generation batches are none of them)."""

    step: int = 0  # rollout steps done
    updates: int = 0  # gradient updates applied
    draws: int = 0  # prompts drawn
    cursor: Cursor = Cursor()  # next problem of the shuffled order
    keep_rate: float = 1.0  # expected share of informative groups


def train(config: Config, run_dir: Path) -> None:
    """Runs a whole DAPO training into `run_dir`, or goes on with the one that is there."""
    d, algo = config.data, config.dapo
    say = functools.partial(print, flush=True) if multihost.is_main() else lambda *line: None

    # ---- Problems, prompts and policy: all that can be wrong is found before a device works -------------------------
    policy = load_policy(config)
    problems, report = load_problems(d.train, d.arithmetic)
    prompts, skipped = make_prompts(problems, policy.tokenizer, d)
    say(f"problems: {report.summary()}; {len(prompts)} prompts" + "".join(f", {n} skipped: {why}" for why, n in skipped.items()))
    eval_sets = load_sets(config, policy, say)
    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    prepare_run_dir(config, run_dir)
    say(f"policy: {describe(policy, mesh)}")
    say(
        f"step: {algo.prompts_per_step} prompts x {algo.responses_per_prompt} responses, "
        f"{algo.prompts_per_step * algo.responses_per_prompt // algo.responses_per_update} updates; {config.reward.verifier} verifier; "
        f"clip [{1 - algo.clip_eps_low:g}, {1 + algo.clip_eps_high:g}]; {algo.loss_normalizer} loss; "
        f"dynamic sampling {'on' if algo.dynamic_sampling else 'off'}; overlong penalty {'on' if config.reward.overlong_penalty else 'off'}"
    )

    # ---- Programs: each is compiled once for the whole run ----------------------------------------------------------
    programs = train_programs(config, policy.model, mesh)
    as_it_is = published_as_it_is(programs.state.params, mesh, policy.model.compute_dtype)
    publish = (lambda params: params) if as_it_is else programs.publish  # an update ends the life of what was published before it
    engine = make_engine(config, policy, mesh, train_sampling(config))
    eval_engine = make_engine(config, policy, mesh, eval_sampling(config))

    buffer = DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus)
    left_open: list[OpenGroup] = []  # by partial rollouts
    memory = PassMemory(len(prompts), algo.rest_after, algo.rest_epochs)
    with (
        Checkpoints(run_dir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints,
        RewardPool(config.reward) as pool,
    ):
        # ---- Where the run stands: a checkpoint, or the start -------------------------------------------------------
        digest = problems_digest([p.problem for p in prompts])
        at = Progress(keep_rate=min(1.0, algo.prompts_per_step / algo.prompts_per_draw))
        if restored := checkpoints.restore(programs.state):
            if restored.host["data_digest"] != digest:
                raise InputError(f"{d.train}: is not the data set that {run_dir} was started with; use that one, or another --run-dir")
            state = restored.state
            at = Progress(*restored.host["progress"])._replace(cursor=Cursor(*restored.host["progress"][3]))
            buffer.restore(restored.groups, {p.problem.id: p.problem for p in prompts})
            memory.restore(restored.groups)
            left_open = restore_open(restored.groups, prompts, policy)
            say(f"resumed from the checkpoint of step {at.step}: {at.updates} updates, {at.draws} draws")
        else:
            params = load_params(config, policy, mesh)
            if config.supervised.updates:
                params = warm_up(config, policy, params, prompts, mesh, say)
            state = programs.init_optimizer(params)

        with MetricsLog(run_dir, resume_step=at.step if restored else None, enabled=multihost.is_main()) as log:

            def save() -> None:
                host = {"progress": at, "config": to_dict(config), "data_digest": digest}
                checkpoints.save(at.step, state, host, buffer.state() | memory.state() | open_state(left_open))

            def evaluate(weights: Any) -> dict[str, float]:
                found = evaluate_sets(eval_sets, config, engine=eval_engine, params=weights, policy=policy, pool=pool, say=say)
                return {f"eval/{name}/{key}": value for name, result in found.items() for key, value in result.items()}

            weights = publish(state.params)
            if not restored:
                if eval_sets and config.eval.every:
                    times: dict[str, float] = {}
                    with timed(times, "time/eval_s"):
                        before = evaluate(weights)
                    log.write(0, 0, 0, before | times)
                if config.supervised.updates:
                    save()

            # ---- Rollout steps --------------------------------------------------------------------------------------
            seed = jax.random.key(config.seed)
            saving: dict[str, float] = {}
            say(header_line())
            while at.step < config.train.steps:
                times = dict.fromkeys(_PHASES, 0.0)
                with timed(times, "time/step_s"):
                    # Draw until the buffer holds a step's worth of informative groups.
                    drawn = Drawn([], [], at.cursor, 0, left_open)
                    if missing := buffer.missing():
                        with progress(None, f"rollout {at.step + 1}", enabled=multihost.is_main()) as bar:
                            stream = engine.stream(weights, seed)
                            drawn = draw_groups(
                                stream,
                                prompts,
                                missing=missing,
                                keep_rate=at.keep_rate,
                                first_draw=at.draws,
                                left_open=left_open,
                                cursor=at.cursor,
                                memory=memory,
                                config=config,
                                policy=policy,
                                pool=pool,
                                times=times,
                                on_done=functools.partial(show_progress, bar),
                            )
                        del stream  # it holds the weights
                        groups = drawn.groups
                        if algo.old_logprobs == "recompute":
                            with timed(times, "time/old_logprobs_s"):
                                groups = score(groups, at.draws, functools.partial(programs.old_logprobs, state.params), config, mesh)
                        buffer.add(groups)
                        keep_rate = keep_rate_after(at.keep_rate, groups)
                        at = at._replace(draws=at.draws + drawn.draws, cursor=drawn.cursor, keep_rate=keep_rate)
                        left_open = drawn.open
                    if buffer.missing() and algo.dynamic_sampling and algo.on_cap == "error":
                        raise StarvedError(buffer.cap_message())
                    kept, counts = buffer.take()

                    # One pass over what was kept, in mini-batches of whole groups. The weights of rollouts make room.
                    del weights
                    at = at._replace(step=at.step + 1)
                    rate = learning_rate(config.optim, at.step)
                    with (
                        timed(times, "time/update_s"),
                        progress(algo.prompts_per_step, f"update {at.step}", enabled=multihost.is_main()) as bar,
                    ):
                        results, packed = [], []
                        for batch, stats in minibatches(kept, config, row_shards(mesh)):
                            state, sums = programs.update(state, put_rows(batch, mesh, axis=1), np.float32(rate))
                            results.append(sums)
                            packed.append(stats)
                            bar.update(algo.responses_per_update // algo.responses_per_prompt)
                        sums = [{k: float(v) for k, v in s.items()} for s in jax.device_get(results)]
                    at = at._replace(updates=at.updates + sum(not s["skipped"] for s in sums))
                    check_finite(sums, config, at.step)
                    weights = publish(state.params)

                # Say what happened.
                metrics = step_metrics(drawn, kept, counts, sums, packed, config) | {"optim/lr": rate} | times
                metrics |= throughput(drawn.groups, packed, times) | {
                    "filter/resting_problems": memory.resting(at.cursor.epoch),
                    "filter/open_groups": len(left_open),
                }
                last = at.step == config.train.steps
                say(step_line(at.step, config.train.steps, metrics))
                if eval_sets and config.eval.every and (at.step % config.eval.every == 0 or last):
                    with timed(times, "time/eval_s"):
                        metrics |= evaluate(weights)
                if multihost.is_main():
                    write_samples(run_dir, at.step, sample_rows(drawn.groups, config))
                # The line goes before the checkpoint, so that a resumed run lacks no line; the time of saving is on the next one.
                log.write(at.step, at.updates, at.draws, metrics | times | saving | {"memory/peak_bytes": peak_memory()})
                if at.step % config.train.save_every == 0 or last:
                    saving = {"time/save_s": 0.0}
                    with timed(saving, "time/save_s"):
                        save()
            checkpoints.wait()

    if multihost.is_main():
        say(f"curves: {plot_curves(run_dir)}")
        say(f"done: {at.step} steps, {at.updates} updates, {at.draws} draws in {run_dir}")


# --------------------------------------------------------------------------------------------------------------------
# What the loop is made of
# --------------------------------------------------------------------------------------------------------------------


def show_progress(bar: Any, ended: int, drawn: int) -> None:
    """Responses that have ended, of those drawn so far."""
    bar.total = drawn
    bar.update(ended)


def pack(items: Sequence[TrainItem], config: Config, shards: int) -> tuple[TrainBatch, PackStats]:
    """Items of one mini-batch as [M, N, T], the same shape every time, its rows balanced over so many row shards."""
    rows = config.train.rows_per_microbatch
    return build_batch(items, row_len=row_len(config), rows_per_microbatch=rows, microbatches=microbatches(config), row_shards=shards)


def score(groups: list[Group], first_draw: int, score_rows: Callable[[TrainBatch], Any], config: Config, mesh: Mesh) -> list[Group]:
    """log π_old of every token of the groups that may be trained on, by the trainer's own forward pass.

    Done when groups are drawn and never again: the first update's ratio is then exactly the policy's own, and groups
    carried to a later step keep the log-probs of the policy that drew them. So do those drawn before `first_draw`, which partial
    rollouts finished in this step: their tokens are of several policies, and only the sampler knows which.
    """
    wanted = informative_groups(np.stack([g.correct for g in groups])) | (not config.dapo.dynamic_sampling)
    wanted &= np.array([g.draw >= first_draw for g in groups])
    flat = [(i, r) for i, group in enumerate(groups) if wanted[i] for r in group.responses]
    scored: list[np.ndarray] = []
    for at in range(0, len(flat), config.dapo.responses_per_update):
        items = [
            TrainItem(groups[i].prompt.tokens, r.tokens, r.behavior_logprobs, r.behavior_logprobs, 0.0, 0.0)
            for i, r in flat[at : at + config.dapo.responses_per_update]
        ]
        batch, stats = pack(items, config, row_shards(mesh))
        scored += gather_targets(multihost.fetch(score_rows(put_rows(batch, mesh, axis=1))), stats.placement)
    by_group = iter(scored)
    return [
        dataclasses.replace(group, old_logprobs=tuple(next(by_group) for _ in group.responses)) if wanted[i] else group
        for i, group in enumerate(groups)
    ]


def minibatches(groups: Sequence[Group], config: Config, shards: int) -> Iterator[tuple[TrainBatch, PackStats]]:
    """Yields the packed batch of each update: whole groups in draw order, advantages and normaliser written in."""
    algo = config.dapo
    advantages = group_advantages(np.stack([g.reward for g in groups]), ddof=algo.advantage_ddof, eps=algo.advantage_eps)
    per_update = algo.responses_per_update // algo.responses_per_prompt
    for at in range(0, len(groups), per_update):
        mine = groups[at : at + per_update]
        responses = [r for group in mine for r in group.responses]
        weights = normalizer_weights(
            np.repeat(np.arange(len(mine)), algo.responses_per_prompt),
            np.array([len(r.tokens) for r in responses]),
            np.array([not (r.truncated and algo.overlong_filtering) for r in responses]),
            normalizer=algo.loss_normalizer,
        )
        flat_advantages = advantages[at : at + per_update].reshape(-1)
        old = [logprobs for group in mine for logprobs in group.old_logprobs]
        owners = [group.prompt.tokens for group in mine for _ in group.responses]
        items = [
            TrainItem(prompt, r.tokens, o, r.behavior_logprobs, float(a), float(w))
            for prompt, r, o, a, w in zip(owners, responses, old, flat_advantages, weights, strict=True)
        ]
        yield pack(items, config, shards)


def check_finite(sums: Sequence[dict[str, float]], config: Config, step: int) -> None:
    """Stops a run whose updates are not finite one after the other; each was skipped, so parameters are still good."""
    in_a_row = 0
    for s in sums:
        in_a_row = in_a_row + 1 if s["skipped"] else 0
        if in_a_row >= config.optim.max_nonfinite_updates:
            raise InputError(
                f"step {step}: {in_a_row} updates in a row had a loss or gradient that is not finite and were skipped; "
                "lower optim.learning_rate, or look at the samples of this step"
            )


def step_metrics(
    step: Drawn,
    kept: Sequence[Group],
    counts: StepCounts,
    sums: Sequence[dict[str, float]],
    packed: Sequence[PackStats],
    config: Config,
) -> dict[str, float]:
    """The metrics of one rollout step, timings aside; `runtime/metrics.py` defines each."""
    drawn = step.groups
    total = {name: sum(s[name] for s in sums) for name in sums[0]}
    timeouts, errors = error_counts(step.verdicts)
    metrics = summarize(total) | {
        "reward/accuracy_kept": counts.accuracy_kept,
        "reward/timeouts": timeouts,
        "reward/errors": errors,
        "filter/carried_groups": counts.carried_in,
        "filter/surplus_groups": counts.surplus,
        "filter/wasted_tokens": counts.wasted_tokens,
        "rollout/generation_batches": math.ceil(len(drawn) / config.dapo.prompts_per_draw),
        "rollout/prompts": len(drawn),
        "rollout/tokens": sum(len(r.tokens) for g in drawn for r in g.responses),
        "policy/loss": float(np.mean([s["loss"] for s in sums])),
        "optim/grad_norm": float(np.mean([s["grad_norm"] for s in sums])),
        "optim/skipped_updates": total["skipped"],
        "pack/efficiency": float(np.mean([p.efficiency for p in packed])),
    }
    if config.dapo.old_logprobs == "recompute":
        gaps = [np.abs(o - r.behavior_logprobs) for g in kept for o, r in zip(g.old_logprobs, g.responses, strict=True)]
        metrics["policy/sampler_gap_mean"] = float(np.concatenate(gaps).mean())
    else:  # only before the first update are trainer and sampler the same policy
        metrics["policy/sampler_gap_mean"] = summarize(sums[0])["policy/sampler_gap_mean"]
    if drawn:  # a step that lives on carried groups alone draws nothing, and these say nothing
        correct = np.stack([g.correct for g in drawn])
        lengths = np.array([len(r.tokens) for g in drawn for r in g.responses])
        metrics |= {
            "reward/mean": float(np.mean([g.reward for g in drawn])),
            "reward/overlong_penalty_mean": float(np.mean([g.penalty for g in drawn])),
            "reward/accuracy": float(correct.mean()),
            "filter/kept_fraction": float(informative_groups(correct).mean()),
            "filter/all_correct": float(correct.all(axis=1).mean()),
            "filter/all_wrong": float((~correct.any(axis=1)).mean()),
            "rollout/response_len_mean": float(lengths.mean()),
            "rollout/response_len_max": int(lengths.max()),
            "rollout/truncated_fraction": float(np.mean([r.truncated for g in drawn for r in g.responses])),
        }
    return metrics


def throughput(drawn: Sequence[Group], packed: Sequence[PackStats], seconds: dict[str, float]) -> dict[str, float]:
    """Tokens per second of sampling (response tokens) and of updating (prompt and response tokens)."""
    rates = {"throughput/train_tokens_per_s": sum(p.tokens for p in packed) / seconds["time/update_s"]}
    if drawn:
        rates["throughput/rollout_tokens_per_s"] = sum(len(r.tokens) for g in drawn for r in g.responses) / seconds["time/rollout_s"]
    return rates


def sample_rows(groups: Sequence[Group], config: Config) -> list[dict[str, Any]]:
    """One response each of the first groups of a step, for people to read."""
    rows = []
    for group in groups[: config.train.samples_per_step]:
        advantage = group_advantages(group.reward[None], ddof=config.dapo.advantage_ddof, eps=config.dapo.advantage_eps)[0, 0]
        rows.append(
            {
                "draw": group.draw,
                "id": group.prompt.problem.id,
                "prompt": group.prompt.problem.prompt
                if isinstance(group.prompt.problem.prompt, str)
                else [dataclasses.asdict(m) for m in group.prompt.problem.prompt],
                "answer": group.prompt.problem.answer,
                "response": group.texts[0],
                "correct": bool(group.correct[0]),
                "group_correct": int(group.correct.sum()),
                "reward": float(group.reward[0]),
                "penalty": float(group.penalty[0]),
                "advantage": float(advantage),
                "length": len(group.responses[0].tokens),
                "truncated": bool(group.responses[0].truncated),
            }
        )
    return rows


def check_divides(config: Config, mesh: Mesh) -> None:
    """Rows and slots are split over the mesh, so they must divide. ConfigError if not."""
    shards = row_shards(mesh)
    for key, size in (
        ("train.rows_per_microbatch", config.train.rows_per_microbatch),
        ("rollout.decode_slots", config.rollout.decode_slots),
    ):
        if size % shards:
            raise ConfigError(
                f"{key}: {size} does not divide over the mesh's {shards} row shards (data x fsdp); use a multiple of {shards}"
            )


def prepare_run_dir(config: Config, run_dir: Path) -> None:
    """Makes the folder and writes the resolved config; refuses a folder whose run was another one."""
    file = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            before, now = (flatten(to_dict(c)) for c in (load_config(file), config))
            for key in sorted(before.keys() | now.keys()):
                if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE):
                    raise ConfigError(
                        f"{key}: is {now.get(key)!r}, but {run_dir} was started with {before.get(key)!r}; "
                        "use another --run-dir, or set it back"
                    )
        multihost.sync("the run folder has been looked at")
        if multihost.is_main():
            file.write_text(dump_yaml(config))
    except OSError as e:
        raise InputError(f"{run_dir}: cannot be used as a run folder ({e.strerror}); give a writable folder") from None


def main(argv: list[str] | None = None) -> int:
    """Trains a policy with DAPO. The run folder gets metrics.jsonl, curves.png, config.yaml, checkpoints/, samples/ and
    tensorboard/. Run the same command again to go on from the newest checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.train", description=main.__doc__)
    parser.add_argument(
        "--config", required=True, help="YAML config, e.g. configs/tiny_cpu.yaml; `python -m dapo_jax.config` lists every field"
    )
    parser.add_argument("--run-dir", required=True, help="folder of this run: made if missing, resumed if it holds a checkpoint")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. --set optim.learning_rate=1e-5; may be repeated"
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    multihost.initialize()
    train(config, Path(args.run_dir))
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
