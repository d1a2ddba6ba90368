"""Trains a policy with DAPO. `train` is the main loop: read it from top to bottom.

    python -m dapo_jax.train --config C --run-dir D [--set section.key=value ...]

Run the same command again to resume from the newest checkpoint.
"""

import argparse
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dapo_jax.config import (
    Config,
    ConfigError,
    SupervisedSection,
    config_from_dict,
    dump_yaml,
    flatten,
    load_config,
    to_dict,
)
from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.dapo.packing import TrainItem
from dapo_jax.data.mixture import Mixture, load_training, mix, mixture_digest
from dapo_jax.data.problems import problems_digest
from dapo_jax.data.prompts import make_prompts, tokens_digest
from dapo_jax.evaluate import Evaluator, checked_pool, eval_sampling, load_sets, not_held_out
from dapo_jax.reward.verify import function_source
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import Checkpoints, newest_host
from dapo_jax.runtime.console import make_console
from dapo_jax.runtime.curves import plot_curves
from dapo_jax.runtime.files import Folder, read, run_folder, write_whole, writing
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.lock import locked
from dapo_jax.runtime.mesh import make_mesh, published_as_it_is
from dapo_jax.runtime.metrics import MetricsLog, read_metrics, timed
from dapo_jax.runtime.profile import Profiler
from dapo_jax.runtime.tracker import Tracker, check_tracker
from dapo_jax.supervised import solution_items, warm_up
from dapo_jax.training import setup
from dapo_jax.training.dynamic_sampling import DrawState, DynamicSampler
from dapo_jax.training.programs import train_programs
from dapo_jax.training.record import Recorder
from dapo_jax.training.setup import Policy
from dapo_jax.training.state import Digests, RunState, RunStore
from dapo_jax.training.step import Trainer
from dapo_jax.types import InputError, Params, Prompt, TrainState

# Options that may change on resume: length, logging and devices, not what is learned.
MAY_CHANGE = tuple(
    """
    dapo.max_generation_batches dapo.on_cap data.allow_change eval. mesh. model.attention_block
    model.remat optim.max_nonfinite_updates optim.rollback_steps reward.allow_change
    reward.environment reward.max_error_fraction reward.memory_mb reward.timeout_s
    reward.workers rollout.decode_slots supervised.save_every train.keep_checkpoints
    train.profile_ train.rows_per_microbatch train.samples_per_step train.save_every
    train.stall_timeout_s train.steps train.tracker
    """.split()
)

_FUNCTION = "reward_function.py"  # in the run folder: a copy of the file of reward.function

_PHASES = ("time/rollout_s", "time/reward_s", "time/old_logprobs_s", "time/update_s")


