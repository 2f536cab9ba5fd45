"""benchmarks/accelerator and examples/smollm2 with tiny shapes: every line of what is run where
there is a card."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from clara_jax.data.schemas import write_rows
from clara_jax.testing import published, tiny
from tests.conftest import SHARED, shared

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "accelerator"


def python(*arguments) -> str:
  # One device, as one card.
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
  done = subprocess.run(
    [sys.executable, *map(str, arguments)], env=environment, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def items(folder: pathlib.Path, side: str) -> dict:
  """What every item found; cuDNN is on cards alone."""
  values = json.loads((folder / f"{side}.json").read_text())
  results = values["items"]
  assert values["smoke"] and results
  wrong = {
    k: v
    for k, v in results.items()
    if "failed" in v and "cudnn" not in k or "skipped" in v or v.get("passed") is False
  }
  assert not wrong
  return results


@pytest.mark.real
def test_checks(golden, tmp_path):
  python(
    FOLDER / "run.py",
    "--part",
    "checks",
    "--smoke",
    "--golden",
    golden,
    "--seconds",
    600,
    "--out",
    tmp_path,
  )
  results = items(tmp_path, "checks")
  assert {
    "golden stage1 float32",
    "golden continuations float32",
    "straight-through top-k",
    "kill and resume",
  } <= set(results)


@pytest.mark.real
def test_speed(tmp_path):
  python(FOLDER / "run.py", "--part", "speed", "--smoke", "--seconds", 600, "--out", tmp_path)
  ours, other = items(tmp_path, "speed-jax"), items(tmp_path, "speed-torch")
  assert set(other) <= set(ours) and all(v["seconds"] > 0 for v in other.values())
  table = python(FOLDER / "tables.py", tmp_path)
  assert (
    "| compress |" in table
    and "| decode | 515 |" in table
    and "smoke: no figure means anything" in table
  )


@pytest.mark.real
def test_train(tmp_path):
  base, rows = tmp_path / "base", tmp_path / "rows"
  published.make("SmolLM2-135M-Instruct", base, max_position_embeddings=8192)
  rows.mkdir()
  for name in ("scp", "instruct", "joint"):
    write_rows(tiny.raw_rows(name), str(rows / f"{name}.jsonl"))
  for name, documents in (("squad", 6), ("squad_given", 5), ("hotpotqa", 6)):
    write_rows(tiny.world().question_rows(documents), str(rows / f"{name}.jsonl"))
  python(
    FOLDER / "run.py",
    "--part",
    "train",
    "--smoke",
    "--seconds",
    600,
    "--base",
    base,
    "--rows",
    rows,
    "--out",
    tmp_path,
    "--work",
    tmp_path,
  )
  results = items(tmp_path, "train")
  assert set(results["adapters"]["bytes"]) == {
    f"joint-{role}.tar.xz" for role in ("compressor", "generator", "query_reasoner")
  }
  language = json.loads((tmp_path / "language.json").read_text())
  assert len(language["trainings"]) == 6 and all(
    v["steps"] == 2 for v in language["trainings"].values()
  )
  settings = {
    "compressor",
    "full_text_generator",
    "compressor_queries",
    "joint",
    "no_documents",
    "full_text",
  }
  assert {v["setting"] for v in language["tests"].values()} == settings
  assert "| joint_softmax | 2 |" in python(FOLDER / "tables.py", tmp_path)


def test_what_travels_comes_back_whole(tmp_path):
  data, model = tmp_path / "data", tmp_path / "m.gguf"
  for name in (
    "squad/paragraphs",
    "squad/qa",
    "nq/nq_passage_qa",
    "multihop/hotpotqa",
    "wiki/passages",
  ):
    path = data / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
      file.write(f'{{"id": "{name}"}}\n')
  model.write_bytes(bytes(range(256)) * 1000)
  report = json.loads(
    python(
      FOLDER / "pack.py",
      "--data",
      data,
      "--model",
      model,
      "--out",
      tmp_path / "pack",
      "--no-wheels",
    )
  )
  assert abs(report["part1"]["bytes"] - report["part2"]["bytes"]) <= 1
  for part in ("part1", "part2"):
    python(FOLDER / "run.py", "--unpack", tmp_path / "pack" / part, "--work", tmp_path / "work")
  assert (tmp_path / "work" / "model.gguf").read_bytes() == model.read_bytes()
  assert (
    gzip.open(tmp_path / "work" / "data" / "wiki" / "passages.jsonl.gz").read()
    == b'{"id": "wiki/passages"}\n'
  )


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="data/ is not there: set CLARA_SHARED")
def test_real_rows_are_divided_by_article(tmp_path):
  counts = json.loads(
    python(
      ROOT / "examples" / "smollm2" / "prepare.py",
      "--data",
      shared("data"),
      "--out",
      tmp_path,
      "--limit",
      4,
      "--passages",
      50,
    )
  )
  rows = {
    name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open(encoding="utf-8")]
    for name in counts
  }
  assert (counts["squad"], counts["squad_given"], counts["hotpotqa"]) == (500, 500, 300)
  assert [r["id"] for r in rows["squad"]] == [r["id"] for r in rows["squad_given"]]
  tested = {
    r["docs"][g] for name in ("squad", "hotpotqa") for r in rows[name] for g in r["pos_index"]
  }
  articles = {text.split("\n")[0] for text in tested}
  for name in ("scp", "instruct", "joint"):
    gold = [r["docs"][g] for r in rows[name] for g in r.get("pos_index", range(len(r["docs"])))]
    assert gold and not articles & {text.split("\n")[0] for text in gold}
  for row in rows["joint"] + rows["squad"]:
    assert len(set(row["docs"])) == len(row["docs"]) == 20
  assert {r["data_type"] for r in rows["scp"] if "data_type" in r} == {"paraphrase"}
  assert any(isinstance(r.get("question"), list) for r in rows["scp"])
