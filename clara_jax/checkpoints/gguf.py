"""GGUF files (llama.cpp): weights, configuration, tokenizer and chat template of Llama, Mistral,
Qwen2, Qwen3 and Phi-3 models.

The library `gguf` reads the file and dequantizes, one tensor at a time. What llama.cpp's converter
did is undone: it renames tensors, turns the rows of Llama's q and k (its rotary layout is
interleaved), and writes Llama 3's RoPE scaling as a tensor of divisors. A GGUF has no
tokenizer.json; the tokenizer is rebuilt from its tokens, merges or scores, and the name of its
pre-tokenizer.
"""

import contextlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from clara_jax.checkpoints import families, huggingface
from clara_jax.checkpoints.formats import LazyCheckpoint
from clara_jax.checkpoints.keymap import EMBEDDING, HEAD, KeyMapError
from clara_jax.checkpoints.lazy import Cast
from clara_jax.config import ClaraConfig, ConfigError, RopeScaling
from clara_jax.model import Clara
from clara_jax.ops.rope import llama3_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3")
_OUTSIDE = {
  "token_embd.weight": EMBEDDING,
  "output.weight": HEAD,
  "output_norm.weight": "model.norm.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_qkv": "self_attn.qkv_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# What published models scale by: original context, factor; low and high are 1 and 4 in all of them.
_LLAMA3 = tuple(RopeScaling("llama3", factor, 8192) for factor in (8.0, 32.0, 16.0, 4.0))

_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}|"
)
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_SPLIT = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _WORDS
_QWEN_SPLIT = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _WORDS
# By the names that llama.cpp gives to pre-tokenizers; None is GPT-2's, which the byte-level step
# has itself.
_SPLITS: dict[str, str | None] = {
  **dict.fromkeys(("gpt-2", "smollm"), None),
  **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe"), _LLAMA3_SPLIT),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN_SPLIT),
  "tekken": _CASED.replace("{end}", "") + r"\p{N}" + _SLASHES,
  "gpt-4o": _CASED.replace("{end}", f"{_CONTRACTION}?") + r"\p{N}{1,3}" + _SLASHES,
}
# A piece that is a token is not merged anew.
_WHOLE_PIECES = ("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe", "tekken", "gpt-4o")
_CONTROL, _USER_DEFINED = 3, 4


def is_gguf(path: str) -> bool:
  """Whether a path is a GGUF file, by its first bytes or its name."""
  if not os.path.isfile(path):
    return False
  with open(path, "rb") as file:
    return file.read(4) == b"GGUF" or str(path).endswith(".gguf")


@contextlib.contextmanager
def opened(path: str) -> Iterator[LazyCheckpoint]:
  """A GGUF file as a plain model; its tokenizer and its config.json lie in a temporary directory.

  Raises:
    ConfigError: the library is not installed; an architecture, a field or a tokenizer that is not
      supported; by name.
    KeyMapError: not a whole GGUF file, or a tensor that is missing or unknown.
  """
  try:
    import gguf
  except ImportError:
    raise ConfigError(
      f"{path}: GGUF files need the library gguf: pip install 'clara_jax[gguf]'"
    ) from None
  try:
    _check_header(path)
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    stored_tensors = {tensor.name: tensor for tensor in reader.tensors}
  except Exception as error:  # the library raises whatever numpy and struct do
    raise KeyMapError(
      f"{path}: not a whole GGUF file: {' '.join(str(error).split())[:200] or type(error).__name__}"
    ) from None
  types = {t.tensor_type.name for t in stored_tensors.values() if len(t.shape) == 2}
  matrices = (
    {"F16": "float16", "BF16": "bfloat16"}.get(next(iter(types)), "float32")
    if len(types) == 1
    else "float32"
  )
  try:
    config = _config(path, values, stored_tensors) | {"torch_dtype": matrices}
  except KeyError as error:
    raise ConfigError(f"{path}: the field {error} is missing") from None
  tensors: dict[str, Any] = {}
  for name, tensor in stored_tensors.items():
    if name not in _ROPE:
      ours = _name(name, config["model_type"], path)
      heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
      }.get(ours.rsplit(".", 2)[-2])
      leaf = _Tensor(path, tensor, heads if config["model_type"] == "llama" else None)
      tensors[ours] = Cast(leaf, matrices) if len(leaf.shape) == 2 else leaf
  with tempfile.TemporaryDirectory(prefix="clara-gguf-") as folder:
    for name, content in (
      (families.CONFIG_FILE, config),
      (
        families.GENERATION_FILE,
        {
          k: config[k]
          for k in ("bos_token_id", "eos_token_id", "pad_token_id")
          if config[k] is not None
        },
      ),
    ):
      with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    tokenizer(path, values).save_pretrained(folder)
    model = Clara(ClaraConfig(families.model_config(folder)))
    yield LazyCheckpoint(
      path,
      "gguf",
      model.config,
      "base",
      {},
      huggingface.base_leaves(model, tensors, path),
      None,
      None,
      folder,
      folder,
    )


