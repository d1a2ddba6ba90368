"""Checkpoints: atomic folders with all that a run needs to resume. Nothing unverified is loaded.

    checkpoints/<name>/params     weights, one array per leaf
                       optimizer  optimizer state and update counter, one array per leaf
                       groups     buffered and open groups, the bytes of one msgpack
                       host       JSON record: the caller's dict; kind and digest of every leaf;
                                  SHA-256 of the groups; SHA-256 of the record itself

A name is `40`, the rollout step that it completes, or `40.1`, `40.2`, ... for a later one at that
step: inside step 41, or step 40 saved again after a rollback. The newest is the highest (step,
number). The newest checkpoint and the newest `keep` whole steps are kept. A whole `0` replaces the
`0.1`, ... of the warm-up before it.

orbax leaves to its caller: stored bytes have no checksum, a failed write shows only when it is
waited for, and a target of another dtype is cast silently.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization
from jax import Array
from jax.experimental import multihost_utils

from dapo_jax.config import printable
from dapo_jax.runtime import files, multihost
from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import Folder, as_path, errors_as, is_bucket, reason
from dapo_jax.runtime.records import plain
from dapo_jax.types import (
    InputError,
    NoCheckpointError,
    Params,
    RunError,
    SharedError,
    Stopped,
    TrainState,
)

_FORMAT = 4
_NAME = re.compile(r"(0|[1-9]\d*)(\.[1-9]\d*)?", re.ASCII)
_COMPLETE = "commit_success.txt"  # what orbax writes last
_RECORD = PurePath("host") / "metadata"  # where orbax's JSON handler writes
_OTHER = "resume with the dapo_jax that wrote it, or start over in another --run-dir"
_EXIT_S = 20.0  # that a failed multi-process job waits for a write: a peer may have died
_T = TypeVar("_T")
_Dict = Mapping[str, Any]


class Restored(NamedTuple):
    path: Folder
    step: int  # rollout step after which it was saved
    state: Any  # a TrainState with the requested shardings
    host: dict[str, Any]
    groups: dict[str, Any]


class _Unusable(Exception):
    """Why a checkpoint cannot be used, as part of a message."""


class Checkpoints:
    """Context manager that saves to and restores from one folder. Every process calls every method.

    Raises InputError where the folder cannot be used; RunError in place of it for a bucket, which
    may answer in a minute. keep_also: one of the given whole steps, or None; that step is kept too.
    """

    def __init__(
        self,
        folder: str | Folder,
        *,
        keep: int,
        keep_also: Callable[[Collection[int]], int | None] = lambda steps: None,
    ):
        self._folder, self._keep, self._saved = _absolute(folder), keep, ""
        self._keep_also = keep_also
        # If a background thread created the folders and failed, others would wait for it for five
        # minutes and keep the interpreter alive.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler()
        self._writer = ocp.AsyncCheckpointer(handler, async_options=options)
        elsewhere = "choose another --run-dir"
        with errors_as(InputError, self._folder, "cannot hold checkpoints", elsewhere):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not is_bucket(self._folder) and not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            incomplete = [path for path in _stored(self._folder) if not _is_complete(path)]
            self._remove([*incomplete, *self._folder.glob("*.orbax-checkpoint-tmp")])
        multihost.sync("incomplete checkpoints removed")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        together = error is None or isinstance(error, SharedError | Stopped)
        if not together and jax.process_count() > 1:
            # Another process may have died, and a collective write waits for all.
            writing = threading.Thread(target=self._writer.wait_until_finished, daemon=True)
            writing.start()
            writing.join(_EXIT_S)
            return
        try:
            self.wait()
            self._writer.close()
        except (InputError, RunError) as e:
            if error is None or isinstance(error, Stopped):  # which says that it has saved
                raise
            if type(error) is not type(e):  # otherwise `error` is this one
                warn(str(e))

    def steps(self) -> list[int]:
        """Whole steps in the folder, newest first; not verified."""
        return _whole_steps(_listed(self._folder))

    def save(
        self, step: int, state: TrainState, host: _Dict, groups: _Dict, *, partial: bool = False
    ) -> None:
        """Starts to write the newest checkpoint. Once this returns, `state` may be donated.

        host: JSON-able, finite numbers. groups: records (`plain`). partial: inside step `step + 1`,
        or before step 1. Raises ValueError if there is one of a later step, FloatingPointError if
        the state is non-finite, RunError if processes or replicas have diverged, and InputError if
        the disk refuses this save or the one before.
        """
        self.wait()
        items = _items(state)
        leaves = {item: _describe(arrays) for item, arrays in items.items()}
        if bad := next(filter(None, map(_first_non_finite, leaves.values())), None):
            raise FloatingPointError(f"step {step}: {bad} is non-finite; no checkpoint is saved")
        blob = serialization.msgpack_serialize(plain(groups))
        record: dict[str, Any] = {"format": _FORMAT, "step": step, "host": host, "leaves": leaves}
        record["groups"] = _sha256(blob)
        if differs := multihost.disagreement(_facts(record)):
            raise RunError(
                f"step {step}: {differs}; nothing is saved; look for a faulty device, then start "
                "the same command again"
            )
        record = json.loads(json.dumps(record, allow_nan=False))  # as it will be read
        record["digest"] = _sha256(_canonical(record))
        items["groups"] = {"msgpack": np.frombuffer(blob, np.uint8)}
        saves = {item: ocp.args.StandardSave(arrays) for item, arrays in items.items()}
        parts = ocp.args.Composite(host=ocp.args.JsonSave(record), **saves)
        stored = _listed(self._folder)
        name = _new_name(stored, step, partial)
        with self._writing():
            self._writer.save(self._folder / name, args=parts)
        self._saved = name
        if any(path.name.startswith(f"{name}.") for path in stored):
            self.wait()  # until they are removed, these would count as newer

    def wait(self) -> None:
        """Waits for the save in progress. Raises InputError if it failed; nothing else does."""
        saved, self._saved = self._saved, ""  # one that fails replaces nothing
        with self._writing():
            self._writer.wait_until_finished()
        if saved:
            listed = _listed(self._folder)
            stored = [path for path in listed if not path.name.startswith(f"{saved}.")]
            whole = [path for path in stored if _key(path)[1] == 0]
            excess = {*listed} - {stored[0], *whole[: self._keep]}
            if excess and multihost.is_main():
                also = self._keep_also([int(path.name) for path in whole])
                self._remove({path for path in excess if path.name != str(also)})

    def restore(self, abstract_state: TrainState, *, at_most: int | None = None) -> Restored | None:
        """The newest complete checkpoint of the expected tree, shapes, dtypes and digests; None if
        the folder holds no checkpoint.

        Newer ones are named on stderr and renamed to `bad-<name>`, out of the way of later saves.
        abstract_state: arrays, or jax.ShapeDtypeStruct leaves with shardings. at_most: rolls back
        to a whole step no later than this. Raises NoCheckpointError if none is usable.
        """
        self.wait()
        target = jax.tree.map(_target, abstract_state)
        wanted = stored = _listed(self._folder)
        if at_most is not None:
            wanted = [path for path in stored if path.name.isdigit() and int(path.name) <= at_most]
        found = _newest(self._folder, wanted, _items(target), groups=True)
        if found is None:
            if (old := self._folder / "interrupted").exists():
                raise NoCheckpointError(f"{old}: written in format 2, not {_FORMAT}; {_OTHER}")
            return None
        self._move_aside(stored[: stored.index(found.path)], found.step)
        return found._replace(state=jax.tree.unflatten(jax.tree.structure(target), found.state))

    def _move_aside(self, newer: Sequence[Folder], step: int) -> None:
        if not newer:
            return
        multihost.sync("checkpoints read")
        for path in newer if multihost.is_main() else ():
            target = files.free_name(self._folder / f"bad-{path.name}")
            with files.writing(target):
                path.rename(target)
            warn(f"{path}: moved to {target.name}; the run resumes from step {step}")
        multihost.sync("checkpoints moved aside")

    def _remove(self, paths: Collection[Folder]) -> None:
        for path in paths if multihost.is_main() else ():
            files.remove(path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """InputError, or RunError in a bucket, for file system errors of orbax and its threads."""
        try:
            yield
        except (InputError, RunError, jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as e:
            kind = RunError if is_bucket(self._folder) else InputError
            raise kind(
                f"{self._folder}: a checkpoint could not be written ({reason(e)}); free disk space "
                "or give write access, then start the same command again: it resumes from the "
                "newest complete checkpoint"
            ) from None


def records_digest(folder: str | Folder) -> str:
    """SHA-256, in hexadecimal, of all checkpoints' records, which hold a digest of every array."""
    digest = hashlib.sha256()
    for path in _stored(_absolute(folder)):
        digest.update(path.name.encode() + b"\n" + (files.read(path / _RECORD) or b""))
    return digest.hexdigest()


