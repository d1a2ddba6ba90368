"""Log-probs of target tokens from hidden states and head, without a [tokens, vocab] array.

Both functions loop over chunks of the rows that have a target, and only those: these rows are
gathered first, and the loop ends after the last of them. `linear_logprobs` recomputes the logits in
its backward pass (8NDV FLOPs). `linear_loss` takes the per-token loss as a function: with the
normaliser known, ∂loss/∂logit is known chunk by chunk, so the forward pass computes both gradients
(6NDV) and nothing is recomputed or kept.

    z = hidden · head / temperature
    log p = z[target] - logsumexp z          entropy = logsumexp z - Σ softmax(z) z
    ∂loss/∂z = (1[target] - softmax z) · ∂loss/∂log p
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Float32, Int

# token_loss(logprobs [n], entropy [n], token_args with leading axis n) -> (loss [n], metrics {name:
# [n]}). The loss may depend on entropy only through metrics: no gradient flows through it.
TokenLoss = Callable[[Array, Array, Any], tuple[Array, Mapping[str, Array]]]

ROW_AXES = ("data", "fsdp")  # mesh axes that rows are split over
VOCAB_AXIS = "tensor"  # mesh axis that the vocabulary is split over


class _Static(NamedTuple):
    temperature: float
    chunk_size: int
    mesh: Mesh | None
    split: bool  # each device holds a part of the vocabulary, along VOCAB_AXIS

    @classmethod
    def of(cls, head: Array, temperature: float, chunk_size: int, mesh: Mesh | None) -> "_Static":
        parts = mesh.shape[VOCAB_AXIS] if mesh else 1
        return cls(temperature, chunk_size, mesh, parts > 1 and head.shape[1] % parts == 0)

    def local(self, targets: Array, size: int) -> Array:
        """Targets as columns of this device's part; outside 0..size - 1 where not in it."""
        return targets - jax.lax.axis_index(VOCAB_AXIS) * size if self.split else targets

    def max(self, x: Array) -> Array:
        return jax.lax.pmax(x, VOCAB_AXIS) if self.split else x

    def sum(self, x: Any) -> Any:
        return jax.lax.psum(x, VOCAB_AXIS) if self.split else x

    def specs(self, head: Array) -> tuple[PartitionSpec, PartitionSpec]:
        """Partitions of rows, and of the head and its gradient: over `fsdp` where that divides D.

        The head is gathered over `fsdp` once per call, its gradient reduced once, after the loop.
        """
        assert self.mesh is not None
        split = "fsdp" if head.shape[0] % self.mesh.shape["fsdp"] == 0 else None
        return PartitionSpec(ROW_AXES), PartitionSpec(split, VOCAB_AXIS if self.split else None)

    def reduce_head(self, d_head: Array) -> Array:
        """∂head summed over the row axes, [D / fsdp, v] where `specs` says so."""
        assert self.mesh is not None
        if d_head.shape[0] % self.mesh.shape["fsdp"]:
            return jax.lax.psum(d_head, ROW_AXES)
        own = jax.lax.psum_scatter(d_head, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(own, "data")


class _Scored(NamedTuple):
    """Logits of n rows, v of V columns on this device; all but two are of the whole vocabulary."""

    logits: Array  # [n, v] float32
    weights: Array  # [n, v] float32, exp(logits - max)
    total: Array  # [n], sum of the weights
    lse: Array  # [n]
    logprobs: Array  # [n]
    entropy: Array  # [n]
    hit: Array  # [n, v] bool, the target's column


def _score(hidden: Array, head: Array, targets: Array, static: _Static) -> _Scored:
    logits = jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=jnp.float32)
    logits = logits / static.temperature
    top = jax.lax.stop_gradient(static.max(logits.max(axis=-1)))
    # Subtracting `top` after the sums avoids another [n, V] array.
    weights = jnp.exp(logits - top[:, None])
    size = head.shape[1]
    column = static.local(targets, size)
    hit = jnp.arange(size)[None] == column[:, None]
    index = jnp.clip(column, 0, size - 1)[:, None]
    at_target = jnp.take_along_axis(logits, index, axis=-1)[:, 0]
    at_target = jnp.where((column >= 0) & (column < size), at_target, 0.0)
    sums = (weights.sum(axis=-1), (weights * logits).sum(axis=-1), at_target)
    total, dot, at_target = static.sum(sums)
    log_total = jnp.log(total)
    lse = log_total + top
    return _Scored(logits, weights, total, lse, at_target - top - log_total, lse - dot / total, hit)


