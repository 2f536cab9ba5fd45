"""A role as a standard PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`, read
and written without peft.

What PEFT computes from an adapter is computed here: scaling by α/r or α/√r, ranks and scales by
pattern, some layers only, an embedding and a head that were trained whole. Adapters are stored with
one rank and one scale, so that modules of a smaller rank get zeros and a scale of their own goes
into B. What cannot be computed is refused by its field: adapters that change the base when they are
made (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), DoRA, aLoRA, biases.

PEFT has no place for CLaRa's special tokens. They lie beside the adapter, in
`clara_special_tokens.safetensors`, with the method's configuration in `clara_config.json` and the
tokenizer in `clara_tokenizer/`; an adapter without these files is read with fresh special tokens.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from clara_jax.checkpoints import lazy
from clara_jax.checkpoints.families import check_fields, read_json
from clara_jax.checkpoints.huggingface import leaf_shapes
from clara_jax.checkpoints.keymap import (
  EMBEDDING,
  HEAD,
  KeyMapError,
  linear_name,
  lora_name,
  lora_place,
)
from clara_jax.checkpoints.tensors import TensorFiles, write_tensors
from clara_jax.config import ClaraConfig, ConfigError, LoraConfig, from_config_dict
from clara_jax.data.tokenizer import has_tokenizer
from clara_jax.model import Clara

CONFIG_FILE, ADAPTER_FILE, ROLE_FILE, SPECIAL_FILE, TOKENIZER = (
  "adapter_config.json",
  "adapter_model.safetensors",
  "clara_config.json",
  "clara_special_tokens.safetensors",
  "clara_tokenizer",
)
_PREFIX = "base_model.model."
_USED = frozenset(
  (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "base_model_name_or_path",
    "ensure_weight_tying",
  )
)
_NEUTRAL = frozenset(
  (
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "megatron_core",
    "eva_config",
    "qalora_group_size",
    "runtime_config",
  )
)
# Fields that change what is computed, and the values that can be honored.
_ONLY: dict[str, Sequence[Any]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "lora_bias": (False, None),
  # The others change the base's weights.
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
  "use_dora": (False, None),
  "use_qalora": (False, None),
  "use_bdlora": (None, False),
  "layer_replication": (None, []),
  "alora_invocation_tokens": (None, []),
  "alora_invocation_string": (None, ""),
  "trainable_token_indices": (None, []),
  "target_parameters": (None, []),
  "megatron_config": (None,),
  "loftq_config": ({}, None),
  "corda_config": (None,),
  "lora_ga_config": (None,),
  "velora_config": (None,),
  "monteclora_config": (None,),
  "arrow_config": (None,),
  "kasa_config": (None,),
}
_SAVED = {"embed_tokens": EMBEDDING, "lm_head": HEAD}


def is_adapter(directory: str) -> bool:
  """Whether a directory holds a PEFT adapter."""
  return (epath.Path(directory) / CONFIG_FILE).exists()


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter that was opened; nothing of its LoRA weights is read yet.

  Attributes:
    directory: where it is.
    lora: its shape here.
    base: the name of its base.
    tokenizer: the directory of a tokenizer that came with it, or None.
    whole: the embedding and the head that it brings, by their Hugging Face names.
  """

  directory: str
  lora: LoraConfig
  base: str | None
  tokenizer: str | None
  whole: dict[str, np.ndarray]
  _values: dict[str, Any]
  _tensors: dict[str, Any]

  def leaves(self, model: Clara, role: str) -> dict[str, Any]:
    """The role's leaves.

    Raises:
      KeyMapError: a tensor that is missing, unknown, doubled or of the wrong shape, by name.
    """
    where = f"{self.directory}/{ADAPTER_FILE}"
    expected = leaf_shapes(model, role)
    tensors = dict(self._tensors)
    for module, letters in _by_module(tensors).items():
      if not _is_target(module, self._values):
        raise KeyMapError(f"{where}: {module} has LoRA weights, but {CONFIG_FILE} does not name it")
      tensors |= {name: self._same_rank(module, name, tensors[name]) for name in letters}
    for path, shape in expected.items():
      for layer in range(shape[0]):
        name = lora_name(path, layer)
        if name not in tensors and not _is_target(name.rpartition(".lora_")[0], self._values):
          like = next(t for n, t in tensors.items() if n.endswith(name.split(".", 3)[3]))
          tensors[name] = np.zeros(like.shape, like.dtype)  # a layer without the adapter
    return lazy.stack(tensors, lora_place, expected, where)

  def _same_rank(self, module: str, name: str, tensor: Any) -> Any:
    """A or B in the rank and with the scale that all modules have."""
    rank, scale = _rank_and_scale(module, self._values)
    is_a = name.endswith("lora_A.weight")
    if tensor.shape[0 if is_a else 1] != rank:
      raise KeyMapError(
        f"{self.directory}/{ADAPTER_FILE}: {name} has the shape {tuple(tensor.shape)}, "
        f"{CONFIG_FILE} gives it rank {rank}"
      )
    if not self._values.get("alpha_pattern") and not self._values.get("rank_pattern"):
      return tensor
    value = lazy.read(tensor).astype(np.float32)
    value = value if is_a else value * np.float32(scale / self.lora.scale)
    missing = self.lora.rank - rank
    return np.pad(value, ((0, missing), (0, 0)) if is_a else ((0, 0), (0, missing)))


