"""The computations of a run on a mesh: where every array lies, and the step that is compiled.

`Trainer` runs it and `launch/aot.py` compiles it for machines that are not there: one and the
same step.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clara_jax import sharding
from clara_jax.batch import GOLD, Batch, Prompt, Tokens
from clara_jax.config import ConfigError, RunConfig
from clara_jax.data.pipeline import label_width, padded_length
from clara_jax.data.prompt_tokenizer import EXTRA_TOKENS
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Clara, Weights
from clara_jax.ops import estimators
from clara_jax.training import consistency, corpus, optim, stages
from clara_jax.training.step import (
  TrainState,
  evaluation_step,
  gradient_paths_step,
  init_state,
  train_step,
)


class Program:
  """One stage on one mesh.

  Args:
    config: the run.
    steps: its length, for the schedule.
    mesh: by default what `config.mesh` makes of all devices.

  Attributes:
    model, stage, mesh, optimizer: what the names say.
    trained: groups of weights that train.
    step: compiled (state, frozen, batch) -> (state, metrics); the state is donated.
    gradients: compiled (state, frozen, batch) -> metrics of the selection's gradient (joint stage).
    evaluate: compiled (trainable, frozen, batch) -> metrics.

  Raises:
    ConfigError: sizes that do not divide over the mesh, by name.
  """

  def __init__(self, config: RunConfig, steps: int, mesh: Mesh | None = None):
    settings = config.train
    self.config = config
    self.mesh = mesh or sharding.make_mesh(config.mesh)
    self.stage = stages.get(settings.stage)
    estimator = (
      estimators.get(config.estimator, config.estimator_args) if config.estimator else None
    )
    self.model = Clara(config.clara, estimator)
    self.trained = self.stage.trained(settings)
    if settings.temperature_schedule == "learned":
      self.trained += ("temperature",)
    consistency.check(config, self.stage, self.trained, self.mesh)
    self.optimizer = optim.make_optimizer(settings, steps, self.trained)
    self.batch_sharding = sharding.batch_sharding(self.mesh)
    temperature = optim.temperature(settings, config.clara.temperature, steps)
    self.step = jax.jit(
      functools.partial(
        train_step,
        self.model,
        self.stage,
        self.optimizer,
        settings.accumulate,
        temperature=temperature,
      ),
      donate_argnums=0,
      out_shardings=(self._state_shardings(), None),
    )
    self.gradients = jax.jit(
      functools.partial(gradient_paths_step, self.model, self.stage, temperature=temperature)
    )
    self.evaluate = jax.jit(functools.partial(evaluation_step, self.model, self.stage))

  def replaced(self, config: RunConfig) -> "Program":
    """The same mesh with another configuration."""
    return Program(config, 1, self.mesh)

  @contextlib.contextmanager
  def context(self) -> Iterator[None]:
    """Where traced calls know the mesh and the logical names."""
    with sharding.context(self.mesh):
      yield

  # ---- shapes before arrays ----------------------------------------------------------------------

  def weights_shapes(self, group: str, model: Clara | None = None) -> Any:
    """A group's shapes, with their shardings."""
    boxed = jax.eval_shape(
      lambda: (model or self.model).init_boxed(jax.random.key(0), (group,))[group]
    )
    return _with_shardings(boxed, sharding.tree_shardings(boxed, self.mesh))

  def _boxed_state(self) -> Any:
    def make():
      trainable = {g: self.model.init_boxed(jax.random.key(0), (g,))[g] for g in self.trained}
      return init_state(trainable, self.optimizer, jax.random.key(0))

    return jax.eval_shape(make)

  def _state_shardings(self) -> Any:
    return sharding.tree_shardings(self._boxed_state(), self.mesh)

  def state_shapes(self) -> TrainState:
    """The state's shapes, with their shardings."""
    return _with_shardings(self._boxed_state(), self._state_shardings())

  def frozen_shapes(self) -> dict[str, Any]:
    """Shapes of the groups that this stage needs and does not train, with their shardings."""
    needed = {"base", *self.stage.starts}
    shapes = {g: self.weights_shapes(g) for g in sorted(needed - set(self.trained))}
    if self.config.data.retrieve == "store":
      shapes["corpus"] = corpus.shapes(
        self.config.clara, self.config.data, self.mesh, MemoryStore(self.config.data.store)
      )
    return shapes

  def batch_shapes(self) -> Batch:
    """The largest batch: every document and every prompt as long as the configuration allows,
    questions of `query_max_length` tokens (in training they are cut at the decoder's maximum only,
    but longer ones are rare)."""
    clara, data = self.config.clara, self.config.data
    b, m, k = data.batch_size, clara.num_memory_tokens, clara.top_k

    def array(*shape, dtype=np.int32):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)

    def tokens(*lead, length):
      return Tokens(array(*lead, length), array(*lead))

    def text(limit):
      return padded_length(limit + EXTRA_TOKENS + m, min(data.bucket, data.document_bucket))

    length = padded_length(clara.decoder_max_length, data.bucket)
    labels = label_width(length - (0 if self.stage.data == "text" else k * (m + 1)), data)
    prompt = Prompt(
      tokens(b, length=length),
      array(b, labels),
      array(b, labels),
      array(b, labels, dtype=np.float32),
    )
    documents = memories = question = is_gold = gold_slots = slots = None
    if self.stage.data == "given":
      documents = tokens(b, k, length=text(clara.doc_max_length))
    elif self.stage.data == "candidates":
      question = tokens(b, length=text(clara.query_max_length))
      if data.retrieve == "store":  # the corpus is an argument of its own
        gold_slots = array(b, GOLD)
      else:
        is_gold = array(b, data.candidates, dtype=bool)
        if data.store:
          memories = array(
            b, data.candidates, m, clara.model.width, dtype=jnp.dtype(clara.model.dtype)
          )
        else:
          documents = tokens(b, data.candidates, length=text(clara.doc_max_length))
    # At worst each row has documents of its own.
    if documents is not None and data.share_documents > 1:
      slots = array(*documents.lengths.shape)
      documents = tokens(documents.lengths.size, length=documents.ids.shape[-1])
    return Batch(
      prompt,
      documents,
      memories,
      question,
      is_gold,
      gold_slots,
      array(b, dtype=np.float32),
      slots,
      m,
    )

  # ---- arrays ------------------------------------------------------------------------------------

  def place_weights(self, init_weights: Weights) -> dict[str, Any]:
    """Every group that the stage needs, on its devices: fresh ones are made there, given ones are
    copied.

    Args:
      init_weights: groups to start from; leaves may be read when they are indexed
        (`checkpoints/lazy.py`).

    Raises:
      ConfigError: a group is missing or has another shape.
    """
    key = jax.random.key(self.config.train.seed)

    def fresh(group):
      make = jax.jit(
        lambda: nn.meta.unbox(self.model.init(key, (group,))[group]),
        out_shardings=_shardings(self.weights_shapes(group)),
      )
      return make()

    groups = stages.starting_weights(self.stage, self.config.train, init_weights, fresh)
    if "temperature" in self.trained:
      groups["temperature"] = (
        init_weights["temperature"] if "temperature" in init_weights else fresh("temperature")
      )
    if "base" in init_weights:
      groups["base"] = init_weights["base"]
    elif "base" in self.stage.trains:
      groups["base"] = fresh("base")
    else:
      raise ConfigError(f"stage {self.stage.name!r} needs a base; set config.base")
    return {group: self._place_group(group, tree) for group, tree in groups.items()}

  def _place_group(self, group: str, tree: Any) -> Any:
    model = self.config.clara.model
    # As a checkpoint has it: whole numbers of words, nothing in eight bits.
    plain = _with_model(self.model, base_quantization="none")
    bare = jax.eval_shape(
      lambda: _with_model(plain, vocab_multiple=1).init(jax.random.key(0), (group,))[group]
    )
    shapes = self.weights_shapes(group, plain)
    check_tree(tree, bare, group, shapes)
    # A copy, because training donates its state and the caller keeps what it gave.
    if group != "base" or model.base_quantization == "none":
      return jax.tree.map(lambda x, like: sharding.place(x, like.sharding, like), tree, shapes)
    return _quantized(tree, shapes, self.weights_shapes(group))

  def initial_state(self, trainable: dict[str, Any]) -> TrainState:
    """The state before the first step."""
    make = jax.jit(
      functools.partial(init_state, optimizer=self.optimizer), out_shardings=self._state_shardings()
    )
    return make(trainable, rng=jax.random.key(self.config.train.seed))


