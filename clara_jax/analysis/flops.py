"""Floating-point operations of a computation, counted on its jaxpr: matrix products only, loops as
often as they run."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.interpreters import partial_eval


def count(function: Callable[..., Any], *shapes: Any) -> float:
  """FLOPs of one call, over all devices; recomputation (remat) counts as often as it is done.

  Args:
    function: traceable.
    *shapes: its arguments, arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    2 · m · n · k for every product of [m, k] and [k, n].
  """
  return _count(jax.make_jaxpr(function)(*shapes).jaxpr)


def _count(jaxpr: Any) -> float:
  # What no output needs is not run.
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      total += _dot(equation)
      continue
    times = 1
    if equation.primitive.name == "scan":
      times = equation.params["length"]
    elif (
      equation.primitive.name == "pallas_call"
    ):  # blocks that its mask leaves out count, as where XLA computes them
      times = math.prod(equation.params["grid_mapping"].grid)
    elif equation.primitive.name == "shard_map":  # its shapes are those of one device
      times = equation.params["mesh"].size
    inner = [_count(j) for j in _inner(equation)]
    total += times * (max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner))
  return total


def _dot(equation: Any) -> float:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return (
    2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
  )


def _inner(equation: Any) -> list[Any]:
  if equation.primitive.name == "custom_vjp_call":  # the primal alone is run
    return [_open(equation.params["call_jaxpr"])]
  jaxprs = []
  for value in equation.params.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
        jaxprs.append(_open(one))
  return jaxprs


def _open(jaxpr: Any) -> Any:
  return jaxpr.jaxpr if isinstance(jaxpr, jex_core.ClosedJaxpr) else jaxpr
