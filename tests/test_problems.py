"""Loading, de-duplicating and ordering problems."""

import gzip
import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torture_rewards
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_jax.config import ArithmeticConfig
from dapo_jax.data import files
from dapo_jax.data import problems as module
from dapo_jax.data.problems import (
    BadRow,
    Cursor,
    Skip,
    advance,
    epoch_order,
    load_problems,
    problem_from_row,
    problems_digest,
)
from dapo_jax.types import InputError, Message, Problem

pytestmark = pytest.mark.host

GOOD = {"prompt": "What is 6 x 7?", "answer": 42}
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve: what is $6^2$?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "36", "style": "rule"},
    "extra_info": {"index": "9a9b6eb4"},
}


def load(path, **kwargs):
    return load_problems(str(path), ArithmeticConfig(), **kwargs)


def write_jsonl(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def error_of(path):
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# Schemas


def test_plain_rows(tmp_path):
    rows = [
        {"prompt": "a", "answer": "x", "id": "first", "solution": "because"},
        {"prompt": "b", "answer": -7, "id": 12},
        {"prompt": "c", "answer": 42.0},
        {"prompt": "d", "answer": 0.5, "solution": None, "id": None},
        {"prompt": "e", "answer": "  1,024 \n", "extra": [1, {}]},
        {"prompt": "f", "answer": 1e20},
    ]
    loaded, report = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [(p.prompt, p.answer, p.solution) for p in loaded] == [
        ("a", "x", "because"),
        ("b", "-7", None),
        ("c", "42", None),
        ("d", "0.5", None),
        ("e", "1,024", None),
        ("f", "100000000000000000000", None),
    ]
    assert [p.id for p in loaded[:2]] == ["first", "12"]
    assert (
        report.rows,
        report.problems,
        report.duplicates,
        report.conflicts,
        dict(report.skipped),
    ) == (6, 6, 0, 0, {})


def test_dapo_rows_are_the_same_from_json_lines_and_parquet(tmp_path):
    rows = [
        DAPO_ROW,
        {
            **DAPO_ROW,
            "prompt": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "é?"},
            ],
        },
    ]
    rows[1]["extra_info"] = {"index": "other"}
    from_lines, _ = load(write_jsonl(tmp_path / "a.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_parquet, _ = load(tmp_path / "a.parquet")
    expected = [
        Problem("9a9b6eb4", (Message("user", "Solve: what is $6^2$?"),), "36"),
        Problem("other", (Message("system", "Be brief."), Message("user", "é?")), "36"),
    ]
    assert from_lines == from_parquet == expected


def test_integer_index_and_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({**DAPO_ROW, "extra_info": {"index": 0}}).encode()))
    assert [p.id for p in load(path)[0]] == ["0"]


def test_the_word_arithmetic_selects_the_generator():
    config = ArithmeticConfig(train_problems=30, heldout_problems=10)
    train, report = load_problems("arithmetic", config)
    heldout, _ = load_problems("arithmetic", config, heldout=True)
    assert (len(train), len(heldout)) == (30, 10) == (report.problems, len(heldout))
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}


# Duplicates, conflicts, identifiers


def test_every_row_is_accounted_for(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "1"},
        {"prompt": "a", "answer": " 1"},  # the same answer but for spaces
        {"prompt": "d", "answer": "-1,234.5"},
        {"prompt": "d", "answer": "-1234.5"},  # the same answer but for commas
        {"prompt": "b", "answer": "2"},  # conflict
        {"prompt": "b", "answer": "1"},  # agrees with the first, but the prompt is out
        {"prompt": "c"},
        {"prompt": "c", "answer": "3"},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "answer": "9",
        },  # chat turns are another prompt than text
    ]
    loaded, report = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [(p.prompt, p.answer) for p in loaded] == [
        ("a", "1"),
        ("d", "-1,234.5"),
        ("c", "3"),
        ((Message("user", "a"),), "9"),
    ]
    assert (report.rows, report.problems, report.duplicates, report.conflicts) == (10, 4, 4, 1)
    assert report.skipped == {"no answer": Skip(count=1, first_row=8)}
    assert report.rows == report.problems + report.duplicates + report.conflicts + sum(
        s.count for s in report.skipped.values()
    )


def test_changes_are_counted_in_the_order_in_which_they_are_made(tmp_path):
    file = tmp_path / "a.jsonl"
    row = {"body": "b", "passage": "p", "context": "c", "question": "q", "answer": ["5 (pens)"]}
    file.write_text(json.dumps(row) + "\n")
    _, report = load_problems(str(file), ArithmeticConfig())
    assert [what.split()[-1] for what in report.normalized] == [
        *["one", "body", "passage", "context", "them"]
    ]


