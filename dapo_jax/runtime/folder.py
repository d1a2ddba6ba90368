"""Where a run lives: a folder of this machine, or gs://bucket/folder, which every host of a pod
reaches.

Both are paths with pathlib's methods. Google Cloud Storage keeps objects: one appears whole, takes
the place of another at once, and cannot be appended to; a folder is there as soon as something is
in it. So a file that grows is sent whole with every line (`AppendFile`), and a writer that knows local
files only gets a local folder, whose files are sent (`Staged`).
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dapo_jax.runtime.paths import Folder, as_path, errors, is_bucket, names_objects, reason
from dapo_jax.types import InputError, RunError

_ASK_S = 30.0  # for a bucket, again and again
_GIVE = 'pip install "dapo_jax[tpu]", and give the machine the bucket: its objects, and storage.buckets.get on itself'


def run_folder(where: str) -> Folder:
    """The folder that a --run-dir names.

    Raises InputError if it is a URL that cannot be one, or its bucket cannot be reached.
    """
    if not is_bucket(where):
        if "://" in where:
            raise InputError(
                f"{where}: cannot be used as a run folder (not gs://); give a local folder or gs://bucket/folder"
            )
        return Path(where)
    check_bucket_folder(where, "a run folder")
    path = as_path(where)
    try:
        _ask(path.parts[2])
        path.exists()
    except Exception as e:  # of google-cloud-storage, gcsfs, aiohttp, google-auth
        raise InputError(
            f"{where}: cannot be used as a run folder ({reason(e)}); {_GIVE}"
        ) from None
    return path


def check_bucket_folder(where: str, use: str) -> None:
    """Raises InputError unless it is of the form gs://bucket/folder. use: as what it was given, in
    words.
    """
    if not names_objects(where):
        raise InputError(
            f"{where}: cannot be used as {use} (not of the form gs://bucket/folder, without *?#[]); name one"
        )


def _ask(bucket: str) -> None:
    """Raises unless there is such a bucket.

    So asks orbax, but of a run that resumes only; and gcsfs would make one that is missing.
    """
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    storage.Client().get_bucket(bucket, retry=DEFAULT_RETRY.with_timeout(_ASK_S))


@contextlib.contextmanager
def writing(path: Folder) -> Iterator[None]:
    """Around a write, and no more.

    Raises InputError if it fails; RunError in a bucket, which may answer in a minute.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except errors(path) as e:
        if is_bucket(path):
            raise RunError(
                f"{path}: cannot be written ({reason(e)}); start the same command again"
            ) from None
        raise InputError(
            f"{path}: cannot be written ({reason(e)}); free the disk or choose another --run-dir"
        ) from None


def read(path: Folder) -> bytes | None:
    """The content, or None where there is no such file.

    Raises InputError if it cannot be read, RunError in a bucket.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except errors(path) as e:
        if is_bucket(path):
            raise RunError(
                f"{path}: cannot be read ({reason(e)}); start the same command again"
            ) from None
        raise InputError(f"{path}: cannot be read ({reason(e)}); give access") from None


def write_result(path: str, text: str) -> None:
    """Writes a file that a flag names. Raises InputError if it cannot."""
    try:
        Path(path).write_text(text)
    except OSError as e:
        raise InputError(f"{path}: cannot write ({e.strerror}); give a writable path") from None


def write_whole(path: Folder, content: bytes) -> None:
    """Writes a file that is there whole or not at all, and its folder."""
    if is_bucket(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed, or a link to somewhere else
    try:
        with _open(temporary, os.O_CREAT | os.O_EXCL) as file:
            _write(file, content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _open(path: Folder, flags: int) -> io.FileIO:
    """Opens a file for writing, and no link; unbuffered, so that what a full disk refuses is not
    tried again later.
    """
    return io.FileIO(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666), "wb")


def _write(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def free_name(path: Folder) -> Folder:
    """The path, or with a number behind it where there is something already."""
    name, n = path, 1
    while name.exists():
        name, n = path.with_name(f"{path.name}-{n}"), n + 1
    return name


def remove(folder: Folder) -> None:
    """Removes a folder as far as it can be."""
    if is_bucket(folder):
        with contextlib.suppress(Exception):
            epath.Path(folder).rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def local_file(path: Folder) -> Iterator[Path]:
    """The file itself, or a local copy of an object while inside."""
    if not is_bucket(path):
        yield Path(path)
        return
    content = read(path)
    if content is None:
        raise InputError(f"{path}: no such object; give the --run-dir of a run")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(content)
        yield copy


class AppendFile:
    """A file that starts with `content` and grows by lines; an object is sent whole with each of
    them.
    """

    def __init__(self, path: Folder, content: bytes):
        write_whole(path, content)
        self._path, self._content = path, content
        self._file = None if is_bucket(path) else _open(path, os.O_APPEND)

    def add(self, line: bytes) -> None:
        if self._file is None:
            self._content += line
            self._path.write_bytes(self._content)
        else:
            _write(self._file, line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Staged:
    """A folder for writers of local files.

    They write to `local`, which is the folder itself or stands in for one in a bucket.
    """

    def __init__(self, folder: Folder):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if is_bucket(folder) else None
        self.local = Path(self._temporary.name) if self._temporary else Path(folder)

    def send(self) -> None:
        """Sends every file, as it is at the moment."""
        if self._temporary:
            for file in sorted(self.local.rglob("*")):
                if file.is_file():
                    (self._folder / file.relative_to(self.local).as_posix()).write_bytes(
                        file.read_bytes()
                    )

    def close(self) -> None:
        if self._temporary:
            self._temporary.cleanup()
