"""One run folder, one job."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dapo_jax.runtime import multihost
from dapo_jax.types import InputError


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds `run_dir/lock` while inside; the kernel lets go of it when the process ends, however it does.

    The first process locks for all of the job. Raises InputError, on every process, if another job has the folder.
    """
    with contextlib.ExitStack() as stack:
        refusal = _lock(run_dir / "lock", stack) if multihost.is_main() else ""
        if refusal := multihost.from_main(refusal):
            raise InputError(refusal)
        yield


def _lock(path: Path, stack: contextlib.ExitStack) -> str:
    """Locks, and returns nothing; or why it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a+"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(errors="replace").strip() or "another process"
        return f"{path.parent}: is in use by {holder}; wait for that job or stop it, or give another --run-dir"
    except OSError as e:
        return f"{path.parent}: cannot be used as a run folder ({e.strerror}); give a writable folder"
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return ""
