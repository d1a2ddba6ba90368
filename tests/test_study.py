"""The study: what a ladder is, what it trains and what it does not train again, and the numbers of its table."""

import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dapo_jax.config import ConfigError, RewardSection, config_from_dict, flatten, load_config, to_dict
from dapo_jax.study import main, runs
from dapo_jax.study.figure import _figure, draw_study
from dapo_jax.study.ladder import load_study
from dapo_jax.study.order import Drawn, accepted, bias, leaked
from dapo_jax.study.summary import Run, as_markdown, at_tokens, budget, estimate, late, read_runs, steps_to, summarize
from dapo_jax.types import InputError, RunError

SHIPPED = Path(__file__).parent.parent / "configs" / "study_arithmetic_cpu.yaml"
TREE = {
    "base": {
        "model": {
            "architecture": {
                **{"vocab_size": 258, "model_dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn_dim": 16},
                **{"max_position": 64},
            }
        },
        "eval": {"sets": {"heldout": "arithmetic"}},
        "data": {"max_prompt_len": 24, "template": "{prompt}="},
        "rollout": {"max_response_len": 40},
        "reward": {"overlong_buffer_len": 8},
        "dapo": {"clip_eps_high": 0.2},
        "supervised": {"updates": 1},
        "train": {"steps": 4},
    },
    "warm_up": {},
    "seeds": [3, 5],
    "target_accuracy": 0.5,
    "ladder": [
        {"name": "naive"},
        {"name": "+ clip-higher", "set": {"dapo": {"clip_eps_high": 0.28}}, "watch": ["policy/entropy"]},
        {"name": "+ filter", "set": {"dapo": {"overlong_filtering": True}}},
    ],
}


@pytest.fixture
def study(tmp_path):
    def load(change=lambda tree: None):
        tree = copy.deepcopy(TREE)
        change(tree)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_study(str(path))

    return load


# ------------------------------------------------------------------------------------------------------------- ladder


def test_each_row_adds_to_the_row_above(study):
    configs = [flatten(to_dict(config_from_dict(row.tree))) for row in study().rows]
    assert [c["dapo.clip_eps_high"] for c in configs] == [0.2, 0.28, 0.28]
    assert [c["dapo.overlong_filtering"] for c in configs] == [False, False, True]
    for above, row in zip(configs, configs[1:], strict=False):
        assert sum(above[key] != row[key] for key in row) == 1


def test_a_row_replaces_data_sets_and_weights_whole(study):
    def change(tree):
        tree["base"]["data"]["train"] = {"a.jsonl": 1, "arithmetic": 2}
        tree["ladder"][1]["set"]["data"] = {"train": {"b.jsonl": 1}}

    configs = [config_from_dict(row.tree) for row in study(change).rows]
    assert [c.data.train for c in configs] == [{"a.jsonl": 1, "arithmetic": 2}, {"b.jsonl": 1}, {"b.jsonl": 1}]
    assert configs[1].data.template == "{prompt}="


