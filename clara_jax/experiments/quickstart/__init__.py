"""`clara quickstart`: the whole system on a generated corpus."""

from clara_jax.experiments.quickstart.recipe import run

__all__ = ["run"]
