"""A Hugging Face `config.json` as a `ModelConfig`, and back: Mistral, Ministral, Llama, Qwen2,
Qwen3, Phi-3 / Phi-4-mini.

What a field means, which of two wins and what a missing one stands for is transformers' own: its
configuration class reads the file. Which fields there may be is ours: every one must be used here,
be known to change nothing that transformers computes, or hold the one value that is supported.
Anything else is refused by name: an unknown field may change the numbers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from etils import epath

from clara_jax.config import ConfigError, ModelConfig, RopeScaling
from clara_jax.data.tokenizer import count_words
from clara_jax.io import parse_json

FAMILIES = ("mistral", "ministral", "llama", "qwen2", "qwen3", "phi3")
ARCHITECTURES = {
  "mistral": "MistralForCausalLM",
  "ministral": "MinistralForCausalLM",
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "phi3": "Phi3ForCausalLM",
}
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

_NEEDED = (
  "vocab_size",
  "hidden_size",
  "num_hidden_layers",
  "num_attention_heads",
  "intermediate_size",
  "max_position_embeddings",
)
_USED = frozenset(
  (
    *_NEEDED,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "torch_dtype",
    "dtype",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "original_max_position_embeddings",
    "partial_rotary_factor",
  )
)
# Fields of which one value is supported; dropouts would matter in training.
_ONLY: dict[str, tuple[Any, ...]] = {
  "hidden_act": ("silu", "swish"),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "lm_head_bias": (False, None),
  "attention_dropout": (0, None),
  "resid_pdrop": (0, None),
  "embd_pdrop": (0, None),
  "hidden_dropout": (0, None),
  "quantization_config": (None,),
  "add_cross_attention": (False,),
  "is_encoder_decoder": (False,),
  "interpolate_factor": (1,),
  "full_attn_mod": (1,),
  "pruned_heads": ({}, None),
  "use_mrope": (False, None),
  "rope_interleaved": (False, None),
  "qk_layernorm": (False, None),
  "use_qk_norm": (False, None),
  "use_bias": (False, None),
  "qkv_bias": (False, None),
}
# What transformers' classes of these families do not read: records, what `generate` would do, what
# trained the model.
_NEUTRAL = frozenset(
  """
    architectures auto_map transformers_version _name_or_path name_or_path _commit_hash model_name
    license finetuned_from bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    cls_token_id mask_token_id decoder_start_token_id image_token_id use_cache pretraining_tp
    return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    output_router_logits chunk_size_feed_forward problem_type id2label label2id num_labels
    is_decoder cross_attention_hidden_size tie_encoder_decoder torchscript use_bfloat16
    tf_legacy_loss task_specific_params tokenizer_class prefix finetuning_task attn_implementation
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 flash_attn
    use_fused_rms_norm use_fused_swiglu use_fused_rotary use_logn_attn use_dynamic_ntk fused_bias
    gradient_checkpointing recompute deepspeed max_length min_length max_new_tokens do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id forced_decoder_ids
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    penalty_alpha cache_implementation is_llama_config transformers.js_config max_sequence_length
    seq_length max_seq_len model_max_length tokenizer_model_max_length n_ctx context_length
    trained_context vocab_multiple resid_dropout_prob classifier_dropout summary_type
    unsloth_version unsloth_fixed unsloth_tiled_mlp use_unsloth ignore_index router_aux_loss_coef
    keys_to_ignore_at_inference embd_layer dtype_plan expert_parallel base_model_tp_plan head_dtype
    """.split()
)
_ROPE_KEYS = {
  "default": set(),
  "linear": {"factor"},
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
  "longrope": {
    "factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
    "attention_factor",
  },
  "yarn": {
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
  },
}


def read_json(directory: str, name: str = CONFIG_FILE) -> dict[str, Any]:
  """The object in a JSON file of a Hugging Face directory.

  Raises:
    ConfigError: there is none, or it is no JSON object.
  """
  file = epath.Path(directory) / name
  if not file.exists():
    raise ConfigError(f"{file}: no such file; expected a Hugging Face model directory")
  try:
    values = parse_json(file.read_bytes())
  except ValueError as error:
    raise ConfigError(f"{file}: {error}") from None
  if not isinstance(values, dict):
    raise ConfigError(f"{file}: expected an object, got {type(values).__name__}")
  return values


def check_fields(
  values: Mapping[str, Any],
  used: frozenset[str] | set[str],
  neutral: frozenset[str],
  only: Mapping[str, Sequence[Any]],
  allow: Sequence[str],
  file: str,
) -> None:
  """Refuses fields that are unknown, unless they are allowed, or have values that are not
  supported.

  Raises:
    ConfigError: by name, with the option that accepts it where it may be accepted.
  """
  for field, value in values.items():
    if field in used or field in neutral:
      continue
    if field in only:
      if value not in only[field]:
        raise ConfigError(
          f"{file}: {field}={value!r} is not supported; expected {only[field][0]!r}"
        )
    elif field not in allow:
      raise ConfigError(
        f"{file}: {field}={value!r:.80} is not known; it may change what is computed. Where it "
        f"does not, accept it with "
        f"--allow-config {field}"
      )


def model_config(
  directory: str, *, allow: Sequence[str] = (), tokenizer: str | None = None, **overrides: Any
) -> ModelConfig:
  """The `ModelConfig` of a Hugging Face directory's config.json.

  The vocabulary is the tokenizer's, where there is one: an embedding that is padded beyond it has
  rows that no text reaches, and CLaRa's tokens come right after the tokenizer's, as in the released
  code.

  Args:
    directory: holds config.json.
    allow: unknown fields that are accepted.
    tokenizer: a directory with another tokenizer than the model's own.
    **overrides: fields to set otherwise, such as dtype.

  Raises:
    ConfigError: no config.json, or a field that is missing, unknown or of a value that is not
      supported, by name.
  """
  values, file = read_json(directory), str(epath.Path(directory) / CONFIG_FILE)
  fields = _fields(values, allow, file)
  words = count_words(tokenizer or directory)
  if words is not None:
    fields["vocab_size"] = words
  return ModelConfig(**{**fields, **overrides})


def _fields(values: Mapping[str, Any], allow: Sequence[str], file: str) -> dict[str, Any]:
  """Fields of `ModelConfig` from those of a config.json."""
  family = values.get("model_type")
  if family not in FAMILIES:
    raise ConfigError(
      f"{file}: model_type={family!r} is not supported; expected one of {list(FAMILIES)}"
    )
  check_fields(values, _USED, _NEUTRAL, _ONLY, allow, file)
  for field in _NEEDED:
    if values.get(field) is None:
      raise ConfigError(f"{file}: the field {field!r} is missing")
    if not isinstance(values[field], int) or isinstance(values[field], bool) or values[field] < 1:
      raise ConfigError(f"{file}: {field}={values[field]!r}: expected a whole number of 1 or more")
  # As in transformers, a mistral whose layers differ is a ministral.
  kind = "ministral" if family == "mistral" and values.get("layer_types") is not None else family
  known_fields = {
    k: v for k, v in values.items() if k in _USED and k not in ("torch_dtype", "dtype")
  }
  try:
    read = transformers.CONFIG_MAPPING[kind].from_dict(
      json.loads(json.dumps({**known_fields, "model_type": kind}))
    )
  except Exception as error:  # its validation raises many kinds
    raise ConfigError(f"{file}: {' '.join(str(error).split())[:300]}") from None
  heads, width = read.num_attention_heads, read.hidden_size
  if heads % (read.num_key_value_heads or heads):
    raise ConfigError(
      f"{file}: num_attention_heads={heads} is not a multiple of "
      f"num_key_value_heads={read.num_key_value_heads}"
    )
  window, full = _window(read, file)
  scaling, theta, fraction = _rope(read, family, allow, file)
  dtype = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
  if dtype not in ("float32", "bfloat16", "float16"):
    raise ConfigError(
      f"{file}: dtype={dtype!r} is not supported; expected 'bfloat16', 'float32' or 'float16'"
    )
  compute = "bfloat16" if dtype == "float16" else dtype
  return {
    "vocab_size": read.vocab_size,
    "width": width,
    "num_layers": read.num_hidden_layers,
    "num_heads": heads,
    "num_kv_heads": read.num_key_value_heads or heads,
    "head_dim": getattr(read, "head_dim", None) or width // heads,
    "mlp_dim": read.intermediate_size,
    "rope_theta": theta,
    "rope_scaling": scaling,
    "rotary_fraction": fraction,
    "qkv_bias": family == "qwen2",
    "qk_norm": family == "qwen3",
    "fused_projections": family == "phi3",
    "norm_eps": float(read.rms_norm_eps),
    "sliding_window": window,
    "full_attention_layers": full,
    "tie_embeddings": bool(read.tie_word_embeddings),
    "max_positions": read.max_position_embeddings,
    "initializer_range": float(read.initializer_range),
    "dtype": compute,
    "param_dtype": compute,
  }


def with_dtype(dtype: str | None) -> dict[str, Any]:
  """Overrides of `model_config` for a compute and storage dtype."""
  return {"dtype": dtype, "param_dtype": dtype} if dtype else {}


def _window(read: Any, file: str) -> tuple[int | None, tuple[int, ...]]:
  """(the window, layers that it does not hold for)."""
  window, kinds = getattr(read, "sliding_window", None), getattr(read, "layer_types", None)
  if read.model_type == "llama" or window is None or kinds is None:
    return (None if read.model_type == "llama" else window), ()
  if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
    raise ConfigError(
      f"{file}: layer_types names {sorted(unknown)[0]!r}; expected 'full_attention' or "
      f"'sliding_attention'"
    )
  full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
  return (None, ()) if len(full) == len(kinds) else (window, full)


def _rope(
  read: Any, family: str, allow: Sequence[str], file: str
) -> tuple[RopeScaling | None, float, float]:
  """(scaling, theta, rotated fraction) from what transformers made of all the fields there are."""
  rope = dict(read.rope_parameters or {})
  kind, theta, fraction = (
    rope.pop("rope_type", "default"),
    rope.pop("rope_theta", None),
    rope.pop("partial_rotary_factor", None),
  )
  rope.pop("type", None)
  for name, value in (
    ("rope_theta", theta),
    ("partial_rotary_factor", fraction),
    ("factor", rope.get("factor")),
  ):
    if value is not None and (
      isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0
    ):
      raise ConfigError(f"{file}: {name}={value!r:.80}: expected a number above 0")
  theta, fraction = float(theta or 10_000.0), float(fraction or 1.0)
  if fraction != 1 and family != "phi3":
    raise ConfigError(
      f"{file}: partial_rotary_factor={fraction!r} is not supported in a {family}; expected 1.0"
    )
  if not isinstance(kind, str) or kind not in _ROPE_KEYS:
    raise ConfigError(
      f"{file}: rope_type={kind!r} is not supported; expected one of {sorted(_ROPE_KEYS)}"
    )
  if kind == "default":
    rope.pop("original_max_position_embeddings", None)
  for name in sorted(set(rope) - _ROPE_KEYS[kind]):
    if f"rope_parameters.{name}" not in allow:
      raise ConfigError(
        f"{file}: rope_parameters.{name}={rope[name]!r:.80} is not known for rope_type={kind!r}. "
        f"Where it changes "
        f"nothing, accept it with --allow-config rope_parameters.{name}"
      )
  if kind == "default":
    return None, theta, fraction
  original = int(rope.get("original_max_position_embeddings") or read.max_position_embeddings)
  factor = rope.get("factor") or (
    read.max_position_embeddings / original if kind in ("longrope", "yarn") else None
  )
  try:
    numbers = {
      name: float(rope[name])
      for name in (
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
      )
      if rope.get(name) is not None
    }
    lists = {
      name: tuple(map(float, rope[name]))
      for name in ("short_factor", "long_factor")
      if name in _ROPE_KEYS[kind]
    }
    if kind == "llama3":
      numbers = {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
    scaling = RopeScaling(
      kind,
      float(factor),
      0 if kind == "linear" else original,
      truncate=bool(rope.get("truncate", True)),
      **numbers,
      **lists,
    )
    return scaling, theta, fraction
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{file}: rope_parameters of rope_type={kind!r}: missing or no number: {error}"
    ) from None


def end_ids(directory: str | None) -> tuple[int, ...]:
  """Tokens that end an answer, by generation_config.json and config.json of a directory."""
  ids: list[int] = []
  for name in (GENERATION_FILE, CONFIG_FILE):
    if directory is not None and (epath.Path(directory) / name).exists():
      ends = read_json(directory, name).get("eos_token_id")
      ids += [
        e
        for e in (ends if isinstance(ends, list) else [ends])
        if isinstance(e, int) and not isinstance(e, bool)
      ]
  return tuple(sorted(set(ids)))


def written_config(source: Mapping[str, Any], vocab_size: int, dtype: str) -> dict[str, Any]:
  """The config.json of a model that came from elsewhere, true for what is written: its fields, with
  rows and type of the weights."""
  values = {k: v for k, v in source.items() if k not in ("auto_map", "dtype", "torch_dtype")}
  return {
    **values,
    "vocab_size": vocab_size,
    "dtype" if "dtype" in source else "torch_dtype": dtype,
  }


def config_json(
  config: ModelConfig, vocab_size: int, special: Mapping[str, int | None], dtype: str | None = None
) -> dict[str, Any]:
  """The Hugging Face config.json of a model that was made here.

  Args:
    config: the model.
    vocab_size: rows of the embedding that is written.
    special: bos_token_id, eos_token_id and the like.
    dtype: of the weights; default: the configuration's.

  Raises:
    ConfigError: no family has this combination of fields.
  """
  if config.fused_projections:
    family = "phi3"
  elif config.qk_norm:
    family = "qwen3"
  elif config.qkv_bias:
    family = "qwen2"
  elif config.full_attention_layers:
    family = "ministral"
  else:
    family = "llama" if config.rope_scaling else "mistral"
  if (
    (config.qk_norm and config.qkv_bias)
    or (config.fused_projections and (config.qk_norm or config.qkv_bias))
    or (config.rotary_fraction != 1 and family != "phi3")
    or (family == "llama" and config.sliding_window)
    or (family == "phi3" and config.full_attention_layers)
  ):
    raise ConfigError(f"no Hugging Face family has this model's combination of fields: {config}")
  values = {
    "architectures": [ARCHITECTURES[family]],
    "model_type": family,
    "vocab_size": vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_dim,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_positions,
    "initializer_range": config.initializer_range,
    "torch_dtype": dtype or config.param_dtype,
    **special,
  }
  if config.rope_scaling:
    values["rope_scaling"] = _rope_scaling(config.rope_scaling, config.max_positions)
    if config.rope_scaling.kind == "longrope":
      values["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
  if family == "phi3":
    values["partial_rotary_factor"] = config.rotary_fraction
  if family != "llama":
    values["sliding_window"] = config.sliding_window
  if family in ("qwen2", "qwen3"):
    values |= {
      "use_sliding_window": config.sliding_window is not None,
      "sliding_window": config.sliding_window or 4096,
    }
  if family in ("qwen2", "qwen3", "ministral"):
    values["layer_types"] = [
      "full_attention"
      if config.sliding_window is None or i in config.full_attention_layers
      else "sliding_attention"
      for i in range(config.num_layers)
    ]
  return values


def _rope_scaling(scaling: RopeScaling, max_positions: int) -> dict[str, Any]:
  """`rope_scaling` of a config.json; fields at their defaults are left out."""
  values: dict[str, Any] = {"rope_type": scaling.kind}
  for name in sorted(
    _ROPE_KEYS[scaling.kind]
    & {
      "low_freq_factor",
      "high_freq_factor",
      "attention_factor",
      "beta_fast",
      "beta_slow",
      "mscale",
      "mscale_all_dim",
    }
  ):
    if scaling.kind == "llama3" or getattr(scaling, name) != getattr(RopeScaling("yarn"), name):
      values[name] = getattr(scaling, name)
  if scaling.kind == "longrope":
    values |= {
      "type": "longrope",
      "short_factor": list(scaling.short_factor),
      "long_factor": list(scaling.long_factor),
    }
    if scaling.factor != max_positions / scaling.original_max_positions:
      values["factor"] = scaling.factor
  else:
    values["factor"] = scaling.factor
  if scaling.kind in ("llama3", "yarn"):
    values["original_max_position_embeddings"] = scaling.original_max_positions
  if scaling.kind == "yarn" and not scaling.truncate:
    values["truncate"] = False
  return values
