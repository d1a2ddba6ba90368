"""Drawing a token against exact probabilities and naive loops, on one device and with the
vocabulary split over several.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from dapo_jax.rollout.token_sampling import (
    Sampling,
    _as_blocks,
    _block_sums,
    _draw,
    _first_above,
    _inverse_cdf,
    _top_k_floor,
    sample_tokens,
)

draw = jax.jit(sample_tokens, static_argnums=2)
# For tens of thousands of rows a program that runs fast is worth its compiling.
OPTIMIZED = {"xla_backend_optimization_level": 1}
draw_many = jax.jit(sample_tokens, static_argnums=2, compiler_options=OPTIMIZED)

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


@functools.partial(jax.jit, compiler_options=OPTIMIZED)
def inverse_cdf(weights, uniform):
    blocks, floor = _as_blocks(jnp.asarray(weights)), jnp.zeros(len(weights))
    block, place, weight = _inverse_cdf(
        blocks, floor, _block_sums(blocks, floor, None), uniform, None
    )
    return block * blocks.shape[2] + place


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=OPTIMIZED)
def tokens_of(weights, seeds, top_p, top_k):
    """Draws from weights [B, V] of which the largest is 1."""
    blocks = _as_blocks(jnp.asarray(weights))
    sums = _block_sums(blocks, jnp.zeros(len(weights)), None)
    block, place, _ = _draw(
        blocks, sums, jax.vmap(jax.random.key)(seeds), Sampling(1.0, top_p, top_k), None
    )
    return block * blocks.shape[2] + place


# --------------------------------------------------------------------------------------------------------------------
# Inverse CDF
# --------------------------------------------------------------------------------------------------------------------


def by_hand(weights, uniform) -> int:
    """First index whose running sum exceeds u times the total."""
    target, total = uniform * sum(weights), 0.0
    for i, w in enumerate(weights):
        total += w
        if total > target:
            return i
    raise AssertionError("uniform is below 1")


@pytest.mark.parametrize("vocab", [5, 128, 129, 300])
def test_inverse_cdf_of_integer_weights_is_exact(vocab):
    """Sums of small integers and dyadic uniforms are exact in float32, so every boundary falls
    where it must.
    """
    rng = np.random.default_rng(vocab)
    weights = rng.integers(0, 4, (64, vocab)) * rng.integers(0, 2, (64, vocab))
    weights[weights.sum(axis=1) == 0, 0] = 1
    uniform = rng.integers(0, 256, 64) / 256
    uniform[:2] = 0, 255 / 256
    found = inverse_cdf(weights.astype(np.float32), uniform.astype(np.float32))
    assert found.tolist() == [
        by_hand(w, u) for w, u in zip(weights.tolist(), uniform.tolist(), strict=True)
    ]


def test_inverse_cdf_at_the_ends_of_the_uniform_and_of_the_vocabulary():
    cases = []  # weights, uniform, index
    for at in (0, 1, 127, 128, 255, 256, 299):
        one_hot = np.eye(300)[at]
        cases += [(one_hot, u, at) for u in (0, 0.5, BELOW_ONE)]
    for first, last in ((130, 140), (127, 128), (3, 298), (200, 201)):
        middle = np.zeros(300)
        middle[[first, last]] = 0.3, 0.7  # zero weights before, between and after
        cases += [
            (middle, 0, first),
            (middle, 0.29, first),
            (middle, 0.31, last),
            (middle, BELOW_ONE, last),
        ]
    weights, uniform, expected = (np.array(x, np.float32) for x in zip(*cases, strict=True))
    assert inverse_cdf(weights, uniform).tolist() == expected.tolist()


def test_inverse_cdf_never_draws_a_zero_weight():
    rng = np.random.default_rng(0)
    weights = (rng.exponential(size=(20000, 300)) * (rng.random((20000, 300)) < 0.1)).astype(
        np.float32
    )
    weights[:, 77] = 1e-3
    sums = np.cumsum(weights, axis=1)
    edges = (
        sums[np.arange(20000), rng.integers(0, 300, 20000)] / sums[:, -1]
    )  # where one entry ends and the next begins
    for uniform in (edges, np.nextafter(edges, np.float32(0)), rng.random(20000)):
        found = np.asarray(inverse_cdf(weights, np.minimum(uniform, BELOW_ONE).astype(np.float32)))
        assert (weights[np.arange(20000), found] > 0).all()


def test_a_target_beyond_what_rounding_allows_still_finds_a_positive_weight():
    """A difference of two sums may come out below 0, or at the total, if a compiler contracts it."""
    weights = np.tile(np.float32([0, 0, 1, 0, 2, 0]), (4, 1))
    target = jnp.float32([-1e-7, 0, 3, 4])
    assert _first_above(jnp.asarray(weights), target).tolist() == [2, 2, 4, 4]


# --------------------------------------------------------------------------------------------------------------------
# Top-k and top-p
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, top_k", [(0.5, 0), (0.875, 0), (1.0, 3), (0.75, 5), (0.5, 500)])
def test_what_is_drawn_is_the_smallest_set_that_holds_top_p_of_the_k_heaviest(top_p, top_k):
    """Integer weights, exact sums; equal weights on the edge stay in together.

    All of the set is drawn, and nothing else.
    """
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 17, (12, 30)) / 16
    weights[:, 5] = 1
    weights[0], weights[1] = 1, np.eye(30)[7]  # all equal; all in one
    draws = 4000  # the lightest entry is a 480th of the mass: missed with a chance of exp(-8)
    found = np.asarray(
        tokens_of(
            np.repeat(weights, draws, axis=0).astype(np.float32),
            np.arange(12 * draws),
            top_p,
            top_k,
        )
    )
    for row, drawn in zip(weights, found.reshape(12, draws), strict=True):
        assert set(drawn.tolist()) == set(
            np.flatnonzero(tiny.nucleus_by_sorting(row, top_p, top_k)).tolist()
        )


@pytest.mark.parametrize("top_p", [0.01, 0.7, 0.999])
def test_nothing_is_drawn_that_top_p_does_not_need(top_p):
    """Without ties, over three blocks: what is heavier than a drawn entry never holds top_p by
    itself.
    """
    weights = np.random.default_rng(0).exponential(size=(2000, 300)).astype(np.float32) ** 3
    weights /= weights.max(axis=1, keepdims=True)
    drawn = np.take_along_axis(
        weights, np.asarray(tokens_of(weights, np.arange(2000), top_p, 0))[:, None], axis=1
    )
    assert (drawn > 0).all()
    heavier = np.where(weights > drawn, weights, 0).sum(axis=1, dtype=np.float64)
    assert (heavier < top_p * weights.sum(axis=1, dtype=np.float64) * (1 + 1e-6)).all()


@pytest.mark.parametrize("k", [1, 2, 7, 100, 299, 300, 1000])
def test_the_k_heaviest_are_found_with_their_ties_and_without_others(k):
    rng = np.random.default_rng(k)
    weights = rng.choice(rng.random(200), (40, 300)).astype(np.float32)  # many ties
    weights[:20] = rng.random((20, 300)) ** 6  # none, over many orders of magnitude
    weights[:, :128] *= np.float32(1e-3)
    weights[0, 3:] = 0  # fewer than k
    floor = np.asarray(
        jax.jit(_top_k_floor, static_argnums=(1, 2))(_as_blocks(jnp.asarray(weights)), k, None)
    )
    for row, above in zip(weights, floor, strict=True):
        np.testing.assert_array_equal(
            np.where(row > above, row, 0), tiny.nucleus_by_sorting(row, 1, k)
        )


# --------------------------------------------------------------------------------------------------------------------
# Drawing a token
# --------------------------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(0, 1.5, 50).astype(np.float32)
DRAWS = 20000


def probabilities(sampling):
    weights = np.exp((LOGITS - LOGITS.max()).astype(np.float64) / sampling.temperature)
    kept = tiny.nucleus_by_sorting(weights, sampling.top_p, sampling.top_k)
    return kept / kept.sum()


def p_value(counts, expected):
    """Of a chi-square test, with rare tokens pooled."""
    common = DRAWS * expected >= 5
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, DRAWS * expected)]
    used = pooled[1] > 0
    if pooled[0][~used].any():
        return 0.0
    return stats.chisquare(pooled[0][used], pooled[1][used]).pvalue


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.5),
        Sampling(2.0),
        Sampling(1.0, top_p=0.7),
        Sampling(1.0, top_k=6),
        Sampling(0.8, top_p=0.8, top_k=10),
    ],
    ids=str,
)
def test_tokens_follow_the_distribution(sampling):
    keys = jax.random.split(jax.random.key(3), DRAWS)
    tokens, logprobs = draw_many(np.tile(LOGITS, (DRAWS, 1)), keys, sampling)
    counts, expected = np.bincount(tokens, minlength=50), probabilities(sampling)
    assert not counts[expected == 0].any()
    assert p_value(counts, expected) > 1e-3
    for other in (
        Sampling(0.9),
        Sampling(1.0, top_p=0.75),
        Sampling(1.0, top_k=7),
    ):  # a test that tells them apart
        assert p_value(counts, probabilities(other)) < 1e-6
    untruncated = jax.nn.log_softmax(
        LOGITS / sampling.temperature
    )  # the policy's: what the trainer can compute
    np.testing.assert_allclose(
        logprobs, np.asarray(untruncated)[np.asarray(tokens)], rtol=0, atol=2e-6
    )


def test_greedy_is_argmax_with_the_log_prob_of_temperature_one():
    logits = np.random.default_rng(1).normal(size=(20, 300)).astype(np.float32)
    tokens, logprobs = draw(logits, jax.random.split(jax.random.key(0), 20), Sampling(0.0))
    assert tokens.tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(
        logprobs, np.asarray(jax.nn.log_softmax(logits)).max(axis=1), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("uniform, token", [(0.0, 2), (1 - 2.0**-23, 4)])
def test_the_smallest_and_largest_noise_draw_no_token_that_is_all_but_impossible(
    monkeypatch, uniform, token
):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.full((), uniform, jnp.float32))
    logits = jnp.float32([[-60, -60, 0, 0, 0, -60]])
    tokens, _ = jax.jit(lambda keys: sample_tokens(logits, keys, Sampling()))(
        jax.random.split(jax.random.key(0), 1)
    )
    assert tokens.tolist() == [token]


# A row each: finite, masked, NaN, +inf, nothing but -inf
ODD = np.tile(np.random.default_rng(2).normal(size=600).astype(np.float32), (5, 1))
ODD[1, 100:500], ODD[2, 7], ODD[3, 590], ODD[4] = -np.inf, np.nan, np.inf, -np.inf
IS_ODD = [False, False, True, True, True]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.0), Sampling(1.0, top_p=0.7), Sampling(1.0, top_p=0.7, top_k=50)],
    ids=str,
)
def test_a_row_that_is_no_distribution_has_no_log_prob_and_ends(sampling):
    """And a masked vocabulary is one like any other.

    NaN and +inf are rejected for ever by a loop that compares them.
    """
    tokens, logprobs = draw(ODD, jax.random.split(jax.random.key(1), 5), sampling)
    assert np.isnan(logprobs).tolist() == IS_ODD
    assert not 100 <= tokens[1] < 500
    np.testing.assert_allclose(
        logprobs[:2],
        np.asarray(jax.nn.log_softmax(ODD[:2]))[[0, 1], np.asarray(tokens[:2])],
        rtol=0,
        atol=2e-6,
    )


def test_rejection_ends_after_64_draws_which_is_as_good_as_never(monkeypatch):
    """Noise that always draws the lightest entry that is left, from 300 of falling weight: the 64th
    draw is taken.
    """
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.full((), 1 - 2.0**-23, jnp.float32))
    logits = jnp.linspace(0, -1, 300, dtype=np.float32)[None]
    tokens, logprobs = jax.jit(lambda keys: sample_tokens(logits, keys, Sampling(1.0, 0.1)))(
        jax.random.split(jax.random.key(0), 1)
    )
    assert tokens.tolist() == [300 - 64] and np.isfinite(logprobs).all()
    assert (
        stats.poisson.sf(63, np.log(2**18)) < 1e-24
    )  # 64 rejections, whatever top_p and the distribution over 2^18 entries


# --------------------------------------------------------------------------------------------------------------------
# The vocabulary split over devices
# --------------------------------------------------------------------------------------------------------------------


def split_draw(vocab, sampling, parts):
    mesh = Mesh(np.array(jax.devices()).reshape(-1, parts), ("data", "tensor"))
    rows = PartitionSpec("data")
    function = functools.partial(sample_tokens, sampling=sampling, axis="tensor")
    specs = {
        "in_specs": (PartitionSpec("data", "tensor"), rows),
        "out_specs": (rows, rows),
        "check_vma": False,
    }
    logits = jax.ShapeDtypeStruct(
        (40, vocab), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "tensor"))
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 40))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=NamedSharding(mesh, rows))
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs)).lower(logits, keys).compile()


@pytest.mark.parametrize(
    "vocab, parts, sampling",
    [
        (2048, 4, Sampling()),
        (2048, 8, Sampling(0.8, top_p=0.7)),
        (600, 2, Sampling(1.0, top_p=0.6, top_k=50)),  # no whole blocks
        (40, 4, Sampling(1.0, top_k=3)),
        (40, 4, Sampling(0.0)),
    ],
)
def test_devices_that_hold_a_part_of_the_vocabulary_draw_the_same_token(vocab, parts, sampling):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (40, vocab)).astype(np.float32)
    if sampling.temperature == 0:
        logits = logits.round()  # ties, also between devices: the first counts
    keys = jax.random.split(jax.random.key(5), 40)
    program = split_draw(vocab, sampling, parts)
    found = program(
        *(
            jax.device_put(x, s)
            for x, s in zip((logits, keys), program.input_shardings[0], strict=True)
        )
    )
    expected = draw(logits, keys, sampling)
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=2e-6)


def test_a_row_that_is_no_distribution_on_one_device_is_none_on_any():
    program = split_draw(600, Sampling(1.0, 0.7), 4)
    inputs = np.tile(ODD, (8, 1)), jax.random.split(jax.random.key(5), 40)
    _, logprobs = program(
        *(jax.device_put(x, s) for x, s in zip(inputs, program.input_shardings[0], strict=True))
    )
    assert np.isnan(logprobs).tolist() == 8 * IS_ODD


def test_no_device_sees_the_logits_of_another():
    text = split_draw(4096, Sampling(1.0, 0.7, 50), 4).as_text()
    sizes = {
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", text)
    }
    assert 20 * 1024 in sizes  # its own part of its own rows
    assert max(sizes) < 20 * 4096
    moved = re.findall(r"= (?:\w+)\[([\d,]+)\]\S* (?:all-gather|all-reduce)(?:-start)?\(", text)
    assert (
        moved
        and max(int(np.prod([int(n) for n in shape.split(",")])) for shape in moved) <= 20 * 128
    )
