"""Mixtures of experts against a plain loop over tokens, and over meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refusal
from runs import run_train, steady

from dapo_jax.config import DapoSection, Experts, LoraConfig, MeshSection, flatten, load_config
from dapo_jax.dapo.loss import batch_logprobs, loss_fn
from dapo_jax.dapo.packing import TrainItem, build_batch, gather_targets
from dapo_jax.model import experts
from dapo_jax.model.decoder import abstract_params, apply, hidden_states, init, logits_of
from dapo_jax.model.experts import (
    Routing,
    mix,
    mixture,
    mixture_decoded,
    mixture_over,
    route,
    routing_sums,
)
from dapo_jax.model.lora import join, merge, split
from dapo_jax.model.quantization import quantize
from dapo_jax.restore import config_of
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import make_mesh, publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.training.setup import with_computation
from dapo_jax.types import Request

E, D, F = 5, 6, 4
RNG = np.random.default_rng(0)
KERNELS = {
    name: jnp.asarray(0.4 * RNG.normal(size=(E, *shape)), jnp.float32)
    for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))
}


def tokens(t, k):
    draws = RNG.normal(size=(t, D)), RNG.uniform(0.1, 1, size=(t, k))
    return [jnp.asarray(a, jnp.float32) for a in draws]


def plain(x, chosen, weight, kernels):
    """All experts of every token, and a sum over those chosen."""
    gate, up = (jnp.einsum("td,edf->tef", x, kernels[name]) for name in ("gate", "up"))
    each = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, kernels["down"])
    share = (jax.nn.one_hot(chosen, E) * weight[..., None]).sum(axis=1)
    return jnp.einsum("ted,te->td", each, share)


CHOICES = {
    "spread": np.stack([np.random.default_rng(n).permutation(E)[:2] for n in range(150)]),
    "one expert": np.tile([[3, 0]], (70, 1)),  # more rows than two blocks; three experts without
    "blocks end": np.repeat([[0, 4], [1, 2]], 32, axis=0),
    "one token": np.array([[4, 1]]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_experts_compute_exactly_their_tokens(name):
    """Values and gradients. Measured: 3e-7."""
    chosen = jnp.asarray(CHOICES[name], jnp.uint8)
    x, weight = tokens(*chosen.shape)

    def loss(f, x, weight, kernels):
        return jnp.sin(f(x, chosen, weight, kernels)).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(x, weight, KERNELS)
        for f in (mix, plain)
    )
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-3)  # a sum of 900 terms
    for part, other in zip(found[1], expected[1], strict=True):
        assert tiny.gap(part, other) < tiny.GRADIENT


SIZES = (40, 0, 130, 0, 30)  # rows of each expert: empty ones, tiles shared, and 30 rows of none


@pytest.mark.parametrize(
    "sizes, dtype",
    [(SIZES, "float32"), ((0,) * 5, "float32"), ((128, 0, 72, 0, 0), "float32")]
    + [(SIZES, "bfloat16"), (SIZES, "int8")],
)
def test_kernels_of_a_tpu(sizes, dtype, monkeypatch):
    """Interpreted, against a loop over experts, of the second layer of three; outputs in three
    tiles, the last not whole. 8-bit weights with float32 rows.
    """
    monkeypatch.setattr(experts, "_TILE_BYTES", 1)
    rng, n, width = np.random.default_rng(0), 230, 300
    w = jnp.asarray(rng.normal(size=(3, E, D, width)), jnp.float32)
    stack = quantize(w, (-2,)) if dtype == "int8" else w.astype(dtype)
    w = stack.values * stack.scale[:, :, None] if dtype == "int8" else stack
    w = np.asarray(w[1], np.float64)
    draws = (rng.normal(size=(n, size)) for size in (D, width))
    x, d_out = (jnp.asarray(a, "bfloat16" if dtype == "bfloat16" else "float32") for a in draws)
    bounds = jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)
    layer = experts.OfLayer(stack, jnp.int32(1))
    found = experts._by_kernel(x, layer, bounds, 1, interpret=True)
    outer = experts._outer_by_kernel(x, d_out, bounds, interpret=True)
    off = {"rtol": 2**-8, "atol": 1e-4} if dtype == "bfloat16" else {"rtol": 0, "atol": 1e-4}
    assert found.dtype == x.dtype and found.shape == (n, width)
    found, outer, x, d_out = (np.asarray(a, np.float64) for a in (found, outer, x, d_out))
    for e, run in enumerate(map(slice, bounds[:-1], bounds[1:])):
        np.testing.assert_allclose(found[run], x[run] @ w[e], **off)
        np.testing.assert_allclose(outer[e], x[run].T @ d_out[run], **off)
    if dtype == "int8":  # frozen
        return
    turned = experts._by_kernel(jnp.asarray(d_out, stack.dtype), layer, bounds, 2, interpret=True)
    for e, run in enumerate(map(slice, bounds[:-1], bounds[1:])):
        np.testing.assert_allclose(np.float64(turned[run]), d_out[run] @ w[e].T, **off)


def test_a_part_of_the_experts_adds_what_is_its_own():
    chosen = jnp.asarray(CHOICES["spread"], jnp.uint8)
    x, weight = tokens(*chosen.shape)
    run = jax.jit(mix)
    whole = run(x, chosen, weight, KERNELS)
    parts = [
        run(x, chosen, weight, {n: w[first:last] for n, w in KERNELS.items()}, first)
        for first, last in ((0, 2), (2, 5))
    ]
    np.testing.assert_allclose(parts[0] + parts[1], whole, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    """To the bit, also where others are NaN."""
    chosen = jnp.asarray(CHOICES["spread"], jnp.uint8)
    x, weight = tokens(*chosen.shape)
    others = jnp.where(jnp.arange(len(x))[:, None] % 3 == 1, jnp.nan, x)
    found, alone = (np.asarray(jax.jit(mix)(a, chosen, weight, KERNELS)) for a in (others, x))
    kept = np.arange(len(x)) % 3 != 1
    np.testing.assert_array_equal(found[kept], alone[kept])


@pytest.mark.parametrize("normalize", [True, False])
def test_routes(normalize):
    x = RNG.normal(size=(7, D)).astype(np.float32)
    kernel = RNG.normal(size=(D, E)).astype(np.float32)
    probs = np.exp(x @ kernel) / np.exp(x @ kernel).sum(axis=1, keepdims=True)
    inputs = jnp.asarray(x), jnp.asarray(kernel), Experts(E, 2, normalize)
    routing, weight = route(*inputs)
    best = np.argsort(-probs, axis=1)[:, :2]
    np.testing.assert_array_equal(routing.chosen, best)
    expected = np.take_along_axis(probs, best, axis=1)
    expected /= expected.sum(axis=1, keepdims=True) if normalize else 1
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    np.testing.assert_allclose(routing.entropy, -(probs * np.log(probs)).sum(axis=1), rtol=1e-5)
    # earlier choices with the router's own weights, where they are asked for
    earlier, asked = (best + 1) % E, np.arange(7) < 4
    replayed = jnp.asarray(earlier, jnp.uint8), jnp.asarray(asked)
    routing, weight = route(*inputs, replayed)
    np.testing.assert_array_equal(routing.chosen, np.where(asked[:, None], earlier, best))
    expected = np.take_along_axis(probs, np.asarray(routing.chosen, int), axis=1)
    expected /= expected.sum(axis=1, keepdims=True) if normalize else 1
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


@pytest.mark.slow  # test_layouts and the engine below have a mesh
@pytest.mark.parametrize("layout, count", [((2, 2, 2), 4), ((1, 4, 2), 5)], ids=str)
def test_experts_over_a_mesh(layout, count):
    """Values and gradients; 5 experts, which tensor 2 does not divide, are whole everywhere. And as
    decoding calls them, under vmap over the row shards.
    """
    mesh, experts = make_mesh(MeshSection(*layout)), Experts(count, 2)
    x = tokens(36, 2)[0].reshape(4, 9, -1)
    kernels = {name: w[:count] for name, w in KERNELS.items()}
    kernels["router"] = jnp.asarray(RNG.normal(size=(D, count)), jnp.float32)

    def loss(f, x, kernels):
        y, routing = f(x, kernels, experts, None)
        return jnp.sin(y).sum(), routing

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1), has_aux=True))(x, kernels)
        for f in (functools.partial(mixture_over, mesh), mixture)
    )
    assert tiny.gap(found, expected) < tiny.GRADIENT
    decoded = jax.vmap(
        lambda x: mixture_decoded(mesh, x, kernels, experts, None), spmd_axis_name=("data", "fsdp")
    )
    y, routing = jax.jit(decoded)(x)
    np.testing.assert_allclose(y, mixture(x, kernels, experts, None)[0], atol=1e-5)
    np.testing.assert_array_equal(routing.chosen, expected[0][1].chosen)


# ---- Routing replay ------------------------------------------------------------------------------

MODEL = tiny.model("qwen3_moe")  # 2 layers of 4 experts, 2 of a token


@functools.cache
def sampled(layout=(2, 2, 2)):
    """Six responses of the engine, with their experts; the slots are fewer, so some wait."""
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    limits = Limits(slots=4, max_prompt_len=6, max_response_len=9, experts=True)
    engine = Engine(MODEL, Sampling(), (3,), limits, mesh=mesh, fetch=fetch)
    weights = publisher(abstract_params(MODEL), mesh, "float32")(tiny.params(MODEL))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 40, n).astype(np.int32) for n in (1, 3, 6, 2, 5, 4)]
    requests = [Request(n, 0, prompt) for n, prompt in enumerate(prompts)]
    return requests, engine.generate(weights, requests, jax.random.key(0)), (engine, weights)


def items(weight=1.0):
    requests, responses, _ = sampled()
    for q, r in zip(requests, responses, strict=True):
        old = r.behavior_logprobs
        yield TrainItem(q.prompt, r.tokens, old, old, 1.0, weight, experts=r.experts)


def batch_of(found):
    batch, stats = build_batch(list(found), row_len=16, rows_per_microbatch=6, microbatches=1)
    return jax.tree.map(lambda a: jnp.asarray(a[0]), batch), stats


def logprobs_of(batch, stats):
    run = jax.jit(functools.partial(batch_logprobs, model=MODEL, chunk_size=32))
    found = np.asarray(run(tiny.params(MODEL), batch))[None]
    return np.concatenate(gather_targets(found, stats.placement))


@jax.jit
def forward(tokens, replayed=None):
    """Log-probs [6, 16, V] and routing of rows of one sequence each."""
    params = tiny.params(MODEL)
    hidden, entries = hidden_states(params, MODEL, tokens, replayed=replayed)
    return jax.nn.log_softmax(logits_of(params, hidden)), entries.routing


def rows_of(found):
    """Tokens [6, 16], and of each row the states that predict its response."""
    tokens, states = np.zeros((6, 16), np.int32), []
    for row, item in zip(tokens, found, strict=True):
        p, end = len(item.prompt), len(item.prompt) + len(item.response)
        row[:end] = np.concatenate([item.prompt, item.response])
        states.append(np.arange(p - 1, end - 1))
    return tokens, states


def test_the_sampler_records_the_experts_that_a_forward_pass_chooses():
    tokens, states = rows_of(items())
    logprobs, routing = forward(tokens)
    for n, (item, at) in enumerate(zip(items(), states, strict=True)):
        expected = np.moveaxis(np.asarray(routing.chosen)[:, n, at], 0, 1)
        np.testing.assert_array_equal(item.experts, expected.reshape(len(at), 4))
        found = np.asarray(logprobs)[n, at, item.response]
        np.testing.assert_allclose(item.behavior_logprobs, found, atol=1e-5)


def test_a_continued_response_has_the_experts_of_an_uninterrupted_one():
    requests, responses, (engine, weights) = sampled()
    cut = [
        q._replace(prefix=tuple(values[:2] for values in r.sampled))
        for q, r in zip(requests, responses, strict=True)
        if len(r.tokens) > 2
    ]
    again = engine.generate(weights, cut, jax.random.key(0))
    assert len(again) > 2
    for r in again:
        whole = next(x for x in responses if np.array_equal(x.tokens, r.tokens))
        np.testing.assert_array_equal(r.experts, whole.experts)


def test_replayed_experts_are_those_of_the_states_that_predict_each_token():
    """The router's own choices change nothing; others give what a plain pass gives with them."""
    batch, stats = batch_of(items())
    own = logprobs_of(batch._replace(experts=None), stats)
    np.testing.assert_allclose(logprobs_of(batch, stats), own, atol=1e-6)
    changed = [item._replace(experts=(item.experts + 1) % 4) for item in items()]
    found = logprobs_of(*batch_of(changed))
    assert np.abs(found - own).max() > 1e-2
    # each alone in a row; of prompts only the last token is replayed
    tokens, states = rows_of(changed)
    chosen, mask = np.zeros((6, 16, 4), np.uint8), np.zeros((6, 16), bool)
    for n, (item, at) in enumerate(zip(changed, states, strict=True)):
        chosen[n, at], mask[n, at] = item.experts, True
    replayed = np.moveaxis(chosen.reshape(6, 16, 2, 2), 2, 0), mask
    logprobs, _ = forward(tokens, jax.tree.map(jnp.asarray, replayed))
    each = zip(np.asarray(logprobs), states, changed, strict=True)
    expected = np.concatenate([row[at, item.response] for row, at, item in each])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_metrics_of_routing():
    """Against counts of the experts chosen; padding does not count."""
    batch, stats = batch_of(items())
    batch = batch._replace(experts=None)
    loss = functools.partial(loss_fn, model=MODEL, algo=DapoSection(), chunk_size=32)
    sums = jax.jit(loss)(tiny.params(MODEL), batch)[1]
    rows = batch.tokens, batch.positions, batch.segment_ids
    states = jax.jit(hidden_states, static_argnums=1)
    routing = states(tiny.params(MODEL), MODEL, *rows)[1].routing
    held = np.asarray(batch.segment_ids) > 0
    assert sums["routed"] == held.sum() == stats.tokens
    loads = [np.bincount(np.asarray(layer)[held].ravel(), minlength=4) for layer in routing.chosen]
    expected = np.mean([load.max() / load.mean() for load in loads])
    assert float(sums["expert_load"]) == pytest.approx(held.sum() * expected, rel=1e-5)
    entropy = np.asarray(routing.entropy)[:, held].mean(axis=0).sum()
    assert float(sums["router_entropy"]) == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.slow
