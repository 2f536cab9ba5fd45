"""The laboratory: estimators of one's own, audits, trainings side by side, and what the gradient of
a run is made of."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clara_jax.checkpoints.formats import Checkpoint
from clara_jax.cli.main import main
from clara_jax.config import ConfigError, DataConfig
from clara_jax.data.pipeline import RowEncoder, evaluation_batches
from clara_jax.experiments.laboratory import audit, laboratory
from clara_jax.experiments.laboratory.compare import verdict
from clara_jax.experiments.laboratory.variants import parse_all
from clara_jax.model import Clara
from clara_jax.ops import estimators
from clara_jax.testing import tiny
from clara_jax.training import optim, stages, trainer
from clara_jax.training.step import TrainState, gradient_paths_step

ROOT = pathlib.Path(__file__).parents[1]


def test_estimators_of_ones_own_are_audited(own_estimator, tmp_path, capsys):
  out = tmp_path / "lab"
  command = [
    "gradients",
    "--out",
    str(out),
    "--draws",
    "20",
    "--vary",
    "correlation",
    "--json",
    "--estimators",
    "algorithm1",
    "mine",
    own_estimator,
    "mine(scale=0.5, temperature=0.1)",
    "score_function",
  ]
  assert main(command) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["estimators"] == 5 and report["settings"] == 4
  saved = json.loads((out / "audit.json").read_text())
  one = saved["settings"][0]["estimators"]
  assert one["mine"] == one[own_estimator] != one["mine(scale=0.5, temperature=0.1)"]
  assert [e["setting"]["correlation"] for e in saved["settings"] if e["varies"]] == [0.0, 0.5, 0.9]
  assert (out / "gradients.html").read_text().count("<svg") == 2 and "| mine |" in (
    out / "gradients.md"
  ).read_text()
  assert main(command) == 0  # nothing is done again
  assert json.loads(capsys.readouterr().out)["seconds"] == report["seconds"]
  file = pathlib.Path(own_estimator.removesuffix(":mine"))
  file.write_text(file.read_text().replace("scale * scores", "0.1 * scale * scores"))
  assert main(command) == 0  # an edited estimator is another one
  changed = json.loads((out / "audit.json").read_text())["settings"][0]["estimators"]
  assert changed[own_estimator] != one[own_estimator] and changed["mine"] == one["mine"]
  capsys.readouterr()
  for more, message in (
    (["--draws", "30"], "is an audit with 20 draws"),
    (["--estimators", "algorithm1(learned=True)"], "schedules are for"),
  ):
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err


def test_the_tutorial_is_the_example():
  tutorial = (ROOT / "docs/gradients.md").read_text()
  code = (ROOT / "examples/new_estimator.py").read_text()
  function = code[code.index("def reinmax") : code.index("\n\nif __name__")].rstrip()
  assert function in tutorial and f"{ROOT}" not in tutorial
  choice = estimators.get(f"{ROOT}/examples/new_estimator.py:reinmax")(
    jnp.array([[0.3, 0.1, 0.2]]), 2, 0.1, jax.random.key(0)
  )
  assert choice.rows(jnp.eye(3)[None]).shape == (1, 2, 3)


def test_reinmax_is_exact_for_quadratic_losses():
  """Which no first-order straight-through estimator is: what a second-order one is for."""
  setting = audit.AuditSetting(n=4, k=1, temperature=0.3, spread=0.3, loss="quadratic")
  names = (f"{ROOT}/examples/new_estimator.py:reinmax", "gumbel")
  reinmax, gumbel = (
    v["plackett_luce"]
    for v in audit.audit_setting(setting, parse_all(names), draws=20_000, count=4).values()
  )
  assert reinmax["bias"] < 3 * reinmax["bias_error"] < 0.1 < gumbel["bias"]


def test_a_learned_temperature_and_the_log_of_the_gradient(tmp_path):
  """With an estimator that draws; annealing runs in tests/test_cli.py."""
  config = dataclasses.replace(
    tiny.run_config("joint", gradients_every=2, temperature_schedule="learned"), estimator="simple"
  )

  def run(**options):
    return trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.weights(),
      tiny.rows("joint")[:32],
      workdir=str(tmp_path),
      progress=False,
      **options,
    ).run()

  stopped, whole = run(stop_at=2), run()
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  paths = [line for line in lines if line["kind"] == "gradients"]
  assert [line["step"] for line in paths] == [0, 2] and all(
    line["path_i"] > 0 and line["path_ii"] > 0 for line in paths
  )
  # A group more, which is kept and goes on.
  first, last = (float(r.weights["temperature"]["log"][0]) for r in (stopped, whole))
  assert abs(first - np.log(0.02)) > 1e-3 and first != last
  np.testing.assert_allclose(paths[1]["temperature"], np.exp(first), rtol=1e-5)


def test_annealing():
  config = tiny.run_config("joint", temperature_schedule="annealed", final_temperature=0.2).train
  taus = [float(optim.temperature(config, 0.02, 4)(step)) for step in range(4)]
  np.testing.assert_allclose(taus, 0.02 * 10 ** (np.arange(4) / 3), rtol=1e-5)


def test_unfit_temperatures():
  with pytest.raises(ConfigError, match="'annealed' needs a final temperature"):
    tiny.run_config("joint", temperature_schedule="annealed")
  config = tiny.run_config("scp", temperature_schedule="learned")
  with pytest.raises(
    ConfigError, match="train.temperature_schedule: stage 'scp' selects no documents"
  ):
    trainer.Trainer(
      config, tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("scp")[:8], progress=False
    ).run()


def test_score_function_in_the_joint_loss():
  """Its gradient on the scores is the leave-one-out one of the rows' cross entropies, by the number
  of label tokens."""
  model = Clara(
    dataclasses.replace(tiny.config(), lora=dataclasses.replace(tiny.config().lora, dropout=0.0)),
    estimators.get("score_function", {"draws": 3}),
  )
  weights, (batch,) = tiny.weights(), batches(2)
  trainable = {"query_reasoner": weights["query_reasoner"]}

  def loss(trainable):
    terms, metrics = stages.joint_loss(model, trainable, weights, batch, jax.random.key(1))
    return sum(t.total / t.count for t in terms.values()), (terms, metrics)

  (value, (terms, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
  assert float(terms["score_function"].total) == 0 and float(value) == pytest.approx(
    float(terms["ce"].value)
  )
  assert float(terms["ce"].count) == 3 * float(terms["score_function"].count)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 0


def batches(size):
  encoder = RowEncoder(
    tiny.prompt_tokenizer(), "candidates", DataConfig(**tiny.DATA), tiny.config().top_k
  )
  return evaluation_batches(tiny.rows("joint")[:size], encoder, size)


def test_the_two_paths_add_up():
  """∂L/∂m in all = path (I) + path (II), on the memory tokens of one row."""
  model, weights, (batch,) = (
    Clara(tiny.config(), estimators.get("algorithm1")),
    tiny.weights(),
    batches(1),
  )
  state = TrainState(
    jnp.zeros((), jnp.int32), {"query_reasoner": weights["query_reasoner"]}, None, jax.random.key(0)
  )
  metrics = {
    k: float(v.value)
    for k, v in jax.jit(
      lambda s: gradient_paths_step(model, stages.get("joint"), s, weights, batch)
    )(state).items()
  }

  def loss(memories):
    scores = model.score(model.encode_query(weights, batch.question), memories)
    rows = model.estimator(scores, model.config.top_k, model.config.temperature, None).rows(
      memories
    )
    ce, _, _ = stages.answer_terms(
      model, weights, model.answer_states(weights, batch.prompt, rows), batch.prompt
    )
    return ce.value

  whole = jax.jit(jax.grad(loss))(model.compress(weights, batch.documents))
  one, two = metrics["path_i"], metrics["path_ii"]
  np.testing.assert_allclose(
    jnp.sum(whole**2), one**2 + two**2 + 2 * one * two * metrics["path_cosine"], rtol=1e-4
  )
  assert one > 0 and two > 0 and 0 < metrics["saturation"] <= 1


def test_audit_of_a_generator(tmp_path):
  checkpoint = Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights(), "here")
  names = ("algorithm1", "selected_only", "score_function(draws=8)")
  report = laboratory.run_generator(
    str(tmp_path), checkpoint, tiny.rows("joint")[:3], names, n=4, draws=60
  )
  stored_report = json.loads((tmp_path / "generator.json").read_text())
  assert (
    report["choices"] == 12
    and stored_report["estimators"]["selected_only"]["plackett_luce"]["bias"] == 1
  )
  unbiased = stored_report["estimators"]["score_function(draws=8)"]["plackett_luce"]
  assert unbiased["bias"] < 4 * unbiased["bias_error"]
  laboratory.run_generator(
    str(tmp_path), checkpoint, tiny.rows("joint")[:3], ["equation33"], n=4, draws=60
  )
  assert set(json.loads((tmp_path / "generator.json").read_text())["estimators"]) == {
    *names,
    "equation33",
  }
  with pytest.raises(ConfigError, match="is an audit of rows 3, n 4, draws 60"):
    laboratory.run_generator(
      str(tmp_path), checkpoint, tiny.rows("joint")[:3], names, n=5, draws=60
    )
  assert "12 ordered choices" in (tmp_path / "gradients.html").read_text()


def test_trainings_side_by_side(tmp_path):
  """From results that are there (tests/test_evaluation.py trains one): nothing is trained again."""
  names = ("algorithm1", "gumbel(temperature=0.1)", "algorithm1(learned=True)")
  line = {
    "path_i": 1.0,
    "path_ii": 2.0,
    "path_cosine": 0.1,
    "saturation": 0.5,
    "soft_mass_on_taken": 0.0,
    "vanishing": 0.0,
  }
  for seed in range(3):
    folder = tmp_path / "trainings" / f"seed_{seed}"
    folder.mkdir(parents=True)
    for name, recall in zip(
      ("algorithm1", "gumbel-temperature=0.1", "algorithm1-learned=True"),
      (0.5, 0.9, 0.51),
      strict=True,
    ):
      (folder / f"estimator_{name}.json").write_text(
        json.dumps(
          {
            "recall_at_1": recall + seed / 100,
            "em": 0.5,
            "milliseconds": 3.0,
            "seconds": 1.0,
            "curve": [[0, 0.1], [150, recall]],
            "gradients": [{"step": 0, **line}, {"step": 25, **line}],
          }
        )
      )
  report = laboratory.run_compare(str(tmp_path), None, names, seeds=3)
  assert report["against_algorithm1"] == {names[1]: "better", names[2]: "not told apart"}
  assert (tmp_path / "gradients.html").read_text().count("<svg") == 2
  table = (tmp_path / "gradients.md").read_text()
  assert table.index("| gumbel(temperature=0.1) | 0.910 [0.885, 0.935] |") < table.index(
    "| algorithm1(learned=True) |"
  )


def test_verdicts():
  assert (
    verdict([0.9, 0.91, 0.92], [0.8, 0.81, 0.82]) == "better"
    and verdict([0.8, 0.81], [0.7, 0.95]) == "not told apart"
  )
  assert verdict([0.1, 0.11, 0.12], [0.8, 0.81, 0.82]) == "worse"
