"""Multi-process jobs that lose a process, or whose processes diverge: none of them waits for
ever, and nothing is lost.

The processes run the train verb itself, with one CPU device each.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import CONFIG, TESTS, VOLATILE, free_port, record, steady

import dapo_jax
from dapo_jax.runtime.metrics import read_metrics

pytestmark = pytest.mark.multiprocess

SECONDS = 60  # within which all have to have ended once one has


DIVERGE = """
import jax, sys
from dapo_jax import cli, train

plain = train.RunStore.save

def save(store, run, **how):
    if run.progress.step == 2 and jax.process_index() == 1:
        leaf = run.state.params["final_norm"]["scale"]
        shard = leaf.addressable_data(0) + 1e-3
        changed = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [shard])
        run.state.params["final_norm"]["scale"] = changed
    plain(store, run, **how)

train.RunStore.save = save
cli.run(train.main, sys.argv[1:])
"""


class Job:
    """Processes of the train verb on one folder: a fault plan, overrides for all, one for single
    processes, another program.
    """

    def __init__(
        self,
        folder: Path,
        processes: int,
        plan: str = "",
        *overrides: str,
        only: dict[int, str] | None = None,
        program: str = "",
    ):
        self.folder = folder
        (folder / "tiny.yaml").write_text(CONFIG)
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
            "PYTHONPATH": os.pathsep.join(
                [
                    str(Path(dapo_jax.__file__).parents[1]),
                    str(TESTS),
                    os.environ.get("PYTHONPATH", ""),
                ]
            ),
        }
        verb = ["-c", program] if program else [TESTS / "faults.py", plan, "dapo_jax.train"]
        command = [
            sys.executable,
            *verb,
            "--config",
            folder / "tiny.yaml",
            "--run-dir",
            folder / "run",
        ]
        command += [
            x
            for o in ("train.steps=2", "eval.every=0", "supervised.updates=0", *overrides)
            for x in ("--set", o)
        ]
        self._logs = [folder / f"{i}.log" for i in range(processes)]
        self._processes = []
        for i, log in enumerate(self._logs):
            mine = [*command, *(["--set", only[i]] if only and i in only else [])]
            with log.open("w") as out:
                self._processes.append(
                    subprocess.Popen(
                        mine,
                        env=env | {"JAX_PROCESS_ID": str(i)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def ends(self) -> list[int]:
        """Exit statuses, once all have ended: within SECONDS of the first."""
        deadline = time.monotonic() + 300
        try:
            while any(alive := [p.poll() is None for p in self._processes]):
                if not all(alive):
                    deadline = min(deadline, time.monotonic() + SECONDS)
                assert time.monotonic() < deadline, "".join(
                    f"\n--- {p}\n{p.read_text()[-2000:]}" for p in self._logs
                )
                time.sleep(0.1)
        finally:
            for process in self._processes:
                process.kill()
        return [p.returncode for p in self._processes]

    def said(self, process: int) -> str:
        return self._logs[process].read_text()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def whole(shared):
    """A run of two processes that nothing happened to."""
    (shared / "whole").mkdir()
    job = Job(shared / "whole", 2)
    assert job.ends() == [0, 0], job.said(0)[-2000:] + job.said(1)[-2000:]
    return shared / "whole/run"


def test_a_job_that_loses_processes_ends_soon_and_resumes(shared, whole):
    """One run that meets one fault after the other, and at last none: it ends as the run that met
    none.
    """
    (shared / "faults").mkdir()
    folder = shared / "faults"

    job = Job(folder, 2, "update:2=term@1")  # one of them is enough
    assert job.ends() == [128 + signal.SIGTERM] * 2
    assert "SIGTERM: saved a checkpoint after step 0 and 1 updates of the next" in job.said(0)

    job = Job(folder, 2, "rollout:1=kill@1")
    first, second = job.ends()
    assert first != 0 and second == -signal.SIGKILL

    job = Job(folder, 2, "rollout:1=kill@0")
    first, second = job.ends()
    assert first == -signal.SIGKILL and second != 0

    job = Job(folder, 2, "update:1=raise@1")
    first, second = job.ends()
    assert first != 0 and second == 1
    assert "InjectedFault: injected at update" in job.said(
        1
    ) and "dapo_jax: process 1 of 2" in job.said(1)

    job = Job(folder, 2, "step:1=hang@1", "train.stall_timeout_s=5")
    assert all(status not in (0, None) for status in job.ends())
    # The watchdogs of both race: the first to end its process takes the other along.
    stalled = [i for i in (0, 1) if "no progress for 5 s in step 1" in job.said(i)]
    assert stalled and all(f"process {i} of 2" in job.said(i) for i in stalled)
    assert 1 not in stalled or "faults.py" in job.said(1)

    job = Job(folder, 2)
    assert job.ends() == [0, 0], job.said(0)[-2000:]
    assert steady(folder / "run") == steady(whole)
    assert record(folder / "run", 2)["leaves"] == record(whole, 2)["leaves"]


def test_processes_that_were_started_differently_are_refused(shared):
    (shared / "differ").mkdir()
    job = Job(shared / "differ", 2, only={1: "seed=1"})
    assert job.ends() == [2, 2]
    for process in (0, 1):
        assert (
            "seed is 1 on process 1, 0 on process 0; start every process with the same command"
            in job.said(process)
        )
        assert "Traceback" not in job.said(process)
    assert not (shared / "differ/run").exists()


def test_weights_that_differ_are_not_saved(shared):
    """Each of the two holds a whole copy of the weights.

    One copy changes after step 1, as by a faulty memory.
    """
    (shared / "diverged").mkdir()
    job = Job(
        shared / "diverged",
        2,
        "",
        "mesh.data=2",
        "mesh.fsdp=1",
        "train.save_every=1",
        program=DIVERGE,
    )
    assert job.ends() == [1, 1], job.said(1)[-2000:]
    for process in (0, 1):
        assert "step 2: params/final_norm/scale is " in job.said(
            process
        ) and "nothing is saved" in job.said(process)
    assert sorted(p.name for p in (shared / "diverged/run/checkpoints").iterdir()) == ["1"]


def test_four_processes_train(shared, whole):
    """Counts exactly as with two, the loss within rounding."""
    (shared / "four").mkdir()
    job = Job(shared / "four", 4)
    assert job.ends() == [0] * 4, job.said(0)[-2000:]
    for a, b in zip(read_metrics(shared / "four/run"), read_metrics(whole), strict=True):
        exact = [k for k in a if not k.startswith((*VOLATILE, "policy/", "optim/grad_norm"))]
        assert {k: a[k] for k in exact} == {k: b[k] for k in exact} and len(exact) > 20
        assert a["policy/entropy"] == pytest.approx(b["policy/entropy"], rel=1e-6)
