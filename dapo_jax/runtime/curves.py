"""The curves of a run as one PNG: held-out accuracy, reward, length, entropy, dynamic sampling, clipping."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_jax.runtime.folder import Folder, as_path, is_bucket, write_whole, writing
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.types import InputError

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f5fa8", "#d9730d", "#2f8f5b", "#b8323a", "#6b7280"
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
    "grid.linewidth": 0.8,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def plot_curves(run_dir: str | Folder) -> Folder:
    """Draws <run>/curves.png from <run>/metrics.jsonl, 1800 x 960 pixels. Returns its path.

    A thin line is what a step measured, a thick one its running mean. Metrics that the run does not have are left out.
    Raises InputError if there are no metrics, or the file cannot be written (RunError in a bucket).
    """
    folder = as_path(run_dir)
    records = read_metrics(folder)
    if not records:
        raise InputError(f"{folder / 'metrics.jsonl'}: holds no steps yet; let the run finish one")
    import matplotlib

    path, image = folder / "curves.png", io.BytesIO()
    with matplotlib.rc_context(STYLE):
        _draw(records, folder.name if is_bucket(folder) else folder.resolve().name).savefig(image, dpi=150)
    with writing(path):
        write_whole(path, image.getvalue())
    return path


def _draw(records: Sequence[dict[str, Any]], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(12, 6.4), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
    (accuracy, reward, length), (entropy, sampling, clipping) = figure.subplots(2, 3, sharex=True)

    accuracy.set_title("Accuracy (%)")
    colors = iter((_BLUE, _GREEN, _RED, "#7a4fa3"))
    for key in sorted({key for record in records for key in record if key.startswith("eval/") and key.endswith("/avg")}):
        _evaluation(accuracy, records, key, next(colors, _GREY))
    _line(accuracy, records, "reward/accuracy", "training, unfiltered", _ORANGE, 100)

    reward.set_title("Reward")
    _line(reward, records, "reward/mean", "score + penalty", _BLUE)
    _line(reward, records, "reward/overlong_penalty_mean", "overlong penalty", _RED)

    length.set_title("Response length (tokens)")
    _line(length, records, "rollout/response_len_mean", "mean length", _BLUE)
    length.set_ylim(bottom=0)
    share = None
    if _series(records, "rollout/truncated_fraction")[0].size:
        share = length.twinx()
        share.grid(False)
        _line(share, records, "rollout/truncated_fraction", "cut off (%, right)", _RED, 100)
        share.set_ylim(0, max(5.0, share.get_ylim()[1]))
        share.tick_params(axis="y", colors=_RED)

    entropy.set_title("Entropy (nats)")
    _line(entropy, records, "policy/entropy", "policy", _BLUE)
    entropy.set_ylim(bottom=0)

    sampling.set_title("Groups drawn (%)")
    _line(sampling, records, "filter/kept_fraction", "kept", _BLUE, 100)
    _line(sampling, records, "filter/all_correct", "all correct", _GREEN, 100)
    _line(sampling, records, "filter/all_wrong", "all wrong", _RED, 100)
    sampling.set_ylim(0, 100)

    clipping.set_title("Clipped share and KL to π_old")
    _line(clipping, records, "policy/clip_fraction_high", "clipped high", _ORANGE)
    _line(clipping, records, "policy/clip_fraction_low", "clipped low", _BLUE)
    _line(clipping, records, "policy/approx_kl", "KL (nats)", _GREY)
    if any((line.get_ydata() > 0).any() for line in clipping.lines):
        clipping.set_yscale("log", nonpositive="mask")

    last = max(record["step"] for record in records)
    for axes in (entropy, sampling, clipping):
        axes.set_xlabel("rollout step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    for axes in (accuracy, reward, length, entropy, sampling, clipping):
        axes.set_xlim(0, max(1, last))
        if not axes.lines:
            axes.set_yticks([])
            axes.grid(False)
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_GREY)
        _name_lines(axes, share.lines if axes is length and share else ())
    return figure


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer of them at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _line(axes: Any, records: Sequence[dict[str, Any]], key: str, label: str, color: str, factor: float = 1.0) -> None:
    steps, values = _series(records, key)
    if not steps.size:
        return
    values = values * factor
    window = min(len(values), 1 + 2 * (len(values) // 50))
    if window > 1:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, window)
    axes.plot(steps, values, color=color, label=label, marker="o" if len(steps) == 1 else "", markersize=4, clip_on=len(steps) > 1)


def _evaluation(axes: Any, records: Sequence[dict[str, Any]], key: str, color: str) -> None:
    """avg@k of a held-out set, with a band of one standard error on each side."""
    steps, mean = _series(records, key)
    error = np.array([record.get(f"{key}_se", 0.0) for record in records if key in record])
    axes.fill_between(steps, 100 * (mean - error), 100 * (mean + error), color=color, alpha=0.15, linewidth=0)
    axes.plot(steps, 100 * mean, color=color, label=f"{key.split('/')[1]} (held out)", marker="o", markersize=3, clip_on=False)


def _name_lines(axes: Any, more: Sequence[Any]) -> None:
    """Names the lines in their colours between title and panel, where no data can be covered."""
    lines = [line for line in (*axes.lines, *more) if not line.get_label().startswith("_")]
    if lines:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "borderpad": 0.0}
        look = {"frameon": False, "labelcolor": "linecolor", "handlelength": 0.9, "handletextpad": 0.4, "columnspacing": 1.1}
        axes.legend(handles=lines, ncols=5, fontsize=9 if len(lines) < 4 else 7, **look, **place)
