"""`clara reproduce`: the paper's claims as experiments on the generated world."""

from clara_jax.reproduction.claims import CLAIMS, run

__all__ = ["CLAIMS", "run"]
