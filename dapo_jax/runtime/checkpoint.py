"""Checkpoints: one atomic step holds all that a run needs to go on, and nothing is loaded that does
not verify.

    checkpoints/<step>/params      weights, an array a leaf
                       optimizer   optimizer state and update counter, an array a leaf
                       groups      buffered host arrays, as the bytes of one .npz
                       host        JSON: the caller's dict; shape, dtype and digest of every leaf; a digest of itself
    checkpoints/interrupted/<n>    the same in the midst of a step, where a run was stopped; gone once a later step is whole

orbax writes them in the background. It leaves four things to its caller, all done here: stored
bytes are not checked, a failed write shows only when it is waited for, any folder with a number for
a name counts as a checkpoint, and a target of another dtype casts in silence.

A local step gets its name when it is whole. In a bucket it has its name from the start, and an
object more when it is whole.
"""

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from dapo_jax.config import printable
from dapo_jax.runtime import files, multihost
from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import Folder, as_path, is_bucket, reason
from dapo_jax.types import Array, InputError, NoCheckpointError, Params, RunError, TrainState

_FORMAT = 2
_INTERRUPTED = "interrupted"
_LEAVE_S = 20.0  # that a job of several processes waits for a write when it ends by an error: another may be gone
_RECORD = PurePath("host") / "metadata"  # where orbax's JSON handler writes
_WHOLE = "commit_success.txt"  # what orbax writes last into a step in a bucket
_T = TypeVar("_T")


class Restored(NamedTuple):
    """A checkpoint, verified."""

    path: Folder
    step: int  # rollout step after which it was saved
    state: TrainState  # sharded as asked for
    host: dict[str, Any]
    groups: dict[str, np.ndarray]


class RestoredParams(NamedTuple):
    """The weights of a checkpoint, verified."""

    step: int  # rollout step after which it was saved
    params: Params  # sharded as asked for
    host: dict[str, Any]


class _Loaded(NamedTuple):
    record: dict[str, Any]
    items: dict[str, dict[str, Array]]  # by item, then by path
    groups: dict[str, np.ndarray]


class _Unusable(Exception):
    """Why a checkpoint cannot be used; half a sentence."""


