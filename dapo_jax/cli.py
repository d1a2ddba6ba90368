"""Exit statuses and shared flags of the verbs, and the `dapo-jax VERB ...` console script."""

import argparse
import difflib
import errno
import importlib
import inspect
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from dapo_jax import __version__
from dapo_jax.config import printable
from dapo_jax.runtime import multihost
from dapo_jax.runtime.compile_cache import use_compilation_cache
from dapo_jax.runtime.console import escaped_output
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.guard import signals_end
from dapo_jax.types import InputError, NoCheckpointError, RunError, Stopped

VERBS = {
    "train": "trains a policy with DAPO, or resumes a run",
    "evaluate": "held-out accuracy of a run or of a model folder",
    "generate": "responses of a run or a model to text, a file of prompts, or in a chat",
    "compare": "two results of evaluate, paired bootstrap",
    "supervised": "only the warm-up on worked solutions, to a model folder",
    "plan": "compiles a config for a TPU pod, with no TPU: does it fit",
    "benchmark": "speed and memory of loss, rollout, update",
    "study": "ablations in miniature: rows, seeds, one table and one figure",
    "export": "a run's checkpoint as a Hugging Face folder, or to the hub",
    "report": "one HTML page about one run or several",
    "data": "prepares data sets, shows rows as they are fed, counts what they hold",
    "config": "every config field with its default and meaning",
}

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # by a disk
_LEAVE_S = 20.0  # for threads to end once the process has failed
_STATUS: Mapping[type[Exception], int] = {InputError: 2, NoCheckpointError: 3, RunError: 1}


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> None:
    """Runs a verb and exits: 0 done, 1 the run cannot continue, 2 bad input, 3 no checkpoint to
    use, 128 + n on signal n; 1 to 3 with one line on standard error."""
    with signals_end(), escaped_output():
        try:
            _check_arguments(sys.argv[1:] if argv is None else argv)
            use_compilation_cache()
            status = main(argv)
            sys.stdout.flush()
        except Stopped as e:
            _print(e)
            sys.exit(128 + e.number)  # all processes exit together
        except KeyboardInterrupt as e:
            _print(str(e) or "interrupted")
            status = 128 + getattr(e, "number", signal.SIGINT)
        except BrokenPipeError:  # `| head` closed our output
            sys.stderr.close()
            status = 0
        except Exception as e:
            what, status = _explained(e)
            if not what and not multihost.is_distributed():
                raise
            if not what:
                traceback.print_exc()
            _print(what or "ended by the error above")
        if status and multihost.is_distributed():
            multihost.leave(status)
        others = {*threading.enumerate()} - {threading.main_thread()}
        if status and not all(thread.daemon for thread in others):
            threading.Thread(target=_leave_late_threads, args=(status,), daemon=True).start()
        sys.exit(status)


