"""`clara COMMAND …`: parse, call one library function, show its report.

Each command is a file of this room: `HELP`, `add_arguments(parser)`, `run(options) -> report` and,
where fields one a line are not enough, `show(report)`. Exit status: 0 done, 2 wrong usage or bad
input (one clear line), 1 anything else. With `--json` exactly one JSON object goes to standard
output; progress and logs go to standard error.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import clara_jax
from clara_jax.cli import inputs, output
from clara_jax.errors import InputError

COMMANDS = (
  "quickstart",
  "train",
  "config",
  "records",
  "compress",
  "store",
  "index",
  "ask",
  "serve",
  "candidates",
  "evaluate",
  "compare",
  "explain",
  "paraphrase",
  "lens",
  "loss",
  "convert",
  "synthesize",
  "reproduce",
  "gradients",
)
EXIT_BAD_INPUT = 2
INTERRUPTED = 130
_WITH_OVERRIDES = ("train", "config")
_CLOUD = ("aiohttp", "gcsfs", "google")  # whose errors are of a network or of credentials
# What is wrong with a disk, not with the program; what was done is kept.
_DISK = {
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EFBIG,
  errno.EIO,
  errno.ENAMETOOLONG,
  errno.EMFILE,
  errno.ESTALE,
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  parser = make_parser(arguments)
  options, overrides = parser.parse_known_args(arguments)
  if overrides and options.command not in _WITH_OVERRIDES:
    parser.error(f"unrecognized arguments: {' '.join(overrides)}")
  output.configure_logging()
  # A terminal that knows ASCII only shows the rest as escapes.
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")
  command = command_module(options.command)
  _Interrupts.begun = True
  try:
    with (
      output.reserved_standard_output(options.json),
      inputs.outputs(options, getattr(command, "OUTPUTS", {})),
    ):
      report = (
        command.run(options, overrides)
        if options.command in _WITH_OVERRIDES
        else command.run(options)
      )
  except KeyboardInterrupt:
    print("clara: interrupted", file=sys.stderr)
    return INTERRUPTED
  except (InputError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
    print(f"clara {options.command}: {_one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT
  except ImportError as error:
    if "gcsfs" not in str(error) and "google" not in str(error):
      raise
    print(
      f"clara {options.command}: gs://…: {error}: pip install 'clara_jax[gcs]'", file=sys.stderr
    )
    return EXIT_BAD_INPUT
  except Exception as error:
    if _Interrupts.came:  # a library has made another error of it
      print("clara: interrupted", file=sys.stderr)
      return INTERRUPTED
    of_disk = isinstance(error, OSError) and error.errno in _DISK
    if not of_disk and type(error).__module__.partition(".")[0] not in _CLOUD:
      raise
    print(f"clara {options.command}: {_one_line(error)}", file=sys.stderr)
    return 1
  if report is None:
    return 0
  value = dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report
  try:
    if options.json:
      print(json.dumps(value, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower()))
    else:
      getattr(command, "show", output.show_fields)(value)
    sys.stdout.flush()
  except BrokenPipeError:  # `clara … | head` has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
  """The parser; where the arguments name a command, with the options of that one alone."""
  parser = argparse.ArgumentParser(
    prog="clara", description="CLaRa: retrieval and answers in one space of memory tokens."
  )
  parser.add_argument("--version", action="version", version=f"clara_jax {clara_jax.__version__}")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  named = arguments[0] if arguments and arguments[0] in COMMANDS else None
  for name in COMMANDS if named is None else (named,):
    module = command_module(name)
    sub = commands.add_parser(name, help=module.HELP, description=module.HELP)
    sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
    module.add_arguments(sub)
  return parser


def command_module(name: str) -> ModuleType:
  """The module of a command."""
  return importlib.import_module(f"clara_jax.cli.{name}")


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split()) or type(error).__name__


class _Interrupts:
  """Ctrl-C: before the command has begun the process ends at once; then it is the exception that
  everybody knows, until a command takes the signal over."""

  came = False
  begun = False

  @classmethod
  def received(cls, number: int, frame: Any) -> None:
    del number
    # An exception in the middle of an import ends some libraries by abort().
    if not cls.begun or _is_importing(frame):
      _leave(INTERRUPTED)
    cls.came = True
    sys.unraisablehook = cls.lost
    raise KeyboardInterrupt

  @classmethod
  def lost(cls, unraisable: Any) -> None:
    """In a place from which no exception comes out; what follows is of no interest either."""
    if unraisable.exc_type is KeyboardInterrupt:
      _leave(INTERRUPTED)


def _is_importing(frame: Any) -> bool:
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      return True
    frame = frame.f_back
  return False


def _leave(status: int) -> NoReturn:
  """Ends the process without Python's own way of ending: threads of libraries that are still at
  work would crash in it. All that was written is whole at any moment."""
  with contextlib.suppress(BaseException):
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(status)


def run() -> None:
  """The console script."""
  signal.signal(signal.SIGINT, _Interrupts.received)
  try:
    status = main()
  except KeyboardInterrupt:
    status = INTERRUPTED
  if status == INTERRUPTED:
    _leave(status)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
  sys.exit(status)


if __name__ == "__main__":
  run()
