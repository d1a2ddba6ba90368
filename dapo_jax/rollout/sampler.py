"""Jitted parts of sampling: prefill prompts, insert them into decode slots, decode until enough
slots are free.

Slots are [N, b]: b on each of the mesh's N row shards. Sequences move only between slots of one
shard, and the first w slots of all shards can be decoded alone. A table [N, b, T] has the pages of
each slot in its shard's cache, in order; page 0 takes what is written for no sequence. Noise is per
token, fold_in(fold_in(fold_in(seed, draw), sample), position): a response depends on its draw and
sample number only, never on its slot, its pages, its neighbours or the number of devices.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, UInt8

from dapo_jax.config import ModelConfig
from dapo_jax.model.attention import PagedCache, list_pages
from dapo_jax.model.decoder import (
    Cache,
    decode_step,
    hidden_states,
    logits_of,
    make_cache,
    write_cache,
)
from dapo_jax.model.experts import Routing
from dapo_jax.model.logprobs import ROW_AXES, ROW_SPEC, VOCAB_AXIS, per_device, split_axis
from dapo_jax.model.ragged_attention import is_ragged
from dapo_jax.rollout.token_sampling import Sampling, sample_tokens
from dapo_jax.types import Params

_COPIES = 64  # pages that a GPU copies at a time


class Slots(NamedTuple):
    """Sequences being decoded."""

    keys: Key[Any, "N b"]  # one per response
    token: Int32[Any, "N b"]  # the newest token, not in the cache yet
    position: Int32[Any, "N b"]  # its position: tokens in the cache
    limit: Int32[Any, "N b"]  # response tokens at most
    length: Int32[Any, "N b"]  # response tokens so far
    tokens: Int32[Any, "N b R"]  # the response
    logprobs: Float32[Any, "N b R"]
    ended: Bool[Any, "N b"]  # sampled a stop token
    live: Bool[Any, "N b"]  # neither ended nor at its limit, and no logits were non-finite
    experts: UInt8[Any, "N b R c"] | None = None  # `Response.experts`, where recorded


class SamplerState(NamedTuple):
    cache: Cache  # [N, L, C, K, p, h]
    slots: Slots


class Arrivals(NamedTuple):
    """Sequences to insert into slots."""

    slot: Int32[Any, "N m"]  # on its shard; the value b drops the entry
    token: Int32[Any, "N m"]  # last of the sequence
    position: Int32[Any, "N m"]  # its position
    draw: Int32[Any, "N m"]
    sample: Int32[Any, "N m"]
    limit: Int32[Any, "N m"]  # response tokens at most


def response_keys(
    seed: Key[Array, ""], draws: Int[Array, "*S"], samples: Int[Array, "*S"]
) -> Key[Array, "*S"]:
    """One key per response: fold_in(fold_in(seed, draw), sample)."""
    fold = jnp.vectorize(jax.random.fold_in, signature="(),()->()")
    return fold(fold(seed, draws), samples)


def empty_state(
    model: ModelConfig,
    *,
    shards: int,
    slots: int,
    pages: int,
    page: int,
    room: int,
    int8: bool,
) -> SamplerState:
    """`slots` free slots and `pages` pages of `page` entries on each shard. R is `room`."""
    entries = (shards, model.layers, pages, model.kv_heads, page)
    kv = jnp.zeros((*entries, model.head_dim), jnp.int8 if int8 else model.compute_dtype)
    scale = jnp.zeros(entries) if int8 else None
    number, flag = jnp.zeros((shards, slots), jnp.int32), jnp.zeros((shards, slots), bool)
    tokens = jnp.zeros((shards, slots, room), jnp.int32)
    return SamplerState(
        Cache(kv, kv, scale, scale),
        Slots(
            keys=response_keys(jax.random.key(0), number, number),
            **dict.fromkeys(("token", "position", "limit", "length"), number),
            tokens=tokens,
            logprobs=tokens.astype(jnp.float32),
            **dict.fromkeys(("ended", "live"), flag),
        ),
    )


def prefill(
    params: Params,
    prompts: Int32[Array, "E P"],
    *,
    model: ModelConfig,
    page: int,
    int8: bool,
    mesh: Mesh,
) -> Cache:
    """Keys and values of prompts, which are padded on the right, in pages [L, E, P / p, K, p, h].

    E is split over the row shards.
    """
    rows = NamedSharding(mesh, ROW_SPEC)
    prompts = jax.lax.with_sharding_constraint(prompts, rows)

    def paged(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % page), (0, 0), (0, 0)))
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, page, *x.shape[3:]), 3, 4)

    found = hidden_states(params, model, prompts, mesh=mesh)[1]
    return make_cache(paged(found.k), paged(found.v), int8=int8)


def _copy_pages(
    cache: Cache, prefilled: Cache, sources: Array, targets: Array, count: Array
) -> Cache:
    """Per device: copies the first `count` of sources [n, m], pages of the prefilled rows of all
    shards, to pages `targets` [n, m].

    A shard may need rows of any shard. They are gathered one layer at a time: all layers at once
    would take the memory of several sequences, or of many where rows are continued responses.
    """
    shards = jnp.arange(len(sources))[:, None]

    def layer(index, cache):
        def gather(x):
            rows = jax.lax.all_gather(x[index], ROW_AXES, tiled=True)
            return rows.reshape(-1, *rows.shape[2:])

        source = jax.tree.map(gather, prefilled)

        def copies(size, cache):  # so many at a time
            def copy(i, cache):
                part = functools.partial(
                    jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size, axis=1
                )
                places = shards, index, part(targets)
                return jax.tree.map(
                    lambda old, new: old.at[places].set(new[part(sources)]), cache, source
                )

            return jax.lax.fori_loop(0, (count + size - 1) // size, copy, cache)

        many = functools.partial(copies, math.gcd(sources.shape[1], _COPIES))
        return jax.lax.platform_dependent(cache, cuda=many, default=functools.partial(copies, 1))

    return jax.lax.fori_loop(0, cache.k.shape[1], layer, cache)


def insert(
    state: SamplerState,
    prefilled: Cache,
    seed: Key[Array, ""],
    packed: Int32[Array, "6 N m"],
    copies: Int32[Array, "2 N c"],
    count: Int32[Array, ""],
    *,
    mesh: Mesh,
) -> SamplerState:
    """Starts sequences: all tokens but the last are prefilled, and the next decode step takes the
    last one as input.

    Args:
      prefilled: [L, E, P / p, K, p, h].
      packed: `Arrivals` as one array.
      copies: pages of `prefilled`, counted through E and P / p, and the pages that they go to.
      count: most copies of a shard; the others go to page 0.
    """
    arrivals = Arrivals(*packed)
    heads = split_axis(mesh, VOCAB_AXIS, state.cache.k.shape[3])
    rows, cache = ROW_SPEC, PartitionSpec(ROW_AXES, None, None, heads)
    inputs = (cache, PartitionSpec(None, ROW_AXES, None, heads), rows, rows, PartitionSpec())
    copy = per_device(_copy_pages, mesh, inputs, cache)

    flags = jnp.zeros(arrivals.slot.shape, bool)
    fresh = {name: getattr(arrivals, name) for name in ("token", "position", "limit")}
    fresh["length"] = jnp.zeros_like(arrivals.slot)
    fresh["keys"] = response_keys(seed, arrivals.draw, arrivals.sample)
    fresh |= {"ended": flags, "live": ~flags}
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))
    slots = state.slots._replace(
        **{name: put(getattr(state.slots, name), arrivals.slot, new) for name, new in fresh.items()}
    )
    sources, targets = copies
    return SamplerState(copy(state.cache, prefilled, sources, targets, count), slots)


def move(state: SamplerState, moves: Int32[Array, "2 N m"]) -> SamplerState:
    """Moves sequences to free slots of their shard; their pages stay.

    moves: disjoint sources, targets; b: none.
    """
    sources, targets = moves

    @jax.vmap
    def relabel(old, sources, targets):
        return old.at[targets].set(old[sources], mode="drop")

    @jax.vmap
    def clear(live, sources):
        return live.at[sources].set(False, mode="drop")

    slots = jax.tree.map(lambda old: relabel(old, sources, targets), state.slots)
    return state._replace(slots=slots._replace(live=clear(slots.live, sources)))


def take(
    slots: Slots, blocks: Int32[Array, " m"], *, size: int, mesh: Mesh
) -> tuple[Int32[Array, "2 m size"], UInt8[Array, "m size c"] | None]:
    """Blocks of `size` consecutive response tokens, and the bits of their log-probs, in one
    collective; and their experts, where recorded.

    blocks: indices over the slots of all shards; a slot has R / size blocks.
    """

    def own(tokens: Array, logprobs: Array, experts: Array | None, blocks: Array) -> Any:
        count = tokens.size // size
        at = blocks - count * jax.lax.axis_index(ROW_AXES)
        take = functools.partial(jnp.take, indices=at, axis=0, mode="clip")
        found = [take(x.reshape(-1, size)) for x in (tokens, logprobs)]
        bits = jnp.stack([found[0], jax.lax.bitcast_convert_type(found[1], jnp.int32)])
        here = (at >= 0) & (at < count)
        sent = [jnp.where(here[None, :, None], bits, 0)]
        if experts is not None:
            chosen = take(experts.reshape(-1, size, experts.shape[-1]))
            sent.append(jnp.where(here[:, None, None], chosen, 0))
        return (*jax.lax.psum(sent, ROW_AXES), None)[:2]

    rows, whole = ROW_SPEC, PartitionSpec()
    over_mesh = per_device(own, mesh, (rows, rows, rows, whole), whole)
    return over_mesh(slots.tokens, slots.logprobs, slots.experts, blocks)


def _append(
    slots: Slots, tokens: Array, logprobs: Array, routing: Routing | None, stop: tuple[int, ...]
) -> Slots:
    """Adds the sampled token [N, b] to every live sequence; one with a NaN log-prob stops before
    it. routing: [N, L, b, ...] of the states that it was sampled from.
    """
    live = slots.live & ~jnp.isnan(logprobs)
    at = jnp.where(live, slots.length, slots.tokens.shape[-1])

    @jax.vmap
    @jax.vmap
    def write(row, at, new):  # one entry per row, not the row: it may be long
        return row.at[at].set(new, mode="drop")

    experts = slots.experts
    if experts is not None:
        assert routing is not None
        chosen = jnp.moveaxis(routing.chosen, 1, 2)  # [N, b, L, k]
        experts = write(experts, at, chosen.reshape(*at.shape, -1))
    length = slots.length + live
    ended = slots.ended | (live & jnp.isin(tokens, jnp.asarray(stop, jnp.int32)))
    return slots._replace(
        token=jnp.where(live, tokens, slots.token),
        position=slots.position + live,
        length=length,
        tokens=write(slots.tokens, at, tokens),
        logprobs=write(slots.logprobs, at, logprobs),
        ended=ended,
        live=live & ~ended & (length < slots.limit),
        experts=experts,
    )


@jax.named_scope("draw")
def sample_on_mesh(
    logits: Float32[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling, mesh: Mesh
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """`sample_tokens` under shard_map: each device has its own rows, and its own part of the
    vocabulary where "tensor" divides it.
    """
    axis = split_axis(mesh, VOCAB_AXIS, logits.shape[1])
    draw = functools.partial(sample_tokens, sampling=sampling, axis=axis)
    inputs = PartitionSpec(ROW_AXES, axis), ROW_SPEC
    return per_device(draw, mesh, inputs, (ROW_SPEC, ROW_SPEC))(logits, keys)


@jax.named_scope("cache")
def _write_on_mesh(
    cache: Cache, new: Cache, slots: Slots, table: Int32[Array, "N b T"], mesh: Mesh
) -> Cache:
    """`write_cache` of live sequences under shard_map: XLA would partition the loop over slots as a
    scatter, with twice the operations in every step. Page 0 gets zeros: it stays finite.
    """
    live = slots.live[:, None, :, None]  # [N, L, b, K] as scales; entries have h too
    new = jax.tree.map(lambda x: jnp.where(live if x.ndim == 4 else live[..., None], x, 0), new)
    at, offset = jnp.divmod(slots.position, cache.k.shape[4])
    page = jnp.take_along_axis(table, at[..., None], axis=2, mode="clip")[..., 0]
    heads = split_axis(mesh, VOCAB_AXIS, cache.k.shape[3])
    entries = PartitionSpec(ROW_AXES, None, None, heads)
    write = per_device(write_cache, mesh, (entries, entries, ROW_SPEC, ROW_SPEC), entries)
    return write(cache, new, jnp.where(slots.live, page, 0), offset)


class Decoding(NamedTuple):
    """How `decode` samples. Static under jit."""

    model: ModelConfig
    sampling: Sampling
    stop: tuple[int, ...]  # token ids that end a response
    mesh: Mesh


class Until(NamedTuple):
    """When `decode` returns."""

    few: Int32[Any, ""]  # once no more sequences than this are live,
    half: Int32[Any, ""]  # or no more than this on any shard,
    max_steps: Int32[Any, ""]  # or after this many steps, for which the table has pages


def decode(
    how: Decoding,
    params: Params,
    state: SamplerState,
    table: Int32[Array, "N b T"],
    until: Until,
    *,
    width: int,
) -> tuple[SamplerState, Int32[Array, "3 N b"], Int32[Array, ""]]:
    """Decodes the first `width` slots of every shard. Sequences without a page are not live.

    A sequence whose logits are non-finite gets no token and is no longer live, though neither ended
    nor at its limit (`Stream._check_finite`).

    Returns: the state; live, length and ended for the host; the number of steps.
    """
    model, mesh = how.model, how.mesh

    def one_shard(token, lengths, cache, table, listed, needed):
        if listed is not None:
            listed = listed._replace(needed=needed)
        seen = PagedCache(cache, table, lengths, listed)
        return decode_step(params, model, token, seen, mesh)

    def step(carry):
        count, cache, slots = carry
        # Of others nothing is read; their output, unused, stays finite.
        token, lengths = (jnp.where(slots.live, x, 0) for x in (slots.token, slots.position))
        # What the kernel writes for these goes to page 0: their own pages may be in use elsewhere.
        own = jnp.where(slots.live[..., None], narrow_table, 0) if ragged else narrow_table
        needed = jnp.zeros((), jnp.int32)
        if listed is not None:
            needed = (listed.step <= count).sum(axis=1, dtype=jnp.int32).max()
        each = jax.vmap(one_shard, in_axes=(0, 0, 0, 0, 0, None), spmd_axis_name=ROW_AXES)
        hidden, new, routing = each(token, lengths, cache, own, listed, needed)
        cache = new if ragged else _write_on_mesh(cache, new, slots, narrow_table, mesh)
        keys = jax.vmap(jax.random.fold_in)(slots.keys.ravel(), slots.position.ravel() + 1)
        # Without this barrier XLA fuses the LM-head matmul into the softmax, which is 3x slower on
        # a CPU with jax 0.12.
        logits = logits_of(params, hidden.reshape(-1, hidden.shape[-1]))
        drawn = sample_on_mesh(jax.lax.optimization_barrier(logits), keys, how.sampling, mesh)
        tokens, logprobs = (x.reshape(slots.token.shape) for x in drawn)
        return count + 1, cache, _append(slots, tokens, logprobs, routing, how.stop)

    def unfinished(carry):
        count, _, slots = carry
        on_shards = slots.live.sum(axis=1)
        crowded = (on_shards.sum() > until.few) & (on_shards.max() > until.half)
        return (count < until.max_steps) & crowded

    narrow_table, narrow = table[:, :width], jax.tree.map(lambda x: x[:, :width], state.slots)
    narrow = narrow._replace(live=narrow.live & (narrow_table[:, :, 0] > 0))
    listed, ragged = None, is_ragged(mesh, model.head_dim)
    if not ragged:
        listing = functools.partial(list_pages, size=state.cache.k.shape[4])
        listed = jax.vmap(listing)(narrow_table, narrow.position)
    first = (jnp.zeros((), jnp.int32), state.cache, narrow)
    steps, cache, narrow = jax.lax.while_loop(unfinished, step, first)
    slots = jax.tree.map(lambda old, new: old.at[:, :width].set(new), state.slots, narrow)
    seen = jnp.stack([x.astype(jnp.int32) for x in (slots.live, slots.length, slots.ended)])
    return SamplerState(cache, slots), seen, steps
