"""Trains a policy with DAPO. `train` is the main loop: read it from top to bottom."""

import functools
from collections.abc import Callable, Sequence

import jax

from dapo_jax import cli
from dapo_jax.config import Config, flatten, load_config, to_dict
from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.inputs import load_data
from dapo_jax.evaluate import Evaluator, checked_pool
from dapo_jax.report import held_checkpoints
from dapo_jax.reward.verify import function_source
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import Checkpoints
from dapo_jax.runtime.console import announced, make_console
from dapo_jax.runtime.curves import curves_at_end
from dapo_jax.runtime.files import Folder, run_folder
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.lock import locked
from dapo_jax.runtime.mesh import is_published_unchanged, make_mesh
from dapo_jax.runtime.metrics import MetricsLog, best_step, last_accuracies, timed
from dapo_jax.runtime.profile import Profiler
from dapo_jax.runtime.same_run import ALLOWED, check_same_run, digest_of, write_config
from dapo_jax.runtime.tracker import Tracker, check_tracker
from dapo_jax.supervised import solution_items, warm_up, warm_up_run
from dapo_jax.training import setup
from dapo_jax.training.dynamic_sampling import DrawState, DynamicSampler
from dapo_jax.training.programs import TrainPrograms, train_programs
from dapo_jax.training.record import Recorder
from dapo_jax.training.state import RunState, RunStore
from dapo_jax.training.step import Trainer

_PHASES = ("time/rollout_s", "time/reward_s", "time/old_logprobs_s", "time/update_s")


def train(
    config: Config, run_dir: Folder, *, quiet: bool = False, allow: Sequence[str] = ()
) -> None:
    """Runs DAPO training with output in `run_dir`, or resumes the run that is there.

    quiet: suppresses progress output. allow: keys of ALLOWED, which may differ from the run's.
    """
    config = setup.with_commit(config, run_dir)
    console = make_console(main=multihost.is_main(), quiet=quiet)
    info, bars, algo, section = console.info, console.bars, config.dapo, config.train

    # ---- Input: checked before any device is used ----
    check_tracker(section.tracker, run_dir)
    setup.check_adapters(config.model)
    policy = setup.load_policy(config)
    needs = ("dapo.prompts_per_step", algo.prompts_per_step)
    data = load_data(config.data, config.eval, policy.encoding, needs, info)
    solutions = solution_items(config, data.prompts, policy, info)
    source = function_source(config.reward.function)
    setup.check_same_start(config, policy, data.sets, {"the reward function": source})
    mesh = make_mesh(config.mesh)
    setup.check_divides(config, mesh, rows=True, slots=True)
    for remark in check_same_run(config, run_dir, source, allow):
        info(remark)
    setup.check_first_weights(policy, run_dir)
    info(f"policy: {setup.describe(policy, mesh, config.model.lora)}")

    # ---- Programs: each is compiled once per run ----
    lora, int8 = config.model.lora, config.rollout.weights == "int8"
    model = setup.adapted(policy.model, lora)
    programs = train_programs(model, mesh, algo, config.optim, config.rollout.temperature, int8)
    programs = announcing(programs, info)
    same = is_published_unchanged(programs.state.params, mesh, model.compute_dtype)
    publish = (lambda params: params) if same and not (lora or int8) else programs.publish
    also = functools.partial(best_step, run_dir) if section.keep_best else lambda steps: None
    engine = setup.make_engine(config, policy, mesh)
    eval_engine = setup.make_engine(config, policy, mesh, held_out=True)

    with (
        curves_at_end(run_dir, info),
        # The next two come before the run folder is created: they raise on bad input.
        checked_pool(config.reward, config.data.template, source, data.sets, console) as pool,
        Guard(section.stall_timeout_s) as guard,
        locked(run_dir),
        Checkpoints(
            run_dir / "checkpoints", keep=section.keep_checkpoints, keep_also=also
        ) as checkpoints,
        Profiler(run_dir / "profile", section.profile_start, section.profile_steps) as profiler,
    ):
        check_same_run(config, run_dir, source, allow)  # another job may have started it since
        write_config(config, run_dir, source, done=max(checkpoints.steps(), default=0))

        # ---- Resume or start ----
        stored, may_change = to_dict(config), "data.train" in allow
        digests = data.digests._replace(function=digest_of(source))
        store = RunStore(checkpoints, programs.state, data.prompts, stored, digests, may_change)
        run = RunState(
            DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus),
            draw=DrawState(keep_rate=min(1.0, algo.prompts_per_step / algo.prompts_per_draw)),
        )
        if store.restore(run):
            info(store.resumed(run))
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
        draw = announced("sampling", DynamicSampler(*drawing, *sections, bars).draw, info)
        shape = setup.batch_shape(config, mesh)
        trainer = Trainer(programs, publish, algo, config.optim, shape, mesh, guard, bars)
        evaluate = functools.partial(evaluator.evaluate_sets, data.eval_sets, info=info, bars=bars)
        evaluate = announced("evaluation", evaluate, info)
        every, exact = config.eval.every, programs.publish_exact
        recording = (run_dir, log, info, store, guard, policy, algo, section, every)
        recorder = Recorder(*recording, evaluate, exact)

        with tracker, log, store.saving_on_exit(run):
            if run.progress.warmed < config.supervised.updates:
                before = (run.progress.warmed, run.progress.nonfinite)
                warming = warm_up(config, policy, mesh, solutions, run.state, console, before)
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
                            drawn = draw(run.weights, run.draw, run.buffer.missing(), times)
                            groups = trainer.score(run, drawn.groups, times)
                            recorder.commit(run, drawn, groups)
                        updates = trainer.update(run, times)
                    recorder.record(run, updates, times)
            checkpoints.wait()
            kept = checkpoints.steps()  # on every process

    if multihost.is_main():
        counts = f"{run.progress.step} steps, {run.progress.updates} updates, {run.draw.draws}"
        console.result(f"done: {counts} draws in {run_dir}{last_accuracies(run_dir)}")
        info(f"checkpoints: steps {held_checkpoints(run_dir, kept)}")