def test_summary_is_one_line(tmp_path):
    conflict = [{"prompt": "z", "answer": "1"}, {"prompt": "z", "answer": "2"}]
    path = write_jsonl(
        tmp_path / "a.jsonl", [GOOD] * 1001 + [{"prompt": "x"}, b"{", {"prompt": "y"}] + conflict
    )
    assert load(path)[1].summary() == (
        f"{path}: 1 problems from 1,006 rows (1,001 duplicates, 1 conflicting prompts dropped, "
        "2 skipped: no answer (row 1002: columns prompt), 1 skipped: not JSON (row 1003))"
    )
    assert load(write_jsonl(path, [GOOD]))[1].summary() == f"{path}: 1 problems from 1 rows"


def test_ids_are_unique_and_do_not_depend_on_other_rows(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1", "id": "x"},
        {"prompt": "b", "answer": "1", "id": "x"},
        {"prompt": "c", "answer": "1"},
    ]
    ids = {p.prompt: p.id for p in load(write_jsonl(tmp_path / "a.jsonl", rows))[0]}
    assert len(set(ids.values())) == 3 and "x" not in ids.values()
    alone = load(write_jsonl(tmp_path / "a.jsonl", rows[2:]))[0]
    assert alone[0].id == ids["c"]


@pytest.mark.slow
def test_memory_holds_distinct_prompts_only(tmp_path):
    rows = [{"prompt": f"{i} " + "x" * 2000, "answer": i} for i in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", rows * 500)
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    report = load(path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.problems, report.rows) == (20, 10_000)
    assert peak < 2e6


@pytest.mark.slow
def test_many_rows_to_a_prompt_in_small():
    assert "20,000 rows, 8 MB: 200 problems" in torture_rewards.rows(20_000)


# Rows that are skipped and counted

BAD_LINES = {
    b"{": "not JSON",
    b'{"prompt": "a", "answer": 1} trailing': "not JSON",
    b"[" * 100_000: "not JSON",
    b"\xff\xfe": "not UTF-8",
    b'["a", 1]': "not a JSON object",
    b"null": "not a JSON object",
    b'{"answer": 1}': "no prompt",
    b'{"prompt": null, "answer": 1}': "no prompt",
    b'{"prompt": NaN, "answer": 1}': "no prompt",
    b'{"prompt": " \\n", "answer": 1}': "empty prompt",
    b'{"prompt": [], "answer": 1}': "empty prompt",
    b'{"prompt": [{"role": "user", "content": " "}], "answer": 1}': "empty prompt",
    b'{"prompt": 5, "answer": 1}': "prompt is neither text nor chat turns",
    b'{"prompt": ["a"], "answer": 1}': "prompt is neither text nor chat turns",
    b'{"prompt": [{"role": "user"}], "answer": 1}': "chat content is not text",
    b'{"prompt": [{"content": "a"}], "answer": 1}': "chat role is not text",
    b'{"prompt": [{"role": "user", "content": ["a"]}], "answer": 1}': "chat content is not text",
    b'{"prompt": "\\ud800", "answer": 1}': "prompt is not valid Unicode",
    (
        b'{"prompt": [{"role": "user", "content": "\\udfff"}], "answer": 1}'
    ): "chat content is not valid Unicode",
    b'{"prompt": "a"}': "no answer",
    b'{"prompt": "a", "answer": null}': "no answer",
    b'{"prompt": "a", "answer": NaN}': "no answer",
    b'{"prompt": "a", "answer": " "}': "no answer",
    b'{"prompt": "a", "reward_model": null}': "no answer",
    b'{"prompt": "a", "reward_model": {"style": "rule"}}': "no answer",
    b'{"prompt": "a", "answer": Infinity}': "answer is neither text nor a finite number",
    b'{"prompt": "a", "answer": 1e999}': "answer is neither text nor a finite number",
    b'{"prompt": "a", "answer": true}': "answer is neither text nor a finite number",
    b'{"prompt": "a", "answer": [{}]}': "answer is neither text nor a finite number",
    b'{"prompt": "a", "answer": ["1", "2"]}': "several answers",
    b'{"prompt": "a", "answer": "[\\"1\\", \\"2\\"]"}': "several answers",
    b'{"prompt": "a", "answer": []}': "no answer",
    b'{"prompt": "a", "solution": "It is \\\\boxed{4."}': "answer with an open \\boxed{",
    (
        b"{\"prompt\": \"[{'role': 'user', 'content': 'a'}]\", \"answer\": 1}"
    ): "prompt is the text of chat turns, but not JSON",
    b'{"prompt": "a", "answer": "\\ud800"}': "answer is not valid Unicode",
    b'{"prompt": "a", "answer": "' + b"1" * 1001 + b'"}': "answer over 1000 characters",
    b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}": "answer over 1000 characters",
    b'{"prompt": "a", "answer": 1, "id": {}}': "id is neither text nor a finite number",
    b'{"prompt": "a", "answer": 1, "id": "\\ud800"}': "id is not valid Unicode",
    b'{"prompt": "a", "answer": 1, "solution": 5}': "solution is not text",
    b'{"prompt": "a", "answer": 1, "solution": "\\ud800"}': "solution is not valid Unicode",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:60]))
