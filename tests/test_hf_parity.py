"""The decoder against transformers, on the tiny models of goldens/make_hf_goldens.py."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from dapo_jax.config import MeshSection, Windows
from dapo_jax.dapo.loss import batch_logprobs
from dapo_jax.dapo.packing import TrainItem, build_batch, gather_targets
from dapo_jax.model.decoder import abstract_params, apply
from dapo_jax.model.weights import load_pretrained
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Request

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")

compiled = jax.jit(apply, static_argnames="config")


def logits_of(config, params, tokens, positions, segment_ids):
    """The decoder's logits, by way of [3, 24] rows: one compilation a model."""

    def fill(x):
        return np.pad(
            np.asarray(x, np.int32), [(0, 3 - tokens.shape[0]), (0, 24 - tokens.shape[1])]
        )

    logits = np.asarray(compiled(params, config, fill(tokens), fill(positions), fill(segment_ids)))
    return logits[: tokens.shape[0], : tokens.shape[1]]


def unpacked(config, params, tokens):
    """Logits of rows that are one sequence each."""
    return logits_of(
        config,
        params,
        tokens,
        np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        np.ones_like(tokens),
    )


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    """config, parameters, and what transformers answered."""
    config, params = load_pretrained(GOLDENS / request.param)
    with np.load(GOLDENS / request.param / "golden.npz") as stored:
        return config, params, dict(stored)


def assert_same_logits(found, expected):
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_family_is_covered():
    configs = [load_pretrained(GOLDENS / name)[0] for name in NAMES]
    assert {(c.family, c.tie_embeddings) for c in configs} == {
        (f, t) for f in FAMILIES for t in (True, False)
    }
    assert any(c.rope_scaling for c in configs)
    windowed = [c for c in configs if c.windows]
    assert {c.rope_factor for c in windowed} == {1, 8} and all(
        c.windows.size == 5 and c.query_scalar == 24 for c in windowed
    )


