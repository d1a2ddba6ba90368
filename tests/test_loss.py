"""The clip and its gradient, the normalisers on a tiny batch, masks, and the loss through a whole
model.
"""

import functools
import math

import jax
import numpy as np
import pytest
import tiny

from dapo_jax.config import DapoSection
from dapo_jax.dapo.loss import (
    batch_logprobs,
    cross_entropy_loss_fn,
    dapo_terms,
    dapo_token_loss,
    loss_fn,
    policy_metrics,
)
from dapo_jax.dapo.packing import TrainItem, build_batch, gather_targets, normalizer_weights
from dapo_jax.types import TrainBatch

CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
MODEL = tiny.model()
PARAMS = tiny.params(MODEL)
TEMPERATURE = 0.8

# advantage, ratio, objective
CLIP_TABLE = [
    (1, r, o)
    for r, o in [(0.5, 0.5), (0.79, 0.79), (1, 1), (1.2, 1.2), (1.28, 1.28), (1.3, 1.28), (2, 1.28)]
] + [
    (-1, r, o)
    for r, o in [(0.5, -0.8), (0.79, -0.8), (1, -1), (1.28, -1.28), (1.3, -1.3), (2, -2), (12, -12)]
]


def objective(log_ratio, advantage, dual_clip=None):
    """The objective of one token in float64 numpy, straight from the definition."""
    ratio = np.exp(log_ratio)
    value = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
    return max(value, dual_clip * advantage) if dual_clip and advantage < 0 else value


def token_loss_and_slope(log_ratio, advantage, dual_clip=None):
    """Loss and its derivative in the log-prob, at an old log-prob that is not 0."""
    log_ratio, advantage = np.float32(log_ratio), np.float32(advantage)
    loss = functools.partial(
        dapo_token_loss,
        old_logprobs=np.float32(-1.5),
        advantages=advantage,
        **CLIP,
        dual_clip=dual_clip,
    )
    return [float(x) for x in jax.value_and_grad(loss)(log_ratio - np.float32(1.5))]


# --------------------------------------------------------------------------------------------------------------------
# One token
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, ratio, expected", CLIP_TABLE)
def test_clip_table(advantage, ratio, expected):
    loss, slope = token_loss_and_slope(np.log(ratio), advantage)
    assert -loss == pytest.approx(expected, rel=1e-6)
    if ratio != 1.28:  # there the slope jumps
        clipped = ratio > 1.28 if advantage > 0 else ratio < 0.8
        assert -slope == (0 if clipped else pytest.approx(advantage * ratio, rel=1e-6))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_loss_and_slope_match_finite_differences_of_the_definition(dual_clip):
    rng = np.random.default_rng(0)
    for advantage in (1.5, 0.3, -0.3, -1.5):
        for log_ratio in rng.uniform(-2, 2, 12):
            if np.abs(np.exp(log_ratio) - np.array([0.8, 1.28, 3.0])).min() < 1e-3:
                continue
            loss, slope = token_loss_and_slope(log_ratio, advantage, dual_clip)
            h = 1e-6
            expected = (
                objective(log_ratio + h, advantage, dual_clip)
                - objective(log_ratio - h, advantage, dual_clip)
            ) / (2 * h)
            assert -loss == pytest.approx(objective(log_ratio, advantage, dual_clip), rel=1e-5)
            assert -slope == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (-1, 12, 10, 0),
        (-2, 12, 20, 0),
        (-1, 9, 9, 9),
        (-1, 0.5, 0.8, 0),
        (1, 12, -1.28, 0),
        (1, 0.5, -0.5, -0.5),
    ],
)
def test_dual_clip_caps_the_loss_of_negative_advantages_only(advantage, ratio, loss, slope):
    assert token_loss_and_slope(np.log(ratio), advantage, dual_clip=10.0) == pytest.approx(
        [loss, slope], rel=1e-5
    )


def test_a_ratio_that_overflows_is_clipped_where_there_is_a_clip():
    assert token_loss_and_slope(200, 1) == pytest.approx([-1.28, 0])
    assert token_loss_and_slope(200, 0) == [0, 0]
    assert token_loss_and_slope(200, -2, dual_clip=10.0) == pytest.approx([20, 0])
    assert token_loss_and_slope(200, -1) == [
        np.inf,
        np.inf,
    ]  # unbounded by definition: the update is skipped, and says so
    assert token_loss_and_slope(-200, 1) == [0, 0]
    assert token_loss_and_slope(-200, -1) == pytest.approx([0.8, 0])


