"""Several data sets with weights: who is drawn when, against a naive loop; and what they hold
together.
"""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from dapo_jax.config import ArithmeticConfig, ColumnsConfig, DataSection, TrainSet
from dapo_jax.data.mixture import (
    Mixture,
    drawn_of_each,
    load_training,
    mix,
    mixture_digest,
    mixture_order,
    next_problems,
)
from dapo_jax.data.problems import Cursor, advance, epoch_order, problems_digest
from dapo_jax.types import Problem

pytestmark = pytest.mark.host

mixtures = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([0.5, 1.0, 2.0, 3.0, 1 / 3, 0.1])),
    min_size=1,
    max_size=4,
).map(
    lambda parts: Mixture(
        tuple("abcd"[: len(parts)]), tuple(n for n, _ in parts), tuple(w for _, w in parts)
    )
)
mixtures = mixtures.filter(lambda m: all(share * sum(m.counts) >= 1 for share in m.shares()))


def owners(mixture, draws):
    """Which data set each drawn index is of, and which of its problems."""
    firsts = np.cumsum([0, *mixture.counts])
    whose = np.searchsorted(firsts, draws, side="right") - 1
    return whose, draws - firsts[whose]


def draw(mixture, take, seed, cursor=Cursor()):  # noqa: B008
    return next_problems(mixture, cursor, take, seed=seed)


# Draws


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_each_data_set_goes_through_its_own_shuffled_epochs(mixture, seed, epochs):
    draws, cursor = draw(mixture, sum(mixture.counts) * epochs, seed)
    whose, which = owners(mixture, draws)
    assert cursor == Cursor(epochs - 1, sum(mixture.counts))
    for n, count in enumerate(mixture.counts):
        own = which[whose == n].tolist()
        passes = [
            epoch_order(count, seed=seed, epoch=e, stream=n).tolist()
            for e in range(len(own) // count + 1)
        ]
        assert own == [i for one in passes for i in one][: len(own)]  # the naive loop
        assert all(
            sorted(own[i : i + count]) == list(range(count))
            for i in range(0, len(own) - count + 1, count)
        )


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(0, 2**31 - 1), st.integers(1, 5))
def test_shares_are_exact_to_within_a_draw_after_every_epoch(mixture, seed, epochs):
    size = sum(mixture.counts)
    whose, _ = owners(mixture, draw(mixture, size * epochs, seed)[0])
    total = sum(Fraction(w) for w in mixture.weights)
    for e in range(1, epochs + 1):
        seen = Counter(whose[: size * e].tolist())
        assert [seen[n] for n in range(len(mixture.counts))] == drawn_of_each(mixture, e)
        assert all(
            abs(seen[n] - size * e * Fraction(w) / total) < 1 for n, w in enumerate(mixture.weights)
        )


def test_within_an_epoch_the_data_sets_are_mixed():
    """1 : 3 over 1,000 draws an epoch: a quarter of any hundred, as hypergeometric counts vary."""
    mixture = Mixture(("a", "b"), (400, 600), (1.0, 3.0))
    whose, _ = owners(mixture, draw(mixture, 20_000, 7)[0])
    counts = (whose.reshape(200, 100) == 0).sum(axis=1)
    assert (whose == 0).sum() == 5_000
    deviation = np.sqrt(100 * 0.25 * 0.75 * 900 / 999)
    assert abs(counts - 25).max() < 5 * deviation and 0.8 < counts.std() / deviation < 1.2
    firsts = Counter(whose[::1000].tolist())  # no data set always begins
    assert len(firsts) == 2


