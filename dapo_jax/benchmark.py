"""Speed and memory of the three hot paths, on random models, through the code that training runs.

    python -m dapo_jax.benchmark loss         the fused head and loss, against three plain ways to write them
    python -m dapo_jax.benchmark rollout      sampling through the rollout engine
    python -m dapo_jax.benchmark update       one optimizer update on packed rows

Each prints a table, and one JSON object as its last line. Rates and `seconds` are of the best call; `cpu_seconds` is processor
time, steadier where a CPU is shared (host work only where there is an accelerator). Quote ratios within one run.
"""

import argparse
import functools
import json
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dapo_jax.config import DapoSection, MeshSection, ModelConfig, OptimSection, check_model
from dapo_jax.dapo.loss import dapo_token_loss, loss_fn, policy_metrics
from dapo_jax.dapo.packing import TrainItem, build_batch
from dapo_jax.dapo.update import init_state, make_optimizer, update_step
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.model.logprobs import linear_loss
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import make_mesh, params_sharding, publisher, put, put_rows, row_shards, state_sharding
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Array, InputError, Params, Request, TrainBatch

_ALGO = DapoSection()
_DEFAULT_CHUNK = linear_loss.__kwdefaults__["chunk_size"]  # type: ignore[index]

Sizes = argparse.Namespace  # the flags
LossInputs = tuple[Array, Array, TrainBatch]  # hidden [N, D], head [D, V], rows of [N]


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def _speed(tokens: int, times: Sequence[tuple[float, float]], unit: str = "tokens") -> dict[str, float]:
    seconds, cpu_seconds = zip(*times, strict=True)
    rates = {f"{unit}_per_s": tokens / min(seconds), f"median_{unit}_per_s": tokens / statistics.median(seconds)}
    return rates | {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def _device() -> dict[str, str]:
    return {"device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}", "jax": jax.__version__}


# ---- loss: the variants, (hidden, head, rows, chunk) → (loss, metric sums) -------------------------------------------


def _token_loss(logprobs: Array, rows: TrainBatch) -> Array:
    eps = {"clip_eps_low": _ALGO.clip_eps_low, "clip_eps_high": _ALGO.clip_eps_high}
    return rows.weight * dapo_token_loss(logprobs, rows.old_logprobs, rows.advantages, **eps)


def _plain(hidden: Array, head: Array, rows: TrainBatch, chunk: int, lse: bool = False) -> tuple[Array, dict[str, Array]]:
    logits = jnp.einsum("nd,dv->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    scores = logits if lse else jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(scores, rows.tokens[:, None], axis=-1)[:, 0]
    if lse:
        logprobs -= jax.nn.logsumexp(logits, axis=-1)
    return _token_loss(jnp.where(rows.target_mask, logprobs, 0.0), rows).sum(), {}


def _checkpointed(hidden: Array, head: Array, rows: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    def split(a):
        return jnp.pad(a, ((0, -a.shape[0] % chunk), *((0, 0),) * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:])

    part = jax.checkpoint(lambda part: _plain(part[0], head, part[1], chunk)[0])
    return jax.lax.map(part, jax.tree.map(split, (hidden, rows))).sum(), {}


def _fused(hidden: Array, head: Array, rows: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    def terms(logprobs, entropy, rows):
        return _token_loss(logprobs, rows), policy_metrics(logprobs, entropy, rows, _ALGO)

    return linear_loss(hidden, head, rows.tokens, terms, rows, mask=rows.target_mask, chunk_size=chunk)


_VARIANTS: dict[str, Callable[..., tuple[Array, dict[str, Array]]]] = {
    "plain": _plain,
    "plain_lse": functools.partial(_plain, lse=True),
    "checkpointed": _checkpointed,
    "fused": _fused,
}


def loss_inputs(sizes: Sizes) -> LossInputs:
    """Random inputs, hidden in compute dtype and the head in float32, as in training; logits have unit variance."""
    rng = np.random.default_rng(0)
    n, d, v = sizes.tokens, sizes.model_dim, sizes.vocab
    hidden = rng.standard_normal((n, d), np.float32)
    head = rng.standard_normal((d, v), np.float32) * np.float32(d**-0.5)
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
    return jnp.asarray(hidden, sizes.dtype), jnp.asarray(head), jax.tree.map(jnp.asarray, rows)


def gradient_error(grads: Sequence[Array], inputs: LossInputs) -> float:
    """max |g - g_plain| / max |g_plain|, the worse of both gradients; g_plain is float32, of the same inputs in compute dtype."""
    hidden, head, rows = inputs
    plain = jax.jit(jax.grad(lambda h, w: _plain(h, w, rows, 0)[0], argnums=(0, 1)))
    with jax.default_matmul_precision("highest"):
        exact = plain(hidden.astype(jnp.float32), head.astype(hidden.dtype).astype(jnp.float32))
    return max(float(jnp.abs(g.astype(jnp.float32) - e).max() / jnp.abs(e).max()) for g, e in zip(grads, exact, strict=True))


# ---- loss: a process for each variant, so that peak memory is its own; the parent asks them in turn ------------------


def _memory(*, peak: bool) -> int | None:
    """Bytes in use now, or at most since the last call that was not for the peak. None where neither device nor system tells."""
    if stats := jax.devices()[0].memory_stats():  # an accelerator's peak is that of the whole process
        return stats["peak_bytes_in_use" if peak else "bytes_in_use"]
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return None
    return 1024 * int(status["VmHWM" if peak else "VmRSS"].split()[0])


def _variant_answers(name: str, sizes: Sizes) -> Iterator[Any]:
    """XLA's temporaries, timings, then peak memory (gradients and temporaries, not inputs) and gradient error."""
    inputs = loss_inputs(sizes)
    function = jax.value_and_grad(functools.partial(_VARIANTS[name], chunk=sizes.chunk), argnums=(0, 1), has_aux=True)
    program = jax.jit(function).lower(*inputs).compile()
    before = _memory(peak=False)
    jax.block_until_ready(program(*inputs))
    yield {"temp_bytes": _temp_bytes(program)}
    for _ in range(sizes.repeats):
        yield _timed(lambda: program(*inputs))
    after = _memory(peak=True)
    peak = None if before is None or after is None else after - before
    yield {"peak_bytes": peak, "grad_error": gradient_error(program(*inputs)[1], inputs)}


def _matmul_answers(name: str, sizes: Sizes) -> Iterator[Any]:
    """The yardstick: a square matmul of as many FLOPs as the logits, 2NDV, in the same dtype."""
    side = round((sizes.tokens * sizes.model_dim * sizes.vocab) ** (1 / 3))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32), sizes.dtype)
    program = jax.jit(lambda x: x @ x).lower(x).compile()
    jax.block_until_ready(program(x))
    yield _device()
    for _ in range(sizes.repeats):
        yield _timed(lambda: program(x))
    yield 2 * side**3 / 1e9


def _serve(pipe: Any, name: str, sizes: Sizes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    answers = _matmul_answers if name == "matmul" else _variant_answers
    try:
        for _, answer in zip(iter(pipe.recv, None), answers(name, sizes), strict=False):  # one a request
            pipe.send(answer)
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not _out_of_memory(e):
            raise


def _ask_in_turn(sizes: Sizes) -> dict[str, list[Any]]:
    """What each process answered. No two work at once: on a CPU they take turns, an accelerator has one process at a time."""
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
            answers[name].append(pipes[name].recv())
        except (EOFError, OSError):
            raise InputError(f"loss: the process of {name} died, most likely out of memory; lower the sizes") from None

    ask("matmul")
    on_cpu = answers["matmul"][0]["device"].startswith("cpu")
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
    """Forward and backward of the DAPO loss to hidden and head. Useful work is 6 x targets x D x V FLOPs for every variant;
    `fused` also makes entropy and policy metrics. peak_fraction is the share of the speed of a square matmul."""
    sizes.targets = max(1, round(sizes.target_fraction * sizes.tokens))
    sizes.chunk = min(sizes.chunk or _DEFAULT_CHUNK, sizes.tokens)
    answers = _ask_in_turn(sizes)
    device, *matmul, matmul_gflop = answers.pop("matmul")
    peak = matmul_gflop / min(matmul)[0]
    gflop = 6 * sizes.targets * sizes.model_dim * sizes.vocab / 1e9
    speeds = {name: _speed(sizes.targets, times) for name, (_, *times, _) in answers.items()}
    variants = {
        name: speeds[name] | {"peak_fraction": gflop / speeds[name]["seconds"] / peak} | first | last
        for name, (first, *_, last) in answers.items()
    }
    ratios = {name: {f"plain/{key}": speeds["plain"][key] / s[key] for key in ("seconds", "cpu_seconds")} for name, s in speeds.items()}
    table = [{"variant": name, **ratios[name], **variants[name]} for name in variants]
    return _report(sizes, table, {"matmul_gflops": peak, "gflop": gflop, "variants": variants}, device)


# ---- rollout and update ----------------------------------------------------------------------------------------------


def _random_model(sizes: Sizes, split_flag: str, split: int) -> tuple[ModelConfig, Mesh, Params]:
    """A Qwen3-shaped tied model with random float32 weights over all devices, which must divide `split`."""
    model = ModelConfig(
        vocab_size=sizes.vocab,
        model_dim=sizes.model_dim,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn_dim=sizes.ffn,
        max_position=sizes.prompt_len + sizes.max_response_len,
        compute_dtype=sizes.dtype,
    )

    def fail(key: str, message: str) -> None:
        raise InputError(f"--{key.replace('_', '-')}: {message}")

    check_model(model, fail)
    mesh = make_mesh(MeshSection())
    if split % row_shards(mesh):
        raise InputError(f"{split_flag}: {split} is no multiple of the {row_shards(mesh)} devices it is split over; give one")
    shardings = params_sharding(abstract_params(model), mesh)
    return model, mesh, jax.jit(functools.partial(init, model), out_shardings=shardings)(jax.random.key(0))


def benchmark_rollout(sizes: Sizes) -> dict[str, Any]:
    """Sampling through the rollout engine, without an end token: every response has the full length."""
    model, mesh, params = _random_model(sizes, "--slots", sizes.slots)
    limits = {"slots": sizes.slots, "max_prompt_len": sizes.prompt_len, "max_response_len": sizes.max_response_len}
    engine = Engine(model, Sampling(top_p=sizes.top_p), (), **limits, mesh=mesh, put=put, fetch=fetch)
    weights = publisher(params, mesh, sizes.dtype)(params)
    prompts = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.requests, sizes.prompt_len), np.int32)
    requests = [Request(draw, 0, prompt) for draw, prompt in enumerate(prompts)]
    generate = functools.partial(engine.generate, weights, requests, jax.random.key(1))
    lengths = [len(response.tokens) for response in generate()]  # compiles
    times = [_timed(generate) for _ in range(sizes.repeats)]
    # A step draws one token a slot, the first in the prefill. In lock-step the longest response of a batch decides.
    steps = sum(max(lengths[at : at + sizes.slots]) for at in range(0, len(lengths), sizes.slots))
    mode = _speed(sum(lengths), times) | {"decode_steps": steps}
    bound = sum(lengths) / sizes.slots
    table = [{"mode": "lockstep", **mode, "bound": bound}]
    return _report(sizes, table, {"modes": {"lockstep": mode}, "bound_decode_steps": bound}, _device())


def train_items(sizes: Sizes) -> list[TrainItem]:
    """Random responses, all of the full length or log-normal with a median of a sixth of it; each token weighs the same."""
    rng = np.random.default_rng(0)
    lengths = np.full(sizes.responses, sizes.max_response_len)
    if sizes.lengths == "lognormal":
        lengths = np.clip(np.rint(lengths / 6 * np.exp(rng.standard_normal(sizes.responses))), 1, lengths).astype(int)
    items = []
    for length in lengths:
        prompt, response = (rng.integers(0, sizes.vocab, n, np.int32) for n in (sizes.prompt_len, length))
        old = np.full(length, -math.log(sizes.vocab), np.float32)
        items.append(TrainItem(prompt, response, old, old, advantage=float(rng.standard_normal()), weight=1.0 / int(lengths.sum())))
    return items


def benchmark_update(sizes: Sizes) -> dict[str, Any]:
    """One AdamW update of the DAPO loss on packed rows: forward, backward and optimizer, over all micro-batches."""
    longest = sizes.prompt_len + sizes.max_response_len
    if longest > sizes.row_len:
        raise InputError(f"--row-len: {sizes.row_len} does not hold --prompt-len + --max-response-len = {longest}; raise it")
    model, mesh, params = _random_model(sizes, "--rows", sizes.rows)
    batch, stats = build_batch(train_items(sizes), row_len=sizes.row_len, rows_per_microbatch=sizes.rows)
    optimizer = make_optimizer(OptimSection())
    shardings = state_sharding(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)
    step = functools.partial(update_step, loss_fn=functools.partial(loss_fn, model=model, algo=_ALGO, mesh=mesh), optimizer=optimizer)
    inputs = put_rows(batch, mesh, axis=1), np.float32(1e-6)
    program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, *inputs).compile()

    def update() -> Any:
        nonlocal state
        state, sums = program(state, *inputs)
        return state, sums

    times = [_timed(update) for _ in range(1 + sizes.repeats)][1:]
    result = _speed(stats.target_tokens, times, "trained_tokens") | {
        "trained_tokens": stats.target_tokens,
        "packing_efficiency": stats.efficiency,
        "packed_rows": stats.rows,
        "microbatches": stats.used_microbatches,
        "temp_bytes": _temp_bytes(program),
    }
    return _report(sizes, [result], result, _device())


