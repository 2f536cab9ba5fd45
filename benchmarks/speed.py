"""clara_jax beside a plain PyTorch implementation (`torch_reference.py`): the same rows, the same
weights, one thread each.

    python benchmarks/speed.py --data ../shared/data/squad --scratch DIR [scp_step instruct_step joint_step compress answer retrieve]

SQuAD rows with their natural lengths; width 256, 6 layers, documents of 128 tokens in 16 memory
tokens, 20 candidates, K = 5. Each side runs in a process of its own on one core (`taskset`), after
a warm-up over the same batches, several times. The first batch's losses must agree. Prints one JSON
object: rates, ratios, warm-up (compile time) apart; of ours the FLOPs and bytes by analysis, their
share of what the core can do (`machine`, measured: a large product, a large copy), and the rate
that this allows (`limit_per_second`).
"""  # noqa: E501

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

TASKS = ("scp_step", "instruct_step", "joint_step", "compress", "answer", "retrieve")
TRAINING = {"scp_step": "scp", "instruct_step": "instruct", "joint_step": "joint"}
CORE = "0"
CANDIDATES, TOP_K, NEW_TOKENS = 20, 5, 32
ROWS = {"scp_step": 8, "instruct_step": 4, "joint_step": 4}  # a batch
BATCHES, REPEATS = 4, 3
WIDTH, LAYERS = 256, 6


def clara_config(layers: int = LAYERS, document: int = 128, ratio: int = 8):
  """The configuration of both sides."""
  from clara_jax.config import ClaraConfig, LoraConfig, ModelConfig

  model = ModelConfig(
    vocab_size=4096,
    width=WIDTH,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=704,
    tie_embeddings=False,
    dtype="float32",
    param_dtype="float32",
    remat="full",
    attention="grouped",
  )
  changes = dict(pair.split("=") for pair in os.environ.get("SPEED_MODEL", "").split(",") if pair)
  model = dataclasses.replace(
    model, **{name: int(value) if value.isdigit() else value for name, value in changes.items()}
  )
  return ClaraConfig(
    model,
    LoraConfig(rank=16, alpha=32.0, dropout=0.0),
    doc_max_length=document,
    compression_rate=ratio,
    query_max_length=1024,
    decoder_max_length=1024,
    top_k=TOP_K,
  )


def make_weights(config) -> dict:
  """Random weights in which every adapter matters."""
  import jax

  from clara_jax.model import Clara

  weights = jax.jit(Clara(config).init)(jax.random.key(0))
  for i, role in enumerate(("compressor", "query_reasoner", "generator")):
    weights[role] = jax.tree.map(
      lambda x, i=i: x + 0.02 * jax.random.normal(jax.random.key(i), x.shape), weights[role]
    )
  return weights


def encoder(scratch: pathlib.Path, task: str, config, memories=None):
  """Rows to tokens."""
  from clara_jax.config import DataConfig
  from clara_jax.data.pipeline import RowEncoder
  from clara_jax.data.prompt_tokenizer import PromptTokenizer

  data = DataConfig(
    batch_size=ROWS.get(task, 4),
    candidates=CANDIDATES,
    bucket=16,
    document_bucket=8,
    label_bucket=16,
  )
  kind = "candidates" if task == "joint_step" else "given"
  return RowEncoder(
    PromptTokenizer(str(scratch / "tokenizer"), config), kind, data, TOP_K, memories
  )


def row_batches(scratch: pathlib.Path, task: str) -> list:
  """The same batches of rows on both sides."""
  from squad import CANDIDATES as in_file

  from clara_jax.data import schemas

  assert in_file == CANDIDATES
  rows = schemas.read_rows(
    [
      str(
        scratch
        / {"scp_step": "scp.jsonl", "instruct_step": "instruct5.jsonl"}.get(task, "joint.jsonl")
      )
    ]
  )
  size = ROWS.get(task, 4)
  return [rows[i * size : (i + 1) * size] for i in range(BATCHES)]


def timed(run, count: int) -> tuple[list[float], list]:
  """Seconds of each repeat over `count` batches after one that warms up, and the warm-up's
  results."""
  start = time.perf_counter()
  first = [run(i) for i in range(count)]
  warm = time.perf_counter() - start
  seconds = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    for i in range(count):
      run(i)
    seconds.append(time.perf_counter() - start)
  return [warm, *seconds], first


# ---- our side ------------------------------------------------------------------------------------


