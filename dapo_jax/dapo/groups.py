"""Informative groups and group-relative advantages."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32
from numpy.typing import ArrayLike

from dapo_jax.config import DapoSection
from dapo_jax.types import Group

# Ranges of π_trainer / π_sampler whose shares of tokens are metrics: policy/sampler_ratio_<name>.
RATIO_RANGES: Mapping[str, tuple[float, float]] = {
    "tight": (0.999, 1.002),
    "one_percent": (0.99, 1.01),
    "five_percent": (0.95, 1.05),
}


def informative_groups(correct: ArrayLike) -> Bool[np.ndarray, " Q"]:
    """Groups with correct and incorrect responses: 0 < #correct < G (arXiv 2503.14476, Eq. 8).

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
    reward: ArrayLike, *, ddof: int = 1, eps: float = 1e-6, scale: float | None = None
) -> Float32[np.ndarray, "Q G"]:
    """A = (R - mean(R)) / (std(R) + eps) in each group (arXiv 2503.14476, Eq. 9).

    The std divides by G - ddof; equal rewards give exactly 0. scale: divides in place of std + eps.
    Raises ValueError for other shapes, ddof outside 0..G-1 and non-finite rewards.

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
    own = reward.std(axis=1, ddof=ddof, keepdims=True) + eps
    divisor = own if scale is None else scale
    centred = reward - reward.mean(axis=1, keepdims=True)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, divisor)).astype(np.float32)


def step_advantages(
    rewards: Sequence[Float[np.ndarray, " _"]], algo: DapoSection
) -> list[Float32[np.ndarray, " _"]]:
    """`group_advantages` of each group of a step; ddof is smaller where there are too few rewards.

    By `dapo.advantage_scale`, R - mean(R) of a group is divided by

        group  std(R) of the group + eps
        batch  std of all rewards of the step + eps
        none   1
    """
    ddof, eps, scale = algo.advantage_ddof, algo.advantage_eps, None
    if algo.advantage_scale == "batch" and rewards:
        every = np.concatenate([*rewards]).astype(np.float64)
        scale = float(every.std(ddof=min(ddof, every.size - 1))) + eps
    elif algo.advantage_scale == "none":
        scale = 1.0
    return [
        group_advantages(r[None], ddof=min(ddof, len(r) - 1), eps=eps, scale=scale)[0]
        for r in rewards
    ]


def corrects_mismatch(algo: DapoSection) -> bool:
    """Whether an option compares π_old with the sampler's policy."""
    options = (algo.importance_cap, algo.token_mask, algo.sequence_mask, algo.sequence_veto)
    return any(option is not None for option in options)


def removed_responses(group: Group, algo: DapoSection) -> Bool[np.ndarray, "2 G"]:
    """Responses that `dapo.sequence_mask` [a, b] and `dapo.sequence_veto` c take out of the loss.

        ρ = π_old / π_sampler of a token      mask: (Π ρ)^(1/|o|) outside [a, b]     veto: any ρ < c

    The mean is geometric: the product itself vanishes or explodes with the length.
    """
    removed = np.zeros((2, len(group.responses)), bool)
    (low, high), veto = algo.sequence_mask or (0.0, np.inf), algo.sequence_veto or 0.0
    if algo.sequence_mask is not None or veto:
        pairs = zip(group.old_logprobs, group.responses, strict=True)
        for i, (old, r) in enumerate(pairs):
            if len(old):
                gap = old - r.behavior_logprobs
                mean = np.exp(gap.mean(dtype=np.float64))
                removed[:, i] = not low <= mean <= high, np.exp(gap.min()) < veto
    return removed