def test_the_shipped_ladder_is_that_of_the_paper():
    """arXiv 2503.14476, table 1; each row differs from the one above in what it is named for and in nothing else; and a control."""
    rows = load_study(str(SHIPPED)).rows
    *rows, control = rows
    alone = flatten(to_dict(config_from_dict(control.tree)))
    naive = flatten(to_dict(config_from_dict(rows[0].tree)))
    assert {k: alone[k] for k in alone if alone[k] != naive[k]} == {"dapo.dynamic_sampling": True}
    configs = [flatten(to_dict(config_from_dict(row.tree))) for row in rows]
    changes = [{k: b[k] for k in b if a[k] != b[k]} for a, b in zip(configs, configs[1:], strict=False)]
    assert changes == [
        {"dapo.overlong_filtering": True},
        {"dapo.clip_eps_high": 0.28},
        {"dapo.overlong_filtering": False, "reward.overlong_penalty": True},
        {"dapo.loss_normalizer": "token-mean"},
        {"dapo.dynamic_sampling": True},
    ]
    first = configs[0]
    assert first["dapo.clip_eps_low"] == first["dapo.clip_eps_high"] == 0.2 and not first["reward.overlong_penalty"]
    assert first["dapo.loss_normalizer"] == "seq-mean-token-mean" and not first["dapo.dynamic_sampling"]


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("seeds",), [], "seeds: expected a list"),
        (("seeds",), [1, 1], "seeds: expected a list of different"),
        (("seeds",), [True], "seeds: expected a list"),
        (("ladder",), [], "ladder: expected a list of rows"),
        (("ladder", 1), {"set": {}}, r"ladder\[1\]: expected a mapping with a `name`"),
        (("ladder", 1, "colour"), "red", r"ladder\[1\]: expected a mapping"),
        (("ladder", 1, "set", "dapo", "clip_eps_hi"), 0.3, r"ladder\[1\]: dapo.clip_eps_hi: unknown key"),
        (("ladder", 1, "watch"), ["policy/entropie"], r"ladder\[1\].watch: expected a list of metrics"),
        (("ladder", 1, "watch"), ["eval/heldout/avg"], r"ladder\[1\].watch: expected a list of metrics of training steps"),
        (("target_accuracy",), 1.5, "target_accuracy: expected a number above 0"),
        (("base", "seed"), 4, "base.seed: is given by `seeds`"),
        (("base", "supervised", "updates"), 0, "base.supervised.updates: is 0"),
        (("warm_up",), {"rollout": {"max_response_len": -1}}, "warm_up: rollout.max_response_len"),
        (("rows",), [], "rows: unknown key"),
        (("warm_up",), None, "warm_up: expected a mapping"),
        (("base", "model"), {"folder": "some/model"}, "warm_up: is what rows start from, unless base.model.folder"),
        (("base", "eval", "every"), 0, "base.eval: has no sets"),
    ],
)
def test_bad_studies_get_one_clear_line(study, path, value, said):
    def change(tree):
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    with pytest.raises(ConfigError, match=said) as error:
        study(change)
    assert "\n" not in str(error.value) and "study.yaml" in str(error.value)


def test_a_key_that_is_missing_is_named(study):
    with pytest.raises(ConfigError, match="seeds: is missing"):
        study(lambda tree: tree.pop("seeds"))
    with pytest.raises(ConfigError, match="warm_up: is what rows start from"):
        study(lambda tree: tree.pop("warm_up"))


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def verbs(monkeypatch):
    """The verbs that a study starts, which here leave what the real ones would."""
    started = []

    def run(self, words, log):
        flags = dict(zip(words[1::2], words[2::2], strict=True))
        started.append((words[0], Path(flags.get("--run-dir") or flags["--out"]).relative_to(log.parents[2 if words[0] == "train" else 1])))
        if words[0] == "supervised":
            Path(flags["--out"]).mkdir(parents=True)
        else:
            folder = Path(flags["--run-dir"])
            folder.mkdir(parents=True, exist_ok=True)
            sets = [value for key, value in zip(words[1::2], words[2::2], strict=True) if key == "--set"]
            load_config(flags["--config"], [s for s in sets if not s.startswith("model.")])  # a config that train would take
            write_run(folder, [0.1, 0.2, 0.3])

    monkeypatch.setattr(runs._Processes, "run", run)
    return started


def write_run(folder: Path, accuracies, tokens=100):
    """Four steps, evaluated before, in the middle and after."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "updates": 0, "draws": 0, "eval/heldout/avg": accuracies[0]}]
    for step in range(1, 5):
        lines.append({"step": step, "updates": step, "draws": step, "rollout/tokens": tokens, "policy/entropy": 1.0 / step})
        if step % 2 == 0:
            lines[-1]["eval/heldout/avg"] = accuracies[step // 2]
    for line in lines:
        if "eval/heldout/avg" in line:
            line |= {"eval/heldout/response_len_mean": 20.0, "eval/heldout/truncated_fraction": 0.5}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_row_starts_from_its_seeds_warm_up_and_nothing_is_done_twice(study, verbs, tmp_path):
    out = tmp_path / "out"
    runs.train_all(study(), out, 1, print)
    rows = ["0_naive", "1_clip_higher", "2_filter"]
    assert sorted(verbs[:2]) == [("supervised", Path(f"warm/{seed}.part")) for seed in (3, 5)]
    assert verbs[2:] == [("train", Path(f"runs/{row}/{seed}")) for seed in (3, 5) for row in rows]
    assert sorted(p.name for p in (out / "warm").iterdir()) == ["3", "5"]
    del verbs[:]
    (out / "runs" / "1_clip_higher" / "5" / "metrics.jsonl").unlink()  # as if it had been interrupted before its first step
    (out / "runs" / "1_clip_higher" / "5").rmdir()
    runs.train_all(study(), out, 1, print)
    assert verbs == [("train", Path("runs/1_clip_higher/5"))]


def put(*path):
    """A change of a study's tree: the last of `path` is set where the others lead."""
    *keys, last, value = path

    def change(tree):
        for key in keys:
            tree = tree[key] if isinstance(tree, list) else tree.setdefault(key, {})
        tree[last] = value

    return change