def stored_steps(folder: str | Folder) -> list[int]:
    """Whole steps that this process finds in the folder, newest first; not verified."""
    return _whole_steps(_stored(_absolute(folder)))


def restore_params(
    folder: str | Folder, abstract_params: Params, step: int | None = None
) -> tuple[int, Params]:
    """Step and weights of the newest usable whole step, or of `step`. Changes no file.

    Unusable ones are named on stderr. Raises NoCheckpointError if there is no usable one.
    """
    folder, target = _absolute(folder), jax.tree.map(_target, abstract_params)
    whole = [path for path in _listed(folder) if _key(path)[1] == 0]
    whole = [path for path in whole if step is None or path.name == str(step)]
    found = _newest(folder, whole, {"params": _named(target)}, groups=False)
    if found is None:
        raise NoCheckpointError(
            f"{folder}: holds no checkpoint; give the --run-dir of a run that has saved one"
        )
    return found.step, jax.tree.unflatten(jax.tree.structure(target), found.state)


def newest_host(folder: str | Folder) -> dict[str, Any] | None:
    """The caller's dict in the newest checkpoint whose record can be read; reads no arrays."""
    for path in _stored(_absolute(folder)):
        with contextlib.suppress(_Unusable, InputError, ValueError, RecursionError):
            return _read_record(path)["host"]
    return None


