"""What others publish: bases of every family, adapters of every kind, files as they lie there;
compared with transformers and PEFT."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import published as study
from clara_jax.checkpoints import families, formats
from clara_jax.checkpoints.convert import convert
from clara_jax.checkpoints.keymap import KeyMapError
from clara_jax.checkpoints.workdir import CheckpointError
from clara_jax.config import ConfigError
from clara_jax.model import Clara
from clara_jax.testing import published
from clara_jax.training import config_file
from tests.helpers import refused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
CONFIG = study.CONFIG


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  """A function from a name to the directory of that small model."""
  folder = tmp_path_factory.mktemp("bases")

  def base(name):
    directory = folder / name
    if not directory.exists():
      published.make(name, directory)
    return str(directory)

  return base


@pytest.fixture
def base(bases, tmp_path):
  """A copy of a small Llama 2, to be harmed."""
  shutil.copytree(bases("Llama-2-7b-chat"), tmp_path / "base")
  return tmp_path / "base"


# ---- bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published.MODELS)
def test_logits_and_the_way_back(name, bases, tmp_path):
  """Logits equal transformers'; Hugging Face -> clara -> Hugging Face gives the same tensors and
  files."""
  difference, scale = study.logit_difference(bases(name))
  assert difference < 1e-4 * max(1, scale)
  assert study.round_trip(bases(name), str(tmp_path)) == []


@pytest.mark.real
def test_one_base_through_every_command(bases, tmp_path):
  """No BOS, a padded embedding, a thinking block: only --config.base is given
  (benchmarks/published.py does it with all)."""
  assert study.learned(bases("Qwen3-0.6B"), str(tmp_path)) == {"evaluate": 1.0, "ask": 1.0}
  for role in ("upstream", "peft"):
    study.run("convert", f"{tmp_path}/joint", f"{tmp_path}/{role}", "--to", role, "--verify")
    report = study.run(
      "convert",
      f"{tmp_path}/{role}",
      f"{tmp_path}/{role}-again",
      "--to",
      "clara",
      "--base",
      bases("Qwen3-0.6B"),
      "--verify",
    )
    assert report["verify"]["exact"]
  merged = study.run(
    "convert",
    f"{tmp_path}/joint",
    f"{tmp_path}/merged",
    "--to",
    "hf",
    "--role",
    "generator",
    "--verify",
  )
  assert merged["verify"]["exact"] and merged["verify"]["max_abs_logit_difference"] < 1e-3
  values = json.loads((tmp_path / "merged" / "config.json").read_text())
  assert values["model_type"] == "qwen3" and values["rope_theta"] == 1e6
  assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["top_p"] == 0.9


def test_the_base_is_the_shape(bases):
  config = config_file.load_config(
    f"{CONFIG}:scp", [f"--config.base={bases('Mistral-7B-Instruct-v0.1')}"]
  )
  assert (
    config.clara.model.rope_theta == 1e4
    and config.clara.model.sliding_window == 24
    and config.clara.model.remat == "full"
  )
  assert config.clara.model.dtype == "bfloat16"
  padded = config_file.load_config(f"{CONFIG}:scp", [f"--config.base={bases('Qwen3-0.6B')}"])
  rows = json.loads(open(f"{bases('Qwen3-0.6B')}/config.json").read())["vocab_size"]
  assert padded.clara.model.vocab_size == rows - 37
  # The number in config.json is no contradiction, others are.
  assert (
    config_file.load_config(
      f"{CONFIG}:scp",
      [f"--config.base={bases('Qwen3-0.6B')}", f"--config.clara.model.vocab_size={rows}"],
    )
    == padded
  )


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("rope_theta", "1e6", "clara.model.rope_theta=1000000.0, but .* has 10000.0"),
    ("sliding_window", "None", "sliding_window=None, but .* has 24"),
    ("vocab_size", "31", "vocab_size=31, but"),
    ("qk_norm", "True", "qk_norm=True, but .* has False"),
    ("wdith", "4", "wdith: unknown field"),
    ("width", "'a'", "expected int"),
  ],
)
def test_a_contradiction_names_both_values(bases, field, value, message):
  with pytest.raises(ConfigError, match=message):
    config_file.load_config(
      f"{CONFIG}:scp",
      [
        f"--config.base={bases('Mistral-7B-Instruct-v0.1')}",
        f"--config.clara.model.{field}={value}",
      ],
    )


def test_mistral_7b_is_not_another_mistral(bases):
  with pytest.raises(ConfigError, match="clara.model.* but .*zephyr-7b-beta has"):
    config_file.load_config(
      "configs/mistral_7b.py:scp", [f"--config.base={bases('zephyr-7b-beta')}"]
    )
  with pytest.raises(ConfigError, match="config.base: name the directory"):
    config_file.load_config(f"{CONFIG}:scp")


def test_neutral_fields_and_unknown_ones(base):
  values = json.loads((base / "config.json").read_text())
  neutral = {
    "do_sample": True,
    "temperature": 0.6,
    "use_sliding_window": False,
    "use_mrope": False,
    "is_llama_config": True,
    "rope_interleaved": False,
    "max_length": 4096,
    "unsloth_fixed": True,
    "task_specific_params": None,
  }
  (base / "config.json").write_text(json.dumps({**values, **neutral}))
  families.model_config(str(base))
  (base / "config.json").write_text(json.dumps({**values, "residual_multiplier": 0.5}))
  line = refused("convert", base, base.parent / "out", "--to", "clara")
  assert (
    "residual_multiplier=0.5 is not known" in line and "--allow-config residual_multiplier" in line
  )
  study.run(
    "convert",
    str(base),
    str(base.parent / "out"),
    "--to",
    "clara",
    "--allow-config",
    "residual_multiplier",
  )
  (base / "config.json").write_text(json.dumps({**values, "attention_bias": True}))
  assert "attention_bias=True is not supported" in refused(
    "convert", base, base.parent / "x", "--to", "clara", "--allow-config", "attention_bias"
  )


def test_rope_fields_win_as_in_transformers(base):
  """A v5 `rope_parameters` beside a README's `rope_scaling`."""
  values = json.loads((base / "config.json").read_text())
  both = {
    **values,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
  }
  (base / "config.json").write_text(json.dumps(both))
  read, theirs = (
    families.model_config(str(base)),
    transformers.AutoConfig.from_pretrained(base).rope_parameters,
  )
  assert (
    theirs["rope_type"] == read.rope_scaling.kind == "yarn"
    and read.rope_theta == theirs["rope_theta"]
  )
  difference, scale = study.logit_difference(str(base))
  assert difference < 1e-4 * scale


