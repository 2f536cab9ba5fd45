"""`python -m clara_jax` is `clara`."""

from clara_jax.cli import run

run()
