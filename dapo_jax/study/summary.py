"""What the runs of a study say: one table of means over seeds with their standard errors, at equal updates and at equal tokens."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.study.ladder import Study
from dapo_jax.study.runs import is_done, run_dir

_LATE = 0.2  # `late` values are means over the last such share of the steps


class Run(NamedTuple):
    """One run, as curves over rollout steps; step 0 is the warm-up's policy."""

    steps: np.ndarray  # [n], of the rollout steps
    tokens: np.ndarray  # [n], response tokens sampled by the end of each, all of them: also of groups that were dropped
    metrics: dict[str, np.ndarray]  # [n] each, NaN where a step has none
    eval_steps: np.ndarray  # [e]
    eval_tokens: np.ndarray  # [e]
    evals: dict[str, np.ndarray]  # [e] each, by the metric's last part: avg, response_len_mean, ...


class Estimate(NamedTuple):
    """Mean over seeds, its standard error (std / √n, ddof 1), and how many seeds."""

    mean: float
    error: float
    seeds: int


def read_run(folder: Path) -> Run:
    """The curves of a run folder; of evaluation sets the first by name."""
    records = read_metrics(folder)
    train = [r for r in records if r["step"] > 0]
    names = sorted({key for r in train for key in r if not key.startswith("eval/")})
    tested = sorted({key.split("/")[1] for r in records for key in r if key.startswith("eval/")})[0]
    held_out = [r for r in records if f"eval/{tested}/avg" in r]
    parts = sorted({key.split("/")[2] for r in held_out for key in r if key.startswith(f"eval/{tested}/")})
    tokens = np.cumsum([r["rollout/tokens"] for r in train])
    eval_steps = np.array([r["step"] for r in held_out])
    return Run(
        steps=np.array([r["step"] for r in train]),
        tokens=tokens,
        metrics={name: np.array([r.get(name, math.nan) for r in train], np.float64) for name in names},
        eval_steps=eval_steps,
        eval_tokens=np.concatenate([[0], tokens])[eval_steps],
        evals={part: np.array([r.get(f"eval/{tested}/{part}", math.nan) for r in held_out], np.float64) for part in parts},
    )


def read_runs(study: Study, out: Path) -> list[dict[int, Run]]:
    """The finished runs of each row, by seed."""
    steps = study.config.train.steps
    found = [{seed: run_dir(out, study, row, seed) for seed in study.seeds} for row in study.rows]
    return [{seed: read_run(folder) for seed, folder in row.items() if is_done(folder, steps)} for row in found]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of what the seeds gave; values that are not finite are left out."""
    finite = np.array([v for v in values if math.isfinite(v)])
    if not finite.size:
        return Estimate(math.nan, math.nan, 0)
    error = float(finite.std(ddof=1) / math.sqrt(finite.size)) if finite.size > 1 else math.nan
    return Estimate(float(finite.mean()), error, int(finite.size))


def at_tokens(run: Run, tokens: float, part: str = "avg") -> float:
    """An evaluation after so many sampled tokens, by linear interpolation between evaluations."""
    return float(np.interp(tokens, run.eval_tokens, run.evals[part]))


def curve(run: Run, metric: str) -> np.ndarray:
    """A metric over the steps, NaN where there is none."""
    return run.metrics.get(metric, np.full(len(run.steps), math.nan))


def late(run: Run, metric: str) -> float:
    """Mean of a metric over the last fifth of the steps, NaN where it has no value there."""
    values = curve(run, metric)
    tail = values[-max(1, round(_LATE * len(values))) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan


def steps_to(run: Run, target: float, along: np.ndarray | None = None) -> float:
    """Where held-out accuracy first reaches a target, by linear interpolation; NaN if it never does.

    along: what to count, [e], instead of steps; `run.eval_tokens` for tokens.
    """
    places, values = run.eval_steps if along is None else along, run.evals["avg"]
    reached = np.flatnonzero(values >= target)
    if not reached.size:
        return math.nan
    i = int(reached[0])
    if i == 0:
        return float(places[0])
    share = (target - values[i - 1]) / (values[i] - values[i - 1])
    return float(places[i - 1] + share * (places[i] - places[i - 1]))


def budget(rows: Sequence[dict[int, Run]]) -> float:
    """The tokens that every run has sampled: the fewest of any."""
    return float(min(run.tokens[-1] for row in rows for run in row.values()))


def summarize(study: Study, rows: Sequence[dict[int, Run]]) -> list[dict[str, Any]]:
    """One entry a row that has runs: name, seeds, and an Estimate a column.

    `gain` is the paired difference to the row above at equal updates, over the seeds that both have: the same warm-up on both sides.
    """
    tokens = budget(rows)
    table = []
    for number, (row, runs) in enumerate(zip(study.rows, rows, strict=True)):
        if not runs:
            continue
        above = rows[number - 1] if number else {}
        reached = [steps_to(run, study.target_accuracy) for run in runs.values()]
        columns = {
            "before": [run.evals["avg"][0] for run in runs.values()],
            "accuracy": [run.evals["avg"][-1] for run in runs.values()],
            "gain": [run.evals["avg"][-1] - above[seed].evals["avg"][-1] for seed, run in runs.items() if seed in above],
            "accuracy_at_tokens": [at_tokens(run, tokens) for run in runs.values()],
            "best_accuracy": [run.evals["avg"].max() for run in runs.values()],
            "steps_to_target": reached,
            "tokens_to_target": [steps_to(run, study.target_accuracy, run.eval_tokens) for run in runs.values()],
            "tokens": [run.tokens[-1] for run in runs.values()],
            "entropy": [late(run, "policy/entropy") for run in runs.values()],
            "response_len": [run.evals["response_len_mean"][-1] for run in runs.values()],
            "truncated": [run.evals["truncated_fraction"][-1] for run in runs.values()],
            "kept": [late(run, "filter/kept_fraction") for run in runs.values()],
            "upclipped_prob": [late(run, "policy/upclipped_prob_mean") for run in runs.values()],
            "long_share": [late(run, "policy/long_share") for run in runs.values()],
            "all_correct": [late(run, "filter/all_correct") for run in runs.values()],
            "trained_informative": [late(run, "filter/trained_informative") for run in runs.values()],
        }
        table.append({"row": row.name, "seeds": list(runs), **{key: estimate(values) for key, values in columns.items()}})
    return table


# Columns of the table: heading, key of `summarize`, factor, digits.
_COLUMNS = (
    ("accuracy (equal updates)", "accuracy", 100, 1),
    ("paired gain on the row above", "gain", 100, 1),
    ("accuracy (equal tokens)", "accuracy_at_tokens", 100, 1),
    ("steps to target", "steps_to_target", 1, 0),
    ("entropy", "entropy", 1, 3),
    ("length", "response_len", 1, 1),
    ("cut %", "truncated", 100, 2),
    ("kept %", "kept", 100, 0),
)


def as_markdown(study: Study, table: Sequence[dict[str, Any]]) -> str:
    """The table, mean ± standard error over seeds; a count in brackets where not every seed has a value, - where none has."""
    lines = ["| row | " + " | ".join(heading for heading, *_ in _COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for entry in table:
        cells = [_cell(entry[key], factor, digits, len(entry["seeds"])) for _, key, factor, digits in _COLUMNS]
        lines.append(f"| {entry['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Estimate, factor: float, digits: int, seeds: int) -> str:
    if not value.seeds:
        return "-"
    error = f" ± {factor * value.error:.{digits}f}" if math.isfinite(value.error) else ""
    return f"{factor * value.mean:.{digits}f}{error}" + (f" ({value.seeds} of {seeds})" if value.seeds < seeds else "")
