import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_jax.dapo.packing import (
    TrainItem,
    build_batch,
    gather_targets,
    long_share,
    max_microbatches,
    normalizer_weights,
    pack_rows,
)
from dapo_jax.types import TrainBatch

# The tiny batch: o1, o2 of group 1 and o3, o4 of group 2, as per-token objectives.
OBJECTIVES = [[1, 1.28], [-1, -0.8, -1.1, -2], [0.9], [-1, -1, -0.8]]
GROUP_OF = [1, 1, 2, 2]
COUNTS = [2, 4, 1, 3]


def tiny_objective(kept, normalizer):
    weights = normalizer_weights(
        np.array(GROUP_OF), np.array(COUNTS), np.array(kept), normalizer=normalizer
    )
    assert weights.dtype == np.float32
    return sum(w * sum(tokens) for w, tokens in zip(weights.tolist(), OBJECTIVES, strict=True))


@pytest.mark.parametrize(
    "normalizer, expected",
    [
        ("token-mean", -0.4520),
        ("group-token-mean", -0.455833),
        ("seq-mean-token-mean", -0.0295833),
        ("seq-mean-token-sum", -1.13),
    ],
)
def test_objective_of_the_tiny_batch(normalizer, expected):
    assert tiny_objective([True] * 4, normalizer) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "normalizer, expected",
    [
        ("token-mean", 0.38 / 6),  # 0.0633333
        ("group-token-mean", (2.28 / 2 - 1.9 / 4) / 2),
        ("seq-mean-token-mean", (2.28 / 2 + 0.9 - 2.8 / 3) / 3),
        ("seq-mean-token-sum", (2.28 + 0.9 - 2.8) / 3),
    ],
)
def test_overlong_filter_of_the_second_response(normalizer, expected):
    assert tiny_objective([True, False, True, True], normalizer) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    "normalizer, expected",
    [
        ("token-mean", 4 / 10),  # every token weighs the same, and o2 has four of ten
        ("seq-mean-token-mean", 1 / 4),  # every response weighs the same
        ("seq-mean-token-sum", 4 / 10),
        (
            "group-token-mean",
            (4 / 6) / 2,
        ),  # and every group the same: 4 of the 6 tokens of the first
    ],
)
def test_share_of_the_longest_quarter(normalizer, expected):
    weights = normalizer_weights(
        np.array(GROUP_OF), np.array(COUNTS), np.ones(4, bool), normalizer=normalizer
    )
    assert long_share(COUNTS, weights, [1, -1, 1, -1]) == pytest.approx(expected)


def test_share_of_the_longest_quarter_counts_advantages():
    assert long_share([9, 5, 5, 5, 1], [0.1] * 5, [0.0, 2.0, 1.0, 1.0, 1.0]) == pytest.approx(
        10 / 21
    )  # two of five: 9 and the first 5
    assert long_share([3, 4], [0.5, 0.5], [0.0, 0.0]) == 0.0


def test_equal_lengths_are_long_in_their_order():
    """Of 80 responses, 40 of them long, the first 20 of these are the quarter, and rows keep their
    order.
    """
    assert long_share([4, 5] * 40, [1.0] * 80, [1.0] * 40 + [0.0] * 40) == 100 / 180
    assert pack_rows([3, 4, 4, 3] * 10, 4) == [
        [i] for i in np.argsort([1, 0, 0, 1] * 10, stable=True)
    ]
    _, stats = build_batch(make_items([(1, 3)] * 40), row_len=4, rows_per_microbatch=40)
    assert [p.row for p in stats.placement] == list(range(40))


def test_a_group_that_is_masked_whole_does_not_count_as_a_group():
    assert tiny_objective([True, True, False, False], "group-token-mean") == pytest.approx(
        -2.62 / 6, abs=1e-6
    )


