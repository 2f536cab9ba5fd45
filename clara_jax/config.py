"""What a run is, as frozen dataclasses.

A config file (see `configs/`) fills an `ml_collections.ConfigDict`; `from_config_dict` turns it
into these classes and refuses unknown or contradictory fields by name, so that a typing error costs
a second and not a run.
"""

import dataclasses
import datetime
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict as config_dict_lib

from clara_jax.errors import InputError

Role = Literal["compressor", "query_reasoner", "generator"]
ROLES: tuple[Role, ...] = ("compressor", "query_reasoner", "generator")

# Linear layers that carry LoRA; 'qkv' and 'gate_up' are those of models with fused projections.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up")


class ConfigError(InputError):
  """A field is unknown, missing, of the wrong type or contradicts another."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched, in Hugging Face's terms (`rope_parameters`).

  Attributes:
    kind: 'linear' (arXiv 2306.15595), 'llama3' (arXiv 2407.21783), 'longrope' (arXiv 2402.13753) or
      'yarn' (arXiv 2309.00071).
    factor: of the context's length.
    original_max_positions: the context's length before.
    low_freq_factor, high_freq_factor: llama3: wavelengths above original / low are divided by
      `factor`, those below original / high are kept.
    short_factor, long_factor: longrope: divisors of each frequency for sequences up to and beyond
      the original length.
    attention_factor: longrope, yarn: scale of cosines and sines; None for sqrt(1 + ln(factor) /
      ln(original_max_positions)) and 0.1 ln(factor) + 1.
    beta_fast, beta_slow: yarn: frequencies with more turns than `beta_fast` within the original
      context are kept, those with fewer than `beta_slow` are divided by `factor`; `truncate` rounds
      these bounds to whole dimensions.
    mscale, mscale_all_dim: yarn: where both are given, weigh the logarithm in the attention factor.
  """

  kind: Literal["linear", "llama3", "longrope", "yarn"]
  factor: float = 1.0
  original_max_positions: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: Mistral, Llama, Qwen2, Qwen3 or Phi-3 / Phi-4-mini, by its fields.

  CLaRa appends its special tokens after the vocabulary (`<MEM0>` … `<MEM{M-1}>`, `<AE>`, `<ENC>`,
  `<SEP>`); `ClaraConfig.vocab_size` counts them.

  Attributes:
    vocab_size: words of the tokenizer; an embedding may be padded beyond them.
    width: D, dimensions of the hidden states.
    num_layers: Y, transformer blocks.
    num_heads: query heads.
    num_kv_heads: key and value heads (grouped-query attention).
    head_dim: dimensions of a head.
    mlp_dim: width of the gated MLP.
    rope_theta: base of the rotary frequencies.
    rope_scaling: how they are stretched for long contexts.
    rotary_fraction: share of each head that is rotated.
    qkv_bias: biases on q, k and v (Qwen2).
    qk_norm: RMSNorm over each head of q and k (Qwen3).
    fused_projections: one matrix for q, k, v and one for gate and up (Phi).
    norm_eps: of the RMSNorms.
    sliding_window: tokens that a position attends to; None for all before it.
    full_attention_layers: layers that `sliding_window` does not hold for.
    tie_embeddings: the head is the embedding.
    max_positions: the longest context.
    initializer_range: standard deviation of fresh weights.
    dtype: compute dtype.
    param_dtype: dtype of the base's weights.
    attention: the backend (`ops/attention.py`).
    scan_unroll: layers that a step of the scan over layers unrolls.
    remat: what the backward pass computes again: nothing, everything of a layer, or all but matrix
      products.
    vocab_multiple: embedding and head are padded to a multiple of it, so that they can be divided
      over `tensor`; padding entries are never predicted.
    logits_chunk: label positions of a row whose logits are formed at a time (0: all), for [B, A, V]
      is large.
    base_quantization: 'int8' keeps the frozen base's matrices in 8 bits with a scale for each
      output channel (training only).
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rotary_fraction: float = 1.0
  qkv_bias: bool = False
  qk_norm: bool = False
  fused_projections: bool = False
  norm_eps: float = 1e-5
  sliding_window: int | None = None
  full_attention_layers: tuple[int, ...] = ()
  tie_embeddings: bool = False
  max_positions: int = 32_768
  initializer_range: float = 0.02
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
  param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
  attention: Literal["auto", "xla", "cudnn", "splash", "grouped"] = "auto"
  scan_unroll: int = 1
  remat: Literal["none", "full", "dots"] = "none"
  vocab_multiple: int = 1
  logits_chunk: int = 0
  base_quantization: Literal["none", "int8"] = "none"

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"model.num_heads={self.num_heads} is not a multiple of "
        f"model.num_kv_heads={self.num_kv_heads}"
      )
    if self.rotary_dim % 2:
      raise ConfigError(
        f"model.head_dim={self.head_dim}, rotary_fraction={self.rotary_fraction}: "
        f"{self.rotary_dim} rotated "
        "dimensions, must be even"
      )
    scaling = self.rope_scaling
    if scaling and scaling.kind == "longrope":
      for name in ("short_factor", "long_factor"):
        if len(getattr(scaling, name)) != self.rotary_dim // 2:
          raise ConfigError(
            f"model.rope_scaling.{name}: {len(getattr(scaling, name))} values, expected "
            f"{self.rotary_dim // 2}"
          )
    if self.attention == "splash" and self.head_dim % 128:
      raise ConfigError(
        f"model.attention='splash': model.head_dim={self.head_dim} must be a multiple of 128"
      )
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ConfigError(f"model.sliding_window={self.sliding_window} must be at least 1 or None")
    if wrong := [i for i in self.full_attention_layers if not 0 <= i < self.num_layers]:
      raise ConfigError(
        f"model.full_attention_layers names {wrong[0]}; there are {self.num_layers} layers"
      )
    if self.vocab_multiple < 1 or self.logits_chunk < 0:
      raise ConfigError(
        f"model.vocab_multiple={self.vocab_multiple} must be at least 1, "
        f"model.logits_chunk={self.logits_chunk} at least 0"
      )

  @property
  def rotary_dim(self) -> int:
    """Dimensions of each head that are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  def table_size(self, vocab_size: int) -> int:
    """Rows of an embedding for that many words: the next multiple of `vocab_multiple`."""
    return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (arXiv 2106.09685): `y = x W + (alpha / rank) · dropout(x) A B`.

  Attributes:
    rank: R, columns of A.
    alpha: the scale is alpha / rank.
    dropout: of the adapter's input, in training.
    targets: linear layers that carry an adapter.
  """

  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.1
  targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    if self.rank < 1:
      raise ConfigError(f"lora.rank={self.rank} must be at least 1")
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"lora.dropout={self.dropout} must be in [0, 1)")
    if unknown := set(self.targets) - set(LORA_TARGETS):
      raise ConfigError(f"lora.targets: unknown {sorted(unknown)}; known: {list(LORA_TARGETS)}")

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ClaraConfig:
  """The method's own numbers (paper §3; the released code's config.json).

  Attributes:
    model: the base.
    lora: the adapters of the three roles.
    doc_max_length: tokens of a document; longer ones are cut.
    compression_rate: document tokens for each memory token: M = doc_max_length / compression_rate.
    query_max_length: tokens of a question's encoder input.
    decoder_max_length: tokens of a prompt with its answer.
    top_k: K, documents given to the generator.
    temperature: τ of the selection; with `train.temperature_schedule` the τ it starts from.
    masking: how earlier slots are masked in the straight-through gradient: as in the paper's
      Algorithm 1 (and the released code), or as in its Eq. 3.3.
    mse_weight: λ of the alignment loss of document and memory means.
    center_scores: subtracts the mean memory of a row's candidates before the cosine; not in the
      paper.
    nested_dropout: share of training rows for which the generator reads only the first few of the K
      documents (joint stage; `training/stages/losses.py`); not in the paper.
    nested_memory: e.g. (4, 8, 16), ends with M: each training batch is written and read with one of
      these numbers of memory tokens, drawn at random, so that the first m are enough for each of
      them (Matryoshka representations, arXiv 2205.13147); empty: always all M.
    prompt_date: ISO 8601, told to a chat template that asks for the date; set when a run starts.
  """

  model: ModelConfig
  lora: LoraConfig = LoraConfig()
  doc_max_length: int = 256
  compression_rate: int = 32
  query_max_length: int = 256
  decoder_max_length: int = 1024
  top_k: int = 5
  temperature: float = 0.02
  masking: Literal["algorithm1", "equation33"] = "algorithm1"
  mse_weight: float = 0.1
  center_scores: bool = False
  nested_dropout: float = 0.0
  nested_memory: tuple[int, ...] = ()
  prompt_date: str | None = None

  def __post_init__(self):
    if self.doc_max_length % self.compression_rate:
      raise ConfigError(
        f"doc_max_length={self.doc_max_length} is not a multiple of "
        f"compression_rate={self.compression_rate}"
      )
    if self.temperature <= 0:
      raise ConfigError(f"temperature={self.temperature} must be positive")
    if self.top_k < 1:
      raise ConfigError(f"top_k={self.top_k} must be at least 1")
    if not 0 <= self.nested_dropout <= 1:
      raise ConfigError(f"nested_dropout={self.nested_dropout} must be in [0, 1]")
    sizes, m = self.nested_memory, self.num_memory_tokens
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != m):
      raise ConfigError(
        f"nested_memory={list(sizes)}: expected ascending numbers of 1 or more that end with M = "
        f"doc_max_length / "
        f"compression_rate = {m}"
      )
    try:
      datetime.date.fromisoformat(self.prompt_date or "2000-01-01")
    except ValueError:
      raise ConfigError(
        f"prompt_date={self.prompt_date!r}: expected a date such as 2026-01-31"
      ) from None

  @property
  def num_memory_tokens(self) -> int:
    """M: memory tokens of a document."""
    return self.doc_max_length // self.compression_rate

  @property
  def vocab_size(self) -> int:
    """V with the special tokens: `<MEM0>` … `<MEM{M-1}>`, `<AE>`, `<ENC>`, `<SEP>`."""
    return self.model.vocab_size + self.num_memory_tokens + 3


