"""Every reader of foreign bytes, fed with files that were right and have been mutated: a result, or
one of the errors of bad input.

    python benchmarks/fuzz.py --workdir quickstart --scratch DIR --seconds 60 [--readers NAME …] [--seed 0]

`quickstart` is a working directory of `clara quickstart`. Prints one JSON object: cases and
refusals a reader, and what else was raised, with the file that raised it kept in DIR/found.
"""  # noqa: E501

import argparse
import copy
import json
import pathlib
import random
import shutil
import signal
import struct
import sys
import time
import traceback

import numpy as np

from clara_jax.checkpoints import convert, families, formats, gguf
from clara_jax.checkpoints.workdir import read_config
from clara_jax.cli.output import configure_logging
from clara_jax.data import schemas
from clara_jax.documents import reading
from clara_jax.errors import InputError
from clara_jax.evaluation import datasets
from clara_jax.memory.store import MemoryStore
from clara_jax.retrieval import index
from clara_jax.serving import schema
from clara_jax.synthesis import journal, replies
from clara_jax.synthesis.rounds import SCHEMAS

TOKENS = [
  b"null",
  b"[]",
  b"{}",
  b"-1",
  b"0",
  b"1e999",
  b"1" * 5000,
  b'"',
  b"\\u0000",
  b"\\ud800",
  b"\xff",
  b"\0" * 8,
  b"[" * 3000,
  b"true",
  b"NaN",
  b'"\xe4\xb8\xad"',
  b"18446744073709551616",
  b"1e39",
  b",",
  b"\n",
  b"{" * 50,
]
# What a command answers with one line and status 2.
REFUSALS = (InputError, IsADirectoryError, NotADirectoryError, PermissionError)
SECONDS = 20  # that a reader may take for a file


def mutated(content: bytes, rng: random.Random) -> bytes:
  """A file that was right, changed in a few places."""
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 5))):
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(7)
    if kind == 0 and data:
      data[place % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
      data[place:place] = rng.choice(TOKENS)
    elif kind == 2:
      del data[place : place + rng.choice((1, 4, 50))]
    elif kind == 3:
      data[place : place + rng.choice((1, 5, 20))] = rng.choice(TOKENS)
    elif kind == 4:
      other = rng.randrange(len(data) + 1)
      data[place:place] = data[other : other + rng.choice((4, 40, 400))]
    elif kind == 5 and len(data) > 8:
      at = rng.randrange(min(len(data) - 7, 64))
      data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, rng.getrandbits(64))))
    else:
      del data[place:]
  return bytes(data)


class Values:
  """A JSON file in which values are exchanged for others, so that it still parses."""

  ODD = [
    None,
    True,
    -1,
    0,
    1e39,
    2**70,
    "",
    "x",
    "\ud800",
    [],
    {},
    [None],
    {"": {}},
    "a/../../b",
    0.5,
    [1, "a"],
    ["</s>"] * 3,
  ]

  def __call__(self, content: bytes, rng: random.Random) -> bytes:
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
      places: list = []
      self._places(value, places)
      if not places:
        break
      holder, key = rng.choice(places)
      if isinstance(holder, dict) and rng.random() < 0.3:
        del holder[key]
      else:
        holder[key] = copy.deepcopy(rng.choice(self.ODD))
    return json.dumps(value).encode()

  def _places(self, value, places):
    for key in value if isinstance(value, dict) else range(len(value)):
      places.append((value, key))
      if isinstance(value[key], (dict, list)) and value[key]:
        self._places(value[key], places)


