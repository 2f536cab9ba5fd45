"""SmolLM2 on real text: scp, instruct and joint with nested memory tokens, what they are held
against, and what the test says.

    python examples/smollm2/prepare.py --data DIR --out rows
    python examples/smollm2/recipe.py --base smollm2/hf --rows rows --workdir runs --out results.json [--seconds 480]

Stages: `scp` -> `instruct` -> `joint`, and from `instruct` also `joint_softmax` (a softmax mixture
teaches the retriever) and `contrastive` (with labels); `full_text` is the ceiling, LoRA of the same
size that reads the documents. configs/smollm2.py has the sizes. With --seconds every stage takes
the steps that its share of the time allows, measured on the way; else those of the configuration,
or --steps. Results go to the file after every item, so that what is stopped keeps what it has;
rerunning the command resumes it.
"""  # noqa: E501

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from clara_jax.training.hooks import Hook
from clara_jax.training.trainer import Result, Trainer

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Training:
  """A stage of the recipe.

  Attributes:
    stage: of configs/smollm2.py.
    rows: its file.
    before: the training that it starts from; None: the base.
    share: of the time for training.
    estimator: of the joint stage.
  """

  stage: str
  rows: str
  before: str | None
  share: float
  estimator: str | None = None


TRAININGS = {
  "scp": Training("scp", "scp", None, 0.46),
  "instruct": Training("instruct", "instruct", "scp", 0.16),
  "full_text": Training("full_text", "instruct", None, 0.12),
  "joint": Training("joint", "joint", "instruct", 0.1),
  "contrastive": Training("contrastive", "joint", "instruct", 0.06),
  "joint_softmax": Training("joint", "joint", "instruct", 0.1, "softmax"),
}
CALIBRATED = 16  # steps that tell how long one takes

# name, training, test rows, setting, memory tokens; in the order of what matters.
TESTS = (
  ("answers from memory, ratio 4", "instruct", "squad_given", "compressor", 64),
  ("answers from text, LoRA", "full_text", "squad_given", "full_text_generator", None),
  ("retrieval before joint", "instruct", "squad", "compressor_queries", 64),
  ("joint", "joint", "squad", "joint", 64),
  *(
    (f"answers from memory, ratio {256 // m}", "instruct", "squad_given", "compressor", m)
    for m in (16, 4, 32, 8)
  ),
  ("contrastive", "contrastive", "squad", "joint", 64),
  ("joint, softmax mixtures", "joint_softmax", "squad", "joint", 64),
  ("joint, HotpotQA", "joint", "hotpotqa", "joint", 64),
  ("retrieval before joint, HotpotQA", "instruct", "hotpotqa", "compressor_queries", 64),
  ("answers from text, LoRA, HotpotQA", "full_text", "hotpotqa", "full_text_generator", None),
  *((f"joint, ratio {256 // m}", "joint", "squad", "joint", m) for m in (16, 4)),
  ("no documents, base", None, "squad_given", "no_documents", None),
  ("answers from text, base", None, "squad_given", "full_text", None),
)


