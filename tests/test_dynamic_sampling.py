"""Dynamic sampling during decoding, with an engine of which only the lengths are real."""

import collections
import functools
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flax import serialization
from refusals import refusal

from dapo_jax.config import DapoSection, RewardSection, RolloutSection
from dapo_jax.data.mixture import Mixture
from dapo_jax.data.problems import Cursor, advance
from dapo_jax.data.prompts import load_tokenizer
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.records import plain, typed
from dapo_jax.training.dynamic_sampling import (
    DrawState,
    DynamicSampler,
    GroupCounts,
    OpenGroup,
    Sample,
    keep_rate_after,
    prompts_wanted,
)
from dapo_jax.training.record import age_metrics
from dapo_jax.training.setup import Policy
from dapo_jax.types import Problem, Prompt, Response, Verdict

TOKENIZER = load_tokenizer(None)
POLICY = Policy(None, TOKENIZER, (TOKENIZER.eos_token_id,))
PROMPTS = [Prompt(Problem(f"p{i}", f"{i}=", "1"), np.array([5, 6], np.int32)) for i in range(50)]
G = 4


SIZES = {
    "prompts_per_step": 8,
    "responses_per_prompt": G,
    "responses_per_update": G,
    "prompts_per_draw": 16,
}
MIXTURE = Mixture(("problems",), (len(PROMPTS),), (1.0,))


class FakeStream:
    """Slots that are refilled, a segment ending with the shortest response in them.

    `outcome(draw, sample)` → (length, correct).
    """

    def __init__(self, outcome, slots=32):
        self._outcome, self._slots = outcome, slots
        self._queue, self._left = collections.deque(), {}
        self.segment, self.submitted, self.sampled, self.suspended = 0, [], 0, 0
        self.steps = 0

    pending = property(lambda self: len(self._queue))
    live = property(lambda self: len(self._left))

    def submit(self, requests):
        """A response that was begun has the rest to go."""
        self._queue += requests
        self.submitted += [(self.segment, r.draw, r.sample) for r in requests]

    def advance(self):
        while self._queue and len(self._left) < self._slots:
            request = self._queue.popleft()
            begun = 0 if request.prefix is None else len(request.prefix[0])
            self._left[request.draw, request.sample] = (
                self._outcome(request.draw, request.sample)[0] - begun,
                request,
            )
        steps = min(left for left, _ in self._left.values())
        self.sampled += steps * len(self._left)
        self._left = {key: (left - steps, request) for key, (left, request) in self._left.items()}
        ended = sorted(key for key, (left, _) in self._left.items() if left == 0)
        self.segment += 1
        return [(self._left.pop(key)[1], self._response(*key)) for key in ended]

    def _response(self, draw, sample):
        length, correct = self._outcome(draw, sample)
        text = b"1" if correct else b"0"
        return Response(
            np.array([*text.ljust(length, b"x")], np.int32) + 2, np.zeros(length, np.float32), False
        )

    def unfinished(self):
        """The tokens so far, of the whole response."""
        running = [
            (request, self._response(*key), left) for key, (left, request) in self._left.items()
        ]
        queued = [
            (
                r,
                self._response(r.draw, r.sample),
                self._outcome(r.draw, r.sample)[0] - len((r.prefix or [()])[0]),
            )
            for r in self._queue
        ]
        cut = [
            (r, Response(w.tokens[:-left], w.behavior_logprobs[:-left], False))
            for r, w, left in running + queued
        ]
        return sorted(cut, key=lambda item: (item[0].draw, item[0].sample))

    def close(self):
        self.closed = True


class FakePool:
    """Judges by the first character; a verdict is there when it likes."""

    def __init__(self, delays=None, error=None, late=None):
        """late: the verdict on answers of 3 tokens."""
        self._delays, self._error, self._late, self.judged = delays, error, late, 0

    def submit(self, items):
        self.judged += len(items)
        verdicts = [
            Verdict(item.text[0] == "1", 1.0 if item.text[0] == "1" else -1.0, self._error)
            for item in items
        ]
        if self._late:
            verdicts = [
                self._late if item.response_len == 3 else v
                for item, v in zip(items, verdicts, strict=True)
            ]

        class Pending:
            def wait(pending, seconds):
                return True

            def result(pending):
                if self._delays:
                    time.sleep(self._delays.random() / 200)
                return verdicts

        return Pending()