def announcing(programs: TrainPrograms, info: Callable[[str], None]) -> TrainPrograms:
    """The programs, which say so when they are compiled."""
    scored = announced("log-probs", programs.old_logprobs, info)
    return programs._replace(update=announced("update", programs.update, info), old_logprobs=scored)


def main(argv: list[str] | None = None) -> int:
    """Trains a policy with DAPO.

    The run folder gets metrics.jsonl, curves.png, config.yaml, checkpoints/, samples/ and
    tensorboard/. Run the same command again to resume from the newest checkpoint.
    """
    examples = (
        "--config configs/tiny_cpu.yaml --run-dir runs/tiny",
        "--config configs/tiny_cpu.yaml --run-dir runs/b --set optim.learning_rate=1e-4",
    )
    parser = cli.parser("train", main.__doc__, *examples)
    add = parser.add_argument
    text = ", e.g. configs/tiny_cpu.yaml; `python -m dapo_jax.config` lists every field"
    said = "warnings, errors and the last line"
    cli.add_config(parser, text, "optim.learning_rate=1e-5", said, required=True)
    folder = "folder or gs://bucket/folder of the run, created or resumed"
    add("--run-dir", required=True, help=folder)
    text = (
        "resume although this has changed: optim (learning rate, weight decay, clip bounds), "
        "data.train (its order starts over), reward.function (its file); may be repeated"
    )
    add("--allow-change", action="append", default=[], choices=ALLOWED, help=text)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    run_dir = run_folder(args.run_dir)
    multihost.initialize()
    train(config, run_dir, quiet=args.quiet, allow=args.allow_change)
    return 0


if __name__ == "__main__":
    cli.run(main)
