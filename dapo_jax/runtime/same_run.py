"""Whether a run folder holds the same run: its config and its reward function."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dapo_jax.config import (
    Config,
    ConfigError,
    config_from_dict,
    dump_yaml,
    flatten,
    load_config,
    to_dict,
)
from dapo_jax.runtime import multihost
from dapo_jax.runtime.checkpoint import newest_host
from dapo_jax.runtime.files import Folder, local_copy, read, write_whole

# Options that may change on resume: length, logging and devices, not what is learned.
MAY_CHANGE = tuple(
    """
    dapo.max_generation_batches dapo.on_cap eval. mesh. model.attention_block model.remat
    optim.max_nonfinite_updates optim.rollback_steps reward.environment
    reward.max_error_fraction reward.memory_mb reward.timeout_s
    reward.workers rollout.cache_tokens rollout.decode_slots supervised.save_every train.keep_
    train.profile_ train.rows_per_microbatch train.samples_per_step train.save_every
    train.stall_timeout_s train.steps train.tracker
    """.split()
)

# What --allow-change takes, and the options, by prefix, that may then change too. Of `optim` the
# optimizer's state keeps its shapes; of `reward.function` it is the file that may change.
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "optim": ("optim.", "dapo.clip_eps_", "dapo.dual_clip", "dapo.importance_cap"),
    "data.train": ("data.train.",),
    "reward.function": (),
}
_CHANGES = "changes.jsonl"  # in the run folder: these changes, and after which step
_FUNCTION = "reward_function.py"  # in the run folder: a copy of the file of reward.function


def stored_config(run_dir: Folder, overrides: Sequence[str] = ()) -> Config | None:
    """The config.yaml of a run folder, if there is one, with overrides."""
    if read(run_dir / "config.yaml") is None:
        return None
    with local_copy(run_dir / "config.yaml") as file:
        return load_config(file, overrides)


def digest_of(source: str | bytes | None) -> str | None:
    """SHA-256 of the file of reward.function, as stored in checkpoints."""
    content = source.encode() if isinstance(source, str) else source
    return None if content is None else hashlib.sha256(content).hexdigest()


def changes(before: Config, now: Config) -> dict[str, list[Any]]:
    """The values before and now of each key in which two configs differ."""
    a, b = flatten(to_dict(before)), flatten(to_dict(now))
    keys = sorted(a.keys() | b.keys())
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}


def refused(changed: dict[str, list[Any]], may_change: tuple[str, ...]) -> tuple | None:
    """The first of the changes, (key, before, now), that none of the prefixes allows."""
    found = ((key, *values) for key, values in changed.items() if not key.startswith(may_change))
    return next(found, None)


def stored_configs(run_dir: Folder, host: Mapping[str, Any]) -> list[Config]:
    """The configs in config.yaml and in `host`, of a checkpoint; either may be missing."""
    found = [stored] if (stored := stored_config(run_dir)) else []
    if isinstance(host.get("config"), dict):
        try:
            found.append(config_from_dict(host["config"], f"the newest checkpoint of {run_dir}"))
        except ConfigError:  # keys of an earlier version; a user can edit config.yaml only
            if not found:
                raise
    return found


def check_same_run(
    config: Config, run_dir: Folder, source: str | None, allow: Sequence[str] = ()
) -> list[str]:
    """What differs from the run, and may by `allow`, keys of ALLOWED. source: the file of
    reward.function now. Raises ConfigError for other differences."""
    # Files may move: digests identify their content.
    moved = tuple(f"data.train.{n}.path" for n in range(len(config.data.train)))
    allowed = tuple(key for name in allow for key in ALLOWED[name])
    host, remarks = newest_host(run_dir / "checkpoints") or {}, []
    for before in stored_configs(run_dir, host):
        changed = changes(before, config)
        if found := refused(changed, MAY_CHANGE + moved + allowed):
            key, was, now = found
            names = (name for name, keys in ALLOWED.items() if key.startswith(keys))
            may = "".join(f", or give --allow-change {name}" for name in names)
            raise ConfigError(
                f"{key}: is {now!r}, but {run_dir} was started with {was!r}; use another "
                f"--run-dir, or set it back{may}"
            )
        remarks += [
            f"{key}: was {was}, is {now}"
            for key, (was, now) in changed.items()
            if key.startswith(allowed)
        ]
    digests = host.get("digests")
    stored = digests.get("function") if isinstance(digests, dict) else None
    started_with = digest_of(read(run_dir / _FUNCTION)) or stored
    another = None not in (started_with, source) and started_with != digest_of(source)
    if another and "reward.function" not in allow:
        raise ConfigError(
            f"reward.function: {config.reward.function} is not what {run_dir} was started with, "
            f"which is in its {_FUNCTION} or checkpoint; restore the file, or give "
            "--allow-change reward.function, or use another --run-dir"
        )
    if another:
        remarks.append("reward.function: its file has changed")
    return list(dict.fromkeys(remarks))


def write_config(config: Config, run_dir: Folder, source: str | None, done: int = 0) -> None:
    """Writes the resolved config, changes of `optim` and the reward function into the run folder.
    ConfigError if the run has already done more than train.steps steps."""
    if (steps := config.train.steps) < done:
        raise ConfigError(
            f"train.steps: is {steps}, but {run_dir} has done {done} steps; set it to {done} or "
            "more, or use another --run-dir"
        )
    multihost.sync("the run folder has been read")
    if multihost.is_main():
        before = stored_config(run_dir)
        changed = changes(before, config) if before else {}
        if optim := {key: changed[key] for key in changed if key.startswith(ALLOWED["optim"])}:
            line = json.dumps({"after_step": done} | optim) + "\n"
            old = read(run_dir / _CHANGES) or b""
            write_whole(run_dir / _CHANGES, old + line.encode())
        if source is not None:
            write_whole(run_dir / _FUNCTION, source.encode())
        write_whole(run_dir / "config.yaml", dump_yaml(config).encode())