def train(config: Config, run_dir: Folder, *, quiet: bool = False) -> None:
    """Runs DAPO training with output in `run_dir`, or resumes the run that is there.

    quiet: suppresses progress output.
    """
    config = setup.with_commit(config, run_dir)
    console = make_console(main=multihost.is_main(), quiet=quiet)
    info, bars, algo, section = console.info, console.bars, config.dapo, config.train

    # ---- Input: checked before any device is used ----
    check_tracker(section.tracker, run_dir)
    setup.check_adapters(config.model)
    policy = setup.load_policy(config)
    data = load_data(config, policy, info)
    source = function_source(config.reward.function)
    setup.check_started_alike(config, policy, data.sets, {"the reward function": source})
    mesh = make_mesh(config.mesh)
    setup.check_divides(config, mesh, rows=True, slots=True)
    check_same_run(config, run_dir, source)
    if function_changed(source, run_dir):
        info("reward.function: its file has changed, which reward.allow_change allows")
    check_first_weights(policy, run_dir)
    info(f"policy: {setup.describe(policy, mesh, config.model.lora)}")

    # ---- Programs: each is compiled once per run ----
    lora, dtype = config.model.lora, policy.model.compute_dtype
    model = setup.adapted(policy.model, lora)
    programs = train_programs(model, mesh, algo, config.optim, config.rollout.temperature)
    same = lora is None and published_as_it_is(programs.state.params, mesh, dtype)
    publish = (lambda params: params) if same else programs.publish
    engine = setup.make_engine(config, policy, mesh, setup.train_sampling(config))
    eval_engine = setup.make_engine(config, policy, mesh, eval_sampling(config.eval))

    with (
        # The first two come before the run folder is created: they raise on bad input.
        checked_pool(config.reward, config.data.template, source, data.sets, console) as pool,
        Guard(section.stall_timeout_s) as guard,
        locked(run_dir),
        Checkpoints(run_dir / "checkpoints", keep=section.keep_checkpoints) as checkpoints,
        Profiler(run_dir / "profile", section.profile_start, section.profile_steps) as profiler,
    ):
        check_same_run(config, run_dir, source)  # another job may have started it since
        check_steps(section.steps, max(checkpoints.steps(), default=0), run_dir)
        write_config(config, run_dir, source)

        # ---- Resume or start ----
        stored, may_change = to_dict(config), config.data.allow_change
        digests = data.digests._replace(function=digest_of(source))
        store = RunStore(checkpoints, programs.state, data.prompts, stored, digests, may_change)
        run = RunState(
            DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus),
            draw=DrawState(keep_rate=min(1.0, algo.prompts_per_step / algo.prompts_per_draw)),
        )
        if store.restore(run):
            counts = f"{run.progress.updates} updates, {run.draw.draws} draws"
            info(f"resumed from the checkpoint of {run.where}: {counts}")
        else:
            params = setup.load_params(config, policy, mesh, lora=lora)
            run.state = programs.init_optimizer(params)
            del params  # they are donated

        # ---- Components of the loop ----
        main, begun = multihost.is_main(), run.progress.begun
        tracker = Tracker(
            section.tracker if main else None, run_dir, flatten(stored), console.result
        )
        last = run.progress.step if begun else None
        log = MetricsLog(run_dir, resume_step=last, enabled=main, copy=tracker.send)
        shared = (config.eval, config.reward, config.seed, policy)
        evaluator = Evaluator(*shared, eval_engine, pool, guard)
        sections = (algo, config.reward, config.rollout, config.seed)
        drawing = (engine, data.prompts, data.mixture, policy, pool, guard)
        sampler = DynamicSampler(*drawing, *sections, bars)
        shape = setup.batch_shape(config, mesh)
        trainer = Trainer(programs, publish, algo, config.optim, shape, mesh, guard, bars)
        evaluate = functools.partial(evaluator.evaluate_sets, data.eval_sets, info=info, bars=bars)
        recorder = Recorder(
            run_dir, log, info, store, guard, policy, algo, section, config.eval.every, evaluate
        )

        with tracker, log, store.saving_on_exit(run):
            if run.progress.warmed < config.supervised.updates:
                before = (run.progress.warmed, run.progress.nonfinite)
                warming = warm_up(config, policy, mesh, data.solutions, run.state, info, before)
                reset = programs.init_optimizer
                warm_up_run(run, warming, config.supervised, reset, store, guard)
            if not run.progress.begun:
                trainer.publish_weights(run)
                recorder.begin(run)
            while run.progress.step < section.steps:
                step = run.progress.step + 1
                guard.doing = f"step {step}"
                guard.reach("step")
                profiler.begin(step)
                times = dict.fromkeys(_PHASES, 0.0)
                trace = jax.profiler.StepTraceAnnotation("rollout step", step_num=step)
                with store.rolling_back(run, config.optim.rollback_steps, log, console.result):
                    with timed(times, "time/step_s"), trace:
                        if run.partial is None:  # else a checkpoint holds the groups of this step
                            trainer.publish_weights(run)
                            drawn = sampler.draw(run.weights, run.draw, run.buffer.missing(), times)
                            groups = trainer.score(run, drawn.groups, times)
                            recorder.commit(run, drawn, groups)
                        updates = trainer.update(run, times)
                    recorder.record(run, updates, times)
            checkpoints.wait()

    if multihost.is_main():
        info(f"curves: {plot_curves(run_dir)}")
        done = f"done: {run.progress.step} steps, {run.progress.updates} updates"
        where = f"{run.draw.draws} draws in {run_dir}"
        console.result(f"{done}, {where}{last_accuracies(run_dir)}")