# Bytes of a value by its type; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _check_header(path: str) -> None:
  """Walks the header within the file's size: the library believes every count, and a wrong one
  takes all memory.

  Raises:
    ValueError: a count or a length leads out of the file, or a type is unknown.
  """
  size = os.path.getsize(path)
  with open(path, "rb") as file:

    def number(form: str) -> int:
      return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def skip(count: int) -> None:
      if count > size - file.tell():
        raise ValueError(f"{count} bytes at {file.tell()}, the file has {size}")
      file.seek(count, os.SEEK_CUR)

    def value(kind: int, depth: int = 0) -> None:
      if kind == 8:
        skip(number("<Q"))
      elif kind == 9 and depth < 2:
        of, count = number("<I"), number("<Q")
        if of in _SIZES:
          skip(count * _SIZES[of])
        else:
          for _ in range(count):
            value(of, depth + 1)
      elif kind in _SIZES:
        skip(_SIZES[kind])
      else:
        raise ValueError(f"a value of the type {kind}")

    skip(4)
    if (version := number("<I")) not in (2, 3):
      raise ValueError(f"version {version}, expected 2 or 3")
    tensors, fields = number("<Q"), number("<Q")
    for _ in range(fields):
      skip(number("<Q"))
      value(number("<I"))
    for _ in range(tensors):
      skip(number("<Q"))
      if (dimensions := number("<I")) > 4:
        raise ValueError(f"a tensor of {dimensions} dimensions")
      skip(8 * dimensions + 12)


