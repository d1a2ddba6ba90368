"""Runs as one HTML page: curves, samples, comparison. The page loads nothing and needs no network.

python -m dapo_jax.report --run-dir D [D ...] [--out FILE]
"""

import argparse
import base64
import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_jax import __version__
from dapo_jax.config import ConfigError, flatten, load_config, to_dict
from dapo_jax.runtime import files
from dapo_jax.runtime.curves import running_mean
from dapo_jax.runtime.files import (
    Folder,
    as_path,
    local_copy,
    read,
    run_folder,
    write_whole,
    writing,
)
from dapo_jax.runtime.metrics import METRICS, definition, read_metrics
from dapo_jax.types import InputError

_POINTS = 1000  # of a curve
_STRETCHES = 200  # of the stacked seconds, which are means over so many stretches of steps
_SAMPLE_STEPS = 100  # of a run, and fewer where they do not fit
_SAMPLE_BYTES = 14_000_000  # of all runs together
_SPLIT = (
    "time/rollout_s",
    "time/reward_s",
    "time/old_logprobs_s",
    "time/update_s",
    "time/eval_s",
    "time/save_s",
)
_NUMBERS = ("draw", "group_correct", "group_size", "reward", "penalty", "advantage", "length")
_GROUPS = ("kept", "all_correct", "all_wrong")


# --------------------------------------------------------------------------------------------------------------------
# What the page is told of a run
# --------------------------------------------------------------------------------------------------------------------


def read_run(run_dir: Folder, name: str, sample_bytes: int) -> dict[str, Any]:
    """A run as the page wants it: `{name, config, ..., series, split, evals, samples}`, plain JSON.

    Raises InputError if the folder holds no metrics, or files that cannot be read.
    """
    by_step = {
        record["step"]: record for record in read_metrics(run_dir) if abs(record["step"]) < 2**53
    }
    records = [by_step[step] for step in sorted(by_step)]
    if not records:
        raise InputError(f"{run_dir / 'metrics.jsonl'}: holds no steps yet; let the run finish one")
    points = {
        key: points_of(records, key)
        for key in sorted({key for record in records for key in record})
        if definition(key)
    }
    points = {key: (steps, values) for key, (steps, values) in points.items() if steps.size}
    text, options, trouble = read_config(run_dir)
    samples, sample_note = read_samples(run_dir, sample_bytes)
    return {
        "name": name,
        "config": text,
        "config_note": trouble,
        "options": options,
        "planned": options and options["train.steps"],
        "dynamic_sampling": options and options["dapo.dynamic_sampling"],
        **{key: counter(records, key) for key in ("step", "updates", "draws")},
        "series": {key: series(key, *found) for key, found in points.items()},
        "split": split(records),
        "evals": evals(records),
        "samples": samples,
        "sample_note": sample_note,
    }


