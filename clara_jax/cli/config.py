"""`clara config`: what a run would use, and what each field means."""

import argparse
from typing import Any

HELP = "What a run of a configuration would use: every field with its value and its meaning."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "config", metavar="FILE.py[:NAME]", help="ml_collections; override with --config.a.b=value"
  )
  parser.add_argument(
    "--allow-config",
    action="append",
    default=[],
    metavar="FIELD",
    help="an unknown field of the base's config.json that changes nothing; any number of times",
  )
  parser.add_argument(
    "--changed", action="store_true", help="only fields that differ from their defaults"
  )


def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
  """Returns {field: {value, default, meaning}}."""
  from clara_jax.training import config_file

  fields = config_file.describe(options.config, overrides, options.allow_config)
  return {
    name: field
    for name, field in fields.items()
    if not options.changed or field["value"] != field["default"]
  }


def show(report: dict[str, Any]) -> None:
  """A field a line, its meaning below it."""
  for name, field in report.items():
    value, default = field["value"], field["default"]
    print(f"{name} = {value!r}" + ("" if value == default else f"  (default {default!r})"))
    print(f"    {field['meaning']}")
