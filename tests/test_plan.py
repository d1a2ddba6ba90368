"""Planning: its arithmetic, messages and exit statuses, and the smallest pod config through the
real compiler, where that is installed.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import plan_table
import pytest
from refusals import refusal

import dapo_jax
from dapo_jax import plan
from dapo_jax.benchmark.schedule import (
    LengthDistribution,
    Schedule,
    Segments,
    StepSummary,
    Workload,
)
from dapo_jax.config import MeshSection, ModelConfig, load_config
from dapo_jax.plan import (
    Part,
    Pod,
    Program,
    Result,
    Work,
    complaints,
    decode_part,
    estimate,
    largest_cost,
    largest_that_fits,
    load_pod,
    table,
    to_json,
    tokens_part,
)
from dapo_jax.runtime.chips import CHIPS, Chip
from dapo_jax.runtime.compiled import BETWEEN_SLICES, Compiled, Link
from dapo_jax.runtime.hlo import Traffic
from dapo_jax.runtime.mesh import make_mesh

CONFIGS = Path(dapo_jax.__file__).parent.parent / "configs"
SMALLEST = CONFIGS / "qwen2.5-1.5b_dapo17k_v5e-8.yaml"
POD = Pod(
    "v5e:2x4", [types.SimpleNamespace(process_index=0)] * 8, 8, Chip(100, 1000, 10, 6, 0.5, 2)
)
LARGEST = ("9.00MiB f32[2]",)
LOAD = Workload(LengthDistribution("by hand", np.array([50, 150])), 10.0, 0.5)
SENT = {Link("all-gather", 2, True): 12.0, Link("all-reduce", 1, False): 3.0}
STATE = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}


def result(
    name="update",
    *,
    peak=600,
    resident=100,
    fits=True,
    sent=SENT,
    traffic=Traffic(6.0, 4.0, 9.0),  # noqa: B008
    calls=4.0,
    work=Work(800.0, 1600.0, 50.0),  # noqa: B008
    arguments=(STATE,),
    static=None,
):
    settings, sizes = "train.rows_per_microbatch", static or {}
    program = Program(name, None, arguments, resident, work, calls, (), settings, sizes)
    compiled = Compiled(peak - 100, 100, peak, fits, sent, traffic, LARGEST)
    return Result(program, compiled, POD)


def schedule(segments, prefills=(), tokens=0, inserts=0):
    """One rollout step of 80 slots. segments: of decode steps, width."""
    steps, width = np.array(segments, float).T
    seen = Segments(0 * steps, steps, width, steps * 100, steps * 150, steps * 200, steps * 60)
    one = StepSummary(0, int(steps.sum()), 0.75, 9, tokens, 8, 0, 0, 0, 5, inserts, 0, 0.5, 2, 3)
    calls = np.array(prefills, int).reshape(-1, 3), np.array([(0, 8, 64)] * inserts).reshape(-1, 3)
    return Schedule(80, 1000, seen, *calls, [one])


def test_a_result_by_hand():
    """Over both axes of the torus 6 bytes/s, over one 3."""
    r = result()
    assert r.peak_bytes == 700 and r.fits
    times = {"FLOPs": 1600 / 8 / 100, "HBM": 1.0, "ICI": 2.0, "DCN": 0.0}
    assert r.times == {**times, "synchronous ICI": 1.0, "small operations": 0.0}
    assert r.seconds == 2.0 + 1.0
    several = result(sent={**SENT, Link(BETWEEN_SLICES, 1, True): 7.0})  # ten times as slow
    assert several.times == {**r.times, "DCN": 14.0} and several.seconds == 15.0
    small = result(traffic=Traffic(6.0, 4.0, 9e6, 2e6, 5.0))
    assert small.times["small operations"] == pytest.approx(2e6 * 1.2e-6 - 5 / 10)
    assert small.seconds == pytest.approx(2.0 + 1.0 + 1.9)
    assert not result(resident=500).fits  # 600 + 500 of 1000
    assert not result(fits=False).fits


def test_decode_steps_of_any_size_follow_from_two():
    """HBM bytes 100 + 2 width, at 10 bytes/s; 7 µs of small operations."""

    def decode(name, width):
        traffic = Traffic(100 + 2 * width, 0, 10, 7e-6 / 1.2e-6, 0)
        sizes, work = {"width": width}, Work(0, 0, 0)
        return result(name, sent={}, traffic=traffic, work=work, static=sizes)

    known = [decode("decode step", 80), decode("decode step, few slots", 10)]
    part = decode_part(known, schedule([(3, 80), (5, 20)]))
    hbm = (3 * (100 + 160) + 5 * (100 + 40)) / 10
    assert part.times["HBM"] == pytest.approx(hbm)
    assert part.times["cache"] == 0
    assert part.bound == pytest.approx(hbm + 8 * 7e-6)


def test_a_kernel_reads_live_entries_of_the_shard_that_has_most():
    """HBM without caches a + b width, a 100, b 2; 200 entries of half a byte in every step."""

    def decode(width):
        traffic, sizes = Traffic(100 + 2 * width, 0, 0, 0, 0), {"width": width}
        found = result("decode step", sent={}, traffic=traffic, work=Work(0, 0, 1), static=sizes)
        return found._replace(program=found.program._replace(entry_bytes=0.5))

    part = decode_part([decode(80), decode(10)], schedule([(3, 80), (5, 20)]))
    cache = (3 + 5) * 200 * 0.5 / 10
    assert part.times["cache"] == pytest.approx(cache)
    hbm = (3 * (100 + 160) + 5 * (100 + 40)) / 10 + cache
    assert part.times["HBM"] == pytest.approx(hbm)
    assert part.bound == pytest.approx(hbm)


def test_prefills_are_scaled_by_tokens_and_read_the_weights():
    """Compiled for 8 rows of 64 tokens: 3 s. Weights of 16 bytes: 1.6 s."""
    weights = jax.ShapeDtypeStruct((8,), "bfloat16")
    arguments = weights, jax.ShapeDtypeStruct((8, 64), "int32")
    known = [result("prefill", arguments=arguments, work=Work(800, 1600, 512))]
    part = tokens_part("prefill", known, np.array([(0, 16, 64), (0, 8, 16)]), 1, read=1.6)
    assert part.bound == 2 * 3.0 + 1.6 and part.times["HBM"] == 2.25


def step():
    """The programs of a step."""
    prompts, work = (STATE, jax.ShapeDtypeStruct((8, 64), "int32")), Work(800, 1600, 512)
    decode = result("decode step", static={"width": 10}, calls=0)
    rollout = [
        result(name, arguments=prompts, work=work, calls=0) for name in ("prefill", "insert")
    ]
    rollout.append(decode)
    return [*rollout, result("old log-probs"), result(), result("publish", calls=1)]


def test_what_a_run_comes_to_by_hand():
    config = load_config(
        SMALLEST, ["dapo.prompts_per_step=16", "dapo.responses_per_update=128", "train.steps=9"]
    )
    results = step()
    seen = schedule([(10, 10)], tokens=4000, inserts=2)
    found = estimate(results, seen, config, LOAD)
    assert found["rollout_s"] == pytest.approx(2 * 3 + 10 * 3)
    assert found["training_s"] == 3 * (4 + 4 + 1)
    assert found["bound_s"] == pytest.approx(63)
    assert found["expected_s"] == pytest.approx((2 + 10 + 9) * (2 + 1 + 2 + 1))
    assert found["decode_steps"] == 10 and found["live_share"] == 0.75
    assert found["token_age_mean"] == 0.5 and found["token_age_max"] == 2
    assert found["cache_read_per_live_token"] == 200 / 100
    assert found["suspended"] == 5 and found["live_share_of_cache"] == 100 / 1000
    assert found["decode_bytes_per_needed"] == pytest.approx(10 * 10 / (10 * 4e6))  # of weights
    assert found["training_mfu"] == 9 * 800 / (27 * 8 * 100)
    assert found["rollout_tokens_per_s_per_chip"] == pytest.approx(4000 / 36 / 8)
    assert found["train_tokens_per_s_per_chip"] == 16 * 8 * 100 / 27 / 8
    assert found["checkpoint_s"] == 4e6 / 1e9
    assert found["hours"] == pytest.approx(9 * 63 / 3600)
    assert found["chip_hours"] == 8 * found["hours"]


def test_the_first_of_several_rollout_steps_is_left_out():
    one = schedule([(3, 80)], [(0, 16, 64)])
    assert plan.steady(one) is one
    both = [
        np.concatenate([a, a + (name == "rollout_step")])
        for name, a in one.segments._asdict().items()
    ]
    later = one.steps[0]._replace(rollout_step=1)
    calls = np.array([(0, 16, 64), (1, 8, 64)])
    several = Schedule(80, 1000, Segments(*both), calls, calls[:1], [*one.steps, later])
    found = plan.steady(several)
    assert found.steps == [later] and found.prefills.tolist() == [[1, 8, 64]]
    assert not len(found.inserts)
    assert found.segments.rollout_step.tolist() == [1] and found.decode_steps == 3


def test_the_largest_cost_has_words_and_a_setting():
    zero = dict.fromkeys(result().times, 0.0)
    decode = Part("decode", 9.0, {**zero, "HBM": 8.0, "cache": 6.0, "small operations": 5.0})
    update = Part("update", 7.0, {**zero, "FLOPs": 5.5, "HBM": 5.0})
    words, seconds, cure = largest_cost([decode, update])
    assert (words, seconds) == ("reading the caches of decode", 6.0) and "rollout.kv_cache" in cure
    words, seconds, cure = largest_cost([decode._replace(times={**zero, "HBM": 1.0}), update])
    assert (words, seconds) == ("FLOPs of update", 5.5) and "model.remat" in cure


def test_the_table_has_a_line_a_program():
    lines = table([result(), result("publish", resident=500)]).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "program"
    assert lines[1].split()[5:7] == ["70%", "yes"] and lines[2].split()[5:7] == ["110%", "NO"]


def test_a_config_has_a_line_in_the_table_of_the_page():
    times = {"rollout_s": 1234.4, "training_s": 56.6, "expected_s": 2000.0}
    found = to_json(step(), times | {"live_share": 0.987, "chip_hours": 4e4})
    memory = " 0.0 (70%) |" * 5
    line = f"| `a_b` | v5e:2x4 |{memory} yes | 1,234 + 57 | 2,000 | 99% | 40,000 |"
    assert plan_table.line("a_b", found) == line


def test_complaints_name_program_cause_and_settings():
    assert complaints([result()]) == []
    (line,) = complaints([result(resident=500, peak=700)])
    assert (
        line.startswith("update does not fit by") and "arguments take" in line and "f32[2]" in line
    )
    assert line.endswith("change train.rows_per_microbatch")


def test_json_has_the_documented_keys():
    found = to_json([result(), result("publish", resident=500)], {"hours": 1.0})
    assert {"topology", "chips", "hbm_bytes", "fits", "programs"} <= found.keys() and found[
        "fits"
    ] is False
    keys = {
        "name",
        "argument_bytes",
        "temp_bytes",
        "peak_bytes",
        "hbm_fraction",
        "flops",
        "collective_bytes",
        "fits",
    }
    assert all(keys <= p.keys() for p in found["programs"])
    assert (
        found["programs"][0]["hbm_fraction"] == 0.7
        and found["programs"][0]["collective_bytes"] == 15
    )


@pytest.mark.parametrize("start", [4, 8, 60, 100])
@pytest.mark.parametrize(
    "base, slope, room, expected",
    [
        (100, 10, 500, 40),
        (100, 10, 505, 40),
        (100, 10, 100, 0),
        (100, 0, 500, 100),
        (600, 0, 500, 0),
        (100, 10, 189, 8),
        (100, 1, 500, 100),
    ],
)
def test_the_largest_that_fits(base, slope, room, expected, start):
    """Of multiples of 4 up to 102: 100 + 10 n ≤ room; another program needs more at first, and
    grows less.

    Each n costs minutes: few are asked for, none twice.
    """
    asked = []

    def peaks(n):
        asked.append(n)
        return base + slope * n, min(base + 40 + 0.6 * slope * n, base + 100 * slope)

    assert largest_that_fits(4, start, 102, peaks, room) == expected
    assert (
        asked[0] == start and len(asked) == len(set(asked)) <= 5 and all(n % 4 == 0 for n in asked)
    )


def test_the_largest_that_fits_where_memory_does_not_grow_evenly():
    """Level at first: what is largest is something else. A step up: the line leads beyond it."""
    assert largest_that_fits(4, 4, 128, lambda n: [max(300, 100 + 10 * n)], 500) == 40
    assert largest_that_fits(4, 4, 128, lambda n: [100 + 10 * n + (50 if n > 20 else 0)], 500) == 32


def test_suggestions_are_the_largest_that_fit_and_known_programs_are_not_compiled_again(
    monkeypatch,
):
    """With programs of a made-up size: 10 bytes for a page on each of 4 shards, 30 per row, 100 more;
    900 of 1000 bytes may be used. A live sequence has 72.5 entries, and a page more: 150 slots.
    """
    config, compiled = (
        load_config(SMALLEST, ["rollout.decode_slots=8", "dapo.prompts_per_draw=20"]),
        [],
    )
    pod = POD._replace(devices=[])

    def programs(config, model, mesh, load):
        rollout, rows = config.rollout, config.train.rows_per_microbatch
        pages = (rollout.cache_tokens or rollout.decode_slots * 4096) // 4 // 64
        sizes = {
            "prefill": (1, pages * 10),
            "decode step": (10 * pages, 100),
            "old log-probs": (20 * rows, 0),
            "update": (30 * rows, 100),
        }
        return [
            Program(
                name,
                types.SimpleNamespace(lower=lambda _, name=name, own=own: (name, own)),
                (jax.ShapeDtypeStruct((own,), "int8"),),
                held,
                None,
                1,
            )
            for name, (own, held) in sizes.items()
        ]

    def compile_program(lowered, argument_bytes, count):
        compiled.append(lowered)
        return Compiled(argument_bytes, 0, argument_bytes, True, {}, Traffic(), ())

    monkeypatch.setattr(plan, "programs", programs)

    def simulate(config, machine, load):
        found, slots = schedule([(10, 10)]), config.rollout.decode_slots
        (one,) = found.steps
        return found._replace(
            slots=slots, steps=[one._replace(suspended=3 if slots < 145 else 9999)]
        )

    monkeypatch.setattr(plan, "simulate", simulate)
    monkeypatch.setattr(plan, "load_model", lambda config: ModelConfig())
    monkeypatch.setattr(plan, "make_mesh", lambda section, devices: make_mesh(MeshSection(1, 4, 2)))
    monkeypatch.setattr(plan, "compile_program", compile_program)
    results = plan.compile_all(config, pod, LOAD, info=lambda line: None)
    lines = plan.suggest(config, pod, LOAD, results, lambda line: None)
    assert lines == [
        "rollout.cache_tokens: 32768; at most 20480 fit in 90% of HBM, with decode_slots 140: "
        "3 suspensions a step",
        "train.rows_per_microbatch: 4; at most 24 fit in 90% of HBM",
    ]
    assert (
        len(compiled) == len(set(compiled)) and [name for name, _ in compiled].count("prefill") == 1
    )


@pytest.mark.parametrize("peak, found", [(2000, 0), (10, 160 * 4096)])
def test_suggestions_where_no_cache_fits_or_the_largest(monkeypatch, peak, found):
    """Not below the longest sequence of each shard, nor above those of a draw: 160. A cache that is never short inserts no
    prefixes: such a program is missing there.
    """
    given = ["rollout.decode_slots=64", "dapo.prompts_per_draw=20", "train.rows_per_microbatch=4"]
    config = load_config(SMALLEST, given)

    def compile_all(config, pod, load, names, info, known):
        rollout = config.rollout
        assert rollout.cache_tokens is None or rollout.cache_tokens >= 4 * 4096
        whole = rollout.cache_tokens == rollout.decode_slots * 4096
        return [
            types.SimpleNamespace(
                program=types.SimpleNamespace(name=name, key=name), compiled=None, peak_bytes=peak
            )
            for name in names
            if not (whole and "prefixes" in name)
        ]

    monkeypatch.setattr(plan, "compile_all", compile_all)
    monkeypatch.setattr(plan, "simulate", lambda *args: schedule([(10, 10)]))
    monkeypatch.setattr(plan, "load_model", lambda config: ModelConfig())
    monkeypatch.setattr(plan, "make_mesh", lambda section, devices: make_mesh(MeshSection(1, 4, 2)))
    line, _ = plan.suggest(config, POD._replace(devices=[]), LOAD, [], lambda line: None)
    expected = f"; at most {found} fit" if found else "; none fits"
    assert line.startswith(f"rollout.cache_tokens: {64 * 4096}{expected}")


def test_unfinished_responses_are_read_again_and_take_their_memory():
    """With partial rollouts a sequence may start with all but its last token: 4 shards of 4096
    tokens, K / tensor 1, h 128, L 28.
    """

    def found(*settings):
        config = load_config(SMALLEST, list(settings))
        mesh = make_mesh(config.mesh)
        return {p.name: p for p in plan.programs(config, plan.load_model(config), mesh, LOAD)}

    off = "dapo.partial_rollouts=false", "dapo.max_policy_age=null", "rollout.cache_tokens=null"
    whole, partial = found(*off), found()
    longer = {"prefill of prefixes", "insert of prefixes"}
    assert partial.keys() - whole.keys() == longer
    assert found(*off, "rollout.cache_tokens=200000").keys() - whole.keys() == longer
    assert partial["prefill"].arguments[1].shape == (4, 1024) and partial[
        "prefill of prefixes"
    ].arguments[1].shape == (4, 4096)
    assert (
        partial["decode step"].resident_bytes - whole["decode step"].resident_bytes
        == 2 * 28 * (4096 - 1024) * 128 * 2
    )


def fake(monkeypatch, *results):
    monkeypatch.setattr(plan, "_compile_for_other_machines", lambda: None)
    monkeypatch.setattr(plan, "load_pod", lambda topology: POD)
    monkeypatch.setattr(plan, "compile_all", lambda *args: list(results))
    monkeypatch.setattr(plan, "make_mesh", lambda section, devices: make_mesh(MeshSection(1, 4, 2)))
    monkeypatch.setattr(plan, "simulate", lambda *args: schedule([(10, 10)]))


@pytest.mark.parametrize("resident, status", [(100, 0), (500, 1)])
def test_exit_status_says_whether_all_fits(monkeypatch, capsys, tmp_path, resident, status):
    fake(monkeypatch, *step()[:-1], result("publish", resident=resident, calls=1))
    assert plan.main(["--config", str(SMALLEST), "--json", str(tmp_path / "out.json")]) == status
    assert ("publish does not fit" in capsys.readouterr().out) == bool(status)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["fits"] == (not status) and found["estimate"]["lengths"] == "lognormal:768:0.8"
    assert [part["name"] for part in found["estimate"]["parts"]][2:4] == ["decode", "old log-probs"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v5p"], "topology 'v5p': ...NAME:AxB"),
        (["--topology", "v9:2x2"], "topology 'v9:2x2': ...v4, v5e, v5p, v6e, tpu7x"),
        (["--topology", "v5p:2x2x1*0"], "topology 'v5p:2x2x1*0': ...*N "),
        (["--kept-fraction", "0"], "--kept-fraction: ...0"),
        (["--lengths", "normal:9:1"], "...lengths: ...lognormal:MEAN:SIGMA"),
        (["--set", "mesh.topology=null"], "...mesh.topology: ...null"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(plan, "_compile_for_other_machines", lambda: None)
    with refusal(message):
        plan.main(["--config", str(SMALLEST), *arguments])


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with refusal("...pip install libtpu"):
        load_pod("v5e:2x4")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_v[0-9]*.yaml")), ids=lambda path: path.stem)
def test_every_pod_config_says_its_topology_and_divides(path):
    config = load_config(path)
    assert config.preset == "paper" and config.mesh.topology is not None
    name, shape = config.mesh.topology.split(":")
    chips = 1
    for n in shape.split("x"):
        chips *= int(n)
    accelerator, count = path.stem.rsplit("_", 1)[1].rsplit("-", 1)
    assert name == accelerator and name in CHIPS
    assert int(count) == chips * (
        2 if name in ("v4", "v5p") else 1
    )  # accelerator types of these count cores
    assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == chips


def run(*command, cwd):
    """In a process of its own: libtpu stays out of this one."""
    path = os.pathsep.join([str(CONFIGS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.compiler
def test_pods_of_every_generation(tmp_path):
    """A chip is one device, but for TPU7x: two, each with half of its memory.

    A mesh axis may take part of a side of the torus.

    Two slices: a device sends the keys and values of its own prompt to the other slice, once.
    Prompts are read by a kernel.
    """
    code = f"""
