"""What a chip can do: one table, and the numbers that follow from it."""

import math
from typing import NamedTuple

from jax.sharding import Mesh


class Chip(NamedTuple):
    """Published peaks of one chip. TPU: cloud.google.com/tpu/docs/<name>, read November 2026."""

    flops: float  # bfloat16 FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: (
        float  # bytes/s that a chip sends over all its links; it receives as many at the same time
    )
    dcn_bandwidth: float  # bytes/s that a chip sends to other slices, its share of the host's network; inf where none is published

    @property
    def ridge(self) -> float:
        """FLOPs a byte from HBM at which arithmetic, not memory, is the limit: tokens a weight must
        meet, at 2 bytes a weight.
        """
        return self.flops / self.hbm_bandwidth


CHIPS = {
    "v4": Chip(275e12, 32e9, 1228e9, 300e9, math.inf),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 3.125e9),  # 6.4 Tbit/s a pod of 256
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 12.5e9),
    "tpu7x": Chip(2307e12, 192e9, 7380e9, 600e9, 12.5e9),
}

# What jax calls them, `device.device_kind`.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_name(device_kind: str) -> str | None:
    """The name of a TPU in `CHIPS`, None for other devices."""
    return _KINDS.get(device_kind)


def loss_chunk(mesh: Mesh) -> int:
    """Tokens a device whose logits exist at a time: what `linear_loss` takes as its chunk_size.

    A chunk reads the head and adds to its gradient once, which arithmetic hides from twice the
    ridge on; more only costs memory. On a CPU 512 measured fastest (BENCHMARKS.md).
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return 512
    name = chip_name(device.device_kind)
    return 2048 if name is None else 512 * math.ceil(2 * CHIPS[name].ridge / 512)


def prefill_tokens(mesh: Mesh) -> int:
    """Prompt tokens that a row shard reads at a time, or one prompt.

    512 are past the ridge of most chips: arithmetic takes longer than reading the weights. A GPU
    spends longer on starting so small a program than on running it; of 512 prompts of 160 tokens,
    an H100 samples 2.5 times as fast with 8192 (BENCHMARKS.md).
    """
    return 8192 if mesh.devices.flat[0].platform == "gpu" else 512
