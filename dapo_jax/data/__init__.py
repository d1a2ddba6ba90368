"""Problems and prompts. `python -m dapo_jax.data` prepares data sets and prints what is in them."""
