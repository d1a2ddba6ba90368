"""Host side of sampling: admits requests in order, returns responses as they finish.

A `Stream` is one use of an engine: a queue of requests, and the sequences in the slots. Its time is
logical, counted in segments of decode steps: no decision depends on the clock, so runs are
reproducible and all hosts agree.
"""

import bisect
import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Key

from dapo_jax.config import ModelConfig
from dapo_jax.model.decoder import Cache
from dapo_jax.model.logprobs import ROW_AXES, VOCAB_AXIS, split_axis
from dapo_jax.model.ragged_attention import page_size
from dapo_jax.rollout import sampler
from dapo_jax.rollout.pages import Pages
from dapo_jax.rollout.sampler import Arrivals, Decoding, SamplerState, Sampling, Slots, Until
from dapo_jax.types import NonFiniteError, Params, Request, Response

_SEGMENT = 64  # most decode steps between two checks for finished sequences
_REFILL = 16  # slots are refilled once 1 in 16 is free
_BLOCK = 256  # tokens of a response that are fetched together
_FETCHES = (16, 128, 512, 2048)  # blocks of one fetch: 4 MB; 200 MB with a 30B's experts
_FREE = -(2**30)  # in place of a free slot's cache length
_HALVINGS = 3  # how often the decoded slots may halve while the last sequences finish

_Slot = tuple[int, int]  # shard, slot of the shard
_Sampled = tuple[np.ndarray, ...]  # `Response.sampled`


class Limits(NamedTuple):
    """Sizes of an engine."""

    slots: int  # B, over all devices; a multiple of the mesh's row shards
    max_prompt_len: int
    max_response_len: int
    prefill_tokens: int = 512  # prompt tokens of a shard in one prefill; `chips.prefill_tokens`
    # Keys and values in 8 bits. Log-probs of 1536 tokens sampled from SmolLM2-135M are then off by
    # 0.027 on average, 0.16 at the 99th percentile (bfloat16 with an exact cache: 0.027 and 0.14).
    # A continued or suspended response may differ: prefill reads no 8-bit values.
    int8: bool = False
    cache_tokens: int | None = None  # of the KV cache, over all devices; None: all slots at longest
    page: int | None = None  # entries of a page of the cache; None: as the devices have it
    experts: bool = False  # record the experts of every token


class Programs(NamedTuple):
    """Jitted functions of an engine, compiled at first use for each static length."""

    start: Callable[..., Any]
    prefill: Callable[..., Any]
    insert: Callable[..., Any]
    move: Callable[..., Any]
    decode: Callable[..., Any]
    take: Callable[..., Any]


@jax.jit
def _are_finite(params: Params) -> Any:
    """Whether each parameter is finite, as a tree."""
    return jax.tree.map(lambda p: jnp.isfinite(p).all(), params)