def test_above_its_cap_a_ratio_continues_along_its_tangent():
    """C (1 + log r - log C) by hand at C = 2: r = 4 → 2 (1 + log 2); below the cap nothing changes."""

    def capped(ratio, advantage, **more):
        loss = functools.partial(
            dapo_token_loss,
            old_logprobs=np.float32(-1),
            advantages=np.float32(advantage),
            ratio_cap=2.0,
            **CLIP,
            **more,
        )
        return [float(x) for x in jax.value_and_grad(loss)(np.float32(np.log(ratio) - 1))]

    assert capped(4, -1) == pytest.approx([2 * (1 + math.log(2)), 2], rel=1e-6)
    assert capped(4, -3) == pytest.approx([6 * (1 + math.log(2)), 6], rel=1e-6)
    assert capped(np.exp(200), -1) == pytest.approx(
        [2 * (201 - math.log(2)), 2], rel=1e-6
    )  # finite where exp is not
    assert capped(4, -1, dual_clip=3.0) == pytest.approx([3, 0], rel=1e-6)
    for advantage, ratio in [(1, 0.5), (1, 1.2), (1, 4), (-1, 0.5), (-1, 1.2), (-1, 1.9)]:
        assert capped(ratio, advantage) == pytest.approx(
            token_loss_and_slope(np.log(ratio), advantage), rel=1e-5
        )


@pytest.mark.parametrize(
    "mode, losses", [("recompute", [2 * 1.5, 2 * 3.0, 2 * 3.0]), ("sampler", [2.0, 2.0, 2.0])]
)
def test_truncated_importance_sampling_weights_by_what_the_sampler_drew(mode, losses):
    """π_old / π_sampler = 1.5, 3, 5 with cap 3, at ratio 1, A = -1, weight 2: recomputed π_old
    weighs each token by 1.5, 3, 3; with the sampler's own log-probs the mismatch is in the ratio,
    which is 1 here.
    """
    old = np.log(np.float32([0.3, 0.3, 0.3]))
    zeros = np.zeros(3, np.int32)
    behavior = (old - np.log([1.5, 3.0, 5.0])).astype(np.float32)
    args = TrainBatch(
        zeros,
        zeros,
        zeros,
        zeros == 0,
        old,
        behavior,
        np.float32([-1] * 3),
        np.float32([2] * 3),
        zeros == 0,
    )
    algo = DapoSection(old_logprobs=mode, importance_cap=3.0)
    loss, metrics = dapo_terms(old, zeros.astype(np.float32), args, algo)
    np.testing.assert_allclose(loss, losses, rtol=1e-6)
    assert metrics["importance_capped"].tolist() == (
        [0, 0, 1] if mode == "recompute" else [0, 0, 0]
    )
    # At π_θ / π_old = 4, with the sampler's log-probs as old ones, only the ratio itself is capped.
    same = args._replace(behavior_logprobs=old)
    loss, metrics = dapo_terms(old + np.float32(np.log(4)), zeros.astype(np.float32), same, algo)
    ratio = 3 * (1 + math.log(4 / 3)) if mode == "sampler" else 4
    np.testing.assert_allclose(loss, [2 * ratio] * 3, rtol=1e-6)
    assert metrics["importance_capped"].tolist() == [mode == "sampler"] * 3
    off, metrics = dapo_terms(old, zeros.astype(np.float32), args, DapoSection(old_logprobs=mode))
    np.testing.assert_allclose(off, [2, 2, 2], rtol=1e-6)
    assert "importance_capped" not in metrics


# --------------------------------------------------------------------------------------------------------------------
# The tiny batch: o1, o2 of group 1 and o3, o4 of group 2
# --------------------------------------------------------------------------------------------------------------------

RATIOS = [[1.0, 1.5], [1, 0.5, 1.1, 2], [0.9], [1, 1, 0.7]]
ADVANTAGES = [1, -1, 1, -1]
GROUP_OF, COUNTS = np.array([1, 1, 2, 2]), np.array([2, 4, 1, 3])
ALL, WITHOUT_O2 = [True] * 4, [True, False, True, True]
J = [
    ("token-mean", ALL, -0.4520),
    ("group-token-mean", ALL, -0.455833),
    ("seq-mean-token-mean", ALL, -0.0295833),
    ("seq-mean-token-sum", ALL, -1.13),
    ("token-mean", WITHOUT_O2, 0.0633333),
    ("group-token-mean", WITHOUT_O2, (2.28 / 2 - 1.9 / 4) / 2),
]


