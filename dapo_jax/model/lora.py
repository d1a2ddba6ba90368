"""Low-rank adapters (LoRA, arXiv 2106.09685): the weights of a folder stay as they are, and a small
product beside each is trained.

    y = x W + (α / r) · (x A) B          A [in, r] random, B [r, out] zero: at first the policy is the base model
    W' = W + (α / r) · A B               what is sampled with, evaluated and exported

In training the two are kept apart, because x W' would need the gradient in W' before that in A and
B, a third of a step's matmuls. In the parameter tree A and B lie beside the kernel that they adapt,
as `adapter/a` and `adapter/b`; their input and output axes are its own.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dapo_jax.config import LoraConfig
from dapo_jax.types import Params

_ADAPTER = "adapter"


class Adapter(nnx.Module):
    """(α / r) · (x A) B of inputs [t, *in], A and B cast to the dtype of x."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        fan_in: int,
        lora: LoraConfig,
        rngs: nnx.Rngs,
    ):
        bound = fan_in**-0.5  # as peft draws it, so that its learning rates and alphas carry over
        self.a = nnx.Param(
            jax.random.uniform(rngs.adapter(), (*inputs, lora.rank), minval=-bound, maxval=bound)
        )
        self.b = nnx.Param(jnp.zeros((lora.rank, *outputs)))
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: Array) -> Array:
        low = jnp.tensordot(x, self.a[...].astype(x.dtype), x.ndim - 1)
        return jnp.tensordot(low * self.scale, self.b[...].astype(x.dtype), 1)


def adapter_of(lora: LoraConfig | None, projection: str) -> LoraConfig | None:
    """What adapts a projection, None if nothing does.

    Of rank 0 there are no adapters: all weights are frozen, and nothing is trained.
    """
    return lora if lora is not None and lora.rank > 0 and projection in lora.targets else None


def split(params: Params, lora: LoraConfig | None) -> tuple[Params, Params]:
    """(what is trained, what is frozen): with LoRA the adapters and the rest, else all and nothing.

    `join` is its inverse.
    """
    if lora is None:
        return params, {}
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for key, value in params.items():
        if key == _ADAPTER:
            trained[key] = value
        elif isinstance(value, Mapping):
            inner, rest = split(value, lora)
            frozen[key] = rest
            if inner:
                trained[key] = inner
        else:
            frozen[key] = value
    return trained, frozen


def join(trained: Params, frozen: Params) -> Params:
    """One tree of the two parts of `split`."""
    both = trained.keys() & frozen.keys()
    return {**frozen, **trained, **{key: join(trained[key], frozen[key]) for key in both}}


def stored(params: Params, lora: LoraConfig | None, compute_dtype: str) -> Params:
    """Parameters in the dtypes that training holds them in: float32, but for frozen weights, which
    are cast to compute dtype for every use anyway and lie in that. Norms compute in float32 and
    stay so.
    """
    if lora is None:
        return params

    def cast(path: Any, leaf: Array) -> Array:
        return leaf if path[-1].key == "scale" else leaf.astype(compute_dtype)

    trained, frozen = split(params, lora)
    return join(trained, jax.tree_util.tree_map_with_path(cast, frozen))


def merge_layer(layer: Params, lora: LoraConfig | None) -> Params:
    """One layer without adapters: float32 kernels W + (α / r) A B in the place of those that had
    one.
    """
    if lora is None:
        return layer
    if _ADAPTER not in layer:
        return {
            key: merge_layer(value, lora) if isinstance(value, Mapping) else value
            for key, value in layer.items()
        }
    a, b = layer[_ADAPTER]["a"], layer[_ADAPTER]["b"]
    product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    kernel = layer["kernel"].astype(jnp.float32) + lora.alpha / lora.rank * product
    return {**{key: value for key, value in layer.items() if key != _ADAPTER}, "kernel": kernel}


def merge(params: Params, lora: LoraConfig | None) -> Params:
    """`merge_layer` of every layer, one at a time: a tree of the base model."""
    if lora is None:
        return params
    return {
        **params,
        "layers": jax.lax.map(functools.partial(merge_layer, lora=lora), params["layers"]),
    }
