"""How long a checkpoint holds up a run, and how long it is written.

python tests/measure_save.py GB [FOLDER]     figures of RELIABILITY.md

The state has a float32 weight and two moments of AdamW; a third of it each.
"""

import os
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from dapo_jax.runtime.checkpoint import Checkpoints, _describe, _items
from dapo_jax.types import TrainState

LEAVES = 24


def measured(call) -> str:
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return f"{time.perf_counter() - start:.2f} s ({time.process_time() - cpu:.2f} CPU s)"


def main() -> None:
    size = float(sys.argv[1]) * 1e9
    rows = round(size / 3 / LEAVES / 4 / 1024)
    keys = jax.random.split(jax.random.key(0), LEAVES)
    params = {str(i): jax.random.normal(key, (rows, 1024)) for i, key in enumerate(keys)}
    moments = [jax.tree.map(jnp.square, params), jax.tree.map(jnp.negative, params)]
    state = jax.block_until_ready(TrainState(params, moments, jnp.int32(0)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    where = sys.argv[2] if len(sys.argv) > 2 else None
    with tempfile.TemporaryDirectory(dir=where) as folder, Checkpoints(folder, keep=1) as saved:
        saved.save(0, state, {}, {})  # compiles the digests
        saved.wait()
        print(f"{size / 1e9:.2f} GB; at 1 GB/s, as `plan` counts: {size / 1e9:.2f} s")
        print("of it, digests:", measured(lambda: list(map(_describe, _items(state).values()))))
        for step in (1, 2, 3):
            print("held up:", measured(lambda step=step: saved.save(step, state, {}, {})))
            print("written after another", measured(saved.wait))
        saved.save(4, state, {}, {})
        print("held up by the save before:", measured(lambda: saved.save(5, state, {}, {})))
        path = os.path.join(folder, "written")
        with open(path, "wb") as file:
            print("the same bytes by write and fsync:", measured(lambda: plain(file, params)))


def plain(file, params) -> None:
    for _ in range(3):
        for leaf in params.values():
            file.write(memoryview(jax.device_get(leaf)).cast("B"))
    file.flush()
    os.fsync(file.fileno())


if __name__ == "__main__":
    main()
