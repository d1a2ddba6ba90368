"""Faults on demand, for tests of what a run survives.

Nothing here acts unless DAPO_JAX_FAULTS is set.

DAPO_JAX_FAULTS="update:3=kill, rollout:7=raise@1"    SIGKILL at the third `update`; an exception at the seventh `rollout` of process 1

Actions: `term` and `int` send this process the signal, `kill` ends it without a word, `raise`
raises, `hang` sleeps for ever.
"""

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping

from dapo_jax.types import InputError

VARIABLE = "DAPO_JAX_FAULTS"


class InjectedFault(RuntimeError):
    """The exception of the action `raise`."""


class Faults:
    """Counts how often each place is reached, and acts where `plan` says so. process: index of this
    process.
    """

    def __init__(self, plan: str, process: int):
        self._actions: dict[tuple[str, int], str] = {}
        self._seen: Counter[str] = Counter()
        for entry in filter(None, re.split(r"\s*,\s*", plan.strip())):
            found = re.fullmatch(r"([a-z-]+):(\d+)=([a-z]+)(?:@(\d+))?", entry)
            if not found or found[3] not in _ACTIONS:
                form = f"PLACE:COUNT=ACTION[@PROCESS] with ACTION of {', '.join(_ACTIONS)}"
                raise InputError(
                    f"{VARIABLE}: {entry!r} is not {form}; correct it, or unset the variable"
                )
            if found[4] is None or int(found[4]) == process:
                self._actions[found[1], int(found[2])] = found[3]

    def reach(self, place: str) -> None:
        """Counts the place, and acts if this is the time."""
        self._seen[place] += 1
        if action := self._actions.get((place, self._seen[place])):
            _ACTIONS[action](place)


def from_environment(process: int) -> Callable[[str], None]:
    """`Faults.reach` of the environment's plan; where there is none, a function that does nothing."""
    plan = os.environ.get(VARIABLE)
    return Faults(plan, process).reach if plan else lambda place: None


def _raise(place: str) -> None:
    raise InjectedFault(f"injected at {place}")


def _hang(place: str) -> None:
    while True:
        time.sleep(60)


_ACTIONS: Mapping[str, Callable[[str], None]] = {
    "term": lambda place: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda place: os.kill(os.getpid(), signal.SIGINT),
    "kill": lambda place: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "hang": _hang,
}
