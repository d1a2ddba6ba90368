"""One run folder, one job.

A local folder is locked by the kernel, which lets go when the process ends, however it does. A
bucket has no such locks. There the object `lock` names its holder and changes every few seconds
while that lives. A job that finds one waits: if it changes, the folder is in use; if it does not
for `_PATIENCE_S`, its holder is gone (killed, preempted) and the job takes it over. No clocks are
compared. A holder that was cut off and comes back finds another's name, and ends at once without
saving: up to a beat long both may have written. A checkpoint that two jobs mixed up is noticed by
its digests. Before all this, every process of a job has to find the folder that the first one
writes to: a folder of each host's own disk would be found out by the first save. Reading
(`evaluate`, `export`) asks for no lock.
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
from dapo_jax.runtime.files import Folder, is_bucket, read, reason, write_whole, writing
from dapo_jax.types import InputError, RunError

_BEAT_S = 5.0
_SHOWN_S = 10.0  # within which every host sees a new file of a shared folder
_PATIENCE_S = 20.0  # below the 30 s that collectives on CPUs wait for the first process


@contextlib.contextmanager
def locked(run_dir: Folder) -> Iterator[None]:
    """Holds `run_dir/lock` while inside.

    The first process locks for all of the job. Raises InputError, on every process, if another job
    has the folder, or if the processes do not share it.
    """
    check_shared(run_dir)
    with contextlib.ExitStack() as stack:
        lock = _lease if is_bucket(run_dir) else _lock
        refusal = lock(run_dir / "lock", stack) if multihost.is_main() else ""
        if refusal := multihost.from_main(refusal):
            raise InputError(refusal)
        yield


def check_shared(run_dir: Folder) -> None:
    """Raises InputError, on every process, unless each finds in the folder what the first has just
    written there.
    """
    if not multihost.is_distributed():
        return
    nonce, refusal, made = secrets.token_hex(8), "", False
    if multihost.is_main():
        made = not run_dir.exists()
        try:
            with writing(run_dir):
                write_whole(run_dir / f"nonce-{nonce}", b"")
        except (InputError, RunError) as e:
            refusal = str(e)
    nonce, refusal = json.loads(multihost.from_main(json.dumps([nonce, refusal])))
    if refusal:
        raise InputError(refusal)
    file = run_dir / f"nonce-{nonce}"
    lost = next(
        filter(None, multihost.gather_texts("" if _appears(file) else multihost.who())), None
    )
    if multihost.is_main():
        with contextlib.suppress(Exception):  # of a bucket that lets nothing be deleted
            file.unlink()
        if lost and made and not is_bucket(run_dir):
            run_dir.rmdir()
    if lost:
        raise InputError(
            f"{run_dir}: {lost} cannot see the file that process 0 wrote there; a job of several processes needs one --run-dir that all "
            "hosts reach: give gs://bucket/folder, or a folder of a network file system"
        )


def _appears(file: Folder) -> bool:
    """Whether the file is there, or soon: a network file system may show it late."""
    until = time.monotonic() + _SHOWN_S
    while True:
        _revalidate(file)
        with contextlib.suppress(InputError, RunError):  # no access: it is not shown
            if read(file) is not None:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(_SHOWN_S / 50)


def _revalidate(file: Folder) -> None:
    """Opens the folders above the file: an NFS client may hold it for up to a minute that one it
    has looked for before is missing (acdirmax, lookupcache of nfs(5)), but asks the server when the
    folder above is opened.
    """
    if is_bucket(file):
        return
    for folder in reversed(file.parents):
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _lock(path: Folder, stack: contextlib.ExitStack) -> str:
    """Locks, and returns nothing; or why it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (
            path.is_symlink()
            or path.exists()
            and not (path.is_file() and path.stat().st_nlink == 1)
        ):
            return f"{path}: is not a regular file; remove it"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, f"{_me()}\n".encode())
    except BlockingIOError:
        return _in_use(path, path.read_bytes())
    except OSError as e:
        return f"{path.parent}: cannot be used as a run folder ({e.strerror}); give a writable folder with room"
    return ""


def _lease(path: Folder, stack: contextlib.ExitStack) -> str:
    """As `_lock`, for an object: two lines, the holder and a word that is its own, then a count of
    beats.
    """
    try:
        before, until = read(path), time.monotonic() + _PATIENCE_S
        if before is not None:
            print(
                f"{path}: left by {_holder(before)}; waiting {_PATIENCE_S:g} s for its heartbeat",
                file=sys.stderr,
                flush=True,
            )
        while before is not None and time.monotonic() < until:
            time.sleep(_BEAT_S / 5)
            now = read(path)
            if now is not None and now != before:
                return _in_use(path, now)
            before = now
        mine = f"{_me()}\n{secrets.token_hex(8)}\n".encode()
        path.write_bytes(mine)
    except Exception as e:
        return f"{path.parent}: cannot be used as a run folder ({reason(e)}); give one in a bucket that this machine may write to"
    released = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, released), name="lock", daemon=True)
    beating.start()
    stack.callback(_release, path, mine, released, beating)
    return ""


def _beat(path: Folder, mine: bytes, released: threading.Event) -> None:
    beats = 0
    while not released.wait(_BEAT_S):
        beats += 1
        with contextlib.suppress(Exception):  # a bucket that does not answer is no reason to end
            if not (read(path) or mine).startswith(mine):
                print(
                    f"dapo_jax: {path.parent}: another job has taken this run over; leaving without saving",
                    file=sys.stderr,
                )
                multihost.leave(2)
            path.write_bytes(mine + f"{beats}\n".encode())


def _release(
    path: Folder, mine: bytes, released: threading.Event, beating: threading.Thread
) -> None:
    released.set()
    beating.join(_BEAT_S)
    with contextlib.suppress(Exception):  # it will be taken for what it is
        if (read(path) or b"").startswith(mine):
            path.unlink()


def _in_use(path: Folder, content: bytes) -> str:
    return f"{path.parent}: is in use by {_holder(content)}; wait for that job or stop it, or give another --run-dir"


def _holder(content: bytes) -> str:
    return (content.decode(errors="replace").splitlines() or [""])[0].strip() or "another process"


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
