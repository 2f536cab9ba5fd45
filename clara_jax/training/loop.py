"""A run of one stage: place the weights, take the steps, report, save, resume, stop when asked to."""

import contextlib
import dataclasses
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from clara_jax import distributed, io
from clara_jax.batch import Batch
from clara_jax.config import ClaraConfig, ConfigError, RunConfig
from clara_jax.data import records
from clara_jax.data.pipeline import MemoryLookup, RowEncoder, TrainingBatches, evaluation_batches
from clara_jax.data.schemas import Row
from clara_jax.data.tokens import Layout
from clara_jax.memory.store import MemoryStore, fingerprint
from clara_jax.model import Weights
from clara_jax.sharding import batch_ways, put_batch, rows_needed
from clara_jax.training import corpus, cost, optim
from clara_jax.training import metrics as metrics_lib
from clara_jax.training.checkpoint import Checkpointer, CheckpointError, claim, note_start, write_config
from clara_jax.training.program import Program

STATUS_SECONDS = 60
PROFILED_STEPS = 5


class NonFiniteLossError(RuntimeError):
  """The loss is not a number any more."""


@dataclasses.dataclass
class Result:
  """What a run leaves: all groups of weights, the last metrics, and the history of evaluations [(step, metrics)].

  `stopped` is the step at which a termination signal ended it before its time, else None.
  """

  weights: dict[str, Any]
  metrics: dict[str, float]
  evaluations: list[tuple[int, dict[str, float]]]
  seconds: float
  stopped: int | None = None


def number_of_steps(config: RunConfig, rows: int) -> int:
  """`train.steps`, or as many as make `train.epochs` passes over the rows."""
  return config.train.steps or max(1, math.ceil(config.train.epochs * rows / config.data.batch_size))


