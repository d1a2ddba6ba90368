"""What a run survives: signals in every phase, hangs, non-finite updates, a second job on
its folder.

The reference is a run that nothing happened to: metrics are compared line by line, weights and
optimizer by their digests.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import in_process
import jax
import numpy as np
import pytest
from refusals import line_of, names, refusal
from runs import CONFIG, TESTS, record, run_train, steady, verb

from dapo_jax import supervised
from dapo_jax.config import load_config
from dapo_jax.rollout.engine import Engine
from dapo_jax.runtime import lock, same_run
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.training import step as training_step
from dapo_jax.types import Stopped

pytestmark = pytest.mark.usefixtures("reward_module")

STEPS = "train.steps=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run of 2 steps that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        assert run_train(config, run, STEPS) == 0
    return run


# Signals that one run gets, one after the other: where, and where the run then stands.
STOPS = (
    ("warm-up:1=term", "1 updates of warm-up"),
    ("eval:1=int", "2 updates of warm-up"),  # the evaluation before training
    ("rollout:1=term", "step 0"),
    ("reward:1=int", "step 0"),
    ("score:2=term", "step 0"),
    ("update:1=term", "step 0 and 0 updates of the next"),
    ("update:2=int", "step 0 and 1 updates of the next"),
    ("step:2=term", "step 1"),
    ("rollout:1=int", "step 1"),
    ("update:2=term", "step 1 and 1 updates of the next"),
    ("eval:2=term", "step 1 and 2 updates of the next"),
    ("save:1=term", "step 2"),
)


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([STOPS[n] for n in (1, 3, 6, 7, 10)], id="five"),
        pytest.param(STOPS, id="all", marks=pytest.mark.slow),
    ],
)
def test_signals_in_every_phase_lose_nothing(config, whole, tmp_path, monkeypatch, capfd, stops):
    """One run, stopped at each of these places and started again: its lines, weights and buffered
    groups are those of a whole run.
    """
    run = tmp_path / "run"
    for stop, stands in stops:
        faults.inject(stop, monkeypatch.setattr)
        number = signal.SIGINT if stop.endswith("int") else signal.SIGTERM
        assert run_train(config, run, STEPS) == 128 + number, stop
        assert (
            f"{number.name}: saved a checkpoint after {stands}; run the same command again"
            in capfd.readouterr().err
        ), stop
    faults.inject("", monkeypatch.setattr)
    assert run_train(config, run, STEPS) == 0
    assert steady(run) == steady(whole)
    for step in (1, 2):
        assert (run / f"samples/step_00000{step}.jsonl").read_bytes() == (
            whole / f"samples/step_00000{step}.jsonl"
        ).read_bytes()
    assert {key: record(run, 2)[key] for key in ("leaves", "groups")} == {
        key: record(whole, 2)[key] for key in ("leaves", "groups")
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"0", "1", "2"}


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_the_watchdog_ends_a_run_that_hangs(tmp_path):
    """Two guards in processes of their own: one gets a second signal before its next place, one
    reaches no place any more.
    """
    script = """