# Finding and reading ------------------------------------------------------------------------------


def _absolute(folder: str | Folder) -> Folder:
    folder = as_path(folder)
    return folder if is_bucket(folder) else folder.absolute()


def _stored(folder: Folder) -> list[Folder]:
    """Checkpoints in the folder, newest first, complete or not."""
    retry = "give access, then start the same command again"
    with errors_as(RunError, folder, "cannot be listed", retry):  # not the same as an empty folder
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
            return sorted(found, key=_key, reverse=True)
    return []


def _new_name(stored: Sequence[Folder], step: int, partial: bool) -> str:
    keys = [_key(path) for path in stored]
    if keys and step < keys[0][0]:
        raise ValueError(f"step {step} is before the newest checkpoint, of step {keys[0][0]}")
    if not partial and (step, 0) not in keys:
        return str(step)
    return f"{step}.{max((n for at, n in keys if at == step), default=0) + 1}"


def _whole_steps(stored: Sequence[Folder]) -> list[int]:
    return [step for step, number in map(_key, stored) if number == 0]


def _listed(folder: Folder) -> list[Folder]:
    """Checkpoints in the folder as process 0 finds them, newest first."""
    names = multihost.from_main(" ".join(path.name for path in _stored(folder)))
    return [folder / name for name in names.split()]


def _key(path: Folder) -> tuple[int, int]:
    """(step, number at that step) of a checkpoint; number 0 is a whole step."""
    step, _, number = path.name.partition(".")
    return int(step), int(number or 0)


def _is_complete(path: Folder) -> bool:
    """False for a checkpoint in a bucket that is being written, or was when its process died."""
    return not is_bucket(path) or files.read(path / _COMPLETE) is not None


def _newest(
    folder: Folder, stored: Sequence[Folder], target: Mapping[str, _Dict], *, groups: bool
) -> Restored | None:
    """The first of the checkpoints that loads, as of `_load`; None if there are none."""
    reasons = []
    for path in stored:
        try:
            return _load(path, target, groups)
        except _Unusable as e:
            reasons.append(str(e))
            if multihost.is_main():
                warn(f"{path}: checkpoint not used: {e}")
    if not stored:
        return None
    raise NoCheckpointError(
        f"{folder}: none of its {len(stored)} checkpoints is usable ({stored[0].name}: "
        f"{reasons[0]}); put back a copy, or start over in another --run-dir"
    )


