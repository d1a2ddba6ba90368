"""What a run tells people while it goes: lines, a table of its steps, progress bars on a terminal.

A log file gets the same lines, without control characters.
"""

import contextlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

_REPEAT = 20  # lines of the table under one header
_LOG_COLUMNS = 120  # where output is no terminal

# title, key, width, factor to the unit shown, format; what stands on a terminal of fewer than
# _LOG_COLUMNS columns
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
    ("tok/s", "throughput/rollout_tokens_per_s", 7, 1, ".0f", True),
    ("draw_s", "time/rollout_s", 6, 1, ".1f", False),
    ("train_s", "time/update_s", 7, 1, ".1f", False),
    ("step_s", "time/step_s", 6, 1, ".1f", True),
)


_CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # surrogates too: they are undecodable bytes of file names
_NOT_OF_BARS = rf"(?![\r\x1b]){_CONTROLS}|\x1b(?!\[A)"  # what progress bars do not write


class _Escaped:
    """A text stream that writes control characters as escapes: file names, keys of files and quoted
    texts may hold any.
    """

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
    """A line on standard error."""
    print(f"dapo_jax: {message}", file=sys.stderr, flush=True)


class Console(NamedTuple):
    """How one process speaks; only the first of a job does."""

    info: Callable[[str], None]  # what goes on
    result: Callable[[str], None]  # results, and what a person should know even of a quiet run
    bars: bool  # progress bars


def make_console(*, main: bool, quiet: bool = False) -> Console:
    """main: whether this is the first process. quiet: no `say`, no bars."""

    def nothing(line: str) -> None:
        pass

    def line_out(line: str) -> None:
        print(line, flush=True)

    return Console(
        line_out if main and not quiet else nothing,
        line_out if main else nothing,
        main and not quiet,
    )


class StepTable:
    """The lines of a run's steps, under titles that come again now and then. steps: of the whole
    run. columns: of the output.
    """

    def __init__(self, steps: int, columns: int | None = None):
        columns = columns or (
            shutil.get_terminal_size().columns if sys.stdout.isatty() else _LOG_COLUMNS
        )
        self._steps, self._lines = steps, 0
        self._columns = [column for column in _COLUMNS if columns >= _LOG_COLUMNS or column[-1]]

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The step's numbers, `-` where there is none; with the titles above them where it is time."""
        titles = self._joined("step", [title for title, *_ in self._columns])
        cells = [
            format(metrics[key] * factor, form) if key in metrics else "-"
            for _, key, _, factor, form, _ in self._columns
        ]
        line = self._joined(f"{step}/{self._steps}", cells)
        self._lines += 1
        return f"{titles}\n{line}" if self._lines % _REPEAT == 1 else line

    def _joined(self, first: str, cells: list[str]) -> str:
        return " ".join(
            [
                f"{first:>9}",
                *(
                    f"{cell:>{column[2]}}"
                    for cell, column in zip(cells, self._columns, strict=True)
                ),
            ]
        )


def progress(total: int | None, description: str, *, enabled: bool = True) -> tqdm:
    """A progress bar, to be used as a context manager with `.update(n)`: shown on a terminal,
    nothing elsewhere.
    """
    return tqdm(
        total=total,
        desc=description,
        leave=False,
        dynamic_ncols=True,
        disable=not (enabled and sys.stderr.isatty()),
    )