import os, signal, sys, time
from dapo_jax.runtime.guard import Guard
with Guard(float(sys.argv[1])) as guard:
    guard.doing = "step 7"
    guard.reach("update")
    print("reached", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}

    def start(timeout_s):
        command = [sys.executable, "-c", script, str(timeout_s)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "reached\n"
        return process

    signalled, hanging = start(60), start(1)
    signalled.terminate()
    assert "SIGTERM: saving a checkpoint" in (
        signalled.stderr.readline() + signalled.stderr.readline()
    )
    assert signalled.poll() is None  # the first signal waits for the next place
    signalled.terminate()
    assert (
        signalled.wait(timeout=10) == 143
        and "again: exiting without saving" in signalled.stderr.read()
    )
    said = hanging.communicate(timeout=20)[1]
    assert hanging.returncode == 1
    assert (
        "no progress for 1 s in step 7" in said
        and "time.sleep(60)" not in said
        and 'File "<string>", line 8' in said
    )


def test_a_guard_leaves_signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with Guard(None) as guard:
        assert signal.getsignal(signal.SIGTERM) == before  # there is nothing to save yet
        guard.reach("step")
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            guard.wait(
                lambda seconds: time.sleep(seconds) or False, "reward"
            )  # what is waited for never comes
    assert stopped.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before


def test_a_run_folder_without_its_config_is_compared_with_its_checkpoint(
    whole, config, tmp_path, capfd, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "config.yaml").unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert run_train(config, run, STEPS, "optim.learning_rate=5e-4") == 2
    assert names(line_of(capfd)[0], f"optim.learning_rate: ...0.0005, ...{run} ...0.001")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert run_train(config, run, STEPS) == 0
    mine, allow = load_config(config), ["reward.function"]
    changed = functools.partial(same_run.check_same_run, mine, tmp_path, allow=allow)
    for digests, found in (
        ({"function": same_run.digest_of("before")}, [False, True, False]),
        (["forged"], [False, False, False]),
    ):
        monkeypatch.setattr(same_run, "newest_host", lambda folder, d=digests: {"digests": d})
        assert [bool(changed(source)) for source in ("before", "now", None)] == found


def test_a_run_of_an_earlier_version_is_resumed_once_its_config_is_edited(config, tmp_path):
    """Its newest checkpoint holds the old keys too, and nobody can edit that: its digest would not
    match.
    """
    old = {"data": {"train": "arithmetic", "columns": {"arithmetic": {"prompt": "p"}}}}
    with refusal(f"...newest checkpoint of {tmp_path}: data.columns: "):
        same_run.stored_configs(tmp_path, {"config": old})
    (tmp_path / "config.yaml").write_text(config.read_text())
    assert [found.train.steps for found in same_run.stored_configs(tmp_path, {"config": old})] == [
        4
    ]


@pytest.mark.parametrize(
    "make",
    [Path.symlink_to, Path.hardlink_to, lambda lock, target: os.mkfifo(lock)],
    ids=["link", "hard link", "pipe"],
)
def test_a_link_for_a_lock_is_not_followed(tmp_path, make):
    target, path = tmp_path / "mine", tmp_path / "run" / "lock"
    target.write_text("mine")
    path.parent.mkdir()
    make(path, target)
    with (
        refusal(f"{path}: ...not a regular file"),
        lock.locked(tmp_path / "run"),
    ):
        pass
    assert target.read_text() == "mine"


def test_a_shared_folder_that_a_client_has_looked_for_too_early_is_found(tmp_path, monkeypatch):
    """An NFS client that has not found a folder says so again, for up to a minute, until the one
    above is opened (simulated).
    """
    shown, scandir = set(), os.scandir

    def opened(path):
        shown.add(Path(path))
        return scandir(path)

    monkeypatch.setattr(lock.os, "scandir", opened)
    monkeypatch.setattr(lock, "read", lambda path: b"mine" if {*path.parents} <= shown else None)
    monkeypatch.setattr(lock, "_SHOWN_S", 0.1)
    (tmp_path / "run").mkdir()
    assert lock._shows(tmp_path / "run" / "lock", b"mine")


def test_two_jobs_on_one_run_folder(whole, config, capfd):
    before = {file: file.read_bytes() for file in whole.rglob("*.json*")}
    with lock.locked(whole):
        assert run_train(config, whole, "train.steps=3") == 2
        assert f"{whole}: is in use by process {os.getpid()} on " in capfd.readouterr().err
        assert {file: file.read_bytes() for file in whole.rglob("*.json*")} == before
    with lock.locked(whole):  # the one before has let go
        pass


def poison(monkeypatch, draws):
    """Makes the loss of every mini-batch that holds one of the draws not a number."""
    plain = training_step.minibatches

    def poisoned(groups, algo, *args):
        size = algo.responses_per_update // algo.responses_per_prompt
        for n, (batch, stats) in enumerate(plain(groups, algo, *args)):
            bad = any(group.draw in draws for group in groups[n * size : (n + 1) * size])
            yield (
                (batch._replace(weight=batch.weight * np.float32(np.nan)) if bad else batch),
                stats,
            )

    monkeypatch.setattr(training_step, "minibatches", poisoned)


QUICK = ("supervised.updates=0", "eval.every=0", "train.save_every=1", "train.steps=3")


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_then_end_the_run_or_take_it_back(
    config, tmp_path, monkeypatch, capfd
):
    """The draws of step 2 poison its loss.

    The parameters stay those of step 1; with a rollback, other draws take their place. A signal
    right after it loses nothing of that.
    """
    good, bad, back = (tmp_path / name for name in ("good", "bad", "back"))
    assert run_train(config, good, *QUICK) == 0
    ends = [line["draws"] for line in read_metrics(good)]
    poison(monkeypatch, range(ends[0], ends[1]))

    assert run_train(config, bad, *QUICK) == 2
    assert "step 2: 2 updates in a row had a non-finite loss or gradient" in capfd.readouterr().err
    assert steady(bad) == steady(good)[:1]
    assert [p.name for p in (bad / "checkpoints").iterdir()] == ["1"] and record(bad, 1)[
        "leaves"
    ] == record(good, 1)["leaves"]

    assert (
        run_train(config, back, *QUICK, "optim.rollback_steps=1") == 2
    )  # step 2 has no checkpoint one step back
    assert "no checkpoint 1 steps back" in capfd.readouterr().err
    poison(monkeypatch, range(0))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(TESTS))
    poison(monkeypatch, range(ends[1], ends[2]))
    faults.inject("step:3=term", monkeypatch.setattr)  # the first is step 2, the second step 3
    assert run_train(config, back, *QUICK, "optim.rollback_steps=1") == 143
    assert "rolled back to step 1, skipping the prompts drawn since" in capfd.readouterr().out
    faults.inject("", monkeypatch.setattr)
    assert run_train(config, back, *QUICK, "optim.rollback_steps=1") == 0
    assert "rolled back" not in capfd.readouterr().out
    lines = read_metrics(back)
    assert [line["step"] for line in lines] == [1, 2, 3] and [
        line["optim/rollbacks"] for line in lines
    ] == [0, 1, 1]
    assert (
        lines[0]["draws"] == ends[0] and lines[1]["draws"] - lines[1]["rollout/prompts"] >= ends[2]
    )
    assert all(
        leaf["finite"] for leaves in record(back, 3)["leaves"].values() for leaf in leaves.values()
    )
    assert any(p.name.startswith("bad-2") for p in (back / "checkpoints").iterdir())