def drawn(
    outcome,
    missing=8,
    keep_rate=0.5,
    pool=None,
    first_draw=0,
    left_open=(),
    slots=32,
    max_error_fraction=0.9,
    step=0,
    **algo,
):
    stream = FakeStream(outcome, slots)
    engine = SimpleNamespace(stream=lambda params, key: stream)
    algo = DapoSection(**(SIZES | algo))
    reward = RewardSection(overlong_buffer_len=100, max_error_fraction=max_error_fraction)
    rollout = RolloutSection(decode_slots=slots, max_response_len=200)
    data, tools = (PROMPTS, MIXTURE, POLICY), (pool or FakePool(), Guard(None))
    sampler = DynamicSampler(engine, *data, *tools, algo, reward, rollout, seed=0)
    state = DrawState(Cursor(), first_draw, keep_rate, tuple(left_open), step)
    return sampler.draw({}, state, missing, {}), stream


def mixed(draw, sample):
    return 10 + sample, sample == 0


def said(group):
    return [r.tokens.tolist() for r in group.responses]


def is_informative(group):
    return 0 < group.correct.sum() < G


def test_as_many_prompts_are_drawn_as_the_keep_rate_calls_for():
    found, _ = drawn(mixed, missing=8, keep_rate=1.0)
    assert [g.draw for g in found.groups] == list(range(8)) and all(
        map(is_informative, found.groups)
    )
    assert (
        len(found.verdicts) == 8 * G
        and found.state.cursor == advance(Cursor(), len(PROMPTS), 8, seed=0)[1]
    )
    # Half of them thought to be dropped: twice as many are drawn at first, and no more.
    assert len(drawn(mixed, missing=8, keep_rate=0.5)[0].groups) == 16
    assert [g.draw for g in drawn(mixed, missing=2, keep_rate=1.0, first_draw=7)[0].groups] == [
        7,
        8,
    ]


def test_a_group_is_what_was_sampled_and_judged():
    group = drawn(
        lambda draw, sample: (150 + 25 * sample, sample % 2 == 0), missing=1, keep_rate=1.0
    )[0].groups[0]
    assert [len(r.tokens) for r in group.responses] == [150, 175, 200, 225]
    assert group.correct.tolist() == [True, False, True, False] and [
        chr(r.tokens[0] - 2) for r in group.responses
    ] == ["1", "0", "1", "0"]
    # L_max 200, L_cache 100
    assert group.penalty.tolist() == [-0.5, -0.75, -1.0, -1.0]
    assert group.reward.tolist() == [0.5, -1.75, 0.0, -2.0]
    assert [len(logprobs) for logprobs in group.old_logprobs] == [150, 175, 200, 225]


@pytest.mark.default("0.2")
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_enough_groups_are_drawn_whatever_the_keep_rate_and_few_too_many(kept):
    surplus = []
    for seed in range(20):

        def outcome(draw, sample, seed=seed):
            rng = random.Random(f"{seed} {draw}")
            good = rng.random() < kept
            return 1 + int(rng.expovariate(1 / 40)) + sample, good and sample == 0

        assert (
            sum(map(is_informative, drawn(outcome, keep_rate=0.5)[0].groups)) >= 8
        )  # expected wrongly
        informative = [g for g in drawn(outcome, keep_rate=kept)[0].groups if is_informative(g)]
        assert len(informative) >= 8
        surplus.append(len(informative) - 8)
    # All of it is used by the next step. The margin alone is sqrt(8 x 0.5) = 2 groups.
    assert np.mean(surplus) < 5


def test_without_informative_groups_drawing_ends_at_the_cap():
    found, _ = drawn(lambda draw, sample: (5, True), max_generation_batches=3)
    assert len(found.groups) == 3 * 16 and not any(map(is_informative, found.groups))


def test_without_dynamic_sampling_each_wanted_group_is_drawn_once():
    found, _ = drawn(lambda draw, sample: (5, True), missing=6, dynamic_sampling=False)
    assert len(found.groups) == 6


