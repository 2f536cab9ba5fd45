"""Workers that come and go: Ray actors, each with an object of its own that keeps its compiled
programs.

Ray starts an actor again that has died, with the calls that it had not answered; calls must
therefore give the same result a second time. Results come in the order of the calls.
"""

import collections
import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from clara_jax.config import ConfigError

log = logging.getLogger(__name__)

_RETRIES = 8  # of a call whose worker has died
AHEAD = 3  # calls an actor that are handed out before their results are taken


class Pool:
  """Actors in a Ray cluster.

  Args:
    address: of the cluster ('auto', HOST:PORT, ray://…), or 'local' to start one on this machine.
    make: what each actor calls, once, for its object; on every machine of the cluster.
    arguments: of `make`.
    count: actors; None: one for each accelerator of the cluster, or one where there is none.

  Raises:
    ConfigError: Ray is not installed, or there is no such cluster.
  """

  def __init__(
    self,
    address: str,
    make: Callable[..., Any],
    arguments: Mapping[str, Any],
    count: int | None = None,
  ):
    try:
      import ray
    except ImportError:
      raise ConfigError("--ray: pip install 'clara_jax[ray]'") from None
    self._ray = ray
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
      _check_address(address)
      ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
      raise ConfigError(f"--ray {address}: {' '.join(str(error).split())[:200]}") from None
    resources, found = _resources(ray.cluster_resources())
    if count and count > found:
      ray.shutdown()
      raise ConfigError(
        f"--ray-workers {count}: the cluster has room for {found}, each with {resources}"
      )
    actor: Any = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **resources)(_Worker)
    self._actors: list[Any] = [actor.remote(make, dict(arguments)) for _ in range(count or found)]
    log.info(f"ray: {len(self._actors)} workers, each with {resources}")

  def __len__(self) -> int:
    return len(self._actors)

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *_: object) -> None:
    self._ray.shutdown()

  def submit(self, worker: int, method: str, *arguments: Any) -> Any:
    """A call of one worker, as a Ray reference (`await` it, or see `result`)."""
    return self._actors[worker].call.remote(method, *arguments)

  def result(self, reference: Any) -> Any:
    """What a call has given; errors are those of the call."""
    with self.errors():
      return self._ray.get(reference)

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """Errors of calls as they were raised there."""
    try:
      yield
    except self._ray.exceptions.RayTaskError as error:
      raise error.cause from None
    except self._ray.exceptions.RayActorError as error:
      raise ConfigError(
        f"--ray: a call has ended its worker {_RETRIES + 1} times: it may be what it is given, or "
        f"too little memory ({' '.join(str(error).split())[:200]})"
      ) from None

  def map(self, method: str, calls: Iterable[Sequence[Any]]) -> Iterator[Any]:
    """Results of many calls, in their order; whoever is free takes the next one."""
    remaining = iter(calls)
    queue: collections.deque[Any] = collections.deque()  # references in order
    at_work: dict[Any, int] = {}
    free = collections.deque(range(len(self)))
    exhausted = False
    while True:
      while free and not exhausted and len(queue) < AHEAD * len(self):
        if (call := next(remaining, None)) is None:
          exhausted = True
          break
        reference = self.submit(worker := free.popleft(), method, *call)
        queue.append(reference)
        at_work[reference] = worker
      if not queue:
        return
      # The head may be ready, or somebody free for more.
      ready, _ = self._ray.wait(list(at_work) or [queue[0]], num_returns=1)
      free.extend(at_work.pop(r) for r in ready if r in at_work)
      while queue and queue[0] not in at_work:
        yield self.result(queue.popleft())


def _check_address(address: str) -> None:
  """Asks whether somebody is there: Ray tries for minutes."""
  host, colon, port = address.removeprefix("ray://").rpartition(":")
  if colon and port.isdigit():
    socket.create_connection((host, int(port)), timeout=10).close()


def _resources(cluster: Mapping[str, float]) -> tuple[dict[str, Any], int]:
  """(what an actor takes, how many of them there can be)."""
  if gpus := int(cluster.get("GPU", 0)):
    return {"num_gpus": 1}, gpus
  if tpus := int(cluster.get("TPU", 0)):  # one process holds all chips of its machine
    hosts = max(1, sum(1 for name in cluster if name.startswith("node:1")))
    return {"resources": {"TPU": tpus // hosts}}, hosts
  return {"num_cpus": 1}, max(1, int(cluster.get("CPU", 1)))


class _Worker:
  """The actor. Its object is made by the first call, so that an error is that of a call."""

  def __init__(self, make: Callable[..., Any], arguments: Mapping[str, Any]):
    self._make, self._arguments = make, arguments
    self._object: Any = None

  def call(self, method: str, *arguments: Any) -> Any:
    if self._object is None:
      self._object = self._make(**self._arguments)
    return getattr(self._object, method)(*arguments)
