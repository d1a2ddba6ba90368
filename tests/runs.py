"""A tiny training run through its command line, for all tests that start one."""

import json
import socket
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from dapo_jax import cli, train
from dapo_jax.runtime.metrics import read_metrics

TESTS = Path(__file__).parent
CONFIG = """
model:
  architecture: {vocab_size: 258, model_dim: 16, layers: 1, heads: 2, kv_heads: 1, head_dim: 8, ffn_dim: 32, max_position: 64}
  compute_dtype: float32
  remat: none
data: {template: "{prompt}=", max_prompt_len: 16, arithmetic: {train_problems: 64, heldout_problems: 8, max_steps: 2, max_operand: 9}}
eval: {sets: {heldout: arithmetic}, every: 2, samples_per_problem: 2, top_p: 1.0}
rollout: {max_response_len: 40, decode_slots: 32}
reward: {verifier: custom, function: "reward_functions:even_sum", allowed_modules: [reward_functions], workers: 1, overlong_buffer_len: 10}
dapo: {prompts_per_step: 6, responses_per_prompt: 4, responses_per_update: 12, prompts_per_draw: 8}
optim: {learning_rate: 1e-3, warmup_steps: 2, max_nonfinite_updates: 2}
supervised: {updates: 2, responses_per_update: 8}
train: {steps: 4, rows_per_microbatch: 8, save_every: 2}
"""
VOLATILE = ("time/", "throughput/", "memory/")


def verb(module, *args) -> int:
    with pytest.raises(SystemExit) as done:
        cli.run(module.main, [str(a) for a in args])
    return int(done.value.code or 0)


def run_train(config, run_dir, *overrides, allow="") -> int:
    return verb(
        train,
        "--config",
        config,
        "--run-dir",
        run_dir,
        *(x for o in overrides for x in ("--set", o)),
        *(("--allow-change", allow) if allow else ()),
    )


def steady(run_dir) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(VOLATILE)}
        for line in read_metrics(run_dir)
    ]


def record(run, step) -> dict:
    return json.loads((run / "checkpoints" / str(step) / "host" / "metadata").read_text())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def install(monkeypatch, name: str, **members) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
