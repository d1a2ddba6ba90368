"""Checkpoints survive what disks and people do to them: everything restored is bit-equal to what
was saved, or refused.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from refusals import refusal
from states import GROUPS, HOST, abstract, bits, make_state, mesh, spec

from dapo_jax.runtime import checkpoint
from dapo_jax.runtime.checkpoint import Checkpoints, newest_host, restore_params
from dapo_jax.types import NoCheckpointError, TrainState


def saved(folder: Path, *steps: int) -> Path:
    with Checkpoints(folder, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {**HOST, "step": step}, GROUPS)
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("saved") / "checkpoints", 3, 5)


@pytest.fixture
def folder(two_steps, tmp_path) -> Path:
    """Steps 3 and 5, to be damaged."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def restored(folder: Path, grid: tuple[int, int] = (2, 4)):
    with Checkpoints(folder, keep=9) as checkpoints:
        return checkpoints.restore(abstract(make_state(0), grid))


# ---------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("grid", [(2, 4), (1, 1), (4, 1), (1, 8)])
def test_round_trip_is_bit_equal_on_any_mesh(two_steps, grid):
    back = restored(two_steps, grid)
    want = make_state(5)
    assert back.step == 5 and bits(back.state) == bits(want)
    assert jax.tree.structure(back.state) == jax.tree.structure(want)
    for leaf, old in zip(jax.tree.leaves(back.state), jax.tree.leaves(want), strict=True):
        assert leaf.dtype == old.dtype and leaf.sharding == NamedSharding(mesh(*grid), spec(old))
    assert back.host == {**HOST, "step": 5}
    assert back.groups.keys() == GROUPS.keys()
    for name, array in GROUPS.items():
        assert back.groups[name].dtype == array.dtype and back.groups[name].shape == array.shape
        np.testing.assert_array_equal(back.groups[name], array)


def test_targets_may_be_arrays_or_have_no_sharding(two_steps):
    with Checkpoints(two_steps, keep=9) as checkpoints:
        from_arrays = checkpoints.restore(make_state(0))
        bare = checkpoints.restore(
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_state(0))
        )
    assert bits(from_arrays.state) == bits(bare.state) == bits(make_state(5))
    assert all(
        leaf.sharding == SingleDeviceSharding(jax.devices()[0])
        for leaf in jax.tree.leaves(bare.state)
    )


def test_params_alone(two_steps):
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_state(0).params)
    step, params = restore_params(two_steps, target)
    assert step == 5 and bits(params) == bits(make_state(5).params)


def test_a_state_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state = TrainState({"w": jnp.arange(500_000.0)}, (), jnp.int32(1))
        want = np.arange(500_000, dtype=np.float32)
        checkpoints.save(1, state, {}, {})
        for _ in range(5):
            state = overwrite(state)
        checkpoints.wait()
        back = checkpoints.restore(state)
    np.testing.assert_array_equal(np.asarray(back.state.params["w"]), want)
    assert back.groups == {} and back.host == {}


def test_keeps_the_newest_and_names_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore(make_state(0)) is None
        for step in (2, 4, 6):
            checkpoints.save(step, make_state(step), {}, {})
            checkpoints.wait()
            assert checkpoints.steps()[0] == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "6"]


def test_nothing_is_pickled(two_steps):
    for path in two_steps.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle") and (
            path.is_dir() or not path.read_bytes().startswith(b"\x80\x04")
        )
    with pytest.raises(ValueError, match="(?i)object"):
        with Checkpoints(two_steps, keep=9) as checkpoints:
            checkpoints.save(9, make_state(9), {}, {"objects": np.array([{}], object)})


def test_a_step_before_the_newest_is_refused(folder):
    with (
        Checkpoints(folder, keep=9) as checkpoints,
        pytest.raises(ValueError, match="step 3 is before the newest checkpoint, of step 5"),
    ):
        checkpoints.save(3, make_state(3), {}, {})