def readers(work: pathlib.Path, quickstart: pathlib.Path) -> dict:
  """Name -> (file to mutate, how, what reads it)."""
  stage, store = quickstart / "stages" / "joint", quickstart / "store"
  for kind in ("hf", "peft", "upstream"):
    options = {"role": "generator"} if kind == "peft" else {}
    convert.convert(str(stage), str(work / kind), kind, **options)
  shutil.copytree(stage, work / "clara")
  first = [
    json.loads(line) for line in (quickstart / "documents.jsonl").read_text().splitlines()[:20]
  ]
  (work / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in first))
  row = {
    "id": "1",
    "question": "Who?",
    "answer": "Ada",
    "docs": ["a", "b"],
    "pos_index": [0],
    "doc_ids": ["1", "2"],
  }
  (work / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
  (work / "squad.json").write_text(
    json.dumps(
      {
        "data": [
          {
            "title": "T",
            "paragraphs": [
              {
                "context": "c",
                "qas": [{"id": "q", "question": "Who?", "answers": [{"text": "Ada"}]}] * 2,
              }
            ],
          }
        ]
      }
    )
  )
  hotpot = {
    "_id": "x",
    "question": "Who?",
    "answer": "Ada",
    "context": [["T", ["Ada is."]]],
    "supporting_facts": [["T", 0]],
  }
  (work / "hotpot.json").write_text(json.dumps([hotpot] * 2))
  small = MemoryStore(str(work / "store"), MemoryStore(str(store)).manifest)
  rows = MemoryStore(str(store)).rows[:30]
  small.upsert(
    MemoryStore(str(store)).documents(rows),
    np.asarray(MemoryStore(str(store)).memories(rows), np.float32),
  )
  small.delete([first[0]["id"]])
  small.close()
  index.update(MemoryStore(str(work / "store")), "exact", 4)
  kept = journal.Journal(str(work / "journal.jsonl"))
  for i in range(20):
    kept.reply(f"d{i}", "k", "text", [1, 2, 3])
    kept.finish(f"d{i}", "said", {"reason": None, "rows": []})
  kept.close()
  message = {"content": json.dumps({"questions": ["Who is it?"]}), "refusal": None}
  reply = json.dumps(
    {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}
  )
  (work / "reply.json").write_text(reply)
  (work / "body.json").write_text(
    json.dumps({"question": "Who?", "k": 2, "ids": ["a"], "max_new_tokens": 3, "stream": False})
  )
  segment = next((work / "store").glob("segments-*/000000-*/segment.json"))

  def opened_store(_):
    whole = MemoryStore(str(work / "store"))
    whole.verify()
    whole.memories()

  def answered(path):
    value = schemas.parse_json(pathlib.Path(path).read_bytes())
    choices = value.get("choices") if isinstance(value, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
      replies.parse(replies.text_of(choices[0]), SCHEMAS["questions"])

  def body(path):
    schema.AnswerRequest.model_validate(schemas.parse_json(pathlib.Path(path).read_bytes()))

  def journal_of(path):
    pathlib.Path(f"{path}.lock").unlink(missing_ok=True)
    journal.Journal(path).close()
    list(journal.outcomes(path))

  def loaded(directory):
    def read(_):
      formats.load(str(work / directory), str(work / "hf") if directory == "peft" else None)

    return read

  values = Values()
  lines = work / "documents.jsonl"
  cases = {
    "documents": (lines, mutated, lambda p: list(schemas.read_documents(p))),
    "documents of synthesize": (lines, mutated, lambda p: list(reading.read(p))),
    "ids": (lines, mutated, schemas.read_ids),
    "rows": (work / "rows.jsonl", mutated, lambda p: list(schemas.parse_rows(p))),
    "rows of evaluate": (work / "rows.jsonl", mutated, datasets.read),
    "SQuAD": (work / "squad.json", mutated, datasets.read),
    "SQuAD, values": (work / "squad.json", values, datasets.read),
    "HotpotQA, values": (work / "hotpot.json", values, datasets.read),
    "journal": (work / "journal.jsonl", mutated, journal_of),
    "store: segment": (segment, mutated, opened_store),
    "store: ledger": (next((work / "store").glob("ledger-*")), mutated, opened_store),
    "store: manifest": (work / "store" / "manifest.json", mutated, opened_store),
    "store: manifest, values": (work / "store" / "manifest.json", values, opened_store),
    "store: keys": (segment.parent / "keys.npy", mutated, opened_store),
    "store: memories": (segment.parent / "memories.array_record", mutated, opened_store),
    "index": (
      work / "store" / "index" / "index.json",
      mutated,
      lambda p: index.load(MemoryStore(str(work / "store"))),
    ),
    "index, values": (
      work / "store" / "index" / "index.json",
      values,
      lambda p: index.load(MemoryStore(str(work / "store"))),
    ),
    "model reply": (work / "reply.json", mutated, answered),
    "model reply, values": (work / "reply.json", values, answered),
    "HTTP body": (work / "body.json", mutated, body),
    "HTTP body, values": (work / "body.json", values, body),
    "config.json of a base": (
      work / "hf" / "config.json",
      mutated,
      lambda p: families.model_config(str(work / "hf")),
    ),
    "config.json of a base, values": (
      work / "hf" / "config.json",
      values,
      lambda p: families.model_config(str(work / "hf")),
    ),
    "config.json of ours": (
      work / "clara" / "config.json",
      mutated,
      lambda p: read_config(str(work / "clara")),
    ),
    "config.json of ours, values": (
      work / "clara" / "config.json",
      values,
      lambda p: read_config(str(work / "clara")),
    ),
    "adapter_config.json": (work / "peft" / "adapter_config.json", mutated, loaded("peft")),
    "adapter_config.json, values": (work / "peft" / "adapter_config.json", values, loaded("peft")),
    "safetensors": (work / "hf" / "model.safetensors", mutated, loaded("hf")),
    "tokenizer.json, values": (work / "hf" / "tokenizer.json", values, loaded("hf")),
    "tokenizer_config.json, values": (work / "hf" / "tokenizer_config.json", values, loaded("hf")),
  }
  cases["GGUF header"] = (_gguf(work), mutated, lambda p: gguf.opened(p).__enter__())
  return {name: value for name, value in cases.items() if value[0].exists()}


def _gguf(work: pathlib.Path) -> pathlib.Path:
  """The header of a small file: magic, version, counts, a few fields and one tensor."""

  def text(value):
    return struct.pack("<Q", len(value)) + value.encode()

  named = (("general.architecture", "llama"), ("general.name", "x"))
  fields = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in named)
  fields += text("llama.block_count") + struct.pack("<II", 4, 1)
  fields += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
  tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 2, 0, 0)
  (work / "a.gguf").write_bytes(
    b"GGUF" + struct.pack("<IQQ", 3, 1, 4) + fields + tensor + bytes(256)
  )
  return work / "a.gguf"


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", default="quickstart")
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--seconds", type=float, default=60, help="a reader; default 60")
  parser.add_argument("--readers", nargs="+")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  configure_logging()
  work = pathlib.Path(options.scratch, "work")
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  kept = pathlib.Path(options.scratch, "found")
  kept.mkdir(exist_ok=True)
  # Replies and bodies are answered by their own errors, which are ValueErrors.
  refusals = (*REFUSALS, ValueError)

  def too_long(*_):
    raise TimeoutError

  signal.signal(signal.SIGALRM, too_long)
  report, broken = {}, False
  for name, (file, mutate, read) in readers(work, pathlib.Path(options.workdir)).items():
    if options.readers and name not in options.readers:
      continue
    rng, whole = random.Random(f"{options.seed} {name}"), file.read_bytes()
    cases = refused = 0
    others: dict[str, int] = {}
    strict = REFUSALS if not name.startswith(("model reply", "HTTP body")) else refusals
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
      cases += 1
      file.write_bytes(content := mutate(whole, rng))
      signal.alarm(SECONDS)
      try:
        with open("/dev/null", "w") as nowhere:
          error, sys.stderr = sys.stderr, nowhere
          try:
            read(str(file))
          finally:
            sys.stderr = error
      except strict:
        refused += 1
      except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = (
          f"{type(error).__name__} at {pathlib.Path(place.filename).name}:{place.lineno}: "
          f"{str(error)[:80]}"
        )
        key = what.split(": ")[0]
        if key not in others:
          (kept / f"{name.replace(' ', '-').replace(':', '')}-{len(others)}").write_bytes(content)
          print(f"{name}: {what}", file=sys.stderr, flush=True)
        others[key] = others.get(key, 0) + 1
      finally:
        signal.alarm(0)
    file.write_bytes(whole)
    report[name] = {"cases": cases, "refused": refused, **({"others": others} if others else {})}
    broken = broken or bool(others)
    print(f"{name}: {report[name]}", file=sys.stderr, flush=True)
  print(json.dumps(report, indent=2))
  sys.exit(broken)


if __name__ == "__main__":
  main()
