"""Failures injected at every step of every road: network, quota, a full disk, a lost host, a slice
that is taken away. Which exit status and message follow, what is tried again, and that the same
command goes on afterwards.
"""

import re
import shutil
import subprocess

import pytest
from pods import (
    ACTIVE,
    NETWORK,
    QUOTA,
    ROADS,
    pytestmark,  # noqa: F401
)

LOST = "ERROR: (gcloud) [/usr/bin/ssh] exited with return code [255]: Connection timed out"
ONE_BY_ONE = ("create", "sync", "setup", "run", "logs", "status", "stop", "delete", "launch")

# ---- Your machine's side: each call of gcloud and kubectl fails once ---------------------------------------------------


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("script", ONE_BY_ONE)
def test_any_step_may_fail_and_the_same_command_goes_on(pod, road, script):
    if (script, road) == ("setup", "gke"):
        pytest.skip("pods set themselves up")
    pod.settings(**ROADS[road])
    pod.state("NONE" if script in ("create", "launch") else ACTIVE[road])
    pod(script)
    steps = [" ".join(call) for call in pod.calls()]
    assert steps
    for at, step in enumerate(steps, start=1):
        pod.clear()
        message = QUOTA if " create " in step else LOST if " ssh " in step else NETWORK
        # VMs of a group are reached at the same time: no order of calls.
        pod.fail(step.partition(" --")[0] if "compute ssh" in step else f"#{at}", message)
        if script == "status" and "storage cat" in step:  # shows the workers all the same
            assert f"cannot be read: {message}" in pod(script).stderr
        else:
            assert message in pod(script, rc=1).stderr
            assert len(pod.calls()) < at + (2 if "compute ssh" in step else 1)
        pod.mend()
        pod(script)
    if script == "launch":
        assert (pod.fake / ("jobset.yaml" if road == "gke" else "startup-script")).exists()


@pytest.mark.parametrize("script", ["run", "stop", "status", "setup"])
@pytest.mark.parametrize("road", ["queued-resource", "mig"])
def test_a_worker_that_cannot_be_reached_is_named(pod, road, script):
    pod.settings(**ROADS[road])
    pod.state(ACTIVE[road])
    pod.fail(" ssh ", LOST, passed=road == "mig")
    assert f"{LOST}\n{script}.sh: not every worker did it" in pod(script, rc=1).stderr


@pytest.mark.parametrize("script", ["run", "stop", "setup"])
def test_a_group_that_has_lost_a_host_is_not_used(pod, script):
    pod.settings(**ROADS["mig"])
    pod.state("RUNNING+TERMINATED")
    assert "pod is SUSPENDED and will not come back" in pod(script, rc=1).stderr


def test_parts_left_by_a_failed_deletion_are_deleted_by_the_next(pod):
    pod.settings(**ROADS["mig"])
    pod("launch")
    pod.state(ACTIVE["mig"])
    pod.fail("instance-templates delete", NETWORK)
    assert NETWORK in pod("delete", "--yes", rc=1).stderr
    pod.mend()
    pod.state("NONE")  # the group is gone
    pod("delete", "--yes")
    assert (pod.fake / "made").read_text() == ""


def test_all_node_pools_are_deleted_though_one_is_gone(pod):
    pod.settings(**ROADS["gke"] | {"SLICES": "2"})
    pod("launch")
    pod.fail("node-pools delete pod-0", "ERROR: (gcloud) code=404, message=Not found")
    assert "not every node pool" in pod("delete", "--yes", rc=1).stderr
    assert any(call[3:5] == ["delete", "pod-1"] for call in pod.calls())


# ---- launch.sh --watch -------------------------------------------------------------------------------------------------

