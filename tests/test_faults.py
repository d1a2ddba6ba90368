"""What a run survives: signals in every phase, hangs, updates that are not finite, a second job on its folder.

The reference is a run that nothing happened to: metrics are compared line by line, weights and optimizer by their digests.
"""

import json
import signal

import pytest
from test_train import CONFIG, TESTS, compile_once, reward_module, run_train, steady  # noqa: F401 - fixtures

from dapo_jax.runtime import faults

STEPS = "train.steps=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG.replace("warmup_steps: 2", "warmup_steps: 2, max_nonfinite_updates: 2"))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, compile_once):  # noqa: F811
    """A run of 2 steps that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        assert run_train(config, run, STEPS) == 0
    return run


def record(run, step) -> dict:
    return json.loads((run / "checkpoints" / str(step) / "host" / "metadata").read_text())


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


def test_signals_in_every_phase_lose_nothing(config, whole, tmp_path, monkeypatch, capfd):
    """One run, stopped at each of these places and started again: its lines, weights and buffered groups are those of a whole run."""
    run = tmp_path / "run"
    for stop, stands in STOPS:
        monkeypatch.setenv(faults.VARIABLE, stop)
        number = signal.SIGINT if stop.endswith("int") else signal.SIGTERM
        assert run_train(config, run, STEPS) == 128 + number, stop
        assert f"{number.name}: stopped and saved after {stands}; the same command goes on" in capfd.readouterr().err, stop
    monkeypatch.delenv(faults.VARIABLE)
    assert run_train(config, run, STEPS) == 0
    assert steady(run) == steady(whole)
    assert {key: record(run, 2)[key] for key in ("leaves", "groups")} == {key: record(whole, 2)[key] for key in ("leaves", "groups")}
    assert not (run / "checkpoints" / "interrupted").exists()
