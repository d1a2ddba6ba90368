"""Causal attention over packed rows, and over a key/value cache for one new token.

`attend_rows` picks the form by the platform of the mesh, not of the host: programs are also
compiled for chips that are not there.

    TPU     splash attention (Pallas): rows padded to whole blocks, gradients by kernels, nothing [T, T] in memory
    GPU     cuDNN, where it takes the inputs; it sees segments only as a mask [N, 1, T, T], so longer rows take the last form
    else    XLA: `attend`, on longer rows a chunk of queries at a time
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, Int8, Num

from dapo_jax.model.logprobs import ROW_AXES

_MASKED = -1e30  # finite, so that a row without any key gives numbers, not NaN
_LANES = 128  # splash blocks are multiples of this
_CAUSAL_PARTS = 4  # pieces of a row's queries in XLA's form
_LONG = 4096  # rows beyond this are not given to forms that hold something [T, T]


class Window(NamedTuple):
    """Sliding-window attention of a layer, if it is such a layer: known only while the program
    runs, which scans over layers.
    """

    size: int  # tokens that are seen: a token itself and those just before it
    on: Bool[Any, ""]  # whether this layer has it

    def shows(self, distance: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether a token is seen from so far behind it."""
        return (distance < self.size) | ~self.on


def attend(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K h"],
    segment_ids: Int[Array, "N T"],
    window: Window | None = None,
) -> Float[Array, "N T H h"]:
    """Attention of every token to what precedes it in its own segment.

    o_t = Σ_s softmax_s(q_t · k_s / √h) v_s over s ≤ t with segment_ids[s] = segment_ids[t]

    Args: q: [N, T, H, h]. k, v: [N, T, K, h], K divides H. segment_ids: int [N, T]. window: only s
      > t - size then; None is all.

    Returns:
      [N, T, H, h], in q's dtype; scores and softmax are float32.
    """
    n, t, heads, h = q.shape
    groups, per_group = k.shape[2], heads // k.shape[2]
    # Heads first, so that each product is a plain batch of matrices; a quarter of the queries at a
    # time, which see only the keys up to their last: on a CPU 2.6 times as fast, forward and
    # backward, as one [T, T] product with the heads inside (T 512).
    grouped = (q * h**-0.5).reshape(n, t, groups, per_group, h).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
    size = max(_LANES, -(-t // _CAUSAL_PARTS))
    parts = []
    for start in range(0, t, size):
        end = min(t, start + size)
        queries = grouped[:, :, :, start:end].reshape(n, groups, -1, h)
        scores = jnp.matmul(queries, keys[..., :end], preferred_element_type=jnp.float32)
        visible = segment_ids[:, start:end, None] == segment_ids[:, None, :end]
        distance = jnp.arange(start, end)[None, :, None] - jnp.arange(end)[None, None]
        visible &= distance >= 0
        if window:
            visible &= window.shows(distance)
        scores = jnp.where(
            visible[:, None, None], scores.reshape(n, groups, per_group, -1, end), _MASKED
        )
        probs = jax.nn.softmax(scores, axis=-1).reshape(n, groups, -1, end)
        parts.append(
            jnp.matmul(probs.astype(v.dtype), values[:, :, :end]).reshape(
                n, groups, per_group, -1, h
            )
        )
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(n, t, heads, h)


def attend_chunked(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K h"],
    segment_ids: Int[Array, "N T"],
    window: Window | None = None,
    *,
    chunk: int,
) -> Float[Array, "N T H h"]:
    """`attend`, `chunk` queries at a time: memory [chunk, T] instead of [T, T], also in the
    backward pass, which recomputes.
    """
    n, t, heads, h = q.shape
    places = jnp.arange(t + -t % chunk).reshape(-1, chunk)
    grouped = jnp.pad(q, ((0, 0), (0, -t % chunk), (0, 0), (0, 0))).reshape(
        n, -1, chunk, k.shape[2], heads // k.shape[2], h
    )
    segments = jnp.pad(segment_ids, ((0, 0), (0, -t % chunk))).reshape(n, -1, chunk)

    @jax.checkpoint
    def part(inputs):
        q, segments, places = inputs
        scores = jnp.einsum("ntkgh,nskh->nkgts", q, k, preferred_element_type=jnp.float32) * h**-0.5
        visible = segments[:, :, None] == segment_ids[:, None, :]
        distance = places[None, :, None] - jnp.arange(t)[None, None]
        visible &= distance >= 0
        if window:
            visible &= window.shows(distance)
        probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, _MASKED), axis=-1)
        return jnp.einsum("nkgts,nskh->ntkgh", probs.astype(v.dtype), v)

    parts = jax.lax.map(part, (jnp.moveaxis(grouped, 1, 0), jnp.moveaxis(segments, 1, 0), places))
    return jnp.moveaxis(parts, 0, 1).reshape(n, -1, heads, h)[:, :t]