def points_of(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite number there."""
    points = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def is_number(value: Any) -> bool:
    """A finite number, and no bool."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def counter(records: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """The last value of a counter."""
    return next(
        (int(record[key]) for record in reversed(records) if is_number(record.get(key))), None
    )


def series(key: str, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """A curve of at most _POINTS points, with its running mean there where it is long, and its
    extremes and end.

    The mean is over about a 25th of all values, as in curves.png. Evaluations have none: they are
    few.
    """
    n = len(values)
    window = 1 if key.startswith("eval/") else 1 + 2 * (n // 50)
    at = even(n, _POINTS) if key.startswith("eval/") else peaks(values, _POINTS)
    low, high = int(values.argmin()), int(values.argmax())
    return {
        "steps": steps[at].tolist(),
        "values": short(values[at]),
        "means": short(running_mean(values, window)[at]) if window > 1 else None,
        **{
            name: [int(steps[i]), short(values[i : i + 1])[0]]
            for name, i in (("first", 0), ("last", n - 1), ("low", low), ("high", high))
        },
    }


def short(values: np.ndarray) -> list[float]:
    """Numbers to six digits, as few characters as that takes."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def even(n: int, most: int) -> np.ndarray:
    """At most so many of the indices below n, evenly spaced, the last among them."""
    return np.unique((n - 1 - np.linspace(0, n - 1, min(n, most))).round().astype(np.int64))


def peaks(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most so many values, the least and the greatest of every stretch among them:
    thinning keeps spikes.
    """
    n = len(values)
    if n <= most:
        return np.arange(n)
    stretches = np.array_split(np.arange(n), (most - 2) // 2)
    ends = [s[i] for s in stretches for i in (values[s].argmin(), values[s].argmax())]
    return np.unique([0, *ends, n - 1])


def split(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of the parts of each rollout step, or their means over every `each` steps where there
    are many; steps by their last.
    """
    timed = [record for record in records if is_number(record.get("time/step_s"))]
    each = max(1, math.ceil(len(timed) / _STRETCHES))
    stretches = [timed[i : i + each] for i in range(0, len(timed), each)]
    seconds = {
        key: [
            np.mean([r[key] if is_number(r.get(key)) else 0.0 for r in stretch])
            for stretch in stretches
        ]
        for key in _SPLIT
    }
    return {
        "each": each,
        "steps": [stretch[-1]["step"] for stretch in stretches],
        "seconds": {key: short(np.array(values)) for key, values in seconds.items()},
    }


def evals(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """First, best and last avg@k of each held-out set as [step, avg, standard error or None], and
    last - first with its own.

    A set that came to hold other problems counts from then on. `digest` is of its problems, None
    where an earlier version wrote none.
    """
    found = {}
    for key in sorted(
        {key for record in records for key in record if re.fullmatch(r"eval/[^/]+/avg", key)}
    ):
        name = key.split("/")[1]
        measured = [record for record in records if is_number(record.get(key))]
        digests = [record.get(f"eval/{name}/digest") for record in measured]
        digest = digests[-1] if digests and isinstance(digests[-1], str) else None
        steps, values = points_of(
            [
                r
                for r, d in zip(measured, digests, strict=True)
                if digest is None or d in (digest, None)
            ],
            key,
        )
        if not steps.size:
            continue
        errors = dict(zip(*(a.tolist() for a in points_of(records, f"{key}_se")), strict=True))
        rows = [
            [step, value, errors.get(step)]
            for step, value in zip(steps.tolist(), values.tolist(), strict=True)
        ]
        best = rows[int(values.argmax())]
        found[name] = {
            "first": rows[0],
            "best": best,
            "last": rows[-1],
            "gain": difference(rows[-1], rows[0]),
            "digest": digest,
        }
    return found


def mark_comparable(runs: Sequence[Mapping[str, Any]]) -> None:
    """Sets `comparable` of each held-out set of each run: whether its problems are those of the
    first run that has a set of that name.
    """
    for name in {name for run in runs for name in run["evals"]}:
        having = [run["evals"][name] for run in runs if name in run["evals"]]
        for found in having:
            found["comparable"] = (
                None in (found["digest"], having[0]["digest"])
                or found["digest"] == having[0]["digest"]
            )


def difference(a: Sequence[Any], b: Sequence[Any]) -> list[float | None]:
    """a - b of two evaluations [step, avg, standard error], and its standard error √(se_a² + se_b²)
    as if they were independent.
    """
    return [a[1] - b[1], None if a[2] is None or b[2] is None else math.hypot(a[2], b[2])]


def read_config(run_dir: Folder) -> tuple[str, dict[str, Any] | None, str]:
    """The text of config.yaml, its options if this version reads it, and what hinders that."""
    path = run_dir / "config.yaml"
    raw = read(path)
    if raw is None:
        return "", None, "no config.yaml in this folder"
    text = raw[:200_000].decode("utf-8", "replace")
    try:
        with local_copy(path) as file:
            return text, flatten(to_dict(load_config(file))), ""
    except ConfigError as e:
        return text, None, f"not read by this version: {str(e).removeprefix(f'{path}: ')}"


def differing(runs: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """`[option, value of each run]` where runs with a readable config differ."""
    read_ones = [run["options"] for run in runs if run["options"] is not None]
    keys = sorted({key for options in read_ones for key in options})
    shown = {
        key: [
            None if run["options"] is None else json.dumps(run["options"].get(key)) for run in runs
        ]
        for key in keys
    }
    return [[key, *values] for key, values in shown.items() if len(set(values) - {None}) > 1]


# --------------------------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------------------------


def read_samples(run_dir: Folder, most_bytes: int) -> tuple[list[list[Any]], str]:
    """`[step, rows]` of evenly spaced steps, the last among them, as many as fit; and what is not
    shown.
    """
    path = run_dir / "samples"
    try:
        names = [file.name for file in path.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return [], "This run has written no samples."
    except files.errors(path) as e:
        raise InputError(f"{path}: cannot be read ({files.reason(e)}); give access") from None
    steps = sorted(
        int(found[1]) for name in names if (found := re.fullmatch(r"step_(\d{6,12})\.jsonl", name))
    )
    read_steps = [steps[i] for i in even(len(steps), _SAMPLE_STEPS)]
    raw = {step: read(path / f"step_{step:06d}.jsonl") or b"" for step in read_steps}
    size = {
        step: len(content) + 5 * sum(map(content.count, (b"<", b">", b"&")))
        for step, content in raw.items()
    }  # see json_in_html
    shown = list(raw)
    while shown and sum(size[step] for step in shown) > most_bytes:
        shown = [shown[i] for i in even(len(shown), len(shown) * 3 // 4)]
    rows = [
        [step, [sample(line) for line in raw[step].split(b"\n") if line.strip()]] for step in shown
    ]
    damaged = sum(row is None for _, found in rows for row in found)
    notes = (
        [f"Samples of {len(shown)} of {len(steps)} steps are on this page, evenly spaced."]
        if len(shown) < len(steps)
        else []
    )
    notes += [f"{damaged} damaged samples are left out."] if damaged else []
    return [[step, [row for row in found if row is not None]] for step, found in rows], " ".join(
        notes
    )


def sample(line: bytes) -> dict[str, Any] | None:
    """The known fields of a sample, of the type they should have; None if it is no JSON object with
    a response.

    `tokens` is left out unless its texts make up the response; where it is there, `response` is
    not, since the page can join them.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        return None
    found = {key: row[key] for key in _NUMBERS if is_number(row.get(key))}
    found |= {key: row[key] for key in ("id", "answer") if isinstance(row.get(key), str)}
    found |= {key: row[key] for key in ("correct", "truncated") if isinstance(row.get(key), bool)}
    found |= {"group": row["group"]} if row.get("group") in _GROUPS else {}
    found["turns"] = turns(row.get("prompt"))
    tokens = row.get("tokens")
    if (
        isinstance(tokens, list)
        and all(map(is_scored_text, tokens))
        and "".join(text for text, *_ in tokens) == row["response"]
    ):
        return found | {"tokens": tokens}
    return found | {"response": row["response"]}


def is_scored_text(entry: Any) -> bool:
    """[text, log-prob], or [text, None] for the middle of a long response."""
    text_first = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    return text_first and (entry[1] is None or is_number(entry[1]))


def turns(prompt: Any) -> list[list[str]]:
    """A problem as [role, text], with no role for plain text."""
    if isinstance(prompt, str):
        return [["", prompt]]
    chat = prompt if isinstance(prompt, list) else []
    return [
        [str(turn.get("role", "")), str(turn.get("content", ""))]
        for turn in chat
        if isinstance(turn, dict)
    ]


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def render(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """The template with its data and the hashes of its own style and script: a browser takes no
    other of either.
    """
    page = importlib.resources.files("dapo_jax").joinpath("report_page.html").read_text("utf-8")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        page = page.replace(
            f"@{tag}@", base64.b64encode(hashlib.sha256(content.encode()).digest()).decode(), 1
        )
    mark_comparable(runs)
    told = [{key: value for key, value in run.items() if key != "options"} for run in runs]
    data = {
        "version": __version__,
        "metrics": dict(METRICS),
        "runs": told,
        "differing": differing(runs),
        "parts": _SPLIT,
    }
    return page.replace("@data@", json_in_html(data), 1).encode(
        "utf-8", errors="backslashreplace"
    )  # a lone surrogate: its JSON escape


def json_in_html(data: Any) -> str:
    """JSON that no text in it can end: `</script>` and `<!--` have no `<`, and the line ends that
    JavaScript alone knows are escaped.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def run_names(run_dirs: Sequence[Folder]) -> list[str]:
    """The last part of each path, and as many before it as tell them apart.

    Raises InputError for a folder given twice.
    """
    paths = [run_dir if files.is_bucket(run_dir) else run_dir.resolve() for run_dir in run_dirs]
    if again := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise InputError(f"{again}: given twice; give each --run-dir once")
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def main(argv: list[str] | None = None) -> int:
    """Writes one HTML page about one run or several: curves, samples with the probability of each
    token, comparison.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.report", description=main.__doc__)
    parser.add_argument(
        "--run-dir",
        required=True,
        nargs="+",
        help="run folders of dapo_jax.train; may still be at work",
    )
    parser.add_argument(
        "--out", help="file to write; report.html in the first run folder if not given"
    )
    args = parser.parse_args(argv)
    if args.out is not None and ("://" in args.out or not args.out or as_path(args.out).is_dir()):
        raise InputError(
            f"{args.out or '--out'}: is no file of this machine; give --out one, e.g. report.html"
        )
    run_dirs = [run_folder(where) for where in args.run_dir]
    names = run_names(run_dirs)
    runs = [
        read_run(run_dir, name, _SAMPLE_BYTES // len(run_dirs))
        for run_dir, name in zip(run_dirs, names, strict=True)
    ]
    page, out = render(runs), as_path(args.out) if args.out else run_dirs[0] / "report.html"
    with writing(out):
        write_whole(out, page)
    print(f"wrote {out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
