"""One optimizer step: gradients summed over micro-batches, then AdamW. Nothing is divided."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int

from dapo_jax.config import LoraConfig, OptimSection
from dapo_jax.dapo.loss import LossFn
from dapo_jax.model.lora import join, split
from dapo_jax.types import Params, TrainBatch, TrainState


def make_optimizer(section: OptimSection) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW without its learning rate, which `update_step` applies."""
    return optax.chain(
        optax.clip_by_global_norm(section.grad_clip),
        optax.scale_by_adam(b1=section.b1, b2=section.b2, eps=section.eps),
        optax.add_decayed_weights(section.weight_decay),
    )


def learning_rate(section: OptimSection, rollout_step: int) -> float:
    """The rate of all updates of rollout step s (from 1): learning_rate · min(1, s / warmup_steps).

    >>> section = OptimSection(learning_rate=1.0, warmup_steps=20)
    >>> [learning_rate(section, step) for step in (1, 10, 20, 320)]
    [0.05, 0.5, 1.0, 1.0]
    """
    return section.learning_rate * min(1.0, rollout_step / max(1, section.warmup_steps))


def init_state(
    params: Params, optimizer: optax.GradientTransformation, lora: LoraConfig | None = None
) -> TrainState:
    """The initial state; float32 moments of the parameters, or of the LoRA adapters."""
    return TrainState(params, optimizer.init(split(params, lora)[0]), jnp.zeros((), jnp.int32))


def used_microbatches(batch: TrainBatch) -> Int[Array, ""]:
    """How many leading micro-batches of [M, N, T] hold a target; the others are padding."""
    holds = batch.target_mask.any(axis=(1, 2))
    return jnp.max(jnp.where(holds, jnp.arange(1, holds.shape[0] + 1), 0))


def accumulate(
    params: Params, batch: TrainBatch, loss_fn: LossFn
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]], Params]:
    """Sums over the micro-batches of [M, N, T]: loss, metric sums, float32 gradient."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def body(i, total):
        (loss, sums), grads = value_and_grad(params, jax.tree.map(lambda a: a[i], batch))
        return jax.tree.map(jnp.add, total, (loss, sums, grads))

    first = jax.tree.map(lambda a: a[0], batch)
    shapes = jax.eval_shape(value_and_grad, params, first)
    (loss, sums), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.fori_loop(0, used_microbatches(batch), body, (loss, sums, grads))


def map_microbatches(
    params: Params, batch: TrainBatch, *, function: Callable[[Params, TrainBatch], Array]
) -> Float32[Array, "M N T"]:
    """function(params, [N, T] batch) → [N, T] of each micro-batch of [M, N, T]; 0 where empty."""

    def body(i, out):
        return out.at[i].set(function(params, jax.tree.map(lambda a: a[i], batch)))

    empty = jnp.zeros(batch.tokens.shape, jnp.float32)
    return jax.lax.fori_loop(0, used_microbatches(batch), body, empty)


def update_step(
    state: TrainState,
    batch: TrainBatch,
    learning_rate: Float32[Array, ""] | float,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig | None = None,
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
    """θ ← θ - lr · AdamW(clip(Σ over micro-batches of ∇loss)); with LoRA, θ are the adapters.

    A non-finite loss or gradient leaves parameters and optimizer state bitwise unchanged.

    state: donated by the caller's jit. batch: [M, N, T]. Returns: (new state, {"loss", "grad_norm",
    "skipped" (0 or 1), the loss's metric sums}).
    """
    before, frozen = split(state.params, lora)
    loss, sums, grads = accumulate(before, batch, lambda p, rows: loss_fn(join(p, frozen), rows))
    grad_norm = optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    direction, opt_state = optimizer.update(grads, state.opt_state, before)
    params = jax.tree.map(lambda p, d: p - learning_rate * d, before, direction)
    changed = TrainState(params, opt_state, state.updates + 1)
    unchanged = state._replace(params=before)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, unchanged)
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": 1.0 - finite, **sums}
    return kept._replace(params=join(kept.params, frozen)), metrics


def summarize(sums: Mapping[str, float]) -> dict[str, float]:
    """`policy/` metrics from metric sums: means over target tokens.

    `upclipped_prob_mean` is the mean over the tokens clipped at 1 + ε_high, absent without any.
    """
    tokens = max(sums["tokens"], 1.0)
    names = {"entropy": "entropy", "approx_kl": "approx_kl"}
    if "clipped_high" in sums:
        names |= {
            "token_prob_mean": "token_prob",
            "clip_fraction_low": "clipped_low",
            "clip_fraction_high": "clipped_high",
            "clip_fraction_dual": "clipped_dual",
            "importance_capped_fraction": "importance_capped",
        }
    means = {f"policy/{name}": sums.get(key, 0.0) / tokens for name, key in names.items()}
    if "token_masked" in sums:
        means["policy/token_masked_fraction"] = sums["token_masked"] / tokens
    if routed := sums.get("routed"):
        means["policy/router_entropy"] = sums["router_entropy"] / routed
        means["policy/expert_load_max"] = sums["expert_load"] / routed
    if clipped := sums.get("clipped_high"):
        means["policy/upclipped_prob_mean"] = sums["upclipped_prob"] / clipped
    return means
