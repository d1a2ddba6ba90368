"""The DAPO loss: a weighted sum over response tokens. The weights hold the normaliser."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from dapo_jax.config import DapoSection, ModelConfig
from dapo_jax.dapo.groups import RATIO_RANGES
from dapo_jax.model.decoder import head_kernel, hidden_states
from dapo_jax.model.experts import Routing, routing_sums
from dapo_jax.model.logprobs import exp, linear_logprobs, linear_loss
from dapo_jax.types import Params, TrainBatch

LossFn = Callable[[Params, TrainBatch], tuple[jax.Array, dict[str, Any]]]
_LOG_RATIO_CAP = 80.0  # exp overflows float32 at 88.7


def dapo_token_loss(
    logprobs: Float[Any, "*S"],
    old_logprobs: Float[Any, "*S"],
    advantages: Float[Any, "*S"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> Float[Array, "*S"]:
    """The clipped surrogate of each token, negated to be minimised.

        r = π_θ / π_old = exp(logprobs - old_logprobs)
        loss = -min(r A, clip(r, 1 - ε_low, 1 + ε_high) A);  with dual clip ≤ c |A| where A < 0

    Args:
      logprobs, old_logprobs, advantages: float32 of one shape. Mask them *before* (log-probs 0): a
        masked ratio that overflows gives NaN gradients. An overflow that is not masked is
        non-finite where the loss has no upper bound (A < 0 without dual clip).
      dual_clip: c > 1. ratio_cap: C ≥ 1 + ε_high. Beyond C, r continues along its tangent in
        log π_θ, C (1 + log r - log C): a token's importance weight in the gradient is min(r, C).

    Returns: float32 of the same shape. Its gradient in logprobs is 0 where A > 0 and r > 1 + ε_high
      and where A < 0 and r < 1 - ε_low (or r > c), elsewhere -A r, or -A min(r, C).

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
        ratio = exp(capped) * (1 + log_ratio - capped)
    else:  # where the objective is constant from some ratio on, its slope must not become 0 · inf
        capped = jnp.minimum(log_ratio, _LOG_RATIO_CAP)
        uncapped = jnp.where(advantages < 0, log_ratio, capped) if dual_clip is None else capped
        ratio = exp(uncapped)
    clipped = jnp.clip(ratio, 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        bounded = jnp.maximum(objective, dual_clip * advantages)
        objective = jnp.where(advantages < 0, bounded, objective)
    return -objective


def cispo_token_loss(
    logprobs: Float[Any, "*S"],
    old_logprobs: Float[Any, "*S"],
    advantages: Float[Any, "*S"],
    *,
    clip_eps_low: float,
    clip_eps_high: float,
) -> Float[Array, "*S"]:
    """CISPO: the clipped ratio is a constant weight, so that every token keeps a gradient.

        loss = -sg(clip(r, 1 - ε_low, 1 + ε_high)) A log π_θ        gradient: -clip(r) A

    Arguments as `dapo_token_loss`. Source: MiniMax-M1 (arXiv 2506.13585) Eq. 4 and 5.

    >>> logprobs, advantage = jnp.log(jnp.array([0.2, 0.4])), jnp.array([1.0, -1.0])
    >>> clip = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
    >>> loss = cispo_token_loss(logprobs, jnp.log(jnp.array([0.1, 0.4])), advantage, **clip)
    >>> [round(float(x), 4) for x in loss]  # ratios 2 and 1: -1.28 log 0.2 and log 0.4
    [2.0601, -0.9163]
    """
    ratio = exp(logprobs - old_logprobs)
    weight = jnp.clip(ratio, 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    return -jax.lax.stop_gradient(weight) * advantages * logprobs


def _log_mismatch(logprobs: Any, args: TrainBatch, algo: DapoSection) -> Any:
    """log π_old / π_sampler of each token; log π_θ / π_sampler where π_old is the sampler's."""
    if algo.old_logprobs == "sampler":
        return jax.lax.stop_gradient(logprobs - args.old_logprobs)
    return args.old_logprobs - args.behavior_logprobs


def _token_masked(logprobs: Any, args: TrainBatch, algo: DapoSection) -> Any:
    """Tokens that `dapo.token_mask` [a, b] takes out of the loss: mismatch outside [a, b]."""
    low, high = map(math.log, algo.token_mask or (1.0, 1.0))
    mismatch = _log_mismatch(logprobs, args, algo)
    return (mismatch < low) | (mismatch > high)


def policy_metrics(
    logprobs: Float[Any, "*S"], entropy: Float[Any, "*S"], args: TrainBatch, algo: DapoSection
) -> dict[str, Float32[Array, "*S"]]:
    """Quantities of each token whose sums give the `policy/` metrics (`update.summarize`)."""
    log_ratio = logprobs - args.old_logprobs
    ratio = exp(log_ratio)
    token_prob = exp(logprobs)
    both = algo.objective == "cispo"  # clips both sides whatever the sign of A
    up_clipped = ((args.advantages > 0) | both) & (ratio > 1 + algo.clip_eps_high)
    metrics = {
        "tokens": jnp.ones_like(logprobs),
        "entropy": entropy,
        "token_prob": token_prob,
        "approx_kl": ratio - 1 - log_ratio,
        "clipped_low": ((args.advantages < 0) | both) & (ratio < 1 - algo.clip_eps_low),
        "clipped_high": up_clipped,
        "upclipped_prob": jnp.where(up_clipped, token_prob, 0.0),
        "sampler_gap": jnp.where(args.current, jnp.abs(logprobs - args.behavior_logprobs), 0.0),
        "gap_tokens": args.current,
    }
    if algo.importance_cap is not None:
        mismatch = exp(_log_mismatch(logprobs, args, algo))
        metrics["importance_capped"] = mismatch > algo.importance_cap
    if algo.token_mask is not None:
        metrics["token_masked"] = _token_masked(logprobs, args, algo)
    if algo.old_logprobs == "sampler":
        for name, (low, high) in RATIO_RANGES.items():
            metrics[f"ratio_{name}"] = args.current & (ratio >= low) & (ratio <= high)
    if algo.dual_clip is not None:
        metrics["clipped_dual"] = (args.advantages < 0) & (ratio > algo.dual_clip)
    return {name: value.astype(jnp.float32) for name, value in metrics.items()}


def batch_hidden(
    params: Params, batch: TrainBatch, model: ModelConfig, mesh: Mesh | None = None
) -> tuple[Float[Array, "_ D"], Routing | None]:
    """Hidden states [N * T, D], row-major: entry t has the state that predicts token t; the only
    place that shifts from t - 1 to t. And the routing of tokens, which replays the experts of the
    batch."""
    rows = (batch.tokens, batch.positions, batch.segment_ids)
    replayed = None
    if batch.experts is not None:  # entry t has the experts of token t - 1
        chosen = batch.experts.reshape(*batch.tokens.shape, model.layers, -1)
        chosen = jnp.moveaxis(jnp.roll(chosen, -1, axis=1), 2, 0)
        replayed = chosen, jnp.roll(batch.target_mask, -1, axis=1).at[:, -1].set(False)
    hidden, entries = hidden_states(params, model, *rows, replayed=replayed, mesh=mesh)
    shifted = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return shifted.reshape(-1, hidden.shape[-1]), entries.routing


def _flat(batch: TrainBatch) -> TrainBatch:
    return jax.tree.map(lambda a: a.reshape(-1), batch._replace(experts=None))


def _batch_loss(params, batch, terms, model, **options):
    flat, mesh = _flat(batch), options["mesh"]
    (hidden, routing), head = batch_hidden(params, batch, model, mesh), head_kernel(params)
    options |= {"mask": flat.target_mask}
    loss, sums = linear_loss(hidden, head, flat.tokens, terms, flat, **options)
    if routing is not None:
        sums |= routing_sums(routing, batch.segment_ids > 0, model.experts.count)
    return loss, sums


def dapo_terms(
    logprobs: Float[Any, "*S"], entropy: Float[Any, "*S"], args: TrainBatch, algo: DapoSection
) -> tuple[Float[Array, "*S"], dict[str, Float32[Array, "*S"]]]:
    """Weight · token loss of the objective and `policy_metrics`: `token_loss` of `linear_loss`.

    With an importance cap C, truncated importance sampling corrects for the sampler's numerics:

        old_logprobs "recompute"   weight · min(π_old / π_sampler, C) · loss
        old_logprobs "sampler"     the ratio π_θ / π_sampler is itself capped: `ratio_cap`

    `_token_masked` tokens get weight 0.
    """
    # Tokens of weight 0 (overlong filtering) are masked before the ratio, which may overflow.
    trained, weight, cap = args.weight > 0, args.weight, algo.importance_cap
    if algo.token_mask is not None:
        trained &= ~_token_masked(logprobs, args, algo)
        weight = jnp.where(trained, weight, 0.0)
    old = jnp.where(trained, args.old_logprobs, 0.0)
    if cap is not None and algo.old_logprobs == "recompute":
        mismatch = old - jnp.where(trained, args.behavior_logprobs, 0.0)
        weight = weight * exp(jnp.minimum(mismatch, math.log(cap)))
    inputs = jnp.where(trained, logprobs, 0.0), old, args.advantages
    clip = {"clip_eps_low": algo.clip_eps_low, "clip_eps_high": algo.clip_eps_high}
    if algo.objective == "cispo":
        loss = cispo_token_loss(*inputs, **clip)
    else:
        ratio_cap = cap if algo.old_logprobs == "sampler" else None
        loss = dapo_token_loss(*inputs, **clip, dual_clip=algo.dual_clip, ratio_cap=ratio_cap)
    return weight * loss, policy_metrics(logprobs, entropy, args, algo)


def _cross_entropy_terms(logprobs, entropy, args: TrainBatch):
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
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Σ_t weight_t · dapo_token_loss_t over the response tokens of packed rows [N, T].

    Equals -J(θ) of DAPO (Eq. 8) if `batch.weight` is that of `packing.normalizer_weights`.

    temperature: of the sampling. chunk_size: tokens per device whose logits exist at a time. mesh:
    if rows are sharded. Returns: (loss, metric sums over target tokens), which add over
    micro-batches.
    """
    options = {"temperature": temperature, "chunk_size": chunk_size, "mesh": mesh}
    return _batch_loss(params, batch, functools.partial(dapo_terms, algo=algo), model, **options)


def cross_entropy_loss_fn(
    params: Params,
    batch: TrainBatch,
    *,
    model: ModelConfig,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """-Σ_t weight_t · log π_θ(token t), for the supervised warm-up. Returns as `loss_fn`."""
    options = {"temperature": 1.0, "chunk_size": chunk_size, "mesh": mesh}
    return _batch_loss(params, batch, _cross_entropy_terms, model, **options)


def batch_logprobs(
    params: Params,
    batch: TrainBatch,
    *,
    model: ModelConfig,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mesh: Mesh | None = None,
) -> Float32[Array, "N T"]:
    """Log-prob of every response token, float32 [N, T], 0 elsewhere: the trainer's log π_old."""
    options: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size, "mesh": mesh}
    flat, (hidden, _) = _flat(batch), batch_hidden(params, batch, model, mesh)
    head, mask = head_kernel(params), flat.target_mask
    logprobs, _ = linear_logprobs(hidden, head, flat.tokens, mask=mask, **options)
    return logprobs.reshape(batch.tokens.shape)
