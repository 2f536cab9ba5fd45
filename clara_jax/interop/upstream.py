"""Checkpoints of the released PyTorch code (SPEC §3), read without running anything of theirs, and written for it."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from clara_jax.config import ClaraConfig, ConfigError, LoraConfig, Role
from clara_jax.interop import lazy
from clara_jax.interop.hf import base_tensors, leaf_shapes
from clara_jax.interop.keymap import EMBEDDING, HEAD, KeyMapError, lora_name, lora_place
from clara_jax.interop.native import base_config
from clara_jax.interop.tensors import is_finite
from clara_jax.model import Clara

ADAPTERS: dict[Role, str] = {
    "compressor": "encoder_adapter", "generator": "decoder_adapter", "query_reasoner": "query_reasoner_adapter"}
ADAPTER_FILE, EMBEDDING_FILE = "adapters.pth", "decoder_first_last_layers.pth"
STAGES = {"scp": "stage1", "instruct": "stage1_2", "joint": "stage2", "contrastive": "stage2_pretrain_retrieval"}


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
  for field in ("lora_r", "doc_max_length", "compr_rate"):
    if not isinstance(values.get(field), int):
      raise ConfigError(f"{file}: {field}={values.get(field)!r}: expected a whole number")
  named = str(values.get("decoder_model_name") or "")
  candidates = [base] if base else [named, str(epath.Path(directory) / named), str(epath.Path(directory).parent / named)]
  found = next((c for c in candidates if c and (epath.Path(c) / "config.json").exists()), None)
  if not found:
    raise ConfigError(f"{file}: its base {named!r} is not a directory here{f' ({base})' if base else ''}; name one with --base")
  model = base_config(found, dtype)
  rank = values["lora_r"]
  return ClaraConfig(
      model, LoraConfig(rank=rank, alpha=2.0 * rank), doc_max_length=values["doc_max_length"],
      compression_rate=values["compr_rate"], query_max_length=values["doc_max_length"],
      top_k=values.get("generation_top_k", 1)), found


def read_weights(model: Clara, directory: str) -> dict[str, Any]:
  """The roles, 'memory_embedding' and 'special_tokens' (the whole embedding and head) of a checkpoint, in their own types.

  Adapters that upstream created fresh also carry the embedding and the head; those load last there, and so they do here.

  Raises:
    KeyMapError: a tensor is unknown, missing or of the wrong shape; or a file holds anything but tensors.
  """
  adapters = _read_pth(directory, ADAPTER_FILE)
  edges = {k: _numpy(v) for k, v in _read_pth(directory, EMBEDDING_FILE).items()}
  if unknown := set(adapters) - set(ADAPTERS.values()):
    raise KeyMapError(f"{directory}/{ADAPTER_FILE}: unknown adapters {sorted(unknown)}; known: {sorted(ADAPTERS.values())}")
  weights: dict[str, Any] = {}
  for role, name in ADAPTERS.items():
    if name not in adapters:
      continue
    where = f"{directory}/{ADAPTER_FILE}[{name}]"
    tensors = {k: _checked(_numpy(v), f"{where}: {k}") for k, v in adapters[name].items()}
    edges.update({k: tensors.pop(k) for k in (EMBEDDING, HEAD) if k in tensors})
    weights[role] = lazy.stack(tensors, lora_place, leaf_shapes(model, role), where)
  config = model.config
  special = {}
  for name, ours, axis in ((EMBEDDING, "embedding", 0), (HEAD, "head", 1)):
    if name not in edges:
      raise KeyMapError(f"{directory}/{EMBEDDING_FILE}: {name} is missing")
    if ours == "head" and config.model.tie_embeddings:
      continue
    value = _checked(edges[name], f"{directory}/{EMBEDDING_FILE}: {name}")
    if value.shape != (config.vocab_size, config.model.width):
      raise KeyMapError(f"{directory}/{EMBEDDING_FILE}: {name} has the shape {value.shape}, expected "
                        f"{(config.vocab_size, config.model.width)}: {config.model.vocab_size} rows of the base + "
                        f"{config.num_memory_tokens} memory tokens + 3")
    special[ours] = value.T if axis else value
  first = config.model.vocab_size
  weights["special_tokens"] = special
  weights["memory_embedding"] = special["embedding"][first:first + config.num_memory_tokens]
  return weights


def write(directory: str, config: ClaraConfig, groups: Mapping[str, Any], base: Mapping[str, Any], base_name: str, stage: str,
          tokenizer: Any) -> None:
  """Writes a checkpoint that the released code loads.

  Args:
    directory: where; it must exist.
    config: the method's configuration.
    groups: roles and 'memory_embedding'.
    base: leaves, special tokens included: its embedding and head belong to the format.
    base_name: what `decoder_model_name` says.
    stage: ours.
    tokenizer: a Hugging Face tokenizer, or None.
  """
  torch = _torch(directory)
  adapters = {}
  for role, name in ADAPTERS.items():
    if role in groups:
      adapters[name] = {t.name: _tensor(torch, t.read()) for t in lazy.named_tensors(groups[role], lora_name, lora_place)}
  torch.save(adapters, str(epath.Path(directory) / ADAPTER_FILE))
  edges = {t.name: t for t in base_tensors(base) if t.name in (EMBEDDING, HEAD)}
  embedding = np.array(edges[EMBEDDING].read())
  first = config.model.vocab_size
  embedding[first:first + config.num_memory_tokens] = lazy.read(groups["memory_embedding"]).astype(embedding.dtype)
  head = embedding if config.model.tie_embeddings else edges[HEAD].read()
  torch.save({EMBEDDING: _tensor(torch, embedding), HEAD: _tensor(torch, head)}, str(epath.Path(directory) / EMBEDDING_FILE))
  # What the released code reads on loading; `pure_inference` keeps it from replacing an instruct checkpoint's generator.
  values = {
      "model_type": "CLaRa", "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
      "decoder_model_name": base_name, "doc_max_length": config.doc_max_length, "compr_rate": config.compression_rate,
      "lora": True, "lora_r": config.lora.rank, "lora_compressor": False, "lora_r_compressor": config.lora.rank,
      "generation_top_k": config.top_k, "training_stage": STAGES.get(stage, "stage2"), "training_form": "both_separately",
      "different_mem_tokens": True, "optimize_mem_tokens": True, "sep": True, "pure_inference": True, "load_adapters": True,
      "compr_model_name": None, "compr_use_mlp": False, "quantization": "no", "ae_mode": "token", "max_new_tokens": 128}
  (epath.Path(directory) / "config.json").write_text(json.dumps(values, indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)


def stage_of(directory: str) -> str:
  """Our name of the stage that a checkpoint says it is of."""
  named = json.loads((epath.Path(directory) / "config.json").read_text()).get("training_stage")
  return next((ours for ours, theirs in STAGES.items() if theirs == named), "joint")


def _torch(where: str) -> Any:
  try:
    import torch
  except ImportError:
    raise ConfigError(f"{where.replace('.unfinished', '')}: .pth files need torch: pip install -e '.[torch]'") from None
  return torch


def _read_pth(directory: str, name: str) -> dict[str, Any]:
  torch = _torch(f"{directory}/{name}")
  path = epath.Path(directory) / name
  if not path.exists():
    raise KeyMapError(f"{path}: no such file")
  try:
    with path.open("rb") as file:
      value = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises pickle, runtime and zip errors alike
    raise KeyMapError(f"{path}: not a file of plain tensors: {str(error).splitlines()[0]}") from None
  if not isinstance(value, dict):
    raise KeyMapError(f"{path}: expected a dict, got {type(value).__name__}")
  return value


def _numpy(tensor: Any) -> np.ndarray:
  import torch
  if not isinstance(tensor, torch.Tensor):
    raise KeyMapError(f"expected a tensor, got {type(tensor).__name__}")
  if tensor.dtype == torch.bfloat16:  # numpy has none of its own
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _tensor(torch: Any, value: np.ndarray) -> Any:
  value = np.array(value)  # contiguous and writable
  if value.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(value)


def _checked(value: np.ndarray, where: str) -> np.ndarray:
  if not is_finite(np.ascontiguousarray(value)):
    raise KeyMapError(f"{where} holds NaN or infinity")
  return value
