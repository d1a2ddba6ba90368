"""Host side of sampling: requests go into decode slots in the order they come, responses come out
as they finish.

A `Stream` is one use of an engine: its queue, and the sequences in the slots. Its time is logical,
one segment of decode steps after another; nothing it decides depends on the clock, so that runs
repeat and all hosts agree.
"""

import collections
import functools
from collections.abc import Callable, Sequence
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
from dapo_jax.model.logprobs import ROW_AXES
from dapo_jax.rollout import sampler
from dapo_jax.rollout.sampler import Arrivals, SamplerState, Sampling, Slots
from dapo_jax.types import NonFiniteError, Params, Request, Response

_SEGMENT = 64  # decode steps at most between looks at which sequences are still live
_REFILL = 16  # slots are refilled when one in so many is free
_BLOCK = 256  # tokens of a response that are fetched as one
_FETCHES = (16, 128, 512, 2048)  # blocks fetched at a time: 4 MB at most
_FREE = -(2**30)  # in place of a slot's first position
_HALVINGS = 3  # of the slots that are decoded, while the last sequences end


class Programs(NamedTuple):
    """What an engine runs on its devices.

    Each is compiled at its first use, for every static length that comes up.
    """

    start: Callable[..., Any]
    prefill: Callable[..., Any]
    insert: Callable[..., Any]
    move: Callable[..., Any]
    decode: Callable[..., Any]
    take: Callable[..., Any]


@jax.jit
def _are_finite(params: Params) -> Any:
    """Whether each parameter is, in a tree like theirs."""
    return jax.tree.map(lambda p: jnp.isfinite(p).all(), params)


def _lengths(first: int, *tops: int) -> list[int]:
    """Few static lengths: powers of two from `first`, and the tops."""
    return sorted({first << i for i in range(32) if first << i < max(tops)} | set(tops))


