"""`python -m dapo_jax.data`: what it prepares, what it counts, how it refuses."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import line_of, names

from dapo_jax import cli
from dapo_jax.config import ArithmeticConfig, load_config
from dapo_jax.data import __main__ as data
from dapo_jax.data.__main__ import length_stats
from dapo_jax.data.problems import load_problems
from dapo_jax.data.prompts import byte_tokenizer, make_prompts

pytestmark = pytest.mark.host

ROWS = [
    {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    {"question": "1+1?", "answer": "1+1=2\n#### 2"},
    {"question": "2+2?", "answer": "4"},
    {"question": "3+3?", "answer": "5"},
    {"question": "3+3?", "answer": "6"},
    {"question": "4+4?"},
    {"question": "5+5" + "?" * 30, "answer": "10"},
    {"question": "6+6<|end|>", "answer": "12"},
]
CONFIG = """
model:
  architecture: {vocab_size: 258, model_dim: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8,
    ffn_dim: 32, max_position: 64}
data:
  train: [a.jsonl, {path: b.jsonl, weight: 3, columns: {prompt: q}}]
  template: "{prompt}="
  max_prompt_len: 16
eval: {sets: {held: arithmetic}}
rollout: {max_response_len: 40}
reward: {overlong_buffer_len: 10}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("b.jsonl").write_text(
        '{"q": "2+2?", "answer": "4"}\n{"q": "7+7?", "answer": "14"}\n{"q": "8+8?", '
        '"answer": "16"}\n'
    )
    Path("c.yaml").write_text(CONFIG)
    return tmp_path


def verb(*args) -> int:
    with pytest.raises(SystemExit) as done:
        cli.run(data.main, [str(a) for a in args])
    return int(done.value.code or 0)


def test_the_counts_of_a_file(capsys):
    assert verb("stats", "--source", "a.jsonl", "--json", "out.json") == 0
    found = json.loads(Path("out.json").read_text())
    assert found == {
        "source": {
            "source": "a.jsonl",
            "rows": 8,
            "problems": 4,
            "duplicates": 2,
            "conflicts": 1,
            "in_earlier_sets": 0,
            "skipped": {"no answer": {"count": 1, "first_row": 6, "columns": ["question"]}},
            "normalized": {},
            "with_solution": 1,
        }
    }
    assert capsys.readouterr().out.splitlines() == [
        "source: a.jsonl",
        "          4  problems from 8 rows",
        "          2  duplicates",
        "          1  conflicting prompts dropped",
        "          1  skipped: no answer (row 6: columns question)",
        "          1  with a solution",
        "source: 4 of 4 (100.0%) ground truths are correct by the strict verifier",
        "source: 1 of 1 (100.0%) solutions are correct by the strict verifier",
    ]


def test_ground_truths_that_no_response_can_reach(capsys):
    """What is left of a solution behind `\\boxed`: said of a file, refused where a config names the
    verifier.
    """
    Path("math.jsonl").write_text(
        '{"prompt": "x?", "answer": "{4}$."}\n{"prompt": "y?", "answer": "{5}$."}\n'
    )
    assert verb("stats", "--source", "math.jsonl") == 0
    line = "0 of 2 (0.0%) ground truths are correct by the strict verifier; not, for example, "
    assert f"warning: source: {line}" in capsys.readouterr().out
    assert verb("stats", "--config", "c.yaml", "--set", "data.train=math.jsonl") == 2
    said = capsys.readouterr()
    assert (
        "          2  problems from 2 rows\n" in said.out
        and f"dapo_jax: data.train: {line}" in said.err
    )


def test_the_sets_of_a_config_with_the_lengths_of_their_prompts(capsys):
    """Lengths are bytes and a `=` here; `make_prompts` keeps those that are not too long."""
    assert (
        verb(
            "stats",
            "--config",
            "c.yaml",
            "--json",
            "out.json",
            "--set",
            "data.arithmetic.heldout_problems=20",
        )
        == 0
    )
    found = json.loads(Path("out.json").read_text())
    assert list(found) == ["data.train.0", "data.train.1", "eval.sets.held"]
    first, second, held = found.values()
    assert (first["weight"], first["share"], second["weight"], second["share"]) == (
        1,
        0.25,
        3,
        0.75,
    )
    assert (second["problems"], second["in_earlier_sets"], second["rows"]) == (2, 1, 3)
    lengths = first["prompt_tokens"]
    assert [lengths[key] for key in ("prompts", "too_long", "min", "max", "p50")] == [
        3,
        1,
        5,
        34,
        5,
    ]
    assert lengths["left_out"] == {"control tokens (<|end|>)": 1}
    assert held["prompt_tokens"]["prompts"] == 20
    out = capsys.readouterr().out
    assert "      75.0%  of the draws, weight 3\n" in out
    assert "          1  longer than 16 tokens\n" in out
    assert "          1  control tokens (<|end|>), left out\n" in out
    assert "  prompt tokens: min 5  mean 14.667  p50 5  p90 34  p95 34  p99 34  max 34\n" in out

    section = load_config("c.yaml").data
    problems, _ = load_problems("a.jsonl", ArithmeticConfig())
    kept, left_out = make_prompts(problems, byte_tokenizer(), section)
    assert len(kept) == lengths["prompts"] - lengths["too_long"]
    assert dict(left_out) == {"control tokens (<|end|>)": 1, "longer than 16 tokens": 1}


