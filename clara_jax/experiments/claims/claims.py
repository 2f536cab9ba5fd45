"""The paper's claims, each as a comparison of experiments over seeds, with a plain verdict."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clara_jax.config import ConfigError
from clara_jax.experiments.claims.experiments import (
  DOCUMENTS_AT_TEST,
  JOINT,
  RATIO,
  Experiments,
  ExperimentSizes,
)
from clara_jax.experiments.quickstart.recipe import TOP_K
from clara_jax.reports import html

log = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, Any]]  # of one seed, by experiment


@dataclasses.dataclass(frozen=True)
class Comparison:
  """`better` is what the paper says is larger, or, with `slack`, not smaller by more than that.

  Attributes:
    metric: what is compared.
    better, worse: (experiment, key of its result).
    name_better, name_worse: in words.
    slack: for claims that something costs little.
  """

  metric: str
  better: tuple[str, str]
  worse: tuple[str, str]
  name_better: str
  name_worse: str
  slack: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim.

  Attributes:
    letter: its name on the command line.
    says: the claim.
    paper: the paper's figures or words.
    needs: experiments, as calls on `Experiments`.
    comparisons: what must come out; none where the claim is a curve.
    curve: (label, value on the axis, experiment, key) points of a plot, its title and the axis.
  """

  letter: str
  says: str
  paper: str
  needs: tuple[tuple[str, Callable[[Experiments], Mapping[str, Any]]], ...]
  comparisons: tuple[Comparison, ...]
  curve: tuple[str, str, tuple[tuple[float, str, str], ...]] | None = None


def _answers(*names: str):
  return tuple((f"answers_{n}", lambda e, n=n: e.answers(n)) for n in names)


def _retrieval(*names: str):
  return tuple((n, lambda e, n=n: e.retrieval(n)) for n in names)


def _answers_than(
  other: str, words: str, metric: str = "em", better: str = "all", said: str = "all three"
):
  return Comparison(
    f"answers ({metric.upper()})",
    (f"answers_{better}", metric),
    (f"answers_{other}", metric),
    said,
    words,
  )


_SLACK = 0.05  # what "little" is

CLAIMS = {
  c.letter: c
  for c in (
    Claim(
      "a",
      "SCP makes better answers than reconstruction alone, and than no pretraining of the "
      "compressor",
      "cover EM 61.53 with SCP, 54.39 without (ratio 16, oracle)",
      _answers("all", "reconstruction", "none"),
      (
        _answers_than("reconstruction", "reconstruction only", said="SCP"),
        _answers_than("none", "no pretraining", said="SCP"),
      ),
    ),
    Claim(
      "b",
      "Simple questions, complex questions and paraphrases together beat each of them alone",
      "all three are best on average",
      _answers("all", "simple", "complex", "paraphrase"),
      (
        _answers_than("simple", "simple questions"),
        _answers_than("complex", "complex questions"),
        _answers_than("paraphrase", "paraphrases"),
      ),
    ),
    Claim(
      "c",
      "The MSE term brings the means of documents and memory tokens together, and helps answers a "
      "little",
      "MSE adds 0.3 to 0.6 points",
      _answers("all", "without_mse"),
      (
        Comparison(
          "squared distance of the two means, by the documents' variance",
          ("answers_without_mse", "distance"),
          ("answers_all", "distance"),
          "without MSE",
          "with MSE",
        ),
        _answers_than("without_mse", "without MSE", said="with MSE"),
      ),
    ),
    Claim(
      "d",
      "The joint stage raises recall without labels and beats training the generator only",
      "F1 70.91 against 52.54 (HotpotQA)",
      _retrieval("joint", "generator_only"),
      (
        Comparison(
          "recall@1",
          ("joint", "recall_at_1"),
          ("joint", "recall_at_1_before"),
          "after joint",
          "before",
        ),
        Comparison(
          "recall@1",
          ("joint", "recall_at_1"),
          ("generator_only", "recall_at_1"),
          "joint",
          "generator only",
        ),
        Comparison(
          "answers (EM)", ("joint", "em"), ("generator_only", "em"), "joint", "generator only"
        ),
      ),
    ),
    Claim(
      "e",
      "Retrieval learned without labels keeps up with retrieval learned from labels",
      "recall@5 96.21 against 82.84 with labels (HotpotQA); 79.13 against 85.02 (2Wiki)",
      _retrieval("joint", "contrastive"),
      (
        Comparison(
          "recall@1",
          ("joint", "recall_at_1"),
          ("contrastive", "recall_at_1"),
          "joint",
          "contrastive, with labels",
        ),
        Comparison(
          "recall@5",
          ("joint", "recall_at_5"),
          ("contrastive", "recall_at_5"),
          "joint",
          "contrastive, with labels",
        ),
        Comparison(
          "answers (EM)",
          ("joint", "em"),
          ("contrastive", "em"),
          "joint",
          "contrastive, with labels",
        ),
      ),
    ),
    Claim(
      "f",
      "A query reasoner that starts as a copy of the compressor beats a fresh one",
      "F1 70.91 against 66.84 (HotpotQA)",
      _retrieval("joint_slow", "fresh_slow", "joint", "fresh"),
      (
        Comparison(
          "recall@1, joint a twentieth of SCP's learning rate, as in the paper",
          ("joint_slow", "recall_at_1"),
          ("fresh_slow", "recall_at_1"),
          "copy",
          "fresh",
        ),
        Comparison(
          "answers (EM), the same", ("joint_slow", "em"), ("fresh_slow", "em"), "copy", "fresh"
        ),
        Comparison(
          "recall@1, joint as fast as in (d)",
          ("joint", "recall_at_1"),
          ("fresh", "recall_at_1"),
          "copy",
          "fresh",
        ),
        Comparison("answers (EM), the same", ("joint", "em"), ("fresh", "em"), "copy", "fresh"),
      ),
    ),
    Claim(
      "g",
      "Answers fall slowly as the compression ratio rises",
      "cover EM 66.76, 63.90, 61.53, 58.66 at ratios 4, 16, 32, 64 (oracle)",
      _answers("ratio_2", "ratio_4", "all", "ratio_16", "ratio_32"),
      tuple(
        Comparison(
          "answers (EM)",
          (f"answers_{name}", "em"),
          ("answers_ratio_2", "em"),
          f"ratio {ratio}, {_SLACK:.0%} allowed",
          "ratio 2",
          _SLACK,
        )
        for name, ratio in (("all", RATIO), ("ratio_32", 32))
      ),
      (
        "Answers against compression",
        "compression ratio",
        tuple(
          (r, "answers_all" if r == RATIO else f"answers_ratio_{r}", "em")
          for r in (2, 4, RATIO, 16, 32)
        ),
      ),
    ),
    Claim(
      "h",
      f"Fewer or more documents at test time than the {TOP_K} of training cost little",
      "more test-time documents than in training cost little",
      (("documents_at_test", lambda e: e.documents_at_test()),),
      tuple(
        Comparison(
          "answers (EM)",
          ("documents_at_test", f"em_{n}"),
          ("documents_at_test", f"em_{TOP_K}"),
          f"{n} documents, {_SLACK:.0%} allowed",
          f"{TOP_K} documents",
          _SLACK,
        )
        for n in (1, 5, 8)
      ),
      (
        "Answers against documents at test time",
        "documents in the prompt",
        tuple((n, "documents_at_test", f"em_{n}") for n in DOCUMENTS_AT_TEST),
      ),
    ),
  )
}
HOLDS, OPPOSITE, OPEN = "as in the paper", "the opposite", "not told apart"


