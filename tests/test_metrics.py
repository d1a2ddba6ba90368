"""metrics.jsonl holds each step once, whatever happened to the run, and nothing that a JSON reader could choke on."""

import json
import re
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dapo_jax.runtime.metrics import METRICS, MetricsLog, definition, peak_memory, read_metrics, timed, write_samples
from dapo_jax.types import InputError


def write_steps(run_dir, steps, **kwargs):
    with MetricsLog(run_dir, **kwargs) as log:
        for step in steps:
            log.write(step, 16 * step, 100 * step, {"reward/mean": step / 7})


def strict_loads(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_table_has_the_public_keys_and_units_in_their_names():
    public = (
        "reward/mean reward/accuracy filter/kept_fraction filter/all_correct filter/all_wrong rollout/response_len_mean "
        "rollout/truncated_fraction policy/entropy policy/approx_kl policy/clip_fraction_low policy/clip_fraction_high "
        "policy/sampler_gap_mean optim/grad_norm optim/lr time/rollout_s time/reward_s time/update_s "
        "throughput/rollout_tokens_per_s throughput/train_tokens_per_s eval/<set>/avg eval/<set>/avg_se eval/<set>/pass eval/<set>/cons"
    ).split()
    assert set(public) <= METRICS.keys()
    for key, meaning in METRICS.items():
        assert re.fullmatch(r"[a-z]+/(<set>/)?[a-z_]+(<k>(_se)?)?", key) and len(meaning) > 10 and not meaning.endswith(".")
        assert key.startswith("time/") == (key.endswith("_s") and not key.endswith("_per_s"))
        assert key.startswith("throughput/") == key.endswith("_per_s")


def test_a_line_is_one_json_object_with_counters_first(tmp_path):
    values = {"reward/mean": np.float32(0.25), "rollout/prompts": np.int64(64), "policy/entropy": jnp.ones(()), "eval/a-1.x/avg_se": 0.1}
    with MetricsLog(tmp_path) as log:
        log.write(3, 48, 300, values)
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed
    counters = [("step", 3), ("updates", 48), ("draws", 300)]
    rest = [("reward/mean", 0.25), ("rollout/prompts", 64), ("policy/entropy", 1.0), ("eval/a-1.x/avg_se", 0.1)]
    assert list(strict_loads(line).items()) == counters + rest
    assert read_metrics(tmp_path) == [strict_loads(line)]


def test_floats_come_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789]
    with MetricsLog(tmp_path) as log:
        for step, value in enumerate(values):
            log.write(step, 0, 0, {"policy/loss": value})
    assert [record["policy/loss"] for record in read_metrics(tmp_path)] == values


def test_values_that_are_not_finite_are_left_out_and_said(tmp_path, capsys):
    with MetricsLog(tmp_path) as log:
        log.write(2, 0, 0, {"policy/loss": float("nan"), "optim/grad_norm": np.float32("inf"), "optim/lr": 1e-6})
    assert read_metrics(tmp_path) == [{"step": 2, "updates": 0, "draws": 0, "optim/lr": 1e-6}]
    (line,) = capsys.readouterr().out.splitlines()
    assert "step 2" in line and "optim/grad_norm, policy/loss" in line


@pytest.mark.parametrize(
    "key", ["reward/meen", "loss", "eval/avg", "eval/aime/average", "eval/a/b/avg", "eval/a/pass_at_0", "eval/a/pass_at_<k>", "time/x_s"]
)
def test_a_key_that_the_table_does_not_define_is_an_error(tmp_path, key):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match=key):
        log.write(1, 0, 0, {"reward/mean": 0.5, key: 1.0})
    assert read_metrics(tmp_path) == []


def test_definition_of_a_key():
    assert definition("reward/mean") == METRICS["reward/mean"]
    assert definition("eval/a-1.x/pass_at_16") == METRICS["eval/<set>/pass_at_<k>"]
    assert definition("eval/pass_at_2/pass_at_2_se") == METRICS["eval/<set>/pass_at_<k>_se"]
    assert definition("step") is None