@pytest.mark.parametrize(
    "normalizer", ["token-mean", "group-token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
)
def test_masked_and_empty_responses_weigh_nothing(normalizer):
    def weights(group_of, counts, kept):
        return normalizer_weights(
            np.array(group_of, int),
            np.array(counts, int),
            np.array(kept, bool),
            normalizer=normalizer,
        )

    np.testing.assert_array_equal(weights([0, 0], [3, 2], [False, False]), [0, 0])
    np.testing.assert_array_equal(weights([0], [0], [True]), [0])
    assert weights([], [], []).shape == (0,)
    with_empty = weights([0, 0, 7, 9], [3, 0, 2, 0], [True, True, True, True])
    np.testing.assert_array_equal(with_empty[[1, 3]], 0)
    np.testing.assert_array_equal(with_empty[[0, 2]], weights([0, 7], [3, 2], [True, True]))


def test_normalizer_weights_checks_its_input():
    one = np.ones(1, int)
    with pytest.raises(ValueError, match="unknown"):
        normalizer_weights(one, one, one > 0, normalizer="mean")
    with pytest.raises(ValueError, match="must be"):
        normalizer_weights(one, np.ones(2, int), one > 0, normalizer="token-mean")
    with pytest.raises(ValueError, match="must be"):
        normalizer_weights(*[np.ones((2, 2), int)] * 3, normalizer="token-mean")
    with pytest.raises(ValueError, match="negative"):
        normalizer_weights([1, 1], [2, -1], [True, True], normalizer="token-mean")


def naive_first_fit_decreasing(lengths, row_len):
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[j] for j in row) + lengths[i] <= row_len:
                row.append(i)
                break
        else:
            rows.append([i])
    return [sorted(row) for row in rows]


@given(st.lists(st.integers(1, 20), max_size=40))
def test_rows_are_those_of_naive_first_fit_decreasing(lengths):
    rows = pack_rows(lengths, 20)
    assert rows == naive_first_fit_decreasing(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_rows_are_few():
    lengths = np.random.default_rng(0).integers(1, 1000, 3000)
    assert len(pack_rows(lengths, 1000)) <= np.ceil(lengths.sum() / 1000) * 11 / 9 + 1


@pytest.mark.parametrize("lengths", [[5, 11], [0, 3], [-1]])
def test_lengths_must_fit_a_row(lengths):
    with pytest.raises(ValueError, match="do not fit"):
        pack_rows(lengths, 10)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 4), st.data())
def test_max_microbatches_is_never_exceeded_and_is_attained(
    max_item_len, slack, rows_per_microbatch, data
):
    row_len = max_item_len + slack
    lengths = data.draw(st.lists(st.integers(1, max_item_len), max_size=40))
    bound = max_microbatches(
        len(lengths),
        row_len=row_len,
        max_item_len=max_item_len,
        rows_per_microbatch=rows_per_microbatch,
    )
    assert np.ceil(len(pack_rows(lengths, row_len)) / rows_per_microbatch) <= bound
    assert (
        np.ceil(len(pack_rows([max_item_len] * len(lengths), row_len)) / rows_per_microbatch)
        == bound
    )


def test_max_microbatches_checks_its_input():
    for length in (0, 11):
        with pytest.raises(ValueError, match="max_item_len"):
            max_microbatches(4, row_len=10, max_item_len=length, rows_per_microbatch=2)


def make_items(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TrainItem(
            prompt=rng.integers(0, 9, p, np.int32),
            response=rng.integers(
                0, 9, r, np.int32
            ),  # 0, the padding value, is a token like any other
            old_logprobs=-rng.random(r, np.float32),
            behavior_logprobs=-rng.random(r, np.float32),
            advantage=float(np.float32(rng.normal())),
            weight=float(np.float32(rng.random())) if rng.random() < 0.8 else 0.0,
        )
        for p, r in sizes
    ]


