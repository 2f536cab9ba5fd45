"""One checkpoint for every compression ratio, beside one checkpoint for each (docs/ratios.md).

    python benchmarks/ratios.py --workdir runs/ratios --out docs/ratios.svg

On the quickstart's world and pretrained base: documents of at most 30 tokens, M = 6 memory tokens.
The nested checkpoint learns with the first 1, 3 or 6 of them (`clara.nested_memory`) in scp,
instruct and joint, for twice as many steps as each of the three others, which have 1, 3 or 6 and no
more. Resumes where it was stopped. Prints one JSON object: for each m and metric both means and the
difference, nested minus single, with its 95 % interval over the test rows of all seeds; and the
seconds of training.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import time

import numpy as np

from clara_jax.checkpoints import formats
from clara_jax.cli.output import configure_logging
from clara_jax.config import DataConfig, RunConfig, TrainConfig
from clara_jax.data import schemas
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.evaluation import evaluator, statistics
from clara_jax.experiments.quickstart import recipe, shipped
from clara_jax.experiments.world import World
from clara_jax.inference.compress import compress_corpus
from clara_jax.memory.store import MemoryStore
from clara_jax.reports import html
from clara_jax.training import run as training

SIZES, LONGER = (1, 3, 6), 2
STEPS = {"scp": 200, "instruct": 80, "joint": 120}
RATES = {"scp": 3e-3, "instruct": 2e-3, "joint": 2e-3}
METRICS = {
  "answers": "answers from 3 given documents (EM)",
  "recall_at_1": "recall@1 of 20 after joint",
  "recall_at_3": "recall@3 of 20 after joint",
  "joint_answers": "answers from the 3 best of 20 (EM)",
}


class Variant:
  """The three stages and the tests of one checkpoint.

  Args:
    workdir: of all.
    seed: of everything but the world and the base.
    m: its memory tokens; None for the nested one.
    rows: test rows.
    scale: factor on steps.
  """

  def __init__(self, workdir: str, seed: int, m: int | None, rows: int, scale: float):
    self.name = f"seed_{seed}/{'nested' if m is None else m}"
    self._workdir, self._seed, self._rows, self._scale = (
      workdir,
      seed,
      rows,
      scale * (LONGER if m is None else 1),
    )
    self._world = World(recipe.Sizes().world)
    self._tokenizer = self._world.tokenizer()
    # The shipped base; its own tokenizer has the special tokens of 3 memory tokens.
    plain = PromptTokenizer(self._world.tokenizer(), recipe.clara_config(len(self._tokenizer)))
    shipped.unpack(os.path.join(workdir, "shipped"), plain)
    self._base = os.path.join(workdir, "shipped", "pretrain")
    self._config = dataclasses.replace(
      recipe.clara_config(len(self._tokenizer)),
      compression_rate=30 // (m or SIZES[-1]),
      nested_memory=SIZES if m is None else (),
    )

  def result(self) -> dict:
    """`sizes`: by m, 0 or 1 of each test row for each of METRICS; `training_seconds`."""
    path = pathlib.Path(self._workdir, f"{self.name}.json")
    if path.exists():
      return json.loads(path.read_text())
    seconds = sum(self._train(stage) for stage in STEPS)
    before, after = (formats.load(self._directory(stage)) for stage in ("instruct", "joint"))
    sizes = {}
    for m in self._config.nested_memory or (self._config.num_memory_tokens,):
      answers = self._evaluate(before.first(m), recipe.TOP_K, "compressor")
      joint_scores = self._evaluate(after.first(m), recipe.CANDIDATES, "joint")
      sizes[m] = {
        "answers": [p["em"] for p in answers],
        "joint_answers": [p["em"] for p in joint_scores],
        **{k: [p[k] for p in joint_scores] for k in ("recall_at_1", "recall_at_3")},
      }
    result = {"sizes": {str(m): v for m, v in sizes.items()}, "training_seconds": seconds}
    path.write_text(json.dumps(result))
    return result

  def _directory(self, stage: str) -> str:
    return os.path.join(self._workdir, self.name, stage)

  def _data(self, stage: str) -> DataConfig:
    return DataConfig(batch_size=32, candidates=recipe.CANDIDATES, bucket=32)

  def _train(self, stage: str) -> float:
    """Seconds, compiling included."""
    done = pathlib.Path(self._directory(stage), "seconds")
    if done.exists():
      return float(done.read_text())
    previous = {"scp": None, "instruct": "scp", "joint": "instruct"}[stage]
    init_from, memories = previous and self._directory(previous), None
    if stage == "joint":
      store = os.path.join(self._workdir, self.name, "store")
      everyone = [
        schemas.Document(**d) for side in (False, True) for d in self._world.documents(side)
      ]
      compress_corpus(formats.load(init_from), everyone, store, progress=False)
      memories = MemoryStore(store).lookup()
    more = {"learning_rate_factors": {"generator": 0.1}} if stage == "joint" else {}
    train = TrainConfig(
      stage=stage,
      steps=max(1, round(STEPS[stage] * self._scale)),
      learning_rate=RATES[stage],
      seed=self._seed,
      schedule="cosine" if stage == "joint" else "linear",
      log_every=50,
      checkpoint_every=10_000,
      **more,
    )
    run = RunConfig(
      self._config,
      self._data(stage),
      train,
      base=self._base,
      init_from=init_from,
    )
    rows = [
      schemas.parse_row(r, f"{stage}:{i}")
      for i, r in enumerate(recipe.stage_rows(self._world, stage))
    ]
    print(f"== {self.name} {stage}", file=sys.stderr, flush=True)
    start = time.monotonic()
    training.train(
      run, self._directory(stage), rows=rows, memories=memories, tokenizer=self._tokenizer
    )
    done.write_text(str(time.monotonic() - start))
    return time.monotonic() - start

  def _evaluate(
    self, checkpoint: formats.Checkpoint, documents: int, setting: str, expand: int = 0
  ) -> list[dict]:
    rows = [
      schemas.parse_row(r, f"test:{i}")
      for i, r in enumerate(self._world.question_rows(documents, True, self._rows))
    ]
    return evaluator.evaluate(
      checkpoint, rows, setting, batch_size=100, max_new_tokens=8, progress=False, expand=expand
    ).predictions


def main() -> None:
  """Trains, evaluates, prints and draws."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, metavar="DIR")
  parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
  parser.add_argument("--rows", type=int, default=1000, help="test rows of each seed; default 1000")
  parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, for a trial")
  parser.add_argument("--out", metavar="F.svg", help="the drawing")
  options = parser.parse_args()
  configure_logging()
  results = {
    seed: {
      m: Variant(options.workdir, seed, m, options.rows, options.scale).result()
      for m in (*SIZES, None)
    }
    for seed in options.seeds
  }
  table = compare(results)
  if options.out:
    text = html.figure(lambda axes: draw(axes, table), 10, 3.6, (1, 2))
    pathlib.Path(options.out).write_text(re.sub("</?figure>", "", text), encoding="utf-8")
  print(json.dumps(table, indent=2))