def outcome(better: Sequence[float], worse: Sequence[float]) -> str:
  """Whether the ranges over seeds are apart, and which way."""
  if min(better) > max(worse):
    return HOLDS
  return OPPOSITE if max(better) < min(worse) else OPEN


def run(
  workdir: str,
  claims: Sequence[str] = tuple(CLAIMS),
  seeds: int = 3,
  scale: float = 1.0,
  sizes: ExperimentSizes | None = None,
) -> dict[str, Any]:
  """Runs the experiments of some claims and writes WORKDIR/reproduction.json, .md and .html.

  Args:
    workdir: everything is kept here; what is there is not done again.
    claims: letters.
    seeds: how many.
    scale: factor on steps and test rows.
    sizes: other ones are for tests.

  Raises:
    ConfigError: an unknown claim, or a directory of another scale.
  """
  if unknown := set(claims) - set(CLAIMS):
    raise ConfigError(f"--claims: unknown {sorted(unknown)}; known: {', '.join(CLAIMS)}")
  sizes = (sizes or ExperimentSizes()).scaled(scale)
  same_sizes(workdir, sizes)
  start = time.monotonic()
  results: dict[int, dict[str, Any]] = {}
  for seed in range(seeds):
    experiments = Experiments(workdir, seed, sizes)
    results[seed] = {}
    for letter in claims:
      for name, make in CLAIMS[letter].needs:
        results[seed][name] = make(experiments)
  report = {
    "scale": scale,
    "seeds": seeds,
    "seconds": round(time.monotonic() - start),
    "experiment_seconds": round(sum(r["seconds"] for s in results.values() for r in s.values())),
    "sizes": dataclasses.asdict(sizes),
    "claims": {letter: judge(CLAIMS[letter], results) for letter in claims},
    "results": results,
  }
  with open(os.path.join(workdir, "reproduction.json"), "w", encoding="utf-8") as file:
    json.dump(report, file, indent=2)
  with open(os.path.join(workdir, "reproduction.md"), "w", encoding="utf-8") as file:
    file.write(markdown(report))
  html.write(os.path.join(workdir, "reproduction.html"), _page(report, results))
  log.info(f"\nWritten: {workdir}/reproduction.json, .md and .html")
  return report


