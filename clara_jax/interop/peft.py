"""A role as a standard PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`, read and written without peft.

PEFT has no place for CLaRa's special tokens. They lie beside the adapter, in `clara_special_tokens.safetensors`, with the method's
configuration in `clara_config.json`; an adapter without these files is read with fresh special tokens.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from clara_jax.config import ClaraConfig, ConfigError, LoraConfig, from_config_dict
from clara_jax.interop import lazy
from clara_jax.interop.hf import leaf_shapes
from clara_jax.interop.keymap import KeyMapError, linear_name, lora_name, lora_place
from clara_jax.interop.tensors import TensorFiles, write_tensors
from clara_jax.model import Clara

CONFIG_FILE, ADAPTER_FILE, ROLE_FILE, SPECIAL_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "clara_config.json", "clara_special_tokens.safetensors")
_PREFIX = "base_model.model."
# Fields of adapter_config.json that change what is computed, and the values that can be honoured.
_ONLY = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None),
         "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
         "layers_to_transform": (None, []), "layer_replication": (None,), "lora_bias": (False, None), "trainable_token_indices": (None,),
         "use_qalora": (False, None)}


def is_adapter(directory: str) -> bool:
  """Whether a directory holds a PEFT adapter."""
  return (epath.Path(directory) / CONFIG_FILE).exists()


def read_lora(directory: str) -> tuple[LoraConfig, str | None]:
  """(shape of the adapter, name of its base).

  Raises:
    ConfigError: a field is missing or of a value that is not supported, by name.
  """
  file = epath.Path(directory) / CONFIG_FILE
  try:
    values = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ConfigError(f"{file}: not JSON: {error}") from None
  for field, allowed in _ONLY.items():
    if values.get(field, allowed[-1]) not in allowed:
      raise ConfigError(f"{file}: {field}={values[field]!r} is not supported; expected {allowed[0]!r}")
  targets = values.get("target_modules")
  if not isinstance(targets, list):
    raise ConfigError(f"{file}: target_modules={targets!r}: expected a list of names")
  if unknown := [t for t in targets if not t.endswith("_proj")]:
    raise ConfigError(f"{file}: target_modules names {unknown[0]!r}; expected projections such as 'q_proj'")
  try:
    return LoraConfig(values["r"], float(values["lora_alpha"]), values.get("lora_dropout", 0.0),
                      tuple(sorted(t.rpartition(".")[2].removesuffix("_proj") for t in targets))), values.get("base_model_name_or_path")
  except KeyError as error:
    raise ConfigError(f"{file}: the field {error} is missing") from None


def read_role(model: Clara, directory: str, role: str) -> dict[str, Any]:
  """A role's leaves.

  Raises:
    KeyMapError: a tensor that is missing, unknown, doubled or of the wrong shape, by name.
  """
  files = TensorFiles(directory, (ADAPTER_FILE,))
  tensors = {}
  for name in files:
    if not name.startswith(_PREFIX):
      raise KeyMapError(f"{directory}/{ADAPTER_FILE}: {name} does not start with {_PREFIX!r}")
    tensors[name.removeprefix(_PREFIX)] = files[name]
  return lazy.stack(tensors, lora_place, leaf_shapes(model, role), f"{directory}/{ADAPTER_FILE}")


def read_clara(directory: str) -> tuple[str | None, ClaraConfig | None, dict[str, Any] | None]:
  """(role, the method's configuration, special tokens and memory embedding), each None where the adapter did not come from here."""
  file = epath.Path(directory) / ROLE_FILE
  if not file.exists():
    return None, None, None
  values = json.loads(file.read_text())
  config = from_config_dict(ClaraConfig, values["clara"], ROLE_FILE)
  files = TensorFiles(directory, (SPECIAL_FILE,))
  return values["role"], config, {name: files[name] for name in files}


def write(directory: str, role: str, config: ClaraConfig, leaves: Mapping[str, Any], special: Mapping[str, Any], base_name: str
          ) -> None:
  """Writes one role.

  Args:
    directory: where; it must exist.
    role: its name.
    config: the method's configuration.
    leaves: of the role.
    special: 'embedding', 'head' of the special tokens and 'memory_embedding'.
    base_name: what `base_model_name_or_path` says.
  """
  tensors = {_PREFIX + t.name: t for t in lazy.named_tensors(leaves, lora_name, lora_place)}
  write_tensors(directory, [(n, t.shape, t.dtype) for n, t in tensors.items()], lambda n: tensors[n].read(), stem="adapter_model")
  targets = sorted({linear_name(path) for path, _ in lazy.leaves(leaves)})
  values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": config.lora.rank,
            "lora_alpha": config.lora.alpha, "lora_dropout": config.lora.dropout, "target_modules": targets, "bias": "none",
            "inference_mode": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False}
  folder = epath.Path(directory)
  (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2))
  (folder / ROLE_FILE).write_text(json.dumps({"role": role, "clara": dataclasses.asdict(config)}, indent=2))
  write_tensors(directory, [(n, tuple(v.shape), v.dtype) for n, v in special.items()], lambda n: lazy.read(special[n]),
                stem="clara_special_tokens")
