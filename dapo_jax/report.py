"""Runs as one HTML page: curves, samples, comparison. It loads nothing and needs no network."""

import base64
import contextlib
import datetime
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dapo_jax import __version__, cli
from dapo_jax.config import ConfigError, flatten, load_config, to_dict
from dapo_jax.runtime import files
from dapo_jax.runtime.checkpoint import stored_steps
from dapo_jax.runtime.console import duration
from dapo_jax.runtime.curves import running_mean
from dapo_jax.runtime.files import Folder, read, run_folder, writing
from dapo_jax.runtime.metrics import METRICS, best_step, definition, held_out, read_metrics
from dapo_jax.types import InputError

_POINTS = 1000  # of a curve
_SAMPLE_STEPS = 100  # of a run, fewer where they do not fit
_SAMPLE_BYTES = 14_000_000  # of all runs together

_TIMES = ("time/step_s", "time/eval_s", "time/save_s")

Record = Mapping[str, Any]  # a line of metrics.jsonl

# ------------------------------------------------------------------------------------------ curves


def read_run(run_dir: Folder, name: str, sample_bytes: int) -> dict[str, Any]:
    """A run as the page reads it, plain JSON. Raises InputError for missing or damaged files."""
    by_step = {record["step"]: record for record in read_metrics(run_dir)}
    records = [by_step[step] for step in sorted(by_step)]
    if not records:
        raise InputError(f"{run_dir / 'metrics.jsonl'}: holds no steps yet; let the run finish one")
    keys = sorted({key for record in records for key in record if definition(key)})
    found = {key: points(records, key) for key in keys}
    counts = {key: points(records, key)[1].tolist() for key in ("updates", "draws")}
    text, options, config_note = read_config(run_dir)
    samples, sample_note = read_samples(run_dir, sample_bytes)
    return {
        "name": name,
        "step": records[-1]["step"],
        "started": started(run_dir),
        "took": duration(sum(sum(points(records, key)[1]) for key in _TIMES)),
        "checkpoints": held_checkpoints(run_dir, stored_steps(run_dir / "checkpoints")),
        **{key: int(values[-1]) if values else None for key, values in counts.items()},
        "config": text,
        "config_note": config_note,
        "options": options,
        "planned": options and options["train.steps"],
        "dynamic_sampling": options and options["dapo.dynamic_sampling"],
        "series": {key: series(key, *xy) for key, xy in found.items() if xy[0].size},
        "evals": evals(records),
        "samples": samples,
        "sample_note": sample_note,
    }


def held_checkpoints(run_dir: Folder, steps: Collection[int]) -> str:
    """The stored steps in order, and which one has the best held-out accuracy."""
    best = best_step(run_dir, steps)
    return ", ".join(f"{step} (best)" if step == best else f"{step}" for step in sorted(steps))


