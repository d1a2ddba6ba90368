"""Every config field with its default and meaning, as text."""

import argparse
import dataclasses
import json
import typing

from dapo_jax.config.checks import limits
from dapo_jax.config.load import dump_yaml, load_config
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


def main(argv: list[str] | None = None) -> int:
    """Prints every config field with its default and meaning, or a resolved config file."""
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.config", description=main.__doc__)
    parser.add_argument("--config", help="print this file, resolved and checked")
    text = "override, e.g. optim.learning_rate=1e-5"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    args = parser.parse_args(argv)
    print(dump_yaml(load_config(args.config, args.set)) if args.config else "\n".join(describe()))
    return 0
