"""The fused head and loss against plain ways to write them, each in a process of its own."""

import functools
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dapo_jax.benchmark.measure import (
    Sizes,
    device,
    memory,
    mesh_of,
    report,
    speed,
    temp_bytes,
    timed,
)
from dapo_jax.cli import no_device, out_of_memory
from dapo_jax.config import DapoSection
from dapo_jax.dapo.loss import dapo_token_loss, policy_metrics
from dapo_jax.model.logprobs import ROW_AXES, linear_loss
from dapo_jax.runtime.chips import loss_chunk
from dapo_jax.runtime.mesh import partition_of, put_rows, row_shards
from dapo_jax.types import Array, InputError, TrainBatch

_ALGO = DapoSection()

LossInputs = tuple[Array, Array, TrainBatch]  # hidden [N, D], head [D, V], rows of [N]

# ---- The variants, (hidden, head, rows, chunk, mesh) → (loss, metric sums) ---------------------------------------------


def _token_loss(logprobs: Array, rows: TrainBatch) -> Array:
    eps = {"clip_eps_low": _ALGO.clip_eps_low, "clip_eps_high": _ALGO.clip_eps_high}
    return rows.weight * dapo_token_loss(logprobs, rows.old_logprobs, rows.advantages, **eps)


Result = tuple[Array, dict[str, Array]]


def _plain(
    hidden: Array,
    head: Array,
    rows: TrainBatch,
    chunk: int = 0,
    mesh: Mesh | None = None,
    lse: bool = False,
) -> Result:
    logits = jnp.einsum(
        "nd,dv->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    scores = logits if lse else jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(scores, rows.tokens[:, None], axis=-1)[:, 0]
    if lse:
        logprobs -= jax.nn.logsumexp(logits, axis=-1)
    return _token_loss(jnp.where(rows.target_mask, logprobs, 0.0), rows).sum(), {}


def _checkpointed(hidden: Array, head: Array, rows: TrainBatch, chunk: int, mesh: Mesh) -> Result:
    def split(a):
        return jnp.pad(a, ((0, -a.shape[0] % chunk), *((0, 0),) * (a.ndim - 1))).reshape(
            -1, chunk, *a.shape[1:]
        )

    part = jax.checkpoint(lambda part: _plain(part[0], head, part[1])[0])
    return jax.lax.map(part, jax.tree.map(split, (hidden, rows))).sum(), {}


def _fused(
    hidden: Array, head: Array, rows: TrainBatch, chunk: int, mesh: Mesh, metrics: bool = True
) -> Result:
    def terms(logprobs, entropy, rows):
        return _token_loss(logprobs, rows), policy_metrics(
            logprobs, entropy, rows, _ALGO
        ) if metrics else {}

    return linear_loss(
        hidden, head, rows.tokens, terms, rows, mask=rows.target_mask, chunk_size=chunk, mesh=mesh
    )


_VARIANTS: dict[str, Callable[..., Result]] = {
    "plain": _plain,
    "plain_lse": functools.partial(_plain, lse=True),
    "checkpointed": _checkpointed,
    "fused": _fused,
    "fused_bare": functools.partial(
        _fused, metrics=False
    ),  # no entropy, no metrics: what they cost
}


def loss_inputs(sizes: Sizes) -> LossInputs:
    """Random inputs, hidden in compute dtype and the head in float32, as in training; logits have
    unit variance.
    """
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
    )
    mesh = mesh_of(sizes)

    def large():  # made where they are wanted: a host takes seconds for a head of a large vocabulary
        key_hidden, key_head = jax.random.split(jax.random.key(0))
        hidden = jax.random.normal(key_hidden, (n, d)).astype(sizes.dtype)
        return hidden, jax.random.normal(key_head, (d, v)) * d**-0.5

    layout = partition_of("head/kernel", (d, v), mesh)
    hidden, head = jax.jit(
        large,
        out_shardings=tuple(
            NamedSharding(mesh, spec) for spec in (PartitionSpec(ROW_AXES), layout)
        ),
    )()
    return hidden, head, put_rows(rows, mesh, axis=0)


