"""Ablations in miniature: parts of DAPO added or taken away, several seeds each.

The YAML file has the keys of `StudyFile`; a row's `set` is merged into the config of the row above,
or of the row that it names.
<out>/warm/<seed>/ gets the warmed-up policy, <out>/runs/<row>/<seed>/ a run folder as any other,
<out>/table.md and figure.png means over seeds with standard errors. The same command resumes: it
skips complete runs. Several commands may share the seeds between them. Rows, seeds and train.steps
may be added; a run of another config is refused.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dapo_jax import cli, supervised
from dapo_jax.config import Config, ConfigError, config_from_dict, dump_yaml, load_config, merge
from dapo_jax.config.checks import build
from dapo_jax.config.load import read_mapping
from dapo_jax.config.schema import STRICT, field
from dapo_jax.runtime.curves import STYLE, running_mean
from dapo_jax.runtime.files import write_whole
from dapo_jax.runtime.metrics import definition, read_metrics
from dapo_jax.runtime.same_run import MAY_CHANGE, changes, refused
from dapo_jax.train import train
from dapo_jax.types import InputError

# Every run of a table must sample and evaluate alike; the warm-up uses neither of the last three.
_RUN_MAY_CHANGE = tuple(key for key in MAY_CHANGE if not key.startswith(("dapo.", "eval.")))
_WARM_UP_MAY_CHANGE = (*_RUN_MAY_CHANGE, "dapo.", "eval.", "reward.")


@dataclass(frozen=True)
class LadderRow:
    """A row as the file has it."""

    name: str = field(MISSING, "heading of the row", min_length=1)
    of: str | None = field(None, "name of the row that this one changes; null: the row above")
    set: Mapping[str, Any] = field(dict, "overrides of that row")
    seeds: int | None = field(None, "use only the study's first n seeds", ge=1)
    watch: tuple[str, ...] = field((), "metrics to compare with that row")


@dataclass(frozen=True)
class StudyFile:
    """A study as the file has it."""

    __pydantic_config__ = STRICT

    base: Mapping[str, Any] = field(MISSING, "config of the first row")
    seeds: tuple[int, ...] = field(MISSING, "every row is trained with each", min_length=1)
    target_accuracy: float = field(MISSING, "held-out accuracy of `steps to target`", gt=0, le=1)
    ladder: tuple[LadderRow, ...] = field(MISSING, "each a change of one before", min_length=1)
    warm_up: Mapping[str, Any] | None = field(None, "overrides of the base for the warm-up")


class Row(NamedTuple):
    """A row of the table. key: its name in paths. of: number of the row that it changes."""

    name: str
    key: str
    config: Config
    watch: tuple[str, ...]
    of: int | None
    seeds: tuple[int, ...]


class Study(NamedTuple):
    warm_up: Config | None  # None: the rows start from the base's model.folder
    seeds: tuple[int, ...]
    target_accuracy: float
    rows: tuple[Row, ...]


def load_study(path: str) -> Study:
    """Reads and checks a study. Raises ConfigError."""

    def fail(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{path}: {key}: {message}")

    file: StudyFile = build(StudyFile, read_mapping(path), fail)
    if len(set(file.seeds)) < len(file.seeds) or min(file.seeds) < 0:
        fail("seeds", "expected different numbers from 0 on")
    if file.base.get("seed") is not None:
        fail("base.seed", "comes from `seeds`; remove it")
    rows: list[Row] = []
    trees: dict[str, Mapping[str, Any]] = {}
    for number, row in enumerate(file.ladder):
        if bad := [m for m in row.watch if m.startswith("eval/") or definition(m) is None]:
            fail(f"ladder.{number}.watch", f"{bad[0][:60]} is no metric of a training step")
        if row.name in trees or (row.of is not None and row.of not in trees):
            fail(f"ladder.{number}", "expected a new name, and in `of` that of a row before it")
        names = list(trees)
        of = names.index(row.of) if row.of is not None else number - 1 if number else None
        trees[row.name] = merge(file.base if of is None else trees[names[of]], row.set)
        config = config_from_dict(trees[row.name], f"{path}: ladder.{number}")
        short = re.sub(r"[^a-z0-9]+", "_", row.name.lower()).strip("_")
        seeds = file.seeds[: row.seeds]
        rows.append(Row(row.name, f"{number}_{short}", config, row.watch, of, seeds))
    first, warm_up = rows[0].config, None
    if (file.warm_up is None) == (first.model.folder is None):
        fail("warm_up", "rows start from a warm-up or from base.model.folder; give one of the two")
    if not first.eval.sets or not first.eval.every:
        fail("base.eval", "has no sets, or `every: 0`; a study compares held-out accuracy")
    if file.warm_up is not None:
        warm_up = config_from_dict(merge(file.base, file.warm_up), f"{path}: warm_up")
        if not warm_up.supervised.updates:
            fail("base.supervised.updates", "is 0; rows start from a warm-up")
    return Study(warm_up, file.seeds, file.target_accuracy, tuple(rows))


def jobs(study: Study, out: Path) -> Iterator[tuple[str | None, Config, Path, Path]]:
    """Of each seed the warm-up, then every row: its name, config, config's file, folder to fill."""
    for seed in study.seeds:
        warm = out / "warm" / str(seed)
        start: Any = {"folder": str(warm), "architecture": None} if study.warm_up else {}
        if study.warm_up:
            yield None, replace(study.warm_up, seed=seed), warm.with_suffix(".yaml"), warm
        for row in (row for row in study.rows if seed in row.seeds):
            model, folder = replace(row.config.model, **start), out / "runs" / row.key / str(seed)
            supervised = replace(row.config.supervised, updates=0)
            config = replace(row.config, seed=seed, model=model, supervised=supervised)
            yield row.name, config, folder / "config.yaml", folder