def test_bad_rows_are_counted_with_the_first_row_and_the_reason(tmp_path, line):
    loaded, report = load(
        write_jsonl(tmp_path / "a.jsonl", [GOOD, line, {**GOOD, "prompt": "b"}, line])
    )
    assert [p.prompt for p in loaded] == [GOOD["prompt"], "b"]
    assert report.skipped == {BAD_LINES[line]: Skip(count=2, first_row=2)}
    assert report.rows == 4


def test_the_longest_answer_that_is_allowed(tmp_path):
    rows = [{"prompt": "a", "answer": "1" * 1000}, {"prompt": "b", "answer": int("1" * 1000)}]
    assert [len(p.answer) for p in load(write_jsonl(tmp_path / "a.jsonl", rows))[0]] == [1000, 1000]


def test_overlong_rows_are_counted_and_do_not_swallow_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
    size = len(json.dumps({"prompt": "", "answer": "1"}))
    texts = ["x" * 1000, "y" * (99 - size), "z" * (100 - size)]  # a line end counts too
    loaded, report = load(
        write_jsonl(
            tmp_path / "a.jsonl", [GOOD, *({"prompt": t, "answer": "1"} for t in texts), GOOD]
        )
    )
    assert [p.prompt[0] for p in loaded] == ["W", "y"]
    assert report.skipped == {"longer than 0 MB": Skip(count=2, first_row=2)}
    assert (report.rows, report.duplicates) == (5, 1)


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n\r\n  \n{"prompt": "b", "answer": '
        b'2}\r\n{"prompt": "c"}'
    )
    loaded, report = load(path)
    assert [p.prompt for p in loaded] == ["a", "b"]
    assert report.rows == 3 and report.skipped == {"no answer": Skip(1, 5)}


def test_a_half_last_line_is_a_bad_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, {**GOOD, "prompt": "b"}])
    path.write_bytes(path.read_bytes()[:-10])
    assert load(path)[1].skipped == {"not JSON": Skip(1, 2)}