@pytest.mark.parametrize("normalizer, kept, expected", J)
def test_objective_of_the_tiny_batch(normalizer, kept, expected):
    weights = normalizer_weights(GROUP_OF, COUNTS, np.array(kept), normalizer=normalizer)
    ratios = np.concatenate(RATIOS).astype(np.float32)
    losses = dapo_token_loss(
        np.log(ratios), np.zeros(10, np.float32), np.repeat(np.float32(ADVANTAGES), COUNTS), **CLIP
    )
    assert -float(np.repeat(weights, COUNTS) @ np.asarray(losses)) == pytest.approx(
        expected, abs=1e-6
    )


def tiny_items(normalizer="token-mean", kept=ALL, only=range(4)):
    """The tiny batch as responses to a model, whose old log-probs are its log-probs - log r.

    `only`: those that a rank holds.
    """
    rng = np.random.default_rng(1)
    mine = np.isin(np.arange(4), list(only))
    weights = normalizer_weights(GROUP_OF, COUNTS, np.array(kept) & mine, normalizer=normalizer)
    items = []
    for advantage, count, weight in zip(ADVANTAGES, COUNTS, weights, strict=True):
        prompt, response = (
            rng.integers(0, MODEL.vocab_size, size).astype(np.int32) for size in (3, count)
        )
        zeros = np.zeros(count, np.float32)
        items.append(TrainItem(prompt, response, zeros, zeros, advantage, float(weight)))
    items = tiny.with_ratios(PARAMS, MODEL, items, RATIOS, TEMPERATURE)
    return [
        item._replace(behavior_logprobs=item.old_logprobs + np.float32(np.log(r)))
        for item, r in zip(items, RATIOS, strict=True)
    ]


def rows(items, n=4, t=26, order=None):
    """The items in packed rows [n, t]: no micro-batches."""
    items = items if order is None else [items[i] for i in order]
    batch, _ = build_batch(items, row_len=t, rows_per_microbatch=n, microbatches=1)
    return jax.tree.map(lambda a: a[0], batch)


@functools.partial(jax.jit, static_argnames="chunk_size")
def loss_and_grad(params, batch, chunk_size=16):
    loss = functools.partial(
        loss_fn, model=MODEL, algo=DapoSection(), temperature=TEMPERATURE, chunk_size=chunk_size
    )
    return jax.value_and_grad(loss, has_aux=True)(params, batch)


@pytest.mark.parametrize("normalizer, kept, expected", J)
def test_objective_of_the_tiny_batch_through_a_model(normalizer, kept, expected):
    (loss, _), _ = loss_and_grad(PARAMS, rows(tiny_items(normalizer, kept)))
    assert -float(loss) == pytest.approx(expected, abs=2e-6)


def test_the_sum_over_ranks_is_the_objective_and_the_mean_of_their_means_is_not():
    def loss(only, weighted_by):
        batch = rows(tiny_items(only=only))
        if weighted_by == "all":
            batch = batch._replace(weight=np.where(batch.weight > 0, np.float32(0.1), 0))
        return -float(loss_and_grad(PARAMS, batch)[0][0])

    for ranks in ([(0, 2), (1, 3)], [(0, 1), (2, 3)], [(0, 1, 2), (3,)]):
        assert sum(loss(own, "all") for own in ranks) == pytest.approx(-0.4520, abs=2e-6)
    assert np.mean([loss(own, "rank") for own in [(0, 2), (1, 3)]]) == pytest.approx(
        -0.0200, abs=2e-6
    )
    by_samples = [len(own) / 4 * loss(own, "rank") for own in [(0, 1, 2), (3,)]]
    assert sum(by_samples) == pytest.approx(-0.417619, abs=2e-6)


