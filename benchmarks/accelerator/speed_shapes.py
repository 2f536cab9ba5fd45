"""Speed at the shapes of Mistral-7B: ratio 32, documents of 256 tokens, K = 5 of N = 20, random
bfloat16 weights; JAX and PyTorch.

Both sides do the same work on the same shapes: all texts full length, LoRA of rank 16 without
dropout. Medians of three after two that warm up.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

QUESTION, ANSWER, NEW_TOKENS = 64, 32, 32
# Tokens of a prompt beside memory slots: the instruction, the question, the answer.
SLOTS_AROUND = 128
VECTORS, DIMENSION, SEARCHED = 1_000_000, 512, 64


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is run; `smoke` makes all of it tiny."""

  width: int = 4096
  layers: int = 32
  heads: int = 32
  kv_heads: int = 8
  head_dim: int = 128
  mlp: int = 14_336
  vocabulary: int = 32_000
  dtype: str = "bfloat16"
  document: int = 256
  ratio: int = 32
  candidates: int = 20
  top_k: int = 5
  compress: int = 64  # documents a pass
  scp: int = 32  # rows of a batch
  joint: int = 8
  joint_in_step: int = 2
  answers: tuple[int, ...] = (1, 8, 32)
  vectors: int = VECTORS
  repeats: int = 3

  @property
  def memory_tokens(self) -> int:
    return self.document // self.ratio


SMOKE = Sizes(64, 2, 4, 2, 16, 96, 512, "float32", 32, 8, 4, 2, 4, 4, 4, 4, (1,), 1000, 1)
# Items that run no line of their own.
ALIKE = ("scp attention=cudnn", "scp remat=none", "paper: compress 20 documents")
# The paper's table 5: milliseconds for a batch of four questions with 20 documents each.
PAPER = {"compress 20 documents": 904, "query": 92, "decode": 515, "full text": 1291}


def run(out: Any, side: str, seconds: float, smoke: bool) -> None:
  """All items of a side that the time allows; `out` is `run.Results`."""
  sizes, end = SMOKE if smoke else Sizes(), time.monotonic() + seconds
  out.values |= {"sizes": dataclasses.asdict(sizes), "paper_ms": PAPER}
  for name, item in (jax_items if side == "jax" else torch_items)(sizes):
    if smoke and name in ALIKE:
      continue
    out.item(name, item, end, needs=0 if smoke else 25)


def timed(call: Callable[[], Any], repeats: int, wait: Callable[[Any], Any]) -> dict[str, float]:
  """Seconds of the first call, compiling included, and the median of others."""
  start = time.perf_counter()
  wait(call())
  first = time.perf_counter() - start
  wait(call())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    wait(call())
    times.append(time.perf_counter() - start)
  return {
    "seconds": statistics.median(times),
    "spread": max(times) / min(times),
    "first_seconds": first,
  }


# ---- JAX -----------------------------------------------------------------------------------------


def clara_config(sizes: Sizes, **model: Any):
  """The configuration of both sides."""
  from clara_jax.config import ClaraConfig, LoraConfig, ModelConfig

  model_config = ModelConfig(
    vocab_size=sizes.vocabulary,
    width=sizes.width,
    num_layers=sizes.layers,
    num_heads=sizes.heads,
    num_kv_heads=sizes.kv_heads,
    head_dim=sizes.head_dim,
    mlp_dim=sizes.mlp,
    rope_theta=1e6,
    dtype=sizes.dtype,
    param_dtype=sizes.dtype,
    **{"remat": "full", **model},
  )
  prompt = sizes.top_k * (sizes.memory_tokens + 1) + SLOTS_AROUND
  return ClaraConfig(
    model_config,
    LoraConfig(rank=16, alpha=32.0, dropout=0.0),
    doc_max_length=sizes.document,
    compression_rate=sizes.ratio,
    query_max_length=QUESTION,
    decoder_max_length=prompt,
    top_k=sizes.top_k,
  )


@functools.cache
def weights_of(sizes: Sizes) -> dict:
  """Random weights of all groups, on the device, once."""
  import jax

  from clara_jax.model import Clara

  return jax.block_until_ready(jax.jit(Clara(clara_config(sizes)).init)(jax.random.key(0)))


