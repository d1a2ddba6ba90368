"""Statistics of a data set, rows and prompt lengths: as numbers, and as lines for a terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from dapo_jax.data.problems import LoadReport, Skip
from dapo_jax.types import Problem

PERCENTILES = (50, 90, 95, 99)
_BINS = 10  # up to the 99th percentile; one more holds what is longer
_BAR = 40  # characters of the longest bar
_COUNTS = {  # and what they count; those with a text are shown unless they are 0
    "rows": "",
    "problems": "",
    "duplicates": "rows whose prompt an earlier row has",
    "conflicts": "prompts with different answers, left out",
    "in_earlier_sets": "prompts of an earlier data set of data.train, left out",
}


def set_stats(report: LoadReport, problems: Sequence[Problem]) -> dict[str, Any]:
    """Counts of one data set, JSON-able."""
    solved = sum(p.solution is not None for p in problems)
    return dataclasses.asdict(report) | {"with_solution": solved}


def length_stats(
    lengths: np.ndarray, with_control_tokens: int, control_tokens: list[str], max_prompt_len: int
) -> dict[str, Any]:
    """The distribution of prompt lengths, int64 [Q] in tokens, without prompts with control tokens.

    The p-th percentile is the shortest length that at least p% of the prompts do not exceed.
    `histogram` holds [from, below, prompts].
    """
    found: dict[str, Any] = {
        "prompts": len(lengths),
        "with_control_tokens": with_control_tokens,
        "control_tokens": control_tokens,
        "max_prompt_len": max_prompt_len,
        "too_long": int((lengths > max_prompt_len).sum()),
    }
    if not len(lengths):
        return found
    low, high, mean = int(lengths.min()), int(lengths.max()), float(lengths.mean())
    points = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    found |= {"min": low, "mean": mean, "max": high}
    found |= {f"p{p}": point for p, point in zip(PERCENTILES, points, strict=True)}
    width = -(-(points[-1] + 1 - low) // _BINS)
    edges = [*range(low, points[-1] + 1 + width, width)]
    edges += [high + 1] if high >= edges[-1] else []
    counts = np.histogram(lengths, edges)[0].tolist()
    bins = [[*edge, count] for edge, count in zip(pairwise(edges), counts, strict=True)]
    return found | {"histogram": bins}


def table(title: str, stats: Mapping[str, Any]) -> list[str]:
    """The lines that show `set_stats`, and `length_stats` under `prompt_tokens`, if there."""
    lines = [f"{title}: {stats['source']}"]
    for key, note in _COUNTS.items():
        if stats[key] or not note:
            lines.append(_line(key.replace("_", " "), stats[key], note))
    for reason, skip in stats["skipped"].items():
        lines.append(_line("skipped", skip["count"], f"{reason} (first in {Skip(**skip).where})"))
    lines += [_line("normalized", count, what) for what, count in stats["normalized"].items()]
    solved = stats["with_solution"]
    lines.append(_line("with a solution", solved, f"{solved / stats['problems']:.1%} of them"))
    if "share" in stats:
        lines.append(f"  {'share of draws':<16}{stats['share']:>11.1%}  weight {stats['weight']:g}")
    return lines + (_length_lines(stats["prompt_tokens"]) if "prompt_tokens" in stats else [])


def _line(name: str, count: int, note: str) -> str:
    return f"  {name:<16}{count:>11,}  {note}".rstrip()


def _length_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if count := found["with_control_tokens"]:
        tokens = ", ".join(found["control_tokens"])
        lines.append(_line("control tokens", count, f"problems that hold {tokens}, left out"))
    if "max" not in found:
        return lines
    share = f"{found['too_long'] / found['prompts']:.1%} exceed {found['max_prompt_len']:,} tokens"
    lines.append(_line("too long", found["too_long"], share))
    points = "  ".join(f"p{p} {found[f'p{p}']:,}" for p in PERCENTILES)
    middle = f"mean {found['mean']:,.1f}  {points}"
    lines.append(f"  prompt tokens: min {found['min']:,}  {middle}  max {found['max']:,}")
    most = max(count for *_, count in found["histogram"])
    for begin, end, count in found["histogram"]:
        bar = "#" * max(round(_BAR * count / most), bool(count))
        lines.append(f"  {f'{begin:,}-{end - 1:,}':>15} {count:>11,}  {bar}".rstrip())
    return lines
