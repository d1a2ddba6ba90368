"""Faults at places that a run reaches (`Guard.reach`), for tests of fault tolerance.

A plan such as "update:3=kill, rollout:7=raise@1": SIGKILL at the third `update`; an exception at
the seventh `rollout` of process 1. Actions: the signals `term`, `int` and `kill`, `raise`, `hang`.

python tests/faults.py PLAN MODULE ...      python -m MODULE ..., with these faults
"""

import os
import re
import runpy
import signal
import sys
import time
from collections import Counter

from dapo_jax.runtime.guard import Guard

_NOTE = Guard._note


class InjectedFault(RuntimeError):
    pass


def inject(plan, patch=setattr):
    """Makes every Guard act on a plan, which may be empty. patch: e.g. monkeypatch.setattr."""
    actions, seen = {}, Counter()
    for entry in filter(None, plan.split(", ")):
        place, count, action, process = re.fullmatch(r"(.+):(\d+)=(\w+)(?:@(\d+))?", entry).groups()
        if process in (None, os.environ.get("JAX_PROCESS_ID", "0")):
            actions[place, int(count)] = action

    def note(guard, place):
        _NOTE(guard, place)
        seen[place] += 1
        action = actions.get((place, seen[place]))
        if action == "raise":
            raise InjectedFault(f"injected at {place}")
        while action == "hang":
            time.sleep(60)
        if action:
            os.kill(os.getpid(), getattr(signal, f"SIG{action.upper()}"))

    patch(Guard, "_note", note)


def keep_programs():
    """Makes every process of a job keep what it compiles. jax leaves that to process 0, whose
    programs have keys on CPUs that are no other process's: the others compiled in every job."""
    from jax._src import compiler, distributed

    write = compiler._cache_write

    def write_too(*args):
        state = distributed.global_state
        own, state.process_id = state.process_id, 0
        try:
            write(*args)
        finally:
            state.process_id = own

    compiler._cache_write = write_too


if __name__ == "__main__":
    plan, module = sys.argv[1:3]
    del sys.argv[:2]
    inject(plan)
    keep_programs()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
