"""The main job: prompts in, better policy out. Read `train` from top to bottom.

    python -m dapo_jax.train --config C --run-dir D [--set section.key=value ...]

Run the same command again to go on from the newest checkpoint.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.config import (
    Config,
    ConfigError,
    DapoSection,
    OptimSection,
    config_from_dict,
    dump_yaml,
    flatten,
    load_config,
    to_dict,
)
from dapo_jax.dapo.buffer import DynamicSamplingBuffer, StepCounts
from dapo_jax.dapo.groups import advantages_of, is_informative
from dapo_jax.dapo.packing import (
    PackStats,
    TrainItem,
    build_batch,
    gather_targets,
    normalizer_weights,
)
from dapo_jax.dapo.update import learning_rate, summarize
from dapo_jax.data.mixture import load_training, mix, mixture_digest
from dapo_jax.data.problems import problems_digest
from dapo_jax.data.prompts import make_prompts, tokens_digest
from dapo_jax.evaluate import Evaluator, checked_pool, eval_sampling, load_sets, not_held_out
from dapo_jax.reward.pool import error_counts, no_answer_fraction
from dapo_jax.reward.verify import function_source
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import Checkpoints, newest_host
from dapo_jax.runtime.console import StepTable, make_console, progress
from dapo_jax.runtime.curves import plot_curves
from dapo_jax.runtime.files import Folder, local_copy, read, run_folder, write_whole, writing
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.lock import locked
from dapo_jax.runtime.mesh import make_mesh, published_as_it_is, put_rows
from dapo_jax.runtime.metrics import (
    VOLATILE,
    MetricsLog,
    peak_memory,
    read_metrics,
    timed,
    write_samples,
)
from dapo_jax.runtime.profile import Profiler
from dapo_jax.runtime.tracker import Tracker, check_tracker
from dapo_jax.supervised import solution_items, warm_up
from dapo_jax.training.dynamic_sampling import Drawn, draw_groups
from dapo_jax.training.programs import train_programs
from dapo_jax.training.samples import sample_rows
from dapo_jax.training.setup import (
    BatchShape,
    Policy,
    adapted,
    batch_shape,
    check_adapters,
    check_divides,
    check_started_alike,
    check_weights,
    describe,
    load_params,
    load_policy,
    make_engine,
    train_sampling,
    weights_folder,
    with_commit,
)
from dapo_jax.training.state import DataDigests, PartialStep, Progress, Run, fetched, restore, save
from dapo_jax.types import (
    Group,
    InputError,
    NonFiniteError,
    Prompt,
    Response,
    RunError,
    SharedError,
    Stopped,
    TrainBatch,
)

# Config that may change between the runs of one run folder: how long, how watched, how spread over
# which devices; not what is learned.
MAY_CHANGE = (
    "dapo.max_generation_batches",
    "dapo.on_cap",
    "data.allow_change",
    "eval.",
    "mesh.",
    "model.attention_block",
    "model.remat",
    "optim.max_nonfinite_updates",
    "optim.rollback_steps",
    "reward.allow_change",
    "reward.environment",
    "reward.max_error_fraction",
    "reward.memory_mb",
    "reward.timeout_s",
    "reward.workers",
    "rollout.decode_slots",
    "supervised.save_every",
    "train.keep_checkpoints",
    "train.profile_",
    "train.rows_per_microbatch",
    "train.samples_per_step",
    "train.save_every",
    "train.stall_timeout_s",
    "train.steps",
    "train.tracker",
)

_FUNCTION = (
    "reward_function.py"  # in the run folder: a copy of the file that reward.function comes from
)

_MAX_ROLLBACKS = 5  # of a run, before it gives up

_PHASES = ("time/rollout_s", "time/reward_s", "time/old_logprobs_s", "time/update_s")


def train(config: Config, run_dir: Folder, *, quiet: bool = False) -> None:
    """Runs a whole DAPO training into `run_dir`, or goes on with the one that is there. quiet: says
    only what must be known.
    """
    config = with_commit(config, run_dir)
    d, algo = config.data, config.dapo
    console = make_console(main=multihost.is_main(), quiet=quiet)
    info = console.info

    # ---- Problems, prompts and policy: all that can be wrong is found before a device works -------------------------
    check_tracker(config.train.tracker, run_dir)
    check_adapters(config.model)
    policy = load_policy(config)
    problems, reports = load_training(d)
    prompts, skipped = make_prompts(problems, policy.tokenizer, d, policy.model.vocab_size)
    loaded = "; ".join(report.summary() for report in reports)
    info(
        f"problems: {loaded}; {len(prompts)} prompts"
        + "".join(f", {n} skipped: {why}" for why, n in skipped.items())
    )
    eval_sets = load_sets(config.eval, d, policy, info)
    loaded_digest = problems_digest(p.problem for p in prompts)
    prompts = fit_to_train_on(prompts, eval_sets, config, info)
    solutions = (
        solution_items(prompts, policy, config.rollout.max_response_len)
        if config.supervised.updates
        else []
    )
    mixture = mix(d.train, [p.problem for p in prompts])
    if several := mixture.summary():
        info(f"mixture: {several}")
    data_digests = DataDigests(
        loaded_digest, mixture_digest([p.problem for p in prompts], mixture), tokens_digest(prompts)
    )
    source = function_source(config.reward.function)
    sets = {"data.train": prompts} | {
        f"eval.sets.{name}": held_out for name, held_out in eval_sets.items()
    }
    check_started_alike(config, policy, sets, {"the reward function": source})
    mesh = make_mesh(config.mesh)
    check_divides(config, mesh, rows=True, slots=True)
    shape = batch_shape(config, mesh)
    check_same_run(config, run_dir, source)
    if function_changed(source, run_dir):
        info(
            "reward.function: its file has changed since the run was started, which reward.allow_change allows"
        )
    check_first_weights(policy, run_dir)
    info(f"policy: {describe(policy, mesh, config.model.lora)}")
    info(
        f"step: {algo.prompts_per_step} prompts x {algo.responses_per_prompt} responses, "
        f"{algo.prompts_per_step * algo.responses_per_prompt // algo.responses_per_update} updates; {config.reward.verifier} verifier; "
        f"clip [{1 - algo.clip_eps_low:g}, {1 + algo.clip_eps_high:g}]; {algo.loss_normalizer} loss; "
        f"dynamic sampling {'on' if algo.dynamic_sampling else 'off'}; overlong penalty {'on' if config.reward.overlong_penalty else 'off'}"
    )

    # ---- Programs: each is compiled once for the whole run ----------------------------------------------------------
    lora = config.model.lora
    programs = train_programs(
        adapted(policy.model, lora), mesh, algo, config.optim, config.rollout.temperature
    )
    as_it_is = lora is None and published_as_it_is(
        programs.state.params, mesh, policy.model.compute_dtype
    )
    publish = (
        (lambda params: params) if as_it_is else programs.publish
    )  # an update ends the life of what was published before it
    engine = make_engine(config, policy, mesh, train_sampling(config))
    eval_engine = make_engine(config, policy, mesh, eval_sampling(config.eval))

    run = Run(
        DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus),
        Progress(keep_rate=min(1.0, algo.prompts_per_step / algo.prompts_per_draw)),
    )
    with (
        checked_pool(
            config.reward, d.template, source, sets, console
        ) as pool,  # first: what it refuses leaves no folder behind
        Guard(
            config.train.stall_timeout_s
        ) as guard,  # and so does a fault setting that cannot be read
        locked(run_dir),
        Checkpoints(run_dir / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints,
        Profiler(
            run_dir / "profile", config.train.profile_start, config.train.profile_steps
        ) as profiler,
    ):
        check_same_run(config, run_dir, source)  # a job that has ended since may have begun it
        check_steps(config.train.steps, max(checkpoints.steps(), default=0), run_dir)
        write_config(config, run_dir, source)
        function = digest_of(source)
        save_run = functools.partial(
            save,
            checkpoints=checkpoints,
            config=to_dict(config),
            data=data_digests,
            function=function,
        )
        restore_run = functools.partial(
            restore,
            checkpoints=checkpoints,
            abstract_state=programs.state,
            prompts=prompts,
            data=data_digests,
            allow_change=d.allow_change,
        )

        shared = (config.eval, config.reward, config.seed, policy)
        evaluator = Evaluator(*shared, eval_engine, pool, guard)

        def evaluate(weights: Any) -> dict[str, float]:
            found = evaluator.evaluate_sets(eval_sets, weights, info, console.bars)
            return {
                f"eval/{name}/{key}": value
                for name, (result, _) in found.items()
                for key, value in result.items()
            }

        # ---- Where the run stands: a checkpoint, or the start -------------------------------------------------------
        if restore_run(run):
            info(
                f"resumed from the checkpoint of {run.where}: {run.at.updates} updates, {run.at.draws} draws before it"
            )
        else:
            run.state = programs.init_optimizer(load_params(config, policy, mesh, lora=lora))
        tracker = Tracker(
            config.train.tracker if multihost.is_main() else None,
            run_dir,
            flatten(to_dict(config)),
            console.result,
        )
        log = MetricsLog(
            run_dir,
            resume_step=run.at.step if run.at.begun else None,
            enabled=multihost.is_main(),
            copy=tracker.send,
        )
        with tracker, log, saving_at_an_end(run, save_run):
            if (warm := config.supervised.updates) > run.at.warmed:
                for updates, in_a_row, state in warm_up(
                    config,
                    policy,
                    mesh,
                    solutions,
                    run.state,
                    info,
                    (run.at.warmed, run.at.nonfinite),
                ):
                    run.state = state if updates < warm else programs.init_optimizer(state.params)
                    run.at = run.at._replace(
                        warmed=updates, nonfinite=in_a_row if updates < warm else 0
                    )
                    guard.reach("warm-up")
                    if updates % config.supervised.save_every == 0 or updates == warm:
                        save_run(run)
            weights = publish(run.state.params)
            if not run.at.begun:
                times: dict[str, float] = {}
                if eval_sets and config.eval.every:
                    with timed(times, "time/eval_s"):
                        before = evaluate(weights)
                    log.write(0, 0, 0, before | times)
                run.at = run.at._replace(begun=True)

            # ---- Rollout steps --------------------------------------------------------------------------------------
            rolling_back = functools.partial(
                rolled_back_if_diverged,
                run,
                config.optim,
                restore_run,
                save_run,
                log,
                console.result,
            )
            seed = jax.random.key(config.seed)
            saving: dict[str, float] = {}
            table = StepTable(config.train.steps)
            while run.at.step < config.train.steps:
                step = run.at.step + 1
                guard.doing = f"step {step}"
                guard.reach("step")
                profiler.begin(step)
                times = dict.fromkeys(_PHASES, 0.0)
                weights = publish(run.state.params) if weights is None else weights
                annotation = jax.profiler.StepTraceAnnotation("rollout step", step_num=step)
                with rolling_back() as rolled_back, timed(times, "time/step_s"), annotation:
                    # Draw until the buffer holds a step's worth of informative groups.
                    if run.partial is None:
                        drawn = Drawn([], [], run.at.cursor, 0, 0, list(run.left_open))
                        if missing := run.buffer.missing():
                            with progress(None, f"rollout {step}", enabled=console.bars) as bar:
                                drawn = draw_groups(
                                    engine.stream(weights, seed),
                                    prompts,
                                    missing=missing,
                                    keep_rate=run.at.keep_rate,
                                    first_draw=run.at.draws,
                                    left_open=run.left_open,
                                    cursor=run.at.cursor,
                                    mixture=mixture,
                                    config=config,
                                    policy=policy,
                                    pool=pool,
                                    guard=guard,
                                    times=times,
                                    on_done=functools.partial(show_progress, bar),
                                )
                        groups = drawn.groups
                        if groups and algo.old_logprobs == "recompute":
                            score_rows = functools.partial(programs.old_logprobs, run.state.params)
                            with timed(times, "time/old_logprobs_s"):
                                groups = score(
                                    groups, run.at.draws, score_rows, config, mesh, guard
                                )
                        if multihost.is_main():
                            write_samples(
                                run_dir,
                                step,
                                sample_rows(
                                    drawn.groups, config.train.samples_per_step, algo, policy
                                ),
                            )
                        run.commit(
                            drawn,
                            groups,
                            at_least=algo.prompts_per_step if algo.on_cap == "error" else 1,
                        )
                        run.partial = PartialStep(draw_metrics(drawn, config), [])
                    drawn_metrics, done = run.partial
                    kept, counts = run.buffer.ready()
                    if counts.kept < algo.prompts_per_step:
                        info(f"step {step}: {underfilled(counts.kept, algo)}")
                    first_draw = run.at.draws - int(
                        drawn_metrics["rollout/prompts"]
                    )  # of this step

                    # One pass over what was kept, in mini-batches of whole groups. The weights of
                    # rollouts make room.
                    weights = None
                    rate, already = learning_rate(config.optim, step), len(done)
                    with (
                        timed(times, "time/update_s"),
                        progress(
                            algo.prompts_per_step, f"update {step}", enabled=console.bars
                        ) as bar,
                    ):
                        packed = []
                        for n, (batch, stats) in enumerate(
                            minibatches(kept, algo, shape, first_draw)
                        ):
                            packed.append(stats)
                            bar.update(algo.responses_per_update // algo.responses_per_prompt)
                            if n < already:  # was done when the run was stopped
                                continue
                            rows = put_rows(batch, mesh, axis=1)
                            jax.block_until_ready(
                                done[-1:]
                            )  # one update under way and one waiting: a stop is heeded soon
                            guard.reach("update")
                            run.state, sums = programs.update(run.state, rows, np.float32(rate))
                            done.append(sums)
                        done[:] = fetched(done)
                    applied = run.at.updates + sum(not s["skipped"] for s in done)
                    longest, nonfinite = skipped_in_a_row(run.at.nonfinite, done)
                    if longest >= config.optim.max_nonfinite_updates:
                        raise NonFiniteError(
                            f"{longest} updates in a row had a loss or gradient that is not finite and were skipped"
                        )
                    weights = publish(run.state.params)
                if rolled_back:
                    weights = None
                    continue

                # Say what happened.
                metrics = (
                    drawn_metrics
                    | update_metrics(kept, first_draw, counts, done, packed, config)
                    | {"optim/lr": rate}
                )
                metrics |= {
                    "filter/open_groups": len(run.left_open),
                    "optim/rollbacks": run.at.rollbacks,
                }
                metrics |= times | throughput(drawn_metrics, packed[already:], times)
                last = step == config.train.steps
                info(table.line(step, metrics))
                if (unread := metrics.get("reward/no_answer_fraction", 0.0)) > 0.5:
                    verifier = config.reward.verifier
                    info(
                        f"step {step}: {unread:.0%} of the responses hold no answer that the {verifier} verifier reads; see samples/"
                    )
                if eval_sets and config.eval.every and (step % config.eval.every == 0 or last):
                    with rolling_back() as rolled_back, timed(times, "time/eval_s"):
                        metrics |= evaluate(weights)
                    if rolled_back:
                        weights = None
                        continue
                run.buffer.take()
                run.at = run.at._replace(step=step, updates=applied, nonfinite=nonfinite)
                run.partial = None
                check_agreement(run, metrics)
                # The line goes before the checkpoint, so that a resumed run lacks no line; the time
                # of saving is on the next one.
                log.write(
                    step,
                    applied,
                    run.at.draws,
                    metrics | times | saving | {"memory/peak_bytes": peak_memory()},
                )
                if step % config.train.save_every == 0 or last:
                    saving = {"time/save_s": 0.0}
                    with timed(saving, "time/save_s"):
                        save_run(run)
                    guard.reach("save")
            checkpoints.wait()

    if multihost.is_main():
        info(f"curves: {plot_curves(run_dir)}")
        console.result(
            f"done: {run.at.step} steps, {run.at.updates} updates, {run.at.draws} draws in {run_dir}{held_out(run_dir)}"
        )


# --------------------------------------------------------------------------------------------------------------------
# What the loop is made of
# --------------------------------------------------------------------------------------------------------------------


def show_progress(bar: Any, ended: int, drawn: int) -> None:
    """Responses that have ended, of those drawn so far."""
    bar.total = drawn
    bar.update(ended)


@contextlib.contextmanager
def saving_at_an_end(run: Run, save_run: Callable[[Run], None]) -> Iterator[None]:
    """Saves where the run stands when it ends inside by a signal, or by what every process finds
    alike; says so in the former case.
    """
    try:
        yield
    except SharedError:
        save_run(run)
        raise
    except Stopped as stopped:
        save_run(run)
        where = run.where if run.at.begun else f"{run.at.warmed} updates of warm-up"
        message = f"{signal.Signals(stopped.number).name}: stopped and saved after {where}; the same command goes on from there"
        raise Stopped(stopped.number, message) from None


def check_agreement(run: Run, metrics: Mapping[str, float]) -> None:
    """RunError, on every process, unless all of them have come to the same numbers."""
    steady = {key: value for key, value in metrics.items() if not key.startswith(VOLATILE)}
    if differs := multihost.disagreement(run.at._asdict() | steady):
        raise RunError(
            f"step {run.at.step}: {differs}: the processes have diverged; nothing is saved; "
            "look for a faulty host, then start the same command again"
        )


def score(
    groups: list[Group],
    first_draw: int,
    score_rows: Callable[[TrainBatch], Any],
    config: Config,
    mesh: Mesh,
    guard: Guard,
) -> list[Group]:
    """log π_old of every token of the groups that may be trained on, by the trainer's own forward
    pass.

    Done when groups are drawn and never again: the first update's ratio is then exactly the
    policy's own, and groups carried to a later step keep the log-probs of the policy that drew
    them. So do those drawn before `first_draw`, which partial rollouts finished in this step: their
    tokens are of several policies, and only the sampler knows which.

    Raises NonFiniteError if a log-prob is non-finite: before a group is taken into the buffer.
    """
    wanted = [
        (is_informative(g.correct) or not config.dapo.dynamic_sampling) and g.draw >= first_draw
        for g in groups
    ]
    flat = [
        (group.prompt, r) for i, group in enumerate(groups) if wanted[i] for r in group.responses
    ]
    scored = score_responses(flat, score_rows, config, mesh, guard)
    if bad := sum(not np.isfinite(logprobs).all() for logprobs in scored):
        raise NonFiniteError(
            f"the trainer's log-probs of {bad} of {len(scored)} responses are non-finite, though the sampler's are not"
        )
    by_group = iter(scored)
    return [
        dataclasses.replace(group, old_logprobs=tuple(next(by_group) for _ in group.responses))
        if wanted[i]
        else group
        for i, group in enumerate(groups)
    ]


def score_responses(
    responses: Sequence[tuple[Prompt, Response]],
    score_rows: Callable[[TrainBatch], Any],
    config: Config,
    mesh: Mesh,
    guard: Guard,
) -> list[np.ndarray]:
    """The trainer's log-prob of every token of each response, float32 [R] each."""
    scored: list[np.ndarray] = []
    shape = batch_shape(config, mesh)
    for at in range(0, len(responses), config.dapo.responses_per_update):
        items = [
            TrainItem(prompt.tokens, r.tokens, r.behavior_logprobs, r.behavior_logprobs, 0.0, 0.0)
            for prompt, r in responses[at : at + config.dapo.responses_per_update]
        ]
        guard.reach("score")
        batch, stats = build_batch(items, **shape._asdict())
        scored += gather_targets(
            multihost.fetch(score_rows(put_rows(batch, mesh, axis=1))), stats.placement
        )
    return scored