def test_the_clock_decides_nothing():
    """Verdicts that come at random times, and verdicts that are there at once."""

    def outcome(draw, sample):
        rng = random.Random(f"{draw} {sample}")
        return rng.randint(1, 60), rng.random() < 0.15

    whole, stream = drawn(outcome)
    for seed in range(3):
        again, other = drawn(outcome, pool=FakePool(delays=random.Random(seed)))
        assert other.submitted == stream.submitted and other.segment == stream.segment
        assert [g.draw for g in again.groups] == [
            g.draw for g in whole.groups
        ] and again.verdicts == whole.verdicts
    assert (
        len({segment for segment, _, _ in stream.submitted}) > 1
    )  # prompts were drawn while decoding went on


def test_slots_change_how_many_are_drawn_and_not_what_a_draw_gives():
    """Nor which are trained on: the first informative ones in draw order."""

    def outcome(draw, sample):
        rng = random.Random(f"{draw} {sample}")
        return rng.randint(1, 60), rng.random() < 0.15

    few, many = (drawn(outcome, keep_rate=0.2, slots=slots)[0].groups for slots in (8, 64))
    assert len(few) < len(many)
    for a, b in zip(few, many, strict=False):
        assert a.draw == b.draw and said(a) == said(b) and a.reward.tolist() == b.reward.tolist()
    assert len([g for g in few if is_informative(g)]) >= 8


def test_kept_lengths_are_distributed_like_all_lengths_and_first_finished_wins_would_not_be():
    """Whether a group is informative has nothing to do with its length.

    The mean of 300 x 8 groups of mean length 40 has a standard error of about 0.8.
    """
    kept, first_finished, everything = [], [], []
    for seed in range(300):

        @functools.cache
        def length(draw, seed=seed):
            return 1 + int(random.Random(f"length {seed} {draw}").expovariate(1 / 40))

        @functools.cache
        def outcome(draw, sample, seed=seed):
            return length(draw), random.Random(f"kind {seed} {draw}").random() < 0.4 and sample == 0  # noqa: B023 - used in this turn

        found, _ = drawn(outcome, keep_rate=0.4)
        informative = [g for g in found.groups if is_informative(g)]
        kept += [len(g.responses[0].tokens) for g in informative[:8]]
        first_finished += sorted(len(g.responses[0].tokens) for g in informative)[
            :8
        ]  # all start at about the same time
        everything += [length(draw) for draw in range(40)]
    expected = np.mean(everything)
    assert abs(np.mean(kept) - expected) < 4 * np.std(kept) / np.sqrt(len(kept))
    assert np.mean(first_finished) < expected - 8 * np.std(kept) / np.sqrt(len(kept))


def test_answers_without_a_verdict_stop_the_run_before_the_cap():
    pool = FakePool(error="ValueError: x")
    with refusal("...no verdict"):
        drawn(lambda draw, sample: (5, False), pool=pool, max_generation_batches=10)
    assert pool.judged < 10 * 16 * G


def sometimes_late(draw, sample):
    """Some answers have no verdict, and all answers of draw 5; groups are mixed, all-correct or
    all-incorrect.
    """
    rng = random.Random(f"{draw} {sample}")
    late = rng.random() < 0.15 or draw == 5
    return 3 if late else 10 + sample, (rng.random() < 0.5, True, False)[draw % 3]


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_answer_without_a_verdict_is_as_if_it_had_not_been_sampled(dynamic):
    """Whatever it is said to score: its group is trained on without it, counts without it as mixed,
    all-correct or all-incorrect, and a group without any verdict is replaced.
    """
    steps = []
    for late in (
        Verdict(False, -1.0, "timed out after 1 s"),
        Verdict(True, 9.0, "timed out after 1 s"),
    ):
        step, stream = drawn(sometimes_late, pool=FakePool(late=late), dynamic_sampling=dynamic)
        steps.append((step, stream.submitted))
    (found, submitted), (other, as_submitted) = steps
    assert submitted == as_submitted and found.state.cursor == other.state.cursor
    for a, b in zip(found.groups, other.groups, strict=True):
        assert (
            a.draw == b.draw
            and a.correct.tolist() == b.correct.tolist()
            and a.reward.tolist() == b.reward.tolist()
        )
        in_time = [sometimes_late(a.draw, n) for n in range(G) if sometimes_late(a.draw, n)[0] != 3]
        assert [
            (len(r.tokens), bool(c)) for r, c in zip(a.responses, a.correct, strict=True)
        ] == in_time
        assert len(a.penalty) == len(a.old_logprobs) == len(in_time)
    sizes = {g.draw: len(g.correct) for g in found.groups}
    assert sizes[5] == 0 and {3, 4} <= set(sizes.values())
    assert sum(v.error is not None for v in found.verdicts) == sum(G - n for n in sizes.values())
    assert keep_rate_after(0.5, found.groups) == keep_rate_after(0.5, other.groups)
    if not dynamic:
        assert len(found.groups) == 8 + 1  # of which 8 are trained on


