"""What is built and installed: the wheel's files, its metadata, the version, and the types of what
others may call.
"""

import inspect
import re
import shutil
import subprocess
import sys
import typing
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import dapo_jax
from dapo_jax.config import load_config
from dapo_jax.dapo.groups import group_advantages, informative_groups
from dapo_jax.dapo.loss import dapo_token_loss, loss_fn
from dapo_jax.dapo.update import update_step
from dapo_jax.model.decoder import apply
from dapo_jax.model.logprobs import linear_logprobs, linear_loss
from dapo_jax.model.weights import load_pretrained, save_pretrained
from dapo_jax.reward.overlong import overlong_penalty
from dapo_jax.reward.verify import strict_verify

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip would build, of a copy, so that nothing is left in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for folder in ("dapo_jax", "tests", "configs", "tpu_scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "built"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (copy / "built").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "dapo_jax").rglob("*")
        if p.suffix not in (".pyc", ".toml") and p.is_file()
    }
    assert names == package
    assert {
        "dapo_jax/py.typed",
        "dapo_jax/report_page.html",
        "dapo_jax/model/__init__.py",
        "dapo_jax/benchmark/__main__.py",
    } <= names


def test_the_wheels_metadata(wheel):
    (info,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"], metadata["Requires-Python"]) == (
        "dapo_jax",
        dapo_jax.__version__,
        ">=3.11",
    )
    assert "dapo-jax = dapo_jax.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    wanted = {
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    } - {""}
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert {_normal(need) for need in needed} == {_normal(need) for need in wanted}


def _normal(need: str) -> tuple[str, frozenset[str]]:
    """`jax>=0.10.2,<0.13`, whatever its blanks and the order of its bounds."""
    name, bounds = re.fullmatch(r"([\w.\[\]-]+)(.*)", need.replace(" ", "")).groups()
    return name.replace("_", "-").lower(), frozenset(bounds.split(","))


def test_changelog_and_package_name_the_same_version():
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == dapo_jax.__version__


PUBLIC = [
    apply,
    dapo_token_loss,
    group_advantages,
    informative_groups,
    linear_logprobs,
    linear_loss,
    load_config,
    load_pretrained,
    loss_fn,
    overlong_penalty,
    save_pretrained,
    strict_verify,
    update_step,
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_what_others_may_call_is_typed_and_described(function):
    assert typing.get_type_hints(function).keys() == {
        *inspect.signature(function).parameters,
        "return",
    }
    assert function.__doc__


def test_the_dockerfile_copies_what_an_installation_needs():
    """Not built here: that needs docker. Each source is there, and each file that pyproject.toml
    reads is copied.
    """
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert len(lines) < 25 and all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "requirements.txt", "README.md", "LICENSE", "dapo_jax"} <= {*copied}
