"""What a base in 8 bits changes: each stage's loss on unseen rows, with the base as it is and in int8.

    clara quickstart --workdir quickstart && python benchmarks/int8.py --workdir quickstart

The quickstart's trained stages (0.9 M parameters: harder on 8 bits than a large base). Prints one JSON object.
"""

import argparse
import dataclasses
import json
import os

from clara_jax.config import DataConfig, RunConfig, TrainConfig
from clara_jax.data import schemas
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.data.world import World
from clara_jax.interop import checkpoints
from clara_jax.quickstart.recipe import CANDIDATES, TOP_K, Sizes
from clara_jax.training import metrics
from clara_jax.training.program import Program


def losses(checkpoint: checkpoints.Checkpoint, stage: str, rows: list[schemas.Row], quantization: str) -> dict[str, float]:
  """The stage's metrics on the rows."""
  model = dataclasses.replace(checkpoint.model.config.model, base_quantization=quantization)
  clara = dataclasses.replace(checkpoint.model.config, model=model)
  config = RunConfig(clara, DataConfig(candidates=CANDIDATES), TrainConfig(stage=stage))
  program = Program(config, 1)
  encoder = RowEncoder(checkpoint.layout, program.stage.data, config.data, clara.top_k)
  with program.context():
    weights = program.place_weights(checkpoint.weights)
    if stage == "scp":  # a stage that starts afresh, evaluated with what it made
      weights |= {g: checkpoint.weights[g] for g in ("compressor", "generator", "memory_embedding")}
    total = None
    for batch in evaluation_batches(rows, encoder, config.data.eval_batch_size):
      total = metrics.add(total, program.evaluate({}, weights, batch))
  return metrics.values(total)


def main() -> None:
  """Prints the result."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of clara quickstart")
  parser.add_argument("--rows", type=int, default=512)
  options = parser.parse_args()
  world = World(Sizes().world)
  report = {}
  for stage, documents in (("scp", 1), ("instruct", TOP_K), ("joint", CANDIDATES)):
    rows = [schemas.parse_row(r, f"test:{i}") for i, r in enumerate(world.question_rows(documents, True, options.rows))]
    checkpoint = checkpoints.load(os.path.join(options.workdir, "stages", stage))
    plain, small = (losses(checkpoint, stage, rows, q) for q in ("none", "int8"))
    report[stage] = {name: [round(plain[name], 5), round(small[name], 5)] for name in plain}
  print(json.dumps(report))


if __name__ == "__main__":
  main()