@pytest.mark.parametrize(
  "scaling",
  [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
      "rope_type": "yarn",
      "factor": 8.0,
      "original_max_position_embeddings": 16,
      "beta_fast": 24.0,
      "beta_slow": 2.0,
      "truncate": False,
    },
    {
      "rope_type": "yarn",
      "factor": 2.0,
      "original_max_position_embeddings": 32,
      "attention_factor": 0.8,
    },
    {
      "rope_type": "yarn",
      "factor": 2.0,
      "original_max_position_embeddings": 32,
      "mscale": 1.2,
      "mscale_all_dim": 0.7,
    },
    {"type": "linear", "factor": 3.0},
  ],
)
def test_scaled_rope(base, scaling):
  values = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps({**values, "rope_scaling": scaling}))
  difference, _ = study.logit_difference(str(base))
  assert difference < 1e-4


def test_windows_of_some_layers_hold_in_answers_and_in_what_explains_them(bases):
  from clara_jax.batch import Tokens
  from clara_jax.inference.generate import make_generate

  checkpoint = formats.load(bases("Ministral-8B-Instruct-2410"), dtype="float32")
  assert checkpoint.model.config.model.full_attention_layers == (0,)
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    bases("Ministral-8B-Instruct-2410"), dtype=torch.float32
  ).eval()
  ids = np.random.default_rng(0).integers(9, 300, (1, 70))
  expected = reference.generate(
    torch.tensor(ids),
    attention_mask=torch.ones(ids.shape, dtype=torch.long),
    max_new_tokens=20,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )[0, 70:].tolist()
  answer_ids = make_generate(checkpoint.model, 20, (-1,), 0, None)(
    checkpoint.weights, Tokens(jnp.asarray(ids), jnp.array([70])), None
  )
  assert answer_ids[0].tolist() == expected


