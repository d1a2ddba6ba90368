"""Run folders in a bucket: a run on gs:// is, bit for bit, the run in a local folder.

The bucket is `fake_gcs.py`.
"""

import json
import os
import subprocess
import sys
import threading
import time

import faults
import jax
import pytest
from refusals import line_of, names, refusal
from runs import run_train, steady, verb
from states import GROUPS, HOST, abstract, bits, make_state

from dapo_jax import evaluate, export
from dapo_jax.runtime import files, lock, multihost
from dapo_jax.runtime.checkpoint import Checkpoints, restore_params
from dapo_jax.runtime.files import AppendFile, as_path, run_folder
from dapo_jax.runtime.lock import locked
from dapo_jax.runtime.metrics import MetricsLog, read_metrics
from dapo_jax.runtime.profile import Profiler
from dapo_jax.types import InputError, RunError

pytestmark = [pytest.mark.bucket, pytest.mark.usefixtures("reward_module")]

RUN = "gs://bucket/deep/run"


def damage(bucket, prefix):
    """Inverts the largest object: a single bit of it may be of no use to anybody."""
    name = max(bucket.names(prefix), key=lambda name: len(bucket[name]))
    bucket.put(name, bytes(byte ^ 0xFF for byte in bucket[name]))


def test_a_run_in_a_bucket_is_the_run_in_a_folder(
    bucket, config, tmp_path, monkeypatch, capfd, curves
):
    """Stopped in the midst of step 2, resumed, evaluated, exported; then an object of its newest
    checkpoint is damaged.
    """
    monkeypatch.chdir(tmp_path)
    settings = ("train.steps=2", "train.save_every=1", "supervised.updates=0")
    assert run_train(config, "local", *settings) == 0
    faults.inject("update:4=term", monkeypatch.setattr)
    assert run_train(config, RUN, *settings) == 143
    assert bucket.names("deep/run/checkpoints/1.1/host/metadata") and not bucket.names(
        "deep/run/lock"
    )
    faults.inject("", monkeypatch.setattr)
    assert run_train(config, RUN, *settings) == 0
    assert (
        "resumed from the checkpoint of step 1 and 1 updates of the next" in capfd.readouterr().out
    )
    assert steady(RUN) == steady("local") and len(steady(RUN)) == 3

    for run, out in (("local", "one"), (RUN, "other")):
        assert verb(evaluate, "--config", config, "--run-dir", run, "--json", f"{out}.json") == 0
        assert verb(export, "--run-dir", run, "--out", out) == 0
    assert (tmp_path / "one.json").read_text() == (tmp_path / "other.json").read_text()
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "other/model.safetensors"
    ).read_bytes()

    parts = {name.split("/")[2] for name in bucket.names("deep/run/")}
    assert parts == {p.name for p in (tmp_path / "local").iterdir()} - {"lock"}
    steps = {name.split("/")[3] for name in bucket.names("deep/run/checkpoints/")}
    assert steps == {"1", "2"} == {p.name for p in (tmp_path / "local/checkpoints").iterdir()}
    assert bucket["deep/run/config.yaml"] == (tmp_path / "local/config.yaml").read_bytes()
    assert (
        bucket["deep/run/samples/step_000002.jsonl"]
        == (tmp_path / "local/samples/step_000002.jsonl").read_bytes()
    )
    assert (
        bucket["deep/run/curves.png"].startswith(b"\x89PNG")
        and len(bucket["deep/run/curves.png"]) > 10_000
    )
    assert (
        b"".join(bucket[name] for name in bucket.names("deep/run/tensorboard/")).count(
            b"reward/mean"
        )
        == 2
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "tiny.yaml",
        "local",
        "one",
        "other",
        "one.json",
        "other.json",
    }  # no folder `gs:`

    damage(bucket, "deep/run/checkpoints/2/params/")
    assert verb(evaluate, "--config", config, "--run-dir", RUN, "--json", "before.json") == 0
    assert f"{RUN}/checkpoints/2: checkpoint not used" in capfd.readouterr().err
    assert json.loads((tmp_path / "before.json").read_text())["step"] == 1