def test_adapters_of_attention_are_trained_and_experts_are_frozen():
    lora = LoraConfig(2, targets=("q", "k", "v", "o"))
    config = dataclasses.replace(MODEL, lora=lora)
    trained, frozen = split(jax.jit(functools.partial(init, config))(jax.random.key(0)), lora)
    assert {name.split(".")[1] for name in flatten(trained)} == {"attn"}
    assert {f"layers.experts.{part}.kernel" for part in KERNELS} < flatten(frozen).keys()
    trained = jax.tree.map(lambda a: a + 0.1, trained)  # B is 0 at first
    params, tokens = join(trained, frozen), jnp.arange(12, dtype=jnp.int32)[None]
    run = jax.jit(apply, static_argnums=1)
    found, expected = run(params, config, tokens), run(merge(params, lora), MODEL, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - run(frozen, MODEL, tokens)).max() > 1e-2


def test_the_load_of_fewer_tokens_than_experts():
    """One token of one expert of eight: 8 times the mean. None: 0."""
    routing = Routing(jnp.full((1, 1, 2, 1), 5, jnp.uint8), jnp.zeros((1, 1, 2)))
    for held, load in ((1, 8), (0, 0)):
        assert routing_sums(routing, jnp.arange(2)[None] < held, 8)["expert_load"] == load