def started(run_dir: Folder) -> str | None:
    """When the run wrote its first file of TensorBoard, by the file's name; UTC."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = [file.name.split(".") for file in (run_dir / "tensorboard").iterdir()]
        times = [int(name[3]) for name in names if len(name) > 3 and name[3].isdecimal()]
        if times:
            first = datetime.datetime.fromtimestamp(min(times) // 10**9, datetime.UTC)
            return f"{first:%Y-%m-%d %H:%M} UTC"
    return None


def points(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records with a finite number at the key."""
    found = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    return np.array([x for x, _ in found], np.int64), np.array([y for _, y in found], np.float64)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def series(key: str, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """A curve of at most _POINTS points with its running mean over a 25th of all values, as in
    curves.png, its extremes and ends. Evaluations, which are few, have no running mean."""
    n, is_eval = len(values), key.startswith("eval/")
    window = 1 if is_eval else 1 + 2 * (n // 50)
    at = even(n, _POINTS) if is_eval else peaks(values, _POINTS)
    marks = {"first": 0, "last": n - 1, "low": int(values.argmin()), "high": int(values.argmax())}
    return {
        "steps": steps[at].tolist(),
        "values": short(values[at]),
        "means": short(running_mean(values, window)[at]) if window > 1 else None,
        **{name: [int(steps[i]), *short(values[i : i + 1])] for name, i in marks.items()},
    }


def short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def even(n: int, most: int) -> np.ndarray:
    """At most so many of the indices below n, evenly spaced, the last among them."""
    return np.unique((n - 1 - np.linspace(0, n - 1, min(n, most))).round().astype(np.int64))


def peaks(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many values, the least and greatest of each stretch: keeps spikes."""
    n = len(values)
    if n <= most:
        return np.arange(n)
    stretches = np.array_split(np.arange(n), (most - 2) // 2)
    ends = [s[i] for s in stretches for i in (values[s].argmin(), values[s].argmax())]
    return np.unique([0, *ends, n - 1])


# --------------------------------------------------------------------------------------- comparison


def evals(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """First, best and last avg@k of each held-out set as [step, avg, standard error or None], and
    the difference of last and first. A set whose problems changed, by digest, counts from then on.
    """
    found = {}
    for name in sorted({name for record in records for name in held_out(record)}):
        avg, se, digest_key = (f"eval/{name}/{key}" for key in ("avg", "avg_se", "digest"))
        measured = [record for record in records if is_number(record.get(avg))]
        if not measured:
            continue
        digest = measured[-1].get(digest_key)
        same = [r for r in measured if digest is None or r.get(digest_key) in (digest, None)]
        rows = [[r["step"], r[avg], r[se] if is_number(r.get(se)) else None] for r in same]
        marks = {"first": rows[0], "best": max(rows, key=lambda row: row[1]), "last": rows[-1]}
        found[name] = {**marks, "gain": difference(rows[-1], rows[0]), "digest": digest}
    return found


def difference(a: Sequence[Any], b: Sequence[Any]) -> list[float | None]:
    """a - b of two evaluations, and its standard error √(se_a² + se_b²) as if independent."""
    return [a[1] - b[1], None if a[2] is None or b[2] is None else math.hypot(a[2], b[2])]


def compare_evals(runs: Sequence[Record]) -> None:
    """Sets of each held-out set whether its problems are those of the first run that has one of
    that name (`comparable`), and the difference of their last evaluations (`versus`)."""
    bases: dict[str, Any] = {}
    for run in runs:
        for name, one in run["evals"].items():
            base = bases.setdefault(name, one)
            digests = {one["digest"], base["digest"]}
            one["comparable"] = None in digests or len(digests) == 1
            one["versus"] = None if one is base else difference(one["last"], base["last"])


def read_config(run_dir: Folder) -> tuple[str, dict[str, Any] | None, str]:
    """The text of config.yaml, its options if this version reads it, and why not."""
    path = run_dir / "config.yaml"
    raw = read(path)
    if raw is None:
        return "", None, "no config.yaml in this folder"
    text = raw[:200_000].decode("utf-8", "replace")
    try:
        with files.local_copy(path) as file:
            return text, flatten(to_dict(load_config(file))), ""
    except ConfigError as e:
        return text, None, f"not read by this version: {str(e).removeprefix(f'{path}: ')}"


def differing(runs: Sequence[Record]) -> list[list[Any]]:
    """`[option, value of each run]` where runs with a readable config differ."""
    options = [run["options"] for run in runs]
    keys = sorted({key for found in options for key in found or ()})
    rows = [[key, *(o and json.dumps(o.get(key)) for o in options)] for key in keys]
    return [row for row in rows if len({*row[1:]} - {None}) > 1]


# ----------------------------------------------------------------------------------------- samples


def read_samples(run_dir: Folder, most_bytes: int) -> tuple[list[list[Any]], str]:
    """`[step, rows]` of evenly spaced steps, as many as fit; and a note on what is left out."""
    path, names = run_dir / "samples", None
    with writing(path, "cannot be read"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = [file.name for file in path.iterdir()]
    if names is None:
        return [], "This run has written no samples."
    matches = [re.fullmatch(r"step_(\d{6,12})\.jsonl", name) for name in names]
    steps = sorted(int(match[1]) for match in matches if match)
    shown = [steps[i] for i in even(len(steps), _SAMPLE_STEPS)]
    raw = {step: read(path / f"step_{step:06d}.jsonl") or b"" for step in shown}
    size = {
        s: len(b) + 5 * sum(map(b.count, (b"<", b">", b"&"))) for s, b in raw.items()
    }  # as JSON
    while shown and sum(size[step] for step in shown) > most_bytes:
        shown = [shown[i] for i in even(len(shown), len(shown) * 3 // 4)]
    found, damaged = [], 0
    for step in shown:
        rows = [sample(line) for line in raw[step].split(b"\n") if line.strip()]
        damaged += rows.count(None)
        found.append([step, [row for row in rows if row is not None]])
    few = f"Samples of {len(shown)} of {len(steps)} steps are on this page, evenly spaced."
    notes = [few] * (len(shown) < len(steps))
    notes += [f"{damaged} damaged samples are left out."] * (damaged > 0)
    return found, " ".join(notes)


_NUMBERS = "draw group_correct group_size reward penalty advantage length".split()
_KINDS = {"id": str, "answer": str, "fed": str, "correct": bool, "truncated": bool}
_GROUPS = ("kept", "all_correct", "all_wrong")


def sample(line: bytes) -> dict[str, Any] | None:
    """The valid known fields of a sample; None if it is no JSON object with a response.

    Either `tokens`, if their texts make up the response, or else `response`. `turns`: the problem
    as [role, text].
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        return None
    found = {key: row[key] for key in _NUMBERS if is_number(row.get(key))}
    found |= {key: row[key] for key, kind in _KINDS.items() if isinstance(row.get(key), kind)}
    found |= {"group": row["group"]} if row.get("group") in _GROUPS else {}
    prompt, tokens = row.get("prompt"), row.get("tokens")
    if isinstance(prompt, str):
        prompt = [{"content": prompt}]
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    found["turns"] = [[str(turn.get(key, "")) for key in ("role", "content")] for turn in turns]
    siblings = row["siblings"] if isinstance(row.get("siblings"), list) else []
    lines = [json.dumps(one).encode() for one in siblings if not isinstance(one, list)]
    if valid := [one for one in map(sample, lines) if one is not None]:
        found["siblings"] = valid
    if isinstance(tokens, list) and all(map(_is_token, tokens)):
        if "".join(text for text, _ in tokens) == row["response"]:
            return found | {"tokens": tokens}
    return found | {"response": row["response"]}


def _is_token(entry: Any) -> bool:
    """[text, log-prob], or [text, None] for the middle of a long response."""
    pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    return pair and (entry[1] is None or is_number(entry[1]))


# ------------------------------------------------------------------------------------------- page


def render(runs: Sequence[dict[str, Any]]) -> bytes:
    """The template with its data, and the hashes of the style and script that its CSP allows."""
    page = importlib.resources.files("dapo_jax").joinpath("report_page.html").read_text("utf-8")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"@{tag}@", digest, 1)
    compare_evals(runs)
    data: dict[str, Any] = {"version": __version__, "metrics": dict(METRICS)}
    data |= {"differing": differing(runs), "runs": [run | {"options": None} for run in runs]}
    # A lone surrogate becomes its JSON escape.
    return page.replace("@data@", json_in_html(data), 1).encode("utf-8", "backslashreplace")


def json_in_html(data: Any) -> str:
    """JSON without characters that end a script element or a line of JavaScript."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda char: f"\\u{ord(char[0]):04x}", text)


def run_names(run_dirs: Sequence[Folder]) -> list[str]:
    """The last parts of each path, as many as make them differ; InputError if two are the same."""
    paths = [path if files.is_bucket(path) else path.resolve() for path in run_dirs]
    if again := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise InputError(f"{again[0]}: given twice; give each --run-dir once")
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def main(argv: list[str] | None = None) -> int:
    """Writes one HTML page about one run or several: curves, samples with the probability of each
    token, comparison."""
    examples = "--run-dir runs/tiny", "--run-dir runs/a runs/b --out comparison.html"
    parser = cli.parser("report", main.__doc__, *examples)
    given = "run folders of dapo_jax.train; may be running"
    parser.add_argument("--run-dir", required=True, nargs="+", help=given)
    parser.add_argument("--out", help="file to write; default report.html in the first run folder")
    args = parser.parse_args(argv)
    if args.out is not None and ("://" in args.out or files.as_path(args.out).is_dir()):
        raise InputError(f"--out: {args.out} is no local file; give one, e.g. report.html")
    run_dirs = [run_folder(where) for where in args.run_dir]
    size = _SAMPLE_BYTES // len(run_dirs)
    names = zip(run_dirs, run_names(run_dirs), strict=True)
    page = render([read_run(run_dir, name, size) for run_dir, name in names])
    out = files.as_path(args.out) if args.out else run_dirs[0] / "report.html"
    files.write_whole(out, page)
    runs = f"{len(run_dirs)} run{'s' * (len(run_dirs) > 1)}"
    print(f"wrote {out}: {runs}, {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main)