def train_all(study: Study, out: Path, info: Callable[[str], None]) -> None:
    """Trains what is not complete.

    Raises ConfigError, before anything is trained, if `out` has runs of another config.
    """
    for row, config, file, _ in jobs(study, out):
        found = load_config(file) if file.is_file() else config
        may_change = _WARM_UP_MAY_CHANGE if row is None else _RUN_MAY_CHANGE
        if changed := refused(changes(found, config), may_change):
            key, was, now = changed
            raise ConfigError(
                f"{file}: {key}: was {was!r} when this was trained, and is {now!r} in the study; "
                "give another --out, or change it back"
            )
    for row, config, file, folder in jobs(study, out):
        if row is None and not folder.is_dir():
            info(f"seed {config.seed}: warm-up")
            write_whole(file, dump_yaml(config).encode())
            supervised.main(["--config", str(file), "--out", str(folder), "--quiet"])
        elif row is not None and last_step(folder) != config.train.steps:
            info(f"seed {config.seed}: {row}")
            train(config, folder, quiet=True)


def last_step(folder: Path) -> int:
    """The last step of a run folder, 0 without one."""
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    return records[-1]["step"] if records else 0


# A run over its records, step 0 first; NaN where a record has no value.
Curves = Mapping[str, np.ndarray]


class Estimate(NamedTuple):
    """Mean over seeds, its standard error (std / sqrt(n), ddof 1), and n."""

    mean: float
    error: float
    seeds: int


def read_curves(folder: Path) -> Curves:
    """The metrics of a run, held-out ones of the first set by name without `eval/<set>/`; `tokens`,
    response tokens sampled so far, those of dropped groups included; `decode_steps` so far."""
    records = read_metrics(folder)
    keys = {key for record in records for key in record}
    name = min(key.split("/")[1] for key in keys if key.startswith("eval/"))
    run = {}
    for key in keys:
        values = [record.get(key, math.nan) for record in records]
        if (definition(key) or key == "step") and not key.endswith("/digest"):
            run[key.removeprefix(f"eval/{name}/")] = np.array(values, np.float64)
    counts = [name for name in ("tokens", "decode_steps") if f"rollout/{name}" in run]
    return run | {name: np.nancumsum(run[f"rollout/{name}"]) for name in counts}