def test_a_one_megabyte_prompt_is_a_prompt(tmp_path):
    loaded, _ = load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 1_000_000, "answer": 1}]))
    assert len(loaded[0].prompt) == 1_000_000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "ground_truth", "index"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "answer", "id", "solution", "reward_model", "extra_info"]),
        json_values,
    )
)
def test_any_row_is_a_sound_problem_or_a_bad_row(row):
    try:
        problem = problem_from_row(row)
    except BadRow as e:
        assert str(e)
        return
    texts = (
        [problem.prompt]
        if isinstance(problem.prompt, str)
        else [turn.content for turn in problem.prompt]
    )
    assert "".join(texts).strip() and problem.answer.strip() and len(problem.answer) <= 1000
    "".join([*texts, problem.answer, problem.id, problem.solution or ""]).encode("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=5))
def test_any_bytes_are_counted(tmp_path_factory, lines):
    path = write_jsonl(
        tmp_path_factory.mktemp("fuzz") / "a.jsonl", [json.dumps(GOOD).encode(), *lines]
    )
    loaded, report = load(path)
    assert len(loaded) == 1 and report.rows == 1 + sum(s.count for s in report.skipped.values())


# Parquet


def test_parquet_rows_across_row_groups_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BATCH", 7)
    numbers = [i % 40 for i in range(100)]
    table = pa.table(
        {
            "prompt": [f"p{n}" for n in numbers],
            "answer": [float(n) for n in numbers],
            "solution": [None] * 100,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    loaded, report = load(tmp_path / "a.parquet")
    assert [(p.prompt, p.answer) for p in loaded] == [(f"p{i}", str(i)) for i in range(40)]
    assert (report.rows, report.duplicates) == (100, 60)


def test_parquet_bad_cells_are_counted(tmp_path):
    answers = pa.array([1.0, math.nan, None, math.inf, 2.0])
    undecodable = pa.StringArray.from_buffers(
        5, pa.array(["a", "b", "c", "d", "??"]).buffers()[1], pa.py_buffer(b"abcd\xff\xfe")
    )
    pq.write_table(pa.table({"prompt": undecodable, "answer": answers}), tmp_path / "a.parquet")
    loaded, report = load(tmp_path / "a.parquet")
    assert [(p.prompt, p.answer) for p in loaded] == [("a", "1")]
    assert report.skipped == {
        "no answer": Skip(2, 2),
        "answer is neither text nor a finite number": Skip(1, 4),
        "prompt is not valid Unicode": Skip(1, 5),
    }


@pytest.mark.parametrize(
    "kind, bits",
    [
        (pa.timestamp("s"), 10**13),
        (pa.duration("s"), 2**60),
        (pa.date64(), 2**60),
        (pa.timestamp("us", "Mars/Phobos"), 5),
    ],
    ids=str,
)
def test_parquet_times_that_python_cannot_hold_are_counted(tmp_path, kind, bits):
    answers = pa.array([bits] * 3, pa.int64()).view(kind)
    pq.write_table(
        pa.table({"prompt": ["a", "b", "c"], "answer": answers, "id": ["x", "y", "z"]}),
        tmp_path / "a.parquet",
    )
    assert "3 skipped: answer is neither text nor a finite number (row 1)" in error_of(
        tmp_path / "a.parquet"
    )


def test_parquet_columns_whose_names_are_not_text(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["a"], "content": ["b"], "answer": ["1"]}), tmp_path / "a.parquet"
    )
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"content", b"c\x80ntent"))
    assert "corrupt Parquet ('utf-8' codec can't decode byte 0x80" in error_of(
        tmp_path / "a.parquet"
    )


def test_parquet_without_the_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "answer": ["1"]}), tmp_path / "a.parquet")
    assert "no prompt (row 1: columns text, answer)" in error_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"PAR1",
        lambda b: b[: len(b) // 2],
        lambda b: b"x" * len(b),
        lambda b: b[:40] + b"\0" * 200 + b[240:],
    ],
    ids=["empty", "magic only", "half", "noise", "zeros in the data"],
)
def test_corrupt_parquet(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(500)], "answer": ["1"] * 500}), path)
    path.write_bytes(damage(path.read_bytes()))
    assert "corrupt Parquet" in error_of(path)


# Sources that cannot be used


def test_missing_file(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "a.csv", "a.json"):
        assert "no such file" in error_of(tmp_path / name)
    assert "*.jsonl: no file" in error_of(tmp_path / "*.jsonl")


def test_unknown_extension(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("prompt\tanswer\n")
    assert ".parquet, .jsonl, .jsonl.gz, .json, .csv, .arrow" in error_of(path)


def test_unreadable_file(tmp_path):
    path = tmp_path / ("a" * 300 + ".jsonl")
    assert "cannot be read" in error_of(path)


def test_folder_that_is_not_prepared(tmp_path):
    assert "dataset_info.json" in error_of(tmp_path)


def test_no_usable_problem(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [])
    assert "0 problems from 0 rows" in error_of(path)
    said = error_of(write_jsonl(path, [{"text": "a", "esc\x1b[2J": 1}]))
    assert "(row 1: columns text, esc\\x1b[2J)" in said
    assert said.endswith(f"{{path: {path}, columns: {{prompt: COLUMN, answer: COLUMN}}}}")
    many = error_of(write_jsonl(path, [dict.fromkeys(["x" * 1000, *map(str, range(1000))])]))
    assert "columns " + "x" * 40 + ", 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in many
    assert "1 conflicting prompts dropped" in error_of(
        write_jsonl(path, [{"prompt": "a", "answer": a} for a in "12"])
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-6],
        lambda b: b"not gzip",
        lambda b: b[:100] + b"\xff" * 20 + b[120:],
    ],
    ids=["half", "no checksum", "text", "noise"],
)
def test_corrupt_gzip(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    noise = np.random.default_rng(0).integers(0, 10**9, 2000)
    content = b"".join(json.dumps({"prompt": f"{n}", "answer": 1}).encode() + b"\n" for n in noise)
    path.write_bytes(damage(gzip.compress(content)))
    assert "corrupt gzip" in error_of(path)


def test_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD] * 3)
    parse = module.problem_from_row

    def parse_while_another_program_writes(*args):
        with path.open("ab") as stream:
            stream.write(b"\n")
        return parse(*args)

    monkeypatch.setattr(module, "problem_from_row", parse_while_another_program_writes)
    # The reader sees what was appended as blank lines, and would be content.
    assert "changed while it was read" in error_of(path)


