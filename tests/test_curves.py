"""curves.png draws the numbers of metrics.jsonl, for long runs, short runs and runs that measured
little.
"""

import json

import matplotlib.image
import numpy as np
import pytest

from dapo_jax.runtime import curves
from dapo_jax.runtime.curves import plot_curves
from dapo_jax.types import InputError

pytestmark = pytest.mark.host

KEYS = (
    "reward/accuracy reward/mean reward/overlong_penalty_mean rollout/response_len_mean "
    "rollout/truncated_fraction policy/entropy filter/kept_fraction filter/all_correct "
    "filter/all_wrong policy/clip_fraction_low policy/clip_fraction_high policy/approx_kl"
).split()


def records(steps: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    lines = [{"step": 0, "updates": 0, "draws": 0, "eval/aime/avg": 0.25, "eval/aime/avg_se": 0.05}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "updates": step,
                "draws": step,
                **{key: float(rng.uniform(0.1, 0.9)) for key in KEYS},
            }
        )
        if step % 5 == 0:
            lines[-1] |= {"eval/aime/avg": 0.5, "eval/aime/avg_se": 0.1}
    return lines


def run_with(tmp_path, lines):
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(lines) -> dict[str, np.ndarray]:
    """Values at each named line of the figure, by panel title and name."""
    figure = curves._draw(lines, "title")
    found = {}
    for axes in figure.axes:
        for line in axes.lines:
            if not line.get_label().startswith("_"):
                found[line.get_label()] = np.stack([line.get_xdata(), line.get_ydata()])
    return found


def test_lines_show_the_numbers():
    lines = records(10)
    got = drawn(lines)
    np.testing.assert_allclose(got["held-out: aime"], [[0, 5, 10], [25, 50, 50]])
    shown = (
        ("score + penalty", "reward/mean", 1),
        ("informative (kept)", "filter/kept_fraction", 100),
        ("KL (nats, right)", "policy/approx_kl", 1),
    )
    for label, key, factor in shown:
        np.testing.assert_allclose(
            got[label], [range(1, 11), [factor * line[key] for line in lines[1:]]]
        )
    assert len(got) == 13


def test_every_panel_names_its_steps_and_shares_do_not_share_an_axis_with_nats():
    figure = curves._draw(records(10), "title")
    assert [axes.get_xlabel() for axes in figure.axes[:6]] == ["rollout step"] * 6
    by_label = {line.get_label(): axes for axes in figure.axes for line in axes.lines}
    assert by_label["KL (nats, right)"] is not by_label["clipped high"] is by_label["clipped low"]
    assert by_label["truncated (%, right)"] is not by_label["mean length"]


def test_standard_error_band():
    figure = curves._draw(records(10), "title")
    (band,) = figure.axes[0].collections
    corners = {(round(x), round(y)) for x, y in band.get_paths()[0].vertices}
    assert {(0, 20), (0, 30), (5, 40), (5, 60), (10, 40), (10, 60)} <= corners


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=23)
    for window in (1, 3, 7, 23):
        half = window // 2
        want = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
        np.testing.assert_allclose(curves.running_mean(values, window), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        records(300),
        records(1),
        records(0),
        [{"step": 4, "policy/approx_kl": 0.0, "policy/clip_fraction_low": 0.0}],
        [{"step": 1}],
    ],
    ids=["long", "one step", "only an evaluation", "all zero on a log scale", "nothing measured"],
)
@pytest.mark.filterwarnings("error")
def test_any_run_makes_a_picture(tmp_path, lines):
    path = plot_curves(run_with(tmp_path, lines))
    assert path == tmp_path / "my_run" / "curves.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (960, 1800) and pixels[..., :3].min() < 0.5 < pixels[..., :3].mean()


@pytest.mark.slow
def test_title_is_the_folder_name_only(tmp_path, monkeypatch):
    folder = run_with(tmp_path, records(3))
    monkeypatch.chdir(folder)
    seen = []
    monkeypatch.setattr(
        curves,
        "_draw",
        lambda lines, title, draw=curves._draw: (seen.append(title), draw(lines, title))[1],
    )
    plot_curves(".")
    assert seen == ["my_run"]


def test_runs_without_metrics(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl"):
        plot_curves(tmp_path)
    with pytest.raises(InputError, match="holds no steps yet"):
        plot_curves(run_with(tmp_path, []))
