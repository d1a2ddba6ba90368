"""Attention against loops over tokens and heads in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dapo_jax.model.attention import attend, attend_cached

run = jax.jit(attend)
run_cached = jax.jit(attend_cached)

N, T, HEADS, KV_HEADS, WIDTH = 2, 9, 4, 2, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]])


def qkv(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(N, T, heads, WIDTH)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def plain(q, k, v, segment_ids):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for n, t, head in np.ndindex(q.shape[:3]):
        kv = head // (HEADS // KV_HEADS)
        seen = [s for s in range(t + 1) if segment_ids[n, s] == segment_ids[n, t]]
        weights = np.exp([q[n, t, head] @ k[n, s, kv] / np.sqrt(WIDTH) for s in seen])
        out[n, t, head] = sum(w * v[n, s, kv] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return out


def test_attend_equals_loops_over_tokens():
    q, k, v = qkv()
    np.testing.assert_allclose(run(q, k, v, SEGMENTS), plain(q, k, v, SEGMENTS), rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = qkv()
    out = np.asarray(run(100 * q, 100 * k, v, SEGMENTS))
    assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(v).max() + 1e-6


def test_bfloat16_stays_bfloat16_and_close():
    """Measured: within 0.011 of float32 of the same rounded inputs, for outputs up to 2.5: bfloat16 itself is as coarse."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
    out = run(q, k, v, SEGMENTS)
    assert out.dtype == jnp.bfloat16
    expected = plain(*(np.asarray(x, np.float32) for x in (q, k, v)), SEGMENTS)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=0.03)


def test_gradients_reach_only_what_is_seen():
    q, k, v = qkv()
    slopes = jax.jit(jax.jacrev(lambda k, v: attend(q, k, v, SEGMENTS)[0, :, 0, 0], argnums=(0, 1)))(k, v)
    for slope in slopes:  # [T, N, T, K, h]
        reached = np.abs(np.asarray(slope)[:, 0]).max(axis=(-1, -2)) > 0
        seen = (SEGMENTS[0][:, None] == SEGMENTS[0][None]) & np.tri(T, dtype=bool)
        alone = (seen.sum(axis=1) == 1)[:, None]  # a single key has weight 1 whatever it is
        np.testing.assert_array_equal(reached, seen & ~alone if slope is slopes[0] else seen)
    assert not np.asarray(slopes[0])[:, 1].any() and not np.asarray(slopes[1])[:, 1].any()  # the other row


@pytest.mark.parametrize("garbage", [0.0, 1e6])
def test_the_cached_form_is_the_last_row_of_the_whole_one(garbage):
    q, k, v = qkv()
    whole = np.asarray(run(q, k, v, np.ones((N, T), np.int32)))
    cache_k, cache_v = (np.moveaxis(x, 1, 2).copy() for x in (k, v))  # [B, K, S, h]
    for lengths in ([0, 8], [5, 3]):
        dirty_k, dirty_v, at = cache_k.copy(), cache_v.copy(), (np.arange(N), lengths)
        for n, length in enumerate(lengths):
            dirty_k[n, :, length:] = dirty_v[n, :, length:] = garbage  # what lies beyond `lengths` must not be read
        found = run_cached(q[at], k[at], v[at], dirty_k, dirty_v, np.array(lengths))
        np.testing.assert_allclose(found, whole[at], rtol=0, atol=1e-6)
