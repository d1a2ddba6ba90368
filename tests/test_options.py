"""Options beside DAPO's own: CISPO, Dr. GRPO, advantages without the group's std, masks by the
mismatch of sampler and trainer. Hand-derived numbers, naive loops, and what verl 0.9.1 gives
(goldens/make_option_goldens.py).
"""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import gap

from dapo_jax.config import DapoSection
from dapo_jax.dapo.groups import corrects_mismatch, removed_responses, step_advantages
from dapo_jax.dapo.loss import cispo_token_loss, dapo_terms, dapo_token_loss
from dapo_jax.dapo.packing import normalizer_weights
from dapo_jax.dapo.update import summarize
from dapo_jax.training.setup import BatchShape
from dapo_jax.training.step import Trainer, minibatches
from dapo_jax.types import Group, Problem, Prompt, Response, TrainBatch

CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
with np.load(Path(__file__).parent / "goldens" / "peers" / "options.npz") as stored:
    VERL = dict(stored)
MASK = np.arange(VERL["logprobs"].shape[1]) < VERL["lengths"][:, None]
BOUND = 5e-6
ADVANTAGES = np.broadcast_to(VERL["advantages"][:, None], MASK.shape)


def entries(ratio, advantages, mismatch=None, weight=1.0):
    """Tokens at π_old 0.3 with these ratios π_θ / π_old and π_old / π_sampler: log-probs, batch."""
    n = len(ratio)
    old = np.full(n, math.log(0.3), np.float32)
    zeros = np.zeros(n, np.int32)
    behavior = old - np.log(np.float32(mismatch or [1] * n))
    weights, flags = np.full(n, weight, np.float32), np.ones(n, bool)
    rest = (old, behavior, np.float32(advantages), weights, flags)
    return old + np.log(np.float32(ratio)), TrainBatch(zeros, zeros, zeros, flags, *rest)


def terms_and_slopes(logprobs, batch, algo):
    """Loss and slope in the log-prob of each token, and metrics."""
    entropy = jnp.zeros_like(logprobs)
    run = jax.jit(lambda p: dapo_terms(p, entropy, batch, algo))
    losses, metrics = run(logprobs)
    slopes = jax.grad(lambda p: run(p)[0].sum())(logprobs)
    return np.asarray(losses), np.asarray(slopes), {k: np.asarray(v) for k, v in metrics.items()}


# --------------------------------------------------------------------------------------------------
# CISPO
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, weight",
    [(1, 1, 1), (2, 1, 1.28), (2, -1, 1.28), (0.5, 1, 0.8), (0.5, -3, 0.8), (1.1, 2, 1.1)],
)
def test_every_token_of_cispo_has_the_gradient_of_its_clipped_ratio(ratio, advantage, weight):
    """Where DAPO's gradient is 0 (A > 0, r = 2; A < 0, r = 0.5) CISPO's is -1.28 A and -0.8 A."""
    algo = DapoSection(objective="cispo")
    losses, slopes, _ = terms_and_slopes(*entries([ratio], [advantage]), algo)
    assert slopes[0] == pytest.approx(-weight * advantage, rel=1e-6)
    expected = -weight * advantage * math.log(0.3 * ratio)
    assert losses[0] == pytest.approx(expected, rel=1e-6)


def test_cispo_counts_clips_on_both_sides_of_either_sign():
    tokens = entries([2, 2, 0.5, 0.5, 1], [1, -1, 1, -1, 1])
    _, _, both = terms_and_slopes(*tokens, DapoSection(objective="cispo"))
    _, _, one = terms_and_slopes(*tokens, DapoSection())
    assert both["clipped_high"].tolist() == [1, 1, 0, 0, 0]
    assert both["clipped_low"].tolist() == [0, 0, 1, 1, 0]
    assert one["clipped_high"].tolist() == [1, 0, 0, 0, 0]
    assert one["clipped_low"].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("log_ratio", [-200.0, 200.0])
def test_a_ratio_that_overflows_leaves_cispo_finite(log_ratio):
    old = jnp.zeros(1) - 1 - log_ratio
    loss, slope = jax.value_and_grad(lambda p: cispo_token_loss(p, old, jnp.ones(1), **CLIP).sum())(
        jnp.full(1, -1.0)
    )
    weight = 0.8 if log_ratio < 0 else 1.28
    assert (float(loss), float(slope[0])) == pytest.approx((weight, -weight))


