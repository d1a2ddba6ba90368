"""The paper's ablation in miniature: parts of DAPO added one by one, several seeds each.

    python -m dapo_jax.study --config configs/study_arithmetic_cpu.yaml --out runs/study

A study is a loop over configs and a summary. Its YAML file holds

    base: {...}              a config, as for dapo_jax.train
    warm_up: {...}           overrides of the base for the supervised warm-up that all rows share
    seeds: [0, 1, 2, 3]
    target_accuracy: 0.25    held-out accuracy of `steps to target`
    ladder:                  each row's `set` is merged into the config of the row above
      - {name: naive GRPO, set: {dapo: {...}}, watch: [policy/entropy]}

and <out> gets

    warm/<seed>/             the warmed-up policy, a Hugging Face folder that the rows start from
    runs/<row>/<seed>/       a run folder, for `dapo_jax.report` as any other
    table.md, figure.png     means over seeds with standard errors

Complete runs are kept and interrupted ones resume, so the same command continues a study. Several
commands may share the seeds between them. Rows, seeds and train.steps may be added to; what was
trained with another config is refused.
"""

import argparse
import dataclasses
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dapo_jax import supervised
from dapo_jax.config import (
    Config,
    ConfigError,
    config_from_dict,
    dump_yaml,
    load_config,
    merge,
    printable,
    read_mapping,
)
from dapo_jax.config.checks import build
from dapo_jax.config.schema import STRICT, field
from dapo_jax.runtime.curves import STYLE, running_mean
from dapo_jax.runtime.files import remove, write_whole, writing
from dapo_jax.runtime.metrics import definition, read_metrics
from dapo_jax.train import MAY_CHANGE, difference, train
from dapo_jax.types import InputError

# Every run of a table must sample and evaluate alike; the warm-up uses neither of the last three.
_RUN_MAY_CHANGE = tuple(key for key in MAY_CHANGE if not key.startswith(("dapo.", "eval.")))
_WARM_UP_MAY_CHANGE = (*_RUN_MAY_CHANGE, "dapo.", "eval.", "reward.")


@dataclasses.dataclass(frozen=True)
class LadderRow:
    """A row as the file has it."""

    name: str = field(MISSING, "heading of the row", min_length=1)
    set: Mapping[str, Any] = field(dict, "overrides of the row above")
    watch: tuple[str, ...] = field((), "metrics to draw beside those of the row above")


@dataclasses.dataclass(frozen=True)
class StudyFile:
    """A study as the file has it."""

    __pydantic_config__ = STRICT

    base: Mapping[str, Any] = field(MISSING, "config of the first row")
    seeds: tuple[int, ...] = field(MISSING, "every row is trained with each", min_length=1)
    target_accuracy: float = field(MISSING, "held-out accuracy of `steps to target`", gt=0, le=1)
    ladder: tuple[LadderRow, ...] = field(MISSING, "rows", min_length=1)
    warm_up: Mapping[str, Any] | None = field(None, "overrides of the base for the warm-up")


class Row(NamedTuple):
    """A row of the table. key: its name in paths."""

    name: str
    key: str
    tree: Mapping[str, Any]
    config: Config
    watch: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """warm_up: its config, None where every row starts from the base's model.folder."""

    warm_up: Config | None
    seeds: tuple[int, ...]
    target_accuracy: float
    rows: tuple[Row, ...]