def evaluated(run: Curves, key: str) -> np.ndarray:
    """The values of a metric at the run's evaluations."""
    return run[key][np.isfinite(run["avg"])]


def read_runs(study: Study, out: Path) -> list[dict[int, Curves]]:
    """The complete runs of each row by seed."""
    rows = []
    for row in study.rows:
        runs, last = out / "runs" / row.key, row.config.train.steps
        done = [seed for seed in study.seeds if last_step(runs / str(seed)) == last]
        rows.append({seed: read_curves(runs / str(seed)) for seed in done})
    return rows


def estimate(values: Sequence[float]) -> Estimate:
    """Over the finite values."""
    x = np.array([v for v in values if math.isfinite(v)])
    mean = float(x.mean()) if x.size else math.nan
    error = float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.nan
    return Estimate(mean, error, x.size)


def late(run: Curves, metric: str) -> float:
    """Mean of a metric over the last fifth of the steps; NaN without a value there."""
    tail = run.get(metric, np.array([math.nan]))[-max(1, round(0.2 * (len(run["tokens"]) - 1))) :]
    return float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan


def at(run: Curves, where: Any, axis: str = "tokens") -> Any:
    """Held-out accuracy after this many tokens, or steps, interpolated between evaluations."""
    return np.interp(where, evaluated(run, axis), evaluated(run, "avg"))


def steps_to(run: Curves, target: float, axis: str = "step") -> float:
    """First step, or token, with a held-out accuracy of at least `target`, interpolated between
    evaluations; NaN if none."""
    accuracy, where = evaluated(run, "avg"), evaluated(run, axis)
    reached = np.flatnonzero(accuracy >= target)
    if not reached.size:
        return math.nan
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(target, accuracy[around], where[around]))


def budget(rows: Sequence[Mapping[int, Curves]]) -> float:
    """Tokens that every run has sampled: the fewest of any."""
    return float(min(run["tokens"][-1] for row in rows for run in row.values()))


def gain(run: Curves, other: Curves | None, axis: str) -> float:
    """Accuracy of a run minus that of another where the first of them ends on `axis`; NaN if that
    is unknown."""
    if other is None or axis not in run or axis not in other:
        return math.nan
    where = min(run[axis][-1], other[axis][-1])
    return float(at(run, where, axis) - at(other, where, axis))


# Columns of the table: heading, factor, digits; values as `columns` gives them.
COLUMNS = (
    ("accuracy (equal updates)", 100, 1),
    ("gain (equal updates)", 100, 1),
    ("accuracy (equal tokens)", 100, 1),
    ("gain (equal tokens)", 100, 1),
    ("gain (equal decode steps)", 100, 1),
    ("steps to target", 1, 1),
    ("tokens to target, thousands", 1e-3, 0),
)


def columns(study: Study, rows: Sequence[Mapping[int, Curves]], number: int) -> list[Estimate]:
    """The row's estimates, in the order of COLUMNS.

    Gains are over the row that this one changes, paired by seed: both start from the same warm-up.
    """
    of, tokens, table = study.rows[number].of, budget(rows), []
    for seed, run in rows[number].items():
        other = rows[of].get(seed) if of is not None else None
        gains = [gain(run, other, axis) for axis in ("step", "tokens", "decode_steps")]
        reached = [steps_to(run, study.target_accuracy, axis) for axis in ("step", "tokens")]
        table.append((at(run, np.inf), gains[0], at(run, tokens), *gains[1:], *reached))
    return [estimate(values) for values in zip(*table, strict=True)]


