"""Every estimator against its definition written plainly, at the edges, and, where it is unbiased,
against the exact expectation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from clara_jax.config import ConfigError
from clara_jax.experiments.laboratory import audit, exact
from clara_jax.experiments.laboratory.variants import parse
from clara_jax.ops import estimators
from clara_jax.ops.topk import straight_through_top_k

N, K, TAU = 5, 3, 0.4
NAMES = sorted(estimators.REGISTRY)
KEY = jax.random.key(7)
SAMPLES = 100_000


def selection_inputs(batch=2, n=N, k=K, seed=0):
  """Scores [B, N], memories [B, N, 2, 3], a cotangent [B, K, 2, 3]."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    jax.random.normal(keys[0], (batch, n)),
    jax.random.normal(keys[1], (batch, n, 2, 3)),
    jax.random.normal(keys[2], (batch, k, 2, 3)),
  )


def pulled(estimator, scores, memories, cotangent, k=K, temperature=TAU, key=KEY):
  """(rows, indices, ∂⟨cotangent, rows⟩/∂scores)."""

  def objective(scores):
    choice = estimator(scores, k, temperature, key)
    rows = choice.rows(memories)
    extra = (
      0.0
      if choice.log_prob is None
      else estimators.leave_one_out(
        jnp.arange(2.0 * len(scores))[: len(scores)], choice.log_prob, 1
      )
    )
    return (rows.astype(jnp.float32) * cotangent).sum() + extra, (rows, choice.indices)

  gradient, (rows, indices) = jax.grad(objective, has_aux=True)(scores)
  return rows, indices, gradient


def slot_weights(estimator, scores, k=K, key=KEY):
  """W [K, N] of one row: with unit vectors as memories, what is read is W itself."""
  return estimator(scores[None], k, TAU, key).rows(jnp.eye(len(scores))[None])[0]


@pytest.mark.parametrize("name", NAMES)
def test_edges(name):
  """k = 1 … N, ties, scores of ±1e4, bfloat16, a batch over devices, vmap: finite, every document
  once, the same numbers."""
  estimator = estimators.get(name)
  rows, memories, _ = selection_inputs(batch=4)
  scores = jnp.stack(
    [rows[0], jnp.zeros(N), jnp.array([1e4, -1e4, 1e4, 0, -1e4]), jnp.round(rows[3])]
  )

  @functools.partial(jax.jit, static_argnums=2)
  def run(scores, memories, ks):
    return [pulled(estimator, scores, memories, jnp.ones((4, k, 2, 3)), k, 0.02) for k in ks]

  for dtype, ks in ((jnp.float32, tuple(range(1, N + 1))), (jnp.bfloat16, (2,))):
    for k, (read, indices, gradient) in zip(
      ks, run(scores.astype(dtype), memories.astype(dtype), ks), strict=True
    ):
      assert read.shape == (4, k, 2, 3) and read.dtype == gradient.dtype == dtype
      assert (
        np.isfinite(np.asarray(read, np.float32)).all()
        and np.isfinite(np.asarray(gradient, np.float32)).all()
      )
      assert all(len(set(row)) == k for row in indices.tolist())

  devices = jax.make_mesh(
    (len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("data"))
  whole, parts = (
    run(*(jax.device_put(x, to) for x in (scores, memories)), (2,)) for to in (None, sharding)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), whole, parts)

  mapped = jax.vmap(lambda s, m: run(s, m, (2,)))(
    jnp.stack([scores] * 2), jnp.stack([memories] * 2)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-3), mapped, whole
  )


