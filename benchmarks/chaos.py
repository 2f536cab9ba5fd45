"""A thousand random faults each for store, index, checkpoints, factory and server; after each, what
is promised is checked.

    python benchmarks/chaos.py --scratch DIR [--parts store index …] [--faults 1000] [--seed 0]

A fault is a SIGKILL at a random moment, a write that fails (a limit on the size of files), a
flipped bit, a truncated or removed file, commands at the same time, a clock that jumps; for the
server, what bad clients send. The promise: what was acknowledged is there, once, and right; what is
damaged is named. Prints one JSON object; ends with status 1 where a promise was broken, and keeps
that state in DIR. Training that is killed is a study of its own, `preemption.py`.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import socket
import sys
import threading
import time

import numpy as np

from clara_jax.cli.output import configure_logging
from clara_jax.data.schemas import Document
from clara_jax.experiments import offline_backend
from clara_jax.experiments.quickstart.recipe import Sizes
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.memory.store import Manifest, MemoryStore, StoreError
from clara_jax.synthesis import factory, journal, rounds, templates

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
MANIFEST = Manifest("chaos", 2, 8, 40, "float32")
CHILDREN = multiprocessing.get_context("forkserver")  # from a process without threads
CHILDREN.set_forkserver_preload(
  [
    "clara_jax.memory.store",
    "clara_jax.retrieval.index",
    "clara_jax.experiments.quickstart.recipe",
    "clara_jax.synthesis.factory",
    "clara_jax.experiments.offline_backend",
  ]
)


class BrokenPromiseError(Exception):
  """What should not have happened."""


def faulty(limit: int | None, clock: int | None) -> None:
  """In a child: files end at `limit` bytes; the clock jumps, by a seed."""
  if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  if clock is not None:
    jumps, now = random.Random(clock), time.time
    time.time = lambda: now() + jumps.uniform(-1e6, 1e6)


def child(target, *arguments, kill_after: float | None = None, wait: bool = True):
  """Runs a function in a process of its own, perhaps for a time."""
  process = CHILDREN.Process(target=target, args=arguments)
  process.start()
  if kill_after is not None:
    process.join(kill_after)
    process.kill()
  if wait:
    process.join()
  return process


def damaged(folder: pathlib.Path, rng: random.Random, among=lambda file: True) -> str:
  """Damages a random file below a folder; says how."""
  file = rng.choice(
    sorted(
      f
      for f in folder.rglob("*")
      if f.is_file() and f.suffix != ".lock" and f.stat().st_size and among(f)
    )
  )
  content, kind = bytearray(file.read_bytes()), rng.choice(("flip", "flip", "truncate", "remove"))
  if kind == "flip":
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  elif kind == "truncate":
    del content[rng.randrange(len(content)) :]
  if kind == "remove":
    file.unlink()
  else:
    file.write_bytes(content)
  return f"{kind} {file.relative_to(folder)}"


# ---- store ---------------------------------------------------------------------------------------


def store_work(
  folder: str,
  log: str,
  writer: int,
  seed: int,
  version: int,
  limit: int | None = None,
  clock: int | None = None,
) -> None:
  """Random changes; what is begun and what is done goes to `log`."""
  rng = random.Random(seed)
  out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

  def note(*values):
    line = (json.dumps(values) + "\n").encode()
    if os.write(out, line) < len(line):  # the limit holds for this file, too
      os._exit(1)

  try:
    store = MemoryStore(folder, MANIFEST, writer=writer)
  except StoreError:  # the other one compacts
    return
  faulty(limit, clock)
  for step in range(rng.randint(1, 4)):
    ids = [f"{writer}-{n}" for n in rng.sample(range(30), rng.randint(1, 12))]
    action = rng.choice(("upsert", "upsert", "upsert", "delete", "compact"))
    note("begin", action, ids, version + step)
    try:
      if action == "upsert":
        store.upsert(
          [Document(i, f"{i} version {version + step}") for i in ids],
          np.full((len(ids), 2, 8), version + step, np.float32),
        )
      elif action == "delete":
        store.delete(ids)
      else:
        store.compact(segment_size=7)
      note("done")
    except (StoreError, OSError):
      note("failed")


def content_of(folder: pathlib.Path) -> dict[str, int]:
  """Versions of all documents, from their texts; their memory tokens must be of the same."""
  store = MemoryStore(str(folder))
  versions = {}
  for document, memory in zip(store.documents(), store.memories(), strict=True):
    version = int(document.text.rsplit(" ", 1)[1])
    if (
      document.text != f"{document.id} version {version}"
      or not (memory == version).all()
      or document.id in versions
    ):
      raise BrokenPromiseError(f"{document}: {memory}")
    versions[document.id] = version
  return versions


class Model:
  """What a store may hold: for each id the versions that are possible, None for absence."""

  def __init__(self):
    self.may: dict[str, set] = collections.defaultdict(lambda: {None})

  def follow(self, log: pathlib.Path) -> None:
    """Takes in what a child has noted."""
    begun = None
    for line in log.read_text().splitlines() if log.exists() else []:
      try:
        kind, *values = json.loads(line)
      except json.JSONDecodeError:  # cut by the limit; the child ended there
        break
      if kind == "begin":
        begun = values
        continue
      if begun and begun[0] != "compact":
        self._take(begun, sure=kind == "done")
      begun = None
    if begun and begun[0] != "compact":
      self._take(begun, sure=False)

  def _take(self, begun, sure):
    action, ids, version = begun
    for i in ids:
      new = None if action == "delete" else version
      self.may[i] = {new} if sure else self.may[i] | {new}

  def check(self, versions: dict[str, int]) -> None:
    """Raises where something else is there; then that is what is known."""
    for i in {*self.may, *versions}:
      if versions.get(i) not in self.may[i]:
        raise BrokenPromiseError(f"{i}: version {versions.get(i)}, expected one of {self.may[i]}")
      self.may[i] = {versions.get(i)}


def store_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """A store that lives through all faults but damage, of which copies of it are the victims."""
  folder, copy, model, counts = scratch / "store", scratch / "copy", Model(), collections.Counter()
  MemoryStore(str(folder), MANIFEST).close()
  for number in range(faults):
    kind, logs = (
      rng.choice(("kill", "kill", "full disk", "two writers", "clock", "damage", "damage")),
      [],
    )
    counts[kind] += 1

    def start(writer, number=number, logs=logs, **options):
      logs.append(scratch / f"log-{number}-{writer}")
      arguments = (
        str(folder),
        str(logs[-1]),
        writer,
        rng.random(),
        10 * number,
        options.pop("limit", None),
        options.pop("clock", None),
      )
      return child(store_work, *arguments, **options)

    if kind == "kill":
      start(0, kill_after=rng.uniform(0, 0.12))
    elif kind == "full disk":
      start(0, limit=rng.randrange(0, 40_000))
    elif kind == "clock":
      start(0, clock=number)
    elif kind == "two writers":
      first = start(0, wait=False)
      start(1, **({"kill_after": rng.uniform(0, 0.12)} if rng.random() < 0.5 else {}))
      first.join()
    else:
      # The next writer enters what a kill left without an entry; it was not acknowledged.
      MemoryStore(str(folder), MANIFEST).close()
      before = content_of(folder)
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(folder, copy)
      how = damaged(copy, rng)
      try:
        if content_of(copy) != before:
          raise BrokenPromiseError(how)
        MemoryStore(str(copy)).verify()
        counts["damage: harmless"] += 1
      except StoreError:
        counts["damage: named"] += 1
      continue
    for log in logs:
      model.follow(log)
      log.unlink(missing_ok=True)
    model.check(content_of(folder))
    MemoryStore(str(folder)).verify()
  return counts


# ---- index ---------------------------------------------------------------------------------------


def index_work(folder: str, seed: int, limit: int | None = None) -> None:
  """Changes the store, and brings its index up to date."""
  from clara_jax.retrieval import index

  rng = np.random.default_rng(seed)
  store = MemoryStore(folder)
  ids = [f"d{n}" for n in rng.integers(0, 60, 5)]
  with contextlib.suppress(StoreError):
    store.upsert(
      [Document(i, i) for i in dict.fromkeys(ids)],
      rng.normal(size=(len(set(ids)), 2, 8)).astype(np.float32),
    )
  faulty(limit, None)
  with contextlib.suppress(StoreError, OSError):
    index.update(store, "exact", 6)


def index_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """An index that is loaded finds what an index built afresh finds."""
  from clara_jax.retrieval import index
  from clara_jax.retrieval.base import unit_vectors

  folder, copy, counts = scratch / "indexed", scratch / "copy", collections.Counter()
  numbers = np.random.default_rng(0).normal(size=(60, 2, 8)).astype(np.float32)
  store = MemoryStore(str(folder), MANIFEST)
  store.append([Document(f"d{n}", f"d{n}") for n in range(60)], numbers)
  store.close()
  index.update(MemoryStore(str(folder)), "exact", 6)
  queries = unit_vectors(numbers[:4])

  def check(where):
    opened = MemoryStore(str(where))
    try:
      loaded = index.load(opened)
    except index.MissingIndexError:
      return "named"
    rows, _ = loaded.search(queries, 3)
    expected, _ = index.build(opened, "exact", 6).search(queries, 3)
    if not np.array_equal(loaded.rows, opened.rows) or not np.array_equal(rows, expected):
      raise BrokenPromiseError(f"{rows}, expected {expected}")
    return "right"

  for number in range(faults):
    kind = rng.choice(
      ("kill", "full disk", "damage", "damage", "damage", "damage", "damage", "damage")
    )
    counts[kind] += 1
    if kind == "kill":
      child(index_work, str(folder), number, kill_after=rng.uniform(0, 1.5))
    elif kind == "full disk":
      child(index_work, str(folder), number, rng.randrange(0, 3000))
    else:
      index.update(MemoryStore(str(folder)), "exact", 6) if index.state(
        MemoryStore(str(folder))
      ) != "current" else None
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(folder, copy)
      damaged(copy / "index", rng)
      counts[f"damage: {check(copy)}"] += 1
      continue
    counts[f"{kind}: {check(folder)}"] += 1
  return counts


# ---- checkpoints ---------------------------------------------------------------------------------


def checkpoints_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """Steps of a run are named as damaged, or are what was saved; every fortieth time the run itself
  goes on, to the same end."""
  import jax

  from clara_jax.checkpoints.workdir import Checkpointer, CheckpointError
  from clara_jax.testing import tiny
  from clara_jax.training import trainer

  config = tiny.run_config(
    "contrastive", steps=4, checkpoint_every=1, keep_checkpoints=9, log_every=4
  )

  def run(where, **options):
    return trainer.Trainer(
      config,
      tiny.prompt_tokenizer(),
      tiny.weights(),
      tiny.rows("contrastive"),
      workdir=str(where),
      progress=False,
      **options,
    ).run()

  def same(a, b):
    return all(
      np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

  end, counts = run(scratch / "straight").weights, collections.Counter()
  run(scratch / "run", stop_at=3)
  before = Checkpointer(str(scratch / "run"), read_only=True).weights()
  for number in range(faults):
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(scratch / "run", copy)
    how = damaged(copy, rng, lambda file: "checkpoints/3" in str(file))
    counts[how.split()[0]] += 1
    try:
      if not same(Checkpointer(str(copy), read_only=True).weights(), before):
        raise BrokenPromiseError(how)
      counts["harmless"] += 1
    except (CheckpointError, FileNotFoundError):
      counts["named"] += 1
    if number % 40 == 0:
      counts["gone on"] += 1
      if not same(run(copy).weights, end):
        raise BrokenPromiseError(f"{how}: another end")
  return counts


# ---- factory -------------------------------------------------------------------------------------


def _documents(count: int):
  world = _world()
  pages = [p for side in (False, True) for p in world.side(side)][:count]
  return [(f"p{i}", Document(f"p{i}", world.document(page))) for i, page in enumerate(pages)]


def _world():
  from clara_jax.experiments.world import World

  return World(Sizes().world)


class _Slow(offline_backend.Offline):
  """Takes as long as a quick server."""

  async def chat(self, messages, **options):
    await asyncio.sleep(0.001)
    return await super().chat(messages, **options)


def factory_work(folder: str, limit: int | None = None) -> None:
  """The factory over all documents."""
  sys.stderr = open(os.devnull, "w")
  items, model = (
    _documents(12),
    _Slow(_world(), offline_backend.Faults(wrong_answer=0.2, missing_fact=0.3, broken_json=0.1)),
  )
  faulty(limit, None)
  with contextlib.suppress(OSError):
    asyncio.run(
      factory.produce(
        iter(items), rounds.scp, model, templates.Templates(), folder, progress=False, at_once=4
      )
    )


def factory_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """Whatever happens to a journal, the next starts come to the rows of a straight run, each
  once."""
  counts = collections.Counter()
  child(factory_work, str(scratch / "straight"))
  name = "journal-00000-of-00001.jsonl"
  expected = dict(journal.outcomes(str(scratch / "straight" / name)))
  folder, number = scratch / "factory", 0
  while number < faults:
    shutil.rmtree(folder, ignore_errors=True)
    for _ in range(min(faults - number, rng.randint(5, 15))):
      number += 1
      kind = rng.choice(("kill", "full disk", "damage", "damage", "damage"))
      counts[kind] += 1
      path = folder / name
      if kind == "kill":
        child(factory_work, str(folder), kill_after=rng.uniform(0.2, 1.2))
      elif kind == "full disk":
        child(factory_work, str(folder), rng.randrange(0, 60_000))
      elif path.exists() and path.stat().st_size:
        content = bytearray(path.read_bytes())
        place, what = rng.randrange(len(content)), rng.choice(("flip", "NUL", "cut", "gap"))
        if what == "flip":
          content[place] ^= 1 << rng.randrange(8)
        elif what == "NUL":
          content[place : place + 200] = b"\0" * 200
        else:
          del content[place : place + 200 if what == "gap" else None]
        path.write_bytes(content)
      if path.exists():
        outcomes = list(journal.outcomes(str(path)))
        if len(dict(outcomes)) < len(outcomes) or any(
          expected[d] != outcome for d, outcome in outcomes
        ):
          raise BrokenPromiseError(kind)
    child(factory_work, str(folder))
    counts["ended"] += 1
    if dict(journal.outcomes(str(folder / name))) != expected:
      raise BrokenPromiseError("another end")
    rows = [
      json.loads(line)["id"]
      for line in (folder / "rows-00000-of-00001.jsonl").read_text().splitlines()
    ]
    if len(set(rows)) < len(rows) or len(rows) != sum(len(o["rows"]) for o in expected.values()):
      raise BrokenPromiseError("rows twice, or missing")
  return counts


# ---- server --------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(scratch: pathlib.Path):
  """A server on loopback: its port, a question, and what is answered to it."""
  from clara_jax.inference.answer import Answerer
  from clara_jax.inference.compress import compress_corpus
  from clara_jax.model import Clara
  from clara_jax.retrieval import index
  from clara_jax.serving import server
  from clara_jax.testing import tiny

  documents = [Document(d["id"], d["text"], d["title"]) for d in tiny.world().documents(False)[:20]]
  model, prompt_tokenizer, weights = Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()
  compress_corpus(
    Checkpoint(model, prompt_tokenizer, weights),
    documents,
    str(scratch / "served"),
    bucket=64,
    progress=False,
  )
  store = MemoryStore(str(scratch / "served"))
  answerer = Answerer(
    Checkpoint(model, prompt_tokenizer, weights),
    store,
    index=index.build(store, "exact"),
    max_new_tokens=6,
  )
  question = next(iter(tiny.world().question_rows(1)))["question"]
  expected = answerer.answer([question])[0]
  limits = server.Limits(batch=32, read_seconds=5.0)
  app = server.make_app(answerer, limits)
  app.state.service.warm_up()
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    running = server.configured(app, limits)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started:
      time.sleep(0.01)
    yield listener.getsockname()[1], question, expected.answer
    running.should_exit = True
    thread.join()


def honest(port: int, question: str, expected: str) -> float:
  """Seconds of one right answer."""
  import httpx

  start = time.monotonic()
  response = httpx.post(f"http://127.0.0.1:{port}/answer", json={"question": question}, timeout=60)
  if response.status_code != 200 or response.json()["answer"] != expected:
    raise BrokenPromiseError(f"{response.status_code}: {response.text[:200]}")
  return time.monotonic() - start


def bad_client(port: int, seed: int) -> str:
  """One client that does what it should not."""
  rng = random.Random(seed)
  body = json.dumps({"question": "Who is it?"}).encode()
  head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
  kind = rng.choice(
    (
      "garbage",
      "half a head",
      "half a body",
      "reset",
      "a wrong length",
      "deep",
      "many heads",
      "chunks",
      "odd values",
      "a huge body",
    )
  )
  with (
    contextlib.suppress(OSError),
    socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
  ):
    if kind == "garbage":
      connection.sendall(rng.randbytes(rng.randrange(1, 5000)))
    elif kind == "half a head":
      connection.sendall(head[: rng.randrange(len(head))])
    elif kind == "half a body":
      connection.sendall(
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body[: rng.randrange(len(body))]
      )
    elif kind == "reset":
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
      connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    elif kind == "a wrong length":
      connection.sendall(head + b"Content-Length: %d\r\n\r\n" % rng.choice((0, 3, 10**12)) + body)
    elif kind == "deep":
      deep = b"[" * 100_000
      connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(deep) + deep)
    elif kind == "many heads":
      connection.sendall(head + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(300)))
    elif kind == "chunks":
      connection.sendall(
        head
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + rng.choice((b"zz\r\n", b"5\r\nab", b"ffffffff\r\n" + b"x" * 9999))
      )
    elif kind == "odd values":
      odd = json.dumps(
        {
          "question": rng.choice(("x" * 10**6, "\x00", 7, None, ["a"])),
          "k": rng.choice((0, -1, 1e39, "3")),
        }
      ).encode()
      connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(odd) + odd)
    else:
      connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (60 << 20) + b" " * (1 << 20))
    if rng.random() < 0.5:
      connection.settimeout(0.2)
      connection.recv(1000)
  return kind


def server_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """After each bad client an honest one is answered right."""
  counts = collections.Counter()
  with served(scratch) as service:
    for _ in range(faults):
      counts[bad_client(service[0], rng.random())] += 1
      honest(*service)
  return counts


def crowd_part(scratch: pathlib.Path, faults: int, rng: random.Random) -> collections.Counter:
  """500 silent connections, 50 slow bodies, 20 bodies of 60 MB beside 32 honest clients: their 99th
  percentile, alone and then."""
  del faults, rng

  def percentile(service, requests=10):
    seconds, wrong = [], []

    def client():
      for _ in range(requests):
        try:
          seconds.append(honest(*service))
        except Exception as error:
          wrong.append(error)

    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    if wrong:
      raise BrokenPromiseError(f"{len(wrong)} honest clients: {wrong[0]}")
    return float(np.percentile(seconds, 99))

  def memory():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) // 1024

  with served(scratch) as service:
    port, over = service[0], threading.Event()
    percentile(service, 3)
    alone, before = percentile(service), memory()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(500)]

    def slow():
      with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port)) as connection,
      ):
        connection.sendall(
          b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
          b"application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        while not over.wait(0.5):
          connection.sendall(b" ")

    threads = [threading.Thread(target=slow) for _ in range(50)]
    # Not in this process: it would share its lock.
    crowd = CHILDREN.Process(target=_huge_bodies, args=(port, 20))
    for thread in threads:
      thread.start()
    crowd.start()
    time.sleep(1)
    crowded, most = percentile(service), memory()
    over.set()
    crowd.kill()
    for connection in silent:
      connection.close()
    for thread in threads:
      thread.join()
  measurements = collections.Counter(
    {
      "p99 alone, ms": round(1e3 * alone),
      "p99 crowded, ms": round(1e3 * crowded),
      "MiB before": before,
      "MiB after": most,
    }
  )
  if crowded > 3 * alone or most > before + 100:
    raise BrokenPromiseError(dict(measurements))
  return measurements


def _huge_bodies(port: int, count: int) -> None:
  body = b'{"queries": [[' + b"0.5," * (15 << 20) + b'0]], "k": 1}'
  head = (
    b"POST /queries HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
    b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
  )

  def one():
    while True:
      with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port)) as connection,
      ):
        connection.sendall(head)
        connection.sendall(body)
      time.sleep(0.2)

  threads = [threading.Thread(target=one) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


PARTS = {
  "store": store_part,
  "index": index_part,
  "checkpoints": checkpoints_part,
  "factory": factory_part,
  "server": server_part,
  "crowd": crowd_part,
}


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--scratch", required=True, metavar="DIR")
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--faults", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  configure_logging()
  report, broken = {}, False
  for name in options.parts:
    scratch = pathlib.Path(options.scratch, name)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    start = time.monotonic()
    try:
      report[name] = dict(
        PARTS[name](scratch, options.faults, random.Random(f"{options.seed} {name}"))
      )
    except (BrokenPromiseError, StoreError) as error:
      report[name], broken = {"broken": f"{type(error).__name__}: {error}"}, True
    report[name]["seconds"] = round(time.monotonic() - start)
    print(f"{name}: {report[name]}", file=sys.stderr, flush=True)
  print(json.dumps(report, indent=2))
  sys.exit(broken)


if __name__ == "__main__":
  main()
