"""A mixture of experts: in every layer a router sends each token to k of E feed-forwards.

    p = softmax(x R)        the k largest are chosen, normalized to sum 1 if the model does
    y = Σ_e p_e · down_e(silu(gate_e(x)) · up_e(x))        over the chosen e

Exact: each expert gets all of its tokens, whatever their number. The k copies of the tokens are
sorted by expert, and a grouped matmul multiplies each run of them with the weights of its expert.
Decoding hands it the weights of all layers and a layer's number: a slice of them would be copied.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from dapo_jax.config import Experts
from dapo_jax.model.logprobs import ROW_AXES, ROW_SPEC, VOCAB_AXIS, per_device, split_axis

_TILE_BYTES = 3 * 2**20  # of an expert in a TPU core's memory; two are there at a time
_BLOCK = 32  # rows of a block off TPU: more would be wasted at the end of each expert

# Router [D, E]; gate and up [E, D, F], down [E, F, D], or in 8 bits, or `OfLayer`.
Kernels = Mapping[str, Any]


class OfLayer(NamedTuple):
    """One layer of a stack. The grouped matmul takes all of it, for XLA would copy a slice."""

    stack: Any  # [L, E, i, o], or `Quantized` with scales [L, E, o]
    layer: Any


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
    gate, up, down = (_of_layer(kernels[name]) for name in ("gate", "up", "down"))
    count = jax.tree.leaves(gate)[0].shape[1]
    expert = chosen.reshape(-1).astype(jnp.int32) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)  # others come last
    order = jnp.argsort(expert)
    places = order, jnp.argsort(order)
    bounds = (expert[:, None] < jnp.arange(count + 1)[None]).sum(axis=0, dtype=jnp.int32)
    k = chosen.shape[-1]
    rows = _spread(k, x.reshape(-1, x.shape[-1]), places)
    hidden = jax.nn.silu(_grouped(rows, gate, bounds)) * _grouped(rows, up, bounds)
    hidden = hidden * _spread(1, weight.reshape(-1, 1), places)
    return _collect(k, _grouped(hidden, down, bounds), places).reshape(x.shape)


def _of_layer(kernel: Any) -> OfLayer:
    if isinstance(kernel, OfLayer):
        return kernel
    return OfLayer(jax.tree.map(lambda leaf: leaf[None], kernel), jnp.zeros((), jnp.int32))


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
    own = experts.count // (mesh.shape[VOCAB_AXIS] if axis else 1)

    def local(x, kernels, replayed):
        first = jax.lax.axis_index(VOCAB_AXIS) * own if axis else 0
        mixed, routing = mixture(x, kernels, experts, replayed, first)
        return mixed[None], routing

    # Added outside: the backward pass then sends every device the sum's gradient only once.
    one, stacked = PartitionSpec(axis), OfLayer(PartitionSpec(None, axis), PartitionSpec())
    split = {name: stacked if isinstance(w, OfLayer) else one for name, w in kernels.items()}
    split["router"] = PartitionSpec()
    inputs, outputs = (ROW_SPEC, split, ROW_SPEC), (PartitionSpec(axis, ROW_AXES), ROW_SPEC)
    parts, routing = per_device(local, mesh, inputs, outputs)(x, kernels, replayed)
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


_Bounds = Int32[Any, " E_1"]  # E + 1: rows bounds[e] to bounds[e + 1] are expert e's


@jax.custom_vjp
def _grouped(x: Array, w: OfLayer, bounds: _Bounds) -> Array:
    """x [n, i] times each expert's weights of a layer. Rows after the last expert's are 0."""
    return _product(x, w, bounds, 1)


def _product(x: Array, w: OfLayer, bounds: _Bounds, summed: int) -> Array:
    """`_grouped` over axis `summed` of [E, i, o]: 1, or 2 to multiply with the transposes."""
    forms: dict[str, Any] = {"tpu": _by_kernel, "default": _in_blocks}
    forms = {name: functools.partial(form, summed=summed) for name, form in forms.items()}
    out = jax.lax.platform_dependent(x, w, bounds, **forms)
    return jnp.where(jnp.arange(len(x))[:, None] < bounds[-1], out, 0)


def _grouped_forward(x, w, bounds):
    return _grouped(x, w, bounds), (x, w, bounds)


def _grouped_backward(saved, d_out):
    """Of a stack of one layer, as training has it."""
    x, w, bounds = saved
    d_x = _product(d_out, w, bounds, 2)
    forms: dict[str, Any] = {"tpu": _outer_by_kernel, "default": _outer_in_blocks}
    d_w = jax.lax.platform_dependent(x, d_out, bounds, **forms)
    return d_x, OfLayer(d_w.astype(w.stack.dtype)[None], None), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def tile_rows(n: float) -> int:
    """Rows of a tile, of n in all. Each expert with rows in it multiplies all of them."""
    return 128 if n < 4096 else 256


def _tiled(x: Array) -> tuple[Array, int]:
    """x with whole tiles of rows, and the rows of one."""
    rows = tile_rows(len(x))
    return jnp.pad(x, ((0, -len(x) % rows), (0, 0))), rows


def _by_kernel(
    x: Array, w: OfLayer, bounds: _Bounds, summed: int, interpret: bool = False
) -> Array:
    """`_product` on a TPU, where XLA's `ragged_dot` multiplies all rows with all experts.

    Each tile of rows is visited by the experts that have rows in it, one after the other, and an
    expert's weights are read once, however many tiles it visits. They are cast to x's dtype in the
    core's memory.
    """
    values, *scale = jax.tree.leaves(w.stack)
    padded, rows = _tiled(x)
    count, inputs, outputs = values.shape[1], x.shape[1], values.shape[4 - summed]
    width = _TILE_BYTES // (inputs * values.dtype.itemsize) // 128 * 128
    width = min(outputs, max(128, width))

    begins, ends = bounds[:-1], bounds[1:]
    tiles = jnp.where(ends > begins, -(-ends // rows) - begins // rows, 0)
    each = jnp.arange(count)
    # Fewer operations than jnp.cumsum.
    total = (tiles[None] * (each[None] <= each[:, None])).sum(axis=1)
    visit = jnp.arange(len(padded) // rows + count - 1)  # those after total[-1] do not run
    past = visit[:, None] >= total[None, :-1]
    expert = past.sum(axis=1, dtype=jnp.int32)
    at = begins // rows - total + tiles  # tile - visit, of each expert
    tile = visit + at[0] + (past * jnp.diff(at)[None]).sum(axis=1)  # no gather, slow on a TPU

    def weights(n, v, layer, bounds, expert, tile):
        return layer[0], expert[v], *((0, n) if summed == 1 else (n, 0))

    block = (inputs, width) if summed == 1 else (width, inputs)
    scales = pl.BlockSpec((None, count, width), lambda n, v, layer, *_: (layer[0], 0, n))
    out = pl.pallas_call(
        functools.partial(_visit, summed=summed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(outputs, width), total[-1]),
            in_specs=[
                pl.BlockSpec((rows, inputs), lambda n, v, *scalars: (scalars[3][v], 0)),
                pl.BlockSpec((None, None, *block), weights),
                *[scales] * len(scale),
            ],
            out_specs=pl.BlockSpec((rows, width), lambda n, v, *scalars: (scalars[3][v], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(padded), outputs), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(jnp.reshape(w.layer, 1), bounds, expert, tile, padded, values, *scale)
    return out[: len(x)]


def _visit(layer, bounds, expert, tile, x, w, *rest, summed):
    """Writes the rows of a tile that are the visiting expert's."""
    *scales, out = rest
    visit = pl.program_id(1)
    own, contract = expert[visit], (((1,), (summed - 1,)), ((), ()))
    product = jax.lax.dot_general(
        x[...], w[...].astype(x.dtype), contract, preferred_element_type=jnp.float32
    )
    for scale in scales:
        product *= scale[pl.ds(own, 1), :]
    row = tile[visit] * len(product) + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
    is_own = (row >= bounds[own]) & (row < bounds[own + 1])
    out[...] = jnp.where(is_own, product, out[...].astype(jnp.float32)).astype(out.dtype)


