"""Output of a run: lines, a table of its steps, progress bars on a terminal.

A log file gets the same lines, without control characters.
"""

import contextlib
import itertools
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

_REPEAT = 20  # lines of the table under one header
_WIDE = 120  # columns of the whole table; a log file gets it, a narrower terminal not

# title, key, width, factor to the unit shown, format, whether narrow terminals show it
_COLUMNS = (
    ("acc%", "reward/accuracy", 5, 100, ".1f", True),
    ("reward", "reward/mean", 6, 1, "+.3f", True),
    ("kept%", "filter/kept_fraction", 5, 100, ".0f", True),
    ("drawn", "rollout/prompts", 5, 1, ".0f", False),
    ("len", "rollout/response_len_mean", 5, 1, ".0f", True),
    ("trunc", "rollout/truncated_fraction", 5, 100, ".1f", True),
    ("entropy", "policy/entropy", 7, 1, ".3f", True),
    ("kl", "policy/approx_kl", 7, 1, ".1e", True),
    ("clip-%", "policy/clip_fraction_low", 6, 100, ".2f", False),
    ("clip+%", "policy/clip_fraction_high", 6, 100, ".2f", False),
    ("gnorm", "optim/grad_norm", 6, 1, ".3g", True),
    ("tok/s", "throughput/rollout_tokens_per_s", 7, 1, ".0f", False),
    ("draw_s", "time/rollout_s", 6, 1, ".1f", False),
    ("train_s", "time/update_s", 7, 1, ".1f", False),
    ("step_s", "time/step_s", 6, 1, ".1f", True),
)

# Surrogates too: they are undecodable bytes of file names.
_CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
_NOT_OF_BARS = rf"(?![\r\x1b]){_CONTROLS}|\x1b(?!\[A)"  # what progress bars do not write


class _Escaped:
    """A text stream that escapes control characters, which names of files may hold."""

    def __init__(self, stream: Any, controls: str):
        self._stream, self._controls = stream, re.compile(controls)

    def write(self, text: str) -> int:
        return self._stream.write(self._controls.sub(lambda found: repr(found[0])[1:-1], text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Standard output and error without terminal controls while inside."""
    out, err = _Escaped(sys.stdout, _CONTROLS), _Escaped(sys.stderr, _NOT_OF_BARS)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def warn(message: str) -> None:
    print(f"dapo_jax: {message}", file=sys.stderr, flush=True)


class Console(NamedTuple):
    """Output of one process; only the first of a job has any."""

    info: Callable[[str], None]  # progress
    result: Callable[[str], None]  # results, and what a quiet run prints too
    bars: bool  # progress bars


def make_console(*, main: bool, quiet: bool = False) -> Console:
    """main: whether this is the first process. quiet: no `info`, no bars."""

    def line(text: str) -> None:
        tqdm.write(text)  # above a bar, if there is one
        sys.stdout.flush()

    def nothing(text: str) -> None:
        pass

    loud = main and not quiet
    return Console(line if loud else nothing, line if main else nothing, loud)


def announced(name: str, function: Callable[..., Any], info: Callable[[str], None]) -> Any:
    """The function, whose first call says that its programs are compiled, which takes a while."""
    calls = itertools.count()

    def call(*args: Any) -> Any:
        if next(calls) == 0:
            info(f"compiling {name} ...")
        return function(*args)

    return call


def duration(seconds: float) -> str:
    """A time in at most five characters: 45m, 3h05m, 2d04h."""
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days}d{hours % 24:02}h" if days < 10 else f"{days}d"
    if hours:
        return f"{hours}h{minutes % 60:02}m" if hours < 10 else f"{hours}h"
    return f"{minutes}m"


class StepTable:
    """The table of a run of `steps` steps; its titles repeat. columns: width in characters.

    `left` is the time left, by the mean time from line to line, evaluations included; the first
    line, before which programs compile, does not count.
    """

    def __init__(self, steps: int, columns: int | None = None):
        terminal = sys.stdout.isatty() and shutil.get_terminal_size().columns
        self._steps, self._lines, self._start = steps, 0, 0.0
        wide = (columns or terminal or _WIDE) >= _WIDE
        self._columns = [column for column in _COLUMNS if wide or column[-1]]

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The step's numbers, `-` for a missing one; every few steps below the titles."""
        titles, line = f"{'step':>9}", f"{f'{step}/{self._steps}':>9}"
        for title, key, width, factor, form, _ in self._columns:
            cell = format(metrics[key] * factor, form) if key in metrics else "-"
            titles, line = f"{titles} {title:>{width}}", f"{line} {cell:>{width}}"
        now, left = time.monotonic(), "-"
        if self._lines and step < self._steps:
            left = duration((now - self._start) / self._lines * (self._steps - step))
        self._start = self._start or now
        titles, line = f"{titles} {'left':>5}", f"{line} {left:>5}"
        self._lines += 1
        return f"{titles}\n{line}" if self._lines % _REPEAT == 1 else line


def progress(total: int | None, description: str, *, enabled: bool = True) -> tqdm:
    """A progress bar, a context manager with `.update(n)`: on a terminal; nothing elsewhere."""
    disable = not (enabled and sys.stderr.isatty())
    return tqdm(total=total, desc=description, leave=False, dynamic_ncols=True, disable=disable)
