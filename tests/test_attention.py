"""Attention against loops over tokens and heads in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import Mesh
from paging import pack

from dapo_jax.config import MeshSection
from dapo_jax.model import attention
from dapo_jax.model.attention import (
    Cache,
    Window,
    _over_mesh,
    attend,
    attend_chunked,
    attend_masked,
    attend_pages,
    attend_splash,
)
from dapo_jax.model.quantization import quantize
from dapo_jax.runtime.mesh import make_mesh

run = jax.jit(attend)


@functools.partial(jax.jit, static_argnames="window")
def run_cached(q, k, v, *cache, lengths, window=None, on=True):
    """With the caches, [B, K, S, h], in pages."""
    seen = pack(Cache(*(x[None] for x in cache)), lengths)
    return attend_pages(q, k, v, seen, None if window is None else Window(window, on))


N, T, HEADS, KV_HEADS, WIDTH = 2, 9, 4, 2, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]])


def qkv(seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.normal(size=(N, T, heads, WIDTH)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def map_arrays(*tree):
    return jax.tree.map(jnp.asarray, tree)


def plain(q, k, v, segment_ids, window=T):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for n, t, head in np.ndindex(q.shape[:3]):
        kv = head // (HEADS // KV_HEADS)
        seen = [
            s for s in range(t + 1) if segment_ids[n, s] == segment_ids[n, t] and s > t - window
        ]
        weights = np.exp([q[n, t, head] @ k[n, s, kv] / np.sqrt(WIDTH) for s in seen])
        out[n, t, head] = sum(
            w * v[n, s, kv] for w, s in zip(weights / weights.sum(), seen, strict=True)
        )
    return out


def test_attend_equals_loops_over_tokens():
    q, k, v = qkv()
    np.testing.assert_allclose(run(q, k, v, SEGMENTS), plain(q, k, v, SEGMENTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_a_window_hides_what_lies_further_back_in_layers_that_have_it(size):
    q, k, v = qkv()
    rows = map_arrays(q, k, v, SEGMENTS)
    seen = jax.jit(lambda on: attend(*rows, Window(size, on)))
    np.testing.assert_allclose(seen(True), plain(q, k, v, SEGMENTS, size), rtol=0, atol=1e-6)
    np.testing.assert_allclose(seen(False), plain(q, k, v, SEGMENTS), rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = qkv()
    out = np.asarray(run(100 * q, 100 * k, v, SEGMENTS))
    assert np.isfinite(out).all() and np.abs(out).max() <= np.abs(v).max() + 1e-6


def test_bfloat16_stays_bfloat16_and_close():
    """Measured: within 0.011 of float32 of the same rounded inputs, for outputs up to 2.5: bfloat16
    itself is as coarse.
    """
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
    out = run(q, k, v, SEGMENTS)
    assert out.dtype == jnp.bfloat16
    expected = plain(*(np.asarray(x, np.float32) for x in (q, k, v)), SEGMENTS)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0, atol=0.03)


def test_gradients_reach_only_what_is_seen():
    q, k, v, segments = map_arrays(*qkv(), SEGMENTS)
    slopes = jax.jit(
        jax.jacrev(lambda k, v: attend(q, k, v, segments)[0, :, 0, 0], argnums=(0, 1))
    )(k, v)
    for slope in slopes:  # [T, N, T, K, h]
        reached = np.abs(np.asarray(slope)[:, 0]).max(axis=(-1, -2)) > 0
        seen = (SEGMENTS[0][:, None] == SEGMENTS[0][None]) & np.tri(T, dtype=bool)
        alone = (seen.sum(axis=1) == 1)[:, None]  # a single key has weight 1 whatever it is
        np.testing.assert_array_equal(reached, seen & ~alone if slope is slopes[0] else seen)
    assert (
        not np.asarray(slopes[0])[:, 1].any() and not np.asarray(slopes[1])[:, 1].any()
    )  # the other row


@pytest.mark.parametrize("garbage", [0.0, 1e6])
@pytest.mark.parametrize("on", [None, True, False])
def test_the_cached_form_is_the_last_row_of_the_whole_one(garbage, on):
    q, k, v = qkv()
    whole = plain(q, k, v, np.ones((N, T), np.int32), 3 if on else T)
    window = None if on is None else 3
    cache_k, cache_v = (np.moveaxis(x, 1, 2).copy() for x in (k, v))  # [B, K, S, h]
    for lengths in ([0, 8], [5, 3]):
        dirty_k, dirty_v, at = cache_k.copy(), cache_v.copy(), (np.arange(N), lengths)
        for n, length in enumerate(lengths):
            dirty_k[n, :, length:] = dirty_v[n, :, length:] = (
                garbage  # what lies beyond `lengths` must not be read
            )
        inputs = q[at], k[at], v[at], dirty_k, dirty_v
        found = run_cached(*inputs, lengths=np.array(lengths), window=window, on=bool(on))
        np.testing.assert_allclose(found, whole[at], rtol=0, atol=1e-6)


def test_quantized_values_are_off_by_at_most_half_a_step():
    x = (
        np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
        * np.logspace(-6, 6, 50, dtype=np.float32)[:, None]
    )
    x[0] = 0
    values, scale = jax.jit(quantize)(x)
    assert values.dtype == jnp.int8 and scale.shape == (50,) and scale.dtype == jnp.float32
    np.testing.assert_allclose(scale[1:], np.abs(x[1:]).max(axis=1) / 127, rtol=1e-6)
    assert (
        np.abs(np.asarray(values) * np.asarray(scale)[:, None] - x)
        <= 0.5001 * np.asarray(scale)[:, None]
    ).all()


def test_attention_over_an_8_bit_cache_is_that_over_what_its_numbers_stand_for():
    q, k, v = qkv()
    at, lengths = (np.arange(N), [5, 3]), np.array([5, 3])
    (k8, scale_k), (v8, scale_v) = (quantize(jnp.moveaxis(x, 1, 2)) for x in (k, v))
    wide_k, wide_v = (
        np.asarray(x, np.float32) * np.asarray(s)[..., None]
        for x, s in ((k8, scale_k), (v8, scale_v))
    )
    expected = run_cached(q[at], k[at], v[at], wide_k, wide_v, lengths=lengths)
    np.testing.assert_allclose(
        run_cached(q[at], k[at], v[at], k8, v8, scale_k, scale_v, lengths=lengths),
        expected,
        rtol=0,
        atol=2e-6,
    )
    exact = run_cached(
        q[at], k[at], v[at], *(np.moveaxis(x, 1, 2) for x in (k, v)), lengths=lengths
    )
    assert 1e-4 < np.abs(expected - exact).max() < 0.03


# --------------------------------------------------------------------------------------------------------------------
# The other forms of `attend`
# --------------------------------------------------------------------------------------------------------------------


def packed(t, width, seed=0):
    """q, k, v [2, t, ...] and segment ids; one row ends in padding."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (2, t)), axis=1)
    segments[1, t - t // 5 :] = 0
    return [
        rng.normal(size=(2, t, heads, width)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ], segments


FORMS = {
    "splash": functools.partial(attend_splash, block=128, interpret=True),
    "chunked": functools.partial(attend_chunked, chunk=64),
    "masked": functools.partial(attend_masked, implementation="xla"),
}


@pytest.mark.default("*-40-16-7", "splash-200-64-None")
@pytest.mark.parametrize(
    "t, width, size", [(40, 16, None), (40, 16, 7), (200, 64, None), (400, 64, 50)]
)
@pytest.mark.parametrize("form", FORMS)
def test_other_forms_give_the_same_output_and_gradients(form, t, width, size):
    """On rows of any length, less than a block or not whole blocks of it, also where padding has no
    key but its own; in layers with a window and without. Measured: 3e-6.
    """
    inputs, segments = map_arrays(packed(t, width))[0]
    mix = np.random.default_rng(1).normal(size=inputs[0].shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(function, inputs, segments, mix, on):  # as constants, XLA would fold them for long
        out, pull = jax.vjp(
            lambda *qkv: function(*qkv, segments, Window(size, on) if size else None), *inputs
        )
        return out, *pull(mix)

    for on in (True, False) if size else (False,):
        found, expected = (outputs(f, inputs, segments, mix, on) for f in (FORMS[form], attend))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window, before, after", [(1024, 36, 20), (150, 21, 19)])
def test_the_kernel_skips_blocks_of_other_segments(window, before, after):
    """Segments of 300, 400, 200 and padding in blocks of 128: 3, 4 and 3 rows of blocks see their own
    only, counted by hand; with a window of 150 a row of blocks sees at most 3.
    """
    mask = splash_attention_mask.LocalMask((1024, 1024), (window - 1, 0), offset=0)
    heads, sizes = splash_attention_mask.MultiHeadMask([mask] * 2), splash.BlockSizes(*(128,) * 8)
    kernel = splash.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    segments = np.repeat([1, 2, 3, 0], [300, 400, 200, 124]).reshape(8, 128)
    own = attention.within_segments(kernel, jnp.asarray(segments))
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        counts = [np.count_nonzero(getattr(one, name).block_mask) for one in (kernel, own)]
        assert counts == [before, after], name


@pytest.mark.parametrize(
    "parts", [2, 4, 8], ids=["kv heads divide", "kv heads are repeated", "heads do not divide"]
)
def test_a_kernel_over_a_mesh_sees_the_heads_that_belong_together(parts):
    mesh = make_mesh(MeshSection(1, -1, parts))
    rng, rows = np.random.default_rng(0), 8 // parts
    q, k, v = (
        rng.normal(size=(rows, T, heads, WIDTH)).astype(np.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    segments = np.resize(SEGMENTS, (rows, T))
    found = jax.jit(lambda *inputs: _over_mesh(attend, mesh, *inputs))(q, k, v, segments)
    np.testing.assert_allclose(found, run(q, k, v, segments), rtol=0, atol=1e-6)
    windowed = jax.jit(
        lambda *inputs: _over_mesh(
            lambda *rows, on: attend(*rows, Window(3, on)), mesh, *inputs[:4], on=inputs[4]
        )
    )
    for on, size in ((True, 3), (False, T)):
        np.testing.assert_allclose(
            windowed(q, k, v, segments, on), plain(q, k, v, segments, size), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    "platform, t, dtype, form",
    [
        ("cpu", 300, "float32", "attend"),
        ("cpu", 5000, "float32", "attend_chunked"),
        ("gpu", 300, "bfloat16", "attend_masked"),
        ("gpu", 300, "float32", "attend"),  # cuDNN takes none
        ("gpu", 301, "bfloat16", "attend"),  # its backward pass takes no odd length with a mask
        ("gpu", 5000, "bfloat16", "attend_chunked"),  # its mask would be [T, T]
        ("tpu", 300, "bfloat16", "attend_splash"),
        ("tpu", 5000, "float32", "attend_splash"),
    ],
)
def test_the_form_follows_the_platform_of_the_mesh(monkeypatch, platform, t, dtype, form):
    """Not that of the host, which here is always a CPU."""
    called = []
    for name in ("attend", "attend_chunked", "attend_masked", "attend_splash"):
        monkeypatch.setattr(
            attention,
            name,
            lambda *inputs, name=name, **options: called.append((name, *inputs[4:])) or inputs[0],
        )
    device = type("Device", (), {"platform": platform})()
    mesh = Mesh(np.array([device]), ("tensor",))
    monkeypatch.setattr(
        attention,
        "_over_mesh",
        lambda function, mesh, *inputs, **scalars: function(*inputs, **scalars),
    )
    q = jnp.zeros((1, t, 4, 8), dtype)
    for window in (None, Window(5, jnp.asarray(True))):
        attention.attend_rows(q, q, q, jnp.ones((1, t), jnp.int32), window, mesh=mesh, block=512)
        name, *given = called.pop()
        assert (
            name == form and not called and (given == [window] or (given == [] and window is None))
        )
