"""Where the log-probs of sampler and trainer differ, on a small model with random weights.

python tests/measure_mismatch.py     tables of docs/algorithm.md, section 9
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from paging import pack

from dapo_jax.config import DapoSection
from dapo_jax.dapo.groups import RATIO_RANGES, removed_responses
from dapo_jax.dapo.loss import batch_logprobs
from dapo_jax.dapo.packing import TrainItem, build_batch, gather_targets
from dapo_jax.model.attention import PagedCache
from dapo_jax.model.decoder import (
    decode_step,
    head_kernel,
    hidden_states,
    logits_of,
    make_cache,
    write_cache,
)
from dapo_jax.model.logprobs import linear_logprobs
from dapo_jax.model.quantization import quantize_layer
from dapo_jax.rollout.token_sampling import Sampling, sample_tokens
from dapo_jax.types import Group, Problem, Prompt, Response

N, P, R = 64, 8, 56
SIZES = {"vocab_size": 2048, "model_dim": 128, "head_dim": 32, "ffn_dim": 256}


def sampled(params, config, prompts, int8):
    """Tokens, log-probs and hidden states [N, R, ...] of the sampler: prefill, then decode steps."""
    k, v = (jnp.swapaxes(x, 2, 3) for x in hidden_states(params, config, prompts)[1][:2])
    room = ((0, 0),) * 3 + ((0, R), (0, 0))
    cache = make_cache(jnp.pad(k, room), jnp.pad(v, room), int8=int8)
    seen = pack(cache, np.full(N, P - 1), P + R)  # one page a sequence
    every = seen.listed._replace(needed=jnp.int32(N))
    keys = jax.random.split(jax.random.key(0), N)

    def step(carry, t):
        token, cache = carry
        lengths = jnp.full(N, P - 1) + t
        view = PagedCache(cache, seen.table, lengths, every)
        hidden, new, _ = decode_step(params, config, token, view)
        one = jax.tree.map(lambda x: x[None], (cache, new, seen.table[:, 0], lengths))
        cache = jax.tree.map(lambda x: x[0], write_cache(*one))
        drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        token, logprobs = sample_tokens(logits_of(params, hidden), drawn, Sampling())
        return (token, cache), (token, logprobs, hidden)

    out = jax.lax.scan(step, (prompts[:, -1], seen.pages), jnp.arange(R))[1]
    return [np.asarray(jnp.swapaxes(x, 0, 1)) for x in out]


def trained(params, config, prompts, tokens, row_len):
    """Log-probs [N, R] of the trainer, in packed rows of this length."""
    zeros = np.zeros(R, np.float32)
    items = [TrainItem(p, y, zeros, zeros, 0.0, 1.0) for p, y in zip(prompts, tokens, strict=True)]
    batch, stats = build_batch(items, row_len=row_len, rows_per_microbatch=N)
    rows = jax.tree.map(lambda a: a[0], batch)
    found = jax.jit(functools.partial(batch_logprobs, model=config))(params, rows)
    return np.stack(gather_targets(np.asarray(found)[None], stats.placement))


def plain_head(hidden, head, tokens, how):
    """Log-probs [N, R] from hidden states, the same on both sides: float32 head, bfloat16 logits."""
    dtype = jnp.float32 if how == "float32" else hidden.dtype
    product = jnp.asarray(hidden, dtype) @ head.astype(dtype)
    scores = jax.nn.log_softmax(product.astype(jnp.float32))
    return np.take_along_axis(np.asarray(scores), tokens[..., None], axis=-1)[..., 0]


def line(name, a, b):
    gap = np.abs(np.asarray(a) - np.asarray(b))
    print(f"| {name} | {gap.mean():.1e} | {gap.max():.1e} | {(gap == 0).mean():.0%} |", flush=True)


def removed(old, behavior):
    """Shares of tokens near 1, and what masks remove."""
    ratio = np.exp(old - behavior)
    for name, (low, high) in RATIO_RANGES.items():
        print(f"  {name}: {((ratio >= low) & (ratio <= high)).mean():.3f}", end="")
    print(f"  max {ratio.max():.2f}")
    empty, verdict = np.zeros(R, np.int32), np.arange(N) % 2
    group = Group(
        0,
        Prompt(Problem("p", "", ""), empty),
        tuple(Response(empty, b, False) for b in behavior),
        verdict > 0,
        np.float32(verdict),
        np.zeros(N, np.float32),
        tuple(old),
    )
    for low, high in [(0.5, 2.0), (0.9, 1.1)]:
        print(f"  token_mask {low, high}: {((ratio < low) | (ratio > high)).mean():.4f}")
    for low, high in [(0.99, 1.01), (0.999, 1.001)]:
        masked, _ = removed_responses(group, DapoSection(sequence_mask=(low, high)))
        print(f"  sequence_mask {low, high}: {masked.mean():.3f}")
    for veto in (1e-4, 0.5):
        _, vetoed = removed_responses(group, DapoSection(sequence_veto=veto))
        print(f"  sequence_veto {veto}: {vetoed.mean():.3f}")


def measure(dtype):
    config = tiny.model(compute_dtype=dtype, **SIZES)
    params = tiny.params(config)
    prompts = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (N, P)).astype(np.int32)
    tokens, behavior, decoded = sampled(params, config, prompts, False)
    whole = np.concatenate([prompts, tokens], axis=1)
    forward = jax.jit(lambda p, x: hidden_states(p, config, x)[0])(params, whole)
    rows = np.asarray(forward[:, P - 1 : -1])
    head, flat = head_kernel(params), tokens.ravel()

    def fused(hidden):
        hidden = jnp.asarray(hidden).reshape(N * R, -1)
        return np.asarray(jax.jit(linear_logprobs)(hidden, head, flat)[0]).reshape(N, R)

    packed, alone = (trained(params, config, prompts, tokens, n) for n in (4 * (P + R), P + R))
    print(f"\n{dtype}: mean, largest, share of tokens with equal bits")
    line("head alone: same hidden states", fused(decoded), behavior)
    line("decode steps against rows, same head", fused(decoded), fused(rows))
    line("packed rows against one response a row", packed, alone)
    line("all: trainer against sampler", packed, behavior)
    if dtype == "bfloat16":
        for how in ("float32", "bfloat16"):
            sides = [plain_head(x, head, tokens, how) for x in (decoded, rows)]
            line(f"decode steps against rows, {how} head", *sides)
    removed(packed, behavior)
    int8 = {**params, "layers": quantize_layer(params["layers"])}
    for how, weights, int8_cache in (("cache", params, True), ("weights", int8, False)):
        tokens, behavior, _ = sampled(weights, config, prompts, int8_cache)
        packed = trained(params, config, prompts, tokens, 4 * (P + R))
        line(f"all, int8 {how}", packed, behavior)
        removed(packed, behavior)


if __name__ == "__main__":
    for name in ("float32", "bfloat16"):
        measure(name)
