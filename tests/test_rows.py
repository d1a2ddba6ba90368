"""Rows as data sets are published, and rows whose columns a config names."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refusal

from dapo_jax.config import (
    ArithmeticConfig,
    ColumnsConfig,
    ConfigError,
    EvalSet,
    TrainSet,
    config_from_dict,
    dump_yaml,
    load_config,
)
from dapo_jax.data.problems import Skip, load_problems
from dapo_jax.data.rows import BadRow, column_names, problem_from_row
from dapo_jax.reward.verify import strict_verify
from dapo_jax.types import Message, Problem

pytestmark = pytest.mark.host

GSM8K = {
    "question": (
        "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?"
    ),
    "answer": (
        "In May she sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"
    ),
}
AIME = "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b$."


def write(path, rows):
    """The same rows, by the name's ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, **columns):
    return load_problems(str(path), ArithmeticConfig(), columns=ColumnsConfig(**columns))


def row_of(prompt):
    return prompt if isinstance(prompt, str) else [vars(turn) for turn in prompt]


# As published

PUBLISHED = {
    "aime, as BytedTsinghua has it": (
        {
            "data_source": "aime_2024",
            "prompt": [{"content": f"Solve. {AIME}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "70", "style": "rule"},
            "extra_info": {"index": 3, "raw_problem": AIME, "split": None},
        },
        Problem("3", (Message("user", f"Solve. {AIME}"),), "70"),
    ),
    "problem and answer": (
        {"id": 60, "problem": AIME, "solution": "Try all.", "answer": "070", "year": 2025},
        Problem("60", AIME, "70", "Try all."),
    ),
    "capitals": (
        {"ID": "2024-I-4", "Problem": AIME, "Solution": "Try all.", "Answer": 70},
        Problem("2024-I-4", AIME, "70", "Try all."),
    ),
    "question and answer": ({"question": AIME, "answer": "70"}, Problem("", AIME, "70")),
    "question and expected_answer": (
        {"id": "aime25-0", "question": AIME, "expected_answer": "70"},
        Problem("aime25-0", AIME, "70"),
    ),
    "gsm8k": (
        GSM8K,
        Problem(
            "",
            GSM8K["question"],
            "72",
            "In May she sold 48/2 = 24 clips.\nAltogether 48+24 = 72.\nAnswer: 72",
        ),
    ),
    "math": (
        {
            "problem": AIME,
            "level": "Level 5",
            "type": "Algebra",
            "solution": r"So \boxed{1}, or $b=\boxed{\frac{7}{\sqrt{2}}}$.",
        },
        Problem(
            "",
            AIME,
            r"\frac{7}{\sqrt{2}}",
            r"So \boxed{1}, or $b=\boxed{\frac{7}{\sqrt{2}}}$." + "\nAnswer: \\frac{7}{\\sqrt{2}}",
        ),
    ),
    "math-500": (
        {
            "problem": AIME,
            "solution": r"It is $\boxed{70}$.",
            "answer": "70",
            "subject": "Algebra",
            "level": 5,
            "unique_id": "test/1.json",
        },
        Problem("", AIME, "70", r"It is $\boxed{70}$."),
    ),
    "skywork-or1": (
        {
            "prompt": [{"role": "user", "content": AIME}],
            "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]', "style": "rule"},
        },
        Problem("", (Message("user", AIME),), r"\frac{1}{2}"),
    ),
    "olympiadbench": (
        {
            "question": AIME,
            "context": None,
            "solution": ["Try all.", "Or think."],
            "final_answer": ["70"],
        },
        Problem("", AIME, "70", "Try all."),
    ),
    "dapo-math-17k-processed": (
        {
            "prompt": AIME,
            "solution": "34",
            "reward_model": {"ground_truth": "34", "style": "rule"},
            "extra_info": {"index": "u0"},
        },
        Problem("u0", AIME, "34"),
    ),
    "asdiv": (
        {
            "body": "Pia has 3 pens and buys 4.",
            "question": "How many pens has Pia?",
            "answer": "7 (pens)",
        },
        Problem("", "Pia has 3 pens and buys 4.\n\nHow many pens has Pia?", "7"),
    ),
    "agieval": (
        {
            "passage": None,
            "question": "Which is prime?",
            "options": ["(A)4", "(B)7"],
            "answer": "B",
        },
        Problem("", "Which is prime?\n\n(A)4\n(B)7", "B"),
    ),
    "choices of which the answer is one": (
        {"question": "Which is prime?", "choices": ["4", "7"], "answer": "7"},
        Problem("", "Which is prime?\n\n4\n7", "7"),
    ),
    "choices without letters": (
        {"question": "Which is prime?", "choices": ["4", "7"], "answer": "B"},
        Problem("", "Which is prime?\n\nA) 4\nB) 7", "B"),
    ),
    "options by letter": (
        {"question": "Which is prime?", "options": {"A": "4", "B": "7"}, "answer": "B"},
        Problem("", "Which is prime?\n\nA) 4\nB) 7", "B"),
    ),
    "options as text": (
        {"question": "Which is prime?", "options": "A) 4 B) 7", "answer": "B"},
        Problem("", "Which is prime?\n\nA) 4 B) 7", "B"),
    ),
    "chat turns as JSON text": (
        {"prompt": json.dumps([{"role": "user", "content": AIME}]), "answer": "70"},
        Problem("", (Message("user", AIME),), "70"),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": AIME}], "ground_truth": "70", "dataset": "math"},
        Problem("", (Message("user", AIME),), "70"),
    ),
    "messages with the response": (
        {
            "messages": [
                {"role": "user", "content": AIME},
                {"role": "assistant", "content": r"\boxed{70} it is."},
            ]
        },
        Problem("", (Message("user", AIME),), "70", "\\boxed{70} it is.\nAnswer: 70"),
    ),
    "conversations of ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": AIME},
                {"from": "gpt", "value": r"\boxed{70} it is."},
            ]
        },
        Problem("", (Message("user", AIME),), "70", "\\boxed{70} it is.\nAnswer: 70"),
    ),
    "parts of a content": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Solve."}, {"type": "text", "text": AIME}],
                }
            ],
            "answer": "70",
        },
        Problem("", (Message("user", f"Solve.\n{AIME}"),), "70"),
    ),
    "an open turn": (
        {
            "prompt": [{"role": "user", "content": AIME}, {"role": "assistant", "content": ""}],
            "answer": 70,
        },
        Problem("", (Message("user", AIME),), "70"),
    ),
    "alpaca with an answer": (
        {"instruction": "Add.", "input": "1 and 2", "answer": "3", "output": "It is 3."},
        Problem("", "Add.\n\n1 and 2", "3"),
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_published_rows_are_recognised(tmp_path, case, ending):
    row, expected = PUBLISHED[case]
    path = write(tmp_path / f"a.{ending}", [row] * 32)
    (found,), report = load(path)
    assert problem_from_row(row) == expected
    assert (
        problem_from_row(
            {"prompt": expected.prompt, **vars(expected)} | {"prompt": row_of(expected.prompt)}
        )
        == expected
    )  # as prepared
    assert (found.prompt, found.answer, found.solution) == (
        expected.prompt,
        expected.answer,
        expected.solution,
    )
    assert (
        found.id == (expected.id or found.id) and found.source == path and report.duplicates == 31
    )


@given(st.integers(-(10**6), 10**6), st.text("abc =+<>\n", max_size=400))
def test_the_strict_verifier_accepts_every_gsm8k_solution(number, worked):
    for written in (f"{number:,}", f"{number}", f"{number}.5"):
        problem = problem_from_row({"question": "q", "answer": f"{worked}\n#### {written}\n"})
        assert problem.answer == written
        worked = re.sub("<<[^<>\n]*>>", "", worked)
        if worked.strip():
            assert problem.solution.startswith(worked.rstrip()) and strict_verify(
                problem.solution, problem.answer
            )
        else:
            assert problem.solution is None


def test_marks_in_rows_of_other_kinds_stay():
    answer = GSM8K["answer"]
    assert problem_from_row({"prompt": "q", "answer": answer}).answer == answer
    assert problem_from_row({"problem": "q", "answer": answer}).answer == answer
    assert (
        problem_from_row({"question": "q", "answer": answer, "solution": "own"}).solution == "own"
    )


def test_a_question_is_not_taken_without_its_passage(tmp_path):
    rows = [
        {
            "passage": "Ellen has six balls, Marin nine.",
            "question": "How many in all?",
            "answer": "15 balls",
        },
        {"passage": "", "context": None, "question": "2+2?", "answer": "4"},
    ]
    loaded, report = load(write(tmp_path / "a.jsonl", rows))
    assert [p.prompt for p in loaded] == [
        "Ellen has six balls, Marin nine.\n\nHow many in all?",
        "2+2?",
    ]
    assert report.normalized == {"prompts joined from question and passage": 1}
    unknown = [
        {"options": 5},
        {"choices": {"text": ["4", "7"]}},
        {"choices": ["4", "7"], "answer": 1},
        {"context": {"title": "x"}},
    ]
    loaded, report = load(
        write(
            tmp_path / "b.jsonl",
            [*rows, *({"question": "q", "answer": "B", **more} for more in unknown)],
        )
    )
    assert report.skipped == {
        "question with options of an unknown form; make one column of both": Skip(1, 3),
        "question with choices of an unknown form; make one column of both": Skip(2, 4),
        "question with context of an unknown form; make one column of both": Skip(1, 6),
    }
    assert (
        problem_from_row({"prompt": "q", "context": "c", "answer": 1}).prompt == "q"
    )  # a prompt is whole
    loaded, _ = load(write(tmp_path / "a.parquet", rows[:1]), prompt="{passage} {question}")
    assert [p.prompt for p in loaded] == ["Ellen has six balls, Marin nine. How many in all?"]


# As a config says

NESTED = {
    "task": {"text": "2+2?", "parts": {"key": 4}},
    "meta": {"uid": "x1"},
    "worked": "2+2=4",
    "prompt": "not this",
    "answer": "nor this",
}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_named_columns(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", [NESTED])
    (found,), _ = load(
        path, prompt="task.text", answer="task.parts.key", solution="worked", id="meta.uid"
    )
    assert found == Problem("x1", "2+2?", "4", "2+2=4")
    (found,), _ = load(path, prompt="{task.text} ({task.parts.key}, {}) {{meta.uid}}")
    assert (found.prompt, found.answer) == ("2+2? (4, {}) {x1}", "nor this")
    with refusal(f"{path}: ...1 ...(column task.words) (row 1: columns ...)...{{path: "):
        load(path, prompt="task.words")
    with refusal(f"{path}: ...1 ...no words (row 1: columns"):
        load(path, prompt="{words}")
    with refusal(f"{path}: ...1 ...task ...(row 1)"):
        load(path, prompt="{task}")


def test_a_column_whose_name_has_a_dot(tmp_path):
    for ending in ("jsonl", "parquet"):
        (found,), _ = load(
            write(tmp_path / f"a.{ending}", [{"a.b": "dotted", "answer": 1}]), prompt="a.b"
        )
        assert found.prompt == "dotted"


def test_what_was_normalized_is_counted(tmp_path):
    rows = [
        {"problem": "a", "answer": "204"},
        {"problem": "b", "answer": "025"},
        {"problem": "c", "answer": '["007"]'},
        {"problem": "d", "answer": ["5"], "solution": "$\\boxed{5}$."},
        {"problem": "e", "solution": r"\boxed{6}"},
        {"question": "f", "answer": "1+6 = <<1+6=7>>7\n#### 7"},
        {"problem": "g", "answer": "000"},
        {"problem": "h", "answer": "01", "solution": 5},
        {"prompt": '[{"role": "user", "content": "i"}]', "answer": "[1, 2]"},
        {"prompt": "[{1}, 2] is?", "answer": "-07"},
        {"problem": "k", "answer": "0.50"},
    ]
    loaded, report = load(write(tmp_path / "a.jsonl", rows))
    assert [p.answer for p in loaded] == [
        "204",
        "25",
        "7",
        "5",
        "6",
        "7",
        "0",
        "[1, 2]",
        "-7",
        "0.50",
    ]
    assert [p.solution for p in loaded if p.solution] == ["1+6 = 7\nAnswer: 7"] and isinstance(
        loaded[-2].prompt, str
    )
    assert report.normalized == {
        "integer answers without their leading zeros": 4,
        "answers that were a list of one": 2,
        "solutions that only repeat the answer, not used": 1,
        r"answers taken from \boxed{}": 1,
        "solutions without their <<...>> annotations": 1,
        "prompts that were chat turns as JSON text": 1,
    }
    assert (
        "1 skipped: solution is not text (row 8), 4 integer answers without their leading zeros, "
        in report.summary()
    )


def test_a_list_that_python_printed_is_a_list(tmp_path):
    golds = ["['5']", r"['\\frac12']", "['1', '2']", "['1' '2']", "['x", "[f'(0), f'(1)]"]
    loaded, report = load(
        write(
            tmp_path / "a.jsonl",
            [{"problem": f"p{n}", "answer": gold} for n, gold in enumerate(golds)],
        )
    )
    assert [p.answer for p in loaded] == ["5", r"\frac12", "['x", "[f'(0), f'(1)]"]
    assert report.skipped == {"several answers": Skip(2, 3)} and report.normalized == {
        "answers that were a list of one": 2
    }


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": "solution"},
        {"answer": "solution", "answer_after": r"\boxed"},
        {"answer": "solution", "answer_after": r"\boxed{"},
    ],
)
def test_an_answer_in_a_box(tmp_path, columns):
    boxes = {
        r"is $\boxed{4}$.": "4",
        r"is $\boxed{\{1, \sqrt{2}\}}$, {really}": r"\{1, \sqrt{2}\}",
        r"is $\boxed{1} = \boxed{ 2 }$": "2",
        r"is $\boxed 3$.": "3",
        r"\boxed{[0, 1\}}": r"[0, 1\}",
    }
    rows = [
        {"problem": text, "solution": text, "answer": "not this"}
        for text in [*boxes, r"is $\boxed{5$"]
    ]
    loaded, report = load(write(tmp_path / "a.jsonl", rows), **columns)
    assert {p.prompt: p.answer for p in loaded} == boxes
    assert loaded[0].solution == "is $\\boxed{4}$.\nAnswer: 4" and strict_verify(
        loaded[0].solution, loaded[0].answer
    )
    assert report.skipped == {r"answer with an open \boxed{": Skip(1, 6)}