def _d_head(hidden: Array, d_logits: Array) -> Array:
    """hiddenᵀ · d_logits, float32 [D, v]."""
    # XLA's fast CPU matmul takes no transposed left side, and without this barrier XLA would fuse
    # the small transpose into the product.
    flipped = jax.lax.optimization_barrier(hidden.T)
    return jnp.einsum("dn,nv->dv", flipped, d_logits, preferred_element_type=jnp.float32)


class _Chunks(NamedTuple):
    """Chunks of the rows of one device, rows with a target first."""

    size: int
    order: Array  # row of each place, padded to whole chunks with row 0
    targets: Array  # number of rows with a target
    number: Array  # of chunks that hold a target

    @classmethod
    def of(cls, mask: Array, static: _Static) -> "_Chunks":
        size = min(static.chunk_size, mask.shape[0])
        order = jnp.argsort(~mask, stable=True)
        order = jnp.pad(order, (0, -mask.shape[0] % size))
        targets = mask.sum()
        number = -(-targets // size)
        # With collectives in the loop, all devices loop as often as the one with the most targets.
        number = jax.lax.pmax(number, ROW_AXES) if static.split else number
        return cls(size, order, targets, number)

    def rows(self, i: Array) -> tuple[Array, Array]:
        """Row numbers of chunk i, and which of its places hold a target."""
        start = i * self.size
        rows = jax.lax.dynamic_slice(self.order, (start,), (self.size,))
        return rows, start + jnp.arange(self.size) < self.targets


def _add_rows(buffer: Array, rows: Array, valid: Array, values: Array) -> Array:
    # Rows past the last target are dropped, not written: they repeat rows that other chunks own.
    return buffer.at[jnp.where(valid, rows, buffer.shape[0])].set(values, mode="drop")


def _whole_head(hidden: Array, head: Array) -> Array:
    """The head [D, v], cast to compute dtype before it is gathered: half the bytes in bfloat16."""
    head = head.astype(hidden.dtype)
    split = head.shape[0] != hidden.shape[1]
    return jax.lax.all_gather(head, "fsdp", tiled=True) if split else head


# --------------------------------------------------------------------------------------------------
# linear_loss
# --------------------------------------------------------------------------------------------------

_Rest = tuple[Array, Array, Any]  # targets [n], mask [n], token_args


def _loss_forward(
    token_loss: TokenLoss, static: _Static, with_grad: bool, hidden, head, rest: _Rest
):
    """Loss, metric sums and (if asked) both gradients, over one device's rows and columns."""
    targets, mask, token_args = rest
    chunks, head = _Chunks.of(mask, static), _whole_head(hidden, head)

    def chunk_loss(logprobs, entropy, args, valid):
        loss, metrics = token_loss(jnp.where(valid, logprobs, 0.0), entropy, args)
        sums = {name: jnp.where(valid, value, 0.0).sum() for name, value in metrics.items()}
        return jnp.where(valid, loss, 0.0).sum(), sums

    def body(i, carry):
        loss, metrics, d_hidden, d_head = carry
        rows, valid = chunks.rows(i)
        h, y = hidden[rows], targets[rows]
        args = jax.tree.map(lambda a: a[rows], token_args)
        scored = _score(h, head, y, static)
        slopes = jax.value_and_grad(chunk_loss, has_aux=True)
        (part, sums), slope = slopes(scored.logprobs, scored.entropy, args, valid)
        metrics = {name: metrics[name] + sums[name] for name in metrics}
        if with_grad:
            slope /= static.temperature
            d_logits = jnp.where(scored.hit, slope[:, None], 0.0)
            d_logits = d_logits - scored.weights * (slope / scored.total)[:, None]
            d_logits = d_logits.astype(h.dtype)
            d_hidden = _add_rows(d_hidden, rows, valid, jnp.einsum("nv,dv->nd", d_logits, head))
            d_head += _d_head(h, d_logits)
        return loss + part, metrics, d_hidden, d_head

    number = jax.ShapeDtypeStruct((chunks.size,), jnp.float32)
    example = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((chunks.size, *a.shape[1:]), a.dtype), token_args
    )
    zeros = {name: jnp.zeros(()) for name in jax.eval_shape(token_loss, number, number, example)[1]}
    grads = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    first = (jnp.zeros(()), zeros, *(grads if with_grad else (None, None)))
    loss, metrics, d_hidden, d_head = jax.lax.fori_loop(0, chunks.number, body, first)
    return loss, metrics, static.sum(d_hidden) if with_grad else None, d_head


