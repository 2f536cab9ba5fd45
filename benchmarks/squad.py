"""The commands on real text: SQuAD articles through pretrain, scp, instruct, joint, compress,
index, ask and evaluate.

    python benchmarks/squad.py --data ../shared/data/squad --workdir runs/squad

A model of this size does not learn to read; the run shows that every command works on real input,
and reports honest figures, with BM25 beside them. Train and test are divided by article; pretrain
and scp take paragraphs of at most 100 words, because pretrain reads them as text. Candidates of a
question are the paragraphs of its article, filled up with those of another one.
"""

import argparse
import collections
import gzip
import json
import pathlib
import random
import subprocess
import sys
import time

import bm25s
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from clara_jax.data.schemas import write_rows
from clara_jax.experiments.world import CHAT_TEMPLATE

CANDIDATES = 20


def read(path: pathlib.Path) -> list[dict]:
  """All rows of a gzipped JSONL file."""
  with gzip.open(path, "rt", encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def prepare(data: pathlib.Path, work: pathlib.Path, articles: int, vocabulary: int) -> None:
  """Rows, documents and a byte-level BPE tokenizer."""
  paragraphs = {p["id"]: p for p in read(data / "paragraphs.jsonl.gz")}
  by_title = collections.defaultdict(list)
  for p in paragraphs.values():
    by_title[p["title"]].append(p)
  titles = sorted(by_title)
  random.Random(0).shuffle(titles)
  titles = titles[:articles]
  test = set(titles[: articles // 5])
  scp = collections.defaultdict(lambda: ([], []))
  joint = {False: [], True: []}
  rng = random.Random(1)
  for q in read(data / "qa.jsonl.gz"):
    gold = paragraphs[q["paragraph_id"]]
    if gold["title"] not in set(titles):
      continue
    side = gold["title"] in test
    questions, answers = scp[gold["id"]]
    questions.append(q["question"])
    answers.append(q["answers"][0])
    others = [p for p in by_title[gold["title"]] if p["id"] != gold["id"]]
    rng.shuffle(others)
    while len(others) < CANDIDATES - 1:
      other = rng.choice(by_title[rng.choice([t for t in titles if (t in test) == side])])
      if other["id"] != gold["id"] and other not in others:
        others.append(other)
    chosen = [gold, *others[: CANDIDATES - 1]]
    rng.shuffle(chosen)
    joint[side].append(
      {
        "id": q["id"],
        "question": q["question"],
        "golden_answers": q["answers"],
        "docs": [p["text"] for p in chosen],
        "pos_index": [chosen.index(gold)],
      }
    )
  train_scp = [
    {"question": q[:4], "answers": a[:4], "docs": [paragraphs[i]["text"]]}
    for i, (q, a) in scp.items()
    if paragraphs[i]["title"] not in test and len(paragraphs[i]["text"].split()) <= 100
  ]
  for side in joint:
    rng.shuffle(joint[side])
  write_rows(train_scp, work / "scp.jsonl")
  instruct_rows = [
    {
      **r,
      "docs": [
        r["docs"][r["pos_index"][0]],
        *[d for i, d in enumerate(r["docs"]) if i != r["pos_index"][0]][:2],
      ],
      "pos_index": [0],
    }
    for r in joint[False]
  ]
  write_rows(instruct_rows, work / "instruct.jsonl")
  write_rows(joint[False], work / "joint.jsonl")
  write_rows(joint[True][:100], work / "test.jsonl")
  write_rows(
    (
      {"id": p["id"], "title": p["title"], "text": p["text"]}
      for p in paragraphs.values()
      if p["title"] in test
    ),
    work / "documents.jsonl",
  )
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=["<unk>", "<s>", "</s>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(
    (p["text"] for p in paragraphs.values() if p["title"] not in test), trainer
  )
  wrapped = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
  )
  wrapped.chat_template = CHAT_TEMPLATE
  wrapped.save_pretrained(str(work / "tokenizer"))


def clara(*arguments) -> dict:
  """Runs a command as a user would and returns its JSON."""
  done = subprocess.run(
    [sys.executable, "-m", "clara_jax", *map(str, arguments), "--json"],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout)


def bm25_recall(rows, k: int) -> float:
  """Recall@k of BM25 over each row's own candidates."""
  hits = 0
  for row in rows:
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(row["docs"], show_progress=False), show_progress=False)
    top_documents, _ = retriever.retrieve(
      bm25s.tokenize([row["question"]], show_progress=False), k=k, show_progress=False
    )
    hits += row["pos_index"][0] in set(top_documents[0].tolist())
  return hits / len(rows)


def main() -> None:
  """Prepares, trains, compresses, asks, evaluates; prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--articles", type=int, default=200)
  parser.add_argument("--steps", type=int, default=150)
  parser.add_argument("--vocabulary", type=int, default=4096)
  options = parser.parse_args()
  work = options.workdir
  work.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  prepare(options.data, work, options.articles, options.vocabulary)
  config = pathlib.Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
  shape = [
    f"--config.clara.model.vocab_size={options.vocabulary}",
    "--config.clara.doc_max_length=128",
    "--config.clara.compression_rate=16",
    "--config.clara.query_max_length=48",
    "--config.clara.decoder_max_length=640",
    f"--config.train.steps={options.steps}",
    "--config.data.batch_size=16",
    "--config.data.eval_batch_size=20",
  ]

  def train(stage, rows, *more):
    return clara(
      "train",
      "--config",
      f"{config}:{stage}",
      "--workdir",
      work / stage,
      *shape,
      f"--config.data.rows=('{work / rows}',)",
      *more,
    )

  losses = {}
  losses["pretrain"] = train(
    "pretrain",
    "scp.jsonl",
    f"--config.tokenizer={work / 'tokenizer'}",
    "--config.data.label_documents=True",
  )
  losses["scp"] = train("scp", "scp.jsonl", f"--config.base={work / 'pretrain'}")
  losses["instruct"] = train("instruct", "instruct.jsonl", f"--config.init_from={work / 'scp'}")
  losses["joint"] = train(
    "joint",
    "joint.jsonl",
    f"--config.init_from={work / 'instruct'}",
    "--config.data.batch_size=4",
    f"--config.data.eval_rows=('{work / 'test.jsonl'}',)",
    f"--config.train.steps={options.steps // 2}",
  )
  evals = [json.loads(line) for line in (work / "joint" / "metrics.jsonl").read_text().splitlines()]
  evals = [e for e in evals if e["kind"] == "eval"]
  compressed = clara(
    "compress",
    "--checkpoint",
    work / "joint",
    "--documents",
    work / "documents.jsonl",
    "--store",
    work / "store",
  )
  index = clara("index", "--store", work / "store")
  test = [json.loads(line) for line in (work / "test.jsonl").read_text().splitlines()]
  ask_report = clara(
    "ask",
    "--checkpoint",
    work / "joint",
    "--store",
    work / "store",
    test[0]["question"],
    "--max-new-tokens",
    16,
  )
  scores = {
    s: clara(
      "evaluate",
      "--checkpoint",
      work / "joint",
      "--rows",
      work / "test.jsonl",
      "--setting",
      s,
      "--limit",
      100,
      "--max-new-tokens",
      16,
    )
    for s in ("joint", "compressor")
  }
  print(
    json.dumps(
      {
        "losses": {name: round(values["loss"], 4) for name, values in losses.items()},
        "recall_at_5": {
          "before": evals[0]["recall_at_5"],
          "after": evals[-1]["recall_at_5"],
          "bm25": bm25_recall(test, 5),
        },
        "compress": compressed,
        "index": index,
        "ask": ask_report["answers"][0],
        "evaluate": scores,
        "seconds": round(time.monotonic() - start),
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()
