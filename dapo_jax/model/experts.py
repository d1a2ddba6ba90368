"""A mixture of experts: in every layer a router sends each token to k of E feed-forwards.

    p = softmax(x R)        the k largest are chosen, normalized to sum 1 if the model does
    y = Σ_e p_e · down_e(silu(gate_e(x)) · up_e(x))        over the chosen e

Exact: each expert gets all of its tokens, whatever their number. The k copies of the tokens are
sorted by expert, and a grouped matmul multiplies each run of them with the weights of its expert.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from dapo_jax.config import Experts
from dapo_jax.model.logprobs import ROW_AXES, ROW_SPEC, VOCAB_AXIS, split_axis
from dapo_jax.model.quantization import Quantized

_TILE_BYTES = 3 * 2**20  # of an expert in a TPU core's memory; two are there at a time
_BLOCK = 32  # rows of a block off TPU: more would be wasted at the end of each expert

Kernels = Mapping[str, Any]  # router [D, E]; gate and up [E, D, F], down [E, F, D], or in 8 bits


class Routing(NamedTuple):
    """Where tokens went in a layer."""

    chosen: UInt8[Any, "*N k"]
    entropy: Float32[Any, "*N"]  # of the router's distribution over experts


def route(
    x: Float[Array, "*N D"],
    kernel: Float[Array, "D E"],
    experts: Experts,
    replayed: tuple[UInt8[Array, "*N k"], Bool[Array, "*N"]] | None = None,
) -> tuple[Routing, Float[Array, "*N k"]]:
    """The experts of each token, and their weights.

    replayed: earlier choices, and where they replace the router's; weights are always its own.
    """
    logits = jnp.einsum(
        "...d,de->...e", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
    )
    probs = jax.nn.softmax(logits)
    chosen = jax.lax.top_k(jax.lax.stop_gradient(probs), experts.per_token)[1]
    if replayed is not None:
        chosen = jnp.where(replayed[1][..., None], replayed[0].astype(jnp.int32), chosen)
    weight = jnp.take_along_axis(probs, chosen, axis=-1)
    if experts.normalize:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    entropy = -jax.lax.stop_gradient((probs * jax.nn.log_softmax(logits)).sum(axis=-1))
    return Routing(chosen.astype(jnp.uint8), entropy), weight.astype(x.dtype)


def routing_sums(
    routing: Routing, tokens: Bool[Array, "N T"], count: int
) -> dict[str, Float32[Array, ""]]:
    """Sums over tokens, for metrics, of the routing [L, N, T, ...] of all layers (means over them).

    expert_load: tokens of the busiest expert over those of the mean one, in these rows.
    """
    hits = routing.chosen[..., None] == jnp.arange(count, dtype=jnp.uint8)[None, None, None, None]
    load = (hits & tokens[None, ..., None, None]).sum(axis=(1, 2, 3), dtype=jnp.float32)
    held = tokens.sum(dtype=jnp.float32)
    return {
        "routed": held,
        "router_entropy": jnp.where(tokens[None], routing.entropy, 0).mean(axis=0).sum(),
        "expert_load": held * (load.max(axis=1) / jnp.maximum(load.mean(axis=1), 1e-6)).mean(),
    }


def mix(
    x: Float[Array, "*N D"],
    chosen: UInt8[Array, "*N k"],
    weight: Float[Array, "*N k"],
    kernels: Kernels,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "*N D"]:
    """The weighted sum over the chosen experts among those of `kernels`, numbered from `first`."""
    count = _count(kernels)
    expert = chosen.reshape(-1).astype(jnp.int32) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # others come last
    order = jnp.argsort(expert)
    places = order, jnp.argsort(order)
    sizes = (expert[:, None] == jnp.arange(count)[None]).sum(axis=0, dtype=jnp.int32)
    k = chosen.shape[-1]
    rows = _spread(k, x.reshape(-1, x.shape[-1]), places)

    def product(rows: Array, name: str) -> Array:
        kernel = kernels[name]
        if not isinstance(kernel, Quantized):
            return _grouped(rows, kernel, sizes)
        scale = kernel.scale[jnp.minimum(expert[order], count - 1)]
        return (_grouped(rows, kernel.values, sizes) * scale).astype(rows.dtype)

    hidden = jax.nn.silu(product(rows, "gate")) * product(rows, "up")
    hidden = hidden * _spread(1, weight.reshape(-1, 1), places)
    return _collect(k, product(hidden, "down"), places).reshape(x.shape)


def _count(kernels: Kernels) -> int:
    return int(jax.tree.leaves(kernels["gate"])[0].shape[0])


def mixture(
    x: Float[Array, "*N D"], kernels: Kernels, experts: Experts, replayed: Any, first: Any = 0
) -> tuple[Float[Array, "*N D"], Routing]:
    """Routes tokens, and `mix`. kernels: of the router too. replayed: as of `route`."""
    routing, weight = route(x, kernels["router"], experts, replayed)
    return mix(x, routing.chosen, weight, kernels, first), routing


def mixture_over(
    mesh: Mesh, x: Float[Array, "N T D"], kernels: Kernels, experts: Experts, replayed: Any
) -> tuple[Float[Array, "N T D"], Routing]:
    """`mixture` with rows split over ROW_AXES, and the experts over "tensor" where it divides them:
    each device computes its own experts on its rows, and the parts are added.
    """
    axis = split_axis(mesh, VOCAB_AXIS, experts.count)

    def local(x, kernels, replayed):
        first = jax.lax.axis_index(VOCAB_AXIS) * _count(kernels) if axis else 0
        mixed, routing = mixture(x, kernels, experts, replayed, first)
        return mixed[None], routing

    # Added outside: the backward pass then sends every device the sum's gradient only once.
    split = {name: PartitionSpec(None if name == "router" else axis) for name in kernels}
    inputs, outputs = (ROW_SPEC, split, ROW_SPEC), (PartitionSpec(axis, ROW_AXES), ROW_SPEC)
    specs: dict[str, Any] = {"in_specs": inputs, "out_specs": outputs, "check_vma": False}
    parts, routing = jax.shard_map(local, mesh=mesh, **specs)(x, kernels, replayed)
    return jax.lax.reduce_sum(parts, axes=(0,)), routing


def mixture_decoded(
    mesh: Mesh, x: Float[Array, "b D"], kernels: Kernels, experts: Experts, replayed: Any
) -> tuple[Float[Array, "b D"], Routing]:
    """`mixture_over` under vmap over the row shards, which would batch the grouped matmuls."""

    @jax.custom_batching.custom_vmap
    def one_shard(x, kernels):
        return mixture(x, kernels, experts, replayed)

    @one_shard.def_vmap
    def over_shards(size, batched, x, kernels):
        return mixture_over(mesh, x, kernels, experts, replayed), (True, Routing(True, True))

    return one_shard(x, kernels)


# ---- Copies of tokens, sorted by expert ----------------------------------------------------------

_Places = tuple[Array, Array]  # [n] each: the copy at each sorted place, the place of each copy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(copies: int, x: Array, places: _Places) -> Array:
    """Sorted copies [t copies, D] of rows [t, D]. With `_collect` neither pass has a scatter: one
    is slow on a TPU, and sums in no fixed order on a GPU.
    """
    return x[places[0] // copies]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(copies: int, rows: Array, places: _Places) -> Array:
    """The sum of each row's copies: the transpose of `_spread`."""
    return rows[places[1]].reshape(-1, copies, rows.shape[1]).sum(axis=1)


