"""Low-rank adapters (LoRA, arXiv 2106.09685): frozen weights, each with a small trained product.

    y = x W + (α / r) · (x A) B          A [in, r] random, B [r, out] zero at first
    W' = W + (α / r) · A B               for sampling, evaluation and export

Training keeps the two apart, because x W' would need the gradient in W' before that in A and B, a
third of a step's matmuls. In the parameter tree, A and B are `adapter/a` and `adapter/b` next to
the kernel that they adapt, with its input and output axes.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array

from dapo_jax.config import LoraConfig
from dapo_jax.types import Params

_ADAPTER = "adapter"


class Adapter(nnx.Module):
    """(α / r) · (x A) B of inputs [t, *in], A and B cast to the dtype of x."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], lora: LoraConfig, rngs: nnx.Rngs
    ):
        bound = math.prod(inputs) ** -0.5  # as in peft: its learning rates and alphas carry over
        shape = (*inputs, lora.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.adapter(), shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((lora.rank, *outputs)))
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: Array) -> Array:
        low = jnp.tensordot(x, self.a[...].astype(x.dtype), x.ndim - 1)
        return jnp.tensordot(low * self.scale, self.b[...].astype(x.dtype), 1)


def adapter_of(lora: LoraConfig | None, projection: str) -> LoraConfig | None:
    """The adapter of a projection, if any. With rank 0 there are none and nothing is trained."""
    return lora if lora is not None and lora.rank > 0 and projection in lora.targets else None


def split(params: Params, lora: LoraConfig | None) -> tuple[Params, Params]:
    """(trained, frozen): with LoRA the adapters and the rest, else everything and nothing."""
    if lora is None:
        return params, {}
    flat = traverse_util.flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if _ADAPTER in path}
    frozen = {path: leaf for path, leaf in flat.items() if _ADAPTER not in path}
    return traverse_util.unflatten_dict(adapters), traverse_util.unflatten_dict(frozen)


def join(trained: Params, frozen: Params) -> Params:
    """The inverse of `split`."""
    flat = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(trained)}
    return traverse_util.unflatten_dict(flat)


def stored(params: Params, lora: LoraConfig | None, compute_dtype: str) -> Params:
    """Parameters in the dtypes of training: float32, but frozen weights, norms aside, in compute
    dtype, to which every use casts them."""
    if lora is None:
        return params

    def cast(path: Any, leaf: Array) -> Array:
        return leaf if path[-1].key == "scale" else leaf.astype(compute_dtype)

    trained, frozen = split(params, lora)
    return join(trained, jax.tree_util.tree_map_with_path(cast, frozen))


def merge_layer(layer: Params, lora: LoraConfig | None) -> Params:
    """One layer with adapters merged into float32 kernels W + (α / r) A B."""
    if lora is None:
        return layer
    if _ADAPTER not in layer:
        return {k: merge_layer(v, lora) if isinstance(v, Mapping) else v for k, v in layer.items()}
    rest = {key: value for key, value in layer.items() if key != _ADAPTER}
    a, b = layer[_ADAPTER]["a"], layer[_ADAPTER]["b"]
    product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return {**rest, "kernel": rest["kernel"].astype(jnp.float32) + lora.alpha / lora.rank * product}


def merge(params: Params, lora: LoraConfig | None) -> Params:
    """A tree of the base model: `merge_layer` of one layer at a time."""
    if lora is None:
        return params
    layers = jax.lax.map(functools.partial(merge_layer, lora=lora), params["layers"])
    return {**params, "layers": layers}
