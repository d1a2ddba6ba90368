"""The jitted sampling loop: prefill prompts, then decode until every sequence has ended.

Noise is per token, fold_in(fold_in(fold_in(seed, draw), sample), position): what a response says depends on its own
draw and sample number only, never on its slot, its neighbours or the number of hosts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dapo_jax.config import ModelConfig
from dapo_jax.model.decoder import Cache, decode_step, hidden_states, logits_of
from dapo_jax.types import Array, Params

_BLOCK = 128  # vocabulary entries a block of the inverse CDF


class Sampling(NamedTuple):
    """How tokens are drawn. Hashable: static under jit."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all


class SamplerState(NamedTuple):
    """B sequences under way. All arrays have B as their leading axis, the cache as its second."""

    cache: Cache  # [L, B, K, S, h], filled up to prompt_len + length - 1: the last token is not in it yet
    keys: Array  # PRNG keys [B], one a response
    prompt_len: Array  # int32 [B]
    length: Array  # int32 [B], response tokens so far
    tokens: Array  # int32 [B, R]
    logprobs: Array  # float32 [B, R]
    ended: Array  # bool [B], drew a stop token
    live: Array  # bool [B], neither ended nor at its limit


def response_keys(seed: Array, draws: Array, samples: Array) -> Array:
    """One key a response: fold_in(fold_in(seed, draw), sample). draws, samples: int [B]."""
    return jax.vmap(lambda d, s: jax.random.fold_in(jax.random.fold_in(seed, d), s))(draws, samples)


def _nucleus(weights: Array, top_p: float, top_k: int) -> Array:
    """Zeroes all but the k heaviest entries, then all but the fewest that hold top_p of what is left. Ties stay in.

    Both cuts are thresholds. They are found by bisection on the float's bits, which orders positive floats as it
    orders integers: 31 halvings are exact, and nothing is sorted.
    """

    def threshold(enough):  # largest t such that the entries >= t are enough
        def halve(_, bounds):
            low, high = bounds
            middle = low + (high - low + 1) // 2
            ok = enough(jax.lax.bitcast_convert_type(middle, jnp.float32))
            return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

        low = jnp.zeros(weights.shape[0], jnp.int32)
        high = jax.lax.bitcast_convert_type(weights.max(axis=-1), jnp.int32)
        return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, (low, high))[0], jnp.float32)

    if top_k:
        cut = threshold(lambda t: (weights >= t[:, None]).sum(axis=-1) >= top_k)
        weights = jnp.where(weights >= cut[:, None], weights, 0.0)
    if top_p < 1:
        mass = top_p * weights.sum(axis=-1)
        cut = threshold(lambda t: jnp.where(weights >= t[:, None], weights, 0.0).sum(axis=-1) >= mass)
        weights = jnp.where(weights >= cut[:, None], weights, 0.0)
    return weights


def _first_above(weights: Array, target: Array) -> Array:
    """First index of positive weight whose running sum exceeds the target; the last such index if rounding leaves none."""
    positive = weights > 0
    hit = positive & (jnp.cumsum(weights, axis=-1) > target[:, None])
    last = jnp.where(positive, jnp.arange(weights.shape[-1])[None], 0).max(axis=-1)
    return jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), last)


