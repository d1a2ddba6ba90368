"""The long tests of what a run survives: `make torture`.

Prints a table of what was promised, done to the run, and seen.

python tests/torture.py [CASE ...]
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dapo_jax.runtime.metrics import VOLATILE, read_metrics

TESTS = Path(__file__).parent
CONFIG = """
model:
  architecture: {vocab_size: 258, model_dim: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, ffn_dim: 32, max_position: 64}
  compute_dtype: float32
  remat: none
data: {template: "{prompt}=", max_prompt_len: 16, arithmetic: {train_problems: 64, heldout_problems: 8, max_steps: 2, max_operand: 9}}
eval: {sets: {heldout: arithmetic}, every: 4, samples_per_problem: 2, top_p: 1.0}
rollout: {max_response_len: 40, decode_slots: 16}
reward: {verifier: custom, function: "reward_functions:even_sum", allowed_modules: [reward_functions], workers: 1, overlong_buffer_len: 10}
dapo: {prompts_per_step: 4, responses_per_prompt: 4, responses_per_update: 8, prompts_per_draw: 6}
optim: {learning_rate: 1e-3, warmup_steps: 2}
supervised: {updates: 4, responses_per_update: 8, save_every: 2}
train: {steps: 24, rows_per_microbatch: 4, save_every: 3, samples_per_step: 1}
"""
KILLS = 20
STEPS = 2000  # of the long run, with a checkpoint every 40
# Runs the train verb; at every line of metrics notes how many programs were compiled so far, and
# the memory in use.
WATCHED = """
import json, sys
import jax
from dapo_jax import cli, train
from dapo_jax.runtime.metrics import MetricsLog

compiled, notes, plain = [], open(sys.argv[1], "a"), MetricsLog.write
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)

def write(self, step, *rest):
    plain(self, step, *rest)
    pages = int(open("/proc/self/statm").read().split()[1])
    print(json.dumps([step, len(compiled), pages * 4096]), file=notes, flush=True)

MetricsLog.write = write
cli.run(train.main, sys.argv[2:])
"""


class Bench:
    """A folder with a config and a compile cache, and runs in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "tiny.yaml").write_text(CONFIG)
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "PYTHONPATH": os.pathsep.join(
                [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
            ),
        }

    def start(
        self,
        name: str,
        *overrides: str,
        plan: str = "",
        program: tuple[str, ...] = (),
    ) -> subprocess.Popen:
        command = [
            sys.executable,
            *(program or (str(TESTS / "faults.py"), plan, "dapo_jax.train")),
            "--config",
            self.folder / "tiny.yaml",
            "--run-dir",
            self.folder / name,
        ]
        command += [x for o in overrides for x in ("--set", o)]
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def end(self, name: str) -> tuple[list, dict]:
        """Lines without what the clock decides, and the digests of the last checkpoint."""
        lines = [
            {k: v for k, v in line.items() if not k.startswith(VOLATILE)}
            for line in read_metrics(self.folder / name)
        ]
        last = max(
            (self.folder / name / "checkpoints").iterdir(),
            key=lambda p: int(p.name) if p.name.isdigit() else -1,
        )
        return lines, json.loads((last / "host" / "metadata").read_text())["leaves"]


def whole(bench: Bench, *overrides: str) -> tuple[list, dict]:
    """A run that nothing happens to."""
    name = "whole" + "".join(overrides)
    if not (bench.folder / name).exists():
        assert bench.start(name, *overrides).wait() == 0
    return bench.end(name)


def random_kills(bench: Bench) -> tuple[str, str, str]:
    """F2: SIGKILL at random places, until the run is done."""
    rng, kills = random.Random(0), 0
    often = {
        "eval": 2,
        "step": 4,
        "rollout": 4,
        "reward": 4,
        "score": 8,
        "update": 8,
        "save": 1,
    }  # in some four steps
    plans = ["warm-up:1=kill", "warm-up:3=kill", "eval:1=kill"]
    plans += [
        f"{place}:{rng.randint(1, often[place])}=kill"
        for place in rng.choices(list(often), k=KILLS - len(plans))
    ]
    while True:
        status = bench.start(
            "killed", "train.steps=96", plan=plans[kills] if kills < KILLS else ""
        ).wait()
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), (bench.folder / "killed.log").read_text()[-2000:]
        if status == 0:
            break
    assert kills == KILLS and bench.end("killed") == whole(bench, "train.steps=96")
    return (
        "P3, P1",
        f"{kills} SIGKILLs at random places, restarted until done",
        "metrics, weights, optimizer bit-identical to a run without",
    )