MIXTURE = (
    "model.architecture.family=qwen3_moe",
    "model.architecture.experts={count: 4, per_token: 2}",
    "model.compute_dtype=bfloat16",
    "dapo.replay_routing=true",
    "dapo.partial_rollouts=true",
    "dapo.prompts_per_draw=24",
    "rollout.decode_slots=8",
    "eval.every=0",
    "supervised.updates=0",
    "train.save_every=1",
)


@pytest.mark.slow
def test_a_mixture_is_trained_from_samples_of_8_bit_experts(config, tmp_path):
    options = ("rollout.weights=int8", "dapo.importance_cap=2", "train.steps=1")
    assert run_train(config, tmp_path / "run", *MIXTURE, *options) == 0
    (line,) = steady(tmp_path / "run")
    assert line["optim/grad_norm"] > 0 and 0 < line["policy/sampler_gap_mean"] < 0.1


def test_verbs_after_training_replay_nothing(config, tmp_path):
    """So `evaluate --model` of a dense model takes the config of a run with replay."""
    text = config.read_text().replace("dapo: {", "dapo: {replay_routing: true, ")
    (file := tmp_path / "replay.yaml").write_text(text)
    assert load_config(str(file)).dapo.replay_routing
    with_computation(config_of(str(file), None), tiny.model("qwen3"))


