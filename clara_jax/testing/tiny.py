"""A world, a model and rows so small that a test takes seconds."""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from clara_jax.checkpoints import native, workdir
from clara_jax.config import (
  ClaraConfig,
  DataConfig,
  LoraConfig,
  ModelConfig,
  RunConfig,
  TrainConfig,
)
from clara_jax.data import schemas
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.experiments.world import World, WorldConfig
from clara_jax.model import Clara

WORLD = WorldConfig(
  level=2,
  kinds=("person",),
  people=60,
  first_names=10,
  last_names=10,
  places=6,
  companies=6,
  relations=2,
  wordings=2,
)

# Buckets so wide that all batches of a run have one shape: compiling is what takes the time in
# tests.
DATA = {
  "batch_size": 8,
  "eval_batch_size": 8,
  "candidates": 6,
  "bucket": 128,
  "document_bucket": 64,
  "label_bucket": 64,
}


@functools.cache
def world() -> World:
  """60 people, half of a page each."""
  return World(WORLD)


@functools.cache
def config() -> ClaraConfig:
  """Two layers of width 16; documents of 40 tokens become 2 memory tokens."""
  model = ModelConfig(
    vocab_size=len(world().tokenizer()),
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
    initializer_range=0.1,
  )
  return ClaraConfig(
    model,
    LoraConfig(rank=2, alpha=4.0, dropout=0.1),
    doc_max_length=40,
    compression_rate=20,
    query_max_length=24,
    decoder_max_length=256,
    top_k=2,
  )


def prompt_tokenizer(**fields) -> PromptTokenizer:
  """The world's tokenizer; `fields` replace those of `config`."""
  return PromptTokenizer(world().tokenizer(), dataclasses.replace(config(), **fields))


def raw_rows(stage: str) -> list[dict]:
  """Rows as a JSONL file has them."""
  return list(
    {
      "pretrain": lambda: world().lookup_rows(versions=1),
      "scp": lambda: itertools.islice(world().scp_rows(versions=1), 64),
      "instruct": lambda: world().question_rows(2),
      "joint": lambda: world().question_rows(6),
      "contrastive": lambda: world().question_rows(6),
    }[stage]()
  )


def rows(stage: str) -> list[schemas.Row]:
  """`raw_rows`, parsed."""
  return [schemas.parse_row(r, f"{stage}:{i}") for i, r in enumerate(raw_rows(stage))]


def run_config(stage: str, **train) -> RunConfig:
  """Four steps; `train` replaces fields of `TrainConfig`."""
  settings = {
    "stage": stage,
    "steps": 4,
    "learning_rate": 1e-2,
    "log_every": 2,
    "checkpoint_every": 100,
    **train,
  }
  return RunConfig(config(), DataConfig(**DATA), TrainConfig(**settings))


def weights(seed: int = 0) -> dict:
  """Fresh weights in which the adapters matter; the dict may be changed, its arrays are shared."""
  return dict(_weights(seed))


@functools.cache
def _weights(seed: int) -> dict:
  return _fresh(config(), seed)


def _fresh(config: ClaraConfig, seed: int) -> dict:
  tree = jax.jit(Clara(config).init)(jax.random.key(seed))
  for i, role in enumerate(("compressor", "query_reasoner", "generator")):
    tree[role] = jax.tree.map(
      lambda x, i=i: 0.1 * jax.random.normal(jax.random.key(i), x.shape), tree[role]
    )
  return tree


@functools.cache
def pod_config() -> ClaraConfig:
  """As `config`, with sizes that divide over eight devices."""
  model = dataclasses.replace(
    config().model,
    width=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    vocab_multiple=8,
    logits_chunk=16,
    remat="full",
  )
  return dataclasses.replace(config(), model=model)


def pod_weights(config: ClaraConfig | None = None) -> dict:
  """Fresh weights of `pod_config`, or of another, in which the adapters matter."""
  return jax.tree.map(np.asarray, _fresh(config or pod_config(), 0))


def write_checkpoint(directory: str, config: ClaraConfig, weights: dict) -> None:
  """A checkpoint of the joint stage that holds its base, with the world's tokenizer."""
  workdir.write_config(directory, RunConfig(config, train=TrainConfig(stage="joint")))
  native.write_weights(directory, weights)
  world().tokenizer().save_pretrained(f"{directory}/tokenizer")
