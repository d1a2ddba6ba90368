"""What the rollout scheduler does in a step: the engine and dynamic sampling that training runs, on
device programs that only count.

    simulate(config, shards, Workload(parse_lengths("lognormal:5120:0.8", 20480)))  ->  Schedule

Response lengths are independent. An informative group has 1 to G - 1 correct responses, each number
equally likely. No model runs, so decode steps are exact for the lengths and say nothing of seconds.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.benchmark.measure import Report
from dapo_jax.config import Config, ModelConfig, load_config
from dapo_jax.config.schema import field
from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.mixture import Mixture
from dapo_jax.model.decoder import Cache
from dapo_jax.report import sample
from dapo_jax.reward.pool import PendingVerdicts, RewardItem, RewardPool
from dapo_jax.rollout.engine import Engine, Limits, Programs, Stream
from dapo_jax.rollout.sampler import Arrivals, Decoding, Until
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.files import Folder, run_folder
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.training.dynamic_sampling import DrawState, DynamicSampler
from dapo_jax.training.record import age_metrics
from dapo_jax.training.setup import Policy
from dapo_jax.types import InputError, Problem, Prompt, Response, Verdict

_PROBLEMS = 1 << 14  # of the simulated data set
_POINTS = 1 << 14  # of a parametric distribution
_PROMPT_SIGMA = 0.4  # of the logarithm of prompt lengths
SIGMA = 0.8  # of the logarithm of response lengths, unless they are given
_NEWEST = 20  # rollout steps that a run's lengths are taken from


class LengthDistribution(NamedTuple):
    """Response lengths in tokens."""

    name: str
    values: np.ndarray  # int64 [n], equally likely

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def live_mean(self) -> float:
        """E[L²] / 2 E[L]: mean response tokens of a live sequence, at a random decode step."""
        return float((self.values.astype(float) ** 2).mean() / (2 * self.values.mean()))


class Workload(NamedTuple):
    """What a schedule depends on and no config holds."""

    lengths: LengthDistribution
    prompt_len: float = 256.0  # mean prompt, tokens
    kept: float = 0.5  # share of sampled groups that are informative
    steps: int = 4  # rollout steps
    seed: int = 0

    @property
    def live_entries(self) -> float:
        """Mean cache of a live sequence."""
        return self.prompt_len + self.lengths.live_mean


class Machine(NamedTuple):
    """What a schedule depends on of the devices."""

    shards: int  # of the mesh's rows, data x fsdp; they divide `rollout.decode_slots`
    prefill_tokens: int = 512  # of a shard in one prefill
    page: int = 128  # entries of a page of the cache
    # entries that attention reads of caches with so many, mean over layers
    reads: Callable[[np.ndarray], np.ndarray] = lambda entries: entries


class Segments(NamedTuple):
    """Calls of the decode program, arrays [n]. Sums are over the decode steps of a segment."""

    rollout_step: np.ndarray  # from 0
    steps: np.ndarray  # decode steps
    width: np.ndarray  # slots of a shard that are decoded
    cache_mean: np.ndarray  # sum of the tokens in a shard's live caches, mean of the shards
    cache_worst: np.ndarray  # the same on the shard that has most of them at that step
    cache_read: np.ndarray  # sum of the entries read, on the shard that reads most at that step
    live: np.ndarray  # sum of the sequences that are live, over all shards


class StepSummary(NamedTuple):
    """One rollout step."""

    rollout_step: int  # from 0
    decode_steps: int
    live_share: float  # of slots x decode steps
    prompts: int  # drawn
    tokens: int  # sampled
    trained: int  # groups
    surplus: int  # informative groups left for the next step, or dropped
    open_groups: int  # left unfinished
    prefill_tokens: int  # padding included
    suspended: int  # times that a sequence was, for lack of cache
    inserts: int
    moves: int
    token_age_mean: float  # of the groups trained on, rollout steps
    token_age_max: int
    versions_max: int  # most policies that sampled one of their responses


class Schedule(NamedTuple):
    """What the scheduler did in some rollout steps."""

    slots: int  # over all shards
    cache_tokens: int  # of a shard
    segments: Segments
    # int64 [n, 3]: rollout step, rows over all shards, tokens of a row
    prefills: np.ndarray
    inserts: np.ndarray  # of the rows of a prefill
    steps: list[StepSummary]

    @property
    def decode_steps(self) -> float:
        """Mean of a rollout step."""
        return float(self.segments.steps.sum() / len(self.steps))

    @property
    def live_share(self) -> float:
        """Share of slots x decode steps that sampled a token."""
        return float(self.segments.live.sum() / (self.segments.steps.sum() * self.slots))

    @property
    def cache_share(self) -> float:
        """Share of the cache that live entries fill; shared prompts count for each sequence."""
        seen = self.segments
        return float(seen.cache_mean.sum() / (seen.steps.sum() * self.cache_tokens))

    @property
    def shard_balance(self) -> float:
        """Live cache of the mean shard / of the worst: the share of its reads that all need."""
        return float(self.segments.cache_mean.sum() / self.segments.cache_worst.sum())


# ---- Lengths ----


def parse_lengths(text: str, longest: int) -> LengthDistribution:
    """`lognormal:MEAN:SIGMA`. MEAN is that of the lengths after they are limited to `longest`;
    SIGMA is of the logarithm, before. Raises InputError.

    >>> parse_lengths("lognormal:100:0", 400).mean
    100.0
    """
    kind, *numbers = text.split(":")
    try:
        mean, sigma = map(float, numbers)
    except ValueError:
        kind = ""
    if kind != "lognormal" or not 1 <= mean < longest or not 0 <= sigma <= 9:
        raise InputError(
            f"lengths: expected lognormal:MEAN:SIGMA, MEAN from 1 to below {longest} tokens and "
            f"SIGMA from 0 to 9, e.g. lognormal:{longest // 4}:0.8; got {text[:40]!r}"
        )
    normal = statistics.NormalDist()
    spread = np.exp([sigma * normal.inv_cdf((n + 0.5) / _POINTS) for n in range(_POINTS)])
    low, high = 0.0, math.log(longest) + 9 * sigma
    for _ in range(60):  # bisection: the mean rises with the median
        median = (low + high) / 2
        below = np.clip(math.exp(median) * spread, 1, longest).mean() < mean
        low, high = (median, high) if below else (low, median)
    values = np.clip(np.rint(math.exp(low) * spread), 1, longest).astype(np.int64)
    return LengthDistribution(text, values)


def measured(run_dir: Folder) -> tuple[LengthDistribution, float]:
    """Lengths of the responses in a run's samples/, newest steps, and its share of kept groups.

    Raises InputError if the run has no step with samples.
    """
    files = sorted((run_dir / "samples").glob("step_*.jsonl"))[-_NEWEST:]
    rows = [sample(line) or {} for file in files for line in file.read_bytes().splitlines()]
    values = np.array([row["length"] for row in rows if "length" in row], np.int64)
    records = read_metrics(run_dir) if values.size else []
    kept = [r["filter/kept_fraction"] for r in records if "filter/kept_fraction" in r]
    if not kept:
        what = "has no step with samples; set train.samples_per_step"
        raise InputError(f"{run_dir}: {what}, or give --lengths")
    name = f"{values.size} samples of {run_dir}"
    return LengthDistribution(name, values), float(np.mean(kept[-_NEWEST:]))


def lengths_and_kept(
    text: str | None, run_dir: str | None, longest: int, kept: float
) -> tuple[LengthDistribution, float]:
    """Those of a run if its folder is given; else `kept`, and the lengths of `parse_lengths`, by
    default log-normal with a mean of a quarter of `longest`.
    """
    if run_dir:
        return measured(run_folder(run_dir))
    return parse_lengths(text or f"lognormal:{longest / 4:g}:{SIGMA}", longest), kept


# ---- Fake device programs ----


class _Slots:
    """What a device knows of its slots, int64 or bool arrays [N, b]."""

    def __init__(self, shards: int, slots: int):
        number = np.zeros((shards, slots), np.int64)
        self.left, self.length, self.position, self.limit = (number.copy() for _ in range(4))
        self.live = np.zeros((shards, slots), bool)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.left, self.length, self.position, self.limit, self.live


class _Samples:
    """The length and correctness of every response, functions of its draw and sample."""

    def __init__(self, work: Workload, size: int):
        self._work, self._size = work, size
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of_draw(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths [G] and correctness [G]."""
        if draw not in self._known:
            work, size = self._work, self._size
            rng = np.random.default_rng([work.seed, draw])
            lengths = rng.choice(work.lengths.values, size)
            informative, some = rng.random() < work.kept, int(rng.integers(1, size))
            count = some if informative else size * int(rng.integers(2))
            self._known[draw] = lengths, rng.permutation(size) < count
        return self._known[draw]

    def key(self, draw: int, sample: int) -> int:
        """A token id that names a response."""
        return draw * self._size + sample

    def verdict(self, key: int) -> Verdict:
        draw, sample = divmod(key, self._size)
        correct = bool(self.of_draw(draw)[1][sample])
        return Verdict(correct, 1.0 if correct else -1.0)