@pytest.mark.parametrize("name", NAMES)
def test_documents_themselves_or_mixtures(name):
  scores, memories, _ = selection_inputs()
  choice = estimators.get(name)(scores, K, TAU, KEY)
  is_soft = name in ("softmax", "iterated_softmax", "optimal_transport", "perturbed")
  exactly = np.array_equal(
    choice.rows(memories), jax.vmap(lambda m, i: m[i])(memories, choice.indices)
  )
  assert exactly != is_soft
  if is_soft:
    hard = estimators.get(name, {"hard": True})(scores, K, TAU, KEY)
    np.testing.assert_array_equal(
      hard.rows(memories), jax.vmap(lambda m, i: m[i])(memories, hard.indices)
    )
    np.testing.assert_array_equal(hard.indices, jax.lax.top_k(scores, K)[1])


@pytest.mark.parametrize("masking", ["algorithm1", "equation33"])
def test_straight_through(masking):
  scores, memories, cotangent = selection_inputs()
  _, indices, gradient = pulled(estimators.get(masking), scores, memories, cotangent)

  def one(s, m, c):
    return jax.grad(lambda s: (straight_through_top_k(s, m, K, TAU, masking)[0] * c).sum())(s)

  np.testing.assert_array_equal(gradient, jax.vmap(one)(scores, memories, cotangent))


def test_a_temperature_that_is_learned():
  scores, memories, cotangent = selection_inputs()

  def value(tau, name):
    return (estimators.get(name)(scores, K, tau, KEY).rows(memories) * cotangent).sum()

  def plain(tau):  # Eq. 3.3 with W = soft: what straight-through takes for its derivative
    taken = jnp.cumsum(jax.nn.one_hot(jax.lax.top_k(scores, K)[1], N), axis=1) - jax.nn.one_hot(
      jax.lax.top_k(scores, K)[1], N
    )
    soft = jax.nn.softmax(jnp.where(taken[:, :K] > 0, -1e9, scores[:, None]) / tau)
    return (jnp.einsum("bkn,bnmd->bkmd", soft, memories) * cotangent).sum()

  expected = jax.grad(plain)(TAU)
  for name in ("equation33", "softmax"):
    np.testing.assert_allclose(jax.grad(value)(TAU, name), expected, rtol=1e-4)
  check_grads(lambda t: value(t, "softmax"), (TAU,), 1, ["rev"], atol=1e-2, rtol=1e-2)


def test_the_control_teaches_nothing():
  scores, memories, cotangent = selection_inputs()
  assert not pulled(estimators.get("selected_only"), scores, memories, cotangent)[2].any()