_spread.defvjp(
    lambda copies, x, places: (_spread(copies, x, places), places),
    lambda copies, places, d_rows: (_collect(copies, d_rows, places), None),
)
_collect.defvjp(
    lambda copies, rows, places: (_collect(copies, rows, places), places),
    lambda copies, places, d_x: (_spread(copies, d_x, places), None),
)


# ---- Grouped matmul ------------------------------------------------------------------------------


@jax.custom_vjp
def _grouped(x: Array, w: Array, sizes: Array) -> Array:
    """x [n, i] times w [E, i, o], where expert e has `sizes[e]` rows after those of the experts
    before it. Rows after the last expert's are 0.
    """
    return _product(x, w.astype(x.dtype), sizes, 1)


def _product(x: Array, w: Array, sizes: Array, summed: int) -> Array:
    """`_grouped` over axis `summed` of w; 2: times its transpose."""
    forms: dict[str, Any] = {"tpu": _by_kernel, "default": _in_blocks}
    forms = {name: functools.partial(form, summed=summed) for name, form in forms.items()}
    out = jax.lax.platform_dependent(x, w, sizes, **forms)
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), out, 0)


def _grouped_forward(x, w, sizes):
    return _grouped(x, w, sizes), (x, w, sizes)


def _grouped_backward(saved, d_out):
    x, w, sizes = saved
    d_x = _product(d_out, w.astype(x.dtype), sizes, 2)
    forms: dict[str, Any] = {"tpu": _outer_by_kernel, "default": _outer_in_blocks}
    d_w = jax.lax.platform_dependent(x, d_out, sizes, **forms)
    return d_x, d_w.astype(w.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _tiled(x: Array) -> tuple[Array, int]:
    """x with whole tiles of rows, and the rows of one."""
    rows = 128 if len(x) < 4096 else 256
    return jnp.pad(x, ((0, -len(x) % rows), (0, 0))), rows


def _by_kernel(x: Array, w: Array, sizes: Array, summed: int, interpret: bool = False) -> Array:
    """`_product` on a TPU. XLA's `ragged_dot` multiplies all rows with all experts there too."""
    padded, rows = _tiled(x)
    inputs, outputs = w.shape[summed], w.shape[3 - summed]
    inputs = min(inputs, 2048)
    outputs = min(outputs, max(128, _TILE_BYTES // (inputs * w.dtype.itemsize) // 128 * 128))
    options: dict[str, Any] = {"transpose_rhs": summed == 2, "interpret": interpret}
    options["tiling"] = rows, inputs, outputs
    return gmm(padded, w, sizes, x.dtype, **options)[: len(x)]


def _outer_by_kernel(x: Array, d_out: Array, sizes: Array, interpret: bool = False) -> Array:
    (padded, rows), (slopes, _) = _tiled(x), _tiled(d_out)
    tiling = rows, min(x.shape[1], 1024), min(d_out.shape[1], 512)
    return tgmm(padded.T, slopes, sizes, x.dtype, tiling, interpret=interpret)


def _blocks(x: Array, sizes: Array) -> tuple[Array, Array]:
    """x with one more block of rows, and where each expert's rows begin."""
    return jnp.pad(x, ((0, _BLOCK), (0, 0))), jnp.cumsum(sizes) - sizes


def _in_blocks(x: Array, w: Array, sizes: Array, summed: int) -> Array:
    """`_product` off TPU, where XLA's `ragged_dot` multiplies all rows with all experts.

    The last block of an expert also writes rows of later experts, which these write again.
    """
    padded, begins = _blocks(x, sizes)

    def expert(out, inputs):
        w, begin, size = inputs

        def block(i, out):
            at = begin + i * _BLOCK
            rows = jax.lax.dynamic_slice_in_dim(padded, at, _BLOCK)
            product = jax.lax.dot_general(rows, w, (((1,), (summed - 1,)), ((), ())))
            return jax.lax.dynamic_update_slice_in_dim(out, product, at, axis=0)

        return jax.lax.fori_loop(0, -(-size // _BLOCK), block, out), None

    out = jnp.zeros((len(padded), w.shape[3 - summed]), x.dtype)
    return jax.lax.scan(expert, out, (w, begins, sizes))[0][: len(x)]


def _outer_in_blocks(x: Array, d_out: Array, sizes: Array) -> Array:
    """The gradient in w: x_eᵀ d_out_e of the rows of each expert e."""
    padded, begins = _blocks(x, sizes)
    slopes, _ = _blocks(d_out, sizes)

    def expert(inputs):
        begin, size = inputs

        def block(i, total):
            rows, d_rows = (
                jax.lax.dynamic_slice_in_dim(a, begin + i * _BLOCK, _BLOCK)
                for a in (padded, slopes)
            )
            own = i * _BLOCK + jnp.arange(_BLOCK) < size
            rows = jnp.where(own[:, None], rows, 0)
            return total + jnp.matmul(rows.T, d_rows, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x.shape[1], d_out.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, -(-size // _BLOCK), block, zeros)

    return jax.lax.map(expert, (begins, sizes)).astype(x.dtype)