def test_only_whole_steps_count_and_what_is_no_step_stays(empty, capsys):
    """A step in a bucket has its name from the start: orbax's last object marks it as complete.

    Other folders are none of its business.
    """
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_state(0).params)
    with Checkpoints("gs://bucket/c", keep=9) as checkpoints:
        checkpoints.save(3, make_state(3), HOST, GROUPS)
    for name in empty.names("c/3/"):
        if name != "c/3/commit_success.txt":
            empty.put(name.replace("c/3/", "c/4/"), empty[name])
    empty.put("c/bad-9/host/metadata", b"{}")
    assert bits(restore_params("gs://bucket/c", target)[1]) == bits(make_state(3).params)
    assert "gs://bucket/c/4: checkpoint not used: incomplete" in capsys.readouterr().err
    with Checkpoints("gs://bucket/c", keep=9) as checkpoints:
        checkpoints.save(3, make_state(7), HOST, GROUPS, partial=True)
    assert not empty.names("c/4/")
    with Checkpoints("gs://bucket/c", keep=2) as checkpoints:
        back = checkpoints.restore(abstract(make_state(0)))
        assert back.step == 3 and bits(back.state) == bits(make_state(7))
        for step in (4, 5):
            checkpoints.save(step, make_state(step), HOST, GROUPS)
        checkpoints.wait()
        assert bits(checkpoints.restore(abstract(make_state(0))).state) == bits(make_state(5))
        assert {name.split("/")[1] for name in empty.names("c/")} == {"4", "5", "bad-9"}
        damage(empty, "c/5/params/")
        damaged = empty.names("c/5/")
        assert bits(checkpoints.restore(abstract(make_state(0))).state) == bits(
            make_state(4)
        ) and checkpoints.steps() == [4]
        checkpoints.save(5, make_state(5), HOST, GROUPS)
    assert "gs://bucket/c/5: moved to bad-5; the run resumes from step 4" in capsys.readouterr().err
    assert {name.split("/")[1] for name in empty.names("c/")} == {"4", "5", "bad-5", "bad-9"}
    assert [name.replace("c/bad-5/", "c/5/") for name in empty.names("c/bad-5/")] == damaged


def test_a_bucket_that_does_not_answer_is_not_an_empty_one(empty):
    """A run that took a silent bucket for an empty one would start over and truncate its metrics."""
    with Checkpoints("gs://bucket/c", keep=9) as checkpoints:
        checkpoints.save(3, make_state(3), HOST, GROUPS)
        checkpoints.wait()
        for empty.failing in (403, 503):
            with pytest.raises(RunError, match="gs://bucket/c: cannot be listed"):
                checkpoints.restore(abstract(make_state(0)))
        empty.fails_at = "c/3/host/metadata"
        with pytest.raises(RunError, match="gs://bucket/c/3/host/metadata: cannot be read"):
            checkpoints.restore(abstract(make_state(0)))
        empty.failing = 0
        assert checkpoints.restore(abstract(make_state(0))).step == 3
    empty.failing, empty.fails_at = 503, ""
    for call in (
        lambda: Checkpoints("gs://bucket/c", keep=9),
        lambda: MetricsLog("gs://bucket"),
        lambda: run_folder(RUN),
    ):
        with pytest.raises((InputError, RunError)) as e:
            call()
        assert "\n" not in str(e.value) and "made to fail" in str(e.value)
    empty.failing = 0
    assert empty.names("c/3/host/metadata")


def test_metrics_are_whole_after_every_line_and_cut_on_resume(empty):
    for begin, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with MetricsLog("gs://bucket/m", resume_step=begin) as log:
            for step in steps:
                log.write(step, 0, 0, {"reward/mean": step / 7})
                assert read_metrics("gs://bucket/m")[-1] == {
                    "step": step,
                    "updates": 0,
                    "draws": 0,
                    "reward/mean": step / 7,
                }
                assert empty.names("m/tensorboard/")
            if begin is None:
                log.rollback(1)
                log.write(2, 0, 0, {"reward/mean": 0.5})
    assert [record["step"] for record in read_metrics("gs://bucket/m")] == [1, 2, 3, 4]
    assert {name.split("/")[1] for name in empty.names("m/")} == {"metrics.jsonl", "tensorboard"}


def test_a_trace_goes_to_the_bucket(empty, capsys):
    with Profiler(as_path("gs://bucket/p"), 2, 1) as profiler:
        for step in (1, 2, 3):
            profiler.begin(step)
            assert not empty.names() or step == 3
    assert any(name.endswith(".xplane.pb") for name in empty.names("p/plugins/profile/"))
    with Profiler(as_path("gs://bucket/p"), 1, 1) as profiler:
        profiler.begin(1)
        empty.failing = 403
    assert "gs://bucket/p: the trace could not be sent (Forbidden" in capsys.readouterr().err


