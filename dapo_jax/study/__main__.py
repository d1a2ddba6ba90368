from dapo_jax.cli import run
from dapo_jax.study import main

run(main)
