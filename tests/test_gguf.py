"""GGUF files of every supported architecture, written as llama.cpp's converter writes them, and
broken ones."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clara_jax.checkpoints import gguf as reader
from clara_jax.checkpoints.convert import convert
from clara_jax.checkpoints.tensors import TensorFiles
from clara_jax.config import RopeScaling
from clara_jax.ops.rope import llama3_frequencies
from clara_jax.testing import published
from tests.helpers import refused

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")
MODELS = {
  "llama": "Llama-3.2-1B-Instruct",
  "qwen2": "Qwen2.5-0.5B-Instruct",
  "qwen3": "Qwen3-0.6B",
  "phi3": "Phi-3.5-mini-instruct",
}
LLAMA3 = RopeScaling("llama3", 32.0, 8192)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """A function from an architecture to the directory of a small model of it, in float32."""
  folder = tmp_path_factory.mktemp("bases")

  def base(name):
    directory = folder / name
    if not directory.exists():
      published.make(MODELS[name], folder / f"{name}-published", intermediate_size=64)
      convert(str(folder / f"{name}-published"), str(directory), "hf", dtype="float32")
    return directory

  return base


def interleaved(value, heads):
  """Rows of q or k as llama.cpp's rotary layout has them."""
  return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def write(base, path, kind="F32", change=None):
  """A Hugging Face directory as a GGUF file; `change` may add to or take from the metadata."""
  config, spec = (json.loads((base / f).read_text()) for f in ("config.json", "tokenizer.json"))
  arch = config["model_type"]
  files = TensorFiles(str(base))
  names = {ours: theirs for theirs, ours in reader._LAYER.items()} | {"mlp.gate_up_proj": "ffn_up"}
  writer = gguf.GGUFWriter(path, arch)
  heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
  head_dim = config.get("head_dim") or config["hidden_size"] // heads
  vocabulary = spec["model"]["vocab"]
  added = {t["content"]: t for t in spec["added_tokens"]}
  tokens = sorted(
    {**vocabulary, **{c: t["id"] for c, t in added.items()}}.items(), key=lambda x: x[1]
  )
  rows = config["vocab_size"]
  values = {
    "block_count": config["num_hidden_layers"],
    "context_length": config["max_position_embeddings"],
    "embedding_length": config["hidden_size"],
    "feed_forward_length": config["intermediate_size"],
    "attention.head_count": heads,
    "attention.head_count_kv": kv_heads,
    "attention.key_length": head_dim,
    "attention.value_length": head_dim,
    "rope.dimension_count": head_dim,
  }
  for name, value in values.items():
    writer.add_uint32(f"{arch}.{name}", value)
  writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
  writer.add_float32(f"{arch}.rope.freq_base", config["rope_theta"])
  listed = [t for t, _ in tokens] + [f"[PAD{i}]" for i in range(len(tokens), rows)]
  sorts = [
    (3 if added[t]["special"] else 4)
    if t in added
    else 6
    if t.startswith("<0x")
    else 5
    if t.startswith("[PAD")
    else 1
    for t in listed
  ]
  writer.add_token_list(listed)
  writer.add_token_types(sorts)
  if spec["model"]["byte_fallback"]:
    writer.add_tokenizer_model("llama")
    order = {a + b: i for i, (a, b) in reversed(list(enumerate(spec["model"]["merges"])))}
    writer.add_token_scores(
      [
        float(-order.get(t, -1)) if t in order else 0.0 if sorts[i] != 1 else -1e4
        for i, t in enumerate(listed)
      ]
    )
  else:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
  for name in ("bos", "eos"):
    if config.get(f"{name}_token_id") is not None:
      writer.add_uint32(f"tokenizer.ggml.{name}_token_id", config[f"{name}_token_id"])
  writer.add_chat_template(published.MODELS[MODELS[arch]].template)
  if arch == "phi3":
    writer.add_uint32(
      "phi3.rope.scaling.original_context_length", config["original_max_position_embeddings"]
    )
    writer.add_uint32("phi3.attention.sliding_window", config["sliding_window"])
    for name in ("long", "short"):
      writer.add_tensor(
        f"rope_factors_{name}.weight",
        np.array(config["rope_scaling"][f"{name}_factor"], np.float32),
      )
  if arch == "llama":
    plain = config["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    writer.add_tensor("rope_freqs.weight", plain / llama3_frequencies(plain, LLAMA3))
  for name in files:
    value = files.read(name)
    outside = {ours: theirs for theirs, ours in reader._OUTSIDE.items()}
    if name in outside:
      theirs = outside[name]
    else:
      layer, _, part = name.removeprefix("model.layers.").partition(".")
      module, _, last = part.rpartition(".")
      theirs = f"blk.{layer}.{names[module]}.{last}"
      if arch == "llama" and names[module] in ("attn_q", "attn_k"):
        value = interleaved(value, heads if names[module] == "attn_q" else kv_heads)
    sort = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
    writer.add_tensor(theirs, gguf.quants.quantize(value.astype(np.float32), sort), raw_dtype=sort)
  if change:
    change(writer, arch)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


@pytest.mark.parametrize(
  "arch, kind",
  [*((a, "F32") for a in MODELS), *(("llama", k) for k in ("F16", "BF16", "Q8_0", "Q4_0"))],
)
def test_every_architecture(bases, tmp_path, arch, kind):
  base = bases(arch)
  report = convert(write(base, tmp_path / "m.gguf", kind), str(tmp_path / "hf"), "hf", verify=True)
  assert (
    report.verify["exact"]
    and report.verify["max_abs_logit_difference"] < 1e-4
    and report.verify["reloaded_by"] == ["transformers"]
  )
  before, after = TensorFiles(str(base)), TensorFiles(str(tmp_path / "hf"))
  assert set(before) == set(after)
  for name in before:
    one, two = before.read(name), after.read(name)
    assert str(two.dtype) == {"F16": "float16", "BF16": "bfloat16"}.get(
      kind if one.ndim == 2 else "", "float32"
    )
    sort = gguf.GGMLQuantizationType[kind if one.ndim == 2 else "F32"]
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")) and kind == "Q4_0":
      continue  # blocks of other rows: compared through what is equal for all
    np.testing.assert_array_equal(
      gguf.quants.dequantize(gguf.quants.quantize(one, sort), sort),
      two.astype(np.float32),
      err_msg=name,
    )
  ours, theirs = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "hf", base))
  for field in (
    "model_type",
    "hidden_size",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "eos_token_id",
    "sliding_window",
    "num_key_value_heads",
    "max_position_embeddings",
  ):
    if field in ours and field in theirs and not (field == "sliding_window" and arch != "phi3"):
      assert ours[field] == theirs[field], field
  if arch == "llama":
    assert ours["rope_scaling"] == {
      "rope_type": "llama3",
      "factor": 32.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    }
  if arch == "phi3":
    assert ours["rope_scaling"]["long_factor"] == theirs["rope_scaling"]["long_factor"]