def test_later_checkpoints_of_a_step_take_the_place_of_each_other(folder):
    """Inside the next step, or of the same step after a rollback. A whole step outlasts them, and a
    rollback takes only whole steps.
    """

    def names():
        return sorted(p.name for p in folder.iterdir())

    for seed, name in ((11, "5.1"), (12, "5.2")):
        with Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.save(5, make_state(seed), {}, GROUPS, partial=seed == 11)
        assert names() == ["3", "5", name] and bits(restored(folder).state) == bits(
            make_state(seed)
        )
        step, params = restore_params(folder, abstract(make_state(0)).params)
        assert step == 5 and bits(params) == bits(make_state(5).params)  # not those inside step 6
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.steps() == [5, 3]
        assert bits(checkpoints.restore(make_state(0), at_most=5).state) == bits(make_state(5))
        assert names() == ["3", "5", "bad-5.2"]
        checkpoints.save(5, make_state(13), {}, {})
        checkpoints.save(6, make_state(6), {}, {})
    assert names() == ["5", "6", "bad-5.2"]


def test_a_whole_step_replaces_the_partial_ones_before_it(tmp_path):
    """Those of a warm-up: what follows finds the weights of step 0."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for seed in (1, 2):
            checkpoints.save(0, make_state(seed), {}, {}, partial=True)
        checkpoints.save(0, make_state(3), {}, {})
        assert [path.name for path in tmp_path.iterdir()] == ["0"]
        assert bits(checkpoints.restore(make_state(0)).state) == bits(make_state(3))
        checkpoints.save(0, make_state(4), {}, {}, partial=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "0.1"]
    assert restore_params(tmp_path, abstract(make_state(0)).params)[0] == 0


def test_groups_come_back_as_they_were(tmp_path):
    groups = {"draw": 3, "open": [{"texts": ["a", "é"], "done": [True, 0.5]}], **GROUPS}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, make_state(0), {}, groups, partial=True)
        checkpoints.wait()
        back = checkpoints.restore(make_state(0)).groups
    assert back["open"] == groups["open"] and back["draw"] == 3 and (tmp_path / "0.1").is_dir()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(folder, value):
    state = make_state(6)
    layers = {**state.params["layers"], "norm": state.params["layers"]["norm"].at[2].set(value)}
    state = state._replace(params={**state.params, "layers": layers})
    with Checkpoints(folder, keep=9) as checkpoints:
        with pytest.raises(FloatingPointError, match="layers/norm"):
            checkpoints.save(6, state, {}, {})
        assert checkpoints.steps() == [5, 3]


# ------------------------------------------------------------------------------------------- digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_digest_sees_every_flipped_bit_and_no_sharding(dtype):
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 60, (8, 4)).astype(dtype)
    (plain,) = checkpoint._describe({"x": jnp.asarray(raw)}).values()
    for grid in ((2, 4), (8, 1)):
        (sharded,) = checkpoint._describe(
            {"x": jax.device_put(raw, NamedSharding(mesh(*grid), PartitionSpec("data", "fsdp")))}
        ).values()
        assert sharded == plain
    flips = range(0, raw.nbytes * 8, 8 if dtype == "bool" else 5)
    for bit in flips:
        flipped = np.frombuffer(raw.tobytes(), np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        (other,) = checkpoint._describe(
            {"x": jnp.asarray(flipped.view(raw.dtype).reshape(raw.shape))}
        ).values()
        assert other["digest"] != plain["digest"]


def test_digest_against_a_plain_loop():
    def mix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    x = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    words = [int(w) for w in x.view(np.uint32).ravel()]
    want = [
        sum(mix(w ^ c * i % 2**32) for i, w in enumerate(words)) % 2**32
        for c in (0x9E3779B1, 0x85EBCA77)
    ]
    assert (
        checkpoint._describe({"x": jnp.asarray(x)})["x"]["digest"] == f"{want[0]:08x}{want[1]:08x}"
    )


def test_digest_sees_two_elements_swapped():
    a, b = (
        checkpoint._describe({"x": jnp.array(x)})["x"]["digest"]
        for x in ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    )
    assert a != b


# ------------------------------------------------------------------------------------------- damage


def all_files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(content)


@pytest.mark.default("flip")
@pytest.mark.parametrize(
    "damage",
    [flip, lambda p: os.truncate(p, p.stat().st_size // 2), Path.unlink],
    ids=["flip", "truncate", "delete"],
)
def test_damage_to_any_file_is_survived_bit_equal(folder, two_steps, damage, capsys):
    """Whatever happens to a file of step 5, the run resumes from step 5 exactly, or from step 3
    exactly with a warning.
    """
    files = all_files(folder / "5")
    seen = []
    for file in files:
        damage(folder / "5" / file)
        back = restored(folder)
        printed = capsys.readouterr().err
        assert back.step in (3, 5), file
        assert bits(back.state) == bits(make_state(back.step)), file
        assert back.host["step"] == back.step
        np.testing.assert_array_equal(back.groups["tokens"], GROUPS["tokens"])
        if back.step == 3:
            seen.append(file)
            assert (
                f"{folder / '5'}: checkpoint not used: " in printed and "Traceback" not in printed
            )
            assert not (folder / "5").exists() and (folder / "bad-5").is_dir()
            shutil.rmtree(folder / "bad-5")
        else:
            shutil.rmtree(folder / "5")
        shutil.copytree(two_steps / "5", folder / "5")
    noticed = {str(file) for file in seen}
    assert {
        "host/metadata",
        "params/manifest.ocdbt",
        "optimizer/manifest.ocdbt",
        "groups/manifest.ocdbt",
    } <= noticed
    assert all(
        any(name.startswith(f"{item}/") and "/d/" in name for name in noticed)
        for item in ("params", "optimizer", "groups")
    )


def test_flips_that_the_store_does_not_see_are_noticed(folder, capsys):
    """Array bytes have no checksum of their own in the store, which puts them into one file or
    several, as time allows.
    """
    files = {file: file.read_bytes() for file in sorted((folder / "5" / "params").rglob("d/*"))}
    target, want = abstract(make_state(0)).params, {s: bits(make_state(s).params) for s in (3, 5)}
    size = sum(map(len, files.values()))
    assert size > 64 * 128 * 4 / 2
    reasons = []
    for file, content in files.items():
        for at in range(40, len(content), size // 12):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            step, params = restore_params(folder, target)
            assert bits(params) == want[step]
            reason = capsys.readouterr().err
            if len(content) > size // 12:  # smaller files describe arrays and hold none
                reasons.append(reason)
        file.write_bytes(content)
    assert sum("does not match its digest" in reason for reason in reasons) >= len(reasons) / 2


def test_after_walking_back_the_run_saves_again(folder):
    (folder / "5" / "host" / "metadata").unlink()
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.restore(make_state(0)).step == 3
        assert checkpoints.steps() == [3]
        checkpoints.save(5, make_state(55), {}, {})
    assert bits(restored(folder).state) == bits(make_state(55))


def test_a_second_bad_step_finds_another_name(folder):
    (folder / "bad-999").mkdir()
    (folder / "999").mkdir()
    assert restored(folder).step == 5
    assert (folder / "bad-999-1").is_dir() and (folder / "bad-999").is_dir()


def test_empty_folder_with_a_number_is_no_checkpoint(folder, capsys):
    (folder / "999").mkdir()
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.restore(make_state(0)).step == 5
        checkpoints.save(6, make_state(6), {}, {})
    assert "999: checkpoint not used: incomplete" in capsys.readouterr().err
    assert restored(folder).step == 6


def test_a_plain_file_with_a_number_is_no_checkpoint(folder):
    (folder / "12").write_text("not a checkpoint")
    assert restored(folder).step == 5


def test_a_half_written_step_is_ignored_and_removed(folder):
    shutil.copytree(folder / "5", folder / "8.orbax-checkpoint-tmp")
    with Checkpoints(folder, keep=9) as checkpoints:
        assert checkpoints.restore(make_state(0)).step == 5
        checkpoints.save(8, make_state(8), {}, {})
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5", "8"]


def test_reading_params_changes_nothing(folder):
    (folder / "5" / "host" / "metadata").unlink()
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    before = all_files(folder)
    assert restore_params(folder, abstract(make_state(0)).params)[0] == 3
    assert (
        all_files(folder) == before
        and (folder / "5").is_dir()
        and (folder / "8.orbax-checkpoint-tmp").is_dir()
    )


def test_params_are_of_a_whole_step(folder):
    """Weights inside step 6 are not those of step 5, under which they would be reported."""
    with Checkpoints(folder, keep=9) as checkpoints:
        checkpoints.save(5, make_state(11), {}, {}, partial=True)
    for expected in (5, 3):
        _, params = restore_params(folder, abstract(make_state(0)).params)
        assert bits(params) == bits(make_state(expected).params)
        shutil.rmtree(folder / str(expected), ignore_errors=True)
    with pytest.raises(NoCheckpointError):
        restore_params(folder, abstract(make_state(0)).params)


def test_params_do_not_need_an_intact_optimizer(folder):
    shutil.rmtree(folder / "5" / "optimizer")
    assert restore_params(folder, abstract(make_state(0)).params)[0] == 5


# ------------------------------------------------------------------------------------------ refused


def test_all_bad_is_refused_and_left_alone(folder):
    flip(folder / "3" / "host" / "metadata")
    (folder / "5" / "host" / "metadata").write_text("[]")
    with refusal(f"{folder}: ...none of its 2 checkpoints", NoCheckpointError):
        restored(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]


def cast(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype
        ),
        state,
    )


def reshape(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (*a.shape[:-1], a.shape[-1] * 2) if a.ndim == 2 else a.shape, a.dtype
        ),
        state,
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (cast, r"embed is float32\[64, 128\], expected bfloat16\[64, 128\]"),
        (reshape, r"embed is float32\[64, 128\], expected float32\[64, 256\]"),
        (lambda s: s._replace(params={**s.params, "head": s.params["embed"]}), "head is missing"),
        (
            lambda s: s._replace(params={"layers": s.params["layers"]}),
            "embed is there, not expected",
        ),
        (lambda s: s._replace(opt_state=optax.sgd(0.1).init(s.params)), "is there, not expected"),
    ],
    ids=["dtype", "shape", "extra", "fewer", "optimizer"],
)
def test_another_models_checkpoint_is_refused(folder, change, said):
    with Checkpoints(folder, keep=9) as checkpoints, pytest.raises(NoCheckpointError, match=said):
        checkpoints.restore(change(make_state(0)))
    assert sorted(p.name for p in folder.iterdir()) == ["3", "5"]


def test_another_format_is_named(folder):
    path = folder / "5" / "host" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    shutil.rmtree(folder / "3")
    with refusal("...written in format 2, not 4", NoCheckpointError):
        restored(folder)
    (folder / "5").rename(folder / "interrupted")  # where format 2 kept partial steps
    with refusal("...interrupted: written in format 2, not 4", NoCheckpointError):
        restored(folder)


def test_params_of_a_folder_without_checkpoints(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NoCheckpointError, match="holds no checkpoint"):
            restore_params(folder, make_state(0).params)


# --------------------------------------------------------------------------------------------- disk


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with refusal(f"{folder}: ...checkpoints"):
            Checkpoints(folder, keep=1)


FULL_DISK = """
    import resource, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp, numpy as np
    from dapo_jax.runtime.checkpoint import Checkpoints
    from dapo_jax.types import InputError, TrainState

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=20_000))
    state = TrainState(dict.fromkeys("abcde", leaf), (), jnp.int32(0))

    for how, limit in (("leave", 50_000), ("save", 50_000), ("raise", 50_000), ("at once", 100)):
        folder = sys.argv[1] + "/" + how
        try:
            with Checkpoints(folder, keep=1) as checkpoints:
                checkpoints.save(1, state, {}, {})
                checkpoints.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
                checkpoints.save(2, state, {}, {})
                if how == "save":
                    checkpoints.save(3, state, {}, {})
                if how == "raise":
                    raise KeyError("the first error")
        except (InputError, KeyError) as e:
            print(how, type(e).__name__, e)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        with Checkpoints(folder, keep=1) as checkpoints:
            print("resumed from", checkpoints.restore(state).step)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_older_step_stays(tmp_path):
    root = Path(checkpoint.__file__).parents[2]
    code = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    done = subprocess.run(
        code,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    leave, _, save, _, first, _, at_once, _ = lines = done.stdout.splitlines()
    assert lines[1::2] == ["resumed from 1"] * 4
    (late,) = done.stderr.splitlines()  # the failed save under an error that came first
    for how, line in (("leave", leave), ("save", save), ("raise", late), ("at once", at_once)):
        assert f"{tmp_path / how}: a checkpoint could not be written (File too large)" in line
    assert all(
        line.startswith(f"{how} InputError")
        for how, line in (("leave", leave), ("save", save), ("at once", at_once))
    )
    assert first == "raise KeyError 'the first error'"


def test_a_folder_that_refuses_a_step_leaves_no_thread_waiting(folder, monkeypatch):
    """Where a background thread made the folders, others would wait for it for five minutes."""

    def mkdir(path, *args, **kwargs):
        if "orbax-checkpoint-tmp" in os.fspath(path):
            raise PermissionError(1, "Operation not permitted", os.fspath(path))
        return plain(path, *args, **kwargs)

    plain, before = os.mkdir, set(threading.enumerate())
    monkeypatch.setattr(os, "mkdir", mkdir)
    with refusal(f"{folder}: ...checkpoint ...written (Operation not permitted)"):
        with Checkpoints(folder, keep=9) as checkpoints:
            checkpoints.save(6, make_state(6), {}, {})
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert thread.daemon or not thread.is_alive(), thread.name
    monkeypatch.undo()
    assert restored(folder).step == 5


@pytest.mark.parametrize("before", [[], [True]])
def test_a_checkpoint_that_was_not_written_replaces_none(tmp_path, monkeypatch, before):
    """In a bucket its folder is seen all the same."""

    def fail():
        (tmp_path / "0").mkdir(exist_ok=True)
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    with (
        refusal(f"{tmp_path}: ...checkpoint ...written (No space left"),
        Checkpoints(tmp_path, keep=2) as checkpoints,
    ):
        for partial in before:
            checkpoints.save(0, make_state(1), {}, {}, partial=partial)
            checkpoints.wait()
        checkpoints.save(0, make_state(3), {}, {}, partial=True)
        checkpoints._writer.wait_until_finished()
        monkeypatch.setattr(checkpoints._writer, "wait_until_finished", fail)
        checkpoints.wait()
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name != "0")
    assert kept == ["0.1", "0.2"][: len(before) + 1]


