"""A trace of some steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import jax

from dapo_jax.runtime.console import warn
from dapo_jax.runtime.files import Folder, Staged, errors, reason


class Profiler:
    """Context manager: traces the steps `first` to `first + count - 1` into `folder`; none if
    `first` is None.

    A trace that cannot be sent to a bucket is lost with a message; it ends no run.
    """

    def __init__(self, folder: Folder, first: int | None, count: int):
        self._folder, self._steps = (
            folder,
            range(0) if first is None else range(first, first + count),
        )
        self._trace: Staged | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """A step begins: the trace starts or ends here."""
        if step in self._steps and self._trace is None:
            self._trace = Staged(self._folder)
            jax.profiler.start_trace(self._trace.local)
        elif step not in self._steps:
            self._stop()

    def _stop(self) -> None:
        if self._trace is None:
            return
        jax.profiler.stop_trace()
        try:
            self._trace.send()
        except errors(self._folder) as e:
            warn(f"{self._folder}: the trace could not be sent ({reason(e)})")
        self._trace.close()
        self._trace = None
