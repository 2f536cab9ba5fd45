"""Names of tensors: Hugging Face on one side, the path of a leaf on ours. Pure; no arrays.

Ours keeps the layers stacked: a leaf below 'layers' holds `model.layers.{0 … Y-1}` along its first
axis. Linear weights are transposed: `[out, in]` on disk, `[in, out]` here. One table serves
Mistral, Llama, Qwen2, Qwen3 and Phi-3: no name means two things.
"""

import dataclasses
import re
from collections.abc import Iterable

from clara_jax.errors import InputError

Path = tuple[str, ...]


class KeyMapError(InputError):
  """A tensor has no place here, is missing or is a duplicate."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor goes: the leaf's path, the layer (None outside the layers), whether it is
  transposed."""

  path: Path
  layer: int | None
  transpose: bool


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.(.+)")
_OUTSIDE: dict[str, tuple[Path, bool]] = {
  EMBEDDING: (("embedding",), False),
  HEAD: (("head",), True),
  "model.norm.weight": (("final_norm", "scale"), False),
}
_LINEAR: dict[str, Path] = {
  f"{block}.{name}_proj": ("layers", ours, name)
  for block, ours, names in (
    ("self_attn", "attention", ("q", "k", "v", "o", "qkv")),
    ("mlp", "mlp", ("gate", "up", "down", "gate_up")),
  )
  for name in names
}
_NORMS: dict[str, Path] = {
  "input_layernorm": ("layers", "attention_norm"),
  "post_attention_layernorm": ("layers", "mlp_norm"),
  "self_attn.q_norm": ("layers", "attention", "q_norm"),
  "self_attn.k_norm": ("layers", "attention", "k_norm"),
}
_BASE_LAYER: dict[str, tuple[Path, bool]] = {
  **{f"{name}.weight": ((*path, "kernel"), True) for name, path in _LINEAR.items()},
  **{f"{name}.bias": ((*path, "bias"), False) for name, path in _LINEAR.items()},
  **{f"{name}.weight": ((*path, "scale"), False) for name, path in _NORMS.items()},
}
_LORA_LAYER: dict[str, tuple[Path, bool]] = {
  f"{name}.lora_{letter}.weight": ((*path, letter.lower()), True)
  for name, path in _LINEAR.items()
  for letter in "AB"
}


def base_place(name: str) -> Place:
  """The place of a base model's tensor.

  Raises:
    KeyMapError: the name is not that of a tensor of a supported family.
  """
  if name in _OUTSIDE:
    return Place(_OUTSIDE[name][0], None, _OUTSIDE[name][1])
  return _layer_place(name, _BASE_LAYER, "base model")


def lora_place(name: str) -> Place:
  """The place of an adapter's tensor, `model.layers.{i}.….lora_A.weight`."""
  return _layer_place(name, _LORA_LAYER, "adapter")


def base_name(path: Path, layer: int | None) -> str:
  """The name of a base model's tensor: the inverse of `base_place`.

  Raises:
    KeyMapError: no tensor has that place.
  """
  return _name(path, layer, _OUTSIDE if layer is None else _BASE_LAYER)


def lora_name(path: Path, layer: int | None) -> str:
  """The name of an adapter's tensor: the inverse of `lora_place`."""
  return _name(path, layer, {} if layer is None else _LORA_LAYER)


def linear_name(path: Path) -> str:
  """The last part of a linear layer's name ('q_proj'), as in PEFT's `target_modules`, from a path
  below it."""
  for name, ours in _LINEAR.items():
    if path[: len(ours)] == ours:
      return name.rpartition(".")[2]
  raise KeyMapError(f"{'/'.join(path)}: not a linear layer")


def _layer_place(name: str, table: dict[str, tuple[Path, bool]], kind: str) -> Place:
  match = _LAYER.fullmatch(name)
  if not match or match[2] not in table:
    raise KeyMapError(f"{name}: not a known tensor of a {kind}")
  path, transpose = table[match[2]]
  return Place(path, int(match[1]), transpose)


def _name(path: Path, layer: int | None, table: dict[str, tuple[Path, bool]]) -> str:
  for name, (ours, _) in table.items():
    if ours == path:
      return name if layer is None else f"model.layers.{layer}.{name}"
  raise KeyMapError(
    f"{'/'.join(path)}{'' if layer is None else f', layer {layer}'}: no tensor has this place"
  )


def check_coverage(
  places: Iterable[Place], expected: Iterable[tuple[Path, int | None]], where: str
) -> None:
  """Every expected (path, layer) exactly once.

  Raises:
    KeyMapError: naming what is missing, doubled or not expected.
  """
  counts: dict[tuple[Path, int | None], int] = {}
  for place in places:
    counts[place.path, place.layer] = counts.get((place.path, place.layer), 0) + 1
  expected = set(expected)
  for problem, keys in (
    ("missing", expected - set(counts)),
    ("not expected", set(counts) - expected),
    ("doubled", {key for key, count in counts.items() if count > 1}),
  ):
    if keys:
      path, layer = sorted(keys, key=str)[0]
      raise KeyMapError(
        f"{where}: {len(keys)} tensors {problem}, first {'/'.join(path)}"
        f"{'' if layer is None else f', layer {layer}'}"
      )
