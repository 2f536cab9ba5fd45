"""Every published family, small: does a model that has learned one answer give it, through every
command, with its base alone named?

    python benchmarks/published.py [--only NAME] [--json F]

For each model of clara_jax/testing/published.py (the fields, the tokenizer and the template of a
published one;
random weights): logits beside transformers', the conversion to our format and back (tensors and
files), a LoRA adapter beside PEFT's, and then train (`scp`, `instruct`, `joint`), compress, index,
ask and evaluate with `--config configs/clara.py:STAGE --config.base=DIR`. Prints the table of
docs/conversion.md.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
  "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax.numpy as jnp
import numpy as np

from clara_jax.checkpoints import formats
from clara_jax.cli import main as cli
from clara_jax.model import Clara
from clara_jax.testing import published

CONFIG = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "clara.py")
ANSWER = "Paris"
# Sizes for rows of a few words; everything else is the paper's.
SIZES = {
  "clara.doc_max_length": 40,
  "clara.compression_rate": 20,
  "clara.query_max_length": 40,
  "clara.decoder_max_length": 512,
  "clara.top_k": 2,
  "clara.lora.rank": 4,
  "clara.lora.alpha": 8.0,
  "data.batch_size": 4,
  "data.eval_batch_size": 4,
  "data.candidates": 4,
  "data.shards": 1,
  "data.length_window": 1,
  "data.workers": 0,
  "data.bucket": 512,
  "data.document_bucket": 64,
  "train.log_every": 1000,
}


def main() -> int:
  """Prints a line for each model; returns 0 where all are right."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", help="models whose name contains this")
  parser.add_argument("--json", metavar="F", help="writes what was measured")
  options = parser.parse_args()
  print(
    "| model | logits beside transformers' | adapter beside PEFT's | files and tensors come back "
    "| EM, evaluate | EM, ask |"
  )
  print("|---|---|---|---|---|---|", flush=True)
  measurements, right = {}, True
  for name in published.MODELS:
    if options.only and options.only not in name:
      continue
    with tempfile.TemporaryDirectory() as folder:
      measurements[name] = measured = measure(name, folder)
    right &= measured["evaluate"] == measured["ask"] == 1 and not measured["differs"]
    right &= max(measured["logits"], measured["adapter"]) < 1e-4
    print(
      f"| {name} | {measured['logits']:.0e} of {measured['scale']:.0f} | "
      f"{measured['adapter']:.0e} | "
      f"{', '.join(measured['differs']) or 'yes'} | {measured['evaluate']:.2f} | "
      f"{measured['ask']:.2f} |",
      flush=True,
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(measurements, indent=2))
  return 0 if right else 1


def measure(name: str, folder: str) -> dict:
  """All that is measured of one model; see the module."""
  base = f"{folder}/base"
  published.make(name, base)
  logits, scale = logit_difference(base)
  return {
    "logits": logits,
    "scale": scale,
    "adapter": adapter_difference(base, folder),
    "differs": round_trip(base, folder),
    **learned(base, folder),
  }


def logit_difference(base: str) -> tuple[float, float]:
  """Largest difference to transformers over 2 x 90 random tokens in float32, and the largest
  logit."""
  import torch
  import transformers

  checkpoint = formats.load(base, dtype="float32")
  words = checkpoint.model.config.model.vocab_size
  ids = np.random.default_rng(0).integers(0, words, (2, 90))
  reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
  with torch.no_grad():
    expected_logits = reference(
      torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long)
    ).logits.numpy()[..., :words]
  return float(
    np.abs(
      _logits(checkpoint.model, checkpoint.weights, None, ids)[..., :words] - expected_logits
    ).max()
  ), float(np.abs(expected_logits).max())


def adapter_difference(base: str, folder: str) -> float:
  """Largest difference to PEFT for a random adapter of all projections."""
  import peft
  import torch
  import transformers

  torch.manual_seed(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  adapted = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    ),
  ).eval()
  adapted.save_pretrained(f"{folder}/adapter")
  opened = formats.open_checkpoint(f"{folder}/adapter", base, "float32")
  words = opened.config.model.vocab_size
  ids = np.random.default_rng(0).integers(0, words, (2, 30))
  with torch.no_grad():
    expected_logits = adapted(
      torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long)
    ).logits.numpy()[..., :words]
  return float(
    np.abs(
      _logits(Clara(opened.config), formats.on_device(opened), "generator", ids)[..., :words]
      - expected_logits
    ).max()
  )


