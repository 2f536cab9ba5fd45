"""`clara reproduce`: the paper's claims as experiments on the generated world."""

from clara_jax.experiments.claims.claims import CLAIMS, run

__all__ = ["CLAIMS", "run"]