@pytest.mark.parametrize("i", range(len(VERL["eps"])))
def test_cispo_of_verl(i):
    low, high = map(float, VERL["eps"][i])
    weight = MASK / MASK.sum()

    def loss(logprobs):
        clip = {"clip_eps_low": low, "clip_eps_high": high}
        losses = cispo_token_loss(logprobs, VERL["old_logprobs"], ADVANTAGES, **clip)
        return (weight * losses).sum()

    value, slope = jax.value_and_grad(loss)(VERL["logprobs"])
    assert gap(value, VERL["cispo_loss"][i]) < BOUND
    assert gap(slope, VERL["cispo_d_logprobs"][i]) < BOUND


# --------------------------------------------------------------------------------------------------
# Normaliser and advantages
# --------------------------------------------------------------------------------------------------


def test_dr_grpo_divides_by_a_constant_length():
    """Token objectives of the tiny batch sum to -4.52 over 4 responses: / (4 · 8)."""
    inputs = np.array([1, 1, 2, 2]), np.array([2, 4, 1, 3]), np.ones(4, bool)
    weights = normalizer_weights(*inputs, normalizer="seq-mean-token-sum", length=8)
    np.testing.assert_array_equal(weights, np.float32(1 / 32))
    sums = np.array([2.28, -4.9, 0.9, -2.8])
    assert float(weights @ sums) == pytest.approx(-4.52 / 32, rel=1e-6)


def test_dr_grpo_of_verl():
    counts, width = VERL["lengths"], MASK.shape[1]
    kept = np.ones(len(counts), bool)
    how = {"normalizer": "seq-mean-token-sum", "length": width}
    weights = normalizer_weights(VERL["group_of"], counts, kept, **how)[:, None] * MASK
    inputs = VERL["logprobs"], VERL["old_logprobs"], ADVANTAGES
    assert gap((weights * dapo_token_loss(*inputs, **CLIP)).sum(), VERL["norm_loss"]) < BOUND