@pytest.fixture
def begun(study, verbs, tmp_path, monkeypatch):
    """A study whose runs are all there, and `again`, which starts it with a change: what it starts then, of which folder."""
    out, start = tmp_path / "out", ["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    runs.train_all(study(), out, 1, print)
    monkeypatch.setattr("dapo_jax.study._undone", lambda config, seed, start: {"all_length": float(config.rollout.max_response_len)})
    monkeypatch.setattr("dapo_jax.study.draw_study", lambda *args: b"")

    def again(change, *flags):
        del verbs[:]
        study(change)
        assert main([*start, *flags]) == 0
        return [path for _, path in verbs]

    return again


@pytest.mark.parametrize("flags", [(), ("--summary",), ("--seeds", "3")])
@pytest.mark.parametrize(
    "change, file, said",
    [
        (put("base", "optim", "learning_rate", 0.5), "0_naive", "optim.learning_rate: is 1e-06, by which .*, but 0.5 in the study"),
        (put("ladder", 1, "set", "dapo", "clip_eps_high", 0.3), "1_clip_higher", "dapo.clip_eps_high: is 0.28, .* 0.3 in the study"),
        (put("base", "eval", "temperature", 0.5), "0_naive", "eval.temperature: is 1.0, .*0.5 in the study"),
        (put("warm_up", "supervised", "updates", 7), "warm_up", "supervised.updates: is 1, .*but 7 in the study"),
    ],
)
def test_a_study_with_another_config_is_not_credited_with_the_runs_of_the_old_one(begun, verbs, tmp_path, change, file, said, flags):
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "configs").iterdir()}
    with pytest.raises(ConfigError, match=rf"configs/{file}.yaml: {said}; give another --out, or set it back") as error:
        begun(change, *flags)
    assert "\n" not in str(error.value) and not verbs
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "configs").iterdir()} == before


def test_a_study_may_grow_and_what_makes_no_result_may_change(begun, tmp_path):
    added = {"name": "+ last", "set": {"dapo": {"dual_clip": 3}}}
    assert begun(put("base", "reward", "workers", 1)) == begun(put("target_accuracy", 0.1)) == begun(put("ladder", 2, "watch", [])) == []
    assert begun(lambda tree: tree["ladder"].append(added)) == [Path(f"runs/3_last/{seed}") for seed in (3, 5)]
    assert begun(put("seeds", [3, 5, 6])) == [Path(p) for p in ("warm/6.part", "runs/0_naive/6", "runs/1_clip_higher/6", "runs/2_filter/6")]
    renamed = put("ladder", 2, {"name": "+ punishment", "set": {"reward": {"overlong_penalty": False}}})
    assert begun(renamed, "--seeds", "3") == [Path("runs/2_punishment/3")]
    shutil.rmtree(tmp_path / "out" / "runs")
    assert len(begun(put("base", "dapo", "clip_eps_high", 0.25))) == 6  # nothing but the warm-up is left, which has no part in it


def test_longer_runs_go_on_and_shorter_ones_are_refused(begun, verbs):
    with pytest.raises(ConfigError, match="runs/0_naive/3: train.steps: is 3 in the study, but .* done 4; .* set it to 4 or more"):
        begun(put("base", "train", "steps", 3))
    with pytest.raises(InputError, match="holds no finished run yet"):  # those of four steps are not the table's
        begun(put("base", "train", "steps", 6))
    assert [verb for verb, _ in verbs] == 6 * ["train"]
    assert begun(put("base", "train", "steps", 4)) == []  # set back