FLEX = dict(CAPACITY="flex-start", MAX_RUN_DURATION="24h")
SPOT = dict(CAPACITY="spot")
DELETE, CREATE = "queued-resources delete", "queued-resources create"
ON, LOST_HOST = "RUNNING+RUNNING", "RUNNING+TERMINATED"
# Road, settings, states that are seen, a failure (step, message, how often the step works before),
# exit status, how often the slice is asked for, what is said.
WATCH = {
    "taken away": ("queued-resource", SPOT, "ACTIVE SUSPENDED ACTIVE", None, 0, 2, "taken away"),
    "taken away, no network for deleting": (
        *("queued-resource", SPOT, "ACTIVE SUSPENDED SUSPENDED ACTIVE", (DELETE, NETWORK, 0)),
        *(0, 2, "will try again in a minute"),
    ),
    "taken away, no quota for another": (
        *("queued-resource", SPOT, "ACTIVE SUSPENDED NONE ACTIVE", (CREATE, QUOTA, 1)),
        *(0, 3, "will try again in a minute"),
    ),
    "no network for looking": (
        *("queued-resource", {}, "ACTIVE ACTIVE", ("describe", NETWORK, 1), 0, 1, NETWORK),
    ),
    "no network for the verdict": (
        *("queued-resource", {}, "ACTIVE ACTIVE", ("storage cat", NETWORK, 0), 0, 1, "over"),
    ),
    "request cannot be met": ("queued-resource", {}, "FAILED", None, 1, 1, "no quota"),
    "deleted": ("queued-resource", {}, "ACTIVE NONE", None, 1, 1, "was deleted"),
    "flex-start at its end": (
        *("queued-resource", FLEX, "ACTIVE SUSPENDED", None, 1, 1, "reached MAX_RUN_DURATION=24h"),
    ),
    "group lost a host": ("mig", SPOT, f"{ON} {LOST_HOST} {ON}", None, 0, 2, "taken away"),
    "group lost a host, no network for deleting": (
        *("mig", SPOT, f"{ON} {LOST_HOST} {LOST_HOST} {ON}", ("managed delete", NETWORK, 0)),
        *(0, 2, "will try again in a minute"),
    ),
    "group lost a host, no quota for another": (
        *("mig", SPOT, f"{ON} {LOST_HOST} NONE {ON}", ("managed create", QUOTA, 1)),
        *(0, 3, "will try again in a minute"),
    ),
    "group lost a host, no network for its template": (
        *("mig", SPOT, f"{ON} {LOST_HOST} NONE {ON}", ("instance-templates create", NETWORK, 1)),
        *(0, 2, "will try again in a minute"),
    ),
    "group of flex-start at its end": ("mig", FLEX, f"{ON} EMPTY", None, 1, 1, "reached MAX_RUN"),
    "group of flex-start at its beginning": (
        *("mig", FLEX, f"EMPTY CREATING+CREATING {ON}", None, 0, 1, "over"),
    ),
}


@pytest.mark.parametrize("row", WATCH.values(), ids=WATCH)
def test_watch(pod, row):
    road, settings, states, failure, status, requests, said = row
    pod.settings(**ROADS[road] | settings)
    pod.env["FAKE_FAST"] = "1"
    pod.state("NONE", *states.split())
    if failure:
        step, message, passed = failure
        pod.fail(step, message, passed=passed, times=1)
    command = ["bash", pod.repo / "tpu_scripts/launch.sh", "--watch", f"--env={pod.tmp / 'my.env'}"]
    with open(pod.tmp / "said", "w") as said_to:
        going = subprocess.Popen(command, env=pod.env, stderr=said_to)
    if status == 0:
        last = f"{states.split()[-1]}\n"
        pod.wait_for(lambda: (pod.fake / "state").read_text() == last or going.poll() is not None)
        (pod.bucket / "pods/pod").mkdir(parents=True, exist_ok=True)
        (pod.bucket / "pods/pod/finished").write_text("0 done (slice0-worker0)\n")
    assert going.wait(timeout=20) == status, (pod.tmp / "said").read_text()
    assert said in (pod.tmp / "said").read_text()
    created = "queued-resources create" if road == "queued-resource" else "managed create"
    assert sum(created in " ".join(call) for call in pod.calls()) == requests


def test_flex_start_on_compute_engine_is_asked_for_again_by_hand(pod):
    pod.settings(**ROADS["mig"] | FLEX)
    pod.state("EMPTY")
    pod("launch")
    done = [" ".join(call[2:5]) for call in pod.calls() if "managed" in call]
    assert done[-2:] == ["instance-groups managed delete", "instance-groups managed create"]


@pytest.mark.parametrize(
    "state, said", [("true", "WAITING_FOR_RESOURCES"), ("Failed", "FAILED"), ("NONE", "NONE")]
)
def test_the_state_of_a_jobset(pod, state, said):
    """Suspended by its queue; failed for good; none."""
    pod.settings(**ROADS["gke"] | {"QUEUE": "team"})
    pod.state(state)
    assert f"pod: {said}" in pod("status").stderr


