"""One update: AdamW by hand, micro-batches that add up, updates that are skipped, one compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dapo_jax.config import DapoSection, OptimSection
from dapo_jax.dapo.loss import batch_logprobs, loss_fn
from dapo_jax.dapo.packing import build_batch, gather_targets
from dapo_jax.dapo.update import (
    accumulate,
    init_state,
    learning_rate,
    make_optimizer,
    map_microbatches,
    summarize,
    update_step,
    used_microbatches,
)
from dapo_jax.types import TrainBatch

SECTION = OptimSection(weight_decay=0.1, grad_clip=1.0, b1=0.9, b2=0.99, eps=1e-4)
OPTIMIZER = make_optimizer(SECTION)


def make_batch(m, used, n=2, t=3):
    """[m, n, t] random numbers, targets in the first `used` micro-batches only."""
    rng = np.random.default_rng(m)
    floats = [rng.normal(size=(m, n, t)).astype(np.float32) for _ in range(4)]
    ids = np.ones((m, n, t), np.int32)
    targets = np.broadcast_to(np.arange(m)[:, None, None] < used, (m, n, t)).copy()
    return TrainBatch(ids, ids, ids, targets, *floats, current=targets)


# --------------------------------------------------------------------------------------------------------------------
# Learning rate
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step, rate", [(1, 5e-8), (10, 5e-7), (20, 1e-6), (21, 1e-6), (320, 1e-6)])
def test_warm_up_counts_rollout_steps(step, rate):
    assert learning_rate(OptimSection(learning_rate=1e-6, warmup_steps=20), step) == pytest.approx(
        rate, rel=1e-12
    )


def test_no_warm_up_is_the_full_rate_at_once():
    assert learning_rate(OptimSection(learning_rate=3e-4, warmup_steps=0), 1) == 3e-4


# --------------------------------------------------------------------------------------------------------------------
# Micro-batches
# --------------------------------------------------------------------------------------------------------------------


def test_used_microbatches_counts_up_to_the_last_that_holds_a_target():
    mask = make_batch(5, 0).target_mask
    assert used_microbatches(make_batch(5, 0)) == 0
    assert used_microbatches(make_batch(5, 5)) == 5
    for last in range(5):
        one = mask.copy()
        one[last, 1, 2] = True  # also with empty ones before it
        assert used_microbatches(make_batch(5, 0)._replace(target_mask=one)) == last + 1


def test_map_microbatches_leaves_the_empty_ones_at_the_end_at_zero():
    batch = make_batch(4, 3)
    batch.target_mask[1] = False  # empty, but in the middle
    batch.weight[3] = np.nan
    out = jax.jit(
        functools.partial(map_microbatches, function=lambda p, b: p["a"] * b.weight + b.advantages)
    )({"a": 2.0}, batch)
    np.testing.assert_allclose(out[:3], 2 * batch.weight[:3] + batch.advantages[:3], rtol=1e-6)
    assert not np.asarray(out[3]).any()


def toy_loss(params, batch):
    """Quadratic in the parameters around what the batch holds: its gradient is known."""
    center = {"w": batch.weight.sum(axis=0), "b": batch.advantages.sum()}
    loss = 0.5 * sum(jnp.sum((params[k] - center[k]) ** 2) for k in center)
    return loss, {"tokens": batch.target_mask.sum().astype(jnp.float32)}


def test_gradients_of_microbatches_add_up_and_are_divided_by_nothing():
    params = {"w": np.float32([1, 2, 3]), "b": np.float32(-1)}
    batch = make_batch(6, 4)
    batch.weight[4:] = np.nan  # padding is not even computed
    loss, sums, grads = jax.jit(functools.partial(accumulate, loss_fn=toy_loss))(params, batch)
    slope_w = sum(params["w"] - batch.weight[i].sum(axis=0) for i in range(4))
    slope_b = sum(params["b"] - batch.advantages[i].sum() for i in range(4))
    np.testing.assert_allclose(grads["w"], slope_w, rtol=1e-5)
    np.testing.assert_allclose(grads["b"], slope_b, rtol=1e-5)
    expected = [
        0.5 * ((params["w"] - batch.weight[i].sum(axis=0)) ** 2).sum()
        + 0.5 * (params["b"] - batch.advantages[i].sum()) ** 2
        for i in range(4)
    ]
    assert float(loss) == pytest.approx(float(sum(expected)), rel=1e-5)
    assert sums["tokens"] == 4 * 6


# --------------------------------------------------------------------------------------------------------------------
# AdamW
# --------------------------------------------------------------------------------------------------------------------

toy_update = jax.jit(functools.partial(update_step, loss_fn=toy_loss, optimizer=OPTIMIZER))


def adamw(params, slopes, rates):
    """AdamW with global-norm clipping and decoupled decay, in float64 numpy."""
    mu, nu = {k: 0.0 for k in params}, {k: 0.0 for k in params}
    params = {k: np.float64(v) for k, v in params.items()}
    norms = []
    for step, (slope, rate) in enumerate(zip(slopes, rates, strict=True), start=1):
        gradient = slope(params)
        norms.append(np.sqrt(sum((g**2).sum() for g in gradient.values())))
        for k, g in gradient.items():
            g = g * min(1.0, SECTION.grad_clip / norms[-1])
            mu[k] = SECTION.b1 * mu[k] + (1 - SECTION.b1) * g
            nu[k] = SECTION.b2 * nu[k] + (1 - SECTION.b2) * g**2
            root = np.sqrt(nu[k] / (1 - SECTION.b2**step)) + SECTION.eps
            params[k] = params[k] - rate * (
                mu[k] / (1 - SECTION.b1**step) / root + SECTION.weight_decay * params[k]
            )
    return params, norms


def test_two_updates_are_adamw_by_hand():
    start = {"w": np.float32([1, -2, 3]), "b": np.float32(0.5)}
    near = make_batch(2, 1)
    near.weight[0], near.advantages[0] = 0, 0
    near.weight[0, 0], near.advantages[0, 0, 0] = (
        start["w"] - np.float32([0.02, 0.01, -0.03]),
        0.5,
    )  # a gradient of norm below 1
    batches = [make_batch(2, 2), near]
    state, rates, norms = init_state(start, OPTIMIZER), [0.1, 0.01], []
    for batch, rate in zip(batches, rates, strict=True):
        state, metrics = toy_update(state, batch, np.float32(rate))
        norms.append(float(metrics["grad_norm"]))

    def slope(batch, used):
        return lambda p: {
            "w": sum(p["w"] - batch.weight[i].sum(axis=0, dtype=np.float64) for i in range(used)),
            "b": sum(p["b"] - batch.advantages[i].sum(dtype=np.float64) for i in range(used)),
        }

    expected, expected_norms = adamw(start, [slope(batches[0], 2), slope(near, 1)], rates)
    assert expected_norms[0] > 1 > expected_norms[1]  # the first is clipped, the second is not
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for k in start:
        np.testing.assert_allclose(state.params[k], expected[k], rtol=2e-6)
    assert state.updates == 2 and metrics["skipped"] == 0 and metrics["tokens"] == 6


def test_weights_decay_by_the_learning_rate_where_there_is_no_gradient():
    state, _ = toy_update(
        init_state({"w": np.float32([4, 0, 0]), "b": np.float32(2)}, OPTIMIZER),
        make_batch(2, 0),
        np.float32(0.5),
    )
    np.testing.assert_allclose(state.params["w"], [4 * (1 - 0.5 * 0.1), 0, 0], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_non_finite_update_changes_nothing_and_is_reported(value):
    """1e30 is finite itself, but its square, in loss and norm, is not."""
    state, _ = toy_update(
        init_state({"w": np.float32([1, 2, 3]), "b": np.float32(0)}, OPTIMIZER),
        make_batch(2, 2),
        np.float32(0.1),
    )
    bad = make_batch(2, 2)
    bad.advantages[1, 0, 0] = value
    after, metrics = toy_update(state, bad, np.float32(0.1))
    assert metrics["skipped"] == 1 and not (
        np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            np.asarray(a).view(np.int32), np.asarray(b).view(np.int32)
        ),
        after,
        state,
    )
    assert after.updates == 1
    recovered, metrics = toy_update(after, make_batch(2, 2), np.float32(0.1))
    assert (
        metrics["skipped"] == 0
        and recovered.updates == 2
        and np.isfinite(recovered.params["w"]).all()
    )


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_finite():
    def loss(params, batch):
        return jnp.sum(
            jnp.sqrt(jnp.abs(params["w"]))
        ) * batch.weight.sum(), {}  # of slope 0 · inf at 0

    state = init_state({"w": np.zeros(3, np.float32)}, OPTIMIZER)
    run = jax.jit(functools.partial(update_step, loss_fn=loss, optimizer=OPTIMIZER))
    after, metrics = run(state, make_batch(1, 1), np.float32(0.1))
    assert (
        metrics["loss"] == 0
        and metrics["skipped"] == 1
        and after.updates == 0
        and not np.asarray(after.params["w"]).any()
    )


# --------------------------------------------------------------------------------------------------------------------
# With the DAPO loss and a model
# --------------------------------------------------------------------------------------------------------------------

MODEL = tiny.model()
ITEMS = tiny.make_items(MODEL, 12)
LOSS = functools.partial(loss_fn, model=MODEL, algo=DapoSection(), chunk_size=16)
SHAPE = {"row_len": 13, "rows_per_microbatch": 2, "microbatches": 7}


@pytest.fixture(scope="module")
def update():
    return jax.jit(
        functools.partial(update_step, loss_fn=LOSS, optimizer=OPTIMIZER), donate_argnums=0
    )


@pytest.fixture
def state():
    return init_state(
        jax.tree.map(jnp.copy, tiny.params(MODEL)), OPTIMIZER
    )  # a copy, because updates donate it


def on_policy(items):
    """The items with the trainer's own log-probs as old ones, recomputed through packed rows as
    training does.
    """
    batch, stats = build_batch(items, **SHAPE)
    score = jax.jit(
        functools.partial(
            map_microbatches, function=functools.partial(batch_logprobs, model=MODEL, chunk_size=16)
        )
    )
    old = gather_targets(np.asarray(score(tiny.params(MODEL), batch)), stats.placement)
    return [item._replace(old_logprobs=o) for item, o in zip(items, old, strict=True)]


def test_the_first_update_has_ratio_one_and_clips_nothing_and_the_second_clips(update, state):
    """The first update's mean KL estimate is 0 up to rounding: 1e-8 at most, measured."""
    batch, _ = build_batch(on_policy(ITEMS), **SHAPE)
    batch, rate = jax.device_put((batch, np.float32(0.03)))
    with jax.transfer_guard("disallow"):  # an update moves nothing between host and device
        state, first = update(state, batch, rate)
        state, second = update(state, batch, rate)
    first, second = (summarize({k: float(v) for k, v in m.items()}) for m in (first, second))
    assert first["policy/clip_fraction_low"] == first["policy/clip_fraction_high"] == 0
    assert abs(first["policy/approx_kl"]) < 1e-7
    assert second["policy/clip_fraction_low"] > 0.02 and second["policy/clip_fraction_high"] > 0.02
    assert second["policy/approx_kl"] > 1e-3