def check_memory_tokens(m: int | None, config: ClaraConfig) -> None:
  """Refuses a number of memory tokens that there are not (None means all).

  Raises:
    ConfigError: m is not 1 to M.
  """
  if m is not None and not 1 <= m <= config.num_memory_tokens:
    raise ConfigError(
      f"memory tokens {m}: expected 1 to {config.num_memory_tokens}, which the compressor writes"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where rows come from and how they are batched.

  Attributes:
    rows: JSONL files (.gz allowed) or directories of `clara records` (ArrayRecord); one after the
      other, or mixed by `weights`.
    weights: how often each entry of `rows` is drawn, by its share of the batch; empty: every row as
      often as any other.
    eval_rows: as `rows`.
    batch_size: rows of a step, over all devices.
    eval_batch_size: rows of an evaluation step.
    candidates: N of the joint and contrastive stages.
    store: a memory store with the candidates' memory tokens; without one they are compressed in the
      step.
    retrieve: candidates are the row's own, or the N nearest documents of the whole store, which
      lies on the devices ('store', joint stage).
    expand: instruct: of so large a share of the rows with several documents some are in the prompt
      as text, so that the generator learns to read both (`clara ask --expand`).
    expand_documents: how many at most; one at least stays memory tokens.
    label_documents: pretrain: the documents in the prompt are labels, too.
    bucket: prompts are padded to a multiple of it.
    document_bucket: documents and questions are padded to a multiple of it.
    label_bucket: labels are padded to a multiple of it.
    shards: a batch consists of that many equal parts, each from files of its own, so that a process
      opens only the files of its part. Which rows a step sees depends on it and on the seed, not on
      how many processes there are.
    share_documents: so many rows that follow each other in a file stay together in the shuffle, and
      a document that several rows of a batch have is compressed once; without dropout the loss is
      as it would be. A file's last such run is filled up with its first rows. Not for rows of
      `clara records`, which are read at random.
    length_window: rows of that many batches are sorted by length before they are cut into batches,
      which are then shuffled.
    workers: processes that tokenize ahead; 0 does it in this one.
    prefetch: windows that are made ahead (by each worker).
    max_malformed: bad rows that are skipped and reported before the run stops.
  """

  rows: tuple[str, ...] = ()
  weights: tuple[float, ...] = ()
  eval_rows: tuple[str, ...] = ()
  batch_size: int = 32
  eval_batch_size: int = 32
  candidates: int = 20
  store: str | None = None
  retrieve: Literal["row", "store"] = "row"
  expand: float = 0.0
  expand_documents: int = 1
  label_documents: bool = False
  bucket: int = 64
  document_bucket: int = 16
  label_bucket: int = 8
  shards: int = 1
  share_documents: int = 1
  length_window: int = 1
  workers: int = 0
  prefetch: int = 2
  max_malformed: int = 0

  def __post_init__(self):
    for name in (
      "batch_size",
      "shards",
      "share_documents",
      "length_window",
      "expand_documents",
      "bucket",
      "document_bucket",
      "label_bucket",
    ):
      if getattr(self, name) < 1:
        raise ConfigError(f"data.{name}={getattr(self, name)} must be at least 1")
    if not 0 <= self.expand <= 1:
      raise ConfigError(f"data.expand={self.expand}: expected a share, 0 to 1")
    if self.retrieve == "store" and not self.store:
      raise ConfigError("data.retrieve='store': data.store names no store")
    if self.batch_size % self.shards:
      raise ConfigError(
        f"data.batch_size={self.batch_size} is not a multiple of data.shards={self.shards}"
      )
    if self.weights and (len(self.weights) != len(self.rows) or min(self.weights) <= 0):
      raise ConfigError(
        f"data.weights={list(self.weights)}: expected a positive number for each of the "
        f"{len(self.rows)} data.rows"
      )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One stage of training.

  Attributes:
    stage: a name of the table of stages, or FILE.py:STAGE (`training/stages`).
    steps: length of the run; None: as many as `epochs` take.
    epochs: passes over the rows, where `steps` is None.
    learning_rate: its maximum (AdamW).
    learning_rate_factors: by group of weights, so that one role moves faster than another.
    schedule: of the learning rate, after the warm-up.
    warmup_fraction: share of the steps in which the learning rate rises from 0.
    final_learning_rate_fraction: of the maximum, at the end of the schedule.
    weight_decay: of AdamW.
    beta1: of AdamW.
    beta2: of AdamW.
    clip_norm: global norm to which gradients are clipped.
    accumulate: micro-batches of a step; the gradient is that of the whole batch.
    freeze: groups of the stage that do not train in this run.
    fresh_generator: the generator starts anew, as the released code's instruct does.
    fresh_query_reasoner: the query reasoner starts anew, instead of as a copy of the compressor
      (the paper's ablation).
    seed: of weights, dropout, draws and the order of rows.
    log_every: steps between reports.
    eval_every: steps between evaluations; 0: at the start and the end.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: last checkpoints that stay.
    keep_best: an evaluation metric: the checkpoint that is best by it stays, too.
    temperature_schedule: τ of the selection (joint stage) is `clara.temperature`, or starts there
      and is 'annealed' to `final_temperature`, by the same factor each step, or 'learned'.
    final_temperature: τ at the end, where it is annealed.
    gradients_every: steps between reports of what the gradient of the selection is made of
      (`training/stages/gradient_paths.py`), which cost another backward pass; 0: none.
  """

  stage: str = "scp"
  steps: int | None = None
  epochs: float = 1.0
  learning_rate: float = 1e-4
  learning_rate_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
  schedule: Literal["cosine", "constant", "linear"] = "cosine"
  warmup_fraction: float = 0.03
  final_learning_rate_fraction: float = 0.0
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.999
  clip_norm: float = 1.0
  accumulate: int = 1
  freeze: tuple[str, ...] = ()
  fresh_generator: bool = False
  fresh_query_reasoner: bool = False
  seed: int = 0
  log_every: int = 20
  eval_every: int = 0
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  keep_best: str | None = None
  temperature_schedule: Literal["fixed", "annealed", "learned"] = "fixed"
  final_temperature: float | None = None
  gradients_every: int = 0

  def __post_init__(self):
    if (self.temperature_schedule == "annealed") != (self.final_temperature is not None):
      raise ConfigError(
        f"train.temperature_schedule={self.temperature_schedule!r} and "
        f"train.final_temperature={self.final_temperature}: 'annealed' needs a "
        "final temperature, others have none"
      )
    if self.final_temperature is not None and self.final_temperature <= 0:
      raise ConfigError(f"train.final_temperature={self.final_temperature} must be positive")
    for name in ("log_every", "checkpoint_every", "accumulate"):
      if getattr(self, name) < 1:
        raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
    if self.steps is not None and self.steps < 1:
      raise ConfigError(f"train.steps={self.steps} must be at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices are arranged (`sharding.make_mesh`).

  Attributes:
    preset: 'chip' (one device), 'host' (fsdp over all), 'pod' (fsdp over 32, data over the rest),
      'slices' (each slice as fsdp, data parallel between slices); None: data over all. Sizes below
      override the preset's; -1 takes what the others leave.
    slice: slices of a pod, joined by the data center network.
    data: devices with rows of their own and the same weights.
    fsdp: devices with rows of their own, over which weights are divided.
    tensor: devices that share a row's computation.
  """

  preset: Literal["chip", "host", "pod", "slices"] | None = None
  slice: int | None = None
  data: int | None = None
  fsdp: int | None = None
  tensor: int | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything `clara train` needs.

  Attributes:
    clara: the method.
    data: rows and batches.
    train: the stage.
    base: a Hugging Face directory (safetensors), its id in the hub's cache, or the working
      directory of a `pretrain` run; None starts a fresh base (`pretrain` only).
    init_from: the checkpoint of the previous stage.
    tokenizer: a directory; by default the base's own.
    mesh: how the devices are arranged.
    estimator: what teaches the query reasoner in the joint stage (`ops/estimators`); by default the
      straight-through top-k of `clara.masking`.
    estimator_args: its arguments.
  """

  clara: ClaraConfig
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  base: str | None = None
  init_from: str | None = None
  tokenizer: str | None = None
  mesh: MeshConfig = MeshConfig()
  estimator: str | None = None
  estimator_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def from_config_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
  """Builds the dataclass `cls` from a ConfigDict or a plain mapping.

  Raises:
    ConfigError: an unknown field, a missing one, or a value of the wrong type; the message names
      the field by its full path.
  """
  if not isinstance(values, Mapping) and not hasattr(values, "items"):
    raise ConfigError(
      f"{where or 'config'}: expected a group of fields for {cls.__name__}, got {values!r}"
    )
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  arguments: dict[str, Any] = {}
  for name, value in values.items():
    if (renamed := _FORMER_NAMES.get((cls, name))) is not None:
      if renamed in values and values[renamed] not in (value, fields[renamed].default):
        raise ConfigError(
          f"{where}.{name}={value!r} and {renamed}={values[renamed]!r}: the first is the former "
          f"name of the second"
        )
      arguments.pop(renamed, None)
      name = renamed
    elif name in arguments:
      continue
    path = f"{where}.{name}" if where else str(name)
    if name not in fields:
      raise ConfigError(
        f"{path}: unknown field of {cls.__name__}; known: {', '.join(sorted(fields))}"
      )
    arguments[name] = _coerce(hints[name], value, path)
  for name, field in fields.items():
    if (
      name not in arguments
      and field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    ):
      raise ConfigError(f"{where + '.' if where else ''}{name}: a value is required")
  try:
    return cls(**arguments)
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}" if where else str(error)) from None


# Fields that were called otherwise in configurations of version 0.1.
_FORMER_NAMES: dict[tuple[type, str], str] = {(TrainConfig, "temperature"): "temperature_schedule"}


def field_meanings(cls: type = RunConfig) -> dict[str, str]:
  """What each field means, by its full path: the `Attributes` of the classes above."""
  meanings = {}
  hints = typing.get_type_hints(cls)
  for name, meaning in _attributes(cls).items():
    nested = next(
      (t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)), None
    )
    meanings[name] = meaning
    if nested:
      meanings |= {f"{name}.{inner}": text for inner, text in field_meanings(nested).items()}  # type: ignore[arg-type]
  return meanings