def test_an_answer_after_a_mark(tmp_path):
    rows = [
        {"q": "a", "a": "one => two => 3"},
        {"q": "b", "a": "=> 4"},
        {"q": "c", "a": "5"},
        {"q": "d", "a": 6},
        {"q": "e", "a": "seven =>"},
        {"q": "f", "a": "x" * 2000 + "=> 8"},
    ]
    loaded, report = load(
        write(tmp_path / "a.jsonl", rows), prompt="q", answer="a", answer_after="=>"
    )
    assert [(p.prompt, p.answer, p.solution) for p in loaded] == [
        ("a", "3", "one => two\nAnswer: 3"),
        ("b", "4", None),
        ("f", "8", "x" * 2000 + "\nAnswer: 8"),
    ]
    assert report.skipped == {
        "answer without =>": Skip(1, 3),
        "answer is not text": Skip(1, 4),
        "no answer": Skip(1, 5),
    }


def test_parquet_cells_that_cannot_be_decoded_are_counted_under_any_name(tmp_path):
    undecodable = pa.StringArray.from_buffers(
        2, pa.array(["a", "??"]).buffers()[1], pa.py_buffer(b"a\xff\xfe")
    )
    pq.write_table(pa.table({"text": undecodable, "label": [1, 2]}), tmp_path / "a.parquet")
    loaded, report = load(tmp_path / "a.parquet", prompt="text", answer="label")
    assert [p.prompt for p in loaded] == ["a"] and report.skipped == {
        "prompt is not valid Unicode": Skip(1, 2)
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from("ab"), v, max_size=2),
    max_leaves=5,
)
paths = st.sampled_from(["a", "b", "a.b", "a.a.b", "{a}{b.a}", "{}", "."])


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(
    st.dictionaries(st.sampled_from("ab"), values),
    st.builds(ColumnsConfig, paths, paths, paths, paths, st.none() | st.sampled_from("ab#")),
)
def test_any_row_under_any_columns_is_a_problem_or_a_bad_row(row, columns):
    assert column_names(columns)
    try:
        problem = problem_from_row(row, columns)
    except BadRow as e:
        assert str(e)
        return
    assert problem.prompt.strip() if isinstance(problem.prompt, str) else problem.prompt
    assert problem.answer.strip() and len(problem.answer) <= 1000