@pytest.mark.slow
def test_a_run_with_replay_resumes_bit_for_bit(config, tmp_path):
    """Experts of buffered groups and of open ones go through the checkpoint."""
    assert run_train(config, tmp_path / "whole", *MIXTURE, "train.steps=2") == 0
    assert run_train(config, tmp_path / "cut", *MIXTURE, "train.steps=1") == 0
    assert run_train(config, tmp_path / "cut", *MIXTURE, "train.steps=2") == 0
    lines = steady(tmp_path / "whole")
    assert steady(tmp_path / "cut") == lines and lines[0]["filter/open_groups"]
    assert all(1 <= line["policy/expert_load_max"] <= 2 for line in lines)
    assert all(0 < line["policy/router_entropy"] <= np.log(4) for line in lines)


@pytest.mark.parametrize(
    "family, option, message",
    [
        ("qwen3", {"dapo.replay_routing": True}, "dapo.replay_routing: qwen3 "),
        ("qwen3_moe", {"model.lora": {}}, "model.lora.targets: ...experts ...down"),
    ],
)
def test_options_of_experts_that_a_model_cannot_have(family, option, message, config):
    loaded = load_config(config, [f"{key}={json.dumps(value)}" for key, value in option.items()])
    with refusal(message):
        with_computation(loaded, tiny.model(family))
