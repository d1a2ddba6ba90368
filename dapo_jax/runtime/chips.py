"""Published peaks of TPU chips, and the chunk sizes that follow from them."""

import math
from typing import NamedTuple

from jax.sharding import Mesh


class Chip(NamedTuple):
    """Peaks of one chip. Source: cloud.google.com/tpu/docs/<name>, read November 2026; of its
    memory what libtpu 0.0.52 lets a program use.
    """

    flops: float  # bfloat16 FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s sent over all links of a chip; as many received meanwhile
    dcn_bandwidth: float  # bytes/s a chip to other slices, of its host's; inf: not published
    torus: int = 3  # axes of the torus, which share the links

    @property
    def ridge(self) -> float:
        """FLOPs a byte of HBM traffic where compute becomes the limit; of a bfloat16 weight's two
        bytes, the tokens it must meet.
        """
        return self.flops / self.hbm_bandwidth


CHIPS = {
    "v4": Chip(275e12, 30.75 * 2**30, 1228e9, 300e9, math.inf),
    "v5e": Chip(197e12, 15.75 * 2**30, 819e9, 200e9, 3.125e9, 2),  # 6.4 Tbit/s a pod of 256
    "v5p": Chip(459e12, 95.73 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 31.24 * 2**30, 1638e9, 400e9, 12.5e9, 2),
    "tpu7x": Chip(2307e12, 189.48 * 2**30, 7380e9, 600e9, 12.5e9),
}
# An operation takes at least this: the least that libtpu 0.0.52 estimates for a fusion, 1818 cycles
# at 1.5 GHz.
OPERATION_SECONDS = 1.2e-6
# By jax's `device.device_kind`; newer versions of jax rename some.
_BY_KIND = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p"}
_BY_KIND |= {"TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def loss_chunk(mesh: Mesh) -> int:
    """Tokens a device whose logits exist at a time: the chunk_size of `linear_loss`.

    A chunk reads the head and adds to its gradient once. From twice the ridge on, compute hides
    that; more only costs memory. On a CPU 512 measured fastest (BENCHMARKS.md).
    """
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return 512
    name = _BY_KIND.get(device.device_kind)
    return 2048 if name is None else 512 * math.ceil(2 * CHIPS[name].ridge / 512)


def prefill_tokens(mesh: Mesh) -> int:
    """Prompt tokens that a row shard prefills at a time, or one prompt.

    512 are past the ridge of most chips. A GPU takes longer to launch so small a program than to
    run it: with 512 prompts of 160 tokens an H100 samples 2.5x as fast with 8192 (BENCHMARKS.md).
    """
    return 8192 if mesh.devices.flat[0].platform == "gpu" else 512
