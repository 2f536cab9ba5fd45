"""A Hugging Face `config.json` as a `ModelConfig`, and back: Mistral, Llama, Qwen2, Qwen3, Phi-3 / Phi-4-mini.

Every field of a config.json must be one that is used here, one that changes nothing that is computed, or hold the one value that is
supported. Anything else is refused by name: an unknown field may change the numbers.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from clara_jax.config import ConfigError, ModelConfig, RopeScaling

FAMILIES = ("mistral", "llama", "qwen2", "qwen3", "phi3")

_USED = frozenset((
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings", "initializer_range", "torch_dtype", "dtype"))
_USED_BY = {
    "mistral": {"sliding_window", "layer_types"},
    "llama": set(),
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "qwen3": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "phi3": {"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"},
}
# Fields of which one value is supported; dropouts would matter in training.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,), "attention_dropout": (0,),
    "resid_pdrop": (0,), "embd_pdrop": (0,), "quantization_config": (None,), "add_cross_attention": (False,),
    "is_encoder_decoder": (False,), "interpolate_factor": (1,), "full_attn_mod": (1,), "pruned_heads": ({}, None),
}
_NEUTRAL = frozenset((
    "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "use_cache", "pretraining_tp",
    "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
    "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder", "torchscript", "use_bfloat16", "task_specific_params",
    "tokenizer_class", "prefix", "finetuning_task", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "model_name", "unsloth_version", "unsloth_fixed"))
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "longrope": {"factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"},
}


def model_config(directory: str, **overrides: Any) -> ModelConfig:
  """The `ModelConfig` of a Hugging Face directory's config.json.

  Args:
    directory: holds config.json.
    **overrides: fields to set otherwise, such as dtype.

  Raises:
    ConfigError: no config.json, or a field that is missing, unknown or of a value that is not supported, by name.
  """
  file = epath.Path(directory) / "config.json"
  if not file.exists():
    raise ConfigError(f"{file}: no such file; expected a Hugging Face model directory")
  try:
    values = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ConfigError(f"{file}: not JSON: {error}") from None
  if not isinstance(values, dict):
    raise ConfigError(f"{file}: expected an object, got {type(values).__name__}")
  family = values.get("model_type")
  if family not in FAMILIES:
    raise ConfigError(f"{file}: model_type={family!r} is not supported; expected one of {list(FAMILIES)}")
  for field, value in values.items():
    if field in _USED | _USED_BY[family] or field in _NEUTRAL:
      continue
    if field not in _ONLY:
      raise ConfigError(f"{file}: {field}={value!r} is not known; it may change what is computed")
    if value not in _ONLY[field]:
      raise ConfigError(f"{file}: {field}={value!r} is not supported; expected {_ONLY[field][0]!r}")
  try:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    scaling, theta, fraction = _rope(values, str(file))
    fields = {
        "vocab_size": values["vocab_size"],
        "width": width,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values["num_key_value_heads"] or heads,
        "head_dim": values.get("head_dim") or width // heads,
        "mlp_dim": values["intermediate_size"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "qkv_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
        "fused_projections": family == "phi3",
        "norm_eps": values["rms_norm_eps"],
        "sliding_window": _window(family, values, str(file)),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "max_positions": values["max_position_embeddings"],
        "initializer_range": values.get("initializer_range", 0.02),
        **_dtypes(values, overrides, str(file)),
    }
  except KeyError as error:
    raise ConfigError(f"{file}: the field {error} is missing") from None
  return ModelConfig(**{**fields, **overrides})


def with_dtype(dtype: str | None) -> dict[str, Any]:
  """Overrides of `model_config` for a type of computation and storage."""
  return {"dtype": dtype, "param_dtype": dtype} if dtype else {}


def _dtypes(values: Mapping[str, Any], overrides: Mapping[str, Any], file: str) -> dict[str, str]:
  name = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
  if name not in ("float32", "bfloat16"):
    if {"dtype", "param_dtype"} <= set(overrides):
      return {}
    raise ConfigError(f"{file}: dtype={name!r} is not supported; expected 'bfloat16' or 'float32', or name one with --dtype")
  return {"dtype": name, "param_dtype": name}


def _window(family: str, values: Mapping[str, Any], file: str) -> int | None:
  window = values.get("sliding_window", 4096 if family == "mistral" else None)
  layers = values["num_hidden_layers"]
  if family in ("qwen2", "qwen3"):
    if not values.get("use_sliding_window", False):
      return None
    first = values.get("max_window_layers", 28)
    if "layer_types" not in values and 0 < first < layers:
      raise ConfigError(f"{file}: max_window_layers={first} of {layers} layers is not supported: a window must hold for all layers or none")
    if first >= layers:
      return None
  kinds = set(values.get("layer_types") or ())
  if len(kinds) > 1:
    raise ConfigError(f"{file}: layer_types={sorted(kinds)} is not supported: a window must hold for all layers or none")
  return None if kinds == {"full_attention"} else window


def _rope(values: Mapping[str, Any], file: str) -> tuple[RopeScaling | None, float, float]:
  """(scaling, theta, rotated fraction), from either generation of fields: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
  given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
  theta = float(given.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0)
  fraction = float(given.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0)
  kinds = {given.pop(name) for name in ("rope_type", "type") if name in given}
  kind = next(iter(kinds), "default")
  where = f"{file}: rope_{'parameters' if values.get('rope_parameters') else 'scaling'}"
  if len(kinds) > 1 or kind not in _ROPE_KEYS:
    raise ConfigError(f"{where}.rope_type={kind!r} is not supported; expected one of {sorted(_ROPE_KEYS)}")
  if unknown := set(given) - _ROPE_KEYS[kind]:
    name = sorted(unknown)[0]
    raise ConfigError(f"{where}.{name}={given[name]!r} is not known for rope_type={kind!r}")
  if kind == "default":
    return None, theta, fraction
  original = given.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
  if kind != "linear" and not original:
    raise ConfigError(f"{where}.original_max_position_embeddings is missing")
  if kind == "longrope":
    factor = given.get("factor") or values["max_position_embeddings"] / original
    return RopeScaling(kind, float(factor), original, short_factor=tuple(map(float, given["short_factor"])),
                       long_factor=tuple(map(float, given["long_factor"])), attention_factor=given.get("attention_factor")
                       ), theta, fraction
  if kind == "llama3":
    return RopeScaling(kind, float(given["factor"]), original, float(given["low_freq_factor"]), float(given["high_freq_factor"])
                       ), theta, fraction
  return RopeScaling(kind, float(given["factor"])), theta, fraction


