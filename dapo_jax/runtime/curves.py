"""The training curves of a run as one PNG."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.runtime import multihost
from dapo_jax.runtime.files import Folder, as_path, is_bucket, read, write_whole
from dapo_jax.runtime.metrics import held_out, read_metrics
from dapo_jax.types import InputError, RunError, Stopped

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f5fa8", "#d9730d", "#2f8f5b", "#b8323a", "#6b7280"
_HELD_OUT = (_BLUE, _GREEN, _RED, "#7a4fa3")  # per evaluation set
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 21,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": "#c4c8cf",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.0,
    "grid.color": "#e8eaee",
    **dict.fromkeys(("xtick.color", "ytick.color"), _GREY),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "lines.linewidth": 1.6,
}


class _Line(NamedTuple):
    """A metric in a panel. right: in another unit, so drawn on the right axis."""

    key: str
    label: str
    color: str
    factor: float = 1.0
    right: bool = False


_PANELS: dict[str, list[_Line]] = {
    "Accuracy (%)": [_Line("reward/accuracy", "training, before filtering", _ORANGE, 100)],
    "Reward": [
        _Line("reward/mean", "score + penalty", _BLUE),
        _Line("reward/overlong_penalty_mean", "overlong penalty", _RED),
    ],
    "Response length (tokens)": [
        _Line("rollout/response_len_mean", "mean length", _BLUE),
        _Line("rollout/truncated_fraction", "truncated (%, right)", _RED, 100, right=True),
    ],
    "Entropy (nats)": [_Line("policy/entropy", "policy", _BLUE)],
    "Groups sampled (%)": [
        _Line("filter/kept_fraction", "informative (kept)", _BLUE, 100),
        _Line("filter/all_correct", "all-correct", _GREEN, 100),
        _Line("filter/all_wrong", "all-incorrect", _RED, 100),
    ],
    "Clipped tokens (%)": [
        _Line("policy/clip_fraction_high", "clipped high", _ORANGE, 100),
        _Line("policy/clip_fraction_low", "clipped low", _BLUE, 100),
        _Line("policy/approx_kl", "KL (nats, right)", _GREY, right=True),
    ],
}
# Names of lines in their colors between title and panel, where they cover no data.
_LEGEND: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderpad": 0.0, "ncols": 5}
_LEGEND |= {"frameon": False, "labelcolor": "linecolor", "handlelength": 0.9}
_LEGEND |= {"columnspacing": 1.1, "handletextpad": 0.4}


def plot_curves(run_dir: str | Folder) -> Folder:
    """Draws <run>/curves.png from <run>/metrics.jsonl, 1800 x 960 pixels. Returns its path.

    Thin lines are the values, thick ones their running mean. Raises InputError if there are no
    metrics, or the file cannot be written (RunError in a bucket).
    """
    folder = as_path(run_dir)
    records = read_metrics(folder)
    if not records:
        raise InputError(f"{folder / 'metrics.jsonl'}: holds no steps yet; let the run finish one")
    import matplotlib

    path, image = folder / "curves.png", io.BytesIO()
    with matplotlib.rc_context(STYLE):
        name = folder.name if is_bucket(folder) else folder.resolve().name
        _draw(records, name).savefig(image, dpi=150)
    write_whole(path, image.getvalue())
    return path


@contextlib.contextmanager
def curves_at_end(run_dir: Folder, info: Callable[[str], None]) -> Iterator[None]:
    """Draws the curves when the block ends, or a signal ends it, if a step is recorded."""
    try:
        yield
    except Stopped:
        if multihost.is_main() and read(run_dir / "metrics.jsonl"):
            with contextlib.suppress(InputError, RunError):  # the stop matters more
                info(f"curves: {plot_curves(run_dir)}")
        raise
    if multihost.is_main():
        info(f"curves: {plot_curves(run_dir)}")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over `window` values, over fewer of them at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _draw(records: Sequence[dict[str, Any]], name: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    last = max(record["step"] for record in records)
    figure = Figure(figsize=(12, 6.4), facecolor="white", layout="constrained")
    title = f"{name}, {last} rollout steps"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    for axes, (title, lines) in zip(figure.subplots(2, 3).ravel(), _PANELS.items(), strict=True):
        axes.set_title(title)
        sides = [axes]
        drawn = _held_out(axes, records) if title.startswith("Accuracy") else []
        for line in lines:
            if not any(line.key in record for record in records):
                continue
            if line.right:
                sides.append(axes.twinx())
                sides[-1].grid(False)
                sides[-1].tick_params(axis="y", colors=line.color)
            drawn += _curve(sides[-1], records, line)
        axes.set(xlim=(0, max(1, last)), xlabel="rollout step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        for side in sides:
            if min((line.get_ydata().min() for line in side.lines), default=0) >= 0:
                side.set_ylim(bottom=0)
        if title.startswith("Groups"):
            axes.set_ylim(0, 100)
        if title.startswith("Response"):  # less than 1% truncated is little, and looks it
            sides[-1].set_ylim(top=max(1.0, sides[-1].get_ylim()[1]))
        if drawn:
            axes.legend(handles=drawn, fontsize=9 if len(drawn) < 4 else 7, **_LEGEND)
        else:
            axes.set_yticks([])
            axes.grid(False)
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_GREY)
    return figure


def _series(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """[2, N]: steps and values."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return np.array(points, np.float64).reshape(-1, 2).T


def _curve(axes: Any, records: Sequence[dict[str, Any]], line: _Line) -> list[Any]:
    steps, values = _series(records, line.key)
    values = values * line.factor
    window = min(len(values), 1 + 2 * (len(values) // 50))
    if window > 1:
        axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, window)
    point: Any = {"marker": "o", "markersize": 4, "clip_on": False} if len(steps) == 1 else {}
    return axes.plot(steps, values, color=line.color, label=line.label, **point)


def _held_out(axes: Any, records: Sequence[dict[str, Any]]) -> list[Any]:
    """avg@k of each evaluation set, in a band of one standard error on each side."""
    names, drawn = {name for record in records for name in held_out(record)}, []
    for number, name in enumerate(sorted(names)):
        color, key = _HELD_OUT[number % len(_HELD_OUT)], f"eval/{name}/avg"
        label = "held-out" if name in ("heldout", "held_out", "held-out") else f"held-out: {name}"
        steps, mean = _series(records, key)
        error = np.array([record.get(f"{key}_se", 0.0) for record in records if key in record])
        band = 100 * (mean - error), 100 * (mean + error)
        axes.fill_between(steps, *band, color=color, alpha=0.15, linewidth=0)
        look: Any = {"marker": "o", "markersize": 3, "clip_on": False}
        drawn += axes.plot(steps, 100 * mean, color=color, label=label, **look)
    return drawn
