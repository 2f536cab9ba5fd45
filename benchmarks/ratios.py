"""One checkpoint for every compression ratio, beside one checkpoint for each (docs/ratios.md).

    python benchmarks/ratios.py --workdir runs/ratios --out docs/ratios.svg

On the generated world of `clara reproduce`: documents of at most 32 tokens, M = 4 memory tokens. The nested checkpoint learns with the first
1, 2 or 4 of them (`clara.nested_memory`) in all stages, for twice as many steps as each of the three others, which have 1, 2 or 4 and no
more. Goes on where it was stopped. Prints one JSON object: for each m and metric both means and the difference, nested minus single,
with its 95 % interval over the test rows of all seeds; and the seconds of training.
"""

import argparse
import json
import os
import pathlib
import re

import numpy as np

from clara_jax.evaluation import report, statistics
from clara_jax.reproduction.experiments import Experiments, Sizes

SINGLE = {1: "ratio_32", 2: "ratio_16", 4: "all"}  # m -> the variant of `experiments.SCP`
METRICS = {"answers": "answers from 5 given documents (EM)", "recall_at_1": "recall@1 of 20 after joint",
           "recall_at_5": "recall@5 of 20 after joint", "joint_answers": "answers from the 5 best of 20 (EM)"}


def main() -> None:
  """Trains, evaluates, prints and draws."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, metavar="DIR")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--rows", type=int, default=1000, help="test rows of each seed; default 1000")
  parser.add_argument("--scale", type=float, default=1.0, help="factor on steps, for a trial")
  parser.add_argument("--out", metavar="F.svg", help="the drawing")
  options = parser.parse_args()
  sizes = Sizes(test_rows=options.rows) if options.scale == 1 else Sizes().scaled(options.scale)
  found = {}
  for seed in range(options.seeds):
    experiments = Experiments(options.workdir, seed, sizes)
    found[seed] = {name: experiments.every_size(name) for name in ("nested", *SINGLE.values())}
  table = compare(found)
  if options.out:
    text = report.figure(lambda axes: draw(axes, table), 10, 3.6, (1, 2))
    pathlib.Path(options.out).write_text(re.sub("</?figure>", "", text), encoding="utf-8")
  print(json.dumps(table, indent=2))


def compare(found: dict[int, dict[str, dict]]) -> dict:
  """Means over all rows of all seeds."""
  made = {"rows": 0, "metrics": {}, "largest_loss": {}}
  for metric in METRICS:
    made["metrics"][metric] = {}
    for m, name in SINGLE.items():
      single, nested = (np.concatenate([np.asarray(values(r[variant], m)[metric]) for r in found.values()]) for variant in (name, "nested"))
      made["rows"] = len(nested)
      difference = statistics.compare(single, nested)
      made["metrics"][metric][m] = {"single": single.mean(), "nested": nested.mean(), "difference": difference.mean,
                                    "low": difference.low, "high": difference.high}
    made["largest_loss"][metric] = min(v["difference"] for v in made["metrics"][metric].values())
  seconds = {name: float(np.mean([r[name]["training_seconds"] for r in found.values()])) for name in ("nested", *SINGLE.values())}
  return made | {"training_seconds": seconds, "training_seconds_singles": sum(seconds[name] for name in SINGLE.values()),
                 "cores": os.cpu_count()}


def values(result: dict, m: int) -> dict:
  """Results of one m; in a file its name is text."""
  return result["sizes"].get(m) or result["sizes"][str(m)]


def draw(axes, table: dict) -> None:
  """Answers and recall against m."""
  for axis, metrics in zip(axes, (("answers", "joint_answers"), ("recall_at_1", "recall_at_5")), strict=True):
    for metric, colour in zip(metrics, ("tab:blue", "tab:orange"), strict=True):
      points = table["metrics"][metric]
      for kind, line in (("nested", "-"), ("single", "--")):
        axis.plot(list(points), [p[kind] for p in points.values()], line, marker="o", color=colour,
                  label=f"{METRICS[metric]}, {'one for all' if kind == 'nested' else 'one for each'}")
    axis.set(xlabel="memory tokens a document (M = 4)", ylim=(0, 1.03), xscale="log")
    axis.set_xticks(list(SINGLE), list(map(str, SINGLE)))
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
  main()