# In a config

TREE = {"model": {"folder": "m"}, "eval": {"every": 0}}


def test_columns_and_weights_are_kept_by_data_set(tmp_path):
    b = {"path": "gs://x/b.parquet", "columns": {"answer": "key", "answer_after": "####"}}
    tree = {
        **TREE,
        "data": {"train": ["a.jsonl", b | {"weight": 2}]},
        "eval": {"every": 0, "sets": {"e": b, "f": "a.jsonl"}},
    }
    config = config_from_dict(tree)
    columns = ColumnsConfig(answer="key", answer_after="####")
    assert config.data.train == (TrainSet("a.jsonl"), TrainSet("gs://x/b.parquet", columns, 2.0))
    assert isinstance(config.data.train[1].weight, float)
    assert config.eval.sets == {"e": EvalSet("gs://x/b.parquet", columns), "f": EvalSet("a.jsonl")}
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert load_config(tmp_path / "c.yaml", ["data.train=a.jsonl"]).data.train == (
        TrainSet("a.jsonl"),
    )


def one(**more):
    return {"train": [{"path": "a.jsonl"} | more]}


@pytest.mark.parametrize(
    "data, said",
    [
        ({"columns": {"a.jsonl": {"prompt": "q"}}}, "data.columns: ...train: [{path: a.jsonl, "),
        (one(columns={"promt": "q"}), "data.train.0.columns.promt: ...'prompt'"),
        (one(columns={"prompt": " "}), "data.train.0.columns.prompt: ...empty"),
        (one(columns="q"), "data.train.0.columns: ...'q'"),
        (one(weigth=1), "data.train.0.weigth: ...'weight'"),
        (one(weight=0), "data.train.0.weight: ...0, got 0"),
        (one(weight=-1), "data.train.0.weight: ...0, got -1"),
        (one(weight="1"), "data.train.0.weight: ...'1'"),
        (one(weight=float("inf")), "data.train.0.weight: ...inf"),
        (one(path="a\0.jsonl"), "data.train.0.path: ...NUL"),
        (one(path="https://me:secret@host/a.jsonl"), "data.train.0.path: ...URL"),
        ({"train": [{"weight": 2}]}, "data.train.0.path: ...missing"),
        ({"train": [3]}, "data.train.0: ...3"),
        ({"train": ["a.jsonl", {"path": "a.jsonl", "weight": 2}]}, "data.train.1.path: a.jsonl "),
        ({"train": []}, "data.train: ...empty"),
        ({"train": {"a.jsonl": 1}}, "data.train: ...{'a.jsonl': 1}; ...[{path: a.jsonl, weight: 1"),
        ({"train": None}, "data.train: ...null"),
    ],
)
def test_what_no_config_may_say(data, said):
    with refusal(f"...{said}", ConfigError) as e:
        config_from_dict({**TREE, "data": data})
    assert "me:secret" not in str(e.value)