def as_markdown(study: Study, rows: Sequence[Mapping[int, Curves]]) -> str:
    """Mean ± standard error; in brackets how many seeds have a value, where not all have."""
    lines = ["| row | of | " + " | ".join(heading for heading, *_ in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for number, (row, runs) in enumerate(zip(study.rows, rows, strict=True)):
        cells = [row.name, "-" if row.of is None else study.rows[row.of].name]
        for value, (_, factor, digits) in zip(columns(study, rows, number), COLUMNS, strict=False):
            text = f"{factor * value.mean:.{digits}f}" if value.seeds else "-"
            text += f" ± {factor * value.error:.{digits}f}" if math.isfinite(value.error) else ""
            partly = 0 < value.seeds < len(runs)
            cells.append(text + (f" ({value.seeds} of {len(runs)})" if partly else ""))
        lines += [f"| {' | '.join(cells)} |"] if runs else []
    return "\n".join(lines) + "\n"


def mechanisms(study: Study, rows: Sequence[Mapping[int, Curves]]) -> str:
    """The watched metrics of each row and of the row that it changes, in the last fifth of the
    steps: means, and mean ± standard error of the difference, over the seeds of both."""
    lines = ["| row | metric | without | with | difference |", "|---|---|---|---|---|"]
    for row, runs in zip(study.rows, rows, strict=True):
        other = rows[row.of] if row.of is not None else {}
        for metric in row.watch:
            pairs = [(late(other[s], metric), late(runs[s], metric)) for s in runs if s in other]
            pairs = [pair for pair in pairs if np.isfinite(pair).all()]
            if pairs:
                before, after = np.mean(pairs, axis=0)
                by = estimate([b - a for a, b in pairs])
                cells = [row.name, metric, f"{before:.3g}", f"{after:.3g}"]
                lines.append(f"| {' | '.join(cells)} | {by.mean:+.2g} ± {by.error:.1g} |")
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
        panels[0].set(title="Held-out accuracy, equal updates", xlabel="rollout step")
        panels[1].set(title="Held-out accuracy, equal tokens", xlabel="response tokens (millions)")
        for number, runs in enumerate(rows):
            if not (every := list(runs.values())):
                continue
            steps = np.arange(1 + min(run["step"][-1] for run in every))
            _band(panels[0], steps, [at(r, steps, "step") for r in every], study, number)
            tokens = np.linspace(0, min(run["tokens"][-1] for run in every), 50)
            _band(panels[1], tokens / 1e6, [at(r, tokens) for r in every], study, number)
            for panel, (added, metric) in zip(panels[2:], watched, strict=False):
                panel.set(title=metric, xlabel="rollout step")
                if number in (study.rows[added].of, added):
                    values = [running_mean(run[metric][1:], 9) for run in every]
                    _band(panel, np.arange(1, 1 + len(values[0])), values, study, number)
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
    mean, n = curves.mean(axis=0), len(curves)
    error = curves.std(axis=0, ddof=min(1, n - 1)) / math.sqrt(n)
    look = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
    panel.plot(x, mean, label=study.rows[number].name, **look)
    panel.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)


def main(argv: list[str] | None = None) -> int:
    """Trains every row of a study with every seed, then writes one table and one figure."""
    example = "--config configs/study_arithmetic_cpu.yaml --out runs/study"
    parser = cli.parser("study", main.__doc__, example)
    parser.add_argument("--config", required=True, help="YAML file of the study")
    parser.add_argument("--out", required=True, help="folder of the study, created or resumed")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the study's seeds")
    parser.add_argument("--summary", action="store_true", help="only summarise complete runs")
    args = parser.parse_args(argv)
    study, out = load_study(args.config), Path(args.out)
    if args.seeds is not None:
        if unknown := sorted(set(args.seeds) - set(study.seeds)):
            raise InputError(f"--seeds: {unknown} are not among {list(study.seeds)}; correct them")
        study = study._replace(seeds=tuple(args.seeds))
    if not args.summary:
        train_all(study, out, lambda line: print(line, flush=True))
    rows = read_runs(study, out)
    if not any(rows):
        raise InputError(f"{out}: holds no complete run; run the study without --summary")
    table = as_markdown(study, rows) + "\n" + mechanisms(study, rows)
    write_whole(out / "table.md", table.encode())
    write_whole(out / "figure.png", draw(study, rows))
    print(table)
    return 0


if __name__ == "__main__":
    cli.run(main)
