"""A run by its configuration alone: base, tokenizer, weights and rows are found, then trained."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
from transformers import PreTrainedTokenizerFast

from clara_jax import buckets, distributed
from clara_jax.checkpoints import families, formats, huggingface, native
from clara_jax.checkpoints.workdir import is_checkpoint, read_config
from clara_jax.config import ConfigError, RunConfig
from clara_jax.data import records
from clara_jax.data.pipeline import MemorySource
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import Row
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Clara, Weights
from clara_jax.ops import estimators
from clara_jax.training import corpus, stages
from clara_jax.training.config_file import FREE_FIELDS
from clara_jax.training.hooks import Hook
from clara_jax.training.trainer import Result, Trainer


@dataclasses.dataclass(frozen=True)
class Start:
  """What a run starts from.

  Attributes:
    config: the run, with its base and the date that its chat template is told.
    prompt_tokenizer: tokenizer and token layouts.
    init_weights: groups of weights; leaves may be read when they are indexed
      (`checkpoints/lazy.py`).
    base_sha256: hash of the base's tensors; None where there is no base.
  """

  config: RunConfig
  prompt_tokenizer: PromptTokenizer
  init_weights: Weights
  base_sha256: str | None


def train(
  config: RunConfig,
  workdir: str | None = None,
  *,
  rows: Sequence[Row] | None = None,
  eval_rows: Sequence[Row] | None = None,
  tokenizer: PreTrainedTokenizerFast | None = None,
  init_weights: Weights | None = None,
  memories: MemorySource | None = None,
  chat_template: str | None = None,
  allow: Sequence[str] = (),
  hooks: Sequence[Hook] = (),
  progress: bool = True,
) -> Result:
  """Trains one stage; resumes from `workdir` where the same run was stopped.

  Args:
    config: the run. Its shape is that of its base (`config_file.load_config` takes it from there).
    workdir: for checkpoints and metrics; None keeps nothing on disk.
    rows, eval_rows: in memory, in place of the files that `config.data` names.
    tokenizer, init_weights: in place of those of `config.tokenizer`, `config.base` and
      `config.init_from`.
    memories: memory tokens of documents, in place of those of `config.data.store`.
    chat_template: takes the place of the tokenizer's.
    allow: unknown fields of the base's config.json that are accepted.
    hooks: what happens beside training.
    progress: whether reports are logged.

  Raises:
    ConfigError, CheckpointError, DataError, KeyMapError, StoreError: naming the field, file or row.
  """
  stage = stages.get(config.train.stage)  # before anything is read
  if config.estimator:
    estimators.get(config.estimator, config.estimator_args)
  data = config.data
  if rows is None and not data.rows:
    raise ConfigError("data.rows: no training rows are named")
  sources = (
    None
    if rows is not None
    else records.open_sources(data.rows, data.shards, data.max_malformed, data.share_documents)
  )
  if eval_rows is None:
    eval_rows = [row for source in records.open_sources(data.eval_rows, 1) for row in source[0]]
  start = resolve(
    config,
    workdir,
    tokenizer=tokenizer,
    init_weights=init_weights,
    chat_template=chat_template,
    allow=allow,
  )
  if data.store and memories is None:
    store = MemoryStore(data.store)
    corpus.check_store(start.config.clara, store)
    memories = store.lookup()
  result = Trainer(
    start.config,
    start.prompt_tokenizer,
    start.init_weights,
    rows,
    eval_rows,
    sources=sources,
    workdir=workdir,
    memories=memories,
    base_sha256=start.base_sha256,
    hooks=hooks,
    progress=progress,
  ).run()
  if distributed.is_main() and workdir is not None and "base" in stage.trained(config.train):
    if source := native.hf_files(start.config.base):  # what the base came with goes with it
      with buckets.written(os.path.join(workdir, native.HF_FOLDER)) as folder:
        huggingface.keep_files(source, folder)
  return result


def resolve(
  config: RunConfig,
  workdir: str | None = None,
  *,
  tokenizer: PreTrainedTokenizerFast | None = None,
  init_weights: Weights | None = None,
  chat_template: str | None = None,
  allow: Sequence[str] = (),
) -> Start:
  """Finds what a run starts from; arguments as `train`.

  Raises:
    ConfigError, CheckpointError, DataError, KeyMapError: naming the field or file.
  """
  config = _with_date(config, workdir)
  if config.init_from:
    opened = formats.open_checkpoint(
      config.init_from, config.base, chat_template=chat_template, allow=allow
    )
    _check_architecture(Clara(opened.config), Clara(config.clara), config.init_from)
    # A pretrained base is the base of what starts from it.
    config = dataclasses.replace(config, base=config.base or opened.base or config.init_from)
    if config.clara.prompt_date is None:
      config = dataclasses.replace(
        config, clara=dataclasses.replace(config.clara, prompt_date=opened.config.prompt_date)
      )
    opened.config, opened.tokenizer = config.clara, tokenizer or opened.tokenizer
    formats.note_rounding(opened.plain_base, config.clara, config.base)
    weights, base_sha256 = opened.weights, opened.check_base()
    prompt_tokenizer = opened.prompt_tokenizer()
  else:
    prompt_tokenizer = _base_tokenizer(config, tokenizer, chat_template)
    weights, base_sha256 = _base_weights(config, allow) if config.base else ({}, None)
  return Start(
    dataclasses.replace(config, clara=prompt_tokenizer.config),
    prompt_tokenizer,
    weights if init_weights is None else init_weights,
    base_sha256,
  )


def _base_tokenizer(
  config: RunConfig, tokenizer: PreTrainedTokenizerFast | None, chat_template: str | None
) -> PromptTokenizer:
  named = config.tokenizer or config.base
  source = tokenizer or named and formats.tokenizer_directory(named)
  if source is None:
    raise ConfigError(
      f"{named}: brings no tokenizer (tokenizer.json); name one with --config.tokenizer=DIR"
      if named
      else "tokenizer: no tokenizer is named, and neither base nor init_from brings one"
    )
  return PromptTokenizer(
    source,
    config.clara,
    end_ids=families.end_ids(native.hf_files(config.base)),
    chat_template=chat_template,
  )


def _base_weights(config: RunConfig, allow: Sequence[str]) -> tuple[dict[str, Any], str | None]:
  """(the base with CLaRa's special tokens, the hash of its tensors on the first process)."""
  clara = config.clara
  plain, special = formats.open_base(Clara(clara), config.base, "config.base", allow)
  formats.note_rounding(plain, clara, config.base)
  # For as many memory tokens as wanted.
  if special is None or special["embedding"].shape[0] != clara.vocab_size - clara.model.vocab_size:
    special = huggingface.special_tokens(clara)
  return (
    {"base": huggingface.with_special_tokens(plain, special, clara)},
    huggingface.base_hash(plain) if jax.process_index() == 0 else None,
  )


def _with_date(config: RunConfig, workdir: str | None) -> RunConfig:
  """A resumed run tells its chat template the date on which it began."""
  if config.clara.prompt_date is None and workdir is not None and is_checkpoint(workdir):
    return dataclasses.replace(
      config,
      clara=dataclasses.replace(
        config.clara, prompt_date=read_config(workdir)[0].clara.prompt_date
      ),
    )
  return config


def _check_architecture(previous: Clara, current: Clara, where: str) -> None:
  for name in ("model", "lora"):
    a, b = (dataclasses.asdict(getattr(m.config, name)) for m in (previous, current))
    for field in a:
      if field not in (*FREE_FIELDS, "dropout") and a[field] != b[field]:
        raise ConfigError(
          f"clara.{name}.{field}={b[field]!r}, but {where} was made with {a[field]!r}"
        )
  if previous.config.num_memory_tokens != current.config.num_memory_tokens:
    raise ConfigError(
      f"{current.config.num_memory_tokens} memory tokens, but {where} was made with "
      f"{previous.config.num_memory_tokens}"
    )
