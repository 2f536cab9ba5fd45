"""`report.html` of a factory's directory: yield, pairs a document, coverage by round, rejects,
examples."""

import collections
import json
import pathlib
from typing import Any

import numpy as np
from markupsafe import Markup

from clara_jax.reports import html
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
  is_teacher = settings(directory).get("kind") == "instruct"
  pairs: dict[str, list[int]] = {"simple": [], "complex": []}
  missing: dict[str, list[list[int]]] = {"simple": [], "complex": []}
  examples, rejects = [], []
  for document, outcome in outcomes(directory):
    states["rejected" if outcome["reason"] else "accepted"] += 1
    refused.update(outcome["refused"])
    for kind, counts in outcome["coverage"].items():
      # A document that tells one fact has no complex questions; one that failed before its first
      # check has nothing covered.
      if counts or (outcome["reason"] or "").startswith(kind):
        missing[kind].append(counts or [1])
    if outcome["reason"]:
      reasons[outcome["reason"]] += 1
      rejects += [(document, outcome["reason"])] * (len(rejects) < 20)
      continue
    kinds = {row.get("kind"): row for row in outcome["rows"]}
    for kind in pairs:
      pairs[kind].append(len(kinds[kind]["question"]) if kind in kinds else 0)
    examples += [outcome["rows"]] * (len(examples) < EXAMPLES)
  total = sum(states.values())
  what = "questions" if is_teacher else "documents"
  numbers = {what: total, "accepted": states["accepted"], "rejected": states["rejected"]}
  sections = [
    (
      "Yield",
      html.table(["", what, "share"], [[k, v, v / max(1, total)] for k, v in states.items()]),
    ),
    ("Made by", html.table(["", ""], _made_by(directory))),
  ]
  if not is_teacher:
    numbers |= {
      f"{kind}_pairs_a_document": float(np.mean(v)) if v else 0.0 for kind, v in pairs.items()
    }
    if states["accepted"]:
      sections.append(
        ("Pairs and rounds", html.plots((_pairs_plot(pairs), _coverage_plot(missing))))
      )
  if rejects:
    sections.append(
      (
        "Rejected",
        html.table(["reason", what], [[k, v] for k, v in reasons.most_common()])
        + html.table([what[:-1], f"reason (the first {len(rejects)})"], [list(r) for r in rejects]),
      )
    )
  if refused:
    sections.append(
      (
        "Refused within the rounds",
        html.table(["by", "times"], [[k, v] for k, v in refused.most_common()]),
      )
    )
  if examples:
    sections.append(("Examples", html.joined(map(_answered if is_teacher else _example, examples))))
  html.write(
    pathlib.Path(directory) / "report.html",
    html.page(
      "Teacher's answers" if is_teacher else "SCP data",
      f"{total:,} {what}, {states['accepted']:,} accepted.",
      sections,
    ),
  )
  return numbers


def _made_by(directory: str) -> list[list[Any]]:
  """Settings, and what all shards have spent."""
  manifests = [
    json.loads(p.read_text(encoding="utf-8"))
    for p in sorted(pathlib.Path(directory).glob("manifest-*.json"))
  ]
  spent = {name: sum(m[name] for m in manifests) for name in ("requests", "tokens", "cost")}
  return [[k, str(v)] for k, v in settings(directory).items()] + [[k, v] for k, v in spent.items()]


def _pairs_plot(pairs: dict[str, list[int]]) -> str:
  def draw(axes):
    most = max((max(v) for v in pairs.values() if v), default=0)
    for shift, (kind, values) in enumerate(pairs.items()):
      counts = np.bincount(values, minlength=most + 1) if values else np.zeros(most + 1)
      axes.bar(np.arange(most + 1) + 0.4 * shift - 0.2, counts, width=0.4, label=kind)
    axes.set(title="Pairs of a document", xlabel="questions with answers", ylabel="documents")
    axes.set_xticks(range(most + 1))
    axes.legend(frameon=False)

  return html.figure(draw)


def _coverage_plot(missing: dict[str, list[list[int]]]) -> str:
  most = max((len(counts) for all_ in missing.values() for counts in all_), default=1)

  def draw(axes):
    for (kind, count_lists), mark in zip(missing.items(), "os", strict=True):
      # After its last round a document stays as it was.
      shares = (
        [
          np.mean([counts[min(n, len(counts) - 1)] == 0 for counts in count_lists])
          for n in range(most)
        ]
        if count_lists
        else []
      )
      axes.plot(range(1, len(shares) + 1), shares, marker=mark, fillstyle="none", label=kind)
    axes.set(
      title="Coverage",
      xlabel="rounds",
      ylabel="share of documents with nothing missing",
      ylim=(0, 1.03),
    )
    axes.set_xticks(range(1, most + 1))
    axes.legend(frameon=False)

  return html.figure(draw)


def _answered(rows: list[dict[str, Any]]) -> str:
  (row,) = rows
  golden = " | ".join(row["provenance"]["golden_answers"])
  documents = html.joined(
    Markup("<p class='doc{}'>{}</p>").format(" gold" if i in row["pos_index"] else "", d)
    for i, d in enumerate(row["docs"])
  )
  return Markup("<h3>{}</h3><p class=doc><b>teacher</b> {}{}</p>{}").format(
    row["question"],
    row["answer"],
    Markup(" <b>golden</b> {}").format(golden) if golden else "",
    documents,
  )


def _example(rows: list[dict[str, Any]]) -> str:
  markup = Markup("<h3>{}</h3><p class=doc>{}</p>").format(
    rows[0]["id"].rpartition("/")[0], rows[0]["docs"][0]
  )
  for row in rows:
    if isinstance(row["question"], list):
      markup += html.table(
        [row.get("kind", "question"), "answer"],
        [list(p) for p in zip(row["question"], row["answers"], strict=True)],
      )
    else:
      markup += Markup("<p class=doc><b>{}</b> {}</p>").format(
        row["question"] or "paraphrase", row["answer"]
      )
  return markup
