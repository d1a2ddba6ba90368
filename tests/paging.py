"""Caches in pages, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from dapo_jax.model.attention import Cache, PagedCache, list_pages


def pack(cache, lengths, size=4) -> PagedCache:
    """A cache [L, B, K, S, ...] as shuffled pages of `size` entries, with three that nobody has."""
    b, s = cache.k.shape[1], cache.k.shape[3]
    count = -(-s // size)
    order = np.random.default_rng(b * s).permutation(b * count + 2)[: b * count] + 1

    def paged(x):
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, count * size - s)] + [(0, 0)] * (x.ndim - 4))
        x = jnp.moveaxis(x.reshape(*x.shape[:3], count, size, *x.shape[4:]), 3, 2)
        x = x.reshape(x.shape[0], b * count, *x.shape[3:])
        return jnp.full((x.shape[0], b * count + 3, *x.shape[2:]), 7, x.dtype).at[:, order].set(x)

    table, lengths = jnp.asarray(order.reshape(b, count), jnp.int32), jnp.asarray(lengths)
    listed = list_pages(table, lengths, size)
    listed = listed._replace(needed=(listed.step <= 0).sum(dtype=jnp.int32))
    return PagedCache(jax.tree.map(paged, cache), table, lengths, listed)


def unpack(pages: Cache, table, length: int) -> Cache:
    """[L, B, K, S, ...] again."""

    def whole(x):
        x = jnp.moveaxis(x[:, table], 2, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :length]

    return jax.tree.map(whole, pages)
