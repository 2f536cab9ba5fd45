"""The data factory against a real HTTP server that has faults: what is accepted is right and
complete, kills lose nothing, how fast it is.

    python benchmarks/synthesis.py --scratch DIR [faults kills throughput memory]
    python benchmarks/synthesis.py --scratch DIR --passages F tokens
    python benchmarks/synthesis.py --scratch DIR --workdir quickstart training

The server is another process on loopback and plays the model (`experiments/offline_backend.py`) for
a generated world: 5 % of its replies are 429, 2 % 500, 2 % hang, 5 % broken JSON; 10 % of its
answers are wrong, 20 % of the facts are left out. Prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

from clara_jax.data.schemas import write_rows
from clara_jax.experiments.offline_backend import Faults, Offline
from clara_jax.experiments.world import World, WorldConfig
from clara_jax.synthesis import factory

WORLD = WorldConfig(
  level=2,
  kinds=("person",),
  people=1_000,
  first_names=60,
  last_names=60,
  relations=6,
  pages=2,
  wordings=2,
  sentences=1,
)
FAULTS = Faults(wrong_answer=0.10, missing_fact=0.20, broken_json=0.05)
REFUSED, FAILED, HANGS = 0.05, 0.02, 0.02
TASKS = ("faults", "kills", "throughput", "memory")


def serve(port: int, moods: bool, delay: float) -> None:
  """The server; with `moods` it has faults, and a log of what it answered goes to standard
  output."""
  from aiohttp import web

  model = Offline(World(WORLD), FAULTS if moods else Faults())
  seen: dict[str, int] = {}

  async def chat(request):
    raw = await request.read()
    body = json.loads(raw)
    if moods:
      key = hashlib.blake2b(raw, digest_size=8).hexdigest()
      seen[key] = seen.get(key, 0) + 1
      draw = random.Random(f"{key} {seen[key]}").random()
      if draw < REFUSED:
        return web.Response(status=429)
      if draw < REFUSED + FAILED:
        return web.Response(status=500)
      if draw < REFUSED + FAILED + HANGS:
        await asyncio.sleep(3600)
    if delay:
      await asyncio.sleep(delay)
    name = body["response_format"]["json_schema"]["name"]
    text = model.reply(body["messages"], name, body["seed"])
    print(hashlib.blake2b(raw, digest_size=8).hexdigest(), flush=True)
    return web.json_response(
      {
        "choices": [{"message": {"content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
      }
    )

  app = web.Application(client_max_size=2**22)
  app.router.add_post("/v1/chat/completions", chat)
  web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


@contextlib.contextmanager
def server(port: int, moods: bool, delay: float, log: pathlib.Path):
  """The server as a process."""
  with open(log, "wb") as file:
    process = subprocess.Popen(
      [
        sys.executable,
        __file__,
        "--serve",
        str(port),
        "--delay",
        str(delay),
        *(["--moods"] if moods else []),
      ],
      stdout=file,
    )
    try:
      time.sleep(6)
      yield f"http://127.0.0.1:{port}/v1"
    finally:
      process.kill()
      process.wait()


def command(url: str, documents: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  """`clara synthesize`."""
  return [
    sys.executable,
    "-m",
    "clara_jax",
    "synthesize",
    "--json",
    "--documents",
    str(documents),
    "--out",
    str(out),
    "--endpoint",
    url,
    "--model",
    "offline",
    "--timeout",
    "2",
    *more,
  ]


def rows(out: pathlib.Path) -> list[dict]:
  """What was accepted."""
  return [
    json.loads(line)
    for path in sorted(out.glob("rows-*.jsonl"))
    for line in path.read_text().splitlines()
  ]


def judged(accepted: list[dict]) -> dict:
  """Accepted rows by the world's own truth."""
  truth = Offline(World(WORLD))
  right = pairs = 0
  covered, facts = set(), 0
  for row in accepted:
    document = row["docs"][0]
    page = truth.page(document)
    if row["kind"] == "paraphrase":
      right += all(page.entity.facts[r] in row["answer"] for r in page.relations)
      pairs += 1
      continue
    asked_relations = set()
    for question, answer in zip(row["question"], row["answers"], strict=True):
      right += truth.truth(question, document) == answer
      pairs += 1
      asked_relations |= truth.relations(question, document)
    facts += len(page.relations)
    covered |= {(row["kind"], document, r) for r in asked_relations}
  return {
    "pairs_and_paraphrases": pairs,
    "precision": right / pairs,
    "coverage": len(covered) / facts,
  }