@pytest.mark.slow
def test_sampling_from_non_finite_weights_keeps_nothing_of_the_step(
    config, tmp_path, monkeypatch, capfd
):
    """Weights that are lost on their way to the sampler in step 3: once and again, and the run
    ends; once, and the run rolls back.
    """
    run, plain, times = tmp_path / "run", Engine.stream, 10

    def stream(engine, params, seed):
        nonlocal times
        times -= 1
        return plain(
            engine, jax.tree.map(lambda p: p * np.inf, params) if times >= 0 else params, seed
        )

    assert run_train(config, run, *QUICK, "train.steps=2") == 0
    before = {
        file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    }
    monkeypatch.setattr(Engine, "stream", stream)
    capfd.readouterr()
    assert run_train(config, run, *QUICK) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line.startswith("dapo_jax: step 3: sampling: draw ")
        and "weights are (embed/embedding)" in line
        and "rollback_steps" in line
    )
    assert {
        file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    } == before
    assert [line["step"] for line in read_metrics(run)] == [1, 2] and not (
        run / "samples/step_000003.jsonl"
    ).exists()
    draws = read_metrics(run)[-1]["draws"]
    times = 1
    assert run_train(config, run, *QUICK, "optim.rollback_steps=1") == 0
    assert "rolled back to step 1" in capfd.readouterr().out
    lines = read_metrics(run)
    assert [line["optim/rollbacks"] for line in lines] == [0, 1, 1] and lines[1]["draws"] - lines[
        1
    ]["rollout/prompts"] == draws