class _Tensor:
  """A tensor that is dequantized when it is indexed; see `lazy.py`."""

  def __init__(self, path: str, tensor: Any, heads: int | None):
    self._path, self._tensor, self._heads = path, tensor, heads
    self.shape, self.dtype = tuple(int(n) for n in tensor.shape[::-1]), np.dtype(np.float32)

  def __getitem__(self, index):
    import gguf

    try:
      value = np.asarray(
        gguf.quants.dequantize(self._tensor.data, self._tensor.tensor_type), np.float32
      ).reshape(self.shape)
    except Exception as error:
      kind = self._tensor.tensor_type.name
      raise KeyMapError(
        f"{self._path}: {self._tensor.name} of the type {kind} cannot be dequantized: {error}"
      ) from None
    if not np.isfinite(value).all():
      raise KeyMapError(f"{self._path}: {self._tensor.name} holds NaN or infinity")
    if self._heads:  # pairs lie side by side there, in two halves here
      value = value.reshape(self._heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(self.shape)
    return value[index]


def _name(name: str, family: str, path: str) -> str:
  """A tensor's Hugging Face name."""
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
  if not match or match[2] not in _LAYER:
    raise KeyMapError(f"{path}: {name}: not a known tensor of a {family}")
  ours = "mlp.gate_up_proj" if family == "phi3" and match[2] == "ffn_up" else _LAYER[match[2]]
  return f"model.layers.{match[1]}.{ours}.{match[3]}"


def _config(path: str, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json of a GGUF file's model."""
  family = values["general.architecture"]
  if family not in ARCHITECTURES:
    raise ConfigError(
      f"{path}: general.architecture={family!r} is not supported; expected one of "
      f"{list(ARCHITECTURES)}"
    )
  if values.get(f"{family}.expert_count"):
    raise ConfigError(
      f"{path}: {family}.expert_count={values[f'{family}.expert_count']!r} is not supported; "
      f"expected no experts"
    )

  def field(name: str, *default: Any) -> Any:
    value = values.get(f"{family}.{name}", *default) if default else values[f"{family}.{name}"]
    # Stored as float32: 1e-05, not 9.9999997e-06.
    return float(str(np.float32(value))) if isinstance(value, float) else value

  heads, width = field("attention.head_count"), field("embedding_length")
  kv_heads, feed_forward = field("attention.head_count_kv", heads), field("feed_forward_length")
  if isinstance(heads, list) or isinstance(kv_heads, list) or isinstance(feed_forward, list):
    raise ConfigError(
      f"{path}: heads or feed_forward_length that differ between layers are not supported"
    )
  head_dim = field("attention.key_length", width // heads)
  if field("attention.value_length", head_dim) != head_dim:
    raise ConfigError(
      f"{path}: {family}.attention.value_length={field('attention.value_length')!r} is not "
      f"supported; expected {head_dim}"
    )
  theta, positions = field("rope.freq_base", 10_000.0), field("context_length")
  config = {
    "architectures": [families.ARCHITECTURES[family]],
    "model_type": family,
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": width,
    "num_hidden_layers": field("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    "head_dim": head_dim,
    "intermediate_size": feed_forward,
    "hidden_act": "silu",
    "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
    "rope_theta": theta,
    "max_position_embeddings": positions,
    "tie_word_embeddings": "output.weight" not in tensors,
    "rope_scaling": _scaling(path, family, field, tensors, theta, head_dim),
  }
  if family == "phi3":
    config |= {
      "sliding_window": field("attention.sliding_window", 0) or None,
      "partial_rotary_factor": field("rope.dimension_count") / head_dim,
      "original_max_position_embeddings": field("rope.scaling.original_context_length", positions),
    }
  for token, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
    # Null, or a class of transformers would have its own.
    config[f"{token}_token_id"] = values.get(f"tokenizer.ggml.{name}_token_id")
  return config


def _scaling(
  path: str, family: str, field: Any, tensors: Mapping[str, Any], theta: float, head_dim: int
) -> dict[str, Any] | None:
  """`rope_scaling` of the config.json."""
  if "rope_factors_long.weight" in tensors:
    short, long = (
      np.asarray(tensors[f"rope_factors_{n}.weight"].data, np.float64).tolist()
      for n in ("short", "long")
    )
    factor = field("rope.scaling.attn_factor", None)
    return {
      "type": "longrope",
      "short_factor": short,
      "long_factor": long,
      **({"attention_factor": factor} if factor else {}),
    }
  if "rope_freqs.weight" in tensors:
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
    for scaling in _LLAMA3:
      if divisors.shape == plain.shape and np.allclose(
        plain / llama3_frequencies(plain, scaling), divisors, rtol=1e-4
      ):
        return {
          "rope_type": "llama3",
          "factor": scaling.factor,
          "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": scaling.original_max_positions,
        }
    raise ConfigError(
      f"{path}: rope_freqs.weight has divisors that no published Llama 3 has; convert the Hugging "
      f"Face model instead"
    )
  kind = field("rope.scaling.type", "none")
  if kind in (None, "none"):
    return None
  if kind not in ("linear", "yarn"):
    raise ConfigError(
      f"{path}: {family}.rope.scaling.type={kind!r} is not supported; expected 'none', 'linear' "
      f"or 'yarn'"
    )
  return {
    "rope_type": kind,
    "factor": field("rope.scaling.factor"),
    **(
      {"original_max_position_embeddings": field("rope.scaling.original_context_length")}
      if kind == "yarn"
      else {}
    ),
  }


def tokenizer(path: str, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
  """The tokenizer of a GGUF file, with its chat template.

  Raises:
    ConfigError: its kind is not supported, by name.
  """
  kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
  tokens = values.get("tokenizer.ggml.tokens")
  if kind not in ("gpt2", "llama") or not tokens:
    raise ConfigError(
      f"{path}: tokenizer.ggml.model={kind!r} is not supported; expected 'gpt2' or 'llama'"
    )
  vocabulary = {token: number for number, token in enumerate(tokens)}
  if kind == "gpt2":
    backend = _byte_level(path, vocabulary, values["tokenizer.ggml.merges"], pre)
  else:
    backend = _sentencepiece(vocabulary, tokens, values)
  for token, sort in zip(tokens, values.get("tokenizer.ggml.token_type") or (), strict=False):
    # A [PAD…] token only fills the vocabulary up.
    if sort in (_CONTROL, _USER_DEFINED) and not re.fullmatch(r"\[PAD\d+\]|<pad\d+>", token):
      backend.add_tokens([AddedToken(token, special=sort == _CONTROL, normalized=False)])
  named = {
    f"{name}_token": tokens[values[f"tokenizer.ggml.{field}_token_id"]]
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    if 0 <= values.get(f"tokenizer.ggml.{field}_token_id", -1) < len(tokens)
  }
  fast_tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
  )
  fast_tokenizer.chat_template = values.get("tokenizer.chat_template")
  return fast_tokenizer


def _byte_level(
  path: str, vocabulary: dict[str, int], merges: list[str], pre: str | None
) -> Tokenizer:
  if pre not in _SPLITS:
    raise ConfigError(
      f"{path}: tokenizer.ggml.pre={pre!r} is not supported; expected one of {sorted(_SPLITS)}"
    )
  backend = Tokenizer(
    models.BPE(
      vocabulary, [tuple(m.split(" ")) for m in merges], ignore_merges=pre in _WHOLE_PIECES
    )
  )
  split = _SPLITS[pre]
  steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
  if pre == "smollm":
    steps = [pre_tokenizers.Digits(individual_digits=True)]
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
  )
  if split == _QWEN_SPLIT:
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(
  vocabulary: dict[str, int], tokens: list[str], values: Mapping[str, Any]
) -> Tokenizer:
  sorts = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
  control = [t for t, sort in zip(tokens, sorts, strict=True) if sort != 1]
  scores = dict(zip(tokens, values["tokenizer.ggml.scores"], strict=True))
  unknown = values.get("tokenizer.ggml.unknown_token_id", 0)
  backend = Tokenizer(
    models.BPE(
      vocabulary,
      generate_merges(vocabulary, scores, control),
      unk_token=tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = values.get("tokenizer.ggml.add_space_prefix", True)
  backend.normalizer = normalizers.Sequence(
    [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ]
  )
  return backend