def test_the_first_loss_is_minus_the_weighted_advantages(update, state):
    items = on_policy(ITEMS)
    _, metrics = update(state, build_batch(items, **SHAPE)[0], np.float32(0))
    expected = -sum(item.weight * item.advantage * len(item.response) for item in items)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_batches_of_any_fill_share_one_compilation(state):
    update = jax.jit(functools.partial(update_step, loss_fn=LOSS, optimizer=OPTIMIZER))
    for n in (12, 1, 7):
        items = tiny.make_items(MODEL, n, seed=n)
        state, metrics = update(state, build_batch(items, **SHAPE)[0], np.float32(1e-3 / n))
        assert metrics["tokens"] == sum(len(item.response) for item in items)
    assert state.updates == 3 and update._cache_size() == 1


def test_loss_and_gradient_of_many_microbatches_are_those_of_one_plain_batch():
    """Against unpacked rows and whole log-softmaxes (test_loss has a single micro-batch).

    Measured: loss 2e-7, gradient 5e-7 relative.
    """
    batch, stats = build_batch(ITEMS, **SHAPE)
    loss, sums, grads = jax.jit(functools.partial(accumulate, loss_fn=LOSS))(
        tiny.params(MODEL), batch
    )
    plain = functools.partial(tiny.plain_loss, config=MODEL, items=ITEMS)
    expected, slopes = jax.jit(jax.value_and_grad(plain))(tiny.params(MODEL))
    assert tiny.gap(loss, expected) < 1e-6 and tiny.gap(grads, slopes) < 1e-6
    assert sums["tokens"] == stats.target_tokens
    assert stats.used_microbatches == 4 < SHAPE["microbatches"]
    assert (
        tiny.gap(loss / 4, expected) > 0.4
    )  # what dividing by the accumulation count once more would do


