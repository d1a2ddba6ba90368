"""What is in a data set: rows, what became of them, and how long the prompts are.

As numbers, and as lines for a terminal.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_jax.data.problems import LoadReport, Skip
from dapo_jax.types import Problem

PERCENTILES = (50, 90, 95, 99)
_BINS = 10  # up to the 99th percentile; one more holds what is longer
_BAR = 40  # characters of the longest bar


def set_stats(report: LoadReport, problems: Sequence[Problem]) -> dict[str, Any]:
    """Counts of one data set, JSON-able: rows == problems + in_earlier_sets + duplicates +
    conflicts + skipped ones.
    """
    return {
        "source": report.source,
        "rows": report.rows,
        "problems": report.problems,
        "duplicates": report.duplicates,
        "conflicts": report.conflicts,
        "in_earlier_sets": report.elsewhere,
        "skipped": {reason: dataclasses.asdict(skip) for reason, skip in report.skipped.items()},
        "normalized": dict(report.normalized),
        "with_solution": sum(p.solution is not None for p in problems),
    }


def length_stats(
    lengths: np.ndarray,
    with_control_tokens: int,
    control_tokens: Sequence[str],
    max_prompt_len: int,
) -> dict[str, Any]:
    """How the lengths of prompts, int64 [Q] in tokens, are distributed; how many more are left out
    for the `control_tokens` they hold.

    The p-th percentile is the shortest length that at least p% of the prompts do not exceed.
    `histogram` holds [from, below, prompts].
    """
    found: dict[str, Any] = {
        "prompts": len(lengths),
        "with_control_tokens": with_control_tokens,
        "control_tokens": [*control_tokens],
        "max_prompt_len": max_prompt_len,
        "too_long": int((lengths > max_prompt_len).sum()),
    }
    if not len(lengths):
        return found
    percentiles = {
        f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES
    }
    return found | {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        **percentiles,
        "max": int(lengths.max()),
        "histogram": _histogram(lengths, percentiles["p99"]),
    }


def _histogram(lengths: np.ndarray, most: int) -> list[list[int]]:
    """Bins of one width, 1, 2 or 5 times a power of ten, that reach to `most`; a last one for what
    is longer, if anything is.
    """
    width = next(
        w
        for power in range(19)
        for w in (10**power, 2 * 10**power, 5 * 10**power)
        if most // w - lengths.min() // w < _BINS
    )
    edges = np.arange(lengths.min() // width, most // width + 2) * width
    counts, _ = np.histogram(lengths[lengths < edges[-1]], edges)
    bins = [
        [int(begin), int(end), int(count)]
        for begin, end, count in zip(edges, edges[1:], counts, strict=False)
    ]
    longer = int((lengths >= edges[-1]).sum())
    return bins + ([[int(edges[-1]), int(lengths.max()) + 1, longer]] if longer else [])


def table(title: str, stats: Mapping[str, Any]) -> list[str]:
    """The lines that show `set_stats`, and `length_stats` under `prompt_tokens`, if there."""
    notes = {
        "duplicates": "rows whose prompt an earlier row has",
        "conflicts": "prompts with different answers, left out",
        "in_earlier_sets": "prompts of an earlier data set of data.train, left out",
    }
    lines = [f"{title}: {stats['source']}"]
    for key in ("rows", "problems", "duplicates", "conflicts", "in_earlier_sets"):
        if stats[key] or key in ("rows", "problems"):
            lines.append(_line(key.replace("_", " "), stats[key], notes.get(key, "")))
    for reason, skip in stats["skipped"].items():
        lines.append(_line("skipped", skip["count"], f"{reason} (first in {Skip(**skip).where})"))
    lines += [_line("normalized", count, what) for what, count in stats["normalized"].items()]
    lines.append(
        _line(
            "with a solution",
            stats["with_solution"],
            f"{stats['with_solution'] / stats['problems']:.1%} of the problems",
        )
    )
    if "share" in stats:
        lines.append(f"  {'share of draws':<16}{stats['share']:>11.1%}  weight {stats['weight']:g}")
    return lines + (_length_lines(stats["prompt_tokens"]) if "prompt_tokens" in stats else [])


def _line(name: str, count: int, note: str) -> str:
    return f"  {name:<16}{count:>11,}  {note}".rstrip()


def _length_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["with_control_tokens"]:
        lines.append(
            _line(
                "control tokens",
                found["with_control_tokens"],
                f"problems that hold {', '.join(found['control_tokens'])}, left out",
            )
        )
    if "max" not in found:
        return lines
    lines.append(
        _line(
            "too long",
            found["too_long"],
            f"{found['too_long'] / found['prompts']:.1%} exceed {found['max_prompt_len']:,} tokens",
        )
    )
    quantiles = "  ".join(f"p{p} {found[f'p{p}']:,}" for p in PERCENTILES)
    lines.append(
        f"  prompt tokens: min {found['min']:,}  mean {found['mean']:,.1f}  {quantiles}  max {found['max']:,}"
    )
    most = max(count for *_, count in found["histogram"])
    for begin, end, count in found["histogram"]:
        bar = "#" * max(round(_BAR * count / most), bool(count))
        lines.append(f"  {f'{begin:,}-{end - 1:,}':>15} {count:>11,}  {bar}".rstrip())
    return lines
