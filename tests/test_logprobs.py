"""Fused log-probs and loss against a whole log_softmax: values, entropies, both gradients, and the
memory they take.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from dapo_jax.config import DapoSection, MeshSection
from dapo_jax.dapo.loss import dapo_terms
from dapo_jax.model import logprobs as fused
from dapo_jax.model.logprobs import linear_logprobs, linear_loss
from dapo_jax.rollout import token_sampling
from dapo_jax.runtime.compiled import sent_bytes
from dapo_jax.runtime.hlo import Module
from dapo_jax.runtime.mesh import make_mesh, put_rows
from dapo_jax.types import TrainBatch

N, D, V = 40, 16, 130
TEMPERATURE = 0.7


def make_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(N, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)) / 2, np.float32)
    targets, mask = rng.integers(0, V, N).astype(np.int32), rng.random(N) < 0.6
    targets[:6] = 0, 25, 26, 64, 65, V - 1  # where a vocabulary over 2 or 5 devices is split
    mask[:6] = True
    return hidden, head, targets, mask, rng.normal(size=N).astype(np.float32)


def plain_logprobs(hidden, head, targets, mask):
    hidden = hidden.astype(jnp.float32)
    log_softmax = jax.nn.log_softmax(hidden @ head / TEMPERATURE)
    logprobs = jnp.take_along_axis(log_softmax, targets[:, None], axis=-1)[:, 0]
    entropy = -(jnp.exp(log_softmax) * log_softmax).sum(axis=-1)
    return jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropy, 0.0)


def token_loss(logprobs, entropy, weight):
    """Not linear in the log-prob, so that its slope differs from token to token."""
    return weight * jnp.sin(logprobs), {
        "entropy": entropy,
        "prob": jnp.exp(logprobs),
        "tokens": jnp.ones_like(logprobs),
    }


def plain_loss(hidden, head, targets, mask, weight):
    loss, metrics = token_loss(*plain_logprobs(hidden, head, targets, mask), weight)
    return jnp.where(mask, loss, 0.0).sum(), {
        name: jnp.where(mask, value, 0.0).sum() for name, value in metrics.items()
    }


def fused_loss(hidden, head, targets, mask, weight, **options):
    return linear_loss(
        hidden, head, targets, token_loss, weight, mask=mask, temperature=TEMPERATURE, **options
    )


def compiled(loss, **options):
    return jax.jit(
        jax.value_and_grad(functools.partial(loss, **options), argnums=(0, 1), has_aux=True)
    )


@pytest.fixture(scope="module")
def expected_loss():
    return compiled(plain_loss)(*make_inputs())


# --------------------------------------------------------------------------------------------------------------------
# linear_loss
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 1024])
def test_linear_loss_equals_a_whole_log_softmax(expected_loss, chunk_size):
    """Measured: relative gaps of 2e-7 in the loss, 6e-7 in the gradients."""
    (loss, metrics), grads = compiled(fused_loss, chunk_size=chunk_size)(*make_inputs())
    (plain, plain_metrics), plain_grads = expected_loss
    assert tiny.gap(loss, plain) < 1e-6
    assert tiny.gap([metrics[k] for k in plain_metrics], list(plain_metrics.values())) < 1e-6
    assert [g.dtype for g in grads] == [jnp.float32] * 2
    for found, expected in zip(grads, plain_grads, strict=True):
        assert tiny.gap(found, expected) < 1e-6
    assert not np.asarray(grads[0])[~make_inputs()[3]].any()  # no target, no gradient


def test_the_loss_without_gradients_is_the_same(expected_loss):
    loss, metrics = jax.jit(functools.partial(fused_loss, chunk_size=16))(*make_inputs())
    assert tiny.gap(loss, expected_loss[0][0]) < 1e-6
    assert tiny.gap(metrics["entropy"], expected_loss[0][1]["entropy"]) < 1e-6


def test_what_rows_without_a_target_hold_changes_nothing():
    hidden, head, targets, mask, weight = make_inputs()
    run = compiled(fused_loss, chunk_size=16)
    clean = run(hidden, head, targets, mask, weight)
    other = run(
        jnp.where(mask[:, None], hidden, 1e3),
        head,
        np.where(mask, targets, V - 1),
        mask,
        np.where(mask, weight, np.float32(np.nan)),
    )
    jax.tree.map(np.testing.assert_array_equal, clean, other)


def test_no_targets_at_all():
    hidden, head, targets, mask, weight = make_inputs()
    run = compiled(fused_loss, chunk_size=16)
    (loss, metrics), grads = run(hidden, head, targets, np.zeros_like(mask), weight)
    assert loss == 0 and not any(metrics.values())
    assert not any(np.asarray(g).any() for g in grads)
    logprobs, entropy = linear_logprobs(
        hidden, head, targets, mask=np.zeros_like(mask), chunk_size=16
    )
    assert not np.asarray(logprobs).any() and not np.asarray(entropy).any()


def test_cotangents_scale_both_gradients_and_no_mask_is_all_rows():
    hidden, head, targets, _, weight = make_inputs()
    everything = np.ones(N, bool)

    def run(loss, mask):
        return jax.jit(
            jax.grad(
                lambda h, w: jnp.exp(0.1 * loss(h, w, targets, mask, weight)[0]), argnums=(0, 1)
            )
        )(hidden, head)

    assert tiny.gap(run(fused_loss, None), run(plain_loss, everything)) < 2e-6


def test_the_default_temperature_is_1():
    found = linear_loss(*make_inputs()[:3], token_loss, make_inputs()[4])[0]
    one = linear_loss(*make_inputs()[:3], token_loss, make_inputs()[4], temperature=1.0)[0]
    assert found == one


def test_bfloat16_hidden_states():
    """Logits are float32 sums of bfloat16 products, probabilities go back to bfloat16 for the
    gradients.

    Against float32 on the same rounded inputs. Measured: loss 7e-8, gradients 0.24% relative.
    """
    hidden, head, *rest = make_inputs(jnp.bfloat16)
    (loss, _), (d_hidden, d_head) = compiled(fused_loss, chunk_size=16)(hidden, head, *rest)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    (plain, _), plain_grads = compiled(plain_loss)(hidden.astype(jnp.float32), rounded, *rest)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    assert tiny.gap(loss, plain) < 1e-5
    assert tiny.gap(d_hidden, plain_grads[0]) < 0.01 and tiny.gap(d_head, plain_grads[1]) < 0.01


# --------------------------------------------------------------------------------------------------------------------
# linear_logprobs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_linear_logprobs_and_entropy_and_their_gradients_equal_a_whole_log_softmax(chunk_size):
    """Measured: relative gaps of gradients 7e-7."""
    hidden, head, targets, mask, weight = make_inputs()
    fused = functools.partial(linear_logprobs, temperature=TEMPERATURE, chunk_size=chunk_size)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)

    def run(function):
        out, pull = jax.vjp(function, hidden, head)
        return out, pull((jnp.asarray(weight), jnp.zeros(N))), pull((jnp.zeros(N), probe))

    found = jax.jit(lambda: run(lambda h, w: fused(h, w, targets, mask=mask)))()
    expected = jax.jit(lambda: run(lambda h, w: plain_logprobs(h, w, targets, mask)))()
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    assert tiny.gap(found[1], expected[1]) < 2e-6  # through log-probs
    assert tiny.gap(found[2], expected[2]) < 2e-6  # through entropies


def test_a_dominant_logit_gives_finite_numbers():
    hidden, head, targets, mask, weight = make_inputs()
    (loss, metrics), grads = compiled(fused_loss, chunk_size=16)(
        1e4 * hidden, head, targets, mask, weight
    )
    assert (
        np.isfinite(loss)
        and all(np.isfinite(v) for v in metrics.values())
        and all(np.isfinite(g).all() for g in grads)
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_vocabulary_that_no_block_divides(dtype):
    """151,936 entries, of Qwen, in which every logit is far below 0: a column that padding adds with
    logit 0 would hold nearly all of the mass. Against float64. Measured: 2e-6 in the log-probs
    (about -12), 6e-7 in the loss, 2e-6 in the gradients, 0.3% in bfloat16.
    """
    n, d, v = 5, 8, 151_936
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(np.concatenate([np.ones((n, 1)), rng.normal(size=(n, d - 1))], 1), dtype)
    head = rng.normal(size=(d, v)).astype(np.float32) / 4
    head[0] -= 20.0
    targets = np.array([0, 1, v - 1, v - 64, 99_999], np.int32)
    weight = rng.normal(size=n).astype(np.float32)

    h, w = (np.asarray(x.astype(dtype), np.float64) for x in (hidden, jnp.asarray(head)))
    logits = h @ w
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = probs.sum(axis=1, keepdims=True)
    expected = (logits - logits.max(axis=1, keepdims=True) - np.log(total))[np.arange(n), targets]
    d_logits = -probs / total
    d_logits[np.arange(n), targets] += 1
    d_logits *= (weight * np.cos(expected))[:, None]  # of token_loss, sin

    logprobs, _ = jax.jit(functools.partial(linear_logprobs, chunk_size=2))(hidden, head, targets)
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=5e-6)

    def loss(hidden, head):
        return linear_loss(hidden, head, targets, token_loss, weight, chunk_size=2)[0]

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    assert float(value) == pytest.approx(float(weight @ np.sin(expected)), rel=1e-5)
    bound = 1e-5 if dtype == np.float32 else 0.01
    # Without the part through the row that lowers all logits: its true value is 0.
    assert tiny.gap(grads[0][:, 1:], (d_logits @ w.T)[:, 1:]) < bound
    assert tiny.gap(grads[1], h.T @ d_logits) < bound


@pytest.mark.parametrize("error", [0.0, 1e-4], ids=["exact", "as on a TPU"])
def test_no_logprob_is_above_zero(error, monkeypatch):
    """Where one token has nearly all of the mass, also if `log` is off by what a TPU's may be."""
    monkeypatch.setattr(fused, "log", lambda x: jnp.log(x) - error)
    monkeypatch.setattr(token_sampling, "log", lambda x: jnp.log(x) - error)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(64, 8)).astype(np.float32) * np.logspace(-2, 4, 64)[:, None]
    head = rng.normal(size=(8, 130)).astype(np.float32)
    logits = np.float32(hidden @ head)
    best = logits.argmax(axis=1).astype(np.int32)
    logprobs, _ = linear_logprobs(np.float32(hidden), head, best)
    assert -1e-9 < logprobs.max() <= 0 and logprobs.min() < -1
    keys = jax.random.split(jax.random.key(0), 64)
    for temperature in (0.0, 1.0):
        sampling = token_sampling.Sampling(temperature=temperature)
        _, sampled = token_sampling.sample_tokens(jnp.asarray(logits), keys, sampling)
        assert -1e-9 < sampled.max() <= 0 and sampled.min() < -1
    unclamped = jnp.log(jnp.ones(())) - error
    assert (unclamped < 0) == (error > 0)  # so -log_total would be above 0


