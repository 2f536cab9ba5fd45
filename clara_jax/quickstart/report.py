"""`report.html` of the quickstart: one self-contained page with its plots."""

import html
import io
import json
from typing import Any

from etils import epath

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
figure{margin:1rem 0}svg{max-width:100%;height:auto}.doc{color:#555;font-size:.9rem;margin:.2rem 0 .2rem 1rem}
.answer{font-weight:600}code{background:#f4f4f4;padding:0 .2rem}
"""


def read_metrics(directory: str, kind: str) -> list[dict[str, float]]:
  """The lines of a run's metrics.jsonl of one kind ('train' or 'eval'), one a step, the last where a step was repeated."""
  by_step: dict[int, dict[str, float]] = {}
  for line in (epath.Path(directory) / "metrics.jsonl").read_text().splitlines():
    value = json.loads(line)
    if value["kind"] == kind:
      by_step[value["step"]] = value
  return [by_step[step] for step in sorted(by_step)]


def _figure(draw, width: float = 8, height: float = 3) -> str:
  import matplotlib
  matplotlib.use("svg")
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
  draw(axes)
  axes.spines[["top", "right"]].set_visible(False)
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata={"Date": None})
  pyplot.close(figure)
  text = buffer.getvalue()
  return f"<figure>{text[text.index('<svg'):]}</figure>"


def loss_plot(runs: dict[str, list[dict[str, float]]]) -> str:
  """Training losses over steps, one line a stage."""
  def draw(axes):
    for name, lines in runs.items():
      axes.plot([v["step"] for v in lines], [v["loss"] for v in lines], label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
  return _figure(draw)


def recall_plot(curves: dict[str, list[dict[str, float]]]) -> str:
  """Recall on unseen people during the joint stage and its comparisons: evaluations by the name of the run."""
  def draw(axes):
    for (name, lines), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
      for k, colour in ((1, "C0"), (5, "C1")):
        axes.plot([v["step"] for v in lines], [v[f"recall_at_{k}"] for v in lines], style, color=colour,
                  label=f"recall@{k}, {name.replace('_', ' ')}")
    axes.set(xlabel="step", ylabel="recall", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  return _figure(draw)


def lens_plot(tokens: list[tuple[str, float]], question: str) -> str:
  """The words of highest logit of one question's memory tokens; words of the question are dark."""
  shown = tokens[:15][::-1]

  def draw(axes):
    colours = ["C0" if word in question else "C7" for word, _ in shown]
    axes.barh([word for word, _ in shown], [logit for _, logit in shown], color=colours)
    axes.set(xlabel="logit")
  return _figure(draw, height=4)


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return " → ".join(_cell(v) for v in value)
  return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def page(title: str, intro: str, table: list[tuple[str, Any, str]], plots: list[tuple[str, str]], answers: list[dict[str, Any]],
         report: dict[str, Any]) -> str:
  """The whole page. `table` rows: (measure, value, what it means)."""
  rows = "".join(f"<tr><td>{html.escape(name)}</td><td class=n>{_cell(value)}</td><td>{html.escape(meaning)}</td></tr>"
                 for name, value, meaning in table)
  figures = "".join(f"<h2>{html.escape(name)}</h2>{svg}" for name, svg in plots)
  told = "".join(
      f"<h3>{html.escape(a['question'])}</h3><p class=answer>{html.escape(a['answer'])}</p>" + "".join(
          f"<p class=doc>{d['score']:.3f} <b>{html.escape(d['title'])}</b> {html.escape(d['text'])}</p>" for d in a["documents"])
      for a in answers)
  return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
          f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>"
          f"<table><tr><th>measure</th><th>value</th><th>meaning</th></tr>{rows}</table>{figures}"
          f"<h2>Three questions, answered from memory tokens</h2>{told}"
          f"<h2>report.json</h2><pre>{html.escape(json.dumps(report, indent=2))}</pre></html>")
