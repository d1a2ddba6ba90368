"""Compiled programs kept between runs: jax's persistent compilation cache, on by default.

jax's own JAX_COMPILATION_CACHE_DIR puts it elsewhere, JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
"""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path

import jax
import jaxlib

_LIMIT = 2 * 2**30  # bytes of all that is kept
_LEAST_S = 0.1  # of compile time: below, reading a file is no faster


def use_compilation_cache() -> None:
    """Turns the cache on, unless the environment says where it is, or that there is none.

    Not where JAX_COORDINATOR_ADDRESS starts several processes: only process 0 would write programs.
    """
    decided = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    if any(name in os.environ for name in (*decided, "JAX_COORDINATOR_ADDRESS")):
        return
    with contextlib.suppress(OSError, RuntimeError):  # a home that is read-only, or not known
        folder = cache_folder("jax")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # programs are native code: run only one's own
            return
        drop_oldest(folder.parent, _LIMIT)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)


def cache_folder(name: str) -> Path:
    """`~/.cache/dapo_jax/programs/<name>-<hash>`: code compiled for one CPU may crash another."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = repr((jaxlib.__version__, platform.machine(), platform.processor(), features))
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    return Path(home) / "dapo_jax" / "programs" / f"{name}-{digest}"


def drop_oldest(folder: Path, limit: int) -> None:
    """Deletes the oldest files below a folder until the rest is at most `limit` bytes."""
    files = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run deletes too
            found = file.lstat()
            if stat.S_ISREG(found.st_mode):
                files.append((found.st_mtime_ns, found.st_size, file))
    for _, size, file in sorted(files, reverse=True):
        limit -= size
        if limit < 0:
            file.unlink(missing_ok=True)
