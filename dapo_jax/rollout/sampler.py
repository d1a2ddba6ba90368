"""The jitted parts of sampling: read prompts, put them into decode slots, decode until enough slots
are free.

Slots are [N, b]: b on each of the mesh's N row shards. Sequences move only between slots of one
shard, and the first w slots of all shards can be decoded without the others. Noise is per token,
fold_in(fold_in(fold_in(seed, draw), sample), position): what a response says depends on its own
draw and sample number only, never on its slot, its neighbours or the number of devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float32, Int, Int32, Key

from dapo_jax.config import ModelConfig
from dapo_jax.model.decoder import Cache, decode_step, hidden_states, logits_of, make_cache
from dapo_jax.model.logprobs import ROW_AXES, VOCAB_AXIS
from dapo_jax.rollout.token_sampling import Sampling, sample_tokens
from dapo_jax.types import Params


class Slots(NamedTuple):
    """Sequences under way. All arrays have [N, b] as their leading axes."""

    keys: Key[Any, "N b"]  # one a response
    token: Int32[Any, "N b"]  # the newest token, not in the cache yet
    position: Int32[Any, "N b"]  # its position: tokens in the cache
    limit: Int32[Any, "N b"]  # response tokens at most
    length: Int32[Any, "N b"]  # response tokens so far
    tokens: Int32[Any, "N b R"]  # the response
    logprobs: Float32[Any, "N b R"]
    ended: Bool[Any, "N b"]  # drew a stop token
    live: Bool[Any, "N b"]  # neither ended nor at its limit, and no logits were non-finite


class SamplerState(NamedTuple):
    cache: Cache  # [N, L, b, K, S, h]
    slots: Slots


class Arrivals(NamedTuple):
    """Sequences to be put into slots, int32 [N, m]."""

    slot: Int32[Any, "N m"]  # on its shard; b drops the entry
    row: Int32[Any, "N m"]  # of the prefilled cache
    token: Int32[Any, "N m"]  # last of the sequence
    position: Int32[Any, "N m"]  # its position
    draw: Int32[Any, "N m"]
    sample: Int32[Any, "N m"]
    limit: Int32[Any, "N m"]  # response tokens at most


def response_keys(
    seed: Key[Array, ""], draws: Int[Array, "*slots"], samples: Int[Array, "*slots"]
) -> Key[Array, "*slots"]:
    """One key a response: fold_in(fold_in(seed, draw), sample). draws, samples: int, of one shape."""
    fold = jnp.vectorize(jax.random.fold_in, signature="(),()->()")
    return fold(fold(seed, draws), samples)


def empty_state(
    model: ModelConfig,
    *,
    shards: int,
    slots: int,
    cache_len: int,
    max_response_len: int,
    int8: bool,
) -> SamplerState:
    """`slots` free slots on each shard, with room for S = cache_len tokens, prompt included, and R
    = max_response_len.
    """
    entries = (shards, model.layers, slots, model.kv_heads, cache_len)
    kv = jnp.zeros((*entries, model.head_dim), jnp.int8 if int8 else model.compute_dtype)
    scale = jnp.zeros(entries) if int8 else None
    number, flag = jnp.zeros((shards, slots), jnp.int32), jnp.zeros((shards, slots), bool)
    return SamplerState(
        cache=Cache(kv, kv, scale, scale),
        slots=Slots(
            keys=response_keys(jax.random.key(0), number, number),
            token=number,
            position=number,
            limit=number,
            length=number,
            tokens=jnp.zeros((shards, slots, max_response_len), jnp.int32),
            logprobs=jnp.zeros((shards, slots, max_response_len), jnp.float32),
            ended=flag,
            live=flag,
        ),
    )


def kv_axis(kv_heads: int, mesh: Mesh) -> str | None:
    """The mesh axis that a cache's kv heads are split over, if any."""
    return VOCAB_AXIS if kv_heads % mesh.shape[VOCAB_AXIS] == 0 else None


def prefill(
    params: Params, prompts: Int32[Array, "E P"], *, model: ModelConfig, int8: bool, mesh: Mesh
) -> Cache:
    """Keys and values of prompts, [L, E, K, P, h]. prompts: int32 [E, P], padded on the right.

    E is split over the row shards.
    """
    prompts = jax.lax.with_sharding_constraint(
        prompts, NamedSharding(mesh, PartitionSpec(ROW_AXES))
    )
    kv = hidden_states(params, model, prompts, mesh=mesh)[1]
    return make_cache(*(jnp.swapaxes(x, 2, 3) for x in kv), int8=int8)


