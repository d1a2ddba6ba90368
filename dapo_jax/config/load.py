"""Configs from small YAML files, with dotted overrides, presets and task files; and back."""

import ast
import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from dapo_jax.config.checks import ConfigError, build, check, check_texts, printable, shown
from dapo_jax.config.schema import PRESETS, Config, to_dict

_MAX_DEPTH = 16
_MAX_BYTES = 1 << 20
_MAX_NODES = 10_000  # keys and values: 1 MB of them take PyYAML half a minute


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (010, 1:30 and yes are text), keys of text once each, no alias, no tag."""

    yaml_implicit_resolvers: dict[str | None, Any] = {}
    _nodes = _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if isinstance(event, yaml.AliasEvent):
            _refuse(event, "aliases are not allowed")
        if event.tag is not None:
            _refuse(event, f"tags are not allowed, got {event.tag}")
        if self._nodes > _MAX_NODES:
            _refuse(event, f"more than {_MAX_NODES:,} keys and values")
        if self._depth > _MAX_DEPTH:
            _refuse(event, "nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, f"a key is a {key.id}, not text")
            if key.tag != "tag:yaml.org,2002:str":
                _refuse(key, f"key {key.value[:60]} is not text")
            if key.value in seen:
                _refuse(key, f"duplicate key {key.value[:60]!r}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would read as another scalar."""


for _tag, _form in {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?=\.?[0-9])(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}.items():
    _resolver = f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), None
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)


def _refuse(at: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as e:
        problem, line = f"not valid YAML ({(str(e) or 'unreadable').splitlines()[0]})", ""
        if isinstance(e, yaml.MarkedYAMLError):
            problem = " ".join(filter(None, (e.context, e.problem)))
            line = f":{e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{where}{line}: {printable(problem)[:200]}; correct the file") from None


