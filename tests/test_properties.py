"""Properties that hold for any batch: hypothesis draws the responses, their order and the way they
are split.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from groups import MIXED, RIGHT, WRONG, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_jax.config import DapoSection, MeshSection
from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.dapo.groups import group_advantages, informative_groups
from dapo_jax.dapo.loss import loss_fn
from dapo_jax.dapo.packing import build_batch, normalizer_weights
from dapo_jax.dapo.update import accumulate
from dapo_jax.runtime.mesh import make_mesh, params_sharding, put, put_rows

MODEL = tiny.model(layers=1)
# (micro-batches, rows, row length, devices): each is one compilation. 12 responses of at most 4 + 9
# tokens fit all of them.
LAYOUTS = [
    (1, 12, 13, None),
    (3, 4, 14, None),
    (12, 1, 13, None),
    (2, 2, 41, None),
    (2, 8, 13, (2, 4, 1)),
    (1, 8, 20, (2, 2, 2)),
]


@functools.cache
def program(layout):
    """Loss and gradient of a batch in that layout."""
    microbatches, rows, row_len, devices = layout
    mesh = None if devices is None else make_mesh(MeshSection(*devices))
    params = tiny.params(MODEL)
    if mesh is not None:
        params = jax.tree.map(
            lambda p, s: put(np.asarray(p), s), params, params_sharding(params, mesh)
        )
    loss = functools.partial(loss_fn, model=MODEL, algo=DapoSection(), chunk_size=7, mesh=mesh)
    run = jax.jit(functools.partial(accumulate, loss_fn=loss))
    compiled = None

    def call(items):
        nonlocal compiled
        batch, _ = build_batch(
            items, row_len=row_len, rows_per_microbatch=rows, microbatches=microbatches
        )
        batch = jax.tree.map(jnp.asarray, batch) if mesh is None else put_rows(batch, mesh, axis=1)
        compiled = compiled or run.lower(params, batch).compile(
            {"xla_backend_optimization_level": 0}
        )
        loss, sums, grads = compiled(params, batch)
        return float(loss), float(sums["tokens"]), jax.device_get(grads)

    return call


def norm(tree) -> float:
    return float(
        np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))
    )


POOL = tiny.make_items(
    MODEL, 12, seed=5
)  # 12 responses whose ratios the model has been asked for once


@pytest.mark.slow
@settings(max_examples=25, deadline=None)  # a layout compiles when it is first drawn
@given(
    chosen=st.permutations(range(12)).flatmap(
        lambda order: st.integers(4, 12).map(lambda n: order[:n])
    ),
    normalizer=st.sampled_from(
        ["token-mean", "group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
    ),
    layout=st.sampled_from(LAYOUTS[1:]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_of_a_batch_gives_one_loss_and_one_gradient(chosen, normalizer, layout, order):
    """Against one response a row in one micro-batch.

    Terms of both signs cancel, in the loss and in the gradient; the scale of an error is what they
    are without. Measured over these examples: loss 1.8e-7, gradient 5.8e-7 (jax 0.10.2), 1.03e-6
    (jax 0.12).
    """
    counts = np.array([len(POOL[i].response) for i in chosen])
    weights = normalizer_weights(
        np.array(chosen) // 4, counts, np.ones(len(chosen), bool), normalizer=normalizer
    )
    items = [POOL[i]._replace(weight=float(w)) for i, w in zip(chosen, weights, strict=True)]
    loss, tokens, grads = program(LAYOUTS[0])(items)
    order.shuffle(items)
    other_loss, other_tokens, other_grads = program(layout)(items)
    assert tokens == other_tokens == counts.sum()
    size = sum(item.weight * len(item.response) * abs(item.advantage) for item in items)
    assert abs(other_loss - loss) < 1e-6 * size
    _, _, uncancelled = program(LAYOUTS[0])(
        [item._replace(advantage=abs(item.advantage)) for item in items]
    )
    difference = jax.tree.map(np.subtract, other_grads, grads)
    assert norm(difference) < tiny.GRADIENT * max(norm(uncancelled), norm(grads))


groups_of_rewards = st.integers(2, 8).flatmap(
    lambda g: st.lists(
        st.lists(st.floats(-2, 1, width=32), min_size=g, max_size=g), min_size=1, max_size=6
    )
)


@given(groups_of_rewards, st.randoms(use_true_random=False))
def test_permuting_groups_or_responses_permutes_advantages(rewards, order):
    reward = np.array(rewards, np.float32)
    groups, responses = (list(range(n)) for n in reward.shape)
    order.shuffle(groups)
    order.shuffle(responses)
    advantages = group_advantages(reward)
    np.testing.assert_array_equal(group_advantages(reward[groups]), advantages[groups])
    np.testing.assert_allclose(
        group_advantages(reward[:, responses]), advantages[:, responses], rtol=1e-5, atol=1e-5
    )


@given(groups_of_rewards)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards):
    reward = np.array(rewards, np.float32)
    advantages = group_advantages(reward)
    assert np.isfinite(advantages).all()
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-4)
    for r, a in zip(reward, advantages, strict=True):
        assert (np.diff(a[np.argsort(r, kind="stable")]) >= 0).all()


@given(st.lists(st.sampled_from([MIXED, WRONG, RIGHT]), min_size=1, max_size=12), st.integers(1, 5))
def test_a_filtered_group_changes_nothing(outcomes, wanted):
    """What a step trains on is the same whether the all-correct and all-incorrect groups between were
    drawn or not.
    """
    groups = [make_group(draw, correct) for draw, correct in enumerate(outcomes)]
    mixed = [g for g in groups if 0 < g.correct.sum() < len(g.correct)]
    if not mixed:
        return
    taken = []
    for stream in (groups, mixed):
        buffer = DynamicSamplingBuffer(wanted, dynamic_sampling=True, carry_surplus=True)
        buffer.add(stream)
        taken.append((buffer.missing(), *buffer.take()))
    (missing, kept, counts), (same_missing, same_kept, same_counts) = taken
    assert missing == same_missing and [g.draw for g in kept] == [g.draw for g in same_kept] == [
        g.draw for g in mixed[:wanted]
    ]
    assert (counts.kept, counts.surplus) == (same_counts.kept, same_counts.surplus)
    advantages = group_advantages(np.stack([g.reward for g in kept]))
    np.testing.assert_array_equal(
        advantages, group_advantages(np.stack([g.reward for g in same_kept]))
    )


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8))
def test_a_group_is_kept_exactly_if_its_accuracy_is_neither_0_nor_1(correct):
    assert informative_groups(np.array(correct)).tolist() == [
        0 < sum(row) / 4 < 1 for row in correct
    ]
