"""The console script, `--help` of every verb, and exit statuses."""

import importlib
import sys

import pytest

import dapo_jax
from dapo_jax import cli
from dapo_jax.types import InputError, NoCheckpointError


def status_of(main) -> int:
    with pytest.raises(SystemExit) as done:
        cli.run(main, [])
    return done.value.code


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, said",
    [
        (InputError("x.yaml: a: wrong"), 2, "dapo_jax: x.yaml: a: wrong\n"),
        (NoCheckpointError("run: none"), 3, "dapo_jax: run: none\n"),
        (KeyboardInterrupt(), 130, "dapo_jax: interrupted\n"),
    ],
)
def test_errors_are_one_line_and_a_status(capsys, error, status, said):
    assert status_of(raising(error)) == status
    assert capsys.readouterr().err == said


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(raising(ZeroDivisionError()), [])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(monkeypatch, capsys, verb):
    monkeypatch.setattr(sys, "argv", ["dapo-jax", verb, "--help"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    assert "usage" in capsys.readouterr().out
    assert importlib.import_module(f"dapo_jax.{verb}").main.__doc__


@pytest.mark.parametrize("argv, status", [([], 2), (["nothing"], 2), (["--help"], 0), (["--version"], 0)])
def test_usage(monkeypatch, capsys, argv, status):
    monkeypatch.setattr(sys, "argv", ["dapo-jax", *argv])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == status
    said = capsys.readouterr()
    if argv == ["--version"]:
        assert said.out == f"dapo_jax {dapo_jax.__version__}\n"
    else:
        assert all(f"  {verb} " in (said.err if status else said.out) for verb in cli.VERBS)