def load_study(path: str) -> Study:
    """Reads and checks a study. Raises ConfigError for anything wrong with it."""
    where = printable(path)

    def fail(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{where}: {key}: {message}")

    file: StudyFile = build(StudyFile, read_mapping(path), fail)
    if len(set(file.seeds)) < len(file.seeds) or min(file.seeds) < 0:
        fail("seeds", "expected different numbers from 0 on")
    if file.base.get("seed") is not None:
        fail("base.seed", "comes from `seeds`; remove it")
    rows: list[Row] = []
    for number, row in enumerate(file.ladder):
        key = f"ladder.{number}"
        for metric in row.watch:
            if metric.startswith("eval/") or definition(metric) is None:
                fail(f"{key}.watch", f"{printable(metric)[:60]} is no metric of a training step")
        tree = merge(rows[-1].tree if rows else file.base, row.set)
        short = re.sub(r"[^a-z0-9]+", "_", row.name.lower()).strip("_")
        config = config_from_dict(tree, f"{where}: {key}")
        rows.append(Row(row.name, f"{number}_{short}", tree, config, row.watch))
    first, warm_up = rows[0].config, None
    if (file.warm_up is None) == (first.model.folder is None):
        fail("warm_up", "rows start from a warm-up or from base.model.folder; give one of the two")
    if not first.eval.sets or not first.eval.every:
        fail("base.eval", "has no sets, or `every: 0`; a study compares held-out accuracy")
    if file.warm_up is not None:
        warm_up = config_from_dict(merge(file.base, file.warm_up), f"{where}: warm_up")
        if not warm_up.supervised.updates:
            fail("base.supervised.updates", "is 0; rows start from a warm-up")
    return Study(warm_up, file.seeds, file.target_accuracy, tuple(rows))


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def run_config(study: Study, row: Row, seed: int, out: Path) -> Config:
    """The config of one run."""
    model = row.config.model
    if study.warm_up is not None:
        folder = str(out / "warm" / str(seed))
        model = dataclasses.replace(model, folder=folder, architecture=None)
    warmed = dataclasses.replace(row.config.supervised, updates=0)
    return dataclasses.replace(row.config, seed=seed, model=model, supervised=warmed)


def train_all(study: Study, out: Path, info: Callable[[str], None]) -> None:
    """Trains what is not complete: all rows of the first seed, then of the next.

    Raises ConfigError, before anything is trained, if `out` has runs of another config; and what
    `train` raises.
    """
    check_same_study(study, out)
    for seed in study.seeds:
        if study.warm_up is not None and not (folder := out / "warm" / str(seed)).is_dir():
            info(f"seed {seed}: warm-up")
            part, file = folder.with_name(f".{seed}.part"), out / "warm" / f"{seed}.yaml"
            remove(part)
            with writing(file):
                write_whole(file, dump_yaml(_warm_up_config(study, seed)).encode())
            supervised.main(["--config", str(file), "--out", str(part), "--quiet"])
            os.rename(part, folder)
        for row in study.rows:
            config, folder = run_config(study, row, seed, out), out / "runs" / row.key / str(seed)
            if last_step(folder) != config.train.steps:
                info(f"seed {seed}: {row.name}")
                train(config, folder, quiet=True)


def _warm_up_config(study: Study, seed: int) -> Config:
    assert study.warm_up is not None
    return dataclasses.replace(study.warm_up, seed=seed)


def check_same_study(study: Study, out: Path) -> None:
    """Raises ConfigError if something in `out` was trained with another config than the study's."""
    files = [
        (out / "runs" / row.key / str(seed) / "config.yaml", run_config(study, row, seed, out))
        for row in study.rows
        for seed in study.seeds
    ]
    known = [(file, config, _RUN_MAY_CHANGE) for file, config in files]
    if study.warm_up is not None:
        known += [
            (out / "warm" / f"{seed}.yaml", _warm_up_config(study, seed), _WARM_UP_MAY_CHANGE)
            for seed in study.seeds
        ]
    for file, config, may_change in known:
        if file.is_file() and (changed := difference(load_config(file), config, may_change)):
            key, was, now = changed
            raise ConfigError(
                f"{file}: {key}: was {was!r} when this was trained, and is {now!r} in the study; give another --out, or change it back"
            )


def last_step(folder: Path) -> int:
    """The last step of a run folder, 0 without one."""
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    return records[-1]["step"] if records else 0


# --------------------------------------------------------------------------------------------------
# Summary
# --------------------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """A run over its rollout steps 1 to n; held-out values over its evaluations."""

    metrics: Mapping[str, np.ndarray]  # [n] each, NaN where a step has none
    tokens: np.ndarray  # [n], response tokens sampled so far, those of dropped groups included
    eval_steps: np.ndarray  # [e]
    eval_tokens: np.ndarray  # [e]
    evals: Mapping[str, np.ndarray]  # [e] each: avg, response_len_mean, truncated_fraction


class Estimate(NamedTuple):
    """Mean over seeds, its standard error (std / sqrt(n), ddof 1), and n."""

    mean: float
    error: float
    seeds: int


def read_curves(folder: Path) -> Curves:
    """The curves of a run folder; of several evaluation sets the first by name."""
    records = read_metrics(folder)
    train = [r for r in records if r["step"] > 0]
    name = min(k.split("/")[1] for r in records for k in r if k.startswith("eval/"))
    held_out = [r for r in records if f"eval/{name}/avg" in r]

    def column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
        return np.array([row.get(key, math.nan) for row in rows], np.float64)

    tokens = np.cumsum(column(train, "rollout/tokens"))
    steps = np.array([r["step"] for r in held_out])
    parts = ("avg", "response_len_mean", "truncated_fraction")
    return Curves(
        {key: column(train, key) for key in {k for r in train for k in r}},
        tokens,
        steps,
        np.concatenate([[0], tokens])[steps],
        {part: column(held_out, f"eval/{name}/{part}") for part in parts},
    )


def read_runs(study: Study, out: Path) -> list[dict[int, Curves]]:
    """The complete runs of each row by seed."""
    folders = [{s: out / "runs" / row.key / str(s) for s in study.seeds} for row in study.rows]
    return [
        {s: read_curves(f) for s, f in found.items() if last_step(f) == row.config.train.steps}
        for row, found in zip(study.rows, folders, strict=True)
    ]


def estimate(values: Sequence[float]) -> Estimate:
    """Over the finite values."""
    finite = np.array([v for v in values if math.isfinite(v)])
    if not finite.size:
        return Estimate(math.nan, math.nan, 0)
    error = finite.std(ddof=1) / math.sqrt(finite.size) if finite.size > 1 else math.nan
    return Estimate(float(finite.mean()), float(error), finite.size)


def late(run: Curves, metric: str) -> float:
    """Mean of a metric over the last fifth of the steps; NaN without a value there."""
    values = run.metrics.get(metric, np.full(len(run.tokens), math.nan))
    tail = values[-max(1, round(0.2 * len(values))) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan


def at_tokens(run: Curves, tokens: float) -> float:
    """Held-out accuracy after so many sampled tokens, interpolated between evaluations."""
    return float(np.interp(tokens, run.eval_tokens, run.evals["avg"]))


def steps_to(run: Curves, target: float) -> float:
    """Step at which held-out accuracy first reaches a target, interpolated; NaN if it never does."""
    accuracy, steps = run.evals["avg"], run.eval_steps
    reached = np.flatnonzero(accuracy >= target)
    if not reached.size or reached[0] == 0:
        return float(steps[0]) if reached.size else math.nan
    around = slice(reached[0] - 1, reached[0] + 1)
    return float(np.interp(target, accuracy[around], steps[around]))


def budget(rows: Sequence[Mapping[int, Curves]]) -> float:
    """Tokens that every run has sampled: the fewest of any."""
    return float(min(run.tokens[-1] for row in rows for run in row.values()))


# Columns of the table: heading, factor, digits; values as `columns` gives them.
COLUMNS = (
    ("accuracy (equal updates)", 100, 1),
    ("paired gain on the row above", 100, 1),
    ("accuracy (equal tokens)", 100, 1),
    ("steps to target", 1, 0),
    ("entropy", 1, 3),
    ("length", 1, 1),
    ("truncated %", 100, 2),
    ("kept %", 100, 0),
)


def columns(study: Study, rows: Sequence[Mapping[int, Curves]], number: int) -> list[Estimate]:
    """The row's estimates, in the order of COLUMNS.

    The gain is paired by seed with the row above: both start from the same warm-up.
    """
    runs, above = rows[number], rows[number - 1] if number else {}
    tokens = budget(rows)
    values = (
        [run.evals["avg"][-1] for run in runs.values()],
        [run.evals["avg"][-1] - above[s].evals["avg"][-1] for s, run in runs.items() if s in above],
        [at_tokens(run, tokens) for run in runs.values()],
        [steps_to(run, study.target_accuracy) for run in runs.values()],
        [late(run, "policy/entropy") for run in runs.values()],
        [run.evals["response_len_mean"][-1] for run in runs.values()],
        [run.evals["truncated_fraction"][-1] for run in runs.values()],
        [late(run, "filter/kept_fraction") for run in runs.values()],
    )
    return [estimate(v) for v in values]


def as_markdown(study: Study, rows: Sequence[Mapping[int, Curves]]) -> str:
    """Mean ± standard error; in brackets how many seeds have a value, where not all have."""
    lines = ["| row | " + " | ".join(heading for heading, *_ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for number, (row, runs) in enumerate(zip(study.rows, rows, strict=True)):
        cells = []
        for value, (_, factor, digits) in zip(columns(study, rows, number), COLUMNS, strict=True):
            text = f"{factor * value.mean:.{digits}f}" if value.seeds else "-"
            text += f" ± {factor * value.error:.{digits}f}" if math.isfinite(value.error) else ""
            partly = 0 < value.seeds < len(runs)
            cells.append(text + (f" ({value.seeds} of {len(runs)})" if partly else ""))
        lines += [f"| {row.name} | " + " | ".join(cells) + " |"] if runs else []
    return "\n".join(lines) + "\n"


def draw(study: Study, rows: Sequence[Mapping[int, Curves]]) -> bytes:
    """PNG: accuracy at equal updates and at equal tokens, then each watched metric.

    Lines are means over seeds, bands one standard error on each side.
    """
    import matplotlib
    from matplotlib.figure import Figure

    watched = [(number, metric) for number, row in enumerate(study.rows) for metric in row.watch]
    height = math.ceil((2 + len(watched)) / 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 3.4 * height), layout="constrained")
        panels = figure.subplots(height, 3, squeeze=False).ravel()
        for number, runs in enumerate(rows):
            if runs:
                steps = set.intersection(*({*run.eval_steps} for run in runs.values()))
                at = [np.isin(run.eval_steps, list(steps)) for run in runs.values()]
                curves = [run.evals["avg"][i] for run, i in zip(runs.values(), at, strict=True)]
                _band(panels[0], np.array(sorted(steps)), curves, study, number)
                tokens = np.linspace(0, min(run.tokens[-1] for run in runs.values()), 50)
                along = [[at_tokens(run, t) for t in tokens] for run in runs.values()]
                _band(panels[1], tokens / 1e6, along, study, number)
        for panel, (number, metric) in zip(panels[2:], watched, strict=False):
            for i in range(max(0, number - 1), number + 1):
                values = [running_mean(r.metrics[metric], 9) for r in rows[i].values()]
                if values:
                    _band(panel, np.arange(1, 1 + len(values[0])), values, study, i)
            panel.set(title=metric, xlabel="rollout step")
        panels[0].set(title="Held-out accuracy, equal updates", xlabel="rollout step")
        panels[1].set(title="Held-out accuracy, equal tokens", xlabel="response tokens (millions)")
        for panel in panels:
            if panel.lines:
                panel.legend(fontsize=7.5, frameon=False, labelcolor="linecolor")
            else:
                panel.set_axis_off()
        image = io.BytesIO()
        figure.savefig(image, dpi=130)
    return image.getvalue()


def _band(panel: Any, x: np.ndarray, curves: Any, study: Study, number: int) -> None:
    """Mean and standard error of curves [seeds, n]."""
    curves = np.asarray(curves)
    mean, error = curves.mean(axis=0), np.zeros(curves.shape[1])
    if len(curves) > 1:
        error = curves.std(axis=0, ddof=1) / math.sqrt(len(curves))
    look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
    panel.plot(x, mean, label=study.rows[number].name, **look)
    panel.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)


def main(argv: list[str] | None = None) -> int:
    """Trains every row of a study with every seed, then writes one table and one figure."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.study", description=main.__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("--out", required=True, help="folder of the study, created or resumed")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the study's seeds")
    parser.add_argument("--summary", action="store_true", help="only summarise complete runs")
    args = parser.parse_args(argv)
    study, out = load_study(args.config), Path(args.out)
    if args.seeds is not None:
        if unknown := sorted(set(args.seeds) - set(study.seeds)):
            raise InputError(f"--seeds: {unknown} are not among {list(study.seeds)}; correct them")
        study = dataclasses.replace(study, seeds=tuple(args.seeds))
    if not args.summary:
        train_all(study, out, lambda line: print(line, flush=True))
    rows = read_runs(study, out)
    if not any(rows):
        raise InputError(f"{out}: holds no complete run; run the study without --summary")
    table = as_markdown(study, rows)
    with writing(out):
        write_whole(out / "table.md", table.encode())
        write_whole(out / "figure.png", draw(study, rows))
    print(table)
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