def _load(path: Folder, target: Mapping[str, _Dict], groups: bool) -> Restored:
    """A verified checkpoint, its state as a list of leaves in the order of the target. Raises
    _Unusable, on all processes or on none."""
    record = _agreed(lambda: _read_record(path))
    _agreed(lambda: _check_expected(record["leaves"], target))
    found = _agreed(lambda: _read_groups(path / "groups", record["groups"])) if groups else {}
    state: list[Array] = []
    for item, leaves in target.items():
        arrays = _agreed(partial(_read_arrays, path / item, leaves))
        content = _describe(arrays)  # on every process, before any of them may refuse
        _agreed(partial(_check_content, record["leaves"][item], content))
        state += arrays.values()
    return Restored(path, record["step"], state, record["host"], found)


def _agreed(read: Callable[[], _T]) -> _T:
    """`read()`, or _Unusable on every process if any fails: all restore the same checkpoint."""
    refusal = ""
    try:
        value = read()
    except _Unusable as e:
        refusal = str(e)
    except (jax.errors.JaxRuntimeError, MemoryError, RunError):
        raise  # the device's or the bucket's fault, not the checkpoint's
    except Exception as e:  # readers of damaged files raise many kinds
        refusal = f"unreadable ({reason(e)})"
    if jax.process_count() > 1:
        if not multihost_utils.process_allgather(np.array(not refusal)).all():
            refusal = refusal or "another process cannot use it"
    if refusal:
        raise _Unusable(printable(" ".join(refusal.split()))[:300])
    return value


def _read_record(path: Folder) -> dict[str, Any]:
    content = files.read(path / _RECORD) if _is_complete(path) else None
    if content is None:
        raise _Unusable("incomplete")
    record = json.loads(content)
    if not isinstance(record, dict) or "digest" not in record:
        raise _Unusable("not written by this program")
    if record.get("format") != _FORMAT:
        raise _Unusable(f"written in format {record.get('format')!r}, not {_FORMAT}; {_OTHER}")
    if record.pop("digest") != _sha256(_canonical(record)):
        raise _Unusable("its JSON record is damaged")
    step, host = record.get("step"), record.get("host")
    if type(step) is not int or step < 0 or not isinstance(host, dict):
        raise _Unusable("its JSON record has no step or host")
    if _key(path)[0] != step:
        raise _Unusable(f"is of step {step}; give its folder that name")
    return record


def _read_groups(path: Folder, digest: str) -> dict[str, Any]:
    blob = np.asarray(_open(path, "msgpack", ts.Context()).read().result()).tobytes()
    if _sha256(blob) != digest:
        raise _Unusable("groups do not match their digest")
    groups = serialization.msgpack_restore(blob)
    if not isinstance(groups, dict):
        raise _Unusable("groups are not a dict")
    return groups