def test_metric_sums_of_the_tiny_batch():
    items = tiny_items()
    items[0] = items[0]._replace(behavior_logprobs=items[0].behavior_logprobs + np.float32(0.25))
    (_, sums), _ = loss_and_grad(PARAMS, rows(items))
    ratios = np.concatenate(RATIOS)
    logprobs = tiny.response_logprobs(PARAMS, MODEL, items, TEMPERATURE)
    expected = {
        "tokens": 10,
        "token_prob": np.exp(np.concatenate(logprobs)).sum(),
        "approx_kl": (ratios - 1 - np.log(ratios)).sum(),
        "clipped_low": 2,  # 0.5 and 0.7 of the negative ones
        "clipped_high": 1,  # 1.5
        "upclipped_prob": np.exp(logprobs[0][1]),
        "sampler_gap": 0.5,  # two tokens
        "gap_tokens": 10,
    }
    assert {k: float(sums[k]) for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert set(sums) == {*expected, "entropy"}  # whose value is test_logprobs' to check
    assert 0 < sums["entropy"] < 10 * np.log(MODEL.vocab_size)
    items[1] = items[1]._replace(current=False)  # of an earlier step's policy
    (loss, without), grads = loss_and_grad(PARAMS, rows(items))
    assert (float(without["sampler_gap"]), float(without["gap_tokens"])) == pytest.approx(
        (0.5, 10 - len(items[1].response)), rel=1e-5
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))


def test_dual_clipped_tokens_are_counted_only_where_it_is_on():
    flat = jax.tree.map(lambda a: a.reshape(-1), rows(tiny_items(), 1, 26))
    logprobs = flat.behavior_logprobs  # those of the model
    assert "clipped_dual" not in policy_metrics(logprobs, logprobs, flat, DapoSection())
    found = policy_metrics(logprobs, logprobs, flat, DapoSection(dual_clip=1.9))["clipped_dual"]
    assert np.asarray(flat.behavior_logprobs - flat.old_logprobs)[found > 0] == pytest.approx(
        [np.log(2)], rel=1e-5
    )


def token_args(n, advantages, log_ratio=0.0):
    """n tokens whose old and the sampler's log-probs are -1, and log-probs of that ratio."""
    zeros, ones = np.zeros(n, np.int32), np.full(n, -1, np.float32)
    signed = np.float32(advantages)
    args = TrainBatch(zeros, zeros, zeros, zeros == 0, ones, ones, signed, -ones, zeros == 0)
    return np.float32(log_ratio) + ones, args


def test_a_ratio_at_its_bound_is_not_counted_as_clipped():
    logprobs, args = token_args(2, [1, -1])
    for mode in ("sampler", "recompute"):
        algo = DapoSection(
            clip_eps_low=0.0,
            clip_eps_high=0.0,
            dual_clip=1.0,
            importance_cap=1.0,
            old_logprobs=mode,
        )
        counts = policy_metrics(logprobs, logprobs, args, algo)
        for name in ("clipped_low", "clipped_high", "clipped_dual", "importance_capped"):
            assert counts[name].tolist() == [0, 0], name


def test_a_token_without_advantage_is_never_counted_as_clipped():
    logprobs, args = token_args(2, [0, 0], [np.log(12), np.log(0.5)])
    counts = policy_metrics(logprobs, logprobs, args, DapoSection(dual_clip=10.0))
    for name in ("clipped_low", "clipped_high", "clipped_dual", "upclipped_prob"):
        assert counts[name].tolist() == [0, 0], name


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def test_a_batch_without_any_trained_token_gives_zero():
    batch = rows(tiny_items())
    for empty in (
        batch._replace(target_mask=np.zeros_like(batch.target_mask)),
        batch._replace(weight=np.zeros_like(batch.weight)),
        jax.tree.map(np.zeros_like, batch),
    ):
        (loss, sums), grads = loss_and_grad(PARAMS, empty)
        assert loss == 0 and all(np.isfinite(v) for v in sums.values())
        assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("old", [-300.0, 300.0])
def test_a_ratio_that_overflows_on_a_token_that_is_not_trained_changes_nothing(old):
    batch = rows(tiny_items(kept=WITHOUT_O2))
    (loss, _), grads = loss_and_grad(PARAMS, batch)
    wild = batch._replace(
        old_logprobs=np.where(
            batch.weight > 0, batch.old_logprobs, np.float32(old)
        ),  # targets of weight 0, prompts, padding
        advantages=np.where(batch.weight > 0, batch.advantages, np.float32(-1)),
    )
    (same_loss, _), same_grads = loss_and_grad(PARAMS, wild)
    assert same_loss == loss
    jax.tree.map(np.testing.assert_array_equal, same_grads, grads)