def _is_pattern(value: Any) -> bool:
  try:
    return isinstance(value, str) and re.compile(value) is not None
  except re.error:
    return False


def _are(value: Any, is_right: Callable[[Any], bool]) -> bool:
  return isinstance(value, list) and all(map(is_right, value))


def _is_name(value: Any) -> bool:
  return isinstance(value, str)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Fields that are read, where they are given: what they must be.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
  **dict.fromkeys(
    ("target_modules", "exclude_modules"),
    (lambda v: _is_pattern(v) or _are(v, _is_name), "a pattern or a list of names"),
  ),
  **dict.fromkeys(
    ("rank_pattern", "alpha_pattern"),
    (
      lambda v: (
        isinstance(v, dict)
        and all(_is_pattern(f"(.*){k}$") and _is_number(n) and n > 0 for k, n in v.items())
      ),
      "an object of patterns and numbers above 0",
    ),
  ),
  "layers_to_transform": (
    lambda v: isinstance(v, int) or _are(v, lambda n: isinstance(n, int)),
    "a number or a list of them",
  ),
  "layers_pattern": (
    lambda v: _is_pattern(v) or _are(v, _is_pattern),
    "a pattern or a list of them",
  ),
  "modules_to_save": (lambda v: _are(v, _is_name), "a list of names"),
  "base_model_name_or_path": (_is_name, "a name"),
  "lora_dropout": (_is_number, "a number"),
  "lora_alpha": (_is_number, "a number"),
  "r": (
    lambda v: isinstance(v, int) and not isinstance(v, bool) and 1 <= v < 1 << 20,
    "a number of 1 or more",
  ),
}


def read(directory: str, allow: Sequence[str] = ()) -> Adapter:
  """Opens an adapter.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    allow: unknown fields of adapter_config.json that are accepted.

  Raises:
    ConfigError: a field is missing, unknown or of a value that is not supported, by name.
    KeyMapError: a tensor that is unknown.
  """
  file = f"{directory}/{CONFIG_FILE}"
  values = read_json(directory, CONFIG_FILE)
  check_fields(values, _USED, _NEUTRAL, _ONLY, allow, file)
  for name, (is_right, expected) in _VALUES.items():
    if values.get(name) is not None and not is_right(values[name]):
      raise ConfigError(f"{file}: {name}={values[name]!r:.60}: expected {expected}")
  if missing := [name for name in ("r", "lora_alpha") if values.get(name) is None]:
    raise ConfigError(f"{file}: {missing[0]}: is missing")
  files = TensorFiles(directory, (ADAPTER_FILE,))
  tensors, whole = {}, {}
  for name in files:
    if not name.startswith(_PREFIX):
      raise KeyMapError(f"{directory}/{ADAPTER_FILE}: {name} does not start with {_PREFIX!r}")
    ours = name.removeprefix(_PREFIX)
    if ours in (EMBEDDING, HEAD):
      whole[ours] = files.read(name)
    else:
      lora_place(ours)
      tensors[ours] = files[name]
  for module in values.get("modules_to_save") or ():
    if module.rpartition(".")[2] not in _SAVED:
      raise ConfigError(
        f"{file}: modules_to_save names {module!r}; only {sorted(_SAVED)} can be read"
      )
    if _SAVED[module.rpartition(".")[2]] not in whole:
      raise KeyMapError(
        f"{directory}/{ADAPTER_FILE}: {module} is missing, which modules_to_save names"
      )
  if not tensors:
    raise KeyMapError(f"{directory}/{ADAPTER_FILE}: has no LoRA weights")
  modules = [_rank_and_scale(m, values) for m in _by_module(tensors)]
  rank, scale = max(r for r, _ in modules), _rank_and_scale("", values)[1]
  alpha = (
    float(values["lora_alpha"])
    if rank == values["r"] and not values.get("use_rslora")
    else scale * rank
  )
  targets = tuple(sorted({lora_place(name).path[-2] for name in tensors}))
  own = os.path.join(directory, TOKENIZER)
  tokenizer = next((d for d in (own, directory) if has_tokenizer(d)), None)
  lora = LoraConfig(rank, alpha, values.get("lora_dropout") or 0.0, targets)
  return Adapter(
    directory, lora, values.get("base_model_name_or_path"), tokenizer, whole, values, tensors
  )