# ---- The worker's side -------------------------------------------------------------------------------------------------

FULL = "No space left on device"
SETUP = {
    "code, network": ("gcloud storage cp gs://my-bucket/dapo/pods/pod/code", 1, NETWORK),
    "code, full disk": ("tar -xzf", 2, f"tar: code: Cannot write: {FULL}"),
    "uv, network": ("curl -LsSf", 6, "curl: (6) Could not resolve host: astral.sh"),
    "Python, network": ("uv venv", 2, "error: Failed to download cpython-3.12"),
    "packages, network": ("uv pip", 2, "error: Request failed after 3 retries"),
    "packages, full disk": ("uv pip", 2, f"error: failed to write to file: {FULL}"),
    "assets, full disk": ("gcloud storage rsync --recursive", 1, f"ERROR: {FULL}"),
}
MODES = {"queued-resource": "boot", "mig": "boot", "gke": "once"}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("step, status, message", SETUP.values(), ids=SETUP)
def test_setup_outlives_two_failures_and_ends_with_1_after_six(pod, road, step, status, message):
    """Never with uv's or tar's own 2, which would end a JobSet."""
    pod.settings(**ROADS[road], ASSETS="gs://my-bucket/assets")
    (pod.fake / "bucket/my-bucket/assets").mkdir(parents=True)
    pod("sync")
    pod.statuses(0)
    pod.fail(step, message, status=status, times=2)
    done = pod.worker(MODES[road])
    output = pod.log() + done.stdout + done.stderr
    assert output.count("setup failed, again in") == 2 and output.count(message) == 2
    assert len(pod.runs()) == 1

    shutil.rmtree(pod.home)
    (pod.bucket / "pods/pod/finished").unlink(missing_ok=True)
    pod.fail(step, message, status=status)
    done = pod.worker(MODES[road], rc=1)
    output = pod.log() + done.stdout + done.stderr
    assert output.count(message) == 6 and "setup failed 6 times" in output
    assert len(pod.runs()) == 1 and not (pod.bucket / "pods/pod/finished").exists()
    if MODES[road] == "boot":
        copied = "".join(file.read_text() for file in (pod.bucket / "pods/pod/logs").iterdir())
        assert "setup failed 6 times" in copied


# A host that is lost, and what the program ends with when the others notice: 1. On GKE the JobSet
# restarts all pods, but for 2 and 3.
ENDS = [(1, "again"), (137, "again"), (143, "again"), (2, "ends"), (3, "ends"), (0, "ends")]


@pytest.mark.parametrize("status, then", ENDS)
@pytest.mark.parametrize("road", ROADS)
def test_a_program_that_ends_is_started_again_or_not(pod, road, status, then):
    pod.settings(**ROADS[road])
    pod("sync")
    pod.statuses(status, 0)
    pod.worker(MODES[road], rc=status if road == "gke" else 0)
    if road == "gke":
        assert len(pod.runs()) == 1  # the status is the JobSet's to judge
    else:
        assert len(pod.runs()) == (2 if then == "again" else 1)
        verdict = 0 if then == "again" else status
        assert (pod.finished()).startswith(f"{verdict} ")


def test_no_network_at_the_end_of_a_run(pod):
    """The verdict, at which other hosts stop, and the deletion, which ends the cost, are repeated."""
    pod.settings(DELETE_WHEN_DONE="yes")
    pod("sync")
    pod.statuses(0)
    pod.fail("gcloud storage cp --no-clobber", NETWORK, times=2)
    pod.worker()
    assert pod.finished().startswith("0 done")
    assert re.search("writing .*finished failed, again in 10 s", pod.log())
    shutil.rmtree(pod.home)
    (pod.bucket / "pods/pod/finished").unlink()
    pod.statuses(0)
    pod.calls()
    pod.fail("queued-resources delete", NETWORK, times=2)
    pod.worker()
    deleted = [call for call in pod.calls() if call[4:5] == ["delete"]]
    assert len(deleted) == 3 and "deleting pod failed, again in 20 s" in pod.log()


def test_logs_that_cannot_be_copied_do_not_stop_a_run(pod):
    pod("sync")
    pod.statuses(1, 0)
    pod.fail("gcloud storage rsync logs", NETWORK)
    pod.worker()
    assert pod.finished().startswith("0 done") and "logs could not be copied" in pod.log()
