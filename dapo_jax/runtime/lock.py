"""One run folder, one job: the file `lock` in it names the process that holds it.

On a disk it is locked by flock, which the kernel releases when the process ends. A bucket has no
locks: there it is a lease, rewritten with every heartbeat. A job that finds one waits for
`_LEASE_S`: if it changes, the folder is in use, if not, its holder is gone. No clocks are compared.
A holder that finds another's lease exits without saving; until its next heartbeat both may write.
`evaluate` and `export` read without a lock.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from dapo_jax.runtime import multihost
from dapo_jax.runtime.files import Folder, errors_as, is_bucket, read, writing
from dapo_jax.types import InputError, RunError

_BEAT_S = 5.0
_LEASE_S = 20.0  # below the 30 s that collectives on CPUs wait for the first process
_SHOWN_S = 10.0  # within which every host sees a new file of a shared folder


@contextlib.contextmanager
def locked(run_dir: Folder) -> Iterator[None]:
    """Holds `run_dir/lock` while inside; process 0 holds it for the job.

    Raises InputError, on every process, if another job has the folder, or if a process does not
    find there what process 0 has just written.
    """
    path, new, refusal = run_dir / "lock", False, ""
    mine = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n"
    with contextlib.ExitStack() as stack:
        if multihost.is_main():
            try:
                with writing(run_dir, "cannot be read"):
                    new = not run_dir.exists()
                stack.enter_context((_leased if is_bucket(path) else _flocked)(path, mine.encode()))
            except (InputError, RunError) as e:
                refusal = str(e)
        refusal, mine = json.loads(multihost.from_main(json.dumps([refusal, mine])))
        if refusal:
            raise InputError(refusal)
        if multihost.is_distributed():
            found = multihost.gather_texts("" if _shows(path, mine.encode()) else multihost.who())
            if lost := next(filter(None, found), None):
                stack.close()
                if multihost.is_main() and new and not is_bucket(path):
                    path.unlink()
                    run_dir.rmdir()
                raise InputError(
                    f"{run_dir}: {lost} cannot see the file that process 0 wrote there; a job of "
                    "several processes needs one --run-dir that all hosts reach: give "
                    "gs://bucket/folder, or a folder of a network file system"
                )
        yield


def _shows(path: Folder, content: bytes) -> bool:
    """Whether the file starts so, or will soon: a network file system may show it late."""
    until = time.monotonic() + _SHOWN_S
    while True:
        # An NFS client may hold for a minute that a file it has looked for is missing (acdirmax,
        # lookupcache of nfs(5)), but asks the server when the folders above are opened.
        for folder in () if is_bucket(path) else reversed(path.parents):
            with contextlib.suppress(OSError):
                os.scandir(folder).close()
        with contextlib.suppress(InputError, RunError):  # no access: it is not shown
            if (read(path) or b"").startswith(content):
                return True
        if time.monotonic() > until:
            return False
        time.sleep(_SHOWN_S / 50)


@contextlib.contextmanager
def _flocked(path: Folder, mine: bytes) -> Iterator[None]:
    fix = "give a writable folder with free space"
    with contextlib.ExitStack() as stack:
        with errors_as(InputError, path.parent, "cannot be used as a run folder", fix):
            path.parent.mkdir(parents=True, exist_ok=True)
            regular = path.is_file() and path.stat().st_nlink == 1
            if path.is_symlink() or path.exists() and not regular:
                raise InputError(f"{path}: is not a regular file; remove it")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(path, path.read_bytes()) from None
            os.ftruncate(file, 0)
            os.write(file, mine)
            os.fsync(file)  # other hosts read it
        yield


@contextlib.contextmanager
def _leased(path: Folder, mine: bytes) -> Iterator[None]:
    if (before := read(path)) is not None:
        what = f"held by {_holder(before)}; waiting {_LEASE_S:g} s for its heartbeat"
        print(f"{path}: {what}", file=sys.stderr, flush=True)
        time.sleep(_LEASE_S)
        if (now := read(path)) not in (None, before):
            raise _in_use(path, now or b"")
    with writing(path):
        path.write_bytes(mine)
    released = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, mine, released), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        released.set()
        beats.join(_BEAT_S)
        with contextlib.suppress(Exception):  # otherwise it expires
            if (read(path) or b"").startswith(mine):
                path.unlink()


def _beat(path: Folder, mine: bytes, released: threading.Event) -> None:
    while not released.wait(_BEAT_S):
        with contextlib.suppress(Exception):  # a bucket that does not answer is no reason to exit
            if not (read(path) or mine).startswith(mine):
                taken = "another job has taken this run over; exiting without saving"
                print(f"dapo_jax: {path.parent}: {taken}", file=sys.stderr)
                multihost.leave(2)
            path.write_bytes(mine + f"{time.time()}\n".encode())


def _in_use(path: Folder, content: bytes) -> InputError:
    return InputError(
        f"{path.parent}: is in use by {_holder(content)}; wait for that job or stop it, or give "
        "another --run-dir"
    )


def _holder(content: bytes) -> str:
    return (content.decode(errors="replace").splitlines() or [""])[0].strip() or "another process"
