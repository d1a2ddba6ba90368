"""Dynamic sampling: drawing while decoding goes on, against generating whole batches of prompts and
filtering them.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark.measure import Sizes, device, random_model, report, speed, timed
from dapo_jax.config import Config, DapoSection, ModelConfig, RewardSection, RolloutSection
from dapo_jax.data.mixture import Mixture
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import load_tokenizer
from dapo_jax.reward.pool import PendingVerdicts, RewardItem, RewardPool
from dapo_jax.rollout.engine import Engine, Stream
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.training.dynamic_sampling import draw_groups
from dapo_jax.training.setup import Policy
from dapo_jax.types import InputError, Params, Problem, Prompt, Request, Verdict

_BATCH = 3  # prompts of a generation batch over groups wanted, as in the paper's recipe


def _random(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def response_len(sizes: Sizes, draw: int, sample: int) -> int:
    """Length to impose on a response: log-normal, cut; the same whoever draws it."""
    drawn = _random(draw, sample).lognormal(math.log(sizes.median), sizes.sigma)
    return int(np.clip(round(drawn), 1, sizes.max_response_len))


class ImposedLengths:
    """A stream whose responses end where `response_len` says."""

    def __init__(self, stream: Stream, sizes: Sizes):
        self._stream, self._sizes = stream, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def submit(self, requests: Sequence[Request]) -> None:
        self._stream.submit(
            [r._replace(limit=response_len(self._sizes, r.draw, r.sample)) for r in requests]
        )


class ImposedVerdicts(RewardPool):
    """Finds a share of the groups informative: their first response to end is right, all others are
    wrong.
    """

    def __init__(self, keep_rate: float):
        super().__init__(RewardSection())
        self._keep_rate = keep_rate
        self._seen: set[str] = set()

    def submit(self, items: Sequence[RewardItem]) -> PendingVerdicts:
        pending = PendingVerdicts(len(items))
        for place, item in enumerate(items):
            right = (
                item.problem.id not in self._seen
                and _random(item.problem.id).random() < self._keep_rate
            )
            self._seen.add(item.problem.id)
            pending.settle(place, Verdict(right, 1.0 if right else -1.0))
        return pending


def _streaming(
    sizes: Sizes,
    model: ModelConfig,
    engine: Engine,
    params: Params,
    prompts: Sequence[Prompt],
    config: Config,
    counts: dict[str, int],
) -> None:
    stream = engine.stream(params, jax.random.key(1))
    tokenizer = load_tokenizer(None)
    drawn = draw_groups(
        ImposedLengths(stream, sizes),  # type: ignore[arg-type]
        prompts,
        missing=sizes.groups,
        keep_rate=sizes.keep_rate,
        first_draw=0,
        left_open=[],
        cursor=Cursor(),
        mixture=Mixture(("imposed",), (len(prompts),), (1.0,)),
        config=config,
        policy=Policy(model, tokenizer, (tokenizer.eos_token_id,)),
        pool=ImposedVerdicts(sizes.keep_rate),
        guard=Guard(None),
        times={},
        on_done=lambda ended, drawn: None,
    )
    kept = [g for g in drawn.groups if 0 < g.correct.sum() < sizes.group][: sizes.groups]
    counts |= {
        "kept": len(kept),
        "tokens": sum(len(r.tokens) for g in kept for r in g.responses),
        "prompts": len(drawn.groups),
    }
    counts["decode_steps"] = stream.steps


def _generate_then_filter(
    sizes: Sizes, engine: Engine, params: Params, prompts: Sequence[Prompt], counts: dict[str, int]
) -> None:
    """Generation batches of three times the groups wanted, in lock-step batches of all slots, until
    enough are informative.
    """
    pool, cursor, drawn, steps = ImposedVerdicts(sizes.keep_rate), Cursor(), 0, 0
    kept: list[int] = []  # tokens of each informative group
    while len(kept) < sizes.groups:
        indices, cursor = advance(cursor, len(prompts), _BATCH * sizes.groups, seed=0)
        chosen = [prompts[i] for i in indices]
        requests = [
            Request(drawn + n, sample, prompt.tokens, limit=response_len(sizes, drawn + n, sample))
            for n, prompt in enumerate(chosen)
            for sample in range(sizes.group)
        ]
        responses = []
        for at in range(0, len(requests), sizes.slots):
            stream = engine.stream(params, jax.random.key(1))
            stream.submit(requests[at : at + sizes.slots])
            while stream.live or stream.pending:
                responses += stream.advance()
            steps += stream.steps
            stream.close()
        ended = sorted(responses, key=lambda item: (item[0].draw, item[0].sample))
        verdicts = pool.submit(
            [RewardItem(chosen[r.draw - drawn].problem, "", len(a.tokens)) for r, a in ended]
        ).result()
        for n in range(len(chosen)):
            own = slice(n * sizes.group, (n + 1) * sizes.group)
            if 0 < sum(v.correct for v in verdicts[own]) < sizes.group:
                kept.append(sum(len(a.tokens) for _, a in ended[own]))
        drawn += len(chosen)
    counts |= {
        "kept": sizes.groups,
        "tokens": sum(kept[: sizes.groups]),
        "prompts": drawn,
        "decode_steps": steps,
    }


def benchmark_draw(sizes: Sizes) -> dict[str, Any]:
    """The sampling of one DAPO step, lengths and outcomes imposed: `streaming` is what training
    does, `generate_then_filter` draws whole generation batches of three times the groups wanted, in
    lock-step, until enough are informative. Tokens are those of kept groups, which are the same for
    both.
    """
    if sizes.group < 2:
        raise InputError(
            f"--group: a group needs at least 2 responses, got {sizes.group}; raise it"
        )
    model, mesh, params = random_model(sizes, "--slots", sizes.slots)
    config = dataclasses.replace(
        Config(),
        dapo=DapoSection(
            prompts_per_step=sizes.groups,
            responses_per_prompt=sizes.group,
            responses_per_update=sizes.groups * sizes.group,
            prompts_per_draw=_BATCH * sizes.groups,
        ),
        rollout=RolloutSection(max_response_len=sizes.max_response_len, decode_slots=sizes.slots),
        reward=RewardSection(overlong_buffer_len=0),
    )
    limits = {
        "slots": sizes.slots,
        "max_prompt_len": sizes.prompt_len,
        "max_response_len": sizes.max_response_len,
    }
    make = functools.partial(
        Engine,
        model,
        Sampling(),
        (),
        **limits,
        mesh=mesh,
        fetch=fetch,
        prefill_tokens=prefill_tokens(mesh),
    )
    weights = publisher(params, mesh, sizes.dtype)(params)
    tokens = np.random.default_rng(0).integers(
        0, sizes.vocab, (10 * _BATCH * sizes.groups, sizes.prompt_len), np.int32
    )
    prompts = [Prompt(Problem(str(i), "", ""), row) for i, row in enumerate(tokens)]
    counts: dict[str, dict[str, int]] = {"generate_then_filter": {}, "streaming": {}}
    runs = {
        "generate_then_filter": functools.partial(
            _generate_then_filter, sizes, make(compact=False), weights, prompts
        ),
        "streaming": functools.partial(_streaming, sizes, model, make(), weights, prompts, config),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(sizes.repeats + 1):
        for name, run in runs.items():
            taken = timed(functools.partial(run, counts[name]))
            if repeat:  # the first compiles
                times[name].append(taken)
    modes = {
        name: speed(counts[name]["tokens"], times[name], "kept_tokens") | counts[name]
        for name in runs
    }
    ratio = modes["generate_then_filter"]["cpu_seconds"] / modes["streaming"]["cpu_seconds"]
    table = [{"mode": name, **mode} for name, mode in modes.items()]
    return report(
        sizes,
        table,
        {"modes": modes, "generate_then_filter/streaming_cpu_seconds": ratio},
        device(),
    )
