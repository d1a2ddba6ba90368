"""Files of this machine and of Google Cloud Storage: run folders, data sets, models.

An object in a bucket appears whole, replaces another at once and cannot be appended to; a folder
exists as soon as it holds something.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import fsspec
import fsspec.config
from etils import epath

from dapo_jax.config import open_regular
from dapo_jax.types import InputError, RunError

Folder: TypeAlias = Path | epath.Path
Objects: TypeAlias = Mapping[str, Mapping[str, Any]]  # gcsfs's entry by the last part of the name

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
ADAPTER = "adapter_config.json"  # of PEFT, without a whole model
DESCRIPTION_FILES = ("config.json", "generation_config.json", ADAPTER, *TOKENIZER_FILES)

_ASK_S = 30.0  # time limit of retries when a bucket is looked up
_ACCESS = (
    'pip install "etils[epath-gcs]", and give this machine access to the bucket (its objects, and '
    "storage.buckets.get on itself) and room on the local disk"
)
_MODEL = "give a model folder, gs://bucket/folder, or a hub id such as Qwen/Qwen2.5-1.5B"
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@\w[\w.-]*(?:/\w[\w.-]*)*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Tokens, signed queries, users and passwords of URLs; httpx takes a password with a / for a port.
_SECRET = re.compile(r"hf_\w+|Bearer .*|(?<=\?)\S+|(?<=//)\S*@|(?<=Invalid port: )\S+")

# gcsfs would cache listings forever, but tensorstore and other hosts write to the same folders.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it then raises


def as_path(where: str | os.PathLike[str]) -> Folder:
    return epath.Path(where) if is_bucket(where) else Path(where)


def is_bucket(where: str | os.PathLike[str]) -> bool:
    return os.fspath(where).startswith("gs://")


def check_url(url: str, use: str) -> None:
    """Raises InputError unless it is of the form gs://bucket/name, without what listings expand."""
    if not re.fullmatch(r"gs://[^/*?#\[\]]+(/+[^/*?#\[\]]+)+/*", url):
        form = "not of the form gs://bucket/name, without *?#[]"
        raise InputError(f"{url}: cannot be used as {use} ({form}); correct it")


def run_folder(where: str) -> Folder:
    """The folder that a --run-dir names. Raises InputError if it cannot be one or be reached."""
    if not is_bucket(where):
        if "://" in where:
            raise InputError(
                f"{where}: cannot be used as a run folder (not gs://); give a local folder or "
                "gs://bucket/folder"
            )
        return Path(where)
    check_url(where, "a run folder")
    path = as_path(where)
    with errors_as(InputError, where, "cannot be used as a run folder", _ACCESS):
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY

        # orbax asks too, but only on resume; and gcsfs would create a bucket that is missing.
        retry = DEFAULT_RETRY.with_timeout(_ASK_S)
        storage.Client().get_bucket(path.parts[2], retry=retry)
        path.exists()
    return path