import json
from dapo_jax import plan
from dapo_jax.benchmark.schedule import parse_lengths
from dapo_jax.config import MeshSection, ModelConfig, load_config
from dapo_jax.runtime.mesh import make_mesh
plan._compile_for_other_machines()
names = ("v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:16x16", "tpu7x:2x2x1")
names += ("v4:2x2x1*2", "tpu7x:2x2x1*2", "v5e:2x4*2")
pods = [plan.load_pod(name) for name in names]
mesh = make_mesh(MeshSection(1, 32, 8), pods[3].devices)
sizes = [[p.chips, len(p.devices), p.chip.hbm_bytes] for p in pods]
print(json.dumps([sizes, len({{d.id for d in mesh.devices.flat}})]))
undivided = lambda: make_mesh(MeshSection(1, 8, 2), pods[-1].devices)
for refused in (lambda: plan.load_pod("v5e:3x77"), undivided):
    try:
        refused()
    except plan.InputError as e:
        print(e)
config = load_config("{SMALLEST}", ["mesh.data=2", "train.rows_per_microbatch=8"])
lengths = plan.Workload(parse_lengths("lognormal:768:0.8", 3072), 128, 0.5)
(insert,) = plan.compile_all(config, pods[-1], lengths, ["insert"], lambda line: None)
mesh = make_mesh(config.mesh, pods[-1].devices)
found = plan.programs(config, plan.load_model(config), mesh, lengths)
prefill = next(p for p in found if p.name == "prefill")
print(json.dumps([insert.compiled.collectives["between slices"], "tpu_custom_call" in prefill.lower().as_text()]))
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, unknown, undivided, sent = done.stdout.splitlines()[-4:]
    v4, v5e, v5p, v6e, half = (n * 2**30 for n in (30.75, 15.75, 95.73, 31.24, 94.74))
    one_slice = [[8, 8, v4], [8, 8, v5e], [8, 8, v5p], [256, 256, v6e], [4, 8, half]]
    assert json.loads(found) == [[*one_slice, [8, 8, v4], [8, 16, half], [16, 16, v5e]], 256]
    assert unknown.startswith("topology 'v5e:3x77': libtpu does not support it")
    assert undivided.startswith("mesh.data: 1 cannot be split over 2 slices")
    assert json.loads(sent) == [
        2 * 28 * 1024 * 128 * 2,
        True,
    ]  # k and v, L, P, h, bytes; one of two kv heads on each device


