"""The commands as a user types them: contract, round trip on a tiny checkpoint, and one clear line
for bad input."""

import json

import numpy as np
import pytest

from clara_jax.cli.main import main
from clara_jax.data.schemas import write_rows
from clara_jax.testing import tiny
from clara_jax.training import trainer


def run(capsys, *arguments):
  """(exit status, parsed standard output or None, standard error)."""
  try:
    status = main([str(a) for a in arguments])
  except SystemExit as stop:
    status = stop.code
  out, err = capsys.readouterr()
  return status, json.loads(out) if out.strip() else None, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A pretrain run, a joint run on it, rows and documents."""
  path = tmp_path_factory.mktemp("cli")
  world = tiny.world()
  weights = tiny.weights()
  base = trainer.Trainer(
    tiny.run_config("pretrain", steps=2),
    tiny.prompt_tokenizer(),
    {},
    tiny.rows("pretrain"),
    workdir=str(path / "base"),
    progress=False,
  ).run()
  weights["base"] = base.weights["base"]
  config = tiny.run_config("joint", steps=2)
  config = trainer.dataclasses.replace(config, base=str(path / "base"))
  trainer.Trainer(
    config,
    tiny.prompt_tokenizer(),
    weights,
    tiny.rows("joint"),
    workdir=str(path / "joint"),
    progress=False,
  ).run()
  write_rows(world.question_rows(6, test=True), str(path / "joint.jsonl"))
  write_rows(world.question_rows(2, test=True), str(path / "given.jsonl"))
  write_rows(world.documents(test=True), str(path / "documents.jsonl"))
  return path


def test_compress_index_ask(folder, capsys):
  checkpoint = ("--checkpoint", folder / "joint", "--json")
  store = folder / "store"
  documents = len(tiny.world().documents(test=True))
  status, report, _ = run(
    capsys,
    "compress",
    *checkpoint,
    "--documents",
    folder / "documents.jsonl",
    "--store",
    store,
    "--batch-size",
    8,
    "--shard-size",
    5,
  )
  assert (status, report["documents"], report["skipped"]) == (0, documents, 0)
  assert report["bytes"] > 0
  status, report, _ = run(
    capsys, "compress", *checkpoint, "--documents", folder / "documents.jsonl", "--store", store
  )
  assert (report["documents"], report["skipped"]) == (documents, documents)
  results = {}
  question = next(tiny.world().question_rows(1, test=True))["question"]
  for kind in ("exact", "scann"):
    if kind == "scann":
      pytest.importorskip("scann")
    status, report, _ = run(capsys, "index", "--store", store, "--kind", kind, "--json")
    assert (
      status == 0
      and report["documents"] == documents
      and report["dimension"] == 32
      and report["seconds"] >= 0
    )
    status, report, _ = run(capsys, "ask", *checkpoint, "--store", store, question, "Who else?")
    assert status == 0
    first, second = report["answers"]
    assert (
      first["question"] == question
      and isinstance(first["answer"], str)
      and second["question"] == "Who else?"
    )
    assert set(first["timings_ms"]) == {"encode", "search", "generate"}
    results[kind] = [(d["id"], d["score"]) for d in first["documents"]]
    assert len(results[kind]) == 2
  if "scann" in results:
    assert [i for i, _ in results["exact"]] == [i for i, _ in results["scann"]]
    np.testing.assert_allclose(*([s for _, s in results[k]] for k in ("exact", "scann")), atol=1e-3)


def test_a_store_is_looked_at_changed_and_made_smaller(folder, capsys, tmp_path):
  store = tmp_path / "store"
  assert (
    run(
      capsys,
      "compress",
      "--checkpoint",
      folder / "joint",
      "--documents",
      folder / "documents.jsonl",
      "--store",
      store,
      "--process",
      0,
      "--processes",
      2,
      "--shard-size",
      4,
      "--workers",
      1,
      "--json",
    )[0]
    == 0
  )
  status, report, _ = run(
    capsys,
    "compress",
    "--checkpoint",
    folder / "joint",
    "--documents",
    folder / "documents.jsonl",
    "--store",
    store,
    "--process",
    1,
    "--processes",
    2,
    "--shard-size",
    4,
    "--json",
  )
  documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
  assert status == 0 and report["documents"] == len(documents)
  status, report, _ = run(capsys, "store", "info", "--store", store, "--json")
  assert (report["form"], report["documents"], report["compression_rate"]) == (
    "float32",
    len(documents),
    20,
  )
  ids = tmp_path / "ids.txt"
  ids.write_text("\n".join([documents[0]["id"], "nobody", documents[5]["id"], ""]))
  status, report, _ = run(capsys, "store", "delete", "--store", store, "--ids", ids, "--json")
  assert report == {"deleted": 2, "unknown": 1, "documents": len(documents) - 2}
  assert run(capsys, "store", "compact", "--store", store, "--json")[0] == 0
  status, report, _ = run(capsys, "store", "verify", "--store", store, "--json")
  assert (status, report["documents"], report["dead"]) == (0, len(documents) - 2, 0)
  status, report, _ = run(
    capsys,
    "store",
    "quantise",
    "--store",
    store,
    "--to",
    tmp_path / "small",
    "--form",
    "int8",
    "--json",
  )
  assert (status, report["form"], report["documents"]) == (0, "int8", len(documents) - 2)
  for arguments, message in (
    (("store", "delete", "--store", store), "--ids"),
    (("store", "quantise", "--store", store), "--to"),
    (
      (
        "compress",
        "--checkpoint",
        folder / "joint",
        "--documents",
        folder / "documents.jsonl",
        "--store",
        store,
        "--process",
        2,
        "--processes",
        2,
      ),
      "expected 0 to 1",
    ),
    (
      ("compress", "--checkpoint", folder / "joint", "--documents", tmp_path, "--store", store),
      "ledger-0-000.jsonl:1: the document has no 'text'",
    ),
    (
      (
        "compress",
        "--checkpoint",
        folder / "joint",
        "--documents",
        tmp_path,
        "--store",
        store,
        "--batch-size",
        0,
      ),
      "expected 1 or more",
    ),
    (("store", "delete", "--store", store, "--ids", "missing.txt"), "missing.txt: no such file"),
    (("ask", "--checkpoint", folder / "joint", "--store", store, " "), "a question is empty"),
    (
      (
        "compress",
        "--checkpoint",
        folder / "joint",
        "--documents",
        tmp_path,
        "--store",
        store,
        "--processes",
        2,
      ),
      "name both",
    ),
    (("index", "--store", store, "--kind", "exact", "--dimensions", 99), "dimensions=99"),
  ):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and message in err


def test_evaluate_and_loss(folder, capsys):
  checkpoint = ("--checkpoint", folder / "joint", "--json")
  predictions = folder / "predictions.jsonl"
  status, report, _ = run(
    capsys,
    "evaluate",
    *checkpoint,
    "--rows",
    folder / "joint.jsonl",
    "--setting",
    "joint",
    "--limit",
    5,
    "--predictions",
    predictions,
    "--max-new-tokens",
    4,
  )
  assert status == 0 and report["n"] == 5
  assert {
    "em",
    "f1",
    "cover_em",
    "em_first",
    "recall_at_1",
    "recall_at_5",
    "precision_at_3",
  } <= set(report)
  assert len(predictions.read_text().splitlines()) == 5
  status, report, _ = run(
    capsys,
    "evaluate",
    *checkpoint,
    "--rows",
    folder / "given.jsonl",
    "--setting",
    "compressor",
    "--max-new-tokens",
    4,
  )
  assert status == 0 and "recall_at_1" not in report
  status, report, _ = run(
    capsys,
    "loss",
    *checkpoint,
    "--stage",
    "joint",
    "--rows",
    folder / "joint.jsonl",
    "--batch-size",
    5,
  )
  assert (
    status == 0
    and len(report["rows"][0]["scores"]) == 6
    and len(report["rows"][0]["selected"]) == 2
  )
  for stage in ("instruct", "contrastive"):
    status, report, _ = run(
      capsys,
      "loss",
      *checkpoint,
      "--stage",
      stage,
      "--rows",
      folder / ("given.jsonl" if stage == "instruct" else "joint.jsonl"),
    )
    assert status == 0 and np.isfinite(report["total"])
  status, report, _ = run(capsys, "lens", *checkpoint, "--top", 5, "Who is it?")
  assert status == 0 and len(report["queries"][0]["tokens"]) >= 5


def test_golden_loss_through_the_command(golden, tmp_path, capsys):
  inputs = json.loads((golden / "inputs.json").read_text())
  rows = tmp_path / "rows.jsonl"
  write_rows(
    (
      {"question": q, "answer": a, "docs": d, "pos_index": p}
      for q, a, d, p in zip(
        inputs["STAGE2_QUESTIONS"], inputs["STAGE2_ANSWERS"], inputs["POOL"], inputs["POS_INDEX"]
      )
    ),
    str(rows),
  )
  for stage, file in (("joint", "stage2"), ("contrastive", "stage2_pretrain")):
    reference = np.load(golden / f"{file}.npz")
    status, report, err = run(
      capsys,
      "loss",
      "--checkpoint",
      golden / "ckpt_stage2",
      "--base",
      golden / "tiny_mistral",
      "--stage",
      stage,
      "--rows",
      rows,
      "--dtype",
      "float32",
      "--json",
    )
    assert status == 0, err
    assert report["loss"] == pytest.approx(float(reference["loss"]), abs=1e-5)
    if stage == "joint":
      np.testing.assert_allclose(
        [r["scores"] for r in report["rows"]], reference["scores"], atol=1e-4
      )
      assert [r["selected"] for r in report["rows"]] == reference["topk_idx"].tolist()
  write_rows(
    (
      {"question": q, "answer": a, "docs": d[:2]}
      for q, a, d in zip(inputs["STAGE2_QUESTIONS"], inputs["STAGE2_ANSWERS"], inputs["POOL"])
    ),
    str(rows),
  )
  reference = np.load(golden / "stage1_2.npz")
  status, report, err = run(
    capsys,
    "loss",
    "--checkpoint",
    golden / "ckpt_stage1_2",
    "--base",
    golden / "tiny_mistral",
    "--stage",
    "instruct",
    "--rows",
    rows,
    "--dtype",
    "float32",
    "--json",
  )
  assert status == 0, err
  for ours, theirs in (("loss", "loss"), ("mse", "mse_loss"), ("total", "total")):
    assert report[ours] == pytest.approx(float(reference[theirs]), abs=1e-5)


BAD_ROWS = {
  "no documents": ('{"question": "q", "answer": "a"}', "bad.jsonl:1: the row has no documents"),
  "no question": ('{"docs": ["d"], "answer": "a"}', "bad.jsonl:1: the row has no question"),
  "no answer": ('{"docs": ["d"], "question": "q"}', "bad.jsonl:1: the row has no answer"),
  "broken JSON": (
    '{"docs": ["d"], "question": "q", "answer": "a"}\n{"docs": [',
    "bad.jsonl:2: not valid JSON",
  ),
  "not an object": ("[1]", "bad.jsonl:1: expected a JSON object"),
  "empty file": ("", "bad.jsonl: the file has no rows"),
  "counts": (
    '{"docs": ["d"], "question": ["q", "r"], "answers": ["a"]}',
    "bad.jsonl:1: 2 questions but 1 answers",
  ),
  "gold": (
    '{"docs": ["d"], "question": "q", "answer": "a", "pos_index": [3]}',
    "bad.jsonl:1: pos_index=3",
  ),
  "k > n": ('{"docs": ["d"], "question": "q", "answer": "a"}', "1 documents, but top_k=2"),
  "long prompt": (
    json.dumps({"docs": ["d", "e"], "question": "word " * 400, "answer": "a"}),
    "the window decoder_max_length=256",
  ),
  "question list": (
    '{"docs": ["d", "e"], "question": ["q"], "answers": ["a"]}',
    "expected one question a row",
  ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(folder, capsys, tmp_path, case):
  text, message = BAD_ROWS[case]
  rows = tmp_path / "bad.jsonl"
  rows.write_text(text)
  status, out, err = run(
    capsys,
    "evaluate",
    "--checkpoint",
    folder / "joint",
    "--rows",
    rows,
    "--setting",
    "joint",
    "--json",
  )
  assert (status, out) == (2, None)
  lines = [line for line in err.splitlines() if line.startswith("clara ")]
  assert len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_k_above_n_in_loss(folder, capsys, tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text('{"docs": ["d"], "question": "q", "answer": "a"}')
  status, _, err = run(
    capsys, "loss", "--checkpoint", folder / "joint", "--stage", "joint", "--rows", rows
  )
  assert status == 2 and "top_k=2 is more than" in err


@pytest.mark.parametrize(
  "change, message",
  [
    (("--config.train.stepz=3",), "stepz"),
    (("--config.train.steps=many",), "steps"),
    (("--config.train.stage=nothing",), "nothing"),
    (("--config.clara.compression_rate=7",), "compression_rate=7"),
    (("--config.data.rows=('missing.jsonl',)",), "missing.jsonl: no such file"),
    (("--unknown=1",), "--unknown=1"),
    ((), "data.rows"),
  ],
)
def test_bad_configuration(capsys, tmp_path, change, message):
  status, _, err = run(
    capsys, "train", "--config", "configs/tiny.py:scp", "--workdir", tmp_path / "run", *change
  )
  assert status == 2 and message in err and "Traceback" not in err
  assert not (tmp_path / "run").exists()


def test_bad_checkpoints(folder, capsys, tmp_path):
  rows = ("--rows", folder / "joint.jsonl", "--setting", "joint")
  for checkpoint, message in (
    (tmp_path / "missing", "no such checkpoint"),
    (tmp_path, "neither a clara_jax checkpoint"),
    (folder / "base", "has no compressor"),
  ):
    status, _, err = run(capsys, "evaluate", "--checkpoint", checkpoint, *rows)
    assert status == 2 and message in err, err


def test_a_role_that_is_missing(folder, capsys, golden):
  status, _, err = run(
    capsys,
    "loss",
    "--checkpoint",
    golden / "ckpt_stage1",
    "--base",
    golden / "tiny_mistral",
    "--stage",
    "joint",
    "--rows",
    folder / "joint.jsonl",
  )
  assert status == 2 and "has no query reasoner" in err


def test_train_through_the_command(folder, capsys, tmp_path, own_estimator):
  rows = tmp_path / "rows.jsonl"
  write_rows(tiny.world().question_rows(6), str(rows))
  arguments = [
    "train",
    "--config",
    "configs/tiny.py:joint",
    "--workdir",
    tmp_path / "run",
    "--json",
    f"--config.init_from={folder / 'joint'}",
    f"--config.data.rows=('{rows}',)",
    "--config.data.batch_size=4",
    "--config.data.candidates=6",
    "--config.train.steps=3",
  ]
  shape = tiny.config()
  for field in (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
  ):
    arguments.append(f"--config.clara.model.{field}={getattr(shape.model, field)}")
  arguments += [
    "--config.clara.lora.rank=2",
    "--config.clara.lora.alpha=4.0",
    "--config.clara.compression_rate=20",
  ]
  status, report, err = run(capsys, *arguments)
  assert status == 0, err
  assert report["step"] == 3 and np.isfinite(report["loss"])
  status, report, _ = run(capsys, *arguments)  # finished: nothing is repeated
  assert status == 0 and report["step"] == 3
  for number, name in enumerate((own_estimator, "mine")):  # from a file, and by an entry point
    arguments[arguments.index("--workdir") + 1] = workdir = tmp_path / f"own{number}"
    # Fields that the file does not name.
    more = ["--config.train.temperature=annealed", "--config.train.final_temperature=0.1"] * number
    status, report, err = run(
      capsys, *arguments, f"--config.estimator={name}", "--config.estimator_args.scale=0.5", *more
    )
    assert status == 0 and np.isfinite(report["loss"]), err
    assert json.loads((workdir / "config.json").read_text())["run"]["estimator_args"] == {
      "scale": 0.5
    }
  for more, message in (
    (["--config.estimator=mine", "--config.estimator_args.x=1"], "does not take x; it takes scale"),
    (["--config.estimator=nobody"], "estimator='nobody': expected one of"),
    (["--config.estimator_args.x=1"], "name config.estimator"),
    (["--config.train.no=1"], "train.no: unknown field"),
    (["--config.train.steps.x=1"], "steps is no group"),
    (["--config.estimator=mine", "--config.train.stage=contrastive"], "selects no documents"),
  ):
    status, _, err = run(capsys, *arguments, *more)
    assert status == 2 and message in err


def test_wrong_usage(capsys):
  for arguments in (
    ["nothing"],
    ["ask", "--checkpoint", "x"],
    ["index", "--store", "x", "--kind", "tree"],
  ):
    assert run(capsys, *arguments)[0] == 2


def test_a_store_of_another_compressor_is_refused(folder, capsys, tmp_path):
  other = tiny.weights(1)
  config = trainer.dataclasses.replace(tiny.run_config("joint", steps=1), base=str(folder / "base"))
  from clara_jax.checkpoints import formats

  other["base"] = formats.load(str(folder / "joint")).weights["base"]
  other["compressor"] = {**other["generator"]}
  trainer.Trainer(
    config,
    tiny.prompt_tokenizer(),
    other,
    tiny.rows("joint"),
    workdir=str(tmp_path / "other"),
    progress=False,
  ).run()
  store = tmp_path / "store"
  arguments = ("--documents", folder / "documents.jsonl", "--store", store, "--json")
  assert run(capsys, "compress", "--checkpoint", folder / "joint", *arguments)[0] == 0
  status, _, err = run(capsys, "compress", "--checkpoint", tmp_path / "other", *arguments)
  assert status == 2 and "the store was made by compressor" in err and "other weights in" in err
