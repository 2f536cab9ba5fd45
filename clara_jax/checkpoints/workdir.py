"""Checkpoints of ours: a directory with a readable config.json, a tokenizer, and Orbax steps.

    DIR/config.json           what it is: format, stage, the run's configuration, where its base is and its hash, the origin
    DIR/tokenizer/            the tokenizer, CLaRa's special tokens included
    DIR/checkpoints/STEP/     weights (all groups but a base that is not trained), optimizer, progress (position in the data, time),
                              checksums.json of all these files
    DIR/metrics.jsonl         one line a report
    DIR/starts.jsonl          when the run was started, and at which step
    DIR/broken/               steps that could not be read
    DIR/run.lock              who trains here

A step is written beside and renamed, with its checksums, so that an interrupted save leaves no half
checkpoint.
"""  # noqa: E501

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from clara_jax import buckets, distributed, io
from clara_jax.config import ConfigError, RunConfig, from_config_dict, to_json
from clara_jax.inference.checkpoint import CheckpointError

log = logging.getLogger(__name__)

FORMAT = "clara_jax"
# Files of Orbax's own that have no checksum: it writes into them once more when a step is done, and
# nothing that is read depends on them.
OF_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")
VERSION = 1


def is_checkpoint(directory: str) -> bool:
  """Whether a directory is a checkpoint of this format."""
  file = epath.Path(directory) / "config.json"
  if not file.exists():
    return False
  try:
    return io.parse_json(file.read_bytes()).get("format") == FORMAT
  except (ValueError, AttributeError):
    return False


def claim(directory: str) -> io.Lock | buckets.Claim:
  """Keeps a directory for this run, as long as the process lives. In a bucket, where nobody can
  tell whether a process still lives, a later run takes it over from an earlier one.

  Raises:
    CheckpointError: another run is at work there; says which.
  """
  if buckets.is_remote(directory):
    try:
      return buckets.Claim(f"{directory.rstrip('/')}/run.lock", "this working directory")
    except buckets.ConflictError as error:
      raise CheckpointError(str(error)) from None
  os.makedirs(directory, exist_ok=True)
  try:
    return io.Lock(os.path.join(directory, "run.lock"))
  except io.LockedError as error:
    raise CheckpointError(f"{directory}: another run is at work here ({error})") from None


def write_config(
  directory: str,
  config: RunConfig,
  base_sha256: str | None = None,
  source: Mapping[str, Any] | None = None,
  stage: str | None = None,
  relative_to: str | None = None,
  inputs: Mapping[str, str] | None = None,
) -> None:
  """Writes DIR/config.json. Local paths are named relative to DIR, so that all can be moved
  together.

  Args:
    directory: DIR.
    config: the run.
    base_sha256: hash of the base's tensors (`checkpoints/huggingface.py`), so that another base is
      refused later.
    source: where a converted checkpoint came from.
    stage: what it is, where that is no stage of training ('base').
    relative_to: where DIR will be, if it is to be renamed.
    inputs: hashes of what a run reads, by field of the configuration.

  Raises:
    CheckpointError: DIR belongs to another run.
  """
  folder = epath.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  check_config(directory, config, base_sha256, inputs)
  run = _portable(directory, config, relative_to)
  values = {
    "format": FORMAT,
    "version": VERSION,
    "stage": stage or config.train.stage,
    "base": run["base"],
    "base_sha256": base_sha256,
    "source": dict(source) if source else None,
    "inputs": dict(inputs or {}),
    "run": run,
  }
  io.write(folder / "config.json", json.dumps(values, indent=2))


def check_config(
  directory: str,
  config: RunConfig,
  base_sha256: str | None = None,
  inputs: Mapping[str, str] | None = None,
) -> None:
  """Refuses to go on in a directory where another run has saved a step.

  Args:
    directory, config, base_sha256, inputs: as `write_config`. Where the content of an input is
      known on both sides, its path may change.

  Raises:
    CheckpointError: naming the fields that differ.
  """
  folder = epath.Path(directory)
  steps = folder / "checkpoints"
  if (
    not is_checkpoint(directory)
    or not steps.exists()
    or not any(p.name.isdigit() for p in steps.iterdir())
  ):
    return
  # Through the dataclass: fields that are new here have their defaults.
  before = json.loads(to_json(read_config(directory)[0]))
  record, inputs = read_record(directory), {"base": base_sha256, **(inputs or {})}
  known = {
    name: (was, inputs[name])
    for name, was in {"base": record.get("base_sha256"), **(record.get("inputs") or {})}.items()
    if was and inputs.get(name)
  }
  if other := [name for name, (was, now) in known.items() if was != now]:
    raise CheckpointError(
      f"{directory}: holds a run that began with another content of {', '.join(other)} (the files "
      f"have changed since); "
      "choose another --workdir, or bring them back"
    )
  if changed := _differences(
    before, json.loads(json.dumps(_portable(directory, config))), free=(*_FREE_FIELDS, *known)
  ):
    raise CheckpointError(
      f"{directory}: holds a run with another configuration ({', '.join(changed)}); choose "
      f"another --workdir"
    )