class _SimulatedEngine(Engine):
    """The engine on programs that count. `segments`, `prefills` and `inserts` have what they
    counted.
    """

    def __init__(self, config: Config, machine: Machine, samples: _Samples):
        self.samples, self.rollout_step, self.reads = samples, 0, machine.reads
        self.segments: list[tuple[float, ...]] = []
        self.prefills: list[tuple[int, int, int]] = []
        self.inserts: list[tuple[int, int, int]] = []
        self.moves = 0
        limits = Limits(
            config.rollout.decode_slots,
            config.data.max_prompt_len,
            config.rollout.max_response_len,
            machine.prefill_tokens,
            cache_tokens=config.rollout.cache_tokens,
            page=machine.page,
        )
        devices = np.full(
            (1, machine.shards, 1), jax.devices("cpu")[0]
        )  # only their number matters
        mesh = Mesh(devices, ("data", "fsdp", "tensor"))
        super().__init__(ModelConfig(), Sampling(), (), limits, mesh=mesh, fetch=lambda tree: tree)

    def stream(self, params: Any, seed: Any) -> "Stream":
        return _SimulatedStream(self, params, seed)

    def _programs(self, how: Decoding, int8: bool, recorded: int) -> Programs:
        def start() -> _Slots:
            return _Slots(self.shards, self.slots)

        def unused(*args: Any) -> None:
            raise AssertionError("responses hold no tokens")

        return Programs(start, self._prefill, self._insert, self._move, self._decode, unused)

    def _prefill(self, params: Any, prompts: np.ndarray) -> Cache:
        self.prefills.append((self.rollout_step, *prompts.shape))
        shape: Any = prompts.shape
        return Cache(shape, shape)

    def _insert(
        self, state: _Slots, cache: Any, seed: Any, packed: np.ndarray, *copies: Any
    ) -> _Slots:
        self.inserts.append((self.rollout_step, *cache.k))
        arrivals = Arrivals(*packed)
        for n, m in np.argwhere(arrivals.slot < self.slots):
            at, limit = (n, arrivals.slot[n, m]), arrivals.limit[n, m]
            lengths, _ = self.samples.of_draw(int(arrivals.draw[n, m]))
            begun = self.max_response_len - limit
            state.left[at] = lengths[arrivals.sample[n, m]] - begun
            state.length[at], state.live[at] = 0, True
            state.position[at], state.limit[at] = arrivals.position[n, m], limit
        return state

    def _move(self, state: _Slots, moves: np.ndarray) -> _Slots:
        sources, targets = moves
        n, m = np.nonzero(sources < self.slots)
        for array in state.arrays():
            array[n, targets[n, m]] = array[n, sources[n, m]]
        state.live[n, sources[n, m]] = False
        self.moves += 1
        return state

    def _decode(
        self, params: Any, state: _Slots, table: np.ndarray, until: Until, *, width: int
    ) -> tuple[_Slots, np.ndarray, int]:
        on = slice(0, width)
        state.live[:, on] &= table[:, on, 0] > 0  # else suspended
        live, position = state.live[:, on], state.position[:, on]
        left = np.where(live, state.left[:, on], 0)
        after = np.arange(int(until.max_steps))
        alive = left[..., None] > after  # [N, width, steps]: samples a token in that step
        counts = alive.sum(axis=1)
        crowded = (counts.sum(axis=0) > until.few) & (counts.max(axis=0) > until.half)
        steps = len(after) if crowded.all() else int(np.argmin(crowded))
        alive, counts, after = alive[..., :steps], counts[:, :steps], after[:steps]
        halfway = self.reads(position + steps // 2)
        cached, read = (np.einsum("nw,nws->ns", x, alive) for x in (position, halfway))
        cached += after * counts
        sums = cached.mean(axis=0), cached.max(axis=0), read.max(axis=0), counts
        self.segments.append((self.rollout_step, steps, width, *(float(x.sum()) for x in sums)))
        done = np.minimum(left, steps)
        for array, change in ((state.left, -done), (state.length, done), (state.position, done)):
            array[:, on] += change
        state.live[:, on] = left > steps
        ended = state.length < state.limit
        return state, np.stack([state.live, state.length, ended]).astype(np.int32), steps


class _SimulatedStream(Stream):
    """Responses of the right lengths, in which every token names the response."""

    _engine: _SimulatedEngine

    def _responses(self, slots: Sequence[tuple[int, int]], ended: np.ndarray) -> list[Any]:
        found = []
        for at in slots:
            job, length = self._running[at], int(self._length[at])
            truncated = not ended[at] and length == self._room(job)
            whole = length + len(job.sequence) - len(job.request.prompt)
            found.append((job, self._of_length(job.request, whole, bool(truncated))))
        return found

    def _response(self, job: Any, new: Any, truncated: bool) -> Response:
        begun = len(job.sequence) - len(job.request.prompt)  # of a queued request
        return self._of_length(job.request, begun, truncated)

    def _of_length(self, request: Any, length: int, truncated: bool) -> Response:
        key = np.int32(self._engine.samples.key(request.draw, request.sample))
        tokens = np.broadcast_to(key, length)  # one number in memory
        return Response(tokens, np.broadcast_to(np.float32(0), length), truncated)


# ---- Fake data and rewards ----


class _Prompts(Sequence[Prompt]):
    """Prompts of log-normal lengths."""

    def __init__(self, mean: float, longest: int, seed: int):
        rng, median = np.random.default_rng([seed, _PROBLEMS]), math.log(mean)
        median -= _PROMPT_SIGMA**2 / 2
        lengths = np.rint(rng.lognormal(median, _PROMPT_SIGMA, _PROBLEMS))
        self._lengths = np.clip(lengths, 1, longest).astype(int)

    def __len__(self) -> int:
        return _PROBLEMS

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: Any) -> Any:
        problem = Problem(f"problem {index}", "", "")
        return Prompt(problem, np.full(self._lengths[index], index, np.int32))