def faults(scratch: pathlib.Path, documents: pathlib.Path) -> dict:
  """A whole run."""
  out = scratch / "faults"
  with server(8801, True, 0.0, scratch / "faults.log") as url:
    done = subprocess.run(
      command(url, documents, out), stdout=subprocess.PIPE, text=True, check=True
    )
  report = json.loads(done.stdout)
  total = len(documents.read_text().splitlines())
  outcomes = report["accepted"] + report["rejected"]
  most = max(outcome["rounds"] for _, outcome in factory.outcomes(str(out)))
  return {
    "documents": total,
    "ended": outcomes,
    "most_rounds": most,
    **{
      k: report[k]
      for k in (
        "accepted",
        "rejected",
        "reasons",
        "refused",
        "rounds",
        "requests",
        "requests_a_document",
        "seconds",
      )
    },
    **judged(rows(out)),
  }


def kills(scratch: pathlib.Path, documents: pathlib.Path, count: int) -> dict:
  """The same with SIGKILLs; the server is told twice about what was in flight only."""
  out, rng = scratch / "kills", random.Random(0)
  log = scratch / "kills.log"
  with server(8802, True, 0.0, log) as url:
    killed = 0
    while True:
      process = subprocess.Popen(command(url, documents, out), stdout=subprocess.PIPE, text=True)
      try:
        process.communicate(timeout=rng.uniform(5, 7) if killed < count else None)
        break
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        killed += 1
  answered = log.read_text().split()
  whole = {json.dumps(r, sort_keys=True) for r in rows(scratch / "faults")}
  row_lines = [json.dumps(r, sort_keys=True) for r in rows(out)]
  return {
    "kills": killed,
    "rows": len(row_lines),
    "twice": len(row_lines) - len(set(row_lines)),
    "same_as_without": set(row_lines) == whole,
    "answered_twice": len(answered) - len(set(answered)),
    "wasted_a_kill": (len(answered) - len(set(answered))) / max(1, killed),
  }


def throughput(scratch: pathlib.Path) -> dict:
  """Requests a second of the client alone at 64 in flight, with a server that takes 50 ms."""
  from clara_jax.synthesis.client import Client, Endpoint
  from clara_jax.synthesis.rounds import SCHEMAS
  from clara_jax.synthesis.templates import Templates

  message = Templates().messages("simple_questions", document="nothing")

  async def run(url, count):
    async with Client(Endpoint(url, "offline", in_flight=64)) as client:
      queue = iter(range(count))

      async def worker():
        for i in queue:
          await client.chat(message, schema=SCHEMAS["questions"], name="questions", seed=i)

      await asyncio.gather(*(worker() for _ in range(64)))

  with server(8803, False, 0.05, scratch / "throughput.log") as url:
    asyncio.run(run(url, 500))
    start = time.perf_counter()
    asyncio.run(run(url, 10_000))
    rate = 10_000 / (time.perf_counter() - start)
  return {"in_flight": 64, "requests_per_second": rate, "share_of_the_limit": rate / (64 / 0.05)}


def memory(scratch: pathlib.Path, count: int) -> dict:
  """Resident memory of one process over many documents."""
  documents = scratch / "many.jsonl"
  texts = [d["text"] for d in World(WORLD).documents(False)]
  write_rows(({"id": str(i), "text": texts[i % len(texts)]} for i in range(count)), str(documents))
  code = (
    "import asyncio, itertools, json, resource, sys\n"
    "from clara_jax.experiments.world import World\n"
    "from clara_jax.data.schemas import read_documents\n"
    "from clara_jax.synthesis import factory, rounds, templates\n"
    "from clara_jax.experiments.offline_backend import Offline\nsys.path.insert(0, "
    "sys.argv[3])\nfrom synthesis import WORLD\n"
    "seen = []\n"
    "def items():\n"
    "  for n, d in enumerate(read_documents(sys.argv[1])):\n"
    "    if n % int(sys.argv[4]) == 0: "
    "seen.append(int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6)\n"
    "    yield d.id, d\n"
    "work = factory.produce(items(), rounds.scp, Offline(World(WORLD)), templates.Templates(), "
    "sys.argv[2], progress=False)\n"
    "r = asyncio.run(work)\n"
    "print(json.dumps({'megabytes': seen, 'accepted': r.accepted, 'seconds': r.seconds}))\n"
  )
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      code,
      str(documents),
      str(scratch / "many"),
      str(pathlib.Path(__file__).parent),
      str(count // 10),
    ],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def training(scratch: pathlib.Path, workdir: str) -> dict:
  """The quickstart's scp stage from the factory's rows, beside the same from the world's own: exact
  answers on unseen people."""
  import itertools

  from clara_jax.checkpoints import formats
  from clara_jax.config import RunConfig
  from clara_jax.data import schemas
  from clara_jax.evaluation import evaluator
  from clara_jax.experiments.quickstart import recipe
  from clara_jax.synthesis import rounds, templates
  from clara_jax.training import trainer

  world = World(recipe.Sizes().world)
  documents = [schemas.Document(d["id"], d["text"]) for d in world.documents(False)]
  factory_report = asyncio.run(
    factory.produce(
      ((d.id, d) for d in documents),
      rounds.scp,
      Offline(world, FAULTS),
      templates.Templates(),
      str(scratch / "quickstart"),
    )
  )
  before = formats.load(f"{workdir}/stages/pretrain")
  data, train = recipe._stage("scp", recipe.Sizes(), 0)
  results = {"documents": len(documents), "accepted": factory_report.accepted}
  test = [schemas.parse_row(r, "test") for r in world.question_rows(1, True, 500)]
  for name, rows_ in (
    ("factory", rows(scratch / "quickstart")),
    ("world", world.scp_rows(versions=1, complex_share=0.0)),
  ):
    parsed = [
      schemas.parse_row(r, name) for r in itertools.chain(rows_, world.lookup_rows(versions=1))
    ]
    where = str(scratch / f"scp_{name}")
    config = RunConfig(
      before.model.config,
      data,
      train,
      base=f"{workdir}/stages/pretrain",
      init_from=f"{workdir}/stages/pretrain",
    )
    trainer.Trainer(
      config,
      before.prompt_tokenizer,
      before.weights,
      parsed,
      workdir=where,
      base_sha256=before.base_sha256,
    ).run()
    after = formats.load(where)
    results[name] = evaluator.evaluate(
      after, test, "compressor", batch_size=100, max_new_tokens=4, progress=False
    ).scores["em"]
  return results


