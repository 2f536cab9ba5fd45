"""`report.html` of a factory's directory: yield, pairs a document, coverage by round, rejects, examples."""

import collections
import html
import pathlib
from typing import Any

import numpy as np

from clara_jax.evaluation import report
from clara_jax.synthesis.factory import outcomes, settings

EXAMPLES = 5


def write(directory: str) -> dict[str, Any]:
  """Writes DIR/report.html from all shards.

  Returns:
    What it shows, in numbers.
  """
  states: collections.Counter = collections.Counter()
  reasons: collections.Counter = collections.Counter()
  refused: collections.Counter = collections.Counter()
  pairs: dict[str, list[int]] = {"simple": [], "complex": []}
  left: dict[str, collections.Counter] = {"simple": collections.Counter(), "complex": collections.Counter()}
  examples, rejects = [], []
  for document, outcome in outcomes(directory):
    states["rejected" if outcome["reason"] else "accepted"] += 1
    refused.update(outcome["refused"])
    for kind, missing in outcome["coverage"].items():
      # Documents that still lacked something after each round.
      for number, count in enumerate(missing, 1):
        left[kind][number] += count > 0
    if outcome["reason"]:
      reasons[outcome["reason"]] += 1
      rejects += [(document, outcome["reason"])] * (len(rejects) < 20)
      continue
    kinds = {row.get("kind"): row for row in outcome["rows"]}
    for kind in pairs:
      pairs[kind].append(len(kinds[kind]["question"]) if kind in kinds else 0)
    examples += [outcome["rows"]] * (len(examples) < EXAMPLES)
  total = sum(states.values())
  numbers = {"documents": total, "accepted": states["accepted"], "rejected": states["rejected"],
             **{f"{kind}_pairs_a_document": float(np.mean(v)) if v else 0.0 for kind, v in pairs.items()}}
  sections = [("Yield", report.table(["", "documents", "share"], [[k, v, v / max(1, total)] for k, v in states.items()])),
              ("Pairs and rounds", "<div class=plots>" + _pairs_plot(pairs) + _coverage_plot(left, total) + "</div>"),
              ("Rejected documents", report.table(["reason", "documents"], [[k, v] for k, v in reasons.most_common()])
               + report.table(["document", "reason"], [list(r) for r in rejects])),
              ("Refused within the rounds", report.table(["by", "times"], [[k, v] for k, v in refused.most_common()])),
              ("Examples", "".join(map(_example, examples)))]
  title = "Teacher's answers" if settings(directory).get("kind") == "instruct" else "SCP data"
  report.write(pathlib.Path(directory) / "report.html", report.page(
      title, f"{total:,} documents, {states['accepted']:,} accepted.", sections))
  return numbers


def _pairs_plot(pairs: dict[str, list[int]]) -> str:
  def draw(axes):
    most = max((max(v) for v in pairs.values() if v), default=0)
    for shift, (kind, values) in enumerate(pairs.items()):
      counts = np.bincount(values, minlength=most + 1) if values else np.zeros(most + 1)
      axes.bar(np.arange(most + 1) + 0.4 * shift - 0.2, counts, width=0.4, label=kind)
    axes.set(title="Pairs of a document", xlabel="questions with answers", ylabel="documents")
    axes.set_xticks(range(most + 1))
    axes.legend(frameon=False)
  return report.figure(draw)


def _coverage_plot(left: dict[str, collections.Counter], total: int) -> str:
  def draw(axes):
    for kind, counts in left.items():
      numbers = range(1, max(counts, default=1) + 1)
      axes.plot(numbers, [1 - counts[n] / max(1, total) for n in numbers], marker="o", label=kind)
    axes.set(title="Coverage", xlabel="rounds", ylabel="documents with nothing missing", ylim=(0, 1.03))
    axes.set_xticks(range(1, max(max(c, default=1) for c in left.values()) + 1))
    axes.legend(frameon=False)
  return report.figure(draw)


def _example(rows: list[dict[str, Any]]) -> str:
  told = f"<h3>{html.escape(rows[0]['id'].rpartition('/')[0])}</h3><p class=doc>{html.escape(rows[0]['docs'][0])}</p>"
  for row in rows:
    if isinstance(row["question"], list):
      told += report.table([row.get("kind", "question"), "answer"], [list(p) for p in zip(row["question"], row["answers"], strict=True)])
    else:
      told += f"<p class=doc><b>{html.escape(row['question'] or 'paraphrase')}</b> {html.escape(row['answer'])}</p>"
  return told
