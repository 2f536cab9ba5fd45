"""`clara train`: one stage."""

import argparse
from typing import Any

from clara_jax.cli import arguments, inputs

HELP = "Trains one stage; resumes where it was stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE.py[:NAME]",
    help="ml_collections; override with --config.a.b=value",
  )
  parser.add_argument("--workdir", required=True, metavar="DIR")
  arguments.reading(
    parser,
    "dtype of the computation and of the frozen base; default: the configuration's, or the base's",
  )
  arguments.several_processes(parser)


def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any] | None:
  """Returns the last metrics (None on all processes but the first)."""
  from clara_jax import distributed
  from clara_jax.compilation import enable_compilation_cache
  from clara_jax.training import config_file
  from clara_jax.training.run import train

  if options.dtype:
    overrides = [
      *overrides,
      *(f"--config.clara.model.{field}={options.dtype}" for field in ("dtype", "param_dtype")),
    ]
  config = config_file.load_config(options.config, overrides, options.allow_config)
  if (
    options.distributed
    or options.coordinator
    or options.processes is not None
    or options.process is not None
  ):
    distributed.initialize(options.coordinator, options.processes, options.process)
  enable_compilation_cache()
  result = train(
    config, options.workdir, chat_template=inputs.chat_template(options), allow=options.allow_config
  )
  if not distributed.is_main():
    return None  # one report for all
  return result.metrics if result.stopped is None else {**result.metrics, "stopped": result.stopped}
