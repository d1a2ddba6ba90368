"""avg@k, pass@k, cons@k against enumeration and hand-derived numbers."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from dapo_jax.config import config_from_dict
from dapo_jax.data.problems import problems_digest
from dapo_jax.data.prompts import byte_tokenizer
from dapo_jax.evaluate import Evaluator, answer_row, consensus, estimates, pass_at_k
from dapo_jax.reward.verify import lenient_verify, strict_verify
from dapo_jax.training.setup import Policy
from dapo_jax.types import Problem, Prompt, Response, Verdict


@pytest.mark.parametrize(
    "samples, correct, k",
    [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)],
)
def test_pass_at_k_is_the_share_of_k_subsets_with_a_correct_one(samples, correct, k):
    found = [i < correct for i in range(samples)]
    subsets = list(itertools.combinations(found, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match="from 1 to the 4 samples"):
        pass_at_k(4, 2, k)


@pytest.mark.parametrize(
    "answers, correct, expected",
    [
        (["7", "8", "7"], [True, False, True], True),
        (["7", "8", "8"], [True, False, False], False),
        (["8", "7"], [False, True], False),  # a tie goes to the first
        (["7", "8"], [True, False], True),
        ([None, None, "7"], [False, False, True], True),  # no answer, no vote
        ([None, None], [False, False], False),
    ],
)
def test_consensus(answers, correct, expected):
    assert consensus(answers, correct) is expected


def test_estimates_by_hand():
    """Accuracies 1, 1/2, 0, 1/2 of four problems: mean 1/2, std √(1/6).

    Three of four pass, two of four have the correct consensus.
    """
    correct = np.array([[True, True], [True, False], [False, False], [False, True]])
    answers = [["1", "1"], ["1", "2"], ["3", None], ["5", "4"]]
    avg, passed, cons = (0.5, math.sqrt(1 / 6) / 2), (0.75, 0.25), (0.5, math.sqrt(1 / 3) / 2)
    expected = {"avg": avg, "pass": passed, "cons": cons, "pass_at_1": avg, "pass_at_2": passed}
    flat = {
        name + end: number
        for name, numbers in expected.items()
        for end, number in zip(("", "_se"), numbers, strict=True)
    }
    assert estimates(correct, answers) == pytest.approx(flat)


@pytest.mark.parametrize(
    "samples, ks",
    [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (6, {1, 2, 4, 6}), (32, {1, 2, 4, 8, 16, 32})],
)
def test_pass_at_powers_of_two_and_at_all_samples(samples, ks):
    found = estimates(np.eye(samples, dtype=bool)[:1], [["1"] * samples])
    assert {
        int(key[len("pass_at_") :])
        for key in found
        if key.startswith("pass_at_") and not key.endswith("_se")
    } == ks
    assert [found[f"pass_at_{k}"] for k in sorted(ks)] == pytest.approx(
        [k / samples for k in sorted(ks)]
    )  # one of n is correct


def test_standard_error_is_over_problems_not_over_samples():
    """Sampling each problem more often does not make up for few problems."""
    few, many = np.array([[True], [False]]), np.array([[True] * 50, [False] * 50])
    a, b = (estimates(c, [["x"] * c.shape[1]] * 2) for c in (few, many))
    assert a["avg_se"] == b["avg_se"] == pytest.approx(0.5)


def test_one_problem_has_no_standard_error():
    found = estimates(np.array([[True, False]]), [["1", "2"]])
    assert {number for key, number in found.items() if key.endswith("_se")} == {0.0}


JUDGES = {
    "strict": ("Answer: 42", strict_verify, {}),
    "lenient": (r"It is \boxed{42}.", lenient_verify, {}),
    "custom": (
        "<answer>42</answer>",
        lambda text, answer: f">{answer}<" in text,
        {"function": "m:f", "allowed_modules": ["m"]},
    ),
}


@pytest.mark.parametrize("verifier", JUDGES)
def test_votes_are_counted_only_where_the_verifier_reads_the_answers_that_vote(verifier):
    """Four correct responses to each of two problems, in the form that each verifier reads."""
    text, rule, more = JUDGES[verifier]
    metrics, answers, line = evaluated(
        text,
        lambda item: Verdict(rule(item.text, item.problem.answer), 1.0),
        {"verifier": verifier, **more},
    )
    assert (
        all(answer.verdict.correct for answer in answers)
        and metrics["avg"] == metrics["pass"] == metrics["pass_at_4"] == 1.0
    )
    assert metrics["digest"] == problems_digest(
        Problem(name, "6*7", "42") for name in "xy"
    )  # in the order of ids, whatever the file's
    votes = {key: number for key, number in metrics.items() if key.startswith("cons")}
    assert votes == ({"cons": 1.0, "cons_se": 0.0} if verifier == "strict" else {})
    assert ("cons@4 1.000" in line) == ("cons" in line) == (verifier == "strict")
    assert metrics["no_verdict"] == 0 and "verdict" not in line


def test_answers_without_a_verdict_are_counted():
    """Three of eight, of one problem."""
    verdicts = iter([Verdict(True, 1.0)] * 5 + [Verdict(False, -1.0, "timed out after 1 s")] * 3)
    metrics, answers, line = evaluated(
        "Answer: 42", lambda item: next(verdicts), {"max_error_fraction": 0.5}
    )
    rows = [answer_row(answer, Policy(None, byte_tokenizer(), (1,))) for answer in answers]
    assert (metrics["no_verdict"], metrics["avg"]) == (3, 5 / 8)
    assert [row["error"] for row in rows] == [None] * 5 + ["timed out after 1 s"] * 3
    assert line.endswith("; 3 of 8 answers got no verdict and count as incorrect")


def evaluated(text, judge, reward):
    """Metrics, answers and line of an evaluation: four responses `text` to each of two problems."""
    config = config_from_dict(
        {
            "model": {"architecture": {}},
            "eval": {"every": 0, "samples_per_problem": 4},
            "reward": reward,
        }
    )
    tokens = np.array(byte_tokenizer()(text)["input_ids"], np.int32)
    said = []

    def generate(params, requests, seed, on_done):
        return [Response(tokens, np.zeros(len(tokens), np.float32), False) for _ in requests]

    def submit(items):
        verdicts = [judge(item) for item in items]
        return SimpleNamespace(wait=lambda seconds: True, result=lambda: verdicts)

    evaluator = Evaluator(
        config.eval,
        config.reward,
        config.seed,
        Policy(config.model.architecture, byte_tokenizer(), (1,)),
        SimpleNamespace(generate=generate),
        SimpleNamespace(submit=submit),
        SimpleNamespace(reach=lambda place: None, wait=lambda done, place: None),
    )
    prompts = [Prompt(Problem(name, "6*7", "42"), np.array([5], np.int32)) for name in "yx"]
    found = evaluator.evaluate_sets({"a": prompts}, {}, said.append)
    return *found["a"], said[0]