def compare(results: dict[int, dict[int | None, dict]]) -> dict:
  """Means over all rows of all seeds."""
  report = {"rows": 0, "metrics": {}, "largest_loss": {}}
  for metric in METRICS:
    report["metrics"][metric] = {}
    for m in SIZES:
      single, nested = (
        np.concatenate([np.asarray(r[variant]["sizes"][str(m)][metric]) for r in results.values()])
        for variant in (m, None)
      )
      report["rows"] = len(nested)
      difference = statistics.compare(single, nested)
      report["metrics"][metric][m] = {
        "single": single.mean(),
        "nested": nested.mean(),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
      }
    report["largest_loss"][metric] = min(
      v["difference"] for v in report["metrics"][metric].values()
    )
  seconds = {
    name: float(np.mean([r[m]["training_seconds"] for r in results.values()]))
    for m, name in ((None, "nested"), *((m, str(m)) for m in SIZES))
  }
  return report | {
    "training_seconds": seconds,
    "training_seconds_singles": sum(seconds[str(m)] for m in SIZES),
  }


def draw(axes, table: dict) -> None:
  """Answers and recall against m."""
  for axis, metrics in zip(
    axes, (("answers", "joint_answers"), ("recall_at_1", "recall_at_3")), strict=True
  ):
    for metric, color in zip(metrics, ("tab:blue", "tab:orange"), strict=True):
      points = table["metrics"][metric]
      for kind, line in (("nested", "-"), ("single", "--")):
        axis.plot(
          list(points),
          [p[kind] for p in points.values()],
          line,
          marker="o",
          color=color,
          label=f"{METRICS[metric]}, {'one for all' if kind == 'nested' else 'one for each'}",
        )
    axis.set(xlabel="memory tokens a document (M = 6)", ylim=(0, 1.03), xscale="log")
    axis.set_xticks(list(SIZES), list(map(str, SIZES)))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
  main()
