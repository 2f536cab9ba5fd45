"""Estimators by name: those of `library.py`, those of other packages (entry points), and functions
in a user's file."""

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clara_jax import extensions
from clara_jax.config import ConfigError
from clara_jax.ops.estimators.api import Estimator, EstimatorFn

ENTRY_POINTS = "clara_jax.estimators"
REGISTRY: dict[str, EstimatorFn] = {}


def register(name: str) -> Callable[[EstimatorFn], EstimatorFn]:
  """Makes an estimator known by a name."""

  def add(function: EstimatorFn) -> EstimatorFn:
    REGISTRY[name] = function
    return function

  return add


def get(name: str, arguments: Mapping[str, Any] | None = None) -> Estimator:
  """The estimator of a name, of an entry point or of `file.py:function`.

  Raises:
    ConfigError: there is none, or it does not take these arguments.
  """
  function = REGISTRY.get(name) or _from_file(name) or _from_entry_point(name)
  if function is None and name.endswith(".py"):
    raise ConfigError(f"estimator={name!r}: name the function, too: {name}:FUNCTION")
  if function is None:
    raise ConfigError(
      f"estimator={name!r}: expected one of {', '.join(sorted(REGISTRY))}, FILE.py:FUNCTION, or "
      f"an entry point of "
      f"{ENTRY_POINTS!r}"
    )
  parameters = list(inspect.signature(function).parameters.values())
  if len(parameters) < 4:
    raise ConfigError(
      f"estimator={name!r}: expected a function of (scores, k, temperature, rng, ...), got "
      f"{inspect.signature(function)}"
    )
  known = [p.name for p in parameters[4:]]
  takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
  if not takes_any and (unknown := set(arguments or {}) - set(known)):
    raise ConfigError(
      f"estimator_args: {name} does not take {', '.join(sorted(unknown))}; it takes "
      f"{', '.join(known) or 'none'}"
    )
  for p in parameters[4:]:
    value = (arguments or {}).get(p.name, p.default)
    # A number where a number is meant: the type of the default tells.
    expected_type = (int, float) if isinstance(p.default, float) else type(p.default)
    if p.default not in (inspect.Parameter.empty, None) and (
      not isinstance(value, expected_type) or isinstance(value, bool) != isinstance(p.default, bool)
    ):
      raise ConfigError(f"estimator_args.{p.name}={value!r}: expected {type(p.default).__name__}")
    if p.name in ("draws", "samples", "iterations") and isinstance(value, int) and value < 1:
      raise ConfigError(f"estimator_args.{p.name}={value}: expected at least 1")
  estimator = Estimator(name, function, tuple(sorted((arguments or {}).items())))
  if name not in REGISTRY:
    _validate_shapes(estimator)
  return estimator


def _validate_shapes(estimator: Estimator) -> None:
  """Whether it does what an estimator does, by shapes alone.

  Raises:
    ConfigError: it fails, or returns something else.
  """
  b, n, k = 2, 6, 3

  def run(scores, memories, key):
    choice = estimator(scores, k, 0.1, key)
    return choice.indices, choice.rows(memories), choice.log_prob

  where = (
    f"estimator={estimator.name!r}, with scores [{b}, {n}], memories [{b}, {n}, 4, 5] and k={k}"
  )
  try:
    indices, rows, log_prob = jax.eval_shape(
      run, jnp.zeros((b, n)), jnp.zeros((b, n, 4, 5)), jax.random.key(0)
    )
  except Exception as error:  # the user's code: whatever it is, it is named
    raise ConfigError(
      f"{where}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ) from error
  if indices.shape != (b, k) or not jnp.issubdtype(indices.dtype, jnp.integer):
    raise ConfigError(
      f"{where}: expected indices of integers [{b}, {k}], got {indices.dtype} {list(indices.shape)}"
    )
  if rows.shape != (b, k, 4, 5):
    raise ConfigError(f"{where}: expected rows [{b}, {k}, 4, 5], got {list(rows.shape)}")
  has_draws = "draws" in inspect.signature(estimator.function).parameters
  if (log_prob is not None) != has_draws or log_prob is not None and log_prob.shape != (b,):
    raise ConfigError(
      f"{where}: expected log_prob [{b}] where the function has an argument 'draws', and else "
      f"None; got "
      f"{None if log_prob is None else list(log_prob.shape)}{' and no draws' if not has_draws else ''}"  # noqa: E501
    )


def _from_file(name: str) -> EstimatorFn | None:
  function = extensions.from_file(name, "estimator")
  if function is not None and not callable(function):
    raise ConfigError(f"estimator={name!r}: expected a function")
  return function


def _from_entry_point(name: str) -> EstimatorFn | None:
  for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
    try:
      return point.load()
    except Exception as error:
      raise ConfigError(
        f"estimator={name!r}: entry point {point.value} fails: {type(error).__name__}: {error}"
      ) from error
  return None
