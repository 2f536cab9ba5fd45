"""Is it right on this device? The reference implementation's numbers, the top-k's gradient, every
attention backend, a kill and a resume.

Each check returns what was found beside what is allowed; `passed` says whether it holds.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Largest differences. Golden: of losses; of gradients, by the largest number of each tensor;
# float32 at highest precision, and bfloat16.
ALLOWED = {"float32": {"loss": 1e-4, "gradient": 1e-3}, "bfloat16": {"loss": 0.01, "gradient": 0.2}}
# The least share of tokens before the first other one; in bfloat16 ties of a random model fall
# otherwise.
NEEDED_CONTINUATIONS = {"float32": 1.0, "bfloat16": 0.5}
ALLOWED_TOP_K, ALLOWED_RESUME = 1e-4, 0.0
ALLOWED_ATTENTION = {"float32": 1e-4, "bfloat16": 0.03}
STEPS = 6


def items(golden: pathlib.Path, smoke: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
  """(name, check) in order."""
  for dtype in ("float32", "bfloat16"):
    for name, stage in (("stage1", "scp"), ("stage1_2", "scp"), ("stage2", "joint")):
      if not smoke or (dtype, name) == ("float32", "stage1"):
        yield (
          f"golden {name} {dtype}",
          lambda dtype=dtype, name=name, stage=stage: golden_losses(golden, name, stage, dtype),
        )
  yield "golden continuations float32", lambda: continuations(golden, "float32")
  if not smoke:
    yield "golden continuations bfloat16", lambda: continuations(golden, "bfloat16")
  yield "straight-through top-k", top_k_gradient
  for dtype in ("float32", "bfloat16"):
    for backend in ("xla", "cudnn", "grouped"):
      if (backend, dtype) != ("cudnn", "float32"):  # cuDNN's kernel takes half precision
        yield (
          f"attention {backend} {dtype}",
          lambda backend=backend, dtype=dtype: attention(backend, dtype, smoke),
        )
  yield "kill and resume", kill_and_resume


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
  """float32 products in float32, not in TF32."""
  import jax

  with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
    yield


def _load(golden, name, dtype):
  from clara_jax.model import Clara
  from clara_jax.testing import golden as golden_lib

  model, weights = golden_lib.load(golden, name)
  config = dataclasses.replace(
    model.config, model=dataclasses.replace(model.config.model, dtype=dtype)
  )
  return Clara(config), weights


def golden_losses(golden: pathlib.Path, name: str, stage: str, dtype: str) -> dict[str, Any]:
  """Loss and gradients of a stage beside the reference implementation's (float32)."""
  from clara_jax.testing import golden as golden_lib
  from clara_jax.training import stages

  reference = np.load(golden / f"{name}.npz")
  model, weights = _load(golden, name, dtype)
  with precision(dtype):
    if stage == "joint":
      batch, trained, expected_loss = (
        golden_lib.joint_batch(reference, golden),
        ("query_reasoner", "generator"),
        float(reference["loss"]),
      )
    else:
      batch = golden_lib.given_batch(reference, 2 if name == "stage1_2" else 1)
      trained, expected_loss = ("compressor", "generator"), float(reference["total"])
    loss, _, grads = golden_lib.objective(model, stages.get(stage), weights, batch, trained)
  worst = 0.0
  for _, ours, expected in golden_lib.gradients(reference, grads):
    worst = max(worst, float(np.abs(ours - expected).max() / np.abs(expected).max()))
  errors = {"loss": abs(loss - expected_loss), "gradient": worst}
  return {
    "found": errors,
    "allowed": ALLOWED[dtype],
    "passed": all(errors[k] <= ALLOWED[dtype][k] for k in errors),
  }