def test_a_base_that_is_trained_on_stays_what_it_is(bases, tmp_path):
  """`pretrain` from a Hugging Face model: family and generation config are there on the way out."""
  row = {"docs": ["Ada."], "question": ["Who?"], "answers": ["Ada."]}
  (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
  sizes = {
    **study.SIZES,
    "data.rows": f'("{tmp_path}/rows.jsonl",)',
    "train.steps": 1,
    "clara.decoder_max_length": 128,
    "data.bucket": 128,
  }
  base = f"--config.base={bases('Llama-3.1-8B-Instruct')}"
  study.run(
    "train",
    "--config",
    f"{CONFIG}:pretrain",
    "--workdir",
    str(tmp_path / "run"),
    base,
    "--dtype",
    "float32",
    *(f"--config.{k}={v}" for k, v in sizes.items()),
  )
  study.run("convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf")
  values = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (
    values["model_type"] == "llama"
    and values["rope_scaling"]["rope_type"] == "llama3"
    and values["torch_dtype"] == "float32"
  )
  assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["top_p"] == 0.9


@pytest.mark.parametrize(
  "file, content, message",
  [
    ("config.json", {"rope_theta": [1]}, "rope_theta=.*expected a number"),
    ("config.json", {"rope_theta": 0}, "rope_theta=0.*above 0"),
    ("config.json", {"rope_scaling": {"rope_type": ["a"]}}, "config.json"),
    ("config.json", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0"),
    ("config.json", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
    ("config.json", b"\xff\xfe\x00", "config.json: not UTF-8 text"),
    ("config.json", [], "config.json: expected an object"),
    ("tokenizer.json", [], "tokenizer.json: expected an object"),
    ("tokenizer_config.json", None, "tokenizer_config.json: expected an object"),
    ("tokenizer.json", b"", "tokenizer.json: not JSON"),
  ],
)
def test_broken_files_are_one_line_with_their_name(base, file, content, message):
  import re

  if isinstance(content, bytes):
    (base / file).write_bytes(content)
  elif isinstance(content, dict):
    (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **content}))
  else:
    (base / file).write_text(json.dumps(content))
  assert re.search(message, refused("convert", base, base.parent / "out", "--to", "hf"))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_float16_is_kept_or_cast(bases, tmp_path, dtype, capsys):
  from safetensors import safe_open

  more = ["--dtype", dtype] if dtype else []
  study.run(
    "convert", bases("Llama-2-7b-chat"), str(tmp_path / "hf"), "--to", "hf", "--verify", *more
  )
  with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
    assert str(file.get_tensor("model.norm.weight").dtype) == f"torch.{dtype or 'float16'}"
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == (
    dtype or "float16"
  )
  formats.load(bases("Llama-2-7b-chat"), dtype=dtype)
  assert ("are rounded to bfloat16" in capsys.readouterr().err) == (dtype != "float32")


def test_buffers_and_files_that_transformers_does_not_read(base, tmp_path):
  from safetensors.numpy import load_file, save_file

  tensors = load_file(base / "model.safetensors")
  for i in range(2):
    tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  save_file(tensors, base / "model.safetensors")
  save_file({"norm.weight": np.ones(32, np.float32)}, base / "consolidated.safetensors")
  convert(str(base), str(tmp_path / "out"), "clara", verify=True)
  tensors["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)
  save_file(tensors, base / "model.safetensors")
  with pytest.raises(KeyMapError, match="self_attn.sinks: not a known tensor"):
    convert(str(base), str(tmp_path / "x"), "clara")


@pytest.mark.parametrize(
  "name, message",
  [
    ("pytorch_model.bin", "are PyTorch files, which are not read: transformers writes safetensors"),
    ("model.Q4_K_M.gguf", "clara convert DIR/model"),
    ("consolidated.safetensors", "consolidated.safetensors is not a file that transformers reads"),
  ],
)
def test_other_weights_are_named_with_what_to_do(base, name, message):
  os.rename(base / "model.safetensors", base / name)
  assert message in refused("convert", base, base.parent / "out", "--to", "clara")


def test_a_config_that_counts_other_words_than_there_are(base):
  values = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps({**values, "vocab_size": 7}))
  assert "says vocab_size=7" in refused("convert", base, base.parent / "out", "--to", "clara")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_with_a_token_that_has_no_row(base, tmp_path, file):
  """Published fine-tunes add a [PAD] to the tokenizer alone."""
  if file == "tokenizer.json":
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
  else:
    values = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**values, "pad_token": "[PAD]"}))
  words = len(transformers.AutoTokenizer.from_pretrained(base))
  checkpoint = formats.load(str(base), dtype="float32")
  assert (
    checkpoint.model.config.model.vocab_size
    == words
    == checkpoint.prompt_tokenizer.tokenizer.pad_token_id + 1
  )
  assert not np.asarray(checkpoint.weights["base"]["embedding"])[words - 1].any()


