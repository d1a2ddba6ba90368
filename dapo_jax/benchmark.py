"""Speed and memory of the three hot paths, on random models, through the code that training runs.

    python -m dapo_jax.benchmark loss         fused head and DAPO loss, against three plain ways to write it
    python -m dapo_jax.benchmark rollout      sampling through the rollout engine
    python -m dapo_jax.benchmark update       one optimizer update on packed rows

Each prints a table, and one JSON object as its last line. Quote ratios of one run: seconds move with what else runs.
"""

import argparse
import functools
import json
import math
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_DEFAULT_CHUNK = linear_loss.__kwdefaults__["chunk_size"]

# --------------------------------------------------------------------------------------------------------------------
# loss: the variants. Each is (hidden [N, D], head [D, V], rows of [N], chunk) → (loss, metric sums).
# --------------------------------------------------------------------------------------------------------------------


def _token_loss(logprobs: Array, args: TrainBatch) -> Array:
    return args.weight * dapo_token_loss(
        logprobs, args.old_logprobs, args.advantages, clip_eps_low=_ALGO.clip_eps_low, clip_eps_high=_ALGO.clip_eps_high
    )


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("nd,dv->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _at(values: Array, targets: Array) -> Array:
    return jnp.take_along_axis(values, targets[:, None], axis=-1)[:, 0]


def _masked_sum(logprobs: Array, args: TrainBatch) -> Array:
    return _token_loss(jnp.where(args.target_mask, logprobs, 0.0), args).sum()


def _plain(hidden: Array, head: Array, args: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    return _masked_sum(_at(jax.nn.log_softmax(_logits(hidden, head)), args.tokens), args), {}


def _plain_lse(hidden: Array, head: Array, args: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    logits = _logits(hidden, head)
    return _masked_sum(_at(logits, args.tokens) - jax.nn.logsumexp(logits, axis=-1), args), {}


def _checkpointed(hidden: Array, head: Array, args: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    def split(a):
        return jnp.pad(a, ((0, -a.shape[0] % chunk), *((0, 0),) * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:])

    part = jax.checkpoint(lambda rows: _plain(rows[0], head, rows[1], chunk)[0])
    return jax.lax.map(part, jax.tree.map(split, (hidden, args))).sum(), {}


def _fused(hidden: Array, head: Array, args: TrainBatch, chunk: int) -> tuple[Array, dict[str, Array]]:
    def terms(logprobs, entropy, args):
        return _token_loss(logprobs, args), policy_metrics(logprobs, entropy, args, _ALGO)

    return linear_loss(hidden, head, args.tokens, terms, args, mask=args.target_mask, chunk_size=chunk)


_VARIANTS = {"plain": _plain, "plain_lse": _plain_lse, "checkpointed": _checkpointed, "fused": _fused}


class LossSizes(NamedTuple):
    """What `loss` runs on."""

    tokens: int
    model_dim: int
    vocab: int
    targets: int  # tokens that are trained
    dtype: str
    chunk: int


def loss_inputs(sizes: LossSizes) -> tuple[Array, Array, TrainBatch]:
    """hidden [N, D] in compute dtype, float32 head [D, V] with logits of unit variance, and rows of [N]."""
    rng = np.random.default_rng(0)
    n, d, v = sizes.tokens, sizes.model_dim, sizes.vocab
    mask = rng.permutation(n) < sizes.targets
    hidden = rng.standard_normal((n, d), np.float32)
    head = rng.standard_normal((d, v), np.float32) * np.float32(d**-0.5)
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


def gradient_error(grads: Sequence[Array], inputs: tuple[Array, Array, TrainBatch]) -> float:
    """max |g - g_plain| / max |g_plain|, the worse of the two gradients; g_plain in float32 on the same inputs."""
    hidden, head, args = inputs
    reference = jax.grad(lambda h, w: _plain(h, w.astype(hidden.dtype).astype(jnp.float32), args, 0)[0], argnums=(0, 1))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(reference)(hidden.astype(jnp.float32), head)
    return max(float(jnp.abs(g.astype(jnp.float32) - e).max() / jnp.abs(e).max()) for g, e in zip(grads, exact, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# loss: one process a variant, so that each has its own peak memory, asked in turn by the parent
# --------------------------------------------------------------------------------------------------------------------


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _memory_start() -> int | None:
    """Bytes in use now; what `_memory_peak` reads counts from here. None where it cannot be told."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_in_use"]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _memory_peak() -> int:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else _status_bytes("VmHWM")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _device() -> dict[str, str]:
    return {"device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}", "jax": jax.__version__}


def _variant_answers(name: str, sizes: LossSizes, repeats: int) -> Iterator[Any]:
    """Facts of the program, `repeats` timings, then peak memory and gradient error: one a request of the parent."""
    inputs = loss_inputs(sizes)
    function = jax.value_and_grad(functools.partial(_VARIANTS[name], chunk=sizes.chunk), argnums=(0, 1), has_aux=True)
    program = jax.jit(function).lower(*inputs).compile()
    before = _memory_start()
    jax.block_until_ready(program(*inputs))
    yield {"temp_bytes": program.memory_analysis().temp_size_in_bytes}
    for _ in range(repeats):
        yield _seconds(lambda: program(*inputs))
    peak = None if before is None else _memory_peak() - before
    yield {"peak_bytes": peak, "grad_error": gradient_error(program(*inputs)[1], inputs)}


def _matmul_answers(sizes: LossSizes, repeats: int) -> Iterator[Any]:
    """The yardstick, in the same rounds: a square matmul with the FLOPs of the logits, 2NDV, in the same dtype."""
    side = round((sizes.tokens * sizes.model_dim * sizes.vocab) ** (1 / 3))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32), sizes.dtype)
    program = jax.jit(lambda x: x @ x).lower(x).compile()
    jax.block_until_ready(program(x))
    yield _device()
    for _ in range(repeats):
        yield 2 * side**3 / _seconds(lambda: program(x)) / 1e9
    yield {}


def _is_too_big(e: Exception) -> bool:
    return isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e)


def _serve(pipe: Any, name: str, sizes: LossSizes, repeats: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    answers = _matmul_answers(sizes, repeats) if name == "matmul" else _variant_answers(name, sizes, repeats)
    try:
        while pipe.recv():
            pipe.send(next(answers))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not _is_too_big(e):
            raise


def _rounds(sizes: LossSizes, repeats: int) -> dict[str, list[Any]]:
    """What every process answered. No two work at once; an accelerator has one process at a time, a CPU one call at a time."""
    spawn = multiprocessing.get_context("spawn")
    answers: dict[str, list[Any]] = {name: [] for name in ("matmul", *_VARIANTS)}
    workers: dict[str, tuple[Any, Any]] = {}

    def ask(name: str) -> None:
        if name not in workers:
            ours, theirs = spawn.Pipe()
            workers[name] = ours, spawn.Process(target=_serve, args=(theirs, name, sizes, repeats), daemon=True)
            workers[name][1].start()
            theirs.close()
        try:
            workers[name][0].send(True)
            answers[name].append(workers[name][0].recv())
        except (EOFError, OSError):
            raise InputError(f"loss: the process of {name} died, most likely out of memory; lower --tokens, --vocab or --model-dim") from None

    ask("matmul")
    on_cpu = answers["matmul"][0]["device"].startswith("cpu")
    for together in [list(answers)] if on_cpu else [[name] for name in answers]:
        for stage in range(repeats + 2):
            for name in together:
                if len(answers[name]) == stage:
                    ask(name)
        for name in together:
            workers[name][0].send(False)
            workers[name][1].join()
    return answers


def benchmark_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of the DAPO loss to hidden and head, N tokens of D against a vocabulary of V."""
    targets = max(1, round(args.target_fraction * args.tokens))
    sizes = LossSizes(args.tokens, args.model_dim, args.vocab, targets, args.dtype, min(args.chunk or _DEFAULT_CHUNK, args.tokens))
    answers = _rounds(sizes, args.repeats)
    facts, *speeds, _ = answers.pop("matmul")
    gflop = 6 * sizes.targets * sizes.model_dim * sizes.vocab / 1e9
    variants: dict[str, dict[str, Any]] = {}
    for name, (before, *seconds, after) in answers.items():
        rates = {"tokens_per_s": targets / min(seconds), "median_tokens_per_s": targets / statistics.median(seconds)}
        variants[name] = rates | {"peak_fraction": gflop / min(seconds) / max(speeds)} | before | after
    base = variants["plain"]
    print(f"{sizes.tokens} tokens, {targets} of them targets; D {sizes.model_dim}, V {sizes.vocab}, {sizes.dtype}, chunks of {sizes.chunk}")
    print(f"matmul {max(speeds):,.0f} GFLOP/s on {facts['device']}; useful work 6 x targets x D x V = {gflop:,.1f} GFLOP")
    print_table(
        ("variant", "tokens/s", "median", "vs plain", "of matmul", "temp MB", "peak MB", "less peak", "grad error"),
        [
            (
                name,
                f"{v['tokens_per_s']:,.0f}",
                f"{v['median_tokens_per_s']:,.0f}",
                f"{v['tokens_per_s'] / base['tokens_per_s']:.2f}x",
                f"{v['peak_fraction']:.2f}",
                _megabytes(v["temp_bytes"]),
                _megabytes(v["peak_bytes"]),
                f"{base['peak_bytes'] / v['peak_bytes']:.1f}x" if v["peak_bytes"] and base["peak_bytes"] else "n/a",
                f"{v['grad_error']:.1e}",
            )
            for name, v in variants.items()
        ],
    )
    return {"benchmark": "loss", **sizes._asdict(), "repeats": args.repeats, "matmul_gflops": max(speeds), "variants": variants, **facts}


# --------------------------------------------------------------------------------------------------------------------
# rollout and update
# --------------------------------------------------------------------------------------------------------------------


def _random_model(args: argparse.Namespace) -> tuple[ModelConfig, Mesh, Params]:
    """A Qwen3-shaped, tied model with random float32 weights, over all devices."""
    model = ModelConfig(
        family="qwen3",
        vocab_size=args.vocab,
        model_dim=args.model_dim,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        ffn_dim=args.ffn,
        max_position=args.prompt_len + args.max_response_len,
        compute_dtype=args.dtype,
    )

    def fail(key: str, message: str) -> None:
        raise InputError(f"--{key.replace('_', '-')}: {message}")

    check_model(model, fail)
    mesh = make_mesh(MeshSection())
    shardings = params_sharding(abstract_params(model), mesh)
    return model, mesh, jax.jit(functools.partial(init, model), out_shardings=shardings)(jax.random.key(0))


def _check_splits(flag: str, value: int, mesh: Mesh) -> None:
    if value % row_shards(mesh):
        raise InputError(f"{flag}: {value} is no multiple of the {row_shards(mesh)} devices it is split over; give one")


def benchmark_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling with no end token, so every response has the full length, through the rollout engine."""
    model, mesh, params = _random_model(args)
    _check_splits("--slots", args.slots, mesh)
    engine = Engine(
        model,
        Sampling(top_p=args.top_p),
        (),
        slots=args.slots,
        max_prompt_len=args.prompt_len,
        max_response_len=args.max_response_len,
        mesh=mesh,
        put=put,
        fetch=fetch,
    )
    weights = publisher(params, mesh, args.dtype)(params)
    prompts = np.random.default_rng(0).integers(0, args.vocab, (args.requests, args.prompt_len), np.int32)
    requests = [Request(draw, 0, prompt) for draw, prompt in enumerate(prompts)]
    run = functools.partial(engine.generate, weights, requests, jax.random.key(1))
    lengths = [len(response.tokens) for response in run()]  # compiles
    seconds = [_seconds(run) for _ in range(args.repeats)]
    # A step draws one token a slot; the first is the prefill's. In lock-step the longest response of a batch decides.
    steps = sum(max(lengths[at : at + args.slots]) for at in range(0, len(lengths), args.slots))
    bound = sum(lengths) / args.slots
    mode = {
        "tokens_per_s": sum(lengths) / min(seconds),
        "median_tokens_per_s": sum(lengths) / statistics.median(seconds),
        "decode_steps": steps,
        "seconds": min(seconds),
    }
    print(f"{args.requests} requests of {args.prompt_len} + {args.max_response_len} tokens in {args.slots} slots; {_device()['device']}")
    print_table(
        ("mode", "tokens/s", "median", "steps", "bound", "seconds"),
        [("lockstep", f"{mode['tokens_per_s']:,.0f}", f"{mode['median_tokens_per_s']:,.0f}", steps, f"{bound:,.1f}", f"{mode['seconds']:.3f}")],
    )
    return {"benchmark": "rollout", **_sizes(args), "modes": {"lockstep": mode}, "bound_decode_steps": bound, **_device()}


def _train_items(args: argparse.Namespace) -> list[TrainItem]:
    """Random responses with random advantages: all of the full length, or log-normal with a median of a sixth of it."""
    rng = np.random.default_rng(0)
    lengths = np.full(args.responses, args.max_response_len)
    if args.lengths == "lognormal":
        drawn = args.max_response_len / 6 * np.exp(rng.standard_normal(args.responses))
        lengths = np.clip(np.rint(drawn), 1, args.max_response_len).astype(int)
    items = []
    for length in lengths:
        prompt, response = (rng.integers(0, args.vocab, n, np.int32) for n in (args.prompt_len, length))
        old = np.full(length, -math.log(args.vocab), np.float32)
        items.append(TrainItem(prompt, response, old, old, advantage=float(rng.standard_normal()), weight=1.0 / int(lengths.sum())))
    return items


def benchmark_update(args: argparse.Namespace) -> dict[str, Any]:
    """One AdamW update of the DAPO loss on packed rows: forward, backward and optimizer, over all micro-batches."""
    longest = args.prompt_len + args.max_response_len
    if longest > args.row_len:
        raise InputError(f"--row-len: {args.row_len} does not hold --prompt-len + --max-response-len = {longest}; raise it")
    model, mesh, params = _random_model(args)
    _check_splits("--rows", args.rows, mesh)
    batch, stats = build_batch(_train_items(args), row_len=args.row_len, rows_per_microbatch=args.rows)
    optimizer = make_optimizer(OptimSection())
    shardings = state_sharding(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)
    step = functools.partial(update_step, loss_fn=functools.partial(loss_fn, model=model, algo=_ALGO, mesh=mesh), optimizer=optimizer)
    inputs = put_rows(batch, mesh, axis=1), np.float32(1e-6)
    program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, *inputs).compile()

    seconds = []
    for _ in range(1 + args.repeats):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, *inputs))
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:]
    result = {
        "trained_tokens": stats.target_tokens,
        "trained_tokens_per_s": stats.target_tokens / min(seconds),
        "median_trained_tokens_per_s": stats.target_tokens / statistics.median(seconds),
        "seconds": min(seconds),
        "packing_efficiency": stats.efficiency,
        "packed_rows": stats.rows,
        "microbatches": stats.used_microbatches,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
    }
    print(f"{args.responses} responses, {args.lengths} lengths: {stats.tokens} tokens, {stats.target_tokens} trained; {_device()['device']}")
    print_table(
        ("trained tokens/s", "median", "seconds", "rows filled", "micro-batches", "packing", "temp MB"),
        [
            (
                f"{result['trained_tokens_per_s']:,.0f}",
                f"{result['median_trained_tokens_per_s']:,.0f}",
                f"{result['seconds']:.3f}",
                stats.rows,
                stats.used_microbatches,
                f"{stats.efficiency:.1%}",
                _megabytes(result["temp_bytes"]),
            )
        ],
    )
    return {"benchmark": "update", **_sizes(args), **result, **_device()}


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("run", "what")}


def _megabytes(size: int | None) -> str:
    return "n/a" if size is None else f"{size / 1e6:,.1f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as they need be, the first to the left."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def _whole(flag: str, low: int, text: str) -> int:
    if not text.isdecimal() or not low <= int(text) < 2**31:
        raise InputError(f"{flag}: expected a whole number from {low} to 2^31 - 1, got {text[:20]!r}; correct it")
    return int(text)


def _fraction(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise InputError(f"{flag}: expected a number above 0 and at most 1, got {text[:20]!r}; correct it")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dapo_jax.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="what", required=True, metavar="loss|rollout|update")

    def verb(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], sizes: Mapping[str, tuple[int, str]], repeats: int):
        sub = verbs.add_parser(name, help=run.__doc__, description=run.__doc__, usage=f"%(prog)s [--flag value ...]   (%(prog)s --help)")
        for flag, (default, text) in (*sizes.items(), ("--repeats", (repeats, "timed calls, after one that is not"))):
            low = 0 if flag == "--chunk" else 1
            sub.add_argument(flag, type=functools.partial(_whole, flag, low), default=default, metavar="N", help=f"{text} (default {default})")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matmuls; weights are float32 (default float32)")
        sub.set_defaults(run=run)
        return sub

    def fraction(sub: argparse.ArgumentParser, flag: str, text: str) -> None:
        sub.add_argument(flag, type=functools.partial(_fraction, flag), default=1.0, metavar="X", help=f"{text} (default 1)")

    def model(heads: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, tuple[int, str]]:
        return {
            "--layers": (4, "decoder layers"),
            "--model-dim": (256, "width of the residual stream"),
            "--heads": (heads, "query heads"),
            "--kv-heads": (kv_heads, "key/value heads; divides --heads"),
            "--head-dim": (head_dim, "width of a head; even"),
            "--ffn": (1024, "hidden width of the feed-forward"),
            "--vocab": (vocab, "vocabulary entries"),
        }

    loss = {
        "--tokens": (4096, "rows of hidden states"),
        "--model-dim": (512, "width of a hidden state"),
        "--vocab": (32768, "vocabulary entries"),
        "--chunk": (0, f"rows a chunk of `checkpointed` and `fused`; 0 is the loss's own {_DEFAULT_CHUNK}"),
    }
    fraction(verb("loss", benchmark_loss, loss, 5), "--target-fraction", "share of the rows that are trained; speeds count only these")
    rollout = {
        "--slots": (16, "sequences decoded at a time"),
        "--requests": (16, "responses to sample"),
        "--prompt-len": (64, "tokens of a prompt"),
        "--max-response-len": (128, "tokens of a response"),
    }
    fraction(verb("rollout", benchmark_rollout, rollout | model(8, 4, 32, 32768), 3), "--top-p", "nucleus mass; 1 is off")
    update = {
        "--rows": (8, "rows of a micro-batch, over all devices"),
        "--row-len": (512, "tokens of a row"),
        "--responses": (8, "responses in the update"),
        "--prompt-len": (128, "tokens of a prompt"),
        "--max-response-len": (384, "tokens of the longest response"),
    }
    lengths = "of responses: all the longest, or log-normal with a median of a sixth of it, capped (default equal)"
    verb("update", benchmark_update, update | model(4, 2, 64, 32000), 3).add_argument(
        "--lengths", choices=("equal", "lognormal"), default="equal", help=lengths
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark; the last line is its JSON."""
    args = _parser().parse_args(argv)
    try:
        result = args.run(args)
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not _is_too_big(e):
            raise
        raise InputError(f"{args.what}: out of memory; lower the sizes") from None
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