class _Tokenizer:
    """Decodes a response to the number that names it."""

    name_or_path = "simulated"

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        return str(ids[0])


class _Known(PendingVerdicts):
    def __init__(self, verdicts: list[Verdict]):
        self._verdicts = verdicts

    def wait(self, seconds: float) -> bool:
        return True

    def result(self) -> list[Verdict]:
        return self._verdicts


class _Judge(RewardPool):
    def __init__(self, samples: _Samples):
        self._samples = samples

    def submit(self, items: Sequence[RewardItem]) -> PendingVerdicts:
        return _Known([self._samples.verdict(int(item.text)) for item in items])

    def close(self) -> None:
        pass


class _NoGuard(Guard):
    """Takes over no signals."""

    def reach(self, place: str) -> None:
        pass


# ---- The simulation ----


def simulate(config: Config, machine: Machine, work: Workload) -> Schedule:
    """Samples `work.steps` rollout steps from the start of a run.

    Raises UnderfilledError where the groups of a step are too few, as a run does.
    """
    algo, slots = config.dapo, config.rollout.decode_slots
    samples = _Samples(work, algo.responses_per_prompt)
    engine = _SimulatedEngine(config, machine, samples)
    prompts = _Prompts(work.prompt_len, config.data.max_prompt_len, work.seed)
    mixture = Mixture(("simulated",), (_PROBLEMS,), (1.0,))
    policy = Policy(ModelConfig(), _Tokenizer(), ())
    tools = (policy, _Judge(samples), _NoGuard(None))
    reward, rollout = config.reward, config.rollout
    sampler = DynamicSampler(
        engine, prompts, mixture, *tools, algo, reward, rollout, seed=work.seed
    )
    buffer = DynamicSamplingBuffer(algo.prompts_per_step, algo.dynamic_sampling, algo.carry_surplus)
    state, steps = DrawState(keep_rate=work.kept), []
    for step in range(work.steps):
        engine.rollout_step, before = step, (len(engine.inserts), engine.moves)
        first, first_prefill = len(engine.segments), len(engine.prefills)
        drawn = sampler.draw({}, state, buffer.missing(), {})
        state = drawn.state
        buffer.add(drawn.groups, at_least=algo.prompts_per_step if algo.on_cap == "error" else 1)
        kept, counts = buffer.take()
        ages = age_metrics(kept, state.step)
        segments = np.array(engine.segments[first:]).reshape(-1, len(Segments._fields))
        decode_steps = int(segments[:, 1].sum())
        prefilled = sum(rows * width for _, rows, width in engine.prefills[first_prefill:])
        steps.append(
            StepSummary(
                rollout_step=step,
                decode_steps=decode_steps,
                live_share=float(segments[:, -1].sum()) / max(1, decode_steps * slots),
                prompts=drawn.draws,
                tokens=drawn.tokens,
                trained=len(kept),
                surplus=counts.surplus,
                open_groups=len(state.open),
                prefill_tokens=prefilled,
                suspended=drawn.suspended,
                inserts=len(engine.inserts) - before[0],
                moves=engine.moves - before[1],
                token_age_mean=ages["policy/token_age_mean"],
                token_age_max=int(ages["policy/token_age_max"]),
                versions_max=int(ages["policy/versions_max"]),
            )
        )
    columns = np.array(engine.segments).reshape(-1, len(Segments._fields)).T
    prefills, inserts = (
        np.array(rows, np.int64).reshape(-1, 3) for rows in (engine.prefills, engine.inserts)
    )
    tokens = engine.pages * engine.page
    return Schedule(slots, tokens, Segments(*columns), prefills, inserts, steps)