def _logits(model, weights, role, ids):
  hidden, _ = model.hidden(weights, role, model.embed(weights, jnp.asarray(ids)))
  return np.asarray(model.logits(weights, hidden))


def round_trip(base: str, folder: str) -> list[str]:
  """Names of files and tensors that are others after Hugging Face -> clara -> Hugging Face."""
  from safetensors import safe_open

  run("convert", base, f"{folder}/clara", "--to", "clara")
  run("convert", f"{folder}/clara", f"{folder}/again", "--to", "hf")
  differs = []
  for name in sorted(set(os.listdir(base)) - {"model.safetensors", "config.json"}):
    one, two = (pathlib.Path(d, name) for d in (base, f"{folder}/again"))
    if not two.exists() or one.read_bytes() != two.read_bytes():
      differs.append(name)
  before, after = (
    json.loads(pathlib.Path(f"{d}/config.json").read_text()) for d in (base, f"{folder}/again")
  )
  differs += [
    f"config.json:{k}"
    for k in {**before, **after}
    if before.get(k) != after.get(k) and k != "auto_map"
  ]
  with (
    safe_open(f"{base}/model.safetensors", "pt") as one,
    safe_open(f"{folder}/again/model.safetensors", "pt") as two,
  ):
    names = set(one.keys()) ^ set(two.keys())
    differs += sorted(names) + [
      n
      for n in one.keys()
      if n not in names
      and not (
        one.get_tensor(n).dtype == two.get_tensor(n).dtype
        and (one.get_tensor(n) == two.get_tensor(n)).all()
      )
    ]
  return differs


def learned(base: str, folder: str) -> dict[str, float]:
  """EM of a model that was trained to one answer, by `evaluate` and by `ask`."""
  words = ["Ada", "Berlin", "France", "Question", "capital", "system", "user", "document"]
  documents = [
    {"id": str(i), "title": w, "text": f"The {w} is in Paris."} for i, w in enumerate(words)
  ]
  texts = [d["text"] for d in documents * 2]
  rows = [
    {"question": f"Where is the {w}?", "answer": ANSWER, "docs": texts[i : i + 4], "pos_index": [0]}
    for i, w in enumerate(words)
  ]
  _write(
    f"{folder}/scp.jsonl",
    [{"question": [r["question"]], "answers": [ANSWER], "docs": r["docs"][:1]} for r in rows],
  )
  _write(f"{folder}/instruct.jsonl", [{**r, "docs": r["docs"][:2]} for r in rows])
  _write(f"{folder}/joint.jsonl", rows)
  _write(f"{folder}/documents.jsonl", documents)
  before = f"--config.base={base}"
  for stage, steps, rate in (("scp", 2, 1e-2), ("instruct", 100, 1e-2), ("joint", 2, 1e-5)):
    run(
      "train",
      "--config",
      f"{CONFIG}:{stage}",
      before,
      "--dtype",
      "float32",
      "--workdir",
      f"{folder}/{stage}",
      f'--config.data.rows=("{folder}/{stage}.jsonl",)',
      f"--config.train.steps={steps}",
      f"--config.train.learning_rate={rate}",
      *(f"--config.{k}={v}" for k, v in SIZES.items()),
    )
    before = f"--config.init_from={folder}/{stage}"
  run(
    "compress",
    "--checkpoint",
    f"{folder}/joint",
    "--documents",
    f"{folder}/documents.jsonl",
    "--store",
    f"{folder}/store",
  )
  run("index", "--store", f"{folder}/store", "--kind", "exact")
  arguments = ("--checkpoint", f"{folder}/joint", "--max-new-tokens", "8")
  ask_report = run("ask", *arguments, "--store", f"{folder}/store", *(r["question"] for r in rows))
  scores = run("evaluate", *arguments, "--rows", f"{folder}/joint.jsonl", "--setting", "joint")
  return {
    "evaluate": scores["em"],
    "ask": float(np.mean([a["answer"] == ANSWER for a in ask_report["answers"]])),
  }


def _write(path: str, rows: list[dict]) -> None:
  pathlib.Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(*arguments: str) -> dict:
  """One command; its report."""
  out, errors = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
    status = cli.main([*arguments, "--json"])
  if status:
    raise SystemExit(f"clara {' '.join(arguments)}: exit status {status}\n{errors.getvalue()}")
  return json.loads(out.getvalue())


if __name__ == "__main__":
  sys.exit(main())
