"""Runs of the verbs in the test process: on few devices, and equal programs are traced once.

Most of what a tiny run costs is tracing its programs anew, in every run of every test, and threads
of eight devices that wait for each other. Two runs share programs only if all that these are made
from is equal.
"""

import jax

from dapo_jax import evaluate, supervised, train
from dapo_jax.rollout.engine import Engine
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training import programs, setup

DEVICES = 2  # of a run; `conftest.eight_devices` for tests of layouts
_KNOWN = {}


def _once(key, make):
    if key not in _KNOWN:
        _KNOWN[key] = make()
    return _KNOWN[key]


def _train_programs(*made_from):
    return _once(("train", *made_from), lambda: programs.train_programs(*made_from))


def _supervised_programs(*made_from):
    return _once(("supervised", *made_from), lambda: programs.supervised_programs(*made_from))


class _Engine(Engine):
    def _programs(self, *made_from):
        sizes = {name: str(value) for name, value in vars(self).items() if name != "fetch"}
        key = ("engine", made_from, *sorted(sizes.items()))
        return _once(key, lambda: super(_Engine, self)._programs(*made_from))


def install():
    """For the verbs. Meshes and programs that a test makes itself are its own."""
    for verb in (train, evaluate, supervised):
        verb.make_mesh = lambda section: make_mesh(section, jax.devices()[:DEVICES])
    train.train_programs = _train_programs
    supervised.supervised_programs = _supervised_programs
    setup.Engine = _Engine