def continuations(golden: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Greedy continuations of 12 tokens: share of tokens that are the reference implementation's
  before the first that is not."""
  from clara_jax.data.prompt_tokenizer import PromptTokenizer
  from clara_jax.testing.golden import compress
  from clara_jax.testing.golden import continuations as continue_greedily

  model, weights = _load(golden, "stage1_2", dtype)
  prompt_tokenizer = PromptTokenizer(str(golden / "tiny_mistral"), model.config)
  inputs = json.loads((golden / "inputs.json").read_text())
  references = json.loads((golden / "generation.json").read_text())["from_text_stage1_2"]["ids"]
  with precision(dtype):
    texts = [t for pool in inputs["POOL"] for t in pool[:2]]
    memories = compress(model, weights, prompt_tokenizer, texts, 2, 2)
    prompts = [prompt_tokenizer.answer_prompt(q, 2).ids for q in inputs["STAGE2_QUESTIONS"]]
    outputs = continue_greedily(model, weights, prompt_tokenizer, prompts, memories)
  same = [
    next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(y))
    for x, y in zip(outputs, references, strict=True)
  ]
  share, needed = sum(same) / sum(map(len, references)), NEEDED_CONTINUATIONS[dtype]
  return {"found": share, "allowed": needed, "passed": share >= needed}


def top_k_gradient() -> dict[str, Any]:
  """The custom_vjp beside the dense formula: N = 20, K = 5, memories of 8 x 512."""
  import jax
  import jax.numpy as jnp

  from clara_jax.ops.topk import straight_through_top_k
  from clara_jax.testing import formulas

  keys = jax.random.split(jax.random.key(0), 3)
  scores, memories = jax.random.uniform(keys[0], (20,)), jax.random.normal(keys[1], (20, 8, 512))
  cotangent = jax.random.normal(keys[2], (5, 8, 512))
  worst = 0.0
  with precision("float32"):
    for masking in ("algorithm1", "equation33"):
      grads = [
        jax.jit(
          jax.grad(
            lambda s, m, f=f, masking=masking: jnp.sum(f(s, m, 5, 0.02, masking)[0] * cotangent),
            (0, 1),
          )
        )(scores, memories)
        for f in (straight_through_top_k, formulas.straight_through_top_k)
      ]
      worst = max(
        worst,
        *(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*grads, strict=True)),
      )
  return {"found": worst, "allowed": ALLOWED_TOP_K, "passed": worst <= ALLOWED_TOP_K}


def attention(backend: str, dtype: str, smoke: bool) -> dict[str, Any]:
  """Output and gradients of `ops.attention.attend` beside the plain formula in float32, with and
  without a window."""
  import jax
  import jax.numpy as jnp

  from clara_jax.ops.attention import attend

  batch, length, heads, groups, width = (1, 48, 4, 2, 8) if smoke else (4, 320, 32, 8, 128)
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, g = (
    jax.random.normal(key, (batch, length, n, width)).astype(dtype)
    for key, n in zip(keys, (heads, groups, groups, heads), strict=True)
  )

  def plain(q, k, v, window):
    q, k, v = (
      x.astype(jnp.float32)
      for x in (q, jnp.repeat(k, heads // groups, 2), jnp.repeat(v, heads // groups, 2))
    )
    at = jnp.arange(length)
    seen = at <= at[:, None]
    if window:
      seen &= at > at[:, None] - window
    scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) * width**-0.5, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)

  worst = 0.0
  with precision(dtype):
    for window in (None, length // 3):

      def ours(q, k, v, window=window):
        return attend(q, k, v, window=window, backend=backend).astype(jnp.float32)

      both = []
      for f in (ours, lambda q, k, v, window=window: plain(q, k, v, window)):
        with jax.default_matmul_precision("highest") if f is not ours else contextlib.nullcontext():
          both.append(
            jax.jit(
              lambda q, k, v, f=f: (
                f(q, k, v),
                jax.grad(lambda *x: (f(*x) * g).sum(), (0, 1, 2))(q, k, v),
              )
            )(q, k, v)
          )
      for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        worst = max(
          worst,
          float(
            jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
            / jnp.abs(b.astype(jnp.float32)).max()
          ),
        )
  return {
    "found": worst,
    "allowed": ALLOWED_ATTENTION[dtype],
    "passed": worst <= ALLOWED_ATTENTION[dtype],
  }


RUN = """
import sys
from clara_jax.training.hooks import Hook
from clara_jax.training.trainer import Trainer
from clara_jax.testing import tiny
class Tell(Hook):
  def after_step(self, trainer, row_ids):
    print(trainer.step, flush=True)
config = tiny.run_config("joint", steps={steps}, checkpoint_every=1)
Trainer(config, tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("joint"), workdir=sys.argv[1], progress=False, hooks=[Tell()]).run()
"""  # noqa: E501


def kill_and_resume() -> dict[str, Any]:
  """A joint run that is killed and goes on ends with the weights of one that was not: largest
  difference."""
  import jax

  from clara_jax.testing import tiny
  from clara_jax.training import trainer

  root = pathlib.Path(__file__).resolve().parents[2]
  with tempfile.TemporaryDirectory() as folder:
    process = subprocess.Popen(
      [sys.executable, "-c", RUN.format(steps=STEPS), folder],
      stdout=subprocess.PIPE,
      text=True,
      cwd=root,
      env={
        **os.environ,
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      },
    )
    for line in process.stdout:
      if line.strip() == str(STEPS // 2):
        process.send_signal(signal.SIGKILL)
    ended = process.wait()
    config = tiny.run_config("joint", steps=STEPS, checkpoint_every=1)
    resumed = (
      trainer.Trainer(
        config,
        tiny.prompt_tokenizer(),
        tiny.weights(),
        tiny.rows("joint"),
        workdir=folder,
        progress=False,
      )
      .run()
      .weights
    )
  whole = (
    trainer.Trainer(
      config, tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("joint"), progress=False
    )
    .run()
    .weights
  )
  worst = max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max())
    for role in ("query_reasoner", "generator")
    for a, b in zip(jax.tree.leaves(resumed[role]), jax.tree.leaves(whole[role]), strict=True)
  )
  return {
    "found": worst,
    "allowed": ALLOWED_RESUME,
    "passed": worst <= ALLOWED_RESUME and ended == -signal.SIGKILL,
  }


def run(out: Any, golden: pathlib.Path, seconds: float, smoke: bool) -> None:
  """All checks that the time allows; `out` (`run.Results`) keeps each."""
  end = time.monotonic() + seconds
  for name, check in items(golden, smoke):
    out.item(name, check, end, needs=5)
