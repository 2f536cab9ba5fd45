"""`clara compare`: two evaluations on the same rows."""

import argparse
from typing import Any

from clara_jax.cli import inputs

HELP = "Two runs of evaluate on the same rows: differences with intervals."
OUTPUTS = {"report": "file"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "a", metavar="A", help="a directory of evaluate --report, or a file of --predictions"
  )
  parser.add_argument("b", metavar="B")
  parser.add_argument("--report", metavar="F.html", help="writes a page")


def run(options: argparse.Namespace) -> dict[str, Any]:
  """Returns differences by run and metric."""
  from clara_jax.evaluation import runs

  inputs.check_output_file("--report", options.report)
  return runs.compare(options.a, options.b, options.report)


def show(report: dict[str, Any]) -> None:
  """Differences with their intervals."""
  for name, metrics in report.items():
    print(f"{name}: {next(iter(metrics.values()))['n']} rows")
    for metric, d in metrics.items():
      print(
        f"  {metric:>14}  A {d['a']:.3f}  B {d['b']:.3f}  B - A {d['mean']:+.3f} "
        f"[{d['low']:+.3f}, {d['high']:+.3f}]  p {d['p']:.4f}"
      )
