import dataclasses

import numpy as np
import pytest
from flax import serialization
from groups import MIXED, RIGHT, WRONG, make_group
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_jax.dapo.buffer import BufferState, DynamicSamplingBuffer, UnderfilledError
from dapo_jax.runtime.records import plain, typed
from dapo_jax.types import InputError, Response


def tokens(group):
    return sum(len(r.tokens) for r in group.responses)


def draws(groups):
    return [g.draw for g in groups]


def test_the_first_informative_groups_in_draw_order_are_taken_and_the_rest_carried():
    buffer = DynamicSamplingBuffer(2, dynamic_sampling=True, carry_surplus=True)
    assert buffer.missing() == 2
    step = [make_group(d, c) for d, c in enumerate([WRONG, MIXED, RIGHT])]
    buffer.add(step)
    assert buffer.missing() == 1
    more = [make_group(d, c) for d, c in [(3, MIXED), (4, MIXED), (7, MIXED), (9, MIXED)]]
    buffer.add(more)
    assert buffer.missing() == 0
    groups, counts = buffer.take()
    assert draws(groups) == [1, 3]
    assert counts._asdict() == {
        "drawn": 7,
        "kept": 2,
        "all_correct": 1,
        "all_wrong": 1,
        "surplus": 3,
        "carried_in": 0,
        "wasted_tokens": tokens(step[0]) + tokens(step[2]),
        "unjudged": 0,
    }
    # The next step needs no draw at all.
    assert buffer.missing() == 0
    groups, counts = buffer.take()
    assert draws(groups) == [4, 7] and groups[0] is more[1]
    assert (counts.drawn, counts.kept, counts.carried_in, counts.surplus, counts.wasted_tokens) == (
        0,
        2,
        3,
        1,
        0,
    )
    assert buffer.missing() == 1


def test_dropped_surplus_is_wasted():
    buffer = DynamicSamplingBuffer(1, dynamic_sampling=True, carry_surplus=False)
    groups = [make_group(d, MIXED) for d in range(3)]
    buffer.add(groups)
    taken, counts = buffer.take()
    assert draws(taken) == [0]
    assert counts.surplus == 2 and counts.wasted_tokens == tokens(groups[1]) + tokens(groups[2])
    assert buffer.missing() == 1


def test_without_dynamic_sampling_every_group_is_trained_on():
    buffer = DynamicSamplingBuffer(3, dynamic_sampling=False, carry_surplus=True)
    buffer.add([make_group(d, c) for d, c in enumerate([WRONG, MIXED, RIGHT])])
    taken, counts = buffer.take()
    assert draws(taken) == [0, 1, 2]
    assert (counts.all_correct, counts.all_wrong, counts.surplus, counts.wasted_tokens) == (
        1,
        1,
        0,
        0,
    )


def test_groups_of_the_answers_that_got_a_verdict_are_of_any_size_and_an_empty_one_is_left_out():
    for dynamic, kept in ((True, [1, 4]), (False, [1, 2, 4])):
        buffer = DynamicSamplingBuffer(len(kept), dynamic, True)
        buffer.add(
            [
                make_group(0, []),
                make_group(1, [1, 0, 1]),
                make_group(2, [1]),
                make_group(3, []),
                make_group(4, [0, 1]),
            ]
        )
        restored = DynamicSamplingBuffer(len(kept), dynamic, True)
        restored.restore(through_a_file(buffer.state()))
        taken, counts = restored.take()
        assert draws(taken) == kept
        assert (counts.drawn, counts.all_correct, counts.all_wrong, counts.unjudged) == (
            5,
            1,
            0,  # a group without a verdict is not all-incorrect
            2,
        )


