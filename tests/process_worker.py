"""One process of a job of several: a fixed loss and gradient, shared judging, then a whole training
run. For test_processes.py.

python process_worker.py OUT.npz CONFIG RUN_DIR     with JAX_COORDINATOR_ADDRESS etc. for a job of several processes
"""

import functools
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

from dapo_jax import cli, train
from dapo_jax.config import DapoSection, MeshSection
from dapo_jax.dapo.loss import loss_fn
from dapo_jax.dapo.packing import build_batch
from dapo_jax.dapo.update import accumulate
from dapo_jax.model import weights
from dapo_jax.runtime import lock, multihost
from dapo_jax.runtime.mesh import make_mesh, params_sharding, put, put_rows
from dapo_jax.training import setup
from dapo_jax.types import InputError, Verdict

VERDICTS = [
    Verdict(i % 3 == 0, i / 4, "timed out after 1 s" if i == 5 else None, i != 2) for i in range(7)
]


def gradient() -> dict[str, np.ndarray]:
    """Loss and gradient of a fixed batch over fsdp 2 x tensor 2 devices, and which of its rows this
    process holds.
    """
    model = tiny.model()
    mesh = make_mesh(MeshSection(1, 2, 2))
    batch, _ = build_batch(
        tiny.make_items(model, 12), row_len=13, rows_per_microbatch=8, microbatches=2
    )
    sharding = params_sharding(tiny.params(model), mesh)
    params = jax.tree.map(lambda p, s: put(np.asarray(p), s), tiny.params(model), sharding)
    batch = put_rows(batch, mesh, axis=1)
    loss_of = functools.partial(loss_fn, model=model, algo=DapoSection(), chunk_size=8, mesh=mesh)
    loss, _, grads = jax.jit(
        functools.partial(accumulate, loss_fn=loss_of), out_shardings=(None, None, sharding)
    )(params, batch)
    rows = {row for shard in batch.tokens.addressable_shards for row in range(8)[shard.index[1]]}
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(multihost.fetch(grads))])
    return {
        "loss": np.asarray(multihost.fetch(loss)),
        "gradient": flat,
        "rows": np.array(sorted(rows)),
    }


def refusals(run_dir: str) -> list[str]:
    """What this process says of facts of which one is its own, and of a run folder that the first
    process alone has.
    """
    mine, said = jax.process_index(), []
    multihost.check_alike(lambda: {"a": 1, "b": 2})
    with lock.locked(Path(run_dir)):
        pass
    lock._SHOWN_S = 0.5
    for attempt in (
        lambda: multihost.check_alike(lambda: {"z": "same", "weights": mine, "a": mine}),
        lambda: lock.locked(Path(f"{run_dir}.{mine}")).__enter__(),
    ):
        try:
            attempt()
        except InputError as e:
            said.append(str(e))
    return said


def loading(out: str) -> dict[str, np.ndarray]:
    """Weights of a folder over fsdp 2 x tensor 2 devices: all of them, the bytes that this process
    read of the files, and those of its shards. Then what it says of a NaN in the last column.
    """
    weights.safe_open = tiny.CountedReads
    goldens = Path(__file__).parent / "goldens/qwen3_untied"
    like = weights.base_params(weights.load_model_config(goldens))
    shardings = params_sharding(like, make_mesh(MeshSection(1, 2, 2)))
    params = setup._own_shards(str(goldens), like, shardings)
    read, own = tiny.CountedReads.total, tiny.shard_bytes(params)
    folder = Path(out).parent / f"model-{Path(out).stem}{jax.process_index()}"
    shutil.copytree(goldens, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, -1] = np.nan  # read by one process
    save_file(tensors, folder / "model.safetensors")
    said = ""
    try:
        setup._own_shards(str(folder), like, shardings)
    except InputError as e:
        said = str(e)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(multihost.fetch(params))])
    return {"weights": flat, "read": read, "own": own, "nan": said}


def main(out: str, config: str, run_dir: str) -> int:
    multihost.initialize()
    found = gradient()
    mine = multihost.share(VERDICTS)
    for before in (0, 3):
        assert (
            multihost.gather_verdicts(multihost.share(VERDICTS, before), len(VERDICTS), before)
            == VERDICTS
        )
    np.savez(
        out.replace(".npz", f"{jax.process_index()}.npz"),
        **found,
        **loading(out),
        judged=len(mine),
        refusals=refusals(run_dir),
    )
    return train.main(["--config", config, "--run-dir", run_dir])


if __name__ == "__main__":
    cli.run(lambda argv: main(*argv), sys.argv[1:])
