"""DAPO reinforcement learning for language models in JAX and Flax."""

import importlib.util
import sys

__version__ = "0.1.0"

if importlib.util.find_spec("jax") is None:
    _missing = f"dapo_jax: {sys.executable} has no jax; run `source .venv/bin/activate` first "
    _missing += "(`make demo` creates .venv), or `pip install -e .`"
    if sys.argv[:1] == ["-m"]:  # `python -m dapo_jax.VERB`: no traceback
        print(_missing, file=sys.stderr)
        sys.exit(2)
    raise ModuleNotFoundError(_missing)
