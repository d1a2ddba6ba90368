"""Sampling of tokens: exact top-k and top-p, without a sort of the vocabulary.

All functions use sums over blocks of the vocabulary, which may be split over a mesh axis (`axis`):
devices exchange block sums and one block per row, never logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float32, Int32, Key

from dapo_jax.model.logprobs import exp, log

_BLOCK = 128  # vocabulary entries
# Rounds of rejection for top-p. n rejections need n uniforms whose product is at least max(top_p,
# 1 / V): as likely as a Poisson variable of mean ln min(1 / top_p, V) is to reach n, below 1e-24
# for n = 64 and V = 2^18.
_ROUNDS = 64


class Sampling(NamedTuple):
    """How tokens are sampled. Hashable: static under jit."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is all


def _total(x: Array, axis: str | None) -> Array:
    return x if axis is None else jax.lax.psum(x, axis)


def _as_blocks(x: Array, padding: float = 0.0) -> Array:
    """[B, V] as [B, V / 128, 128].

    On a TPU in the layout that sums over blocks and selecting a block both read: without it XLA
    copies the whole array for each, with six times the HBM traffic.
    """
    sizes = (0, 0), (0, -x.shape[1] % _BLOCK)
    blocks = jnp.pad(x, sizes, constant_values=padding).reshape(len(x), -1, _BLOCK)

    def by_block(x: Array) -> Array:
        return with_layout_constraint(x, Layout((1, 0, 2)))

    return jax.lax.platform_dependent(blocks, tpu=by_block, default=lambda x: x)


def _block_sums(blocks: Array, floor: Array, axis: str | None) -> Array:
    """Sum of the weights above `floor` [B] in each block of the whole vocabulary, [B, blocks]."""
    sums = jnp.where(blocks <= floor[:, None, None], 0.0, blocks).sum(axis=-1)
    return sums if axis is None else jax.lax.all_gather(sums, axis, axis=1, tiled=True)


def _first_above(weights: Array, target: Array) -> Array:
    """First index of positive weight whose running sum exceeds the target, else the last one."""
    positive = weights > 0
    hit = positive & (jnp.cumsum(weights, axis=-1) > target[:, None])
    last = jnp.where(positive, jnp.arange(weights.shape[-1])[None], 0).max(axis=-1)
    return jnp.where(hit.any(axis=-1), jnp.argmax(hit, axis=-1), last)


def _inverse_cdf(
    blocks: Array, floor: Array, sums: Array, uniform: Array, axis: str | None
) -> tuple[Array, Array, Array]:
    """Index i with Σ_{j<i} w_j ≤ u Σ w < Σ_{j≤i} w_j over weights above `floor` [B].

    Rounding never selects a weight at or below `floor`. blocks: [B, n, 128], not negative.
    sums: their `_block_sums`. uniform: [B] in [0, 1).

    Returns: block, place in it and weight there, [B] each.
    """
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[:, -1]
    block = _first_above(sums, target)
    previous = jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0]
    before = jnp.where(block > 0, previous, 0.0)
    count = blocks.shape[1]
    own = block if axis is None else block - count * jax.lax.axis_index(axis)
    inside = jnp.take_along_axis(blocks, jnp.clip(own, 0, count - 1)[:, None, None], axis=1)[:, 0]
    inside = _total(jnp.where(((own >= 0) & (own < count))[:, None], inside, 0.0), axis)
    inside = jnp.where(inside > floor[:, None], inside, 0.0)
    place = _first_above(inside, target - before)
    return block, place, jnp.take_along_axis(inside, place[:, None], axis=1)[:, 0]


