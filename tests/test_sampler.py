"""Drawing a token against exact probabilities, and whole responses against teacher forcing and a draw done by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dapo_jax.model.decoder import apply
from dapo_jax.rollout.sampler import Sampling, _first_above, _inverse_cdf, _nucleus, decode, prefill, response_keys, sample_tokens

draw = jax.jit(sample_tokens, static_argnums=2)
inverse_cdf = jax.jit(_inverse_cdf)
nucleus = jax.jit(_nucleus, static_argnums=(1, 2))

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


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
    """Sums of small integers and dyadic uniforms are exact in float32, so every boundary falls where it must."""
    rng = np.random.default_rng(vocab)
    weights = rng.integers(0, 4, (64, vocab)) * rng.integers(0, 2, (64, vocab))
    weights[weights.sum(axis=1) == 0, 0] = 1
    uniform = rng.integers(0, 256, 64) / 256
    uniform[:2] = 0, 255 / 256
    found = inverse_cdf(weights.astype(np.float32), uniform.astype(np.float32))
    assert found.tolist() == [by_hand(w, u) for w, u in zip(weights.tolist(), uniform.tolist(), strict=True)]


def test_inverse_cdf_at_the_ends_of_the_uniform_and_of_the_vocabulary():
    cases = []  # weights, uniform, index
    for at in (0, 1, 127, 128, 255, 256, 299):
        one_hot = np.eye(300)[at]
        cases += [(one_hot, u, at) for u in (0, 0.5, BELOW_ONE)]
    for first, last in ((130, 140), (127, 128), (3, 298), (200, 201)):
        middle = np.zeros(300)
        middle[[first, last]] = 0.3, 0.7  # zero weights before, between and after
        cases += [(middle, 0, first), (middle, 0.29, first), (middle, 0.31, last), (middle, BELOW_ONE, last)]
    weights, uniform, expected = (np.array(x, np.float32) for x in zip(*cases, strict=True))
    assert inverse_cdf(weights, uniform).tolist() == expected.tolist()


def test_inverse_cdf_never_draws_a_zero_weight():
    rng = np.random.default_rng(0)
    weights = (rng.exponential(size=(20000, 300)) * (rng.random((20000, 300)) < 0.1)).astype(np.float32)
    weights[:, 77] = 1e-3
    sums = np.cumsum(weights, axis=1)
    edges = sums[np.arange(20000), rng.integers(0, 300, 20000)] / sums[:, -1]  # where one entry ends and the next begins
    for uniform in (edges, np.nextafter(edges, np.float32(0)), rng.random(20000)):
        found = np.asarray(inverse_cdf(weights, np.minimum(uniform, BELOW_ONE).astype(np.float32)))
        assert (weights[np.arange(20000), found] > 0).all()


def test_a_target_beyond_what_rounding_allows_still_finds_a_positive_weight():
    """A difference of two sums may come out below 0, or at the total, if a compiler contracts it."""
    weights = np.tile(np.float32([0, 0, 1, 0, 2, 0]), (4, 1))
    assert _first_above(weights, np.float32([-1e-7, 0, 3, 4])).tolist() == [2, 2, 4, 4]


# --------------------------------------------------------------------------------------------------------------------
# Top-k and top-p
# --------------------------------------------------------------------------------------------------------------------


def nucleus_by_sorting(weights, top_p, top_k):
    kept = np.sort(weights)[::-1]
    threshold = kept[top_k - 1] if 0 < top_k <= kept.size else 0
    weights = np.where(weights >= threshold, weights, 0)
    if top_p == 1:
        return weights
    order = np.sort(weights)[::-1]
    enough = int(np.argmax(np.cumsum(order) >= top_p * order.sum()))
    return np.where(weights >= order[enough], weights, 0)


@pytest.mark.parametrize("top_p, top_k", [(0.5, 0), (0.875, 0), (1.0, 3), (0.75, 5), (0.5, 500)])
def test_nucleus_is_the_smallest_set_that_holds_top_p_of_the_k_heaviest(top_p, top_k):
    """Integer weights, exact sums; equal weights on the edge stay in together."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 20, (50, 30))
    weights[0], weights[1] = 1, np.eye(30)[7]  # all equal; all in one
    found = nucleus(weights.astype(np.float32), top_p, top_k)
    np.testing.assert_array_equal(found, [nucleus_by_sorting(w, top_p, top_k) for w in weights])


