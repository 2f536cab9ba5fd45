"""Names of tensors: Hugging Face on one side, the path of a leaf on ours. Pure; no arrays.

Ours keeps the layers stacked: a leaf below 'layers' holds `model.layers.{0 … Y-1}` along its first axis. Linear weights are
transposed: `[out, in]` on disk, `[in, out]` here.
"""

import dataclasses
import re
from collections.abc import Iterable

Path = tuple[str, ...]


class KeyMapError(ValueError):
  """A tensor has no place here, is missing or comes twice."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor goes: the leaf's path, the layer (None outside the layers), whether it is transposed."""

  path: Path
  layer: int | None
  transpose: bool


_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE = {
    "model.embed_tokens.weight": (("embedding",), False),
    "lm_head.weight": (("head",), True),
    "model.norm.weight": (("final_norm", "scale"), False),
}
_LINEAR = {f"self_attn.{n}_proj": ("layers", "attention", n) for n in _ATTENTION} | {
    f"mlp.{n}_proj": ("layers", "mlp", n) for n in _MLP}
_NORMS = {
    "input_layernorm.weight": (("layers", "attention_norm", "scale"), False),
    "post_attention_layernorm.weight": (("layers", "mlp_norm", "scale"), False),
}
_BASE_LAYER = {f"{name}.weight": ((*path, "kernel"), True) for name, path in _LINEAR.items()} | _NORMS
_LORA_LAYER = {
    f"{name}.lora_{letter}.weight": ((*path, letter.lower()), True) for name, path in _LINEAR.items() for letter in "AB"}


def base_place(name: str) -> Place:
  """The place of a base model's tensor.

  Raises:
    KeyMapError: the name is not that of a Mistral-family tensor.
  """
  if name in _OUTSIDE:
    return Place(_OUTSIDE[name][0], None, _OUTSIDE[name][1])
  return _layer_place(name, _BASE_LAYER, "base model")


def lora_place(name: str) -> Place:
  """The place of an adapter's tensor, `model.layers.{i}.….lora_A.weight`."""
  return _layer_place(name, _LORA_LAYER, "adapter")


def _layer_place(name: str, table: dict[str, tuple[Path, bool]], kind: str) -> Place:
  match = _LAYER.fullmatch(name)
  if not match or match[2] not in table:
    raise KeyMapError(f"{name}: not a known tensor of a {kind}")
  path, transpose = table[match[2]]
  return Place(path, int(match[1]), transpose)


def check_coverage(places: Iterable[Place], expected: Iterable[tuple[Path, int | None]], where: str) -> None:
  """Every expected (path, layer) exactly once.

  Raises:
    KeyMapError: naming what is missing, doubled or not expected.
  """
  counts: dict[tuple[Path, int | None], int] = {}
  for place in places:
    counts[place.path, place.layer] = counts.get((place.path, place.layer), 0) + 1
  expected = set(expected)
  for problem, keys in (("missing", expected - set(counts)), ("not expected", set(counts) - expected),
                        ("doubled", {key for key, count in counts.items() if count > 1})):
    if keys:
      path, layer = sorted(keys, key=str)[0]
      raise KeyMapError(f"{where}: {len(keys)} tensors {problem}, first {'/'.join(path)}"
                        f"{'' if layer is None else f', layer {layer}'}")
