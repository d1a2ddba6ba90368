"""Log-probs of target tokens from hidden states and head, without a [tokens, vocab] array.

Both functions loop over chunks of the rows that have a target, which are gathered first.
`linear_logprobs` recomputes the logits in its backward pass (8NDV FLOPs). `linear_loss` takes the
per-token loss as a function: with the normaliser known, ∂loss/∂logit is known chunk by chunk, so
the forward pass computes both gradients (6NDV) and nothing is recomputed or kept.

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
ROW_SPEC = PartitionSpec(ROW_AXES)
VOCAB_AXIS = "tensor"  # mesh axis that the vocabulary is split over

# By default a TPU computes both with an error of about 1e-4 in a logsumexp.
exp = functools.partial(jax.lax.exp, accuracy=jax.lax.AccuracyMode.HIGHEST)
log = functools.partial(jax.lax.log, accuracy=jax.lax.AccuracyMode.HIGHEST)


def split_axis(mesh: Mesh | None, axis: str, size: int) -> str | None:
    """The mesh axis, if it splits a dimension of this size: evenly, over several devices."""
    parts = mesh.shape[axis] if mesh else 1
    return axis if parts > 1 and size % parts == 0 else None


def per_device(function: Callable, mesh: Mesh, inputs: Any, outputs: Any) -> Callable:
    """`jax.shard_map`, without its check that outputs are as replicated as their specs say."""
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def sum_over_rows(x: Array, scattered: int | None) -> Array:
    """A per-device sum over rows as the sum over all devices' rows, its axis `scattered` split over
    "fsdp"."""
    if scattered is None:
        return jax.lax.psum(x, ROW_AXES)
    own = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=scattered, tiled=True)
    return jax.lax.psum(own, "data")


class _Static(NamedTuple):
    """How to compute: hashable, static under jit."""

    temperature: float
    chunk_size: int
    mesh: Mesh | None
    # Of the head [D, V] and its gradient. The head is gathered over "fsdp" once per call, its
    # gradient reduced once, after the loop. Over "tensor" each device computes its columns only.
    head: PartitionSpec

    @classmethod
    def of(cls, head: Array, temperature: float, chunk_size: int, mesh: Mesh | None) -> "_Static":
        d, v = head.shape
        spec = PartitionSpec(split_axis(mesh, "fsdp", d), split_axis(mesh, VOCAB_AXIS, v))
        return cls(temperature, chunk_size, mesh, spec)

    @property
    def split(self) -> bool:
        """Whether each device holds a part of the vocabulary, along VOCAB_AXIS."""
        return self.head[1] is not None

    def local(self, targets: Array, size: int) -> Array:
        """Targets as columns of this device's part; outside 0..size - 1 where not in it."""
        return targets - jax.lax.axis_index(VOCAB_AXIS) * size if self.split else targets

    def max(self, x: Array) -> Array:
        return jax.lax.pmax(x, VOCAB_AXIS) if self.split else x

    def sum(self, x: Any) -> Any:
        return jax.lax.psum(x, VOCAB_AXIS) if self.split else x

    def whole_head(self, hidden: Array, head: Array) -> Array:
        """The head [D, v], cast before it is gathered: half the bytes in bfloat16."""
        head = head.astype(hidden.dtype)
        return jax.lax.all_gather(head, "fsdp", tiled=True) if self.head[0] else head

    def over_mesh(self, function: Callable, outputs: Any) -> Callable:
        """function(hidden, head, rest) on each device's rows and part of the head."""
        if self.mesh is None:
            return function
        return per_device(function, self.mesh, (ROW_SPEC, self.head, ROW_SPEC), outputs)


class _Scored(NamedTuple):
    """Logits of n rows, v of V columns on this device; all but two are of the whole vocabulary."""

    logits: Array  # [n, v] float32
    weights: Array  # [n, v] float32, exp(logits - max)
    total: Array  # [n], sum of the weights
    mean: Array  # [n], of the logits under their softmax
    logprobs: Array  # [n]
    entropy: Array  # [n]
    hit: Array  # [n, v] bool, the target's column


def _score(hidden: Array, head: Array, targets: Array, static: _Static) -> _Scored:
    logits = jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=jnp.float32)
    logits = logits / static.temperature
    top = jax.lax.stop_gradient(static.max(logits.max(axis=-1)))
    # Subtracting `top` after the sums avoids another [n, V] array.
    weights = exp(logits - top[:, None])
    size = head.shape[1]
    column = static.local(targets, size)
    hit = jnp.arange(size)[None] == column[:, None]
    index = jnp.clip(column, 0, size - 1)[:, None]
    at_target = jnp.take_along_axis(logits, index, axis=-1)[:, 0]
    at_target = jnp.where((column >= 0) & (column < size), at_target, 0.0)
    sums = (weights.sum(axis=-1), (weights * logits).sum(axis=-1), at_target)
    total, dot, at_target = static.sum(sums)
    log_total, mean = log(total), dot / total
    logprobs = jnp.minimum(at_target - top - log_total, 0.0)  # rounding must give no p > 1
    entropy = log_total + top - mean
    return _Scored(logits, weights, total, mean, logprobs, entropy, hit)


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


