"""Which sequences have which pages of one shard's KV cache. All decisions are in logical time."""

from collections.abc import Sequence

import numpy as np

_Key = tuple[int, bytes]  # the page before it, and the tokens of a full page of a prompt


class Pages:
    """Pages 1 to `count`; page 0 belongs to no sequence."""

    def __init__(self, count: int):
        self._free = list(range(count, 0, -1))
        self._holders = np.zeros(count + 1, int)
        self._prompts: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def admit(
        self, prompt: Sequence[bytes], count: int, spare: int
    ) -> tuple[list[int], int] | None:
        """`count` pages for a sequence, of which the first are those of its prompt.

        Pages of equal prompts are shared: the second number is how many are filled already.

        Args:
          prompt: the tokens of each full page of the prompt.
          spare: free pages that must be left.

        Returns: None if too few are free.
        """
        shared = list[int]()
        for tokens in prompt:
            key = (shared[-1] if shared else 0, tokens)
            if key not in self._prompts:
                break
            shared.append(self._prompts[key])
        if self.free < count - len(shared) + spare:
            return None
        pages = shared + self.take(count - len(shared))
        self._holders[shared] += 1
        for n in range(len(shared), len(prompt)):
            self._keys[pages[n]] = key = (pages[n - 1] if n else 0, prompt[n])
            self._prompts[key] = pages[n]
        return pages, len(shared)

    def take(self, count: int) -> list[int]:
        """Free pages. IndexError if they are fewer."""
        pages = [self._free.pop() for _ in range(count)]
        self._holders[pages] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Gives up the pages of a sequence; each is free once no other sequence has it."""
        held = np.array(pages, int)
        self._holders[held] -= 1
        free = held[self._holders[held] == 0][::-1].tolist()
        self._free += free
        for page in self._keys.keys() & free:
            del self._prompts[self._keys.pop(page)]