def test_gumbel_is_algorithm1_at_perturbed_scores():
  scores, memories, cotangent = selection_inputs()
  noisy = scores + TAU * jax.random.gumbel(KEY, scores.shape)
  for a, b in zip(
    pulled(estimators.get("gumbel"), scores, memories, cotangent),
    pulled(estimators.get("algorithm1"), noisy, memories, cotangent),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def plain_iterated(scores):
  alpha, rows = scores / TAU, []
  for _ in range(K):
    p = jax.nn.softmax(alpha)
    rows.append(p)
    alpha = alpha + jnp.log(1 - p)
  return jnp.stack(rows)


def plain_transport(scores):
  """Sinkhorn's iterations as they are: kernel, row and column scalings."""
  places = jnp.array([1, 2 / 3, 1 / 3, 0])
  kernel, v = jnp.exp(scores[:, None] * places / TAU), jnp.ones(K + 1)
  for _ in range(50):
    u = 1 / (kernel @ v)
    v = jnp.array([1.0, 1, 1, N - K]) / (kernel.T @ u)
  return (u[:, None] * kernel * v)[:, :K].T


def plain_simple(scores):
  """Over all subsets: whether n is the j-th best of it."""
  order = jnp.argsort(-scores)
  weights, total = jnp.zeros((K, N)), 0.0
  for places in itertools.combinations(range(N), K):
    p = jnp.exp(scores[order[jnp.array(places)]].sum() / TAU)
    weights = weights.at[jnp.arange(K), order[jnp.array(places)]].add(p)
    total += p
  return weights / total


@pytest.mark.parametrize(
  "name, plain", [("iterated_softmax", plain_iterated), ("optimal_transport", plain_transport)]
)
def test_relaxations(name, plain):
  scores, memories, cotangent = selection_inputs()
  soft = estimators.get(name)
  np.testing.assert_allclose(slot_weights(soft, scores[0]), plain(scores[0]), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(slot_weights(soft, scores[0]).sum(-1), 1.0, rtol=1e-5)
  check_grads(
    lambda s: soft(s, K, TAU, None).rows(memories), (scores,), 1, ["rev"], atol=1e-2, rtol=1e-2
  )
  # Straight-through: the derivative of the soft rows.
  expected = jax.grad(
    lambda s: (jnp.einsum("kn,nmd->kmd", plain(s), memories[0]) * cotangent[0]).sum()
  )(scores[0])
  for hard in (False, True):
    got = pulled(estimators.get(name, {"hard": hard}), scores, memories, cotangent)[2][0]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_marginals_of_subsets():
  scores, memories, cotangent = selection_inputs()

  def simple_gradient(s, m, c):
    return jax.grad(lambda s: (jnp.einsum("kn,nmd->kmd", plain_simple(s), m) * c).sum())(s)

  for sample in (True, False):
    got = pulled(estimators.get("simple", {"sample": sample}), scores, memories, cotangent)[2]
    for b in range(2):
      np.testing.assert_allclose(
        got[b], simple_gradient(scores[b], memories[b], cotangent[b]), rtol=1e-3, atol=1e-5
      )


def test_perturbed_by_its_formula():
  scores, memories, cotangent = selection_inputs()
  estimator = estimators.get("perturbed", {"samples": 6})
  rows, _, gradient = pulled(estimator, scores, memories, cotangent)
  z = np.asarray(jax.random.normal(KEY, (6, 2, N)))

  def matrix(s):  # [K, N]
    return np.eye(N)[np.argsort(-s, kind="stable")[:K]]

  for b in range(2):
    m, g = np.asarray(memories[b]).reshape(N, -1), np.asarray(cotangent[b]).reshape(K, -1)
    drawn = [matrix(np.asarray(scores[b]) + TAU * z[i, b]) for i in range(6)]
    np.testing.assert_allclose(
      np.asarray(rows[b]).reshape(K, -1), np.mean([w @ m for w in drawn], 0), rtol=1e-5, atol=1e-6
    )
    inner = [(g * ((w - matrix(np.asarray(scores[b]))) @ m)).sum() for w in drawn]
    np.testing.assert_allclose(
      gradient[b],
      np.mean([i * z[j, b] for j, i in enumerate(inner)], 0) / TAU,
      rtol=1e-4,
      atol=1e-5,
    )


# ---- draws and expectations ----------------------------------------------------------------------


def frequencies(name, scores, samples):
  tiled = jnp.broadcast_to(scores, (samples, len(scores)))
  indices = np.asarray(
    jax.jit(lambda key: estimators.get(name)(tiled, 2, TAU, key).indices)(jax.random.key(1))
  )
  choices = exact.choices(len(scores), 2)
  return np.array([(indices == c).all(-1).mean() for c in choices]), choices


@pytest.mark.parametrize(
  "name, policy",
  [("gumbel", "plackett_luce"), ("score_function", "plackett_luce"), ("simple", "subsets")],
)
def test_draws_have_their_distribution(name, policy):
  scores = jnp.array([0.3, -0.2, 0.1, 0.5])
  samples = 20_000 if name == "simple" else SAMPLES
  got, choices = frequencies(name, scores, samples)
  expected = np.asarray(exact.POLICIES[policy](scores, choices, TAU))
  assert np.abs(got - expected).max() < 4.5 * np.sqrt(0.25 / samples)
  assert got[expected == 0].sum() == 0
  if name == "score_function":
    choice = estimators.get(name)(jnp.broadcast_to(scores, (len(choices), 4)), 2, TAU, KEY)
    at = [choices.tolist().index(i) for i in choice.indices.tolist()]
    np.testing.assert_allclose(jnp.exp(choice.log_prob), expected[at], rtol=1e-5)


def test_the_score_function_is_unbiased():
  """1e5 draws of four, a loss that is no sum over documents, against the enumeration."""
  setting = audit.AuditSetting(n=5, k=2, temperature=0.5, spread=0.5, loss="two_hops")
  (summaries,) = (
    audit.audit_setting(setting, [parse("score_function")], draws=SAMPLES, count=1).values(),
  )
  values = next(iter(summaries))["plackett_luce"]
  assert values["bias"] < 2.5 * values["bias_error"] < 0.05 and values["cosine"] > 0.999


def test_perturbed_is_unbiased_for_linear_losses():
  """Of two documents one: P(0 before 1) = Φ((s_0 - s_1)/(τ√2)), and its derivative."""
  scores = jnp.array([0.3, 0.1])
  memories = jnp.array([[1.0], [0.0]])

  def one(key):
    return jax.grad(
      lambda s: (
        estimators.get("perturbed", {"samples": 1})(s[None], 1, TAU, key).rows(memories[None]).sum()
      )
    )(scores)

  drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, SAMPLES)))
  sigma = TAU * np.sqrt(2)
  expected = np.exp(-0.5 * (0.2 / sigma) ** 2) / np.sqrt(2 * np.pi) / sigma
  error = drawn.std(0) / np.sqrt(SAMPLES)
  assert (np.abs(drawn.mean(0) - [expected, -expected]) < 4 * error).all() and (
    error < 0.02 * expected
  ).all()


