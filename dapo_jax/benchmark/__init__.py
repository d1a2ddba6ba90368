"""Speed and memory of the three hot paths, on random models, through the code that training runs.

    python -m dapo_jax.benchmark loss         the fused head and loss, against three plain ways to write them
    python -m dapo_jax.benchmark rollout      sampling through the rollout engine
    python -m dapo_jax.benchmark draw         the sampling of a DAPO step: streaming, and generating all to filter it
    python -m dapo_jax.benchmark update       one optimizer update on packed rows
    python -m dapo_jax.benchmark host         what a process does in a step beside its devices, without a model

Each prints a table, and one JSON object as its last line. Rates and `seconds` are of the best call;
`cpu_seconds` is processor time, steadier where a CPU is shared (host work only where there is an
accelerator). Quote ratios within one run.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax

from dapo_jax.benchmark.draw import benchmark_draw
from dapo_jax.benchmark.host import benchmark_host
from dapo_jax.benchmark.loss import benchmark_loss
from dapo_jax.benchmark.measure import Sizes
from dapo_jax.benchmark.rollout import benchmark_rollout
from dapo_jax.benchmark.update import benchmark_update
from dapo_jax.cli import out_of_memory
from dapo_jax.types import InputError


def _number(flag: str, kind: type, low: float, text: str) -> Any:
    high = 2**31 - 1 if kind is int else 9 if flag == "--sigma" else 1
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise InputError(
            f"{flag}: expected a{' whole' if kind is int else ''} number from {low} to {high}, got {text[:20]!r}; correct it"
        )
    return value


_LENGTHS = {
    "--prompt-len": "tokens of a prompt",
    "--max-response-len": "tokens of a response, at most",
}
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
_CHUNK = (
    "rows a chunk of `checkpointed` and `fused`, a device; 0 is what training takes on this device"
)
_LOSS = {
    "--tokens": "N, rows of hidden states",
    "--model-dim": "D, width of one",
    "--vocab": "V, vocabulary entries",
    "--chunk": _CHUNK,
}
_ROLLOUT = {
    "--slots": "sequences decoded at a time",
    "--requests": "responses to sample",
    **_LENGTHS,
}
_ROLLOUT |= {
    "--median": "of log-normal lengths, before they are cut",
    "--top-k": "sample among so many tokens; 0 is all",
    **_MODEL,
}
_DRAW = {
    "--slots": "sequences decoded at a time",
    "--groups": "informative groups wanted",
    "--group": "responses of a group",
    **_LENGTHS,
}
_DRAW |= {"--median": "of log-normal lengths, before they are cut", **_MODEL}
_UPDATE = (
    {
        "--rows": "rows of a micro-batch",
        "--row-len": "tokens of a row",
        "--responses": "responses in the update",
    }
    | _LENGTHS
    | _MODEL
)
_HOST = {
    "--processes": "in the job",
    "--responses": "of the step; half of them are packed",
    "--group": "responses of a group",
}
_HOST |= {
    "--slots": "sequences decoded at a time",
    **_LENGTHS,
    "--median": "of log-normal lengths, before they are cut",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark. Its JSON is the last line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dapo_jax.benchmark", description=__doc__, formatter_class=raw
    )
    verbs = parser.add_subparsers(
        dest="what", required=True, metavar="loss|rollout|draw|update|host"
    )

    def verb(
        run: Callable[[Sizes], dict[str, Any]], flags: dict[str, str], *defaults: int
    ) -> argparse.ArgumentParser:
        name = run.__name__.removeprefix("benchmark_")
        sub = verbs.add_parser(
            name,
            help=run.__doc__,
            description=run.__doc__,
            usage="%(prog)s [--flag value ...], or --help",
        )
        for (flag, text), default in zip((flags | _REPEATS).items(), defaults, strict=True):
            kind = functools.partial(_number, flag, int, 0 if flag in ("--chunk", "--top-k") else 1)
            sub.add_argument(
                flag, type=kind, default=default, metavar="N", help=f"{text} (default {default})"
            )
        sub.add_argument(
            "--dtype",
            choices=("float32", "bfloat16"),
            default="float32",
            help="of the matmuls (default float32)",
        )
        text = "data x fsdp x tensor over all devices, -1 is what is left (default 1x-1x1)"
        sub.add_argument("--mesh", default="1x-1x1", metavar="DxFxT", help=text)
        if "--layers" in flags:
            sub.add_argument(
                "--family",
                choices=("llama", "qwen2", "qwen3"),
                default="qwen3",
                help="of the model (default qwen3)",
            )
            sub.add_argument(
                "--remat",
                choices=("none", "dots", "full"),
                default="none",
                help="as in the config (default none)",
            )
        sub.set_defaults(run=run)
        return sub

    def fraction(sub: argparse.ArgumentParser, flag: str, text: str) -> None:
        sub.add_argument(
            flag,
            type=functools.partial(_number, flag, float, 1e-6),
            default=1.0,
            metavar="X",
            help=f"{text} (default 1)",
        )

    loss = verb(benchmark_loss, _LOSS, 4096, 512, 32768, 0, 5)
    fraction(
        loss,
        "--target-fraction",
        "share of the rows that are trained; tokens/s and FLOPs count only these",
    )
    rollout = verb(
        benchmark_rollout, _ROLLOUT, 16, 16, 64, 128, 21, 0, 4, 256, 8, 4, 32, 1024, 32768, 3
    )
    fraction(rollout, "--top-p", "nucleus mass; 1 is off")
    fraction(rollout, "--sigma", "of the logarithm of log-normal lengths")
    rollout.add_argument(
        "--lengths",
        choices=("equal", "lognormal"),
        default="equal",
        help="of responses, imposed (default equal)",
    )
    rollout.add_argument(
        "--kv-cache",
        choices=("compute", "int8"),
        default="compute",
        help="as in the config (default compute)",
    )
    draw = verb(benchmark_draw, _DRAW, 16, 16, 8, 64, 128, 21, 4, 256, 8, 4, 32, 1024, 32768, 3)
    fraction(draw, "--sigma", "of the logarithm of the lengths")
    draw.add_argument(
        "--keep-rate",
        type=functools.partial(_number, "--keep-rate", float, 1e-2),
        default=1 / 3,
        help="share of informative groups (default 1/3)",
    )
    update = verb(benchmark_update, _UPDATE, 8, 512, 8, 128, 384, 4, 256, 4, 2, 64, 1024, 32000, 3)
    text = "of responses: all the longest, or log-normal with a median of a sixth of it (default equal)"
    update.add_argument("--lengths", choices=("equal", "lognormal"), default="equal", help=text)
    host = verbs.add_parser("host", help=benchmark_host.__doc__, description=benchmark_host.__doc__)
    for (flag, text), default in zip(
        _HOST.items(), (32, 16384, 16, 1408, 256, 20480, 3300), strict=True
    ):
        kind = functools.partial(_number, flag, int, 1)
        host.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default {default})"
        )
    fraction(host, "--sigma", "of the logarithm of the lengths")
    host.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a Hugging Face model (default bytes)"
    )
    host.set_defaults(run=benchmark_host)
    args = parser.parse_args(argv)
    try:
        print(json.dumps(args.run(args)))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise InputError(f"{args.what}: out of memory; lower the sizes") from None
    return 0