def test_hub_ids(base, tmp_path, monkeypatch):
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  snapshot = tmp_path / "hub" / "models--me--mine" / "snapshots" / "abc"
  shutil.copytree(base, snapshot)
  (snapshot.parents[1] / "refs").mkdir()
  (snapshot.parents[1] / "refs" / "main").write_text("abc")
  study.run("convert", "me/mine", str(tmp_path / "out"), "--to", "clara")
  assert config_file.load_config(f"{CONFIG}:scp", ["--config.base=me/mine"]).base == str(snapshot)
  assert "fetch it with: hf download me/other" in refused(
    "convert", "me/other", tmp_path / "x", "--to", "clara"
  )
  assert "no such checkpoint" in refused(
    "convert", "nowhere at all", tmp_path / "x", "--to", "clara"
  )


@pytest.mark.parametrize(
  "name",
  [
    "run#1",
    "what?",
    "100%",
    "run%20a",
    "base[v1]",
    "a b",
    "café",
    "semi;colon",
    "star*",
    "q'uote",
    "am&p",
    "~tilde",
  ],
)
def test_any_path(bases, tmp_path, name):
  report = convert(bases("SmolLM2-135M-Instruct"), str(tmp_path / "x" / name), "clara", verify=True)
  assert report.verify["exact"] and os.listdir(tmp_path / "x") == [name]
  assert convert(str(tmp_path / "x" / name), str(tmp_path / "y" / name), "hf", verify=True).verify[
    "exact"
  ]
  formats.load(str(tmp_path / "y" / name))


# ---- adapters ------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(5, 300, (2, 12))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(directory, base, change=None, **fields):
  """A random adapter by PEFT; its logits."""
  peft = pytest.importorskip("peft")
  torch.manual_seed(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  peft_model = peft.get_peft_model(
    model,
    peft.LoraConfig(
      **{"r": 4, "lora_alpha": 7, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **fields}
    ),
  )
  with torch.no_grad():
    for name, value in peft_model.named_parameters():
      if "lora_" in name or "modules_to_save" in name:
        value.add_(0.05 * torch.randn_like(value))
  peft_model.save_pretrained(directory)
  # What a user of PEFT gets who loads it.
  model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  with torch.no_grad():
    return peft.PeftModel.from_pretrained(model, directory).eval()(torch.tensor(IDS)).logits.numpy()


def logits(directory, base):
  opened = formats.open_checkpoint(str(directory), base, "float32")
  model, weights = Clara(opened.config), formats.on_device(opened)
  hidden, _ = model.hidden(weights, "generator", model.embed(weights, jnp.asarray(IDS)))
  return np.asarray(model.logits(weights, hidden))[..., : opened.config.model.vocab_size]


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6}},
    {"alpha_pattern": {"q_proj": 3, "layers.0.mlp.up_proj": 1}, "use_rslora": True},
    {"rank_pattern": {"^model.layers.0.*": 2}, "alpha_pattern": {".*v_proj": 9}},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": r"model\.layers\.0\.(self_attn|mlp)\.(q|up)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
  ],
  ids=lambda f: ",".join(f) or "plain",
)
def test_what_peft_computes_is_computed(bases, tmp_path, fields):
  base = bases("TinyLlama-1.1B-Chat-v1.0")
  expected = adapter(tmp_path / "adapter", base, **fields)
  computed = logits(tmp_path / "adapter", base)
  np.testing.assert_allclose(computed, expected[..., : computed.shape[-1]], rtol=0, atol=1e-4)
  if fields and not {"alpha_pattern", "layers_to_transform", "modules_to_save"} & set(fields):
    return
  # And back: another adapter perhaps, the same function.
  convert(
    str(tmp_path / "adapter"),
    str(tmp_path / "ours"),
    "clara",
    base=base,
    dtype="float32",
    verify=True,
  )
  report = convert(
    str(tmp_path / "ours"), str(tmp_path / "again"), "peft", role="generator", verify=True
  )
  assert report.verify["max_abs_logit_difference"] < 1e-4 and "peft" in report.verify["reloaded_by"]
  merged = convert(
    str(tmp_path / "ours"),
    str(tmp_path / "merged"),
    "hf",
    role="generator",
    dtype="float32",
    verify=True,
  )
  assert merged.verify["max_abs_logit_difference_unmerged"] < 1e-3


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ({"alora_invocation_tokens": [33, 41]}, r"alora_invocation_tokens=\[33, 41\]"),
    ({"use_dora": True}, "use_dora=True"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"modules_to_save": ["norm"]}, "modules_to_save names 'norm'"),
    (
      {"use_something_new": 3},
      "use_something_new=3 is not known.*--allow-config use_something_new",
    ),
    ({"r": "8"}, "r='8': expected a number"),
    ({"target_modules": ["q_proj"]}, "has LoRA weights, but adapter_config.json does not name it"),
    ({"r": 8}, "gives it rank 8"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
  ],
)
def test_what_cannot_be_computed_is_refused_by_its_field(bases, tmp_path, fields, message):
  base = bases("TinyLlama-1.1B-Chat-v1.0")
  adapter(tmp_path / "adapter", base)
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
  with pytest.raises((ConfigError, KeyMapError), match=message):
    formats.open_checkpoint(str(tmp_path / "adapter"), base)
  if "use_something_new" in fields:
    formats.open_checkpoint(str(tmp_path / "adapter"), base, allow=("use_something_new",))


