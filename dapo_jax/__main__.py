"""`python -m dapo_jax VERB ...` is `python -m dapo_jax.VERB ...`."""

from dapo_jax.cli import main

main()