def test_nucleus_of_any_mass_is_minimal():
    """Without ties: it holds top_p, and not without its lightest entry."""
    weights = np.random.default_rng(0).exponential(size=(200, 130)).astype(np.float32) ** 3
    for top_p in (0.01, 0.7, 0.999):
        kept = np.asarray(nucleus(weights, top_p, 0), np.float64)
        mass, total = kept.sum(axis=1), weights.sum(axis=1, dtype=np.float64)
        lightest = np.where(kept > 0, kept, np.inf).min(axis=1)
        assert (mass >= top_p * total * (1 - 1e-6)).all() and (mass - lightest < top_p * total * (1 + 1e-6)).all()
        np.testing.assert_array_equal(kept > 0, weights >= lightest[:, None])


# --------------------------------------------------------------------------------------------------------------------
# Drawing a token
# --------------------------------------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(0, 1.5, 50).astype(np.float32)
DRAWS = 20000


def probabilities(sampling):
    weights = np.exp((LOGITS - LOGITS.max()).astype(np.float64) / sampling.temperature)
    kept = nucleus_by_sorting(weights, sampling.top_p, sampling.top_k)
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
    tokens, logprobs = draw(np.tile(LOGITS, (DRAWS, 1)), keys, sampling)
    counts, expected = np.bincount(tokens, minlength=50), probabilities(sampling)
    assert not counts[expected == 0].any()
    assert p_value(counts, expected) > 1e-3
    for other in (Sampling(0.9), Sampling(1.0, top_p=0.75), Sampling(1.0, top_k=7)):  # a test that tells them apart
        assert p_value(counts, probabilities(other)) < 1e-6
    untruncated = jax.nn.log_softmax(LOGITS / sampling.temperature)  # the policy's: what the trainer can compute
    np.testing.assert_allclose(logprobs, np.asarray(untruncated)[np.asarray(tokens)], rtol=0, atol=2e-6)


def test_greedy_is_argmax_with_the_log_prob_of_temperature_one():
    logits = np.random.default_rng(1).normal(size=(20, 300)).astype(np.float32)
    tokens, logprobs = draw(logits, jax.random.split(jax.random.key(0), 20), Sampling(0.0))
    assert tokens.tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits)).max(axis=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("uniform, token", [(0.0, 2), (1 - 2.0**-23, 4)])
def test_the_smallest_and_largest_noise_draw_no_token_that_is_all_but_impossible(monkeypatch, uniform, token):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.full((), uniform, jnp.float32))
    logits = np.float32([[-60, -60, 0, 0, 0, -60]])
    tokens, _ = jax.jit(lambda keys: sample_tokens(logits, keys, Sampling()))(jax.random.split(jax.random.key(0), 1))
    assert tokens.tolist() == [token]


# --------------------------------------------------------------------------------------------------------------------
# Whole responses
# --------------------------------------------------------------------------------------------------------------------

MODEL = tiny.model(vocab_size=130)
B, P, R = 8, 6, 9
SAMPLING = Sampling(0.9, top_p=0.95, top_k=60)
STOP = (3, 4, 5, 6, 7, 8, 9, 10)
SEED = jax.random.key(11)
PROMPT_LEN = np.array([1, 6, 3, 0, 2, 5, 4, 6], np.int32)  # slot 3 is empty
DRAW, SAMPLE = np.arange(B) // 2, np.arange(B) % 2


@functools.cache
def sharp_params():
    """Logits with a spread, so that top-p and top-k cut something."""
    params = tiny.params(MODEL)
    return {**params, "embed": {"embedding": 3 * params["embed"]["embedding"]}}


