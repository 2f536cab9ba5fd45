"""A million rows through the data pipeline: rows a second, memory, exact resume in the middle.

    python benchmarks/data_pipeline.py --rows 1000000 --workers 2

Generates JSONL rows of the project's world (SCP; a share is malformed), writes them as ArrayRecord
(`clara records`), reads all of them through the pipeline that training uses (shards, shuffle,
tokenize, windows of like length, batch, pad), once straight and once stopped in the middle and
resumed. Prints one JSON object.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import psutil

from clara_jax.config import ClaraConfig, DataConfig, ModelConfig
from clara_jax.data import records
from clara_jax.data.pipeline import RowEncoder, TrainingBatches
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.experiments.world import World, WorldConfig

BATCH, MALFORMED_EVERY = 128, 50_000


def write(path: pathlib.Path, world: World, count: int) -> int:
  """Writes the rows, some of them broken; returns how many are."""
  rows = list(itertools.islice(world.scp_rows(versions=4), 20_000))
  broken = 0
  with path.open("w", encoding="utf-8") as file:
    for i in range(count):
      if i % MALFORMED_EVERY == MALFORMED_EVERY // 2:
        broken += 1
        file.write('{"docs": ["a document without an answer"]}\n' if i % 2 else "not JSON\n")
      row = rows[i % len(rows)]
      file.write(json.dumps({**row, "id": f"row-{i}"}) + "\n")
  return broken


def memory() -> float:
  """Resident and unshared bytes of this process and its workers, in MB."""
  me = psutil.Process()
  return sum(p.memory_full_info().uss for p in [me, *me.children(recursive=True)]) / 1e6


def main() -> None:
  """Prints the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--scratch", default=tempfile.gettempdir())
  options = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(dir=options.scratch))
  world = World(WorldConfig(people=400))
  start = time.monotonic()
  broken = write(folder / "rows.jsonl", world, options.rows)
  generated = time.monotonic() - start
  report = records.build(
    "scp", [str(folder / "rows.jsonl")], str(folder), files=8, max_malformed=broken
  )
  assert report.malformed == broken and report.rows == options.rows

  model = ModelConfig(
    vocab_size=len(world.tokenizer()),
    width=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=8,
  )
  clara = ClaraConfig(model, doc_max_length=40, compression_rate=10, decoder_max_length=512)
  data = DataConfig(batch_size=BATCH, bucket=32, shards=8, length_window=8, workers=options.workers)
  encoder = RowEncoder(PromptTokenizer(world.tokenizer(), clara), "given", data, 1)

  def batches(step=0):
    training_batches = TrainingBatches(
      records.open_sources([report.directory], data.shards), encoder, seed=0
    )
    training_batches.set_state({"step": step})
    return training_batches

  steps = options.rows // BATCH
  middle, resumed_for = steps // 2, min(200, steps // 4)
  digests, used = {}, []
  source = batches()
  start = first = time.monotonic()
  for step in range(steps):
    batch = next(source)
    if middle <= step < middle + resumed_for:
      digests[step] = hashlib.sha256(
        "".join(batch.ids).encode() + batch.batch.prompt.tokens.ids.tobytes()
      ).hexdigest()
    if step == steps // 10:
      first = time.monotonic()
    if step % (steps // 10) == 0 and step:
      used.append(round(memory()))
      print(
        f"{step * BATCH} rows, {step * BATCH / (time.monotonic() - start):.0f} rows/s, {used[-1]} "
        f"MB",
        file=sys.stderr,
        flush=True,
      )
  end = time.monotonic()
  source.close()
  again = batches(middle)
  same = all(
    hashlib.sha256("".join(b.ids).encode() + b.batch.prompt.tokens.ids.tobytes()).hexdigest()
    == digests[middle + i]
    for i, b in zip(range(resumed_for), again)
  )
  again.close()
  print(
    json.dumps(
      {
        "rows": options.rows,
        "malformed": report.malformed,
        "jsonl_seconds": round(generated),
        "records_seconds": round(report.seconds),
        "records_rows_per_second": round(options.rows / report.seconds),
        "workers": options.workers,
        "rows_per_second": round(0.9 * options.rows / (end - first)),
        "memory_mb": used,
        "resume_exact": same,
      }
    )
  )


if __name__ == "__main__":
  main()
