"""Typed records as plain data for a checkpoint, and back."""

import dataclasses
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(strict=True, ge=0)]
_T = TypeVar("_T")


def plain(value: Any) -> Any:
    """NamedTuples and dataclasses as dicts, tuples as lists, numpy's scalars as Python's."""
    if dataclasses.is_dataclass(value):
        value = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def typed(kind: type[_T], data: Any) -> _T:
    """The record of this type from which `plain` made `data`. Raises ValueError if it is none."""
    how = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    try:
        record = TypeAdapter(kind, config=how).validate_python(data)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}") from None
    _check_unchanged(plain(record), data)
    return record


def _check_unchanged(value: Any, data: Any, where: str = "record") -> None:
    """Raises ValueError where pydantic has read a value of another type, as 1 for "1"."""
    if type(value) is not type(data):
        kinds = f"{type(data).__name__}, not {type(value).__name__}"
        raise ValueError(f"{where}: is {kinds}")
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            _check_unchanged(value[key], data[key], f"{where}.{key}")
