"""Runs of one test process share their jitted programs: equal ones are traced once.

Most of what a tiny run costs is tracing its programs anew, in every run of every test. Two runs
share programs only if all that these are made from is equal.
"""

import inspect

from dapo_jax import supervised, train
from dapo_jax.dapo import loss, update
from dapo_jax.rollout.engine import Engine
from dapo_jax.training import programs, setup

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


def train_programs(model, mesh, algo, optim, temperature):
    read = _read_by(loss, algo), _read_by(update.make_optimizer, optim)
    key = ("train", model, mesh, *read, temperature)
    return _once(key, lambda: programs.train_programs(model, mesh, algo, optim, temperature))


def supervised_programs(model, mesh, optim):
    key = ("supervised", model, mesh, _read_by(update.make_optimizer, optim))
    return _once(key, lambda: programs.supervised_programs(model, mesh, optim))


class EngineOfKnownPrograms(Engine):
    def _programs(self, *made_from):
        sizes = {name: str(value) for name, value in vars(self).items() if name != "fetch"}
        key = ("engine", made_from, *sorted(sizes.items()))
        return _once(key, lambda: super(EngineOfKnownPrograms, self)._programs(*made_from))


def install():
    """For runs through the verbs. Programs that a test makes itself are its own."""
    train.train_programs = train_programs
    supervised.supervised_programs = supervised_programs
    setup.Engine = EngineOfKnownPrograms
