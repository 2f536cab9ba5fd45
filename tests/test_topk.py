"""The straight-through top-k against the plain formula and the reference implementation's
numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.ops.topk import push, straight_through_top_k
from clara_jax.testing import formulas


@pytest.mark.parametrize("masking", ["algorithm1", "equation33"])
@pytest.mark.parametrize(
  "n, k, temperature",
  [(1, 1, 1.0), (5, 1, 0.02), (5, 5, 0.5), (20, 5, 0.02), (7, 3, 0.1), (64, 13, 0.3)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_plain_formula(masking, n, k, temperature, ties):
  keys = jax.random.split(jax.random.key(n * k), 3)
  scores = jax.random.uniform(keys[0], (n,))
  scores = jnp.round(scores * 3) / 3 if ties else scores
  memories = jax.random.normal(keys[1], (n, 2, 3))
  cotangent = jax.random.normal(keys[2], (k, 2, 3))

  def loss(select):
    def inner(s, m):
      selected, indices = select(s, m, k, temperature, masking)
      return (selected * cotangent).sum(), (selected, indices)

    return jax.value_and_grad(inner, (0, 1), has_aux=True)(scores, memories)

  (_, (selected, indices)), grads = jax.jit(lambda: loss(straight_through_top_k))()
  (_, (plain_selected, plain_indices)), plain_grads = loss(formulas.straight_through_top_k)
  np.testing.assert_array_equal(indices, plain_indices)
  np.testing.assert_array_equal(selected, memories[indices])  # exactly, not nearly
  np.testing.assert_allclose(selected, plain_selected, rtol=0, atol=1e-6)
  for got, want in zip(grads, plain_grads, strict=True):
    np.testing.assert_allclose(
      got, want, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(want).max()))
    )


def test_bfloat16_scores():
  scores = jnp.array([0.1, 0.5, 0.3, 0.9], jnp.bfloat16)
  memories = jax.random.normal(jax.random.key(0), (4, 3), jnp.bfloat16)
  grad = jax.grad(
    lambda s: straight_through_top_k(s, memories, 2, 0.5)[0].astype(jnp.float32).sum()
  )(scores)
  want = jax.grad(
    lambda s: formulas.straight_through_top_k(s, memories, 2, 0.5, "algorithm1")[0].sum()
  )(scores.astype(jnp.float32))
  assert grad.dtype == jnp.bfloat16
  np.testing.assert_allclose(grad.astype(jnp.float32), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["cos", "t1", "wide"])
def test_reference(golden, name):
  z = np.load(golden / f"topk_{name}.npz")
  n, k, temperature = z["scores"].shape[1], int(z["k"]), float(z["temperature"])

  def loss(scores):
    # With unit vectors as memories, what is selected is W itself.
    w, indices = jax.vmap(lambda s: straight_through_top_k(s, jnp.eye(n), k, temperature))(scores)
    return (w * z["cotangent"]).sum(), (w, indices)

  grads, (w, indices) = jax.grad(loss, has_aux=True)(jnp.asarray(z["scores"]))
  np.testing.assert_array_equal(w, z["W"])
  np.testing.assert_array_equal(indices, z["idx"])
  np.testing.assert_allclose(
    grads, z["grad_scores"], rtol=0, atol=1e-5 * np.abs(z["grad_scores"]).max()
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((3, 4, 0.02, "algorithm1"), "k=4 among N=3"),
    ((3, 0, 0.02, "algorithm1"), "k=0"),
    ((3, 1, 0.0, "algorithm1"), "temperature"),
    ((3, 1, 0.02, "other"), "masking"),
  ],
)
def test_bad_arguments(arguments, message):
  n, *rest = arguments
  with pytest.raises(ValueError, match=message):
    straight_through_top_k(jnp.zeros(n), jnp.zeros((n, 2)), *rest)


def test_memory_is_linear_in_n():
  n, k, width = 300_000, 8, 4

  def loss(scores, memories):
    return straight_through_top_k(scores, memories, k, 0.02)[0].sum()

  compiled = (
    jax.jit(jax.grad(loss))
    .lower(jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n, width), jnp.float32))
    .compile()
  )
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  # W alone would be k·n floats = 9.6 MB; some vectors of n, and the memories once more, are
  # allowed.
  assert temporaries < (width + 3) * n * 4
  grads = compiled(
    jax.random.normal(jax.random.key(0), (n,)), jax.random.normal(jax.random.key(1), (n, width))
  )
  assert bool(jnp.isfinite(grads).all())


@chex.assert_max_traces(n=1)
def _batched(scores, memories):
  return jax.vmap(lambda s, m: straight_through_top_k(s, m, 2, 0.1)[0])(scores, memories)


def test_jit_vmap_and_sharded_batch():
  devices = np.array(jax.devices())
  mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  batch = 2 * len(devices)
  scores = jax.random.normal(jax.random.key(0), (batch, 6))
  memories = jax.random.normal(jax.random.key(1), (batch, 6, 3))
  grad = jax.jit(jax.grad(lambda s, m: jnp.square(_batched(s, m)).sum()))
  sharded = grad(jax.device_put(scores, sharding), jax.device_put(memories, sharding))
  single = [
    jax.grad(lambda s, m: jnp.square(straight_through_top_k(s, m, 2, 0.1)[0]).sum())(s, m)
    for s, m in zip(scores, memories, strict=True)
  ]
  np.testing.assert_allclose(sharded, jnp.stack(single), rtol=1e-5, atol=1e-5)


def test_push_is_the_negative_gradient():
  scores, memories = (
    jax.random.normal(jax.random.key(0), (5,)),
    jax.random.normal(jax.random.key(1), (5, 3)),
  )
  cotangent = jax.random.normal(jax.random.key(2), (2, 3))
  grad = jax.grad(lambda s: (straight_through_top_k(s, memories, 2, 0.5)[0] * cotangent).sum())(
    scores
  )
  indices = jax.lax.top_k(scores, 2)[1]
  np.testing.assert_allclose(
    push(scores, memories, indices, cotangent, 0.5, "algorithm1"), -grad, rtol=1e-6
  )
