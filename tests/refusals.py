"""Bad input is asserted by what a message names (file, key, row, wrong value) and the exit status.
How it says it is free.
"""

import contextlib
import re

import pytest

from dapo_jax.types import InputError


def names(line: str, expected: str) -> bool:
    """Whether a line names what is expected, in this order; `...` stands for any text."""
    return re.match(".*".join(map(re.escape, expected.split("..."))), line) is not None


@contextlib.contextmanager
def refusal(expected: str, error: type[Exception] = InputError):
    """For code that must raise an error of one line, which names what is expected."""
    with pytest.raises(error) as caught:
        yield caught
    line = str(caught.value)
    assert names(line, expected), line
    assert "\n" not in line and len(line) < 600, line


def line_of(capture) -> tuple[str, str]:
    """The line, without the program's name, that a verb wrote on stderr, all alone; and stdout."""
    out, err = capture.readouterr()
    lines = [line for line in err.split("\n") if line]
    assert len(lines) == 1 and err.startswith("dapo_jax: ") and len(err) < 600, err
    return lines[0].removeprefix("dapo_jax: "), out
