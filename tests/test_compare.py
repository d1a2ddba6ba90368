"""Paired bootstrap of two evaluations."""

import json
import os

import numpy as np
import pytest
from refusals import refusal

from dapo_jax import compare
from dapo_jax.compare import paired_difference

pytestmark = pytest.mark.host


def of(values) -> dict[str, float]:
    return {f"p{i}": float(v) for i, v in enumerate(values)}


def test_against_a_plain_loop():
    """Interval and standard error of 2,000 resamples drawn one by one: within the noise of
    resampling.
    """
    rng = np.random.default_rng(0)
    a, b = rng.binomial(4, 0.4, 50) / 4, rng.binomial(4, 0.55, 50) / 4
    found = paired_difference(of(a), of(b))
    means = [np.mean([(b - a)[rng.integers(50)] for _ in range(50)]) for _ in range(2000)]
    assert found.mean == pytest.approx(np.mean(b - a)) and found.problems == 50
    assert found.standard_error == pytest.approx(np.std(means), rel=0.05)
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=0.012
    )


def test_the_interval_holds_the_truth_19_times_in_20_and_pairing_tightens_it():
    """Accuracies of problems of mixed difficulty, the second better by 0.05 on each: 400
    evaluations of 60 problems.
    """
    rng, held, widths, unpaired = np.random.default_rng(1), 0, [], []
    for _ in range(400):
        p = rng.beta(0.5, 0.5, 60) * 0.95
        a, b = rng.binomial(16, p) / 16, rng.binomial(16, p + 0.05) / 16
        d = a - b
        low, high = np.quantile(
            d[rng.integers(0, 60, (999, 60))].mean(axis=1), [0.025, 0.975]
        )  # as `paired_difference`, and quicker
        held += low <= -0.05 <= high
        widths.append(high - low)
        unpaired.append(2 * 1.96 * np.sqrt(a.var(ddof=1) / 60 + b.var(ddof=1) / 60))
    assert 0.92 < held / 400 < 0.98
    assert np.mean(widths) < 0.5 * np.mean(unpaired)


def test_equal_differences_have_no_spread():
    assert paired_difference(of([0.25, 0.5]), of([0.5, 0.75])) == (0.25, 0.25, 0.25, 0.0, 2)


def test_what_a_person_sees(tmp_path, capsys):
    rng = np.random.default_rng(2)
    a = rng.binomial(4, 0.3, 100) / 4
    files = []
    for name, values in (("a", a), ("b", np.minimum(1, a + 0.25)), ("c", rng.permutation(a))):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(
            json.dumps({"sets": {"heldout": {"avg": 0.0, "accuracies": of(values)}}})
        )
    for second, verdict in ((files[1], "better"), (files[2], "no difference shown")):
        assert compare.main([str(files[0]), str(second)]) == 0
        assert (
            capsys.readouterr().out.strip().endswith(f"(95%, paired over 100 problems): {verdict}")
        )
    assert compare.main([str(files[1]), str(files[0])]) == 0
    assert capsys.readouterr().out.strip().endswith("worse")


def test_few_problems_and_other_ways_of_sampling_are_said(tmp_path, capsys):
    """9 problems that are all better by 1/2 have an interval of no width, which shows nothing; 10
    are believed.
    """
    for problems, verdict in ((9, "too few problems to tell"), (10, "better")):
        for name, value, more in (
            ("a", 0.25, {"verifier": "strict"}),
            ("b", 0.75, {"verifier": "lenient", "temperature": 0.5}),
        ):
            sets = {"heldout": {"accuracies": of([value] * problems)}}
            (tmp_path / f"{name}.json").write_text(
                json.dumps({"samples_per_problem": 4, **more, "sets": sets})
            )
        assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
        note, line = capsys.readouterr().out.splitlines()
        assert line.endswith(verdict)
        assert (
            note
            == f"note: verifier is 'strict' in {tmp_path}/a.json, 'lenient' in {tmp_path}/b.json"
        )


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "cannot read"),
        ("{", "no evaluation"),
        ("[]", "no evaluation"),
        ('{"sets": {"heldout": {"avg": 1}}}', "no evaluation"),
        ('{"sets": {"heldout": {"accuracies": {"p0": 2}}}}', "no evaluation"),
        ('{"sets": {"heldout": {"accuracies": {"p0": NaN}}}}', "no evaluation"),
        ('{"sets": {"other": {"accuracies": {"p0": 1}}}}', "no set"),
        ('{"sets": {"heldout": {"accuracies": {"p1": 1}}}}', "other problems"),
    ],
)
def test_a_file_that_cannot_be_compared_is_named(tmp_path, content, said):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"sets": {"heldout": {"accuracies": {"p0": 1}}}}')
    if content is not None:
        bad.write_text(content)
    with refusal(f"{bad}: ...{said}"):
        compare.main([str(good), str(bad)])


def test_a_fifo_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with refusal(f"{tmp_path}/fifo: ...not a regular file"):
        compare.main([str(tmp_path / "fifo"), str(tmp_path / "fifo")])
