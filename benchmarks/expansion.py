"""The best documents as text, beside the memory tokens of the others: answers against tokens read
(docs/ratios.md).

    python benchmarks/expansion.py --workdir runs/expansion

On the quickstart's world and pretrained base, at ratios where memory tokens begin to fail:
documents of at most 30 tokens, one or two memory tokens. Each seed learns scp, instruct with
`data.expand`, and joint; then questions are answered from the 3 best of 20 documents, n of them as
text. Resumes where it was stopped. Prints one JSON object: by memory tokens and n, exact match with
its 95 % interval over the test rows of all seeds, and the mean number of tokens that stand for
documents in a prompt.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from ratios import Variant

from clara_jax.checkpoints import formats
from clara_jax.cli.output import configure_logging
from clara_jax.config import DataConfig
from clara_jax.evaluation import statistics
from clara_jax.experiments.quickstart import recipe

STAGES = ("scp", "instruct", "joint")


class Expanding(Variant):
  """A checkpoint whose generator has learned to read documents both ways; `share`: of the rows."""

  def __init__(self, workdir: str, seed: int, m: int, rows: int, scale: float, share: float):
    super().__init__(workdir, seed, m, rows, scale)
    self._share = share

  def _data(self, stage: str) -> DataConfig:
    data = super()._data(stage)
    if stage != "instruct":
      return data
    return dataclasses.replace(data, expand=self._share, expand_documents=recipe.TOP_K - 1)

  def result(self) -> dict:
    """By n: 0 or 1 of each test row (`em`), and its `tokens`."""
    path = pathlib.Path(self._workdir, f"{self.name}.json")
    if not path.exists():
      for stage in STAGES:
        self._train(stage)
      checkpoint, result = formats.load(self._directory("joint")), {}
      for n in range(recipe.TOP_K + 1):
        rows = self._evaluate(checkpoint, recipe.CANDIDATES, "joint", expand=n)
        result[n] = {"em": [r["em"] for r in rows], "tokens": [r["context_tokens"] for r in rows]}
      path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def main() -> None:
  """Trains, evaluates and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, metavar="DIR")
  parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
  parser.add_argument("--memory-tokens", type=int, nargs="+", default=(1, 2))
  parser.add_argument("--share", type=float, default=0.5, help="data.expand; default 0.5")
  parser.add_argument("--rows", type=int, default=1000, help="test rows of each seed; default 1000")
  parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, for a trial")
  options = parser.parse_args()
  configure_logging()
  report: dict[str, dict] = {}
  for m in options.memory_tokens:
    results = [
      Expanding(options.workdir, seed, m, options.rows, options.scale, options.share).result()
      for seed in options.seeds
    ]
    report[f"{m} memory tokens"] = {}
    for n in results[0]:
      scores = np.concatenate([np.asarray(r[n]["em"]) for r in results])
      interval = statistics.mean(scores)
      report[f"{m} memory tokens"][f"{n} as text"] = {
        "em": round(float(scores.mean()), 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "tokens": round(float(np.mean([t for r in results for t in r[n]["tokens"]])), 1),
      }
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
