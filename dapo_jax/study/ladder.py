"""What a study is: a base config, and rows that each add something to the row above, trained with several seeds.

base: {...}                        a config, as for dapo_jax.train
warm_up: {...}                     what the supervised warm-up, which all rows share, does otherwise
seeds: [0, 1, 2, 3]
target_accuracy: 0.8               held-out accuracy that `steps to target` counts to
ladder:
  - {name: naive GRPO, set: {dapo: {...}}, watch: [policy/entropy]}

`set` and `warm_up` are merged as overrides of a config are: section by section, but data.train and the like are replaced whole.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dapo_jax.config import Config, ConfigError, config_from_dict, merge, printable, read_mapping
from dapo_jax.runtime.metrics import definition

_KEYS = ("base", "warm_up", "seeds", "target_accuracy", "ladder")
_ROW_KEYS = ("name", "set", "watch")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    tree: Mapping[str, Any]  # its whole config: the base, and what all rows down to this one add
    watch: tuple[str, ...]  # metrics in which what it adds should show: drawn beside those of the row above


@dataclasses.dataclass(frozen=True)
class Study:
    """A ladder of configs, each row to be trained with every seed."""

    warm_up: Mapping[str, Any] | None  # config of the warm-up; None where all start from the base's model.folder
    seeds: tuple[int, ...]
    target_accuracy: float
    rows: tuple[Row, ...]

    @property
    def config(self) -> Config:
        """Of the first row; rows differ in the algorithm only."""
        return config_from_dict(self.rows[0].tree)


def load_study(path: str) -> Study:
    """Reads and checks a study. Raises ConfigError, and nothing else, for anything wrong with it."""
    tree, where = read_mapping(path), printable(path)

    def fail(key: str, message: str) -> typing.NoReturn:
        raise ConfigError(f"{where}: {key}: {message}")

    for key in [*tree, *_KEYS]:
        if key not in _KEYS or (key not in tree and key != "warm_up"):
            fail(printable(key)[:60], f"{'is missing' if key not in tree else 'unknown key'}; a study has: {', '.join(_KEYS)}")
    base, seeds, ladder, changes = tree["base"], tree["seeds"], tree["ladder"], tree.get("warm_up")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
        fail("seeds", "expected a list of different whole numbers")
    if not isinstance(ladder, list) or not ladder:
        fail("ladder", "expected a list of rows")
    if type(tree["target_accuracy"]) not in (int, float) or not 0 < tree["target_accuracy"] <= 1:
        fail("target_accuracy", "expected a number above 0 and at most 1")
    for key in ("base", "warm_up"):
        if not isinstance(tree.get(key, {}), Mapping):
            fail(key, "expected a mapping")
    if base.get("seed") is not None:
        fail("base.seed", "is given by `seeds`; remove it")
    rows: list[Row] = []
    for number, row in enumerate(ladder):
        key = f"ladder[{number}]"
        if not isinstance(row, Mapping) or not set(row) <= set(_ROW_KEYS) or not isinstance(row.get("name"), str):
            fail(key, f"expected a mapping with a `name`, and: {', '.join(_ROW_KEYS)}")
        added, watch = row.get("set", {}), row.get("watch", [])
        if not isinstance(added, Mapping):
            fail(f"{key}.set", "expected a mapping of config sections")
        if not isinstance(watch, list) or not all(is_training_metric(name) for name in watch):
            fail(f"{key}.watch", "expected a list of metrics of training steps, as in metrics.jsonl")
        merged = merge(rows[-1].tree if rows else base, added)
        config_from_dict(merged, f"{where}: {key}")
        rows.append(Row(row["name"], merged, tuple(watch)))
    config = config_from_dict(rows[0].tree, where)
    if (changes is None) != (config.model.folder is not None):
        fail("warm_up", "is what rows start from, unless base.model.folder names a model that they do; give one of the two")
    if changes is not None and not config_from_dict(merge(base, changes), f"{where}: warm_up").supervised.updates:
        fail("base.supervised.updates", "is 0; the rows of a study start from one warm-up")
    if not config.eval.sets or not config.eval.every:
        fail("base.eval", "has no sets, or `every: 0`; a study compares held-out accuracy")
    return Study(None if changes is None else merge(base, changes), tuple(seeds), float(tree["target_accuracy"]), tuple(rows))


def is_training_metric(name: Any) -> bool:
    """Whether rollout steps report it."""
    return isinstance(name, str) and not name.startswith("eval/") and definition(name) is not None