def _copy_row(cache: Cache, source: Cache, row: Array, slot: Array) -> Cache:
    """Row of `source` [L, E, K, P, h] into the front of a slot of one shard's cache [L, b, K, S,
    h]; dropped beyond b.
    """

    def copy(old, new):
        return old.at[:, slot, :, : new.shape[3]].set(new[:, row], mode="drop")

    return jax.tree.map(copy, cache, source)


def _copy_arrivals(
    cache: Cache, prefilled: Cache, rows: Array, slots: Array, count: Array
) -> Cache:
    """On one device: the first `count` of its rows [n, m] of everybody's prefilled cache into its
    slots [n, m].

    A row may be wanted on any shard, and lies on one. Rows of all shards are gathered a layer at a
    time: all layers of them would take as much memory as several sequences, or many if rows are as
    long as a response that is gone on with.
    """

    def layer(index, cache):
        source = jax.tree.map(
            lambda x: jax.lax.all_gather(x[index], ROW_AXES, tiled=True), prefilled
        )

        def copy(i, cache):
            def one(old, new):  # [n, L, b, K, S, ...], [E, K, P, ...]
                return old.at[jnp.arange(len(rows)), index, slots[:, i], :, : new.shape[2]].set(
                    new[rows[:, i]], mode="drop"
                )

            return jax.tree.map(one, cache, source)

        def at_once(cache):
            def one(old, new):
                return old.at[jnp.arange(len(rows))[:, None], index, slots, :, : new.shape[2]].set(
                    new[rows], mode="drop"
                )

            return jax.tree.map(one, cache, source)

        return jax.lax.platform_dependent(
            cache, cuda=at_once, default=lambda cache: jax.lax.fori_loop(0, count, copy, cache)
        )

    return jax.lax.fori_loop(0, cache.k.shape[1], layer, cache)


def insert(
    state: SamplerState,
    prefilled: Cache,
    seed: Key[Array, ""],
    packed: Int32[Array, "7 N m"],
    count: Int32[Array, ""],
    *,
    mesh: Mesh,
) -> SamplerState:
    """Starts sequences whose tokens, all but the last, have been read.

    The next decode step reads the last and draws.

    Args: prefilled: [L, E, K, P, h]; many sequences may share a row. packed: `Arrivals` as one
      array, int32 [7, N, m]. count: how many of the m there are, on the shard that has most.
    """
    arrivals = Arrivals(*packed)
    heads = kv_axis(state.cache.k.shape[3], mesh)
    whole, rows, source = (
        PartitionSpec(*axes) for axes in ((), (ROW_AXES,), (None, ROW_AXES, heads))
    )
    cache = PartitionSpec(ROW_AXES, None, None, heads)
    copy = jax.shard_map(
        _copy_arrivals,
        mesh=mesh,
        in_specs=(cache, source, rows, rows, whole),
        out_specs=cache,
        check_vma=False,
    )

    zeros, flags = jnp.zeros_like(arrivals.slot), jnp.zeros(arrivals.slot.shape, bool)
    fresh = {
        "token": arrivals.token,
        "position": arrivals.position,
        "limit": arrivals.limit,
        "length": zeros,
    }
    fresh |= {
        "keys": response_keys(seed, arrivals.draw, arrivals.sample),
        "ended": flags,
        "live": ~flags,
    }
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))
    slots = state.slots._replace(
        **{name: put(getattr(state.slots, name), arrivals.slot, new) for name, new in fresh.items()}
    )
    return SamplerState(copy(state.cache, prefilled, arrivals.row, arrivals.slot, count), slots)


def move(
    state: SamplerState, moves: Int32[Array, "2 N m"], count: Int32[Array, ""]
) -> SamplerState:
    """Moves sequences to free slots of their shard. moves: int32 [2, N, m], from and to, disjoint;
    b drops an entry.
    """
    sources, targets = moves

    def copy(i, cache):
        return jax.vmap(_copy_row)(cache, cache, sources[:, i], targets[:, i])

    def relabel(old, sources, targets):
        return old.at[targets].set(old[sources], mode="drop")

    slots = jax.tree.map(lambda old: jax.vmap(relabel)(old, sources, targets), state.slots)
    live = jax.vmap(lambda live, sources: live.at[sources].set(False, mode="drop"))(
        slots.live, sources
    )
    return SamplerState(jax.lax.fori_loop(0, count, copy, state.cache), slots._replace(live=live))


