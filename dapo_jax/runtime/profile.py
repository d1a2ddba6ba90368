"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import tempfile
from pathlib import Path

import jax

from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import Folder, is_bucket, reason, remove, upload


class Profiler:
    """Context manager: traces `count` steps from `first` into `folder`; none if `first` is None."""

    def __init__(self, folder: Folder, first: int | None, count: int):
        self._folder = folder
        self._steps = range(0) if first is None else range(first, first + count)
        self._trace: Path | None = None  # where it is written

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """A step begins: the trace starts or ends here."""
        if step not in self._steps:
            self._stop()
        elif self._trace is None:
            bucket = is_bucket(self._folder)
            self._trace = Path(tempfile.mkdtemp() if bucket else self._folder)
            jax.profiler.start_trace(self._trace)

    def _stop(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None:
            return
        jax.profiler.stop_trace()
        if is_bucket(self._folder):
            try:
                upload(trace, self._folder)
            except Exception as e:  # ends no run
                warn(f"{self._folder}: the trace could not be sent ({reason(e)})")
            remove(trace)
