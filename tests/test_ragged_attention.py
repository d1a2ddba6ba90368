"""The TPU kernel of decode attention, run by Pallas' interpreter, against attention by XLA."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from paging import pack

from dapo_jax.config import MeshSection
from dapo_jax.model import decoder, ragged_attention
from dapo_jax.model.attention import Cache, Window, attend_pages
from dapo_jax.model.quantization import quantize
from dapo_jax.model.ragged_attention import attend_ragged
from dapo_jax.rollout import engine, sampler
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Request

LAYERS, H = 2, 128


def by_loops(q, k, v, cache, lengths, window):
    """Attention of each sequence and head in float64; cache [B, K, S, h]."""
    out = np.zeros(q.shape)
    for b, head in np.ndindex(q.shape[:2]):
        group = head // (q.shape[1] // k.shape[1])
        near = slice(max(0, lengths[b] - window + 1), lengths[b])
        keys, values = (
            np.append(x[b, group, near], own[b, None, group], 0).astype(np.float64)
            for x, own in zip(cache, (k, v), strict=True)
        )
        scores = keys @ q[b, head].astype(np.float64) / q.shape[2] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, head] = weights @ values / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames="window")
def both(q, k, v, cache, lengths, on, window=None):
    """The kernel's output for layer 1, and XLA's."""
    seen = None if window is None else Window(window, on)
    pages = pack(cache, lengths, 128)._replace(layer=jnp.int32(1))
    found, _ = attend_ragged(q, k, v, pages, seen, interpret=True)
    return found, attend_pages(q, k, v, pages, seen)


@pytest.mark.default("5-2-*", "4-2-*")
@pytest.mark.parametrize(
    ("slots", "groups", "per_group", "entries", "int8", "window", "on"),
    [
        (5, 2, 5, 512, False, None, False),  # an odd number of sequences
        (1, 1, 8, 128, False, None, False),  # one core, one page
        (4, 1, 2, 640, False, None, False),  # a page that is no whole block
        (6, 2, 3, 640, True, None, False),
        (5, 2, 3, 640, False, 300, True),
        (5, 2, 3, 640, False, 300, False),
        (4, 2, 3, 640, True, 40, True),
    ],
)
def test_live_entries_give_the_attention_of_the_whole_cache(
    slots, groups, per_group, entries, int8, window, on
):
    """Whatever lies behind a sequence's entries is not seen."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    stored = [normal(LAYERS, slots, groups, entries, H) for _ in "kv"]
    parts = [quantize(x) for x in stored]
    cache = Cache(*(x for x, _ in parts), *(s for _, s in parts)) if int8 else Cache(*stored)
    q, k, v = (normal(slots, n, H) for n in (groups * per_group, groups, groups))
    edges = [0, entries, 1, 256, 257, entries - 1]
    lengths = jnp.asarray([n for n in edges if n <= entries][:slots], jnp.int32)
    layer = [np.asarray(x[1]) for x in stored]
    if int8:
        layer = [np.asarray(x[1], np.float64) * np.asarray(s)[1, ..., None] for x, s in parts]
    inputs = (*map(np.asarray, (q, k, v)), layer, np.asarray(lengths))
    expected = by_loops(*inputs, window if on else entries + 1)
    for found in both(q, k, v, cache, lengths, jnp.asarray(on), window=window):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_the_kernel_writes_each_new_entry_into_its_page_and_nothing_else(monkeypatch, int8):
    """In both pages of a block, at the first and last entry of a tile and of a page, and of a
    sequence whose next page does not exist: into page 0, as zeros.
    """
    rng = np.random.default_rng(0)
    monkeypatch.setattr(ragged_attention, "_SLOTS", 3)  # 4 parts
    lengths = np.array([0, 7, 8, 127, 128, 255, 256, 300, 383, 384])
    k, v = (rng.normal(size=(len(lengths), 2, H)).astype(np.float32) for _ in "kv")
    stored = [rng.normal(size=(LAYERS, len(k), 2, 384, H)).astype(np.float32) for _ in "kv"]
    parts = [quantize(jnp.asarray(x)) for x in stored]
    cache = Cache(*(x for x, _ in parts), *(s for _, s in parts)) if int8 else Cache(*stored)
    seen = pack(cache, lengths, 128)._replace(layer=jnp.int32(1))
    q = np.concatenate([k, v], axis=1)
    written = attend_ragged(*map(jnp.asarray, (q, k, v)), seen, interpret=True)[1]
    fresh = [quantize(jnp.asarray(x)) for x in (k, v)]
    fresh = [*(x for x, _ in fresh), *(s for _, s in fresh)] if int8 else [k, v]
    live = sorted(set(np.ravel(seen.table)))
    for n, new in enumerate(fresh):
        found, expected = (np.array(x[n]) for x in (written, seen.pages))
        for slot, length in enumerate(lengths[:-1]):
            page, at = int(seen.table[slot, length // 128]), length % 128
            expected[1, page, :, at] = new[slot]
            found[1, page, :, at + 1 :] = expected[1, page, :, at + 1 :]  # not in use yet
        np.testing.assert_array_equal(found[:, live], expected[:, live])
        assert np.abs(found[1, 0, :, :8].astype(np.float32)).max() < 1e-20  # zeros, and their scale


def test_many_sequences_are_done_in_several_parts(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(7, n, H)), jnp.float32) for n in (4, 2, 2))
    cache = Cache(*(jnp.asarray(rng.normal(size=(1, 7, 2, 300, H)), jnp.float32) for _ in "kv"))
    seen = pack(cache, jnp.asarray([300, 0, 1, 129, 40, 299, 7], jnp.int32), 128)
    once = attend_ragged(q, k, v, seen, interpret=True)[0]
    monkeypatch.setattr(ragged_attention, "_SLOTS", 2)  # 4 parts
    found = attend_ragged(q, k, v, seen, interpret=True)[0]
    np.testing.assert_array_equal(found, once)


