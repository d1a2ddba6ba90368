"""Rows of the embedding table, where the table lies split over devices: no device makes the whole
of it, nor of its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from dapo_jax.model.logprobs import ROW_AXES, VOCAB_AXIS


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "N T"],
    dtype: Any,
    mesh: Mesh | None,
    split_sequence: bool,
) -> Float[Array, "N T D"]:
    """Rows `tokens` of the table, in dtype; the gradient is added up in float32, whatever the
    dtype.

    (A bfloat16 sum of ones stops growing at 256: frequent tokens would hardly learn.)

    Args: table: [V, D], V over "tensor" and D over "fsdp" where these divide. tokens: int [N, T],
      rows over ("data", "fsdp"). mesh: None where nothing is split. split_sequence: lay T of the
      result over "tensor", which must divide it.

    Returns:
      [N, T, D]
    """
    if mesh is None:
        return table.astype(dtype)[tokens]
    table_spec, rows, split_vocab, split_dim = _layout(table, mesh, split_sequence)

    def local(table, tokens):
        part = table.astype(dtype)
        part = jax.lax.all_gather(part, "fsdp", axis=1, tiled=True) if split_dim else part
        at, hit = _places(tokens, part.shape[0], split_vocab)
        x = jnp.where(hit[..., None], part[jnp.where(hit, at, 0)], 0)
        if not split_sequence:
            return jax.lax.psum(x, VOCAB_AXIS) if split_vocab else x
        if split_vocab:
            return jax.lax.psum_scatter(x, VOCAB_AXIS, scatter_dimension=1, tiled=True)
        size = x.shape[1] // mesh.shape[VOCAB_AXIS]
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(VOCAB_AXIS) * size, size, axis=1)

    inputs = (table_spec, PartitionSpec(ROW_AXES))
    return jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=rows, check_vma=False)(
        table, tokens
    )


def _layout(
    table: Array, mesh: Mesh, split_sequence: bool
) -> tuple[PartitionSpec, PartitionSpec, bool, bool]:
    """Partitions of the table and of the rows found in it, and whether V and D are split."""
    split_vocab = mesh.shape[VOCAB_AXIS] > 1 and table.shape[0] % mesh.shape[VOCAB_AXIS] == 0
    split_dim = table.shape[1] % mesh.shape["fsdp"] == 0
    table_spec = PartitionSpec(VOCAB_AXIS if split_vocab else None, "fsdp" if split_dim else None)
    return (
        table_spec,
        PartitionSpec(ROW_AXES, VOCAB_AXIS if split_sequence else None),
        split_vocab,
        split_dim,
    )


def _places(tokens: Array, size: int, split_vocab: bool) -> tuple[Array, Array]:
    """Tokens as rows of this device's part of the table, and which of them are in it."""
    at = tokens - jax.lax.axis_index(VOCAB_AXIS) * size if split_vocab else tokens
    return at, (at >= 0) & (at < size)


def _forward(table, tokens, dtype, mesh, split_sequence):
    return embed(table, tokens, dtype, mesh, split_sequence), (table, tokens)


def _backward(dtype, mesh, split_sequence, inputs, d_rows):
    table, tokens = inputs
    if mesh is None:
        return jnp.zeros(table.shape, jnp.float32).at[tokens].add(d_rows).astype(table.dtype), None
    table_spec, rows, split_vocab, split_dim = _layout(table, mesh, split_sequence)
    size = table.shape[0] // mesh.shape[VOCAB_AXIS] if split_vocab else table.shape[0]

    def local(tokens, d_rows):
        d_rows = (
            jax.lax.all_gather(d_rows, VOCAB_AXIS, axis=1, tiled=True) if split_sequence else d_rows
        )
        at, hit = _places(tokens, size, split_vocab)
        d_table = (
            jnp.zeros((size, d_rows.shape[-1]), jnp.float32)
            .at[jnp.where(hit, at, size)]
            .add(d_rows, mode="drop")
        )
        if not split_dim:
            return jax.lax.psum(d_table, ROW_AXES)
        return jax.lax.psum(
            jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True), "data"
        )

    inputs = (PartitionSpec(ROW_AXES), rows)
    d_table = jax.shard_map(
        local, mesh=mesh, in_specs=inputs, out_specs=table_spec, check_vma=False
    )(tokens, d_rows)
    return d_table.astype(table.dtype), None


embed.defvjp(_forward, _backward)
