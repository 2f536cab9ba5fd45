"""What a base in 8 bits changes: the quickstart's trained stages, evaluated on unseen people with
the base as it is and in int8.

    clara quickstart --workdir quickstart && python benchmarks/int8.py --workdir quickstart
"""

import argparse
import dataclasses
import json
import os

from clara_jax.checkpoints import formats
from clara_jax.config import DataConfig, RunConfig, TrainConfig
from clara_jax.data import schemas
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.experiments.quickstart.recipe import CANDIDATES, TOP_K, Sizes
from clara_jax.experiments.world import World
from clara_jax.sharding import put_batch
from clara_jax.training import metrics
from clara_jax.training.program import Program

ROWS = 512
DOCUMENTS = {"scp": 1, "instruct": TOP_K, "joint": CANDIDATES}
SHOWN = ("ce", "answers", "recall_at_1")


def evaluate(directory: str, stage: str, quantization: str) -> dict[str, float]:
  """Metrics of a stage's own loss on rows of people that were never seen."""
  checkpoint = formats.load(directory)
  config = checkpoint.model.config
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, base_quantization=quantization)
  )
  data = DataConfig(batch_size=64, candidates=CANDIDATES, bucket=512)
  # The loss of scp; scp itself would start with new adapters.
  loss = "joint" if stage == "joint" else "instruct"
  program = Program(RunConfig(config, data, TrainConfig(stage=loss)), steps=1)
  world = World(Sizes().world).question_rows(DOCUMENTS[stage], True, ROWS)
  rows = [schemas.parse_row(r, f"{stage}:{i}") for i, r in enumerate(world)]
  encoder = RowEncoder(checkpoint.prompt_tokenizer, program.stage.data, data, config.top_k)
  total = None
  with program.context():
    weights = program.place_weights(checkpoint.weights)
    for batch in evaluation_batches(rows, encoder, data.batch_size):
      placed = put_batch(batch, program.batch_sharding, data.batch_size, None)
      total = metrics.add(total, program.evaluate(weights, {}, placed))
  return {name: value for name, value in metrics.values(total).items() if name in SHOWN}


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="of clara quickstart")
  options = parser.parse_args()
  report = {}
  for stage in DOCUMENTS:
    directory = os.path.join(options.workdir, "stages", stage)
    report[stage] = {kind: evaluate(directory, stage, kind) for kind in ("none", "int8")}
    none, int8 = report[stage]["none"]["ce"], report[stage]["int8"]["ce"]
    report[stage]["relative_ce_difference"] = (int8 - none) / none
  print(json.dumps(report))


if __name__ == "__main__":
  main()
