"""The study as one figure: held-out accuracy over updates and over tokens, and what each part of the ladder is to change."""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dapo_jax.runtime.curves import STYLE, running_mean
from dapo_jax.study.ladder import Study
from dapo_jax.study.summary import Estimate, Run, curve

_COLORS = ("#6b7280", "#d9730d", "#7a4fa3", "#2f8f5b", "#b8323a", "#1f5fa8", "#8a6d3b", "#0f7b8a")
_LINES = ("-", "--", ":", "-.")  # once all colours have been used
_COLUMNS = 3
_WINDOW = 9  # steps of the running mean of a training metric
_TITLES = {
    "policy/entropy": "Entropy (nats)",
    "policy/upclipped_prob_mean": "Probability of up-clipped tokens",
    "policy/long_share": "Loss weight on the longest quarter (%)",
    "filter/all_correct": "Groups all correct (%)",
    "filter/trained_informative": "Trained groups that teach (%)",
    "rollout/truncated_fraction": "Responses cut off (%)",
    "rollout/response_len_mean": "Response length (tokens)",
}
_ACCEPTED = {"all": "all informative", "draw_order": "in draw order", "first_finished": "first finished"}


def draw_study(study: Study, rows: Sequence[dict[int, Run]], without: Mapping[str, Estimate]) -> bytes:
    """PNG. Lines are means over seeds, bands and bars one standard error on each side.

    The first two panels show all rows; each of the others a metric that a row is to change, beside the row above. The last shows what
    `order.bias` found of the order in which groups are accepted, if that is among `without`.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        image = io.BytesIO()
        _figure(study, rows, without).savefig(image, dpi=130)
    return image.getvalue()


def _figure(study: Study, rows: Sequence[dict[int, Run]], without: Mapping[str, Estimate]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    watched = [(number, metric) for number, row in enumerate(study.rows) for metric in row.watch]
    accepted = {text: without[f"{key}_length"] for key, text in _ACCEPTED.items() if f"{key}_length" in without}
    used = 2 + len(watched) + bool(accepted)
    height = math.ceil(used / _COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(13.5, 3.4 * height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(height, _COLUMNS, squeeze=False).ravel()
    for panel in panels[used:]:
        panel.set_axis_off()

    panels[0].set_title("Held-out accuracy (%), equal updates")
    panels[0].set_xlabel("rollout step")
    panels[1].set_title("Held-out accuracy (%), equal tokens")
    panels[1].set_xlabel("response tokens sampled (millions)")
    for number, (row, runs) in enumerate(zip(study.rows, rows, strict=True)):
        if not runs:
            continue
        # A run that was made longer has an evaluation where it ended at first.
        steps = functools.reduce(np.intersect1d, [run.eval_steps for run in runs.values()])
        accuracy = np.array([run.evals["avg"][np.isin(run.eval_steps, steps)] for run in runs.values()])
        tokens = np.linspace(0, min(run.tokens[-1] for run in runs.values()), 50)
        along = np.array([np.interp(tokens, run.eval_tokens, run.evals["avg"]) for run in runs.values()])
        _band(panels[0], steps, 100 * accuracy, row.name, number)
        _band(panels[1], tokens / 1e6, 100 * along, row.name, number)
    for panel, (number, metric) in zip(panels[2:], watched, strict=False):
        factor = 100 if "(%)" in _TITLES.get(metric, "") else 1
        panel.set_title(_TITLES.get(metric, metric))
        panel.set_xlabel("rollout step")
        for i in (number - 1, number):
            if i >= 0 and (runs := rows[i]):
                values = np.array([_smooth(curve(run, metric)) for run in runs.values()])
                _band(panel, next(iter(runs.values())).steps, factor * values, study.rows[i].name, i)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    if accepted:
        panel = panels[used - 1]
        panel.set_title("Length of what is accepted (tokens)")
        means, errors = ([value[i] for value in accepted.values()] for i in (0, 1))
        panel.errorbar(range(len(accepted)), means, np.nan_to_num(errors), fmt="o", capsize=3, color=_COLORS[0])
        panel.set_xticks(range(len(accepted)), list(accepted))
        panel.set_xlim(-0.5, len(accepted) - 0.5)
    for panel in panels[: 2 + len(watched)]:
        if len(panel.lines) > 3:  # room above for so long a legend
            low, high = panel.get_ylim()
            panel.set_ylim(top=high + 0.07 * len(panel.lines) * (high - low))
        if panel.lines:
            panel.legend(fontsize=7.5, frameon=False, labelcolor="linecolor")
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the values that are there."""
    there, window = np.isfinite(values), min(_WINDOW, len(values))
    share = running_mean(there.astype(float), window)
    return np.where(share > 0, running_mean(np.where(there, values, 0.0), window) / np.where(share > 0, share, 1.0), math.nan)


def _band(panel: Any, places: np.ndarray, curves: np.ndarray, label: str, number: int) -> None:
    """Mean of curves [seeds, n] with a band of one standard error on each side, in the look of the row with this number."""
    color, line = _COLORS[number % len(_COLORS)], _LINES[number // len(_COLORS) % len(_LINES)]
    there = np.isfinite(curves).all(axis=0)
    places, curves = places[there], curves[:, there]
    mean = curves.mean(axis=0)
    error = curves.std(axis=0, ddof=1) / math.sqrt(len(curves)) if len(curves) > 1 else np.zeros_like(mean)
    panel.fill_between(places, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    panel.plot(places, mean, color=color, linestyle=line, label=label)