def _chunk(sizes: Sizes) -> int:
    """Rows a chunk, a device. Looks at the devices."""
    mesh = mesh_of(sizes)
    if sizes.tokens % row_shards(mesh):
        raise InputError(
            f"--tokens: {sizes.tokens} is no multiple of the {row_shards(mesh)} devices it is split over; give one"
        )
    return min(sizes.chunk or loss_chunk(mesh), sizes.tokens // row_shards(mesh))


def gradient_error(grads: Sequence[Array], inputs: LossInputs) -> float:
    """max |g - g_plain| / max |g_plain|, the worse of both gradients; g_plain is float32, of the
    same inputs in compute dtype.
    """
    hidden, head, rows = inputs
    plain = jax.jit(jax.grad(lambda h, w: _plain(h, w, rows)[0], argnums=(0, 1)))
    with jax.default_matmul_precision("highest"):
        exact = plain(hidden.astype(jnp.float32), head.astype(hidden.dtype).astype(jnp.float32))
    return max(
        float(jnp.abs(g.astype(jnp.float32) - e).max() / jnp.abs(e).max())
        for g, e in zip(grads, exact, strict=True)
    )


# ---- A process for each variant, so that peak memory is its own; the parent asks them in turn --------------------------


def _variant_answers(name: str, sizes: Sizes) -> Iterator[Any]:
    """XLA's temporaries, timings, then peak memory (gradients and temporaries, not inputs) and
    gradient error.
    """
    inputs = loss_inputs(sizes)
    function = jax.value_and_grad(
        functools.partial(_VARIANTS[name], chunk=_chunk(sizes), mesh=mesh_of(sizes)),
        argnums=(0, 1),
        has_aux=True,
    )
    program = jax.jit(function).lower(*inputs).compile()
    before = memory(peak=False)
    jax.block_until_ready(program(*inputs))
    yield {"temp_bytes": temp_bytes(program)}
    for _ in range(sizes.repeats):
        yield timed(lambda: program(*inputs))
    after = memory(peak=True)
    peak = None if before is None or after is None else after - before
    yield {"peak_bytes": peak, "grad_error": gradient_error(program(*inputs)[1], inputs)}


def _matmul_answers(name: str, sizes: Sizes) -> Iterator[Any]:
    """The yardstick: a square matmul of about as many FLOPs as the logits, 2NDV, in the same dtype."""
    # Whole tiles: of bfloat16 an H100 makes 180 TFLOP/s at 17213, 676 at 8192.
    side = 256 * max(1, round((sizes.tokens * sizes.model_dim * sizes.vocab) ** (1 / 3) / 256))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32), sizes.dtype)
    program = jax.jit(lambda x: x @ x).lower(x).compile()
    jax.block_until_ready(program(x))
    yield _chunk(sizes), device()
    for _ in range(sizes.repeats):
        yield timed(lambda: program(x))
    yield 2 * side**3 / 1e9


def _serve(pipe: Any, name: str, sizes: Sizes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    answers = _matmul_answers if name == "matmul" else _variant_answers
    try:
        for _, answer in zip(
            iter(pipe.recv, None), answers(name, sizes), strict=False
        ):  # one a request
            pipe.send(answer)
    except InputError as e:
        pipe.send(e)
    except Exception as e:
        if why := no_device(e):
            pipe.send(InputError(why))
        elif not out_of_memory(e):
            raise


def _ask_in_turn(sizes: Sizes) -> dict[str, list[Any]]:
    """What each process answered.

    No two work at once: on a CPU they take turns, an accelerator has one process at a time.
    """
    spawn = multiprocessing.get_context("spawn")
    answers: dict[str, list[Any]] = {name: [] for name in ("matmul", *_VARIANTS)}
    pipes, processes = {}, {}
    for name in answers:
        pipes[name], theirs = spawn.Pipe()
        processes[name] = spawn.Process(target=_serve, args=(theirs, name, sizes), daemon=True)
        processes[name].start()
        theirs.close()  # so that its death ends our wait

    def ask(name: str) -> None:
        try:
            pipes[name].send("next")
            answer = pipes[name].recv()
        except (EOFError, OSError):
            raise InputError(
                f"loss: the process of {name} died, most likely out of memory; lower the sizes"
            ) from None
        if isinstance(answer, InputError):
            raise answer
        answers[name].append(answer)

    ask("matmul")
    on_cpu = answers["matmul"][0][1]["device"].startswith("cpu")
    for together in [list(answers)] if on_cpu else [[name] for name in answers]:
        for stage in range(sizes.repeats + 2):
            for name in together:
                if len(answers[name]) == stage:
                    ask(name)
        for name in together:
            pipes[name].send(None)
            processes[name].join()
    return answers


def benchmark_loss(sizes: Sizes) -> dict[str, Any]:
    """Forward and backward of the DAPO loss to hidden and head.

    Useful work is 6 x targets x D x V FLOPs for every variant; `fused` also makes entropy and
    policy metrics. peak_fraction is the share of the speed of a square matmul.
    """
    sizes.targets = max(1, round(sizes.target_fraction * sizes.tokens))
    answers = _ask_in_turn(sizes)
    (sizes.chunk, device), *matmul, matmul_gflop = answers.pop("matmul")
    peak = matmul_gflop / min(matmul)[0]
    gflop = 6 * sizes.targets * sizes.model_dim * sizes.vocab / 1e9
    speeds = {name: speed(sizes.targets, times) for name, (_, *times, _) in answers.items()}
    variants = {
        name: speeds[name]
        | {"peak_fraction": gflop / speeds[name]["seconds"] / peak}
        | first
        | last
        for name, (first, *_, last) in answers.items()
    }
    ratios = {
        name: {f"plain/{key}": speeds["plain"][key] / s[key] for key in ("seconds", "cpu_seconds")}
        for name, s in speeds.items()
    }
    table = [{"variant": name, **ratios[name], **variants[name]} for name in variants]
    return report(
        sizes, table, {"matmul_gflops": peak, "gflop": gflop, "variants": variants}, device
    )
