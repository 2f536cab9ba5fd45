"""Gradient estimators for the selection of K among N documents: hard or soft forward, and what
reaches the scores backward.

An estimator is a function

    (scores [B, N], k, temperature, rng, **arguments) -> Selection

and one line makes it known by name: `@register("name")`. `clara train --config.estimator=NAME
--config.estimator_args.ARGUMENT=VALUE` trains with it; NAME may also be `file.py:function`, or the
name of an entry point of the group `clara_jax.estimators` (docs/gradients.md). `api.py` says what
an estimator returns, `registry.py` finds it by its name, `library.py` has those that come along.
"""

from clara_jax.ops.estimators.api import Estimator, EstimatorFn, Selection, weighted
from clara_jax.ops.estimators.library import leave_one_out, plackett_luce
from clara_jax.ops.estimators.registry import REGISTRY, get, register

__all__ = [
  "REGISTRY",
  "Estimator",
  "EstimatorFn",
  "Selection",
  "get",
  "leave_one_out",
  "plackett_luce",
  "register",
  "weighted",
]