@pytest.mark.compiler
def test_the_smallest_pod_config_fits(tmp_path):
    """Through the real compiler, as a user would; all but the programs that take it longest."""
    out = tmp_path / "plan.json"
    names = ["prefill", "insert", "decode step", "publish"]
    done = run(
        "-m",
        "dapo_jax.plan",
        "--config",
        str(SMALLEST),
        "--json",
        str(out),
        *(f"--only={name}" for name in names),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["fits"] and found["chips"] == 8 and [p["name"] for p in found["programs"]] == names
    assert all(
        0.05 < p["hbm_fraction"] < 0.9 and p["collective_bytes"] > 0 for p in found["programs"]
    )
    by_name = {p["name"]: p for p in found["programs"]}
    # 1.54 B parameters, float32 over 8 chips, and their two moments beside them; bfloat16 over
    # tensor 2. Little else.
    assert 4 * 1.54e9 / 8 < by_name["publish"]["argument_bytes"] < 1.1 * 4 * 1.54e9 / 8
    assert 8 * 1.54e9 / 8 < by_name["publish"]["resident_bytes"] < 1.1 * 8 * 1.54e9 / 8
    assert 2 * 1.54e9 / 2 < by_name["prefill"]["argument_bytes"] < 1.1 * 2 * 1.54e9 / 2
    # From 8 shards to tensor 2: each chip sends 3/4 of what it gets, at least.
    assert by_name["publish"]["collective_bytes"] > 0.7 * 2 * 1.54e9 / 2
