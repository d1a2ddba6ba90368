"""Metrics for Weights & Biases and MLflow, by modules that stand in for them: what they get, and
that they can do no harm.
"""

import json
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from refusals import refusal
from runs import install

from dapo_jax.runtime import tracker
from dapo_jax.runtime.files import as_path
from dapo_jax.runtime.tracker import Tracker, check_tracker

pytestmark = pytest.mark.host

KEY = "0123456789abcdef-key"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in tracker._KEYS:
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def wandb(monkeypatch):
    """The runs that were begun, each a dict of what `init` got, and its `lines`; `fail` and `hang`
    are called with each line.
    """
    kept = SimpleNamespace(runs=[], fail=lambda line: None)

    def init(**given):
        assert threading.current_thread() is not threading.main_thread()
        run = given | {"lines": [], "finished": False}
        kept.runs.append(run)

        def log(line):
            kept.fail(line)
            run["lines"].append(line)

        return SimpleNamespace(
            define_metric=lambda *a, **k: run.update(axis=(a, k)),
            log=log,
            finish=lambda: run.update(finished=True),
        )

    install(monkeypatch, "wandb", init=init, Settings=lambda **settings: settings)
    return kept


@pytest.fixture
def mlflow(monkeypatch):
    """Runs of a store by id, as dicts of params, (step, key, value) and status.

    It refuses what MLflow refuses.
    """
    kept = SimpleNamespace(runs={}, experiments={}, address=None)

    class Client:
        def __init__(self, address):
            kept.address = address

        def get_experiment_by_name(self, name):
            return (
                SimpleNamespace(experiment_id=kept.experiments[name])
                if name in kept.experiments
                else None
            )

        def create_experiment(self, name):
            kept.experiments[name] = str(len(kept.experiments))
            return kept.experiments[name]

        def create_run(self, experiment, run_name):
            kept.runs[run := f"run{len(kept.runs)}"] = {
                "name": run_name,
                "params": {},
                "metrics": [],
                "status": "RUNNING",
            }
            return SimpleNamespace(info=SimpleNamespace(run_id=run))

        def update_run(self, run, status):
            kept.runs[run]["status"] = status

        def log_batch(self, run, metrics=(), params=()):
            assert len(params) <= 100 and not kept.runs[run]["params"].keys() & {
                key for key, _ in params
            }
            kept.runs[run]["params"] |= dict(params)
            kept.runs[run]["metrics"] += [(step, key, value) for key, value, _, step in metrics]

        def set_terminated(self, run):
            kept.runs[run]["status"] = "FINISHED"

    install(monkeypatch, "mlflow", MlflowClient=Client)
    status = SimpleNamespace(RUNNING="RUNNING", to_string=str)
    install(
        monkeypatch, "mlflow.entities", Metric=lambda *a: a, Param=lambda *a: a, RunStatus=status
    )
    return kept


def track(kind, folder, lines, config=None) -> list[str]:
    """Sends (step, numbers) lines as one run of the trainer does. Returns what was said."""
    said: list[str] = []
    with Tracker(
        kind, folder, {"train.steps": 3} if config is None else config, said.append
    ) as one:
        for step, numbers in lines:
            one.send(step, numbers)
    return said


def numbers(step: int) -> dict[str, float]:
    return {"updates": 2 * step, "reward/mean": step / 7, "eval/a/pass_at_2": 0.5}


def test_wandb_gets_the_lines_and_a_resumed_run_continues_its_run(tmp_path, wandb):
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    assert track("wandb", run_dir, [(step, numbers(step)) for step in (0, 1, 2, 3)]) == []
    assert (
        track("wandb", run_dir, [(step, numbers(step)) for step in (3, 4)]) == []
    )  # step 3 is done again
    first, again = wandb.runs
    assert (first["mode"], first["project"], first["name"], first["dir"]) == (
        "offline",
        "dapo_jax",
        "my run",
        str(run_dir),
    )
    assert (
        first["config"] == {"train.steps": 3} and first["finished"] and first["resume"] == "allow"
    )
    assert first["id"] == again["id"] == json.loads((run_dir / "tracker.json").read_text())["wandb"]
    assert first["lines"] == [{"step": step, **numbers(step)} for step in (0, 1, 2, 3)]
    assert [line["step"] for line in again["lines"]] == [3, 4] and again["axis"] == (
        ("*",),
        {"step_metric": "step"},
    )


