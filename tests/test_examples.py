"""The examples and notebooks run, and the options that they show are there."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

import clara_jax
from clara_jax.cli.main import main
from clara_jax.config import ConfigError
from clara_jax.data import schemas
from clara_jax.testing import tiny
from clara_jax.training import stages

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.real
@pytest.mark.parametrize(
  "notebook", sorted(p.name for p in (EXAMPLES / "notebooks").glob("*.ipynb"))
)
def test_notebooks(notebook):
  nbclient = pytest.importorskip("nbclient")
  nbformat = pytest.importorskip("nbformat")
  pytest.importorskip("ipykernel")
  book = nbformat.read(EXAMPLES / "notebooks" / notebook, as_version=4)
  assert all(not cell.get("outputs") for cell in book.cells)
  nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()


def test_a_stage_in_a_file(tmp_path):
  name = f"{EXAMPLES}/new_stage.py:STAGE"
  config = tiny.run_config(name, steps=1)
  result = clara_jax.Trainer(
    config, tiny.prompt_tokenizer(), tiny.weights(), tiny.rows("scp")[:16], progress=False
  ).run()
  assert "mse" in result.metrics and result.metrics["loss"] == result.metrics["ce"]
  with pytest.raises(ConfigError, match="has no 'NOTHING'"):
    stages.get(name.replace("STAGE", "NOTHING"))
  with pytest.raises(ConfigError, match=r"expected one of \['answers_only', .*or FILE\.py:STAGE"):
    stages.get("nothing")
  with pytest.raises(ConfigError, match="stage 'joint': is one of clara_jax's own"):
    stages.register(dataclasses.replace(stages.get(name), name="joint"))
  (tmp_path / "no.py").write_text("STAGE = 1\n")
  with pytest.raises(ConfigError, match="expected a Stage, got int"):
    stages.get(f"{tmp_path}/no.py:STAGE")


@pytest.mark.real
def test_answers_from_python(tmp_path):
  """`answer.py` and `custom_retriever.py` over a tiny store."""
  base = str(tmp_path / "base")
  clara_jax.train(
    tiny.run_config("pretrain", steps=1),
    base,
    rows=tiny.rows("pretrain"),
    tokenizer=tiny.prompt_tokenizer().tokenizer,
    progress=False,
  )
  config = clara_jax.RunConfig(
    tiny.config(), clara_jax.DataConfig(**tiny.DATA), tiny.run_config("joint", steps=1).train, base
  )
  weights = {**tiny.weights(), "base": clara_jax.load(base).weights["base"]}
  joint, store = str(tmp_path / "joint"), str(tmp_path / "store")
  clara_jax.train(config, joint, rows=tiny.rows("joint")[:8], init_weights=weights, progress=False)
  documents = [schemas.Document(**d) for d in list(tiny.world().documents(False))[:10]]
  clara_jax.compress_corpus(clara_jax.load(joint), documents, store, progress=False)
  clara_jax.Index.update(clara_jax.MemoryStore(store), "exact")
  for script in ("answer.py", "custom_retriever.py"):
    done = subprocess.run(
      [sys.executable, EXAMPLES / script, joint, store, "Who is it?"],
      capture_output=True,
      text=True,
      check=True,
    )
    assert done.stdout.startswith("Who is it?\n"), done.stderr


def test_config_and_version(capsys):
  assert main(["config", "configs/clara.py:joint", "--config.train.steps=7", "--json"]) == 0
  fields = json.loads(capsys.readouterr().out)
  assert fields["train.steps"] == {
    "value": 7,
    "default": None,
    "meaning": "length of the run; None: as many as `epochs` take.",
  }
  assert fields["clara.model.width"]["value"] == "the base's"
  assert all(field["meaning"] for field in fields.values())
  assert main(["config", "configs/tiny.py:pretrain", "--changed"]) == 0
  shown = capsys.readouterr().out
  assert "clara.model.width = 128" in shown and "data.batch_size" not in shown
  assert main(["config", "configs/tiny.py:pretrain", "--config.train.stepz=1"]) == 2
  assert "train.stepz: unknown field" in capsys.readouterr().err
  head = subprocess.run(
    f"{sys.executable} -m clara_jax config configs/tiny.py:pretrain | head -1",
    shell=True,
    capture_output=True,
    text=True,
  )
  assert head.stdout.startswith("clara.model.vocab_size = 1024") and not head.stderr
  with pytest.raises(SystemExit) as stopped:
    main(["--version"])
  assert stopped.value.code == 0
  assert capsys.readouterr().out == f"clara_jax {clara_jax.__version__}\n"
