"""Is one evaluation better than another? A paired bootstrap over problems.

    python -m dapo_jax.compare A.json B.json          files that `python -m dapo_jax.evaluate --json` wrote

Both evaluations have to be of the same problems; where they were sampled or judged in different
ways, that is said. What is compared is B - A, problem by problem: easy and hard problems are in
both, so their spread does not count as noise, as it would if two standard errors were added.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

from dapo_jax.config import printable
from dapo_jax.types import InputError

RESAMPLES = 9999
CONFIDENCE = 0.95
_FEWEST = 10  # problems: of fewer, resampling makes intervals that are far too narrow
_WAYS = ("verifier", "samples_per_problem", "temperature", "top_p")


class Difference(NamedTuple):
    """Of mean accuracy, second minus first."""

    mean: float
    low: float  # of the confidence interval
    high: float
    standard_error: float
    problems: int


def paired_difference(first: dict[str, float], second: dict[str, float]) -> Difference:
    """Mean difference in accuracy of the problems, with its 95% percentile-bootstrap interval;
    problems are what is drawn anew.

    Args:
      first, second: accuracy by problem id, of the same problems.

    Raises ValueError if they are not.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("accuracies are of different problems")
    differences = np.array([second[problem] - first[problem] for problem in sorted(first)])
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # nothing to draw
        return Difference(mean, mean, mean, 0.0, len(differences))
    found = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return Difference(mean, float(low), float(high), float(found.standard_error), len(differences))


def _load(path: str) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Accuracies by set and problem, and how they came about.

    InputError if the file is no result of `evaluate`.
    """
    try:
        found = json.loads(Path(path).read_bytes())
        accuracies = {
            name: _accuracies(result["accuracies"]) for name, result in found["sets"].items()
        }
        return accuracies, {way: found[way] for way in _WAYS if way in found}
    except OSError as e:
        raise InputError(
            f"{path}: cannot read ({e.strerror}); give a file that `dapo_jax.evaluate --json` wrote"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{path}: holds no evaluation; give a file that `dapo_jax.evaluate --json` wrote"
        ) from None


def _accuracies(found: Any) -> dict[str, float]:
    accuracies = {str(problem): float(value) for problem, value in found.items()}
    if not accuracies or not all(0 <= value <= 1 for value in accuracies.values()):
        raise ValueError("no accuracies")
    return accuracies


def main(argv: list[str] | None = None) -> int:
    """Compares two evaluations of the same problems: difference in avg@k with a paired bootstrap
    interval, for each set in both.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.compare", description=main.__doc__)
    parser.add_argument(
        "first", metavar="A.json", help="what `python -m dapo_jax.evaluate --json` wrote"
    )
    parser.add_argument("second", metavar="B.json", help="the same for another run, step or model")
    args = parser.parse_args(argv)
    (first, first_ways), (second, second_ways) = _load(args.first), _load(args.second)
    common = [name for name in first if name in second]
    if not common:
        raise InputError(
            f"{args.second}: has no set of {args.first} ({', '.join(first)}); evaluate the same eval.sets"
        )
    for way in _WAYS:
        if way in first_ways and way in second_ways and first_ways[way] != second_ways[way]:
            print(
                printable(
                    f"note: {way} is {first_ways[way]!r} in {args.first}, {second_ways[way]!r} in {args.second}"
                )
            )
    for name in common:
        try:
            d = paired_difference(first[name], second[name])
        except ValueError:
            raise InputError(
                f"{args.second}: set {name} is of other problems than in {args.first}; evaluate the same eval.sets"
            ) from None
        verdict = "better" if d.low > 0 else "worse" if d.high < 0 else "no difference shown"
        verdict = "too few problems to tell" if d.problems < _FEWEST else verdict
        a, b = (float(np.mean(list(accuracies[name].values()))) for accuracies in (first, second))
        print(
            f"{name}: {a:.3f} → {b:.3f}, {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] (95%, paired over {d.problems} problems): {verdict}"
        )
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