def test_an_adapter_of_a_base_that_is_not_here(bases, tmp_path):
  adapter(tmp_path / "adapter", bases("TinyLlama-1.1B-Chat-v1.0"))
  file = tmp_path / "adapter" / "adapter_config.json"
  file.write_text(
    json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "me/nothing"})
  )
  with pytest.raises(
    CheckpointError, match="its base 'me/nothing' is not a directory here; name one with --base"
  ):
    formats.open_checkpoint(str(tmp_path / "adapter"))


def test_upstream_files_that_were_saved_with_gradients(golden, tmp_path):
  for name in ("ckpt_stage2", "tiny_mistral"):
    shutil.copytree(golden / name, tmp_path / name, copy_function=shutil.copyfile)
    os.chmod(tmp_path / name, 0o755)
  for name in ("adapters.pth", "decoder_first_last_layers.pth"):
    tree = torch.load(tmp_path / "ckpt_stage2" / name, weights_only=True)

    def grown(value):
      return (
        {k: grown(v) for k, v in value.items()}
        if isinstance(value, dict)
        else value.float().requires_grad_()
      )

    torch.save(grown(tree), tmp_path / "ckpt_stage2" / name)
  convert(str(tmp_path / "ckpt_stage2"), str(tmp_path / "ours"), "clara", verify=True)


def test_trained_memory_tokens_are_not_rounded_on_their_way_out(golden, tmp_path):
  """A bfloat16 base; the memory tokens that were trained in float32 come back to the bit, the rest
  stays what it is."""
  from safetensors.numpy import load_file, save_file

  convert(
    str(golden / "ckpt_stage2"), str(tmp_path / "peft"), "peft", base=str(golden / "tiny_mistral")
  )
  for role in ("compressor", "query_reasoner", "generator"):
    file = tmp_path / "peft" / role / "clara_special_tokens.safetensors"
    tensors = load_file(file)
    tensors["memory_embedding"] = tensors["memory_embedding"].astype(np.float32) * 1.001
    save_file(tensors, file)
  convert(
    str(tmp_path / "peft"),
    str(tmp_path / "ours"),
    "clara",
    base=str(golden / "tiny_mistral"),
    dtype="bfloat16",
  )
  report = convert(str(tmp_path / "ours"), str(tmp_path / "up"), "upstream", verify=True)
  assert report.verify["exact"]
  again = formats.open_checkpoint(str(tmp_path / "up"), str(golden / "tiny_mistral"))
  np.testing.assert_array_equal(
    np.asarray(again.groups["memory_embedding"]), tensors["memory_embedding"]
  )
