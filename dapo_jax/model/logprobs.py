"""Log-probs of target tokens from hidden states and head, without a [tokens, vocab] array.

Both forms walk over chunks of the rows that have a target, and only those: rows are gathered
targets first, and the loop ends with the last target. `linear_logprobs` serves any use and
recomputes in its backward pass (8NDV FLOPs). `linear_loss` takes the per-token loss as a function.
A normaliser that is known before the head makes ∂loss/∂logit known chunk by chunk, so both
gradients are made in the forward pass (6NDV) and nothing is recomputed or kept.

    z = hidden · head / temperature      log p = z[target] - logsumexp z      entropy = logsumexp z - Σ softmax(z) z
    ∂loss/∂z = (1[target] - softmax z) · ∂loss/∂log p
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import ArrayLike, Bool, Float, Float32, Int

# token_loss(logprobs [n], entropy [n], token_args with leading axis n) -> (loss [n], metrics {name:
# [n]}). The loss may depend on entropy only through metrics: no gradient flows through it.
TokenLoss = Callable[[Array, Array, Any], tuple[Array, Mapping[str, Array]]]

ROW_AXES = ("data", "fsdp")  # mesh axes that rows are split over
VOCAB_AXIS = "tensor"  # mesh axis that the vocabulary is split over


class _Static(NamedTuple):
    temperature: float
    chunk_size: int
    mesh: Mesh | None

    def splits_vocab(self, head: Array) -> bool:
        """Whether each device holds a part of the vocabulary."""
        return (
            self.mesh is not None
            and self.mesh.shape[VOCAB_AXIS] > 1
            and head.shape[1] % self.mesh.shape[VOCAB_AXIS] == 0
        )


class _Vocab(NamedTuple):
    """A device's part of the vocabulary: all of it, or one of the parts that lie along VOCAB_AXIS."""

    split: bool

    def local(self, targets: Array, size: int) -> Array:
        """Targets as columns of this part; outside 0..size - 1 where they belong to another."""
        return targets - jax.lax.axis_index(VOCAB_AXIS) * size if self.split else targets

    def max(self, x: Array) -> Array:
        return jax.lax.pmax(x, VOCAB_AXIS) if self.split else x

    def sum(self, x: Any) -> Any:
        return jax.lax.psum(x, VOCAB_AXIS) if self.split else x


class _Chunk(NamedTuple):
    """What the logits of n rows say; v columns of V on this device.

    All but the first two are of the whole vocabulary.
    """

    logits: Array  # [n, v] float32
    weights: Array  # [n, v] float32, exp(logits - max)
    total: Array  # [n], sum of the weights
    lse: Array  # [n]
    logprobs: Array  # [n]
    entropy: Array  # [n]
    hit: Array  # [n, v] bool, the target's column


def _score(hidden: Array, head: Array, targets: Array, temperature: float, vocab: _Vocab) -> _Chunk:
    logits = jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=jnp.float32) / temperature
    top = jax.lax.stop_gradient(vocab.max(logits.max(axis=-1)))
    # Everything [n, V] is made once and read often: subtracting `top` after the sums keeps a third
    # such array from being made.
    weights = jnp.exp(logits - top[:, None])
    column = vocab.local(targets, head.shape[1])
    hit = jnp.arange(head.shape[1])[None] == column[:, None]
    at_target = jnp.take_along_axis(
        logits, jnp.clip(column, 0, head.shape[1] - 1)[:, None], axis=-1
    )[:, 0]
    at_target = jnp.where((column >= 0) & (column < head.shape[1]), at_target, 0.0)
    total, dot, at_target = vocab.sum(
        (weights.sum(axis=-1), (weights * logits).sum(axis=-1), at_target)
    )
    log_total = jnp.log(total)
    lse = log_total + top
    return _Chunk(logits, weights, total, lse, at_target - top - log_total, lse - dot / total, hit)


def _d_head(hidden: Array, d_logits: Array) -> Array:
    """hiddenᵀ · d_logits, float32 [D, v]."""
    # XLA's fast CPU matmul takes no transposed left side; left alone, XLA would fold this small
    # transpose into the product.
    flipped = jax.lax.optimization_barrier(hidden.T)
    return jnp.einsum("dn,nv->dv", flipped, d_logits, preferred_element_type=jnp.float32)