def train(
    config: RunConfig,
    layout: Layout,
    before: Weights,
    rows: Sequence[Row] | None = None,
    eval_rows: Sequence[Row] = (),
    *,
    sources: Sequence[Sequence[Sequence[Row]]] | None = None,
    workdir: str | None = None,
    memories: MemoryLookup | None = None,
    progress: bool = True,
    base_sha256: str | None = None,
    stop_at: int | None = None,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    on_report: Callable[[int, dict[str, float]], None] | None = None,
    on_step: Callable[[int, list[str]], None] | None = None,
) -> Result:
  """Runs one stage to its end; goes on from `workdir` where a run of the same configuration was stopped.

  Several processes (`distributed.initialize`) call it alike; each reads its part of every batch. On SIGTERM, or when the cluster
  announces a preemption, the run saves and returns.

  Args:
    config: the run.
    layout: tokenizer and layouts.
    before: groups of weights to start from: the base (except in `pretrain`) and those of the stage before.
    rows: training rows in memory; or
    sources: rows by source and shard (`data/records.py`).
    eval_rows: rows whose metrics are reported every `train.eval_every` steps, and at the start and the end.
    workdir: for checkpoints and metrics; None keeps nothing on disk.
    memories: memory tokens of documents; None compresses candidates in the step.
    progress: whether lines go to standard error.
    base_sha256: hash of the base's tensors, for the checkpoint's record.
    stop_at: stops (and saves) after this step, for tests and for time limits.
    on_evaluation: called with each evaluation.
    on_report: called with the metrics of each report.
    on_step: called after each step with the ids of the rows that this process gave to it.

  Raises:
    ConfigError: the configuration does not fit the data, the devices or the weights before.
    DataError: a row does not fit.
    NonFiniteLossError: naming the step and its rows.
  """
  settings, data = config.train, config.data
  if sources is None:
    sources = [records.divide(rows, data.shards, data.share_documents)]
  steps = number_of_steps(config, sum(len(shard) for source in sources for shard in source))
  program = Program(config, steps)
  encoder = RowEncoder(layout, program.stage.data, data, config.clara.top_k, memories, settings.accumulate)
  batches = TrainingBatches(sources, encoder, settings.seed, rows_needed(program.batch_sharding, data.batch_size), distributed.maximum)
  evaluation = _evaluation(eval_rows, encoder, config) if eval_rows else {}
  if eval_rows and data.eval_batch_size % batch_ways(program.mesh):
    raise ConfigError(f"data.eval_batch_size={data.eval_batch_size} does not divide over the {batch_ways(program.mesh)} parts of mesh "
                      f"{dict(program.mesh.shape)}")
  main, folder = distributed.is_main(), epath.Path(workdir) if workdir else None

  with program.context(), _Signals() as signals, contextlib.ExitStack() as held:
    weights = program.place_weights(before)
    state = program.initial_state({g: weights.pop(g) for g in program.trained})
    frozen = weights
    carried = {g: w for g, w in frozen.items() if g != "base"}
    if data.retrieve == "store":
      store = MemoryStore(data.store)
      frozen["corpus"] = corpus.place(corpus.shapes(config.clara, data, program.mesh, store), store)
    if "base" in frozen:
      carried["special_tokens"] = jax.jit(functools.partial(special_token_rows, config=config.clara))(frozen["base"])

    checkpointer, watch = None, metrics_lib.Stopwatch(time.time())
    if workdir is not None:
      if (lock := _admitted(workdir, config, before, base_sha256)) is not None:
        held.callback(lock.release)
      if main:
        layout.tokenizer.save_pretrained(str(folder / "tokenizer"))
      distributed.barrier("the record is written")
      checkpointer = Checkpointer(workdir, settings.keep_checkpoints, settings.keep_best)
      productive = 0.0
      if checkpointer.latest_step() is not None:
        state, found = checkpointer.restore(state)
        batches.set_state(found["data"])
        productive = found["productive_seconds"]
      watch = metrics_lib.Stopwatch(note_start(workdir, int(state.step), main), productive)
    reporter = metrics_lib.Reporter(folder if main else None, settings.stage, steps, progress and main)
    chip = cost.chip_of(jax.devices()[0])
    peak = chip.flops * program.mesh.size if chip else None
    history: list[tuple[int, dict[str, float]]] = []
    last: dict[str, float] = {}
    step, end = int(state.step), min(steps, stop_at or steps)
    position = batches.get_state()  # of the state: what an interruption saves belongs together
    start, stopped, finished = time.monotonic(), None, False
    window, profile = _Window(program, peak is not None), _Profile(folder if main else None)

    def apart():
      """What follows trains nothing; steps that are still under way are reported first."""
      report()
      return watch.unproductive()

    def evaluate():
      with apart():
        numbers = {}
        for suffix, prepared in evaluation.items():
          total = None
          for batch in prepared:
            placed = put_batch(batch, program.batch_sharding, data.eval_batch_size, np.arange(data.eval_batch_size))
            total = metrics_lib.add(total, program.evaluate(state.trainable, frozen, placed))
          numbers |= {f"{name}{suffix}": value for name, value in metrics_lib.values(total).items()}
      history.append((step, numbers))
      if main:
        reporter.write(step, numbers, "eval")
      if on_evaluation:
        on_evaluation(step, numbers)

    def report():
      nonlocal last
      if not window.steps:
        return
      last = window.values()
      last |= {"learning_rate": float(optim.schedule(settings, steps)(step - 1)),
               **watch.report(data.batch_size * len(window.steps), window.tokens, window.flops, peak)}
      if batches.malformed:
        last["malformed_rows"] = batches.malformed
      window.clear()
      if main:
        reporter.write(step, last)
      if on_report:
        on_report(step, last)

    def save():
      with apart():
        checkpointer.save(state, carried, {"data": position, "productive_seconds": watch.productive},
                          history[-1][1] if history and history[-1][0] == step else None)

    try:
      if evaluation and step < end:
        evaluate()
      while step < end:
        with watch.waiting():
          given = next(batches)
          batch = put_batch(given.batch, program.batch_sharding, data.batch_size, given.positions)
        if settings.gradients_every and step % settings.gradients_every == 0:
          with apart():
            reporter.write(step, metrics_lib.values(program.gradients(state, frozen, batch)), "gradients")
        compiled, called = program.step._cache_size(), time.monotonic()
        state, numbers = program.step(state, frozen, batch)
        position = batches.get_state()
        if program.step._cache_size() > compiled:  # a batch of a new shape
          watch.discount(time.monotonic() - called)
        step += 1
        if on_step:
          on_step(step, given.ids)
        window.add(step, given.ids, batch, numbers)
        profile.after_step(step, state)
        stopping = signals.received(step)
        if step % settings.log_every == 0 or step == end or stopping or watch.elapsed > STATUS_SECONDS:
          report()
        if stopping and step < end:
          stopped = step
          break
        if evaluation and step < end and settings.eval_every and step % settings.eval_every == 0:
          evaluate()
        if checkpointer and step < end and step % settings.checkpoint_every == 0:
          save()
      if evaluation and stopped is None and (not history or history[-1][0] != step):
        evaluate()
      finished = True
      if signals.interrupted:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
      if not finished:  # a second Ctrl-C, anywhere: what is in memory may be neither before nor after a step
        stopped = None
      raise
    finally:
      if checkpointer and (finished or stopped is not None):
        if checkpointer.latest_step() != int(state.step):
          save()
        checkpointer.close()
        if stopped is not None and main:
          print(f"stopped at step {stopped}; the same command goes on from there", file=sys.stderr)
      elif checkpointer and jax.process_count() == 1:  # what is being saved becomes whole; several processes may not meet any more
        checkpointer.close()
      batches.close()
      reporter.close()
    frozen.pop("corpus", None)
    return Result({**frozen, **state.trainable}, {"step": step, **last, **(history[-1][1] if history else {})}, history,
                  time.monotonic() - start, stopped)


