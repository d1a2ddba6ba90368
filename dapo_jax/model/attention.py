"""Causal attention over packed rows, and of one new token to a key/value cache.

`attend_rows` chooses the implementation by the platform of the mesh, not of the host: programs are
also compiled for chips that are not attached.

    TPU   splash attention (Pallas): rows padded to whole blocks, no [T, T] array in memory
    GPU   cuDNN where it takes the inputs; its mask is [N, 1, T, T], so long rows use XLA
    else  XLA: `attend`, on long rows `attend_chunked`

A new token attends to a cache by `attend_pages`, on a TPU by `ragged_attention`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Num

from dapo_jax.model.logprobs import ROW_AXES, ROW_SPEC, VOCAB_AXIS, per_device, split_axis

Queries = Float[Array, "N T H h"]
Keys = Float[Array, "N T K h"]  # or values; K divides H
Segments = Int[Array, "N T"]

SAVED = "matmul"  # name of what `remat: dots` keeps for the backward pass
MASKED = -1e30  # finite, so that a row without any key gives numbers, not NaN
_LANES = 128  # splash blocks are multiples of this
_CAUSAL_PARTS = 4  # parts of a row's queries in `attend`
_LONG = 4096  # longer rows use no implementation that holds a [T, T] array


class Window(NamedTuple):
    """Sliding-window attention of a layer; the scan over layers carries whether it is on."""

    size: int  # visible tokens: the token itself and those just before it
    on: Bool[Any, ""]

    def shows(self, distance: Int[Array, "*S"]) -> Bool[Array, "*S"]:
        """Whether a token at this distance back is visible."""
        return (distance < self.size) | ~self.on


class Cache(NamedTuple):
    """Keys and values of all layers in C pages of p entries, [L, C, K, p, h].

    In compute dtype, or int8 with float32 scales (`quantize`): about half the bytes of bfloat16.
    """

    k: Num[Any, "*L C K p h"]
    v: Num[Any, "*L C K p h"]
    scale_k: Float32[Any, "*L C K p"] | None = None
    scale_v: Float32[Any, "*L C K p"] | None = None


class PageList(NamedTuple):
    """The pages of all sequences, by the decode step from which on they are read."""

    page: Int32[Any, " W"]
    owner: Int32[Any, " W"]  # its sequence
    begin: Int32[Any, " W"]  # its first entry's place in the sequence
    step: Int32[Any, " W"]
    index: Int32[Any, "B T"]  # of each page of the table in this list
    needed: Int32[Any, ""]  # pages at the front of the list that are read


class PagedCache(NamedTuple):
    """The cache of B sequences, whose entries are in pages."""

    pages: Cache  # of all layers: a slice per layer would be a copy
    table: Int32[Any, "B T"]  # each sequence's pages in order; 0, which none has, after the last
    lengths: Int32[Any, " B"]  # filled entries of each
    listed: PageList | None = None  # not for the TPU kernel
    layer: Int32[Any, ""] | int = 0


def attend(
    q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: Window | None = None
) -> Queries:
    """Attention of every token to itself and the earlier tokens of its segment.

    o_t = Σ_s softmax_s(q_t · k_s / √h) v_s over s ≤ t with segment_ids[s] = segment_ids[t], and
    s > t - size with a window. Scores and softmax are float32.
    """
    n, t, heads, h = q.shape
    groups, per_group = k.shape[2], heads // k.shape[2]
    # With the heads first, each product is a batched matmul. A quarter of the queries at a time
    # needs only the keys up to its last one. On a CPU (T 512, forward and backward) this is 2.6x as
    # fast as one [T, T] product with the heads inside.
    grouped = (q * h**-0.5).reshape(n, t, groups, per_group, h).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    size = max(_LANES, -(-t // _CAUSAL_PARTS))
    parts = []
    for start in range(0, t, size):
        end = min(t, start + size)
        queries = grouped[:, :, :, start:end].reshape(n, groups, -1, h)
        scores = jnp.matmul(queries, keys[..., :end], preferred_element_type=jnp.float32)
        scores = scores.reshape(n, groups, per_group, -1, end)
        visible = segment_ids[:, start:end, None] == segment_ids[:, None, :end]
        visible &= _visible(jnp.arange(start, end), end, window)
        scores = jnp.where(visible[:, None, None], scores, MASKED)
        probs = jax.nn.softmax(scores, axis=-1).reshape(n, groups, -1, end)
        part = jnp.matmul(probs.astype(v.dtype), values[:, :, :end])
        parts.append(part.reshape(n, groups, per_group, -1, h))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(n, t, heads, h)


def _visible(places: Array, end: int, window: Window | None) -> Array:
    """Which of the keys 0..end - 1 queries at `places` [t] may see, bool [1, t, end]."""
    distance = places[None, :, None] - jnp.arange(end)[None, None]
    return distance >= 0 if window is None else (distance >= 0) & window.shows(distance)


def attend_chunked(
    q: Queries, k: Keys, v: Keys, segment_ids: Segments, window: Window | None = None, *, chunk: int
) -> Queries:
    """`attend`, `chunk` queries at a time: [chunk, T] in memory; the backward pass recomputes."""
    n, t, heads, h = q.shape
    padding = (0, 0), (0, -t % chunk)
    grouped = jnp.pad(q, (*padding, (0, 0), (0, 0)))
    grouped = grouped.reshape(n, -1, chunk, k.shape[2], heads // k.shape[2], h)
    segments = jnp.pad(segment_ids, padding).reshape(n, -1, chunk)
    places = jnp.arange(t + -t % chunk).reshape(-1, chunk)

    @jax.checkpoint
    def part(inputs):
        q, segments, places = inputs
        scores = jnp.einsum("ntkgh,nskh->nkgts", q, k, preferred_element_type=jnp.float32) * h**-0.5
        visible = segments[:, :, None] == segment_ids[:, None, :]
        visible &= _visible(places, t, window)
        probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
        return jnp.einsum("nkgts,nskh->ntkgh", probs.astype(v.dtype), v)

    parts = jax.lax.map(part, (jnp.moveaxis(grouped, 1, 0), jnp.moveaxis(segments, 1, 0), places))
    return jnp.moveaxis(parts, 0, 1).reshape(n, -1, heads, h)[:, :t]


def within_segments(kernel: Any, segments: Int[Array, "blocks size"]) -> Any:
    """A splash kernel that skips blocks whose queries and keys have no segment in common."""
    ids = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)  # padding comes last
    first, last = ids.min(1), ids.max(1)
    meet = (first[:, None] <= last[None]) & (first[None] <= last[:, None])

    def skip(info: Any, *, axis: int) -> Any:  # axis: of the blocks that lie in their own order
        other = jnp.asarray(info.data_next, jnp.int32)
        own = jax.lax.broadcasted_iota(jnp.int32, other.shape, axis)
        runs = meet[own, other].astype(info.block_mask.dtype)
        return info._replace(block_mask=info.block_mask * runs)

    forward, dq, dkv = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    infos = skip(forward, axis=1), skip(dq, axis=1), skip(dkv, axis=2)
    return type(kernel)(*infos, **kernel.kwargs)


def attend_splash(
    q: Queries,
    k: Keys,
    v: Keys,
    segment_ids: Segments,
    window: Window | None = None,
    *,
    block: int,
    interpret: bool = False,
) -> Queries:
    """`attend` as a TPU kernel, forward and backward.

    Blocks are of at most `block` positions, rounded up to a multiple of 128; padding comes last,
    where no other position sees it. A kernel skips blocks that its mask hides or that are of other
    segments; layers with a window have a kernel of their own. interpret: run anywhere, for tests.
    """
    t, heads, h = q.shape[1:]
    size = _LANES * math.ceil(min(block, t) / _LANES)
    length = size * math.ceil(t / size)
    padding = (0, 0), (0, length - t)
    inputs = [jnp.pad(x, (*padding, (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * h**-0.5, k, v)]
    segments = jnp.pad(segment_ids, padding)
    blocks = splash.BlockSizes(*(size,) * 8)

    def kernel(mask):
        masks = splash_attention_mask.MultiHeadMask([mask] * heads)
        options: dict[str, Any] = {"head_shards": 1, "q_seq_shards": 1, "interpret": interpret}
        options["residual_checkpoint_name"] = SAVED  # the output and its log-sums
        made = splash.make_splash_mha(masks, block_sizes=blocks, **options)

        def attend(q, k, v, s):
            own = within_segments(made, s.reshape(-1, size))
            return own(q, k, v, splash.SegmentIds(s, s))

        return jax.vmap(attend)

    shape = (length, length)
    whole = kernel(splash_attention_mask.CausalMask(shape))
    if window is None:
        out = whole(*inputs, segments)
    else:
        near = kernel(splash_attention_mask.LocalMask(shape, (window.size - 1, 0), offset=0))
        out = jax.lax.cond(window.on, near, whole, *inputs, segments)
    return out.swapaxes(1, 2)[:, :t].astype(q.dtype)


def attend_masked(
    q: Queries,
    k: Keys,
    v: Keys,
    segment_ids: Segments,
    window: Window | None = None,
    *,
    implementation: str,
) -> Queries:
    """`attend` by `jax.nn.dot_product_attention`, "cudnn" or "xla"."""
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if window:
        places = jnp.arange(q.shape[1])
        mask &= window.shows(places[:, None] - places[None])[None, None]
    options: dict[str, Any] = {"is_causal": True, "implementation": implementation}
    return jax.nn.dot_product_attention(q, k, v, mask=mask, **options)


def attend_rows(
    q: Queries,
    k: Keys,
    v: Keys,
    segment_ids: Segments,
    window: Window | None = None,
    *,
    mesh: Mesh | None,
    block: int,
) -> Queries:
    """`attend`, implemented for the mesh's platform; without a mesh by XLA.

    Rows are sharded over ("data", "fsdp"), heads over "tensor". block: positions of a splash block
    or of a chunk of queries.
    """
    platform, t, h = mesh.devices.flat[0].platform if mesh else "cpu", q.shape[1], q.shape[3]
    if mesh and platform == "tpu":
        kernel = functools.partial(attend_splash, block=block)
        if window is None:
            return _over_mesh(kernel, mesh, q, k, v, segment_ids)

        def windowed(q, k, v, segment_ids, on):  # under shard_map, which takes no closed-over array
            return kernel(q, k, v, segment_ids, window._replace(on=on))

        return _over_mesh(windowed, mesh, q, k, v, segment_ids, on=window.on)
    if t > _LONG:
        return attend_chunked(q, k, v, segment_ids, window, chunk=block)
    # cuDNN takes bfloat16, head sizes up to 128 in multiples of 8, and even row lengths
    if platform == "gpu" and q.dtype == jnp.bfloat16 and t % 2 == 0 and h <= 128 and h % 8 == 0:
        return attend_masked(q, k, v, segment_ids, window, implementation="cudnn")
    return attend(q, k, v, segment_ids, window)


def _over_mesh(
    function, mesh: Mesh, q: Array, k: Array, v: Array, segment_ids: Array, **scalars: Array
) -> Array:
    """A kernel, which XLA cannot partition, on each device's own rows and heads.

    Where "tensor" does not divide the query heads, every device computes all of them. Where it
    divides these but not the kv heads, kv heads are repeated until it does.
    """
    parts = mesh.shape["tensor"]
    heads = split_axis(mesh, VOCAB_AXIS, q.shape[2])
    if heads and k.shape[2] % parts:
        k, v = (jnp.repeat(x, math.lcm(k.shape[2], parts) // k.shape[2], axis=2) for x in (k, v))
    rows = PartitionSpec(ROW_AXES, None, heads)
    inputs = (rows, rows, rows, ROW_SPEC, PartitionSpec())

    def local(q, k, v, segment_ids, scalars):
        return function(q, k, v, segment_ids, **scalars)

    return per_device(local, mesh, inputs, rows)(q, k, v, segment_ids, scalars)


def list_pages(table: Int32[Array, "B T"], lengths: Int32[Array, " B"], size: int) -> PageList:
    """The list for decode steps that begin with these lengths. size: entries of a page."""
    begin = size * jnp.arange(table.shape[1], dtype=jnp.int32)
    step = jnp.maximum(begin[None] + 1 - lengths[:, None], 0)
    step = jnp.where(table > 0, step, jnp.iinfo(jnp.int32).max).ravel()
    order = jnp.argsort(step).astype(jnp.int32)
    index = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    owner, at = jnp.divmod(order, table.shape[1])
    page, none = table.ravel()[order], jnp.zeros((), jnp.int32)
    return PageList(page, owner, begin[at], step[order], index.reshape(table.shape), none)


def page_counts(slots: int, most: int) -> list[int]:
    """How many pages of the list `attend_pages` may read, where a sequence has at most `most`."""
    steps = {n << i for n in (1, 3) for i in range(most.bit_length())}
    return [slots * n for n in sorted({n for n in steps if n < most} | {most})]


def attend_pages(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K h"],
    seen: PagedCache,
    window: Window | None = None,
) -> Float[Array, "B H h"]:
    """Attention of one new token per sequence to its pages of one layer, and to itself.

    o = (Σ_s exp(a_s - m) v_s + exp(a - m) v) / (Σ_s exp(a_s - m) + exp(a - m)), with the scores a_s
    of the cached entries, a = q · k / √h of the new one, and m the largest. The new key and value
    are not in the cache yet: it is written once per decode step, outside the scan over layers.

    All pages that are read are one batch, whose size is the next of a few.
    """
    assert seen.listed is not None
    sizes = page_counts(*seen.table.shape)
    branches = [functools.partial(_attend_listed, size) for size in sizes]
    index = jnp.searchsorted(jnp.asarray(sizes), seen.listed.needed)
    return jax.lax.switch(index, branches, q, k, v, seen, window)


def _attend_listed(
    size: int, q: Array, k: Array, v: Array, seen: PagedCache, window: Window | None
) -> Array:
    """`attend_pages` to the first `size` pages of the list."""
    listed = seen.listed
    assert listed is not None
    page, owner, begin = listed.page[:size], listed.owner[:size], listed.begin[:size]
    old_k, old_v, *scales = (x[seen.layer, page] for x in seen.pages if x is not None)
    (b, heads, h), wide = q.shape, jnp.float32
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], h)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    # Keys first; the barrier keeps it so. With queries first XLA takes twice as long on a CPU.
    scores = product("wkph,wkgh->wkpg", old_k.astype(q.dtype), grouped[owner])
    scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3) * h**-0.5
    if scales:  # outside the product, which reads int8
        scores = scores * scales[0][:, :, None]
    place = begin[:, None] + jnp.arange(old_k.shape[2])[None]
    visible = place < seen.lengths[owner][:, None]
    if window:
        visible &= window.shows(seen.lengths[owner][:, None] - place)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    most = scores.max(axis=-1)  # of a page
    weights = jnp.exp(scores - most[..., None])
    total = weights.sum(axis=-1)
    if scales:
        weights = weights * scales[1][:, :, None]
    mixed = product("wkgp,wkph->wkgh", weights.astype(v.dtype), old_v.astype(v.dtype))

    # The pages of each sequence, with its own entry: gathered, because sums by a scatter have no
    # fixed order on a GPU.
    own = product("bkgh,bkh->bkg", grouped, k) * h**-0.5
    at, here = jnp.minimum(listed.index, size - 1), (listed.index < size)[..., None, None]
    most = jnp.where(here, most[at], MASKED)  # [B, T, K, G]
    highest = jnp.maximum(most.max(axis=1), own)
    share, alone = jnp.exp(most - highest[:, None]), jnp.exp(own - highest)
    total = (share * jnp.where(here, total[at], 0)).sum(axis=1) + alone
    mixed = jnp.where(here[..., None], mixed[at], 0)  # another sequence's may be NaN
    out = product("btkg,btkgh->bkgh", share, mixed)
    out = (out + alone[..., None] * v[:, :, None]) / total[..., None]
    return out.reshape(b, heads, h).astype(q.dtype)
