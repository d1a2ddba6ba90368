"""Exit statuses of every verb, and the `dapo-jax VERB ...` console script."""

import errno
import importlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable

from dapo_jax import __version__
from dapo_jax.config import printable
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import escaped_output
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.guard import signals_end
from dapo_jax.types import InputError, NoCheckpointError, RunError, Stopped

VERBS = {
    "train": "trains a policy with DAPO, or goes on with a run",
    "evaluate": "held-out accuracy of a run or of a model folder",
    "compare": "two results of evaluate, paired bootstrap",
    "supervised": "only the warm-up on worked solutions, to a model folder",
    "plan": "compiles a config for a TPU pod, with no TPU: does it fit",
    "benchmark": "speed and memory of loss, rollout, update",
    "study": "the paper's ablation in miniature: rows, seeds, one table and one figure",
    "export": "a run's newest checkpoint as a Hugging Face folder",
    "report": "one HTML page about one run or several",
    "data": "prepares data sets, and says what is in them",
    "config": "every config field with its default and meaning",
}

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # by a disk
_LEAVE_S = 20.0  # that threads may take to end once the process has failed


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> None:
    """Runs a verb and exits: 0 done, 1 the run cannot go on, 2 bad input in one line, 3 no usable
    checkpoint, 128 + n on signal n.
    """
    with signals_end(), escaped_output():
        _run(main, argv)


def _run(main: Callable[[list[str] | None], int], argv: list[str] | None) -> typing.NoReturn:
    try:
        _check_arguments(sys.argv[1:] if argv is None else argv)
        status = main(argv)
        sys.stdout.flush()
    except InputError as e:
        status = _info(e, 2)
    except NoCheckpointError as e:
        status = _info(e, 3)
    except RunError as e:
        status = _info(e, 1)
    except Stopped as e:
        _info(e, 0)
        sys.exit(128 + e.number)  # all processes leave together
    except KeyboardInterrupt as e:
        status = _info(str(e) or "interrupted", 128 + getattr(e, "number", signal.SIGINT))
    except BrokenPipeError:  # `| head` closed our output
        sys.stderr.close()
        status = 0
    except Exception as e:
        if out_of_memory(e):
            what = f"out of memory ({reason(e)}); lower rollout.decode_slots (sampling) or train.rows_per_microbatch (updates)"
            status = _info(
                f"{what}, set model.remat: full, or use more devices; `python -m dapo_jax.plan` says what fits a TPU",
                2,
            )
        elif why := no_device(e):
            status = _info(why, 2)
        elif isinstance(e, OSError) and e.errno in _REFUSED:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 1
            )  # what it refused may be the output, and is written again at the end
            status = _info(
                f"{e.filename or 'output'}: cannot be written ({e.strerror}); free the disk, then start the same command again",
                2,
            )
        elif multihost.is_distributed():
            traceback.print_exc()
            status = _info("ended by the error above", 1)
        else:
            raise
    if status and multihost.is_distributed():
        multihost.leave(status)
    if status and any(
        not thread.daemon
        for thread in threading.enumerate()
        if thread is not threading.main_thread()
    ):
        threading.Thread(target=_leave_late_threads, args=(status,), daemon=True).start()
    sys.exit(status)


def _leave_late_threads(status: int) -> None:
    """Ends the process although threads that some library has left would hold the interpreter."""
    threading.main_thread().join()
    time.sleep(_LEAVE_S)
    os._exit(status)


def _check_arguments(argv: list[str]) -> None:
    """No argument of any verb may be empty: as a path it would be the current folder, or the same
    as none.
    """
    for before, argument in itertools.pairwise(["the first argument", *argv]):
        flag, _, value = (
            argument.partition("=") if argument.startswith("--") else (before, "", argument)
        )
        if argument != flag and not value.strip():
            raise InputError(f"{flag}: is empty; give a value, or leave it out")


def out_of_memory(e: Exception) -> bool:
    """Whether a device, or the host, had not as much memory as was asked for."""
    # By name: what runs before a verb does not import jax. A CPU calls it INTERNAL, and the
    # compiler of a TPU says "ran out of memory".
    from_jax = type(e).__name__ == "JaxRuntimeError" and any(
        words in str(e) for words in ("RESOURCE_EXHAUSTED", "Out of memory")
    )
    return isinstance(e, MemoryError) or from_jax


def no_device(e: Exception) -> str | None:
    """What to say where jax has no device of the kinds in JAX_PLATFORMS, or does not know them;
    None for any other error.
    """
    *_, (frame, _) = traceback.walk_tb(e.__traceback__)
    failed = (
        isinstance(e, AssertionError) and frame.f_globals.get("__name__") == "jax._src.xla_bridge"
    )  # where CUDA is missing
    if not failed and not (
        isinstance(e, RuntimeError) and str(e).startswith("Unable to initialize backend")
    ):
        return None
    asked = os.environ.get("JAX_PLATFORMS", "")
    said = f" ({reason(e)})" if str(e) else ""
    return f"JAX_PLATFORMS: is {asked!r}, but jax finds no such device{said}; install jax for this device, or unset JAX_PLATFORMS"


def _info(what: object, status: int) -> int:
    where = f" {multihost.who()}:" if multihost.is_distributed() else ""
    line = printable(" ".join(str(what).split()))  # it may quote files that anyone wrote
    print(f"dapo_jax:{where} {line}", file=sys.stderr, flush=True)
    return status


def main() -> None:
    """`dapo-jax VERB ...` is `python -m dapo_jax.VERB ...`."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "--version":
        print(f"dapo_jax {__version__}")
        sys.exit(0)
    if verb not in VERBS:
        lines = ["usage: dapo-jax VERB ...      (dapo-jax VERB --help says more)", ""]
        lines += [
            f"  {name:<11} {what}"
            for name, what in {**VERBS, "--version": "the version of this package"}.items()
        ]
        wanted = verb in ("-h", "--help")
        print("\n".join(lines), file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    run(importlib.import_module(f"dapo_jax.{verb}").main, sys.argv[2:])