def test_a_ratio_that_overflows_on_a_trained_token_with_a_positive_advantage_has_slope_zero():
    batch = rows(tiny_items())
    t = np.argwhere(batch.target_mask & (batch.advantages > 0))[0]
    old = batch.old_logprobs.copy()
    old[*t] = -300
    (loss, _), grads = loss_and_grad(PARAMS, batch._replace(old_logprobs=old))
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


# --------------------------------------------------------------------------------------------------------------------
# Through the whole model
# --------------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_the_slope_of_the_loss():
    """Central differences along the gradient and two random directions.

    Measured: within 1.1e-4 of the gradient's norm.
    """
    batch = rows(tiny_items())
    grads = jax.tree.map(np.asarray, loss_and_grad(PARAMS, batch)[1])
    rng = np.random.default_rng(0)
    directions = [
        grads,
        *(
            jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
            for _ in range(2)
        ),
    ]

    def norm(tree):
        return float(
            np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))
        )

    def loss_at(distance, direction):
        moved = jax.tree.map(lambda p, d: p + distance * d, PARAMS, direction)
        return float(loss_and_grad(moved, batch)[0][0])

    for direction in directions:
        length = np.float32(norm(direction))
        unit = jax.tree.map(lambda d, length=length: d / length, direction)
        slope = sum(
            float(np.vdot(g, u))
            for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(unit), strict=True)
        )
        h = 2e-3
        assert (loss_at(h, unit) - loss_at(-h, unit)) / (2 * h) == pytest.approx(
            slope, abs=1e-3 * norm(grads)
        )


ITEMS = tiny.make_items(MODEL, 8, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def plain():
    loss = jax.jit(
        functools.partial(tiny.plain_loss, config=MODEL, items=ITEMS, temperature=TEMPERATURE)
    )
    return jax.device_get(jax.value_and_grad(lambda p: loss(p))(PARAMS))


def test_the_items_are_clipped_on_both_sides():
    _, sums = loss_and_grad(PARAMS, rows(ITEMS))[0]
    assert sums["clipped_low"] >= 3 and sums["clipped_high"] >= 3 and sums["tokens"] > 20


@pytest.mark.parametrize(
    "n, t, order, chunk_size",
    [
        (4, 26, None, 16),
        (4, 26, [5, 2, 7, 0, 1, 6, 3, 4], 16),  # other rows, other neighbours
        (
            9,
            13,
            None,
            50,
        ),  # shorter rows that hold hardly more than one item, an empty row, chunks that do not divide the rows
    ],
)
def test_loss_and_gradient_do_not_depend_on_packing_padding_and_chunks(
    plain, n, t, order, chunk_size
):
    """Against unpacked rows and whole log-softmaxes.

    Measured: loss 2e-7, gradient 5e-7 relative.
    """
    (loss, _), grads = loss_and_grad(PARAMS, rows(ITEMS, n, t, order), chunk_size)
    assert tiny.gap(loss, plain[0]) < 1e-6
    assert tiny.gap(grads, plain[1]) < 1e-6


def test_batch_logprobs_are_those_of_a_plain_log_softmax():
    batch, stats = build_batch(ITEMS, row_len=26, rows_per_microbatch=4)
    run = jax.jit(
        functools.partial(batch_logprobs, model=MODEL, temperature=TEMPERATURE, chunk_size=16)
    )
    parts = [jax.tree.map(lambda a, m=m: a[m], batch) for m in range(len(batch.tokens))]
    found = np.stack([run(PARAMS, rows) for rows in parts])
    assert not found[~batch.target_mask].any()
    for own, expected in zip(
        gather_targets(found, stats.placement),
        tiny.response_logprobs(PARAMS, MODEL, ITEMS, TEMPERATURE),
        strict=True,
    ):
        np.testing.assert_allclose(own, expected, rtol=0, atol=2e-6)


def test_cross_entropy_is_the_weighted_sum_of_negative_logprobs():
    loss, sums = jax.jit(functools.partial(cross_entropy_loss_fn, model=MODEL, chunk_size=16))(
        PARAMS, rows(ITEMS)
    )
    expected = -sum(
        item.weight * p.sum()
        for item, p in zip(ITEMS, tiny.response_logprobs(PARAMS, MODEL, ITEMS), strict=True)
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert sums["tokens"] == sum(len(item.response) for item in ITEMS) and set(sums) == {
        "tokens",
        "entropy",
    }