def refill_size(slots: int) -> int:
    """How many of the slots are free before they are refilled, while requests are queued."""
    return max(1, slots // _REFILL)


def _lengths(first: int, *tops: int) -> list[int]:
    """Few static lengths: powers of two from `first`, and the tops."""
    return sorted({first << i for i in range(32) if first << i < max(tops)} | set(tops))


class Engine:
    """A fixed number of decode slots over a mesh, and the programs compiled for them.

    Args:
      stop: token ids that end a response.
      mesh: slots are split over ("data", "fsdp"), kv heads and vocabulary over "tensor" where they
        divide; ValueError where the slots do not, or a shard's cache is less than one sequence.
      fetch: device arrays to numpy, whole, on every process.
      compact: once the queue is empty, moves the last sequences together and decodes fewer slots.
    """

    def __init__(
        self,
        model: ModelConfig,
        sampling: Sampling,
        stop: tuple[int, ...],
        limits: Limits,
        *,
        mesh: Mesh,
        fetch: Callable[[Any], Any],
        compact: bool = True,
    ):
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        slots, response_len = limits.slots, limits.max_response_len
        if slots < 1 or slots % self.shards:  # without a slot on a shard nothing would finish
            raise ValueError(
                f"slots must be a multiple of the mesh's {self.shards} row shards, got {slots}"
            )
        self.slots = slots // self.shards
        self.max_response_len, self.cache_len = response_len, limits.max_prompt_len + response_len
        self.page = limits.page or page_size(mesh, model.head_dim)
        self.table_len = -(-self.cache_len // self.page)  # T, pages of the longest sequence
        self.pages = self.slots * self.table_len  # of a shard
        if limits.cache_tokens is not None:
            self.pages = min(self.pages, limits.cache_tokens // self.shards // self.page)
        if self.pages < self.table_len:
            least = self.shards * self.table_len * self.page
            raise ValueError(f"cache_tokens must be at least {least}, got {limits.cache_tokens}")
        # of a shard in one insertion: all prompts, or one continued response
        prompt_pages = -(-limits.max_prompt_len // self.page)
        self.copies = max(self.slots * prompt_pages, self.table_len)
        self.prompt_lens = _lengths(16, limits.max_prompt_len, self.cache_len)
        halvings = range(_HALVINGS + 1 if compact else 1)
        self.widths = sorted({self.slots >> i for i in halvings} - {0})
        self.block = min(_BLOCK, response_len)
        self.blocks = -(-response_len // self.block)  # of a slot
        self.fetches = sorted({min(n, slots * self.blocks) for n in _FETCHES})
        self.prefill_tokens, self.fetch = limits.prefill_tokens, fetch
        self.dtype = model.compute_dtype
        self.nothing: _Sampled = np.zeros(0, np.int32), np.zeros(0, np.float32)
        recorded = model.experts.per_token * model.layers if model.experts and limits.experts else 0
        if recorded:
            self.nothing = (*self.nothing, np.zeros((0, recorded), np.uint8))
        self.programs = self._programs(Decoding(model, sampling, stop, mesh), limits.int8, recorded)

    def _programs(self, how: Decoding, int8: bool, recorded: int) -> Programs:
        model, mesh = how.model, how.mesh
        whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(ROW_AXES))
        heads = split_axis(mesh, VOCAB_AXIS, model.kv_heads)

        def layout(*axes: Any) -> Cache:
            kv = NamedSharding(mesh, P(*axes, heads))
            return Cache(kv, kv, kv, kv) if int8 else Cache(kv, kv)

        slots = Slots(*(rows,) * len(Slots._fields))._replace(experts=rows if recorded else None)
        state = SamplerState(layout(ROW_AXES, None, None), slots)
        sizes = {"shards": self.shards, "slots": self.slots, "pages": 1 + self.pages}
        sizes |= {"page": self.page, "room": self.blocks * self.block}

        def start() -> SamplerState:
            state = sampler.empty_state(model, **sizes, int8=int8)
            shape = (*state.slots.tokens.shape, recorded)
            experts = jnp.zeros(shape, jnp.uint8) if recorded else None
            return state._replace(slots=state.slots._replace(experts=experts))

        prefill = functools.partial(
            sampler.prefill, model=model, page=self.page, int8=int8, mesh=mesh
        )
        insert = functools.partial(sampler.insert, mesh=mesh)
        take = functools.partial(sampler.take, size=self.block, mesh=mesh)
        decode = jax.jit(
            functools.partial(sampler.decode, how),
            static_argnames="width",
            donate_argnums=1,
            out_shardings=(state, whole, whole),
        )
        return Programs(
            start=jax.jit(start, out_shardings=state),
            prefill=jax.jit(prefill, out_shardings=layout(None, ROW_AXES, None)),
            insert=jax.jit(insert, donate_argnums=0, out_shardings=state),
            move=jax.jit(sampler.move, donate_argnums=0, out_shardings=state),
            decode=decode,
            take=jax.jit(take, out_shardings=whole),
        )

    def stream(self, params: Params, seed: Key[Array, ""]) -> "Stream":
        """A stream of responses of these weights."""
        return Stream(self, params, seed)

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        seed: Key[Array, ""],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> list[Response]:
        """Samples every request to its end; responses in the order of the requests.

        `on_done` gets the number of newly finished ones. NonFiniteError as `Stream.advance`.
        """
        stream, responses = self.stream(params, seed), dict[int, Response]()
        stream.submit(requests)
        while stream.pending or stream.live:
            finished = stream._segment()
            responses |= {job.number: response for job, response in finished}
            on_done(len(finished))
        return [responses[i] for i in range(len(requests))]


class _Job(NamedTuple):
    number: int  # of the submission
    request: Request
    before: _Sampled  # that is continued
    sequence: np.ndarray  # int32: prompt and tokens

    @classmethod
    def of(cls, number: int, request: Request, before: _Sampled) -> "_Job":
        sequence = np.concatenate([request.prompt, before[0]]).astype(np.int32)
        return cls(number, request, before, sequence)

    @property
    def head(self) -> bytes:
        """All tokens but the last, for prefill. Jobs with equal heads share a prefill row."""
        return self.sequence[:-1].tobytes()


_Found = tuple[_Job, Response]
_Prefilled = tuple[Cache | None, dict[bytes, int], int]  # the row of each head, and pages of a row


def _by_draw(found: Iterable[_Found]) -> list[tuple[Request, Response]]:
    pairs = [(job.request, response) for job, response in found]
    return sorted(pairs, key=lambda pair: (pair[0].draw, pair[0].sample))


class Stream:
    """One use of an engine. A response depends on weights, seed and request only.

    Attributes:
      segment: segments decoded so far. steps: decode steps so far.
      suspended: how often a sequence gave up its slot for lack of pages, to be continued later.
    """

    def __init__(self, engine: Engine, params: Params, seed: Key[Array, ""]):
        self._engine, self._params, self._seed = engine, params, seed
        self._state = engine.programs.start()
        self._queue: collections.deque[_Job] = collections.deque()
        self._running: dict[_Slot, _Job] = {}
        # per slot: tokens sampled, and tokens in its cache before those
        self._length = np.zeros((engine.shards, engine.slots), np.int32)
        self._begin = np.full_like(self._length, _FREE)
        # per slot: its pages in order, how many, and how many it can need
        self._table = np.zeros((*self._length.shape, engine.table_len), np.int32)
        self._held, self._most = np.zeros((2, *self._length.shape), np.int32)
        self._pages = [Pages(engine.pages) for _ in range(engine.shards)]
        self._prefilled: _Prefilled = None, {}, 0  # the last
        self._submitted = self.segment = self.steps = self.suspended = 0

    @property
    def pending(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def live(self) -> int:
        """Requests in slots."""
        return len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests. A response continued from a `prefix` equals an uninterrupted one.

        ValueError for a request that does not fit.
        """
        for request in requests:
            before = request.prefix or self._engine.nothing
            before = before if len(before[0]) else self._engine.nothing
            job = _Job.of(self._submitted, request, before)
            prompt, total = len(request.prompt), len(job.sequence)
            if not 1 <= prompt <= total <= self._engine.cache_len or self._room(job) < 1:
                raise ValueError(
                    f"request of draw {request.draw}, sample {request.sample}: {prompt} prompt and "
                    f"{total - prompt} prefix tokens do not fit"
                )
            self._queue.append(job)
            self._submitted += 1

    def advance(self) -> list[tuple[Request, Response]]:
        """Refills free slots, decodes one segment, returns the finished ones by draw and sample.

        Raises NonFiniteError, on every process, if a sequence's logits are non-finite.
        """
        return _by_draw(self._segment())

    def unfinished(self) -> list[tuple[Request, Response]]:
        """Running and queued requests with their tokens so far, by draw and sample.

        `request._replace(prefix=response.sampled)` continues one in another stream.
        """
        running = self._responses(sorted(self._running), np.zeros_like(self._length))
        nothing = self._engine.nothing
        queued = [(job, self._response(job, nothing, truncated=False)) for job in self._queue]
        return _by_draw(running + queued)

    def close(self) -> None:
        """Drops all requests and frees the devices' memory. The stream cannot be used after."""
        self._queue.clear()
        self._running.clear()
        self._state, self._prefilled = None, (None, {}, 0)

    # ---- One segment -----------------------------------------------------------------------------

    def _segment(self) -> list[_Found]:
        engine = self._engine
        self._refill()
        if not self._running:
            return []
        self._grow()
        width = self._compact()
        few = half = 0
        if self._queue:  # no slot or page is left: decode until enough slots are for a refill
            few = max(0, self.live - refill_size(engine.shards * engine.slots))
        else:  # decode until fewer slots suffice
            half = max((w for w in engine.widths if w < width), default=0)
        until = Until(np.int32(few), np.int32(half), np.int32(_SEGMENT))
        decode = engine.programs.decode
        self._state, *seen = decode(self._params, self._state, self._table, until, width=width)
        slots_seen, steps = engine.fetch(tuple(seen))
        live, self._length, ended = np.array(slots_seen)
        self.segment, self.steps = self.segment + 1, self.steps + int(steps)
        stopped = np.argwhere((self._begin != _FREE) & (live == 0)).tolist()
        done: list[_Slot] = [(n, i) for n, i in stopped]
        self._check_finite(done, ended)
        finished = self._responses(done, ended)
        for at in done:
            self._leave(at)
        return finished

    def _leave(self, at: _Slot) -> _Job:
        """Frees a slot and its pages. Returns the job that it had."""
        self._pages[at[0]].release(self._table[at][: self._held[at]].tolist())
        self._table[at] = self._held[at] = self._most[at] = 0
        self._begin[at] = _FREE
        return self._running.pop(at)

    def _check_finite(self, done: Sequence[_Slot], ended: np.ndarray) -> None:
        """Raises NonFiniteError if a slot stopped without an end token and below its limit."""
        for at in done:
            job, length = self._running[at], int(self._length[at])
            if ended[at] or length == self._room(job):
                continue
            finite = self._engine.fetch(_are_finite(self._params))
            leaves = jax.tree_util.tree_leaves_with_path(finite)
            bad = [path for path, leaf in leaves if not leaf]
            cause = f"finite weights overflow in {self._engine.dtype}"
            if bad:
                first = jax.tree_util.keystr(bad[0], simple=True, separator="/")
                cause = f"{len(bad)} of {len(leaves)} weights are ({first})"
            raise NonFiniteError(
                f"sampling: draw {job.request.draw}, sample {job.request.sample}: logits are "
                f"non-finite after {length} tokens, because {cause}; use weights of an earlier "
                "step, or others"
            )

    def _refill(self) -> None:
        """Admits requests from the front of the queue, lowest slots first."""
        engine = self._engine
        free = [(n, i) for i, n in np.argwhere(self._begin.T == _FREE).tolist()]
        place = self._place(free)
        while place is not None:
            if self._queue[0].head not in self._prefilled[1]:
                self._prefilled = self._prefill()
            cache, rows, row_pages = self._prefilled
            shape = (len(Arrivals._fields), engine.shards, engine.slots)
            arrivals = np.full(shape, engine.slots, np.int32)
            copies = np.zeros((2, engine.shards, engine.copies), np.int32)
            counts, copied = np.zeros((2, engine.shards), np.int32)
            while place is not None and self._queue[0].head in rows:
                job, ((n, i), shared) = self._queue[0], place
                begin = len(job.sequence) - 1
                parts = np.arange(shared, -(-begin // engine.page))
                if copied[n] + len(parts) > engine.copies:
                    break
                to = slice(copied[n], copied[n] + len(parts))
                copies[:, n, to] = rows[job.head] * row_pages + parts, self._table[n, i, parts]
                request, token = job.request, job.sequence[-1]
                entry = Arrivals(i, token, begin, request.draw, request.sample, self._room(job))
                arrivals[:, n, counts[n]] = entry
                counts[n], copied[n] = counts[n] + 1, to.stop
                self._running[n, i] = self._queue.popleft()
                place = self._place(free)
            inputs = self._seed, arrivals, copies, copied.max()
            self._state = engine.programs.insert(self._state, cache, *inputs)

    def _place(self, free: list[_Slot]) -> tuple[_Slot, int] | None:
        """Takes the first free slot whose shard has the pages that the queue's first job needs now,
        and one for each sequence there that may want another in this segment.

        Returns: the slot, and how many of its pages are filled, as they are another sequence's too.
        """
        if not self._queue:
            return None
        job, page = self._queue[0], self._engine.page
        begin, room = len(job.sequence) - 1, self._room(job)
        full = min(len(job.request.prompt), begin) // page * page
        prompt = [job.sequence[n : n + page].tobytes() for n in range(0, full, page)]
        count, tried = -(-(begin + min(room, _SEGMENT)) // page), set[int]()
        for at in free:
            if (n := at[0]) in tried:
                continue
            tried.add(n)
            spare = int((self._held[n] < self._most[n]).sum())
            if (taken := self._pages[n].admit(prompt, count, spare)) is not None:
                free.remove(at)
                pages, shared = taken
                self._table[at][:count], self._held[at] = pages, count
                self._most[at] = -(-(begin + room) // page)
                self._begin[at], self._length[at] = begin, 0
                return at, shared
        return None

    def _grow(self) -> None:
        """Gives sequences the pages of the next segment.

        Where too few are free the shard's youngest are suspended: they go back to the queue, and
        continue from their tokens.
        """
        columns = np.arange(self._engine.table_len)
        for n, pages in enumerate(self._pages):
            while True:
                entries = self._begin[n] + self._length[n] + _SEGMENT
                wanted = np.minimum(self._most[n], -(-entries // self._engine.page))
                new = (self._held[n, :, None] <= columns) & (columns < wanted[:, None])
                if (count := int(new.sum())) <= pages.free:
                    break
                rivals = (at for at in self._running if at[0] == n)
                self._suspend(max(rivals, key=lambda at: self._running[at].number))
            self._table[n][new] = pages.take(count)
            self._held[n] = np.maximum(self._held[n], wanted)

    def _suspend(self, at: _Slot) -> None:
        """Puts a sequence back into the queue, with its tokens so far."""
        ((job, response),) = self._responses([at], np.zeros_like(self._length))
        self._leave(at)
        job = _Job.of(job.number, job.request, response.sampled)
        bisect.insort(self._queue, job, key=lambda job: job.number)
        self.suspended += 1

    def _prefill(self) -> _Prefilled:
        """Prefills the heads of the next requests, as many as fit into one program."""
        engine, rows = self._engine, dict[bytes, int]()
        width = capacity = 0
        for job in self._queue:
            wide = next(n for n in engine.prompt_lens if n >= max(width, len(job.sequence) - 1))
            room = engine.shards * max(1, min(engine.slots, engine.prefill_tokens // wide))
            if job.head not in rows and len(rows) >= room:
                break
            rows.setdefault(job.head, len(rows))
            width, capacity = wide, room
        prompts = np.zeros((capacity, width), np.int32)
        for head, row in rows.items():
            tokens = np.frombuffer(head, np.int32)
            prompts[row, : len(tokens)] = tokens
        cache = engine.programs.prefill(self._params, prompts)
        return cache, rows, -(-width // engine.page)

    def _compact(self) -> int:
        """How many slots of each shard to decode; moves sequences beyond them to free slots."""
        engine = self._engine
        taken = self._begin != _FREE
        width = next(w for w in engine.widths if w >= taken.sum(axis=1).max())
        if not taken[:, width:].any():
            return width
        moves = np.full((2, engine.shards, engine.slots), engine.slots, np.int32)
        counts = np.zeros(engine.shards, np.int32)
        for n, slots in enumerate(taken):
            free = np.flatnonzero(~slots[:width]).tolist()
            sources = (width + np.flatnonzero(slots[width:])).tolist()
            for source, target in zip(sources, free, strict=False):
                moves[:, n, counts[n]] = source, target
                counts[n] += 1
                self._running[n, target] = self._running.pop((n, source))
                for array in (self._length, self._begin, self._table, self._held, self._most):
                    array[n, target] = array[n, source]
                self._table[n, source] = self._held[n, source] = self._most[n, source] = 0
                self._begin[n, source] = _FREE
        self._state = engine.programs.move(self._state, moves)
        return width

    # ---- Responses -------------------------------------------------------------------------------

    def _room(self, job: _Job) -> int:
        """Tokens that may still be sampled."""
        limit = self._engine.max_response_len
        limit = limit if job.request.limit is None else min(limit, job.request.limit)
        return limit - len(job.before[0])

    def _responses(self, slots: Sequence[_Slot], ended: np.ndarray) -> list[_Found]:
        """Responses in slots; fetches only blocks that hold tokens, many of them in one fetch."""
        if not slots:
            return []
        engine = self._engine
        lengths = [int(self._length[at]) for at in slots]
        counts = [-(-length // engine.block) for length in lengths]
        begins = [(n * engine.slots + i) * engine.blocks for n, i in slots]
        ranges = [np.arange(b, b + count) for b, count in zip(begins, counts, strict=True)]
        blocks, most = np.concatenate(ranges), engine.fetches[-1]
        parts = [blocks[at : at + most] for at in range(0, len(blocks), most)]
        taken = []
        for part in parts:  # few sizes, so few programs
            size = next(size for size in engine.fetches if size >= len(part))
            padded = np.resize(part, size).astype(np.int32)
            taken.append(engine.programs.take(self._state.slots, padded))
        pairs = zip(engine.fetch(taken), parts, strict=True)
        fetched = [(rows[:, : len(part)], chosen) for (rows, chosen), part in pairs]
        none = np.zeros((2, 0, engine.block), np.int32)
        tokens, bits = np.concatenate([none, *(rows for rows, _ in fetched)], axis=1).reshape(2, -1)
        sampled: _Sampled = tokens, bits.view(np.float32)
        found, start = [], 0
        if len(engine.nothing) > 2:
            width = engine.nothing[2].shape[1]
            chosen = [c[: rows.shape[1]].reshape(-1, width) for rows, c in fetched]
            sampled = (*sampled, np.concatenate([engine.nothing[2], *chosen]))
        for at, length, count in zip(slots, lengths, counts, strict=True):
            job, own = self._running[at], slice(start, start + length)
            truncated = not ended[at] and length == self._room(job)
            new = tuple(values[own] for values in sampled)
            found.append((job, self._response(job, new, truncated)))
            start += count * engine.block
        return found

    def _response(self, job: _Job, new: _Sampled, truncated: bool) -> Response:
        tokens, logprobs, *experts = map(np.concatenate, zip(job.before, new, strict=True))
        return Response(tokens, logprobs, truncated, experts=experts[0] if experts else None)