def jax_training(scratch, task, from_store):
  """Steps of a stage."""
  import random

  from clara_jax.analysis import cost
  from clara_jax.config import RunConfig, TrainConfig
  from clara_jax.memory.store import MemoryStore
  from clara_jax.sharding import put_batch
  from clara_jax.training.program import Program

  config = clara_config()
  memories = MemoryStore(str(scratch / "store")).lookup() if from_store else None
  rows = encoder(scratch, task, config, memories)
  # scp's own adapters would start anew: instruct is the same step and goes on from these.
  stage = "joint" if task == "joint_step" else "instruct"
  program = Program(
    RunConfig(
      config, rows.data, TrainConfig(stage=stage, schedule="constant", warmup_fraction=0.0)
    ),
    1000,
  )
  raw_batches = row_batches(scratch, task)
  batches = [[rows.encode(r, random.Random(0)) for r in batch] for batch in raw_batches]
  with program.context():
    weights = program.place_weights(make_weights(config))
    state = program.initial_state({g: weights.pop(g) for g in program.trained})

    def run(i):
      nonlocal state
      encoded = batches[i]
      if from_store:  # reading is part of the step
        encoded = [
          {**e, "memories": memories(r.documents)}
          for e, r in zip(encoded, raw_batches[i], strict=True)
        ]
      batch = put_batch(rows.collate(encoded), program.batch_sharding, len(encoded), None)
      state, metrics = program.step(state, weights, batch)
      return float(metrics["loss"].value)

    seconds, losses = timed(run, len(batches))
    flops = sum(cost.model_flops(program, rows.collate(b)) for b in batches)
  return {
    "seconds": seconds,
    "check": losses[0],
    "samples": ROWS[task] * BATCHES,
    "model_flops": flops,
    "bytes": len(batches) * 3 * _bytes(weights["base"]),
  }  # forward, again, backward


def documents(scratch) -> list[str]:
  """Texts to compress."""
  from clara_jax.data import schemas

  return [d.text for d in schemas.read_documents(str(scratch / "documents.jsonl"))][:256]


def jax_compress(scratch):
  """Documents in batches of 32, sorted by length."""
  import jax
  import numpy as np

  from clara_jax.analysis import flops
  from clara_jax.data.pipeline import pad_tokens
  from clara_jax.model import Clara

  config = clara_config()
  rows, weights, model = encoder(scratch, "compress", config), make_weights(config), Clara(config)
  inputs = rows.prompt_tokenizer.documents(documents(scratch))
  order = np.argsort([len(x) for x in inputs], kind="stable")
  batches = [
    pad_tokens([inputs[i] for i in order[a : a + 32]], 0, 16) for a in range(0, len(order), 32)
  ]
  compress = jax.jit(model.compress)
  seconds, first = timed(lambda i: np.asarray(compress(weights, batches[i])), len(batches))
  means = np.empty(len(order))
  means[order] = np.concatenate([m.mean((1, 2)) for m in first])
  return {
    "seconds": seconds,
    "check": float(np.abs(means).mean()),
    "samples": len(order),
    "model_flops": sum(flops.count(model.compress, weights, b) for b in batches),
    "bytes": len(batches) * _bytes(weights["base"]),
  }


def answer_batch(scratch, size):
  """Prompts and memory tokens of `size` questions."""
  import numpy as np

  config = clara_config()
  rows = encoder(scratch, "joint_step", config)
  questions = [r.questions[0] for batch in row_batches(scratch, "joint_step") for r in batch][:size]
  prompts = [rows.prompt_tokenizer.answer_prompt(q, TOP_K).ids for q in questions]
  memories = (
    np.random.default_rng(0)
    .normal(size=(size, TOP_K, config.num_memory_tokens, WIDTH))
    .astype(np.float32)
  )
  return rows.prompt_tokenizer, prompts, memories


