"""The decoder against transformers, on the tiny models of goldens/make_hf_goldens.py."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from dapo_jax.model.decoder import apply
from dapo_jax.model.weights import load_pretrained

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))

compiled = jax.jit(apply, static_argnames="config")


def logits_of(config, params, tokens, positions, segment_ids):
    """The decoder's logits, by way of [3, 24] rows: one compilation a model."""

    def fill(x):
        return np.pad(np.asarray(x, np.int32), [(0, 3 - tokens.shape[0]), (0, 24 - tokens.shape[1])])

    logits = np.asarray(compiled(params, config, fill(tokens), fill(positions), fill(segment_ids)))
    return logits[: tokens.shape[0], : tokens.shape[1]]


def unpacked(config, params, tokens):
    """Logits of rows that are one sequence each."""
    return logits_of(config, params, tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape), np.ones_like(tokens))


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
    assert {(c.family, c.tie_embeddings) for c in configs} == {(f, t) for f in ("llama", "qwen2", "qwen3") for t in (True, False)}
    assert any(c.rope_scaling for c in configs)


def test_logits_and_logprobs(golden):
    config, params, g = golden
    logits = unpacked(config, params, g["tokens"])
    assert_same_logits(logits, g["logits"])
    logprobs = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
    logprobs = np.take_along_axis(logprobs, g["tokens"][:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, g["logprobs"], atol=1e-5, rtol=0)


def test_left_padded_batch(golden):
    config, params, g = golden
    mask = g["padded_mask"].astype(bool)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits = logits_of(config, params, g["padded_tokens"], positions, mask)
    assert_same_logits(logits[mask], g["padded_logits"][mask])


def pack(g):
    """The first 10 tokens of one sequence and 14 of the other in a row: tokens, positions, segment ids."""
    tokens = np.concatenate([g["tokens"][0, :10], g["tokens"][1, :14]])[None]
    positions = np.concatenate([np.arange(10), np.arange(14)])[None]
    return tokens, positions, np.repeat([1, 2], [10, 14])[None]


def test_packed_sequences_do_not_see_each_other(golden):
    config, params, g = golden
    logits = logits_of(config, params, *pack(g))
    assert_same_logits(logits[0, :10], g["logits"][0, :10])  # causal: the stored logits of a prefix are the prefix's own
    assert_same_logits(logits[0, 10:], g["logits"][1, :14])


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


def test_rope_scaling_matters():
    config, params = load_pretrained(GOLDENS / "llama_scaled_untied")
    with np.load(GOLDENS / "llama_scaled_untied" / "golden.npz") as g:
        unscaled = unpacked(dataclasses.replace(config, rope_scaling=None), params, g["tokens"])
        assert np.abs(unscaled - g["logits"]).max() > 0.01 * np.abs(g["logits"]).max()
