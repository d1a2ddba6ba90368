"""The overlong penalty against the table of the paper's recipe, and its properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_jax.reward.overlong import overlong_penalty

pytestmark = pytest.mark.host

TABLE = {
    0: 0,
    16384: 0,
    16385: -0.000244140625,
    17408: -0.25,
    18432: -0.5,
    19456: -0.75,
    20479: -0.999755859375,
    20480: -1,
    20481: -1,
    30000: -1,
}


@pytest.mark.parametrize(("length", "penalty"), TABLE.items())
def test_table_of_the_recipe(length, penalty):
    assert overlong_penalty(length, max_response_len=20480, overlong_buffer_len=4096) == np.float32(
        penalty
    )


def test_is_vectorised_over_any_shape():
    lengths = np.array(list(TABLE), np.int32).reshape(2, 5)
    penalty = overlong_penalty(lengths, max_response_len=20480, overlong_buffer_len=4096)
    assert isinstance(penalty, np.ndarray) and penalty.dtype == np.float32
    np.testing.assert_array_equal(penalty, np.array(list(TABLE.values()), np.float32).reshape(2, 5))
    assert overlong_penalty([], max_response_len=2, overlong_buffer_len=1).shape == (0,)
    scalar = overlong_penalty(3, max_response_len=2, overlong_buffer_len=1)
    assert isinstance(scalar, np.ndarray) and scalar.shape == () and scalar.dtype == np.float32


def test_no_buffer_is_a_step():
    with np.errstate(all="raise"):
        penalty = overlong_penalty([0, 9, 10, 11, 99], max_response_len=10, overlong_buffer_len=0)
    np.testing.assert_array_equal(penalty, [0, 0, 0, -1, -1])


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int8, np.int64])
def test_any_integer_type_gives_the_same(kind):
    penalty = overlong_penalty(
        np.array([0, 5, 7, 10, 12], kind), max_response_len=10, overlong_buffer_len=5
    )
    np.testing.assert_array_equal(penalty, np.array([0, 0, -0.4, -1, -1], np.float32))


@given(st.integers(0, 500).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(0, limit))))
def test_falls_from_zero_to_minus_one(sizes):
    limit, buffer = sizes
    penalty = overlong_penalty(
        np.arange(limit + 50), max_response_len=limit, overlong_buffer_len=buffer
    )
    assert np.all(np.diff(penalty) <= 0)
    assert np.all(penalty[: limit - buffer + 1] == 0)
    assert np.all(penalty[limit + 1 :] == -1)
    naive = [
        0.0 if n <= limit - buffer else -1.0 if n > limit else (limit - buffer - n) / buffer
        for n in range(limit + 50)
    ]
    np.testing.assert_array_equal(penalty, np.array(naive, np.float32))


@pytest.mark.parametrize(
    ("length", "limit", "buffer"), [(1, -1, 0), (1, 10, -1), (1, 10, 11), ([3, -2], 10, 5)]
)
def test_impossible_sizes_are_refused(length, limit, buffer):
    with pytest.raises(ValueError, match="must not be negative|need 0 <="):
        overlong_penalty(length, max_response_len=limit, overlong_buffer_len=buffer)
