"""`report.html` of the quickstart: one self-contained page with its plots."""

import json
from typing import Any

from etils import epath
from markupsafe import Markup

from clara_jax.reports import html

# Of metrics that version 0.1 wrote.
_FORMER_NAMES = {"push_first": "gold_gradient_top1", "push_top3": "gold_gradient_top3"}


def read_metrics(directory: str, kind: str) -> list[dict[str, float]]:
  """The lines of a run's metrics.jsonl of one kind ('train' or 'eval'), one a step, the last where
  a step was repeated."""
  by_step: dict[int, dict[str, float]] = {}
  for line in (epath.Path(directory) / "metrics.jsonl").read_text().splitlines():
    value = {_FORMER_NAMES.get(k, k): v for k, v in json.loads(line).items()}
    if value["kind"] == kind:
      by_step[value["step"]] = value
  return [by_step[step] for step in sorted(by_step)]


def loss_plot(runs: dict[str, list[dict[str, float]]]) -> str:
  """Training losses over steps, one line a stage."""

  def draw(axes):
    for name, lines in runs.items():
      axes.plot([v["step"] for v in lines], [v["loss"] for v in lines], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)

  return html.figure(draw)


def recall_plot(curves: dict[str, list[dict[str, float]]]) -> str:
  """Recall on unseen people during the joint stage and its comparisons: evaluations by the name of
  the run."""

  def draw(axes):
    for (name, lines), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
      for k, color in ((1, "C0"), (5, "C1")):
        axes.plot(
          [v["step"] for v in lines],
          [v[f"recall_at_{k}"] for v in lines],
          style,
          color=color,
          label=f"recall@{k}, {name.replace('_', ' ')}",
        )
    axes.set(xlabel="step", ylabel="recall", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

  return html.figure(draw)


def lens_plot(tokens: list[tuple[str, float]], question: str) -> str:
  """The words of highest logit of one question's memory tokens; words of the question are dark."""
  shown = tokens[:15][::-1]

  def draw(axes):
    colors = ["C0" if word in question else "C7" for word, _ in shown]
    axes.barh([word for word, _ in shown], [logit for _, logit in shown], color=colors)
    axes.set(xlabel="logit")

  return html.figure(draw, height=4)


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return " → ".join(_cell(v) for v in value)
  return f"{value:.3f}" if isinstance(value, float) else str(value)


def page(
  title: str,
  intro: str,
  table: list[tuple[str, Any, str]],
  plots: list[tuple[str, str]],
  answers: list[dict[str, Any]],
  report: dict[str, Any],
) -> str:
  """The whole page. `table` rows: (measure, value, what it means)."""
  answer_section = html.joined(
    Markup("<h3>{}</h3><p class=answer>{}</p>{}").format(
      a["question"],
      a["answer"],
      html.joined(
        Markup("<p class=doc>{:.3f} <b>{}</b> {}</p>").format(d["score"], d["title"], d["text"])
        for d in a["documents"]
      ),
    )
    for a in answers
  )
  return html.page(
    title,
    intro,
    [
      (
        "Figures",
        html.table(
          ["measure", "value", "meaning"],
          [[name, _cell(value), meaning] for name, value, meaning in table],
        ),
      ),
      *plots,
      ("Three questions, answered from memory tokens", answer_section),
      ("report.json", Markup("<pre>{}</pre>").format(json.dumps(report, indent=2))),
    ],
  )
