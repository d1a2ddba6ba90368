"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import jax

from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import Folder, Staged, errors, reason


class Profiler:
    """Context manager: traces `count` steps from `first` into `folder`; none if `first` is None."""

    def __init__(self, folder: Folder, first: int | None, count: int):
        self._folder = folder
        self._steps = range(0) if first is None else range(first, first + count)
        self._trace: Staged | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """A step begins: the trace starts or ends here."""
        if step not in self._steps:
            self._stop()
        elif self._trace is None:
            self._trace = Staged(self._folder)
            jax.profiler.start_trace(self._trace.local)

    def _stop(self) -> None:
        trace, self._trace = self._trace, None
        if trace is None:
            return
        jax.profiler.stop_trace()
        try:
            trace.send()
        except errors(self._folder) as e:  # ends no run
            warn(f"{self._folder}: the trace could not be sent ({reason(e)})")
        trace.close()