class Checkpoints:
    """Context manager that saves to and restores from one folder. Every process calls every method.

    keep: newest so many are kept. Leaving the context waits for the save under way. Raises
    InputError where the folder cannot be used. Where a method says InputError for what the disk
    does, it is RunError in a bucket: it may answer in a minute.
    """

    _superseded = False  # the save under way makes what was interrupted before obsolete

    def __init__(self, folder: str | Folder, *, keep: int):
        self._folder = _absolute(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not is_bucket(self._folder) and not os.access(self._folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._manager = _manager(self._folder, keep)
        except files.errors(self._folder) as e:
            raise InputError(
                f"{self._folder}: cannot hold checkpoints ({reason(e)}); choose another --run-dir"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1:
            # Another process may have gone, and a write of all waits for all.
            writing = threading.Thread(target=self._manager.wait_until_finished, daemon=True)
            writing.start()
            writing.join(_LEAVE_S)
            return
        try:
            with self._writing():
                self.wait()
                self._manager.close()
        except (InputError, RunError) as e:
            if error is None:
                raise
            if type(error) is not type(e):  # else the same is said already
                warn(str(e))

    def steps(self) -> list[int]:
        """Whole steps in the folder; not verified."""
        return [int(path.name) for path in _stored(self._folder)]

    def latest_step(self) -> int | None:
        """Newest whole step in the folder or being written; not verified."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        groups: Mapping[str, np.ndarray],
    ) -> None:
        """Starts to write a step and returns once the arrays are copied: `state` may be donated
        afterwards.

        host: JSON-able, finite numbers. groups: arrays of any shape, no objects. Raises ValueError
        unless `step` is above the latest, FloatingPointError if the state is not finite, RunError
        if the processes or replicas do not hold the same, and InputError if the disk refuses this
        save or the one before.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(f"checkpoint step {step} is not above the latest one, {latest}")
        self._write(self._manager, step, step, state, host, groups)
        self._superseded = True

    def save_interrupted(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        groups: Mapping[str, np.ndarray],
    ) -> None:
        """Writes where a run stands in the midst of the step after `step`, in the place of what was
        written so before; waits for it.
        """
        self.wait()
        folder = self._folder / _INTERRUPTED
        with self._writing():
            folder.mkdir(exist_ok=True)
            manager = _manager(folder, keep=1)
            self._write(manager, (manager.latest_step() or 0) + 1, step, state, host, groups)
            manager.wait_until_finished()
            manager.close()

    def _write(
        self,
        manager: ocp.CheckpointManager,
        name: int,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        groups: Mapping[str, np.ndarray],
    ) -> None:
        items = _items(state)
        leaves = {item: _describe(arrays) for item, arrays in items.items()}
        for described in leaves.values():
            if leaf := _first_non_finite(described):
                raise FloatingPointError(
                    f"step {step}: {leaf} is not finite; no checkpoint is saved"
                )
        blob = _npz(groups)
        record = {
            "format": _FORMAT,
            "step": step,
            "host": host,
            "leaves": leaves,
            "groups": _sha256(blob.tobytes()),
        }
        if differs := multihost.disagreement(_facts(record)):
            raise RunError(
                f"step {step}: {differs}; nothing is saved; look for a faulty device, then start the same command again"
            )
        record = json.loads(
            json.dumps(record, allow_nan=False)
        )  # as it will be read: text keys, lists
        record["digest"] = _sha256(_canonical(record))
        saves = {
            item: ocp.args.StandardSave(arrays)
            for item, arrays in (*items.items(), ("groups", {"npz": blob}))
        }
        with self._writing():
            manager.save(
                name, args=ocp.args.Composite(host=ocp.args.JsonSave(record), **saves), force=True
            )

    def wait(self) -> None:
        """Waits for the save under way.

        Raises InputError if it failed: only here does that show.
        """
        with self._writing():
            self._manager.wait_until_finished()
        if self._superseded and jax.process_index() == 0:
            files.remove(self._folder / _INTERRUPTED)
        self._superseded = False

    def restore(self, abstract_state: TrainState, *, at_most: int | None = None) -> Restored | None:
        """The newest checkpoint that is complete, of the expected tree, shapes and dtypes, and
        whose digests hold.

        abstract_state: jax.ShapeDtypeStruct leaves with shardings, or arrays; the device count may
        differ from the saved one. at_most: goes back to a whole step no later than this. Newer
        checkpoints, unusable or beyond `at_most`, are named on stderr and moved to `bad-<step>`,
        out of the way of later saves. Returns None if the folder holds no checkpoint; raises
        NoCheckpointError if it holds only unusable ones.
        """
        self.wait()
        abstract_state = jax.tree.map(_target, abstract_state)
        stored = _stored(self._folder, interrupted=True)
        wanted = (
            stored
            if at_most is None
            else [p for p in _stored(self._folder) if int(p.name) <= at_most]
        )
        found = _newest(
            self._folder, wanted, lambda path: _load(path, _items(abstract_state), groups=True)
        )
        if found is None:
            return None
        path, (record, items, groups) = found
        self._move_aside(stored[: stored.index(path)], record["step"])
        params = jax.tree.unflatten(
            jax.tree.structure(abstract_state.params), items["params"].values()
        )
        rest = jax.tree.unflatten(
            jax.tree.structure(_rest(abstract_state)), items["optimizer"].values()
        )
        return Restored(
            path,
            record["step"],
            TrainState(params, rest["opt_state"], rest["updates"]),
            record["host"],
            groups,
        )

    def _move_aside(self, newer: Sequence[Folder], step: int) -> None:
        if not newer:
            return
        multihost.sync("checkpoints read")
        if jax.process_index() == 0:
            for path in newer:
                name = path.name if path.parent == self._folder else f"{_INTERRUPTED}-{path.name}"
                target = files.free_name(self._folder / f"bad-{name}")
                with files.writing(target):
                    path.rename(target)
                warn(f"{path}: moved to {target.name}; the run goes on from step {step}")
        multihost.sync("checkpoints moved aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """InputError, or RunError in a bucket, for what the file system says inside, in whatever
        type orbax and its threads put it.
        """
        try:
            yield
        except (InputError, RunError, FloatingPointError, jax.errors.JaxRuntimeError, MemoryError):
            raise
        except Exception as e:
            kind = RunError if is_bucket(self._folder) else InputError
            raise kind(
                f"{self._folder}: a checkpoint could not be written ({reason(e)}); make room or give write access, then start "
                "the same command again: it goes on from the last whole checkpoint"
            ) from None


def records_digest(folder: str | Folder) -> str:
    """SHA-256, in hexadecimal, of the records of all whole steps in the folder, which hold a digest
    of every array.
    """
    digest = hashlib.sha256()
    for path in _stored(_absolute(folder)):
        digest.update(path.name.encode() + b"\n" + (files.read(path / _RECORD) or b""))
    return digest.hexdigest()


def restore_params(folder: str | Folder, abstract_params: Params) -> RestoredParams:
    """The weights of the newest usable checkpoint, without the optimizer's.

    Changes nothing in the folder.

    abstract_params: jax.ShapeDtypeStruct leaves with shardings, or arrays. Unusable checkpoints are
    named on stderr. Raises NoCheckpointError if there is no usable one.
    """
    folder = _absolute(folder)
    target = _named(jax.tree.map(_target, abstract_params))
    found = _newest(
        folder, _stored(folder), lambda path: _load(path, {"params": target}, groups=False)
    )
    if found is None:
        raise NoCheckpointError(
            f"{folder}: holds no checkpoint; give the --run-dir of a run that has saved one"
        )
    _, (record, items, _) = found
    return RestoredParams(
        record["step"],
        jax.tree.unflatten(jax.tree.structure(abstract_params), items["params"].values()),
        record["host"],
    )


# --------------------------------------------------------------------------------------------------------------------
# Finding and reading
# --------------------------------------------------------------------------------------------------------------------


def _absolute(folder: str | Folder) -> Folder:
    folder = as_path(folder)
    return folder if is_bucket(folder) else folder.absolute()


def _manager(folder: Folder, keep: int) -> ocp.CheckpointManager:
    bucket = is_bucket(folder)
    if (
        bucket
    ):  # orbax would take all that is no whole step for a half-written one, `interrupted` too
        if jax.process_index() == 0:
            for path in _numbered(folder):
                if not _is_whole(path):
                    files.remove(path)
        multihost.sync("half-written checkpoints removed")
    # Where a background thread makes the folders and fails, others wait for it for five minutes and
    # keep the interpreter alive.
    threads = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not bucket, async_options=threads
    )
    return ocp.CheckpointManager(folder, options=options)


def _stored(folder: Folder, *, interrupted: bool = False) -> list[Folder]:
    """Checkpoints in the folder, newest first, complete or not. interrupted: also those in the
    midst of a step.
    """
    found: list[tuple[float, int, Folder]] = [(int(p.name), 0, p) for p in _numbered(folder)]
    if interrupted:
        found += [(_step_of(p), 1 + int(p.name), p) for p in _numbered(folder / _INTERRUPTED)]
    return [path for *_, path in sorted(found, reverse=True)]


def _numbered(folder: Folder) -> list[Folder]:
    try:
        return [p for p in folder.iterdir() if re.fullmatch(r"0|[1-9]\d*", p.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except files.errors(folder) as e:  # not the same as holding none
        raise RunError(
            f"{folder}: cannot be listed ({reason(e)}); give access, then start the same command again"
        ) from None


def _is_whole(path: Folder) -> bool:
    """False for a step in a bucket that is being written, or was when its process died."""
    return not is_bucket(path) or files.read(path / _WHOLE) is not None


def _check_whole(path: Folder) -> None:
    if not _is_whole(path):
        raise _Unusable("incomplete")


def _step_of(path: Folder) -> float:
    """The step that an interrupted checkpoint follows; infinity, to be looked at first, if its
    record cannot be read.
    """
    try:
        return _read_record(path)["step"]
    except (_Unusable, InputError, ValueError, RecursionError):
        return float("inf")


def _newest(
    folder: Folder, stored: Sequence[Folder], load: Callable[[Folder], _T]
) -> tuple[Folder, _T] | None:
    """The first of the stored checkpoints that loads; None where there is none at all."""
    reasons = []
    for path in stored:
        try:
            return path, load(path)
        except _Unusable as e:
            reasons.append(str(e))
            if jax.process_index() == 0:
                warn(f"{path}: checkpoint not used: {e}")
    if not stored:
        return None
    raise NoCheckpointError(
        f"{folder}: none of its {len(stored)} checkpoints is usable (step {stored[0].name}: {reasons[0]}); "
        "put back a copy, or start anew in another --run-dir"
    )


def _load(path: Folder, targets: Mapping[str, dict[str, Any]], *, groups: bool) -> _Loaded:
    """A step, verified. Raises _Unusable, on all processes or on none."""
    _agreed(lambda: _check_whole(path))
    record = _agreed(lambda: _read_record(path))
    _agreed(lambda: _check_expected(record["leaves"], targets))
    host_arrays = _agreed(lambda: _read_groups(path / "groups", record["groups"])) if groups else {}
    items = {}
    for item, target in targets.items():
        items[item] = _agreed(partial(_read_arrays, path / item, target))
        content = _describe(items[item])  # on every process, before any of them may refuse
        _agreed(partial(_check_content, record["leaves"], item, content))
    return _Loaded(record, items, host_arrays)


def _agreed(read: Callable[[], _T]) -> _T:
    """`read()`, or _Unusable on every process if any of them fails: all take the same checkpoint."""
    refusal = ""
    try:
        value = read()
    except _Unusable as e:
        refusal = str(e)
    except (
        jax.errors.JaxRuntimeError,
        MemoryError,
        RunError,
    ):  # the device's fault or the bucket's, not the checkpoint's
        raise
    except Exception as e:  # readers of damaged files raise all sorts
        refusal = f"unreadable ({reason(e)})"
    if (
        jax.process_count() > 1
        and not multihost_utils.process_allgather(np.array(not refusal)).all()
    ):
        refusal = refusal or "another process cannot use it"
    if refusal:
        raise _Unusable(printable(" ".join(refusal.split()))[:300])
    return value


def newest_host(folder: str | Folder) -> dict[str, Any] | None:
    """The caller's dict in the newest checkpoint whose record can be read; its arrays are not
    looked at.
    """
    for path in _stored(_absolute(folder), interrupted=True):
        with contextlib.suppress(_Unusable, InputError, ValueError, RecursionError):
            return _read_record(path)["host"]
    return None


def _read_record(path: Folder) -> dict[str, Any]:
    content = files.read(path / _RECORD)
    if content is None:
        raise _Unusable("incomplete")
    record = json.loads(content)
    if not isinstance(record, dict) or "digest" not in record:
        raise _Unusable("not written by this program")
    if record.get("format") != _FORMAT:
        raise _Unusable(
            f"written in format {record.get('format')!r}, not {_FORMAT}; use the dapo_jax that wrote it"
        )
    if record.pop("digest") != _sha256(_canonical(record)):
        raise _Unusable("its JSON record is damaged")
    step, host = record.get("step"), record.get("host")
    if type(step) is not int or step < 0 or not isinstance(host, dict):
        raise _Unusable("its JSON record has no step or host")
    if path.parent.name != _INTERRUPTED and path.name != str(step):
        raise _Unusable(f"is of step {step}; give its folder that name")
    return record


def _read_groups(path: Folder, digest: str) -> dict[str, np.ndarray]:
    blob = np.asarray(_open(path, "npz", ts.Context()).read().result()).tobytes()
    if _sha256(blob) != digest:
        raise _Unusable("groups do not match their digest")
    with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
        return dict(arrays)


def _read_arrays(path: Folder, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """The arrays of an item on their shardings; each device gets its part, each process reads only
    what its devices hold.

    orbax stores zarr arrays in an OCDBT database. Its own reader leaves tasks and tracebacks behind
    on damaged files, and waits for other processes that may have failed.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        stored = _open(path, name, context)
        if stored.shape != leaf.shape or stored.dtype.numpy_dtype != leaf.dtype:
            raise _Unusable(f"{name} is not of the shape and dtype that its record says")
        index_of = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        parts = {}
        for index in (
            index_of.values()
        ):  # devices that hold the same part share one read; slices are no keys before Python 3.12
            if str(index) not in parts:
                parts[str(index)] = stored[index].read()
        shards = [
            jax.device_put(parts[str(index)].result(), device) for device, index in index_of.items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(target, pool.map(read, target, target.values()), strict=True))


def _open(path: Folder, name: str, context: ts.Context) -> ts.TensorStore:
    if is_bucket(path):
        _, _, bucket, *parts = path.parts  # "/", "gs", bucket, ...
        base = {"driver": "gcs", "bucket": bucket, "path": "/".join(parts) + "/"}
    else:
        base = {"driver": "file", "path": f"{path}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return ts.open(
        {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False},
        open=True,
        read=True,
        context=context,
    ).result()


def _check_expected(
    leaves: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises _Unusable unless the checkpoint holds what the target asks for, and no more."""
    for item, target in targets.items():
        stored = leaves[item]
        if other := sorted(stored.keys() ^ target.keys()):
            raise _Unusable(
                f"of another model or optimizer: {other[0]} is {'there, not expected' if other[0] in stored else 'missing'}"
            )
        for name, leaf in target.items():
            has, wants = (
                (stored[name]["dtype"], *stored[name]["shape"]),
                (str(leaf.dtype), *leaf.shape),
            )
            if has != wants:
                raise _Unusable(
                    f"of another model or optimizer: {name} is {_shown(*has)}, expected {_shown(*wants)}"
                )


def _shown(dtype: str, *shape: int) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _check_content(
    leaves: Mapping[str, Mapping[str, Any]], item: str, read: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, leaf in read.items():
        if leaf["digest"] != leaves[item][name]["digest"]:
            raise _Unusable(f"{name} does not match its digest")
    if lost := _first_non_finite(read):
        raise _Unusable(f"{lost} is not finite")


# --------------------------------------------------------------------------------------------------------------------
# Trees, digests, words
# --------------------------------------------------------------------------------------------------------------------


def _rest(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "updates": state.updates}


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """What is stored apart, so that weights can be read without the optimizer's."""
    return {"params": _named(state.params), "optimizer": _named(_rest(state))}


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order: on disk no type of a tree, so none to mismatch."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(named) != len(paths):
        raise ValueError("two leaves of the state have the same path")
    return named


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to restore.

    Without a sharding it goes to the first device; orbax would ask for the devices that saved it.
    """
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(arrays: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Shape, dtype, digest (16 hex digits) of each array, and whether it is finite."""
    # One leaf at a time: virtual CPU devices that share few cores lock up with many programs of
    # collectives in flight.
    results = {name: _alike(name, _inspect(array)) for name, array in arrays.items()}
    return {
        name: {
            "shape": list(arrays[name].shape),
            "dtype": str(arrays[name].dtype),
            "digest": "".join(f"{int(word):08x}" for word in words),
            "finite": bool(finite),
        }
        for name, (words, finite) in results.items()
    }


def _alike(name: str, found: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
    """The values on the host, once each of this process's devices has found the same: copies of an
    array must be copies.
    """
    copies = jax.device_get(
        [[shard.data for shard in array.addressable_shards] for array in jax.tree.leaves(found)]
    )
    if any(copy != of_one[0] for of_one in copies for copy in of_one):
        raise RunError(
            f"{name}: its copies on this host's devices differ; nothing is saved; look for a faulty device"
        )
    return jax.tree.unflatten(jax.tree.structure(found), [of_one[0] for of_one in copies])


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's record as facts that processes can compare: digests by leaf, the rest by key."""
    leaves = {
        f"{item}/{name}": leaf["digest"]
        for item, named in record["leaves"].items()
        for name, leaf in named.items()
    }
    return leaves | {key: record[key] for key in ("step", "host", "groups")}


def _first_non_finite(described: Mapping[str, Mapping[str, Any]]) -> str | None:
    return next((name for name, leaf in described.items() if not leaf["finite"]), None)


@jax.jit
def _inspect(x: Array) -> tuple[tuple[Array, ...], Array]:
    return _digest(x), _finite(x)


def _digest(x: Array) -> tuple[Array, ...]:
    """Two uint32 scalars of an array, made where it is: no copy to the host, any sharding, any
    number of processes.

        digest_k = sum over i of mix(word_i ^ c_k i)  mod 2^32,   k = 0, 1

    The order of a sum modulo 2^32 does not matter, so the digest does not depend on the sharding.
    `mix` is a bijection, so a change of one word always shows; any other change is missed with
    probability 2^-64. Against damage, not against forgery.
    """
    return tuple(_lane(x, c) for c in (0x9E3779B1, 0x85EBCA77))


def _lane(x: Array, c: int) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    scaled, stride = (
        jnp.zeros(words.shape, jnp.uint32),
        c,
    )  # c i, from one iota an axis: a reshape would gather a sharded array
    for axis in reversed(range(words.ndim)):
        scaled += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= words.shape[axis]
    return _mix(words ^ scaled).sum(dtype=jnp.uint32)


def _finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


def _mix(h: Array) -> Array:
    """The finaliser of MurmurHash3: a bijection of uint32 in which every bit depends on every bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _npz(groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """The arrays as the bytes of an .npz: unlike orbax it takes empty arrays and text, and nothing
    is pickled.
    """
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **groups)
    return np.frombuffer(file.getvalue(), np.uint8)


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, allow_nan=False).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _show_unless_late(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _show_unraisable(unraisable)


# Of a failed write orbax logs the traceback from each of its threads, asyncio and Python what orbax
# has not awaited, and tensorstore that nobody awaits the other writes any more. `wait` reports it
# in one line.
logging.getLogger("absl").addFilter(_not_from_orbax)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited")
_show_unraisable, sys.unraisablehook = sys.unraisablehook, _show_unless_late