def kills_inside_saves(bench: Bench) -> tuple[str, str, str]:
    """F3: SIGKILL up to 60 ms after a checkpoint's temporary folder has appeared."""
    rng, kills, half = random.Random(1), 0, 0
    folder = bench.folder / "torn" / "checkpoints"
    while True:
        process = bench.start("torn", "train.save_every=1")
        before = set(folder.glob("*"))
        while process.poll() is None and kills < KILLS:
            if {p for p in set(folder.glob("*")) - before if "tmp" in p.name}:
                time.sleep(rng.uniform(0, 0.06))
                process.kill()
                process.wait()
                kills, half = kills + 1, half + any("tmp" in p.name for p in folder.iterdir())
            time.sleep(0.002)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, (bench.folder / "torn.log").read_text()[
            -2000:
        ]
    assert kills >= KILLS and bench.end("torn") == whole(bench)
    return (
        "P3, P7",
        f"{kills} SIGKILLs while a checkpoint was written, {half} left half written",
        "bit-identical",
    )


def terminations(bench: Bench) -> tuple[str, str, str]:
    """F4: SIGTERM after a random time, whatever the run is doing."""
    rng, stops, slowest = random.Random(2), 0, 0.0
    while True:
        process = bench.start("stopped")
        if stops < KILLS:
            while (
                process.poll() is None and "step " not in (bench.folder / "stopped.log").read_text()
            ):
                time.sleep(0.05)
            time.sleep(rng.uniform(2, 8))
            asked = time.monotonic()
            process.terminate()
        status = process.wait()
        if status == 0:
            break
        slowest, stops = max(slowest, time.monotonic() - asked), stops + 1
        assert status in (128 + signal.SIGTERM, -signal.SIGTERM), (
            bench.folder / "stopped.log"
        ).read_text()[-2000:]
    assert stops > 3 and bench.end("stopped") == whole(bench)
    return (
        "P2, P1",
        f"{stops} SIGTERMs at random times",
        f"left within {slowest:.1f} s each time, start-up included; bit-identical",
    )


def a_long_run(bench: Bench) -> tuple[str, str, str]:
    """2,000 steps and 50 checkpoints: memory stays flat, and nothing compiles after the first
    steps.
    """
    notes = bench.folder / "notes.jsonl"
    # A rate at which it learns next to nothing: a policy that can do it all leaves no group to
    # train on.
    changes = (
        f"train.steps={STEPS}",
        f"train.save_every={STEPS // 50}",
        "eval.every=400",
        "optim.learning_rate=1e-7",
    )
    assert bench.start("long", *changes, program=("-c", WATCHED, str(notes))).wait() == 0, (
        bench.folder / "long.log"
    ).read_text()[-2000:]
    seen = {
        step: (compiled, memory / 2**20)
        for step, compiled, memory in map(json.loads, notes.read_text().splitlines())
    }
    tenth, end = seen[STEPS // 10], seen[STEPS]
    halves = [
        sum(m for s, (_, m) in seen.items() if a < s <= b) / (b - a)
        for a, b in ((STEPS // 2, 3 * STEPS // 4), (3 * STEPS // 4, STEPS))
    ]
    compiled = f"{tenth[0]} programs compiled by step {STEPS // 10}, {end[0]} by the end"
    memory = f"memory {tenth[1]:.0f} MB, then {end[1]:.0f} MB; mean of the third and last quarter {halves[0]:.0f} and {halves[1]:.0f} MB"
    assert end[0] == tenth[0], compiled
    assert halves[1] < 1.02 * halves[0] + 5, memory
    return "load", f"{STEPS} steps, 50 checkpoints", f"{compiled}; {memory}"


CASES: dict[str, Callable[[Bench], tuple[str, str, str]]] = {
    "kills": random_kills,
    "saves": kills_inside_saves,
    "terminations": terminations,
    "long": a_long_run,
}


def rows(names: list[str]) -> Iterator[str]:
    yield "| promised | injected | survived | seconds |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            start = time.monotonic()
            promised, injected, survived = CASES[name](bench)
            yield f"| {promised} | {injected} | {survived} | {time.monotonic() - start:,.0f} |"


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or list(CASES)):
        print(row, flush=True)