class _Plan(NamedTuple):
    """Which rows the chunks walk over: `order` puts rows with a target first, padded to whole
    chunks.
    """

    order: Array  # int [C * chunk], row of each place; padding repeats row 0
    targets: Array  # rows with a target
    chunks: Array  # chunks to walk over: those that hold any


def _plan(mask: Array, chunk_size: int, vocab: _Vocab) -> _Plan:
    order = jnp.argsort(~mask, stable=True)
    order = jnp.pad(order, (0, -mask.shape[0] % chunk_size))
    count = mask.sum()
    chunks = -(-count // chunk_size)
    # With collectives in the loop, every device goes round as often as the one with most targets.
    return _Plan(order, count, jax.lax.pmax(chunks, ROW_AXES) if vocab.split else chunks)


def _rows(plan: _Plan, i: Array, chunk_size: int) -> tuple[Array, Array]:
    """Row numbers of chunk i, and which of its places hold a target."""
    start = i * chunk_size
    return jax.lax.dynamic_slice(plan.order, (start,), (chunk_size,)), start + jnp.arange(
        chunk_size
    ) < plan.targets


def _add_rows(buffer: Array, rows: Array, valid: Array, values: Array) -> Array:
    # Rows past the last target are dropped, not written: they repeat rows that other chunks own.
    return buffer.at[jnp.where(valid, rows, buffer.shape[0])].set(values, mode="drop")


def _specs(static: _Static, head: Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Partitions of rows, and of the head and its gradient: over `fsdp` like the parameter it
    belongs to, where that divides D.

    The head is gathered over `fsdp` once a call, and its gradient reduced once, after the loop.
    """
    columns = VOCAB_AXIS if static.splits_vocab(head) else None
    assert static.mesh is not None
    split = "fsdp" if head.shape[0] % static.mesh.shape["fsdp"] == 0 else None
    return PartitionSpec(ROW_AXES), PartitionSpec(split, columns)


def _whole_head(hidden: Array, head: Array) -> Array:
    """The head [D, v] in the dtype of `hidden` [n, D], cast before it is gathered: half the bytes
    where that is bfloat16.
    """
    head = head.astype(hidden.dtype)
    return (
        head if head.shape[0] == hidden.shape[1] else jax.lax.all_gather(head, "fsdp", tiled=True)
    )


def _reduce_head(static: _Static, d_head: Array) -> Array:
    """∂head summed over the row axes, [D / fsdp, v] where `_specs` says so."""
    assert static.mesh is not None
    if d_head.shape[0] % static.mesh.shape["fsdp"]:
        return jax.lax.psum(d_head, ROW_AXES)
    return jax.lax.psum(
        jax.lax.psum_scatter(d_head, "fsdp", scatter_dimension=0, tiled=True), "data"
    )


# --------------------------------------------------------------------------------------------------------------------
# linear_loss
# --------------------------------------------------------------------------------------------------------------------


def _loss_forward(
    token_loss: TokenLoss,
    static: _Static,
    with_grad: bool,
    vocab: _Vocab,
    hidden,
    head,
    targets,
    mask,
    token_args,
):
    """Loss, metric sums and (if asked) both gradients, over one device's rows and columns."""
    size = min(static.chunk_size, hidden.shape[0])
    plan = _plan(mask, size, vocab)
    head = _whole_head(hidden, head)

    def chunk_loss(logprobs, entropy, args, valid):
        loss, metrics = token_loss(jnp.where(valid, logprobs, 0.0), entropy, args)
        sums = {name: jnp.where(valid, value, 0.0).sum() for name, value in metrics.items()}
        return jnp.where(valid, loss, 0.0).sum(), sums

    def body(i, carry):
        loss, metrics, d_hidden, d_head = carry
        rows, valid = _rows(plan, i, size)
        h, y = hidden[rows], targets[rows]
        args = jax.tree.map(lambda a: a[rows], token_args)
        scored = _score(h, head, y, static.temperature, vocab)
        (part, sums), slope = jax.value_and_grad(chunk_loss, has_aux=True)(
            scored.logprobs, scored.entropy, args, valid
        )
        metrics = {name: metrics[name] + sums[name] for name in metrics}
        if with_grad:
            slope /= static.temperature
            d_logits = (
                jnp.where(scored.hit, slope[:, None], 0.0)
                - scored.weights * (slope / scored.total)[:, None]
            ).astype(h.dtype)
            d_hidden = _add_rows(d_hidden, rows, valid, jnp.einsum("nv,dv->nd", d_logits, head))
            d_head += _d_head(h, d_logits)
        return loss + part, metrics, d_hidden, d_head

    number = jax.ShapeDtypeStruct((size,), jnp.float32)
    example = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), token_args
    )
    zeros = {name: jnp.zeros(()) for name in jax.eval_shape(token_loss, number, number, example)[1]}
    d_hidden, d_head = (
        (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)) if with_grad else (None, None)
    )
    loss, metrics, d_hidden, d_head = jax.lax.fori_loop(
        0, plan.chunks, body, (jnp.zeros(()), zeros, d_hidden, d_head)
    )
    return loss, metrics, vocab.sum(d_hidden) if with_grad else None, d_head


