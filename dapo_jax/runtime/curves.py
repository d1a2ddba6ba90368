"""The curves of a run as one PNG: held-out accuracy, reward, length, entropy, dynamic sampling,
clipping.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.runtime.files import Folder, as_path, is_bucket, write_whole, writing
from dapo_jax.runtime.metrics import read_metrics
from dapo_jax.types import InputError

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f5fa8", "#d9730d", "#2f8f5b", "#b8323a", "#6b7280"
_HELD_OUT = (_BLUE, _GREEN, _RED, "#7a4fa3")  # a colour for each evaluation set
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


class _Line(NamedTuple):
    """A metric in a panel. right: on an axis of its own, on the right, because its unit is another."""

    key: str
    label: str
    color: str
    factor: float = 1.0
    right: bool = False


_PANELS = (
    ("Accuracy (%)", [_Line("reward/accuracy", "training, before filtering", _ORANGE, 100)]),
    (
        "Reward",
        [
            _Line("reward/mean", "score + penalty", _BLUE),
            _Line("reward/overlong_penalty_mean", "overlong penalty", _RED),
        ],
    ),
    (
        "Response length (tokens)",
        [
            _Line("rollout/response_len_mean", "mean length", _BLUE),
            _Line("rollout/truncated_fraction", "truncated (%, right)", _RED, 100, right=True),
        ],
    ),
    ("Entropy (nats)", [_Line("policy/entropy", "policy", _BLUE)]),
    (
        "Groups sampled (%)",
        [
            _Line("filter/kept_fraction", "informative (kept)", _BLUE, 100),
            _Line("filter/all_correct", "all-correct", _GREEN, 100),
            _Line("filter/all_wrong", "all-incorrect", _RED, 100),
        ],
    ),
    (
        "Clipped tokens (%)",
        [
            _Line("policy/clip_fraction_high", "clipped high", _ORANGE, 100),
            _Line("policy/clip_fraction_low", "clipped low", _BLUE, 100),
            _Line("policy/approx_kl", "KL (nats, right)", _GREY, right=True),
        ],
    ),
)


def plot_curves(run_dir: str | Folder) -> Folder:
    """Draws <run>/curves.png from <run>/metrics.jsonl, 1800 x 960 pixels. Returns its path.

    A thin line is what a step measured, a thick one its running mean. Metrics that the run does not
    have are left out. Raises InputError if there are no metrics, or the file cannot be written
    (RunError in a bucket).
    """
    folder = as_path(run_dir)
    records = read_metrics(folder)
    if not records:
        raise InputError(f"{folder / 'metrics.jsonl'}: holds no steps yet; let the run finish one")
    import matplotlib

    path, image = folder / "curves.png", io.BytesIO()
    with matplotlib.rc_context(STYLE):
        _draw(records, folder.name if is_bucket(folder) else folder.resolve().name).savefig(
            image, dpi=150
        )
    with writing(path):
        write_whole(path, image.getvalue())
    return path


def _draw(records: Sequence[dict[str, Any]], name: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    last = max(record["step"] for record in records)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(12, 6.4), facecolor="white", layout=layout)
    figure.suptitle(
        f"{name}, {last} rollout steps", x=0.012, ha="left", fontsize=13, fontweight="bold"
    )
    for axes, (title, lines) in zip(figure.subplots(2, 3).ravel(), _PANELS, strict=True):
        axes.set_title(title)
        drawn = _held_out(axes, records) if title.startswith("Accuracy") else []
        right = None
        for line in lines:
            if any(line.key in record for record in records):
                if line.right and right is None:
                    right = axes.twinx()
                    right.grid(False)
                    right.tick_params(axis="y", colors=line.color)
                drawn += _curve(right if line.right else axes, records, line)
        axes.set_xlim(0, max(1, last))
        axes.set_xlabel("rollout step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        for side in (axes, right) if right else (axes,):
            if min((line.get_ydata().min() for line in side.lines), default=0) >= 0:
                side.set_ylim(bottom=0)
        if title.startswith("Groups"):
            axes.set_ylim(0, 100)
        if right is not None and title.startswith("Response"):
            right.set_ylim(
                0, max(1.0, right.get_ylim()[1])
            )  # less than 1% truncated is little, and looks it
        if drawn:
            _legend(axes, drawn)
        else:
            axes.set_yticks([])
            axes.grid(False)
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_GREY)
    return figure


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[key]) for record in records if key in record]
    return np.array([step for step, _ in points], np.float64), np.array(
        [value for _, value in points], np.float64
    )


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer of them at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _curve(axes: Any, records: Sequence[dict[str, Any]], line: _Line) -> list[Any]:
    steps, values = _series(records, line.key)
    values = values * line.factor
    window = min(len(values), 1 + 2 * (len(values) // 50))
    if window > 1:
        axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
        values = running_mean(values, window)
    alone = len(steps) == 1
    return axes.plot(
        steps,
        values,
        color=line.color,
        label=line.label,
        marker="o" if alone else "",
        markersize=4,
        clip_on=not alone,
    )


def _held_out(axes: Any, records: Sequence[dict[str, Any]]) -> list[Any]:
    """avg@k of each evaluation set, with a band of one standard error on each side."""
    keys = sorted(
        {
            key
            for record in records
            for key in record
            if key.startswith("eval/") and key.endswith("/avg")
        }
    )
    drawn = []
    for number, key in enumerate(keys):
        color, name = _HELD_OUT[number % len(_HELD_OUT)], key.split("/")[1]
        label = "held-out" if name in ("heldout", "held_out", "held-out") else f"held-out: {name}"
        steps, mean = _series(records, key)
        error = np.array([record.get(f"{key}_se", 0.0) for record in records if key in record])
        axes.fill_between(
            steps, 100 * (mean - error), 100 * (mean + error), color=color, alpha=0.15, linewidth=0
        )
        drawn += axes.plot(
            steps, 100 * mean, color=color, label=label, marker="o", markersize=3, clip_on=False
        )
    return drawn


def _legend(axes: Any, lines: Sequence[Any]) -> None:
    """Names the lines in their colours between title and panel, where no data can be covered."""
    place = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "borderaxespad": 0.2,
        "borderpad": 0.0,
    }
    look = {
        "frameon": False,
        "labelcolor": "linecolor",
        "handlelength": 0.9,
        "handletextpad": 0.4,
        "columnspacing": 1.1,
    }
    axes.legend(handles=lines, ncols=5, fontsize=9 if len(lines) < 4 else 7, **look, **place)
