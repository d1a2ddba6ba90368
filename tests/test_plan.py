"""Planning: its arithmetic, messages and exit statuses, and the smallest pod config through the
real compiler, where that is installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

import dapo_jax
from dapo_jax import plan
from dapo_jax.config import MeshSection, load_config
from dapo_jax.plan import (
    Lengths,
    Pod,
    Program,
    Result,
    Work,
    complaints,
    estimate,
    largest_that_fits,
    load_pod,
    table,
    to_json,
)
from dapo_jax.runtime.chips import CHIPS, Chip
from dapo_jax.runtime.compiled import BETWEEN_SLICES, Compiled
from dapo_jax.runtime.mesh import make_mesh
from dapo_jax.types import InputError

CONFIGS = Path(dapo_jax.__file__).parent.parent / "configs"
SMALLEST = CONFIGS / "qwen2.5-1.5b_dapo17k_v5e-8.yaml"
POD = Pod(
    "v5e:2x4",
    [None] * 8,
    8,
    Chip(flops=100.0, hbm_bytes=1000.0, hbm_bandwidth=10.0, ici_bandwidth=5.0, dcn_bandwidth=0.5),
)

LARGEST = ("9.00MiB f32[2]",)


def result(
    name="update",
    *,
    peak=600,
    resident=100,
    fits=True,
    sent=20.0,
    between=0.0,
    calls=4.0,
    work=None,
):
    work = work or Work(800.0, 1600.0, 50.0, 10.0)
    program = Program(name, None, (), resident, work, calls, settings="train.rows_per_microbatch")
    return Result(
        program,
        Compiled(
            peak - 100, 100, peak, fits, {"all-gather": sent, BETWEEN_SLICES: between}, LARGEST
        ),
        POD,
    )


def test_a_result_by_hand():
    r = result()
    assert r.peak_bytes == 700 and r.fits
    assert (
        r.times == {"FLOPs": 1600 / 8 / 100, "HBM": 1.0, "ICI": 4.0, "DCN": 0.0}
        and r.seconds == 4.0
    )
    several = result(between=7.0)  # other links, ten times as slow
    assert (
        several.sent_bytes == 20
        and several.times["ICI"] == 4.0
        and several.times["DCN"] == several.seconds == 14.0
    )
    assert not result(resident=500).fits  # 600 + 500 of 1000
    assert not result(fits=False).fits


def test_what_a_run_comes_to_by_hand():
    config = load_config(
        SMALLEST, ["dapo.prompts_per_step=16", "dapo.responses_per_update=128", "train.steps=9"]
    )
    results = [
        result("prefill", calls=1),
        result("decode step", calls=10),
        result("old log-probs"),
        result(),
        result("publish", calls=1),
    ]
    found = estimate(results, config, Lengths(10, 100, 0.5))
    assert found["rollout_s"] == 44 and found["training_s"] == 16 + 16 + 4
    assert found["rollout_tokens_per_s_per_chip"] == 16 * 8 * 100 / 0.5 / 44 / 8
    assert found["train_tokens_per_s_per_chip"] == 16 * 8 * 100 / 36 / 8
    assert found["hours"] == 9 * 80 / 3600 and found["chip_hours"] == 8 * found["hours"]


def test_the_table_has_a_line_a_program():
    lines = table([result(), result("publish", resident=500)]).splitlines()
    assert len(lines) == 3 and lines[0].split()[0] == "program"
    assert lines[1].split()[5:7] == ["70%", "yes"] and lines[2].split()[5:7] == ["110%", "NO"]


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
        and found["programs"][0]["collective_bytes"] == 20
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
    """With programs of a made-up size: 10 bytes per slot, 30 per row, 100 more; 900 of 1000 bytes may
    be used.
    """
    config, compiled = (
        load_config(SMALLEST, ["rollout.decode_slots=8", "dapo.prompts_per_draw=10000"]),
        [],
    )
    pod = POD._replace(devices=[])

    def programs(config, model, mesh, lengths):
        slots, rows = config.rollout.decode_slots, config.train.rows_per_microbatch
        sizes = {
            "prefill": (1, slots * 10),
            "decode step": (10 * slots, 100),
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

    def compile_program(lowered, argument_bytes, trips):
        compiled.append(lowered)
        return Compiled(argument_bytes, 0, argument_bytes, True, {}, ())

    monkeypatch.setattr(plan, "programs", programs)
    monkeypatch.setattr(plan, "load_model", lambda config: None)
    monkeypatch.setattr(plan, "make_mesh", lambda section, devices: make_mesh(MeshSection(1, 4, 2)))
    monkeypatch.setattr(plan, "compile_program", compile_program)
    lengths = Lengths(10, 100, 0.5)
    results = plan.compile_all(config, pod, lengths, info=lambda line: None)
    lines = plan.suggest(config, pod, lengths, results, lambda line: None)
    assert lines == [
        "rollout.decode_slots: 8; at most 80 fit in 90% of HBM",
        "train.rows_per_microbatch: 4; at most 24 fit in 90% of HBM",
    ]
    assert (
        len(compiled) == len(set(compiled)) and [name for name, _ in compiled].count("prefill") == 1
    )


def test_unfinished_responses_are_read_again_and_take_their_memory():
    """With partial rollouts a sequence may start with all but its last token: 4 shards of 4096
    tokens, K / tensor 1, h 128, L 28.
    """

    def found(*settings):
        config = load_config(SMALLEST, list(settings))
        mesh = make_mesh(config.mesh)
        return {
            p.name: p
            for p in plan.programs(config, plan.load_model(config), mesh, Lengths(128, 768, 0.5))
        }

    whole, partial = found(), found("dapo.partial_rollouts=true")
    assert partial.keys() - whole.keys() == {"prefill of prefixes"}
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


@pytest.mark.parametrize("resident, status", [(100, 0), (500, 1)])
def test_exit_status_says_whether_all_fits(monkeypatch, capsys, tmp_path, resident, status):
    fake(monkeypatch, result(), result("publish", resident=resident))
    assert plan.main(["--config", str(SMALLEST), "--json", str(tmp_path / "out.json")]) == status
    assert ("publish does not fit" in capsys.readouterr().out) == bool(status)
    assert json.loads((tmp_path / "out.json").read_text())["fits"] == (not status)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v5p"], "topology 'v5p': expected NAME:AxB"),
        (["--topology", "v9:2x2"], "NAME one of v4, v5e, v5p, v6e, tpu7x"),
        (["--topology", "v5p:2x2x1*0"], r"and \*N after it for N slices"),
        (["--kept-fraction", "0"], "--kept-fraction: must be above 0"),
        (["--set", "mesh.topology=null"], "mesh.topology: is null; set the chips to plan for"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(plan, "_compile_for_other_machines", lambda: None)
    with pytest.raises(InputError, match=message) as e:
        plan.main(["--config", str(SMALLEST), *arguments])
    assert "\n" not in str(e.value)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
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


COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)


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


@COMPILER
def test_pods_of_every_generation(tmp_path):
    """A chip is one device, but for TPU7x: two, each with half of its memory.

    A mesh axis may take part of a side of the torus.

    Two slices: a device sends the keys and values of its own prompt to the other slice, once.
    Prompts are read by a kernel.
    """
    code = f"""
import json
from dapo_jax import plan
from dapo_jax.config import MeshSection, load_config
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
lengths = plan.Lengths(128, 768, 0.5)
(insert,) = plan.compile_all(config, pods[-1], lengths, ["insert"], lambda line: None)
mesh = make_mesh(config.mesh, pods[-1].devices)
found = plan.programs(config, plan.load_model(config), mesh, lengths)
prefill = next(p for p in found if p.name == "prefill")
print(json.dumps([insert.between_slices, "tpu_custom_call" in prefill.lower().as_text()]))
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, unknown, undivided, sent = done.stdout.splitlines()[-4:]
    one_slice = [[8, 8, 32e9], [8, 8, 16e9], [8, 8, 95e9], [256, 256, 32e9], [4, 8, 96e9]]
    assert json.loads(found) == [[*one_slice, [8, 8, 32e9], [8, 16, 96e9], [16, 16, 16e9]], 256]
    assert unknown.startswith("topology 'v5e:3x77': libtpu does not support it")
    assert undivided.startswith("mesh.data: 1 cannot be split over 2 slices")
    assert json.loads(sent) == [
        2 * 28 * 1024 * 128 * 2,
        True,
    ]  # k and v, L, P, h, bytes; one of two kv heads on each device


@COMPILER
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