@given(mixtures, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_sequence_is_the_same_sequence(mixture, takes, seed):
    whole, end = draw(mixture, sum(takes), seed)
    cursor, parts = Cursor(), [np.empty(0, np.int64)]
    for take in takes:
        mixture_order.cache_clear()
        part, cursor = draw(
            mixture, take, seed, Cursor(*json.loads(json.dumps(cursor)))
        )  # as a restart would
        parts.append(part)
    assert np.concatenate(parts).tolist() == whole.tolist() and cursor == end


@given(st.integers(1, 30), st.integers(0, 100), st.floats(0.001, 1000))
def test_one_data_set_is_drawn_as_if_there_were_no_mixtures(count, seed, weight):
    mixed = draw(Mixture(("a",), (count,), (weight,)), 3 * count + 1, seed)
    plain = advance(Cursor(), count, 3 * count + 1, seed=seed)
    assert mixed[0].tolist() == plain[0].tolist() and mixed[1] == plain[1]


def test_weights_matter_up_to_a_common_factor_only():
    orders = [
        mixture_order(Mixture(("a", "b"), (5, 7), w), seed=3, epoch=2).tolist()
        for w in ((1.0, 3.0), (2.0, 6.0), (3.0, 1.0))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_data_sets_of_one_size_are_shuffled_apart():
    mixture = Mixture(("a", "b"), (20, 20), (1.0, 1.0))
    whose, which = owners(mixture, draw(mixture, 40, 0)[0])
    assert which[whose == 0].tolist() != which[whose == 1].tolist()


# Loading


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(prompt, answer="1", **more):
    return {"prompt": prompt, "answer": answer, **more}


@pytest.fixture
def sources(tmp_path):
    a = write(
        tmp_path / "a.jsonl",
        row("x", id="0"),
        row("y", id="1"),
        row("y"),
        row("z", "1"),
        row("z", "2"),
    )
    b = write(
        tmp_path / "b.jsonl",
        {"q": "x", "answer": "other", "id": "0"},
        {"q": "z", "answer": "2"},
        {"q": "w", "answer": "1", "id": "1"},
    )
    return a, b


def test_the_first_data_set_that_has_a_prompt_keeps_it(sources):
    a, b = sources
    section = DataSection((TrainSet(a), TrainSet(b, ColumnsConfig(prompt="q"), 2.0)))
    problems, reports = load_training(section)
    assert [(p.prompt, p.answer, p.source) for p in problems] == [
        ("x", "1", a),
        ("y", "1", a),
        ("z", "2", b),
        ("w", "1", b),
    ]
    assert [
        (r.rows, r.problems, r.in_earlier_sets, r.duplicates, r.conflicts) for r in reports
    ] == [
        (5, 2, 0, 2, 1),
        (3, 2, 1, 0, 0),
    ]
    assert reports[1].summary() == f"{b}: 2 problems from 3 rows (1 in an earlier data set)"
    ids = [p.id for p in problems]
    assert (
        len(set(ids)) == 4 and ids[0] == "0" and "1" not in ids
    )  # both data sets have a 1 that is used
    swapped, _ = load_training(DataSection(section.train[::-1]))
    assert {p.prompt: p.answer for p in swapped} == {"x": "other", "z": "2", "w": "1", "y": "1"}


def test_one_data_set_loads_as_ever(sources):
    problems, (report,) = load_training(DataSection(train := (TrainSet(sources[0]),)))
    assert [p.id for p in problems] == ["0", "1"] and report.problems == 2
    assert mixture_digest(problems, mix(train, problems)) == problems_digest(problems)


def test_the_embedded_problems_may_be_one_of_several(sources):
    section = DataSection(
        (TrainSet(sources[0]), TrainSet("arithmetic")),
        arithmetic=ArithmeticConfig(train_problems=10),
    )
    problems, _ = load_training(section)
    mixture = mix(section.train, problems)
    assert mixture.counts == (2, 10)
    assert mixture.summary().startswith(
        f"50.0% {sources[0]} (2 prompts, each drawn 3 times an epoch), 50.0% arithmetic "
        f"(10 prompts, "
    )


def test_the_digest_covers_problems_and_weights():
    problems = [Problem(c, c, "1", source=s) for c, s in zip("abcd", "xxyy", strict=True)]
    trains = [
        (TrainSet("x", weight=x), TrainSet("y", weight=y))
        for x, y in ((1.0, 1.0), (1.0, 1.5), (1.5, 1.0))
    ]
    digests = {mixture_digest(problems, mix(train, problems)) for train in trains}
    moved = [Problem(c, c, "1", source=s) for c, s in zip("abcd", "xyyy", strict=True)]
    digests.add(mixture_digest(moved, mix(trains[0], moved)))
    assert len(digests) == 4 and problems_digest(problems) not in digests


def test_what_cannot_be_mixed(sources):
    a, b = sources
    with refusal(f"{a}: every problem ...data.train"):
        load_training(DataSection((TrainSet(write_copy(a)), TrainSet(a))))
    problems, _ = load_training(DataSection((TrainSet(a),)))
    with refusal(f"{b}: ...no prompt ...data.train"):
        mix((TrainSet(a), TrainSet(b)), problems)
    two = [*problems, Problem("w", "w", "1", source=b)]
    with refusal(f"data.train: ...{b}: weight 0.1 ...3"):
        mix((TrainSet(a, weight=9.0), TrainSet(b)), two)
    assert mix((TrainSet(a, weight=2.0), TrainSet(b)), two).counts == (2, 1)


def write_copy(path):
    with open(path) as source, open(path + "-copy.jsonl", "w") as copy:
        copy.write(source.read())
    return copy.name