@pytest.fixture(scope="module")
def sampled():
    """Prompts and the final state, decoded in pieces of four steps."""
    prompts = np.random.default_rng(0).integers(0, MODEL.vocab_size, (B, P)).astype(np.int32)
    options = {"model": MODEL, "sampling": SAMPLING, "stop": STOP}
    start = jax.jit(functools.partial(prefill, **options, max_response_len=R))
    go_on = jax.jit(functools.partial(decode, **options, max_steps=4))
    state = start(sharp_params(), prompts, PROMPT_LEN, response_keys(SEED, DRAW, SAMPLE))
    pieces = 0
    while state.live.any():
        state, pieces = go_on(sharp_params(), state), pieces + 1
    assert pieces == 2  # the first token is the prefill's, 4 + 4 make nine
    return prompts, jax.tree.map(np.asarray, state._replace(keys=None))


@pytest.fixture(scope="module")
def forced(sampled):
    """Logits [B, R, V] / temperature that the model gives for each response token, from one pass over prompt and response."""
    prompts, state = sampled
    rows = np.zeros((B, P + R), np.int32)
    for row, prompt, length, response in zip(rows, prompts, PROMPT_LEN, state.tokens, strict=True):
        row[: length + R] = np.concatenate([prompt[:length], response])
    logits = np.asarray(jax.jit(apply, static_argnums=1)(sharp_params(), MODEL, rows), np.float64)
    at = np.maximum(PROMPT_LEN[:, None] - 1, 0) + np.arange(R)
    return np.take_along_axis(logits, at[..., None], axis=1) / SAMPLING.temperature


def test_log_probs_are_those_of_teacher_forcing(sampled, forced):
    """Measured: within 2e-6."""
    _, state = sampled
    log_softmax = forced - np.log(np.exp(forced).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_softmax, state.tokens[..., None], axis=-1)[..., 0]
    written = np.arange(R) < state.length[:, None]
    np.testing.assert_allclose(state.logprobs[written], expected[written], rtol=0, atol=1e-5)
    assert not state.logprobs[~written].any() and not state.tokens[~written].any()


def test_every_token_is_the_draw_that_its_key_makes(sampled, forced):
    """The same draw by hand: sort, cut, inverse CDF, all in float64; noise fold_in(seed, draw, sample, position)."""
    _, state = sampled
    for b in range(B):
        for t in range(state.length[b]):
            key = SEED
            for number in (DRAW[b], SAMPLE[b], PROMPT_LEN[b] + t):
                key = jax.random.fold_in(key, number)
            weights = nucleus_by_sorting(np.exp(forced[b, t] - forced[b, t].max()), SAMPLING.top_p, SAMPLING.top_k)
            assert state.tokens[b, t] == by_hand(weights, float(jax.random.uniform(key)) + 2.0**-24)


def test_stop_tokens_end_a_response_and_belong_to_it_and_the_limit_cuts(sampled):
    _, state = sampled
    is_stop = np.isin(state.tokens, STOP)
    outcomes = set()
    for b in np.flatnonzero(PROMPT_LEN):
        first = int(np.argmax(is_stop[b])) if is_stop[b].any() else None
        assert state.length[b] == (R if first is None else first + 1)
        assert state.ended[b] == (first is not None)
        outcomes.add("cut" if first is None else "ended")
    assert outcomes == {"cut", "ended"}
    assert not state.live.any()


def test_an_empty_slot_stays_empty(sampled):
    _, state = sampled
    assert state.length[3] == 0 and not state.ended[3] and not state.tokens[3].any()


def test_a_response_without_stop_tokens_runs_to_its_limit():
    start = functools.partial(prefill, model=MODEL, sampling=SAMPLING, stop=(), max_response_len=1)
    state = jax.jit(start)(sharp_params(), np.ones((2, 1), np.int32), np.ones(2, np.int32), response_keys(SEED, np.arange(2), np.arange(2)))
    assert state.length.tolist() == [1, 1] and not state.live.any() and not state.ended.any()


def test_keys_differ_by_draw_and_sample_and_are_those_of_fold_in():
    draws, samples = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(5)))
    keys = np.asarray(jax.random.key_data(response_keys(SEED, draws, samples)))
    assert len({tuple(key) for key in keys}) == 25
    expected = jax.random.fold_in(jax.random.fold_in(SEED, draws[7]), samples[7])
    np.testing.assert_array_equal(keys[7], jax.random.key_data(expected))