@pytest.mark.slow
def test_warm_up_whose_updates_are_not_finite_ends_the_run_and_the_verb(
    config, tmp_path, monkeypatch, capfd
):
    """At such a rate the first update ruins the weights, and all others are skipped: two in a row,
    also with a stop between them.
    """
    rates = ("supervised.updates=5", "supervised.learning_rate=1e15", "supervised.warmup_updates=0")
    faults.inject("warm-up:2=term", monkeypatch.setattr)
    assert run_train(config, tmp_path / "run", *rates) == 143
    faults.inject("", monkeypatch.setattr)
    for _ in range(2):  # nothing of it is saved: the same again
        assert run_train(config, tmp_path / "run", *rates) == 2
        said = [line for line in capfd.readouterr().err.splitlines() if "non-finite" in line]
        assert len(said) == 1 and said[0].startswith(
            "dapo_jax: warm-up update 3: 2 updates in a row had a non-finite loss or gradient"
        )
    assert not read_metrics(tmp_path / "run")
    settings = [x for rate in rates for x in ("--set", rate)]
    assert verb(supervised, "--config", config, "--out", tmp_path / "out", *settings) == 2
    assert (
        "warm-up update 3: 2 updates in a row" in capfd.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_one_skipped_update_leaves_parameters_as_they_are(config, tmp_path, monkeypatch):
    """Every update of the run is skipped, but never so many in a row that it ends."""
    poison(monkeypatch, range(10**6))
    assert run_train(config, tmp_path / "run", *QUICK, "optim.max_nonfinite_updates=100") == 0
    params = [record(tmp_path / "run", step)["leaves"] for step in (1, 3)]
    assert params[0] == params[1]
    lines = read_metrics(tmp_path / "run")
    assert [line["optim/skipped_updates"] for line in lines] == [2, 2, 2] and lines[-1][
        "updates"
    ] == 0
    assert (
        record(tmp_path / "run", 3)["host"]["progress"]["nonfinite"] == 6
    )  # skipped in a row, over three steps


def test_at_learning_rate_0_nothing_changes_and_sampler_and_trainer_stay_together(config, tmp_path):
    assert (
        run_train(
            config, tmp_path / "run", *QUICK, "optim.learning_rate=0", "dapo.old_logprobs=recompute"
        )
        == 0
    )
    assert (
        record(tmp_path / "run", 1)["leaves"]["params"]
        == record(tmp_path / "run", 3)["leaves"]["params"]
    )
    gaps = [line["policy/sampler_gap_mean"] for line in read_metrics(tmp_path / "run")]
    assert max(gaps) < 2e-7  # measured 4e-8
    assert all(abs(line["policy/approx_kl"]) < 1e-9 for line in read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_epochs_end_within_steps_and_a_changed_data_set_is_refused(config, tmp_path, capfd):
    """Seven problems: every step goes through more than an epoch.

    Stopped after step 1, then with other problems under the same name.
    """
    data = tmp_path / "few.jsonl"
    rows = [json.dumps({"prompt": f"{n}+{n}", "answer": str(2 * n)}) + "\n" for n in range(1, 9)]
    data.write_text("".join(rows[:7]))
    few = (*QUICK, f"data.train={data}", "train.steps=2")
    assert run_train(config, tmp_path / "whole", *few) == 0
    assert run_train(config, tmp_path / "cut", *few, "train.steps=1") == 0
    assert run_train(config, tmp_path / "cut", *few) == 0
    assert steady(tmp_path / "cut") == steady(tmp_path / "whole")
    assert read_metrics(tmp_path / "cut")[-1]["draws"] > 7  # more than an epoch

    capfd.readouterr()
    (tmp_path / "held.jsonl").write_text(rows[0])
    assert (
        run_train(
            config,
            tmp_path / "cut",
            *few,
            "train.steps=3",
            f"eval.sets={{held: {tmp_path / 'held.jsonl'}}}",
        )
        == 2
    )
    assert names(line_of(capfd)[0], "eval.sets: ...data.train ...evaluate")

    data.write_text("".join(rows))
    assert run_train(config, tmp_path / "cut", *few, "train.steps=3") == 2
    assert names(line_of(capfd)[0], "data.train: ...not the data set")
    assert run_train(config, tmp_path / "cut", *few, "train.steps=3", allow="data.train") == 0
    last = read_metrics(tmp_path / "cut")[-1]
    assert last["step"] == 3 and last["filter/carried_groups"] == 0
    assert last["draws"] == steady(tmp_path / "cut")[-2]["draws"] + last["rollout/prompts"]


@pytest.mark.slow
def test_a_run_resumes_on_other_devices_with_the_rows_and_slots_that_fit_them(
    config, whole, tmp_path, monkeypatch
):
    """The first step on eight devices, twice as many row shards and heads over two, then on two as
    the run that nothing happened to: alike but for rounding. The slots change no draw here;
    `test_dynamic_sampling.py -k slots` is where they do.
    """
    monkeypatch.setattr(in_process, "DEVICES", 8)
    shards = (
        "mesh.fsdp=4",
        "mesh.tensor=2",
        "train.rows_per_microbatch=4",
        "rollout.decode_slots=16",
    )
    assert (
        run_train(
            config,
            tmp_path / "run",
            *shards,
            "model.remat=full",
            "model.attention_block=16",
            "train.steps=1",
        )
        == 0
    )
    monkeypatch.setattr(in_process, "DEVICES", 2)
    assert run_train(config, tmp_path / "run", STEPS) == 0
    for found, expected in zip(steady(tmp_path / "run"), steady(whole), strict=True):
        expected.pop("rollout/decode_steps", None)  # the slots of a shard decide them
        texts = {key: expected.pop(key) for key in list(expected) if isinstance(expected[key], str)}
        assert {key: found[key] for key in texts} == texts
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_mixture_resumes_bit_for_bit_wherever_its_files_are_and_only_with_its_weights(
    config, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{n}+{n}", "answer": str(2 * n)}) + "\n" for n in range(10, 20)
        )
    )
    mixture = (
        *QUICK,
        "data.train=[arithmetic, {path: d.jsonl, weight: 2}]",
        "train.steps=2",
        "train.save_every=1",
    )
    assert run_train(config, "whole", *mixture) == 0
    assert (
        "mixture: 33.3% arithmetic (64 prompts, each drawn 0.39 times an epoch), 66.7% d.jsonl (10 prompts"
        in capfd.readouterr().out
    )
    faults.inject("update:4=term", monkeypatch.setattr)
    assert run_train(config, "cut", *mixture) == 143
    capfd.readouterr()
    faults.inject("", monkeypatch.setattr)
    capfd.readouterr()
    assert run_train(config, "cut", *mixture, "data.train.1.weight=3") == 2
    assert names(line_of(capfd)[0], "data.train.1.weight: ...3.0, ...cut ...2.0")
    (tmp_path / "d.jsonl").rename(
        "moved.jsonl"
    )  # the same problems under another name are the same data
    mixture = (
        *QUICK,
        "data.train=[arithmetic, {path: moved.jsonl, weight: 2}]",
        "train.steps=2",
        "train.save_every=1",
    )
    assert (
        run_train(
            config,
            "cut",
            *mixture,
            "eval.sets={all: moved.jsonl}",
            "eval.max_problems=1",
            allow="data.train",
        )
        == 2
    )
    assert names(line_of(capfd)[0], "eval.sets: ...in the middle of step 2")
    assert run_train(config, "cut", *mixture) == 0
    assert (
        steady("cut") == steady("whole")
        and record(tmp_path / "cut", 2)["leaves"] == record(tmp_path / "whole", 2)["leaves"]
    )


@pytest.mark.slow
def test_a_trace_of_some_steps(config, tmp_path):
    assert run_train(config, tmp_path / "run", *QUICK, "train.profile_start=2") == 0
    traces = list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"rollout step" in traces[0].read_bytes()
