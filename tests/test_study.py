"""The study: what a ladder is, what it trains and what it does not train again, and the numbers of
its table.
"""

import copy
import io
import json
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from record_study import CONFIG, PAGE, RECORDS, pack, tables
from refusals import refusal

from dapo_jax.config import ConfigError, dump_yaml, flatten, to_dict
from dapo_jax.study import (
    COLUMNS,
    as_markdown,
    at,
    budget,
    columns,
    draw,
    estimate,
    jobs,
    late,
    load_study,
    main,
    mechanisms,
    read_runs,
    steps_to,
)

pytestmark = pytest.mark.host

SHIPPED = CONFIG
TREE = {
    "base": {
        "model": {
            "architecture": {
                **{
                    "vocab_size": 258,
                    "model_dim": 16,
                    "layers": 1,
                    "heads": 2,
                    "kv_heads": 2,
                    "head_dim": 8,
                    "ffn_dim": 16,
                },
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
        {
            "name": "+ clip-higher",
            "set": {"dapo": {"clip_eps_high": 0.28}},
            "watch": ["policy/entropy"],
        },
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


# ------------------------------------------------------------------------------------------- ladder


def test_each_row_adds_to_the_row_above(study):
    configs = [flatten(to_dict(row.config)) for row in study().rows]
    assert [c["dapo.clip_eps_high"] for c in configs] == [0.2, 0.28, 0.28]
    assert [c["dapo.overlong_filtering"] for c in configs] == [False, False, True]
    for above, row in zip(configs, configs[1:], strict=False):
        assert sum(above[key] != row[key] for key in row) == 1


def test_a_row_changes_the_row_that_it_names_and_runs_with_the_first_seeds(study, tmp_path):
    def change(tree):
        tree["ladder"][2] |= {"of": "naive", "seeds": 1}

    rows = study(change).rows
    last = flatten(to_dict(rows[2].config))
    assert last["dapo.clip_eps_high"] == 0.2 and last["dapo.overlong_filtering"]
    assert [(row.of, row.seeds) for row in rows] == [(None, (3, 5)), (0, (3, 5)), (0, (3,))]
    folders = [folder for name, *_, folder in jobs(study(change), tmp_path) if name == "+ filter"]
    assert folders == [tmp_path / "runs" / rows[2].key / "3"]


def test_a_row_replaces_data_sets_and_weights_whole(study):
    def change(tree):
        tree["base"]["data"]["train"] = ["a.jsonl", {"path": "arithmetic", "weight": 2}]
        tree["ladder"][1]["set"]["data"] = {"train": ["b.jsonl"]}

    configs = [row.config for row in study(change).rows]
    assert [[one.path for one in c.data.train] for c in configs] == [
        ["a.jsonl", "arithmetic"],
        ["b.jsonl"],
        ["b.jsonl"],
    ]
    assert configs[1].data.template == "{prompt}="


PARTS = {  # of DAPO, with their values in naive GRPO
    "dapo.clip_eps_high": (0.28, 0.2),
    "dapo.loss_normalizer": ("token-mean", "seq-mean-token-mean"),
    "reward.overlong_penalty": (True, False),
    "dapo.dynamic_sampling": (True, False),
}


def test_the_shipped_study_takes_each_part_of_dapo_away():
    """arXiv 2503.14476, section 3: four parts; each row differs from the one that it changes in
    what it is named for and in nothing else.
    """
    rows = load_study(str(SHIPPED)).rows
    configs = [flatten(to_dict(row.config)) for row in rows]
    naive, whole = configs[:2]
    assert naive["dapo.clip_eps_low"] == whole["dapo.clip_eps_low"] == 0.2
    assert {k: (whole[k], naive[k]) for k in whole if whole[k] != naive[k]} == PARTS
    responses = naive["dapo.prompts_per_step"] * naive["dapo.responses_per_prompt"]
    assert responses == 16 * naive["dapo.responses_per_update"]
    changes = [
        (rows[row.of].name, {k: c[k] for k in c if c[k] != configs[row.of].get(k)})
        for row, c in zip(rows[2:], configs[2:], strict=True)
    ]
    without = [("DAPO", {key: value}) for key, (_, value) in PARTS.items()]
    assert changes == [
        *without,
        ("DAPO", {"dapo.overlong_filtering": True}),
        ("DAPO", {"dapo.partial_rollouts": True, "dapo.max_policy_age": 2}),
        ("DAPO", {"dapo.importance_cap": 2.0}),
        ("DAPO, importance correction", {"rollout.weights": "int8"}),
    ]


@pytest.mark.parametrize(
    "path, value, key",
    [
        (("seeds",), [], "seeds"),
        (("seeds",), [1, 1], "seeds"),
        (("seeds",), [True], "seeds.0"),
        (("seeds",), [-1], "seeds"),
        (("ladder",), [], "ladder"),
        (("ladder", 1), {"set": {}}, "ladder.1.name"),
        (("ladder", 1, "colour"), "red", "ladder.1.colour"),
        (("ladder", 1, "of"), "+ filter", "ladder.1"),
        (("ladder", 1, "name"), "naive", "ladder.1"),
        (("ladder", 1, "seeds"), 0, "ladder.1.seeds"),
        (("ladder", 1, "set", "dapo", "clip_eps_hi"), 0.3, "ladder.1: dapo.clip_eps_hi"),
        (("ladder", 1, "watch"), ["policy/entropie"], "ladder.1.watch"),
        (("ladder", 1, "watch"), ["eval/heldout/avg"], "ladder.1.watch"),
        (("target_accuracy",), 1.5, "target_accuracy"),
        (("base", "seed"), 4, "base.seed"),
        (("base", "supervised", "updates"), 0, "base.supervised.updates"),
        (("warm_up",), {"rollout": {"max_response_len": -1}}, "warm_up: rollout.max_response_len"),
        (("rows",), [], "rows"),
        (("warm_up",), None, "warm_up"),
        (("base", "model"), {"folder": "some/model"}, "warm_up"),
        (("base", "eval", "every"), 0, "base.eval"),
    ],
)
def test_bad_studies_get_one_clear_line(study, path, value, key):
    def change(tree):
        for part in path[:-1]:
            tree = tree[part]
        tree[path[-1]] = value

    with refusal(f"...study.yaml: {key}: ", ConfigError):
        study(change)


@pytest.mark.parametrize("key", ["base", "seeds", "target_accuracy", "ladder", "warm_up"])
def test_a_key_that_is_missing_is_named(study, key):
    with refusal(f"...study.yaml: {key}: ", ConfigError):
        study(lambda tree: tree.pop(key))


# --------------------------------------------------------------------------------------------- runs


def write_run(folder: Path, accuracies, tokens=100):
    """Four steps, evaluated before, in the middle and after."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 0, "updates": 0, "draws": 0, "eval/heldout/avg": accuracies[0]}]
    for step in range(1, 5):
        lines.append(
            {
                "step": step,
                "updates": step,
                "draws": step,
                "rollout/tokens": tokens,
                "policy/entropy": 1.0 / step,
            }
        )
        if step % 2 == 0:
            lines[-1]["eval/heldout/avg"] = accuracies[step // 2]
    for line in lines:
        if "eval/heldout/avg" in line:
            line |= {"eval/heldout/response_len_mean": 20.0, "eval/heldout/digest": "0f"}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def start(study, tmp_path, monkeypatch):
    """Starts the study with a change; returns what it trains.

    `train` and `supervised` leave what the real ones would.
    """
    trained = []

    def train(config, folder, *, quiet):
        trained.append(str(folder.relative_to(tmp_path / "out")))
        assert config.seed == int(folder.name) and not config.supervised.updates
        write_run(folder, [0.1, 0.2, 0.3])
        (folder / "config.yaml").write_text(dump_yaml(config))

    def warm_up(words):
        out = Path(words[words.index("--out") + 1])
        trained.append(str(out.relative_to(tmp_path / "out")))
        out.mkdir(parents=True)

    monkeypatch.setattr("dapo_jax.study.train", train)
    monkeypatch.setattr("dapo_jax.supervised.main", warm_up)

    def start(change=lambda tree: None, *flags):
        study(change)
        trained.clear()
        assert (
            main(["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), *flags])
            == 0
        )
        return list(trained)

    return start


def put(*path):
    """A change of a study's tree: the last of `path` is set where the others lead."""
    *keys, last, value = path

    def change(tree):
        for key in keys:
            tree = tree[key] if isinstance(tree, list) else tree.setdefault(key, {})
        tree[last] = value

    return change


ROWS = ("0_naive", "1_clip_higher", "2_filter")


def test_every_row_starts_from_its_seeds_warm_up_and_nothing_is_done_twice(start, tmp_path):
    out = tmp_path / "out"
    assert start() == [
        path
        for seed in (3, 5)
        for path in (f"warm/{seed}", *(f"runs/{row}/{seed}" for row in ROWS))
    ]
    assert sorted(path.name for path in (out / "warm").iterdir()) == ["3", "3.yaml", "5", "5.yaml"]
    assert start() == []
    lines = (out / "runs" / ROWS[1] / "5" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "runs" / ROWS[1] / "5" / "metrics.jsonl").write_text(
        "".join(lines[:-1])
    )  # as if interrupted before its last step
    assert start() == [f"runs/{ROWS[1]}/5"]


@pytest.mark.default("*-flags0")
@pytest.mark.parametrize("flags", [(), ("--seeds", "3")])
@pytest.mark.parametrize(
    "change, file, said",
    [
        (
            put("base", "optim", "learning_rate", 0.5),
            "warm/3",
            "optim.learning_rate: was 1e-06 ...is 0.5 ",
        ),
        (
            put("ladder", 1, "set", "dapo", "clip_eps_high", 0.3),
            "runs/1_clip_higher/3/config",
            "dapo.clip_eps_high: was 0.28 ...is 0.3 ",
        ),
        (
            put("base", "eval", "temperature", 0.5),
            "runs/0_naive/3/config",
            "eval.temperature: was 1.0 ...is 0.5 ",
        ),
        (
            put("warm_up", "supervised", "updates", 7),
            "warm/3",
            "supervised.updates: was 1 ...is 7 ",
        ),
    ],
)
def test_runs_of_another_config_are_refused(start, tmp_path, change, file, said, flags):
    start()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.yaml")}
    with refusal(f"...{file}.yaml: {said}", ConfigError):
        start(change, *flags)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.yaml")} == before


@pytest.mark.slow
def test_a_study_may_grow_and_what_makes_no_result_may_change(start):
    start()
    added = {"name": "+ last", "set": {"dapo": {"dual_clip": 3}}}
    assert (
        start(put("base", "reward", "workers", 1))
        == start(put("target_accuracy", 0.1))
        == start(put("ladder", 2, "watch", []))
        == []
    )
    assert start(lambda tree: tree["ladder"].append(added)) == [
        f"runs/3_last/{seed}" for seed in (3, 5)
    ]
    assert start(put("seeds", [3, 5, 6])) == ["warm/6", *(f"runs/{row}/6" for row in ROWS)]
    renamed = put(
        "ladder", 2, {"name": "+ punishment", "set": {"reward": {"overlong_penalty": False}}}
    )
    assert start(renamed, "--seeds", "3") == ["runs/2_punishment/3"]


@pytest.mark.slow
def test_longer_runs_resume(start):
    start()
    with refusal("...no complete run"):  # those of four steps are not the table's
        start(put("base", "train", "steps", 6))
    assert start(put("base", "train", "steps", 4)) == []


@pytest.mark.default("models*")
@pytest.mark.parametrize(
    "folder", ["gs://bucket/models/tiny", "some-lab/Tiny-0.1B@main", "models/tiny"]
)
def test_rows_of_a_pretrained_model_need_no_warm_up(study, monkeypatch, tmp_path, folder):
    def change(tree):
        tree["base"]["model"] = {"folder": folder}
        del tree["warm_up"]

    def train(config, run_dir, *, quiet):
        assert (config.model.folder, config.model.architecture, config.seed) == (
            folder,
            None,
            int(run_dir.name),
        )
        write_run(run_dir, [0.1, 0.2, 0.3])

    monkeypatch.setattr("dapo_jax.study.train", train)
    study(change)
    assert main(["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "warm").exists()


# ------------------------------------------------------------------------------------------ numbers


def curve(accuracies, tokens=(10, 20, 40, 80), every=2, **metrics):
    run = {key: np.array([math.nan, *values], float) for key, values in metrics.items()}
    held_out = {"avg": accuracies, "response_len_mean": 9.0, "truncated_fraction": 0.0}
    for key, values in held_out.items():
        run[key] = np.full(len(tokens) + 1, math.nan)
        run[key][: every * len(accuracies) : every] = values
    return run | {"step": np.arange(len(tokens) + 1), "tokens": np.array([0, *tokens], float)}


def test_accuracy_at_equal_tokens_lies_between_evaluations():
    run = curve([0.2, 0.4, 0.8])  # after 0, 20 and 80 tokens
    assert at(run, 20) == 0.4 and at(run, 50) == pytest.approx(0.6) and at(run, 80) == 0.8
    assert budget([{0: run}, {0: curve([0, 0, 0], (1, 2, 3, 5))}]) == 5


def test_steps_to_a_target():
    run = curve([0.2, 0.4, 0.8])
    assert (
        steps_to(run, 0.4) == 2
        and steps_to(run, 0.5) == pytest.approx(2.5)
        and steps_to(run, 0.1) == 0
    )
    assert math.isnan(steps_to(run, 0.9))
    assert steps_to(curve([0.5, 0.4, 0.8]), 0.6) == pytest.approx(3)  # a fall before the rise


def test_late_values_and_estimates():
    run = curve([0, 0], tokens=range(1, 11), **{"policy/entropy": [9] * 8 + [1, 3]})
    assert late(run, "policy/entropy") == 2 and math.isnan(late(run, "policy/loss"))
    assert estimate([1.0, 3.0, math.nan]) == (2.0, pytest.approx(1.0), 2)  # std √2 over √2
    assert math.isnan(estimate([1.0]).error) and math.isnan(estimate([]).mean)


def test_late_means_are_over_steps_that_have_the_metric():
    run = curve([0, 0], **{"policy/upclipped_prob_mean": [0.9, 0.9, 0.9, math.nan]})
    assert math.isnan(late(run, "policy/upclipped_prob_mean")) and math.isnan(
        late(run, "policy/entropy")
    )
    run = curve([0, 0], tokens=range(10), **{"policy/upclipped_prob_mean": [math.nan] * 9 + [0.4]})
    assert late(run, "policy/upclipped_prob_mean") == pytest.approx(0.4)


def test_gains_are_paired_by_seed(study):
    rows = [
        {3: curve([0.2, 0.3, 0.4]), 5: curve([0.2, 0.3, 0.6])},
        {3: curve([0.2, 0.3, 0.5]), 5: curve([0.2, 0.3, 0.7])},
        {5: curve([0.2, 0.3, 0.9])},
    ]
    accuracy, gain = zip(*(columns(study(), rows, number)[:2] for number in range(3)), strict=True)
    assert accuracy[0].mean == pytest.approx(0.5) and gain[0].seeds == 0
    # the seeds differ by 0.2, and each gains 0.1: no spread is left
    assert gain[1].mean == pytest.approx(0.1) and gain[1].error == pytest.approx(0, abs=1e-12)
    assert gain[2] == (pytest.approx(0.2), pytest.approx(math.nan, nan_ok=True), 1)
    text = as_markdown(study(), rows)
    assert "| naive | - | 50.0 ± 10.0 | - |" in text
    assert "| + clip-higher | naive | 60.0 ± 10.0 | 10.0 ± 0.0 |" in text
    assert "3.3 (1 of 2)" in text  # seed 5 of the first row reaches 0.5 at step 3.33, seed 3 never


def test_gains_at_equal_cost_end_where_the_first_of_the_two_ends(study):
    """After 40 tokens of 80: 0.9 against the 0.6 between 0.4, after 20, and 0.8, after 60."""
    long = curve([0.2, 0.4, 0.8], tokens=(10, 20, 40, 60), decode_steps=(1, 2, 3, 4))
    short = curve([0.2, 0.5, 0.9], tokens=(10, 20, 30, 40), decode_steps=(2, 4, 6, 8))
    rows = [{3: long}, {3: short}, {}]
    found = dict(zip((name for name, *_ in COLUMNS), columns(study(), rows, 1), strict=True))
    assert found["gain (equal updates)"].mean == pytest.approx(0.1)
    assert found["gain (equal tokens)"].mean == pytest.approx(0.3)
    assert found["gain (equal decode steps)"].mean == pytest.approx(0.5 - 0.8)
    # 0.5 is reached a fourth of the way from the second evaluation to the third
    assert steps_to(long, 0.5) == 2.5 and steps_to(long, 0.5, "tokens") == pytest.approx(30)


def test_mechanisms_are_differences_of_the_same_seeds(study):
    def run(*entropy):
        return curve([0, 0], **{"policy/entropy": [9, 9, 9, entropy[0]]})

    rows = [{3: run(1), 5: run(2)}, {3: run(1.5), 5: run(3.5), 7: run(99)}, {}]
    line = "| + clip-higher | policy/entropy | 1.5 | 2.5 | +1 ± 0.5 |"  # (0.5 + 1.5) / 2
    assert mechanisms(study(), rows).splitlines()[2:] == [line]


# ---------------------------------------------------------------------------------------- the whole


def test_table_and_figure_of_complete_runs(study, tmp_path, capsys):
    loaded, out = study(), tmp_path / "out"
    for n, row in enumerate(loaded.rows):
        for seed in loaded.seeds:
            write_run(
                out / "runs" / row.key / str(seed),
                [0.1, 0.2 + 0.1 * n, 0.3 + 0.1 * n],
                tokens=100 + 100 * n,
            )
    assert main(["--config", str(tmp_path / "study.yaml"), "--out", str(out), "--summary"]) == 0
    rows = read_runs(loaded, out)
    assert budget(rows) == 400 and [sorted(row) for row in rows] == [[3, 5]] * 3
    text = as_markdown(loaded, rows) + "\n" + mechanisms(loaded, rows)
    last = columns(loaded, rows, 2)
    assert last[0] == (pytest.approx(0.5), 0.0, 2) and last[2].mean == pytest.approx(
        0.1 + 0.3 * 400 / 600
    )
    assert (out / "table.md").read_text() == text in capsys.readouterr().out
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_takes_runs_that_were_made_longer_and_many_rows(study):
    def change(tree):
        tree["ladder"] = [
            {"name": f"row {n}", "watch": ["policy/entropy"] if n == 9 else []} for n in range(10)
        ]

    metrics = {"policy/entropy": [1, math.nan, 3, 4]}
    longer, new = (
        curve([0.1, 0.2, 0.4], tokens=range(1, 5), **metrics),
        curve([0.1, 0.3], tokens=range(1, 5), every=4, **metrics),
    )
    assert draw(study(change), [{3: longer, 5: new}] * 10).startswith(
        b"\x89PNG"
    )  # the first was evaluated in step 2 too


def test_nothing_complete_yet(study, tmp_path):
    study()
    with refusal(f"{tmp_path}/out: ...no complete run"):
        main(
            ["--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--summary"]
        )
    with refusal("--seeds: [4] "):
        main(
            [
                "--config",
                str(tmp_path / "study.yaml"),
                "--out",
                str(tmp_path / "out"),
                "--seeds",
                "4",
            ]
        )


def extract(records, folder):
    with tarfile.open(fileobj=io.BytesIO(records)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_recorded_study_has_the_tables_of_its_runs(study, tmp_path):
    loaded, out = study(), tmp_path / "out"
    for n, row in enumerate(loaded.rows):
        write_run(out / "runs" / row.key / "3", [0.1, 0.2 + 0.1 * n, 0.3], tokens=100 + 100 * n)
    found = [
        f(loaded, read_runs(loaded, folder))
        for folder in (out, extract(pack(loaded, out), tmp_path / "recorded"))
        for f in (as_markdown, mechanisms)
    ]
    assert found[:2] == found[2:] and found[0].count("|") > 40


def test_the_page_has_the_tables_of_its_records(tmp_path):
    page = PAGE.read_text()
    assert len(re.findall(r"[^\W\d_][\w'-]*", page)) <= 1000
    assert RECORDS.stat().st_size < 200_000
    rows = read_runs(study := load_study(str(SHIPPED)), extract(RECORDS.read_bytes(), tmp_path))
    assert tables(page) == as_markdown(study, rows) + "\n" + mechanisms(study, rows)