# ---- Data ----


class TrainData(NamedTuple):
    """Training and evaluation data of a run."""

    prompts: list[Prompt]  # without those in evaluation sets
    eval_sets: Mapping[str, Sequence[Prompt]]
    solutions: list[TrainItem]  # for supervised warm-up
    mixture: Mixture  # of the prompts
    digests: Digests  # `function` is not set yet

    @property
    def sets(self) -> dict[str, Sequence[Prompt]]:
        """All prompts, by config key."""
        held_out = {f"eval.sets.{name}": prompts for name, prompts in self.eval_sets.items()}
        return {"data.train": self.prompts} | held_out


def load_data(config: Config, policy: Policy, info: Callable[[str], None]) -> TrainData:
    """Problems, prompts, evaluation sets and solutions. Raises InputError if there are too few."""
    d, wanted, updates = config.data, config.dapo.prompts_per_step, config.supervised.updates
    problems, reports = load_training(d)
    loaded, skipped = make_prompts(problems, policy.tokenizer, d, policy.model.vocab_size)
    counts = "; ".join(report.summary() for report in reports)
    left_out = "".join(f", {n} skipped: {why}" for why, n in skipped.items())
    info(f"problems: {counts}; {len(loaded)} prompts{left_out}")
    eval_sets = load_sets(config.eval, d, policy, info)
    prompts = not_held_out(loaded, eval_sets, info)
    if len(prompts) < wanted:
        held = len(loaded) - len(prompts)
        few = f"{len(prompts)} prompts to train on"
        few += f" ({held} more are in eval.sets)" if held else ""
        raise InputError(
            f"data.train: {few} are fewer than dapo.prompts_per_step {wanted}; give more problems, "
            "or lower it"
        )
    limit = config.rollout.max_response_len
    solutions = solution_items(prompts, policy, limit) if updates else []
    mixture = mix(d.train, [p.problem for p in prompts])
    if several := mixture.summary():
        info(f"mixture: {several}")
    digest = mixture_digest([p.problem for p in prompts], mixture)
    whole = problems_digest(p.problem for p in loaded)
    digests = Digests(whole, digest, tokens_digest(prompts), None)
    return TrainData(prompts, eval_sets, solutions, mixture, digests)


# ---- Parts of the run ----


def warm_up_run(
    run: RunState,
    updates: Iterable[tuple[int, int, TrainState]],
    section: SupervisedSection,
    init_optimizer: Callable[[Params], TrainState],
    store: RunStore,
    guard: Guard,
) -> None:
    """Runs the remaining supervised `updates`, saves checkpoints, then resets the optimizer."""
    for done, skipped, state in updates:
        last = done == section.updates
        run.state = init_optimizer(state.params) if last else state
        run.progress = run.progress._replace(warmed=done, nonfinite=0 if last else skipped)
        guard.reach("warm-up")
        if last or done % section.save_every == 0:
            store.save(run)


def last_accuracies(run_dir: Folder) -> str:
    """The last held-out accuracy of each set, as the end of the final message."""
    last = {key: value for record in read_metrics(run_dir) for key, value in record.items()}
    keys = [key for key in last if key.startswith("eval/") and key.endswith("/avg")]
    shown = [f"{k.split('/')[1]} {last[k]:.3f} ± {last.get(f'{k}_se', 0):.3f}" for k in keys]
    return "".join(f"; {text}" for text in shown)


# ---- Is it the same run? ----


def digest_of(source: str | bytes | None) -> str | None:
    """SHA-256 of the file of reward.function, as stored in checkpoints."""
    content = source.encode() if isinstance(source, str) else source
    return None if content is None else hashlib.sha256(content).hexdigest()


def function_changed(source: str | None, run_dir: Folder) -> bool:
    """Whether the file of reward.function, now `source`, differs from the one of the run."""
    before = digest_of(read(run_dir / _FUNCTION))
    if before is None:
        digests = (newest_host(run_dir / "checkpoints") or {}).get("digests")
        before = digests.get("function") if isinstance(digests, dict) else None
    return None not in (before, source) and before != digest_of(source)


