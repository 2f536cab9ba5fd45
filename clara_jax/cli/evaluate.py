"""`clara evaluate`: answers rows and scores the answers."""

import argparse
import functools
import os
from typing import Any

from clara_jax.cli import arguments, inputs, output
from clara_jax.evaluation.settings import SETTINGS

HELP = "Answers every row of a file in one or more settings and scores the answers."
OUTPUTS = {"report": "folder", "predictions": "file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  arguments.memory_tokens(parser)
  arguments.rows(parser)
  arguments.several_processes(parser)
  parser.add_argument(
    "--setting",
    choices=(*SETTINGS, "all"),
    required=True,
    nargs="+",
    help="what the generator reads: "
    + "; ".join(f"{name}: {setting.description}" for name, setting in SETTINGS.items()),
  )
  parser.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="NAME=CKPT",
    help="another checkpoint in the setting joint, e.g. a contrastive one; with --report, any "
    "number of times",
  )
  parser.add_argument(
    "--report",
    metavar="DIR",
    help="writes predictions, report.json and report.html; resumes where it was stopped",
  )
  parser.add_argument(
    "--judge",
    metavar="URL",
    help="with --report: an OpenAI-compatible server, up to /v1, that says whether answers "
    "are grounded in the documents that were read; its key in OPENAI_API_KEY",
  )
  parser.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
  parser.add_argument(
    "--batch-size", type=arguments.positive, default=16, help="rows in a batch; default 16"
  )
  parser.add_argument(
    "--predictions",
    metavar="F",
    help="one JSON a row, of one setting; resumes where it was stopped",
  )
  arguments.expand(parser)


def run(options: argparse.Namespace) -> dict[str, Any] | None:
  """Returns the scores of one setting, or with --report `runs`: scores by setting."""
  from clara_jax.config import ConfigError
  from clara_jax.evaluation import evaluator, runs
  from clara_jax.inference.checkpoint import CheckpointError
  from clara_jax.synthesis.client import Endpoint
  from clara_jax.synthesis.judge import grounding

  # 'all': those of one checkpoint; a generator of stage full_text reads no memory tokens.
  settings = (
    [n for n in SETTINGS if n != "full_text_generator"]
    if "all" in options.setting
    else options.setting
  )
  if options.report is None and (len(settings) > 1 or options.also):
    raise ConfigError("several settings or --also: name --report DIR")
  if options.report and options.predictions:
    raise ConfigError("--predictions: with --report, predictions are in DIR/predictions")
  if options.judge and not (options.judge_model and options.report):
    raise ConfigError("--judge: name --judge-model and --report, too")
  if options.report and options.expand:
    raise ConfigError("--expand: of one setting, without --report")
  judge = None
  if options.judge:
    judge = functools.partial(
      grounding,
      endpoint=Endpoint(options.judge, options.judge_model, os.environ.get("OPENAI_API_KEY")),
    )
  checkpoint = inputs.checkpoint(
    options, *dict.fromkeys(role for name in settings for role in SETTINGS[name].roles())
  )
  rows = inputs.rows(options, checkpoint, *settings)
  inputs.copy_outputs(options, "report", "predictions")
  if options.report is None:
    evaluation = evaluator.evaluate(
      checkpoint,
      rows,
      settings[0],
      batch_size=options.batch_size,
      max_new_tokens=options.max_new_tokens,
      path=options.predictions,
      expand=options.expand,
    )
    return inputs.main_only(evaluation.scores)
  also = {}
  for argument in options.also:
    name, equals, directory = argument.partition("=")
    if not equals or not name:
      raise ConfigError(f"--also {argument}: expected NAME=CKPT")
    try:
      also[name] = inputs.first(inputs.load(directory, None, options), options)
    except CheckpointError as error:
      raise ConfigError(f"--also {argument}: {error}") from None
  report = runs.run(
    checkpoint,
    rows,
    settings,
    options.report,
    also=also,
    title=f"{options.checkpoint} on {options.rows}",
    batch_size=options.batch_size,
    max_new_tokens=options.max_new_tokens,
    judge=judge,
  )
  return inputs.main_only(report)


def show(report: dict[str, Any]) -> None:
  """Scores; of several runs a table, runs as lines, metrics as columns: means with their
  intervals."""
  if "runs" not in report:
    output.show_fields(report)
    return
  runs = report["runs"]
  shown = ("em", "f1", "cover_em", "recall_at_1", "recall_at_5", "context_tokens", "seconds")
  names = [name for name in shown if any(name in values for values in runs.values())]
  width = max(len(name) for name in runs)
  print(f"{'':{width}}  " + "  ".join(f"{name:>22}" for name in names))
  for run_name, values in runs.items():
    cells = []
    for name in names:
      value = values.get(name)
      text = (
        ""
        if value is None
        else f"{value:.3g}"
        if not isinstance(value, dict)
        else (f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
      )
      cells.append(f"{text:>22}")
    print(f"{run_name:{width}}  " + "  ".join(cells))