def test_exp_and_log_ask_a_tpu_for_the_highest_accuracy():
    """In the program as it is handed to the TPU's compiler: of loss and gradient, log-probs and
    sampling, each exponential and logarithm whose result is used. What the chip makes of it cannot
    be seen without one.
    """
    hidden, head, targets, mask, weight = make_inputs()
    flat = TrainBatch(*[targets] * 3, mask, *[weight] * 4, mask)

    def dapo(hidden, head, algo):
        terms = functools.partial(dapo_terms, algo=algo)
        return linear_loss(hidden, head, targets, terms, flat, mask=mask)[0]

    def sample(logits):
        sampling = token_sampling.Sampling(top_k=8, top_p=0.9)
        return token_sampling.sample_tokens(
            logits, jax.random.split(jax.random.key(0), N), sampling
        )

    algos = [
        DapoSection(importance_cap=2.0, token_mask=(0.5, 5.0)),
        DapoSection(objective="cispo", old_logprobs="sampler"),
        DapoSection(importance_cap=2.0, old_logprobs="sampler"),
    ]
    loss = [jax.grad(functools.partial(dapo, algo=algo), argnums=(0, 1)) for algo in algos]
    programs = [(function, (hidden, head)) for function in loss]
    programs += [
        (functools.partial(linear_logprobs, targets=targets, mask=mask), (hidden, head)),
        (sample, (jnp.zeros((N, V)),)),
    ]
    for function, inputs in programs:
        text = jax.jit(function).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
        kinds = set()
        for body in text.split("func.func"):  # names are of one function
            for name, kind, rest in re.findall(r"(%\w+) = stablehlo\.(exponential|log) (.*)", body):
                used = len(re.findall(rf"{name}\b", body)) > 1
                assert "HIGHEST" in rest or not used, (function, kind, rest)
                kinds.add(kind)
        assert kinds == {"exponential", "log"}