_Rest = tuple[Array, Array, Any]  # targets [n], mask [n], token_args


def _loss_and_grads(
    token_loss: TokenLoss, static: _Static, slopes_in: tuple[str, ...], hidden, head, rest: _Rest
):
    """Loss, metric sums, ∂loss/∂hidden and ∂loss/∂head over one device's rows and columns.

    slopes_in: what the gradients go through, "logprobs" and "entropy"; without any they are None.
    """
    targets, mask, token_args = rest
    chunks, head = _Chunks.of(mask, static), static.whole_head(hidden, head)

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
        slopes = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)
        (part, sums), (slope, entropy_slope) = slopes(scored.logprobs, scored.entropy, args, valid)
        metrics = {name: metrics[name] + sums[name] for name in metrics}
        if slopes_in:
            slope /= static.temperature
            d_logits = jnp.where(scored.hit, slope[:, None], 0.0)
            d_logits = d_logits - scored.weights * (slope / scored.total)[:, None]
            if "entropy" in slopes_in:  # ∂entropy/∂z = -softmax z · (z - mean)
                slope = entropy_slope / static.temperature / scored.total
                centred = scored.logits - scored.mean[:, None]
                d_logits -= scored.weights * centred * slope[:, None]
            d_logits = d_logits.astype(h.dtype)
            d_hidden = _add_rows(d_hidden, rows, valid, jnp.einsum("nv,dv->nd", d_logits, head))
            d_head += _d_head(h, d_logits)
        return loss + part, metrics, d_hidden, d_head

    number = jax.ShapeDtypeStruct(mask.shape, jnp.float32)
    names = jax.eval_shape(token_loss, number, number, token_args)[1]
    zeros = dict.fromkeys(names, jnp.zeros(()))
    grads = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    first = (jnp.zeros(()), zeros, *(grads if slopes_in else (None, None)))
    loss, metrics, d_hidden, d_head = jax.lax.fori_loop(0, chunks.number, body, first)
    if static.mesh is not None:
        loss, metrics = jax.lax.psum((loss, metrics), ROW_AXES)
        if slopes_in:
            d_head = sum_over_rows(d_head, 0 if static.head[0] else None)
    return loss, metrics, static.sum(d_hidden) if slopes_in else None, d_head


def _loss_over_mesh(token_loss: TokenLoss, static: _Static, slopes_in: tuple[str, ...], *inputs):
    run = functools.partial(_loss_and_grads, token_loss, static, slopes_in)
    outputs = (PartitionSpec(), PartitionSpec(), ROW_SPEC, static.head)
    return static.over_mesh(run, outputs)(*inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear_loss(token_loss, static, hidden, head, rest):
    return _loss_over_mesh(token_loss, static, (), hidden, head, rest)[:2]


def _linear_loss_fwd(token_loss, static, hidden, head, rest):
    slopes_in = ("logprobs",)
    loss, metrics, *grads = _loss_over_mesh(token_loss, static, slopes_in, hidden, head, rest)
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


def _logprobs_and_entropy(static: _Static, hidden, head, rest):
    targets, mask = rest
    chunks, head = _Chunks.of(mask, static), static.whole_head(hidden, head)

    def body(i, carry):
        rows, valid = chunks.rows(i)
        scored = _score(hidden[rows], head, targets[rows], static)
        found = (scored.logprobs, scored.entropy)
        return tuple(_add_rows(x, rows, valid, new) for x, new in zip(carry, found, strict=True))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks.number, body, (zeros, zeros))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprobs(static, hidden, head, rest):
    run = functools.partial(_logprobs_and_entropy, static)
    return static.over_mesh(run, (ROW_SPEC, ROW_SPEC))(hidden, head, rest)


def _linear_logprobs_fwd(static, *inputs):
    return _linear_logprobs(static, *inputs), inputs


def _linear_logprobs_bwd(static, inputs, cotangents):
    """The gradient of the loss that is linear in both outputs, with the cotangents as slopes."""

    def linear(logprobs, entropy, slopes):
        return logprobs * slopes[0] + entropy * slopes[1], {}

    hidden, head, rest = inputs
    rest, slopes_in = (*rest, cotangents), ("logprobs", "entropy")
    *_, d_hidden, d_head = _loss_over_mesh(linear, static, slopes_in, hidden, head, rest)
    return d_hidden, d_head.astype(head.dtype), None


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
    inputs = jax.tree.map(jnp.asarray, (hidden, head, (targets, mask)))
    return _linear_logprobs(_Static.of(inputs[1], temperature, chunk_size, mesh), *inputs)
