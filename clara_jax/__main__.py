"""`python -m clara_jax` is `clara`."""

from clara_jax.cli.main import run

run()