# ---- Report and command line -----------------------------------------------------------------------------------------


def _temp_bytes(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _out_of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e)


def _report(sizes: Sizes, table: Sequence[Mapping[str, Any]], result: Mapping[str, Any], device: Mapping[str, str]) -> dict[str, Any]:
    """Prints sizes, the table (bytes as MB) and what single results are not in it; returns the JSON object."""

    def cell(key: str, value: Any) -> str:
        if isinstance(value, int | float):
            value = value / 1e6 if key.endswith("_bytes") else value
            return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"
        return "n/a" if value is None else str(value)

    flags = {name: value for name, value in vars(sizes).items() if name not in ("run", "what")}
    alone = {key: value for key, value in result.items() if key not in table[0] and not isinstance(value, dict)}
    print("  ".join(f"{key}={cell(key, value)}" for key, value in {**flags, **alone, **device}.items()))
    lines = [[key.replace("_bytes", "_MB") for key in table[0]], *([cell(*item) for item in row.items()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines))
    return {"benchmark": sizes.what, **flags, **result, **device}


def _number(flag: str, kind: type, low: float, text: str) -> Any:
    high = 2**31 - 1 if kind is int else 1
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"{flag}: expected a{' whole' if kind is int else ''} number from {low} to {high}, got {text[:20]!r}; correct it")
    return value


