"""What is seen in predictions: recall, calibration, quality against compression, explained
answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from clara_jax.evaluation import statistics
from clara_jax.evaluation.explain import Explanation, Word
from clara_jax.reports.html import figure, joined, plots

_COLORS: dict[str, str] = {}


def _line(name: str) -> dict[str, str]:
  """Label and color of a run: the same in all plots."""
  return {
    "label": name.replace("_", " "),
    "color": _COLORS.setdefault(name, f"C{len(_COLORS) % 10}"),
  }


# ---- what is seen in predictions -----------------------------------------------------------------

QUALITY = ("em", "f1", "cover_em", "em_first", "grounded")
RETRIEVAL = ("recall_at_1", "recall_at_3", "recall_at_5", "recall_at_20", "mrr", "ndcg_at_5")
Predictions = Sequence[Mapping[str, Any]]


def summary(predictions: Predictions) -> dict[str, Any]:
  """Means with intervals of quality and retrieval, context tokens and seconds a question (median;
  None where every pass compiled)."""
  report: dict[str, Any] = {"rows": len(predictions)}
  for name in sorted(
    {
      k
      for p in predictions
      for k, v in p.items()
      if isinstance(v, float) and k not in ("seconds", "confidence")
    }
  ):
    values = [p[name] for p in predictions if name in p]
    if values:
      report[name] = statistics.mean(values)
  report["context_tokens"] = float(np.mean([p["context_tokens"] for p in predictions]))
  seconds = [p["seconds"] for p in predictions if p["seconds"] is not None]
  report["seconds"] = float(np.median(seconds)) if seconds else None
  return report


def recall_curve(runs: Mapping[str, Predictions]) -> str:
  """Share of gold documents among the first k, over k."""

  def draw(axes):
    for name, predictions in runs.items():
      rows = [
        (np.isin(p["ranked"], p["pos_index"]).cumsum() / len(p["pos_index"]))
        for p in predictions
        if p.get("pos_index")
      ]
      length = min(map(len, rows))
      axes.plot(
        range(1, length + 1), np.mean([r[:length] for r in rows], axis=0), marker=".", **_line(name)
      )
    axes.set(
      title="Recall of gold documents", xlabel="first k documents", ylabel="recall", ylim=(0, 1.03)
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)

  return figure(draw)


def by_bins(
  runs: Mapping[str, Predictions],
  value: Callable[[Mapping[str, Any]], float | None],
  title: str,
  xlabel: str,
  bins: int = 5,
) -> Markup | None:
  """Exact match over quantiles of a property of the row, with intervals; None where it does not
  vary."""

  def draw(axes):
    for shift, (name, predictions) in enumerate(runs.items()):
      pairs = [(v, p["em"]) for p in predictions if (v := value(p)) is not None]
      distinct = sorted({v for v, _ in pairs})
      quantiles = np.unique(np.quantile([v for v, _ in pairs], np.linspace(0, 1, bins + 1))[:-1])
      edges = np.array(distinct) if len(distinct) <= 2 * bins else quantiles
      inside = np.searchsorted(edges, [v for v, _ in pairs], side="right") - 1
      points = [
        (
          np.mean([v for (v, _), j in zip(pairs, inside, strict=True) if j == i]),
          statistics.mean([e for (_, e), j in zip(pairs, inside, strict=True) if j == i]),
        )
        for i in range(len(edges))
        if (inside == i).any()
      ]
      x = np.array([v for v, _ in points]) * (1 + 0.004 * shift)
      means = [m for _, m in points]
      axes.errorbar(
        x,
        [m.mean for m in means],
        np.maximum(0, [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]),
        marker="o",
        capsize=3,
        **_line(name),
      )
    axes.set(title=title, xlabel=xlabel, ylabel="exact match (95 % interval)", ylim=(0, 1.05))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)

  values = {v for predictions in runs.values() for p in predictions if (v := value(p)) is not None}
  return figure(draw) if len(values) > 1 else None


def calibration(runs: Mapping[str, Predictions], bins: int = 10) -> str:
  """Share of exact answers over the probability that the model gave them; the expected calibration
  error is in the legend."""

  def draw(axes):
    axes.plot([0, 1], [0, 1], color="0.75", linewidth=1)
    for name, predictions in runs.items():
      confidence, exact = (np.array([p[key] for p in predictions]) for key in ("confidence", "em"))
      places = np.minimum((confidence * bins).astype(int), bins - 1)
      inside = [places == i for i in np.unique(places)]
      x, y, n = np.array([(confidence[m].mean(), exact[m].mean(), m.sum()) for m in inside]).T
      error = (n * np.abs(x - y)).sum() / len(predictions)
      axes.plot(
        x, y, marker="o", **{**_line(name), "label": f"{name.replace('_', ' ')} (ECE {error:.2f})"}
      )
    axes.set(
      title="Calibration",
      xlabel="probability of the answer's tokens (geometric mean)",
      ylabel="exact match",
      xlim=(0, 1.02),
      ylim=(0, 1.05),
    )
    axes.legend(frameon=False)

  return figure(draw)


def against_ratio(points: Mapping[str, tuple[float, statistics.BootstrapMean]]) -> str:
  """F1 over compression ratio, a point a run."""

  def draw(axes):
    for name, (ratio, mean) in points.items():
      axes.errorbar(
        [ratio],
        [mean.mean],
        [[mean.mean - mean.low], [mean.high - mean.mean]],
        marker="o",
        capsize=3,
        **_line(name),
      )
    axes.set(
      title="Quality against compression",
      xlabel="compression ratio",
      ylabel="F1 (95 % interval)",
      xscale="log",
      ylim=(0, 1.05),
    )
    ticks = sorted({ratio for ratio, _ in points.values()})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)

  return figure(draw)


def pca_plots(sets: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> str:
  """PCA of document means and memory means (`explain.pca_2d`), a plot a checkpoint; a line joins
  the two of a document."""

  def drawer(name, projection):
    documents, memories, share = projection

    def draw(axes):
      for a, b in zip(documents, memories, strict=True):
        axes.plot(*zip(a, b, strict=True), color="0.8", linewidth=0.7, zorder=1)
      axes.scatter(*documents.T, s=14, label="mean of the document's tokens", zorder=2)
      axes.scatter(*memories.T, s=14, marker="^", label="mean of its memory tokens", zorder=2)
      axes.set(
        title=name,
        xlabel=f"first component ({share[0]:.0%} of the variance)",
        ylabel=f"second component ({share[1]:.0%})",
      )
      axes.legend(frameon=False)

    return draw

  return plots(figure(drawer(name, projection)) for name, projection in sets.items())


def word_list(words: Sequence[Word], most: int = 20) -> Markup:
  """Lens words: bold where they stand in the question, underlined where in a gold document."""

  def one(word):
    kind = " ".join(c for c, on in (("q", word.in_question), ("g", word.in_gold)) if on)
    return Markup("<span class='{}'>{}</span>").format(kind, word.word) if kind else word.word

  return joined((one(w) for w in words[:most]), ", ")


LENS_LEGEND = Markup(
  "<p class=small>Words of the logit lens: <span class=q>bold</span> stands in the question, "
  "<span class=g>underlined</span> in a gold "
  "document. Attention: share of the answer tokens' attention to memory tokens. Gain: log "
  "probability of the answer that was given, with "
  "all documents minus without this one. log p: of that answer.</p>"
)


def explained(explanation: Explanation) -> Markup:
  """One explanation."""
  right = explanation.prediction and any(
    explanation.prediction.lower() == a.lower() for a in explanation.answers
  )
  documents = joined(
    Markup(
      "<p class='doc{}'>cosine {:.3f}, attention {:.0%}, gain {:+.2f} nats{}<br>{}<br>{}</p>"
    ).format(
      " gold" if d.is_gold else "",
      d.score,
      d.attention,
      d.gain,
      ", gold" if d.is_gold else "",
      d.text[:600] + ("…" if len(d.text) > 600 else ""),
      word_list(d.lens, 12),
    )
    for d in explanation.documents
  )
  return Markup(
    "<h3>{}</h3><p><span class='answer {}'>{}</span> <span class=small>wanted: {}; log p "
    "{:.2f}</span></p>"
    "<p class=small>question: {}</p>{}"
  ).format(
    explanation.question,
    "good" if right else "bad",
    explanation.prediction or "(nothing)",
    " | ".join(explanation.answers),
    explanation.log_p,
    word_list(explanation.lens),
    documents,
  )