def test_a_copy_gets_what_the_line_gets(tmp_path):
    copies = []
    write_steps(tmp_path, [1, 2], copy=lambda step, numbers: copies.append({"step": step, **numbers}))
    assert copies == read_metrics(tmp_path) and len(copies) == 2


def test_a_text_is_in_the_line_alone(tmp_path):
    copies = []
    with MetricsLog(tmp_path, copy=lambda step, numbers: copies.append(numbers)) as log:
        log.write(1, 0, 0, {"eval/a/avg": 0.5, "eval/a/digest": "ab"})
    assert read_metrics(tmp_path) == [{"step": 1, **copies[0], "eval/a/digest": "ab"}] and copies[0].keys() == {
        "updates",
        "draws",
        "eval/a/avg",
    }
    assert b"digest" not in b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def test_other_processes_write_nothing_but_check_their_keys(tmp_path):
    write_steps(tmp_path / "run", [1, 2], enabled=False)
    assert not (tmp_path / "run").exists()
    with MetricsLog(tmp_path / "run", enabled=False) as log, pytest.raises(ValueError):
        log.write(1, 0, 0, {"nonsense": 1.0})


@pytest.mark.parametrize("half", [b"", b'{"step": 5, "upda', b"\x00\x00\xff", b'{"step": 2}'])
def test_resume_leaves_each_step_once(tmp_path, half):
    write_steps(tmp_path, [0, 1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(half)
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]


def test_a_run_that_starts_afresh_cuts_what_an_earlier_attempt_left(tmp_path):
    write_steps(tmp_path, [0, 1, 2])
    write_steps(tmp_path, [0, 1])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    write_steps(tmp_path, [1, 2])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"reward/mean") == 2


def test_a_half_last_line_is_left_out_and_damage_elsewhere_is_named(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="metrics.jsonl: line 2"):
        read_metrics(tmp_path)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl: cannot read"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("")
    for call in (lambda: MetricsLog(tmp_path / "file"), lambda: write_samples(tmp_path / "file", 1, [])):
        with pytest.raises(InputError, match="cannot be written") as e:
            call()
        assert "\n" not in str(e.value)


def test_samples(tmp_path):
    text = "π = 3\nline \u2028 two \ud800"
    rows = [{"id": "a", "response": text, "correct": np.bool_(True), "reward": np.float32(0.5), "length": np.int64(7)}, {"id": "b"}]
    path = write_samples(tmp_path, 12, rows)
    assert path == tmp_path / "samples" / "step_000012.jsonl" and [p.name for p in path.parent.iterdir()] == [path.name]
    first, second = path.read_bytes().decode("utf-8").split("\n")[:-1]
    assert strict_loads(first) == {"id": "a", "response": text, "correct": True, "reward": 0.5, "length": 7}
    assert strict_loads(second) == {"id": "b"} and "π" in first


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell a process's own peak")
def test_peak_memory_is_this_processs_own(monkeypatch):
    """Linux tells a new process the peak of the one that started it as its own, by getrusage."""
    monkeypatch.setattr("resource.getrusage", lambda who: pytest.fail("asked getrusage"))
    before = peak_memory()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert 0 < 1024 * int(status["VmRSS"].split()[0]) <= peak_memory()
    more = np.ones(before // 8 + 2**24)  # what is in use now and 128 MiB
    assert before + more.nbytes // 2 < peak_memory() < 3 * before + 2 * more.nbytes


def test_timed_adds_up_also_when_it_fails():
    times = {}
    for _ in range(2):
        with timed(times, "time/rollout_s"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timed(times, "time/reward_s"):
        raise KeyError
    assert 0.04 <= times["time/rollout_s"] < 1 and times["time/reward_s"] >= 0