class Recipe:
  """The trainings and tests in one directory.

  Args:
    base: SmolLM2 as a Hugging Face directory.
    rows: what prepare.py wrote.
    workdir: of the runs.
    out: the JSON file.
    overrides: `--config.a.b=value` for every stage.
    limit: rows of each file, for a trial.
    evaluate: test rows of each file.
    batch_size: of the tests.
  """

  def __init__(
    self,
    base: str,
    rows: str,
    workdir: str,
    out: str,
    overrides: list[str],
    limit: int | None = None,
    evaluate: int | None = None,
    batch_size: int = 100,
  ):
    self.base, self.rows, self.workdir, self.out = (
      base,
      pathlib.Path(rows),
      pathlib.Path(workdir),
      pathlib.Path(out),
    )
    self.overrides, self.limit, self.evaluated, self.batch_size = (
      overrides,
      limit,
      evaluate,
      batch_size,
    )
    self.found: dict[str, Any] = (
      json.loads(self.out.read_text()) if self.out.exists() else {"trainings": {}, "tests": {}}
    )

  def write(self) -> None:
    """Writes what there is."""
    part = self.out.with_name(f"{self.out.name}.part")
    part.write_text(json.dumps(self.found, indent=2))
    part.replace(self.out)

  # ---- training ----------------------------------------------------------------------------------

  def train(self, name: str, seconds: float | None, steps: int | None) -> None:
    """One training, in `seconds` or `steps`."""
    import jax

    from clara_jax.checkpoints.workdir import is_checkpoint, read_config
    from clara_jax.data import records
    from clara_jax.training import config_file
    from clara_jax.training import run as run_lib

    training = TRAININGS[name]
    overrides = [f"--config.base={self.base}", *self.overrides]
    config = config_file.load_config(f"{ROOT}/configs/smollm2.py:{training.stage}", overrides)
    if training.estimator:
      config = dataclasses.replace(config, estimator=training.estimator)
    if training.before:
      config = dataclasses.replace(config, init_from=str(self.workdir / training.before))
    begin = run_lib.resolve(config, str(self.workdir / name))
    config = begin.config
    (source,) = records.open_sources(
      (str(self.rows / f"{training.rows}.jsonl"),), 1, together=config.data.share_documents
    )
    source = [shard[: self.limit] for shard in source]
    start = time.monotonic()

    def run(
      number: int, hook: Hook, log_every: int = config.train.log_every, workdir: str | None = None
    ) -> Result:
      settings = dataclasses.replace(config.train, steps=number, log_every=log_every)
      return Trainer(
        dataclasses.replace(config, train=settings),
        begin.prompt_tokenizer,
        begin.init_weights,
        sources=[source],
        progress=False,
        workdir=workdir,
        hooks=[hook],
      ).run()

    each, end = None, None if seconds is None else start + seconds
    # It was stopped, and goes on to the end that it had.
    if is_checkpoint(str(self.workdir / name)):
      steps = read_config(str(self.workdir / name))[0].train.steps
    elif seconds is not None:
      each = seconds_of_step(lambda hook: run(CALIBRATED, hook, log_every=1))
      compiling = time.monotonic() - start - CALIBRATED * each  # at worst the same again
      steps = max(CALIBRATED, int((end - time.monotonic() - compiling) / each))
      print(
        f"{name}: {each:.3f} s a step, {compiling:.0f} s to start and compile, {steps} steps",
        file=sys.stderr,
        flush=True,
      )
    watch = InTime(end)
    result = run(steps or config.train.steps, watch, workdir=str(self.workdir / name))
    losses = watch.losses
    if result.stopped is not None and not watch.asked:  # by somebody else; what was done is saved
      raise KeyboardInterrupt
    with open(self.workdir / name / "finished", "w", encoding="utf-8"):
      pass
    speeds = [x["samples_per_second"] for x in losses]
    self.found["trainings"][name] = {
      "steps": result.metrics["step"],
      "batch_size": config.data.batch_size,
      "rows": len(source[0]),
      "planned": steps,
      "seconds": time.monotonic() - start,
      "seconds_a_step": each,
      "samples_per_second": max(speeds),
      "tokens_per_second": max(x["tokens_per_second"] for x in losses),
      "mfu": max((x["mfu"] for x in losses if "mfu" in x), default=None),
      "device": jax.devices()[0].device_kind,
      "losses": [
        {k: round(x[k], 4) for k in ("step", "loss", "ce", "answers", "recall_at_1") if k in x}
        for x in losses
      ],
    }
    self.write()

  # ---- tests -------------------------------------------------------------------------------------

  def test(self, name: str, training: str | None, file: str, setting: str, m: int | None) -> None:
    """One test: mean scores with their intervals."""
    from clara_jax.checkpoints import formats
    from clara_jax.data import schemas
    from clara_jax.evaluation import evaluator, statistics

    start = time.monotonic()
    checkpoint = (
      formats.load(str(self.workdir / training), self.base)
      if training
      else formats.load(self.base, dtype=self.dtype)
    )
    if training == "contrastive":  # it trains the query reasoner alone
      before = formats.load(str(self.workdir / TRAININGS[training].before), self.base)
      checkpoint = dataclasses.replace(
        checkpoint, weights={"generator": before.weights["generator"], **checkpoint.weights}
      )
    config = checkpoint.model.config
    m = min(m, config.num_memory_tokens) if m else None
    if m and m not in (config.nested_memory or (config.num_memory_tokens,)):
      self.found["tests"][name] = {
        "skipped": f"{m} memory tokens were not trained, {list(config.nested_memory)} were"
      }
      return self.write()
    checkpoint = checkpoint.first(m)
    rows = schemas.read_rows([str(self.rows / f"{file}.jsonl")])[: self.evaluated]
    predictions = evaluator.evaluate(
      checkpoint,
      rows,
      setting,
      batch_size=self.batch_size,
      max_new_tokens=24,
      progress=False,
      weights_sha256=name,
    ).predictions
    scores = {
      metric: dataclasses.asdict(statistics.mean([p[metric] for p in predictions]))
      for metric in ("em", "f1", "cover_em", "recall_at_1", "recall_at_5", "documents_read")
      if metric in predictions[0]
    }
    self.found["tests"][name] = {
      "training": training,
      "rows": file,
      "setting": setting,
      "memory_tokens": m,
      **scores,
      "seconds": time.monotonic() - start,
      "examples": [
        {k: p[k] for k in ("question", "answers", "prediction")} for p in predictions[:10]
      ],
    }
    self.write()

  @property
  def dtype(self) -> str | None:
    """Of the computations, where the overrides name one."""
    return next(
      (o.rpartition("=")[2] for o in self.overrides if o.startswith("--config.clara.model.dtype=")),
      None,
    )

  # ---- all ---------------------------------------------------------------------------------------

  def run(
    self,
    seconds: float | None,
    steps: int | None,
    only: tuple[str, ...] = (),
    for_tests: float = 0.35,
    tests: tuple[tuple, ...] = TESTS,
    end: float | None = None,
  ) -> None:
    """All that is not there yet; each training gets its share of `seconds`, of which `for_tests` is
    kept for the tests, and nothing goes on beyond `end` (`time.monotonic()`)."""
    end = end if seconds is None or end else time.monotonic() + seconds
    for name, training in TRAININGS.items():
      if only and name not in only or (self.workdir / name / "finished").exists():
        continue
      budget = (
        None
        if seconds is None
        else min(seconds * (1 - for_tests) * training.share, end - time.monotonic())
      )
      if budget is not None and budget < 5:
        self.found["trainings"][name] = {"failed": "no time was left"}
        self.write()
        continue
      self._guarded(
        "trainings", name, lambda name=name, budget=budget: self.train(name, budget, steps)
      )
    for name, training, *test in tests:
      if only and training not in only or "em" in self.found["tests"].get(name, {}):
        continue
      if training and not (self.workdir / training / "finished").exists():
        continue
      if end is not None and time.monotonic() > end - 30:
        self.found["tests"][name] = {"skipped": "no time was left"}
        self.write()
        continue
      self._guarded(
        "tests",
        name,
        lambda name=name, training=training, test=test: self.test(name, training, *test),
      )

  def _guarded(self, kind: str, name: str, item: Callable[[], None]) -> None:
    """An item that fails is written down, and the next one goes on."""
    print(f"{kind}: {name}", file=sys.stderr, flush=True)
    try:
      item()
    except Exception as error:
      self.found[kind][name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
      self.write()
      print(f"{kind}: {name}: {self.found[kind][name]['failed']}", file=sys.stderr, flush=True)


class InTime(Hook):
  """Keeps the reports, and asks the run to stop at a time (`time.monotonic`)."""

  def __init__(self, end: float | None):
    self._end, self.losses, self.asked = end, [], False

  def after_step(self, trainer, row_ids):
    """Asks once."""
    if self._end is not None and time.monotonic() > self._end and not self.asked:
      self.asked = True
      os.kill(os.getpid(), signal.SIGTERM)  # the run saves and returns

  def after_report(self, trainer, metrics):
    """Keeps them."""
    self.losses.append({"step": trainer.step, **metrics})


class Times(Hook):
  """When each report was made."""

  def __init__(self):
    self.times = [time.monotonic()]

  def after_report(self, trainer, metrics):
    """Notes the time."""
    self.times.append(time.monotonic())


def seconds_of_step(run: Callable[[Hook], Any]) -> float:
  """Seconds of a step by a short run that reports each step: the mean of the faster half, for in
  the others something may have been compiled."""
  watch = Times()
  run(watch)
  times = watch.times
  seconds = sorted(b - a for a, b in zip(times, times[1:], strict=False))
  faster = seconds[: max(1, len(seconds) // 2)]
  return sum(faster) / len(faster)


def main() -> None:
  """Runs what is not there yet and prints the file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--base", required=True, metavar="DIR")
  parser.add_argument("--rows", required=True, metavar="DIR")
  parser.add_argument("--workdir", required=True, metavar="DIR")
  parser.add_argument("--out", required=True, metavar="F.json")
  parser.add_argument("--seconds", type=float)
  parser.add_argument("--steps", type=int)
  parser.add_argument("--only", nargs="+", default=(), choices=list(TRAININGS), metavar="TRAINING")
  parser.add_argument("--limit", type=int, help="training rows of each file, for a trial")
  parser.add_argument(
    "--evaluate", type=int, metavar="N", help="test rows of each file; default: all; 0: no tests"
  )
  parser.add_argument("--test-batch-size", type=int, default=100)
  options, overrides = parser.parse_known_args()
  from clara_jax.compilation import enable_compilation_cache

  enable_compilation_cache()
  pathlib.Path(options.workdir).mkdir(parents=True, exist_ok=True)
  recipe = Recipe(
    os.path.abspath(options.base),
    options.rows,
    os.path.abspath(options.workdir),
    options.out,
    overrides,
    options.limit,
    options.evaluate,
    options.test_batch_size,
  )
  recipe.run(
    options.seconds,
    options.steps,
    tuple(options.only),
    tests=() if options.evaluate == 0 else TESTS,
  )
  print(options.out)


if __name__ == "__main__":
  main()
