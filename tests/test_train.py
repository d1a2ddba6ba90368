"""The main job through its real command line: what it writes, how it resumes, how it refuses."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import in_process
import jax
import numpy as np
import pytest
from refusals import line_of, names
from runs import CONFIG, TESTS, install, run_train, steady, verb
from transformers import GenerationConfig

from dapo_jax import evaluate, export, supervised, train
from dapo_jax.config import Config, load_config
from dapo_jax.runtime import same_run
from dapo_jax.runtime.checkpoint import Checkpoints
from dapo_jax.runtime.metrics import METRICS, read_metrics
from dapo_jax.training import record
from dapo_jax.training import step as training_step
from dapo_jax.training.dynamic_sampling import DynamicSampler
from dapo_jax.types import InputError

pytestmark = pytest.mark.usefixtures("reward_module")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TESTS))
        assert run_train(folder / "tiny.yaml", folder / "run") == 0
    return folder / "tiny.yaml", folder / "run"


def test_a_run_leaves_what_it_promises(finished):
    config, run = finished
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["updates"] for line in lines] == [
        0,
        2,
        4,
        6,
        8,
    ]  # 6 x 4 responses a step, 12 an update
    assert all(b["draws"] >= a["draws"] for a, b in zip(lines, lines[1:], strict=False))
    assert lines[-1]["draws"] == sum(line["rollout/prompts"] for line in lines[1:])
    values = [(k, v) for line in lines for k, v in line.items()]
    assert all(
        len(v) == 64
        if k == "eval/heldout/digest"
        else isinstance(v, int | float) and math.isfinite(v)
        for k, v in values
    )
    keys = [
        k.replace("<set>", "heldout") for k in METRICS if "<set>" in k and "cons" not in k
    ]  # a custom verifier has no votes
    assert {k for line in lines for k in line if k.startswith("eval/")} == {
        k.replace("<k>", n) for k in keys for n in "12"
    }
    assert [("eval/heldout/avg" in line) for line in lines] == [True, False, True, False, True]
    assert load_config(run / "config.yaml") == load_config(config)
    assert (run / "curves.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())
    sample = json.loads((run / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {
        "prompt",
        "response",
        "correct",
        "reward",
        "penalty",
        "advantage",
        "group",
    } <= sample.keys()
    assert (
        "".join(text for text, *_ in sample["tokens"]) == sample["response"]
        and len(sample["tokens"]) == sample["length"]
    )


MASKS = ("token_masked", "sequence_masked", "sequence_vetoed")  # dapo.token_mask and others


def test_every_metric_of_the_table_is_written(finished):
    """All but a mean over tokens that are clipped from above, shares of masks, and those of
    experts: this run has none.
    """
    lines = read_metrics(finished[1])
    assert not any(line.get("policy/clip_fraction_high") for line in lines)
    missing = {k for k in METRICS if "<set>" not in k} - {k for line in lines for k in line}
    masks = {f"policy/{kind}_fraction" for kind in MASKS}
    experts = {"policy/router_entropy", "policy/expert_load_max"}
    assert missing == {"policy/upclipped_prob_mean"} | masks | experts


def test_rates_of_a_step_follow_rollout_steps(finished):
    assert [line["optim/lr"] for line in read_metrics(finished[1])[1:]] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 1e-3]
    )


def test_counts_of_dynamic_sampling_add_up(finished):
    """Informative groups drawn and carried in are trained on, or carried out."""
    carried = 0
    for line in read_metrics(finished[1])[1:]:
        assert line["filter/carried_groups"] == min(6, carried)
        informative = round(line.get("filter/kept_fraction", 0) * line["rollout/prompts"])
        assert informative + carried == 6 + line["filter/surplus_groups"]
        assert line["rollout/generation_batches"] == math.ceil(line["rollout/prompts"] / 8)
        carried = line["filter/surplus_groups"]


def test_interrupted_and_whole_runs_are_bit_identical(finished, tmp_path):
    """Stops after step 2 and resumes to step 4 (buffered groups included): metrics and weights equal
    those of one run.
    """
    config, whole = finished
    assert run_train(config, tmp_path / "run", "train.steps=2", "eval.every=2") == 0
    assert run_train(config, tmp_path / "run", "train.steps=4") == 0
    assert steady(tmp_path / "run") == steady(whole)
    for name in ("whole", "halves"):
        assert (
            verb(
                export,
                "--run-dir",
                whole if name == "whole" else tmp_path / "run",
                "--out",
                tmp_path / name,
            )
            == 0
        )
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "halves/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_quiet_run_says_one_line_and_a_tracker_gets_its_lines(
    config, tmp_path, capfd, monkeypatch
):
    lines = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=lines.append, finish=lambda: None)
    install(monkeypatch, "wandb", init=lambda **given: run, Settings=dict)
    quick = (
        "train.steps=1",
        "supervised.updates=1",
        "train.samples_per_step=0",
        "train.tracker=wandb",
    )
    quick = [word for setting in quick for word in ("--set", setting)]
    assert verb(train, "--config", config, "--run-dir", tmp_path / "run", "--quiet", *quick) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("done: 1 steps, 2 updates, ") and "; heldout 0." in line
    numbers = [
        {key: value for key, value in line.items() if not isinstance(value, str)}
        for line in read_metrics(tmp_path / "run")
    ]
    assert lines == numbers and len(lines) == 2
    assert verb(evaluate, "--config", config, "--run-dir", tmp_path / "run", "--quiet") == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("eval heldout: avg@2 ") and len(line) < 90


def test_finished_run_started_again_does_nothing(finished):
    before = (finished[1] / "metrics.jsonl").read_bytes()
    assert run_train(*finished) == 0
    assert (finished[1] / "metrics.jsonl").read_bytes() == before


@pytest.mark.multiprocess
def test_killed_run_resumes_from_its_checkpoint(config, tmp_path):
    command = [
        sys.executable,
        "-m",
        "dapo_jax.train",
        "--config",
        config,
        "--run-dir",
        tmp_path / "run",
        "--set",
        "train.save_every=1",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_PLATFORMS": "cpu",
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 240
        while (
            not (tmp_path / "run/checkpoints/1").exists()
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "resumed from the checkpoint of step" in again.stdout and "warm-up" not in again.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_saving_by_the_clock_changes_no_result_and_loses_at_most_a_phase(
    finished, tmp_path, monkeypatch
):
    """A checkpoint after each sampling and each step, none of them a whole step but the last; a
    crash in the updates of step 3 costs these updates only."""
    seconds = itertools.count(0, 100)
    monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    saved, save = [], Checkpoints.save

    def save_and_note(self, step, *args, partial=False):
        saved.append((step, partial))
        save(self, step, *args, partial=partial)

    monkeypatch.setattr(Checkpoints, "save", save_and_note)
    by_clock = ("train.save_every=100", "train.save_every_s=1")
    update, drawn = training_step.Trainer.update, []

    def crash(self, run, times):
        if run.progress.step == 2:
            raise RuntimeError("crashed")
        return update(self, run, times)

    monkeypatch.setattr(training_step.Trainer, "update", crash)
    with pytest.raises(RuntimeError, match="crashed"):
        run_train(finished[0], tmp_path / "run", *by_clock)
    monkeypatch.setattr(training_step.Trainer, "update", update)
    sample = DynamicSampler.draw
    monkeypatch.setattr(
        DynamicSampler, "draw", lambda self, *a: drawn.append(1) or sample(self, *a)
    )
    assert run_train(finished[0], tmp_path / "run", *by_clock) == 0
    assert len(drawn) == 1  # step 4; the groups of step 3 were in the checkpoint
    inside = [(step, True) for step in (0, 1, 1, 2, 2, 3, 3)]
    assert [one for one in saved if one[0] > 0 or one[1]][-8:] == [*inside, (4, False)]
    assert steady(tmp_path / "run") == steady(finished[1])


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_nothing_compiles_after_the_first_steps(config, tmp_path, monkeypatch):
    """A step may meet a length that none before it had: two are allowed, the other four are not."""
    compiled, counts, plain = [], [], train.Recorder.record
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: (
            compiled.append(len(counts) + 1)
            if event == "/jax/core/compile/backend_compile_duration"
            else None
        )
    )

    def record(*args):
        plain(*args)
        counts.append(len(compiled))

    monkeypatch.setattr(train.Recorder, "record", record)
    monkeypatch.setattr(in_process, "_KNOWN", {})  # as in a process of its own
    settings = ("train.steps=6", "eval.every=0", "train.save_every=1")
    assert run_train(config, tmp_path / "run", *settings) == 0
    assert len(counts) == 6 and 1 in compiled and set(compiled) <= {1, 2}  # in which step


@pytest.mark.slow
def test_naive_grpo_is_the_same_code_with_the_parts_off(config, tmp_path):
    off = (
        "dapo.dynamic_sampling=false",
        "dapo.clip_eps_high=0.2",
        "dapo.loss_normalizer=seq-mean-token-mean",
        "reward.overlong_penalty=false",
    )
    assert (
        run_train(
            config, tmp_path / "run", *off, "train.steps=2", "eval.every=0", "supervised.updates=0"
        )
        == 0
    )
    for line in read_metrics(tmp_path / "run"):
        assert (line["rollout/prompts"], line["rollout/generation_batches"]) == (6, 1)
        assert (line["filter/surplus_groups"], line["reward/overlong_penalty_mean"]) == (0, 0)


@pytest.mark.default("recompute-float32-*")
@pytest.mark.parametrize(
    "mode, dtype, least, most",
    [
        ("recompute", "float32", 0, 1e-4),
        ("sampler", "float32", 0, 1e-4),
        ("recompute", "bfloat16", 1e-5, 1e-2),
    ],
)
def test_old_logprobs_both_ways(config, tmp_path, mode, dtype, least, most):
    """Sampler and trainer agree to 1e-4 in float32, so both ways train alike; measured 4e-8, and
    5e-4 in bfloat16.
    """
    settings = [
        f"dapo.old_logprobs={mode}",
        f"model.compute_dtype={dtype}",
        "dapo.importance_cap=2",
    ]
    assert (
        run_train(
            config,
            tmp_path / "run",
            *settings,
            "train.steps=1",
            "eval.every=0",
            "supervised.updates=0",
        )
        == 0
    )
    line = read_metrics(tmp_path / "run")[-1]
    assert least < line["policy/sampler_gap_mean"] < most
    assert line["policy/importance_capped_fraction"] == 0
    assert (line["time/old_logprobs_s"] > 0) == (mode == "recompute")


@pytest.mark.slow
def test_partial_rollouts_resume_bit_for_bit(config, tmp_path):
    """Open groups go through the checkpoint; a whole run and one that was interrupted write the
    same lines.
    """
    settings = (
        "dapo.partial_rollouts=true",
        "dapo.prompts_per_draw=24",
        "eval.every=0",
        "supervised.updates=0",
        "train.save_every=1",
    )
    assert run_train(config, tmp_path / "whole", *settings, "train.steps=4") == 0
    assert run_train(config, tmp_path / "cut", *settings, "train.steps=2") == 0
    assert run_train(config, tmp_path / "cut", *settings, "train.steps=4") == 0
    assert steady(tmp_path / "cut") == steady(tmp_path / "whole")
    lines = steady(tmp_path / "whole")
    assert any(line["filter/open_groups"] for line in lines[1:3])
    assert np.cumsum([line["rollout/prompts"] for line in lines]).tolist() == [
        line["draws"] for line in lines
    ]


def test_evaluation_of_run_and_of_its_export_agree(finished, tmp_path, capsys):
    config, run = finished
    assert verb(export, "--run-dir", run, "--out", tmp_path / "hf") == 0
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")  # of the byte tokenizer
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (
        1,
        0,
        None,
    )
    sampling = (generation.do_sample, generation.temperature, generation.top_p, generation.top_k)
    assert sampling == (True, 1.0, 1.0, 0)
    assert verb(evaluate, "--config", config, "--run-dir", run, "--json", tmp_path / "a.json") == 0
    assert (
        verb(
            evaluate, "--config", config, "--model", tmp_path / "hf", "--json", tmp_path / "b.json"
        )
        == 0
    )
    a, b = (json.loads((tmp_path / f"{x}.json").read_text()) for x in "ab")
    assert a["step"] == 4 and a["sets"] == b["sets"]
    last = read_metrics(run)[-1]
    assert (
        a["sets"]["heldout"].items()
        >= {k.removeprefix("eval/heldout/"): v for k, v in last.items() if "heldout" in k}.items()
    )
    assert "avg@2" in capsys.readouterr().out


def test_supervised_writes_a_folder_that_train_starts_from(config, tmp_path, capfd):
    assert verb(supervised, "--config", config, "--out", tmp_path / "warm", "--quiet") == 0
    assert capfd.readouterr().out == f"wrote {tmp_path / 'warm'}\n"
    assert verb(supervised, "--config", config, "--out", tmp_path / "warm") == 2  # not overwritten
    start = (
        "model.architecture=null",
        f"model.folder={tmp_path / 'warm'}",
        "supervised.updates=0",
        "train.steps=1",
        "eval.every=0",
    )
    assert run_train(config, tmp_path / "run", *start) == 0


BAD = {
    "missing model folder": (
        ("model.architecture=null", "model.folder=nowhere"),
        "nowhere: no such folder",
    ),
    "missing data": (("data.train=nowhere.jsonl",), "nowhere.jsonl: no such file"),
    "missing eval data": (("eval.sets.heldout=nowhere.jsonl",), "nowhere.jsonl: no such file"),
    "unknown kind of data": (("data.train=x.docx",), "x.docx: ...kind"),
    "unknown key": (("dapo.clip=1",), "...dapo.clip: unknown"),
    "G = 1": (("dapo.responses_per_prompt=1",), "...dapo.responses_per_prompt: ...1"),
    "rows over devices": (("train.rows_per_microbatch=12",), "...train.rows_per_microbatch: 12 "),
    "slots over devices": (("rollout.decode_slots=30",), "...rollout.decode_slots: 30 "),
    "mesh": (("mesh.fsdp=3",), "mesh: data 1 x fsdp 3 x tensor 1 ...8 devices"),
    "every prompt too long": (("data.max_prompt_len=1",), "...longer than 1 tokens"),
    "tokenizer beyond the embedding": (("model.architecture.vocab_size=50",), "...embedding of 50"),
    "reward module missing": (
        ("reward.function=gone:f", "reward.allowed_modules=[gone]"),
        "reward.function: ...'gone'",
    ),
    "reward raises": (
        ("reward.function=reward_functions:raises",),
        "reward.function: reward_functions:raises ",
    ),
    "reward of another signature": (
        ("reward.function=reward_functions:_raise",),
        "reward.function: ..._raise() takes 0 positional arguments but 3 were given",
    ),
    "tracker missing": (("train.tracker=mlflow",), "train.tracker: mlflow "),
    "no group is ever mixed": (
        ("reward.verifier=strict", "reward.function=null"),
        "...0 of 6 groups",
    ),
}


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(config, tmp_path, capfd, case):
    overrides, expected = BAD[case]
    quick = ("eval.every=0", "supervised.updates=0", "dapo.max_generation_batches=2")
    assert run_train(config, tmp_path / "run", *quick, *overrides) == 2
    said, _ = line_of(capfd)
    assert names(said, expected), said


def test_a_run_folder_of_another_run_is_refused(finished, capfd):
    config, run = finished
    before = (run / "config.yaml").read_bytes()
    assert run_train(config, run, "optim.learning_rate=1e-5") == 2
    assert names(line_of(capfd)[0], "optim.learning_rate: ...1e-05, ")
    assert (run / "config.yaml").read_bytes() == before


def test_no_checkpoint_is_status_3(config, tmp_path):
    assert verb(evaluate, "--config", config, "--run-dir", tmp_path) == 3


@pytest.mark.parametrize(
    "count, sizes", [(1, [1]), (32, [32]), (33, [17, 16]), (65, [22, 22, 21]), (512, [32] * 16)]
)
def test_the_groups_of_an_underfilled_step_are_spread_evenly_over_its_updates(count, sizes):
    parts = training_step.groups_of_updates(count, Config().dapo)
    groups = list(range(count))
    assert [len(groups[part]) for part in parts] == sizes and [
        g for part in parts for g in groups[part]
    ] == groups


@pytest.mark.slow
def test_on_cap_train_uses_what_there_is(config, tmp_path, capfd):
    """One generation batch of 2 prompts cannot fill 6 groups; the step trains on the few there are."""
    few = ("dapo.prompts_per_draw=2", "dapo.max_generation_batches=1", "dapo.on_cap=train")
    assert (
        run_train(
            config, tmp_path / "run", *few, "train.steps=2", "eval.every=0", "supervised.updates=0"
        )
        == 0
    )
    lines = read_metrics(tmp_path / "run")
    assert all(line["rollout/prompts"] == 2 for line in lines)
    assert np.diff([line["updates"] for line in lines]) <= 1
    assert [line["optim/underfilled_updates"] for line in lines] == [1, 1]
    assert re.search(
        r"step 1: dapo.on_cap: trained on [12] of 6 groups, in 1 updates of ([12]) to \1 groups \(3 fill one\)",
        capfd.readouterr().out,
    )


@pytest.mark.slow
def test_a_starved_step_is_sampled_again_and_resumes_with_a_raised_cap(config, tmp_path, capfd):
    """Of 6 prompts, two responses each, not all groups are mixed.

    With the cap lifted, the run is the one that never met it.
    """
    settings = (
        "dapo.prompts_per_draw=2",
        "dapo.responses_per_prompt=2",
        "train.steps=2",
        "eval.every=0",
        "supervised.updates=0",
    )
    for _ in range(2):
        assert run_train(config, tmp_path / "cut", *settings, "dapo.max_generation_batches=3") == 2
        assert (
            "of 6 groups to train on; this step carried in 0 and drew 6: " in capfd.readouterr().err
        )
    assert (
        len((tmp_path / "cut/samples/step_000001.jsonl").read_text().splitlines()) == 6
    )  # what was drawn can be looked at
    assert run_train(config, tmp_path / "cut", *settings, "dapo.max_generation_batches=20") == 0
    assert run_train(config, tmp_path / "whole", *settings, "dapo.max_generation_batches=20") == 0
    assert steady(tmp_path / "cut") == steady(tmp_path / "whole")


@pytest.mark.slow
def test_a_step_that_keeps_no_group_leaves_a_run_that_resumes(config, tmp_path, capfd):
    """No answer is right, then with other problems half of them are."""
    data, judge = tmp_path / "data.jsonl", tmp_path / "judge.py"
    judge.write_text(
        "def judge(problem, text, response_len):\n    return problem.answer == '1' and sum(text.encode()) % 2 == 0, 0.0\n"
    )
    settings = (
        "dapo.prompts_per_draw=2",
        "dapo.on_cap=train",
        "train.steps=1",
        "eval.every=0",
        "supervised.updates=0",
    )
    settings += (
        f"data.train={data}",
        f"reward.function={judge}:judge",
        f"reward.allowed_modules=[{judge}]",
    )
    for answer, batches, allow, status in (
        (0, 1, "", 2),
        (0, 2, "", 2),
        (1, 2, "data.train", 0),
    ):
        data.write_text(
            "".join(
                json.dumps({"prompt": f"{n}+{n}", "answer": str(answer)}) + "\n"
                for n in range(10, 20)
            )
        )
        limit = f"dapo.max_generation_batches={batches}"
        assert run_train(config, tmp_path / "run", *settings, limit, allow=allow) == status
        drew = f"0 of 6 groups to train on; this step carried in 0 and drew {2 * batches}: 0 all-correct, {2 * batches} all-incorrect, "
        assert (drew in capfd.readouterr().err) == (status == 2)
    (line,) = read_metrics(tmp_path / "run")
    assert line["rollout/prompts"] == line["draws"] == 4


def test_a_run_folder_takes_its_data_from_anywhere(config, tmp_path):
    """The paths of data sets may change; their number, weights and columns may not."""
    two = (
        "data.train=[a.jsonl, {path: b.jsonl, weight: 2, columns: {prompt: q}}]",
        "eval.sets={e: e.jsonl}",
    )
    same_run.write_config(load_config(config, two), tmp_path / "run", None)

    def refusal(*overrides, allow=()):
        try:
            changed = load_config(config, (*two, *overrides))
            same_run.check_same_run(changed, tmp_path / "run", None, allow)
        except InputError as e:
            return str(e)

    moved = ("data.train.0=d/a.jsonl", "data.train.1.path=d/b.jsonl")
    assert refusal() is None
    assert refusal(*moved, "eval.sets={e: f.jsonl}") is None
    assert "data.train.1.weight: is 3.0, but" in refusal(*moved, "data.train.1.weight=3")
    assert "data.train.2.weight: is 1.0, but" in refusal("data.train.2=c.jsonl")
    assert "data.train.1.columns.prompt: is None, but" in refusal(
        *moved, "data.train.1.columns=null"
    )
    assert "data.train.1.columns.prompt: is None, but" in refusal("data.train=a.jsonl")
    assert (
        refusal("data.train=other.jsonl", allow=["data.train"]) is None
    )  # by digest, once it is loaded