def test_draws_are_bounded_also_where_no_answer_gets_a_verdict():
    found, _ = drawn(
        lambda draw, sample: (3, True),
        pool=FakePool(late=Verdict(False, 0.0, "x")),
        max_error_fraction=1.0,
        dynamic_sampling=False,
        max_generation_batches=3,
    )
    assert len(found.groups) == 3 * 16 and not any(g.responses for g in found.groups)


def long_tailed(draw, sample):
    rng = random.Random(f"{draw} {sample}")
    return 1 + int(rng.expovariate(1 / 40)), rng.random() < 0.3


def steps(count, save=lambda groups: groups, outcome=long_tailed, **options):
    """So many steps of 8 groups, each continuing from the state of the one before."""
    found, left_open, draws = [], [], 0
    for n in range(count):
        step, _ = drawn(outcome, first_draw=draws, left_open=save(left_open), step=n, **options)
        left_open, draws = step.state.open, step.state.draws
        found.append(step)
    return found


def test_partial_rollouts_leave_later_groups_to_the_next_step_and_lose_nothing():
    partial = steps(6, partial_rollouts=True)
    groups = [g for step in partial for g in step.groups]
    assert [g.draw for g in groups] == list(range(len(groups)))  # each draw once, in order
    assert all(sum(map(is_informative, step.groups)) >= 8 for step in partial)
    assert any(step.state.open for step in partial) and any(
        len(s.response.tokens) and not s.ended
        for step in partial
        for g in step.state.open
        for s in g.samples
    )
    for group in groups:  # whole responses, whichever steps they were sampled in
        assert [
            (len(r.tokens), bool(c)) for r, c in zip(group.responses, group.correct, strict=True)
        ] == [long_tailed(group.draw, sample) for sample in range(G)]
    whole = [g for step in steps(6) for g in step.groups]
    for a, b in zip(groups, whole, strict=False):
        assert a.draw == b.draw and said(a) == said(b) and a.reward.tolist() == b.reward.tolist()


def test_tokens_are_counted_in_the_step_that_samples_them():
    left_open, draws, settled = [], 0, 0
    for _ in range(6):
        step, stream = drawn(
            long_tailed, first_draw=draws, left_open=left_open, partial_rollouts=True
        )
        assert step.tokens == stream.sampled > 0
        left_open, draws, settled = step.state.open, draws + step.draws, settled + len(step.groups)
        assert draws == settled + len(left_open)


def test_ages_are_those_of_a_naive_count_of_each_token():
    """By what every response held at the end of every step, a token at a time."""
    sampled_in = collections.defaultdict(list)  # of each token of a response, its rollout step
    ages, versions, seen = [], [], 0
    for n, step in enumerate(steps(8, partial_rollouts=True, slots=96), 1):
        assert step.state.step == n
        for group in step.groups:
            for sample, response in enumerate(group.responses):
                tokens = sampled_in[group.draw, sample]
                tokens += [n] * (len(response.tokens) - len(tokens))
        for group in step.state.open:
            for number, sample in enumerate(group.samples):
                tokens = sampled_in[group.draw, number]
                tokens += [n] * (len(sample.response.tokens) - len(tokens))
        kept = [group for group in step.groups if is_informative(group)]
        tokens = [sampled_in[g.draw, s] for g in kept for s in range(len(g.responses))]
        ages = [n - at for response in tokens for at in response]
        versions = [len(set(response)) for response in tokens]
        seen = max(seen, *ages)
        assert age_metrics(kept, n) == {
            "policy/token_age_mean": pytest.approx(np.mean(ages)),
            "policy/token_age_max": max(ages),
            "policy/versions_mean": pytest.approx(np.mean(versions)),
            "policy/versions_max": max(versions),
        }
    assert seen > 1 and max(versions) > 1