def _by_module(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
  """Names of A and B by the module that they adapt, `model.layers.{i}.….q_proj`."""
  names_by_module: dict[str, list[str]] = {}
  for name in tensors:
    names_by_module.setdefault(name.rpartition(".lora_")[0], []).append(name)
  return names_by_module


def _rank_and_scale(module: str, values: Mapping[str, Any]) -> tuple[int, float]:
  """Of one module, by the first pattern that ends its name, as in PEFT."""
  rank, alpha = (
    next(
      (v for key, v in (values.get(field) or {}).items() if re.match(rf"(.*\.)?({key})$", module)),
      values[default],
    )
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
  )
  return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _is_target(module: str, values: Mapping[str, Any]) -> bool:
  """Whether PEFT adapts a module: `target_modules`, `exclude_modules` and `layers_to_transform`."""

  def named(names: Any) -> bool:
    if isinstance(names, str):
      return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == g or module.endswith(f".{g}") for g in names or ())

  if not named(values.get("target_modules")) or named(values.get("exclude_modules")):
    return False
  layers = values.get("layers_to_transform")
  if layers is None or layers == []:
    return True
  patterns = values.get("layers_pattern") or r"[^.]*"
  patterns = [patterns] if isinstance(patterns, str) else patterns
  index = next((m[1] for p in patterns if (m := re.match(rf".*\.{p}\.(\d+)\.", module))), None)
  return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)


def read_clara(directory: str) -> tuple[str | None, ClaraConfig | None, dict[str, Any] | None]:
  """(role, the method's configuration, special tokens and memory embedding), each None where the
  adapter did not come from here."""
  if not (epath.Path(directory) / ROLE_FILE).exists():
    return None, None, None
  values = read_json(directory, ROLE_FILE)
  if not {"role", "clara"} <= set(values):
    raise ConfigError(f"{directory}/{ROLE_FILE}: expected the fields 'role' and 'clara'")
  config = from_config_dict(ClaraConfig, values["clara"], f"{directory}/{ROLE_FILE}: clara")
  files = TensorFiles(directory, (SPECIAL_FILE,))
  return values["role"], config, {name: files[name] for name in files}


def write(
  directory: str,
  role: str,
  config: ClaraConfig,
  leaves: Mapping[str, Any],
  special: Mapping[str, Any],
  base_name: str,
  whole: Mapping[str, np.ndarray],
  tokenizer: Any,
) -> None:
  """Writes one role.

  Args:
    directory: where; it must exist.
    role: its name.
    config: the method's configuration.
    leaves: of the role.
    special: 'embedding', 'head' of the special tokens and 'memory_embedding'.
    base_name: what `base_model_name_or_path` says.
    whole: an embedding and a head that are not the base's, by their Hugging Face names, in the
      base's shapes.
    tokenizer: with the special tokens, or None.
  """
  tensors = {_PREFIX + t.name: (t.shape, t.dtype, t.read) for t in _named(leaves, whole)}
  write_tensors(
    directory,
    [(n, shape, dtype) for n, (shape, dtype, _) in tensors.items()],
    lambda n: tensors[n][2](),
    stem="adapter_model",
  )
  targets = sorted({linear_name(path) for path, _ in lazy.leaves(leaves)})
  values = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_name,
    "r": config.lora.rank,
    "lora_alpha": config.lora.alpha,
    "lora_dropout": config.lora.dropout,
    "target_modules": targets,
    "bias": "none",
    "inference_mode": True,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
  }
  if whole:
    values["modules_to_save"] = [name for name, tensor in _SAVED.items() if tensor in whole]
  folder = epath.Path(directory)
  (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2))
  (folder / ROLE_FILE).write_text(
    json.dumps({"role": role, "clara": dataclasses.asdict(config)}, indent=2)
  )
  write_tensors(
    directory,
    [(n, tuple(v.shape), v.dtype) for n, v in special.items()],
    lambda n: lazy.read(special[n]),
    stem="clara_special_tokens",
  )
  if tokenizer is not None:
    tokenizer.save_pretrained(os.path.join(directory, TOKENIZER))


def _named(leaves: Mapping[str, Any], whole: Mapping[str, np.ndarray]) -> Iterator[lazy.Named]:
  yield from lazy.named_tensors(leaves, lora_name, lora_place)
  for name, value in whole.items():
    yield lazy.Named(name, value.shape, value.dtype, lambda value=value: value)
