"""What a decoder must be, whatever its weights: causal, segment by segment, the same through a cache. Hugging Face: test_hf_parity."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dapo_jax.config import RopeScaling
from dapo_jax.model.decoder import Cache, abstract_params, apply, decode_step, hidden_states, init, logits_of, rotary, rotate, segment_positions

SCALED = tiny.model("llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), tie_embeddings=False)
BIASED = tiny.model("qwen2")
NORMED = tiny.model("qwen3", tie_embeddings=False)
ROWS, WIDTH = 2, 12
TOKENS = np.random.default_rng(0).permutation(40)[: ROWS * WIDTH].reshape(ROWS, WIDTH).astype(np.int32)  # all distinct
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [3, 0, 0], [1] * 12], np.int32)

run = jax.jit(apply, static_argnums=1)


# --------------------------------------------------------------------------------------------------------------------
# What a token sees
# --------------------------------------------------------------------------------------------------------------------


def test_a_logit_depends_on_its_own_segment_up_to_itself_and_on_nothing_else():
    """By gradients in the embeddings of the tokens, which are all distinct; exactly 0 where there is no dependence."""
    params = tiny.params(NORMED)

    def logits(embedding):
        return apply({**params, "embed": {"embedding": embedding}}, NORMED, TOKENS, segment_ids=SEGMENTS)

    def slope(row, t):  # of all logits at [row, t], weighted at random
        probe = jnp.zeros((ROWS, WIDTH, 40)).at[row, t].set(np.random.default_rng(1).normal(size=40))
        return jax.vjp(logits, params["embed"]["embedding"])[1](probe)[0]

    slopes = jax.jit(jax.vmap(slope))(np.repeat([0, 1], WIDTH), np.tile(np.arange(WIDTH), ROWS))
    reached = np.abs(np.asarray(slopes)).max(axis=-1)[:, TOKENS.ravel()] > 0  # [row t, row s]
    row, t = np.divmod(np.arange(ROWS * WIDTH), WIDTH)
    flat = SEGMENTS.ravel()
    expected = (row[:, None] == row[None]) & (flat[:, None] == flat[None]) & (t[:, None] >= t[None])
    np.testing.assert_array_equal(reached, expected)


def test_a_segment_in_a_packed_row_is_what_it_is_alone():
    params = tiny.params(SCALED)
    packed = np.asarray(run(params, SCALED, TOKENS, None, SEGMENTS))
    for segment in (1, 2, 3):
        own = np.flatnonzero(SEGMENTS[0] == segment)
        alone = np.zeros_like(TOKENS)
        alone[0, : own.size] = TOKENS[0, own]
        found = np.asarray(run(params, SCALED, alone, None, np.ones_like(SEGMENTS)))[0, : own.size]
        np.testing.assert_allclose(packed[0, own], found, rtol=0, atol=2e-6)


def test_positions_restart_with_every_segment():
    ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 1, 1, 0, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8)), [0, 1, 0, 1, 0, 0, 1, 2]]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(ids)), expected)
    assert segment_positions(jnp.asarray(ids)).dtype == jnp.int32


def test_default_positions_are_those_of_the_segments_and_positions_matter():
    params = tiny.params(SCALED)
    positions = np.asarray(segment_positions(jnp.asarray(SEGMENTS)))
    default = np.asarray(run(params, SCALED, TOKENS, None, SEGMENTS))
    np.testing.assert_array_equal(run(params, SCALED, TOKENS, positions, SEGMENTS), default)
    stretched = np.asarray(run(params, SCALED, TOKENS, 2 * positions, SEGMENTS))
    assert np.abs(stretched - default).max() > 1e-3
    shifted = np.asarray(run(params, SCALED, TOKENS, positions + 17, SEGMENTS))  # only distances count
    np.testing.assert_allclose(shifted, default, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SCALED, BIASED, NORMED], ids=lambda c: c.family)
def test_decoding_token_by_token_gives_the_logits_of_the_whole_row(config):
    """Sequences of different lengths side by side; the cache beyond them holds garbage."""
    params, behind = tiny.params(config), np.array([0, 3])
    whole = np.asarray(run(params, config, TOKENS))
    size = (config.layers, ROWS, config.kv_heads, WIDTH, config.head_dim)
    _, (k, v) = jax.jit(hidden_states, static_argnums=1)(params, config, TOKENS)
    filled = np.arange(WIDTH)[None] < behind[:, None]
    cache = Cache(*(jnp.where(filled[None, :, None, :, None], jnp.swapaxes(x, 2, 3), 1e3) for x in (k, v)))
    assert cache.k.shape == size

    @jax.jit
    def step(tokens, lengths, cache):
        hidden, cache = decode_step(params, config, tokens, lengths, cache)
        return logits_of(params, hidden), cache

    for offset in range(WIDTH - 3):
        at = (np.arange(ROWS), behind + offset)
        logits, cache = step(TOKENS[at], behind + offset, cache)
        np.testing.assert_allclose(logits, whole[at], rtol=0, atol=5e-6)
    for found, expected in zip(cache, (k, v), strict=True):
        np.testing.assert_allclose(found[:, 1], np.swapaxes(expected, 2, 3)[:, 1], rtol=0, atol=5e-6)


# --------------------------------------------------------------------------------------------------------------------
# Rotary embeddings
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, RopeScaling(), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(4.0, 2.0, 3.0, 64)])
def test_rotary_angles_follow_the_formula_of_the_llama_3_1_release(scaling):
    config = tiny.model("llama", head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    positions = np.array([[0, 1, 7, 300]])
    cos, sin = rotary(config, positions)
    kinds = set()
    for j in range(32):
        frequency = 5e5 ** (-2 * j / 64)
        if scaling is not None:
            length, wavelength = scaling.original_max_position, 2 * math.pi / frequency
            if wavelength > length / scaling.low_freq_factor:
                frequency, kind = frequency / scaling.factor, "long"
            elif wavelength < length / scaling.high_freq_factor:
                kind = "short"
            else:
                smooth = (length / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency, kind = (1 - smooth) * frequency / scaling.factor + smooth * frequency, "between"
            kinds.add(kind)
        np.testing.assert_allclose(cos[0, :, j], np.cos(positions[0] * frequency), rtol=0, atol=5e-5)
        np.testing.assert_allclose(sin[0, :, j], np.sin(positions[0] * frequency), rtol=0, atol=5e-5)
    assert scaling is None or kinds == {"long", "short", "between"}


def test_rotation_turns_the_first_half_against_the_second_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    angle = np.random.default_rng(1).uniform(-3, 3, size=(2, 3, 4)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[..., None, :]
    np.testing.assert_allclose(rotate(x, (np.cos(angle), np.sin(angle))), np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Parameters, heads, precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_abstract_params_are_the_shapes_of_init(family, tied):
    config = tiny.model(family, tie_embeddings=tied)
    made, abstract = jax.jit(functools.partial(init, config))(jax.random.key(0)), abstract_params(config)
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(lambda a: (a.shape, jnp.float32), abstract)
    vocab, d, heads, kv, h, ffn = 40, 16, 4, 2, 8, 24
    layer = 2 * d + 2 * d * heads * h + 2 * d * kv * h + 3 * d * ffn
    layer += {"llama": 0, "qwen2": (heads + 2 * kv) * h, "qwen3": 2 * h}[family]
    assert sum(a.size for a in jax.tree.leaves(made)) == vocab * d * (1 if tied else 2) + d + 2 * layer


def test_init_scales_every_kernel_by_its_fan_in_and_residual_branches_by_depth():
    config = tiny.model(vocab_size=500, model_dim=64, ffn_dim=96, tie_embeddings=False)
    made = jax.jit(functools.partial(init, config))(jax.random.key(1))
    attn, mlp = made["layers"]["attn"], made["layers"]["mlp"]
    expected = {0.02: [made["embed"]["embedding"]], 64**-0.5: [made["head"]["kernel"], attn["q"]["kernel"], mlp["gate"]["kernel"]]}
    expected |= {(32 * 4) ** -0.5: [attn["o"]["kernel"]], (96 * 4) ** -0.5: [mlp["down"]["kernel"]]}
    for deviation, kernels in expected.items():
        for kernel in kernels:
            assert np.std(kernel) == pytest.approx(deviation, rel=0.05)
    assert not np.array_equal(attn["q"]["kernel"][0], attn["q"]["kernel"][1])  # each layer draws its own


def test_a_tied_head_is_the_embedding_transposed():
    tied, untied = tiny.model("llama"), tiny.model("llama", tie_embeddings=False)
    params = tiny.params(tied)
    same = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    other = {**params, "head": {"kernel": 2 * params["embed"]["embedding"].T}}
    logits = np.asarray(run(params, tied, TOKENS))
    np.testing.assert_array_equal(run(same, untied, TOKENS), logits)
    np.testing.assert_allclose(run(other, untied, TOKENS), 2 * logits, rtol=1e-6)


def test_what_the_backward_pass_keeps_does_not_change_gradients():
    """Measured: relative gap 2e-7 at most."""
    params = tiny.params(BIASED)
    probe = np.random.default_rng(0).normal(size=(ROWS, WIDTH, BIASED.vocab_size)).astype(np.float32)

    def gradient(remat):
        config = dataclasses.replace(BIASED, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.vdot(probe, apply(p, config, TOKENS, segment_ids=SEGMENTS))))(params)

    kept = gradient("none")
    for remat in ("dots", "full"):
        print("REMAT", tiny.gap(gradient(remat), kept))
        assert tiny.gap(gradient(remat), kept) < 1e-6


def test_remat_saves_memory():
    """What the three policies keep of a deep model, from the compiler: bytes of temporaries."""

    def temporaries(remat):
        config = tiny.model("llama", layers=16, remat=remat)
        rows = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        loss = jax.grad(lambda p, tokens: hidden_states(p, config, tokens)[0].sum())
        return jax.jit(loss).lower(abstract_params(config), rows).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = (temporaries(remat) for remat in ("none", "dots", "full"))
    assert full < dots / 2 < none / 2


def test_bfloat16_compute_differs_little_and_returns_float32():
    """Measured: logits within 1.5% of their norm."""
    narrow = dataclasses.replace(NORMED, compute_dtype="bfloat16")
    params = tiny.params(NORMED)
    found, expected = run(params, narrow, TOKENS), run(params, NORMED, TOKENS)
    assert found.dtype == expected.dtype == jnp.float32
    assert hidden_states_dtype(narrow) == jnp.bfloat16
    print("BF16", tiny.gap(found, expected))
    assert 1e-4 < tiny.gap(found, expected) < 0.03


def hidden_states_dtype(config):
    return jax.eval_shape(lambda p: hidden_states(p, config, TOKENS)[0], abstract_params(config)).dtype