def _admitted(workdir: str, config: RunConfig, before: Weights, base_sha256: str | None) -> io.Lock | None:
  """Locks the directory, compares the run with the one that was there, and records it; one process does it for all.

  Raises:
    CheckpointError: another run is at work, or this is not the run that was there.
  """
  lock = problem = None
  if distributed.is_main():
    try:
      lock = claim(workdir)
      write_config(workdir, config, base_sha256, inputs=_inputs(config, before, base_sha256))
    except Exception as error:  # whatever it is, the others must not wait
      problem = error
  if distributed.maximum(np.array(problem is not None)):
    if lock is not None:
      lock.release()
    raise problem or CheckpointError(f"{workdir}: process 0 refuses to go on there")
  return lock


def _inputs(config: RunConfig, before: Weights, base_sha256: str | None) -> dict[str, str]:
  """Hashes of what the run reads, by field of its configuration."""
  def whole(leaf):
    return leaf if isinstance(leaf, (np.ndarray, jax.Array)) else leaf[(slice(None),) * len(leaf.shape)]
  start = {group: jax.tree.map(whole, tree) for group, tree in before.items() if group != "base" or not base_sha256}
  found = {"init_from": fingerprint(start, sorted(start))} if start else {}
  data = config.data
  for name, paths in (("data.rows", data.rows), ("data.eval_rows", data.eval_rows)):
    if paths and all("://" in path or os.path.isfile(path) or os.path.isdir(path) for path in paths):
      found[name] = records.identity(paths)
  if data.store:
    store = MemoryStore(data.store)
    found["data.store"] = store.identity() if data.retrieve == "store" else store.manifest.compressor
  return found


def _evaluation(rows: Sequence[Row], encoder: RowEncoder, config: RunConfig) -> dict[str, list[Batch]]:
  """Batches by the suffix of their metrics' names: with all memory tokens none, with the first m of `clara.nested_memory` '_m<m>'."""
  sizes = config.clara.nested_memory if encoder.kind != "text" else ()
  made = {"": evaluation_batches(rows, encoder, config.data.eval_batch_size)}
  return made | {f"_m{m}": evaluation_batches(rows, encoder.first_tokens(m), config.data.eval_batch_size) for m in sizes[:-1]}


