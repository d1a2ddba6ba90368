"""What a decoder must be, whatever its weights: causal, segment by segment, the same through a
cache. Hugging Face: test_hf_parity.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from paging import pack, unpack

from dapo_jax.config import RopeScaling, Windows, flatten
from dapo_jax.model.attention import list_pages
from dapo_jax.model.decoder import (
    Cache,
    abstract_params,
    apply,
    decode_step,
    hidden_states,
    init,
    logits_of,
    make_cache,
    rotary,
    rotate,
    segment_positions,
    windowed_layers,
    write_cache,
)
from dapo_jax.model.families import tensors

SCALED = tiny.model("llama", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), tie_embeddings=False)
BIASED = tiny.model("qwen2")
NORMED = tiny.model("qwen3", tie_embeddings=False)
WINDOWED = tiny.model("gemma3_text", layers=3)  # a window of 3 in the first and the last
ROWS, WIDTH = 2, 12
TOKENS = (
    np.random.default_rng(0).permutation(40)[: ROWS * WIDTH].reshape(ROWS, WIDTH).astype(np.int32)
)  # all distinct
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [3, 0, 0], [1] * 12], np.int32)

POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 1], list(range(12))], np.int32)
ONE_SEGMENT, COUNTED = np.ones_like(TOKENS), np.tile(np.arange(WIDTH, dtype=np.int32), (ROWS, 1))


@functools.partial(jax.jit, static_argnums=1)
def forward(params, config, tokens, positions, segment_ids):
    """Logits, keys and values."""
    hidden, entries = hidden_states(params, config, tokens, positions, segment_ids)
    return logits_of(params, hidden), entries[:2]


def run(params, config, tokens=TOKENS, positions=COUNTED, segment_ids=ONE_SEGMENT):
    return np.asarray(forward(params, config, tokens, positions, segment_ids)[0])


# --------------------------------------------------------------------------------------------------------------------
# What a token sees
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, sight",
    [(NORMED, WIDTH), (tiny.model("gemma3_text", layers=1, tie_embeddings=False), 3)],
)
def test_a_logit_depends_on_its_own_segment_up_to_itself_and_on_nothing_else(config, sight):
    """By gradients in the embeddings of the tokens, which are all distinct; exactly 0 where there
    is no dependence.
    """
    params = tiny.params(config)

    def logits(embedding):
        return apply(
            {**params, "embed": {"embedding": embedding}}, config, TOKENS, segment_ids=SEGMENTS
        )

    def slope(row, t):  # of all logits at [row, t], weighted at random
        probe = (
            jnp.zeros((ROWS, WIDTH, 40)).at[row, t].set(np.random.default_rng(1).normal(size=40))
        )
        return jax.vjp(logits, params["embed"]["embedding"])[1](probe)[0]

    slope = jax.jit(slope)
    slopes = np.stack([slope(row, t) for row, t in np.ndindex(ROWS, WIDTH)])
    reached = np.abs(slopes).max(axis=-1)[:, TOKENS.ravel()] > 0  # [row t, row s]
    row, t = np.divmod(np.arange(ROWS * WIDTH), WIDTH)
    flat = SEGMENTS.ravel()
    expected = (
        (row[:, None] == row[None])
        & (flat[:, None] == flat[None])
        & (t[:, None] >= t[None])
        & (t[:, None] < t[None] + sight)
    )
    np.testing.assert_array_equal(reached, expected)


@pytest.mark.parametrize("config", [SCALED, WINDOWED], ids=lambda c: c.family)
def test_a_segment_in_a_packed_row_is_what_it_is_alone(config):
    params = tiny.params(config)
    packed = run(params, config, TOKENS, POSITIONS, SEGMENTS)
    for segment in (1, 2, 3):
        own = np.flatnonzero(SEGMENTS[0] == segment)
        alone = np.zeros_like(TOKENS)
        alone[0, : own.size] = TOKENS[0, own]
        np.testing.assert_allclose(
            packed[0, own], run(params, config, alone)[0, : own.size], rtol=0, atol=5e-6
        )


def test_positions_restart_with_every_segment():
    ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 1, 1, 0, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8)), [0, 1, 0, 1, 0, 0, 1, 2]]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(ids)), expected)
    assert segment_positions(jnp.asarray(ids)).dtype == jnp.int32


def test_default_positions_are_those_of_the_segments_and_only_distances_count():
    params = tiny.params(SCALED)
    given = run(params, SCALED, TOKENS, POSITIONS, SEGMENTS)
    np.testing.assert_allclose(
        jax.jit(apply, static_argnums=1)(params, SCALED, TOKENS, None, SEGMENTS),
        given,
        rtol=0,
        atol=2e-6,
    )
    np.testing.assert_allclose(
        run(params, SCALED, TOKENS, POSITIONS + 17, SEGMENTS), given, rtol=0, atol=2e-5
    )
    assert np.abs(run(params, SCALED, TOKENS, 2 * POSITIONS, SEGMENTS) - given).max() > 0.01


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def decoded(params, config, tokens, lengths, cache, size=4):
    """A decode step of one shard, its entries written into the pages of its cache."""
    seen = pack(cache, lengths, size)
    hidden, new, _ = decode_step(params, config, tokens, seen)
    at, offset = jnp.divmod(jnp.asarray(lengths), size)
    page = seen.table[jnp.arange(len(at)), at]
    shard = [jax.tree.map(lambda x: x[None], tree) for tree in (seen.pages, new, page, offset)]
    written = jax.tree.map(lambda x: x[0], write_cache(*shard))
    return hidden, unpack(written, seen.table, cache.k.shape[3])


def test_an_entry_of_every_sequence_is_written_where_it_belongs():
    """Two shards, two of three pages, 8-bit entries and their scales."""
    shape, offset = (2, 4, 3, 2, 5, 6), np.array([[0, 4], [2, 3]], np.int32)
    page = np.array([[0, 1], [2, 1]], np.int32)
    numbers = np.random.default_rng(0).integers(-127, 127, shape).astype(np.int8)
    old = Cache(numbers, -numbers, *(numbers[..., 0].astype(np.float32),) * 2)
    new = Cache(*(3 * x[:, :, :2, :, 0] + 1 for x in old))
    expected = [x.copy() for x in old]
    for n, i in np.ndindex(2, 2):
        for into, fresh in zip(expected, new, strict=True):
            into[n, :, page[n, i], :, offset[n, i]] = fresh[n, :, i]
    for found, whole in zip(jax.jit(write_cache)(old, new, page, offset), expected, strict=True):
        np.testing.assert_array_equal(found, whole)


@pytest.mark.default("qwen3*", "gemma3_text")
@pytest.mark.parametrize("config", [SCALED, BIASED, NORMED, WINDOWED], ids=lambda c: c.family)
def test_decoding_token_by_token_gives_the_logits_of_the_whole_row(config):
    """Sequences of different lengths side by side; the cache beyond them holds garbage."""
    params, behind = tiny.params(config), np.array([0, 3])
    size = (config.layers, ROWS, config.kv_heads, WIDTH, config.head_dim)
    whole, (k, v) = jax.device_get(forward(params, config, TOKENS, COUNTED, ONE_SEGMENT))
    filled = np.arange(WIDTH)[None] < behind[:, None]
    cache = Cache(
        *(jnp.where(filled[None, :, None, :, None], jnp.swapaxes(x, 2, 3), 1e3) for x in (k, v))
    )
    assert cache.k.shape == size

    @jax.jit
    def step(tokens, lengths, cache):
        hidden, cache = decoded(params, config, tokens, lengths, cache)
        return logits_of(params, hidden), cache

    for offset in range(WIDTH - 3):
        at = (np.arange(ROWS), behind + offset)
        logits, cache = step(TOKENS[at], behind + offset, cache)
        np.testing.assert_allclose(logits, whole[at], rtol=0, atol=5e-6)
    for found, expected in zip(cache[:2], (k, v), strict=True):
        np.testing.assert_allclose(
            found[:, 1], np.swapaxes(expected, 2, 3)[:, 1], rtol=0, atol=5e-6
        )


@pytest.mark.slow
def test_a_step_reads_and_writes_only_the_pages_of_its_sequences():
    """One sequence of two, six tokens of twelve: the pages of the other are NaN and stay as they
    are; so do the entries of its own that lie beyond.
    """
    params = tiny.params(NORMED)
    whole, kv = jax.device_get(forward(params, NORMED, TOKENS, COUNTED, ONE_SEGMENT))
    exact = [np.moveaxis(x, 2, 3) for x in kv]  # [L, B, K, S, h]
    holes = [x.copy() for x in exact]
    for x in holes:
        x[:, 1], x[:, :1, :, 5:] = np.nan, 1e3
    seen = pack(Cache(*map(jnp.asarray, holes)), np.array([5, 0]))
    seen = seen._replace(table=seen.table[:1], lengths=seen.lengths[:1])
    listed = list_pages(seen.table, seen.lengths, 4)
    seen = seen._replace(listed=listed._replace(needed=jnp.int32(2)))
    hidden, new, _ = jax.jit(lambda t, c: decode_step(params, NORMED, t, c))(TOKENS[:1, 5], seen)
    np.testing.assert_allclose(logits_of(params, hidden), whole[:1, 5], rtol=0, atol=5e-6)
    for found, full in zip(new[:2], exact, strict=True):
        np.testing.assert_allclose(found[:, 0], full[:, 0, :, 5], rtol=0, atol=5e-6)


def test_an_8_bit_cache_holds_the_scaled_keys_and_values():
    """And moves logits by little. Measured: 7e-3 of their norm."""
    params, lengths = tiny.params(NORMED), np.array([7, 4])
    whole, kv = jax.device_get(forward(params, NORMED, TOKENS, COUNTED, ONE_SEGMENT))
    k, v = (np.moveaxis(x, 2, 3) for x in kv)
    tokens = TOKENS[np.arange(2), lengths]
    cache = make_cache(jnp.asarray(k), jnp.asarray(v), int8=True)
    for values, scale, exact in ((cache.k, cache.scale_k, k), (cache.v, cache.scale_v, v)):
        assert values.dtype == jnp.int8
        np.testing.assert_allclose(
            np.asarray(values) * np.asarray(scale)[..., None],
            exact,
            rtol=0,
            atol=np.abs(exact).max() / 250,
        )
    step = jax.jit(lambda t, n, c: decoded(params, NORMED, t, n, c))
    hidden, after = step(tokens, lengths, cache)
    assert 1e-5 < tiny.gap(logits_of(params, hidden), whole[np.arange(2), lengths]) < 0.02
    for old, new in zip(cache, after, strict=True):  # the new token, and nothing else
        changed = np.argwhere(
            np.asarray(old != new).any(axis=(0, 2)).reshape(2, WIDTH, -1).any(axis=-1)
        )
        assert {tuple(at) for at in changed.tolist()} <= {(0, 7), (1, 4)}


# --------------------------------------------------------------------------------------------------------------------
# Rotary embeddings
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling(), RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(4.0, 2.0, 3.0, 64)],
)
def test_rotary_angles_follow_the_formula_of_the_llama_3_1_release(scaling):
    config = tiny.model("llama", head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    positions = np.array([[0, 1, 7, 300]])
    cos, sin = rotary(config, jnp.asarray(positions))
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
                smooth = (length / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency, kind = (
                    (1 - smooth) * frequency / scaling.factor + smooth * frequency,
                    "between",
                )
            kinds.add(kind)
        np.testing.assert_allclose(
            cos[0, :, j], np.cos(positions[0] * frequency), rtol=0, atol=5e-5
        )
        np.testing.assert_allclose(
            sin[0, :, j], np.sin(positions[0] * frequency), rtol=0, atol=5e-5
        )
    assert scaling is None or kinds == {"long", "short", "between"}


def test_rotation_turns_the_first_half_against_the_second_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    angle = np.random.default_rng(1).uniform(-3, 3, size=(2, 3, 4)).astype(np.float32)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[..., None, :]
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), (jnp.cos(angle), jnp.sin(angle))),
        np.concatenate([turned.real, turned.imag], -1),
        rtol=0,
        atol=1e-6,
    )


# --------------------------------------------------------------------------------------------------------------------
# Parameters, heads, precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_hugging_face_models(family, tied):
    config = tiny.model(family, tie_embeddings=tied)
    abstract = abstract_params(config)
    found = {(leaf, index) for _, leaf, _, _, index in tensors(config)}
    leaves = flatten(abstract)

    def stacked(leaf):  # layers, and experts
        each = re.match(r"layers\.(experts\.(gate|up|down))?", leaf)
        return leaves[leaf].shape[: 0 if each is None else 2 if each[1] else 1]

    assert found == {(leaf, index) for leaf in leaves for index in np.ndindex(stacked(leaf))}
    filled = dict.fromkeys(leaves, 0)
    for t in tensors(config):
        filled[t.leaf] += math.prod(t.shape)
    assert filled == {leaf: array.size for leaf, array in leaves.items()}
    vocab, d, heads, kv, h, ffn = 40, 16, 4, 2, 8, 24
    layer = 2 * d + 2 * d * heads * h + 2 * d * kv * h + 3 * d * ffn
    layer += {
        "llama": 0,
        "qwen2": (heads + 2 * kv) * h,
        "qwen3": 2 * h,
        "qwen3_moe": 2 * h + d * 4 + 3 * 3 * d * ffn,  # a router; 3 experts more
        "gemma3_text": 2 * h + 2 * d,
    }[family]
    assert (
        sum(a.size for a in jax.tree.leaves(abstract))
        == vocab * d * (1 if tied else 2) + d + 2 * layer
    )


def test_init_scales_every_kernel_by_its_fan_in_and_residual_branches_by_depth():
    config = tiny.model(vocab_size=500, model_dim=64, ffn_dim=96, tie_embeddings=False)
    made = jax.jit(functools.partial(init, config))(jax.random.key(1))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_params(config)
    )
    attn, mlp = made["layers"]["attn"], made["layers"]["mlp"]
    expected = {
        0.02: [made["embed"]["embedding"]],
        64**-0.5: [made["head"]["kernel"], attn["q"]["kernel"], mlp["gate"]["kernel"]],
    }
    expected |= {(32 * 4) ** -0.5: [attn["o"]["kernel"]], (96 * 4) ** -0.5: [mlp["down"]["kernel"]]}
    for deviation, kernels in expected.items():
        for kernel in kernels:
            assert np.std(kernel) == pytest.approx(deviation, rel=0.05)
    assert not np.array_equal(
        attn["q"]["kernel"][0], attn["q"]["kernel"][1]
    )  # each layer draws its own


def test_a_tied_head_is_the_embedding_transposed():
    tied, untied = dataclasses.replace(SCALED, tie_embeddings=True), SCALED
    params = tiny.params(tied)
    same = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    other = {**params, "head": {"kernel": 2 * params["embed"]["embedding"].T}}
    logits = run(params, tied)
    np.testing.assert_allclose(run(same, untied), logits, rtol=0, atol=2e-6)
    np.testing.assert_allclose(run(other, untied), 2 * logits, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_remat_saves_memory_and_changes_no_gradient():
    """Bytes of temporaries from the compiler, for a deep model.

    Measured: gradients are the same to the bit.
    """
    base = tiny.model("llama", layers=16)
    params = tiny.params(base)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 64)), jnp.int32)

    def gradient(remat):
        config = dataclasses.replace(base, remat=remat)
        loss = jax.grad(lambda p: jnp.sin(hidden_states(p, config, tokens)[0]).sum())
        program = jax.jit(loss).lower(params).compile()
        return program(params), program.memory_analysis().temp_size_in_bytes

    (none, none_bytes), (dots, dots_bytes), (full, full_bytes) = (
        gradient(remat) for remat in ("none", "dots", "full")
    )
    assert full_bytes < dots_bytes / 2 < none_bytes / 2
    assert tiny.gap(dots, none) < 1e-6 and tiny.gap(full, none) < 1e-6


@pytest.mark.slow
def test_remat_changes_no_gradient_where_some_layers_have_a_window():
    params = tiny.params(WINDOWED)
    rows = [jnp.asarray(x) for x in (TOKENS, POSITIONS, SEGMENTS)]

    def gradient(remat):
        config = dataclasses.replace(WINDOWED, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sin(hidden_states(p, config, *rows)[0]).sum()))(
            params
        )

    none = gradient("none")
    assert tiny.gap(gradient("dots"), none) < 1e-6 and tiny.gap(gradient("full"), none) < 1e-6


def test_which_layers_have_a_window():
    """As transformers' own rule for Gemma 3 1B: 26 layers, every sixth of them sees everything."""
    seen = [
        i + 1
        for i, windowed in enumerate(
            windowed_layers(tiny.model("gemma3_text", layers=26, windows=Windows(512, 6)))
        )
        if not windowed
    ]
    assert seen == [6, 12, 18, 24]
    assert windowed_layers(NORMED) is None


def test_bfloat16_compute_differs_little_and_gives_float32_logits():
    """Measured: logits within 2.1% of their norm."""
    narrow, params = dataclasses.replace(NORMED, compute_dtype="bfloat16"), tiny.params(NORMED)
    (found, (k, v)), expected = (
        forward(params, narrow, TOKENS, COUNTED, ONE_SEGMENT),
        run(params, NORMED),
    )
    assert found.dtype == jnp.float32 and k.dtype == v.dtype == jnp.bfloat16
    assert 1e-4 < tiny.gap(found, expected) < 0.04
