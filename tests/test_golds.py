"""What is seen of data that the verifier cannot be right about, before a device works."""

import pytest
from refusals import refusal

from dapo_jax.config import DAPO_TEMPLATE, RewardSection
from dapo_jax.reward.golds import check_data
from dapo_jax.reward.pool import RewardPool
from dapo_jax.types import Message, Problem, Verdict

pytestmark = pytest.mark.host

STRICT = RewardSection()
MATH = "We have\n\\[x^2 = 16,\\]so $x = \\boxed{4}$."


def problems(*golds, **fields):
    return [Problem(f"p{n}", "What?", gold, **fields) for n, gold in enumerate(golds)]


def check(some, section=STRICT, template="{prompt}"):
    with RewardPool(section) as pool:
        return check_data("data.train", some, template, section, pool.judge)


@pytest.mark.parametrize("verifier", ["strict", "lenient"])
def test_ground_truths_that_can_be_reached(verifier):
    golds = (
        "42",
        "$42$",
        "025",
        '["34"]',
        "1,024",
        "-7",
        "(1,2)",
        r"\frac12",
        "x = 5",
        "A",
        "U.S.",
        "12:00",
        "Tuesday, May 4",
        "4.5e33",
    )
    found = check(problems(*golds), RewardSection(verifier=verifier, workers=1))
    assert found == [
        f"data.train: 14 of 14 (100.0%) ground truths are correct by the {verifier} verifier"
    ]


def test_ground_truths_that_cannot():
    line, sentences = check(problems("42", "{4}$.", "5.", MATH, "x" * 400))
    assert "1 of 5 ground truths are sentences, for example 'We have" in sentences
    whole = f"Answer: {MATH}"
    assert line == (
        "warning: data.train: 1 of 5 (20.0%) ground truths are correct by the strict verifier; not, for example, "
        "p1 with the answer '{4}$.': 'Answer: {4}' is not correct; p2 with the answer '5.': 'Answer: 5' is not correct; "
        f"p3 with the answer {MATH!r}: {whole!r} is not correct"
    )
    with refusal("data.train: 0 of 2 (0.0%) ground truths"):
        check(problems("{4}$.", MATH))


@pytest.mark.parametrize("verifier", ["strict", "lenient"])
def test_ground_truths_with_a_label_of_their_own(verifier):
    [line] = check(problems("42", "Answer: 5"), RewardSection(verifier=verifier, workers=1))
    assert line.startswith(
        f"warning: data.train: 1 of 2 (50.0%) ground truths are correct by the {verifier} verifier; not, for example, p1"
    )


@pytest.mark.parametrize("verifier", ["strict", "lenient"])
def test_ground_truths_that_are_sentences(verifier):
    ways = "Adding both cases gives five. Therefore the number of ways is 12"
    lines = check(
        problems("42", r"\text{the second of May}", ways, "The answer is 12"),
        RewardSection(verifier=verifier, workers=1),
    )
    assert lines[1:] == [
        f"warning: data.train: 2 of 4 ground truths are sentences, for example {ways[:60]!r} of p2; "
        "an answer must repeat them, so give the bare answers"
    ]


def test_solutions_are_judged_too():
    right, wrong = Problem("a", "?", "4", "2+2=4\nAnswer: 4"), Problem("b", "?", "4", MATH)
    lines = check([right, wrong, Problem("c", "?", "5")])
    assert (
        lines[0] == "data.train: 3 of 3 (100.0%) ground truths are correct by the strict verifier"
    )
    assert lines[1].startswith(
        "warning: data.train: 1 of 2 (50.0%) solutions are correct by the strict verifier; not, for example, b with"
    )
    made = Problem("d", "?", "4", "2+2=5\nAnswer: 5", source="arithmetic")  # wrong on purpose
    assert len(check([made])) == 1


def test_solutions_of_evaluation_sets_may_have_another_form():
    boxed, wrong = Problem("a", "?", "4", MATH), Problem("b", "?", "4", "2+2=5\nAnswer: 5")
    with RewardPool(STRICT) as pool:
        assert len(check_data("eval.sets.math500", [boxed], "{prompt}", STRICT, pool.judge)) == 1
        lines = check_data("eval.sets.math500", [boxed, wrong], "{prompt}", STRICT, pool.judge)
    assert lines[1].startswith("warning: eval.sets.math500: 0 of 1 (0.0%) solutions are correct")


def test_math_verify_judges_a_few_of_many():
    some = problems(*map(str, range(1000)))
    judged = []

    def judge(items):
        judged.extend(item.problem.id for item in items)
        return [Verdict(True, 1.0)] * len(items)

    for verifier, count in (
        ("lenient", "250 of 250 (100.0%) sampled"),
        ("strict", "1,000 of 1,000 (100.0%)"),
    ):
        [line] = check_data("a", some, "{prompt}", RewardSection(verifier=verifier), judge)
        assert line == f"a: {count} ground truths are correct by the {verifier} verifier"
    assert judged == [f"p{n}" for n in (*range(0, 1000, 4), *range(1000))]


@pytest.mark.parametrize(
    ("prompt", "form"),
    [
        (r"What is 1+1? Put the answer within \boxed{}.", r"\boxed"),
        (
            (
                Message("system", "Be brief."),
                Message("user", 'What is 1+1? Output the answer after "####".'),
            ),
            "####",
        ),
    ],
)
def test_prompts_that_ask_for_another_form(prompt, form):
    asks, plain = Problem("a", prompt, "2"), Problem("b", "What is 1+1?", "2")
    [_, line] = check([asks, plain], template=DAPO_TEMPLATE)
    assert line == (
        f"warning: data.train: 1 of 2 prompts contain {form}, but the strict verifier reads an `Answer:` line only; "
        "set reward.verifier: lenient, or let the prompts ask for `Answer:` alone"
    )
    assert len(check([asks] + [plain] * 9, template=DAPO_TEMPLATE)) == 1
    assert len(check([asks], RewardSection(verifier="lenient", workers=1))) == 1


def test_a_template_that_asks_for_another_form():
    assert (
        r"2 of 2 prompts contain \boxed"
        in check(problems("1", "2"), template=r"{prompt} End with \boxed{}.")[1]
    )
