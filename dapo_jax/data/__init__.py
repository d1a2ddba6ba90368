"""Problems and prompts. `python -m dapo_jax.data` prepares data sets and prints what is in them."""


def main(argv: list[str] | None = None) -> int:
    """Prepares data sets, and prints what is in them. Uses no device."""
    from dapo_jax.data import __main__ as verb  # the package is used without its verb

    return verb.main(argv)