def difference(
    before: Config, now: Config, may_change: tuple[str, ...]
) -> tuple[str, Any, Any] | None:
    """The first key in which two configs differ, except those that start with one of `may_change`,
    with its values before and now.
    """
    a, b = flatten(to_dict(before)), flatten(to_dict(now))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key) and not key.startswith(may_change):
            return key, a.get(key), b.get(key)
    return None


def stored_configs(run_dir: Folder) -> list[Config]:
    """The configs in config.yaml and in the newest checkpoint; either may be missing."""
    stored = setup.stored_config(run_dir)
    host = newest_host(run_dir / "checkpoints") or {}
    found = [] if stored is None else [stored]
    if isinstance(host.get("config"), dict):
        try:
            found.append(config_from_dict(host["config"], f"the newest checkpoint of {run_dir}"))
        except ConfigError:  # keys of an earlier version; a user can edit config.yaml only
            if not found:
                raise
    return found


def check_same_run(config: Config, run_dir: Folder, source: str | None) -> None:
    """Raises ConfigError if the run in the folder has another config, or another `source` of its
    reward function.
    """
    data: tuple[str, ...] = ("data.train",)
    if not config.data.allow_change:  # files may move: digests identify their content
        data = tuple(f"data.train.{n}.path" for n in range(len(config.data.train)))
    for before in stored_configs(run_dir):
        if changed := difference(before, config, MAY_CHANGE + data):
            key, was, now = changed
            raise ConfigError(
                f"{key}: is {now!r}, but {run_dir} was started with {was!r}; use another "
                "--run-dir, or set it back"
            )
    if function_changed(source, run_dir) and not config.reward.allow_change:
        raise ConfigError(
            f"reward.function: {config.reward.function} is not what {run_dir} was started with, "
            f"which is in its {_FUNCTION} or checkpoint; restore the file, or set "
            "reward.allow_change, or use another --run-dir"
        )


def check_first_weights(policy: Policy, run_dir: Folder) -> None:
    """Checks the weights that a new run starts from; a resumed run restores its own.

    Process 0 decides whether the run is new: the check is a collective, and processes that do not
    share the folder (found later, by `locked`) may disagree.
    """
    resumed = multihost.from_main("" if read(run_dir / "config.yaml") is None else "resumed")
    if not resumed and (folder := setup.weights_folder(policy)):
        setup.check_weights(folder)


def check_steps(steps: int, done: int, run_dir: Folder) -> None:
    """Raises ConfigError if the run has already done more than `steps` steps."""
    if steps < done:
        raise ConfigError(
            f"train.steps: is {steps}, but {run_dir} has done {done} steps; set it to {done} or "
            "more, or use another --run-dir"
        )


def write_config(config: Config, run_dir: Folder, source: str | None) -> None:
    """Writes the resolved config and the source of the reward function into the run folder."""
    multihost.sync("the run folder has been read")
    if multihost.is_main():
        with writing(run_dir / "config.yaml"):
            if source is not None:
                write_whole(run_dir / _FUNCTION, source.encode())
            write_whole(run_dir / "config.yaml", dump_yaml(config).encode())


def main(argv: list[str] | None = None) -> int:
    """Trains a policy with DAPO.

    The run folder gets metrics.jsonl, curves.png, config.yaml, checkpoints/, samples/ and
    tensorboard/. Run the same command again to resume from the newest checkpoint.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.train", description=main.__doc__)
    add = parser.add_argument
    fields = "`python -m dapo_jax.config` lists every field"
    add("--config", required=True, help=f"YAML config, e.g. configs/tiny_cpu.yaml; {fields}")
    folder = "folder or gs://bucket/folder of the run, created or resumed"
    add("--run-dir", required=True, help=folder)
    override = "override, e.g. --set optim.learning_rate=1e-5; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    add("--quiet", action="store_true", help="only warnings, errors and the last line")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    run_dir = run_folder(args.run_dir)
    multihost.initialize()
    train(config, run_dir, quiet=args.quiet)
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