def _top_k_floor(blocks: Array, k: int, axis: str | None) -> Array:
    """A number [B] that the k largest weights exceed, ties with the k-th too, and no others.

    Only the k blocks with the largest maxima matter. Bisection on the bits of positive floats,
    which order like integers, until k weights are above.
    """
    _, best = jax.lax.top_k(blocks.max(axis=-1), min(k, blocks.shape[1]))
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=1)

    def above(bits: Array) -> Array:
        floor = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return _total((candidates > floor[:, None, None]).sum(axis=(1, 2)), axis)

    def unfinished(carry):
        low, high, count = carry
        return ((low < high) & (count != k)).any()

    def halve(carry):
        low, high, count = carry
        middle = low + (high - low + 1) // 2
        found = above(middle)
        enough = found >= k
        low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)
        return low, high, jnp.where(enough, found, count)

    low = jnp.zeros(blocks.shape[0], jnp.int32)
    high = jnp.full_like(low, jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32))
    bits = jax.lax.while_loop(unfinished, halve, (low, high, above(low)))[0]
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _uniform(keys: Array) -> Array:
    # Multiples of 2^-23, moved to the middle of their interval: 0 itself would draw the first
    # entry, however unlikely.
    return jax.vmap(lambda k: jax.random.uniform(k))(keys) + 2.0**-24


def _draw(
    blocks: Array, sums: Array, keys: Array, sampling: Sampling, axis: str | None
) -> tuple[Array, Array, Array]:
    """Block, place and weight of one draw per row from weights [B, n, 128] whose largest is 1.

    Top-p (the fewest entries that hold top_p of the mass; ties stay in) is by rejection: a draw is
    in the nucleus if the heavier entries hold less than top_p. Otherwise no entry as light is in
    it, and the next draw is from the heavier entries, so the accepted draw has the distribution of
    the nucleus. The mass outside it about halves per round; the draw of round _ROUNDS is accepted.
    """
    floor = jnp.zeros(blocks.shape[0])
    if sampling.top_k:
        floor = _top_k_floor(blocks, sampling.top_k, axis)
        sums = _block_sums(blocks, floor, axis)
    drawn = _inverse_cdf(blocks, floor, sums, _uniform(keys), axis)
    if sampling.top_p == 1:
        return drawn
    mass = sampling.top_p * sums.sum(axis=-1)

    def rejected(drawn, sums):
        return sums.sum(axis=-1) >= mass

    def redraw(carry):
        round_, drawn, sums, open_ = carry
        floor = drawn[2]
        uniform = _uniform(jax.vmap(jax.random.fold_in, (0, None))(keys, round_))
        new = _inverse_cdf(blocks, floor, sums, uniform, axis)
        drawn = tuple(jnp.where(open_, a, b) for a, b in zip(new, drawn, strict=True))
        sums = _block_sums(blocks, drawn[2], axis)
        return round_ + 1, drawn, sums, open_ & rejected(drawn, sums)

    sums = _block_sums(blocks, drawn[2], axis)
    first = (1, drawn, sums, rejected(drawn, sums))
    return jax.lax.while_loop(lambda c: (c[0] < _ROUNDS) & c[3].any(), redraw, first)[1]


def sample_tokens(
    logits: Float32[Array, "B V"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    axis: str | None = None,
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """Samples one token per row, and its log-prob under softmax(logits / temperature).

    The log-prob is of the distribution before top-p and top-k, which the trainer can compute (of
    softmax(logits) where greedy). It is NaN, and the token arbitrary, exactly where a row of
    logits / temperature defines no distribution: it has NaN or +inf, or only -inf.

    logits: under `jax.shard_map` with `axis`, this device's part of V.
    """
    temperature, vocab = sampling.temperature or 1.0, logits.shape[1]
    highest = (logits / temperature).max(axis=-1)
    top = highest if axis is None else jax.lax.pmax(highest, axis)
    blocks = exp(_as_blocks(logits, -jnp.inf) / temperature - top[:, None, None])
    sums = _block_sums(blocks, jnp.zeros(blocks.shape[0]), axis)
    log_total = log(sums.sum(axis=-1))
    if not sampling.temperature:
        tokens = jnp.argmax(logits, axis=-1)
        if axis is not None:
            tokens = tokens + vocab * jax.lax.axis_index(axis)
            tokens = jnp.where(highest == top, tokens, jnp.iinfo(jnp.int32).max)
            tokens = jax.lax.pmin(tokens, axis)
        return tokens.astype(jnp.int32), jnp.minimum(-log_total, 0.0)
    block, place, weight = _draw(blocks, sums, keys, sampling, axis)
    tokens = block // blocks.shape[1] * vocab + block % blocks.shape[1] * _BLOCK + place
    return tokens.astype(jnp.int32), jnp.minimum(log(weight) - log_total, 0.0)