_LENGTHS = {"--prompt-len": "tokens of a prompt", "--max-response-len": "tokens of a response, at most"}
_MODEL = {
    "--layers": "decoder layers",
    "--model-dim": "D, width of the residual stream",
    "--heads": "query heads",
    "--kv-heads": "key/value heads; divides --heads",
    "--head-dim": "width of a head; even",
    "--ffn": "hidden width of the feed-forward",
    "--vocab": "V, vocabulary entries",
}
_REPEATS = {"--repeats": "timed calls, after one that is not"}
_CHUNK = f"rows a chunk of `checkpointed` and `fused`; 0 is the loss's own, {_DEFAULT_CHUNK}"
_LOSS = {"--tokens": "N, rows of hidden states", "--model-dim": "D, width of one", "--vocab": "V, vocabulary entries", "--chunk": _CHUNK}
_ROLLOUT = {"--slots": "sequences decoded at a time", "--requests": "responses to sample", **_LENGTHS, **_MODEL}
_UPDATE = {"--rows": "rows of a micro-batch", "--row-len": "tokens of a row", "--responses": "responses in the update"} | _LENGTHS | _MODEL


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark. Its JSON is the last line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.benchmark", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="what", required=True, metavar="loss|rollout|update")

    def verb(run: Callable[[Sizes], dict[str, Any]], flags: dict[str, str], *defaults: int) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("benchmark_")
        sub = verbs.add_parser(name, help=run.__doc__, description=run.__doc__, usage="%(prog)s [--flag value ...], or --help")
        for (flag, text), default in zip((flags | _REPEATS).items(), defaults, strict=True):
            kind = functools.partial(_number, flag, int, 0 if flag == "--chunk" else 1)
            sub.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} (default {default})")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matmuls (default float32)")
        sub.set_defaults(run=run)
        return sub

    def fraction(sub: argparse.ArgumentParser, flag: str, text: str) -> None:
        sub.add_argument(flag, type=functools.partial(_number, flag, float, 1e-6), default=1.0, metavar="X", help=f"{text} (default 1)")

    loss = verb(benchmark_loss, _LOSS, 4096, 512, 32768, 0, 5)
    fraction(loss, "--target-fraction", "share of the rows that are trained; tokens/s and FLOPs count only these")
    rollout = verb(benchmark_rollout, _ROLLOUT, 16, 16, 64, 128, 4, 256, 8, 4, 32, 1024, 32768, 3)
    fraction(rollout, "--top-p", "nucleus mass; 1 is off")
    update = verb(benchmark_update, _UPDATE, 8, 512, 8, 128, 384, 4, 256, 4, 2, 64, 1024, 32000, 3)
    text = "of responses: all the longest, or log-normal with a median of a sixth of it (default equal)"
    update.add_argument("--lengths", choices=("equal", "lognormal"), default="equal", help=text)
    args = parser.parse_args(argv)
    try:
        print(json.dumps(args.run(args)))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not _out_of_memory(e):
            raise
        raise InputError(f"{args.what}: out of memory; lower the sizes") from None
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
