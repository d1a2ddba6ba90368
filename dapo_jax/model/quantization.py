"""8-bit kernels of rollout weights: a decode step reads half the bytes of bfloat16."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8, Num

from dapo_jax.types import Params

_SUMMED = {"q": (-3,), "k": (-3,), "v": (-3,), "o": (-3, -2)}  # axes of kernels; others: (-2,)


class Quantized(NamedTuple):
    """A kernel, W ≈ values · scale."""

    values: Int8[Any, "*S"]  # [*in, *out]
    scale: Float32[Any, "*out"]


def quantize(x: Num[Array, "*S"], axes: tuple[int, ...] = (-1,)) -> Quantized:
    """x as int8, with scale = max|x| / 127 over `axes`: off by at most half a scale."""
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis=axes, keepdims=True) / 127, 1e-30)
    return Quantized(jnp.round(wide / scale).astype(jnp.int8), scale.squeeze(axes))


def quantize_layer(layer: Params) -> Params:
    """A layer, or all of them, with each kernel in 8 bits and a scale an output channel, of each
    expert for itself. A router stays as it is: its choices are sensitive, and it is small.
    """

    def each(name: str, part: Any) -> Any:
        if name == "router" or not isinstance(part, Mapping):
            return part
        part = {key: each(key, value) for key, value in part.items()}
        if "kernel" in part:
            part["kernel"] = quantize(part["kernel"], _SUMMED.get(name, (-2,)))
        return part

    return each("", layer)


def product(spec: str, x: Array, kernel: Array | Quantized) -> Array:
    """An einsum of x and a kernel in x's dtype, partial sums over `tensor` too; then the scales."""
    if not isinstance(kernel, Quantized):
        return jnp.einsum(spec, x, kernel.astype(x.dtype))
    y = jnp.einsum(spec, x, kernel.values.astype(x.dtype))
    return (y * kernel.scale[None]).astype(x.dtype)
