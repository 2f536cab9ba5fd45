"""What is compared: an estimator with its arguments and its temperature, written as a call:
`perturbed(samples=16, temperature=0.1)`."""

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from clara_jax.config import ConfigError
from clara_jax.ops import estimators


@dataclasses.dataclass(frozen=True)
class Variant:
  """One line of a table.

  Attributes:
    name: as it was written.
    estimator: the function with its arguments.
    temperature: τ, or where it starts; None: the setting's own.
    final_temperature: where it is annealed to.
    learned: whether τ is learned.
  """

  name: str
  estimator: estimators.Estimator
  temperature: float | None = None
  final_temperature: float | None = None
  learned: bool = False

  @property
  def train(self) -> dict[str, Any]:
    """Fields of a `TrainConfig`."""
    if self.final_temperature is not None:
      return {"temperature_schedule": "annealed", "final_temperature": self.final_temperature}
    return {"temperature_schedule": "learned"} if self.learned else {}


AUDITED = (
  "algorithm1",
  "equation33",
  "softmax",
  "iterated_softmax(hard=True)",
  "optimal_transport(hard=True)",
  "gumbel",
  "perturbed(hard=True)",
  "score_function",
  "simple",
  "simple(sample=False)",
  "selected_only",
)
TRAINED = (
  *AUDITED,
  "iterated_softmax",
  "optimal_transport",
  "algorithm1(temperature=0.1)",
  "algorithm1(temperature=0.2, final_temperature=0.02)",
  "algorithm1(learned=True)",
)


def parse(text: str) -> Variant:
  """A variant from its name.

  Args:
    text: `NAME` or `NAME(argument=value, …)`; NAME as `estimators.get` takes it. `temperature`,
      `final_temperature` and `learned` are fields of the variant, others arguments of the
      estimator.

  Raises:
    ConfigError: it does not parse, or there is no such estimator or argument.
  """
  text = text.strip().removesuffix("()")
  name, bracket, rest = text.rpartition("(") if text.endswith(")") else (text, "", "")
  arguments: dict[str, Any] = {}
  if bracket:
    try:
      call = ast.parse(f"f({rest}", mode="eval").body
      if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise SyntaxError
      arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
      raise ConfigError(f"estimator {text!r}: expected NAME or NAME(argument=value, …)") from None
  fields = {
    k: arguments.pop(k) for k in ("temperature", "final_temperature", "learned") if k in arguments
  }
  for field in ("temperature", "final_temperature"):
    value = fields.get(field, 1.0)
    if (
      isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf")
    ):
      raise ConfigError(f"estimator {text!r}: {field}={value!r}, expected a positive number")
  if not isinstance(fields.get("learned", True), bool):
    raise ConfigError(f"estimator {text!r}: learned={fields['learned']!r}, expected True or False")
  return Variant(text, estimators.get(name.strip(), arguments), **fields)


def parse_all(texts: Sequence[str]) -> list[Variant]:
  """Variants of different names.

  Raises:
    ConfigError: as `parse`.
  """
  return [parse(text) for text in dict.fromkeys(texts)]