def test_rows_as_fed_and_the_verdict_on_every_solution(capsys):
    """Without evaluation sets. Two of three solutions state the ground truth; the third row is too
    long for the config.
    """
    rows = [
        {"question": "1+1?", "answer": "2", "solution": "Adding.\nAnswer: 2"},
        {"question": "2+2?", "answer": "4", "solution": "Answer: 5"},
        {"question": "9" * 40, "answer": "7", "solution": "Answer: 7"},
    ]
    Path("s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--set", "data.train=s.jsonl", "--set", "eval.sets={}", "--set", "eval.every=5")
    Path("c.yaml").write_text(CONFIG.replace("eval: {sets: {held: arithmetic}}\n", ""))
    assert verb("show", "--config", "c.yaml", "--set", "data.train=s.jsonl") == 0
    out = capsys.readouterr().out
    first = out.partition("---- ground truth: 2\n---- solution: Adding.\nAnswer: 2\n")
    assert first[1] and first[0].endswith(": prompt as fed\n1+1?=\n")
    assert "(data: no usable prompt (1 longer than 16 tokens)" in out
    line = "data.train: 2 of 3 (66.7%) solutions are correct by the strict verifier\n"
    failure = out.partition(line)[2]
    assert failure.count("---- ") == 1 and ": incorrect; ground truth: 4\nAnswer: 5\n" in failure
    assert verb("stats", "--config", "c.yaml", "--set", "data.train=s.jsonl") == 0
    assert verb("stats", "--config", "c.yaml", *more) == 2  # what is asked for is checked
    capsys.readouterr()
    assert verb("show", "--source", "s.jsonl", "--first", "1") == 0
    out = capsys.readouterr().out
    assert out.count(": prompt as fed\n") == 1 and "Solve the following math problem" in out


@pytest.mark.parametrize("answer, found", [("4", "1 of 1"), ("{4}$.", "warning: ")])
def test_rows_without_solutions_get_the_verdict_on_their_ground_truths(capsys, answer, found):
    """README's first row; and one whose answer no response can give."""
    Path("own.jsonl").write_text(json.dumps({"prompt": "What is 2+2?", "answer": answer}))
    assert verb("show", "--source", "own.jsonl") == 0
    out = capsys.readouterr().out
    assert "What is 2+2?" in out and found in out.splitlines()[-1]
    assert "ground truths are correct by the strict verifier" in out.splitlines()[-1]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(1, 3000))
def test_percentiles_against_a_naive_count(lengths, limit):
    found = length_stats(lengths, limit)
    ordered = sorted(lengths)
    for p in (50, 90, 95, 99):
        assert found[f"p{p}"] == min(
            n for n in ordered if 100 * sum(m <= n for m in ordered) >= p * len(ordered)
        )
    assert found["too_long"] == sum(n > limit for n in lengths) and (
        found["min"],
        found["max"],
    ) == (ordered[0], ordered[-1])


def test_prepared_folders_of_two_splits_serve_training_and_evaluation(capsys):
    assert (
        verb(
            "prepare",
            "--source",
            "a.jsonl",
            "--test",
            "b.jsonl",
            "--columns",
            "prompt=q",
            "--out",
            "out",
        )
        == 2
    )
    said, _ = line_of(capsys)
    assert names(said, "a.jsonl: 0 ...8 rows ...8 ...(column q) (row 1: columns question, answer)")
    assert not Path("out").exists()
    Path("b.jsonl").write_text('{"question": "7+7?", "answer": "14"}\n')
    assert (
        verb(
            "prepare", "--source", "a.jsonl", "--test", "b.jsonl", "--out", "out", "--name", "sums"
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "a.jsonl: 4 problems from 8 rows (2 duplicates, 1 conflicting prompts dropped, "
        "1 skipped: no answer (row 6: columns question))",
        "b.jsonl: 1 problems from 1 rows",
        "wrote out/sums/1.0.0",
    ]
    loaded = [
        load_problems("out/sums/1.0.0", ArithmeticConfig(), heldout=heldout)[0]
        for heldout in (False, True)
    ]
    assert loaded == [load_problems(f"{name}.jsonl", ArithmeticConfig())[0] for name in "ab"]
    info = json.loads(Path("out/sums/1.0.0/dataset_info.json").read_text())
    assert info["name"] == "sums" and info["description"] == "\n".join(out[:2])


@pytest.mark.parametrize(
    "args, said",
    [
        ("stats --source gone.jsonl", "gone.jsonl: no such file"),
        ("stats --source a.tsv", "a.tsv: ...kind"),
        ("stats --source a.jsonl --columns promt=q", "--columns promt: ...prompt...PART=COLUMN"),
        ("stats --source a.jsonl --columns prompt", "--columns prompt: is empty"),
        ("stats --source a.jsonl --tokenizer gone", "gone: no such folder"),
        ("stats --source a.jsonl --json gone/out.json", "gone/out.json: cannot write"),
        ("stats --source a.jsonl --set seed=1", "--set: ...--config"),
        ("stats --config c.yaml --columns prompt=q", "--columns, --heldout: ...--source"),
        ("stats --config gone.yaml", "gone.yaml: cannot read"),
        ("stats --config c.yaml --set data.columns.a.prompt=q", "c.yaml: data.columns: "),
        ("prepare --source a.jsonl --out out --name No/Name", "...'No/Name': ...a-z"),
        ("prepare --source a.jsonl --out gs://bucket", "gs://bucket: ...gs://bucket/name"),
        ("prepare --source a.jsonl --out a.jsonl", "a.jsonl/problems/1.0.0: ...written"),
    ],
)
def test_refusals_are_one_line_and_status_2(folder, capsys, args, said):
    before = sorted(folder.rglob("*"))
    assert verb(*args.split()) == 2
    line, _ = line_of(capsys)
    assert names(line, said), line
    assert sorted(folder.rglob("*")) == before