def _inverse_cdf(weights: Array, uniform: Array) -> Array:
    """Index i with Σ_{j<i} w_j ≤ u Σ w < Σ_{j≤i} w_j: first among blocks of the vocabulary, then inside one.

    Never an index of weight 0, whatever the rounding (compilers contract and reorder these sums).

    weights: [B, V], not negative, not all 0. uniform: [B] in [0, 1). One uniform a row is enough for an exact draw.
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    block = _first_above(sums, target)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    return block * _BLOCK + _first_above(inside, target - before)


def sample_tokens(logits: Array, keys: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Draws one token a row, and its log-prob under softmax(logits / temperature).

    The log-prob is of the tempered distribution before top-p and top-k: the policy's, which the trainer can compute.

    Args:
      logits: float32 [B, V]. keys: PRNG keys [B], one a token.

    Returns:
      tokens int32 [B], logprobs float32 [B] (of softmax(logits) where greedy).
    """
    scaled = logits / (sampling.temperature or 1.0)
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = weights.sum(axis=-1)
    if sampling.temperature:
        # Multiples of 2^-23, moved to the middle of their interval: 0 itself would draw the first entry, however unlikely.
        uniform = jax.vmap(lambda k: jax.random.uniform(k))(keys) + 2.0**-24
        tokens = _inverse_cdf(_nucleus(weights, sampling.top_p, sampling.top_k), uniform)
    else:
        tokens = jnp.argmax(shifted, axis=-1)
    logprobs = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0] - jnp.log(total)
    return tokens.astype(jnp.int32), logprobs


def _append(state: SamplerState, logits: Array, stop: tuple[int, ...], sampling: Sampling) -> SamplerState:
    """Draws the next token of every live sequence."""
    position = state.prompt_len + state.length
    tokens, logprobs = sample_tokens(logits, jax.vmap(jax.random.fold_in)(state.keys, position), sampling)
    at = jnp.arange(state.tokens.shape[1])[None] == state.length[:, None]
    write = at & state.live[:, None]
    length = state.length + state.live
    ended = state.ended | (state.live & jnp.isin(tokens, jnp.asarray(stop, jnp.int32)))
    return state._replace(
        tokens=jnp.where(write, tokens[:, None], state.tokens),
        logprobs=jnp.where(write, logprobs[:, None], state.logprobs),
        length=length,
        ended=ended,
        live=state.live & ~ended & (length < state.tokens.shape[1]),
    )


def prefill(
    params: Params,
    prompts: Array,
    prompt_len: Array,
    keys: Array,
    *,
    model: ModelConfig,
    sampling: Sampling,
    stop: tuple[int, ...],
    max_response_len: int,
) -> SamplerState:
    """Reads prompts into a cache and draws the first response token.

    Args:
      prompts: int32 [B, P], padded on the right. prompt_len: int32 [B]; 0 marks an empty slot.
      keys: PRNG keys [B]. stop: token ids that end a response.

    Returns:
      A state whose cache holds S = P + max_response_len tokens a sequence.
    """
    size, width = prompts.shape
    hidden, (k, v) = hidden_states(params, model, prompts)
    room = ((0, 0), (0, 0), (0, 0), (0, max_response_len), (0, 0))
    cache = Cache(*(jnp.pad(jnp.swapaxes(x, 2, 3), room) for x in (k, v)))
    last = jnp.take_along_axis(hidden, jnp.maximum(prompt_len - 1, 0)[:, None, None], axis=1)[:, 0]
    state = SamplerState(
        cache=cache,
        keys=keys,
        prompt_len=prompt_len,
        length=jnp.zeros(size, jnp.int32),
        tokens=jnp.zeros((size, max_response_len), jnp.int32),
        logprobs=jnp.zeros((size, max_response_len), jnp.float32),
        ended=jnp.zeros(size, bool),
        live=prompt_len > 0,
    )
    return _append(state, logits_of(params, last), stop, sampling)


def decode(
    params: Params, state: SamplerState, *, model: ModelConfig, sampling: Sampling, stop: tuple[int, ...], max_steps: int
) -> SamplerState:
    """Up to `max_steps` decode steps; leaves as soon as no sequence is live."""

    def step(carry):
        count, state = carry
        newest = jnp.maximum(state.length - 1, 0)
        tokens = jnp.take_along_axis(state.tokens, newest[:, None], axis=1)[:, 0]
        hidden, cache = decode_step(params, model, tokens, state.prompt_len + newest, state.cache)
        return count + 1, _append(state._replace(cache=cache), logits_of(params, hidden), stop, sampling)

    def unfinished(carry):
        count, state = carry
        return (count < max_steps) & state.live.any()

    return jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state))[1]
