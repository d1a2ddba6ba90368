"""The console script, `--help` of every verb, and exit statuses."""

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from refusals import refusal

import dapo_jax
from dapo_jax import cli
from dapo_jax.types import InputError, NoCheckpointError

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_is_anything_to_save_is_one_line_and_a_status(capsys, number):
    before, removed = signal.getsignal(number), []

    def main(argv):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            removed.append("what was half written")

    assert status_of(main) == 128 + number and removed
    assert capsys.readouterr().err == f"dapo_jax: interrupted by {number.name}\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    "error, reason",
    [
        (MemoryError(), ""),
        # as a GPU, the compiler of a TPU and a CPU say it
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
            ),
            "9 bytes",
        ),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.7G hbm."
            ),
            "20.1G",
        ),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: Error dispatching computation: Out of memory allocating 29491200000 bytes."
            ),
            "29491200000",
        ),
    ],
    ids=["host", "gpu", "tpu", "cpu"],
)
def test_out_of_memory_says_what_to_lower(capsys, error, reason):
    assert status_of(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith("dapo_jax: out of memory (") and said.count("\n") == 1 and reason in said
    assert "lower rollout.decode_slots (sampling) or train.rows_per_microbatch (updates)" in said


@pytest.mark.default("cuda-*")
@pytest.mark.parametrize(
    "platforms, first", [("cuda", "jax.devices()"), ("cudda", "jax.jit(lambda x: x)(1)")]
)
def test_devices_that_jax_does_not_have_are_named(platforms, first):
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("jax has CUDA here")
    script = f"import jax; from dapo_jax import cli; cli.run(lambda argv: {first})"
    environment = os.environ | {"JAX_PLATFORMS": platforms}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"dapo_jax: JAX_PLATFORMS: is '{platforms}', but jax finds no such device"
    )
    assert done.stderr.endswith("; install jax for this device, or unset JAX_PLATFORMS\n")


@pytest.mark.parametrize(
    "argv", [["--run-dir", ""], ["--config", "c.yaml", "--run-dir", " "], ["--run-dir="]]
)
def test_an_empty_argument_is_no_folder(capsys, argv):
    with pytest.raises(SystemExit) as done:
        cli.run(lambda argv: 0, argv)
    assert done.value.code == 2
    assert (
        capsys.readouterr().err == "dapo_jax: --run-dir: is empty; give a value, or leave it out\n"
    )


def test_empty_values_of_other_kinds_are_left_to_the_verb(capsys):
    with pytest.raises(SystemExit) as done:
        cli.run(lambda argv: 0, ["--quiet", "--set", "data.template=", "x"])
    assert done.value.code == 0


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")],
    ids=["python", "jax"],
)
def test_a_bug_is_not_hidden(error):
    with pytest.raises(type(error)):
        cli.run(raising(error), [])


@pytest.mark.slow
def test_output_that_a_full_disk_refuses_is_one_line():
    """Written when a verb prints, or only when it ends."""
    if not os.path.exists("/dev/full"):
        pytest.skip("the system has no full device")
    for printed in ("print('x', flush=True)", "print('x')"):
        code = f"from dapo_jax import cli\ndef main(argv):\n    {printed}\n    return 0\ncli.run(main, [])"
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
        assert done.returncode == 2
        assert done.stderr == (
            "dapo_jax: output: cannot be written (No space left on device); free the disk, then start the same command again\n"
        )


@pytest.mark.slow
def test_a_thread_that_a_library_has_left_does_not_hold_a_failed_process():
    code = """
import threading, time
from dapo_jax import cli
from dapo_jax.types import InputError
cli._LEAVE_S = 0.2
def main(argv):
    threading.Thread(target=time.sleep, args=(100,)).start()
    raise InputError("x.yaml: a: wrong")
cli.run(main, [])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )
    assert (done.returncode, done.stderr) == (2, "dapo_jax: x.yaml: a: wrong\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(monkeypatch, capsys, verb):
    monkeypatch.setattr(sys, "argv", ["dapo-jax", verb, "--help"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "usage" in said and f"examples:\n  python -m dapo_jax.{verb} " in said
    assert cli.main_of(verb).__doc__


@pytest.mark.parametrize(
    "argv, status", [([], 2), (["nothing"], 2), (["--help"], 0), (["--version"], 0)]
)
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


@pytest.mark.default("trian-*")
@pytest.mark.parametrize("typed, near", [("trian", "train"), ("eval", "evaluate")])
def test_a_mistyped_verb_gets_the_nearest_one(typed, near):
    command = [sys.executable, "-m", "dapo_jax", typed]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    last = f"dapo_jax: {typed}: no such verb; did you mean {near}?"
    assert done.stderr.splitlines()[-1] == last


def test_a_python_without_jax_is_told_what_to_activate():
    """`python -m` prints one line; the package itself, whose data readers need no jax, imports."""
    block = "import sys, importlib.util as u; u.find_spec = lambda name: None; sys.argv = [{!r}]; import dapo_jax"
    for argv, status in (("-m", 2), ("x.py", 0)):
        command = [sys.executable, "-c", block.format(argv)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
        said = [
            "has no jax; run `source .venv/bin/activate`" in x for x in done.stderr.splitlines()
        ]
        assert (done.returncode, said) == (status, [True] if status else [])


@pytest.mark.parametrize(
    "key, first",
    [
        ("optim.grad_clip", "grad_clip: 1.0 "),
        ("mesh", "mesh:  # devices"),
        ("model.lora.rank", "# rank: 16 "),
        ("eval.sets", "sets: {} "),
    ],
)
def test_a_config_key_is_explained(capsys, key, first):
    from dapo_jax.config import __main__ as config

    assert config.main([key]) == 0
    assert capsys.readouterr().out.startswith(first)


def test_an_unknown_config_key_gets_the_nearest_ones():
    from dapo_jax.config import __main__ as config

    with refusal("optim.lerning_rate: ...optim.learning_rate"):
        config.main(["optim.lerning_rate"])


def test_shipped_configs_are_listed_with_their_headers(capsys):
    from dapo_jax.config import __main__ as config

    assert config.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert lines[::2] == [f"configs/{file.name}" for file in files]
    assert all(len(line.strip()) > 20 for line in lines[1::2])


@pytest.mark.slow
def test_signals_of_a_verb_that_has_ended_end_nothing_else():
    """A process that continues after two verbs: one was signalled while it started, one where its
    guard heeds signals.
    """
    script = """
import os, signal, time
from dapo_jax import cli
from dapo_jax.runtime import guard
guard._UNWIND_S = 0.5

def starting(argv):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        time.sleep(0.2)

def running(argv):
    with guard.Guard(None) as g:
        g.reach("a")
        os.kill(os.getpid(), signal.SIGTERM)
        g.reach("b")

for verb in (starting, running):
    try:
        cli.run(verb, [])
    except SystemExit as e:
        print(e.code, flush=True)
time.sleep(1)
print("alive", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.split()) == (0, ["143", "143", "alive"]), done.stderr
