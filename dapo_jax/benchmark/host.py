"""Host work of one rollout step, without a model: fetch, decode, judge, group and pack, on one
process of a job of several.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dapo_jax.benchmark.measure import Sizes, device, report
from dapo_jax.config import (
    Config,
    DapoSection,
    ModelConfig,
    RewardSection,
    RolloutSection,
    TrainSection,
)
from dapo_jax.data.mixture import Mixture
from dapo_jax.data.problems import Cursor
from dapo_jax.data.prompts import load_tokenizer
from dapo_jax.reward.pool import RewardPool
from dapo_jax.rollout.engine import Engine, Programs
from dapo_jax.rollout.sampler import Arrivals, SamplerState, Sampling, Slots
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.runtime.metrics import process_memory
from dapo_jax.train import minibatches
from dapo_jax.training import dynamic_sampling
from dapo_jax.training.setup import Policy
from dapo_jax.types import Problem, Prompt, Request

_PARTS = ("fetch", "decode", "judge", "group", "pack")
_UPDATE = 512  # responses of a mini-batch
_ROWS = 32  # of a micro-batch


class _Imposed:
    """Stands in for the engine's programs on one device: responses of given lengths, of random
    tokens that are there from the start.
    """

    def __init__(self, sizes: Sizes, engine: Engine, ids: np.ndarray):
        drawn = np.random.default_rng(0).lognormal(
            math.log(sizes.median), sizes.sigma, sizes.responses
        )
        self.lengths = np.clip(drawn.round(), 1, sizes.max_response_len).astype(int)
        shape = (1, sizes.slots, engine.blocks * engine.block)
        tokens = jnp.asarray(np.random.default_rng(1).choice(ids, shape).astype(np.int32))
        unused = dict.fromkeys(Slots._fields)
        self._state = SamplerState(
            None,  # type: ignore[arg-type]
            Slots(**unused | {"tokens": tokens, "logprobs": -jnp.ones(shape)}),
        )
        self._left, self._length = np.zeros((2, sizes.slots), np.int64)
        self._sizes = sizes
        none = functools.partial(lambda result, *args: result, None)
        engine.programs = Programs(
            lambda: self._state, none, self._insert, self._move, self._decode, engine.programs.take
        )

    def limit(self, request: Request) -> Request:
        return request._replace(
            limit=int(self.lengths[request.draw * self._sizes.group + request.sample])
        )

    def _insert(
        self, state: SamplerState, cache: None, seed: Any, packed: np.ndarray, count: int
    ) -> SamplerState:
        new = Arrivals(*packed[:, 0, :count])
        self._left[new.slot], self._length[new.slot] = new.limit, 0
        return state

    def _move(self, state: SamplerState, moves: np.ndarray, count: int) -> SamplerState:
        source, target = moves[:, 0, :count]
        for array in (self._left, self._length):
            array[target], array[source] = array[source], 0
        return state

    def _decode(
        self,
        params: None,
        state: SamplerState,
        few: int,
        half: int,
        most: int,
        *,
        width: int,
        read: int,
    ) -> tuple[Any, ...]:
        left = np.sort(self._left[self._left > 0])[::-1]
        stay = max(
            int(few), int(half)
        )  # sequences that are live at most when the segment ends early
        steps = min(int(most), int(left[stay])) if stay < len(left) else 0
        self._length += np.minimum(self._left, steps)
        self._left = np.maximum(self._left - steps, 0)
        live = self._left > 0
        return (
            state,
            np.stack([live, self._length, ~live])[:, None].astype(np.int32),
            np.int32(steps),
        )


@contextlib.contextmanager
def _one_of(processes: int) -> Iterator[None]:
    """The first of so many processes, the others of which say what it says; what passes between
    them takes no time.
    """

    def gather(tree: Any, tiled: bool = False) -> Any:
        return jax.tree.map(lambda x: np.stack([np.asarray(x)] * processes), tree)

    with (
        mock.patch.object(jax, "process_count", lambda: processes),
        mock.patch.object(multihost_utils, "process_allgather", gather),
    ):
        yield


class _Clock:
    """Wall and processor seconds of functions, and how often they were called."""

    def __init__(self) -> None:
        self.parts = {part: {"seconds": 0.0, "cpu_seconds": 0.0, "calls": 0} for part in _PARTS}

    def __call__(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "calls": 1,
                }
                self.parts[part] = {
                    key: self.parts[part][key] + value for key, value in spent.items()
                }

        return timed


def benchmark_host(sizes: Sizes) -> dict[str, Any]:
    """What one of `--processes` processes does in a rollout step beside waiting for devices,
    lengths log-normal and no model: `fetch`es responses from the device, decodes and judges
    (strict) its share of them, puts them into groups, and packs half of the groups into
    mini-batches of 512 responses. `group` is all that sampling does on the host but the first
    three.
    """
    tokenizer = load_tokenizer(sizes.tokenizer)
    stop = (tokenizer.eos_token_id,)
    ids = np.setdiff1d(sorted(tokenizer.get_vocab().values()), [*tokenizer.all_special_ids, *stop])
    model = ModelConfig("llama", int(ids.max()) + 1, 2, 1, 1, 1, 2, 2)
    groups, clock, fetched = sizes.responses // sizes.group, _Clock(), [0]
    config = dataclasses.replace(
        Config(),
        dapo=DapoSection(
            groups, sizes.group, min(_UPDATE, sizes.responses), dynamic_sampling=False
        ),
        data=dataclasses.replace(Config().data, max_prompt_len=sizes.prompt_len),
        rollout=RolloutSection(max_response_len=sizes.max_response_len, decode_slots=sizes.slots),
        reward=RewardSection(overlong_buffer_len=sizes.max_response_len // 5),
        train=TrainSection(rows_per_microbatch=_ROWS),
    )

    def fetch(tree: Any) -> Any:
        found = jax.device_get(tree)
        fetched[0] += sum(leaf.nbytes for leaf in jax.tree.leaves(found))
        return found

    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    limits = {
        "slots": sizes.slots,
        "max_prompt_len": sizes.prompt_len,
        "max_response_len": sizes.max_response_len,
    }
    engine = Engine(model, Sampling(), stop, **limits, mesh=mesh, fetch=clock("fetch", fetch))
    imposed = _Imposed(sizes, engine, ids)
    stream = engine.stream({}, jax.random.key(0))
    submit = stream.submit
    tokens = np.random.default_rng(2).choice(ids, (groups, sizes.prompt_len)).astype(np.int32)
    prompts = [Prompt(Problem(str(i), "", "1"), row) for i, row in enumerate(tokens)]
    draw = functools.partial(
        dynamic_sampling.draw_groups,
        prompts=prompts,
        missing=groups,
        keep_rate=1.0,
        first_draw=0,
        left_open=(),
        cursor=Cursor(),
        mixture=Mixture(("imposed",), (groups,), (1.0,)),
        config=config,
        policy=Policy(model, tokenizer, stop),
        times=defaultdict(float),
        on_done=lambda ended, drawn: None,
    )
    with RewardPool(config.reward) as pool, Guard(None) as guard, _one_of(sizes.processes):
        with (
            mock.patch.object(dynamic_sampling, "decode", clock("decode", dynamic_sampling.decode)),
            mock.patch.object(pool, "submit", clock("judge", pool.submit)),
            mock.patch.object(
                stream, "submit", lambda requests: submit([imposed.limit(r) for r in requests])
            ),
        ):
            drawn = clock("group", draw)(stream, pool=pool, guard=guard)
    for part in ("fetch", "decode", "judge"):
        for key in ("seconds", "cpu_seconds"):
            clock.parts["group"][key] -= clock.parts[part][key]
    batches = minibatches(drawn.groups[: max(1, groups // 2)], config, 1)
    while clock("pack", next)(batches, None) is not None:
        pass
    total = {
        key: sum(part[key] for part in clock.parts.values()) for key in ("seconds", "cpu_seconds")
    }
    table = [{"part": name, **part} for name, part in clock.parts.items()]
    counts = {
        "tokens": drawn.tokens,
        "segments": stream.segment,
        "fetched_bytes": fetched[0],
        "peak_bytes": process_memory("VmHWM"),
    }
    return report(sizes, table, {"parts": clock.parts, **total, **counts}, device())
