"""Published models made small: the fields of their config.json and generation_config.json, their
kind of tokenizer, and templates of their shape, with random weights of a few thousand numbers. The
templates are written here; `make test-real` has the published ones.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

TEXT = [
  "You are a helpful assistant. Your task is to extract relevant information from provided "
  "documents and to answer to questions as "
  "briefly as possible.",
  "Given a document, your task is to generate some single questions to cover all key information "
  "of the document and answer them "
  "sequentially.",
  "Background: Question: Answer: What is the capital of France? Paris. Who was Ada? Where is "
  "Berlin? It is in Germany, user and system.",
] * 3


def _chatml(first: str = "", think: bool = False) -> str:
  thought = (
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' "
    "}}{% endif %}"
    if think
    else ""
  )
  answered = (
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    if think
    else ""
  )
  return (
    f"{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\\nYou are "
    f"SmallModel.<|im_end|>\\n' }}}}{{% endif %}}{first}"
    f"{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}{answered}{{{{ m.content "
    f"+ '<|im_end|>\\n' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{thought}{{% endif %}}"
  )


def _inst(
  user: str, system: str = "first", answer: str = "{{ ' ' + m.content + eos_token }}"
) -> str:
  """Mistral's: where the system's text goes ('first' or 'last' user turn, 'own' turn, 'none':
  refused)."""
  head = {"own": "{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}"}.get(
    system, ""
  )
  refusal = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('Conversation roles must "
    "alternate user/assistant/…') }}{% endif %}"
  )
  clause = {
    "first": "loop.first and system is defined",
    "last": "loop.last and system is defined",
  }.get(system, "false")
  return (
    f"{{{{ bos_token }}}}{refusal if system == 'none' else ''}"
    f"{{% if messages[0].role == 'system' %}}{{% set system = messages[0].content %}}"
    f"{head}{{% set messages = messages[1:] %}}{{% endif %}}{{% for m in messages %}}{{% if "
    f"m.role == 'user' %}}"
    f"{{% set text = (system + '\\n\\n' + m.content) if {clause} else m.content %}}{user}{{% else "
    f"%}}{answer}{{% endif %}}{{% endfor %}}"
  )


MISTRAL_V1 = "{{ '[INST] ' + text + ' [/INST]' }}"
_HEADERS = (
  "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
  "'<|end_header_id|>\\n\\n' }}{DATE}"
  "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% "
  "endif %}"
)
LLAMA3 = _HEADERS.replace("{DATE}", "")
LLAMA32 = _HEADERS.replace(
  "{DATE}",
  "{% if m.role == 'system' %}{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}{% endif %}",  # noqa: E501
)
LLAMA2 = _inst(
  "{{ bos_token if not loop.first }}{{ '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' "
  "if loop.first and system is defined "
  "else '') + m.content + ' [/INST]' }}",
  answer="{{ ' ' + m.content + ' ' + eos_token }}",
)
ZEPHYR = (
  "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
  "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
PHI3 = (
  "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' "
  "}}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_MINI = PHI3.replace("|>\\n'", "|>'")
R1 = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
  "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
  "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% "
  "endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)

_LLAMA3_ROPE = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
  "rope_type": "llama3",
}
_LONG = {
  "type": "longrope",
  "short_factor": [1.0, 1.1, 1.2, 1.3],
  "long_factor": [1.0, 2.0, 4.0, 8.0],
}
_HEADER_TOKENS = (
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eom_id|>",
  "<|eot_id|>",
)
_PHI3_TOKENS = (
  "<unk>",
  "<s>",
  "</s>",
  "<|endoftext|>",
  "<|assistant|>",
  "<|system|>",
  "<|end|>",
  "<|user|>",
)
_QWEN = {
  "attention_dropout": 0.0,
  "max_window_layers": 28,
  "use_sliding_window": False,
  "sliding_window": 131072,
  "use_cache": True,
}
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PHI = {
  "attention_bias": False,
  "attention_dropout": 0.0,
  "embd_pdrop": 0.0,
  "resid_pdrop": 0.0,
  "original_max_position_embeddings": 64,
  "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
  "attn_implementation": None,
  "pad_token_id": 0,
}
_LLAMA = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1}


@dataclasses.dataclass(frozen=True)
class Published:
  """A model as it is published, but for its sizes.

  Attributes:
    family: `model_type`.
    template: of its shape.
    tokens: its special tokens, in order.
    fields: of config.json.
    bos, eos: of the tokenizer.
    ends: `eos_token_id` of generation_config.json, as tokens.
    padding: rows of the embedding beyond the tokenizer.
    sentencepiece: whether the tokenizer puts a mark before words, as Llama 2's; else bytes.
    dtype: of the weights.
  """

  family: str
  template: str | None
  tokens: tuple[str, ...] = ("<unk>", "<s>", "</s>")
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  bos: str | None = "<s>"
  eos: str | None = "</s>"
  ends: tuple[str, ...] = ()
  padding: int = 0
  sentencepiece: bool = False
  dtype: str = "bfloat16"


_CONTROL = (
  "<unk>",
  "<s>",
  "</s>",
  "[INST]",
  "[/INST]",
  "[TOOL_CALLS]",
  "[AVAILABLE_TOOLS]",
  "[/AVAILABLE_TOOLS]",
)
MODELS: dict[str, Published] = {
  "Mistral-7B-Instruct-v0.1": Published(
    "mistral",
    _inst(MISTRAL_V1, "none", "{{ m.content + eos_token + ' ' }}"),
    sentencepiece=True,
    fields={"sliding_window": 24, "rope_theta": 10000.0},
  ),
  "Mistral-7B-Instruct-v0.2": Published(
    "mistral",
    _inst("{{ ' [INST] ' + text + ' [/INST]' }}"),
    sentencepiece=True,
    fields={"sliding_window": None, "rope_theta": 1e6, "attention_dropout": 0.0},
  ),
  "Mistral-7B-Instruct-v0.3": Published(
    "mistral",
    _inst("{{ '[INST] ' + text + '[/INST]' }}", "last"),
    _CONTROL,
    sentencepiece=True,
    fields={"sliding_window": None, "rope_theta": 1e6, "attention_dropout": 0.0},
  ),
  "Mistral-Nemo-Instruct-2407": Published(
    "mistral",
    _inst("{{ '[INST]' + text + '[/INST]' }}", "last", "{{ m.content + eos_token }}"),
    _CONTROL,
    {"sliding_window": None, "rope_theta": 1e6, "head_dim": 16},
  ),
  "Ministral-8B-Instruct-2410": Published(
    "mistral",
    _inst("{{ '[INST]' + text + '[/INST]' }}", "last", "{{ m.content + eos_token }}"),
    _CONTROL,
    {
      "sliding_window": 24,
      "rope_theta": 1e8,
      "head_dim": 16,
      "layer_types": ["full_attention", "sliding_attention"],
    },
  ),
  "Mistral-Small-24B-Instruct-2501": Published(
    "mistral",
    _inst("{{ '[INST]' + text + '[/INST]' }}", "own", "{{ m.content + eos_token }}").replace(
      "{{ bos_token }}", "{{ bos_token }}{% set today = strftime_now('%Y-%m-%d') %}"
    ),
    (*_CONTROL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    {"sliding_window": None, "rope_theta": 1e8, "head_dim": 16},
  ),
  "Llama-2-7b-chat": Published(
    "llama",
    LLAMA2,
    sentencepiece=True,
    dtype="float16",
    fields={"pretraining_tp": 1, "rope_scaling": None, "max_length": 4096, "use_cache": True},
  ),
  "Meta-Llama-3-8B-Instruct": Published(
    "llama",
    LLAMA3,
    _HEADER_TOKENS,
    {**_LLAMA, "rope_theta": 5e5, "rope_scaling": None},
    "<|begin_of_text|>",
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eot_id|>"),
  ),
  "Llama-3.1-8B-Instruct": Published(
    "llama",
    LLAMA3,
    _HEADER_TOKENS,
    {**_LLAMA, "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE},
    "<|begin_of_text|>",
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
  ),
  "Llama-3.2-1B-Instruct": Published(
    "llama",
    LLAMA32,
    _HEADER_TOKENS,
    {
      **_LLAMA,
      "rope_theta": 5e5,
      "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
      "tie_word_embeddings": True,
      "head_dim": 8,
    },
    "<|begin_of_text|>",
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
  ),
  "zephyr-7b-beta": Published(
    "mistral",
    ZEPHYR,
    sentencepiece=True,
    fields={
      "sliding_window": 24,
      "rope_theta": 10000.0,
      "pad_token_id": 2,
      "_name_or_path": "mistralai/Mistral-7B-v0.1",
    },
  ),
  "TinyLlama-1.1B-Chat-v1.0": Published(
    "llama",
    ZEPHYR,
    sentencepiece=True,
    fields={
      "attention_bias": False,
      "pretraining_tp": 1,
      "rope_scaling": None,
      "rope_theta": 10000.0,
    },
  ),
  "SmolLM2-135M-Instruct": Published(
    "llama",
    _chatml(),
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {
      **_LLAMA,
      "is_llama_config": True,
      "rope_interleaved": False,
      "rope_scaling": None,
      "rope_theta": 100000,
      "tie_word_embeddings": True,
      "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "<|im_start|>",
    "<|im_end|>",
    ("<|im_end|>",),
  ),
  "Yi-1.5-6B-Chat": Published(
    "llama",
    _chatml(),
    ("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    {**_LLAMA, "rope_theta": 5e6, "rope_scaling": None},
    "<|startoftext|>",
    "<|im_end|>",
    ("<|im_end|>",),
    sentencepiece=True,
  ),
  "Qwen2.5-0.5B-Instruct": Published(
    "qwen2",
    _chatml(),
    _QWEN_TOKENS,
    {**_QWEN, "use_mrope": False, "rope_theta": 1e6, "tie_word_embeddings": True},
    None,
    "<|im_end|>",
    ("<|im_end|>", "<|endoftext|>"),
    37,
  ),
  "Qwen2.5-7B-Instruct (YaRN)": Published(
    "qwen2",
    _chatml(),
    _QWEN_TOKENS,
    {
      **_QWEN,
      "rope_theta": 1e6,
      "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
    },
    None,
    "<|im_end|>",
    ("<|im_end|>", "<|endoftext|>"),
    37,
  ),
  "Qwen3-0.6B": Published(
    "qwen3",
    _chatml(think=True),
    (*_QWEN_TOKENS, "<think>", "</think>"),
    {
      **_QWEN,
      "sliding_window": None,
      "attention_bias": False,
      "head_dim": 16,
      "rope_theta": 1e6,
      "rope_scaling": None,
      "tie_word_embeddings": True,
    },
    None,
    "<|im_end|>",
    ("<|im_end|>", "<|endoftext|>"),
    37,
  ),
  "Phi-3-mini-4k-instruct": Published(
    "phi3",
    PHI3,
    _PHI3_TOKENS,
    {**_PHI, "sliding_window": 47, "rope_theta": 10000.0, "rope_scaling": None},
    "<s>",
    "<|endoftext|>",
    ("<|endoftext|>", "<|end|>"),
    21,
    sentencepiece=True,
  ),
  "Phi-3.5-mini-instruct": Published(
    "phi3",
    PHI3,
    _PHI3_TOKENS,
    {**_PHI, "sliding_window": 2620, "rope_theta": 10000.0, "rope_scaling": _LONG},
    "<s>",
    "<|endoftext|>",
    ("<|endoftext|>", "<|end|>"),
    21,
    sentencepiece=True,
  ),
  "phi-4": Published(
    "phi3",
    PHI4,
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
    {**_PHI, "sliding_window": None, "rope_theta": 250000, "rope_scaling": None},
    "<|endoftext|>",
    "<|im_end|>",
    ("<|endoftext|>", "<|im_end|>"),
    15,
  ),
  "Phi-4-mini-instruct": Published(
    "phi3",
    PHI4_MINI,
    ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    {
      **_PHI,
      "sliding_window": 262144,
      "rope_theta": 10000.0,
      "rope_scaling": {**_LONG, "short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 4.0]},
      "partial_rotary_factor": 0.75,
      "interpolate_factor": 1,
      "full_attn_mod": 1,
      "lm_head_bias": False,
      "mlp_bias": False,
      "tie_word_embeddings": True,
    },
    "<|endoftext|>",
    "<|endoftext|>",
    ("<|end|>", "<|endoftext|>"),
    35,
  ),
  "DeepSeek-R1-Distill-Qwen-1.5B": Published(
    "qwen2",
    R1,
    (
      "<｜end▁of▁sentence｜>",
      "<｜User｜>",
      "<｜Assistant｜>",
      "<｜begin▁of▁sentence｜>",
      "<think>",
    ),
    {**_QWEN, "use_mrope": False, "rope_theta": 10000},
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    ("<｜end▁of▁sentence｜>",),
    37,
  ),
  "DeepSeek-R1-Distill-Llama-8B": Published(
    "llama",
    R1,
    (
      "<｜begin▁of▁sentence｜>",
      "<｜end▁of▁sentence｜>",
      "<｜User｜>",
      "<｜Assistant｜>",
      "<think>",
    ),
    {**_LLAMA, "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE},
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    ("<｜end▁of▁sentence｜>",),
  ),
}


def tokenizer(model: Published) -> Any:
  """A small tokenizer of a model's kind."""
  from transformers import PreTrainedTokenizerFast

  tokens = list(model.tokens)
  if model.sentencepiece:
    backend = Tokenizer(models.BPE(unk_token=tokens[0], fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
      [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
      ]
    )
    alphabet, initial = [f"<0x{i:02X}>" for i in range(256)], sorted(set("".join(TEXT)))
    backend.train_from_iterator(
      [w for text in TEXT for w in text.split()],
      trainers.BpeTrainer(
        vocab_size=480, special_tokens=[*tokens, *alphabet], initial_alphabet=initial
      ),
    )
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in alphabet]
    backend = Tokenizer.from_str(json.dumps(spec))
  else:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
      pre_tokenizers.ByteLevel(add_prefix_space=False),
      decoders.ByteLevel(),
    )
    backend.train_from_iterator(
      TEXT,
      trainers.BpeTrainer(
        vocab_size=400, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
      ),
    )
  backend.add_tokens(
    [AddedToken(t, special=t not in ("<think>", "</think>"), normalized=False) for t in tokens]
  )
  named = (
    {"bos_token": model.bos, "eos_token": model.eos}
    if model.bos
    else {"eos_token": model.eos, "pad_token": tokens[0]}
  )
  fast_tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    clean_up_tokenization_spaces=False,
    **{k: v for k, v in named.items() if v},
  )
  fast_tokenizer.chat_template = model.template
  return fast_tokenizer