def unpack(batch):
    """The items of a batch, read back token by token from segment ids and masks alone."""
    items = []
    M, N, T = batch.tokens.shape
    for m in range(M):
        for n in range(N):
            segments: dict[int, list[int]] = {}
            for t in range(T):
                if s := int(batch.segment_ids[m, n, t]):
                    segments.setdefault(s, []).append(t)
                else:
                    assert all(not field[m, n, t] for field in batch[:-1])
            assert list(segments) == list(range(1, len(segments) + 1))
            for entries in segments.values():
                assert entries == list(range(entries[0], entries[-1] + 1))
                assert batch.positions[m, n, entries].tolist() == list(range(len(entries)))
                targets = [t for t in entries if batch.target_mask[m, n, t]]
                prompt = [t for t in entries if t not in targets]
                assert prompt + targets == entries
                for field in (
                    batch.old_logprobs,
                    batch.behavior_logprobs,
                    batch.advantages,
                    batch.weight,
                ):
                    assert not field[m, n, prompt].any()
                items.append(
                    (
                        tuple(batch.tokens[m, n, prompt].tolist()),
                        tuple(batch.tokens[m, n, targets].tolist()),
                        tuple(batch.old_logprobs[m, n, targets].tolist()),
                        tuple(batch.behavior_logprobs[m, n, targets].tolist()),
                        tuple(batch.advantages[m, n, targets].tolist()),
                        tuple(batch.weight[m, n, targets].tolist()),
                    )
                )
    return items


def as_tuple(item):
    r = len(item.response)
    arrays = (item.prompt, item.response, item.old_logprobs, item.behavior_logprobs)
    return (*(tuple(a.tolist()) for a in arrays), (item.advantage,) * r, (item.weight,) * r)


sizes_strategy = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 10)), min_size=1, max_size=20)


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_unpacking_gives_the_items_back(sizes, rows_per_microbatch, extra, seed):
    items = make_items(sizes, seed)
    fewest, stats = build_batch(items, row_len=16, rows_per_microbatch=rows_per_microbatch)
    batch, padded = build_batch(
        items,
        row_len=16,
        rows_per_microbatch=rows_per_microbatch,
        microbatches=stats.used_microbatches + extra,
    )
    assert padded == stats
    for field, small in zip(batch[:-1], fewest[:-1], strict=True):
        assert field.shape == (stats.used_microbatches + extra, rows_per_microbatch, 16)
        np.testing.assert_array_equal(field[: stats.used_microbatches], small)
    dtypes = [np.int32] * 3 + [np.bool_] + [np.float32] * 4 + [np.bool_]
    assert [field.dtype for field in batch[:-1]] == dtypes
    assert sorted(unpack(batch)) == sorted(map(as_tuple, items))

    assert stats.tokens == sum(p + r for p, r in sizes) == np.count_nonzero(batch.segment_ids)
    assert stats.target_tokens == sum(r for _, r in sizes) == np.count_nonzero(batch.target_mask)
    assert (
        stats.rows
        == len(pack_rows([p + r for p, r in sizes], 16))
        == (batch.segment_ids > 0).any(-1).sum()
    )
    assert (
        stats.used_microbatches
        == -(-stats.rows // rows_per_microbatch)
        == (batch.segment_ids > 0).any((1, 2)).sum()
    )
    assert stats.efficiency == pytest.approx(stats.tokens / (16 * stats.rows))


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 4))
def test_gather_targets_undoes_the_packing(sizes, rows_per_microbatch):
    items = make_items(sizes)
    batch, stats = build_batch(items, row_len=16, rows_per_microbatch=rows_per_microbatch)
    for got, item in zip(gather_targets(batch.old_logprobs, stats.placement), items, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, item.old_logprobs)
    for got, item in zip(gather_targets(batch.tokens, stats.placement), items, strict=True):
        np.testing.assert_array_equal(got, item.response)


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 4))
def test_microbatches_have_equal_work(sizes, rows_per_microbatch):
    batch, stats = build_batch(
        make_items(sizes), row_len=16, rows_per_microbatch=rows_per_microbatch
    )
    row_cost = np.array(
        [[sum(c**2 for c in np.bincount(row)[1:]) for row in rows] for rows in batch.segment_ids]
    )
    cost = row_cost.sum(1)
    assert cost.max() - cost.min() <= row_cost.max()
    rows = (row_cost > 0).sum(1)
    assert rows.max() - rows.min() <= 1