def attend_splash(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K h"],
    segment_ids: Int[Array, "N T"],
    window: Window | None = None,
    *,
    block: int,
    interpret: bool = False,
) -> Float[Array, "N T H h"]:
    """`attend` as a TPU kernel, forward and backward.

    Blocks are of `block` positions, less where the row has less, rounded up to a multiple of 128.
    The row is padded to whole blocks; padding comes last, where no other position sees it.
    interpret: run the kernel on any platform, for tests. A kernel skips the blocks that its mask
    hides, so there is one for layers with a window and one for the others.
    """
    t, heads, h = q.shape[1:]
    size = _LANES * math.ceil(min(block, t) / _LANES)
    length = size * math.ceil(t / size)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, length - t), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q * h**-0.5, k, v)
    )
    segments = jnp.pad(segment_ids, ((0, 0), (0, length - t)))

    def kernel(mask):
        made = splash.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(*(size,) * 8),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(lambda q, k, v, s: made(q, k, v, splash.SegmentIds(s, s)))

    whole = kernel(splash_attention_mask.CausalMask((length, length)))
    if window is None:
        out = whole(q, k, v, segments)
    else:
        near = kernel(
            splash_attention_mask.LocalMask((length, length), (window.size - 1, 0), offset=0)
        )
        out = jax.lax.cond(window.on, near, whole, q, k, v, segments)
    return out.swapaxes(1, 2)[:, :t].astype(q.dtype)


