"""A model that a config names, as a folder of this machine: it is one, or lies in a bucket, or has
an id on the Hugging Face hub.

    models/qwen                           a folder that is there
    gs://bucket/models/qwen               its files are copied to the cache, `$XDG_CACHE_HOME/dapo_jax` (~/.cache/dapo_jax)
    Qwen/Qwen2.5-1.5B, or ID@REVISION     downloaded by huggingface_hub into its own cache; HF_TOKEN, HF_HOME, HF_HUB_OFFLINE are heeded

Every process fetches for its own machine, and only the files that are asked for by name: no code is
among them. Processes of one machine wait for each other, so that each file is fetched once.
"""

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from dapo_jax.runtime.folder import check_bucket_folder, is_bucket, reason
from dapo_jax.types import InputError

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@\w[\w.-]*(?:/\w[\w.-]*)*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GIVE = "give the path of a model folder, gs://bucket/folder, or an id of the hub such as Qwen/Qwen2.5-1.5B"
_ACCESS = 'pip install "dapo_jax[tpu]", and let the machine list and read the bucket\'s objects'


class LocalModel(NamedTuple):
    """Where a model's files are."""

    name: str  # as it was given; an id of the hub with the commit, ID@COMMIT, which names the same files for ever
    folder: str  # on this machine


def local_model(name: str, files: Sequence[str]) -> LocalModel:
    """The model's folder on this machine, with those of the `files` (names, `*` is any text) that
    the model has.

    A folder that exists is taken as it is. Raises InputError if there is no such model, or it
    cannot be had.
    """
    if os.path.isdir(name):
        return LocalModel(name, name)
    if is_bucket(name):
        return LocalModel(name, str(_copied(name, files)))
    if is_id(name):
        return _downloaded(name, files)
    raise InputError(f"{name}: no such folder; {_GIVE}")


def is_id(name: str) -> bool:
    """Whether this is, or could be, a model of the hub."""
    return bool(_ID.fullmatch(name)) and not os.path.isdir(name)


def same_commit(asked: str, started: str | None) -> str:
    """What a run that goes on takes for `asked`: `started`, if that is a commit of the id and none
    is asked for by name.
    """
    repo, _, commit = (started or "").rpartition("@")
    return f"{repo}@{commit}" if repo == asked and _COMMIT.fullmatch(commit) else asked


# --------------------------------------------------------------------------------------------------------------------
# The hub
# --------------------------------------------------------------------------------------------------------------------


def _downloaded(name: str, files: Sequence[str]) -> LocalModel:
    import huggingface_hub  # not at the top: takes a second

    repo, _, revision = name.partition("@")
    try:
        offline = (
            huggingface_hub.constants.HF_HUB_OFFLINE
        )  # releases below 2 list a commit's files on the hub all the same
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(files), local_files_only=offline
        )
    except Exception as e:  # of huggingface_hub, its HTTP client, and the file system
        raise InputError(f"{name}: {_refusal(e, repo, revision)}") from None
    return LocalModel(
        f"{repo}@{Path(folder).name}", folder
    )  # a folder of the cache is called by its commit


def _refusal(error: Exception, repo: str, revision: str) -> str:
    """Why there is no download, and what to do.

    Errors' own texts are left out: they may quote headers, with a token in them.
    """
    from huggingface_hub import constants, errors

    download = f"download it elsewhere (`hf download {repo}`) and give the path of the folder"
    if isinstance(error, errors.GatedRepoError):
        return f"is no folder here, and gated on the hub; accept its terms on its page and set HF_TOKEN, or {download}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is neither a folder here nor a model that the hub shows; correct the spelling, set HF_TOKEN if it is private, or {_GIVE}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's {repo} has no revision {revision!r}; give a branch, tag or commit of it, or none for the newest"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"is no folder here, and not whole in the cache, while HF_HUB_OFFLINE is set; unset it, or {download}"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", "no status")
        return f"is no folder here, and the hub answers with HTTP status {status}; try again, correct HF_TOKEN if there is one, or {download}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be written to the cache of huggingface_hub ({error.strerror}); free the disk, or set HF_HOME to another place"
    return f"is no folder here, and the hub cannot be reached ({type(error.__cause__ or error).__name__}); {download}"


# --------------------------------------------------------------------------------------------------------------------
# A bucket
# --------------------------------------------------------------------------------------------------------------------


def _copied(url: str, files: Sequence[str]) -> Path:
    """Copies what is asked for and not there yet.

    Objects that change get a new folder: runs under way keep theirs.
    """
    check_bucket_folder(url, "a model folder")
    try:
        system, path = fsspec.url_to_fs(url.rstrip("/"))
        listed = {
            entry["name"].rpartition("/")[2]: entry
            for entry in system.ls(path, detail=True)
            if entry["type"] == "file"
        }
    except FileNotFoundError:
        listed = {}
    except Exception as e:  # of gcsfs, aiohttp, google-auth; ImportError without gcsfs
        raise InputError(f"{url}: cannot be listed ({reason(e)}); {_ACCESS}") from None
    if not {"config.json", "adapter_config.json"} & listed.keys():
        raise InputError(
            f"{url}: no such model folder, for it holds no config.json; correct it, or copy a Hugging Face folder there"
        )
    state = json.dumps(
        [
            url.rstrip("/"),
            sorted(
                (name, entry["size"], entry.get("generation")) for name, entry in listed.items()
            ),
        ]
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dapo_jax", "models")
    folder = cache / hashlib.sha256(state.encode()).hexdigest()[:16]
    wanted = {
        name: entry
        for name, entry in listed.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in files)
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _copy(
                system,
                {n: entry for n, entry in wanted.items() if not (folder / n).exists()},
                folder,
                url,
            )
    except OSError as e:
        raise InputError(
            f"{url}: cannot be copied to {folder} ({reason(e)}); free the disk, or set XDG_CACHE_HOME to another place"
        ) from None
    return folder


def _copy(system: Any, missing: Mapping[str, Mapping[str, Any]], folder: Path, url: str) -> None:
    """Copies objects; each file appears whole."""
    if not missing:
        return
    size = sum(entry["size"] for entry in missing.values())
    print(
        f"copying {len(missing)} files, {size / 1e9:,.2f} GB, from {url} to {folder}",
        file=sys.stderr,
        flush=True,
    )
    partial = {name: folder / f".{name}.partial" for name in missing}
    try:
        system.get(
            [missing[name]["name"] for name in missing], [str(partial[name]) for name in missing]
        )
    except OSError as e:
        if e.errno is not None:  # of the local disk
            raise
        raise InputError(f"{url}: cannot be read ({reason(e)}); {_ACCESS}") from None
    except Exception as e:
        raise InputError(f"{url}: cannot be read ({reason(e)}); {_ACCESS}") from None
    for name, file in partial.items():
        if file.stat().st_size != missing[name]["size"]:
            raise InputError(f"{url}: {name}: changed while it was copied; start again")
        os.replace(file, folder / name)