def test_summarize_divides_by_tokens_and_by_clipped_tokens():
    sums = {
        "tokens": 10.0,
        "entropy": 5,
        "approx_kl": 0.1,
        "token_prob": 4,
        "clipped_low": 1,
        "clipped_high": 2,
        "upclipped_prob": 0.5,
    }
    sums |= {"loss": 9, "grad_norm": 9}
    expected = {
        "entropy": 0.5,
        "approx_kl": 0.01,
        "token_prob_mean": 0.4,
        "clip_fraction_low": 0.1,
        "clip_fraction_high": 0.2,
    }
    expected |= {
        "clip_fraction_dual": 0,
        "importance_capped_fraction": 0,
        "upclipped_prob_mean": 0.25,
    }
    assert summarize(sums) == pytest.approx({f"policy/{k}": v for k, v in expected.items()})
    assert summarize(sums | {"clipped_dual": 3.0})["policy/clip_fraction_dual"] == pytest.approx(
        0.3
    )
    nothing = summarize(sums | {"clipped_high": 0.0, "upclipped_prob": 0.0})
    assert nothing["policy/clip_fraction_high"] == 0 and "policy/upclipped_prob_mean" not in nothing
    one = {"tokens": 1.0, "entropy": 0.5, "approx_kl": 0.25}
    assert summarize(one) == {"policy/entropy": 0.5, "policy/approx_kl": 0.25}
    assert summarize({"tokens": 0.0, "entropy": 0.0, "approx_kl": 0.0}) == {
        "policy/entropy": 0,
        "policy/approx_kl": 0,
    }
