"""What each command does: one function a command, from parsed options to a report."""

import argparse
import asyncio
import dataclasses
import functools
import glob
import gzip
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

import jax

from clara_jax import distributed
from clara_jax.cli import configs
from clara_jax.compilation import keep_programs
from clara_jax.config import ConfigError, MeshConfig, RunConfig
from clara_jax.data import records as records_lib
from clara_jax.data import schemas
from clara_jax.data.tokens import Layout
from clara_jax.data.world import World, write_rows
from clara_jax.evaluation import benchmarks, datasets, logit_lens, runs
from clara_jax.evaluation import candidates as candidates_lib
from clara_jax.evaluation import report as report_lib
from clara_jax.evaluation.explain import Explainer
from clara_jax.evaluation.settings import SETTINGS
from clara_jax.inference.answer import Answerer
from clara_jax.interop import checkpoints, families, hf, native
from clara_jax.interop import convert as convert_lib
from clara_jax.interop.keymap import KeyMapError
from clara_jax.memory.compress import compress_corpus
from clara_jax.memory.quantise import quantise, truncate
from clara_jax.memory.store import MemoryStore, StoreError
from clara_jax.model import Clara, MissingWeightsError
from clara_jax.nn.linear import MissingAdapterError
from clara_jax.ops import estimators
from clara_jax.retrieval import index as index_lib
from clara_jax.synthesis.client import Endpoint, RequestError
from clara_jax.synthesis.judge import grounding
from clara_jax.training import corpus, loop, stages
from clara_jax.training.checkpoint import CheckpointError, is_checkpoint, read_config


def bad_input_errors() -> tuple[type[Exception], ...]:
  """Errors of the user's input: one line and exit status 2."""
  return (ConfigError, schemas.DataError, KeyMapError, StoreError, CheckpointError, MissingWeightsError, MissingAdapterError,
          index_lib.MissingIndexError, RequestError, IsADirectoryError, NotADirectoryError, PermissionError)


def show(command: str, report: dict[str, Any]) -> None:
  """A report for a person, on standard output."""
  if command == "quickstart":
    return  # it has told everything already
  if command == "ask":
    for answer in report["answers"]:
      print(f"\n{answer['question']}\n  {answer['answer']}")
      for document in answer["documents"]:
        print(f"    {document['score']:.4f}  {document['id']}  {document['title']}")
    return
  if command == "lens":
    for query in report["queries"]:
      print(f"\n{query['question']}\n  " + "  ".join(f"{token} ({logit:.1f})" for token, logit in query["tokens"]))
    return
  if command == "explain":
    for row in report["rows"]:
      print(f"\n{row['question']}\n  {row['prediction']}  (wanted: {' | '.join(row['answers'])})")
      print("  memory tokens say: " + ", ".join(w["word"] for w in row["lens"][:15]))
      for document in row["documents"]:
        print(f"    {'gold ' if document['is_gold'] else '     '}attention {document['attention']:.0%}  gain {document['gain']:+.2f} nats  "
              f"{' '.join(document['text'].split())[:90]}")
    return
  if command == "compare":
    for run, metrics in report.items():
      print(f"{run}: {next(iter(metrics.values()))['n']} rows")
      for name, d in metrics.items():
        print(f"  {name:>14}  A {d['a']:.3f}  B {d['b']:.3f}  B - A {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]  p {d['p']:.4f}")
    return
  if command == "reproduce":
    for letter, claim in report["claims"].items():
      print(f"({letter}) {claim['says']}: {claim['verdict']}")
    return
  if command == "evaluate" and "runs" in report:
    _show_table(report["runs"])
    return
  for name, value in report.items():
    if not isinstance(value, (list, dict)):
      print(f"{name:>24}  {value:.4f}" if isinstance(value, float) else f"{name:>24}  {value}")
    else:
      print(f"{name:>24}  {json.dumps(value)}")


