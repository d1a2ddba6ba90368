"""Every config field with its default and meaning, as text."""

import dataclasses
import difflib
import json
import textwrap
import typing
from collections.abc import Iterator

from dapo_jax.config.checks import ConfigError, limits, printable
from dapo_jax.config.schema import Config


def _fields(cls: type, path: str = "", lead: str = "") -> Iterator[tuple[str, str]]:
    """Every field's key, and its default, meaning and bounds as a commented YAML line."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        alternatives = typing.get_args(hints[field.name])
        words = [one for one in alternatives if isinstance(one, str)]  # of a Literal
        words += [w for one in alternatives for w in typing.get_args(one) if isinstance(w, str)]
        notes = (" | ".join(words), field.metadata["description"], limits(field))
        meaning = "; ".join(filter(None, notes))
        key, name, default = f"{path}{field.name}", f"{lead}{field.name}:", field.default
        if dataclasses.is_dataclass(default):
            yield key, f"{name}  # {meaning}"
            yield from _fields(type(default), f"{key}.", f"{lead}  ")
            continue
        yield key, f"{name + ' ' + _shown(field):<50}  # {meaning}"
        for kind in alternatives:  # what else it may hold, as comments
            if dataclasses.is_dataclass(kind):
                inner = _fields(typing.cast(type, kind), f"{key}.")
                yield from ((below, f"{lead}  # {line}") for below, line in inner)


def _shown(field: dataclasses.Field) -> str:
    """The default of a field, short enough for a line; nothing where there is none."""
    if field.default is dataclasses.MISSING:
        return "{}" if field.default_factory is dict else ""
    if field.default is None or isinstance(field.default, bool):
        return json.dumps(field.default)
    many = isinstance(field.default, tuple)
    shown = str([getattr(one, "path", one) for one in field.default] if many else field.default)
    return shown if len(shown) <= 50 else f"{shown[:40]!r}..."


def describe(key: str = "") -> list[str]:
    """The lines of a field or section, of all without one. ConfigError for an unknown key."""
    fields = [*_fields(Config)]
    found = [line for path, line in fields if not key or f"{path}.".startswith(f"{key}.")]
    if not found:
        near = difflib.get_close_matches(key, [path for path, _ in fields], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "without KEY, all are listed"
        raise ConfigError(f"{printable(key)[:100]}: no such field or section; {hint}")
    return textwrap.dedent("\n".join(found)).splitlines()