@pytest.mark.parametrize("arch", MODELS)
def test_the_tokenizer_and_its_template(bases, tmp_path, arch):
  from transformers import AutoTokenizer

  convert(write(bases(arch), tmp_path / "m.gguf"), str(tmp_path / "hf"), "hf")
  one, two = (AutoTokenizer.from_pretrained(d) for d in (bases(arch), tmp_path / "hf"))
  assert two.chat_template == published.MODELS[MODELS[arch]].template and (
    one.bos_token,
    one.eos_token,
  ) == (two.bos_token, two.eos_token)
  for text in (
    "Paris is the capital of France.",
    "Was Ada's  answer 12345, é 中?",
    "<|im_start|>user\nWho?<|im_end|>",
    " leading\n\n\ttab",
  ):
    assert one.encode(text, add_special_tokens=False) == two.encode(
      text, add_special_tokens=False
    ), text


def test_to_our_format_and_into_a_run(bases, tmp_path):
  convert(write(bases("qwen3"), tmp_path / "m.gguf"), str(tmp_path / "clara"), "clara", verify=True)
  convert(str(tmp_path / "clara"), str(tmp_path / "hf"), "hf")
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3"
  assert (tmp_path / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w, a: w.add_uint32(f"{a}.expert_count", 8), "llama.expert_count=8 is not supported"),
    (
      lambda w, a: w.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
      "blk.0.attn_sinks.weight: not a known tensor of a llama",
    ),
  ],
)
def test_what_is_not_supported_is_refused_by_name(bases, tmp_path, change, message):
  assert message in refused(
    "convert",
    write(bases("llama"), tmp_path / "m.gguf", change=change),
    tmp_path / "out",
    "--to",
    "hf",
  )
  assert not (tmp_path / "out").exists()


def test_another_architecture_and_other_commands(tmp_path, bases):
  writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gemma2")
  writer.add_uint32("gemma2.block_count", 1)
  writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  assert "general.architecture='gemma2' is not supported" in refused(
    "convert", tmp_path / "g.gguf", tmp_path / "out", "--to", "hf"
  )
  path = write(bases("llama"), tmp_path / "m.gguf")
  assert "clara convert FILE.gguf DIR --to clara" in refused("lens", "--checkpoint", path, "Who?")


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_one_line(bases, tmp_path_factory, data):
  """Cut anywhere, or with a byte of its header changed: refused in one line, or read."""
  folder = tmp_path_factory.mktemp("damaged")
  whole = open(write(bases("qwen2"), folder / "m.gguf"), "rb").read()
  if data.draw(st.booleans()):
    broken = whole[: data.draw(st.integers(4, len(whole) - 1))]
  else:
    at = data.draw(st.integers(4, 3000))
    broken = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
  (folder / "b.gguf").write_bytes(broken)
  from clara_jax.cli import main as cli

  assert cli.main(["convert", str(folder / "b.gguf"), str(folder / "out"), "--to", "hf"]) in (0, 2)
