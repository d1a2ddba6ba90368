"""Small train states on a mesh of eight devices, and what is saved beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dapo_jax.types import TrainState

HOST = {
    "seed": 7,
    "cursor": {"draw": 12345678901234, "epoch": 0},
    "text": "é\ud800",
    "floats": [0.1, 1e-300, -2.5e17, 1 / 3],
}
GROUPS = {
    "tokens": np.arange(7, dtype=np.int32),
    "logprobs": np.linspace(-3, 0, 11).astype(np.float32),
    "lengths": np.array([[3, 4], [0, 0]], np.int64),
    "empty": np.zeros((0, 5), np.float32),
    "correct": np.array([True, False]),
}


def mesh(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def spec(leaf) -> PartitionSpec:
    return PartitionSpec("fsdp", "data") if leaf.ndim == 2 else PartitionSpec()


@functools.cache
def make_state(seed: int, grid: tuple[int, int] = (2, 4)) -> TrainState:
    """Float32, bfloat16, integer and scalar leaves, with AdamW moments."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embed": jax.random.normal(
            keys[0], (64, 128)
        ),  # more than the 1 KB a part that the store keeps in its index
        "layers": {
            "w": jax.random.normal(keys[1], (8, 16)),
            "norm": jax.random.normal(keys[2], (5,)).astype(jnp.bfloat16),
        },
    }
    state = TrainState(params, optax.adamw(1e-3).init(params), jnp.int32(seed))
    state = jax.tree.map(lambda a: a + jnp.asarray(seed, a.dtype), state)
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh(*grid), spec(a))), state)


def abstract(state: TrainState, grid: tuple[int, int] = (2, 4)) -> TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh(*grid), spec(a))
        ),
        state,
    )


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