def jax_answer(scratch, size, merged=False):
  """NEW_TOKENS tokens for each of `size` questions; `merged`: with the generator in a copy of the
  base."""
  import jax
  import numpy as np

  from clara_jax.analysis import flops
  from clara_jax.data.pipeline import pad_tokens
  from clara_jax.inference.generate import Greedy
  from clara_jax.model import Clara
  from clara_jax.nn import linear

  config = clara_config()
  weights, model = make_weights(config), Clara(config)
  prompt_tokenizer, prompts, memories = answer_batch(scratch, size)
  tokens = pad_tokens(prompts, prompt_tokenizer.pad_id, 16)
  if merged:
    weights = {
      "base": linear.merge(weights["base"], weights["generator"], config.lora.scale),
      "memory_embedding": weights["memory_embedding"],
    }
  # No token ends an answer.
  greedy = Greedy(
    model, NEW_TOKENS, (-1,), prompt_tokenizer.pad_id, None if merged else "generator"
  )
  whole, prefill = jax.jit(greedy.__call__), jax.jit(greedy.prefill)
  # What every prompt begins with is read once, when the answerer starts.
  slot = int(np.argmax(prompts[0] >= config.model.vocab_size))
  prefix_cache = jax.jit(greedy.prefill_prefix)(weights, prompts[0][:slot], None)
  seconds, first = timed(lambda _: np.asarray(whole(weights, tokens, memories, prefix_cache)), 1)
  first_token, _ = timed(
    lambda _: jax.block_until_ready(prefill(weights, tokens, memories, prefix_cache)), 1
  )
  decoding = jax.eval_shape(prefill, weights, tokens, memories, prefix_cache)
  count = (
    flops.count(prefill, weights, tokens, memories, prefix_cache),
    flops.count(greedy.decode, weights, decoding, NEW_TOKENS),
  )
  # Every token reads all weights but the embedding, and the cache.
  read = (
    _bytes([v for k, v in weights.items() if k != "memory_embedding"])
    + _bytes(decoding.cache)
    - _bytes(weights["base"]["embedding"])
  )
  return {
    "seconds": seconds,
    "check": first[0][0].tolist(),
    "samples": size * NEW_TOKENS,
    "first_token_seconds": first_token[1:],
    "model_flops": count[0] + (NEW_TOKENS - 1) * count[1],
    "bytes": (NEW_TOKENS - 1) * read,
  }


def _bytes(tree):
  import jax

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def search_vectors():
  """20,000 documents and 64 queries of 512 dimensions."""
  import numpy as np

  rng = np.random.default_rng(0)
  return rng.normal(size=(20_000, 512)).astype(np.float32), rng.normal(size=(64, 512)).astype(
    np.float32
  )


def jax_retrieve():
  """The ten nearest."""
  import numpy as np

  from clara_jax.retrieval.exact import ExactIndex

  vectors, queries = search_vectors()
  index = ExactIndex(512)
  vectors, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
  index.fill(np.arange(len(vectors)), lambda rows: vectors[rows])
  seconds, first = timed(lambda _: index.search(queries, 10)[0], 1)
  return {
    "seconds": seconds,
    "check": first[0][0].tolist(),
    "samples": len(queries),
    "model_flops": 2 * vectors.size * len(queries),
    "bytes": _bytes(vectors),
  }