def _outer_by_kernel(x: Array, d_out: Array, bounds: _Bounds, interpret: bool = False) -> Array:
    (padded, rows), (slopes, _) = _tiled(x), _tiled(d_out)
    tiling = rows, min(x.shape[1], 1024), min(d_out.shape[1], 512)
    return tgmm(padded.T, slopes, jnp.diff(bounds), x.dtype, tiling, interpret=interpret)


def _blocks(x: Array) -> Array:
    """x with one more block of rows."""
    return jnp.pad(x, ((0, _BLOCK), (0, 0)))


def _in_blocks(x: Array, w: OfLayer, bounds: _Bounds, summed: int) -> Array:
    """`_product` off TPU, where XLA's `ragged_dot` multiplies all rows with all experts.

    The last block of an expert also writes rows of later experts, which these write again.
    """
    values, *scales = jax.tree.leaves(w.stack)
    padded, count = _blocks(x), values.shape[1]

    def expert(out, inputs):
        e, begin, size = inputs
        own, *scale = (a[w.layer, e] for a in (values, *scales))
        own = own.astype(x.dtype)

        def block(i, out):
            at = begin + i * _BLOCK
            rows = jax.lax.dynamic_slice_in_dim(padded, at, _BLOCK)
            product = jax.lax.dot_general(rows, own, (((1,), (summed - 1,)), ((), ())))
            for s in scale:
                product = (product * s[None]).astype(x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, product, at, axis=0)

        return jax.lax.fori_loop(0, -(-size // _BLOCK), block, out), None

    out = jnp.zeros((len(padded), values.shape[4 - summed]), x.dtype)
    runs = jnp.arange(count), bounds[:-1], jnp.diff(bounds)
    return jax.lax.scan(expert, out, runs)[0][: len(x)]


def _outer_in_blocks(x: Array, d_out: Array, bounds: _Bounds) -> Array:
    """The gradient in w: x_eᵀ d_out_e of the rows of each expert e."""
    padded, slopes = _blocks(x), _blocks(d_out)

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

    return jax.lax.map(expert, (bounds[:-1], jnp.diff(bounds))).astype(x.dtype)
