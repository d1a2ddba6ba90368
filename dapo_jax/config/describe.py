"""Every config field with its default and meaning, as text."""

import dataclasses
import difflib
import json
import textwrap
import typing

from dapo_jax.config.checks import ConfigError, limits, printable
from dapo_jax.config.schema import Config


def describe(cls: type = Config, indent: str = "") -> list[str]:
    """Every field with its default, meaning and bounds, as commented YAML lines."""
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        alternatives = typing.get_args(hints[field.name])
        words = [one for one in alternatives if isinstance(one, str)]  # of a Literal
        words += [w for one in alternatives for w in typing.get_args(one) if isinstance(w, str)]
        notes = (" | ".join(words), field.metadata["description"], limits(field))
        meaning = "; ".join(filter(None, notes))
        name, default = f"{indent}{field.name}:", field.default
        if dataclasses.is_dataclass(default):
            lines += [f"{name}  # {meaning}", *describe(type(default), indent + "  ")]
            continue
        lines.append(f"{name + ' ' + _shown(field):<50}  # {meaning}")
        for kind in alternatives:  # what else it may hold, as comments
            if dataclasses.is_dataclass(kind):
                inner = describe(typing.cast(type, kind))
                lines += [f"{indent}  # {line}" for line in inner]
    return lines


def _shown(field: dataclasses.Field) -> str:
    """The default of a field, short enough for a line; nothing where there is none."""
    if field.default is dataclasses.MISSING:
        return "{}" if field.default_factory is dict else ""
    if field.default is None or isinstance(field.default, bool):
        return json.dumps(field.default)
    many = isinstance(field.default, tuple)
    shown = str([getattr(one, "path", one) for one in field.default] if many else field.default)
    return shown if len(shown) <= 50 else f"{shown[:40]!r}..."


def explain(key: str) -> list[str]:
    """The lines of a field or section. Raises ConfigError for an unknown key."""
    found, path = dict[str, list[str]](), list[str]()
    for line in describe():
        lead = line[: len(line) - len(line.lstrip(" #"))]  # of what else a field may hold: `  # `
        depth = len(lead.replace("# ", "")) // 2
        path = [*path[:depth], line[len(lead) :].partition(":")[0]]
        for end in range(1, len(path) + 1):
            found.setdefault(".".join(path[:end]), []).append(line)
    if key not in found:
        near = difflib.get_close_matches(key, found, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "without KEY, all are listed"
        raise ConfigError(f"{printable(key)[:100]}: no such field or section; {hint}")
    return textwrap.dedent("\n".join(found[key])).splitlines()