def reason(error: BaseException) -> str:
    """The operating system's text for an error, or the first line of its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return "not found"
    line = (str(error).splitlines() or [""])[0]
    if number := re.search(r"\[os_error_code='(\d+)'\]", line):  # of tensorstore
        return os.strerror(int(number[1]))
    return line.split(" [")[0][:200] or type(error).__name__


@contextlib.contextmanager
def errors_as(kind: type[Exception], where: str | Folder, what: str, fix: str) -> Iterator[None]:
    """Raises an error of reading or writing inside as one line of `kind`."""
    try:
        yield
    except Exception as e:  # clients of buckets raise many kinds
        other = not isinstance(e, OSError) and not is_bucket(where)
        if other or isinstance(e, InputError | RunError):
            raise
        raise kind(f"{where}: {what} ({reason(e)}); {fix}") from None


def writing(path: Folder, what: str = "cannot be written") -> AbstractContextManager[None]:
    """Around a write to a run folder. Raises InputError if it fails; RunError in a bucket."""
    if is_bucket(path):
        return errors_as(RunError, path, what, "start the same command again")
    fix = "free the disk, give access or choose another --run-dir"
    return errors_as(InputError, path, what, fix)


def read(path: Folder) -> bytes | None:
    """The content, or None if there is no such file. Raises as `writing` does."""
    with writing(path, "cannot be read"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return path.read_bytes()
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises InputError if there is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    again = "download the model again"
    try:
        with open_regular(path) as file:
            tree = json.loads(file.read(), object_pairs_hook=unique)
    except OSError as e:
        fix = "give a complete Hugging Face model folder"
        raise InputError(f"{path}: cannot read ({e.strerror}); {fix}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: no valid JSON ({str(e)[:100]}); {again}") from None
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise InputError(f"{path}: expected a JSON object, got a {kind}; {again}")
    return tree


def check_result(path: str | None) -> None:
    """Raises InputError unless `write_result` may write there; call it before long work."""
    where = Path(path or ".")
    if path and (where.is_dir() or not os.access(where.parent, os.W_OK | os.X_OK)):
        raise InputError(f"{path}: cannot write; give a file in a folder that exists")


def write_result(path: str, text: str) -> None:
    """Writes a file that a flag names. Raises InputError if it cannot."""
    with errors_as(InputError, Path(path), "cannot write", "give a writable path"):
        Path(path).write_text(text, "utf-8", "backslashreplace")


def write_whole(path: Folder, content: bytes) -> None:
    """Writes a file atomically, and creates its folder. Raises as `writing` does."""
    with writing(path):
        if is_bucket(path):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)  # of a killed process, or a link to somewhere else
        try:
            with temporary.open("xb", buffering=0) as file:
                _write(file, content)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _write(file: io.FileIO, content: bytes) -> None:
    """Unbuffered: a buffer would try again later what a full disk has refused."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


class AppendFile:
    """A file that grows by lines; an object is sent whole with each. Raises as `writing` does."""

    def __init__(self, path: Folder, content: bytes):
        write_whole(path, content)
        self._path, self._content = path, content
        with writing(path):
            self._file = None if is_bucket(path) else Path(path).open("ab", buffering=0)

    def add(self, line: bytes) -> None:
        with writing(self._path):
            if self._file is None:
                self._content += line
                self._path.write_bytes(self._content)
            else:
                _write(self._file, line)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def free_name(path: Folder) -> Folder:
    """The path, with a number appended if it exists."""
    name, n = path, 1
    while name.exists():
        name, n = path.with_name(f"{path.name}-{n}"), n + 1
    return name


def remove(folder: Folder) -> None:
    """Removes a folder as far as possible."""
    if is_bucket(folder):
        with contextlib.suppress(Exception):
            epath.Path(folder).rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def upload(folder: Path, target: Folder, last: str = "") -> None:
    """Copies the files of a local folder to another one, the file named `last` at the end."""
    for file in sorted(folder.rglob("*"), key=lambda file: (file.name == last, file)):
        if file.is_file():
            copy = target / file.relative_to(folder).as_posix()
            if not is_bucket(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as content, copy.open("wb") as stream:
                shutil.copyfileobj(content, stream, 1 << 20)


def _objects(url: str) -> Objects:
    """The object of this name, or those of the folder; empty if there is neither."""
    system, path = fsspec.url_to_fs(url.rstrip("/"))
    try:
        entries = system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {Path(one["name"]).name: one for one in entries if one["type"] == "file"}


def _download(objects: Objects, folder: Path) -> None:
    """Copies objects into a folder; each file appears whole. Raises InputError if one changes."""
    system = fsspec.filesystem("gs")
    names = [one["name"] for one in objects.values()]
    partial = [folder / f".{name}.partial" for name in objects]
    system.get(names, [str(file) for file in partial])
    for file, (name, before) in zip(partial, objects.items(), strict=True):
        now = system.info(before["name"])
        same = now.get("generation") == before.get("generation")
        if not same or file.stat().st_size != before["size"]:
            again = "changed while it was read; start again when it is complete"
            raise InputError(f"gs://{before['name']}: {again}")
        os.replace(file, folder / name)


@contextlib.contextmanager
def local_copy(where: str | Folder, holds: Sequence[str] = ("*",)) -> Iterator[Path]:
    """The path itself, or while inside a local copy of an object, or of a folder's objects.

    Raises InputError if it cannot be read, or nothing in it matches `holds`.
    """
    url = os.fspath(where)
    if not is_bucket(url):
        yield Path(url)
        return
    check_url(url, "input")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, Path(url).name)
        with errors_as(InputError, url, "cannot be read", _ACCESS):
            objects = _objects(url)
            if not any(fnmatch.fnmatchcase(name, one) for name in objects for one in holds):
                what = f"holds none of {', '.join(holds)}" if objects else "no such file"
                raise InputError(f"{url}: {what}; correct the path")
            whole = [one["name"] for one in objects.values()] == [url.removeprefix("gs://")]
            if not whole:
                copy.mkdir()
            _download(objects, copy.parent if whole else copy)
        yield copy


