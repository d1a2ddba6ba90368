"""Every benchmark through its command line, at toy sizes.

Speeds are never judged, only that they are there.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import measure_sampling
import numpy as np
import pytest
from refusals import names, refusal

import dapo_jax
from dapo_jax.benchmark import main
from dapo_jax.benchmark.rollout import RolloutSizes, response_lengths
from dapo_jax.benchmark.update import UpdateSizes, padded_rows, train_items

pytestmark = pytest.mark.benchmark

SAMPLING = ({}, [measure_sampling.__file__])
MODEL = (
    "--layers 1 --model-dim 16 --heads 4 --kv-heads 2 --head-dim 8 --ffn 32 --vocab 64 --repeats 2"
)
SPEED = ("tokens_per_s", "median_tokens_per_s", "seconds", "cpu_seconds")


def command(
    arguments: str, more: Mapping[str, str] | None = None, program=("-m", "dapo_jax.benchmark")
) -> subprocess.CompletedProcess:
    path = os.pathsep.join(
        [str(Path(dapo_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | (more or {})
    return subprocess.run(
        [sys.executable, *program, *arguments.split()],
        env=env,
        capture_output=True,
        text=True,
    )


def run(arguments: str, *options) -> tuple[list[str], dict]:
    """The lines for people, and the JSON object under them."""
    done = command(arguments, *options)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def positive(*numbers: float) -> bool:
    return all(math.isfinite(n) and n > 0 for n in numbers)


def test_loss():
    # 3 chunks, the last one short, and no multiple of the targets
    lines, result = run(
        "loss --tokens 80 --model-dim 16 --vocab 300 --target-fraction 0.5 --chunk 32 --repeats 2"
    )
    assert result["benchmark"] == "loss" and result["device"].startswith("cpu") and result["jax"]
    assert [result[k] for k in ("tokens", "targets", "model_dim", "vocab", "chunk", "dtype")] == [
        80,
        40,
        16,
        300,
        32,
        "float32",
    ]
    assert result["gflop"] == pytest.approx(6 * 40 * 16 * 300 / 1e9)
    assert positive(result["matmul_gflops"])
    assert list(result["variants"]) == [
        *("plain", "plain_lse", "checkpointed", "fused", "fused_bare"),
        *("fused_cispo", "fused_masked"),
    ]
    for name, variant in result["variants"].items():
        assert set(variant) == {*SPEED, "peak_fraction", "temp_bytes", "grad_error"}
        assert positive(
            *(variant[key] for key in SPEED), variant["peak_fraction"], variant["temp_bytes"]
        )
        assert variant["tokens_per_s"] == pytest.approx(40 / variant["seconds"])
        assert variant["median_tokens_per_s"] <= variant["tokens_per_s"]
        assert 0 <= variant["grad_error"] < 1e-4
        assert any(name in line for line in lines)


def check_rollout(result, tokens, bound):
    assert result["bound_decode_steps"] == pytest.approx(bound)
    assert list(result["modes"]) == ["lockstep", "refill"]
    for mode in result["modes"].values():
        assert set(mode) == {*SPEED, "decode_steps", "read/live", "bound_share", "suspended"}
        assert positive(*(value for key, value in mode.items() if key != "suspended"))
        assert mode["read/live"] >= 1
        assert mode["tokens_per_s"] == pytest.approx(tokens / mode["seconds"])


def test_rollout():
    lines, result = run(
        f"rollout --slots 2 --requests 3 --prompt-len 4 --max-response-len 6 {MODEL}"
    )
    assert result["benchmark"] == "rollout" and len(lines) == 7  # three of them as calls end
    check_rollout(result, 18, 9)
    # 3 responses of 6 steps, which see 3 to 8 earlier tokens. A page of 64 for each decoded slot.
    assert result["live_tokens"] == 3 * sum(range(3, 9))
    reads = [result["live_tokens"] * mode["read/live"] for mode in result["modes"].values()]
    assert reads == pytest.approx([12 * 2 * 64, (6 * 2 + 6) * 64])
    # Two batches of 6 steps, the second half empty; 3 responses of 6 tokens would fill 2 slots for
    # 9.
    assert [mode["decode_steps"] for mode in result["modes"].values()] == [12, 12]


def test_rollout_of_responses_of_different_lengths():
    sizes = RolloutSizes(lengths="lognormal", median=3, sigma=1.0, requests=12, max_response_len=20)
    lengths = response_lengths(sizes).tolist()
    options = (
        "--lengths lognormal --median 3 --top-p 0.7 --top-k 9 --kv-cache int8 --dtype bfloat16"
    )
    _, result = run(
        f"rollout --slots 2 --requests 12 --prompt-len 4 --max-response-len 20 {options} {MODEL}"
    )
    check_rollout(result, sum(lengths), sum(lengths) / 2)
    free_at = [0, 0]
    for length in lengths:
        free_at[free_at.index(min(free_at))] += length
    lockstep = sum(max(lengths[i : i + 2]) for i in range(0, 12, 2))
    assert [mode["decode_steps"] for mode in result["modes"].values()] == [lockstep, max(free_at)]
    assert lockstep > max(free_at)


def test_imposed_lengths():
    sizes = RolloutSizes(
        lengths="lognormal", median=21, sigma=1.0, requests=4000, max_response_len=128
    )
    drawn = response_lengths(sizes)
    assert (
        np.median(drawn) == pytest.approx(21, rel=0.05) and drawn.min() >= 1 and drawn.max() == 128
    )
    assert np.log(drawn[drawn < 21] / 21).std() == pytest.approx(
        math.sqrt(1 - 2 / math.pi), rel=0.1
    )  # of half a normal
    sizes.lengths = "equal"
    assert set(response_lengths(sizes)) == {128}


def test_update():
    _, result = run(
        "update --rows 2 --row-len 32 --responses 5 --prompt-len 4 --max-response-len 12 "
        f"--family llama {MODEL}"
    )
    assert (
        result["benchmark"] == "update"
        and result["lengths"] == "equal"
        and result["family"] == "llama"
    )
    # 5 segments of 16 tokens, two a row: 3 rows in 2 micro-batches of 2. Padded, a row each, 4 rows
    # of 16 a micro-batch.
    assert (result["trained_tokens"], result["packed_rows"]) == (60, 3)
    assert result["packing_efficiency"] == pytest.approx(80 / 96)
    packed, padded = result["modes"]["packed"], result["modes"]["padded"]
    assert (packed["microbatches"], packed["filled"]) == (2, 80 / 128) and (
        padded["microbatches"],
        padded["filled"],
    ) == (2, 80 / 128)
    for mode in (packed, padded):
        assert positive(
            mode["trained_tokens_per_s"],
            mode["median_trained_tokens_per_s"],
            mode["seconds"],
            mode["temp_bytes"],
        )


def test_draw():
    """Both modes keep the same groups, so their tokens are the same; generation batches are of
    three times the groups wanted.
    """
    _, result = run(
        "draw --slots 4 --groups 3 --group 2 --prompt-len 4 --max-response-len 8 --median 3 "
        f"--keep-rate 0.3 {MODEL}",
        *SAMPLING,
    )
    batches, streaming = result["modes"]["generate_then_filter"], result["modes"]["streaming"]
    assert (
        batches["kept"] == streaming["kept"] == 3 and batches["tokens"] == streaming["tokens"] > 0
    )
    assert batches["prompts"] % 9 == 0 and 3 <= streaming["prompts"]
    assert batches["decode_steps"] >= streaming["decode_steps"] > 0
    assert positive(
        *(
            mode[key]
            for mode in (batches, streaming)
            for key in ("kept_tokens_per_s", "seconds", "cpu_seconds")
        )
    )


def test_host():
    """Every response is fetched, in one or two transfers a segment; a quarter of them are decoded;
    half of the groups are packed.
    """
    job, lengths = "--processes 4 --responses 64 --group 4 --slots 16", "--max-response-len 200"
    lines, result = run(f"host {job} --prompt-len 4 {lengths} --median 30", *SAMPLING)
    parts, segments = result["parts"], result["segments"]
    assert list(parts) == ["fetch", "decode", "judge", "group", "pack"] and len(lines) == 7
    assert (
        64 < result["tokens"] <= 64 * 200
        and parts["judge"]["calls"] == segments
        and parts["pack"]["calls"] == 2
    )
    assert parts["decode"]["calls"] == 64 / 4 and segments < parts["fetch"]["calls"] <= 2 * segments
    assert all(positive(part["seconds"]) for part in parts.values()) and positive(
        result["peak_bytes"]
    )


def test_padded_rows_hold_the_items_one_by_one():
    sizes = UpdateSizes(
        responses=5, prompt_len=4, max_response_len=12, vocab=64, lengths="lognormal"
    )
    items = train_items(sizes)
    batch = padded_rows(items, 16, 2)
    assert batch.tokens.shape == (3, 2, 16) and batch.segment_ids.max() == 1
    for item, row, mask in zip(
        items, batch.tokens.reshape(6, 16), batch.target_mask.reshape(6, 16), strict=False
    ):
        assert (
            row[mask].tolist() == item.response.tolist()
            and row[:4].tolist() == item.prompt.tolist()
        )
    assert not batch.tokens[2, 1].any() and batch.weight.sum() == pytest.approx(1)


def test_loss_over_several_devices():
    """The gradient is held against plain: 8 rows of tokens on each of 4 devices, the vocabulary
    over 2.
    """
    env = {"JAX_NUM_CPU_DEVICES": "8"}
    _, result = run(
        "loss --tokens 32 --model-dim 16 --vocab 64 --chunk 8 --repeats 1 --mesh 2x2x2", env
    )
    assert all(0 <= variant["grad_error"] < 1e-4 for variant in result["variants"].values())
    done = command("loss --tokens 30 --model-dim 16 --vocab 64 --repeats 1 --mesh 2x2x2", env)
    assert done.returncode == 2 and names(done.stderr, "dapo_jax: --tokens: 30 ...4 devices")


@pytest.mark.parametrize("lengths, median", [("equal", 120), ("lognormal", 20)])
def test_lengths_of_responses(lengths, median):
    sizes = UpdateSizes(
        responses=999, prompt_len=4, max_response_len=120, vocab=64, lengths=lengths
    )
    drawn = np.array([len(item.response) for item in train_items(sizes)])
    assert np.median(drawn) == pytest.approx(median, rel=0.1)
    assert drawn.min() >= 1 and drawn.max() == 120
    assert sum(item.weight * len(item.response) for item in train_items(sizes)) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("loss --tokens 0", "--tokens"),
        ("loss --vocab many", "--vocab: ...integer...'many'"),
        ("loss --vocab 2147483648", "--vocab: 2147483648 "),
        ("rollout --family bert", "--family: ...'llama', 'qwen2' or 'qwen3', got"),
        ("loss --chunk -1", "--chunk"),
        ("loss --target-fraction 1.5", "--target-fraction"),
        ("loss --target-fraction nan", "--target-fraction"),
        ("rollout --top-p 0", "--top-p"),
        ("rollout --heads 3 --kv-heads 2", "--kv-heads"),
        ("rollout --head-dim 7", "--head-dim"),
        ("rollout --slots 3", "--slots: 3 ...8 devices"),
        ("update --mesh 2x4", "--mesh: ...DATAxFSDPxTENSOR"),
        ("update --mesh 3x1x1", "mesh: data 3 x fsdp 1 x tensor 1 ...8 devices"),
        ("update --rows 9", "--rows: 9 ...8 devices"),
        ("update --row-len 511", "--row-len: 511 ...--prompt-len + --max-response-len = 512"),
    ],
)
def test_bad_sizes_are_named_in_one_line(arguments, said):
    with refusal(said):
        main(arguments.split())


def test_a_group_of_one_is_refused():
    with refusal("--group: ...2"):
        measure_sampling.main(["draw", "--group", "1"])


def test_bad_sizes_exit_with_2():
    done = command("update --layers 0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["dapo_jax: --layers: must be at least 1, got 0"]


@pytest.mark.parametrize("verb", ["loss", "rollout", "draw", "update", "host"])
def test_help_gives_every_default(verb, capsys):
    program = measure_sampling.main if verb in ("draw", "host") else main
    with pytest.raises(SystemExit) as e:
        program([verb, "--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    assert shown.count("(default") == shown.count("\n  --")