def _loss_sharded(token_loss, static: _Static, with_grad: bool, hidden, head, rest: _Rest):
    run = functools.partial(_loss_forward, token_loss, static, with_grad)
    if static.mesh is None:
        return run(hidden, head, rest)

    def local(*inputs):
        loss, metrics, d_hidden, d_head = run(*inputs)
        d_head = static.reduce_head(d_head) if with_grad else None
        return *jax.lax.psum((loss, metrics), ROW_AXES), d_hidden, d_head

    rows, kernel = static.specs(head)
    outputs = (PartitionSpec(), PartitionSpec(), rows, kernel)
    specs: dict[str, Any] = {"in_specs": (rows, kernel, rows), "out_specs": outputs}
    over_mesh = jax.shard_map(local, mesh=static.mesh, check_vma=False, **specs)
    return over_mesh(hidden, head, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(token_loss, static, hidden, head, rest):
    return _loss_sharded(token_loss, static, False, hidden, head, rest)[:2]


def _linear_loss_fwd(token_loss, static, hidden, head, rest):
    loss, metrics, *grads = _loss_sharded(token_loss, static, True, hidden, head, rest)
    d_hidden, d_head = grads
    return (loss, metrics), (d_hidden, d_head.astype(head.dtype))


def _linear_loss_bwd(token_loss, static, gradients, cotangents):
    scale = cotangents[0]  # metrics carry no gradient
    return *(gradient * scale.astype(gradient.dtype) for gradient in gradients), None


_linear_loss.defvjp(_linear_loss_fwd, _linear_loss_bwd)


@jax.named_scope("loss")
def linear_loss(
    hidden: Float[ArrayLike, "N D"],
    head: Float[ArrayLike, "D V"],
    targets: Int[ArrayLike, " N"],
    token_loss: TokenLoss,
    token_args: Any,
    *,
    mask: Bool[ArrayLike, " N"] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Σ over target rows of a per-token loss; ∂hidden and ∂head in the forward pass (6NDV FLOPs).

    Args:
      hidden: in compute dtype; row n predicts targets[n].
      token_loss: (logprobs [n], entropy [n], args [n]) → (loss [n], metrics {name: [n]}). The
        normaliser is in the loss, every reduction is a sum. Differentiated in logprobs only.
      token_args: pytree of [N, ...] arrays, passed to token_loss chunk by chunk; no gradient.
      mask: rows that have a target; the others cost nothing. None is all.
      temperature: divides the logits. chunk_size: rows per chunk, on each device.
      mesh: if given, N is sharded over ("data", "fsdp"), and V over "tensor" where that divides it.

    Returns: (loss, metric sums over target rows).
    """
    mask = jnp.ones(np.shape(targets), bool) if mask is None else mask
    inputs = jax.tree.map(jnp.asarray, (hidden, head, (targets, mask, token_args)))
    static = _Static.of(inputs[1], temperature, chunk_size, mesh)
    return _linear_loss(token_loss, static, *inputs)


# --------------------------------------------------------------------------------------------------
# linear_logprobs
# --------------------------------------------------------------------------------------------------


def _logprobs_forward(static: _Static, hidden, head, targets, mask):
    chunks, head = _Chunks.of(mask, static), _whole_head(hidden, head)

    def body(i, carry):
        rows, valid = chunks.rows(i)
        scored = _score(hidden[rows], head, targets[rows], static)
        found = (scored.logprobs, scored.entropy)
        return tuple(_add_rows(x, rows, valid, new) for x, new in zip(carry, found, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks.number, body, (zeros, zeros))


def _logprobs_backward(static: _Static, inputs, cotangents):
    hidden, head, targets, mask = inputs
    chunks, head = _Chunks.of(mask, static), _whole_head(hidden, head)

    def body(i, carry):
        d_hidden, d_head = carry
        rows, valid = chunks.rows(i)
        d_logprobs, d_entropy = (jnp.where(valid, d[rows], 0.0)[:, None] for d in cotangents)
        h = hidden[rows]
        scored = _score(h, head, targets[rows], static)
        softmax = scored.weights / scored.total[:, None]
        log_softmax = scored.logits - scored.lse[:, None]
        d_logits = (scored.hit - softmax) * d_logprobs
        d_logits -= softmax * (log_softmax + scored.entropy[:, None]) * d_entropy
        d_logits = (d_logits / static.temperature).astype(h.dtype)
        d_hidden = _add_rows(d_hidden, rows, valid, jnp.einsum("nv,dv->nd", d_logits, head))
        return d_hidden, d_head + _d_head(h, d_logits)

    zeros = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
    d_hidden, d_head = jax.lax.fori_loop(0, chunks.number, body, zeros)
    return static.sum(d_hidden), d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprobs(static, hidden, head, targets, mask):
    run = functools.partial(_logprobs_forward, static)
    if static.mesh is not None:
        rows, kernel = static.specs(head)
        specs: dict[str, Any] = {"in_specs": (rows, kernel, rows, rows), "out_specs": (rows, rows)}
        run = jax.shard_map(run, mesh=static.mesh, check_vma=False, **specs)
    return run(hidden, head, targets, mask)


def _linear_logprobs_fwd(static, *inputs):
    return _linear_logprobs(static, *inputs), inputs


def _linear_logprobs_bwd(static, inputs, cotangents):
    head = inputs[1]

    def run(inputs, cotangents):
        d_hidden, d_head = _logprobs_backward(static, inputs, cotangents)
        return d_hidden, d_head if static.mesh is None else static.reduce_head(d_head)

    if static.mesh is not None:
        rows, kernel = static.specs(head)
        specs: dict[str, Any] = {"in_specs": ((rows, kernel, rows, rows), (rows, rows))}
        specs["out_specs"] = (rows, kernel)
        run = jax.shard_map(run, mesh=static.mesh, check_vma=False, **specs)
    d_hidden, d_head = run(inputs, cotangents)
    return d_hidden, d_head.astype(head.dtype), None, None


_linear_logprobs.defvjp(_linear_logprobs_fwd, _linear_logprobs_bwd)


@jax.named_scope("logprobs")
def linear_logprobs(
    hidden: Float[ArrayLike, "N D"],
    head: Float[ArrayLike, "D V"],
    targets: Int[ArrayLike, " N"],
    *,
    mask: Bool[ArrayLike, " N"] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, " N"], Float32[Array, " N"]]:
    """Log-prob of each target and entropy of each distribution, 0 on rows without a target.

    Arguments as `linear_loss`. Differentiable in hidden and head; the backward pass recomputes the
    logits chunk by chunk.

    >>> hidden = jnp.array([[1.0, 0.0]])
    >>> head = jnp.array([[jnp.log(2), 0.0], [0.0, 0.0]])  # softmax (2/3, 1/3)
    >>> logprobs, entropy = linear_logprobs(hidden, head, jnp.array([0]))
    >>> round(float(jnp.exp(logprobs[0])), 4), round(float(entropy[0]), 4)  # log 3 - 2/3 log 2
    (0.6667, 0.6365)
    """
    mask = jnp.ones(np.shape(targets), bool) if mask is None else mask
    inputs = jax.tree.map(jnp.asarray, (hidden, head, targets, mask))
    return _linear_logprobs(_Static.of(inputs[1], temperature, chunk_size, mesh), *inputs)