def special_token_rows(base: Weights, config: ClaraConfig) -> dict[str, jax.Array]:
  """The rows of CLaRa's own tokens, which the base on disk does not have: embedding [M+3, D] and, if it is not tied, head [D, M+3]."""
  first, last = config.model.vocab_size, config.vocab_size
  return {"embedding": base["embedding"][first:last], **({"head": base["head"][:, first:last]} if "head" in base else {})}


class _Window:
  """The steps since the last report."""

  def __init__(self, program: Program, counts_flops: bool):
    self._program, self._counts_flops = program, counts_flops
    self._flops_of: dict[tuple, float] = {}
    self.clear()

  def clear(self) -> None:
    self.steps: list[tuple[int, list[str], metrics_lib.Mean]] = []
    self.tokens, self.flops = 0, 0.0
    self._sum: metrics_lib.Metrics | None = None

  def add(self, step: int, ids: list[str], batch: Batch, numbers: metrics_lib.Metrics) -> None:
    """One step; nothing waits for the devices."""
    self.steps.append((step, ids, numbers["loss"]))
    self.tokens += sum(t.ids.size for t in (batch.prompt.tokens, batch.documents, batch.question) if t is not None)
    if self._counts_flops:
      shapes = (batch.memory_tokens, *(x.shape for x in jax.tree.leaves(batch)))
      if shapes not in self._flops_of:
        self._flops_of[shapes] = cost.model_flops(self._program, batch)
      self.flops += self._flops_of[shapes]
    self._sum = metrics_lib.add(self._sum, numbers)

  def values(self) -> dict[str, float]:
    """The means over the window; waits for the devices.

    Raises:
      NonFiniteLossError: a loss is not finite.
    """
    for step, ids, loss in self.steps:
      if not np.isfinite(value := float(loss.value)):
        settings = self._program.config.train
        raise NonFiniteLossError(f"{settings.stage}: the loss is {value} at step {step} (seed {settings.seed}), rows {', '.join(ids)}; "
                                 "the last checkpoint is kept")
    return metrics_lib.values(self._sum)


class _Signals:
  """Whether the run is asked to stop; several processes agree on the step. A second Ctrl-C stops at once, without saving.

  Attributes:
    interrupted: whether it was Ctrl-C.
  """

  def __init__(self):
    self.interrupted = self._received = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "_Signals":
    if threading.current_thread() is threading.main_thread():
      # With several processes, the handler of SIGTERM is that of JAX's preemption service.
      for number in (signal.SIGINT, signal.SIGTERM)[:1 if jax.process_count() > 1 else 2]:
        self._before[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number: int, *_: object) -> None:
    if number == signal.SIGINT:
      if self.interrupted:
        raise KeyboardInterrupt
      self.interrupted = True
    self._received = True
    print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  def received(self, step: int) -> bool:
    """Whether all processes stop after this step; call it once a step."""
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._received


class _Profile:
  """A profiler window on demand: `touch DIR/profile` traces the next steps into DIR/profiles (for TensorBoard or XProf)."""

  def __init__(self, folder: Any):
    self._request = folder / "profile" if folder is not None else None
    self._folder = folder
    self._until: int | None = None
    self._checked = 0.0

  def after_step(self, step: int, state: Any) -> None:
    """Starts or ends a window; looks for a request every few seconds."""
    if self._until is not None:
      if step >= self._until:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._until = None
      return
    if self._request is None or time.monotonic() - self._checked < 5:
      return
    self._checked = time.monotonic()
    if self._request.exists():
      self._request.unlink()
      jax.profiler.start_trace(str(self._folder / "profiles" / f"step-{step}"))
      self._until = step + PROFILED_STEPS
