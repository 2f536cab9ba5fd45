"""A corpus through `clara compress`, killed again and again: every document once, and what a
straight run makes.

    clara quickstart --workdir quickstart
    python benchmarks/compress.py --checkpoint quickstart/stages/joint --documents passages.jsonl.gz --scratch DIR

Prints one JSON object.
"""  # noqa: E501

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np

from clara_jax.data.schemas import read_documents
from clara_jax.memory.store import MemoryStore


def command(options, store: str) -> list[str]:
  """`clara compress`."""
  return [
    sys.executable,
    "-m",
    "clara_jax",
    "compress",
    "--checkpoint",
    options.checkpoint,
    "--documents",
    os.path.join(options.scratch, "documents.jsonl"),
    "--store",
    store,
    "--json",
    "--shard-size",
    str(options.shard_size),
  ]


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--documents", required=True)
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--count", type=int, default=50_000)
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--shard-size", type=int, default=1024)
  options = parser.parse_args()
  os.makedirs(options.scratch, exist_ok=True)
  with open(os.path.join(options.scratch, "documents.jsonl"), "w", encoding="utf-8") as file:
    ids = []
    for document in itertools.islice(read_documents(options.documents), options.count):
      ids.append(document.id)
      file.write(
        json.dumps({"id": document.id, "title": document.title, "text": document.text}) + "\n"
      )
  straight, killed = (os.path.join(options.scratch, name) for name in ("straight", "killed"))
  for store in (straight, killed):
    shutil.rmtree(store, ignore_errors=True)
  first = json.loads(
    subprocess.run(command(options, straight), stdout=subprocess.PIPE, check=True, text=True).stdout
  )
  print("straight run:", first, file=sys.stderr, flush=True)
  rng, document_counts = random.Random(0), []
  for _ in range(options.kills):
    process = subprocess.Popen(
      command(options, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    segments = os.path.join(killed, "segments-0")
    before = len(os.listdir(segments)) if os.path.isdir(segments) else 0
    # Not before a segment of its own has begun, so that every start does something.
    while (
      process.poll() is None
      and (len(os.listdir(segments)) if os.path.isdir(segments) else 0) <= before
    ):
      time.sleep(0.005)
    time.sleep(rng.uniform(0, first["seconds"] / options.kills / 2))
    process.kill()
    process.wait()
    document_counts.append(len(MemoryStore(killed)))
    print("killed with", document_counts[-1], "documents", file=sys.stderr, flush=True)
  last = json.loads(
    subprocess.run(command(options, killed), stdout=subprocess.PIPE, check=True, text=True).stdout
  )
  one, other = MemoryStore(straight), MemoryStore(killed)
  verified = other.verify()
  stored_ids = [d.id for d in other.documents()]
  rows = other.locate([d.id for d in one.documents()])
  equal = all(
    np.array_equal(one.memories(a), other.memories(b))
    for a, b in zip(np.array_split(one.rows, 50), np.array_split(rows, 50), strict=True)
  )
  print(
    json.dumps(
      {
        "documents": len(ids),
        "kills": options.kills,
        "documents_at_each_kill": document_counts,
        "straight": first,
        "last": last,
        "every_id_once": sorted(stored_ids) == sorted(ids),
        "equal_to_straight_run": equal,
        "verified": verified,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()