def take(
    slots: Slots, blocks: Int32[Array, " m"], *, size: int, mesh: Mesh
) -> Int32[Array, "2 m size"]:
    """Blocks of `size` successive tokens of responses, and the bits of their log-probs: int32 [2,
    m, size], in one collective.

    blocks: int32 [m], counted through the slots of all shards; a slot has R / size of them.
    """

    def own(tokens: Array, logprobs: Array, blocks: Array) -> Array:
        count = tokens.size // size
        at = blocks - count * jax.lax.axis_index(ROW_AXES)
        found = [jnp.take(x.reshape(-1, size), at, axis=0, mode="clip") for x in (tokens, logprobs)]
        bits = jnp.stack([found[0], jax.lax.bitcast_convert_type(found[1], jnp.int32)])
        return jax.lax.psum(jnp.where(((at >= 0) & (at < count))[:, None], bits, 0), ROW_AXES)

    rows, whole = PartitionSpec(ROW_AXES), PartitionSpec()
    over_mesh = jax.shard_map(
        own, mesh=mesh, in_specs=(rows, rows, whole), out_specs=whole, check_vma=False
    )
    return over_mesh(slots.tokens, slots.logprobs, blocks)


def _append(slots: Slots, tokens: Array, logprobs: Array, stop: tuple[int, ...]) -> Slots:
    """Adds the token [N, b] that was drawn to every live sequence; where its log-prob is NaN, the
    sequence stops before it.
    """
    live = slots.live & ~jnp.isnan(logprobs)
    at = jnp.where(live, slots.length, slots.tokens.shape[-1])
    write = jax.vmap(
        jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
    )  # one entry a row: rows may be long
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
    )


@jax.named_scope("draw")
def sample_on_mesh(
    logits: Float32[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling, mesh: Mesh
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """`sample_tokens`, each device for its own rows, and on its own part of the vocabulary where
    "tensor" divides it.
    """
    axis = (
        "tensor"
        if mesh.shape["tensor"] > 1 and logits.shape[1] % mesh.shape["tensor"] == 0
        else None
    )
    draw, rows = (
        functools.partial(sample_tokens, sampling=sampling, axis=axis),
        PartitionSpec(ROW_AXES),
    )
    over_mesh = jax.shard_map(
        draw,
        mesh=mesh,
        in_specs=(PartitionSpec(ROW_AXES, axis), rows),
        out_specs=(rows, rows),
        check_vma=False,
    )
    return over_mesh(logits, keys)


def decode(
    params: Params,
    state: SamplerState,
    few: Int32[Array, ""],
    half: Int32[Array, ""],
    max_steps: Int32[Array, ""],
    *,
    model: ModelConfig,
    sampling: Sampling,
    stop: tuple[int, ...],
    mesh: Mesh,
    width: int,
    read: int,
) -> tuple[SamplerState, Int32[Array, "3 N b"], Int32[Array, ""]]:
    """Decodes the first `width` slots of every shard until enough of them are free, or for
    `max_steps` steps.

    A sequence whose logits are non-finite gets no token and is not live any more, though neither
    ended nor at its limit: for the host to see (`Stream._check_finite`).

    Args: few: int32, leave when no more sequences than this are live. half: int32, or no more than
      this on any shard. max_steps: int32, at most read + 1 - the largest position of a live
      sequence. stop: token ids that end a response. read: static, how much of the cache is looked
      at.

    Returns: The state, what the host needs to know of it (int32 [3, N, b]: live, length, ended),
      and the steps taken.
    """

    def step(carry):
        count, cache, slots = carry
        hidden, cache = jax.vmap(lambda t, p, c: decode_step(params, model, t, p, c, read))(
            slots.token, slots.position, cache
        )
        keys = jax.vmap(jax.random.fold_in)(slots.keys.ravel(), slots.position.ravel() + 1)
        # Left to itself, XLA draws the product into one fusion with the softmax: on a CPU, jax 0.12
        # then takes three times as long.
        logits = jax.lax.optimization_barrier(
            logits_of(params, hidden.reshape(-1, hidden.shape[-1]))
        )
        tokens, logprobs = (
            x.reshape(slots.token.shape) for x in sample_on_mesh(logits, keys, sampling, mesh)
        )
        return count + 1, cache, _append(slots, tokens, logprobs, stop)

    def unfinished(carry):
        count, _, slots = carry
        on_shards = slots.live.sum(axis=1)
        return (count < max_steps) & (on_shards.sum() > few) & (on_shards.max() > half)

    narrow = jax.tree.map(lambda x: x[:, :width], state.slots)
    steps, cache, narrow = jax.lax.while_loop(
        unfinished, step, (jnp.zeros((), jnp.int32), state.cache, narrow)
    )
    slots = jax.tree.map(lambda old, new: old.at[:, :width].set(new), state.slots, narrow)
    return (
        SamplerState(cache, slots),
        jnp.stack([x.astype(jnp.int32) for x in (slots.live, slots.length, slots.ended)]),
        steps,
    )