def attend_masked(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K h"],
    segment_ids: Int[Array, "N T"],
    window: Window | None = None,
    *,
    implementation: str,
) -> Float[Array, "N T H h"]:
    """`attend` by `jax.nn.dot_product_attention`, "cudnn" or "xla". cuDNN takes bfloat16, heads of
    up to 128 in eights, rows in twos.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if window:
        places = jnp.arange(q.shape[1])
        same &= window.shows(places[:, None] - places[None])[None, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, implementation=implementation
    )  # type: ignore[call-overload]


def attend_rows(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K h"],
    segment_ids: Int[Array, "N T"],
    window: Window | None = None,
    *,
    mesh: Mesh | None,
    block: int,
) -> Float[Array, "N T H h"]:
    """`attend` in the form that suits the mesh's platform.

    Rows are sharded over ("data", "fsdp"), heads over "tensor".

    Args as `attend`; mesh: None for a program of no mesh, in XLA's form. block: positions of a
    splash block or a chunk of queries.
    """
    platform, t, h = mesh.devices.flat[0].platform if mesh else "cpu", q.shape[1], q.shape[3]
    if mesh and platform == "tpu":
        kernel = functools.partial(attend_splash, block=block)
        if window is None:
            return _over_mesh(kernel, mesh, q, k, v, segment_ids)

        def windowed(
            q, k, v, segment_ids, on
        ):  # a kernel over a mesh takes what it is given, and closes over nothing
            return kernel(q, k, v, segment_ids, window._replace(on=on))

        return _over_mesh(windowed, mesh, q, k, v, segment_ids, on=window.on)
    if (
        platform == "gpu"
        and t <= _LONG
        and t % 2 == 0
        and q.dtype == jnp.bfloat16
        and h <= 128
        and h % 8 == 0
    ):
        return attend_masked(q, k, v, segment_ids, window, implementation="cudnn")
    return (
        attend(q, k, v, segment_ids, window)
        if t <= _LONG
        else attend_chunked(q, k, v, segment_ids, window, chunk=block)
    )


def _over_mesh(
    function, mesh: Mesh, q: Array, k: Array, v: Array, segment_ids: Array, **scalars: Array
) -> Array:
    """A kernel, which the compiler cannot split by itself, over each device's own rows and heads.

    Where "tensor" does not divide the query heads, every device computes all of them. Where it
    divides these but not the kv heads, kv heads are repeated until it does.
    """
    parts = mesh.shape["tensor"]
    heads = "tensor" if q.shape[2] % parts == 0 else None
    if heads and k.shape[2] % parts:
        k, v = (jnp.repeat(x, math.lcm(k.shape[2], parts) // k.shape[2], axis=2) for x in (k, v))
    rows = PartitionSpec(ROW_AXES, None, heads)
    inputs = (rows, rows, rows, PartitionSpec(ROW_AXES), PartitionSpec())

    def local(q, k, v, segment_ids, scalars):
        return function(q, k, v, segment_ids, **scalars)

    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=rows, check_vma=False)(
        q, k, v, segment_ids, scalars
    )


def quantize(x: Float[Array, "*rest h"]) -> tuple[Int8[Array, "*rest h"], Float32[Array, "*rest"]]:
    """x [..., h] as int8 and a float32 scale [...], max|x| / 127: x ≈ int8 · scale, off by at most
    half a scale.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis=-1) / 127, 1e-30)
    return jnp.round(wide / scale[..., None]).astype(jnp.int8), scale


def attend_cached(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K h"],
    cache_k: Num[Array, "B K S h"],
    cache_v: Num[Array, "B K S h"],
    lengths: Int[Array, " B"],
    scale_k: Float32[Array, "B K S"] | None = None,
    scale_v: Float32[Array, "B K S"] | None = None,
    window: Window | None = None,
) -> Float[Array, "B H h"]:
    """Attention of one new token a sequence to the cache and to itself.

    The new key and value come beside the cache, not in it: the cache of all layers is then written
    once a decode step, outside the scan over layers, and only read inside.

    Args: q: [B, H, h]. k, v: [B, K, h], of the new token. cache_k, cache_v: [B, K, S, h]. lengths:
      int [B], filled entries. scale_k, scale_v: float32 [B, K, S], of an int8 cache (`quantize`).
      They stand outside the products with it. window: None where everything is seen.

    Returns:
      [B, H, h], in q's dtype.
    """
    b, heads, h = q.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], h)
    past = (
        jnp.einsum(
            "bkgh,bksh->bkgs", grouped, cache_k.astype(q.dtype), preferred_element_type=jnp.float32
        )
        * h**-0.5
    )
    past = past if scale_k is None else past * scale_k[:, :, None]
    filled = jnp.arange(cache_k.shape[2])[None] < lengths[:, None]
    if window:
        filled &= window.shows(lengths[:, None] - jnp.arange(cache_k.shape[2])[None])
    past = jnp.where(filled[:, None, None], past, _MASKED)
    self_score = (
        jnp.einsum("bkgh,bkh->bkg", grouped, k, preferred_element_type=jnp.float32)[..., None]
        * h**-0.5
    )
    probs = jax.nn.softmax(jnp.concatenate([past, self_score], axis=-1), axis=-1)
    mixed = probs[..., :-1] if scale_v is None else probs[..., :-1] * scale_v[:, :, None]
    out = (
        jnp.einsum("bkgs,bksh->bkgh", mixed.astype(v.dtype), cache_v.astype(v.dtype))
        + probs[..., -1:].astype(v.dtype) * v[:, :, None]
    )
    return out.reshape(b, heads, h)