@settings(deadline=None)
@given(
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.lists(
        st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6),
        min_size=1,
        max_size=12,
    ),
)
def test_steps_equal_a_naive_simulation(needed, dynamic, carry, generation_batches):
    buffer = DynamicSamplingBuffer(needed, dynamic, carry)
    ledger = []  # [group, step that drew it, its fate: None, "kept", "filtered" or "dropped"]
    step, previous = 0, []
    for verdicts in generation_batches:
        batch = [make_group(len(ledger) + i, correct) for i, correct in enumerate(verdicts)]
        for group in batch:
            useless = dynamic and sum(group.correct) in (0, 3)
            ledger.append([group, step, "filtered" if useless else None])
        buffer.add(batch)
        waiting = [entry for entry in ledger if entry[2] is None]
        assert buffer.missing() == max(0, needed - len(waiting))
        while buffer.missing() == 0:
            carried_in = len([e for e in waiting if e[1] < step])
            for entry in waiting[:needed]:
                entry[2] = "kept"
            for entry in waiting[needed:]:
                entry[2] = None if carry else "dropped"
            groups, counts = buffer.take()
            added = [len([e for e in ledger if e[1] == s]) for s in range(step + 1)]
            assert all(
                step - e[1] <= -(-added[e[1]] // needed) for e in waiting[:needed]
            )  # the bound on staleness
            mine = [e[0] for e in ledger if e[1] == step]
            right = [sum(g.correct) for g in mine]
            assert draws(groups) == [e[0].draw for e in waiting[:needed]] == sorted(draws(groups))
            assert (
                counts.drawn == len(mine)
                and counts.kept == needed
                and counts.carried_in == carried_in
            )
            assert (counts.all_correct, counts.all_wrong) == (right.count(3), right.count(0))
            assert counts.surplus == len(waiting) - needed
            assert counts.wasted_tokens == sum(
                tokens(e[0]) for e in ledger if e[1] == step and e[2] in ("filtered", "dropped")
            )
            removed = counts.all_correct + counts.all_wrong if dynamic else 0
            assert counts.drawn + counts.carried_in == counts.kept + removed + counts.surplus
            previous += draws(groups)
            step += 1
            waiting = [entry for entry in ledger if entry[2] is None]
    assert previous == sorted(set(previous))  # over the whole run: in draw order, none twice


def test_groups_must_come_in_draw_order():
    buffer = DynamicSamplingBuffer(4, True, True)
    with pytest.raises(ValueError, match="draw 1 after draw 2"):
        buffer.add([make_group(2, MIXED), make_group(1, MIXED)])
    assert buffer.missing() == 4
    buffer.add([make_group(2, MIXED)])
    buffer.add([])
    with pytest.raises(ValueError, match="draw 2 after draw 2"):
        buffer.add([make_group(2, MIXED)])
    buffer.take()
    with pytest.raises(ValueError, match="draw 0 after draw 2"):
        buffer.add([make_group(0, MIXED)])


def test_a_group_to_train_on_needs_a_log_prob_a_token_and_another_does_not():
    buffer = DynamicSamplingBuffer(4, True, True)
    with pytest.raises(ValueError, match="draw 1: .* old log-probs"):
        buffer.add(
            [make_group(0, MIXED), dataclasses.replace(make_group(1, MIXED), old_logprobs=())]
        )
    for lacking in ("correct", "reward", "penalty"):
        group = make_group(0, [1, 0, 1])
        short = {lacking: getattr(group, lacking)[:2]}
        with pytest.raises(ValueError, match="draw 0: 3 responses"):
            buffer.add([dataclasses.replace(group, **short)])
    first, second = group.responses[0], group.responses[1:]
    first = first._replace(behavior_logprobs=np.zeros(9, np.float32))
    with pytest.raises(ValueError, match="draw 0: .* have \\[9, "):
        buffer.add([dataclasses.replace(group, responses=(first, *second))])
    assert buffer.missing() == 4
    buffer.add([make_group(0, MIXED), dataclasses.replace(make_group(1, WRONG), old_logprobs=())])
    assert buffer.missing() == 3


def test_prompts_per_step_is_checked():
    with pytest.raises(ValueError, match="prompts_per_step"):
        DynamicSamplingBuffer(0, True, True)


def test_a_step_may_train_with_what_there_is_but_not_with_nothing():
    buffer = DynamicSamplingBuffer(4, True, True)
    buffer.add([make_group(d, c) for d, c in enumerate([WRONG, WRONG, RIGHT])])
    with pytest.raises(UnderfilledError) as caught:
        buffer.take()
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value) and "on_cap: train" not in str(caught.value)
    buffer.add([make_group(5, MIXED)])  # the step is still open
    groups, counts = buffer.take()
    assert draws(groups) == [5] and counts.drawn == 4