def config_json(config: ModelConfig, vocab_size: int, special: Mapping[str, int | None]) -> dict[str, Any]:
  """The Hugging Face config.json of a model of this shape.

  Args:
    config: the model.
    vocab_size: rows of the embedding that is written.
    special: bos_token_id, eos_token_id and the like.

  Raises:
    ConfigError: no family has this combination of fields.
  """
  if config.fused_projections:
    family = "phi3"
  elif config.qk_norm:
    family = "qwen3"
  elif config.qkv_bias:
    family = "qwen2"
  else:
    family = "llama" if config.rope_scaling else "mistral"
  if (config.qk_norm and config.qkv_bias) or (config.fused_projections and (config.qk_norm or config.qkv_bias)) or (
      config.rotary_fraction != 1 and family != "phi3") or (family == "llama" and config.sliding_window):
    raise ConfigError(f"no Hugging Face family has this model's combination of fields: {config}")
  values = {
      "architectures": [{"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                         "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM"}[family]],
      "model_type": family, "vocab_size": vocab_size, "hidden_size": config.width, "num_hidden_layers": config.num_layers,
      "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
      "intermediate_size": config.mlp_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
      "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": config.max_positions,
      "initializer_range": config.initializer_range, "torch_dtype": config.param_dtype, **special}
  scaling = config.rope_scaling
  if scaling:
    values["rope_scaling"] = {"rope_type": scaling.kind, **{
        "linear": {"factor": scaling.factor},
        "llama3": {"factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
                   "high_freq_factor": scaling.high_freq_factor,
                   "original_max_position_embeddings": scaling.original_max_positions},
        "longrope": {"short_factor": list(scaling.short_factor), "long_factor": list(scaling.long_factor)},
    }[scaling.kind]}
    if scaling.kind == "longrope":
      values["rope_scaling"] |= {"type": "longrope"} | (
          {"attention_factor": scaling.attention_factor} if scaling.attention_factor is not None else {})
      values["original_max_position_embeddings"] = scaling.original_max_positions
      if scaling.factor != config.max_positions / scaling.original_max_positions:
        values["rope_scaling"]["factor"] = scaling.factor
  if family == "phi3":
    values["partial_rotary_factor"] = config.rotary_fraction
    values["sliding_window"] = config.sliding_window
  elif family in ("qwen2", "qwen3"):
    values |= {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window or 4096,
               "max_window_layers": 0 if config.sliding_window else config.num_layers}
  elif family == "mistral":
    values["sliding_window"] = config.sliding_window
  return values