# Digest


def test_digest_tells_ids_prompts_answers_and_order_apart():
    a, b = Problem("1", "a", "x"), Problem("2", "b", "y")
    variants = [
        [a, b],
        [b, a],
        [a],
        [],
        [Problem("3", "a", "x"), b],
        [Problem("1", "c", "x"), b],
        [Problem("1", "a", "z"), b],
        [Problem("1", (Message("user", "a"),), "x"), b],
        [Problem("1", (Message("system", "a"),), "x"), b],
        [Problem("1a", "", "x"), b],
    ]
    assert len({problems_digest(v) for v in variants}) == len(variants)
    assert problems_digest([a, b]) == problems_digest([Problem("1", "a", "x", solution="s"), b])
    assert len(problems_digest([])) == 64 and set(problems_digest([a])) <= set("0123456789abcdef")


# Order


def philox_words(key, count):
    """Philox4x64-10 as Salmon et al. (SC 2011) give it; numpy's first block has counter 1."""
    mask, words, block = 2**64 - 1, [], 0
    while len(words) < count:
        block += 1
        c, (k0, k1) = [block, 0, 0, 0], key
        for _ in range(10):
            p0, p1 = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(p1 >> 64) ^ c[1] ^ k0, p1 & mask, (p0 >> 64) ^ c[3] ^ k1, p0 & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += c
    return words[:count]


@pytest.mark.parametrize(
    "seed, epoch, count", [(0, 0, 10), (0, 1, 10), (7, 3, 101), (2**31 - 1, 5, 4), (0, 0, 1)]
)
def test_epoch_order_sorts_philox_words(seed, epoch, count):
    words = philox_words((seed, epoch), count)
    assert epoch_order(count, seed=seed, epoch=epoch).tolist() == sorted(
        range(count), key=words.__getitem__
    )


@given(st.integers(1, 200), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_epoch_order_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed=seed, epoch=epoch)) == list(range(count))


def test_epoch_orders_differ_by_seed_and_epoch_and_look_uniform():
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    first = Counter(int(epoch_order(5, seed=0, epoch=e)[0]) for e in range(2000))
    assert all(abs(first[i] - 400) < 5 * math.sqrt(2000 * 0.2 * 0.8) for i in range(5))


@given(st.integers(1, 30), st.lists(st.integers(0, 70), max_size=8), st.integers(0, 100))
def test_any_cut_of_the_sequence_is_the_same_sequence(count, takes, seed):
    total = sum(takes)
    epochs = [epoch_order(count, seed=seed, epoch=e) for e in range(total // count + 1)]
    expected = np.concatenate(epochs)[:total]
    cursor, seen = Cursor(), [np.empty(0, np.int64)]
    for take in takes:
        indices, cursor = advance(
            Cursor(*json.loads(json.dumps(cursor))), count, take, seed=seed
        )  # as a restart would
        assert indices.shape == (take,) and indices.dtype == np.int64
        seen.append(indices)
    assert np.concatenate(seen).tolist() == expected.tolist()
    assert cursor.epoch * count + cursor.index == total


def test_every_problem_comes_once_an_epoch():
    indices, cursor = advance(Cursor(), 7, 21, seed=3)
    assert [sorted(epoch) for epoch in indices.reshape(3, 7)] == [list(range(7))] * 3
    assert cursor == Cursor(epoch=2, index=7)
    following, cursor = advance(cursor, 7, 1, seed=3)
    assert following[0] == epoch_order(7, seed=3, epoch=3)[0] and cursor == Cursor(3, 1)


def test_cursor_beyond_a_smaller_data_set_goes_to_the_next_epoch():
    indices, cursor = advance(Cursor(epoch=2, index=90), 10, 3, seed=0)
    assert indices.tolist() == epoch_order(10, seed=0, epoch=3)[:3].tolist() and cursor == Cursor(
        3, 3
    )


def test_no_problems_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError):
        advance(Cursor(), 0, 1, seed=0)