def _show_table(found: dict[str, dict[str, Any]]) -> None:
  """Runs as lines, metrics as columns: means with their intervals."""
  shown = ("em", "f1", "cover_em", "recall_at_1", "recall_at_5", "context_tokens", "seconds")
  names = [name for name in shown if any(name in values for values in found.values())]
  width = max(len(name) for name in found)
  print(f"{'':{width}}  " + "  ".join(f"{name:>22}" for name in names))
  for run, values in found.items():
    cells = []
    for name in names:
      value = values.get(name)
      text = "" if value is None else f"{value:.3g}" if not isinstance(value, dict) else (
          f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")
      cells.append(f"{text:>22}")
    print(f"{run:{width}}  " + "  ".join(cells))


def quickstart(options: argparse.Namespace) -> dict[str, Any]:
  """`clara quickstart`."""
  from clara_jax import quickstart as recipe
  return recipe.run(options.workdir, from_scratch=options.from_scratch, seed=options.seed)


def train(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any] | None:
  """`clara train`: one stage."""
  if options.dtype:
    overrides = [*overrides, *(f"--config.clara.model.{field}={options.dtype}" for field in ("dtype", "param_dtype"))]
  config = configs.load(options.config, overrides, options.allow_config)
  if config.estimator:  # before a base is read
    estimators.get(config.estimator, config.estimator_args)
  if options.distributed or options.coordinator or options.processes is not None or options.process is not None:
    distributed.initialize(options.coordinator, options.processes, options.process)
  keep_programs()
  stages.get(config.train.stage)  # an unknown stage costs no reading
  if not config.data.rows:
    raise ConfigError("data.rows: no training rows are named")
  sources = records_lib.open_sources(config.data.rows, config.data.shards, config.data.max_malformed, config.data.share_documents)
  eval_rows = [row for source in records_lib.open_sources(config.data.eval_rows, 1) for row in source[0]]
  config = _with_date(config, options.workdir)
  model, template = Clara(config.clara), _chat_template(options)
  before: dict[str, Any] = {}
  if config.init_from:
    opened = checkpoints.open_checkpoint(config.init_from, config.base, chat_template=template, allow=options.allow_config)
    _same_architecture(Clara(opened.config), model, config.init_from)
    # A pretrained base is the base of what starts from it.
    config = dataclasses.replace(config, base=config.base or opened.base or config.init_from)
    if config.clara.prompt_date is None:
      config = dataclasses.replace(config, clara=dataclasses.replace(config.clara, prompt_date=opened.config.prompt_date))
    opened.config = config.clara
    checkpoints.note_rounding(opened.plain_base, config.clara, config.base)
    before, layout, base_sha256 = opened.weights, opened.layout(), opened.check_base()
  else:
    named = config.tokenizer or config.base
    tokenizer = named and checkpoints.tokenizer_directory(named)
    if tokenizer is None:
      raise ConfigError(f"{named}: brings no tokenizer (tokenizer.json); name one with --config.tokenizer=DIR" if named else
                        "tokenizer: no tokenizer is named, and neither base nor init_from brings one")
    layout = Layout(tokenizer, config.clara, end_ids=families.end_ids(native.hf_files(config.base)),
                    chat_template=template)
    base_sha256 = None
    if config.base:
      plain, special = checkpoints.open_base(model, config.base, "config.base", options.allow_config)
      checkpoints.note_rounding(plain, config.clara, config.base)
      before = {"base": hf.with_special_tokens(plain, special or hf.special_tokens(config.clara), config.clara)}
      base_sha256 = hf.base_hash(plain) if jax.process_index() == 0 else None
  config = dataclasses.replace(config, clara=layout.config)
  memories = None
  if config.data.store:
    opened_store = MemoryStore(config.data.store)
    corpus.check_store(config.clara, opened_store)
    memories = opened_store.lookup()
  result = loop.train(config, layout, before, eval_rows=eval_rows, sources=sources, workdir=options.workdir, memories=memories,
                      base_sha256=base_sha256)
  if not distributed.is_main():
    return None  # one report for all
  source = native.hf_files(config.base)
  if source and "base" in stages.get(config.train.stage).trained(config.train):  # what it came with goes with it
    hf.keep_files(source, os.path.join(options.workdir, native.HF_FOLDER))
  return result.metrics if result.stopped is None else {**result.metrics, "stopped": result.stopped}


def _with_date(config: RunConfig, workdir: str) -> RunConfig:
  """A run that goes on tells its chat template the date on which it began."""
  if config.clara.prompt_date is None and is_checkpoint(workdir):
    return dataclasses.replace(config, clara=dataclasses.replace(config.clara, prompt_date=read_config(workdir)[0].clara.prompt_date))
  return config


def _same_architecture(have: Clara, want: Clara, where: str) -> None:
  for name in ("model", "lora"):
    a, b = (dataclasses.asdict(getattr(m.config, name)) for m in (have, want))
    for field in a:
      if field not in (*configs.FREE_FIELDS, "dropout") and a[field] != b[field]:
        raise ConfigError(f"clara.{name}.{field}={b[field]!r}, but {where} was made with {a[field]!r}")
  if have.config.num_memory_tokens != want.config.num_memory_tokens:
    raise ConfigError(f"{want.config.num_memory_tokens} memory tokens, but {where} was made with {have.config.num_memory_tokens}")


def records(options: argparse.Namespace) -> Any:
  """`clara records`."""
  return records_lib.build(options.kind, options.rows, options.out, options.files, options.max_malformed)


def compress(options: argparse.Namespace) -> Any:
  """`clara compress`."""
  if (options.process is None) != (options.processes is None) and not options.distributed:
    raise ConfigError("--process and --processes: name both, or neither")
  process, processes = options.process or 0, options.processes or 1
  if not 0 <= process < processes:
    raise ConfigError(f"--process {process}: expected 0 to {processes - 1}")
  if options.distributed or options.coordinator:  # otherwise they need not know of each other
    distributed.initialize(options.coordinator, options.processes, options.process)
    process, processes = jax.process_index(), jax.process_count()
  checkpoint = _checkpoint(options, "compressor")
  documents = schemas.read_documents(options.documents, schemas.Malformed(options.max_malformed))
  return compress_corpus(checkpoint.model, checkpoint.layout, checkpoint.weights, documents, options.store, form=options.form,
                         text=False if options.no_text else None, replace=options.replace, batch_size=options.batch_size,
                         shard_size=options.shard_size, workers=options.workers, process=process, processes=processes,
                         mesh=MeshConfig(data=-1, fsdp=options.fsdp))


def index(options: argparse.Namespace) -> dict[str, Any]:
  """`clara index`."""
  start = time.monotonic()
  store = MemoryStore(options.store)
  there = index_lib.saved_settings(store)
  kind = options.kind or there.get("kind", "scann")
  same = options.memory_tokens in (None, there.get("memory_tokens"))
  dimensions = (options.dimensions if options.dimensions is not None else there.get("dimensions") if same else None) or None
  store = store.first(options.memory_tokens or there.get("memory_tokens"))
  built, changed = index_lib.update(store, kind, dimensions)
  full = store.manifest.num_memory_tokens * store.manifest.width
  return {"documents": len(built), "changed": changed, "dimension": dimensions or full,
          "memory_tokens": store.manifest.num_memory_tokens, "bytes": index_lib.saved_bytes(options.store),
          "seconds": time.monotonic() - start, "kind": kind}


def store(options: argparse.Namespace) -> dict[str, Any]:
  """`clara store ACTION`."""
  if options.action == "repair":
    return MemoryStore(options.store, damaged=True).repair()
  opened = MemoryStore(options.store)
  if options.action == "verify":
    return opened.verify()
  if options.action == "delete":
    if not options.ids:
      raise ConfigError("--ids: name a file with one id a line")
    ids = schemas.read_ids(options.ids)
    deleted = opened.delete(ids)
    return {"deleted": deleted, "unknown": len(ids) - deleted, "documents": len(opened)}
  if options.action == "compact":
    opened.compact()
  elif options.action == "quantise":
    if not options.to or not options.form:
      raise ConfigError("--to and --form: name the new store and its form")
    opened = quantise(opened, options.to, options.form, options.sub_width)
  elif options.action == "truncate":
    if not options.to or not options.memory_tokens:
      raise ConfigError("--to and --memory-tokens: name the new store and how many memory tokens it keeps")
    opened = truncate(opened, options.to, options.memory_tokens)
  return {**dataclasses.asdict(opened.manifest), "compression_rate": opened.manifest.compression_rate, "documents": len(opened),
          "dead": opened.dead, "bytes": opened.nbytes(), "bytes_per_document": opened.nbytes() / max(1, len(opened)),
          "index": index_lib.state(opened)}


def ask(options: argparse.Namespace) -> dict[str, Any]:
  """`clara ask`."""
  if any(not q.strip() for q in options.questions):
    raise ConfigError("QUESTION: a question is empty")
  answerer = _answerer(options)
  return {"answers": [dataclasses.asdict(a) for a in answerer.answer(options.questions)]}


def serve(options: argparse.Namespace) -> None:
  """`clara serve`."""
  from clara_jax.serving import guard, server
  access = guard.Access(tuple(options.allowed_host), guard.read_token(options.token_file) if options.token_file else None)
  server.run(_answerer(options), options.host, options.port, server.Limits(
      batch=options.max_batch, wait_ms=options.max_wait_ms, waiting=options.max_waiting, seconds=options.timeout), access)


def _answerer(options: argparse.Namespace) -> Answerer:
  store = MemoryStore(options.store, memory_tokens=options.memory_tokens)
  checkpoint = _checkpoint(options, "compressor", "query_reasoner", "generator").first(None)  # the store says how many are read
  return Answerer(checkpoint.model, checkpoint.layout, checkpoint.weights, store, top_k=options.top_k,
                  max_new_tokens=options.max_new_tokens, merge=options.merge)


def candidates(options: argparse.Namespace) -> Any:
  """`clara candidates`."""
  if os.path.abspath(options.out) == os.path.abspath(options.questions):
    raise ConfigError(f"--out {options.out}: is the file of the questions")
  _output_file("--out", options.out)
  malformed = schemas.Malformed(options.max_malformed)
  rows = datasets.read(options.questions, malformed)
  corpus = list(schemas.read_documents(options.corpus, malformed)) if options.corpus else candidates_lib.own_corpus(rows)
  made = candidates_lib.make(rows, corpus, options.count, options.setting, options.retriever, options.seed)
  os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
  report, part = None, f"{options.out}.part"
  with (gzip.open(part, "wt", encoding="utf-8") if options.out.endswith(".gz") else open(part, "w", encoding="utf-8")) as file:
    for row in made:
      if isinstance(row, dict):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
      else:
        report = row
  os.replace(part, options.out)
  return report


def _output_file(option: str, path: str | None) -> None:
  """Refuses what cannot be written before any work is done."""
  if path and os.path.isdir(path):
    raise ConfigError(f"{option} {path}: is a directory, expected the name of a file")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
  """`clara evaluate`."""
  # 'all': those of one checkpoint; a generator of stage full_text reads no memory tokens.
  settings = [n for n in SETTINGS if n != "full_text_generator"] if "all" in options.setting else options.setting
  if options.report is None and (len(settings) > 1 or options.also):
    raise ConfigError("several settings or --also: name --report DIR")
  if options.report and options.predictions:
    raise ConfigError("--predictions: with --report, predictions are in DIR/predictions")
  if options.judge and not (options.judge_model and options.report):
    raise ConfigError("--judge: name --judge-model and --report, too")
  judge = None
  if options.judge:
    judge = functools.partial(grounding, endpoint=Endpoint(options.judge, options.judge_model, os.environ.get("OPENAI_API_KEY")))
  checkpoint = _checkpoint(options, *dict.fromkeys(role for name in settings for role in SETTINGS[name].roles()))
  rows = _rows(options, checkpoint, *settings)
  if options.report is None:
    return benchmarks.evaluate(checkpoint.model, checkpoint.layout, checkpoint.weights, rows, settings[0], batch_size=options.batch_size,
                               max_new_tokens=options.max_new_tokens, path=options.predictions).scores
  also = {}
  for given in options.also:
    name, equals, directory = given.partition("=")
    if not equals or not name:
      raise ConfigError(f"--also {given}: expected NAME=CKPT")
    try:
      also[name] = _first(_load(directory, None, options), options)
    except checkpoints.CheckpointError as error:
      raise ConfigError(f"--also {given}: {error}") from None
  return runs.run(checkpoint, rows, settings, options.report, also=also, title=f"{options.checkpoint} on {options.rows}",
                  batch_size=options.batch_size, max_new_tokens=options.max_new_tokens, judge=judge)


def _rows(options: argparse.Namespace, checkpoint: checkpoints.Checkpoint, *settings: str) -> list[schemas.Row]:
  """The first rows that can be answered in all settings."""
  malformed = schemas.Malformed(options.max_malformed)
  rows: list[schemas.Row] = []
  for place, row in enumerate(datasets.read(options.rows, malformed)):
    if len(rows) == options.limit:
      break
    try:
      for name in settings:
        benchmarks.check(row, SETTINGS[name], checkpoint.model.config.top_k, checkpoint.layout)
      rows.append(row)
    except schemas.DataError as error:
      malformed.add(str(error), place)
  if not rows:
    raise schemas.DataError(f"{options.rows}: no row can be answered")
  return rows


def compare(options: argparse.Namespace) -> dict[str, Any]:
  """`clara compare`."""
  _output_file("--report", options.report)
  return runs.compare(options.a, options.b, options.report)


def explain(options: argparse.Namespace) -> dict[str, Any]:
  """`clara explain`."""
  _output_file("--report", options.report)
  checkpoint = _checkpoint(options, "compressor", "query_reasoner", "generator")
  explainer = Explainer(checkpoint.model, checkpoint.layout, checkpoint.weights, options.max_new_tokens, options.top)
  found = [explainer.explain(row) for row in _rows(options, checkpoint, "joint")]
  if options.report:
    report_lib.write(options.report, report_lib.page(f"{options.checkpoint} on {options.rows}", f"{len(found)} questions, explained.", [
        ("Questions", report_lib.LENS_LEGEND + report_lib.joined(map(report_lib.explained, found)))]))
  return {"rows": [dataclasses.asdict(f) for f in found]}


def synthesize(options: argparse.Namespace) -> dict[str, Any]:
  """`clara synthesize`."""
  from clara_jax.synthesis import factory, pages
  made: dict[str, Any] = {}
  if options.documents and options.questions:
    raise ConfigError("--documents and --questions: name one of them")
  if options.documents or options.questions:
    # SIGTERM as Ctrl-C: requests are given up, rows and manifest are written.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
      made = dataclasses.asdict(asyncio.run(_synthesized(options)))
    except KeyboardInterrupt:
      print(f"synthesize: stopped; what was done is in {options.out}, the same command goes on", file=sys.stderr)
      raise
    finally:
      signal.signal(signal.SIGTERM, before)
  elif not (options.report or options.records) or options.retry_rejected is not None:
    raise ConfigError("--documents or --questions: name one")
  if options.report:
    made |= pages.write(options.out)
  if options.records:
    kind = factory.settings(options.out)["kind"]
    paths = sorted(glob.glob(os.path.join(glob.escape(options.out), "rows-*.jsonl")))
    count = sum(1 for path in paths for _ in schemas.read_jsonl(path))
    if not count:
      raise ConfigError(f"--records: {options.out} has no accepted rows")
    directory = os.path.join(options.out, "records")
    with tempfile.TemporaryDirectory(prefix="records-", dir=options.out) as folder:  # takes the place of earlier ones when it is whole
      fresh = os.path.join(folder, "records")
      built = records_lib.build(kind, [path for path in paths if os.path.getsize(path)], fresh, min(32, count))
      shutil.rmtree(directory, ignore_errors=True)
      os.replace(fresh, directory)
    made["records"] = dataclasses.asdict(dataclasses.replace(built, directory=built.directory.replace(fresh, directory)))
  return made


async def _synthesized(options: argparse.Namespace) -> Any:
  from clara_jax.synthesis import client, documents, factory, rounds, templates
  if not options.endpoint or options.endpoint != "offline" and not options.model:
    raise ConfigError("--endpoint and --model: name both")
  for name in ("max_requests", "max_tokens"):
    if getattr(options, name) and options.endpoint in ("offline", "checkpoint"):
      raise ConfigError(f"--{name.replace('_', '-')}: budgets are for servers, not for --endpoint {options.endpoint}")
  if not all(0 <= price < float("inf") for price in options.price):
    raise ConfigError(f"--price {options.price[0]} {options.price[1]}: expected numbers of 0 or more")
  if options.tokens < 16:
    raise ConfigError(f"--tokens {options.tokens}: expected 16 or more")
  texts = templates.Templates(options.prompts)
  if options.questions:
    rows = _questions(options.questions)[:options.limit]
    items, work = ((r.identifier, r) for r in rows), rounds.teacher
  else:
    count = documents.token_counter(options.tokenizer) if options.tokenizer else documents.words
    pieces = documents.Reading(options.documents, options.tokens, count, options.limit)
    items, work = ((p.id, p) for p in pieces), functools.partial(rounds.scp, rounds=options.rounds)
  settings = {"directory": options.out, "shard": factory.Shard(options.shard, options.shards),
              "sampling": factory.Sampling(options.temperature, options.max_reply_tokens),
              "at_once": options.in_flight + options.in_flight // 4, "price": tuple(options.price),
              "share": None if options.questions else lambda: pieces.share, "retry_rejected": options.retry_rejected, "record": {
                  "model": options.model, "endpoint": options.endpoint, "kind": "instruct" if options.questions else "scp",
                  "tokens": options.tokens, "tokens_by": documents.tokenizer_hash(options.tokenizer) if options.tokenizer else "words",
                  "rounds": options.rounds}}
  if options.endpoint == "offline":
    from clara_jax.quickstart.recipe import Sizes
    from clara_jax.synthesis.offline import Offline
    return await factory.produce(items, work, Offline(World(Sizes().world)), texts, **settings)
  if options.endpoint == "checkpoint":
    from clara_jax.synthesis.own import OwnModel
    keep_programs()
    return await factory.produce(items, work, OwnModel(_load(options.model, None, options)), texts, **settings)
  key = os.environ.get("OPENAI_API_KEY", "").strip()
  endpoint = client.Endpoint(options.endpoint, options.model, key, options.in_flight, options.timeout,
                             max_requests=options.max_requests, max_tokens=options.max_tokens, json_schema=not options.no_json_schema,
                             seed=not options.no_seed)
  async with client.Client(endpoint) as backend:
    return await factory.produce(items, work, backend, texts, **settings)


def _questions(path: str) -> list[schemas.Row]:
  """Rows with names of their own that do not depend on where the file lies."""
  rows = [dataclasses.replace(row, identifier=f"{os.path.basename(path)}{row.identifier.removeprefix(path)}")
          if row.identifier.startswith(f"{path}:") else row for row in datasets.read(path)]
  seen: set[str] = set()
  for row in rows:
    if row.identifier in seen:
      raise schemas.DataError(f"{path}: id {row.identifier!r} comes twice")
    if not row.documents:
      raise schemas.DataError(f"{path}: question {row.identifier!r} has no documents; clara candidates finds some")
    seen.add(row.identifier)
  return rows


def paraphrase(options: argparse.Namespace) -> dict[str, Any]:
  """`clara paraphrase`."""
  _output_file("--predictions", options.predictions)
  from clara_jax.evaluation import fidelity
  checkpoint = _checkpoint(options, "compressor", "generator")
  documents = list(itertools.islice(schemas.read_documents(options.documents, schemas.Malformed(options.max_malformed)), options.limit))
  result = fidelity.paraphrase(checkpoint.model, checkpoint.layout, checkpoint.weights, documents, batch_size=options.batch_size,
                               max_new_tokens=options.max_new_tokens, bert_model=options.bertscore)
  if options.predictions:
    write_rows(result.predictions, options.predictions)
  return result.scores


def reproduce(options: argparse.Namespace) -> dict[str, Any]:
  """`clara reproduce`."""
  from clara_jax import reproduction
  return reproduction.run(options.workdir, options.claims or tuple(reproduction.CLAIMS), options.seeds, options.scale)


def gradients(options: argparse.Namespace) -> dict[str, Any]:
  """`clara gradients`."""
  from clara_jax.gradients import laboratory
  from clara_jax.gradients.audit import VARIED
  from clara_jax.gradients.variants import AUDITED, TRAINED
  if (options.checkpoint is None) != (options.rows is None):
    raise ConfigError("--checkpoint and --rows: name both, or neither")
  if options.checkpoint and options.train:
    raise ConfigError("--checkpoint and --train: name one of them; each adds its part to the page of --out")
  names = options.estimators
  if options.draws is not None and options.draws < 2:
    raise ConfigError(f"--draws {options.draws}: expected 2 or more, for a variance")
  if options.train:
    return laboratory.run_compare(options.out, options.workdir, names or TRAINED, options.seeds, options.scale)
  if options.checkpoint:
    checkpoint = _checkpoint(options, "compressor", "generator")
    rows = list(itertools.islice((r for r in schemas.read_rows([options.rows]) if r.data_type == "qa"), options.limit))
    return laboratory.run_generator(options.out, checkpoint, rows, names or AUDITED, options.candidates, options.draws or 32,
                                    told={"checkpoint": options.checkpoint, "file": options.rows})
  return laboratory.run_audit(options.out, names or AUDITED, options.draws or 1000, VARIED if options.vary is None else options.vary)


def loss(options: argparse.Namespace) -> dict[str, Any]:
  """`clara loss`."""
  roles = {"scp": ("compressor", "generator"), "instruct": ("compressor", "generator"),
           "joint": ("compressor", "query_reasoner", "generator"), "contrastive": ("compressor", "query_reasoner")}
  checkpoint = _checkpoint(options, *roles[options.stage])
  return benchmarks.stage_loss(checkpoint.model, checkpoint.layout, checkpoint.weights, options.stage,
                               schemas.read_rows([options.rows]), options.batch_size)


def convert(options: argparse.Namespace) -> Any:
  """`clara convert`."""
  return convert_lib.convert(options.source, options.destination, options.to, role=options.role, base=options.base, dtype=options.dtype,
                             chat_template=_chat_template(options), allow=options.allow_config, verify=options.verify)


def lens(options: argparse.Namespace) -> dict[str, Any]:
  """`clara lens`."""
  checkpoint = _checkpoint(options, "query_reasoner")
  return {"queries": logit_lens.queries(checkpoint.model, checkpoint.layout, checkpoint.weights, options.questions, options.top)}


def _checkpoint(options: argparse.Namespace, *roles: str) -> checkpoints.Checkpoint:
  keep_programs()
  checkpoint = _load(options.checkpoint, options.base, options)
  checkpoint.require(*roles)
  return _first(checkpoint, options)


def _first(checkpoint: checkpoints.Checkpoint, options: argparse.Namespace) -> checkpoints.Checkpoint:
  """With --memory-tokens, where the command has it."""
  m, config = getattr(options, "memory_tokens", None), checkpoint.model.config
  first = checkpoint.first(m)
  if m and m not in (config.nested_memory or (config.num_memory_tokens,)):
    trained = " or ".join(map(str, config.nested_memory)) or f"{config.num_memory_tokens}, all at once"
    print(f"note: --memory-tokens {m}: {checkpoint.directory} was trained to read {trained}", file=sys.stderr, flush=True)
  return first


def _load(directory: str, base: str | None, options: argparse.Namespace) -> checkpoints.Checkpoint:
  return checkpoints.load(directory, base, options.dtype, chat_template=_chat_template(options), allow=options.allow_config)


def _chat_template(options: argparse.Namespace) -> str | None:
  """The text of --chat-template FILE."""
  if options.chat_template is None:
    return None
  try:
    with open(options.chat_template, encoding="utf-8-sig") as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f"--chat-template {options.chat_template}: {getattr(error, 'strerror', None) or error}") from None