# ------------------------------------------------------------------------------------------- forged


def forge(step: Path, change) -> None:
    """Changes a record, and updates its digest."""
    path = step / "host" / "metadata"
    record = json.loads(path.read_text())
    del record["digest"]
    change(record)
    path.write_text(
        json.dumps({**record, "digest": checkpoint._sha256(checkpoint._canonical(record))})
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("leaves"),
        lambda r: r.update(leaves=[]),
        lambda r: r.update(leaves={"params": r["leaves"]["params"]}),
        lambda r: r["leaves"].update(params=7),
        lambda r: r["leaves"]["params"].update(embed=None),
        lambda r: r["leaves"]["params"]["embed"].pop("digest"),
        lambda r: r["leaves"]["params"]["embed"].update(kind="wide"),
        lambda r: r.pop("groups"),
        lambda r: r.update(groups={}),
        lambda r: r.pop("host"),
        lambda r: r.update(host=[1]),
        lambda r: r.pop("step"),
        lambda r: r.update(step=4),
        lambda r: r.update(step="5"),
    ],
)
def test_a_forged_record_is_one_line(folder, capsys, change):
    """Its digest holds, and still it is not used but named, and the step before is taken."""
    forge(folder / "5", change)
    assert restored(folder).step == 3
    used, moved = capsys.readouterr().err.splitlines()
    assert f"{folder / '5'}: checkpoint not used: " in used and "moved to bad-5" in moved


def test_the_newest_record_that_can_be_read(folder, tmp_path):
    assert newest_host(folder)["step"] == 5
    forge(folder / "5", lambda r: r.pop("host"))
    assert newest_host(folder)["step"] == 3
    assert newest_host(tmp_path / "missing") is None
