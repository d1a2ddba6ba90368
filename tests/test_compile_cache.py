"""Where compiled programs are kept, when they are not, and how much of them."""

import os
from pathlib import Path

import jax
import pytest

from dapo_jax.runtime.compile_cache import cache_folder, drop_oldest, use_compilation_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
DECIDED = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COORDINATOR_ADDRESS")


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    for name in DECIDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for option, value in before.items():
        jax.config.update(option, value)


def test_a_verb_keeps_programs_in_the_user_s_cache_folder(tmp_path):
    use_compilation_cache()
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder == cache_folder("jax")
    assert folder.parent == tmp_path / "cache" / "dapo_jax" / "programs"
    assert folder.stat().st_mode & 0o777 == 0o700  # what lies there is run


def test_copies_of_models_beside_the_programs_stay(monkeypatch, tmp_path):
    monkeypatch.setattr("dapo_jax.runtime.compile_cache._LIMIT", 10)
    model = tmp_path / "cache" / "dapo_jax" / "models" / "abc" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(bytes(100))
    use_compilation_cache()
    assert model.stat().st_size == 100


@pytest.mark.parametrize("name", DECIDED)
def test_the_environment_decides(monkeypatch, tmp_path, name):
    before = [getattr(jax.config, option) for option in OPTIONS]
    monkeypatch.setenv(name, "0")
    use_compilation_cache()
    assert [getattr(jax.config, option) for option in OPTIONS] == before
    assert not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_another_cpu_has_another_folder(monkeypatch):
    here, read = cache_folder("jax"), Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: "flags : sse2\n" if path == Path("/proc/cpuinfo") else read(path),
    )
    monkeypatch.setattr("platform.processor", lambda: "of another kind")
    assert cache_folder("jax") != here


def test_the_oldest_programs_go_first(tmp_path):
    (tmp_path / "deep").mkdir()
    for age, name in enumerate(("new", "deep/middle", "old")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    drop_oldest(tmp_path, limit=30)
    assert (tmp_path / "old").exists()
    drop_oldest(tmp_path, limit=25)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["middle", "new"]


def test_a_folder_of_another_user_is_not_used(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before


def test_a_file_that_another_run_deletes_meanwhile_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "kept").write_bytes(bytes(8))
    found = [tmp_path / "kept", tmp_path / "gone"]
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter(found))
    drop_oldest(tmp_path, 8)
    assert found[0].exists()
    drop_oldest(tmp_path, 7)
    assert not found[0].exists()
