"""The Python API as the README shows it, and what an import costs."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import clara_jax
from clara_jax.config import ConfigError
from clara_jax.data.schemas import write_rows
from clara_jax.inference.checkpoint import CheckpointError
from clara_jax.testing import tiny

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A pretrained base and an instruct and a joint run upon it, with a file of joint rows."""
  folder = tmp_path_factory.mktemp("api")
  tokenizer = tiny.prompt_tokenizer().tokenizer
  base = str(folder / "runs" / "base")
  clara_jax.train(
    tiny.run_config("pretrain", steps=1),
    base,
    rows=tiny.rows("pretrain"),
    tokenizer=tokenizer,
    progress=False,
  )
  previous = None
  for stage in ("scp", "instruct", "joint"):
    config = clara_jax.RunConfig(
      tiny.config(),
      clara_jax.DataConfig(**tiny.DATA),
      tiny.run_config(stage, steps=1).train,
      base=base,
      init_from=previous,
    )
    previous = str(folder / "runs" / stage)
    clara_jax.train(config, previous, rows=tiny.rows(stage), progress=False)
  write_rows(tiny.raw_rows("joint")[:4], str(folder / "rows.jsonl"))
  return folder


def python_blocks():
  return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", [b for b in python_blocks() if "clara_jax" in b])
def test_the_readme_runs(runs, monkeypatch, capsys, block):
  monkeypatch.chdir(runs)
  exec(compile(block, "README.md", "exec"), {})
  assert capsys.readouterr().out.strip()


def test_the_readme_has_both():
  blocks = python_blocks()
  assert any("checkpoint.answer(" in b for b in blocks) and any("jax.grad" in b for b in blocks)


def test_texts_and_arrays_agree(runs):
  """The methods on texts are those of `Clara` on arrays."""
  checkpoint = clara_jax.load(str(runs / "runs" / "joint"))
  texts, question = ["one document", "another one of more words"], "Who is it?"
  memories, query = checkpoint.compress(texts), checkpoint.encode_query([question])
  scores = checkpoint.score(query, memories)
  selected, indices = checkpoint.select(scores, memories, k=1)
  np.testing.assert_array_equal(selected[0, 0], memories[indices[0, 0]])
  flat = [np.asarray(x).reshape(len(x), -1) for x in (query, memories)]
  cosine = flat[0] @ flat[1].T / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1], axis=1)
  np.testing.assert_allclose(scores, cosine, rtol=1e-5)
  assert len(checkpoint.answer([question], selected, max_new_tokens=2)) == 1


def test_what_does_not_fit_is_refused(runs):
  checkpoint = clara_jax.load(str(runs / "runs" / "scp"))
  with pytest.raises(CheckpointError, match="has no query reasoner"):
    checkpoint.encode_query(["Who?"])
  memories = checkpoint.compress(["one"])
  with pytest.raises(ConfigError, match="k=2: there are 1 documents"):
    checkpoint.select(jax.numpy.zeros((1, 1)), memories, k=2)
  with pytest.raises(TypeError, match="expected a sequence of texts, got one string"):
    checkpoint.compress("one")
  with pytest.raises(ConfigError, match=r"data\.rows: no training rows are named"):
    clara_jax.train(tiny.run_config("scp"))


def test_every_name_is_there():
  for name in clara_jax.__all__:
    assert getattr(clara_jax, name) is not None
  assert set(clara_jax.__all__) <= set(dir(clara_jax))
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    clara_jax.nothing  # noqa: B018


def test_importing_costs_nothing():
  """No library is imported before a name is used; 0.1 s is the bound, here with room for a busy
  machine."""
  code = (
    "import sys, time; start = time.perf_counter(); import clara_jax; seconds = "
    "time.perf_counter() - start;"
    "import json; print(json.dumps([seconds, sorted(set(sys.modules) & {'jax', 'numpy', 'flax', "
    "'transformers', 'ml_collections'})]))"
  )
  seconds, heavy = json.loads(
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
  )
  assert not heavy and seconds < 0.5
