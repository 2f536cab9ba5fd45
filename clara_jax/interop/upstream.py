"""Checkpoints of the released PyTorch code (SPEC §3), read without running anything of theirs."""

import json
from typing import Any

import numpy as np
from etils import epath

from clara_jax.config import ROLES, ClaraConfig, ConfigError, LoraConfig, Role
from clara_jax.interop import hf
from clara_jax.interop.keymap import KeyMapError, base_place, lora_place
from clara_jax.model import Clara

ADAPTERS: dict[Role, str] = {
    "compressor": "encoder_adapter", "generator": "decoder_adapter", "query_reasoner": "query_reasoner_adapter"}
ADAPTER_FILE, EMBEDDING_FILE = "adapters.pth", "decoder_first_last_layers.pth"
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def is_upstream(directory: str) -> bool:
  """Whether a directory is a checkpoint of the released code."""
  return (epath.Path(directory) / ADAPTER_FILE).exists()


def read_config(directory: str, base: str | None = None, dtype: str | None = None) -> tuple[ClaraConfig, str]:
  """The configuration of a checkpoint and the directory of its base.

  Args:
    directory: the checkpoint.
    base: the base's directory, where the checkpoint's `decoder_model_name` is not a directory that can be reached.
    dtype: type of computation and storage.

  Raises:
    ConfigError: a field is missing or not supported, or the base is not to be found.
  """
  file = epath.Path(directory) / "config.json"
  if not file.exists():
    raise ConfigError(f"{file}: no such file; expected a CLaRa checkpoint")
  values = json.loads(file.read_text())
  if values.get("model_type") != "CLaRa":
    raise ConfigError(f"{file}: model_type={values.get('model_type')!r}, expected 'CLaRa'")
  for field, wanted in (("different_mem_tokens", True), ("sep", True), ("lora", True), ("compr_use_mlp", False),
                        ("compr_model_name", None)):
    if values.get(field, wanted) != wanted:
      raise ConfigError(f"{file}: {field}={values[field]!r} is not supported; expected {wanted!r}")
  named = str(values.get("decoder_model_name") or "")
  candidates = [base] if base else [named, str(epath.Path(directory) / named), str(epath.Path(directory).parent / named)]
  found = next((c for c in candidates if c and (epath.Path(c) / "config.json").exists()), None)
  if not found:
    raise ConfigError(f"{file}: its base {named!r} is not a directory here{f' ({base})' if base else ''}; name one with --base")
  model = hf.model_config(found, **hf.with_dtype({}, dtype))
  rank = values["lora_r"]
  return ClaraConfig(
      model, LoraConfig(rank=rank, alpha=2.0 * rank), doc_max_length=values["doc_max_length"],
      compression_rate=values["compr_rate"], query_max_length=values["doc_max_length"],
      top_k=values.get("generation_top_k", 1)), found


def read_weights(model: Clara, directory: str, base: str) -> dict[str, Any]:
  """All groups of a checkpoint, with its base from `base`.

  Adapters that upstream created fresh also carry the embedding and the head; those load last there, and so they do here.

  Raises:
    KeyMapError: a tensor is unknown, missing or of the wrong shape; or a file holds anything but tensors.
  """
  adapters = _read_pth(directory, ADAPTER_FILE)
  edges = dict(_read_pth(directory, EMBEDDING_FILE))
  weights: dict[str, Any] = {}
  for role, name in ADAPTERS.items():
    if name not in adapters:
      continue
    tensors = {k: _numpy(v) for k, v in adapters[name].items()}
    edges.update({k: adapters[name][k] for k in _EMBEDDINGS if k in tensors})
    weights[role] = hf.stack(model, role, ((k, v) for k, v in tensors.items() if k not in _EMBEDDINGS), lora_place,
                             f"{directory}/{ADAPTER_FILE}[{name}]")
  if unknown := set(adapters) - set(ADAPTERS.values()):
    raise KeyMapError(f"{directory}/{ADAPTER_FILE}: unknown adapters {sorted(unknown)}; known: {sorted(ADAPTERS.values())}")
  missing = [k for k in _EMBEDDINGS if k not in edges]
  if missing:
    raise KeyMapError(f"{directory}/{EMBEDDING_FILE}: {missing[0]} is missing")
  kept = ((n, t) for n, t in hf.read_safetensors(base) if n not in _EMBEDDINGS)
  edge_arrays = [(k, _numpy(v)) for k, v in edges.items() if not (model.config.model.tie_embeddings and k == "lm_head.weight")]
  rows = edge_arrays[0][1].shape[0]
  if rows != model.config.vocab_size:
    raise KeyMapError(f"{directory}/{EMBEDDING_FILE}: {edge_arrays[0][0]} has {rows} rows, expected {model.config.vocab_size} = "
                      f"{model.config.model.vocab_size} of the base + {model.config.num_memory_tokens} memory tokens + 3")
  weights["base"] = hf.stack(model, "base", [*kept, *edge_arrays], base_place, f"{base} with {directory}/{EMBEDDING_FILE}")
  first = model.config.model.vocab_size
  weights["memory_embedding"] = np.asarray(
      weights["base"]["embedding"][first:first + model.config.num_memory_tokens], np.float32)
  return weights


def roles_in(weights: dict[str, Any]) -> list[str]:
  """The roles that a checkpoint brought."""
  return [role for role in ROLES if role in weights]


def _read_pth(directory: str, name: str) -> dict[str, Any]:
  try:
    import torch
  except ImportError:
    raise ConfigError(f"{directory}/{name}: reading a .pth file needs torch: pip install 'clara_jax[torch]'") from None
  path = epath.Path(directory) / name
  if not path.exists():
    raise KeyMapError(f"{path}: no such file")
  try:
    with path.open("rb") as file:
      return torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises pickle, runtime and zip errors alike
    raise KeyMapError(f"{path}: not a file of plain tensors: {str(error).splitlines()[0]}") from None


def _numpy(tensor: Any) -> np.ndarray:
  # numpy has no bfloat16 of its own; float32 holds every bfloat16 exactly.
  return tensor.float().numpy()
