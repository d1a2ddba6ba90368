"""Speed and memory of the three hot paths, on random models, through the code that training runs.

    python -m dapo_jax.benchmark loss         the fused head and loss, against three plain ways
    python -m dapo_jax.benchmark rollout      sampling through the rollout engine
    python -m dapo_jax.benchmark update       one optimizer update on packed rows
    python -m dapo_jax.benchmark schedule     decode steps of a config, by simulation (no model)

Each prints a table, and one JSON object as its last line. Rates and `seconds` are of the best call;
`cpu_seconds` is processor time, which varies less on a shared CPU (host work only where there is an
accelerator). Quote ratios within one run.
"""

from collections.abc import Callable
from typing import Any

from dapo_jax import cli
from dapo_jax.benchmark.loss import LossSizes, benchmark_loss
from dapo_jax.benchmark.measure import Report, run_benchmark
from dapo_jax.benchmark.rollout import RolloutSizes, benchmark_rollout
from dapo_jax.benchmark.schedule import ScheduleSizes, benchmark_schedule
from dapo_jax.benchmark.update import UpdateSizes, benchmark_update


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark. Its JSON is the last line."""
    parser = cli.parser("benchmark", __doc__, "loss --tokens 2048 --vocab 32000")
    update = UpdateSizes(heads=4, kv_heads=2, head_dim=64, vocab=32000)
    update.prompt_len, update.max_response_len = 128, 384
    benchmarks: dict[str, tuple[Callable[[Any], Report], Any]] = {
        "loss": (benchmark_loss, LossSizes(repeats=5)),
        "rollout": (benchmark_rollout, RolloutSizes()),
        "update": (benchmark_update, update),
        "schedule": (benchmark_schedule, ScheduleSizes()),
    }
    return run_benchmark(parser, benchmarks, argv)
