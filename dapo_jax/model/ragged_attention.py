"""Attention of one new token per sequence to its own entries of a paged KV cache, as a TPU kernel.

XLA gathers the pages before it uses them, which takes three times their traffic. This kernel copies
each sequence's own pages from HBM, so its traffic is proportional to live tokens. The copy of the
next block of pages, also that of the next sequence, runs while the current one is used. It also
writes the new entries, which by XLA would be six operations a sequence in every step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32

from dapo_jax.model.attention import MASKED, Cache, PagedCache, Window, attend_pages
from dapo_jax.model.logprobs import VOCAB_AXIS, per_device, split_axis
from dapo_jax.model.quantization import quantize

LANES = 128  # p and h are multiples of this: copies are of whole tiles
_CORES = 2  # of a v4 or v5p chip; a single core runs all parts one after the other
_SLOTS = 32  # of a part at most: their queries, keys, values and outputs are in VMEM
BLOCK_PAGES = 2  # of a block, which is copied and used at a time
_SUBLANES = 8  # the query heads of a kv head are padded to a multiple of this
Turns = Float32[Any, "B 2 h"]  # rotary angles: cosine, and sine with a sign (`turns_of`)
_SMALL_PAGE = 64  # fastest of 32, 64 and 128 on a CPU


def is_ragged(mesh: Mesh | None, head_dim: int) -> bool:
    """Whether decoding on this mesh uses the kernel."""
    return mesh is not None and mesh.devices.flat[0].platform == "tpu" and head_dim % LANES == 0


def page_size(mesh: Mesh, head_dim: int) -> int:
    """Entries of a page of the cache."""
    return LANES if is_ragged(mesh, head_dim) else _SMALL_PAGE


def entries_read(length: np.ndarray, window: int = 0) -> np.ndarray:
    """How many entries the kernel copies for sequences with so many: whole blocks, one at least.

    window: its size; 0: none.
    """
    block = BLOCK_PAGES * LANES
    end = np.maximum(1, -(-length // block))
    first = np.maximum(0, length - window + 1) // block if window else 0
    return block * (end - np.minimum(first, end - 1))


def entries_written(*, int8: bool) -> float:
    """Of how many entries' size what the kernel writes of a sequence is: whole tiles."""
    return (4 * _SUBLANES * LANES + 4 * LANES) / (LANES + 4) if int8 else _SUBLANES


def turns_of(rope: tuple[Array, Array]) -> Turns:
    """Cosine and sine as the kernel takes them: x is turned into x · cos + swapped · sin, where
    `swapped` has the halves of x exchanged.
    """
    cos, sin = rope
    both = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return jnp.stack(both, axis=1)


def attend_paged_over(
    mesh: Mesh,
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K h"],
    seen: PagedCache,
    window: Window | None = None,
    turns: Turns | None = None,
) -> tuple[Float[Array, "B H h"], Cache | None]:
    """`attend_ragged`, or `attend_pages` and no cache, for the sequences of one row shard, with
    heads split over "tensor" where it divides the kv heads. For use under vmap over the row shards,
    with their axes as `spmd_axis_name`.
    """
    heads, whole = split_axis(mesh, VOCAB_AXIS, k.shape[1]), PartitionSpec()
    entries, stored = PartitionSpec(None, heads), PartitionSpec(None, None, heads)
    on = jnp.zeros((), bool) if window is None else window.on
    ragged = is_ragged(mesh, q.shape[2])

    def local(q, k, v, seen, on, turns):  # a function under shard_map takes no closed-over array
        near = None if window is None else Window(window.size, on)
        if ragged:
            return attend_ragged(q, k, v, seen, near, turns)
        return attend_pages(q, k, v, seen, near), None

    view = jax.tree.map(lambda _: whole, seen)._replace(pages=stored)
    inputs = entries, entries, entries, view, whole, whole
    return per_device(local, mesh, inputs, (entries, stored))(q, k, v, seen, on, turns)