def on_both_sides(
  sizes: Sizes, compress: Callable, step: Callable, answer: Callable
) -> Iterator[tuple[str, Callable[[], dict]]]:
  """(name, item) of what a side's functions run, what matters most first."""
  yield "compress", lambda: compress(sizes, sizes.compress)
  yield "scp", lambda: step(sizes, "scp", sizes.scp)
  yield "joint from the store", lambda: step(sizes, "joint", sizes.joint, from_store=True)
  yield "joint compressed in the step", lambda: step(sizes, "joint", sizes.joint_in_step)
  for batch in sizes.answers:
    yield f"answer batch {batch}", lambda batch=batch: answer(sizes, batch, False)


def jax_items(sizes: Sizes) -> Iterator[tuple[str, Callable[[], dict]]]:
  """(name, item) in order."""
  yield from on_both_sides(sizes, jax_compress, jax_step, jax_answer)
  yield "compress attention=cudnn", lambda: jax_compress(sizes, sizes.compress, attention="cudnn")
  yield "scp attention=cudnn", lambda: jax_step(sizes, "scp", sizes.scp, attention="cudnn")
  yield "answer merged batch 1", lambda: jax_answer(sizes, 1, True)
  yield f"search {sizes.vectors} x {DIMENSION}", lambda: jax_search(sizes)
  yield "scp remat=dots", lambda: jax_step(sizes, "scp", max(1, sizes.scp // 2), remat="dots")
  yield "scp remat=none", lambda: jax_step(sizes, "scp", max(1, sizes.scp // 4), remat="none")
  for batch in sizes.answers[1:]:
    yield f"answer merged batch {batch}", lambda batch=batch: jax_answer(sizes, batch, True)
  yield "paper: compress 20 documents", lambda: jax_compress(sizes, 4 * sizes.candidates)
  yield "paper: query", lambda: jax_query(sizes, 4)
  yield "paper: decode", lambda: jax_answer(sizes, 4, False)
  yield "paper: full text", lambda: jax_full_text(sizes, 4)


def _peak():
  import jax

  from clara_jax.analysis import cost

  return cost.chip_of(jax.devices()[0])


def _with_flops(timing: dict, flops: float, samples: int, read: float | None = None) -> dict:
  """Adds rates, and shares of the card's peaks where they are known."""
  chip = _peak()
  timing |= {"samples": samples, "per_second": samples / timing["seconds"], "model_flops": flops}
  if chip:
    timing["mfu"] = flops / timing["seconds"] / chip.flops
    if read is not None:
      timing["bandwidth_share"] = read / timing["seconds"] / chip.memory_bandwidth
  return timing


def _texts(sizes: Sizes, *lead: int, length: int | None = None):
  """Encoder inputs of full length."""
  from clara_jax.batch import Tokens

  m, words = sizes.memory_tokens, (length or sizes.document) + 3
  ids = np.random.default_rng(0).integers(3, sizes.vocabulary, (*lead, words + m), np.int32)
  ids[..., words:] = sizes.vocabulary + np.arange(m)
  return Tokens(ids, np.full(lead, words + m, np.int32))


def _prompts(sizes: Sizes, batch: int, documents: int, answer: int):
  """Prompts with their slots first, and label positions at the end."""
  from clara_jax.batch import Prompt, Tokens

  m = sizes.memory_tokens
  slots = np.tile(np.append(sizes.vocabulary + np.arange(m), sizes.vocabulary + m + 2), documents)
  length = -(-(len(slots) + SLOTS_AROUND) // 64) * 64
  ids = np.random.default_rng(1).integers(3, sizes.vocabulary, (batch, length), np.int32)
  ids[:, 16 : 16 + len(slots)] = slots
  tokens = Tokens(ids, np.full(batch, length, np.int32))
  positions = np.broadcast_to(
    np.arange(length - answer - 1, length - 1, dtype=np.int32), (batch, answer)
  )
  return Prompt(
    tokens,
    positions,
    np.take_along_axis(ids, positions + 1, 1),
    np.ones((batch, answer), np.float32),
  )


def jax_compress(sizes: Sizes, count: int, **model: Any) -> dict:
  """Documents a second."""
  import jax

  from clara_jax.analysis import flops
  from clara_jax.model import Clara

  compress = jax.jit(Clara(clara_config(sizes, **model)).compress)
  weights, texts = weights_of(sizes), jax.device_put(_texts(sizes, count))
  timing = timed(lambda: compress(weights, texts), sizes.repeats, jax.block_until_ready)
  # A kernel's products are not counted.
  plain = jax.jit(Clara(clara_config(sizes, attention="grouped")).compress)
  return _with_flops(timing, flops.count(plain, weights, texts), count)


def jax_query(sizes: Sizes, count: int) -> dict:
  """Questions through the query reasoner."""
  import jax

  from clara_jax.analysis import flops
  from clara_jax.model import Clara

  encode = jax.jit(Clara(clara_config(sizes)).encode_query)
  weights, texts = weights_of(sizes), jax.device_put(_texts(sizes, count, length=QUESTION))
  timing = timed(lambda: encode(weights, texts), sizes.repeats, jax.block_until_ready)
  return _with_flops(timing, flops.count(encode, weights, texts), count)


def jax_step(sizes: Sizes, stage: str, rows: int, from_store: bool = False, **model: Any) -> dict:
  """Training steps: rows a second."""
  import jax

  from clara_jax.analysis import cost
  from clara_jax.batch import Batch
  from clara_jax.config import DataConfig, RunConfig, TrainConfig
  from clara_jax.training.program import Program

  config = clara_config(sizes, **model)
  data = DataConfig(
    batch_size=rows, candidates=sizes.candidates, store="given" if from_store else None
  )
  program = Program(
    RunConfig(config, data, TrainConfig(stage=stage, schedule="constant", warmup_fraction=0.0)),
    1000,
  )
  joint = stage == "joint"
  documents = None if from_store else _texts(sizes, rows, sizes.candidates if joint else 1)
  memories = (
    np.random.default_rng(2).normal(size=(rows, sizes.candidates, sizes.memory_tokens, sizes.width))
    if from_store
    else None
  )
  batch = Batch(
    _prompts(sizes, rows, sizes.top_k if joint else 1, ANSWER),
    documents,
    memories
    if memories is None
    else memories.astype(np.float32).astype(jax.numpy.dtype(sizes.dtype)),
    _texts(sizes, rows, length=QUESTION) if joint else None,
    valid=np.ones(rows, np.float32),
  )
  with program.context():
    # The base is frozen: no copy of it. What trains is donated and copied.
    weights = dict(weights_of(sizes))
    state = program.initial_state(
      {g: jax.tree.map(jax.numpy.copy, weights.pop(g)) for g in program.trained}
    )
    placed = jax.device_put(batch, program.batch_sharding)

    def step():
      nonlocal state
      state, metrics = program.step(state, weights, placed)
      return metrics

    timing = timed(step, sizes.repeats, jax.block_until_ready)
    return _with_flops(timing, cost.model_flops(program, batch), rows)


def jax_answer(sizes: Sizes, batch: int, merged: bool) -> dict:
  """Time to the first token, and tokens a second of those after it."""
  import jax

  from clara_jax.inference.generate import Greedy
  from clara_jax.model import Clara
  from clara_jax.nn import linear

  config = clara_config(sizes)
  model, weights = Clara(config), weights_of(sizes)
  if merged:
    base = jax.jit(functools.partial(linear.merge, scale=config.lora.scale))(
      weights["base"], weights["generator"]
    )
    weights = {"base": base, "memory_embedding": weights["memory_embedding"]}
  # No token ends an answer.
  greedy = Greedy(model, NEW_TOKENS, (-1,), 0, None if merged else "generator")
  tokens = jax.device_put(_prompts(sizes, batch, sizes.top_k, ANSWER).tokens)
  memories = jax.numpy.zeros((batch, sizes.top_k, sizes.memory_tokens, sizes.width), sizes.dtype)
  whole, prefill = jax.jit(greedy.__call__), jax.jit(greedy.prefill)
  first = timed(lambda: prefill(weights, tokens, memories), sizes.repeats, jax.block_until_ready)
  timing = timed(lambda: whole(weights, tokens, memories), sizes.repeats, jax.block_until_ready)
  decoding = timing["seconds"] - first["seconds"]
  # Each token reads all weights but the embedding's table.
  read = sum(
    x.size * x.dtype.itemsize
    for g in ("base", "generator")
    if g in weights
    for x in jax.tree.leaves(weights[g])
  )
  read -= weights["base"]["embedding"].size * weights["base"]["embedding"].dtype.itemsize
  chip = _peak()
  timing |= {
    "samples": batch,
    "time_to_first_token": first["seconds"],
    "tokens_per_second": batch * (NEW_TOKENS - 1) / decoding,
    "per_second": batch / timing["seconds"],
  }
  if chip:
    timing["bandwidth_share"] = read * (NEW_TOKENS - 1) / decoding / chip.memory_bandwidth
  return timing


def jax_full_text(sizes: Sizes, batch: int) -> dict:
  """Answers of the base alone from K documents as text."""
  import jax

  from clara_jax.batch import Tokens
  from clara_jax.inference.generate import Greedy
  from clara_jax.model import Clara

  weights, length = weights_of(sizes), sizes.top_k * sizes.document + SLOTS_AROUND
  ids = np.random.default_rng(0).integers(3, sizes.vocabulary, (batch, length), np.int32)
  tokens = jax.device_put(Tokens(ids, np.full(batch, length, np.int32)))
  answer = jax.jit(Greedy(Clara(clara_config(sizes)), NEW_TOKENS, (-1,), 0, None).__call__)
  timing = timed(lambda: answer(weights, tokens, None), sizes.repeats, jax.block_until_ready)
  return timing | {"samples": batch, "per_second": batch / timing["seconds"]}


def jax_search(sizes: Sizes) -> dict:
  """The ten nearest of a million, exactly."""
  import jax

  from clara_jax.ops.nearest import nearest, slots_needed

  slots = slots_needed(sizes.vectors, 1)
  vectors = jax.random.normal(jax.random.key(0), (slots, DIMENSION))
  queries, scale = (
    jax.random.normal(jax.random.key(1), (SEARCHED, DIMENSION)),
    (jax.numpy.arange(slots) < sizes.vectors).astype("float32"),
  )
  search = jax.jit(lambda v, s, q: nearest(v, s, q, 10))
  timing = timed(lambda: search(vectors, scale, queries), sizes.repeats, jax.block_until_ready)
  chip, read = _peak(), vectors.size * 4
  # float32: no share of the bfloat16 peak
  timing |= {"samples": SEARCHED, "per_second": SEARCHED / timing["seconds"]}
  return timing | (
    {"bandwidth_share": read / timing["seconds"] / chip.memory_bandwidth} if chip else {}
  )


# ---- PyTorch -------------------------------------------------------------------------------------


@functools.cache
def reference_of(sizes: Sizes):
  """transformers' Mistral with three PEFT adapters, SDPA."""
  import torch
  import transformers
  from torch_reference import Reference

  config = transformers.MistralConfig(
    vocab_size=sizes.vocabulary + sizes.memory_tokens + 3,
    hidden_size=sizes.width,
    intermediate_size=sizes.mlp,
    num_hidden_layers=sizes.layers,
    num_attention_heads=sizes.heads,
    num_key_value_heads=sizes.kv_heads,
    head_dim=sizes.head_dim,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    sliding_window=None,
    attn_implementation="sdpa",
  )
  device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, sizes.dtype)
  torch.manual_seed(0)
  with torch.device(device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model = transformers.MistralForCausalLM(config)
    torch.set_default_dtype(before)
  reference = Reference(
    model,
    None,
    16,
    32,
    list(range(sizes.vocabulary, sizes.vocabulary + sizes.memory_tokens)),
    dropout=0.0,
  )
  reference.model.to(device)
  return torch, reference, device


def torch_items(sizes: Sizes) -> Iterator[tuple[str, Callable[[], dict]]]:
  """The same names as `jax_items`, where there is another side."""
  yield from on_both_sides(sizes, torch_compress, torch_step, torch_answer)
  for batch in sizes.answers:
    yield f"answer merged batch {batch}", lambda batch=batch: torch_answer(sizes, batch, True)
  yield f"search {sizes.vectors} x {DIMENSION}", lambda: torch_search(sizes)


def _wait(device: str) -> Callable[[Any], Any]:
  import torch

  return (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)


def _tensor(torch, ids, device):
  ids = torch.from_numpy(np.ascontiguousarray(ids)).long().to(device)
  return ids, torch.ones_like(ids)


def torch_compress(sizes: Sizes, count: int) -> dict:
  """Documents a second."""
  torch, model, device = reference_of(sizes)
  model.training("compressor")
  ids, mask = _tensor(torch, _texts(sizes, count).ids, device)
  timing = timed(lambda: model.compress(ids, mask), sizes.repeats, _wait(device))
  return timing | {"samples": count, "per_second": count / timing["seconds"]}


def torch_step(sizes: Sizes, stage: str, rows: int, from_store: bool = False) -> dict:
  """Training steps, with gradient checkpointing as our side recomputes.

  PEFT recomputes a layer with the adapter that is active at the time of the backward pass, the
  generator's, whichever it was: the work is the same, the gradients of the other role are not
  right.
  """
  torch, model, device = reference_of(sizes)
  joint = stage == "joint"
  prompts = _prompts(sizes, rows, sizes.top_k if joint else 1, ANSWER)
  ids, mask = _tensor(torch, prompts.tokens.ids, device)
  labels = torch.full_like(ids, -100)
  labels[:, -ANSWER:] = ids[:, -ANSWER:]
  batch = {"prompt": ids, "prompt_mask": mask, "labels": labels}
  if not from_store:
    texts = _texts(sizes, rows * (sizes.candidates if joint else 1))
    batch["documents"], batch["document_mask"] = _tensor(torch, texts.ids, device)
  if joint:
    batch["question"], batch["question_mask"] = _tensor(
      torch, _texts(sizes, rows, length=QUESTION).ids, device
    )
  memories = None
  if from_store:
    memories = torch.randn(
      rows,
      sizes.candidates,
      sizes.memory_tokens,
      sizes.width,
      device=device,
      dtype=getattr(torch, sizes.dtype),
    )
  optimizer, parameters = model.training(
    *(("query_reasoner", "generator") if joint else ("compressor", "generator"))
  )
  model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
  model.model.train()

  def step():
    loss = (
      model.joint_loss(batch, sizes.top_k, memories=memories)
      if joint
      else model.given_documents_loss(batch)
    )
    return model.step(optimizer, parameters, loss)

  try:
    timing = timed(step, sizes.repeats, _wait(device))
  finally:
    model.model.gradient_checkpointing_disable()
    model.model.eval()
    if device == "cuda":
      torch.cuda.empty_cache()
  return timing | {"samples": rows, "per_second": rows / timing["seconds"]}


def torch_answer(sizes: Sizes, batch: int, merged: bool) -> dict:
  """`generate`; merged: without adapters, which costs as much as a merged model."""
  torch, model, device = reference_of(sizes)
  model.training("generator")
  ids, mask = _tensor(torch, _prompts(sizes, batch, sizes.top_k, ANSWER).tokens.ids, device)
  memories = torch.zeros(
    batch,
    sizes.top_k,
    sizes.memory_tokens,
    sizes.width,
    device=device,
    dtype=getattr(torch, sizes.dtype),
  )
  import contextlib

  with model.model.disable_adapter() if merged else contextlib.nullcontext():
    first = timed(lambda: model.answer(ids, mask, memories, 1), sizes.repeats, _wait(device))
    timing = timed(
      lambda: model.answer(ids, mask, memories, NEW_TOKENS), sizes.repeats, _wait(device)
    )
  decoding = timing["seconds"] - first["seconds"]
  return timing | {
    "samples": batch,
    "time_to_first_token": first["seconds"],
    "tokens_per_second": batch * (NEW_TOKENS - 1) / decoding,
    "per_second": batch / timing["seconds"],
  }


def torch_search(sizes: Sizes) -> dict:
  """A product and a top-k."""
  torch, _, device = reference_of(sizes)
  vectors, queries = (torch.randn(n, DIMENSION, device=device) for n in (sizes.vectors, SEARCHED))
  timing = timed(
    lambda: (queries @ vectors.T).topk(10, dim=1).indices, sizes.repeats, _wait(device)
  )
  return timing | {"samples": SEARCHED, "per_second": SEARCHED / timing["seconds"]}
