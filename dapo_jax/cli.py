"""Exit statuses of every verb, and the `dapo-jax VERB ...` console script."""

import importlib
import signal
import sys
from collections.abc import Callable

from dapo_jax.types import InputError, NoCheckpointError

VERBS = ("train", "evaluate", "supervised", "plan", "benchmark", "export", "config")


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> None:
    """Runs a verb and exits: 0 done, 2 bad input in one line, 3 no usable checkpoint, 130 on Ctrl-C."""
    try:
        status = main(argv)
    except InputError as e:
        print(f"dapo_jax: {e}", file=sys.stderr)
        status = 2
    except NoCheckpointError as e:
        print(f"dapo_jax: {e}", file=sys.stderr)
        status = 3
    except KeyboardInterrupt:
        print("dapo_jax: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` closed our output
        sys.stderr.close()
        status = 0
    sys.exit(status)


def main() -> None:
    """`dapo-jax VERB ...` is `python -m dapo_jax.VERB ...`."""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        wanted = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help")
        print(f"usage: dapo-jax {{{','.join(VERBS)}}} ...   (dapo-jax VERB --help)", file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    verb = importlib.import_module(f"dapo_jax.{sys.argv[1]}")
    run(verb.main, sys.argv[2:])
