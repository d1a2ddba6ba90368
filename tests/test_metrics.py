"""metrics.jsonl holds each step once, whatever happened to the run, and nothing that a JSON reader
could choke on.
"""

import errno
import json
import re
import resource
import struct
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from dapo_jax.runtime.files import AppendFile
from dapo_jax.runtime.metrics import (
    METRICS,
    MetricsLog,
    definition,
    peak_memory,
    read_metrics,
    timed,
    write_samples,
)


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
        "reward/mean reward/accuracy filter/kept_fraction filter/all_correct filter/all_wrong "
        "rollout/response_len_mean rollout/truncated_fraction policy/entropy policy/approx_kl "
        "policy/clip_fraction_low policy/clip_fraction_high policy/sampler_gap_mean "
        "optim/grad_norm optim/lr time/rollout_s time/reward_s time/update_s "
        "throughput/rollout_tokens_per_s throughput/train_tokens_per_s "
        "eval/<set>/avg eval/<set>/avg_se eval/<set>/pass eval/<set>/cons"
    ).split()
    assert set(public) <= METRICS.keys()
    for key, meaning in METRICS.items():
        assert (
            re.fullmatch(r"[a-z]+/(<set>/)?[a-z_]+(<k>(_se)?)?", key)
            and len(meaning) > 10
            and not meaning.endswith(".")
        )
        assert key.startswith("time/") == (key.endswith("_s") and not key.endswith("_per_s"))
        assert key.startswith("throughput/") == key.endswith("_per_s")


def test_a_line_is_one_json_object_with_counters_first(tmp_path):
    values = {
        "reward/mean": np.float32(0.25),
        "rollout/prompts": np.int64(64),
        "policy/entropy": jnp.ones(()),
        "eval/a-1.x/avg_se": 0.1,
    }
    with MetricsLog(tmp_path) as log:
        log.write(3, 48, 300, values)
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed
    counters = [("step", 3), ("updates", 48), ("draws", 300)]
    rest = [
        ("reward/mean", 0.25),
        ("rollout/prompts", 64),
        ("policy/entropy", 1.0),
        ("eval/a-1.x/avg_se", 0.1),
    ]
    assert list(strict_loads(line).items()) == counters + rest
    assert read_metrics(tmp_path) == [strict_loads(line)]


def test_floats_come_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789]
    with MetricsLog(tmp_path) as log:
        for step, value in enumerate(values):
            log.write(step, 0, 0, {"policy/loss": value})
    assert [record["policy/loss"] for record in read_metrics(tmp_path)] == values


def test_non_finite_values_are_left_out_with_a_message(tmp_path, capsys):
    with MetricsLog(tmp_path) as log:
        log.write(
            2,
            0,
            0,
            {"policy/loss": float("nan"), "optim/grad_norm": np.float32("inf"), "optim/lr": 1e-6},
        )
    assert read_metrics(tmp_path) == [{"step": 2, "updates": 0, "draws": 0, "optim/lr": 1e-6}]
    (line,) = capsys.readouterr().out.splitlines()
    assert "step 2" in line and "optim/grad_norm, policy/loss" in line