def _portable(directory: str, config: RunConfig, relative_to: str | None = None) -> dict[str, Any]:
  """The run with local paths relative to its directory."""
  run = dataclasses.asdict(config)
  for name in ("base", "init_from", "tokenizer"):
    if run[name]:
      run[name] = buckets.relative(run[name], relative_to or directory)
  return run


# A run may go on with these changed.
_FREE_FIELDS = (
  "train.log_every",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.eval_every",
  "mesh",
  "data.prefetch",
  "data.workers",
  "data.max_malformed",
)


def _differences(
  before: Any, now: Any, path: str = "", free: Sequence[str] = _FREE_FIELDS
) -> list[str]:
  if path in free:
    return []
  if isinstance(before, dict) and isinstance(now, dict):
    return [
      d
      for key in {**before, **now}
      for d in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."), free)
    ]
  return [] if before == now else [f"{path}: {before!r} -> {now!r}"]


def read_config(directory: str) -> tuple[RunConfig, str | None]:
  """(the run's configuration, the base's path or None where this checkpoint is a base).

  Raises:
    CheckpointError: not a checkpoint of this format.
  """
  if not is_checkpoint(directory):
    raise CheckpointError(f"{directory}: not a checkpoint (no config.json with format={FORMAT!r})")
  values = read_record(directory)
  if values["version"] > VERSION:
    raise CheckpointError(
      f"{directory}: format version {values['version']}, this program reads up to {VERSION}"
    )
  try:
    config = from_config_dict(RunConfig, values["run"])
  except (
    ConfigError,
    ArithmeticError,
    TypeError,
    ValueError,
  ) as error:  # values that no run has written
    raise CheckpointError(f"{directory}/config.json: {error}") from None
  base = values.get("base")
  if base and "://" not in base and not os.path.isabs(base):
    scheme, mark, path = directory.rpartition("://")
    base = scheme + mark + os.path.normpath(os.path.join(path, base))
  return config, base


def read_record(directory: str) -> dict[str, Any]:
  """All of config.json: format, version, stage, base, base_sha256, source, inputs, run.

  Raises:
    CheckpointError: a field is missing or of another type.
  """
  file = epath.Path(directory) / "config.json"
  try:
    values = io.parse_json(file.read_bytes())
  except ValueError as error:
    raise CheckpointError(f"{file}: {error}") from None
  for name, kinds in {
    "version": (int,),
    "stage": (str,),
    "run": (dict,),
    "base": (str, type(None)),
    "base_sha256": (str, type(None)),
    "source": (dict, type(None)),
    "inputs": (dict, type(None)),
  }.items():
    if not isinstance(values.get(name), kinds):
      raise CheckpointError(
        f"{file}: {name}={values.get(name)!r:.60}: expected "
        f"{' or '.join(k.__name__ for k in kinds)}"
      )
  return values


def note_start(directory: str, step: int, write: bool) -> float:
  """Notes in DIR/starts.jsonl that the run was (re)started; returns when it was first."""
  file = epath.Path(directory) / "starts.jsonl"
  notes = []
  for line in file.read_bytes().decode("utf-8", "replace").splitlines() if file.exists() else []:
    try:
      note = json.loads(line)
      notes.append({**note, "time": float(note["time"])})
    except (ValueError, KeyError, TypeError):  # a line that was cut tells nothing that a run needs
      continue
  now = time.time()
  if write:
    note = {
      "time": round(now, 3),
      "step": step,
      "processes": jax.process_count(),
      "devices": jax.device_count(),
    }
    io.write(file, "".join(json.dumps(n) + "\n" for n in [*notes, note]))
  return notes[0]["time"] if notes else now


