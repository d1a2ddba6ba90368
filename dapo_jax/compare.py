"""Is one evaluation better than another? A paired bootstrap over problems.

Both evaluations must be of the same problems. The difference B - A is taken problem by problem, so
that the spread of difficulty, which both share, does not count as noise.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from dapo_jax import cli
from dapo_jax.config import printable, read_text
from dapo_jax.types import InputError

_MIN_PROBLEMS = 10  # intervals of fewer are far too narrow
_MAX_BYTES = 1 << 28
_SETTINGS = ("verifier", "samples_per_problem", "temperature", "top_p")


class Difference(NamedTuple):
    """Difference in mean accuracy, second minus first. low, high: its 95% interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    problems: int


def paired_difference(first: dict[str, float], second: dict[str, float]) -> Difference:
    """Mean difference in accuracy with its 95% percentile-bootstrap interval over problems.

    Args: first, second: accuracy by problem id. Raises ValueError unless the ids are the same.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("accuracies are of different problems")
    x = np.array([second[problem] - first[problem] for problem in sorted(first)])
    mean = float(x.mean())
    if np.ptp(x) == 0:  # scipy warns and returns NaN
        return Difference(mean, mean, mean, 0.0, len(x))
    rng = np.random.default_rng(0)
    found = bootstrap((x,), np.mean, n_resamples=9999, method="percentile", random_state=rng)
    low, high = map(float, found.confidence_interval)
    return Difference(mean, low, high, float(found.standard_error), len(x))


def _load(path: str) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Accuracies by set and problem, and how they were measured."""
    do = "give a file that `dapo_jax.evaluate --json` wrote"
    try:
        found = json.loads(read_text(path, path, "evaluation", "JSON", _MAX_BYTES))
        sets = {name: result["accuracies"] for name, result in found["sets"].items()}
        sets = {name: {p: float(x) for p, x in by.items()} for name, by in sets.items()}
        if not all(by and all(0 <= x <= 1 for x in by.values()) for by in sets.values()):
            raise ValueError
        return sets, {key: found[key] for key in _SETTINGS if key in found}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: holds no evaluation; {do}") from None


def main(argv: list[str] | None = None) -> int:
    """Compares two evaluations of the same problems: difference in avg@k with a paired bootstrap
    interval, for each set in both."""
    parser = cli.parser("compare", main.__doc__, "before.json after.json")
    parser.add_argument("first", metavar="A.json", help="written by dapo_jax.evaluate --json")
    parser.add_argument("second", metavar="B.json", help="the same of another run, step or model")
    args = parser.parse_args(argv)
    (first, before), (second, after) = _load(args.first), _load(args.second)
    for key, value in before.items():
        if after.get(key, value) != value:
            values = f"{value!r} in {args.first}, {after[key]!r} in {args.second}"
            print(printable(f"note: {key} is {values}"))
    do, common = "evaluate the same eval.sets", [name for name in first if name in second]
    if not common:
        raise InputError(f"{args.second}: has no set of {args.first} ({', '.join(first)}); {do}")
    for name in common:
        a, b = first[name], second[name]
        if a.keys() != b.keys():
            what = f"set {name} is of other problems than in {args.first}"
            raise InputError(f"{args.second}: {what}; {do}")
        d = paired_difference(a, b)
        verdict = "better" if d.low > 0 else "worse" if d.high < 0 else "no difference shown"
        verdict = "too few problems to tell" if d.problems < _MIN_PROBLEMS else verdict
        means = f"{np.mean(list(a.values())):.3f} → {np.mean(list(b.values())):.3f}"
        interval = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
        print(f"{name}: {means}, {interval} (95%, paired over {d.problems} problems): {verdict}")
    return 0


if __name__ == "__main__":
    cli.run(main)
