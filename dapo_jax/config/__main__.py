from dapo_jax.cli import run
from dapo_jax.config import main

run(main)