class Checkpointer:
  """Saves and restores a run's state below DIR/checkpoints; saving goes on in the background.

  Args:
    directory: DIR.
    keep: how many of the last steps stay.
    best: the metric by which one more stays, the best; None for none. Smaller is better for 'loss'
      and what ends so.
    read_only: nothing is written.
  """

  def __init__(
    self, directory: str, keep: int = 2, best: str | None = None, read_only: bool = False
  ):
    path = (
      epath.Path(os.path.abspath(directory) if "://" not in str(directory) else directory)
      / "checkpoints"
    )
    if read_only and not path.exists():
      raise CheckpointError(f"{directory}: has no saved step yet")
    self._directory, self._path, self._best = directory, path, best
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if best:
      policies.append(
        ocp.checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics[best],
          reverse=best.endswith("loss"),
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._saving: list[int] = []
    options = ocp.CheckpointManagerOptions(
      async_options=ocp.AsyncOptions(timeout_secs=4 * 3600, post_finalization_callback=self._seal),
      create=not read_only,
      read_only=read_only,
      best_fn=(lambda metrics: metrics[best]) if best else None,
      best_mode="min" if best and best.endswith("loss") else "max",
      preservation_policy=None
      if read_only
      else ocp.checkpoint_managers.AnyPreservationPolicy(policies),
    )
    self._manager = ocp.CheckpointManager(
      path,
      options=options,
      item_handlers={
        "weights": ocp.PyTreeCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def latest_step(self) -> int | None:
    """The last complete step, or None."""
    return self._manager.latest_step()

  def all_steps(self) -> list[int]:
    """The steps that are kept."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    weights: dict[str, Any],
    optimizer: dict[str, Any],
    progress: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Saves a step.

    Args:
      step: its number.
      weights: all groups but a base that does not train.
      optimizer: the rest of the training state.
      progress: what else a resumed run needs (position in the data, time spent).
      metrics: of the last evaluation, to choose the best step by.
    """
    metrics = (
      {self._best: float(metrics[self._best])}
      if self._best and metrics and self._best in metrics
      else None
    )
    self._saving.append(step)
    saved = self._manager.save(
      step,
      metrics=metrics,
      args=ocp.args.Composite(
        weights=ocp.args.PyTreeSave(weights),
        optimizer=ocp.args.StandardSave(optimizer),
        progress=ocp.args.JsonSave(dict(progress)),
      ),
    )
    if not saved:
      self._saving.remove(step)

  def save_weights(self, step: int, weights: dict[str, Any]) -> None:
    """Saves weights alone: a checkpoint to use, not to go on from."""
    self._saving.append(step)
    self._manager.save(step, args=ocp.args.Composite(weights=ocp.args.PyTreeSave(weights)))

  def _seal(self) -> None:
    """In Orbax's thread, when all files of a step are written; then it gets its final name."""
    step = str(self._saving.pop(0))
    if distributed.is_main():
      for folder in [f for f in self._path.iterdir() if f.name.split(".")[0] == step]:
        io.seal_folder(folder, but=OF_ORBAX)

  def damage(self, step: int) -> str | None:
    """What is wrong with a step's files; one process reads them for all."""
    problem = None
    if distributed.is_main():
      try:
        problem = io.damage(self._path / str(step))
      except Exception as error:  # of a remote file system; the others must not wait
        problem = f"{self._path / str(step)}: {error}"
    if distributed.maximum(np.array(problem is not None)):
      return problem or "its files are damaged"
    return None

  def restore(
    self, weights: dict[str, Any], optimizer: dict[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(weights, optimizer, progress) of the last step that can be read, in the shapes and shardings
    of what is given.

    Steps after it are broken: they are moved to DIR/broken, with a warning.

    Raises:
      CheckpointError: no step can be read.
    """
    broken: dict[int, Exception] = {}
    for step in reversed(self.all_steps()):
      try:
        if problem := self.damage(step):
          raise CheckpointError(problem)
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            weights=_restore_weights(weights, ocp.checkpoint_utils.construct_restore_args(weights)),
            optimizer=ocp.args.StandardRestore(optimizer),
            progress=ocp.args.JsonRestore(),
          ),
        )
        break
      except Exception as error:  # Orbax and TensorStore have many kinds
        broken[step] = error
        log.warning(
          f"{self._directory}: step {step} cannot be read and is skipped: "
          f"{str(error).splitlines()[0][:200]}"
        )
    else:
      raise CheckpointError(
        f"{self._directory}: no saved step can be read; the last: {next(iter(broken.values()))}"
      )
    if broken and distributed.is_main():
      aside = epath.Path(self._directory) / "broken"
      aside.mkdir(exist_ok=True)
      for step in broken:
        (self._path / str(step)).rename(aside / f"{step}-{int(time.time())}")
    if broken:
      distributed.barrier("broken steps are moved")
      self._manager.reload()
    return restored["weights"], restored["optimizer"], restored["progress"]

  def weights(self) -> dict[str, Any]:
    """All groups of the last step, as host arrays.

    Raises:
      CheckpointError: no step was saved.
    """
    step = self._manager.latest_step()
    if step is None:
      raise CheckpointError(f"{self._directory}: has no saved step yet")
    if problem := self.damage(step):
      raise CheckpointError(f"{self._directory}: step {step} is damaged: {problem}")
    tree = dict(self._manager.item_metadata(step)["weights"].tree)
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree)
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return self._manager.restore(
      step, args=ocp.args.Composite(weights=_restore_weights(shapes, on_host))
    )["weights"]

  def wait(self) -> None:
    """Waits until what is being saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and frees the threads."""
    self.wait()
    self._manager.close()


def _restore_weights(like: Any, arguments: Any) -> Any:
  # Groups that are carried along but not asked for stay on disk.
  return ocp.args.PyTreeRestore(item=like, restore_args=arguments, partial_restore=True)