class LocalModel(NamedTuple):
    name: str  # as given; a hub id with the commit, ID@COMMIT, which always names the same files
    folder: str  # on this machine


def local_model(name: str, files: Sequence[str] = DESCRIPTION_FILES) -> LocalModel:
    """A model as a folder of this machine, with those of the `files` (patterns) that it has.

    A folder is used as it is, gs://bucket/folder is copied to $XDG_CACHE_HOME/dapo_jax
    (~/.cache/dapo_jax), and a hub id, ID or ID@REVISION, downloaded to huggingface_hub's cache.
    Raises InputError if it cannot be had.
    """
    if os.path.isdir(name):
        return LocalModel(name, name)
    if is_bucket(name):
        return LocalModel(name, str(_cached(name, files)))
    if name.startswith("real/"):  # of the shipped configs, no id
        raise InputError(f"{name}: no such folder; `make real` fetches it")
    if is_id(name):
        return _from_hub(name, files)
    raise InputError(f"{name}: no such folder; {_MODEL}")


def is_id(name: str) -> bool:
    """Whether this may be a model of the hub."""
    return bool(_ID.fullmatch(name)) and not os.path.isdir(name)


def same_commit(asked: str, started: str | None) -> str:
    """The model of a resumed run: `started`, if that is a commit of the id `asked`."""
    repo, _, commit = (started or "").rpartition("@")
    return f"{repo}@{commit}" if repo == asked and _COMMIT.fullmatch(commit) else asked


def without_secrets(e: Exception) -> str:
    """An error of the hub on one line, without tokens."""
    return _SECRET.sub("***", " ".join(f"{type(e).__name__}: {e}".split()))[:300]


def _from_hub(name: str, files: Sequence[str]) -> LocalModel:
    from huggingface_hub import constants, snapshot_download  # not at the top: takes a second

    repo, _, revision = name.partition("@")
    offline = constants.HF_HUB_OFFLINE  # releases below 2 list a commit regardless
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=list(files), local_files_only=offline
        )
    except Exception as e:  # of huggingface_hub, its HTTP client, the file system
        why = without_secrets(e)
        fix = f"correct the name, set HF_TOKEN, or give the folder of `hf download {repo}`"
        raise InputError(f"{name}: no such folder, and no download ({why}); {fix}") from None
    return LocalModel(f"{repo}@{Path(folder).name}", folder)  # the cache's folder is the commit


def _cached(url: str, files: Sequence[str]) -> Path:
    """The cache's folder with what is asked for. Changed objects get a new folder."""
    check_url(url, "a model folder")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dapo_jax", "models")
    with errors_as(InputError, url, f"cannot be copied to {cache} (XDG_CACHE_HOME)", _ACCESS):
        objects = _objects(url)
        if not {"config.json", ADAPTER} & objects.keys():
            raise InputError(f"{url}: no such model folder, it holds no config.json; correct it")
        versions = [(name, one["size"], one.get("generation")) for name, one in objects.items()]
        state = json.dumps([url.rstrip("/"), sorted(versions)])
        folder = cache / hashlib.sha256(state.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {
                name: one
                for name, one in objects.items()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in files)
                and not (folder / name).exists()
            }
            if missing:
                size = sum(one["size"] for one in missing.values()) / 1e9
                what = f"copying {len(missing)} files, {size:,.2f} GB, from {url} to {folder}"
                print(what, file=sys.stderr, flush=True)
                _download(missing, folder)
    return folder
