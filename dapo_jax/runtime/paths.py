"""Paths of this machine and of Google Cloud Storage, with pathlib's methods both: what every room
may use of them.
"""

import logging
import os
import re
from pathlib import Path
from typing import TypeAlias

import fsspec.config
from etils import epath

Folder: TypeAlias = Path | epath.Path

# gcsfs would remember for good what it has listed, but tensorstore and other hosts write to the
# same folders.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
# It logs tracebacks of what it then raises.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def as_path(where: str | os.PathLike[str]) -> Folder:
    """The path object for a local path or a gs:// URL."""
    return epath.Path(where) if is_bucket(where) else Path(where)


def is_bucket(where: str | os.PathLike[str]) -> bool:
    """True for what lies in a bucket: it has objects instead of files."""
    return os.fspath(where).startswith("gs://")


def names_objects(where: str) -> bool:
    """True for gs://bucket/name and longer, without what listings take for a pattern."""
    return bool(re.fullmatch(r"gs://[^/*?#\[\]]+(/+[^/*?#\[\]]+)+/*", where))


def errors(path: Folder) -> type[Exception]:
    """What reading or writing there may raise. Clients of a bucket raise all sorts."""
    return Exception if is_bucket(path) else OSError


def reason(error: Exception) -> str:
    """The operating system's word for an error, or the start of its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return "not found"
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if number := re.search(r"\[os_error_code='(\d+)'\]", line):  # of tensorstore
        return os.strerror(int(number[1]))
    return line.split(" [")[0][:200] or type(error).__name__