def _attributes(cls: type) -> dict[str, str]:
  text = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
  entries = re.findall(r"^  ([\w, ]+): ((?:.+\n?)(?:    .*\n?)*)", text, re.MULTILINE)
  return {
    name.strip(): " ".join(meaning.split())
    for names, meaning in entries
    for name in names.split(",")
  }


def config_dict() -> ml_collections.ConfigDict:
  """The defaults of `RunConfig` for a config file, which then says what differs.

  `clara.model` is empty: the shape is the base's, and the file names only how it is run.
  """
  return ml_collections.ConfigDict(_defaults(RunConfig))


def _defaults(cls: type) -> dict[str, Any]:
  hints, values = typing.get_type_hints(cls), {}
  for field in dataclasses.fields(cls):
    hint = hints[field.name]
    options = (
      [t for t in typing.get_args(hint) if t is not type(None)]
      if typing.get_origin(hint) in (typing.Union, types.UnionType)
      else []
    )
    plain = options[0] if options else hint
    if dataclasses.is_dataclass(plain) and not options:
      values[field.name] = {} if plain is ModelConfig else _defaults(plain)  # type: ignore[arg-type]
    elif field.default_factory is not dataclasses.MISSING:
      values[field.name] = field.default_factory()
    elif field.default not in (None, dataclasses.MISSING):
      values[field.name] = field.default
    else:
      origin = typing.get_origin(plain) or plain
      kind = type(typing.get_args(plain)[0]) if origin is Literal else origin
      values[field.name] = config_dict_lib.placeholder(kind)
  return values


def _coerce(hint: Any, value: Any, path: str) -> Any:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    return value if isinstance(value, hint) else from_config_dict(hint, value, path)  # type: ignore[arg-type]
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in arguments:
      return None
    (hint,) = [a for a in arguments if a is not type(None)]
    return _coerce(hint, value, path)
  if origin is Literal:
    if value not in arguments:
      raise ConfigError(f"{path}={value!r}: expected one of {list(arguments)}")
    return value
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
      raise ConfigError(f"{path}={value!r}: expected a list")
    return tuple(_coerce(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
  if origin is not None and issubclass(origin, Mapping):
    if not hasattr(value, "items"):
      raise ConfigError(f"{path}={value!r}: expected a mapping")
    return {str(k): _coerce(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint in (int, float, bool, str) and (
    not isinstance(value, hint) or (hint is int and isinstance(value, bool))
  ):
    raise ConfigError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
  return value


def to_json(config: Any) -> str:
  """The config as readable JSON; `from_config_dict(type(config), json.loads(...))` gives it
  back."""
  return json.dumps(dataclasses.asdict(config), indent=2)