def attend_ragged(
    q: Float[Array, "B H h"],
    k: Float[Array, "B K h"],
    v: Float[Array, "B K h"],
    seen: PagedCache,
    window: Window | None = None,
    turns: Turns | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B H h"], Cache]:
    """`attention.attend_pages` as a kernel, and the cache with the new entries, changed in place.

    turns: by which queries and keys are rotated first; None: they are already.
    An entry whose page is 0, which no sequence has, is written as zeros: that page stays finite.
    Blocks of pages are added one by one to the new entry's own term, with the largest score so far
    as m (Milakov and Gimelshein, arXiv:1805.02867). interpret: run on any platform, for tests.
    """
    (b, heads, h), groups, page = q.shape, k.shape[1], seen.pages.k.shape[3]
    parts = min(b, _CORES * pl.cdiv(b, _CORES * _SLOTS))
    pages = min(BLOCK_PAGES, seen.table.shape[1])

    # One array, laid out at once: of each kv head its queries, the new key and the new value.
    each = [q.reshape(b, groups, -1, h), k[:, :, None], v[:, :, None]]
    per_group = each[0].shape[2]
    new = jnp.concatenate(each, axis=2)
    new = jnp.pad(new, ((0, -b % parts), (0, 0), (0, -new.shape[2] % _SUBLANES), (0, 0)))
    new = new.reshape(-1, parts, *new.shape[1:])
    if turns is None:
        turns = turns_of((jnp.ones((b, h // 2)), jnp.zeros((b, h // 2))))
    turns = jnp.pad(turns, ((0, -b % parts), (0, 0), (0, 0))).reshape(-1, parts, 2, h)
    angles = pl.BlockSpec((len(turns), 1, 2, h), lambda part, *_: (0, part, 0, 0))

    def rows(count: int) -> tuple[Any, tuple[int, ...]]:
        """A part's block of an array with so many rows of a kv head, and the array's shape."""
        shape = (*new.shape[:3], count, h)
        block = (shape[0], 1, *shape[2:])
        return pl.BlockSpec(block, lambda part, *_: (0, part, 0, 0, 0)), shape

    mixed, shape = rows(-(-per_group // _SUBLANES) * _SUBLANES)
    stored = [x for x in seen.pages if x is not None]
    buffers = [pltpu.VMEM((2, groups, pages * page, *x.shape[4:]), x.dtype) for x in stored]
    tiles = [pltpu.VMEM((groups, _tile(x), *x.shape[4:]), x.dtype) for x in stored]
    on = jnp.zeros((), bool) if window is None else window.on
    table = jnp.pad(seen.table, ((0, 0), (0, -seen.table.shape[1] % pages)))
    scalars = (jnp.reshape(x, 1).astype(jnp.int32) for x in (seen.layer, on))
    size = 0 if window is None else window.size
    in_hbm, count = [pl.BlockSpec(memory_space=pl.ANY)] * len(stored), len(stored)
    out, *written = pl.pallas_call(
        functools.partial(_kernel, _Sizes(b, per_group, table.shape[1], page, pages, size)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(parts,),
            in_specs=[rows(new.shape[3])[0], angles, *in_hbm],
            out_specs=[mixed, *in_hbm],
            scratch_shapes=[*buffers, *tiles, pltpu.SemaphoreType.DMA((3, count))],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, q.dtype), *stored],
        input_output_aliases={6 + n: 1 + n for n in range(count)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="ragged_attention",
    )(*scalars, seen.lengths.astype(jnp.int32), table.ravel(), new, turns, *stored)
    out = out.reshape(-1, *out.shape[2:])[:b, :, :per_group]
    return out.reshape(b, heads, h), Cache(*written)


class _Sizes(NamedTuple):
    """Static sizes of the kernel."""

    slots: int
    per_group: int  # query heads of a kv head
    width: int  # pages of a sequence in the table
    page: int
    pages: int  # of a block
    window: int  # 0 is none


def _tile(cache: Any) -> int:
    """Entries of a page that are written at a time: whole tiles of memory, of scales a page."""
    if cache.ndim == 4:
        return cache.shape[3]
    return _SUBLANES if cache.dtype.itemsize > 1 else 4 * _SUBLANES


@dataclasses.dataclass
class _Part:
    """The work of one part: every `parts`-th sequence, block by block. Refs as `_kernel` gets them.

    A block is (slot, at, half): its sequence, its number in the sequence, and the half of the
    buffers that it is copied to.
    """

    sizes: _Sizes
    layer: Any
    on: Any  # whether the window is
    lengths: Any
    table: Any
    new: Any  # queries, keys and values
    turns: Any
    caches: Any
    out: Any
    buffers: Any
    tiles: Any
    semaphores: Any

    @property
    def block(self) -> int:
        return self.sizes.page * self.sizes.pages

    @property
    def scale(self) -> float:
        return self.new.shape[-1] ** -0.5

    def rows(self, slot: Any, group: Any = slice(None)) -> Any:
        """Queries of a kv head, with what rounds up their rows; new key and value in float32."""
        at, n, h = slot // pl.num_programs(0), self.sizes.per_group, self.new.shape[-1]
        rows = self.new[at, 0, group].astype(jnp.float32)
        cos, sin = (jnp.broadcast_to(self.turns[at, 0, i : i + 1], rows.shape) for i in range(2))
        turned = rows * cos + pltpu.roll(rows, h // 2, rows.ndim - 1) * sin
        queries = turned[..., : self.out.shape[3], :].astype(self.new.dtype)
        return queries, turned[..., n : n + 1, :], rows[..., n + 1 : n + 2, :]

    def span(self, slot: Any) -> tuple[Any, Any]:
        """First and last + 1 block of a sequence, one at least."""
        length, first = self.lengths[slot], 0
        end = jnp.maximum(1, pl.cdiv(length, self.block))
        if self.sizes.window:
            first = jnp.maximum(0, length - self.sizes.window + 1) * self.on[0] // self.block
        return jnp.minimum(first, end - 1), end

    def after(self, slot: Any, at: Any) -> tuple[Any, Any]:
        """The following block; its slot is `slots` or more after the last."""
        ends, next_slot = at + 1 == self.span(slot)[1], slot + pl.num_programs(0)
        first = self.span(jnp.minimum(next_slot, self.sizes.slots - 1))[0]
        return jnp.where(ends, next_slot, slot), jnp.where(ends, first, at + 1)

    def copies(self, slot: Any, at: Any, half: Any) -> list[Any]:
        """Of a block's pages; those after the last are page 0."""
        copies = []
        for i in range(self.sizes.pages):
            page = self.table[slot * self.sizes.width + at * self.sizes.pages + i]
            here = half, slice(None), pl.ds(i * self.sizes.page, self.sizes.page)
            copies += [
                pltpu.make_async_copy(
                    cache.at[self.layer[0], page], buffer.at[here], self.semaphores.at[half, n]
                )
                for n, (cache, buffer) in enumerate(zip(self.caches, self.buffers, strict=True))
            ]
        return copies

    def visible(self, slot: Any, at: Any) -> Array:
        length, shape = self.lengths[slot], (1, self.block)
        place = at * self.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = place < length
        if self.sizes.window:
            seen &= (length - place < self.sizes.window) | (self.on[0] == 0)
        return seen

    def own(self, slot: Any, group: int) -> tuple[Array, Array, Array]:
        """The new entry's term: its score, weight 1 and value, of a kv head's queries."""
        q, k, v = self.rows(slot, group)
        score = (q.astype(jnp.float32) * k).sum(axis=1, keepdims=True) * self.scale
        return score, jnp.ones_like(score), jnp.broadcast_to(v, q.shape)

    def add(self, queries: Array, half: Any, group: int, visible: Array, sums: Any) -> Any:
        """The largest score, the sum of weights and of weighted values, with one more block."""
        most, total, mixed = sums
        k, v, *scales = (buffer[half, group] for buffer in self.buffers)
        contract: Any = (((1,), (1,)), ((), ()))
        scores = jax.lax.dot_general(
            queries, k.astype(queries.dtype), contract, preferred_element_type=jnp.float32
        )
        scores *= self.scale
        if scales:  # int8: applied outside the products
            scores *= scales[0][None]
        scores = jnp.where(visible, scores, MASKED)
        highest = jnp.maximum(most, scores.max(axis=1, keepdims=True))
        weights, faded = jnp.exp(scores - highest), jnp.exp(most - highest)
        total = total * faded + weights.sum(axis=1, keepdims=True)
        if scales:
            weights *= scales[1][None]
        values, weights = v.astype(queries.dtype), weights.astype(queries.dtype)
        added = jnp.dot(weights, values, preferred_element_type=jnp.float32)
        return highest, total, mixed * faded + added

    def target(self, slot: Any) -> Any:
        """The page of a sequence's new entry; 0 where the table has none."""
        at, count = self.lengths[slot] // self.sizes.page, self.sizes.width
        return jnp.where(at < count, self.table[slot * count + jnp.minimum(at, count - 1)], 0)

    def writes(self, slot: Any) -> list[Any]:
        """Copies of the tiles with a sequence's new entry."""
        at, page, copies = self.lengths[slot], self.target(slot), []
        for n, (cache, tile) in enumerate(zip(self.caches, self.tiles, strict=True)):
            rows = tile.shape[1]
            start = pl.multiple_of(at % self.sizes.page // rows * rows, rows)
            to = cache.at[self.layer[0], page, :, pl.ds(start, rows)]
            copies.append(pltpu.make_async_copy(tile, to, self.semaphores.at[2, n]))
        return copies

    def write(self, slot: Any, half: Any) -> None:
        """Starts writing a sequence's new entry. Earlier entries of its tiles are in the last block
        (`half`); later ones are none yet.
        """

        @pl.when(slot >= pl.num_programs(0))
        def _():
            for copy in self.writes(slot):  # of the sequence before: as large
                copy.wait()

        length, used = self.lengths[slot], self.target(slot) > 0
        new = [jnp.where(used, x, 0) for x in self.rows(slot)[1:]]
        if len(self.caches) > 2:
            parts = [quantize(x) for x in new]
            new = [x for x, _ in parts] + [scale for _, scale in parts]
        for tile, buffer, entry in zip(self.tiles, self.buffers, new, strict=True):
            rows = tile.shape[1]
            start = pl.multiple_of(length % self.block // rows * rows, rows)
            before = buffer[half, :, pl.ds(start, rows)].astype(jnp.float32)
            place = jax.lax.broadcasted_iota(jnp.int32, before.shape, 1)
            kept = jnp.where(place < length % rows, before, 0)
            found = jnp.where(place == length % rows, entry.astype(jnp.float32), kept)
            tile[...] = found.astype(tile.dtype)
        for copy in self.writes(slot):
            copy.start()

    def step(self, carry: Any) -> Any:
        """Uses one block while the next is copied."""
        slot, at, half, sums = carry
        first, end = self.span(slot)
        next_slot, next_at = self.after(slot, at)

        @pl.when(next_slot < self.sizes.slots)
        def _():
            for copy in self.copies(next_slot, next_at, 1 - half):
                copy.start()

        for copy in self.copies(slot, at, half):
            copy.wait()
        visible, row, new = self.visible(slot, at), slot // pl.num_programs(0), []
        for group, before in enumerate(sums):
            own = self.own(slot, group)
            start = [jnp.where(at == first, *pair) for pair in zip(own, before, strict=True)]
            new.append(self.add(self.rows(slot, group)[0], half, group, visible, start))

        @pl.when(at + 1 == end)
        def _():
            for group, (_, total, mixed) in enumerate(new):
                self.out[row, 0, group] = (mixed / total).astype(self.out.dtype)
            self.write(slot, half)

        return next_slot, next_at, 1 - half, new


def _kernel(sizes: _Sizes, layer: Any, on: Any, lengths: Any, table: Any, *refs: Any) -> None:
    """refs: queries, keys and values; turns; caches; output; caches again, the same memory; a
    buffer and a tile for each; semaphores.
    """
    count = (len(refs) - 4) // 4
    new, turns, out, semaphores = *refs[:2], refs[2 + count], refs[-1]
    caches, buffers, tiles = (refs[i : i + count] for i in range(3 + count, 3 + 4 * count, count))
    inputs = layer, on, lengths, table, new, turns
    work = _Part(sizes, *inputs, caches, out, buffers, tiles, semaphores)
    part = pl.program_id(0)
    start = part, work.span(part)[0], jnp.int32(0)
    for copy in work.copies(*start):
        copy.start()
    groups, rows, h = out.shape[2:]
    column, mixed = jnp.zeros((rows, 1), jnp.float32), jnp.zeros((rows, h), jnp.float32)
    init = *start, [(column, column, mixed)] * groups
    jax.lax.while_loop(lambda carry: carry[0] < sizes.slots, work.step, init)
    for copy in work.writes(part):  # of the last sequence: as large
        copy.wait()