# ---- The benchmark ----


@dataclasses.dataclass(kw_only=True)
class ScheduleSizes:
    """Flags of `benchmark schedule`."""

    config: str = field("", "YAML config; neither its weights nor its data are read")
    set: tuple[str, ...] = field((), "override, as in `train`; may be repeated")
    shards: int = field(0, "row shards; 0: mesh.data x mesh.fsdp of the config", ge=0)
    lengths: str = field("", "of responses: lognormal:MEAN:SIGMA, MEAN tokens after truncation")
    lengths_from: str = field("", "instead: run folder, for its samples and share of kept groups")
    prompt_len: float = field(256.0, "mean prompt, tokens", ge=1)
    kept_fraction: float = field(0.5, "share of sampled groups that are informative", gt=0, le=1)
    steps: int = field(4, "rollout steps", ge=1)
    seed: int = field(0, "of lengths and verdicts", ge=0)


def benchmark_schedule(sizes: ScheduleSizes) -> Report:
    """The rollout scheduler on device programs that only count: decode steps and live slots.

    `ideal_decode_steps` are those of full slots. `shard_balance` is the live cache of the mean
    shard / of the fullest one.
    """
    if not sizes.config:
        raise InputError("--config: give a YAML config")
    jax.config.update("jax_platforms", "cpu")
    config = load_config(sizes.config, list(sizes.set))
    mesh = config.mesh
    shards = sizes.shards or mesh.data * mesh.fsdp
    if shards < 1:
        raise InputError("--shards: the config's mesh depends on the machine; give a number")
    given = sizes.lengths, sizes.lengths_from, config.rollout.max_response_len
    lengths, kept = lengths_and_kept(*given, sizes.kept_fraction)
    work = Workload(lengths, sizes.prompt_len, kept, sizes.steps, sizes.seed)
    try:
        schedule = simulate(config, Machine(shards), work)
    except ValueError as e:  # of the engine
        raise InputError(f"rollout: {e}") from None
    tokens = sum(step.tokens for step in schedule.steps)
    facts: dict[str, Any] = {
        "slots": schedule.slots,
        "row_shards": shards,
        "mean_response": lengths.mean,
        "kept": kept,
        "decode_steps_per_step": schedule.decode_steps,
        "ideal_decode_steps": tokens / schedule.slots / sizes.steps,
        "live_share_of_slots": schedule.live_share,
        "live_share_of_cache": schedule.cache_share,
        "shard_balance": schedule.shard_balance,
    }
    return [step._asdict() for step in schedule.steps], facts
