"""The `clara` command."""

import os
import signal


def run() -> None:
  """The console script. Before anything is imported Ctrl-C ends the process at once."""
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))
  from clara_jax.cli import main

  main.run()
