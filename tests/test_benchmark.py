"""Every benchmark through its command line, at toy sizes. Speeds are never judged, only that they are there."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dapo_jax
from dapo_jax.benchmark import main
from dapo_jax.benchmark.update import train_items
from dapo_jax.types import InputError

MODEL = "--layers 1 --model-dim 16 --heads 4 --kv-heads 2 --head-dim 8 --ffn 32 --vocab 64 --repeats 2"
SPEED = ("tokens_per_s", "median_tokens_per_s", "seconds", "cpu_seconds")


def command(arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(dapo_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-m", "dapo_jax.benchmark", *arguments.split()], env=env, capture_output=True, text=True)


def run(arguments: str) -> tuple[list[str], dict]:
    """The lines for people, and the JSON object under them."""
    done = command(arguments)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def positive(*numbers: float) -> bool:
    return all(math.isfinite(n) and n > 0 for n in numbers)


def test_loss():
    # 3 chunks, the last one short, and no multiple of the targets
    lines, result = run("loss --tokens 80 --model-dim 16 --vocab 300 --target-fraction 0.5 --chunk 32 --repeats 2")
    assert result["benchmark"] == "loss" and result["device"].startswith("cpu") and result["jax"]
    assert [result[k] for k in ("tokens", "targets", "model_dim", "vocab", "chunk", "dtype")] == [80, 40, 16, 300, 32, "float32"]
    assert result["gflop"] == pytest.approx(6 * 40 * 16 * 300 / 1e9)
    assert positive(result["matmul_gflops"])
    assert list(result["variants"]) == ["plain", "plain_lse", "checkpointed", "fused"]
    for name, variant in result["variants"].items():
        assert set(variant) == {*SPEED, "peak_fraction", "temp_bytes", "peak_bytes", "grad_error"}
        assert positive(*(variant[key] for key in SPEED), variant["peak_fraction"], variant["temp_bytes"])
        assert variant["tokens_per_s"] == pytest.approx(40 / variant["seconds"])
        assert variant["median_tokens_per_s"] <= variant["tokens_per_s"]
        assert 0 <= variant["grad_error"] < 1e-4
        assert any(name in line for line in lines)
    if sys.platform == "linux":
        assert positive(*(variant["peak_bytes"] for variant in result["variants"].values()))


def test_rollout():
    lines, result = run(f"rollout --slots 2 --requests 3 --prompt-len 4 --max-response-len 6 {MODEL}")
    assert result["benchmark"] == "rollout" and len(lines) == 3
    mode = result["modes"]["lockstep"]
    assert set(mode) == {*SPEED, "decode_steps"} and positive(*mode.values())
    # Two batches of 6 steps, the second half empty; 3 responses of 6 tokens would fill 2 slots for 9.
    assert mode["decode_steps"] == 12 and result["bound_decode_steps"] == 9
    assert mode["tokens_per_s"] == pytest.approx(18 / mode["seconds"])


def test_update():
    _, result = run(f"update --rows 2 --row-len 32 --responses 5 --prompt-len 4 --max-response-len 12 {MODEL}")
    assert result["benchmark"] == "update" and result["lengths"] == "equal"
    # 5 segments of 16 tokens, two a row: 3 rows in 2 micro-batches of 2
    assert (result["trained_tokens"], result["packed_rows"], result["microbatches"]) == (60, 3, 2)
    assert result["packing_efficiency"] == pytest.approx(80 / 96)
    assert positive(result["trained_tokens_per_s"], result["median_trained_tokens_per_s"], result["seconds"], result["temp_bytes"])


@pytest.mark.parametrize("lengths, median", [("equal", 120), ("lognormal", 20)])
def test_lengths_of_responses(lengths, median):
    sizes = argparse.Namespace(responses=999, prompt_len=4, max_response_len=120, vocab=64, lengths=lengths)
    drawn = np.array([len(item.response) for item in train_items(sizes)])
    assert np.median(drawn) == pytest.approx(median, rel=0.1)
    assert drawn.min() >= 1 and drawn.max() == 120
    assert sum(item.weight * len(item.response) for item in train_items(sizes)) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("loss --tokens 0", "--tokens"),
        ("loss --vocab many", "--vocab"),
        ("loss --chunk -1", "--chunk"),
        ("loss --target-fraction 1.5", "--target-fraction"),
        ("loss --target-fraction nan", "--target-fraction"),
        ("rollout --top-p 0", "--top-p"),
        ("rollout --heads 3 --kv-heads 2", "--kv-heads"),
        ("rollout --head-dim 7", "--head-dim"),
        ("rollout --slots 3", "--slots: 3 is no multiple of the 8 devices"),
        ("update --rows 9", "--rows: 9 is no multiple of the 8 devices"),
        ("update --row-len 511", "--row-len: 511 does not hold --prompt-len + --max-response-len = 512"),
    ],
)
def test_bad_sizes_are_named_in_one_line(arguments, said):
    with pytest.raises(InputError) as e:
        main(arguments.split())
    assert str(e.value).startswith(said) and "\n" not in str(e.value)


def test_bad_sizes_exit_with_2():
    done = command("update --layers 0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["dapo_jax: --layers: expected a whole number from 1 to 2147483647, got '0'; correct it"]


@pytest.mark.parametrize("verb", ["loss", "rollout", "update"])
def test_help_gives_every_default(verb, capsys):
    with pytest.raises(SystemExit) as e:
        main([verb, "--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert shown.count("(default") == shown.count("\n  --")