class Engine:
    """A fixed number of decode slots over a mesh, and the programs compiled for them.

    Args: slots: B, over all devices; a multiple of the mesh's row shards, or ValueError. stop:
      token ids that end a response. mesh: slots are split over its ("data", "fsdp") axes, kv heads
      and the vocabulary over "tensor" where they divide. fetch: device arrays to numpy, whole, on
      every process. prefill_tokens: prompt tokens that a shard reads at a time, or one prompt;
      `chips.prefill_tokens`. int8: keeps keys and values in 8 bits. Log-probs of 1536 tokens
      sampled from SmolLM2-135M are then off from float32 ones by
        0.027 on average, 0.16 at the 99th percentile (bfloat16 compute with an exact cache: 0.027
        and 0.14). A response that is gone on with may then differ from an uninterrupted one: its
        prefix is read again through exact keys and values.
      compact: once nothing waits, the last sequences move together, and fewer slots are decoded.
    """

    def __init__(
        self,
        model: ModelConfig,
        sampling: Sampling,
        stop: tuple[int, ...],
        *,
        slots: int,
        max_prompt_len: int,
        max_response_len: int,
        mesh: Mesh,
        fetch: Callable[[Any], Any],
        prefill_tokens: int = 512,
        int8: bool = False,
        compact: bool = True,
    ):
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if slots < 1 or slots % self.shards:  # with no slot on a shard nothing would ever end
            raise ValueError(
                f"slots must be a multiple of the mesh's {self.shards} row shards, got {slots}"
            )
        self.slots = slots // self.shards
        self.max_response_len, self.cache_len = max_response_len, max_prompt_len + max_response_len
        self.reads = sorted({*_lengths(64, self.cache_len), *_lengths(192, self.cache_len)})
        self.prompt_lens = _lengths(16, max_prompt_len, self.cache_len)
        self.widths = sorted(
            {self.slots >> i for i in range(_HALVINGS + 1)} - {0} if compact else {self.slots}
        )
        self.block = min(_BLOCK, max_response_len)
        self.blocks = -(-max_response_len // self.block)  # of a slot
        self.fetches = sorted({min(n, slots * self.blocks) for n in _FETCHES})
        self.prefill_tokens, self.fetch, self.dtype = prefill_tokens, fetch, model.compute_dtype
        whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(ROW_AXES))
        heads = sampler.kv_axis(model.kv_heads, mesh)

        def layout(*axes: Any) -> Cache:
            kv = NamedSharding(mesh, P(*axes, heads))
            return Cache(kv, kv, kv, kv) if int8 else Cache(kv, kv)

        state = SamplerState(layout(ROW_AXES, None, None), Slots(*(rows,) * len(Slots._fields)))
        sizes = {"shards": self.shards, "slots": self.slots, "cache_len": self.cache_len}
        sizes["max_response_len"] = self.blocks * self.block
        decode = functools.partial(
            sampler.decode, model=model, sampling=sampling, stop=stop, mesh=mesh
        )
        self.programs = Programs(
            start=jax.jit(
                functools.partial(sampler.empty_state, model, **sizes, int8=int8),
                out_shardings=state,
            ),
            prefill=jax.jit(
                functools.partial(sampler.prefill, model=model, int8=int8, mesh=mesh),
                out_shardings=layout(None, ROW_AXES),
            ),
            insert=jax.jit(
                functools.partial(sampler.insert, mesh=mesh), donate_argnums=0, out_shardings=state
            ),
            move=jax.jit(sampler.move, donate_argnums=0, out_shardings=state),
            decode=jax.jit(
                decode,
                static_argnames=("width", "read"),
                donate_argnums=1,
                out_shardings=(state, whole, whole),
            ),
            take=jax.jit(
                functools.partial(sampler.take, size=self.block, mesh=mesh), out_shardings=whole
            ),
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

        `on_done` is told how many more have ended.

        Raises NonFiniteError as `Stream.advance`.
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
    sequence: np.ndarray  # int32: prompt and prefix

    @property
    def head(self) -> bytes:
        """What has to be in the cache before it can start: all tokens but the last.

        Jobs with the same share a prefill.
        """
        return self.sequence[:-1].tobytes()


class Stream:
    """Requests under way in an engine's slots. Responses depend on weights, seed and request only.

    Attributes:
      segment: segments decoded so far. steps: decode steps so far.
    """

    def __init__(self, engine: Engine, params: Params, seed: Key[Array, ""]):
        self._engine, self._params, self._seed = engine, params, seed
        self._state = engine.programs.start()
        self._queue: collections.deque[_Job] = collections.deque()
        self._running: dict[tuple[int, int], _Job] = {}  # by (shard, slot)
        self._length = np.zeros(
            (engine.shards, engine.slots), np.int32
        )  # tokens drawn in each slot
        self._begin = np.full_like(self._length, _FREE)  # and in its cache before them
        self._prefilled: tuple[Cache | None, dict[bytes, int]] = (
            None,
            {},
        )  # and which head is in which row
        self._submitted = self.segment = self.steps = 0

    @property
    def pending(self) -> int:
        """Requests that have no slot yet."""
        return len(self._queue)

    @property
    def live(self) -> int:
        """Requests in slots."""
        return len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests.

        One with a `prefix` goes on where that ends: its tokens are those of an uninterrupted
        response.

        ValueError for a request that does not fit.
        """
        for request in requests:
            sequence = np.concatenate([request.prompt, *(request.prefix or ())[:1]]).astype(
                np.int32
            )
            job = _Job(self._submitted, request, sequence)
            if (
                not 1 <= len(request.prompt) <= len(sequence) <= self._engine.cache_len
                or self._room(job) < 1
            ):
                raise ValueError(
                    f"request of draw {request.draw}, sample {request.sample}: {len(request.prompt)} prompt and "
                    f"{len(sequence) - len(request.prompt)} prefix tokens do not fit"
                )
            self._queue.append(job)
            self._submitted += 1

    def advance(self) -> list[tuple[Request, Response]]:
        """Fills free slots from the queue, decodes one segment, and returns what it finished, by
        draw and sample.

        Raises NonFiniteError, on every process, if a sequence's logits are non-finite.
        """
        finished = sorted(
            self._segment(), key=lambda found: (found[0].request.draw, found[0].request.sample)
        )
        return [(job.request, response) for job, response in finished]

    def unfinished(self) -> list[tuple[Request, Response]]:
        """What is in slots or queued, with the tokens that are there so far, by draw and sample.

        `request._replace(prefix=(response.tokens, response.behavior_logprobs))` goes on with it in
        another stream.
        """
        running = self._responses(sorted(self._running), np.zeros_like(self._length))
        queued = [
            (job, self._response(job, np.zeros(0, np.int32), np.zeros(0, np.float32), False))
            for job in self._queue
        ]
        found = [(job.request, response) for job, response in running + queued]
        return sorted(found, key=lambda item: (item[0].draw, item[0].sample))

    def close(self) -> None:
        """Forgets all requests and frees the devices' memory.

        The stream is of no use afterwards.
        """
        self._queue.clear()
        self._running.clear()
        self._state, self._prefilled = None, (None, {})

    # ---- One segment -------------------------------------------------------------------------------------------------

    def _segment(self) -> list[tuple[_Job, Response]]:
        engine = self._engine
        self._refill()
        if not self._running:
            return []
        width = self._compact()
        used = int((self._begin + self._length).max())
        read = next(n for n in engine.reads if n >= used)
        if self._queue:  # all slots are taken: until a refill is worth its while
            few, half = (
                engine.shards * engine.slots - max(1, engine.shards * engine.slots // _REFILL),
                0,
            )
        else:  # until fewer slots will do
            few, half = 0, max((w for w in engine.widths if w < width), default=0)
        limits = (np.int32(n) for n in (few, half, min(_SEGMENT, read + 1 - used)))
        self._state, seen, steps = engine.programs.decode(
            self._params, self._state, *limits, width=width, read=read
        )
        seen, steps = engine.fetch((seen, steps))
        live, self._length, ended = np.array(seen)
        self.segment, self.steps = self.segment + 1, self.steps + int(steps)
        done: list[tuple[int, int]] = [
            (n, i) for n, i in np.argwhere((self._begin != _FREE) & (live == 0)).tolist()
        ]
        self._check_finite(done, ended)
        finished = self._responses(done, ended)
        for at in done:
            del self._running[at]
            self._begin[at] = _FREE
        return finished

    def _check_finite(self, done: Sequence[tuple[int, int]], ended: np.ndarray) -> None:
        """Raises NonFiniteError if one of the slots stopped without an end token and below its
        limit, and says what is non-finite.
        """
        for at in done:
            job, length = self._running[at], int(self._length[at])
            if ended[at] or length == self._room(job):
                continue
            leaves = jax.tree_util.tree_leaves_with_path(
                self._engine.fetch(_are_finite(self._params))
            )
            bad = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, finite in leaves
                if not finite
            ]
            raise NonFiniteError(
                f"sampling: draw {job.request.draw}, sample {job.request.sample}: logits are non-finite after {length} tokens, because "
                + (
                    f"{len(bad)} of {len(leaves)} weights are ({bad[0]})"
                    if bad
                    else f"finite weights overflow in {self._engine.dtype}"
                )
                + "; use weights of an earlier step, or others"
            )

    def _refill(self) -> None:
        """Starts requests from the front of the queue in the free slots, lowest slots first."""
        engine = self._engine
        free = collections.deque((n, i) for i, n in np.argwhere(self._begin.T == _FREE).tolist())
        while self._queue and free:
            if self._queue[0].head not in self._prefilled[1]:
                self._prefilled = self._prefill()
            cache, rows = self._prefilled
            arrivals = np.full(
                (len(Arrivals._fields), engine.shards, engine.slots), engine.slots, np.int32
            )
            counts = np.zeros(engine.shards, np.int32)
            while self._queue and free and self._queue[0].head in rows:
                job, (n, i) = self._queue.popleft(), free.popleft()
                request, sequence = job.request, job.sequence
                entry = Arrivals(
                    i,
                    rows[job.head],
                    sequence[-1],
                    len(sequence) - 1,
                    request.draw,
                    request.sample,
                    self._room(job),
                )
                arrivals[:, n, counts[n]] = entry
                counts[n] += 1
                self._running[n, i], self._begin[n, i], self._length[n, i] = (
                    job,
                    len(sequence) - 1,
                    0,
                )
            self._state = engine.programs.insert(
                self._state, cache, self._seed, arrivals, counts.max()
            )

    def _prefill(self) -> tuple[Cache, dict[bytes, int]]:
        """Reads what the next requests of the queue start with, as many as go into one program."""
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
        return engine.programs.prefill(self._params, prompts), rows

    def _compact(self) -> int:
        """How many slots of each shard to decode.

        Sequences beyond them move to free slots among them.
        """
        engine = self._engine
        taken = self._begin != _FREE
        width = next(w for w in engine.widths if w >= taken.sum(axis=1).max())
        moves = np.full((2, engine.shards, engine.slots), engine.slots, np.int32)
        counts = np.zeros(engine.shards, np.int32)
        for n, slots in enumerate(taken):
            free = np.flatnonzero(~slots[:width]).tolist()
            for source, target in zip(
                (width + np.flatnonzero(slots[width:])).tolist(), free, strict=False
            ):
                moves[:, n, counts[n]] = source, target
                counts[n] += 1
                self._running[n, target] = self._running.pop((n, source))
                self._length[n, target], self._begin[n, target] = (
                    self._length[n, source],
                    self._begin[n, source],
                )
                self._begin[n, source] = _FREE
        if counts.any():
            self._state = engine.programs.move(self._state, moves, counts.max())
        return width

    # ---- Responses ---------------------------------------------------------------------------------------------------

    def _room(self, job: _Job) -> int:
        """Tokens that may still be drawn."""
        limit = self._engine.max_response_len
        limit = limit if job.request.limit is None else min(limit, job.request.limit)
        return limit - (len(job.sequence) - len(job.request.prompt))

    def _responses(
        self, slots: Sequence[tuple[int, int]], ended: np.ndarray
    ) -> list[tuple[_Job, Response]]:
        """What is in slots, and nothing else: of each only the blocks that hold tokens, many of
        them in one fetch.
        """
        if not slots:
            return []
        engine = self._engine
        lengths = [int(self._length[at]) for at in slots]
        counts = [-(-length // engine.block) for length in lengths]
        begins = [(n * engine.slots + i) * engine.blocks for n, i in slots]
        blocks = np.concatenate(
            [np.arange(b, b + count) for b, count in zip(begins, counts, strict=True)]
        )
        parts = [
            blocks[at : at + engine.fetches[-1]] for at in range(0, len(blocks), engine.fetches[-1])
        ]
        sizes = [next(size for size in engine.fetches if size >= len(part)) for part in parts]
        taken = [
            engine.programs.take(self._state.slots, np.resize(part, n).astype(np.int32))
            for part, n in zip(parts, sizes, strict=True)
        ]
        fetched = [
            rows[:, : len(part)] for rows, part in zip(engine.fetch(taken), parts, strict=True)
        ]
        tokens, bits = np.concatenate(
            [np.zeros((2, 0, engine.block), np.int32), *fetched], axis=1
        ).reshape(2, -1)
        logprobs, found, start = bits.view(np.float32), [], 0
        for at, length, count in zip(slots, lengths, counts, strict=True):
            job, own = self._running[at], slice(start, start + length)
            found.append(
                (
                    job,
                    self._response(
                        job, tokens[own], logprobs[own], not ended[at] and length == self._room(job)
                    ),
                )
            )
            start += count * engine.block
        return found

    def _response(
        self, job: _Job, tokens: np.ndarray, logprobs: np.ndarray, truncated: bool
    ) -> Response:
        before = job.request.prefix or (np.zeros(0, np.int32), np.zeros(0, np.float32))
        return Response(
            np.concatenate([before[0], tokens]), np.concatenate([before[1], logprobs]), truncated
        )
