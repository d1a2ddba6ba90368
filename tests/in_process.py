"""Runs of the verbs in the test process: on few devices, and equal programs are traced once.

Most of what a tiny run costs is tracing its programs anew, in every run of every test, and threads
of eight devices that wait for each other. Two runs share programs only if all that these are made
from is equal.
"""

import inspect

import jax

from dapo_jax import evaluate, supervised, train
from dapo_jax.dapo import loss, update
from dapo_jax.rollout.engine import Engine
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.training import programs, setup

DEVICES = 2  # of a run; `conftest.eight_devices` for tests of layouts
_KNOWN = {}


def forget():
    """The next run traces its programs, as in a process of its own."""
    _KNOWN.clear()


def _once(key, make):
    if key not in _KNOWN:
        _KNOWN[key] = make()
    return _KNOWN[key]


def _read_by(code, section):
    """The fields of a config section that code names: no other can change what it does."""
    source = inspect.getsource(code)
    return tuple(pair for pair in vars(section).items() if pair[0] in source)


def _train_programs(model, mesh, algo, optim, temperature):
    read = _read_by(loss, algo), _read_by(update.make_optimizer, optim)
    key = ("train", model, mesh, *read, temperature)
    return _once(key, lambda: programs.train_programs(model, mesh, algo, optim, temperature))


def _supervised_programs(model, mesh, optim):
    key = ("supervised", model, mesh, _read_by(update.make_optimizer, optim))
    return _once(key, lambda: programs.supervised_programs(model, mesh, optim))


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