def parser(verb: str, what: str | None, *examples: str) -> argparse.ArgumentParser:
    """The argument parser of a verb. examples: arguments, for the end of its `--help`."""
    lines = [f"  python -m dapo_jax.{verb} {example}" for example in examples]
    return argparse.ArgumentParser(
        prog=f"python -m dapo_jax.{verb}",
        description=inspect.cleandoc(what or ""),
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(
    parser: Any, what: str, override: str, quiet: str = "", *, required: bool = False
) -> None:
    """Adds --config, --set and, with the words for what is still printed, --quiet."""
    parser.add_argument("--config", required=required, help=f"YAML config{what}")
    text = f"override, e.g. {override}; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    if quiet:
        parser.add_argument("--quiet", action="store_true", help=f"only {quiet}")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    what = "the checkpoint of this rollout step (default: the newest)"
    which.add_argument("--step", type=int, metavar="N", help=what)
    best = "the checkpoint with the highest held-out accuracy (see train.keep_best)"
    which.add_argument("--best", action="store_true", help=best)


def _explained(e: Exception) -> tuple[str, int]:
    """The line for an error, empty for a bug, and the exit status."""
    for kind, status in _STATUS.items():
        if isinstance(e, kind):
            return str(e), status
    if out_of_memory(e):
        return (
            f"out of memory ({reason(e)}); lower rollout.decode_slots (sampling) or "
            "train.rows_per_microbatch (updates), set model.remat: full, or use more devices; "
            "`python -m dapo_jax.plan` computes what fits a TPU"
        ), 2
    if why := no_device(e):
        return why, 2
    if isinstance(e, OSError) and e.errno in _REFUSED:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # stdout may be what is full, and is flushed
        fix = "free the disk, then start the same command again"
        return f"{e.filename or 'output'}: cannot be written ({e.strerror}); {fix}", 2
    return "", 1


def _leave_late_threads(status: int) -> None:
    """Ends the process although threads that a library has left would hold the interpreter."""
    threading.main_thread().join()
    time.sleep(_LEAVE_S)
    os._exit(status)


def _check_arguments(argv: list[str]) -> None:
    """Refuses empty arguments: as a path one would be the current folder, or the same as none."""
    for before, argument in itertools.pairwise(["the first argument", *argv]):
        flag, _, value = argument.partition("=")
        if not argument.startswith("--"):
            flag, value = before, argument
        if argument != flag and not value.strip():
            raise InputError(f"{flag}: is empty; give a value, or leave it out")


def out_of_memory(e: Exception) -> bool:
    # A CPU calls it INTERNAL, and the compiler of a TPU says "ran out of memory".
    full = "RESOURCE_EXHAUSTED" in str(e) or "Out of memory" in str(e)
    return isinstance(e, MemoryError) or (type(e).__name__ == "JaxRuntimeError" and full)


def no_device(e: Exception) -> str | None:
    """The message if jax has no device of JAX_PLATFORMS, or does not know it; None otherwise."""
    *_, (frame, _) = traceback.walk_tb(e.__traceback__)
    in_jax = frame.f_globals.get("__name__") == "jax._src.xla_bridge"
    without_cuda = isinstance(e, AssertionError) and in_jax
    unable = isinstance(e, RuntimeError) and str(e).startswith("Unable to initialize backend")
    if not (without_cuda or unable):
        return None
    asked, said = os.environ.get("JAX_PLATFORMS", ""), f" ({reason(e)})" if str(e) else ""
    fix = "install jax for this device, or unset JAX_PLATFORMS"
    return f"JAX_PLATFORMS: is {asked!r}, but jax finds no such device{said}; {fix}"


def _print(what: object) -> None:
    where = f" {multihost.who()}:" if multihost.is_distributed() else ""
    line = printable(" ".join(str(what).split()))  # it may quote untrusted files
    print(f"dapo_jax:{where} {line}", file=sys.stderr, flush=True)


def main_of(verb: str) -> Callable[[list[str] | None], int]:
    module = importlib.import_module(f"dapo_jax.{verb}")
    if not hasattr(module, "main"):
        module = importlib.import_module(f"dapo_jax.{verb}.__main__")
    return module.main


def main() -> None:
    """`dapo-jax VERB ...` is `python -m dapo_jax.VERB ...`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "--version":
        print(f"dapo_jax {__version__}")
    elif verb in VERBS:
        run(main_of(verb), sys.argv[2:])
    else:
        wanted = verb in ("-h", "--help")
        lines = ["usage: dapo-jax VERB ...      (dapo-jax VERB --help lists its flags)", ""]
        verbs = {**VERBS, "--version": "the version of this package"}
        lines += [f"  {name:<11} {what}" for name, what in verbs.items()]
        print("\n".join(lines), file=sys.stdout if wanted else sys.stderr)
        if near := difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5):
            _print(f"{verb}: no such verb; did you mean {near[0]}?")
        sys.exit(0 if wanted else 2)
    sys.exit(0)