def test_logits_and_logprobs(golden):
    config, params, g = golden
    logits = unpacked(config, params, g["tokens"])
    assert_same_logits(logits, g["logits"])
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    logprobs = np.take_along_axis(logprobs, g["tokens"][:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, g["logprobs"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_logprobs_in_bfloat16(golden):
    """Measured, the worst model: 0.071 at most, 0.023 root mean square.

    Those of transformers in bfloat16: 0.079 and 0.031.
    """
    config, params, g = golden
    logits = unpacked(dataclasses.replace(config, compute_dtype="bfloat16"), params, g["tokens"])
    assert logits.dtype == np.float32
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    logprobs = np.take_along_axis(logprobs, g["tokens"][:, 1:, None], axis=-1)[..., 0]
    gap = logprobs - g["logprobs"]
    assert np.abs(gap).max() < 0.2
    assert 1e-3 < np.sqrt(np.mean(gap**2)) < 0.07  # not float32 by mistake


def test_left_padded_batch(golden):
    config, params, g = golden
    mask = g["padded_mask"].astype(bool)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits = logits_of(config, params, g["padded_tokens"], positions, mask)
    assert_same_logits(logits[mask], g["padded_logits"][mask])


def pack(g):
    """The first 10 tokens of one sequence and 14 of the other in a row: tokens, positions, segment
    ids.
    """
    tokens = np.concatenate([g["tokens"][0, :10], g["tokens"][1, :14]])[None]
    positions = np.concatenate([np.arange(10), np.arange(14)])[None]
    return tokens, positions, np.repeat([1, 2], [10, 14])[None]


def test_packed_sequences_do_not_see_each_other(golden):
    config, params, g = golden
    logits = logits_of(config, params, *pack(g))
    assert_same_logits(
        logits[0, :10], g["logits"][0, :10]
    )  # causal: the stored logits of a prefix are the prefix's own
    assert_same_logits(logits[0, 10:], g["logits"][1, :14])


# Sequence, prompt tokens, response tokens.
CUTS = [(0, 4, 20), (1, 1, 9), (0, 3, 5), (1, 7, 17), (0, 1, 1), (1, 2, 1)]


@pytest.mark.default("*_untied")
def test_logprobs_of_packed_training_rows(golden):
    """Up to four prompts and responses in a row, against each sequence alone.

    Measured: within 4e-6.
    """
    config, params, g = golden
    zeros = np.zeros(24, np.float32)
    items = [
        TrainItem(g["tokens"][i, :p], g["tokens"][i, p : p + r], zeros[:r], zeros[:r], 0.0, 1.0)
        for i, p, r in CUTS
    ]
    batch, stats = build_batch(items, row_len=40, rows_per_microbatch=2)
    assert batch.segment_ids.max(axis=-1).tolist() == [[4, 2]]
    run = jax.jit(functools.partial(batch_logprobs, model=config, chunk_size=32))
    found = gather_targets(
        np.asarray(run(params, jax.tree.map(lambda a: a[0], batch)))[None], stats.placement
    )
    for (i, p, r), logprobs in zip(CUTS, found, strict=True):
        np.testing.assert_allclose(logprobs, g["logprobs"][i, p - 1 : p + r - 1], atol=1e-5, rtol=0)


def test_default_positions_and_segments():
    config, params = load_pretrained(GOLDENS / "llama_scaled_untied")
    with np.load(GOLDENS / "llama_scaled_untied" / "golden.npz") as stored:
        g = dict(stored)
    assert_same_logits(np.asarray(compiled(params, config, g["tokens"])), g["logits"])
    tokens, positions, segment_ids = pack(g)
    found = np.asarray(compiled(params, config, tokens, segment_ids=segment_ids))
    assert_same_logits(found, logits_of(config, params, tokens, positions, segment_ids))


def test_greedy_continuation(golden):
    config, params, g = golden
    rows = [g["prompt_0"], g["prompt_1"]]
    for _ in range(12):
        tokens = np.stack([np.pad(row, (0, 20 - len(row))) for row in rows])
        logits = unpacked(config, params, tokens)
        rows = [np.append(row, logits[i, len(row) - 1].argmax()) for i, row in enumerate(rows)]
    np.testing.assert_array_equal(rows[0][5:], g["continuation_0"])
    np.testing.assert_array_equal(rows[1][8:], g["continuation_1"])


@pytest.mark.default("*_untied")
def test_greedy_sampling(golden):
    """Prompts of two lengths at once, through the engine: prefill, cache and decode steps."""
    config, params, g = golden
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    limits = Limits(slots=2, max_prompt_len=8, max_response_len=12)
    engine = Engine(config, Sampling(temperature=0.0), (), limits, mesh=mesh, fetch=fetch)
    weights = publisher(abstract_params(config), mesh, "float32")(params)
    found = engine.generate(
        weights, [Request(0, 0, g["prompt_0"]), Request(1, 0, g["prompt_1"])], jax.random.key(0)
    )
    np.testing.assert_array_equal(
        [response.tokens for response in found], [g["continuation_0"], g["continuation_1"]]
    )


@pytest.mark.default("gemma3_scaled_untied-False")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemma3")])
def test_sampled_logprobs_are_those_of_whole_rows(name, int8):
    """Eight slots of prompts of 2 to 8 tokens and 12 tokens each, in windows of 5.

    Measured: within 2e-6, with an 8-bit cache 0.03.
    """
    config, params = load_pretrained(GOLDENS / name)
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    limits = Limits(slots=8, max_prompt_len=8, max_response_len=12, int8=int8)
    engine = Engine(config, Sampling(temperature=1.0), (), limits, mesh=mesh, fetch=fetch)
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, config.vocab_size, n).astype(np.int32) for n in (2, 3, 4, 5, 6, 7, 8, 8)
    ]
    weights = publisher(abstract_params(config), mesh, "float32")(params)
    found = engine.generate(
        weights, [Request(i, 0, prompt) for i, prompt in enumerate(prompts)], jax.random.key(0)
    )
    rows = np.stack(
        [
            np.pad(np.concatenate([p, r.tokens]), (0, 8 - len(p)))
            for p, r in zip(prompts, found, strict=True)
        ]
    )
    logprobs = np.asarray(
        jax.nn.log_softmax(jax.jit(apply, static_argnums=1)(params, config, rows))
    )
    for row, prompt, response in zip(logprobs, prompts, found, strict=True):
        expected = row[np.arange(12) + len(prompt) - 1, response.tokens]
        np.testing.assert_allclose(
            response.behavior_logprobs, expected, rtol=0, atol=0.1 if int8 else 1e-5
        )


@pytest.mark.default("*-gemma3_scaled_untied")
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gemma3")])
@pytest.mark.parametrize(
    "changes",
    [
        {"windows": Windows(24, 2, 1e2)},
        {"windows": Windows(6, 2, 1e2)},
        {"windows": Windows(5, 1, 1e2)},
        {"windows": Windows(5, 2, 1e4)},
        {"windows": Windows(5, 3, 1e2)},
        {"query_scalar": None},
        {"rope_factor": 2.0},
    ],
    ids=str,
)
def test_what_gemma_3_is_told_matters(name, changes):
    """Stored answers would notice a window that is not there or one too long, another layer in its
    place, another scale of scores.
    """
    config, params = load_pretrained(GOLDENS / name)
    other = dataclasses.replace(config, **changes)
    if other == config:  # every third layer is what one of the two has
        return
    with np.load(GOLDENS / name / "golden.npz") as g:
        assert (
            np.abs(unpacked(other, params, g["tokens"]) - g["logits"]).max()
            > 0.01 * np.abs(g["logits"]).max()
        )


def test_rope_scaling_matters():
    config, params = load_pretrained(GOLDENS / "llama_scaled_untied")
    with np.load(GOLDENS / "llama_scaled_untied" / "golden.npz") as g:
        unscaled = unpacked(dataclasses.replace(config, rope_scaling=None), params, g["tokens"])
        assert np.abs(unscaled - g["logits"]).max() > 0.01 * np.abs(g["logits"]).max()
