"""Soft overlong punishment: a length penalty that grows over the last tokens before the limit."""

import numpy as np
from numpy.typing import ArrayLike


def overlong_penalty(
    response_len: ArrayLike, *, max_response_len: int, overlong_buffer_len: int
) -> np.ndarray:
    """Penalty that is added to the score of a response of n tokens, its end token included.
    float32, shaped like `response_len`.

        0                                   n <= L_max - L_cache
        ((L_max - L_cache) - n) / L_cache   L_max - L_cache < n <= L_max
        -1                                  n > L_max

    with L_max = `max_response_len` and L_cache = `overlong_buffer_len`, in tokens. L_cache = 0
    leaves the first and the last line. Raises ValueError for negative lengths and for a buffer
    longer than the limit. DAPO (arXiv 2503.14476), Eq. 13.

    >>> print(overlong_penalty([16384, 17408, 18432, 20480, 30000], max_response_len=20480, overlong_buffer_len=4096))
    [ 0.   -0.25 -0.5  -1.   -1.  ]
    """
    if not 0 <= overlong_buffer_len <= max_response_len:
        raise ValueError(
            f"need 0 <= overlong_buffer_len <= max_response_len, got {overlong_buffer_len} and {max_response_len}"
        )
    lengths = np.asarray(response_len)
    if np.any(lengths < 0):
        raise ValueError(f"response_len must not be negative, got {lengths.min()}")
    if overlong_buffer_len == 0:
        return np.asarray(np.where(lengths > max_response_len, -1, 0), np.float32)
    excess = lengths.astype(np.int64) - (max_response_len - overlong_buffer_len)
    return np.asarray(np.clip(-excess / overlong_buffer_len, -1, 0), np.float32)
