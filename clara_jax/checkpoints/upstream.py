"""Checkpoints of the released PyTorch code, read without running anything of theirs, and written
for it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from clara_jax.checkpoints import lazy
from clara_jax.checkpoints.families import read_json
from clara_jax.checkpoints.hub import local_directory
from clara_jax.checkpoints.huggingface import base_tensors, leaf_shapes
from clara_jax.checkpoints.keymap import EMBEDDING, HEAD, KeyMapError, lora_name, lora_place
from clara_jax.checkpoints.native import base_config
from clara_jax.checkpoints.tensors import is_finite
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.config import ClaraConfig, ConfigError, LoraConfig, Role
from clara_jax.model import Clara

ADAPTERS: dict[Role, str] = {
  "compressor": "encoder_adapter",
  "generator": "decoder_adapter",
  "query_reasoner": "query_reasoner_adapter",
}
ADAPTER_FILE, EMBEDDING_FILE = "adapters.pth", "decoder_first_last_layers.pth"
DATE_FIELD = "clara_jax_prompt_date"  # ours: the released code passes over it
STAGES = {
  "scp": "stage1",
  "instruct": "stage1_2",
  "joint": "stage2",
  "contrastive": "stage2_pretrain_retrieval",
}


def is_upstream(directory: str) -> bool:
  """Whether a directory is a checkpoint of the released code."""
  return (epath.Path(directory) / ADAPTER_FILE).exists()


def read(
  directory: str, base: str | None = None, dtype: str | None = None, allow: Sequence[str] = ()
) -> tuple[ClaraConfig, str, dict[str, Any]]:
  """A checkpoint: (its configuration, the directory of its base, its groups in their own types).

  The groups are the roles, 'memory_embedding' and 'special_tokens' (the whole embedding and head).
  Adapters that upstream created fresh also carry the embedding and the head; those load last there,
  and so they do here.

  Args:
    directory: the checkpoint.
    base: the base's directory, where the checkpoint's `decoder_model_name` does not lead to one.
    dtype: compute and storage dtype.
    allow: unknown fields of the base's config.json that are accepted.

  Raises:
    ConfigError: a field is missing or not supported, or the base is not to be found.
    KeyMapError: a tensor is unknown, missing or of the wrong shape; or a file holds anything but
      tensors.
  """
  values, base_directory = _config(directory), _base(directory, base)
  adapters = _read_pth(directory, ADAPTER_FILE)
  edges = {k: _numpy(v) for k, v in _read_pth(directory, EMBEDDING_FILE).items()}
  if unknown := set(adapters) - set(ADAPTERS.values()):
    raise KeyMapError(
      f"{directory}/{ADAPTER_FILE}: unknown adapters {sorted(unknown)}; known: "
      f"{sorted(ADAPTERS.values())}"
    )
  tensors: dict[Role, dict[str, np.ndarray]] = {}
  for role, name in ADAPTERS.items():
    if name in adapters:
      tensors[role] = {
        k: _checked(_numpy(v), f"{directory}/{ADAPTER_FILE}[{name}]: {k}")
        for k, v in adapters[name].items()
      }
      edges.update({k: tensors[role].pop(k) for k in (EMBEDDING, HEAD) if k in tensors[role]})
  for name in (EMBEDDING, HEAD):
    if name not in edges:
      raise KeyMapError(f"{directory}/{EMBEDDING_FILE}: {name} is missing")
  rank, memory_tokens = values["lora_r"], values["doc_max_length"] // values["compr_rate"]
  # Its rows are the tokenizer's words, M memory tokens and three more: the base's own embedding may
  # be padded.
  words = edges[EMBEDDING].shape[0] - memory_tokens - 3
  config = ClaraConfig(
    dataclasses.replace(base_config(base_directory, dtype, allow), vocab_size=words),
    LoraConfig(rank=rank, alpha=2.0 * rank),
    doc_max_length=values["doc_max_length"],
    compression_rate=values["compr_rate"],
    query_max_length=values["doc_max_length"],
    top_k=values.get("generation_top_k", 1),
    prompt_date=values.get(DATE_FIELD),
  )
  groups: dict[str, Any] = {}
  for role, named in tensors.items():
    groups[role] = lazy.stack(
      named,
      lora_place,
      leaf_shapes(Clara(config), role),
      f"{directory}/{ADAPTER_FILE}[{ADAPTERS[role]}]",
    )
  special = {}
  for name, ours, axis in ((EMBEDDING, "embedding", 0), (HEAD, "head", 1)):
    if ours == "head" and config.model.tie_embeddings:
      continue
    value = _checked(edges[name], f"{directory}/{EMBEDDING_FILE}: {name}")
    if value.shape != (config.vocab_size, config.model.width):
      raise KeyMapError(
        f"{directory}/{EMBEDDING_FILE}: {name} has the shape {value.shape}, expected "
        f"{(config.vocab_size, config.model.width)}: {words} words + {memory_tokens} memory "
        f"tokens + 3"
      )
    special[ours] = value.T if axis else value
  return (
    config,
    base_directory,
    groups
    | {
      "special_tokens": special,
      "memory_embedding": special["embedding"][words : words + memory_tokens],
    },
  )


def _config(directory: str) -> dict[str, Any]:
  file = epath.Path(directory) / "config.json"
  values = read_json(directory)
  if values.get("model_type") != "CLaRa":
    raise ConfigError(f"{file}: model_type={values.get('model_type')!r}, expected 'CLaRa'")
  for field, expected in (
    ("different_mem_tokens", True),
    ("sep", True),
    ("lora", True),
    ("compr_use_mlp", False),
    ("compr_model_name", None),
  ):
    if values.get(field, expected) != expected:
      raise ConfigError(
        f"{file}: {field}={values[field]!r} is not supported; expected {expected!r}"
      )
  for field in ("lora_r", "doc_max_length", "compr_rate"):
    if not isinstance(values.get(field), int) or values[field] < 1:
      raise ConfigError(f"{file}: {field}={values.get(field)!r}: expected a whole number")
  return values


def _base(directory: str, base: str | None) -> str:
  if base:
    return base
  named = str(read_json(directory).get("decoder_model_name") or "")
  near = next(
    (
      c
      for c in (str(epath.Path(directory) / named), str(epath.Path(directory).parent / named))
      if named and (epath.Path(c) / "config.json").exists()
    ),
    None,
  )
  try:
    return near or local_directory(named)
  except CheckpointError as error:
    raise ConfigError(
      f"{directory}/config.json: its base {named!r} is not here; name one with --base ({error})"
    ) from None


def write(
  directory: str,
  config: ClaraConfig,
  groups: Mapping[str, Any],
  base: Mapping[str, Any],
  base_name: str,
  stage: str,
  tokenizer: Any,
) -> None:
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
      adapters[name] = {
        t.name: _tensor(torch, t.read())
        for t in lazy.named_tensors(groups[role], lora_name, lora_place)
      }
  torch.save(adapters, str(epath.Path(directory) / ADAPTER_FILE))
  edges = {t.name: t for t in base_tensors(base) if t.name in (EMBEDDING, HEAD)}
  embedding, memory = edges[EMBEDDING].read(), lazy.read(groups["memory_embedding"])
  if not (memory.astype(embedding.dtype).astype(np.float32) == memory.astype(np.float32)).all():
    # Which holds a bfloat16 base, too: the trained rows would be rounded.
    embedding = embedding.astype(np.float32)
  embedding = np.array(embedding)
  embedding[config.model.vocab_size : config.model.vocab_size + config.num_memory_tokens] = memory
  head = embedding if config.model.tie_embeddings else edges[HEAD].read()
  torch.save(
    {EMBEDDING: _tensor(torch, embedding), HEAD: _tensor(torch, head)},
    str(epath.Path(directory) / EMBEDDING_FILE),
  )
  # What the released code reads on loading; `pure_inference` keeps it from replacing an instruct
  # checkpoint's generator.
  values = {
    "model_type": "CLaRa",
    "auto_map": {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"},
    "decoder_model_name": base_name,
    "doc_max_length": config.doc_max_length,
    "compr_rate": config.compression_rate,
    "lora": True,
    "lora_r": config.lora.rank,
    "lora_compressor": False,
    "lora_r_compressor": config.lora.rank,
    "generation_top_k": config.top_k,
    "training_stage": STAGES.get(stage, "stage2"),
    "training_form": "both_separately",
    "different_mem_tokens": True,
    "optimize_mem_tokens": True,
    "sep": True,
    "pure_inference": True,
    "load_adapters": True,
    "compr_model_name": None,
    "compr_use_mlp": False,
    "quantization": "no",
    "ae_mode": "token",
    "max_new_tokens": 128,
    **({DATE_FIELD: config.prompt_date} if config.prompt_date else {}),
  }
  (epath.Path(directory) / "config.json").write_text(json.dumps(values, indent=2))
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)


def stage_of(directory: str) -> str:
  """Our name of the stage that a checkpoint says it is of."""
  named = read_json(directory).get("training_stage")
  return next((ours for ours, theirs in STAGES.items() if theirs == named), "joint")


def _torch(where: str) -> Any:
  try:
    import torch
  except ImportError:
    raise ConfigError(
      f"{where.replace('.unfinished', '')}: .pth files need torch: pip install 'clara_jax[torch]'"
    ) from None
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
    raise KeyMapError(
      f"{path}: not a file of plain tensors: {str(error).splitlines()[0]}"
    ) from None
  if not isinstance(value, dict):
    raise KeyMapError(f"{path}: expected a dict, got {type(value).__name__}")
  return value


def _numpy(tensor: Any) -> np.ndarray:
  import torch

  if not isinstance(tensor, torch.Tensor):
    raise KeyMapError(f"expected a tensor, got {type(tensor).__name__}")
  if tensor.dtype == torch.bfloat16:  # numpy has none of its own
    return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.detach().numpy()


def _tensor(torch: Any, value: np.ndarray) -> Any:
  value = np.array(value)  # contiguous and writable
  if value.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(value)


def _checked(value: np.ndarray, where: str) -> np.ndarray:
  if not is_finite(np.ascontiguousarray(value)):
    raise KeyMapError(f"{where} holds NaN or infinity")
  return value
