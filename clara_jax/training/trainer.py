"""A run of one stage: place the weights, take the steps, report, evaluate, save, resume, stop when
asked to."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from clara_jax import buckets, distributed, io
from clara_jax.analysis import cost
from clara_jax.batch import Batch
from clara_jax.checkpoints.workdir import Checkpointer, note_start
from clara_jax.config import ClaraConfig, ConfigError, RunConfig
from clara_jax.data import records
from clara_jax.data.pipeline import MemorySource, RowEncoder, TrainingBatches, evaluation_batches
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.data.schemas import Row
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Weights
from clara_jax.sharding import num_batch_shards, put_batch, rows_needed
from clara_jax.training import corpus, optim, resume
from clara_jax.training import metrics as metrics_lib
from clara_jax.training.hooks import Hook, ProfileOnRequest
from clara_jax.training.interruption import Signals
from clara_jax.training.program import Program
from clara_jax.training.step import TrainState

STATUS_SECONDS = 60

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
  """The loss is not a finite number."""


@dataclasses.dataclass
class Result:
  """What a run leaves: all groups of weights, the last metrics, and the history of evaluations
  [(step, metrics)].

  `stopped` is the step at which a termination signal ended it early, else None.
  """

  weights: dict[str, Any]
  metrics: dict[str, float]
  evaluations: list[tuple[int, dict[str, float]]]
  seconds: float
  stopped: int | None = None


def number_of_steps(config: RunConfig, rows: int) -> int:
  """`train.steps`, or as many as make `train.epochs` passes over the rows."""
  return config.train.steps or max(
    1, math.ceil(config.train.epochs * rows / config.data.batch_size)
  )


class Trainer:
  """One stage, from its initial weights to its end; resumes from `workdir` where a run of the same
  configuration was stopped.

  Several processes (`distributed.initialize`) call it alike; each reads its part of every batch. On
  SIGTERM, Ctrl-C, or when the cluster announces a preemption, the run saves and returns.

  Args:
    config: the run.
    prompt_tokenizer: tokenizer and token layouts.
    init_weights: groups of weights to start from: the base (except in `pretrain`) and those of the
      previous stage.
    rows: training rows in memory; or
    sources: rows by source and shard (`data/records.py`).
    eval_rows: rows whose metrics are reported every `train.eval_every` steps, and at the start and
      the end.
    workdir: for checkpoints and metrics; None keeps nothing on disk.
    memories: memory tokens of documents; None compresses candidates in the step.
    progress: whether reports are logged.
    base_sha256: hash of the base's tensors, for the checkpoint's record.
    stop_at: stops (and saves) after this step, for tests and for time limits.
    hooks: what happens beside training.

  Attributes:
    config, program: the run and its computations.
    state: what trains, as of `step`.
    step: steps that are done.
    total_steps: the length of the run.
    evaluations: [(step, metrics)] so far.

  Raises:
    ConfigError: the configuration does not fit the data, the devices or the initial weights.
  """

  def __init__(
    self,
    config: RunConfig,
    prompt_tokenizer: PromptTokenizer,
    init_weights: Weights,
    rows: Sequence[Row] | None = None,
    eval_rows: Sequence[Row] = (),
    *,
    sources: Sequence[Sequence[Sequence[Row]]] | None = None,
    workdir: str | None = None,
    memories: MemorySource | None = None,
    progress: bool = True,
    base_sha256: str | None = None,
    stop_at: int | None = None,
    hooks: Sequence[Hook] = (),
  ):
    settings, data = config.train, config.data
    if sources is None:
      sources = [records.divide(rows, data.shards, data.share_documents)]
    self.config = config
    self.total_steps = number_of_steps(
      config, sum(len(shard) for source in sources for shard in source)
    )
    self.program = Program(config, self.total_steps)
    self.evaluations: list[tuple[int, dict[str, float]]] = []
    self.state: TrainState | None = None
    self.step = 0
    self._end = min(self.total_steps, stop_at or self.total_steps)
    self._prompt_tokenizer, self._init_weights, self._base_sha256 = (
      prompt_tokenizer,
      init_weights,
      base_sha256,
    )
    self._workdir, self._folder = workdir, epath.Path(workdir) if workdir else None
    self._progress = progress
    encoder = RowEncoder(
      prompt_tokenizer,
      self.program.stage.data,
      data,
      config.clara.top_k,
      memories,
      settings.accumulate,
    )
    self._batches = TrainingBatches(
      sources,
      encoder,
      settings.seed,
      rows_needed(self.program.batch_sharding, data.batch_size),
      distributed.maximum,
    )
    self._eval_batches = _evaluation(eval_rows, encoder, config) if eval_rows else {}
    if eval_rows and data.eval_batch_size % num_batch_shards(self.program.mesh):
      raise ConfigError(
        f"data.eval_batch_size={data.eval_batch_size} does not divide over the "
        f"{num_batch_shards(self.program.mesh)} parts of "
        f"mesh {dict(self.program.mesh.shape)}"
      )
    chip = cost.chip_of(jax.devices()[0])
    self._peak_flops = chip.flops * self.program.mesh.size if chip else None
    self._window = _Window(self.program, counts_flops=self._peak_flops is not None)
    self._hooks = list(hooks)
    if self._folder is not None and distributed.is_main():
      self._hooks.append(ProfileOnRequest(self._folder))
    self._compiled: set[tuple] = set()
    self._last_report: dict[str, float] = {}
    self._frozen: dict[str, Any] = {}
    self._carried: dict[str, Any] = {}
    self._checkpointer: Checkpointer | None = None
    self._lock: io.Lock | buckets.Claim | None = None  # the main process's
    self._watch = metrics_lib.Stopwatch(time.time())
    self._stopped: int | None = None

  def run(self) -> Result:
    """Trains to the end.

    Raises:
      ConfigError: the configuration does not fit the initial weights.
      CheckpointError: `workdir` holds another run, or one that cannot be read.
      DataError: a row does not fit.
      NonFiniteLossError: naming the step and its rows.
      KeyboardInterrupt: Ctrl-C; after the first one the run has saved.
    """
    if self.state is not None:
      raise RuntimeError("this Trainer has run; make another one")
    start = time.monotonic()
    with self.program.context(), Signals() as signals, contextlib.ExitStack() as held:
      self._place_weights()
      if self._workdir is not None:
        self._open_workdir(held)
      main = distributed.is_main()
      self._reporter = metrics_lib.Reporter(
        self._folder if main else None,
        self.config.train.stage,
        self.total_steps,
        self._progress and main,
      )
      # The position of the state: what an interruption saves belongs together.
      self._position = self._batches.get_state()
      finished = False
      try:
        self._train(signals)
        finished = True
        if signals.interrupted:
          raise KeyboardInterrupt
      except KeyboardInterrupt:
        # A second Ctrl-C, anywhere: what is in memory may be neither before nor after a step.
        if not finished:
          self._stopped = None
        raise
      finally:
        self._close(save=finished or self._stopped is not None)
    self._frozen.pop("corpus", None)
    last = self.evaluations[-1][1] if self.evaluations else {}
    return Result(
      {**self._frozen, **self.state.trainable},
      {"step": self.step, **self._last_report, **last},
      self.evaluations,
      time.monotonic() - start,
      self._stopped,
    )

  # ---- before the first step ---------------------------------------------------------------------

  def _place_weights(self) -> None:
    """The state, the frozen groups, and what of these a checkpoint carries."""
    weights, data = self.program.place_weights(self._init_weights), self.config.data
    self.state = self.program.initial_state({g: weights.pop(g) for g in self.program.trained})
    self._frozen = weights
    self._carried = {g: w for g, w in weights.items() if g != "base"}
    if data.retrieve == "store":
      store = MemoryStore(data.store)
      self._frozen["corpus"] = corpus.place(
        corpus.shapes(self.config.clara, data, self.program.mesh, store), store
      )
    if "base" in weights:
      self._carried["special_tokens"] = jax.jit(
        functools.partial(special_token_rows, config=self.config.clara)
      )(weights["base"])

  def _open_workdir(self, held: contextlib.ExitStack) -> None:
    """Locks the directory, records the run, and restores the last step if there is one."""
    settings, main = self.config.train, distributed.is_main()
    self._lock = resume.admit(self._workdir, self.config, self._init_weights, self._base_sha256)
    if self._lock is not None:
      held.callback(self._lock.release)
    if main:
      with buckets.written(str(self._folder / "tokenizer")) as folder:
        self._prompt_tokenizer.tokenizer.save_pretrained(folder)
    distributed.barrier("the record is written")
    self._checkpointer = Checkpointer(self._workdir, settings.keep_checkpoints, settings.keep_best)
    productive = 0.0
    if self._checkpointer.latest_step() is not None:
      trainable, rest, progress = self._checkpointer.restore(
        self.state.trainable, _without_weights(self.state)
      )
      self.state = TrainState(trainable=trainable, **rest)
      self._batches.set_state(progress["data"])
      productive = progress["productive_seconds"]
    self.step = int(self.state.step)
    self._watch = metrics_lib.Stopwatch(note_start(self._workdir, self.step, main), productive)

  # ---- the steps ---------------------------------------------------------------------------------

  def _train(self, signals: Signals) -> None:
    settings = self.config.train
    if self._eval_batches and self.step < self._end:
      self.evaluate()
    while self.step < self._end:
      self._take_step()
      stopping = signals.received(self.step)
      if (
        self.step % settings.log_every == 0
        or self.step == self._end
        or stopping
        or self._watch.elapsed > STATUS_SECONDS
      ):
        self.report()
      if self.step == self._end:
        break
      if stopping:
        self._stopped = self.step
        return
      if self._eval_batches and settings.eval_every and self.step % settings.eval_every == 0:
        self.evaluate()
      if self._checkpointer and self.step % settings.checkpoint_every == 0:
        self.save()
    if self._eval_batches and (not self.evaluations or self.evaluations[-1][0] != self.step):
      self.evaluate()

  def _take_step(self) -> None:
    settings, program = self.config.train, self.program
    with self._watch.waiting():
      training_batch = next(self._batches)
      batch = put_batch(
        training_batch.batch,
        program.batch_sharding,
        self.config.data.batch_size,
        training_batch.positions,
      )
    if settings.gradients_every and self.step % settings.gradients_every == 0:
      with self._untimed():
        self._reporter.write(
          self.step,
          metrics_lib.values(program.gradients(self.state, self._frozen, batch)),
          "gradients",
        )
    start = time.monotonic()
    self.state, metrics = program.step(self.state, self._frozen, batch)
    self._position = self._batches.get_state()
    if (shapes := _shapes(batch)) not in self._compiled:  # the call has waited for the compiler
      self._compiled.add(shapes)
      self._watch.discount(time.monotonic() - start)
    self.step += 1
    self._window.add(self.step, training_batch.ids, batch, metrics)
    for hook in self._hooks:
      hook.after_step(self, training_batch.ids)

  @contextlib.contextmanager
  def _untimed(self) -> Iterator[None]:
    """Work that trains nothing; steps that are still running are reported first."""
    self.report()
    with self._watch.unproductive():
      yield

  # ---- what comes of them ------------------------------------------------------------------------

  def report(self) -> None:
    """Writes the means over the steps since the last report; waits for the devices.

    Raises:
      NonFiniteLossError: a loss is not finite.
    """
    window, config = self._window, self.config
    if not window.steps:
      return
    metrics = window.values() | {
      "learning_rate": float(optim.schedule(config.train, self.total_steps)(self.step - 1)),
      **self._watch.report(
        config.data.batch_size * len(window.steps), window.tokens, window.flops, self._peak_flops
      ),
    }
    if self._batches.malformed:
      metrics["malformed_rows"] = self._batches.malformed
    window.clear()
    self._last_report = metrics
    if distributed.is_main():
      self._reporter.write(self.step, metrics)
    for hook in self._hooks:
      hook.after_report(self, metrics)

  def evaluate(self) -> dict[str, float]:
    """Runs the evaluation rows, without dropout; records and returns their metrics. For
    hooks, while `run` is at work."""
    self._check_running()
    metrics: dict[str, float] = {}
    with self._untimed():
      size = self.config.data.eval_batch_size
      for suffix, batches in self._eval_batches.items():
        total = None
        for batch in batches:
          placed = put_batch(batch, self.program.batch_sharding, size, np.arange(size))
          total = metrics_lib.add(
            total, self.program.evaluate(self.state.trainable, self._frozen, placed)
          )
        metrics |= {f"{name}{suffix}": value for name, value in metrics_lib.values(total).items()}
    self.evaluations.append((self.step, metrics))
    if distributed.is_main():
      self._reporter.write(self.step, metrics, "eval")
    for hook in self._hooks:
      hook.after_evaluation(self, metrics)
    return metrics

  def save(self) -> None:
    """Saves the state with the position in the data, in the background. For hooks, while `run`
    is at work; there is a `workdir`."""
    self._check_running()
    if self._checkpointer is None:
      raise ConfigError("workdir: a Trainer without one has nowhere to save")
    with self._untimed():
      if buckets.is_remote(self._workdir):
        resume.check_claim(self._lock)
      evaluated = (
        self.evaluations[-1][1]
        if self.evaluations and self.evaluations[-1][0] == self.step
        else None
      )
      self._checkpointer.save(
        int(self.state.step),
        {**self._carried, **self.state.trainable},
        _without_weights(self.state),
        {"data": self._position, "productive_seconds": self._watch.productive},
        evaluated,
      )

  def _check_running(self) -> None:
    if self.state is None:
      raise RuntimeError("the Trainer is not at work: call run()")

  def _close(self, save: bool) -> None:
    """Saves if asked to, and frees threads and files."""
    if self._checkpointer and save:
      if self._checkpointer.latest_step() != int(self.state.step):
        self.save()
      self._checkpointer.close()
      if self._stopped is not None and distributed.is_main():
        log.warning("stopped at step %d; rerun the command to resume", self._stopped)
    elif (
      self._checkpointer and jax.process_count() == 1
    ):  # what is being saved becomes whole; several processes may not meet any more
      self._checkpointer.close()
    self._batches.close()
    self._reporter.close()


def _without_weights(state: TrainState) -> dict[str, Any]:
  return {"opt_state": state.opt_state, "rng": state.rng, "step": state.step}


def _shapes(batch: Batch) -> tuple:
  """What a compiled step depends on."""
  return (batch.memory_tokens, *(x.shape for x in jax.tree.leaves(batch)))


def _evaluation(
  rows: Sequence[Row], encoder: RowEncoder, config: RunConfig
) -> dict[str, list[Batch]]:
  """Batches by the suffix of their metrics' names: with all memory tokens none, with the first m of
  `clara.nested_memory` '_m<m>'."""
  sizes = config.clara.nested_memory if encoder.kind != "text" else ()
  batches = {"": evaluation_batches(rows, encoder, config.data.eval_batch_size)}
  return batches | {
    f"_m{m}": evaluation_batches(rows, encoder.first_tokens(m), config.data.eval_batch_size)
    for m in sizes[:-1]
  }


def special_token_rows(base: Weights, config: ClaraConfig) -> dict[str, jax.Array]:
  """The rows of CLaRa's own tokens, which the base on disk does not have: embedding [M+3, D] and,
  if it is not tied, head [D, M+3]."""
  first, last = config.model.vocab_size, config.vocab_size
  return {
    "embedding": base["embedding"][first:last],
    **({"head": base["head"][:, first:last]} if "head" in base else {}),
  }


class _Window:
  """The steps since the last report: their losses, tokens and FLOPs."""

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
    self.tokens += sum(
      t.ids.size for t in (batch.prompt.tokens, batch.documents, batch.question) if t is not None
    )
    if self._counts_flops:
      shapes = _shapes(batch)
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
        raise NonFiniteLossError(
          f"{settings.stage}: the loss is {value} at step {step} (seed {settings.seed}), rows "
          f"{', '.join(ids)}; "
          "the last checkpoint is kept"
        )
    return metrics_lib.values(self._sum)
