"""DAPO reinforcement learning for language models in JAX and Flax."""

import importlib.util
import sys

__version__ = "0.1.0"

# `python -m dapo_jax.VERB`: no traceback. The readers of data need no jax.
if sys.argv[:1] == ["-m"] and importlib.util.find_spec("jax") is None:
    _missing = f"dapo_jax: {sys.executable} has no jax; run `source .venv/bin/activate` first "
    print(_missing + "(`make demo` creates .venv), or `pip install -e .`", file=sys.stderr)
    sys.exit(2)