def test_leave_one_out_is_a_gradient_and_no_value():
  losses, scores = jnp.array([1.0, 4.0, 2.0, 2.0]), jnp.array([0.5, 0.1, 0.2, 0.7])
  value, gradient = jax.value_and_grad(lambda x: estimators.leave_one_out(losses, x, 2))(scores)
  assert value == 0
  np.testing.assert_allclose(gradient, [(1 - 4) / 2, (4 - 1) / 2, 0, 0])


# ---- the exact gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(exact.POLICIES))
@pytest.mark.parametrize("n, k", [(2, 1), (5, 3)])
def test_exact_gradient_against_finite_differences(policy, n, k):
  with jax.enable_x64(True):
    rng = np.random.default_rng(n)
    scores, choices = jnp.asarray(rng.normal(size=n) * 0.3), exact.choices(n, k)
    losses = jnp.asarray(rng.normal(size=len(choices)))
    value = jax.jit(lambda s: exact.expected_loss(exact.POLICIES[policy], s, losses, choices, TAU))
    got = exact.exact_gradient(exact.POLICIES[policy], scores, losses, choices, TAU)
    steps = 1e-5 * np.eye(n)
    expected = [(value(scores + h) - value(scores - h)) / 2e-5 for h in steps]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    probabilities = exact.POLICIES[policy](scores, choices, TAU)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-9)
    assert (np.asarray(probabilities) >= 0).all()


def test_uniform_noise_by_drawing():
  scores = jnp.array([0.3, -0.2, 0.1, 0.5])
  noise = jax.random.uniform(KEY, (SAMPLES, 4), minval=-exact.HALF_WIDTH, maxval=exact.HALF_WIDTH)
  drawn = np.asarray(jax.lax.top_k(scores + TAU * noise, 2)[1])
  choices = exact.choices(4, 2)
  with jax.enable_x64(True):
    expected = np.asarray(
      exact.uniform_noise_policy(jnp.asarray(scores, jnp.float64), choices, TAU)
    )
  assert np.abs([(drawn == c).all(-1).mean() for c in choices] - expected).max() < 4.5 * np.sqrt(
    0.25 / SAMPLES
  )


