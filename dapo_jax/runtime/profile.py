"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

from pathlib import Path

import jax


class Profiler:
    """Context manager: traces the steps `first` to `first + count - 1` into `folder`; none if `first` is None."""

    def __init__(self, folder: Path, first: int | None, count: int):
        self._folder, self._steps = folder, range(0) if first is None else range(first, first + count)
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """A step begins: the trace starts or ends here."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step not in self._steps:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