def test_a_file_that_grows_is_the_same_in_a_bucket(empty, tmp_path):
    for path in (as_path("gs://bucket/g/lines"), tmp_path / "g" / "lines"):
        lines = AppendFile(path, b"one\n")
        lines.add(b"two\n")
        assert files.read(path) == b"one\ntwo\n"
        lines.close()


def test_what_other_hosts_write_is_seen(empty):
    path = as_path("gs://bucket/h")
    for count in (1, 2, 3):
        empty.put(f"h/{count}", b"x" * count)
        assert [p.name for p in path.iterdir()] == ["1", "2", "3"][:count]
        empty.put("h/1", b"y" * count)
        assert files.read(path / "1") == b"y" * count


def test_one_job_at_a_time_and_what_is_left_of_a_dead_one_is_taken_over(empty, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_BEAT_S", 0.1)
    monkeypatch.setattr(lock, "_LEASE_S", 1.0)
    run = as_path(RUN)
    with locked(run):
        assert b"process" in empty["deep/run/lock"]
        with refusal(f"{RUN}: is in use by process {os.getpid()} on "), locked(run):
            pass
        assert empty.names("deep/run/lock")
    assert not empty.names()
    empty.put("deep/run/lock", b"process 1 on gone\nabc\n17\n")
    began = time.monotonic()
    with locked(run):
        assert (
            time.monotonic() - began >= 1.0
            and f"process {os.getpid()} ".encode() in empty["deep/run/lock"]
        )
    assert not empty.names() and "held by process 1 on gone; waiting 1 s" in capsys.readouterr().err


def test_a_job_whose_folder_was_taken_over_leaves(empty, monkeypatch, capsys):
    left = []

    def leave(status):
        left.append(status)
        threading.Event().wait()

    monkeypatch.setattr(lock, "_BEAT_S", 0.1)
    monkeypatch.setattr(multihost, "leave", leave)
    with locked(as_path(RUN)):
        empty.put("deep/run/lock", b"process 1 on another\nabc\n")
        deadline = time.monotonic() + 10
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
    assert left == [2] and empty["deep/run/lock"] == b"process 1 on another\nabc\n"
    assert "another job has taken this run over" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where, said",
    {
        "s3://bucket/run": "(not gs://)",
        "gs://bucket": "gs://bucket/name",
        "gs:///run": "gs://bucket/name",
        "gs://bucket/a?b": "gs://bucket/name",
        "gs://other/run": "(404 GET ",
    }.items(),
)
def test_what_cannot_be_a_run_folder_is_one_line_and_status_2(empty, config, capfd, where, said):
    assert run_train(config, where) == 2
    assert names(line_of(capfd)[0], f"{where}: ...run folder ...{said}")
    assert not empty.names()


def test_a_bucket_that_orbax_may_not_ask_for_is_refused_at_the_start(empty):
    empty.failing, empty.fails_at = 403, "/b/bucket?"
    with refusal(f"{RUN}: ...run folder (403 ...made to fail...storage.buckets.get"):
        run_folder(RUN)


def test_without_network_it_is_one_line_and_status_2(empty, config, monkeypatch, capfd):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    for command in (
        lambda: run_train(config, RUN),
        lambda: verb(export, "--run-dir", RUN, "--out", "gone"),
    ):
        assert command() == 2
        said, _ = line_of(capfd)
        assert names(said, f'{RUN}: ...run folder (...pip install "etils[epath-gcs]"')


def test_without_gcsfs_it_is_one_line():
    code = "import sys; sys.modules['gcsfs'] = None; from dapo_jax.runtime import files; "
    code += f"files.run_folder({RUN!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"EPATH_USE_TF": "false"},
    )
    last = done.stderr.splitlines()[-1].removeprefix("dapo_jax.types.InputError: ")
    assert names(last, f'{RUN}: ...run folder (...pip install "etils[epath-gcs]"')


def test_export_goes_to_a_local_folder(capfd, tmp_path):
    assert verb(export, "--run-dir", tmp_path, "--out", RUN) == 2
    assert names(line_of(capfd)[0], f"{RUN}: ...local folder")
