"""Data sets in Google Cloud Storage: copied to this machine while they are read, and from it when
they are prepared.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dapo_jax.data.files import ENDINGS
from dapo_jax.runtime.paths import is_bucket, names_objects, reason
from dapo_jax.types import InputError

_SHARDS = tuple(ending for ending in ENDINGS if ending != ".json")
_INFO = "dataset_info.json"  # is in every folder that tensorflow-datasets prepared
_CHUNK = 1 << 20  # bytes
_GIVE = 'pip install "dapo_jax[tpu]", and give the machine the bucket'


@contextlib.contextmanager
def local_copy(source: str) -> Iterator[str]:
    """The path of a data set's file or folder on this machine: itself, or for gs://bucket/... a
    copy that is there while inside.

    Raises InputError if there is no such object, or it cannot be fetched.
    """
    if not is_bucket(source):
        yield source
        return
    check_name(source)
    with tempfile.TemporaryDirectory() as temporary:
        path = epath.Path(source)
        copy = Path(temporary, path.name)
        with _talking(source, "read"):
            if source.endswith(ENDINGS):
                _fetch(path, copy)
            else:
                parts = [*path.iterdir()] if path.is_dir() else []
                if not any(part.name == _INFO or part.name.endswith(_SHARDS) for part in parts):
                    raise InputError(
                        f"{source}: ends in none of {', '.join(ENDINGS)}, and holds no {_INFO}; give a file or a folder of them"
                    )
                copy.mkdir()
                for part in parts:
                    _fetch(part, copy / part.name)
        yield str(copy)


def send(folder: Path, target: str) -> None:
    """Copies the files of a prepared folder to gs://bucket/folder, dataset_info.json last.

    Raises InputError if it cannot.
    """
    with _talking(target, "written"):
        if (epath.Path(target) / _INFO).exists():
            raise InputError(
                f"{target}: already holds a prepared data set; remove it or choose another folder"
            )
        for file in sorted(folder.iterdir(), key=lambda file: file.name == _INFO):
            with file.open("rb") as content, (epath.Path(target) / file.name).open("wb") as stream:
                shutil.copyfileobj(content, stream, _CHUNK)


def check_name(where: str) -> None:
    """Raises InputError for a gs:// URL that can name neither a file nor a folder."""
    if not names_objects(where):
        raise InputError(
            f"{where}: not of the form gs://bucket/name, without *?#[]; correct the URL"
        )


def _fetch(path: epath.Path, copy: Path) -> None:
    before = path.stat()
    with path.open("rb") as stream, copy.open("wb") as content:
        shutil.copyfileobj(stream, content, _CHUNK)
    if path.stat() != before or copy.stat().st_size != before.length:
        raise InputError(f"{path}: changed while it was read; start again when it is complete")


@contextlib.contextmanager
def _talking(where: str, done: str) -> Iterator[None]:
    """Around what a bucket is asked.

    Raises InputError for the many kinds of errors that its clients raise.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; correct the path") from None
    except Exception as e:
        raise InputError(f"{where}: cannot be {done} ({reason(e)}); {_GIVE}") from None