def test_the_message_at_the_cap_counts_and_advises():
    buffer = DynamicSamplingBuffer(8, True, True)
    with pytest.raises(UnderfilledError) as caught:
        buffer.add(
            [make_group(d, c) for d, c in enumerate([WRONG] * 3 + [RIGHT] * 2 + [MIXED])],
            at_least=2,
        )
    text = str(caught.value)
    assert "\n" not in text and text.startswith("dapo.max_generation_batches: ")
    for part in (
        "1 of 8 groups",
        "drew 6: 2 all-correct, 3 all-incorrect, 1 informative",
        "easier",
        "responses_per_prompt",
        "on_cap: train",
    ):
        assert part in text
    with pytest.raises(
        UnderfilledError,
        match="1 of 8 groups .* drew 10: 6 all-correct, 3 all-incorrect, 1 informative; use harder",
    ):
        buffer.add(
            [make_group(d, c) for d, c in enumerate([WRONG] * 3 + [RIGHT] * 6 + [MIXED])],
            at_least=2,
        )
    buffer.add([make_group(0, MIXED), make_group(1, MIXED)], at_least=2)
    assert buffer.ready()[1].drawn == 2  # what was refused left no trace


def test_the_message_at_the_cap_leaves_groups_without_a_verdict_out_and_advises_on_a_tie():
    buffer = DynamicSamplingBuffer(8, True, True)
    drawn = [make_group(d, c) for d, c in enumerate([WRONG, RIGHT, MIXED, []])]
    tie = "drew 4: 1 all-correct, 1 all-incorrect, 1 informative; use easier"
    with pytest.raises(UnderfilledError, match=tie):
        buffer.add(drawn, at_least=2)


def assert_same(left, right):
    """Equal to the bit, types included."""
    if isinstance(left, np.ndarray):
        assert (
            isinstance(right, np.ndarray)
            and left.dtype == right.dtype
            and left.shape == right.shape
        )
        assert left.tobytes() == right.tobytes()
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert type(left) is type(right) and left == right


def as_bytes(state):
    return serialization.msgpack_serialize(plain(state))


def through_a_file(state):
    return typed(BufferState, serialization.msgpack_restore(as_bytes(state)))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.lists(st.booleans(), min_size=2, max_size=4), max_size=5),
        min_size=2,
        max_size=2,
    ),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_restored_buffer_continues_as_if_nothing_had_happened(batches, take_between, seed):
    original = DynamicSamplingBuffer(2, True, True)
    draw = 0
    for batch in batches:
        original.add([make_group(draw + i, correct, seed) for i, correct in enumerate(batch)])
        draw += len(batch)
        if take_between and original.missing() < 2:
            original.take()

    restored = DynamicSamplingBuffer(2, True, True)
    restored.restore(through_a_file(original.state()))

    for buffer in (original, restored):
        if draw:
            with pytest.raises(ValueError, match="draw order"):
                buffer.add([make_group(draw - 1, MIXED)])
        buffer.add([make_group(draw + i, MIXED, seed) for i in range(3)])
    while original.missing() == 0:
        (groups, counts), (groups_restored, counts_restored) = original.take(), restored.take()
        assert counts == counts_restored
        assert_same(tuple(groups), tuple(groups_restored))
    assert original.missing() == restored.missing()
    assert as_bytes(original.state()) == as_bytes(restored.state())


def test_special_floats_survive():
    group = make_group(0, MIXED)
    odd = np.array([-np.inf, np.nan, 1e-45, -0.0, -3.4028235e38], np.float32)
    responses = (
        Response(np.arange(5, dtype=np.int32), odd, False),
        Response(np.zeros(0, np.int32), odd[:0], True),
    )
    group = dataclasses.replace(
        group, responses=responses, old_logprobs=(odd[::-1].copy(), odd[:0])
    )
    buffer, restored = (DynamicSamplingBuffer(1, True, True) for _ in range(2))
    buffer.add([group])
    restored.restore(through_a_file(buffer.state()))
    assert_same(restored.take()[0][0], group)