def test_advantages_by_the_std_of_the_group_of_the_step_and_none():
    """Rewards [1, -1, -1, -1] and [1, 1, -1]: means -1/2 and 1/3. All seven have mean -1/7 and
    squared deviations 3 (8/7)² + 4 (6/7)² = 48/7, so a std of √(8/7) with ddof 1.
    """
    rewards = [np.float32([1, -1, -1, -1]), np.float32([1, 1, -1])]
    centred = [[1.5, -0.5, -0.5, -0.5], [2 / 3, 2 / 3, -4 / 3]]
    for scale, divisors in {
        "group": (1 + 1e-6, math.sqrt(4 / 3) + 1e-6),
        "batch": (math.sqrt(8 / 7) + 1e-6,) * 2,
        "none": (1, 1),
    }.items():
        found = step_advantages(rewards, DapoSection(advantage_scale=scale))
        for a, values, divisor in zip(found, centred, divisors, strict=True):
            np.testing.assert_allclose(a, np.array(values) / divisor, rtol=1e-6)
    equal = [np.float32([0.1, 0.1, 0.1]), np.float32([1, -1])]
    for scale in ("group", "batch", "none"):
        algo = DapoSection(advantage_scale=scale, advantage_eps=0.0)
        assert not step_advantages(equal, algo)[0].any()
        assert step_advantages([], algo) == []
        wide = dataclasses.replace(algo, advantage_eps=1.0)
        divisor = 1 if scale == "none" else math.sqrt(2) + 1
        (found,) = step_advantages([np.float32([1, -1])], wide)
        np.testing.assert_allclose(found, np.array([1, -1]) / divisor, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Masks by the mismatch
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dapo", "cispo"])
def test_tokens_outside_the_mask_have_no_loss_and_no_slope(objective):
    """π_old / π_sampler of 0.4, 0.6, 1, 1.9, 2.1 with [0.5, 2]: the first and the last are out, and
    what is left is as without the mask, the normaliser unchanged.
    """
    tokens = entries([1.1] * 5, [1, -1, 1, -1, 1], [0.4, 0.6, 1, 1.9, 2.1], weight=0.2)
    plain = terms_and_slopes(*tokens, DapoSection(objective=objective))
    algo = DapoSection(objective=objective, token_mask=(0.5, 2.0))
    losses, slopes, metrics = terms_and_slopes(*tokens, algo)
    assert metrics["token_masked"].tolist() == [1, 0, 0, 0, 1]
    for found, all_tokens in zip((losses, slopes), plain, strict=False):
        assert found[0] == found[4] == 0
        np.testing.assert_array_equal(found[1:4], all_tokens[1:4])
    sums = {name: float(value.sum()) for name, value in metrics.items()}
    assert summarize(sums)["policy/token_masked_fraction"] == pytest.approx(2 / 5)


def test_a_masked_token_whose_ratio_overflows_changes_nothing():
    """It would make loss and gradient infinite: A < 0 without dual clip."""
    logprobs, batch = entries([1, 1], [-1, -1])
    wild = batch._replace(old_logprobs=batch.old_logprobs - np.float32([0, 300]))
    losses, slopes, _ = terms_and_slopes(logprobs, wild, DapoSection(token_mask=(0.5, 2.0)))
    np.testing.assert_allclose((losses, slopes), [[1, 0], [1, 0]], rtol=1e-6)
    assert np.isinf(terms_and_slopes(logprobs, wild, DapoSection())[0][1])


def test_with_the_samplers_logprobs_the_mask_is_on_the_ratio_itself():
    """π_old = π_sampler, so that π_θ / π_sampler is r, here 1, 2.5 and 0.3. No gradient through the
    mask.
    """
    algo = DapoSection(old_logprobs="sampler", token_mask=(0.5, 2.0))
    losses, slopes, metrics = terms_and_slopes(*entries([1, 2.5, 0.3], [-1, -1, 1]), algo)
    assert metrics["token_masked"].tolist() == [0, 1, 1]
    np.testing.assert_allclose((losses, slopes), [[1, 0, 0]] * 2, rtol=1e-6)
    assert metrics["ratio_tight"].tolist() == [1, 0, 0]


def test_the_token_cap_and_the_mask_act_together():
    """Cap 1.5 below the mask's 2: weights 1, 1.5, 0 at mismatches 1, 1.8, 2.2."""
    algo = DapoSection(importance_cap=1.5, token_mask=(0.5, 2.0))
    losses, *_ = terms_and_slopes(*entries([1] * 3, [-1] * 3, [1, 1.8, 2.2]), algo)
    np.testing.assert_allclose(losses, [1, 1.5, 0], rtol=1e-6)


def test_masks_of_verl():
    """Which tokens, and which responses by the mean of their log-ratios, verl keeps."""
    old, behavior = VERL["old_logprobs"], VERL["behavior_logprobs"]
    algo = DapoSection(token_mask=tuple(map(float, VERL["token_bounds"])))
    flat = entries([1] * MASK.size, [1] * MASK.size)[1]
    flat = flat._replace(old_logprobs=old.ravel(), behavior_logprobs=behavior.ravel())
    metrics = terms_and_slopes(old.ravel(), flat, algo)[2]
    found = metrics["token_masked"].reshape(MASK.shape) == 0
    np.testing.assert_array_equal(found[MASK], VERL["token_kept"][MASK] > 0)
    algo = DapoSection(sequence_mask=tuple(map(float, VERL["sequence_bounds"])))
    pairs = [(o[m], b[m]) for o, b, m in zip(old, behavior, MASK, strict=True)]
    removed, vetoed = removed_responses(a_group(pairs), algo)
    np.testing.assert_array_equal(~removed, VERL["sequence_kept"] > 0)
    assert not vetoed.any()


def a_group(pairs, draw=0, rewards=None):
    """A group of responses with these (old, behavior) log-probs."""
    pairs = [(np.float32(old), np.float32(behavior)) for old, behavior in pairs]
    responses = [Response(np.zeros(len(b), np.int32), b, False) for _, b in pairs]
    rewards = np.float32(rewards if rewards is not None else np.arange(len(pairs)) % 2 * 2 - 1)
    return Group(
        draw=draw,
        prompt=Prompt(Problem("p", "1+1=", "2"), np.zeros(3, np.int32)),
        responses=tuple(responses),
        correct=rewards > 0,
        reward=rewards,
        penalty=np.zeros_like(rewards),
        old_logprobs=tuple(old for old, _ in pairs),
    )


def with_mismatch(*ratios, **options):
    """A group with these π_old / π_sampler on the tokens of each response."""
    return a_group([(np.log(r) - 1, np.full(len(r), -1.0)) for r in ratios], **options)


MISMATCHED = with_mismatch(
    [2, 0.5, 1],  # geometric mean 1
    [1.3] * 4,  # 1.3, though the product is 2.9
    [0.8] * 40,  # 0.8, though the product is 1e-4: a sum would only see its length
    [1.05] * 200,  # 1.05, though the product is 17,000
    [1, 1e-5, 1, 1, 1, 1],  # 0.147, and one token of 1e-5
    [],  # nothing to remove
)


def test_responses_are_removed_by_their_geometric_mean_or_by_one_token():
    algo = DapoSection(sequence_mask=(0.9, 1.1), sequence_veto=1e-4)
    masked, vetoed = removed_responses(MISMATCHED, algo)
    assert masked.tolist() == [False, True, True, False, True, False]
    assert vetoed.tolist() == [False, False, False, False, True, False]
    assert not removed_responses(MISMATCHED, DapoSection()).any()
    only = removed_responses(MISMATCHED, DapoSection(sequence_veto=0.9))
    assert only.tolist() == [[False] * 6, [True, False, True, False, True, False]]


def test_a_mismatch_at_a_bound_stays_in():
    one, same = entries([1], [1]), with_mismatch([1, 1])
    for mask in ((1.0, 2.0), (0.5, 1.0)):
        *_, metrics = terms_and_slopes(*one, DapoSection(token_mask=mask))
        assert metrics["token_masked"].tolist() == [0]
        assert not removed_responses(same, DapoSection(sequence_mask=mask)).any()
    assert not removed_responses(same, DapoSection(sequence_veto=1.0)).any()


def test_tokens_of_earlier_policies_are_in_no_share_of_the_ratio():
    logprobs, batch = entries([1, 1], [1, 1])
    batch = batch._replace(current=np.array([True, False]))
    *_, metrics = terms_and_slopes(logprobs, batch, DapoSection(old_logprobs="sampler"))
    for name in ("tight", "one_percent", "five_percent"):
        assert metrics[f"ratio_{name}"].tolist() == [1, 0]


def test_shares_of_the_ratio_have_a_bound_on_either_side():
    """[0.999, 1.002], 1% and 5% around 1: ratios just inside and just outside of each."""
    ratios = [0.9995, 1.0015, 0.9985, 1.0025, 0.991, 1.009]
    ratios += [0.989, 1.011, 0.951, 1.049, 0.949, 1.051]
    algo = DapoSection(old_logprobs="sampler")
    *_, metrics = terms_and_slopes(*entries(ratios, [1] * 12), algo)
    for name, count in (("tight", 2), ("one_percent", 6), ("five_percent", 10)):
        assert metrics[f"ratio_{name}"].tolist() == [1] * count + [0] * (12 - count)


SHAPE = BatchShape(row_len=256, rows_per_microbatch=2, microbatches=2, row_shards=1)


def test_a_removed_response_has_weight_zero_and_still_counts():
    """In the normaliser and in its group's mean and std, so that nothing else changes."""
    algo = DapoSection(responses_per_prompt=6, responses_per_update=6)
    masked = dataclasses.replace(algo, sequence_mask=(0.9, 1.1), sequence_veto=1e-4)
    (plain, _), (found, stats) = (next(minibatches([MISMATCHED], a, SHAPE)) for a in (algo, masked))
    tokens = [1 / 253 * n for n in (0, 3, 4, 40, 200, 6)]
    assert plain.weight.sum() == pytest.approx(sum(tokens), rel=1e-5)
    for place, out in zip(stats.placement, [False, True, True, False, True, False], strict=True):
        at = place.microbatch, place.row, slice(place.start, place.start + place.length)
        np.testing.assert_array_equal(found.weight[at], 0.0 if out else plain.weight[at])
    np.testing.assert_array_equal(found.advantages, plain.advantages)
    assert 0 < (found.weight > 0).sum() == 203


@pytest.mark.parametrize(
    "option, scored",
    [
        ({}, False),
        ({"importance_cap": 2.0}, True),
        ({"token_mask": (0.5, 2.0)}, True),
        ({"sequence_mask": (0.9, 1.1)}, True),
        ({"sequence_veto": 1e-4}, True),
    ],
    ids=str,
)
def test_groups_that_partial_rollouts_finish_are_compared_with_the_trainer(option, scored):
    """Of draw 3, where this step's begin at 4: several policies sampled its tokens."""
    algo = DapoSection(responses_per_update=16, **option)
    assert corrects_mismatch(algo) == scored
    carried, new = (with_mismatch([1, 1], [1], draw=draw) for draw in (3, 4))
    trainer = Trainer(*[None] * 2, algo, *[None] * 4)
    asked = []

    def logprobs(self, params, groups):
        asked.extend(g.draw for g in groups)
        return [np.full(len(r.tokens), -9, np.float32) for g in groups for r in g.responses]

    run = SimpleNamespace(draw=SimpleNamespace(draws=4), state=SimpleNamespace(params=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_logprobs", logprobs)
        found = trainer.score(run, [carried, new], {})
    assert asked == ([3, 4] if scored else [4])
    assert [g.old_logprobs[0][0] for g in found] == ([-9, -9] if scored else [-1, -9])
