"""The fused head and loss against plain ways to write them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dapo_jax.benchmark import measure
from dapo_jax.benchmark.measure import Report, Sizes
from dapo_jax.config import DapoSection
from dapo_jax.config.schema import field
from dapo_jax.dapo.loss import dapo_terms
from dapo_jax.model.logprobs import ROW_AXES, linear_loss
from dapo_jax.runtime.chips import loss_chunk
from dapo_jax.runtime.mesh import partition_of, put_rows, row_shards
from dapo_jax.types import TrainBatch

_ALGO = DapoSection()
# What options cost beside `fused`. Sampler and trainer agree here: the masks act on no token.
_OPTIONS = {
    "fused_cispo": DapoSection(objective="cispo"),
    "fused_masked": DapoSection(importance_cap=2.0, token_mask=(0.5, 5.0)),
}

LossInputs = tuple[Array, Array, TrainBatch]  # hidden [N, D], head [D, V], rows of [N]
Result = tuple[Array, dict[str, Array]]  # loss, metric sums


@dataclasses.dataclass(kw_only=True)
class LossSizes(Sizes):
    tokens: int = field(4096, "N, rows of hidden states", ge=1)
    model_dim: int = field(512, "D, width of a row", ge=1)
    vocab: int = field(32768, "V, vocabulary entries", ge=1)
    chunk: int = field(0, "rows a chunk of a device; 0: what training takes", ge=0)
    target_fraction: float = field(1.0, "share of trained rows; rates count only these", gt=0, le=1)

    @property
    def targets(self) -> int:
        return max(1, round(self.target_fraction * self.tokens))


def _plain(
    hidden: Array,
    head: Array,
    rows: TrainBatch,
    lse: bool = False,
    algo: DapoSection = _ALGO,
    **_: Any,
) -> Result:
    weight = head.astype(hidden.dtype)
    logits = jnp.einsum("nd,dv->nv", hidden, weight, preferred_element_type=jnp.float32)
    scores = logits if lse else jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(scores, rows.tokens[:, None], axis=-1)[:, 0]
    if lse:
        logprobs -= jax.nn.logsumexp(logits, axis=-1)
    logprobs = jnp.where(rows.target_mask, logprobs, 0.0)
    return dapo_terms(logprobs, jnp.zeros_like(logprobs), rows, algo)[0].sum(), {}


def _checkpointed(hidden: Array, head: Array, rows: TrainBatch, chunk: int, mesh: Mesh) -> Result:
    def split(a):
        padded = jnp.pad(a, ((0, -a.shape[0] % chunk), *((0, 0),) * (a.ndim - 1)))
        return padded.reshape(-1, chunk, *a.shape[1:])

    part = jax.checkpoint(lambda part: _plain(part[0], head, part[1])[0])
    return jax.lax.map(part, jax.tree.map(split, (hidden, rows))).sum(), {}


def _fused(
    hidden: Array,
    head: Array,
    rows: TrainBatch,
    chunk: int,
    mesh: Mesh,
    algo: DapoSection = _ALGO,
    metrics: bool = True,
) -> Result:
    def terms(logprobs, entropy, rows):
        loss, sums = dapo_terms(logprobs, entropy, rows, algo)
        return loss, sums if metrics else {}

    options: dict[str, Any] = {"mask": rows.target_mask, "chunk_size": chunk, "mesh": mesh}
    return linear_loss(hidden, head, rows.tokens, terms, rows, **options)


_VARIANTS: dict[str, Callable[..., Result]] = {
    "plain": _plain,
    "plain_lse": functools.partial(_plain, lse=True),
    "checkpointed": _checkpointed,
    "fused": _fused,
    "fused_bare": functools.partial(_fused, metrics=False),  # without entropy and metrics
    **{name: functools.partial(_fused, algo=algo) for name, algo in _OPTIONS.items()},
}


def loss_inputs(sizes: LossSizes, mesh: Mesh) -> LossInputs:
    """Random inputs: hidden in compute dtype, head in float32; logits have unit variance."""
    rng = np.random.default_rng(0)
    n, d, v = sizes.tokens, sizes.model_dim, sizes.vocab
    mask = rng.permutation(n) < sizes.targets
    old = np.where(mask, -math.log(v) - 0.5 + 0.1 * rng.standard_normal(n), 0.0).astype(np.float32)
    rows = TrainBatch(
        tokens=rng.integers(0, v, n, np.int32),
        segment_ids=np.ones(n, np.int32),
        positions=np.arange(n, dtype=np.int32),
        target_mask=mask,
        old_logprobs=old,
        behavior_logprobs=old,
        advantages=rng.standard_normal(n, np.float32),
        weight=np.where(mask, 1.0 / sizes.targets, 0.0).astype(np.float32),
        current=mask,
    )

    def large():  # on the devices: a host takes seconds for the head of a large vocabulary
        key_hidden, key_head = jax.random.split(jax.random.key(0))
        hidden = jax.random.normal(key_hidden, (n, d)).astype(sizes.dtype)
        return hidden, jax.random.normal(key_head, (d, v)) * d**-0.5

    layouts = PartitionSpec(ROW_AXES), partition_of("head/kernel", (d, v), mesh)
    shardings = tuple(NamedSharding(mesh, layout) for layout in layouts)
    hidden, head = jax.jit(large, out_shardings=shardings)()
    return hidden, head, put_rows(rows, mesh, axis=0)


def exact_gradients(inputs: LossInputs, algo: DapoSection = _ALGO) -> tuple[Array, Array]:
    """Of `plain` in float32, from the same inputs in compute dtype."""
    hidden, head, rows = inputs
    plain = jax.jit(jax.grad(lambda h, w: _plain(h, w, rows, algo=algo)[0], argnums=(0, 1)))
    with jax.default_matmul_precision("highest"):
        return plain(hidden.astype(jnp.float32), head.astype(hidden.dtype).astype(jnp.float32))


def gradient_error(grads: Sequence[Array], exact: Sequence[Array]) -> float:
    """max |g - g_exact| / max |g_exact|, the worse of both gradients."""
    pairs = zip(grads, exact, strict=True)
    errors = (jnp.abs(g.astype(jnp.float32) - e).max() / jnp.abs(e).max() for g, e in pairs)
    return max(map(float, errors))


def square_matmul(sizes: LossSizes) -> tuple[Callable[[], Array], float]:
    """For comparison: a matmul of about 2NDV FLOPs, as many as the logits; and its GFLOP."""
    # Whole tiles: an H100 reaches 180 TFLOP/s in bfloat16 at 17213, and 676 at 8192.
    side = 256 * max(1, round((sizes.tokens * sizes.model_dim * sizes.vocab) ** (1 / 3) / 256))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32), sizes.dtype)
    return functools.partial(jax.jit(jnp.matmul), x, x), 2 * side**3 / 1e9


def benchmark_loss(sizes: LossSizes) -> Report:
    """Forward and backward of the DAPO loss to hidden and head.

    Useful work is 6 x targets x D x V FLOPs for every variant; `fused`, `fused_cispo` and
    `fused_masked` also compute entropy and policy metrics. peak_fraction: of a square matmul.
    """
    mesh = measure.mesh_of(sizes, "tokens")
    chunk = min(sizes.chunk or loss_chunk(mesh), sizes.tokens // row_shards(mesh))
    inputs = loss_inputs(sizes, mesh)
    exact = exact_gradients(inputs)
    matmul, matmul_gflop = square_matmul(sizes)
    calls, memory, errors = {"matmul": matmul}, {}, {}
    for name, variant in _VARIANTS.items():
        loss = functools.partial(variant, chunk=chunk, mesh=mesh)
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        program = gradients.lower(*inputs).compile()
        calls[name] = functools.partial(program, *inputs)
        memory[name] = measure.temp_bytes(program)
        own = exact_gradients(inputs, _OPTIONS[name]) if name in _OPTIONS else exact
        errors[name] = gradient_error(program(*inputs)[1], own)
        print(f"{name}: compiled, gradient error {errors[name]:.2g}", flush=True)
    times = measure.time_in_turn(calls, sizes.repeats)
    peak = matmul_gflop / min(times["matmul"])[0]
    gflop = 6 * sizes.targets * sizes.model_dim * sizes.vocab / 1e9
    variants, rows = {}, []
    for name in _VARIANTS:
        rates = measure.speed(sizes.targets, times[name])
        variants[name] = rates | {
            "peak_fraction": gflop / rates["seconds"] / peak,
            "temp_bytes": memory[name],
            "grad_error": errors[name],
        }
        plain = variants["plain"]
        ratios = {f"plain/{key}": plain[key] / rates[key] for key in ("seconds", "cpu_seconds")}
        rows.append({"variant": name, **ratios, **variants[name]})
    result = {"targets": sizes.targets, "chunk": chunk, "matmul_gflops": peak, "gflop": gflop}
    return rows, result | {"variants": variants} | measure.device()
