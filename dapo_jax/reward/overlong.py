"""Soft overlong punishment: a length penalty that grows over the last tokens before the limit."""

import numpy as np
from numpy.typing import ArrayLike


def overlong_penalty(
    response_len: ArrayLike, *, max_response_len: int, overlong_buffer_len: int
) -> np.ndarray:
    """The penalty on the score of a response of n tokens, its end token included.

        0                                   n <= L_max - L_cache
        ((L_max - L_cache) - n) / L_cache   L_max - L_cache < n <= L_max
        -1                                  n > L_max

    with L_max = `max_response_len`, L_cache = `overlong_buffer_len` (0: no soft part), in tokens.
    Returns float32, shaped like `response_len`. Raises ValueError for negative lengths and for a
    buffer longer than the limit. DAPO (arXiv 2503.14476), Eq. 13.

    >>> print(overlong_penalty([10, 14, 16, 30], max_response_len=16, overlong_buffer_len=4))
    [ 0.  -0.5 -1.  -1. ]
    """
    if not 0 <= (buffer := overlong_buffer_len) <= max_response_len:
        found = f"got {buffer} and {max_response_len}"
        raise ValueError(f"need 0 <= overlong_buffer_len <= max_response_len, {found}")
    lengths = np.asarray(response_len)
    if np.any(lengths < 0):
        raise ValueError(f"response_len must not be negative, got {lengths.min()}")
    if overlong_buffer_len == 0:
        return np.asarray(np.where(lengths > max_response_len, -1, 0), np.float32)
    excess = lengths.astype(np.int64) - (max_response_len - overlong_buffer_len)
    return np.asarray(np.clip(-excess / overlong_buffer_len, -1, 0), np.float32)
