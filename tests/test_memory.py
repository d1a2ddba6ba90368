"""Problems that rest after being all right several draws running."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_jax.data.memory import PassMemory
from dapo_jax.data.problems import Cursor, advance


def test_off_it_is_the_plain_order():
    memory = PassMemory(7, None, 1)
    for index in range(7):
        memory.record(index, True, 0)
    taken, epochs, cursor = memory.take(Cursor(), 20, seed=3)
    expected, expected_cursor = advance(Cursor(), 7, 20, seed=3)
    np.testing.assert_array_equal(taken, expected)
    assert cursor == expected_cursor and memory.resting(0) == 0
    assert epochs.tolist() == [0] * 7 + [1] * 7 + [2] * 6
    assert memory.take(Cursor(3, 7), 2, seed=3)[1].tolist() == [4, 4]


def test_a_problem_rests_after_so_many_draws_running_and_for_so_many_epochs():
    memory = PassMemory(4, rest_after=2, rest_epochs=2)
    for outcome in (True, False, True, True):  # the wrong one starts the count anew
        assert memory.resting(5) == 0
        memory.record(1, outcome, 5)
    assert [memory.resting(epoch) for epoch in (5, 6, 7, 8)] == [1, 1, 1, 0]
    taken, epochs, cursor = memory.take(Cursor(6, 0), 6, seed=0)
    assert (
        1 not in taken
        and sorted(taken[:3]) == sorted(taken[3:]) == [0, 2, 3]
        and epochs.tolist() == [6, 6, 6, 7, 7, 7]
    )
    taken, *_ = memory.take(Cursor(8, 0), 4, seed=0)
    assert sorted(taken) == [0, 1, 2, 3]
    memory.record(1, True, 8)  # the count starts anew after a rest
    assert memory.resting(8) == 0


@pytest.mark.parametrize("size", [1, 3, 5, 8, 11])
def test_how_long_a_problem_rests_does_not_depend_on_how_many_are_drawn_at_a_time(size):
    """Eight problems, all solved: each rests for the pass after its own.

    It comes once a pass, so its n-th draw is of the n-th.
    """
    memory, cursor = PassMemory(8, rest_after=1, rest_epochs=1), Cursor()
    draws = np.zeros(8, int)
    while not draws.all():
        taken, epochs, cursor = memory.take(cursor, size, seed=0)
        for problem, epoch in zip(taken, epochs, strict=True):
            memory.record(problem, True, epoch)
            draws[problem] += 1
    assert (
        memory.state()["memory_rests_until"].tolist() == draws.tolist()
    )  # pass n - 1, counted from 0, and the next


def test_if_all_rest_none_is_skipped():
    memory = PassMemory(3, rest_after=1, rest_epochs=9)
    for index in range(3):
        memory.record(index, True, 0)
    taken, *_ = memory.take(Cursor(1, 0), 6, seed=0)
    assert set(taken) <= {0, 1, 2} and len(taken) == 6


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=30),
    st.lists(st.integers(1, 7), max_size=6),
)
def test_problems_come_in_the_plain_order_without_those_that_rest(count, outcomes, takes):
    memory = PassMemory(count, rest_after=2, rest_epochs=3)
    for index, right in outcomes:
        memory.record(index % count, right, 0)
    copy = PassMemory(count, rest_after=2, rest_epochs=3)
    copy.restore(memory.state())
    cursor = other = Cursor(1, 0)
    resting = memory.resting(1)
    rests = {i for i in range(count) if memory.state()["memory_rests_until"][i] >= 1}
    assert len(rests) == resting
    for take in takes:
        first = cursor
        taken, epochs, cursor = memory.take(cursor, take, seed=5)
        again, _, other = copy.take(other, take, seed=5)
        assert (
            taken.tolist() == again.tolist()
            and cursor == other
            and len(taken) == len(epochs) == take
        )
        assert (
            first.epoch <= epochs[0]
            and sorted(epochs) == epochs.tolist()
            and epochs[-1] == cursor.epoch
        )
        if cursor.epoch <= 3 and resting < count:
            width = (cursor.epoch - first.epoch) * count + cursor.index - first.index
            plain, _ = advance(first, count, width, seed=5)
            assert [i for i in plain if i not in rests] == taken.tolist()


@pytest.mark.parametrize("arrays", [{}, {"draw": np.zeros(1)}])
def test_a_checkpoint_without_a_memory_leaves_it_new(arrays):
    memory = PassMemory(2, 1, 1)
    memory.restore(arrays)
    assert memory.resting(0) == 0
