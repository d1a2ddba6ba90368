"""What would be trained on without dynamic sampling as it is here: groups taken as they finish, and groups that are not filtered.

"First finished wins": a group is finished with its longest response, so the first to finish are the short ones, and a step that takes
what is there first trains on shorter responses and easier problems than it drew. dapo_jax accepts in draw order (`drawing.py`).

Unfiltered: where overlong responses are punished, a group that is all wrong has rewards that differ, and teaches to be wrong in fewer
tokens. dapo_jax filters on correctness, before any punishment (`dapo/groups.py`); without dynamic sampling nothing is filtered.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dapo_jax.config import Config, RewardSection
from dapo_jax.dapo.groups import group_advantages, informative_groups
from dapo_jax.dapo.packing import Normalizer, normalizer_weights
from dapo_jax.data.mixture import load_training
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import decode, make_prompts
from dapo_jax.policy import load_params, load_policy, make_engine
from dapo_jax.programs import train_sampling
from dapo_jax.reward.overlong import overlong_penalty
from dapo_jax.reward.pool import RewardItem, RewardPool
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.types import Request

_POOL = 4  # prompts drawn, in units of a step's groups


class Drawn(NamedTuple):
    """Groups of one pool, in draw order."""

    lengths: np.ndarray  # int [Q, G], tokens
    correct: np.ndarray  # bool [Q, G]
    finished: np.ndarray  # int [Q], decode steps until the last response of the group had ended


def accepted(drawn: Drawn, count: int, *, first_finished: bool) -> np.ndarray:
    """Indices of the first `count` informative groups, by draw, or by when they finished."""
    informative = np.flatnonzero(informative_groups(drawn.correct))
    order = np.argsort(drawn.finished[informative], kind="stable") if first_finished else np.arange(informative.size)
    return informative[order[:count]]


def bias(pools: Sequence[Drawn], count: int) -> dict[str, float]:
    """Mean response length and accuracy of what is accepted either way, and of all informative groups, over pools."""
    chosen = {
        "draw_order": [accepted(pool, count, first_finished=False) for pool in pools],
        "first_finished": [accepted(pool, count, first_finished=True) for pool in pools],
        "all": [accepted(pool, len(pool.finished), first_finished=False) for pool in pools],
    }
    found = {}
    for name, indices in chosen.items():
        found[f"{name}_length"] = float(np.mean([pool.lengths[i].mean() for pool, i in zip(pools, indices, strict=True)]))
        found[f"{name}_accuracy"] = float(np.mean([pool.correct[i].mean() for pool, i in zip(pools, indices, strict=True)]))
    return found


def leaked(pools: Sequence[Drawn], reward: RewardSection, *, max_response_len: int, normalizer: Normalizer) -> float:
    """Share of the loss's weight, sum of |w A| over tokens, on groups that are all right or all wrong, if all are trained on.

    Rewards are +1 or -1 with the overlong penalty of `reward`, whether that is switched on or not.
    """
    shares = []
    for lengths, correct, _ in pools:
        penalty = overlong_penalty(lengths, max_response_len=max_response_len, overlong_buffer_len=reward.overlong_buffer_len)
        advantages = group_advantages(np.where(correct, 1.0, -1.0) + penalty)
        group_of = np.repeat(np.arange(len(lengths)), lengths.shape[1])
        weights = normalizer_weights(group_of, lengths.ravel(), np.ones(lengths.size, bool), normalizer=normalizer)
        carried = weights.reshape(lengths.shape) * lengths * np.abs(advantages)
        shares.append(carried[~informative_groups(correct)].sum() / carried.sum())
    return float(np.mean(shares))


def draw_pools(config: Config, pools: int) -> list[Drawn]:
    """Draws pools of prompts with the policy of `model.folder`, each all at once into the engine's slots, and times their ends."""
    policy, mesh = load_policy(config), make_mesh(config.mesh)
    prompts, _ = make_prompts(load_training(config.data)[0], policy.tokenizer, config.data)
    params = load_params(config, policy, mesh)
    weights = publisher(params, mesh, policy.model.compute_dtype)(params)
    engine = make_engine(config, policy, mesh, train_sampling(config))
    size, wanted = config.dapo.responses_per_prompt, _POOL * config.dapo.prompts_per_step
    cursor, drawn = Cursor(), []
    with RewardPool(config.reward) as judges:
        for number in range(pools):
            indices, cursor = advance(cursor, len(prompts), wanted, seed=config.seed)
            stream = engine.stream(weights, jax.random.key(config.seed))
            first = number * wanted
            stream.submit([Request(first + q, g, prompts[i].tokens) for q, i in enumerate(indices) for g in range(size)])
            lengths, correct = np.zeros((wanted, size), int), np.zeros((wanted, size), bool)
            finished = np.zeros(wanted, int)
            while stream.live or stream.pending:
                ended = stream.advance()
                texts = [decode(policy.tokenizer, response.tokens, policy.stop) for _, response in ended]
                items = [
                    RewardItem(prompts[indices[request.draw - first]].problem, text, len(response.tokens))
                    for (request, response), text in zip(ended, texts, strict=True)
                ]
                for (request, response), verdict in zip(ended, judges.judge(items), strict=True):
                    q = request.draw - first
                    lengths[q, request.sample], correct[q, request.sample] = len(response.tokens), verdict.correct
                    finished[q] = stream.steps
            drawn.append(Drawn(lengths, correct, finished))
    return drawn
