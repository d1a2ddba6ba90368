"""The notebook: it is what its script makes, and its cells run in order on a tiny model."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import yaml
from runs import CONFIG, TESTS

ROOT = TESTS.parent
spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs/make_notebook.py")
make_notebook = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_notebook)
CELLS = json.loads(make_notebook.NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def as_python(cell: str) -> str:
    """`!command` and `%pip` become calls of `shell`."""
    cell = re.sub(r"^( *)%(pip .*)$", r"\1!python -m \2", cell, flags=re.MULTILINE)
    return re.sub(
        r"^( *)!(.*)$", lambda line: f"{line[1]}shell({line[2]!r})", cell, flags=re.MULTILINE
    )


def test_the_notebook_is_what_its_script_makes():
    assert make_notebook.NOTEBOOK.read_text() == make_notebook.notebook()


def test_the_notebook_is_text_only_and_valid():
    for cell in CELLS:
        assert {"cell_type", "id", "metadata", "source"} <= cell.keys()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse(as_python("".join(cell["source"])))
        else:
            assert cell["cell_type"] == "markdown" and "outputs" not in cell
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert not re.search(r"^\s*(import|from) jax", "\n".join(CODE), re.MULTILINE)


@pytest.mark.scripts
def test_its_cells_run_in_order(tmp_path, monkeypatch):
    """In a clone, without a TPU, with the run in a folder elsewhere; a second session resumes."""
    clone, mounted = tmp_path / "clone", tmp_path / "mounted"
    shutil.copytree(ROOT / "dapo_jax", clone / "dapo_jax", ignore=shutil.ignore_patterns("__py*"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / "docs").mkdir()
    (clone / "docs/make_notebook.py").touch()
    (clone / "configs").mkdir()
    (clone / "configs/tiny_cpu.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG)))
    env = {
        "PYTHONPATH": str(TESTS),
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        # Installs nothing here, and fetches nothing.
        **{f"PIP_{key}": "1" for key in ("DRY_RUN", "NO_DEPS", "NO_INDEX")},
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: none
    }
    for name, value in (env | {"RUN_DIR": str(mounted)}).items():
        monkeypatch.setenv(name, value)
    output = []

    def shell(command: str) -> None:
        command = re.sub(r"\{(\w+)\}", lambda name: str(names[name[1]]), command)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-2000:])
        output.append(f"$ {command}\n{done.stdout}")

    def image(file: str) -> None:
        assert (tmp_path / file).stat().st_size > 10_000

    display = ModuleType("IPython.display")
    display.Image = image
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for session in (1, 2):
        monkeypatch.chdir(clone / "docs")  # where Jupyter opens it
        names = {"shell": shell}
        for cell in CODE:
            exec(compile(as_python(cell), "cell", "exec"), names)
        assert (mounted / "report.html").stat().st_size > 10_000
        assert (mounted / "exported/model.safetensors").exists()
        if session == 1:
            shutil.rmtree(mounted / "exported")
    said = "\n".join(output)
    assert said.count("dapo_jax.generate") == 4 and said.count("pip install") == 2
    lines = (mounted / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4 and len(lines) <= 6