def _loss_sharded(token_loss, static, with_grad, hidden, head, targets, mask, token_args):
    run = functools.partial(
        _loss_forward, token_loss, static, with_grad, _Vocab(static.splits_vocab(head))
    )
    if static.mesh is None:
        return run(hidden, head, targets, mask, token_args)

    def local(*inputs):
        loss, metrics, d_hidden, d_head = run(*inputs)
        return (
            *jax.lax.psum((loss, metrics), ROW_AXES),
            d_hidden,
            _reduce_head(static, d_head) if with_grad else None,
        )

    rows, kernel = _specs(static, head)
    whole = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=static.mesh,
        in_specs=(rows, kernel, rows, rows, rows),
        out_specs=(whole, whole, rows, kernel),
        check_vma=False,
    )(hidden, head, targets, mask, token_args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(token_loss, static, hidden, head, targets, mask, token_args):
    return _loss_sharded(token_loss, static, False, hidden, head, targets, mask, token_args)[:2]


def _linear_loss_fwd(token_loss, static, hidden, head, targets, mask, token_args):
    loss, metrics, d_hidden, d_head = _loss_sharded(
        token_loss, static, True, hidden, head, targets, mask, token_args
    )
    return (loss, metrics), (d_hidden, d_head.astype(head.dtype))


def _linear_loss_bwd(token_loss, static, gradients, cotangents):
    scale = cotangents[0]  # metrics carry no gradient
    d_hidden, d_head = gradients
    return (
        d_hidden * scale.astype(d_hidden.dtype),
        d_head * scale.astype(d_head.dtype),
        None,
        None,
        None,
    )


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
    """Σ over target rows of a per-token loss, with ∂hidden and ∂head made in the forward pass (6NDV
    FLOPs).

    Args: hidden: [N, D], in compute dtype; row n is what predicts targets[n]. head: [D, V].
      targets: int [N]. token_loss: (logprobs [n], entropy [n], args [n]) → (loss [n], metrics
      {name: [n]}); the normaliser is already
        in the loss, and every reduction is a sum. Differentiated with respect to logprobs only.
      token_args: pytree of [N, ...] arrays handed to token_loss chunk by chunk; no gradient flows
      to them. mask: bool [N], rows that have a target; the others cost nothing. None is all.
      temperature: divides the logits. chunk_size: rows a chunk, a device. mesh: if given, N is
      sharded over ("data", "fsdp") and V over "tensor" where that divides it: no device makes the
      logits
        of the whole vocabulary. The head is gathered over the row axes once, and ∂head reduced
        once.

    Returns:
      (scalar loss, metric sums over target rows), float32.
    """
    mask = jnp.ones(np.shape(targets), bool) if mask is None else mask
    inputs = jax.tree.map(jnp.asarray, (hidden, head, targets, mask, token_args))
    return _linear_loss(token_loss, _Static(temperature, chunk_size, mesh), *inputs)


# --------------------------------------------------------------------------------------------------------------------
# linear_logprobs
# --------------------------------------------------------------------------------------------------------------------


def _logprobs_forward(static: _Static, vocab: _Vocab, hidden, head, targets, mask):
    size = min(static.chunk_size, hidden.shape[0])
    plan = _plan(mask, size, vocab)
    head = _whole_head(hidden, head)

    def body(i, carry):
        rows, valid = _rows(plan, i, size)
        scored = _score(hidden[rows], head, targets[rows], static.temperature, vocab)
        return _add_rows(carry[0], rows, valid, scored.logprobs), _add_rows(
            carry[1], rows, valid, scored.entropy
        )

    zeros = jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.fori_loop(0, plan.chunks, body, (zeros, zeros))


def _logprobs_backward(
    static: _Static, vocab: _Vocab, hidden, head, targets, mask, d_logprobs, d_entropy
):
    size = min(static.chunk_size, hidden.shape[0])
    plan = _plan(mask, size, vocab)
    head = _whole_head(hidden, head)

    def body(i, carry):
        d_hidden, d_head = carry
        rows, valid = _rows(plan, i, size)
        h = hidden[rows]
        scored = _score(h, head, targets[rows], static.temperature, vocab)
        softmax = scored.weights / scored.total[:, None]
        log_softmax = scored.logits - scored.lse[:, None]
        d_logits = (scored.hit - softmax) * jnp.where(valid, d_logprobs[rows], 0.0)[:, None]
        d_logits -= (
            softmax
            * (log_softmax + scored.entropy[:, None])
            * jnp.where(valid, d_entropy[rows], 0.0)[:, None]
        )
        d_logits = (d_logits / static.temperature).astype(h.dtype)
        d_hidden = _add_rows(d_hidden, rows, valid, jnp.einsum("nv,dv->nd", d_logits, head))
        return d_hidden, d_head + _d_head(h, d_logits)

    zeros = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
    d_hidden, d_head = jax.lax.fori_loop(0, plan.chunks, body, zeros)
    return vocab.sum(d_hidden), d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprobs(static, hidden, head, targets, mask):
    run = functools.partial(_logprobs_forward, static, _Vocab(static.splits_vocab(head)))
    if static.mesh is None:
        return run(hidden, head, targets, mask)
    rows, kernel = _specs(static, head)
    return jax.shard_map(
        run,
        mesh=static.mesh,
        in_specs=(rows, kernel, rows, rows),
        out_specs=(rows, rows),
        check_vma=False,
    )(hidden, head, targets, mask)


def _linear_logprobs_fwd(static, hidden, head, targets, mask):
    return _linear_logprobs(static, hidden, head, targets, mask), (hidden, head, targets, mask)


def _linear_logprobs_bwd(static, inputs, cotangents):
    head = inputs[1]
    run = functools.partial(_logprobs_backward, static, _Vocab(static.splits_vocab(head)))
    if static.mesh is None:
        d_hidden, d_head = run(*inputs, *cotangents)
        return d_hidden, d_head.astype(head.dtype), None, None

    def local(*args):
        d_hidden, d_head = run(*args)
        return d_hidden, _reduce_head(static, d_head)

    rows, kernel = _specs(static, head)
    specs = (rows, kernel, rows, rows, rows, rows)
    d_hidden, d_head = jax.shard_map(
        local, mesh=static.mesh, in_specs=specs, out_specs=(rows, kernel), check_vma=False
    )(*inputs, *cotangents)
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
    """Log-prob of each target and entropy of each distribution, differentiable in hidden and head.

    Arguments as in `linear_loss`. The backward pass recomputes the logits chunk by chunk.

    Returns:
      (logprobs [N], entropy [N]), float32, 0 on rows without a target.

    >>> hidden, head = jnp.array([[1.0, 0.0]]), jnp.array([[jnp.log(2), 0.0], [0.0, 0.0]])  # softmax (2/3, 1/3)
    >>> logprobs, entropy = linear_logprobs(hidden, head, jnp.array([0]))
    >>> round(float(jnp.exp(logprobs[0])), 4), round(float(entropy[0]), 4)  # log 3 - 2/3 log 2
    (0.6667, 0.6365)
    """
    mask = jnp.ones(np.shape(targets), bool) if mask is None else mask
    inputs = jax.tree.map(jnp.asarray, (hidden, head, targets, mask))
    return _linear_logprobs(_Static(temperature, chunk_size, mesh), *inputs)
