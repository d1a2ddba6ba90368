"""Writes docs/notebook.ipynb: python docs/make_notebook.py. The cells are the texts below."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("notebook.ipynb")

# Text cells and code cells in turn.
CELLS = [
    """
# DAPO in a notebook

On a host with eight TPU v5e chips (Kaggle, Colab, a TPU VM) this trains Qwen3-0.6B on GSM8K,
anywhere else a tiny model on arithmetic: 5 to 9 minutes on two CPU cores. Run the cells from top to
bottom.

Every step is a command, which runs in a process of its own. The notebook itself never imports jax:
TPU chips belong to one process at a time.
""",
    """
import glob
import os

REPOSITORY = ""  # its address, if this notebook was opened outside a clone of it
TPU = bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
CONFIG = "configs/qwen3-0.6b_gsm8k_v5e-8.yaml" if TPU else "configs/tiny_cpu.yaml"
# The config holds the shape of the model, for planning; its weights come from the hub.
MODEL = "--set model.folder=Qwen/Qwen3-0.6B --set model.architecture=null" if TPU else ""
# A run in a mounted folder (/content/drive/MyDrive/x, /kaggle/working/x) outlives the session.
RUN = os.environ.get("RUN_DIR", "runs/notebook")
QUESTION = "Tom has 3 boxes of 12 eggs and breaks 5. How many are left?" if TPU else "((6-3)-2)+4"
""",
    """
## Install

The code, and the package with its dependencies: `[tpu]` brings jax for the chips.
""",
    """
EXTRA = "[tpu]" if TPU else ""
if os.path.exists("make_notebook.py"):  # opened in docs/
    os.chdir("..")
if not os.path.exists("pyproject.toml"):
    !git clone --depth 1 {REPOSITORY} dapo_jax_clone
    os.chdir("dapo_jax_clone")
%pip install --quiet --editable ".{EXTRA}"
""",
    """
## Data

The first problems as the model gets them, and the verifier's verdict on all solutions. Your own:
[recipes](recipes.md#your-own-data).
""",
    """
if TPU:
    !hf download openai/gsm8k --repo-type dataset --local-dir gsm8k
!python -m dapo_jax.data show --config {CONFIG} {MODEL} --first 2
""",
    """
## Before

Two responses of the model that training starts from. The tiny one has random weights; its warm-up
comes first in training.
""",
    """
!python -m dapo_jax.generate --config {CONFIG} {MODEL} --samples 2 "{QUESTION}"
""",
    """
## Train

Interrupting the cell saves and stops; running it again resumes, also in another session with the
same folder.
""",
    """
!python -m dapo_jax.train --config {CONFIG} {MODEL} --run-dir {RUN}
""",
    """
## Curves

Held-out accuracy, reward, length, entropy, dynamic sampling, clipping. `report.html` in the run
folder has all metrics, and samples with the probability of each token.
""",
    """
from IPython.display import Image

!python -m dapo_jax.report --run-dir {RUN}
Image(f"{RUN}/curves.png")
""",
    """
## After
""",
    """
!python -m dapo_jax.generate --run-dir {RUN} --samples 2 "{QUESTION}"
""",
    """
## Export

A Hugging Face folder: weights, tokenizer, model card. `--best` takes the stored checkpoint with the
best held-out accuracy, `--push OWNER/NAME` uploads the folder.
""",
    """
!python -m dapo_jax.export --run-dir {RUN} --out {RUN}/exported
""",
]


def notebook() -> str:
    """The notebook as text: nbformat 4.5, no outputs."""
    cells = []
    for index, text in enumerate(CELLS):
        kind = "code" if index % 2 else "markdown"
        cell = {"cell_type": kind, "id": f"cell-{index}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append(cell | {"source": text.strip().splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    tree = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(tree, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
