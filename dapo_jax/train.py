"""The main job: prompts in, better policy out. Read `train` from top to bottom.

    python -m dapo_jax.train --config C --run-dir D [--set section.key=value ...]

Run the same command again to go on from the newest checkpoint.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dapo_jax.config import Config, ConfigError, dump_yaml, flatten, load_config, to_dict
from dapo_jax.dapo.buffer import DynamicSamplingBuffer, StarvedError, StepCounts
from dapo_jax.dapo.groups import group_advantages, informative_groups
from dapo_jax.dapo.loss import batch_logprobs, loss_fn
from dapo_jax.dapo.packing import PackStats, TrainItem, build_batch, gather_targets, max_microbatches, normalizer_weights
from dapo_jax.dapo.update import init_state, learning_rate, make_optimizer, map_microbatches, summarize, update_step
from dapo_jax.data.problems import Cursor, advance, load_problems, problems_digest
from dapo_jax.data.prompts import decode, make_prompts
from dapo_jax.evaluate import eval_sampling, evaluate_sets, load_sets
from dapo_jax.model.decoder import abstract_params
from dapo_jax.policy import Policy, describe, load_params, load_policy, make_engine, row_len
from dapo_jax.reward.overlong import overlong_penalty
from dapo_jax.reward.pool import RewardItem, RewardPool, check_errors, error_counts
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import Checkpoints
from dapo_jax.runtime.chips import loss_chunk
from dapo_jax.runtime.curves import plot_curves
from dapo_jax.runtime.mesh import make_mesh, publisher, put_rows, row_shards, state_sharding
from dapo_jax.runtime.metrics import MetricsLog, header_line, peak_memory, progress, step_line, timed, write_samples
from dapo_jax.supervised import warm_up
from dapo_jax.types import Group, InputError, Prompt, Request, TrainBatch, Verdict

# Config that may change between the runs of one run folder: how long, how watched, how spread; not what is learned.
_MAY_CHANGE = ("train.steps", "train.save_every", "train.keep_checkpoints", "train.samples_per_step", "eval.", "mesh.", "reward.workers")


_PHASES = ("time/rollout_s", "time/reward_s", "time/old_logprobs_s", "time/update_s")


class Progress(NamedTuple):
    """Where a run stands. Three counters, because they count three things (and generation batches are none of them)."""

    step: int = 0  # rollout steps done
    updates: int = 0  # gradient updates applied
    draws: int = 0  # prompts drawn
    cursor: Cursor = Cursor()  # next problem of the shuffled order


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
    optimizer = make_optimizer(config.optim)
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), abstract_params(policy.model))
    shardings = state_sharding(abstract, mesh)
    temperature = config.rollout.temperature
    publish = publisher(abstract.params, mesh, policy.model.compute_dtype)
    init_optimizer = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)
    head = {"temperature": temperature, "chunk_size": loss_chunk(mesh), "mesh": mesh}
    loss = functools.partial(loss_fn, model=policy.model, algo=algo, **head)
    update = jax.jit(
        functools.partial(update_step, loss_fn=loss, optimizer=optimizer),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )
    score_rows = jax.jit(
        functools.partial(map_microbatches, function=functools.partial(batch_logprobs, model=policy.model, **head)),
        out_shardings=NamedSharding(mesh, P(None, ("data", "fsdp"))),
    )
    engine = make_engine(config, policy, mesh, Sampling(temperature, config.rollout.top_p, config.rollout.top_k))
    eval_engine = make_engine(config, policy, mesh, eval_sampling(config))

    buffer = DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus)
    with (
        Checkpoints(run_dir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints,
        RewardPool(config.reward) as pool,
    ):
        # ---- Where the run stands: a checkpoint, or the start -------------------------------------------------------
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
        digest = problems_digest([p.problem for p in prompts])
        at = Progress()
        if restored := checkpoints.restore(target):
            if restored.host["data_digest"] != digest:
                raise InputError(f"{d.train}: is not the data set that {run_dir} was started with; use that one, or another --run-dir")
            state = restored.state
            at = Progress(*restored.host["progress"])._replace(cursor=Cursor(*restored.host["progress"][3]))
            buffer.restore(restored.groups, {p.problem.id: p.problem for p in prompts})
            say(f"resumed from the checkpoint of step {at.step}: {at.updates} updates, {at.draws} draws")
        else:
            params = load_params(config, policy, mesh)
            if config.supervised.updates:
                params = warm_up(config, policy, params, prompts, mesh, say)
            state = init_optimizer(params)

        with MetricsLog(run_dir, resume_step=at.step if restored else None, enabled=multihost.is_main()) as log:

            def save() -> None:
                host = {"progress": at, "config": to_dict(config), "data_digest": digest}
                checkpoints.save(at.step, state, host, buffer.state())

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
                    drawn: list[Group] = []
                    verdicts: list[Verdict] = []
                    batches = 0
                    while buffer.missing() and batches < (algo.max_generation_batches if algo.dynamic_sampling else 1):
                        count = algo.prompts_per_draw if algo.dynamic_sampling else buffer.missing()
                        indices, cursor = advance(at.cursor, len(prompts), count, seed=config.seed)
                        chosen = [prompts[i] for i in indices]
                        with (
                            timed(times, "time/rollout_s"),
                            progress(count * algo.responses_per_prompt, f"rollout {at.step + 1}", enabled=multihost.is_main()) as bar,
                        ):
                            requests = [
                                Request(at.draws + i, j, p.tokens) for i, p in enumerate(chosen) for j in range(algo.responses_per_prompt)
                            ]
                            responses = engine.generate(weights, requests, seed, bar.update)
                        with timed(times, "time/reward_s"):
                            groups, judged = judge(chosen, responses, at.draws, config, policy, pool)
                        if algo.old_logprobs == "recompute":
                            with timed(times, "time/old_logprobs_s"):
                                groups = score(groups, functools.partial(score_rows, state.params), config, mesh)
                        buffer.add(groups)
                        drawn, verdicts, batches = drawn + groups, verdicts + judged, batches + 1
                        at = at._replace(draws=at.draws + count, cursor=cursor)
                    if buffer.missing() and algo.dynamic_sampling and algo.on_cap == "error":
                        raise StarvedError(buffer.cap_message())
                    kept, counts = buffer.take()

                    # One pass over what was kept, in mini-batches of whole groups.
                    at = at._replace(step=at.step + 1)
                    rate = learning_rate(config.optim, at.step)
                    with (
                        timed(times, "time/update_s"),
                        progress(algo.prompts_per_step, f"update {at.step}", enabled=multihost.is_main()) as bar,
                    ):
                        results, packed = [], []
                        for batch, stats in minibatches(kept, config, row_shards(mesh)):
                            state, sums = update(state, put_rows(batch, mesh, axis=1), np.float32(rate))
                            results.append(sums)
                            packed.append(stats)
                            bar.update(algo.responses_per_update // algo.responses_per_prompt)
                        sums = [{k: float(v) for k, v in s.items()} for s in jax.device_get(results)]
                    at = at._replace(updates=at.updates + sum(not s["skipped"] for s in sums))
                    check_finite(sums, config, at.step)
                    weights = publish(state.params)

                # Say what happened.
                metrics = step_metrics(drawn, verdicts, kept, counts, sums, packed, batches, config) | {"optim/lr": rate} | times
                metrics |= throughput(drawn, packed, times)
                last = at.step == config.train.steps
                say(step_line(at.step, config.train.steps, metrics))
                if eval_sets and config.eval.every and (at.step % config.eval.every == 0 or last):
                    with timed(times, "time/eval_s"):
                        metrics |= evaluate(weights)
                if multihost.is_main():
                    write_samples(run_dir, at.step, sample_rows(drawn, config))
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


def judge(
    prompts: Sequence[Prompt], responses: Sequence[Any], first_draw: int, config: Config, policy: Policy, pool: RewardPool
) -> tuple[list[Group], list[Verdict]]:
    """Verifies responses and adds the overlong penalty: reward = score + penalty. Groups in draw order."""
    g = config.dapo.responses_per_prompt
    texts = [decode(policy.tokenizer, r.tokens, policy.stop) for r in responses]
    items = [RewardItem(prompts[i // g].problem, text, len(responses[i].tokens)) for i, text in enumerate(texts)]
    verdicts = multihost.gather_verdicts(pool.judge(multihost.share(items)), len(items))
    check_errors(verdicts, config.reward)
    penalty = np.zeros(len(responses), np.float32)
    if config.reward.overlong_penalty:
        penalty = overlong_penalty(
            np.array([len(r.tokens) for r in responses]),
            max_response_len=config.rollout.max_response_len,
            overlong_buffer_len=config.reward.overlong_buffer_len,
        )
    reward = np.array([v.score for v in verdicts], np.float32) + penalty
    correct = np.array([v.correct for v in verdicts])
    groups = []
    for i, prompt in enumerate(prompts):
        own = slice(i * g, (i + 1) * g)
        old = tuple(r.behavior_logprobs for r in responses[own])
        groups.append(Group(first_draw + i, prompt, tuple(responses[own]), tuple(texts[own]), correct[own], reward[own], penalty[own], old))
    return groups, verdicts


def pack(items: Sequence[TrainItem], config: Config, shards: int) -> tuple[TrainBatch, PackStats]:
    """Items of one mini-batch as [M, N, T], the same shape every time, its rows balanced over so many row shards."""
    rows = config.train.rows_per_microbatch
    longest = config.data.max_prompt_len + config.rollout.max_response_len
    most = max_microbatches(config.dapo.responses_per_update, row_len=row_len(config), max_item_len=longest, rows_per_microbatch=rows)
    return build_batch(items, row_len=row_len(config), rows_per_microbatch=rows, microbatches=most, row_shards=shards)


def score(groups: list[Group], score_rows: Callable[[TrainBatch], Any], config: Config, mesh: Mesh) -> list[Group]:
    """log π_old of every token of the groups that may be trained on, by the trainer's own forward pass.

    Done when groups are drawn and never again: the first update's ratio is then exactly the policy's own, and groups
    carried to a later step keep the log-probs of the policy that drew them.
    """
    wanted = informative_groups(np.stack([g.correct for g in groups])) | (not config.dapo.dynamic_sampling)
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
    drawn: Sequence[Group],
    verdicts: Sequence[Verdict],
    kept: Sequence[Group],
    counts: StepCounts,
    sums: Sequence[dict[str, float]],
    packed: Sequence[PackStats],
    batches: int,
    config: Config,
) -> dict[str, float]:
    """The metrics of one rollout step, timings aside; `runtime/metrics.py` defines each."""
    total = {name: sum(s[name] for s in sums) for name in sums[0]}
    timeouts, errors = error_counts(verdicts)
    metrics = summarize(total) | {
        "reward/accuracy_kept": counts.accuracy_kept,
        "reward/timeouts": timeouts,
        "reward/errors": errors,
        "filter/carried_groups": counts.carried_in,
        "filter/surplus_groups": counts.surplus,
        "filter/wasted_tokens": counts.wasted_tokens,
        "rollout/generation_batches": batches,
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