# --------------------------------------------------------------------------------------------------------------------
# Devices and memory
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(8, 1, 1), (2, 2, 2), (1, 3, 2), (1, 1, 5), (1, 2, 4)], ids=str)
def test_rows_and_vocabulary_spread_unevenly_over_devices(expected_loss, layout):
    """One device has no targets at all, so trip counts differ; the vocabulary of 130 is split over
    2 and 5 devices and stays whole on 4; 3 does not divide D, so that ∂head is not scattered.
    Measured: relative gaps as on one device.
    """
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    hidden, head, targets, mask, weight = make_inputs()
    order = np.argsort(mask, kind="stable")  # rows without a target first
    order = order[: len(order) - len(order) % (layout[0] * layout[1])]
    sharded = put_rows(
        [np.asarray(a)[order] for a in (hidden, targets, mask, weight)], mesh, axis=0
    )
    (loss, metrics), (d_hidden, d_head) = compiled(fused_loss, chunk_size=3, mesh=mesh)(
        sharded[0], head, *sharded[1:]
    )
    (plain, plain_metrics), plain_grads = (
        expected_loss
        if len(order) == N
        else compiled(plain_loss)(hidden[order], head, targets[order], mask[order], weight[order])
    )
    assert tiny.gap(loss, plain) < 1e-6
    assert tiny.gap([metrics[k] for k in plain_metrics], list(plain_metrics.values())) < 1e-6
    rows = order if len(order) == N else np.arange(len(order))
    assert (
        tiny.gap(d_hidden, np.asarray(plain_grads[0])[rows]) < 1e-6
        and tiny.gap(d_head, plain_grads[1]) < 1e-6
    )

    probe = jnp.asarray(np.random.default_rng(1).normal(size=len(order)), jnp.float32)

    def pulled(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull((probe, 0.5 * probe))

    fused = functools.partial(
        linear_logprobs,
        targets=sharded[1],
        mask=sharded[2],
        temperature=TEMPERATURE,
        chunk_size=3,
        mesh=mesh,
    )
    values, slopes = jax.jit(lambda h, w: pulled(fused, h, w))(sharded[0], head)
    expected = functools.partial(plain_logprobs, targets=targets[order], mask=mask[order])
    plain_values, plain_slopes = jax.jit(lambda h, w: pulled(expected, h, w))(hidden[order], head)
    for found, whole in zip(values, plain_values, strict=True):
        np.testing.assert_allclose(found, whole, rtol=0, atol=5e-6)
    assert tiny.gap(slopes, plain_slopes) < 2e-6


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_the_head_is_gathered_in_compute_dtype(layout, function):
    """Half the bytes of the float32 parameter.

    In float16, because a CPU gathers bfloat16 as float32.
    """
    mesh, (d, v) = make_mesh(MeshSection(*layout)), (32, 512)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    hidden = jax.ShapeDtypeStruct((64, d), jnp.float16, sharding=rows)
    head = jax.ShapeDtypeStruct(
        (d, v), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    )
    targets, weight = (
        jax.ShapeDtypeStruct((64,), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32)
    )

    def run(hidden, head, targets, weight):
        if function == "loss":
            return linear_loss(hidden, head, targets, token_loss, weight, chunk_size=16, mesh=mesh)[
                0
            ]
        return (weight * linear_logprobs(hidden, head, targets, chunk_size=16, mesh=mesh)[0]).sum()

    program = jax.jit(run).lower(hidden, head, targets, weight).compile()
    sent = sent_bytes(Module(program.as_text()))
    gathered = sum(size for link, size in sent.items() if link.kind == "all-gather")
    assert gathered == 2 * d * v // layout[2] * (layout[1] - 1) / layout[1]


@pytest.mark.parametrize(
    "layout, whole", [((1, 1, 2), False), ((1, 1, 4), True)], ids=["split", "does not divide"]
)
def test_no_device_makes_logits_of_the_whole_vocabulary(layout, whole):
    mesh = make_mesh(MeshSection(*layout), jax.devices()[: np.prod(layout)])
    program = (
        compiled(fused_loss, chunk_size=7, mesh=mesh).lower(*make_inputs()).compile().as_text()
    )
    assert (f"f32[7,{V}]" in program) == whole
    assert (f"f32[7,{V // 2}]" in program) != whole


def largest(jaxpr) -> int:
    """Elements of the largest array that a jaxpr makes, at any depth."""
    inner = [
        j
        for eqn in jaxpr.eqns
        for p in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
        for j in [getattr(p, "jaxpr", p)]
    ]
    own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    return max(own + [largest(j) for j in inner if hasattr(j, "eqns")], default=0)


@pytest.mark.parametrize(
    "function, forbidden",
    [
        (compiled(fused_loss, chunk_size=32), False),
        (
            jax.grad(
                lambda h, w, y, m, _: sum(
                    x.sum() for x in linear_logprobs(h, w, y, mask=m, chunk_size=32)
                ),
                argnums=(0, 1),
            ),
            False,
        ),
        (compiled(plain_loss), True),
    ],
    ids=["linear_loss", "linear_logprobs", "plain"],
)
def test_no_array_of_tokens_times_vocabulary_is_ever_made(function, forbidden):
    n, d, v = 2048, 8, 512
    shapes = [
        ((n, d), np.float32),
        ((d, v), np.float32),
        ((n,), np.int32),
        ((n,), bool),
        ((n,), np.float32),
    ]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    elements = largest(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert elements >= n * v if forbidden else elements == 32 * v == n * d
    temporaries = jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporaries >= 4 * n * v if forbidden else temporaries < n * v