def test_rows_of_a_pretrained_model_need_no_warm_up(study, verbs, tmp_path):
    def change(tree):
        tree["base"]["model"] = {"folder": str(tmp_path / "model")}
        del tree["warm_up"]

    pretrained = study(change)
    runs.train_all(pretrained, tmp_path / "out", 1, print)
    assert {verb for verb, _ in verbs} == {"train"} and len(verbs) == 6
    assert runs.start_dir(pretrained, tmp_path / "out", 5) == tmp_path / "model"


@pytest.mark.parametrize("folder", ["gs://bucket/models/tiny", "some-lab/Tiny-0.1B@main", "models/tiny"])
def test_a_model_folder_is_handed_on_as_it_was_given(study, monkeypatch, tmp_path, folder):
    def change(tree):
        tree["base"]["model"] = {"folder": folder}
        del tree["warm_up"]

    def run(self, words, log):
        config = load_config(words[2], words[6::2])
        assert (config.model.folder, config.model.architecture, config.seed) == (folder, None, int(Path(words[4]).name))
        write_run(Path(words[4]), [0.1, 0.2, 0.3])

    def measure(config, seed, start):
        measured.append((seed, str(start)))
        return {"all_length": 9.0}

    def asked(name, files):
        if len(measured) == 1:
            raise InputError(f"{name}: the hub cannot be reached")

    measured: list[tuple[int, str]] = []
    monkeypatch.setattr(runs._Processes, "run", run)
    monkeypatch.setattr("dapo_jax.study._undone", measure)
    monkeypatch.setattr("dapo_jax.study.local_model", asked)
    study(change)
    assert main(["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0  # a table, though seed 5's cannot be had
    assert measured == [(3, folder)]
    assert json.loads((tmp_path / "out" / "study.json").read_text())["without"] == {"all_length": [9.0, None, 1]}


def test_a_verb_that_fails_is_named_with_its_last_line(tmp_path):
    with runs._Processes(tmp_path / "cache", 1) as processes:
        processes.run(["config"], tmp_path / "good.log")
        with pytest.raises(RunError, match=r"bad.log: dapo_jax.config ended with status 2: dapo_jax: .*nothing.yaml: cannot read config"):
            processes.run(["config", "--config", str(tmp_path / "nothing.yaml")], tmp_path / "bad.log")
    assert "clip_eps_high" in (tmp_path / "good.log").read_text()


def test_runs_at_a_time_share_the_memory_of_a_gpu_unless_told_otherwise(tmp_path, monkeypatch):
    seen = []

    class Process:
        pid = 0

        def __init__(self, command, env, **rest):
            seen.append(env.get("XLA_PYTHON_CLIENT_MEM_FRACTION"))

        def wait(self):
            return 0

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None, raising=False)
    for jobs, told in ((1, None), (4, None), (4, "0.1")):
        if told:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", told)
        with runs._Processes(tmp_path / "cache", jobs) as processes:
            processes.run(["train"], tmp_path / "log")
    assert seen == [None, "0.200", "0.1"]


# ------------------------------------------------------------------------------------------------------------- numbers


def curve(accuracies, tokens=(10, 20, 40, 80), every=2, **metrics):
    steps = np.arange(1, len(tokens) + 1)
    eval_steps = every * np.arange(len(accuracies))
    along = np.concatenate([[0], tokens])[eval_steps]
    evals = {
        "avg": np.array(accuracies),
        "response_len_mean": np.full(len(accuracies), 9.0),
        "truncated_fraction": np.zeros(len(accuracies)),
    }
    return Run(steps, np.array(tokens), {k: np.array(v, float) for k, v in metrics.items()}, eval_steps, along, evals)


def test_accuracy_at_equal_tokens_lies_between_evaluations():
    run = curve([0.2, 0.4, 0.8])  # after 0, 20 and 80 tokens
    assert at_tokens(run, 20) == 0.4 and at_tokens(run, 50) == pytest.approx(0.6) and at_tokens(run, 80) == 0.8
    assert budget([{0: run}, {0: curve([0, 0, 0], (1, 2, 3, 5))}]) == 5


def test_steps_to_a_target():
    run = curve([0.2, 0.4, 0.8])
    assert steps_to(run, 0.4) == 2 and steps_to(run, 0.5) == pytest.approx(2.5) and steps_to(run, 0.1) == 0
    assert math.isnan(steps_to(run, 0.9))
    assert steps_to(run, 0.6, run.eval_tokens) == pytest.approx(50)


def test_late_values_and_estimates():
    run = curve([0, 0], tokens=range(1, 11), **{"policy/entropy": [9] * 8 + [1, 3]})
    assert late(run, "policy/entropy") == 2 and math.isnan(late(run, "policy/loss"))
    assert estimate([1.0, 3.0, math.nan]) == (2.0, pytest.approx(1.0), 2)  # std √2 over √2
    assert math.isnan(estimate([1.0]).error) and math.isnan(estimate([]).mean)


def test_late_means_are_over_steps_that_have_the_metric():
    run = curve([0, 0], **{"policy/upclipped_prob_mean": [0.9, 0.9, 0.9, math.nan]})
    assert math.isnan(late(run, "policy/upclipped_prob_mean")) and math.isnan(late(run, "policy/entropy"))
    run = curve([0, 0], tokens=range(10), **{"policy/upclipped_prob_mean": [math.nan] * 9 + [0.4]})
    assert late(run, "policy/upclipped_prob_mean") == pytest.approx(0.4)


def test_gains_are_paired_by_seed(study):
    rows = [
        {3: curve([0.2, 0.3, 0.4]), 5: curve([0.2, 0.3, 0.6])},
        {3: curve([0.2, 0.3, 0.5]), 5: curve([0.2, 0.3, 0.7])},
        {5: curve([0.2, 0.3, 0.9])},
    ]
    first, second, third = summarize(study(), rows)
    assert first["accuracy"].mean == pytest.approx(0.5) and first["gain"].seeds == 0
    # the seeds differ by 0.2, and each gains 0.1: no spread is left
    assert second["gain"].mean == pytest.approx(0.1) and second["gain"].error == pytest.approx(0, abs=1e-12)
    assert third["gain"] == (pytest.approx(0.2), pytest.approx(math.nan, nan_ok=True), 1)
    text = as_markdown(study(), [first, second, third])
    assert "| naive | 50.0 ± 10.0 | - |" in text and "| + clip-higher | 60.0 ± 10.0 | 10.0 ± 0.0 |" in text
    assert "3 (1 of 2)" in text  # seed 5 of the first row reaches 0.5 at step 3.33, seed 3 never


def test_first_finished_takes_the_short_groups_and_draw_order_does_not():
    correct = np.array([[1, 0], [1, 0], [1, 1], [1, 0], [0, 1]], bool)
    drawn = Drawn(lengths=np.array([[9, 9], [1, 3], [1, 1], [8, 2], [2, 2]]), correct=correct, finished=np.array([9, 3, 1, 8, 2]))
    assert accepted(drawn, 2, first_finished=False).tolist() == [0, 1]  # draw 2 is all right
    assert accepted(drawn, 2, first_finished=True).tolist() == [4, 1]
    found = bias([drawn], 2)
    assert (found["draw_order_length"], found["first_finished_length"]) == ((9 + 9 + 1 + 3) / 4, (2 + 2 + 1 + 3) / 4)
    assert found["all_length"] == (9 + 9 + 1 + 3 + 8 + 2 + 2 + 2) / 8 and found["draw_order_accuracy"] == 0.5


def test_unfiltered_groups_leak_through_the_overlong_penalty():
    """One mixed group, one all wrong of unequal length, one all wrong in which none is punished."""
    correct = np.array([[1, 0], [0, 0], [0, 0]], bool)
    drawn = Drawn(lengths=np.array([[2, 2], [4, 8], [3, 3]]), correct=correct, finished=np.zeros(3, int))
    section = RewardSection(overlong_buffer_len=4)
    # |A| is 1/√2 in both groups that differ; at token level they carry 4 and 12 tokens, at sample level two responses each
    assert leaked([drawn], section, max_response_len=8, normalizer="token-mean") == pytest.approx(12 / 16, rel=1e-5)
    assert leaked([drawn], section, max_response_len=8, normalizer="seq-mean-token-mean") == pytest.approx(1 / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- the whole


def test_table_figure_and_json_of_finished_runs(study, tmp_path, capsys, monkeypatch):
    study(lambda tree: None)
    out = tmp_path / "out"
    loaded = load_study(str(tmp_path / "study.yaml"))
    for n, row in enumerate(loaded.rows):
        for seed in loaded.seeds:
            write_run(runs.run_dir(out, loaded, row, seed), [0.1, 0.2 + 0.1 * n, 0.3 + 0.1 * n], tokens=100 + 100 * n)
    assert main(["--config", str(tmp_path / "study.yaml"), "--out", str(out), "--summary"]) == 0
    told = json.loads((out / "study.json").read_text())
    assert told["tokens"] == 400 and [row["row"] for row in told["rows"]] == ["naive", "+ clip-higher", "+ filter"]
    assert told["rows"][2]["accuracy"] == [pytest.approx(0.5), 0.0, 2]
    assert told["rows"][2]["accuracy_at_tokens"][0] == pytest.approx(0.1 + 0.3 * 400 / 600)
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    plain = draw_study(loaded, read_runs(loaded, out), {})
    orders = {f"{name}_length": estimate([20.0, 21.0]) for name in ("all", "draw_order", "first_finished")}
    assert plain == (out / "figure.png").read_bytes() != draw_study(loaded, read_runs(loaded, out), orders)


def test_the_figure_takes_runs_that_were_made_longer_beside_new_ones(study):
    longer, new = curve([0.1, 0.2, 0.4], tokens=range(1, 5)), curve([0.1, 0.3], tokens=range(1, 5), every=4)
    draw_study(study(), [{3: longer, 5: new}, {}, {}], {})  # one was evaluated in step 2 too, its last at first


def test_a_figure_of_many_rows_tells_them_apart(study):
    def change(tree):
        tree["ladder"] = [{"name": f"row {n}", "watch": ["policy/entropy"] if n == 9 else []} for n in range(10)]

    run = curve([0.1, 0.2, 0.4], **{"policy/entropy": [1, 2, 3, 4]})
    panels = _figure(study(change), [{3: run}] * 10, {}).axes
    looks = [[(line.get_color(), line.get_linestyle()) for line in panel.lines] for panel in panels[:3]]
    assert len(set(looks[0])) == 10 and looks[0] == looks[1] and looks[2] == looks[0][8:]


def test_what_the_starts_leave_undone_is_measured_once(study, tmp_path, capsys, monkeypatch):
    loaded, out, measured = study(), tmp_path / "out", []

    def measure(config, seed, start):
        measured.append((seed, start.name))
        return {"leaked_token-mean": 0.25 + 0.5 * (seed == loaded.seeds[0])}

    monkeypatch.setattr("dapo_jax.study._undone", measure)
    for seed in loaded.seeds:
        (out / "warm" / str(seed)).mkdir(parents=True)
        write_run(runs.run_dir(out, loaded, loaded.rows[0], seed), [0.1, 0.2, 0.3], tokens=100)
    for _ in range(2):
        assert main(["--config", str(tmp_path / "study.yaml"), "--out", str(out), "--summary"]) == 0
        assert "leaked_token-mean: 0.5 ± 0.25\n" in capsys.readouterr().out
        assert json.loads((out / "study.json").read_text())["without"] == {"leaked_token-mean": [0.5, 0.25, 2]}
    assert measured == [(seed, str(seed)) for seed in loaded.seeds]


def test_what_the_starts_leave_undone_is_measured_again_by_another_config(begun, tmp_path, capsys):
    undone = tmp_path / "out" / "undone" / "3.json"
    begun(put("target_accuracy", 0.4))
    assert json.loads(undone.read_text())["numbers"] == {"all_length": 40}
    shutil.rmtree(tmp_path / "out" / "runs")
    shutil.rmtree(tmp_path / "out" / "warm")
    begun(put("base", "rollout", "max_response_len", 39))
    assert "all_length: 39 ± 0" in capsys.readouterr().out


def test_nothing_finished_yet(study, tmp_path):
    study()
    with pytest.raises(Exception, match="holds no finished run yet"):
        main(["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--summary"])
