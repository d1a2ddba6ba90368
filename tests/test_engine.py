"""Requests into slots and back: order, independence of what runs beside them and on which devices, one compilation."""

import logging
import re

import jax
import numpy as np
import pytest
import tiny

from dapo_jax.config import MeshSection
from dapo_jax.model.decoder import abstract_params
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import make_mesh, publisher, put
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Request

MODEL = tiny.model()
PROMPT, RESPONSE = 5, 70  # longer than the 64 decode steps of one call
STOP = (3, 4)
SEED = jax.random.key(7)
RNG = np.random.default_rng(0)
REQUESTS = [Request(i // 2, i % 2, RNG.integers(5, 40, 1 + i % PROMPT).astype(np.int32)) for i in range(11)]


def make_engine(slots, layout):
    """An engine, and the weights as it wants them."""
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    sizes = {"slots": slots, "max_prompt_len": PROMPT, "max_response_len": RESPONSE}
    engine = Engine(MODEL, Sampling(1.0, 0.95), STOP, **sizes, mesh=mesh, put=put, fetch=fetch)
    return engine, publisher(abstract_params(MODEL), mesh, "float32")(tiny.params(MODEL))


@pytest.fixture(scope="module")
def single():
    return make_engine(4, (1, 1, 1))


@pytest.fixture(scope="module")
def responses(single):
    """To eleven requests, through four slots on one device: three batches, the last with an empty slot."""
    return single[0].generate(single[1], REQUESTS, SEED)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.truncated == b.truncated
        np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=1e-5)


def test_responses_end_with_a_stop_token_or_at_the_limit(responses):
    assert len(responses) == len(REQUESTS)
    for r in responses:
        assert r.tokens.dtype == np.int32 and r.behavior_logprobs.dtype == np.float32
        assert 1 <= len(r.tokens) == len(r.behavior_logprobs) <= RESPONSE
        assert not np.isin(r.tokens[:-1], STOP).any()
        assert np.isin(r.tokens[-1], STOP) != r.truncated
        assert not r.truncated or len(r.tokens) == RESPONSE
        assert (r.behavior_logprobs < 0).all()
    assert {r.truncated for r in responses} == {True, False} and len({len(r.tokens) for r in responses}) > 3


def test_log_probs_and_order_are_those_of_teacher_forcing(responses):
    """Each response continues its own request's prompt. Measured: within 1e-6."""
    rows = np.zeros((len(REQUESTS), PROMPT + RESPONSE), np.int32)
    for row, request, r in zip(rows, REQUESTS, responses, strict=True):
        sequence = np.concatenate([request.prompt, r.tokens])
        row[: sequence.size] = sequence
    forced = np.asarray(tiny.plain_logprobs(tiny.params(MODEL), MODEL, rows))
    worst = 0
    for row, request, r in zip(forced, REQUESTS, responses, strict=True):
        start = len(request.prompt)
        worst = max(worst, np.abs(row[start : start + len(r.tokens)] - r.behavior_logprobs).max())
    assert worst < 1e-5


def test_a_response_does_not_depend_on_its_slot_or_on_its_neighbours(single, responses):
    order = np.random.default_rng(1).permutation(len(REQUESTS))
    engine, params = single
    assert_same(engine.generate(params, [REQUESTS[i] for i in order], SEED), [responses[i] for i in order])
    assert_same(engine.generate(params, REQUESTS[6:7], SEED), responses[6:7])


def test_draw_sample_and_seed_each_change_the_noise(single):
    prompt = np.array([7, 8], np.int32)
    engine, params = single
    of_one_seed = engine.generate(
        params, [Request(0, 0, prompt), Request(1, 0, prompt), Request(0, 1, prompt), Request(0, 0, prompt)], SEED
    )
    other_seed = engine.generate(params, [Request(0, 0, prompt)], jax.random.key(8))
    texts = [tuple(r.tokens.tolist()) for r in of_one_seed + other_seed]
    assert len(set(texts)) == 4 and texts[0] == texts[3]


def test_on_done_is_told_of_every_response_once(single, responses):
    done = []
    single[0].generate(single[1], REQUESTS, SEED, done.append)
    assert sum(done) == len(REQUESTS) and min(done) >= 0
    assert len(done) > 3  # more often than once a batch


def test_no_requests_no_responses(single):
    assert single[0].generate(single[1], [], SEED) == []


def test_on_a_mesh_with_more_slots_responses_are_the_same_and_each_program_is_compiled_once(responses, caplog):
    """Eight slots over four row shards, heads over two devices."""
    engine, params = make_engine(8, (2, 2, 2))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        first = engine.generate(params, REQUESTS, SEED)
        compiled = re.findall(r"Finished XLA compilation of jit\((start|decode)\)", caplog.text)
        caplog.clear()
        second = engine.generate(params, REQUESTS[:3], SEED)
        engine.generate(params, REQUESTS[3:], jax.random.key(1))
        assert "XLA compilation" not in caplog.text
    assert sorted(compiled) == ["decode", "start"]
    assert_same(first, responses)
    assert_same(second, responses[:3])
