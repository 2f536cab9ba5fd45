"""Several settings and checkpoints on one file: a table, predictions on disk, a page; and two such
runs side by side."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from clara_jax.checkpoints.formats import Checkpoint
from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError, Row
from clara_jax.evaluation import plots, statistics
from clara_jax.evaluation.evaluator import (
  evaluate,
  read_predictions,
  weights_hash,
  write_predictions,
)
from clara_jax.evaluation.explain import Explainer, document_and_memory_means, pca_2d
from clara_jax.evaluation.settings import SETTINGS
from clara_jax.reports import html

log = logging.getLogger(__name__)

EXAMPLES, PICTURED = 5, 150
Judge = Callable[[Sequence[Row], Sequence[dict[str, Any]]], Any]


def run(
  checkpoint: Checkpoint,
  rows: Sequence[Row],
  settings: Sequence[str],
  directory: str,
  *,
  also: Mapping[str, Checkpoint],
  title: str,
  batch_size: int = 16,
  max_new_tokens: int = 64,
  judge: Judge | None = None,
) -> dict[str, Any]:
  """Answers all rows in every setting and writes DIR/predictions/NAME.jsonl, DIR/report.json and
  DIR/report.html.

  What was answered before is not answered again.

  Args:
    checkpoint: with the roles of the settings.
    rows: questions with documents.
    settings: of `settings.SETTINGS`.
    directory: DIR.
    also: other checkpoints, by name, in the setting 'joint' (a contrastive one, a generator-only
      one).
    title: of the page.
    batch_size, max_new_tokens: see `evaluate`.
    judge: adds to predictions whether their answers are grounded (`synthesis/judge.py`).

  Returns:
    What is in report.json: `plots.summary` by setting or name.

  Raises:
    ConfigError: a name is used twice, or cannot be that of a file; DIR has a report with other
      runs.
  """
  for name in also:
    if name in settings or not re.fullmatch(r"[\w.-]+", name):
      raise ConfigError(
        f"--also {name}: "
        f"{'is the name of a setting' if name in settings else 'expected letters, digits, _ . -'}"
      )
  jobs = {name: (checkpoint, name) for name in settings} | {
    name: (other, "joint") for name, other in also.items()
  }
  where = pathlib.Path(directory)
  if where.is_file():
    raise ConfigError(f"--report {directory}: is a file, expected a directory")
  if lost := _runs_of(where) - set(jobs):
    raise ConfigError(
      f"--report {directory}: has a report with {', '.join(sorted(lost))}, too; name these as "
      f"well (what is answered is "
      "not answered again), or another directory"
    )
  (where / "predictions").mkdir(parents=True, exist_ok=True)
  predictions, summaries = {}, {}
  hashes = {id(source): weights_hash(source.weights) for source in (checkpoint, *also.values())}
  for name, (source, setting) in jobs.items():
    source.require(*SETTINGS[setting].roles())
    path = str(where / "predictions" / f"{name}.jsonl")
    predictions[name] = evaluate(
      source,
      rows,
      setting,
      batch_size=batch_size,
      max_new_tokens=max_new_tokens,
      path=path,
      name=name,
      weights_sha256=hashes[id(source)],
    ).predictions
    if judge:
      judge(rows, predictions[name])
      keys = {p["key"] for p in predictions[name]}
      write_predictions(
        path, [*predictions[name], *(p for p in read_predictions(path) if p["key"] not in keys)]
      )
    summaries[name] = plots.summary(predictions[name])
  values = {
    name: {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in s.items()}
    for name, s in summaries.items()
  }
  report = {"title": title, "rows": len(rows), "runs": values}
  (where / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
  html.write(
    where / "report.html",
    _page(title, checkpoint, also, rows, predictions, summaries, max_new_tokens),
  )
  log.info(f"evaluate: {where / 'report.html'}")
  return report


def _runs_of(directory: pathlib.Path) -> set[str]:
  """Runs that a report has."""
  try:
    return set(json.loads((directory / "report.json").read_text(encoding="utf-8"))["runs"])
  except (FileNotFoundError, ValueError, KeyError):
    return set()


def summary_table(
  summaries: Mapping[str, Mapping[str, Any]], descriptions: Mapping[str, str]
) -> str:
  """The table of a run."""
  order = dict.fromkeys(
    ("em", "f1", "recall_at_1", "recall_at_5", *plots.QUALITY, *plots.RETRIEVAL)
  )
  columns = [c for c in order if any(c in s for s in summaries.values())]
  if all(s["em_first"] == s["em"] for s in summaries.values()):
    columns.remove("em_first")
  rows = [
    [name.replace("_", " "), *(s.get(c) for c in columns), s["context_tokens"], s["seconds"]]
    for name, s in summaries.items()
  ]
  names = html.joined(
    Markup("<br><b>{}</b>: {}").format(name.replace("_", " "), descriptions[name])
    for name in summaries
    if name in descriptions
  )
  header = ["run", *(c.replace("_", " ") for c in columns), "context tokens", "s a question"]
  return html.table(header, rows) + Markup("<p class=small>What is read:{}</p>").format(names)


def _page(title, checkpoint, also, rows, predictions, summaries, max_new_tokens):
  descriptions = {name: SETTINGS[name].description for name in predictions if name in SETTINGS} | {
    name: "joint, of another checkpoint" for name in also
  }
  ranked = {
    name: p
    for name, p in predictions.items()
    if any(x.get("pos_index") and "ranked" in x for x in p)
  }
  compressed = {
    name: p
    for name, p in predictions.items()
    if SETTINGS.get(name, SETTINGS["joint"]).form == "memories"
  }
  shown = {name: predictions[name] for name in list(compressed)[:4] or list(predictions)[:4]}
  lengths = {
    p["key"]: _gold_tokens(checkpoint, row)
    for p, row in zip(next(iter(predictions.values())), rows, strict=True)
  }
  drawn = [plots.recall_curve(ranked)] if ranked else []
  drawn += [
    p
    for p in (
      plots.by_bins(
        shown,
        lambda p: lengths[p["key"]],
        "Length of the gold document",
        "tokens of the first gold document",
      ),
      plots.by_bins(
        {n: p for n, p in shown.items() if n in ranked},
        lambda p: p["pos_index"][0] + 1 if p.get("pos_index") else None,
        "Place of the gold document among the candidates",
        "place of the first gold document, as given",
      ),
      plots.by_bins(
        {n: p for n, p in shown.items() if n in ranked},
        _rank,
        "Where the gold document was ranked",
        "rank of the first gold document",
      ),
    )
    if p
  ]
  drawn.append(plots.calibration(shown))
  ratios = {
    name: (checkpoint if name in SETTINGS else also[name]).model.compression_rate
    for name in compressed
  }
  if len(set(ratios.values())) > 1:
    drawn.append(
      plots.against_ratio({name: (ratio, summaries[name]["f1"]) for name, ratio in ratios.items()})
    )
  note = Markup(
    "<p class=small>Means over rows with their 95 % bootstrap intervals. em, f1 and cover em: "
    "best over the gold answers; em first: "
    "against the first one. Seconds: retrieval and answer, in batches, median over rows, without "
    "passes that compile; documents were "
    "compressed before. Recall and the like: over rows with gold documents.</p>"
  )
  sections = [
    ("Results", summary_table(summaries, descriptions) + note),
    ("Plots", html.plots(drawn)),
  ]
  if "joint" in predictions:
    sections += _examples(checkpoint, rows, predictions["joint"], max_new_tokens)
  texts = list(dict.fromkeys(d for row in rows for d in row.documents))[:PICTURED]
  if texts and compressed:
    sets: dict[str, Any] = {}
    for name, c in {"this checkpoint": checkpoint, **also}.items():
      projection = pca_2d(*document_and_memory_means(c, texts))
      # One compressor.
      same = next((n for n, other in sets.items() if np.array_equal(other[0], projection[0])), None)
      if same:
        sets = {f"{n}, {name}" if n == same else n: value for n, value in sets.items()}
      else:
        sets[name] = projection
    said = Markup(
      "<p>Means of the compressor's states over a document's own tokens and over its memory "
      "tokens, {} documents, PCA. "
      "The MSE term of SCP (paper §3.1) brings the two together.</p>"
    ).format(len(texts))
    sections.append(("Documents and their memory tokens", said + plots.pca_plots(sets)))
  model, config = checkpoint.model, checkpoint.model.config
  intro = (
    f"{len(rows)} questions; {model.num_memory_tokens} memory tokens for documents of at most "
    f"{config.doc_max_length} tokens "
    f"(ratio {model.compression_rate:g}), K = {config.top_k}."
  )
  return html.page(title, intro, sections)


def _gold_tokens(checkpoint, row):
  return (
    len(checkpoint.prompt_tokenizer.ids(row.documents[row.gold[0]]))
    if row.gold and row.documents
    else None
  )


def _rank(prediction):
  gold = prediction.get("pos_index")
  return (
    next(i for i, place in enumerate(prediction["ranked"], 1) if place in gold) if gold else None
  )


def _examples(checkpoint, rows, predictions, max_new_tokens):
  order = sorted(range(len(rows)), key=lambda i: -predictions[i]["confidence"])
  right, wrong = (
    [i for i in order if bool(predictions[i]["em"]) == is_right][:EXAMPLES]
    for is_right in (True, False)
  )
  explainer = Explainer(checkpoint, max_new_tokens)

  def explained(places):
    return html.joined(plots.explained(explainer.explain(rows[i])) for i in places) or Markup(
      "<p>None.</p>"
    )

  return [
    ("Worst: wrong, and sure of it", plots.LENS_LEGEND + explained(wrong)),
    ("Best: right, and sure of it", explained(right)),
  ]


# ---- two runs ------------------------------------------------------------------------------------


def compare(a: str, b: str, page: str | None = None) -> dict[str, Any]:
  """Two prediction files, or two directories of `run`, on the same rows.

  Args:
    a, b: JSONL files, or directories; of directories every run that both have.
    page: an HTML file to write.

  Returns:
    {run: {metric: {`a`, `b`: means, and `statistics.Difference` of b - a}}}.

  Raises:
    DataError: they have no run or no row in common.
  """
  pairs = _pairs(a, b)
  report: dict[str, dict[str, dict[str, Any]]] = {}
  sections = []
  for name, (left, right) in pairs.items():
    metrics = [
      m for m in (*plots.QUALITY, *plots.RETRIEVAL) if all(m in p for p in (*left, *right))
    ]
    values = {m: ([p[m] for p in left], [p[m] for p in right]) for m in metrics}
    differences = {m: statistics.compare(*v) for m, v in values.items()}
    report[name] = {
      m: {
        "a": statistics.mean(v[0]).mean,
        "b": statistics.mean(v[1]).mean,
        **dataclasses.asdict(differences[m]),
      }
      for m, v in values.items()
    }
    if page:
      sections.append(
        (f"{name.replace('_', ' ')}: {len(left)} rows", _comparison(left, right, differences))
      )
  if page:
    html.write(
      page, html.page("Two runs", f"A: {a}. B: {b}. Positive differences: B is better.", sections)
    )
  return report


def _pairs(a, b):
  def files(path):
    where = pathlib.Path(path)
    if not where.exists():
      raise DataError(f"{path}: no such file or directory")
    if not where.is_dir():
      return {where.stem: where}
    if not (paths := {f.stem: f for f in sorted((where / "predictions").glob("*.jsonl"))}):
      raise DataError(f"{path}: is no directory of clara evaluate --report")
    return paths

  left, right = files(a), files(b)
  if pathlib.Path(a).is_file() and pathlib.Path(b).is_file():  # whatever they are called
    left, right = ({"predictions": next(iter(f.values()))} for f in (left, right))
  names = [name for name in left if name in right]
  if not names:
    raise DataError(f"{a} and {b}: no run in common: {sorted(left)} and {sorted(right)}")
  if alone := sorted({*left, *right} - set(names)):
    log.warning(f"compare: only one of the two has {', '.join(alone)}")
  pairs = {}
  for name in names:
    first, second = ({p["key"]: p for p in read_predictions(str(f[name]))} for f in (left, right))
    keys = [key for key in first if key in second]
    if not keys:
      raise DataError(f"{left[name]} and {right[name]}: no row in common")
    if more := len(first) + len(second) - 2 * len(keys):
      log.warning(f"compare {name}: {len(keys)} rows; {more} are in one of the two only")
    pairs[name] = [first[key] for key in keys], [second[key] for key in keys]
  return pairs


def _comparison(left, right, differences):
  rows = [
    [
      m.replace("_", " "),
      statistics.mean([p[m] for p in left]),
      statistics.mean([p[m] for p in right]),
      f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
      d.p,
    ]
    for m, d in differences.items()
  ]
  text = html.table(["metric", "A", "B", "B − A (95 %)", "p"], rows)
  curves = {
    label: p
    for label, p in (("A", left), ("B", right))
    if any(x.get("pos_index") and "ranked" in x for x in p)
  }
  text += html.plots(
    ([plots.recall_curve(curves)] if curves else []) + [plots.calibration({"A": left, "B": right})]
  )
  for heading, sign in (("B is right where A was wrong", 1), ("A was right where B is wrong", -1)):
    changed = [(p, q) for p, q in zip(left, right, strict=True) if sign * (q["em"] - p["em"]) > 0]
    shown = [
      [p["question"], " | ".join(p["answers"]), p["prediction"], q["prediction"]]
      for p, q in changed[:10]
    ]
    first = f", the first {len(shown)}" if len(shown) < len(changed) else ""
    text += Markup("<h3>{}: {} rows{}</h3>").format(heading, len(changed), first) + html.table(
      ["question", "wanted", "A", "B"], shown
    )
  return text
