"""Causal attention over packed rows, and over a key/value cache for one new token."""

import jax
import jax.numpy as jnp

from dapo_jax.types import Array

_MASKED = -1e30  # finite, so that a row without any key gives numbers, not NaN


def attend(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Attention of every token to what precedes it in its own segment.

    o_t = Σ_s softmax_s(q_t · k_s / √h) v_s over s ≤ t with segment_ids[s] = segment_ids[t]

    Args:
      q: [N, T, H, h]. k, v: [N, T, K, h], K divides H. segment_ids: int [N, T].

    Returns:
      [N, T, H, h], in q's dtype; scores and softmax are float32.
    """
    n, t, heads, h = q.shape
    grouped = q.reshape(n, t, k.shape[2], heads // k.shape[2], h)
    scores = jnp.einsum("ntkgh,nskh->nkgts", grouped, k, preferred_element_type=jnp.float32) * h**-0.5
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & jnp.tril(jnp.ones((t, t), bool))
    probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1)
    return jnp.einsum("nkgts,nskh->ntkgh", probs.astype(v.dtype), v).reshape(n, t, heads, h)


def attend_cached(q: Array, k: Array, v: Array, cache_k: Array, cache_v: Array, lengths: Array) -> Array:
    """Attention of one new token a sequence to the cache and to itself.

    The new key and value come beside the cache, not in it: the cache of all layers is then written once a decode
    step, outside the scan over layers, and only read inside.

    Args:
      q: [B, H, h]. k, v: [B, K, h], of the new token. cache_k, cache_v: [B, K, S, h]. lengths: int [B], filled entries.

    Returns:
      [B, H, h], in q's dtype.
    """
    b, heads, h = q.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], h)
    past = jnp.einsum("bkgh,bksh->bkgs", grouped, cache_k, preferred_element_type=jnp.float32) * h**-0.5
    filled = jnp.arange(cache_k.shape[2])[None] < lengths[:, None]
    past = jnp.where(filled[:, None, None], past, _MASKED)
    self_score = jnp.einsum("bkgh,bkh->bkg", grouped, k, preferred_element_type=jnp.float32)[..., None] * h**-0.5
    probs = jax.nn.softmax(jnp.concatenate([past, self_score], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", probs[..., :-1], cache_v) + probs[..., -1:] * v[:, :, None]
    return out.reshape(b, heads, h)
