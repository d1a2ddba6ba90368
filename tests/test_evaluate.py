"""avg@k, pass@k, cons@k against enumeration and hand-derived numbers."""

import itertools
import math

import numpy as np
import pytest

from dapo_jax.evaluate import consensus, estimates, pass_at_k


@pytest.mark.parametrize("samples, correct, k", [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(samples, correct, k):
    right = [i < correct for i in range(samples)]
    subsets = list(itertools.combinations(right, k))
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
    """Accuracies 1, 1/2, 0, 1/2 of four problems: mean 1/2, std √(1/6), standard error √(1/6) / 2."""
    correct = np.array([[True, True], [True, False], [False, False], [False, True]])
    answers = [["1", "1"], ["1", "2"], ["3", None], ["5", "4"]]
    found = estimates(correct, answers)
    assert found == pytest.approx({"avg": 0.5, "avg_se": math.sqrt(1 / 6) / 2, "pass": 0.75, "cons": 0.5})


def test_standard_error_is_over_problems_not_over_samples():
    """Sampling each problem more often does not make up for few problems."""
    few, many = np.array([[True], [False]]), np.array([[True] * 50, [False] * 50])
    a, b = (estimates(c, [["x"] * c.shape[1]] * 2) for c in (few, many))
    assert a["avg_se"] == b["avg_se"] == pytest.approx(0.5)


def test_one_problem_has_no_standard_error():
    assert estimates(np.array([[True, False]]), [["1", "2"]])["avg_se"] == 0.0
