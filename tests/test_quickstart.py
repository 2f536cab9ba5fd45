"""The quickstart from end to end, two steps a stage: what it writes, not what it learns (that is
the quickstart's own report)."""

import dataclasses
import json

import numpy as np
import pytest

from clara_jax.checkpoints import formats
from clara_jax.cli import main as cli
from clara_jax.data.prompt_tokenizer import PromptTokenizer
from clara_jax.experiments.quickstart import recipe, shipped
from clara_jax.experiments.world import World, WorldConfig

SIZES = recipe.Sizes(
  world=WorldConfig(
    level=2,
    kinds=("person",),
    people=60,
    first_names=10,
    last_names=10,
    relations=6,
    pages=6,
    wordings=2,
    sentences=2,
  ),
  evaluation_rows=20,
  corpus=40,
  pretrain=2,
  scp=2,
  instruct=2,
  contrastive=2,
  joint=2,
)


@pytest.mark.real
def test_quickstart_and_what_is_shipped(tmp_path, caplog, monkeypatch, capsys):
  caplog.set_level("INFO", "clara_jax")
  report = recipe.run(str(tmp_path / "run"), from_scratch=True, sizes=SIZES)
  assert report == json.loads((tmp_path / "run" / "report.json").read_text())
  assert report["documents"] == SIZES.corpus and report["compression_ratio"] >= 8
  checkpoint = str(tmp_path / "run" / "stages" / "joint")
  status = cli.main(
    ["evaluate", "--checkpoint", checkpoint, "--rows", str(tmp_path / "run" / "questions.jsonl")]
    + ["--setting", "joint", "--max-new-tokens", "4", "--json"]
  )
  scores = json.loads(capsys.readouterr().out)
  assert status == 0 and scores["n"] == SIZES.evaluation_rows
  for name in ("recall_at_1", "recall_at_5"):
    assert report["joint"][name][1] == scores[name]
  assert report["joint"]["answer_em"][1] == scores["em"]
  only = report["joint"]["generator_only_recall_at_1"]
  assert only[0] == only[1]  # the query reasoner is frozen
  page = (tmp_path / "run" / "report.html").read_text()
  assert page.count("<svg") == 3 and "recall@5, generator only" in page and "<script" not in page
  assert "joint.recall_at_1" in caplog.text

  assert 0 < shipped.pack(str(tmp_path / "run"), tmp_path / "package") < 4 * 2**20
  monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
  tokenizer = World(SIZES.world).tokenizer()
  record = shipped.unpack(
    str(tmp_path / "unpacked"), PromptTokenizer(tokenizer, recipe.clara_config(len(tokenizer)))
  )
  assert set(record) == {"recipe", "seed", "stages", "seconds"}
  unpacked, trained = (
    formats.load(str(folder / "instruct"))
    for folder in (tmp_path / "unpacked", tmp_path / "run" / "stages")
  )
  for role in ("compressor", "generator"):
    a, b = (
      np.concatenate([np.ravel(x) for x in _leaves(c.weights[role])]) for c in (unpacked, trained)
    )
    np.testing.assert_allclose(a, b, rtol=2**-8)


@pytest.mark.real
def test_joint_training_raises_recall_without_labels(tmp_path):
  """The headline: from the shipped compressor and a new query reasoner, on the loss of the answers
  alone. Half of the quickstart's steps."""
  start = recipe.Recipe(str(tmp_path), sizes=dataclasses.replace(recipe.Sizes(), joint=100))
  assert start.unpack_shipped()
  start.shipped["stages"] = ("pretrain", "scp", "instruct")
  start.train("joint", memories=start.training_memories())
  before, after = start.before_and_after()
  # Three seeds of the full recipe: from 0.36 to between 0.84 and 0.92.
  assert before["recall_at_1"] < 0.45 and after["recall_at_1"] > before["recall_at_1"] + 0.2
  assert after["em"] > before["em"] + 0.1


def _leaves(tree):
  return [
    leaf
    for value in tree.values()
    for leaf in (_leaves(value) if hasattr(value, "values") else [value])
  ]
