"""Which problems rest: those that every response solved, several draws in a row, teach nothing for
a while.

A problem that is drawn all right `rest_after` times running is skipped for the next `rest_epochs`
passes over the data, then drawn again: the policy may have changed. Nothing is skipped for being
all wrong, for that is what may still be learned.
"""

import functools
from collections.abc import Mapping

import numpy as np

from dapo_jax.data.mixture import Mixture, mixture_order
from dapo_jax.data.problems import Cursor, advance


class PassMemory:
    """Counts, for each of `count` problems, the draws running in which every response was right.

    rest_after: so many make a problem rest; None never does. rest_epochs: for so many epochs, the
    one under way not counted. mixture: of the `count` problems, if they are drawn with weights.
    """

    def __init__(
        self, count: int, rest_after: int | None, rest_epochs: int, mixture: Mixture | None = None
    ):
        self._mixture = mixture
        self._rest_after, self._rest_epochs = rest_after, rest_epochs
        self._streak = np.zeros(count, np.int32)
        self._rests_until = np.full(count, -1, np.int32)  # last epoch in which it is skipped

    def clear(self) -> None:
        """Forgets all draws."""
        self._streak[:], self._rests_until[:] = 0, -1

    def take(
        self, cursor: Cursor, wanted: int, *, seed: int
    ) -> tuple[np.ndarray, np.ndarray, Cursor]:
        """The next `wanted` problems that do not rest, the epoch that each is drawn in, int64
        [wanted] both, and the cursor after them.

        If all rest, none is skipped.
        """
        count = len(self._streak)
        order = (
            functools.partial(mixture_order, self._mixture, seed=seed) if self._mixture else None
        )
        if self._rest_after is None:
            epochs = cursor.epoch + (cursor.index + np.arange(wanted)) // count
            indices, cursor = advance(cursor, count, wanted, seed=seed, order=order)
            return indices, epochs, cursor
        found: list[tuple[int, int]] = []
        skipped = 0
        while len(found) < wanted:
            epoch, index = (cursor.epoch + 1, 0) if cursor.index >= count else cursor
            chosen, cursor = advance(
                cursor, count, min(wanted - len(found), count - index), seed=seed, order=order
            )
            awake = [
                (int(i), epoch) for i in chosen if self._rests_until[i] < epoch or skipped >= count
            ]
            skipped = 0 if awake else skipped + len(chosen)
            found += awake
        indices, epochs = np.array(found, np.int64).reshape(-1, 2).T
        return indices, epochs, cursor

    def record(self, index: int, all_correct: bool, epoch: int) -> None:
        """Tells the outcome of a draw of problem `index`, made in `epoch`."""
        self._streak[index] = self._streak[index] + 1 if all_correct else 0
        if self._rest_after is not None and self._streak[index] >= self._rest_after:
            self._rests_until[index], self._streak[index] = epoch + self._rest_epochs, 0

    def resting(self, epoch: int) -> int:
        """How many problems rest in an epoch."""
        return int((self._rests_until >= epoch).sum())

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to go on, as arrays."""
        return {
            "memory_streak": self._streak.copy(),
            "memory_rests_until": self._rests_until.copy(),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes up a `state` of as many problems; leaves a new memory as it is where the arrays
        hold none.
        """
        if "memory_streak" in arrays:
            if (
                arrays["memory_streak"].shape != self._streak.shape
                or arrays["memory_rests_until"].shape != self._streak.shape
            ):
                raise ValueError("a memory of other problems")
            self._streak, self._rests_until = (
                arrays["memory_streak"].copy(),
                arrays["memory_rests_until"].copy(),
            )