def dump_yaml(config: Config) -> str:
    """YAML that `load_config` reads back to an equal Config."""
    tree = to_dict(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """`base` with the keys of `top` in it; `path` is where in a config they are.

    Sections are merged key by key. Everything else is replaced whole, eval.sets and lists too.
    """
    merged = dict(base)
    for key, value in top.items():
        if (*path, key)[:2] != ("eval", "sets") and isinstance(value, Mapping):
            below = merged.get(key)
            value = merge(below, value, *path, key) if isinstance(below, Mapping) else value
        merged[key] = value
    return merged


def _override(tree: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or len(path) > _MAX_DEPTH:
        raise ConfigError(f"--set {printable(assignment)[:60]}: expected section.key=value")
    where = f"--set {shown(key.strip())}"
    value = _parse_yaml(text, where)

    def put(tree: Any, depth: int) -> Any:
        """The tree with the value at path[depth:], keys and, in lists, indices."""
        name, last = path[depth], depth + 1 == len(path)
        index = int(name) if re.fullmatch("[0-9]{1,4}", name) else None
        if isinstance(tree, str):  # a data set by its path alone
            tree = {"path": tree} if index is None else [tree]
        if isinstance(tree, list):
            if index is None or index > len(tree):
                raise ConfigError(f"{where}: expected 0 to {len(tree)}, got {shown(name)}")
            below = tree[index] if index < len(tree) else None
            entry = value if last else put(below, depth + 1)
            return [*tree[:index], entry, *tree[index + 1 :]]
        tree = tree if isinstance(tree, Mapping) else {}
        if last:
            return merge(tree, {name: value}, *path[:depth])
        return {**tree, name: put(tree.get(name), depth + 1)}

    return put(tree, 0)


def _data_sets(tree: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The tree with each text that names a data set as the mapping that it is short for."""

    def entry(one: Any) -> Any:
        return {"path": one} if isinstance(one, str) else one

    data, evaluation = tree.get("data"), tree.get("eval")
    if isinstance(data, Mapping):
        train = data.get("train", [])
        train = [train] if isinstance(train, str) else train
        if not isinstance(train, list):
            got = "null" if train is None else printable(repr(train))[:60]
            form = "[{path: a.jsonl, weight: 1, columns: {prompt: question}}, ...]"
            raise ConfigError(
                f"{where}: data.train: expected text or a list, got {got}; write {form}"
            )
        train = {"train": [entry(one) for one in train]} if "train" in data else {}
        tree = {**tree, "data": {**data, **train}}
    if isinstance(evaluation, Mapping) and isinstance(sets := evaluation.get("sets"), Mapping):
        sets = {name: entry(one) for name, one in sets.items()}
        tree = {**tree, "eval": {**evaluation, "sets": sets}}
    return tree


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, for a FIFO, device or socket too."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_text(
    path: str | Path, where: str, what: str, kind: str, max_bytes: int = _MAX_BYTES
) -> str:
    """The text of a UTF-8 file of limited size. Raises ConfigError, in these words, otherwise."""
    try:
        with open_regular(path) as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise ConfigError(f"{where}: larger than {max_bytes >> 20} MB; this is no {what} file")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
    except (OSError, ValueError) as e:
        reason, fix = getattr(e, "strerror", None) or str(e), f"give the path of a {kind} file"
        raise ConfigError(f"{where}: cannot read {what} ({reason}); {fix}") from None


def _task_settings(path: str, data: Any, where: str) -> dict[str, Any]:
    """Keys that a task file sets and the config overrides; a resolved config has its template."""
    if not path.endswith(".py"):
        raise ConfigError(f"{where}: expected a Python file, name.py, got {shown(path)}")
    settings: dict[str, Any] = {"reward": {"verifier": "custom", "function": f"{path}:reward"}}
    if not (isinstance(data, Mapping) and "template" in data):
        settings["data"] = {"template": _task_template(path, f"{where}: {printable(path)}")}
    return settings


def _task_template(path: str, where: str) -> str:
    """The text that a Python file assigns to TEMPLATE. The file is parsed, not run."""
    try:
        body = ast.parse(read_text(path, where, "task", "Python")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = f":{e.lineno}" if isinstance(e, SyntaxError) and e.lineno else ""
        reason = printable(getattr(e, "msg", "") or str(e) or "nested too deeply")[:200]
        raise ConfigError(f"{where}{line}: not valid Python ({reason}); correct the file") from None
    template = None
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if "TEMPLATE" in map(ast.unparse, targets):
                template = getattr(node.value, "value", None)
    if not isinstance(template, str) or template.count("{prompt}") != 1:
        needs = 'needs TEMPLATE = "... {prompt} ...": one text in quotes with {prompt} exactly once'
        raise ConfigError(f"{where}: {needs}, as the file is not run; or set data.template")
    return template


def config_from_dict(
    tree: Mapping[str, Any], where: str = "config", overrides: Sequence[str] = ()
) -> Config:
    """Builds and checks a Config, with overrides. `where` names the source in errors."""
    for assignment in overrides:
        tree = _override(tree, assignment)

    def fail(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{where}: {key}: {message}")

    check_texts(tree, "", fail)
    preset, task = tree.get("preset"), tree.get("task")
    if isinstance(preset, str) and preset in PRESETS:
        tree = merge(PRESETS[preset], tree)
    if isinstance(task, str):
        tree = merge(_task_settings(task, tree.get("data"), f"{where}: task"), tree)
    config = build(Config, _data_sets(tree, where), fail)
    check(config, where)
    return config


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file of at most 1 MB holds. Raises ConfigError for all others."""
    where = printable(str(path))
    tree = _parse_yaml(read_text(path, where or "config", "config", "YAML"), where)
    if not isinstance(tree, dict):
        what = "empty" if tree is None else f"a {type(tree).__name__}"
        see = "see `python -m dapo_jax.config`"
        raise ConfigError(f"{where}: is {what}; expected `section:` keys, {see}")
    return tree


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides, and checks the result.

    An override of a section is merged into it; a number is an index into a list:
    `data.train.0.weight=2`. Raises ConfigError, and nothing else.

    >>> overrides = ["dapo.clip_eps_high=0.2", "optim.learning_rate=1e-5"]
    >>> config = load_config("configs/tiny_cpu.yaml", overrides)
    >>> config.dapo.clip_eps_high, config.optim.learning_rate, config.dapo.responses_per_prompt
    (0.2, 1e-05, 8)
    """
    return config_from_dict(read_mapping(path), printable(str(path)), overrides)
