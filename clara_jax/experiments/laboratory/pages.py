"""`gradients.html` and its figures, of what a directory has: audit.json, generator.json,
compare.json."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from clara_jax.experiments.laboratory.compare import REFERENCE, interval
from clara_jax.reports import html

MEASURES = ("cosine", "cosine_of_one", "bias", "bias_error", "variance", "norm")
LEGEND = (
  "Cosine: of the mean over draws and the exact gradient; cosine_of_one: of a single draw, on "
  "average; bias: distance of the mean "
  "from the exact one, by the exact one's norm, of which bias_error is what chance alone makes; "
  "variance: of a draw, by the square "
  "of that norm; norm: of the mean, by it. An estimator with draws costs as many passes of the "
  "generator a row. Those that draw "
  "nothing are held against the same expectation."
)
AXES = {
  "temperature": "temperature τ",
  "spread": "standard deviation of the scores",
  "k": "K",
  "n": "N",
  "correlation": "correlation of memories",
  "loss": "loss",
}
# Estimators keep their color and mark on all plots.
_COLORS = (
  "#1f4e9c",
  "#c0392b",
  "#1d7a3b",
  "#8e44ad",
  "#c47a00",
  "#00838f",
  "#5d4037",
  "#d81b60",
  "#607d8b",
  "#827717",
  "#000000",
  "#3f51b5",
  "#ff7043",
  "#26a69a",
  "#9e9d24",
  "#ad1457",
  "#4e342e",
  "#90a4ae",
)
_MARKS = "os^vDPX*<>phd81234"


def write(directory: str) -> dict[str, str]:
  """Writes DIR/gradients.html, DIR/gradients.md (the tables) and the figures as DIR/*.svg.

  Returns:
    The files.
  """
  folder = pathlib.Path(directory)
  reports = {
    name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("audit", "generator", "compare")
    if (folder / f"{name}.json").exists()
  }
  sections: list[tuple[str, str]] = []
  tables: list[str] = []
  files = {}

  def add(title: str, text: str, header: Sequence[str], rows: list[list[Any]]) -> None:
    sections.append((title, Markup("<p>{}</p>").format(text) + html.table(header, rows)))
    tables.append(f"## {title}\n\n{text}\n\n" + html.markdown(header, rows))

  def draw(name: str, svg: str) -> None:
    sections[-1] = (sections[-1][0], sections[-1][1] + svg)
    files[name] = str(folder / f"{name}.svg")
    (folder / f"{name}.svg").write_text(
      svg.removeprefix("<figure>").removesuffix("</figure>"), encoding="utf-8"
    )

  if "audit" in reports:
    base = reports["audit"]["settings"][0]
    add(
      "Against the exact gradient, synthetic loss",
      f"{_setting(base['setting'])}; {reports['audit']['draws']} draws, "
      f"{reports['audit']['instances']} instances, medians. Exact: of the "
      "expected loss when documents are drawn from the Plackett–Luce distribution of the scores. "
      + LEGEND,
      ["estimator", *MEASURES, "cosine, uniform noise", "cosine, subsets"],
      [
        [
          name,
          *(v["plackett_luce"][m] for m in MEASURES),
          v["uniform_noise"]["cosine"],
          v["subsets"]["cosine"],
        ]
        for name, v in _shown(reports["audit"], base)
      ],
    )
    if any(entry["varies"] for entry in reports["audit"]["settings"]):
      draw("audit_cosine", _varied(reports["audit"], "cosine", "cosine to the exact gradient"))
      draw("audit_error", _varied(reports["audit"], "error", "relative error of one draw"))
  if "generator" in reports:
    g = reports["generator"]
    add(
      "Against the exact gradient, a generator's loss",
      f"{g['rows']} questions, N = {g['n']}, K = {g['k']} ({g['choices']} ordered choices), τ = "
      f"{g['temperature']:g}, standard deviation "
      f"of the scores {g['spread']:.3f}; {g['draws']} draws, medians over questions. " + LEGEND,
      ["estimator", *MEASURES, "cosine, uniform noise", "cosine, subsets"],
      [
        [
          name,
          *(v["plackett_luce"][m] for m in MEASURES),
          v["uniform_noise"]["cosine"],
          v["subsets"]["cosine"],
        ]
        for name, v in g["estimators"].items()
      ],
    )
  if "compare" in reports:
    c = reports["compare"]
    rows = []
    for name, results in c["results"].items():
      recall, answers = ([r[key] for r in results] for key in ("recall_at_1", "em"))
      mean, low, high = interval(recall)
      rows.append(
        [
          name,
          f"{mean:.3f} [{low:.3f}, {high:.3f}]",
          f"{min(recall):.3f}–{max(recall):.3f}",
          float(np.mean(answers)),
          float(np.median([r["milliseconds"] for r in results])),
          c["against_algorithm1"].get(name, ""),
        ]
      )
    rows.sort(key=lambda row: row[1], reverse=True)
    add(
      "Trained with",
      f"Joint stage on the generated world, {c['steps']} steps, {c['seeds']} seeds, "
      f"{c['test_rows']} questions about "
      "people never seen in training, 20 candidates. Mean with its 95 % interval over seeds.",
      ["estimator", "recall@1", "range", "answers (EM)", "ms a step", f"against {REFERENCE}"],
      rows,
    )
    draw("compare_recall", _recall(c))
    draw("compare_paths", _paths(c))
  html.write(
    folder / "gradients.html",
    html.page("Gradient estimators", "Bias, variance and what they come to in training.", sections),
  )
  (folder / "gradients.md").write_text("\n".join(tables), encoding="utf-8")
  return {"page": str(folder / "gradients.html"), "tables": str(folder / "gradients.md"), **files}


def _setting(values: Mapping[str, Any]) -> str:
  return (
    f"loss {values['loss']!r}, N = {values['n']}, K = {values['k']}, τ = "
    f"{values['temperature']:g}, scores' standard deviation "
    f"{values['spread']:g}, memories' correlation {values['correlation']:g}"
  )


def _style(names: Sequence[str]) -> dict[str, dict[str, str]]:
  return {
    name: {"color": _COLORS[i % len(_COLORS)], "marker": _MARKS[i % len(_MARKS)]}
    for i, name in enumerate(names)
  }


def _varied(audit: Mapping[str, Any], measure: str, label: str) -> str:
  """One panel for each thing that was varied."""
  names = [name for name, _ in _shown(audit, audit["settings"][0])]
  style = _style(names)
  axes_of = {
    f: title for f, title in AXES.items() if any(e["varies"] == f for e in audit["settings"])
  }
  columns = min(3, len(axes_of))
  lines = -(-len(axes_of) // columns)

  def value(entry, name):
    summary = entry["estimators"][name]["plackett_luce"]
    return (
      summary["cosine"]
      if measure == "cosine"
      else float(np.sqrt(summary["bias"] ** 2 + summary["variance"]))
    )

  def draw(axes):
    panels = list(np.atleast_1d(axes).flat)
    for panel in panels[len(axes_of) :]:
      panel.set_axis_off()
    for panel, (factor, title) in zip(panels, axes_of.items(), strict=False):
      entries = [
        e
        for e in audit["settings"]
        if e["varies"] == factor and all(name in e["estimators"] for name in names)
      ]
      x = [e["setting"][factor] for e in entries]
      places = range(len(x)) if factor == "loss" else x
      for name in names:
        panel.plot(
          places,
          [value(e, name) for e in entries],
          label=name,
          markersize=4,
          linewidth=1,
          **style[name],
        )
      panel.set(title=title, xlabel=title, ylabel=label)
      if factor in ("temperature", "spread"):
        panel.set_xscale("log")
      panel.set_xticks(list(places), [str(v) for v in x])
      panel.minorticks_off()
      if measure == "cosine":
        panel.set_ylim(-0.05, 1.05)
      else:
        panel.set(yscale="log", ylim=(0.1, 30))
    first = np.atleast_1d(axes).flat[0]
    first.figure.legend(
      *first.get_legend_handles_labels(),
      loc="outside lower center",
      ncols=4,
      frameon=False,
      fontsize=8,
    )

  return html.figure(draw, 3.5 * columns, 3.2 * lines + 0.6, panels=(lines, columns))


def _shown(audit: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """The estimators of the last start, in its order."""
  return [
    (name, entry["estimators"][name]) for name in audit["names"] if name in entry["estimators"]
  ]


def _recall(compare: Mapping[str, Any]) -> str:
  names = list(compare["results"])
  style = _style(names)

  def draw(axes):
    for name in names:
      curves = [np.array(r["curve"]) for r in compare["results"][name]]
      values = np.stack([c[:, 1] for c in curves])
      axes.plot(
        curves[0][:, 0], values.mean(0), label=name, markersize=4, linewidth=1.2, **style[name]
      )
      axes.fill_between(
        curves[0][:, 0], values.min(0), values.max(0), alpha=0.08, color=style[name]["color"]
      )
    axes.set(
      title="Recall on unseen people during the joint stage; mean and range over seeds",
      xlabel="step",
      ylabel="recall@1",
    )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

  return html.figure(draw, 10, 5)


def _paths(compare: Mapping[str, Any]) -> str:
  names = list(compare["results"])
  style = _style(names)
  shown = {
    "path_i": "norm of path (I), scores",
    "path_ii": "norm of path (II), representation",
    "path_cosine": "cosine of the two paths",
    "saturation": "largest probability of a slot",
    "soft_mass_on_taken": "soft mass on taken documents",
    "vanishing": "share of rows with a vanishing gradient",
  }

  def draw(axes):
    for panel, (key, title) in zip(axes.flat, shown.items(), strict=True):
      for name in names:
        lines = [r["gradients"] for r in compare["results"][name]]
        values = np.array([[line[key] for line in one] for one in lines])
        panel.plot(
          [line["step"] for line in lines[0]],
          values.mean(0),
          label=name,
          markersize=4,
          linewidth=1,
          **style[name],
        )
      panel.set(title=title, xlabel="step")
      if key in ("path_i", "path_ii"):
        panel.set_yscale("symlog", linthresh=1e-4)
    axes.flat[0].figure.legend(
      *axes.flat[0].get_legend_handles_labels(),
      loc="outside lower center",
      ncols=4,
      frameon=False,
      fontsize=8,
    )

  return html.figure(draw, 10, 7, panels=(2, 3))