def jax_machine():
  """What the core can do: a product of [2048, 2048] matrices, a copy of 256 MB (read and
  written)."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  x, product = jnp.ones((2048, 2048)), jax.jit(lambda x: x @ x)
  source = np.ones(2**26, np.float32)
  target = np.empty_like(source)
  products, _ = timed(lambda _: jax.block_until_ready(product(x)), 1)
  copies, _ = timed(lambda _: np.copyto(target, source), 1)
  return {
    "seconds": products,
    "samples": 1,
    "flops_per_second": 2 * 2048**3 / min(products[1:]),
    "bytes_per_second": 2 * source.nbytes / min(copies[1:]),
  }


# ---- the other side ------------------------------------------------------------------------------


def left_padded(torch, rows, length=None):
  """Ids and mask [B, L], padded on the left."""
  length = length or max(len(r) for r in rows)
  ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
  for i, row in enumerate(rows):
    ids[i, length - len(row) :] = torch.tensor(row)
    mask[i, length - len(row) :] = 1
  return ids, mask


def reference(scratch):
  """The PyTorch model with our weights."""
  import numpy as np
  import torch

  torch.set_num_threads(1)
  from torch_reference import Reference
  from transformers import AutoModelForCausalLM

  config = clara_config()
  adapters = {
    role: dict(np.load(scratch / f"{role}.npz"))
    for role in ("compressor", "query_reasoner", "generator")
  }
  first = config.model.vocab_size
  model = AutoModelForCausalLM.from_pretrained(
    str(scratch / "hf"), dtype=torch.float32, attn_implementation="sdpa"
  )
  return torch, Reference(
    model, adapters, 16, 32, list(range(first, first + config.num_memory_tokens))
  )


def torch_batch(torch, reference_, task, encoded, config):
  """One batch as the released code pads it."""
  m = config.num_memory_tokens
  prompts = [e["prompt"] for e in encoded]
  ids, mask = left_padded(torch, [p.ids for p in prompts])
  labels = torch.full_like(ids, -100)
  for i, p in enumerate(prompts):
    labels[i, -(len(p.ids) - p.prompt_length) :] = ids[i, -(len(p.ids) - p.prompt_length) :]
  texts = [d for e in encoded for d in e["documents"]]
  batch = {"prompt": ids, "prompt_mask": mask, "labels": labels}
  batch["documents"], batch["document_mask"] = left_padded(
    torch, texts, config.doc_max_length + 3 + m
  )
  if task == "joint_step":
    from torch_reference import QUERY_TOKENS

    batch["question"], batch["question_mask"] = left_padded(
      torch, [e["question"] for e in encoded], QUERY_TOKENS + m
    )
  return batch


def torch_training(scratch, task):
  """Steps of a stage."""
  import random

  torch, model = reference(scratch)
  config = clara_config()
  rows = encoder(scratch, task, config)
  batches = [
    torch_batch(torch, model, task, [rows.encode(r, random.Random(0)) for r in batch], config)
    for batch in row_batches(scratch, task)
  ]
  optimizer, parameters = model.training(
    *(("query_reasoner", "generator") if task == "joint_step" else ("compressor", "generator"))
  )

  def run(i):
    loss = (
      model.joint_loss(batches[i], TOP_K)
      if task == "joint_step"
      else model.given_documents_loss(batches[i])
    )
    return model.step(optimizer, parameters, loss)

  seconds, losses = timed(run, len(batches))
  return {"seconds": seconds, "check": losses[0], "samples": ROWS[task] * BATCHES}


def torch_compress(scratch):
  """Documents in batches of 32, padded to their full length."""
  torch, model = reference(scratch)
  config = clara_config()
  model.training("compressor")
  inputs = encoder(scratch, "compress", config).prompt_tokenizer.documents(documents(scratch))
  batches = [
    left_padded(torch, inputs[a : a + 32], config.doc_max_length + 3 + config.num_memory_tokens)
    for a in range(0, len(inputs), 32)
  ]
  seconds, first = timed(lambda i: model.compress(*batches[i]), len(batches))
  return {
    "seconds": seconds,
    "check": float(torch.cat(first).mean((1, 2)).abs().mean()),
    "samples": len(inputs),
  }


def torch_answer(scratch, size):
  """`model.generate`."""
  torch, model = reference(scratch)
  _, prompts, memories = answer_batch(scratch, size)
  ids, mask = left_padded(torch, prompts)
  memories = torch.from_numpy(memories)
  seconds, first = timed(lambda _: model.answer(ids, mask, memories, NEW_TOKENS), 1)
  first_token, _ = timed(lambda _: model.answer(ids, mask, memories, 1), 1)
  return {
    "seconds": seconds,
    "check": first[0][0].tolist(),
    "samples": size * NEW_TOKENS,
    "first_token_seconds": first_token[1:],
  }


def torch_retrieve():
  """A product and a top-k."""
  import torch

  torch.set_num_threads(1)
  vectors, queries = (torch.from_numpy(x) for x in search_vectors())
  vectors, queries = (x / x.norm(dim=1, keepdim=True) for x in (vectors, queries))
  seconds, first = timed(lambda _: (queries @ vectors.T).topk(10, dim=1).indices, 1)
  return {"seconds": seconds, "check": first[0][0].tolist(), "samples": len(queries)}


# ---- both ----------------------------------------------------------------------------------------


def prepare(data: pathlib.Path, scratch: pathlib.Path) -> None:
  """Rows, tokenizer, weights in both formats, and the memory store."""
  import itertools

  import jax
  import numpy as np
  from squad import prepare as prepare_squad

  from clara_jax.checkpoints import huggingface, lazy
  from clara_jax.checkpoints.keymap import lora_name, lora_place
  from clara_jax.data import schemas
  from clara_jax.data.prompt_tokenizer import PromptTokenizer
  from clara_jax.inference.checkpoint import Checkpoint
  from clara_jax.inference.compress import compress_corpus
  from clara_jax.model import Clara

  scratch.mkdir(parents=True, exist_ok=True)
  prepare_squad(data, scratch, 200, 4096)
  rows = [json.loads(line) for line in (scratch / "joint.jsonl").read_text().splitlines()]
  with open(scratch / "instruct5.jsonl", "w", encoding="utf-8") as file:
    file.writelines(
      json.dumps({**r, "docs": r["docs"][:TOP_K], "pos_index": []}) + "\n" for r in rows[:200]
    )
  config = clara_config()
  weights = jax.tree.map(np.asarray, make_weights(config))
  base = dict(weights["base"])
  first = config.model.vocab_size
  base["embedding"] = base["embedding"].copy()
  base["embedding"][first : first + config.num_memory_tokens] = weights["memory_embedding"]
  prompt_tokenizer = PromptTokenizer(str(scratch / "tokenizer"), config)
  (scratch / "hf").mkdir(exist_ok=True)
  huggingface.write_model(str(scratch / "hf"), base, config.model, None, {})
  for role in ("compressor", "query_reasoner", "generator"):
    named = lazy.named_tensors(weights[role], lora_name, lora_place)
    np.savez(scratch / f"{role}.npz", **{f"base_model.model.{t.name}": t.read() for t in named})
  texts = list(
    dict.fromkeys(
      itertools.chain.from_iterable(
        r.documents for b in row_batches(scratch, "joint_step") for r in b
      )
    )
  )
  compress_corpus(
    Checkpoint(Clara(config), prompt_tokenizer, weights),
    [schemas.Document(str(i), t) for i, t in enumerate(texts)],
    str(scratch / "store"),
    progress=False,
  )


def side(name: str, task: str, scratch: pathlib.Path, size: int) -> dict:
  """One task on one side, in this process."""
  if name == "torch":
    return {
      "compress": lambda: torch_compress(scratch),
      "answer": lambda: torch_answer(scratch, size),
      "retrieve": torch_retrieve,
    }.get(task, lambda: torch_training(scratch, task))()
  return {
    "compress": lambda: jax_compress(scratch),
    "answer": lambda: jax_answer(scratch, size, name == "jax-merged"),
    "retrieve": jax_retrieve,
    "machine": jax_machine,
  }.get(task, lambda: jax_training(scratch, task, name == "jax-store"))()


def alone(name: str, task: str, scratch: pathlib.Path, size: int = 0) -> dict:
  """The same in a process on one core with one thread."""
  environment = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "JAX_NUM_CPU_DEVICES": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  }
  command = [
    "taskset",
    "-c",
    CORE,
    sys.executable,
    __file__,
    "--scratch",
    str(scratch),
    "--side",
    name,
    "--size",
    str(size),
    task,
  ]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  report = json.loads(done.stdout.splitlines()[-1])
  warm, *seconds = report.pop("seconds")
  middle = statistics.median(seconds)
  report |= {
    "per_second": report["samples"] / middle,
    "spread": max(seconds) / min(seconds),
    "warm_up_seconds": warm - middle,
  }
  if "first_token_seconds" in report:
    report["first_token_seconds"] = statistics.median(report["first_token_seconds"])
  print(task, name, size or "", report, file=sys.stderr, flush=True)
  return report


def compare(task: str, scratch: pathlib.Path, machine: dict) -> dict:
  """Both sides of a task, with their ratio."""
  if task == "answer":
    return {
      f"batch {size}": _pair(task, scratch, machine, ("jax", "jax-merged"), size) for size in (1, 8)
    }
  return _pair(task, scratch, machine, ("jax-store", "jax") if task == "joint_step" else ("jax",))


def _pair(task, scratch, machine, ours, size=0):
  import numpy as np

  other = alone("torch", task, scratch, size)
  report = {"torch": other}
  for name in ours:
    report[name] = mine = alone(name, task, scratch, size)
    np.testing.assert_allclose(
      mine.pop("check"), other["check"], rtol=1e-4, err_msg=f"{task}: the two sides disagree"
    )
    mine["times_torch"] = mine["per_second"] / other["per_second"]
    passes = mine["per_second"] / mine["samples"]
    mine["flops_utilization"] = passes * mine["model_flops"] / machine["flops_per_second"]
    mine["bandwidth_utilisation"] = passes * mine["bytes"] / machine["bytes_per_second"]
    mine["limit_per_second"] = mine["samples"] * min(
      machine["flops_per_second"] / mine["model_flops"], machine["bytes_per_second"] / mine["bytes"]
    )
  other.pop("check")
  return report


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all"
  )
  parser.add_argument(
    "--data",
    type=pathlib.Path,
    help="the folder with SQuAD; not needed where DIR is prepared already",
  )
  parser.add_argument("--scratch", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument(
    "--model",
    default="",
    metavar="FIELD=VALUE,…",
    help="fields of our model's configuration, e.g. remat=none",
  )
  parser.add_argument(
    "--side", choices=("jax", "jax-store", "jax-merged", "torch"), help=argparse.SUPPRESS
  )
  parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if not options.side and (unknown := set(options.tasks) - set(TASKS)):
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
  if options.side:
    print(json.dumps(side(options.side, options.tasks[0], options.scratch, options.size)))
    return
  os.environ["SPEED_MODEL"] = options.model
  if not (options.scratch / "store" / "manifest.json").exists():
    prepare(options.data, options.scratch)
  machine = alone("jax", "machine", options.scratch)
  print(
    json.dumps(
      {"machine": machine}
      | {task: compare(task, options.scratch, machine) for task in options.tasks or TASKS},
      indent=2,
    )
  )


if __name__ == "__main__":
  main()
