"""Which sequences have which pages: random lives of many sequences, against sets."""

import numpy as np
import pytest

from dapo_jax.rollout.pages import Pages

PROMPTS = [[], [b"a"], [b"a", b"b"], [b"a", b"c"], [b"b", b"b"], [b"b", b"b", b"a"]]


@pytest.mark.parametrize("seed", range(20))
def test_no_page_is_lost_or_freed_twice_or_shared_but_by_equal_prompts(seed):
    rng, pages, count = np.random.default_rng(seed), Pages(30), 30
    lives: list[tuple[list[bytes], list[int]]] = []
    for _ in range(400):
        held = {page for _, own in lives for page in own}
        assert pages.free == count - len(held) and held <= set(range(1, count + 1))
        at = int(rng.integers(len(lives))) if lives else 0
        match rng.integers(3):
            case 0:
                prompt, spare = PROMPTS[rng.integers(len(PROMPTS))], int(rng.integers(3))
                size = len(prompt) + int(rng.integers(1, 5))
                known = [p for p, _ in lives]
                equal = max(
                    n
                    for n in range(len(prompt) + 1)
                    if not n or prompt[:n] in [p[:n] for p in known]
                )
                found = pages.admit(prompt, size, spare)
                fits = size - equal + spare <= count - len(held)
                assert (found is not None) == fits
                if found is not None:
                    own, shared = found
                    assert shared == equal and len(own) == len(set(own)) == size
                    assert not held & set(own[shared:])
                    other = next(
                        (o for p, o in lives if equal and p[:equal] == prompt[:equal]), own
                    )
                    assert own[:equal] == other[:equal]
                    lives.append((prompt, own))
            case 1 if lives and pages.free:
                (page,) = pages.take(1)
                assert page not in held
                lives[at][1].append(page)
            case 2 if lives:
                pages.release(lives.pop(at)[1])
    for _, own in lives:
        pages.release(own)
    assert pages.free == count and sorted(pages.take(count)) == [*range(1, 31)]
    with pytest.raises(IndexError):
        pages.take(1)
