"""Embedding lookup on a table that is split over devices: no device holds all of the table, nor of
its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dapo_jax.model.logprobs import (
    ROW_AXES,
    ROW_SPEC,
    VOCAB_AXIS,
    per_device,
    split_axis,
    sum_over_rows,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "N T"],
    dtype: Any,
    mesh: Mesh | None,
    split_sequence: bool,
) -> Float[Array, "N T D"]:
    """Rows `tokens` of the table, in dtype. The gradient is summed in float32 whatever the dtype: a
    bfloat16 sum of ones stops at 256, so frequent tokens would hardly learn.

    table: V split over "tensor" and D over "fsdp" where these divide. tokens: rows over ("data",
    "fsdp"). mesh: None where nothing is split. split_sequence: split T of the result over "tensor".
    """
    if mesh is None:
        return table.astype(dtype)[tokens]
    spec = _table_spec(table, mesh)

    def local(table, tokens):
        part = table.astype(dtype)
        part = jax.lax.all_gather(part, "fsdp", axis=1, tiled=True) if spec[1] else part
        at, hit = _places(tokens, part.shape[0], spec)
        x = jnp.where(hit[..., None], part[jnp.where(hit, at, 0)], 0)
        if not split_sequence:
            return jax.lax.psum(x, VOCAB_AXIS) if spec[0] else x
        if spec[0]:
            return jax.lax.psum_scatter(x, VOCAB_AXIS, scatter_dimension=1, tiled=True)
        size = x.shape[1] // mesh.shape[VOCAB_AXIS]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(VOCAB_AXIS) * size, size, axis=1)

    return per_device(local, mesh, (spec, ROW_SPEC), _rows(split_sequence))(table, tokens)


def _table_spec(table: Array, mesh: Mesh) -> PartitionSpec:
    v, d = table.shape
    return PartitionSpec(split_axis(mesh, VOCAB_AXIS, v), split_axis(mesh, "fsdp", d))


def _rows(split_sequence: bool) -> PartitionSpec:
    return PartitionSpec(ROW_AXES, VOCAB_AXIS if split_sequence else None)


def _places(tokens: Array, size: int, spec: PartitionSpec) -> tuple[Array, Array]:
    """Tokens as rows of this device's part of the table, and which of them are in it."""
    at = tokens - jax.lax.axis_index(VOCAB_AXIS) * size if spec[0] else tokens
    return at, (at >= 0) & (at < size)


def _forward(table, tokens, dtype, mesh, split_sequence):
    return embed(table, tokens, dtype, mesh, split_sequence), (table, tokens)


def _backward(dtype, mesh, split_sequence, inputs, d_rows):
    table, tokens = inputs
    if mesh is None:
        return jnp.zeros(table.shape, jnp.float32).at[tokens].add(d_rows).astype(table.dtype), None
    spec = _table_spec(table, mesh)
    size = table.shape[0] // (mesh.shape[VOCAB_AXIS] if spec[0] else 1)

    def local(tokens, d_rows):
        if split_sequence:
            d_rows = jax.lax.all_gather(d_rows, VOCAB_AXIS, axis=1, tiled=True)
        at, hit = _places(tokens, size, spec)
        d_table = jnp.zeros((size, d_rows.shape[-1]), jnp.float32)
        d_table = d_table.at[jnp.where(hit, at, size)].add(d_rows, mode="drop")
        return sum_over_rows(d_table, 1 if spec[1] else None)

    inputs = (ROW_SPEC, _rows(split_sequence))
    return per_device(local, mesh, inputs, spec)(tokens, d_rows).astype(table.dtype), None


embed.defvjp(_forward, _backward)
