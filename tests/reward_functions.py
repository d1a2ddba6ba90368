"""Custom verifiers that behave well and badly, for tests of the reward pool.

Workers import this module by name.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

not_callable = 3


def judge(problem, text, response_len):
    """Right iff the text is the answer; `!problem` and the problem as JSON checks that, any other
    `!word` does something nasty.
    """
    command, _, rest = text.partition(" ")
    if command == "!problem":
        return json.dumps(dataclasses.asdict(problem)) == rest, 0.0
    if command == "!key":
        return os.environ["JUDGE_KEY"] == rest, 0.0
    if command == "!quote":
        raise ValueError(
            " " * len(rest) + "x" * 172 * bool(rest) + "bad key " + os.environ["JUDGE_KEY"] + "."
        )
    if text in _NASTY:
        return _NASTY[text]()
    return text == problem.answer, response_len / 10


def _environment():
    kept = [name for name in os.environ if "CANARY" in name]
    with open("/proc/self/environ", "rb") as f:
        return not kept and b"canary-value" not in f.read(), 0.0


def _print():
    while True:
        print("x" * 1000)
        print("x" * 1000, file=sys.stderr, flush=True)


def _raise():
    raise ValueError("two\nlines " + "x" * 1000)


def _allocate():
    return len(bytearray(10 * 2**30)) == 0, 0.0


def _fork_and_allocate():
    if os.fork() == 0:
        _allocate()
    return True, float(os.wait()[1])


def _child():
    os.system("sleep 1000 &")
    time.sleep(1000)


def _leave_session():
    return True, float(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid)


_NASTY = {
    "!sleep": lambda: time.sleep(1000),
    "!exit": lambda: os._exit(3),
    "!sys.exit": lambda: sys.exit(4),
    "!crash": lambda: os.kill(os.getpid(), 11),
    "!allocate": _allocate,
    "!print": _print,
    "!raise": _raise,
    "!child": _child,
    "!fork": lambda: (os.fork() >= 0, 0.0),
    "!fork and allocate": _fork_and_allocate,
    "!leave session": _leave_session,
    "!environment": _environment,
    "!jax": lambda: ("jax" not in sys.modules and "flax" not in sys.modules, 0.0),
    "!main": lambda: (not hasattr(sys.modules["__main__"], "__file__"), 0.0),
    "!pid": lambda: (True, float(os.getpid())),
    "!group": lambda: (os.getpgrp() == os.getpid(), 0.0),
    "!none": lambda: None,
    "!nan": lambda: (True, float("nan")),
    "!text": lambda: "right",
    "!length": lambda: (True, 1.0, None),
    "!number": lambda: (1, 1.0),
}


def even_sum(problem, text, response_len):
    """Right for half of all texts, whatever they say: gives mixed groups to a policy that knows
    nothing.
    """
    correct = sum(text.encode("utf-8", "replace")) % 2 == 0
    return correct, 1.0 if correct else -1.0


def raises(problem, text, response_len):
    return _raise()


def nonsense(problem, text, response_len):
    return "very good"
