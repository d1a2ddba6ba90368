"""Informative groups and group-relative advantages."""

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.typing import ArrayLike

from dapo_jax.config import DapoSection


def informative_groups(correct: ArrayLike) -> Bool[np.ndarray, " Q"]:
    """Groups with correct and incorrect responses: 0 < #correct < G (arXiv 2503.14476, Eq. 8).

    bool [Q, G] -> bool [Q]. Raises ValueError for other shapes.

    >>> print(informative_groups([[True, False, False], [True, True, True], [False, False, False]]))
    [ True False False]
    """
    correct = np.asarray(correct, bool)
    if correct.ndim != 2:
        raise ValueError(f"correct must be [Q, G], got shape {correct.shape}")
    return np.logical_and(correct.any(axis=1), ~correct.all(axis=1))


def is_informative(correct: ArrayLike) -> bool:
    """`informative_groups` of one group, bool [G]; G is smaller where responses got no verdict."""
    return bool(informative_groups(np.asarray(correct)[None])[0])


def group_advantages(
    reward: ArrayLike, *, ddof: int = 1, eps: float = 1e-6
) -> Float32[np.ndarray, "Q G"]:
    """A = (R - mean(R)) / (std(R) + eps) in each group (arXiv 2503.14476, Eq. 9).

    [Q, G] -> float32 [Q, G]. The std divides by G - ddof; equal rewards give exactly 0. Raises
    ValueError for other shapes, ddof outside 0..G-1 and non-finite rewards.

    >>> print(group_advantages([[1, 1, -1, -1], [0.1, 0.1, 0.1, 0.1]]).round(4))
    [[ 0.866  0.866 -0.866 -0.866]
     [ 0.     0.     0.     0.   ]]
    """
    reward = np.asarray(reward, np.float64)
    if reward.ndim != 2:
        raise ValueError(f"reward must be [Q, G], got shape {reward.shape}")
    if not 0 <= ddof < reward.shape[1]:
        raise ValueError(f"ddof must be at least 0 and below G = {reward.shape[1]}, got {ddof}")
    if not np.isfinite(reward).all():
        raise ValueError("reward holds non-finite values")
    # The std of equal rewards need not round to 0 (0.1, 0.1, 0.1), so the rewards are compared.
    constant = reward.max(axis=1, keepdims=True) == reward.min(axis=1, keepdims=True)
    scale = reward.std(axis=1, ddof=ddof, keepdims=True) + eps
    centred = reward - reward.mean(axis=1, keepdims=True)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, scale)).astype(np.float32)


def advantages_of(reward: Float[np.ndarray, " G"], algo: DapoSection) -> Float32[np.ndarray, " G"]:
    """`group_advantages` of one group, float32 [G]; ddof is smaller where G is too small for it."""
    ddof = min(algo.advantage_ddof, len(reward) - 1)
    return group_advantages(reward[None], ddof=ddof, eps=algo.advantage_eps)[0]
