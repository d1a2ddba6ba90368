"""What a person sees while a run goes: a table that lines up at both widths, and nothing that a log
file could not hold.
"""

import re
import sys

import pytest

from dapo_jax import cli
from dapo_jax.runtime import console
from dapo_jax.runtime.console import StepTable, make_console, progress
from dapo_jax.runtime.metrics import METRICS

VALUES = {
    "reward/accuracy": 0.4567,
    "reward/mean": -0.25,
    "policy/clip_fraction_high": 0.0123,
    "time/update_s": 12.34,
    "time/step_s": 60.06,
}
# As large as numbers of a pod's run get.
LARGE = dict.fromkeys(METRICS, 1.0) | {
    "reward/mean": -1.5,
    "policy/approx_kl": 1.2e-3,
    "rollout/response_len_mean": 20480.0,
}
LARGE |= {
    "rollout/prompts": 15360,
    "throughput/rollout_tokens_per_s": 1234567.0,
    "time/rollout_s": 1234.5,
    "time/step_s": 2345.6,
}


def cells(titles: str, line: str) -> dict[str, str]:
    """Each title with the value below it."""
    spans = {match[0].strip(): match.span() for match in re.finditer(r" *\S+", titles)}
    return {title: line[start:end].strip() for title, (start, end) in spans.items()}


@pytest.mark.parametrize("columns", [80, 120])
def test_columns_line_up_and_show_what_they_say(columns):
    table = StepTable(320, columns)
    (titles, line), empty, full = (
        table.line(7, VALUES).split("\n"),
        table.line(320, {}),
        table.line(320, LARGE),
    )
    assert len(titles) == len(line) == len(empty) == len(full) < columns
    shown = cells(titles, line)
    expected = {"step": "7/320", "acc%": "45.7", "reward": "-0.250", "kl": "-", "step_s": "60.1"}
    assert expected.items() <= shown.items()
    assert set(cells(titles, empty).values()) == {"320/320", "-"}
    assert cells(titles, full)["len"] == "20480"
    assert ("clip+%" in shown) == (columns == 120) and (
        columns == 80 or (shown["clip+%"], shown["train_s"]) == ("1.23", "12.3")
    )
    assert {key for _, key, *_ in console._COLUMNS} <= METRICS.keys()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0m"),
        (89, "1m"),
        (3570, "1h00m"),
        (11100, "3h05m"),
        (45000, "12h"),
        (86400 * 2.2, "2d04h"),
        (864000, "10d"),
    ],
)
def test_a_duration_has_at_most_five_characters(seconds, text):
    assert console.duration(seconds) == text and len(text) <= 5


def test_the_time_left_is_of_the_mean_step_after_the_first(monkeypatch):
    """Lines at 1000, 1060 and 1180 s: a mean of 60, then of 90 s, for 8 and 7 steps."""
    clock = iter([1000.0, 1060.0, 1180.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    table = StepTable(10, 80)
    titles = table.line(1, VALUES).split("\n")[0]
    assert [cells(titles, table.line(step, VALUES))["left"] for step in (2, 3)] == ["8m", "10m"]


def test_the_first_call_of_a_program_is_announced():
    said = []
    add = console.announced("update", lambda a, b: a + b, said.append)
    assert (add(1, 2), add(3, 4), said) == (3, 7, ["compiling update ..."])


def test_titles_come_again():
    table = StepTable(100, 80)
    lines = [table.line(step, VALUES) for step in range(1, 46)]
    assert [step for step, line in enumerate(lines, start=1) if "acc%" in line] == [1, 21, 41]


def test_a_log_file_has_the_wide_table_and_no_control_characters(capsys):
    said = make_console(main=True)
    said.info(StepTable(3).line(1, VALUES))
    with progress(3, "rollout 1", enabled=said.bars) as bar:
        bar.update(2)
    out, err = capsys.readouterr()
    assert "clip+%" in out and err == "" and all(char.isprintable() or char == "\n" for char in out)


def test_a_quiet_run_tells_results_and_other_processes_tell_nothing(capsys):
    for main, quiet, expected in (
        (True, False, "going\ndone\n"),
        (True, True, "done\n"),
        (False, False, ""),
        (False, True, ""),
    ):
        said = make_console(main=main, quiet=quiet)
        said.info("going")
        said.result("done")
        assert capsys.readouterr().out == expected
        assert said.bars == (main and not quiet)


def test_progress_is_silent_where_there_is_no_terminal(capsys, monkeypatch):
    with progress(10, "rollout") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(10, "rollout") as bar:
        bar.update(10)
    assert "rollout" in capsys.readouterr().err
    with progress(10, "rollout", enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_terminal_controls_reach_no_terminal_through_any_verb(capsys, monkeypatch):
    """Names of files, keys of files, errors: whatever is printed. Bars may move the cursor."""

    def main(argv):
        print("data\x1b[31m\x9b2J\x07\r\udcff.jsonl: ¿ok? 你好\tof\nthree")
        with progress(2, "rollout 1") as bar:
            bar.update(2)
        print("run\x1b]0;title\x07: waiting", file=sys.stderr)
        return 0

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        cli.run(main, [])
    out, err = capsys.readouterr()
    assert out == "data\\x1b[31m\\x9b2J\\x07\\r\\udcff.jsonl: ¿ok? 你好\tof\nthree\n"
    bars, _, line = err.rpartition("\r")
    assert "rollout 1: " in bars and line.endswith("run\\x1b]0;title\\x07: waiting\n")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", err)
