import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_jax.config import DapoSection
from dapo_jax.dapo.groups import (
    group_advantages,
    informative_groups,
    is_informative,
    step_advantages,
)

pytestmark = pytest.mark.host


def test_a_group_is_informative_when_it_holds_correct_and_incorrect():
    correct = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(informative_groups(correct), [False, True, True, False])


def test_the_filter_looks_at_correctness_and_not_at_reward():
    # All-incorrect rewards [-1, -1, -1.5, -2] have a spread, and their advantages would praise short
    # wrong answers.
    assert not informative_groups(np.zeros((1, 4), bool)).any()
    assert group_advantages(np.array([[-1, -1, -1.5, -2]]))[0, 0] == pytest.approx(
        0.783348, abs=1e-6
    )


@pytest.mark.parametrize(
    "rewards, sample, population",
    [
        ([1, -1, -1, -1], [1.4999985] + 3 * [-0.4999995], [1.732051] + 3 * [-0.577350]),
        ([1, 1, -1, -1], [0.8660246, 0.8660246, -0.8660246, -0.8660246], [1, 1, -1, -1]),
        (
            [1, 0.5, -1, -2],
            [0.998625, 0.635488, -0.453920, -1.180193],
            [1.153113, 0.733799, -0.524142, -1.362770],
        ),
        ([1] + 15 * [-1], [3.749993] + 15 * [-0.25], [3.872983] + 15 * [-0.258199]),
    ],
)
def test_advantages_of_the_paper(rewards, sample, population):
    reward = np.array([rewards], np.float32)
    got = group_advantages(reward)
    assert got.dtype == np.float32 and got.shape == reward.shape
    np.testing.assert_allclose(got[0], sample, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        group_advantages(reward, ddof=0, eps=0.0)[0], population, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_give_exactly_zero(dtype, eps):
    value = np.full((1, 3), 0.1, dtype)
    if dtype == np.float64:
        assert value.std() > 0  # the trap: equal numbers whose std does not round to 0
    reward = np.concatenate([value, np.array([[1, -1, -1]], dtype)])
    advantages = group_advantages(reward, eps=eps)
    np.testing.assert_array_equal(advantages[0], 0.0)
    assert advantages[1, 0] > 1


@given(
    st.integers(2, 12).flatmap(
        lambda g: st.lists(
            st.lists(st.integers(-8, 4), min_size=g, max_size=g), min_size=1, max_size=4
        )
    ),
    st.integers(0, 1),
)
def test_advantages_equal_a_naive_loop(quarters, ddof):
    rewards = [[q / 4 for q in row] for row in quarters]
    got = group_advantages(np.array(rewards, np.float32), ddof=ddof)
    for row, advantages in zip(rewards, got, strict=True):
        mean = sum(row) / len(row)
        std = (sum((r - mean) ** 2 for r in row) / (len(row) - ddof)) ** 0.5
        np.testing.assert_allclose(
            advantages, [(r - mean) / (std + 1e-6) for r in row], rtol=1e-6, atol=1e-6
        )


def test_epsilon_is_a_millionth():
    """The std of 0 and 1e-6 is 1e-6 / √2."""
    slight = 0.5 / (0.5**0.5 + 1)
    np.testing.assert_allclose(group_advantages([[0, 1e-6]]), [[-slight, slight]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rewards_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([[1.0, bad], [1.0, -1.0]]))


def test_shapes_and_ddof_are_checked():
    with pytest.raises(ValueError, match="Q, G"):
        group_advantages(np.zeros(4))
    with pytest.raises(ValueError, match="Q, G"):
        informative_groups(np.zeros(4, bool))
    for ddof in (-1, 4, 5):
        with pytest.raises(ValueError, match="ddof"):
            group_advantages(np.zeros((2, 4)), ddof=ddof)


def test_a_group_of_the_answers_that_got_a_verdict_is_one_of_their_number():
    """PAPER's numbers for four rewards hold for the four that are left of five; one alone has
    nothing to be compared with.
    """
    algo = DapoSection()
    np.testing.assert_allclose(
        step_advantages([np.array([1, -1, -1, -1], np.float32)], algo)[0],
        [1.4999985, *[-0.4999995] * 3],
        rtol=0,
        atol=1e-6,
    )
    assert step_advantages([np.float32([1])], algo)[0].tolist() == [0.0]
    np.testing.assert_allclose(
        step_advantages([np.float32([1, -1])], DapoSection(advantage_ddof=2))[0],
        [0.5**0.5, -(0.5**0.5)],
        atol=1e-6,
    )
    assert [is_informative(np.array(c, bool)) for c in ([1, 0], [1], [0, 0], [])] == [
        True,
        False,
        False,
        False,
    ]
