"""Speed of sampling around the model, with imposed lengths and verdicts.

    python tests/measure_sampling.py draw     sampling of a DAPO step: streaming, or whole batches
    python tests/measure_sampling.py host     host work of a step: fetch, decode, judge, pack

As `dapo_jax.benchmark`: a table, and one JSON object as the last line.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import time
import types
import zlib
from collections import defaultdict
from concurrent.futures import Future
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dapo_jax.benchmark.measure import (
    ModelSizes,
    device,
    random_model,
    run_benchmark,
    speed,
    time_in_turn,
)
from dapo_jax.benchmark.rollout import rollout_engine
from dapo_jax.cli import run
from dapo_jax.config import (
    Config,
    DapoSection,
    ModelConfig,
    RewardSection,
    RolloutSection,
    TrainSection,
)
from dapo_jax.config.schema import STRICT, field
from dapo_jax.data.mixture import Mixture
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import load_tokenizer
from dapo_jax.reward.pool import PendingVerdicts, RewardItem, RewardPool
from dapo_jax.rollout.engine import Programs
from dapo_jax.rollout.sampler import Arrivals, SamplerState, Slots
from dapo_jax.runtime import multihost
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.runtime.metrics import process_memory
from dapo_jax.training import dynamic_sampling
from dapo_jax.training.dynamic_sampling import DrawState, DynamicSampler
from dapo_jax.training.setup import Policy, batch_shape
from dapo_jax.training.step import minibatches
from dapo_jax.types import InputError, Problem, Prompt, Request, Verdict

MEDIAN = "of log-normal lengths, before they are clipped"
SIGMA = "of the logarithm of the lengths"
BATCH = 3  # prompts of a generation batch over groups wanted, as in the paper's recipe


@dataclasses.dataclass(kw_only=True)
class DrawSizes(ModelSizes):
    slots: int = field(16, "sequences decoded at a time", ge=1)
    groups: int = field(16, "informative groups wanted", ge=1)
    group: int = field(8, "responses of a group", ge=1)
    median: int = field(21, MEDIAN, ge=1)
    sigma: float = field(1.0, SIGMA, gt=0, le=9)
    keep_rate: float = field(1 / 3, "share of informative groups", ge=1e-2, le=1)


@dataclasses.dataclass(kw_only=True)
class HostSizes:
    __pydantic_config__ = STRICT
    processes: int = field(32, "in the job", ge=1)
    responses: int = field(16384, "of the step; half of them are packed", ge=1)
    group: int = field(16, "responses of a group", ge=1)
    slots: int = field(1408, "sequences decoded at a time", ge=1)
    prompt_len: int = field(256, "tokens of a prompt", ge=1)
    max_response_len: int = field(20480, "tokens of the longest response", ge=1)
    median: int = field(3300, MEDIAN, ge=1)
    sigma: float = field(1.0, SIGMA, gt=0, le=9)
    tokenizer: str = field("", "folder of a Hugging Face model; none: bytes")


def draw_groups(stream, prompts, pool, guard, config, policy, missing, keep_rate):
    engine = types.SimpleNamespace(stream=lambda params, key: stream)
    mixture = Mixture(("imposed",), (len(prompts),), (1.0,))
    sections = (config.dapo, config.reward, config.rollout, config.seed)
    sampler = DynamicSampler(engine, prompts, mixture, policy, pool, guard, *sections)
    return sampler.draw({}, DrawState(keep_rate=keep_rate), missing, defaultdict(float))


# ---- draw ----------------------------------------------------------------------------------------


def seeded(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def response_len(sizes, draw, sample):
    """Length to impose on a response: log-normal, clipped; the same whoever samples it."""
    drawn = seeded(draw, sample).lognormal(math.log(sizes.median), sizes.sigma)
    return int(np.clip(round(drawn), 1, sizes.max_response_len))


class ImposedVerdicts(RewardPool):
    """Makes a share of the groups informative: only their first response to end is correct."""

    def __init__(self, keep_rate):
        super().__init__(RewardSection())
        self._keep_rate, self._seen = keep_rate, set()

    def submit(self, items):
        pending = PendingVerdicts([Future() for _ in items])
        for place, item in enumerate(items):
            key = item.problem.id
            correct = key not in self._seen and seeded(key).random() < self._keep_rate
            self._seen.add(key)
            pending.futures[place].set_result(Verdict(correct, 1.0 if correct else -1.0))
        return pending


def imposed(submit, limit):
    """`Stream.submit` with responses that end at limit(draw, sample)."""
    return lambda requests: submit([r._replace(limit=limit(r.draw, r.sample)) for r in requests])


def streaming(sizes, model, engine, params, prompts, config, counts):
    stream, tokenizer = engine.stream(params, jax.random.key(1)), load_tokenizer(None)
    stream.submit = imposed(stream.submit, functools.partial(response_len, sizes))
    policy, pool = (
        Policy(model, tokenizer, (tokenizer.eos_token_id,)),
        ImposedVerdicts(sizes.keep_rate),
    )
    drawn = draw_groups(
        stream, prompts, pool, Guard(None), config, policy, sizes.groups, sizes.keep_rate
    )
    kept = [g for g in drawn.groups if 0 < g.correct.sum() < sizes.group][: sizes.groups]
    tokens = sum(len(r.tokens) for g in kept for r in g.responses)
    counts |= {"kept": len(kept), "tokens": tokens, "prompts": len(drawn.groups)}
    counts["decode_steps"] = stream.steps


def generate_then_filter(sizes, engine, params, prompts, counts):
    """Generation batches of three times the groups wanted, in lock-step batches of all slots, until
    enough are informative.
    """
    pool, cursor, drawn, steps = ImposedVerdicts(sizes.keep_rate), Cursor(), 0, 0
    kept = []  # tokens of each informative group
    while len(kept) < sizes.groups:
        indices, cursor = advance(cursor, len(prompts), BATCH * sizes.groups, seed=0)
        requests = [
            Request(drawn + n, s, prompts[i].tokens, limit=response_len(sizes, drawn + n, s))
            for n, i in enumerate(indices)
            for s in range(sizes.group)
        ]
        ended = []
        for at in range(0, len(requests), sizes.slots):
            stream = engine.stream(params, jax.random.key(1))
            stream.submit(requests[at : at + sizes.slots])
            while stream.live or stream.pending:
                ended += stream.advance()
            steps += stream.steps
            stream.close()
        ended.sort(key=lambda item: (item[0].draw, item[0].sample))
        problems = [prompts[indices[r.draw - drawn]].problem for r, _ in ended]
        lengths = [len(response.tokens) for _, response in ended]
        verdicts = pool.submit(
            [RewardItem(p, "", n) for p, n in zip(problems, lengths, strict=True)]
        ).result()
        for at in range(0, len(ended), sizes.group):
            own = slice(at, at + sizes.group)
            if 0 < sum(v.correct for v in verdicts[own]) < sizes.group:
                kept.append(sum(lengths[own]))
        drawn += len(indices)
    tokens = sum(kept[: sizes.groups])
    counts |= {"kept": sizes.groups, "tokens": tokens, "prompts": drawn, "decode_steps": steps}


def measure_draw(sizes):
    """The sampling of one DAPO step, lengths and outcomes imposed.

    `streaming` is what training does; `generate_then_filter` samples whole generation batches of
    three times the groups wanted, in lock-step, until enough are informative. Tokens are those of
    kept groups, which are the same for both.
    """
    if sizes.group < 2:
        raise InputError(
            f"--group: a group needs at least 2 responses, got {sizes.group}; raise it"
        )
    model, mesh, params = random_model(sizes, "slots")
    batch, wanted = sizes.groups * sizes.group, BATCH * sizes.groups
    config = dataclasses.replace(
        Config(),
        dapo=DapoSection(sizes.groups, sizes.group, batch, prompts_per_draw=wanted),
        rollout=RolloutSection(max_response_len=sizes.max_response_len, decode_slots=sizes.slots),
        reward=RewardSection(overlong_buffer_len=0),
    )
    weights = publisher(params, mesh, sizes.dtype)(params)
    shape = (10 * wanted, sizes.prompt_len)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab, shape, np.int32)
    prompts = [Prompt(Problem(str(i), "", ""), row) for i, row in enumerate(tokens)]
    lockstep = rollout_engine(sizes, model, mesh, compact=False)
    engine = rollout_engine(sizes, model, mesh)
    counts = {"generate_then_filter": {}, "streaming": {}}
    runs = {
        "generate_then_filter": functools.partial(
            generate_then_filter, sizes, lockstep, weights, prompts
        ),
        "streaming": functools.partial(streaming, sizes, model, engine, weights, prompts, config),
    }
    calls = {name: functools.partial(run, counts[name]) for name, run in runs.items()}
    times = time_in_turn(calls, sizes.repeats)
    modes = {
        name: speed(count["tokens"], times[name], "kept_tokens") | count
        for name, count in counts.items()
    }
    ratio = modes["generate_then_filter"]["cpu_seconds"] / modes["streaming"]["cpu_seconds"]
    result = {"modes": modes, "generate_then_filter/streaming_cpu_seconds": ratio}
    return [{"mode": name, **mode} for name, mode in modes.items()], result | device()


# ---- host ----------------------------------------------------------------------------------------


class FakePrograms:
    """Stands in for the engine's programs on one device: responses of given lengths, of random
    tokens that are there from the start.
    """

    def __init__(self, sizes, engine, ids):
        shape = (1, sizes.slots, engine.blocks * engine.block)
        tokens = jnp.asarray(np.random.default_rng(1).choice(ids, shape).astype(np.int32))
        unused = dict.fromkeys(Slots._fields)
        slots = Slots(**unused | {"tokens": tokens, "logprobs": -jnp.ones(shape)})
        self._state = SamplerState(None, slots)
        self._left, self._length = np.zeros((2, sizes.slots), np.int64)
        engine.programs = Programs(
            start=lambda: self._state,
            prefill=lambda *args: None,
            insert=self._insert,
            move=self._move,
            decode=self._decode,
            take=engine.programs.take,
        )

    def _insert(self, state, cache, seed, packed, copies, count):
        new = Arrivals(*(x[packed[0, 0] < packed.shape[2]] for x in packed[:, 0]))
        self._left[new.slot], self._length[new.slot] = new.limit, 0
        return state

    def _move(self, state, moves):
        source, target = moves[:, 0, moves[0, 0] < moves.shape[2]]
        for array in (self._left, self._length):
            array[target], array[source] = array[source], 0
        return state

    def _decode(self, params, state, table, until, *, width):
        left = np.sort(self._left[self._left > 0])[::-1]
        stay = max(
            int(until.few), int(until.half)
        )  # sequences live at most when the segment ends early
        steps = min(int(until.max_steps), int(left[stay])) if stay < len(left) else 0
        self._length += np.minimum(self._left, steps)
        self._left = np.maximum(self._left - steps, 0)
        live = self._left > 0
        flags = np.stack([live, self._length, ~live])[:, None].astype(np.int32)
        return state, flags, np.int32(steps)


@contextlib.contextmanager
def one_of(processes):
    """The first of so many processes, all others of which hold what it holds; communication takes
    no time.
    """

    def gather_shares(own, total, before=0):  # the others' shares may be longer than this one's
        return [*itertools.islice(itertools.cycle(own or [(False, 0.0, None, False)]), total)]

    def gather(tree, tiled=False):
        return jax.tree.map(lambda x: np.stack([np.asarray(x)] * processes), tree)

    with (
        mock.patch.object(jax, "process_count", lambda: processes),
        mock.patch.object(multihost_utils, "process_allgather", gather),
        mock.patch.object(multihost, "gather_shares", gather_shares),
    ):
        yield


class Clock:
    """Wall and processor seconds of functions, and how often they were called."""

    def __init__(self, *parts):
        self.parts = {part: {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0} for part in parts}

    def __call__(self, part, function):
        spent = self.parts[part]

        def timed(*args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent["seconds"] += time.perf_counter() - wall
                spent["cpu_seconds"] += time.process_time() - cpu
                spent["calls"] += 1

        return timed


def host_config(sizes, groups):
    update = min(512, sizes.responses)
    return dataclasses.replace(
        Config(),
        dapo=DapoSection(groups, sizes.group, update, dynamic_sampling=False),
        data=dataclasses.replace(Config().data, max_prompt_len=sizes.prompt_len),
        rollout=RolloutSection(max_response_len=sizes.max_response_len, decode_slots=sizes.slots),
        reward=RewardSection(overlong_buffer_len=sizes.max_response_len // 5),
        train=TrainSection(rows_per_microbatch=32),
    )


def measure_host(sizes):
    """What one of `--processes` processes does in a rollout step apart from waiting for devices.

    Lengths are log-normal, and there is no model. It `fetch`es responses from the device, decodes
    and judges (strict) its share of them, forms groups, and packs half of the groups into
    mini-batches of 512 responses. `group` is all host work of sampling but the first three.
    """
    tokenizer = load_tokenizer(sizes.tokenizer or None)
    stop = (tokenizer.eos_token_id,)
    ids = np.setdiff1d(sorted(tokenizer.get_vocab().values()), [*tokenizer.all_special_ids, *stop])
    model = ModelConfig("llama", int(ids.max()) + 1, 2, 1, 1, 1, 2, 2)
    groups, clock, fetched = (
        sizes.responses // sizes.group,
        Clock("fetch", "decode", "judge", "group", "pack"),
        [0],
    )
    config = host_config(sizes, groups)
    drawn = np.random.default_rng(0).lognormal(math.log(sizes.median), sizes.sigma, sizes.responses)
    lengths = np.clip(drawn.round(), 1, sizes.max_response_len).astype(int).tolist()

    def fetch(tree):
        found = jax.device_get(tree)
        fetched[0] += sum(leaf.nbytes for leaf in jax.tree.leaves(found))
        return found

    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    engine = rollout_engine(sizes, model, mesh)
    engine.fetch = clock("fetch", fetch)
    FakePrograms(sizes, engine, ids)
    stream = engine.stream({}, jax.random.key(0))
    stream.submit = imposed(stream.submit, lambda draw, n: lengths[draw * sizes.group + n])
    tokens = np.random.default_rng(2).choice(ids, (groups, sizes.prompt_len)).astype(np.int32)
    prompts = [Prompt(Problem(str(i), "", "1"), row) for i, row in enumerate(tokens)]
    decode = clock("decode", dynamic_sampling.decode)
    with (
        RewardPool(config.reward) as pool,
        Guard(None) as guard,
        one_of(sizes.processes),
        mock.patch.object(dynamic_sampling, "decode", decode),
        mock.patch.object(pool, "submit", clock("judge", pool.submit)),
    ):
        drawn = clock("group", draw_groups)(
            stream, prompts, pool, guard, config, Policy(model, tokenizer, stop), groups, 1.0
        )
    for part in ("fetch", "decode", "judge"):
        for key in ("seconds", "cpu_seconds"):
            clock.parts["group"][key] -= clock.parts[part][key]
    batches = minibatches(
        drawn.groups[: max(1, groups // 2)], config.dapo, batch_shape(config, mesh)
    )
    while clock("pack", next)(batches, None) is not None:
        pass
    result = {
        "parts": clock.parts,
        "seconds": sum(part["seconds"] for part in clock.parts.values()),
        "cpu_seconds": sum(part["cpu_seconds"] for part in clock.parts.values()),
        "tokens": drawn.tokens,
        "segments": stream.segment,
        "fetched_bytes": fetched[0],
        "peak_bytes": process_memory("VmHWM"),
    }
    return [{"part": name, **part} for name, part in clock.parts.items()], result | device()


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    benchmarks = {"draw": (measure_draw, DrawSizes()), "host": (measure_host, HostSizes())}
    return run_benchmark(parser, benchmarks, argv)


if __name__ == "__main__":
    run(main)
