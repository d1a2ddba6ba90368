from dapo_jax.benchmark import main
from dapo_jax.cli import run

run(main)