def test_ages_without_partial_rollouts_are_of_carried_groups_only():
    step, _ = drawn(mixed, missing=8, keep_rate=1.0)
    assert age_metrics(step.groups, 1) == {
        "policy/token_age_mean": 0,
        "policy/token_age_max": 0,
        "policy/versions_mean": 1,
        "policy/versions_max": 1,
    }
    assert age_metrics(step.groups, 3)["policy/token_age_mean"] == 2 and age_metrics([], 3) == {}


def test_open_groups_survive_a_checkpoint():
    def through_a_file(groups):
        packed = serialization.msgpack_serialize(plain(DrawState(open=tuple(groups))))
        return typed(DrawState, serialization.msgpack_restore(packed)).open

    def some_late(draw, sample):
        length, correct = long_tailed(draw, sample)
        return 3 if length % 5 == 0 else length, correct

    options = {
        "outcome": some_late,
        "pool": FakePool(late=Verdict(True, 9.0, "timed out after 1 s")),
        "partial_rollouts": True,
    }
    kept, restored = (steps(6, save, **options) for save in (lambda groups: groups, through_a_file))
    for a, b in zip(kept, restored, strict=True):
        assert (
            [g.draw for g in a.groups] == [g.draw for g in b.groups]
            and a.verdicts == b.verdicts
            and a.state[:3] == b.state[:3]
        )
        assert list(map(said, a.groups)) == list(map(said, b.groups))
        ages = [[r.policies for g in x.groups for r in g.responses] for x in (a, b)]
        assert ages[0] == ages[1] and a.state.step == b.state.step
    assert any(step.state.open for step in kept)
    verdicts = [s.verdict for step in kept for g in step.state.open for s in g.samples]
    assert any(v and v.error for v in verdicts)


def opened(*outcomes):
    groups = []
    for draw, outcome in enumerate(outcomes):
        verdicts = [None if c == "?" else Verdict(c == "1", 0.0) for c in outcome]
        groups.append(OpenGroup(draw, 0, [Sample(verdict=v) for v in verdicts]))
    return groups


@pytest.mark.parametrize(
    "missing, groups, rate, expected",
    [
        (8, [], 0.5, 16),
        (8, [], 1.0, 8),
        (2, ["10??", "0001"], 0.5, 0),  # informative already, though not finished
        (
            2,
            ["10??", "????"],
            0.5,
            4,
        ),  # p = 1/2, no group is judged: (2 - max(1, 1) + sqrt(1 x 1/2)) / (1/2) = 3.4
        # p = (8 x 0.5) / 10 = 0.4: (3 - max(1, 0.8) + sqrt(2 x 0.6)) / 0.4 = 7.7
        (3, ["10??", "1111", "0000", "11??"], 0.5, 8),
        # p = (8 x 0.5 + 1) / 9 = 5/9: (4 - 1 - max(0, 2 x 5/9) + sqrt(3 x 4/9)) / (5/9) = 5.5
        (4, ["1000", "11??", "????"], 0.5, 6),
    ],
)
def test_prompts_wanted_by_hand(missing, groups, rate, expected):
    assert prompts_wanted(missing, GroupCounts().update(opened(*groups)), rate) == expected


def test_the_expected_keep_rate_follows_what_was_drawn():
    found, _ = drawn(
        lambda draw, sample: (5, draw % 4 == 0 and sample == 0), missing=2, keep_rate=0.5
    )
    share = np.mean([is_informative(g) for g in found.groups])
    assert keep_rate_after(0.5, found.groups) == pytest.approx(0.25 + share / 2)
    assert keep_rate_after(0.5, []) == 0.5