def tokens(passages: str, rounds: float = 1.5, attempts: float = 1.2) -> dict:
  """Tokens of a document's requests: prompts rendered for real passages (4 tokens for 3 words) with
  as many pairs as the paper had, 7.8 simple and 4.6 complex ones, and so many rounds and
  paraphrases on average."""
  import itertools
  import statistics

  from clara_jax.data.schemas import read_documents
  from clara_jax.synthesis.templates import Templates

  prompt_templates = Templates()

  def prompt(name, **values):
    return sum(len(m["content"].split()) for m in prompt_templates.messages(name, **values)) * 4 / 3

  sent, received = [], []
  for document in itertools.islice(read_documents(passages), 500):
    text = f"{document.title}\n{document.text}"
    total = answered = 0.0
    for kind, count, words in (("simple", 7.8, (12, 3)), ("complex", 4.6, (22, 5))):
      pair = ("word " * words[0], "word " * words[1])
      pairs = [pair] * round(count)
      again = prompt("answers", document=text, questions=[q for q, _ in pairs])
      again += prompt("check", document=text, kept=[], pairs=pairs, kind=kind)
      total += (
        prompt(f"{kind}_questions", document=text)
        + again
        + prompt("verdict", document=text, pairs=pairs, kind=kind)
      )
      total += (rounds - 1) * (
        prompt(f"{kind}_supplement", document=text, pairs=pairs, missing=["word " * 8]) + again
      )
      answered += (count * sum(words) + 60) * 4 / 3
    total += attempts * (
      prompt("paraphrase", document=text, problems=[])
      + prompt("paraphrase_check", document=text, paraphrase=text)
    )
    sent.append(total)
    received.append(answered + attempts * (len(text.split()) + 20) * 4 / 3)
  return {
    "passages": len(sent),
    "prompt_tokens": statistics.mean(sent),
    "reply_tokens": statistics.mean(received),
  }


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "tasks",
    nargs="*",
    metavar="TASK",
    help=f"of {', '.join(TASKS)}; default: all (kills compares with faults)",
  )
  parser.add_argument("--scratch", type=pathlib.Path, metavar="DIR")
  parser.add_argument("--documents", type=int, default=2_000)
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--workdir", metavar="DIR", help="of a finished quickstart, for `training`")
  parser.add_argument("--passages", metavar="F", help="documents of `tokens`")
  parser.add_argument("--memory", type=int, default=100_000, help="documents of that study")
  parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--moods", action="store_true", help=argparse.SUPPRESS)
  parser.add_argument("--delay", type=float, default=0.0, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.serve:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    serve(options.serve, options.moods, options.delay)
    return
  options.scratch.mkdir(parents=True, exist_ok=True)
  documents = options.scratch / "documents.jsonl"
  world = World(WORLD)
  write_rows([*world.documents(False), *world.documents(True)][: options.documents], str(documents))
  report = {"cores": os.cpu_count(), "faults_of_the_server": dataclasses.asdict(FAULTS)}
  for task in options.tasks or TASKS:
    more = {
      "faults": (documents,),
      "kills": (documents, options.kills),
      "memory": (options.memory,),
      "training": (options.workdir,),
    }.get(task, ())
    report[task] = (
      tokens(options.passages) if task == "tokens" else globals()[task](options.scratch, *more)
    )
    print(task, report[task], file=sys.stderr, flush=True)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
