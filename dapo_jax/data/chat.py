"""Chat templates: programs that come with a model, rendered in a process that can be stopped.

transformers' sandbox keeps a template from the interpreter's insides, but not from loops without end, `9**9**9**9` (which holds the
interpreter's lock, so that no thread could watch it) or gigabytes of text. The process is a fresh interpreter with an environment
of a few harmless variables, a memory limit and a deadline for every conversation. Both ways go lines of JSON.
"""

import contextlib
import datetime
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

START_S = 120.0  # for the process to import what it needs
DEADLINE_S = 10.0  # for one conversation
MAX_CHARS = 16 << 20  # of one text
_MEMORY_BYTES = 1 << 30  # address space beyond what the process starts with
_ALARM_S = 2.0  # beyond the deadline, when a process whose caller is gone ends itself

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")  # the rest may hold secrets
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dapo_jax.data.chat import work; work()"


class TemplateError(Exception):
    """Why a template gave no text; half a sentence."""


def render(
    template: str,
    variables: Mapping[str, Any],
    conversations: Sequence[Sequence[Mapping[str, str]]],
    date: str,
    *,
    add_generation_prompt: bool = True,
) -> list[str]:
    """Each conversation through a chat template, with the header of the assistant's turn at the end unless told otherwise.

    Args:
      variables: JSON-able, as the special tokens are.
      date: YYYY-MM-DD, what the template takes for today: the clock would make another prompt of the same problem every day.

    Raises TemplateError if the template fails, or takes too much time, memory or text for a conversation.
    """
    if not conversations:
        return []
    with tempfile.TemporaryFile() as orders:
        for order in ([template, dict(variables), DEADLINE_S, date, add_generation_prompt], *conversations):
            orders.write(json.dumps(order).encode() + b"\n")
        orders.seek(0)
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, json.dumps([os.path.abspath(entry) for entry in sys.path])],
            stdin=orders,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C is the caller's
        ) as process:
            try:
                answers = _answers(process)
                next(answers)  # it has started
                return [_text(next(answers)) for _ in conversations]
            finally:
                process.kill()


def _answers(process: subprocess.Popen) -> Iterator[bytes]:
    """The lines that the process says, each within its time."""
    assert process.stdout is not None
    heard = select.poll()
    heard.register(process.stdout, select.POLLIN)
    limit, begun = START_S, b""
    while True:
        deadline, parts = time.monotonic() + limit, [begun]
        while b"\n" not in parts[-1]:
            if not heard.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TemplateError(f"no result within {limit:g} s")
            parts.append(os.read(process.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                raise TemplateError(f"its process ended with status {process.wait()}")
        line, _, begun = b"".join(parts).partition(b"\n")
        limit = DEADLINE_S
        yield line


def _text(answer: bytes) -> str:
    text, error = json.loads(answer)
    if error is not None:
        raise TemplateError(error)
    return text


def work() -> None:
    """The life of the process: reads a template, its variables and a deadline, then conversations; says so once, then texts."""
    with open(os.dup(1), "wb") as out, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 1)  # whatever a library may print
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the caller's disposition and mask are inherited
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        from transformers.utils import chat_template_utils

        with contextlib.suppress(ValueError, OSError):  # where there is no /proc, or a lower limit already
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        _say(out, b"ready")
        template, variables, deadline_s, date, add_generation_prompt = json.loads(sys.stdin.buffer.readline())

        class FixedDate(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(date)

        chat_template_utils.datetime = FixedDate  # type: ignore[misc]  # of strftime_now
        for line in sys.stdin.buffer:
            signal.setitimer(signal.ITIMER_REAL, deadline_s + _ALARM_S)  # the caller decides; this is for one that is gone
            try:
                texts: Any = chat_template_utils.render_jinja_template(
                    [json.loads(line)], chat_template=template, add_generation_prompt=add_generation_prompt, **variables
                )[0]
                text = texts[0]
                if len(text) > MAX_CHARS:
                    raise ValueError(f"a text of {len(text):,} characters")
                answer = json.dumps([text, None])
            except Exception as e:  # a template is a program: it may raise anything
                answer = json.dumps([None, " ".join(str(e).split())[:200] or type(e).__name__])
            _say(out, answer.encode())


def _say(out: BinaryIO, line: bytes) -> None:
    out.write(line + b"\n")
    out.flush()