def test_too_many_choices():
  with pytest.raises(ConfigError, match="N=20, k=5: 1,860,480 ordered choices, at most 200,000"):
    exact.choices(20, 5)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, arguments, message",
  [
    ("nobody", {}, "expected one of algorithm1"),
    ("gumbel", {"samples": 3}, "gumbel does not take samples; it takes none"),
    ("perturbed", {"samples": 0}, "samples=0: expected at least 1"),
    ("perturbed", {"samples": "x"}, "samples='x': expected int"),
    ("simple", {"sample": 1}, "sample=1: expected bool"),
    ("missing.py:f", {}, "no file missing.py"),
  ],
)
def test_bad_names_and_arguments(name, arguments, message):
  with pytest.raises(ConfigError, match=message):
    estimators.get(name, arguments)


def test_bad_k():
  for k in (0, N + 1):
    with pytest.raises(ValueError, match=f"k={k} among N={N}"):
      estimators.get("simple")(jnp.zeros((1, N)), k, TAU, KEY)


def test_files_that_fail(tmp_path):
  (tmp_path / "helper.py").write_text(
    "from clara_jax.ops.estimators import *\nfrom clara_jax.ops.estimators import "
    "weighted\nimport jax"
  )
  (tmp_path / "mine.py").write_text("""
from __future__ import annotations
import dataclasses
from helper import *

@dataclasses.dataclass
class Settings:
  x: float

def soft(scores, k):
  return jax.numpy.repeat(jax.nn.softmax(scores)[:, None], k, axis=1)

def good(scores, k, temperature, rng, x=1.0, count: int = 0):
  return weighted(jax.lax.top_k(scores, k)[1], soft(scores, k))
def bad(scores): pass
def nothing(scores, k, temperature, rng): pass
def decides(scores, k, temperature, rng): return good(scores, k, 1, 1) if scores.sum() > 0 else None
def too_many(scores, k, temperature, rng): return good(scores, k + 1, 1, 1)
def few_rows(scores, k, temperature, rng): return weighted(jax.lax.top_k(scores, k)[1], soft(scores, 1), hard=False)
def no_log(scores, k, temperature, rng, draws: int = 2): return good(scores, k, 1, 1)
""")  # noqa: E501
  assert estimators.get(f"{tmp_path}/mine.py:good", {"x": 2}).arguments == (("x", 2),)
  for text, message in (
    ("mine.py:bad", "expected a function of .scores, k, temperature, rng"),
    ("mine.py:none", "has no 'none'"),
    ("mine.py", "name the function, too"),
    ("mine.py:nothing", "'NoneType' object has no attribute 'indices'|TypeCheckError"),
    ("mine.py:decides", "TracerBoolConversionError"),
    ("mine.py:too_many", r"expected indices of integers \[2, 3\], got int32 \[2, 4\]"),
    ("mine.py:few_rows", r"expected rows \[2, 3, 4, 5\], got \[2, 1, 4, 5\]|TypeCheckError"),
    ("mine.py:no_log", "expected log_prob"),
  ):
    with pytest.raises(ConfigError, match=message):
      estimators.get(f"{tmp_path}/{text}")
  (tmp_path / "broken.py").write_text("import nothing_of_the_kind")
  with pytest.raises(ConfigError, match="broken.py fails: ModuleNotFoundError"):
    estimators.get(f"{tmp_path}/broken.py:f")


@pytest.mark.parametrize(
  "text",
  [
    "algorithm1(",
    "algorithm1(3)",
    "algorithm1(temperature=-1)",
    "algorithm1(x=y)",
    "algorithm1(**{})",
    "algorithm1(learned=3)",
    "algorithm1(temperature=1e999)",
  ],
)
def test_bad_variants(text):
  with pytest.raises(ConfigError, match="algorithm1"):
    parse(text)


def test_variants():
  variant = parse("perturbed(samples=16, temperature=0.2, final_temperature=0.02)")
  assert dict(variant.estimator.arguments) == {"samples": 16} and variant.temperature == 0.2
  assert variant.train == {"temperature_schedule": "annealed", "final_temperature": 0.02}
  assert parse("algorithm1(learned=True)").train == {"temperature_schedule": "learned"}