def _read_arrays(path: Folder, target: _Dict) -> dict[str, Array]:
    """The arrays of an item on their shardings. Each process reads only what its devices hold.

    orbax stores zarr arrays in an OCDBT database. Its own reader leaves tasks and tracebacks behind
    on damaged files, and waits for other processes that may have failed.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        stored = _open(path, name, context)
        if stored.shape != leaf.shape or stored.dtype.numpy_dtype != leaf.dtype:
            raise _Unusable(f"{name} is not of the shape and dtype in its record")
        index_of = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        # Devices that hold the same part share a read. Slices are no keys before Python 3.12.
        parts = {str(index): index for index in index_of.values()}
        reads = {key: stored[index].read() for key, index in parts.items()}
        shards = [
            jax.device_put(reads[str(index)].result(), device) for device, index in index_of.items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(target, pool.map(read, target, target.values()), strict=True))


def _open(path: Folder, name: str, context: ts.Context) -> ts.TensorStore:
    base: dict[str, Any] = {"driver": "file", "path": f"{path}/"}
    if is_bucket(path):
        _, _, bucket, *parts = path.parts  # "/", "gs", bucket, ...
        base = {"driver": "gcs", "bucket": bucket, "path": "/".join(parts) + "/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True, context=context).result()


def _check_expected(leaves: Mapping[str, _Dict], target: Mapping[str, _Dict]) -> None:
    """Raises _Unusable unless the checkpoint holds exactly what the target asks for."""
    for item, wanted in target.items():
        stored, other = leaves[item], "of another model or optimizer"
        for name in sorted(stored.keys() ^ wanted.keys()):
            state = "missing" if name in wanted else "there, not expected"
            raise _Unusable(f"{other}: {name} is {state}")
        for name, leaf in wanted.items():
            if (kind := stored[name]["kind"]) != _kind(leaf):
                raise _Unusable(f"{other}: {name} is {kind}, expected {_kind(leaf)}")


def _check_content(stored: _Dict, read: _Dict) -> None:
    for name, leaf in read.items():
        if leaf["digest"] != stored[name]["digest"]:
            raise _Unusable(f"{name} does not match its digest")
    if bad := _first_non_finite(read):
        raise _Unusable(f"{bad} is non-finite")


# Leaves and digests -------------------------------------------------------------------------------


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Leaves by item and path. Two items: weights can be read without the optimizer's."""
    rest = {"opt_state": state.opt_state, "updates": state.updates}
    return {"params": _named(state.params), "optimizer": _named(rest)}


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: no tree type is stored, so none can mismatch."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) != len(paths):
        raise ValueError("two leaves of the state have the same path")
    return named


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """The target of a restore; on the first device if no sharding is given."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _kind(leaf: Any) -> str:
    """Dtype and shape: float32[64, 128]."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _describe(arrays: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Kind, digest (16 hex digits) and finiteness of each array."""
    described = {}
    # One leaf at a time: virtual CPU devices that share few cores deadlock with many programs of
    # collectives in flight.
    for name, array in arrays.items():
        *words, finite = _on_host(name, _inspect(array))
        digest = "".join(f"{int(word):08x}" for word in words)
        described[name] = {"kind": _kind(array), "digest": digest, "finite": bool(finite)}
    return described


def _on_host(name: str, scalars: Sequence[Array]) -> list[np.ndarray]:
    """The values, once all local devices agree on them: replicas of an array must be equal."""
    replicas = jax.device_get([[s.data for s in scalar.addressable_shards] for scalar in scalars])
    if any(replica != first for first, *others in replicas for replica in others):
        raise RunError(
            f"{name}: its replicas on this host's devices differ; nothing is saved; look for a "
            "faulty device"
        )
    return [first for first, *_ in replicas]


def _facts(record: _Dict) -> dict[str, Any]:
    """A record as facts that processes can compare: digests by leaf, the rest by key."""
    facts = {key: record[key] for key in ("step", "host", "groups")}
    leaves = record["leaves"].items()
    return {f"{i}/{name}": leaf["digest"] for i, of in leaves for name, leaf in of.items()} | facts


def _first_non_finite(leaves: _Dict) -> str | None:
    return next((name for name, leaf in leaves.items() if not leaf["finite"]), None)


@jax.jit
def _inspect(x: Array) -> tuple[Array, Array, Array]:
    """Two uint32 digests, and whether all elements are finite.

        digest_k = sum over i of mix(word_i ^ c_k i)  mod 2^32,   k = 0, 1

    The sum does not depend on the sharding. `mix` is a bijection, so a change of one word always
    shows; any other is missed with probability 2^-64. Against damage, not against forgery.
    """
    return _digest(x, 0x9E3779B1), _digest(x, 0x85EBCA77), jnp.isfinite(x).all()


def _digest(x: Array, c: int) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # c i from one iota per axis: a reshape would gather a sharded array.
    scaled, stride = jnp.zeros(words.shape, jnp.uint32), c
    for axis in reversed(range(words.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        scaled += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return _mix(words ^ scaled).sum(dtype=jnp.uint32)


def _mix(h: Array) -> Array:
    """The finalizer of MurmurHash3: a bijection of uint32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _canonical(record: _Dict) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _show_unless_late(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _show_unraisable(unraisable)


# After a failed write orbax logs a traceback from each of its threads, asyncio and Python report
# what orbax has not awaited, and tensorstore that the other writes are not awaited. `wait` reports
# the failure in one line.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited")
_show_unraisable, sys.unraisablehook = sys.unraisablehook, _show_unless_late
