"""README's commands run in order, as they stand, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import CONFIG, TESTS

pytestmark = pytest.mark.scripts
ROOT = TESTS.parent
README = (ROOT / "README.md").read_text()
MAKE = """#!/usr/bin/env bash
# What `make demo` leaves, without its environment.
mkdir -p .venv/bin && touch .venv/bin/activate
python -m dapo_jax.train --config configs/tiny_cpu.yaml --run-dir runs/tiny
"""


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_commands_run_in_order(tmp_path):
    """All but those under Install. The config has README's name, steps and checkpoints."""
    before, _, after = README.partition("## Install")
    text = before + after.partition("## ")[2]
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3 and "make demo" in blocks[0]
    tiny, shipped = (
        yaml.safe_load(CONFIG),
        yaml.safe_load((ROOT / "configs/tiny_cpu.yaml").read_text()),
    )
    tiny["train"] |= {key: shipped["train"][key] for key in ("steps", "save_every")}
    tiny["eval"]["every"] = shipped["eval"]["every"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny_cpu.yaml").write_text(yaml.safe_dump(tiny))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}", "JAX_PLATFORMS": "cpu"}
    env["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for file in ("runs/tiny/report.html", "early.json", "best.json", "exported/README.md"):
        assert (tmp_path / file).stat().st_size > 500
    assert "1 problems" in done.stdout and "heldout: " in done.stdout
