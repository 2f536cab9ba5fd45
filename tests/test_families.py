"""Every supported family against transformers, plain and with PEFT adapters; config.json fields
that are not understood."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.checkpoints import families, formats
from clara_jax.checkpoints.convert import convert
from clara_jax.config import ConfigError
from clara_jax.model import Clara

SHAPE = {
  "vocab_size": 97,
  "hidden_size": 48,
  "intermediate_size": 80,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "initializer_range": 0.2,
  "rms_norm_eps": 1e-5,
  "pad_token_id": 0,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 5.0]}
FAMILIES = {
  "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
  "mistral-tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
  "llama": ("Llama", {"rope_theta": 5e5}),
  "llama3-rope": (
    "Llama",
    {
      "rope_theta": 5e5,
      "max_position_embeddings": 64,
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
      },
    },
  ),
  "qwen2": ("Qwen2", {}),
  "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
  "phi3": (
    "Phi3",
    {
      "partial_rotary_factor": 0.5,
      "tie_word_embeddings": True,
      "max_position_embeddings": 64,
      "original_max_position_embeddings": 32,
      "rope_scaling": LONG,
    },
  ),
  "phi3-long": (
    "Phi3",
    {
      "partial_rotary_factor": 0.5,
      "max_position_embeddings": 64,
      "original_max_position_embeddings": 8,
      "rope_scaling": LONG,
    },
  ),
}
IDS = np.random.default_rng(0).integers(3, 97, (2, 12))


def reference(name, directory):
  torch = pytest.importorskip("torch")
  import transformers

  kind, fields = FAMILIES[name]
  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **fields})
  model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
  with torch.no_grad():
    for parameter_name, value in model.named_parameters():  # biases and norms are constant at first
      if value.ndim == 1:
        value.add_(0.1 * torch.randn_like(value))
      assert value.dtype == torch.float32, parameter_name
  model.save_pretrained(directory)
  return torch, model


def torch_logits(torch, model):
  with torch.no_grad():
    return model(
      torch.tensor(IDS), attention_mask=torch.ones(IDS.shape, dtype=torch.long)
    ).logits.numpy()


def logits(directory, role=None, base=None):
  opened = formats.open_checkpoint(directory, base)
  model, weights = Clara(opened.config), formats.on_device(opened)
  weights.setdefault(
    "memory_embedding", jnp.zeros((opened.config.num_memory_tokens, opened.config.model.width))
  )
  hidden, _ = model.hidden(weights, role, model.embed(weights, jnp.asarray(IDS)))
  return np.asarray(model.logits(weights, hidden))[..., : SHAPE["vocab_size"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_round_trip(tmp_path, name):
  torch, model = reference(name, tmp_path / "hf")
  expected = torch_logits(torch, model)
  np.testing.assert_allclose(logits(str(tmp_path / "hf")), expected, rtol=0, atol=1e-4)
  convert(str(tmp_path / "hf"), str(tmp_path / "clara"), "clara")
  convert(str(tmp_path / "clara"), str(tmp_path / "back"), "hf")
  import transformers

  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
  np.testing.assert_allclose(torch_logits(torch, again), expected, rtol=0, atol=1e-6)
  before, after = model.state_dict(), again.state_dict()
  assert set(before) == set(after)
  assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2", "phi3"])
def test_adapters_equal_peft(tmp_path, name):
  torch, model = reference(name, tmp_path / "hf")
  peft = pytest.importorskip("peft")
  adapted = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    ),
  ).eval()
  adapted.save_pretrained(tmp_path / "adapter")
  expected = torch_logits(torch, adapted)
  base = str(tmp_path / "hf")
  np.testing.assert_allclose(
    logits(str(tmp_path / "adapter"), "generator", base), expected, rtol=0, atol=1e-4
  )
  report = convert(
    str(tmp_path / "adapter"),
    str(tmp_path / "merged"),
    "hf",
    role="generator",
    base=base,
    verify=True,
  )
  assert report.verify["exact"] and report.verify["reloaded_by"] == ["transformers"]
  assert report.verify["max_abs_logit_difference"] < 1e-4
  assert report.verify["max_abs_logit_difference_unmerged"] < 1e-4
  report = convert(
    str(tmp_path / "adapter"),
    str(tmp_path / "again"),
    "peft",
    role="generator",
    base=base,
    verify=True,
  )
  assert report.verify["exact"] and report.verify["max_abs_logit_difference"] < 1e-4
  # peft's own file comes back to the bit, fused projections still fused
  from safetensors.numpy import load_file

  one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
  assert set(one) == set(two) and all(
    (one[k] == two[k]).all() and one[k].dtype == two[k].dtype for k in one
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"model_type": "gemma"}, "model_type='gemma'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"logit_scale": 0.5}, "logit_scale=0.5 is not known"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type='dynamic'"),
    (
      {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "beta": 1}},
      "beta=1 is not known.*--allow-config rope_parameters.beta",
    ),
    ({"layer_types": ["full_attention", "chunked_attention"], "sliding_window": 8}, "layer_types"),
    ({"num_hidden_layers": None}, "num_hidden_layers.* is missing"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers='2': expected a whole number"),
    ({"dtype": "float64"}, "dtype='float64'"),
  ],
)
def test_config_fields_are_never_ignored(tmp_path, fields, message):
  values = {
    "model_type": "mistral",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "sliding_window": None,
    **fields,
  }
  (tmp_path / "config.json").write_text(
    json.dumps({k: v for k, v in values.items() if v is not None or k == "sliding_window"})
  )
  with pytest.raises(ConfigError, match=message) as error:
    families.model_config(str(tmp_path))
  assert "config.json" in str(error.value)


def test_real_config_files_are_understood(tmp_path):
  """The fields that published checkpoints carry (typed here; no weights)."""
  common = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
  }
  published = {
    "mistral-7b-v0.1": {
      "architectures": ["MistralForCausalLM"],
      "model_type": "mistral",
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "max_position_embeddings": 32768,
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "sliding_window": 4096,
      "tie_word_embeddings": False,
      "vocab_size": 32000,
    },
    "llama-3.1-8b": {
      "attention_bias": False,
      "attention_dropout": 0.0,
      "model_type": "llama",
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-5,
      "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
      },
      "rope_theta": 500000.0,
      "tie_word_embeddings": False,
      "vocab_size": 128256,
    },
    "qwen2.5-7b": {
      "attention_dropout": 0.0,
      "model_type": "qwen2",
      "hidden_size": 3584,
      "intermediate_size": 18944,
      "max_position_embeddings": 131072,
      "max_window_layers": 28,
      "num_attention_heads": 28,
      "num_hidden_layers": 28,
      "num_key_value_heads": 4,
      "rms_norm_eps": 1e-6,
      "rope_theta": 1e6,
      "sliding_window": 131072,
      "tie_word_embeddings": False,
      "use_sliding_window": False,
      "vocab_size": 152064,
    },
    "phi-4-mini": {
      "attention_bias": False,
      "attention_dropout": 0.0,
      "embd_pdrop": 0.0,
      "full_attn_mod": 1,
      "model_type": "phi3",
      "hidden_size": 3072,
      "intermediate_size": 8192,
      "interpolate_factor": 1,
      "lm_head_bias": False,
      "max_position_embeddings": 131072,
      "mlp_bias": False,
      "num_attention_heads": 24,
      "num_hidden_layers": 32,
      "num_key_value_heads": 8,
      "original_max_position_embeddings": 4096,
      "partial_rotary_factor": 0.75,
      "resid_pdrop": 0.0,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "sliding_window": 262144,
      "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
      "tie_word_embeddings": True,
      "vocab_size": 200064,
    },
  }
  configs = {}
  for name, values in published.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps({**common, **values}))
    configs[name] = families.model_config(str(tmp_path / name))
    again = tmp_path / f"{name}-again"
    again.mkdir()
    (again / "config.json").write_text(
      json.dumps(families.config_json(configs[name], configs[name].vocab_size, {}))
    )
    assert families.model_config(str(again)) == configs[name]
  assert (
    configs["mistral-7b-v0.1"].sliding_window == 4096
    and configs["qwen2.5-7b"].sliding_window is None
  )
  assert configs["qwen2.5-7b"].qkv_bias and configs["llama-3.1-8b"].rope_scaling.factor == 8
  assert configs["phi-4-mini"].rotary_dim == 96 and configs["phi-4-mini"].rope_scaling.factor == 32
