"""The backbone against transformers' MistralForCausalLM on random weights; cached decoding against
the full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clara_jax.checkpoints import formats
from clara_jax.config import ClaraConfig, LoraConfig, MeshConfig, ModelConfig
from clara_jax.inference.generate import empty_cache
from clara_jax.model import Clara
from clara_jax.nn.decoder import EMPTY, extend
from clara_jax.nn.linear import MissingAdapterError
from clara_jax.ops.attention import attend, attend_cached
from clara_jax.sharding import make_mesh


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tmp_path, window, tied):
  torch = pytest.importorskip("torch")
  import transformers

  torch.manual_seed(0)
  config = transformers.MistralConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=window,
    tie_word_embeddings=tied,
    initializer_range=0.2,
    rms_norm_eps=1e-5,
  )
  reference = transformers.MistralForCausalLM(config).float().eval()
  reference.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(0, 97, (2, 12))
  with torch.no_grad():
    expected = reference(
      torch.tensor(ids), attention_mask=torch.ones(2, 12, dtype=torch.long)
    ).logits.numpy()

  opened = formats.open_checkpoint(str(tmp_path))
  model, weights = Clara(opened.config), formats.on_device(opened)
  weights["memory_embedding"] = jnp.zeros((opened.config.num_memory_tokens, 48))
  hidden, _ = model.hidden(weights, None, model.embed(weights, jnp.asarray(ids)))
  np.testing.assert_allclose(model.logits(weights, hidden)[..., :97], expected, rtol=0, atol=1e-4)


def tiny(**fields):
  values = {
    "vocab_size": 50,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
    "dtype": "float32",
    "param_dtype": "float32",
    "initializer_range": 0.2,
  }
  return Clara(
    ClaraConfig(
      ModelConfig(**{**values, **fields}), LoraConfig(4), doc_max_length=16, compression_rate=8
    )
  )


@pytest.mark.parametrize("window", [None, 4])
def test_cached_decoding_equals_full_forward(window):
  model = tiny(sliding_window=window)
  weights = model.init(jax.random.key(0), ("base", "memory_embedding", "generator"))
  weights["generator"] = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(1), x.shape) * 0.1, weights["generator"]
  )
  ids = jax.random.randint(jax.random.key(2), (2, 11), 0, 50)
  full, _ = model.hidden(weights, "generator", model.embed(weights, ids))
  lengths = jnp.array([4, 7])
  prompt = jnp.where(jnp.arange(7) < lengths[:, None], ids[:, :7], 0)  # right-padded
  _, read = model.hidden(weights, "generator", model.embed(weights, prompt), return_kv=True)
  read = read._replace(
    positions=jnp.where(read.positions < lengths[:, None], read.positions, EMPTY)
  )
  cache = extend(empty_cache(model.config.model, 2, 16), read, 0)
  for step in range(3):
    at = lengths + step
    token = jnp.take_along_axis(ids, at[:, None], axis=1)
    hidden, new = model.hidden(
      weights, "generator", model.embed(weights, token), positions=at[:, None], cache=cache
    )
    cache = extend(cache, new, 9 + step)  # a slot of the cache is no position
    np.testing.assert_allclose(hidden[:, 0], full[jnp.arange(2), at], rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
  plain, saved = tiny(), tiny(remat=remat)
  weights = plain.init(jax.random.key(0), ("base", "memory_embedding"))
  ids = jax.random.randint(jax.random.key(2), (2, 9), 0, 50)

  def loss(model):
    return lambda base: jnp.square(
      model.hidden({**weights, "base": base}, None, model.embed(weights, ids))[0]
    ).sum()

  for a, b in zip(
    jax.tree.leaves(jax.grad(loss(plain))(weights["base"])),
    jax.tree.leaves(jax.grad(loss(saved))(weights["base"])),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_missing_adapter_names_the_module():
  model = tiny()
  weights = model.init(jax.random.key(0), ("base", "memory_embedding"))
  with pytest.raises(MissingAdapterError, match="layers/attention/q"):
    model.hidden({**weights, "generator": {}}, "generator", jnp.zeros((1, 3, 32)))


def test_bfloat16_stays_close_to_float32():
  exact, fast = tiny(), tiny(dtype="bfloat16")
  weights = exact.init(jax.random.key(0), ("base", "memory_embedding"))
  x = exact.embed(weights, jax.random.randint(jax.random.key(2), (2, 9), 0, 50))
  a, b = (m.hidden(weights, None, x)[0] for m in (exact, fast))
  assert b.dtype == jnp.bfloat16
  assert float(jnp.abs(a - b).max()) < 0.15


def test_7b_builds_without_memory():
  config = ModelConfig(
    vocab_size=32_000,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
  )
  shapes = jax.eval_shape(lambda: Clara(ClaraConfig(config)).init(jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes["base"])) == 7_241_732_096 + 2 * 11 * 4096
  assert sum(x.size for x in jax.tree.leaves(shapes["generator"])) == 41_943_040


@pytest.mark.parametrize("window", [None, 50])
def test_splash_attention(window, monkeypatch):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  monkeypatch.setattr(
    splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True)
  )
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 200, heads, 128)), jnp.float32) for heads in (4, 2, 2))

  def value_and_grads(backend):
    return jax.jit(
      jax.value_and_grad(
        lambda *x: (attend(*x, window=window, backend=backend) ** 2).sum(), argnums=(0, 1, 2)
      )
    )(q, k, v)

  def on_a_mesh():
    spec = PartitionSpec("fsdp", None, "tensor")
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])):
      return jax.jit(lambda *x: attend(*x, window=window, backend="splash", partition=spec))(
        q, k, v
      )

  (value, grads), (expected, expected_grads) = value_and_grads("splash"), value_and_grads("xla")
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for a, b in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  np.testing.assert_allclose(on_a_mesh(), attend(q, k, v, window=window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_backends_agree(window):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, 9, heads, 8)), jnp.float32) for heads in (6, 3, 3))

  def mixed(backend):
    return lambda q, k, v: attend(q, k, v, window=window, backend=backend)

  whole = mixed("xla")(q, k, v)
  np.testing.assert_allclose(mixed("grouped")(q, k, v), whole, atol=1e-5)
  grads = [
    jax.grad(lambda *x, b=b: (mixed(b)(*x) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    for b in ("grouped", "xla")
  ]
  for a, b in zip(*grads, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  # The last three tokens of one row and the last two of the other, after those before them.
  cached = [
    jnp.pad(jnp.moveaxis(x, 1, 2), ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=9.0)
    for x in (k, v)
  ]
  positions = jnp.array([[6], [4]]) + jnp.arange(3)
  some = [jnp.stack([x[0, 6:9], x[1, 4:7]]) for x in (q, k, v)]
  at = jnp.broadcast_to(jnp.arange(13), (2, 13))
  output = attend_cached(
    *some, positions, *cached, jnp.where(at < positions[:, :1], at, EMPTY), window=window
  )
  np.testing.assert_allclose(output, jnp.stack([whole[0, 6:9], whole[1, 4:7]]), atol=1e-5)