def _with_model(model: Clara, **fields: Any) -> Clara:
  return Clara(
    dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, **fields))
  )


def check_tree(tree: Any, expected: Any, name: str, filled: Any = None) -> None:
  """Compares names and shapes of two trees; a leaf may also have the shape that it has in `filled`.

  Raises:
    ConfigError: naming the leaf, what was expected and what came.
  """

  def shapes(t):
    return {
      jax.tree_util.keystr(path): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(t)
    }

  have, want = shapes(tree), shapes(expected)
  also = want if filled is None else shapes(filled)
  for path in {**want, **have}:
    if (
      have.get(path) not in (want.get(path), also.get(path)) or path not in want or path not in have
    ):
      raise ConfigError(
        f"weights {name}{path}: expected shape {want.get(path, 'none')}, got "
        f"{have.get(path, 'none')}"
      )


def _quantized(tree: Any, plain: Any, shapes: Any) -> Any:
  """Places a base leaf by leaf, matrices in int8 with a scale for each layer and output channel
  (the largest |W| over the inputs)."""
  try:
    import qwix
  except ImportError:
    raise ConfigError(
      "clara.model.base_quantization='int8' needs qwix: pip install 'clara_jax[int8]'"
    ) from None
  result = {}
  for name, like in shapes.items():
    if name == "scale" and "kernel" in tree:
      continue  # made with its kernel
    if isinstance(like, dict):
      result[name] = _quantized(tree[name], plain[name], like)
      continue
    value = sharding.place(tree[name], plain[name].sharding, plain[name])
    if like.dtype == np.int8:

      def quantize(x):
        q = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 2))
        return q.qvalue, q.scale[:, 0].astype(jnp.float32)

      value, result["scale"] = jax.jit(
        quantize, out_shardings=(like.sharding, shapes["scale"].sharding)
      )(value)
    result[name] = value
  return result


def _with_shardings(boxed: Any, shardings: Any) -> Any:
  def leaf(value, to):
    value = value.value if isinstance(value, nn.LogicallyPartitioned) else value
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=to)

  return jax.tree.map(
    leaf, boxed, shardings, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def _shardings(shapes: Any) -> Any:
  return jax.tree.map(lambda s: s.sharding, shapes)
