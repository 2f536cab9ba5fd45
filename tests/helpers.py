"""What several test modules call."""

import contextlib
import io
import socket
import threading
import time

import httpx

from clara_jax.cli import main as cli
from clara_jax.serving import guard, server
from clara_jax.testing import tiny


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def refused(*arguments) -> str:
  """The one line of a command that is refused."""
  errors = io.StringIO()
  with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
    status = cli.main([str(a) for a in arguments])
  assert status == 2, (status, errors.getvalue())
  return errors.getvalue().strip().splitlines()[-1]


def question(person: int = 0) -> str:
  return [r["question"] for r in tiny.world().question_rows(1)][person]


@contextlib.contextmanager
def running(answerer, limits, access=guard.ANYBODY, follow=0.0, port=None):
  """A real server on loopback."""
  port = port or free_port()
  app = server.make_app(answerer, limits, access, follow)
  running_server = server.configured(app, limits, port=port)
  thread = threading.Thread(target=running_server.run)
  thread.start()
  while not running_server.started:
    time.sleep(0.01)
  with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
    yield client, app.state.service
  running_server.should_exit = True
  thread.join()