def same_sizes(workdir: str, sizes: ExperimentSizes) -> None:
  """Notes the sizes of a directory, or compares them.

  Raises:
    ConfigError: it has experiments of other sizes.
  """
  path = os.path.join(workdir, "sizes.json")
  requested_sizes = json.loads(json.dumps(dataclasses.asdict(sizes)))
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      if (stored_sizes := json.load(file)) != requested_sizes:
        changed = [
          f"{k}: {stored_sizes[k]} there, {v} asked for"
          for k, v in requested_sizes.items()
          if stored_sizes.get(k) != v
        ]
        raise ConfigError(
          f"{workdir}: has experiments of other sizes ({'; '.join(changed)}); name another "
          f"--workdir"
        )
    return
  os.makedirs(workdir, exist_ok=True)
  with open(path, "w", encoding="utf-8") as file:
    json.dump(requested_sizes, file, indent=2)


def judge(claim: Claim, results: Mapping[int, Results]) -> dict[str, Any]:
  """A claim's comparisons over seeds."""
  lines = []
  for c in claim.comparisons:
    better, worse = ([r[name][key] for r in results.values()] for name, key in (c.better, c.worse))
    lines.append(
      {
        "metric": c.metric,
        "better": c.name_better,
        "worse": c.name_worse,
        "values_better": better,
        "values_worse": worse,
        "outcome": outcome([b + c.slack for b in better], worse),
      }
    )
  outcomes = {line["outcome"] for line in lines}
  verdict = (
    outcomes.pop()
    if len(outcomes) == 1
    else "in part: "
    + "; ".join(
      f"{line['metric']}, {line['better']} over {line['worse']}: {line['outcome']}"
      for line in lines
    )
  )
  return {"says": claim.says, "paper": claim.paper, "verdict": verdict, "comparisons": lines}


def _range(values: Sequence[float]) -> str:
  return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def markdown(report: Mapping[str, Any]) -> str:
  """The table for a document."""
  lines = [
    "| | claim | the paper | what was compared | larger in the paper | smaller in the paper | "
    "verdict |",
    "|---|---|---|---|---|---|---|",
  ]
  for letter, claim in report["claims"].items():
    for i, c in enumerate(claim["comparisons"]):
      head = f"| ({letter}) | {claim['says']} | {claim['paper']} " if not i else "| | | "
      lines.append(
        f"{head}| {c['metric']} | {c['better']}: {_range(c['values_better'])} | {c['worse']}: "
        f"{_range(c['values_worse'])} | "
        f"**{c['outcome']}** |"
      )
  return "\n".join(lines) + "\n"


def _page(report: Mapping[str, Any], results: Mapping[int, Results]) -> str:
  rows = [
    [
      f"({letter}) {claim['says']}" if not i else "",
      claim["paper"] if not i else "",
      c["metric"],
      f"{c['better']}: {_range(c['values_better'])}",
      f"{c['worse']}: {_range(c['values_worse'])}",
      c["outcome"],
    ]
    for letter, claim in report["claims"].items()
    for i, c in enumerate(claim["comparisons"])
  ]
  plots = []
  for letter in report["claims"]:
    if curve := CLAIMS[letter].curve:
      plots.append(_curve(*curve, results))
  names = [n for n in JOINT if all(n in r for r in results.values())]
  if names:
    plots.append(_recall(names, results))
  intro = (
    "One seed."
    if report["seeds"] == 1
    else (
      f"{report['seeds']} seeds; mean (range over seeds). Two numbers count as told apart only "
      f"where their ranges do not touch."
    )
  )
  table = html.table(
    ["claim", "the paper", "compared", "larger in the paper", "smaller in the paper", "verdict"],
    rows,
  )
  return html.page(
    "The paper's claims on a generated world",
    intro,
    [("Claims", table), ("Curves", html.plots(plots))],
  )


def _curve(
  title: str, axis: str, points: Sequence[tuple[float, str, str]], results: Mapping[int, Results]
) -> str:
  def draw(axes):
    x = [p[0] for p in points]
    values = np.array([[r[name][key] for _, name, key in points] for r in results.values()])
    axes.plot(x, values.mean(0), marker="o", label="mean over seeds")
    axes.fill_between(x, values.min(0), values.max(0), alpha=0.2, label="range")
    axes.set(title=title, xlabel=axis, ylabel="exact match", xscale="log", ylim=(0, 1.05))
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.minorticks_off()
    axes.legend(frameon=False)

  return html.figure(draw)


def _recall(names: Sequence[str], results: Mapping[int, Results]) -> str:
  def draw(axes):
    for name in names:
      curves = [np.array(r[name]["curve"]) for r in results.values()]
      values = np.stack([c[:, 1] for c in curves])
      axes.plot(curves[0][:, 0], values.mean(0), marker=".", label=name.replace("_", " "))
      axes.fill_between(curves[0][:, 0], values.min(0), values.max(0), alpha=0.15)
    axes.set(
      title="Recall on unseen people during the joint stage",
      xlabel="step",
      ylabel="recall@1",
      ylim=(0, 1.03),
    )
    axes.legend(frameon=False)

  return html.figure(draw)
