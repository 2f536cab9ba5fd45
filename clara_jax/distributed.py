"""Several processes as one: who is who, and what they agree on."""

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clara_jax.config import ConfigError

log = logging.getLogger(__name__)


def initialize(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Joins the processes of a run; call it before anything else of JAX.

  Without arguments JAX finds the others itself: on Cloud TPU (also under GKE), SLURM, Kubernetes or
  Open MPI, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Args:
    coordinator: HOST:PORT of process 0.
    processes: how many there are.
    process: which one this is.

  Raises:
    ConfigError: only some of the three are given, or the others are not to be found.
  """
  arguments: dict[str, Any] = {
    "--coordinator": coordinator,
    "--processes": processes,
    "--process": process,
  }
  environment = {
    "--coordinator": os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "--processes": os.environ.get("JAX_NUM_PROCESSES"),
    "--process": os.environ.get("JAX_PROCESS_ID"),
  }
  if any(v is not None for v in arguments.values()) or environment["--coordinator"]:
    arguments = {
      name: value if value is not None else environment[name] for name, value in arguments.items()
    }
    if missing := [name for name, value in arguments.items() if value is None]:
      raise ConfigError(
        f"{', '.join(missing)}: missing; several processes by hand need --coordinator, "
        f"--processes and --process"
      )
    coordinator, processes, process = (
      arguments["--coordinator"],
      int(arguments["--processes"]),
      int(arguments["--process"]),
    )
  try:
    jax.distributed.initialize(coordinator, processes, process)
  except (ValueError, RuntimeError) as error:
    raise ConfigError(f"--distributed: {str(error).splitlines()[0]}") from None
  log.info(
    f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
    f"{jax.device_count()} devices"
  )


def is_main() -> bool:
  """Whether this is the process that writes logs and records."""
  return jax.process_index() == 0


def several() -> bool:
  """Whether there are other processes."""
  return jax.process_count() > 1


def maximum(values: np.ndarray) -> np.ndarray:
  """The elementwise maximum over all processes."""
  if not several():
    return values
  return np.asarray(multihost_utils.process_allgather(values)).max(0)


def agree(what: str, values: Mapping[str, Any]) -> None:
  """Refuses to go on where the processes were given different values, rather than wait for each
  other in different places.

  Raises:
    ConfigError: naming those that differ, on every process.
  """
  if not several():
    return
  sums = np.array(
    [
      int.from_bytes(hashlib.blake2b(repr(values[name]).encode(), digest_size=4).digest(), "big")
      for name in sorted(values)
    ],
    np.uint32,
  )
  count = maximum(np.array(len(sums)))
  if maximum(np.array(len(sums) != count)):
    raise ConfigError(f"the processes were started with other {what}")
  all_sums = np.asarray(multihost_utils.process_allgather(sums))
  differing = [
    n for n, column in zip(sorted(values), all_sums.T, strict=True) if len(set(column.tolist())) > 1
  ]
  if differing:
    raise ConfigError(
      f"the processes were started with other {what}: {', '.join(differing)}; give all the same"
    )


def succeed(problem: Exception | None, what: str) -> None:
  """Raises on every process where something has failed on one, so that none waits for it.

  Raises:
    Exception: `problem`; on the others a ConfigError that says on which.
  """
  failed = maximum(np.array(-1 if problem is None else jax.process_index()))
  if failed >= 0:
    raise problem or ConfigError(f"{what} failed on process {int(failed)}, which says why")


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if several():
    multihost_utils.sync_global_devices(name)


def to_host(x: Any) -> np.ndarray:
  """An array as numpy has it, on every process; several processes call this together."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