@settings(deadline=None)
@given(sizes_strategy, st.integers(1, 3), st.integers(1, 4))
def test_devices_have_equal_work(sizes, rows_a_device, shards):
    """Each of a micro-batch's parts, and no item is lost."""
    items = make_items(sizes)
    batch, stats = build_batch(
        items, row_len=16, rows_per_microbatch=rows_a_device * shards, row_shards=shards
    )
    row_cost = np.array(
        [[sum(c**2 for c in np.bincount(row)[1:]) for row in rows] for rows in batch.segment_ids]
    )
    parts = row_cost.reshape(-1, rows_a_device)
    assert parts.sum(1).max() - parts.sum(1).min() <= row_cost.max()
    rows = (parts > 0).sum(1)
    assert rows.max() - rows.min() <= 1
    assert sorted(unpack(batch)) == sorted(map(as_tuple, items))
    assert stats.used_microbatches == (batch.segment_ids > 0).any((1, 2)).sum() == len(batch.tokens)


def test_rows_are_dealt_back_and_forth():
    _, stats = build_batch(
        make_items([(1, 13), (1, 15), (1, 12), (1, 14)]), row_len=16, rows_per_microbatch=2
    )
    # Costs 16², 15², 14², 13² go to micro-batches 0, 1, 1, 0: 425 against 421.
    assert [(p.microbatch, p.row) for p in stats.placement] == [(1, 1), (0, 0), (0, 1), (1, 0)]


def test_a_row_costs_the_sum_of_its_squared_lengths():
    """12² > 8² + 8² > 11²; neither lengths nor their cubes are in this order."""
    _, stats = build_batch(
        make_items([(1, 10), (1, 7), (1, 7), (1, 11)]), row_len=16, rows_per_microbatch=3
    )
    assert [p.row for p in stats.placement] == [2, 1, 1, 0]


def test_a_row_by_hand():
    items = [
        TrainItem(
            np.array([7]),
            np.array([8, 9]),
            np.array([-1, -2]),
            np.array([-3, -4]),
            advantage=1.5,
            weight=0.25,
        ),
        TrainItem(
            np.array([5, 6]),
            np.array([0, 0, 4]),
            np.array([-5, -6, -7]),
            np.array([-8, -9, -10]),
            advantage=-0.5,
            weight=0.0,
            current=False,
        ),
    ]
    batch, stats = build_batch(items, row_len=9, rows_per_microbatch=2)
    row = TrainBatch(*(field[0, 0].tolist() for field in batch[:-1]))
    assert row.tokens == [7, 8, 9, 5, 6, 0, 0, 4, 0]
    assert row.segment_ids == [1, 1, 1, 2, 2, 2, 2, 2, 0]
    assert row.positions == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert row.target_mask == [False, True, True, False, False, True, True, True, False]
    assert row.old_logprobs == [0, -1, -2, 0, 0, -5, -6, -7, 0]
    assert row.behavior_logprobs == [0, -3, -4, 0, 0, -8, -9, -10, 0]
    assert row.advantages == [0, 1.5, 1.5, 0, 0, -0.5, -0.5, -0.5, 0]
    assert row.weight == [0, 0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert row.current == [False, True, True, False, False, False, False, False, False]
    assert not any(field[0, 1].any() for field in batch[:-1])
    assert stats.placement == ((0, 0, 1, 2), (0, 0, 5, 3))


def test_build_batch_checks_its_input():
    good, no_prompt, too_long = make_items([(2, 3), (0, 3), (9, 9)])
    sizes = {"row_len": 16, "rows_per_microbatch": 1}
    with pytest.raises(ValueError, match="no items"):
        build_batch([], **sizes)
    with pytest.raises(ValueError, match="item 1 has an empty prompt"):
        build_batch([good, no_prompt], **sizes)
    with pytest.raises(ValueError, match="do not fit"):
        build_batch([too_long], **sizes)
    with pytest.raises(ValueError, match="item 0 has 3 response tokens, but 2 old"):
        build_batch([good._replace(old_logprobs=good.old_logprobs[1:])], **sizes)
    with pytest.raises(ValueError, match="3 old and 2 behavior log-probs"):
        build_batch([good._replace(behavior_logprobs=good.old_logprobs[1:])], **sizes)
    with pytest.raises(ValueError, match="3 rows do not divide over 2 devices"):
        build_batch([good], row_len=16, rows_per_microbatch=3, row_shards=2)
    with pytest.raises(ValueError, match="need 2 micro-batches"):
        build_batch([good] * 4, **sizes, microbatches=1)