@pytest.mark.parametrize(
    "key",
    [
        "reward/meen",
        "loss",
        "eval/avg",
        "eval/aime/average",
        "eval/a/b/avg",
        "eval/a/pass_at_0",
        "eval/a/pass_at_<k>",
        "time/x_s",
    ],
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
    write_steps(
        tmp_path, [1, 2], copy=lambda step, numbers: copies.append({"step": step, **numbers})
    )
    assert copies == read_metrics(tmp_path) and len(copies) == 2


def test_a_text_is_in_the_line_alone(tmp_path):
    copies = []
    with MetricsLog(tmp_path, copy=lambda step, numbers: copies.append(numbers)) as log:
        log.write(1, 0, 0, {"eval/a/avg": 0.5, "eval/a/digest": "ab"})
    assert read_metrics(tmp_path) == [{"step": 1, **copies[0], "eval/a/digest": "ab"}] and copies[
        0
    ].keys() == {
        "updates",
        "draws",
        "eval/a/avg",
    }
    assert b"digest" not in b"".join(
        path.read_bytes() for path in (tmp_path / "tensorboard").iterdir()
    )


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


def tensorboard_events(run_dir):
    """What TensorBoard reads: the events of every file, by name."""
    for path in sorted((run_dir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            length, crc, data, end = np.split(
                np.frombuffer(content[: size + 16], np.uint8), [8, 12, 12 + size]
            )
            assert [masked_crc32c(part.tobytes()) for part in (length, data)] == [
                int(part.view("<u4")[0]) for part in (crc, end)
            ]
            yield Event.FromString(data.tobytes())
            content = content[size + 16 :]


def test_tensorboard_gets_the_same_scalars(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [2, 3], resume_step=1)
    events = list(tensorboard_events(tmp_path))
    assert [event.file_version for event in events].count("brain.Event:2") == 2 and events[
        0
    ].file_version
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [
        0,
        2,
    ]
    scalars = [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events
        if event.summary.value
    ]
    assert scalars == [(step, {"reward/mean": np.float32(step / 7)}) for step in (1, 2, 2, 3)]


def test_a_half_last_line_is_left_out_and_damage_elsewhere_is_named(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with refusal(f"{path}: line 2"):
        read_metrics(tmp_path)


def test_folders_that_cannot_be(tmp_path):
    with refusal(f"{tmp_path}/metrics.jsonl: cannot read"):
        read_metrics(tmp_path)
    (tmp_path / "file").write_text("")
    for call in (
        lambda: MetricsLog(tmp_path / "file"),
        lambda: write_samples(tmp_path / "file", 1, []),
    ):
        with refusal(f"{tmp_path}/file...cannot be written"):
            call()


def test_a_file_in_place_of_the_tensorboard_folder_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with refusal(f"{tmp_path}/tensorboard/events... cannot be written"):
        MetricsLog(tmp_path)
    assert (tmp_path / "tensorboard").read_text() == "mine"


def test_resume_says_what_damage_and_loss_it_finds(tmp_path, capsys):
    """Nothing of the file is lost: with damaged lines it is kept as it was, and a second one does
    not take its place.
    """
    write_steps(tmp_path, [0, 1, 2, 3, 4, 5, 6])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3], lines[5] = b"nonsense\n", b""
    path.write_bytes(before := b"".join(lines))
    write_steps(tmp_path, [], resume_step=6)
    damaged, missing = capsys.readouterr().err.splitlines()
    assert damaged.startswith(
        f"dapo_jax: {path}: 1 damaged lines are left out, the first is line 4"
    ) and damaged.endswith("is bad-metrics.jsonl")
    assert missing.endswith("has no line of step 3 and 1 more of the 6 steps that are done")
    assert (tmp_path / "bad-metrics.jsonl").read_bytes() == before
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 4, 6]
    path.write_bytes(b"again\n" + path.read_bytes())
    write_steps(tmp_path, [], resume_step=1)
    assert (
        "bad-metrics.jsonl-1" in capsys.readouterr().err
        and (tmp_path / "bad-metrics.jsonl").read_bytes() == before
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        "metrics.jsonl.tmp",
        "samples/step_000001.jsonl",
        "samples/step_000001.jsonl.tmp",
    ],
)
def test_a_link_in_a_run_folder_is_replaced_not_followed(tmp_path, name):
    target, link = tmp_path / "mine", tmp_path / "run" / name
    target.write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    write_steps(tmp_path / "run", [1])
    write_samples(tmp_path / "run", 1, [{"id": "a"}])
    assert target.read_text() == "mine" and not link.is_symlink()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize("room", [100, 400, 1100])
def test_a_full_disk_is_reported_once_and_the_next_run_resumes(tmp_path, room):
    """Whichever file it refuses, and although closing them would write again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (room, limits[1])
    )  # as a full disk, in the writes of this process
    try:
        with refusal(f"{tmp_path}/...written (File too large)"):
            write_steps(tmp_path, range(1, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = len(read_metrics(tmp_path))
    write_steps(tmp_path, range(done + 1, 8), resume_step=done)
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, max(8, done + 1)))
    assert not list(tmp_path.rglob("*.tmp"))


def test_samples(tmp_path):
    text = "π = 3\nline \u2028 two \ud800"
    rows = [
        {
            "id": "a",
            "response": text,
            "correct": np.bool_(True),
            "reward": np.float32(0.5),
            "length": np.int64(7),
        },
        {"id": "b"},
    ]
    path = write_samples(tmp_path, 12, rows)
    assert path == tmp_path / "samples" / "step_000012.jsonl" and [
        p.name for p in path.parent.iterdir()
    ] == [path.name]
    first, second = path.read_bytes().decode("utf-8").split("\n")[:-1]
    assert strict_loads(first) == {
        "id": "a",
        "response": text,
        "correct": True,
        "reward": 0.5,
        "length": 7,
    }
    assert strict_loads(second) == {"id": "b"} and "π" in first


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="the system does not tell a process's own peak"
)
def test_peak_memory_is_this_processs_own(monkeypatch):
    """Linux reports to a new process, by getrusage, the peak of its parent as its own."""
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


def test_a_file_that_cannot_be_opened_again_is_one_line(tmp_path, monkeypatch):
    opened = Path.open

    def no_more(path, mode="r", *args, **how):
        if mode == "ab":
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, mode, *args, **how)

    monkeypatch.setattr(Path, "open", no_more)
    with refusal(f"{tmp_path}/a.jsonl: ...written (Too many open files"):
        AppendFile(tmp_path / "a.jsonl", b"")