def sampled(family, layout):
    """An engine of two slots on each row shard, and its responses to eleven requests."""
    model = tiny.model(family, head_dim=H)
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    params = publisher(decoder.abstract_params(model), mesh, "float32")(tiny.params(model))
    rng, key = np.random.default_rng(0), jax.random.key(7)
    prompts = [rng.integers(5, 40, 1 + n % 5).astype(np.int32) for n in range(11)]
    requests = [Request(n // 2, n % 2, prompt) for n, prompt in enumerate(prompts)]
    limits = engine.Limits(2 * layout[0] * layout[1], 8, 70)
    made = engine.Engine(model, Sampling(1.0, 0.95), (3, 4), limits, mesh=mesh, fetch=fetch)
    return made, made.generate(params, requests, key)


@functools.cache
def sampled_without_kernel(family):
    return sampled(family, (1, 1, 1))[1]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_an_engine_with_the_kernel_samples_the_same_responses(monkeypatch, layout, family):
    """Through the decoder, sharded over rows and heads, with prompts of one token among them: those
    of one device without the kernel.
    """
    expected = sampled_without_kernel(family)
    for module in (sampler, decoder, ragged_attention):
        monkeypatch.setattr(module, "is_ragged", lambda mesh, head_dim: True)
    interpreted = functools.partial(attend_ragged, interpret=True)
    monkeypatch.setattr(ragged_attention, "attend_ragged", interpreted)
    kernel, found = sampled(family, layout)
    assert kernel.page == 128 and kernel.table_len == 1
    assert len({len(r.tokens) for r in expected}) > 3
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, rtol=0, atol=1e-5)


COMPILE = """
    import sys
    import jax
    import tiny
    from dapo_jax import plan
    from dapo_jax.config import MeshSection
    from dapo_jax.rollout.engine import Engine, Limits
    from dapo_jax.rollout.sampler import Sampling, Until
    from dapo_jax.runtime.mesh import make_mesh
    from dapo_jax.model.decoder import abstract_params

    topology, slots, heads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    plan._compile_for_other_machines()
    pod = plan.load_pod(topology)
    mesh = make_mesh(MeshSection(1, len(pod.devices) // 2, 2), pod.devices)
    heads = {"heads": 2 * heads, "kv_heads": heads, "head_dim": 128}
    model = tiny.model(layers=4, compute_dtype="bfloat16", **heads)
    longest = 2**17 // slots
    limits = Limits(slots * len(pod.devices) // 2, longest // 8, longest - longest // 8)
    engine = Engine(model, Sampling(1.0, 1.0), (1,), limits, mesh=mesh, fetch=None)
    state, number = jax.eval_shape(engine.programs.start), jax.ShapeDtypeStruct((), "int32")
    weights = jax.eval_shape(lambda p: p, abstract_params(model))
    table = jax.ShapeDtypeStruct((engine.shards, engine.slots, engine.table_len), "int32")
    inputs = weights, state, table, Until(*[number] * 3)
    lowered = engine.programs.decode.lower(*inputs, width=engine.slots)
    compiled = lowered.compile()
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    print(kernels, compiled.memory_analysis().temp_size_in_bytes, cache // len(pod.devices))
"""


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("topology", "slots", "heads"),
    [
        ("v5e:2x2", 16, 2),
        ("v5p:2x2x1", 16, 2),
        ("v6e:2x2", 16, 2),
        ("v5e:2x2", 512, 16),  # more queries and outputs than fit into its VMEM at once
    ],
)
def test_decoding_for_a_tpu_makes_no_copy_of_the_cache(topology, slots, heads):
    """slots: of a row shard."""
    code = [sys.executable, "-c", textwrap.dedent(COMPILE), topology, str(slots), str(heads)]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        code, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels, temporaries, cache = map(int, done.stdout.split()[-3:])
    assert kernels == 1 and temporaries < cache / 8