def groups_of_updates(count: int, algo: DapoSection) -> list[slice]:
    """Which of a step's groups each update trains on: in draw order, and as few updates as hold
    them all.

    Those of an underfilled step (`on_cap: train`) are spread evenly, 33 that go 32 into an update
    as 17 and 16: every update takes a whole optimizer step, which a remainder of one group, with
    all its noise, should not.
    """
    updates = math.ceil(count * algo.responses_per_prompt / algo.responses_per_update)
    ends = [math.ceil(n * count / updates) for n in range(updates + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def underfilled(kept: int, algo: DapoSection) -> str:
    """What an underfilled step trains on, in words."""
    sizes, full = (
        [part.stop - part.start for part in groups_of_updates(kept, algo)],
        algo.responses_per_update // algo.responses_per_prompt,
    )
    return (
        f"dapo.on_cap: trains on {kept} of {algo.prompts_per_step} groups, in {len(sizes)} updates of {min(sizes)} to {max(sizes)} groups "
        f"({full} fill one); each is a whole optimizer step"
    )


def minibatches(
    groups: Sequence[Group], algo: DapoSection, shape: BatchShape, first_draw: int = 0
) -> Iterator[tuple[TrainBatch, PackStats]]:
    """Yields the packed batch of each update: whole groups in draw order (`groups_of_updates`),
    advantages and normaliser written in.

    first_draw: of the step. Of the groups before it the sampler's log-probs, if they are in the
    ratio, are left out of the metrics.
    """
    for part in groups_of_updates(len(groups), algo):
        mine = groups[part]
        responses = [r for group in mine for r in group.responses]
        weights = normalizer_weights(
            np.repeat(np.arange(len(mine)), [len(group.responses) for group in mine]),
            np.array([len(r.tokens) for r in responses]),
            np.array([not (r.truncated and algo.overlong_filtering) for r in responses]),
            normalizer=algo.loss_normalizer,
        )
        advantages = np.concatenate([advantages_of(group.reward, algo) for group in mine])
        old = [logprobs for group in mine for logprobs in group.old_logprobs]
        owners = [group.prompt.tokens for group in mine for _ in group.responses]
        old_only = [
            algo.old_logprobs == "sampler" and group.draw < first_draw
            for group in mine
            for _ in group.responses
        ]
        items = [
            TrainItem(
                prompt,
                r.tokens,
                o,
                o + np.nan if hidden else r.behavior_logprobs,
                float(a),
                float(w),
            )
            for prompt, r, o, hidden, a, w in zip(
                owners, responses, old, old_only, advantages, weights, strict=True
            )
        ]
        yield build_batch(items, **shape._asdict())


def skipped_in_a_row(before: int, sums: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """How many updates in a row were skipped, after `before` of earlier steps: (at most, at the
    end).
    """
    longest = running = before
    for s in sums:
        running = running + 1 if s["skipped"] else 0
        longest = max(longest, running)
    return longest, running


@contextlib.contextmanager
def rolled_back_if_diverged(
    run: Run,
    optim: OptimSection,
    restore_run: Callable[..., bool],
    save_run: Callable[[Run], None],
    log: MetricsLog,
    info: Callable[[str], None],
) -> Iterator[list[int]]:
    """Where NonFiniteError ends what is inside, rolls the run back `optim.rollback_steps` or more,
    past the draws since, and saves that.

    Yields a list, which then holds the step that the run is at. Raises InputError where the config
    does not ask for it, or there is no checkpoint to roll back to. Nothing of the step is saved
    then: it is done again when the run goes on, and the machine may have been at fault.
    """
    trouble, rolled_back = "", list[int]()
    try:
        yield rolled_back
    except NonFiniteError as e:
        trouble = f"step {run.at.step + 1}: {e}"
        traceback.clear_frames(e.__traceback__)  # they hold the weights and the cache
    if not trouble:
        return
    back, at = optim.rollback_steps, run.at
    if back is None:
        raise InputError(
            f"{trouble}; lower optim.learning_rate, look at the samples of this step, or set optim.rollback_steps"
        )
    if at.rollbacks >= _MAX_ROLLBACKS:
        raise InputError(f"{trouble}, after {at.rollbacks} rollbacks; lower optim.learning_rate")
    if not restore_run(run, at_most=at.step - back):
        raise InputError(
            f"{trouble}, and there is no checkpoint {back} steps back; lower train.save_every or optim.rollback_steps"
        )
    run.at = run.at._replace(draws=at.draws, cursor=at.cursor, rollbacks=at.rollbacks + 1)
    log.rollback(run.at.step)
    save_run(
        run
    )  # whatever ends the run next: it must not draw these problems again, nor forget how often it was rolled back
    rolled_back.append(run.at.step)
    info(
        f"{trouble}: rolled back to step {run.at.step}, without the problems that were drawn since"
    )


def draw_metrics(step: Drawn, config: Config) -> dict[str, float]:
    """The metrics of what one rollout step drew, timings aside; `runtime/metrics.py` defines each."""
    drawn = step.groups
    timeouts, errors = error_counts(step.verdicts)
    metrics: dict[str, float] = {
        "reward/timeouts": timeouts,
        "reward/errors": errors,
        "reward/no_answer_fraction": no_answer_fraction(step.verdicts),
        "rollout/generation_batches": math.ceil(step.draws / config.dapo.prompts_per_draw),
        "rollout/prompts": step.draws,
        "rollout/tokens": step.tokens,
    }
    if not any(
        g.responses for g in drawn
    ):  # a step that lives on carried groups alone draws nothing, and the others say nothing
        return metrics
    lengths = np.array([len(r.tokens) for g in drawn for r in g.responses])
    return metrics | {
        "reward/mean": float(np.concatenate([g.reward for g in drawn]).mean()),
        "reward/overlong_penalty_mean": float(np.concatenate([g.penalty for g in drawn]).mean()),
        "reward/accuracy": float(np.concatenate([g.correct for g in drawn]).mean()),
        "filter/kept_fraction": float(np.mean([is_informative(g.correct) for g in drawn])),
        "filter/all_correct": float(
            np.mean([g.correct.size > 0 and g.correct.all() for g in drawn])
        ),
        "filter/all_wrong": float(np.mean([not g.correct.any() for g in drawn])),
        "rollout/response_len_mean": float(lengths.mean()),
        "rollout/response_len_max": int(lengths.max()),
        "rollout/truncated_fraction": float(
            np.mean([r.truncated for g in drawn for r in g.responses])
        ),
    }


def update_metrics(
    kept: Sequence[Group],
    first_draw: int,
    counts: StepCounts,
    sums: Sequence[dict[str, float]],
    packed: Sequence[PackStats],
    config: Config,
) -> dict[str, float]:
    """The metrics of what one rollout step trained on and learned, timings aside. first_draw: of
    the step.

    `policy/` metrics and the gradient norm are of the updates that were applied: the sums of a
    skipped one may be non-finite.
    """
    applied, algo = [s for s in sums if not s["skipped"]], config.dapo
    metrics = {
        "reward/accuracy_kept": counts.accuracy_kept,
        "filter/carried_groups": min(counts.carried_in, counts.kept),
        "filter/surplus_groups": counts.surplus,
        "filter/wasted_tokens": counts.wasted_tokens,
        "filter/trained_informative": float(np.mean([is_informative(g.correct) for g in kept])),
        "policy/long_share": float(np.mean([p.long_share for p in packed])),
        "optim/skipped_updates": len(sums) - len(applied),
        "optim/underfilled_updates": sum(
            (part.stop - part.start) * algo.responses_per_prompt < algo.responses_per_update
            for part in groups_of_updates(len(kept), algo)
        ),
        "pack/efficiency": float(np.mean([p.efficiency for p in packed])),
    }
    if applied:
        metrics |= summarize({name: sum(s[name] for s in applied) for name in applied[0]})
        metrics["policy/loss"] = float(np.mean([s["loss"] for s in applied]))
        metrics["optim/grad_norm"] = float(np.mean([s["grad_norm"] for s in applied]))
    # Sampler and trainer are compared on tokens that this step's policy sampled, before an update
    # has changed it.
    if algo.old_logprobs == "recompute":
        new = [
            (o, r)
            for g in kept
            if g.draw >= first_draw
            for o, r in zip(g.old_logprobs, g.responses, strict=True)
        ]
        if new:
            metrics["policy/sampler_gap_mean"] = float(
                np.concatenate([np.abs(o - r.behavior_logprobs) for o, r in new]).mean()
            )
    elif applied and applied[0]["gap_tokens"]:
        metrics["policy/sampler_gap_mean"] = applied[0]["sampler_gap"] / applied[0]["gap_tokens"]
    return metrics


def throughput(
    drawn: Mapping[str, float], packed: Sequence[PackStats], seconds: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second of sampling (response tokens) and of updating (prompt and response tokens),
    of what was done just now.
    """
    rates = {}
    if packed:
        rates["throughput/train_tokens_per_s"] = (
            sum(p.tokens for p in packed) / seconds["time/update_s"]
        )
    if drawn["rollout/tokens"] and seconds["time/rollout_s"]:
        rates["throughput/rollout_tokens_per_s"] = (
            drawn["rollout/tokens"] / seconds["time/rollout_s"]
        )
    return rates


def held_out(run_dir: Folder) -> str:
    """The last held-out accuracy of each set, for the end of a line."""
    last: dict[str, float] = {}
    for record in read_metrics(run_dir):
        last |= {
            key: value
            for key, value in record.items()
            if key.startswith("eval/") and key.endswith(("/avg", "/avg_se"))
        }
    return "".join(
        f"; {key.split('/')[1]} {last[key]:.3f} ± {last.get(f'{key}_se', 0):.3f}"
        for key in last
        if key.endswith("/avg")
    )


def fit_to_train_on(
    prompts: Sequence[Prompt],
    eval_sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    info: Callable[[str], None],
) -> list[Prompt]:
    """The prompts that no evaluation set holds. InputError if they are too few for a step."""
    kept = not_held_out(prompts, eval_sets, info)
    if len(kept) < (wanted := config.dapo.prompts_per_step):
        held = len(prompts) - len(kept)
        few = f"{len(kept)} prompts to train on" + (
            f" ({held} more are in eval.sets)" if held else ""
        )
        raise InputError(
            f"data.train: {few} are fewer than dapo.prompts_per_step {wanted}; give more problems, or lower it"
        )
    return kept


def digest_of(source: str | None) -> str | None:
    """Of the file of reward.function, as checkpoints hold it."""
    return None if source is None else hashlib.sha256(source.encode()).hexdigest()


def function_changed(source: str | None, run_dir: Folder) -> bool:
    """Whether the file of reward.function, now `source`, is another than the run was started with."""
    copy = read(run_dir / _FUNCTION)
    host = newest_host(run_dir / "checkpoints") or {}
    before = host.get("function_digest") if copy is None else hashlib.sha256(copy).hexdigest()
    return None not in (before, source) and before != digest_of(source)


def difference(
    before: Config, now: Config, may_change: tuple[str, ...]
) -> tuple[str, Any, Any] | None:
    """The first key, but for those that start with one of `may_change`, in which two configs
    differ, and what it was and is.
    """
    a, b = flatten(to_dict(before)), flatten(to_dict(now))
    differing = (
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not key.startswith(may_change)
    )
    return next(((key, a.get(key), b.get(key)) for key in differing), None)


def stored_configs(run_dir: Folder) -> list[Config]:
    """What the run folder was started with, by its config.yaml and by its newest checkpoint: either
    may be missing.
    """
    found, file = [], run_dir / "config.yaml"
    if read(file) is not None:
        with local_copy(file) as stored:
            found.append(load_config(stored))
    host = newest_host(run_dir / "checkpoints") or {}
    if isinstance(host.get("config"), dict):
        try:
            found.append(config_from_dict(host["config"], f"the newest checkpoint of {run_dir}"))
        except ConfigError:  # of an earlier version, whose keys have changed since: config.yaml can be edited, a checkpoint cannot
            if not found:
                raise
    return found


def check_same_run(config: Config, run_dir: Folder, source: str | None) -> None:
    """Raises ConfigError for a folder whose run was another one, with another config or another
    `source` of its reward function.
    """
    for before in stored_configs(run_dir):
        # files may move: digests tell what they hold
        data = (
            ("data.train",)
            if config.data.allow_change
            else tuple(f"data.train.{n}.path" for n in range(len(config.data.train)))
        )
        if changed := difference(before, config, MAY_CHANGE + data):
            key, was, now = changed
            raise ConfigError(
                f"{key}: is {now!r}, but {run_dir} was started with {was!r}; use another --run-dir, or set it back"
            )
    if function_changed(source, run_dir) and not config.reward.allow_change:
        raise ConfigError(
            f"reward.function: {config.reward.function} is not what {run_dir} was started with, which is in its {_FUNCTION} or checkpoint; "
            "restore the file, or set reward.allow_change, or use another --run-dir"
        )


def check_first_weights(policy: Policy, run_dir: Folder) -> None:
    """`check_weights` of those that a new run starts from; one that is resumed has its own.

    Process 0 says which it is: in a folder that the processes do not share they may find different
    things, and what follows is a collective. That they do not share it is found after this
    (`lock.locked`).
    """
    resumed = multihost.from_main("" if read(run_dir / "config.yaml") is None else "resumed")
    if not resumed and (folder := weights_folder(policy)):
        check_weights(folder)


def check_steps(steps: int, done: int, run_dir: Folder) -> None:
    """Raises ConfigError if a run has done more steps than it is asked for."""
    if steps < done:
        raise ConfigError(
            f"train.steps: is {steps}, but {run_dir} has done {done} steps; set it to {done} or more, or use another --run-dir"
        )


def write_config(config: Config, run_dir: Folder, source: str | None) -> None:
    """Writes the resolved config into the folder, and the source of its reward function."""
    multihost.sync("the run folder has been looked at")
    if multihost.is_main():
        with writing(run_dir / "config.yaml"):
            if source is not None:
                write_whole(run_dir / _FUNCTION, source.encode())
            write_whole(run_dir / "config.yaml", dump_yaml(config).encode())


def main(argv: list[str] | None = None) -> int:
    """Trains a policy with DAPO.

    The run folder gets metrics.jsonl, curves.png, config.yaml, checkpoints/, samples/ and
    tensorboard/. Run the same command again to go on from the newest checkpoint.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.train", description=main.__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML config, e.g. configs/tiny_cpu.yaml; `python -m dapo_jax.config` lists every field",
    )
    parser.add_argument(
        "--run-dir",
        required=True,
        help="folder or gs://bucket/folder of this run: made if missing, resumed if it holds a checkpoint",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. --set optim.learning_rate=1e-5; may be repeated",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="only warnings, errors and the last line"
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    run_dir = run_folder(args.run_dir)
    multihost.initialize()
    train(config, run_dir, quiet=args.quiet)
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