def make(name: str, directory: str | pathlib.Path, **sizes: int) -> Published:
  """Writes a small model of that name as its publisher's directory would be: the files, the fields,
  weights of its type."""
  import torch
  import transformers

  model, directory = MODELS[name], pathlib.Path(directory)
  model_tokenizer = tokenizer(model)
  model_tokenizer.save_pretrained(directory)
  ids = {
    k: model_tokenizer.convert_tokens_to_ids(v)
    for k, v in (("bos_token_id", model.bos), ("eos_token_id", model.eos))
    if v
  }
  fields = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": len(model_tokenizer) + model.padding,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    **ids,
    **model.fields,
    **sizes,
  }
  values = {
    "architectures": [f"{model.family.capitalize()}ForCausalLM"],
    "model_type": model.family,
    **fields,
    "torch_dtype": model.dtype,
    "transformers_version": "4.44.0",
  }
  kind = "ministral" if "layer_types" in model.fields else model.family
  config = transformers.CONFIG_MAPPING[kind].from_dict(
    {k: v for k, v in fields.items() if k not in ("attn_implementation", "auto_map")}
  )
  torch.manual_seed(0)
  made_model = transformers.AutoModelForCausalLM.from_config(config).float()
  with torch.no_grad():
    for parameter in made_model.parameters():
      if parameter.ndim == 1:  # biases and norms are constant at first
        parameter.add_(0.1 * torch.randn_like(parameter))
  made_model.to(getattr(torch, model.dtype)).save_pretrained(directory)
  (directory / "config.json").write_text(json.dumps(values, indent=2))
  ends = [model_tokenizer.convert_tokens_to_ids(t) for t in model.ends or (model.eos,)]
  generation = {
    "_from_model_config": True,
    **ids,
    "eos_token_id": ends if len(ends) > 1 else ends[0],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
  }
  (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
  return model