def test_the_environment_says_where_to(tmp_path, wandb, mlflow, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert track("wandb", tmp_path, []) == track("mlflow", tmp_path, []) == []
    assert (wandb.runs[0]["mode"], wandb.runs[0]["project"]) == ("online", "other")
    assert mlflow.address == "http://localhost:1" and list(mlflow.experiments) == ["other"]
    assert json.loads((tmp_path / "tracker.json").read_text()).keys() == {"wandb", "mlflow"}


def test_mlflow_gets_the_lines_and_a_resumed_run_continues_its_run(tmp_path, mlflow):
    config = {f"a.{i}": "x" * 600 for i in range(150)}
    assert track("mlflow", tmp_path, [(1, numbers(1)), (2, numbers(2))], config) == []
    assert (
        track("mlflow", tmp_path, [(2, numbers(2)), (3, numbers(3))], config | {"a.1": "other"})
        == []
    )
    assert mlflow.address == f"sqlite:///{tmp_path}/mlflow.db"
    assert list(mlflow.experiments) == ["dapo_jax"]
    ((_, run),) = mlflow.runs.items()
    assert run["metrics"] == [
        (step, key, value) for step in (1, 2, 2, 3) for key, value in numbers(step).items()
    ]
    assert (
        run["params"] == {key: "x" * 500 for key in config}
        and run["status"] == "FINISHED"
        and run["name"] == tmp_path.name
    )


def test_no_tracker_does_nothing(tmp_path):
    assert track(None, tmp_path, [(1, numbers(1))]) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"nonsense", b"[]", b'{"wandb": 3}', b"[" * 100_000])
def test_a_damaged_file_of_ids_begins_another_run(tmp_path, wandb, content):
    (tmp_path / "tracker.json").write_bytes(content)
    assert track("wandb", tmp_path, []) == []
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"wandb": wandb.runs[0]["id"]}


def test_no_part_of_a_key_is_in_a_message_that_is_cut(tmp_path, wandb):
    def fail(line):
        raise ConnectionError(f"{180 * 'x'} {KEY * 9}")

    wandb.fail = fail
    said = track("wandb", tmp_path, [(1, numbers(1))])
    assert len(said) == 1 and KEY[:6] not in said[0]


def test_a_tracker_that_fails_is_said_once_without_its_key(tmp_path, wandb):
    def fail(line):
        if line["step"] == 2:
            raise ConnectionError(f"https://me:{KEY}@host refused the key {KEY}\nand more")

    wandb.fail = fail
    said: list[str] = []
    with Tracker("wandb", tmp_path, {}, said.append) as one:
        for step in range(1, 100):
            one.send(step, numbers(step))
            time.sleep(0.02 if step < 5 else 0)
    assert [line["step"] for line in wandb.runs[0]["lines"]] == [1]
    (line,) = said
    assert (
        line.startswith(
            "train.tracker: wandb has failed (https://...@host refused the key WANDB_API_KEY)"
        )
        and "\n" not in line
    )
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY in file.read_text()]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, ImportError])
def test_a_tracker_that_cannot_begin_does_not_stop_the_run(tmp_path, monkeypatch, error):
    def init(**given):
        raise error

    install(monkeypatch, "wandb", init=init, Settings=dict)
    (line,) = track("wandb", tmp_path, [(1, numbers(1))])
    assert error.__name__ in line and "the run continues" in line


def test_a_tracker_that_hangs_slows_nothing(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(tracker, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(tracker, "_WAITING", 10)
    release = threading.Event()
    wandb.fail = lambda line: release.wait(20)
    began = time.monotonic()
    said = track("wandb", tmp_path, [(step, numbers(step)) for step in range(100)])
    assert time.monotonic() - began < 5
    release.set()
    (line,) = said
    assert "too slow" in line


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_what_is_wrong_is_said_before_a_device_works(tmp_path, monkeypatch, kind):
    check_tracker(None, tmp_path)
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with refusal(f"train.tracker: {kind} ...pip install -e '.[{kind}]'"):
        check_tracker(kind, tmp_path)
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    check_tracker(kind, tmp_path)
    bucket = as_path("gs://bucket/run")
    setting = {"wandb": "WANDB_MODE=online", "mlflow": "MLFLOW_TRACKING_URI"}[kind]
    with refusal(f"...gs://bucket/run, ...{setting}"):
        check_tracker(kind, bucket)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    check_tracker(kind, bucket)
