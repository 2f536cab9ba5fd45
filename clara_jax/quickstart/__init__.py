"""`clara quickstart`: the whole system on a generated corpus."""

from clara_jax.quickstart.recipe import run

__all__ = ["run"]
