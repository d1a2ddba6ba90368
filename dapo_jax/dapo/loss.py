"""The DAPO loss: a weighted sum over response tokens.

The normaliser is in the weights, so nothing here divides.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dapo_jax.config import DapoSection, ModelConfig
from dapo_jax.model.decoder import head_kernel, hidden_states
from dapo_jax.model.logprobs import linear_logprobs, linear_loss
from dapo_jax.types import Array, Params, TrainBatch

_LOG_RATIO_CAP = 80.0  # exp overflows float32 at 88.7


def dapo_token_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Array:
    """The clipped surrogate of each token, negated to be minimised.

        r = π_θ / π_old = exp(logprobs - old_logprobs)
        loss = -min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)          and, with dual clip, loss ≤ c |A| where A < 0

    Args: logprobs, old_logprobs, advantages: float32, any one shape. Mask *before* calling (set
      log-probs to 0): a masked
        ratio that overflows would give NaN gradients. One that overflows unmasked is not finite
        where the loss has no upper bound (A < 0 without dual clip), and is clipped like any other
        elsewhere.
      dual_clip: c > 1, or None for off. ratio_cap: C ≥ 1 + ε_high, or None for off. Where r > C, r
      is continued along its tangent in log π_θ, as
        C (1 + log r - log C): the importance weight of a token in the gradient is min(r, C), and
        nothing overflows.

    Returns: float32 of the same shape. Its gradient in logprobs is 0 where A > 0 and r > 1 +
      ε_high, where A < 0 and r < 1 - ε_low (and, with dual clip, r > c), and -A r elsewhere (-A
      min(r, C) with a ratio cap).

    Source: DAPO (arXiv 2503.14476) Eq. 8 and 10; dual clip: arXiv 1912.09729.

    >>> ratio, advantage = jnp.array([1.2, 2.0, 0.5, 2.0]), jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> clip = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    >>> loss = dapo_token_loss(jnp.log(ratio), jnp.zeros(4), advantage, **clip)
    >>> [round(float(x), 4) for x in loss]
    [-1.2, -1.28, 0.8, 2.0]
    """
    log_ratio = logprobs - old_logprobs
    if ratio_cap is not None:
        capped = jnp.minimum(log_ratio, math.log(ratio_cap))
        ratio = jnp.exp(capped) * (1 + log_ratio - capped)
    else:  # where the objective is constant from some ratio on, its slope must not become 0 · inf
        capped = jnp.minimum(log_ratio, _LOG_RATIO_CAP)
        ratio = jnp.exp(
            jnp.where(advantages < 0, log_ratio, capped) if dual_clip is None else capped
        )
    clipped = jnp.clip(ratio, 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = jnp.maximum(objective, dual_clip * advantages)
        objective = jnp.where(advantages < 0, bounded, objective)
    return -objective


def policy_metrics(
    logprobs: Array, entropy: Array, args: TrainBatch, algo: DapoSection
) -> dict[str, Array]:
    """Per-token quantities whose sums over target tokens make the `policy/` metrics
    (`update.summarize` divides).
    """
    log_ratio = logprobs - args.old_logprobs
    ratio = jnp.exp(log_ratio)
    current = ~jnp.isnan(args.behavior_logprobs)
    up_clipped = (args.advantages > 0) & (ratio > 1 + algo.clip_eps_high)
    metrics = {
        "tokens": jnp.ones_like(logprobs),
        "entropy": entropy,
        "token_prob": jnp.exp(logprobs),
        "approx_kl": ratio - 1 - log_ratio,
        "clipped_low": (args.advantages < 0) & (ratio < 1 - algo.clip_eps_low),
        "clipped_high": up_clipped,
        "upclipped_prob": jnp.where(up_clipped, jnp.exp(logprobs), 0.0),
        "sampler_gap": jnp.where(
            current, jnp.abs(logprobs - jnp.where(current, args.behavior_logprobs, 0.0)), 0.0
        ),
        "gap_tokens": current,
    }
    if algo.importance_cap is not None:
        weight = (
            ratio
            if algo.old_logprobs == "sampler"
            else jnp.exp(args.old_logprobs - args.behavior_logprobs)
        )
        metrics["importance_capped"] = weight > algo.importance_cap
    if algo.dual_clip is not None:
        metrics["clipped_dual"] = (args.advantages < 0) & (ratio > algo.dual_clip)
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _shift(hidden: Array) -> Array:
    """Aligns hidden states with the tokens they predict: entry t gets the state of t - 1.

    The only shift there is.
    """
    return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))


def batch_hidden(
    params: Params, batch: TrainBatch, model: ModelConfig, mesh: Mesh | None = None
) -> Array:
    """hidden [N * T, D], row-major, aligned with the tokens it predicts."""
    hidden, _ = hidden_states(
        params, model, batch.tokens, batch.positions, batch.segment_ids, mesh=mesh
    )
    return _shift(hidden).reshape(-1, hidden.shape[-1])


def _flat(batch: TrainBatch) -> TrainBatch:
    return TrainBatch(*(a.reshape(-1) for a in batch))


def _batch_loss(params, batch, token_loss, *, model, temperature, chunk_size, mesh):
    flat = _flat(batch)
    return linear_loss(
        batch_hidden(params, batch, model, mesh),
        head_kernel(params),
        flat.tokens,
        token_loss,
        flat,
        mask=flat.target_mask,
        temperature=temperature,
        chunk_size=chunk_size,
        mesh=mesh,
    )


def dapo_terms(
    logprobs: Array, entropy: Array, args: TrainBatch, algo: DapoSection
) -> tuple[Array, dict[str, Array]]:
    """weight · `dapo_token_loss` and `policy_metrics` of each token: what `linear_loss` takes as
    its token_loss.

    With an importance cap C, the mismatch between sampler and trainer is corrected by truncated
    importance sampling:

        old_logprobs "recompute":   weight · min(π_old / π_sampler, C) · loss       (π_old, the trainer's own, is in the ratio)
        old_logprobs "sampler":     the ratio π_θ / π_sampler is the importance weight, and itself capped: `ratio_cap`
    """
    # Tokens of weight 0 (overlong filtering) are masked before the ratio, which may overflow on
    # them.
    trained = args.weight > 0
    old = jnp.where(trained, args.old_logprobs, 0.0)
    weight, cap = args.weight, algo.importance_cap
    if cap is not None and algo.old_logprobs == "recompute":
        mismatch = old - jnp.where(trained, args.behavior_logprobs, 0.0)
        weight = weight * jnp.exp(jnp.minimum(mismatch, math.log(cap)))
    loss = dapo_token_loss(
        jnp.where(trained, logprobs, 0.0),
        old,
        args.advantages,
        clip_eps_low=algo.clip_eps_low,
        clip_eps_high=algo.clip_eps_high,
        dual_clip=algo.dual_clip,
        ratio_cap=cap if algo.old_logprobs == "sampler" else None,
    )
    return weight * loss, policy_metrics(logprobs, entropy, args, algo)


def _cross_entropy_terms(logprobs: Array, entropy: Array, args: TrainBatch):
    return -args.weight * logprobs, {"tokens": jnp.ones_like(logprobs), "entropy": entropy}


def loss_fn(
    params: Params,
    batch: TrainBatch,
    *,
    model: ModelConfig,
    algo: DapoSection,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Σ_t weight_t · dapo_token_loss_t over the response tokens of packed rows.

    Minus J(θ) of DAPO (Eq. 8) when `batch.weight` holds that normaliser; see
    `packing.normalizer_weights`.

    Args: params: parameter tree. batch: [N, T] rows. temperature: of the sampling, so that ratios
      compare like with like. chunk_size: tokens a device whose logits exist at a time. mesh: set if
      rows are sharded over ("data", "fsdp").

    Returns: (scalar loss, metric sums over target tokens). Sums of micro-batches and devices add up
      to those of the batch.
    """
    terms = functools.partial(dapo_terms, algo=algo)
    return _batch_loss(
        params, batch, terms, model=model, temperature=temperature, chunk_size=chunk_size, mesh=mesh
    )


def cross_entropy_loss_fn(
    params: Params,
    batch: TrainBatch,
    *,
    model: ModelConfig,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[Array, dict[str, Array]]:
    """-Σ_t weight_t · log π_θ(token t): supervised warm-up through the same rows.

    Returns as `loss_fn`.
    """
    return _batch_loss(
        params,
        batch,
        _cross_entropy_terms,
        model=model,
        temperature=1.0,
        chunk_size=chunk_size,
        mesh=mesh,
    )


def batch_logprobs(
    params: Params,
    batch: TrainBatch,
    *,
    model: ModelConfig,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> Array:
    """Log-prob of every response token, float32 [N, T], 0 elsewhere: how log π_old is recomputed by
    the trainer.
    """
    flat = _flat(batch)
    logprobs, _ = linear_logprobs(
        batch_hidden(params, batch, model, mesh),
        head_kernel(params),
        flat.tokens,
        mask=flat.target_mask,
        temperature=temperature,
        chunk_size=chunk_size,
        mesh=mesh,
    )
    return logprobs.reshape(batch.tokens.shape)


LossFn = Callable[[Params, TrainBatch], tuple[jax.Array, dict[str, Any]]]
