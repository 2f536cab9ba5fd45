"""64 clients on one server: every answer checked, latencies and requests a second, one by one and
in shared passes.

    clara quickstart --workdir quickstart && python benchmarks/serving.py --workdir quickstart

Clients mix short and long questions, 1 to 3 documents, whole and streamed answers. Client and
server share the machine. `--path /v1/chat/completions` asks as chat clients do. Prints one JSON
object.
"""

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np

from clara_jax.checkpoints import formats
from clara_jax.experiments.quickstart.recipe import Sizes
from clara_jax.experiments.world import World
from clara_jax.inference.answer import Answerer, Question
from clara_jax.memory.store import MemoryStore

PORT = 5017
FILLERS = ("", "Please tell me. ", "Please tell me. Please tell me. ")


def expected(workdir: str, questions: int) -> list[tuple[dict, str, list[str]]]:
  """Requests with their right answers and documents, made without a server."""
  checkpoint = formats.load(os.path.join(workdir, "stages", "joint"))
  store = MemoryStore(os.path.join(workdir, "store"))
  answerer = Answerer(checkpoint, store, max_new_tokens=4)
  rng = random.Random(0)
  requests = []
  for row in World(Sizes().world).question_rows(1, True, questions):
    requests.append(
      {
        "question": rng.choice(FILLERS) + row["question"],
        "k": rng.choice((1, 2, 3)),
        "stream": rng.random() < 0.25,
      }
    )
  expectations = []
  for start in range(0, len(requests), 32):
    batch = requests[start : start + 32]
    for request, answer in zip(
      batch, answerer.answer([Question(r["question"], r["k"]) for r in batch]), strict=True
    ):
      expectations.append((request, answer.answer, [d.id for d in answer.documents]))
  return expectations


def sent(path: str, request: dict) -> dict:
  """A request's body."""
  if path == "/answer":
    return request
  messages = [{"role": "user", "content": request["question"]}]
  more = {"k": request["k"], "stream": request["stream"], "citations": False}
  return {"model": "clara", "messages": messages, **more}


def received(path: str, text: str) -> tuple[str, list[str]]:
  """(answer, ids of its documents) of a response, streamed or not."""
  if path == "/answer":
    got = json.loads(text.splitlines()[-1])
    return got["answer"], [d["id"] for d in got["documents"]]
  if not text.startswith("data: "):
    got = json.loads(text)
    return got["choices"][0]["message"]["content"], [d["id"] for d in got["documents"]]
  events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
  content = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
  return content, [d["id"] for d in events[-1]["documents"]]


def client(path: str, requests: list, rng: random.Random, until: float, log: dict) -> None:
  """One request after the other on one connection."""
  connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
  while time.monotonic() < until:
    request, answer, documents = rng.choice(requests)
    body, start = json.dumps(sent(path, request)), time.monotonic()
    try:
      connection.request("POST", path, body, {"Content-Type": "application/json"})
      response = connection.getresponse()
      text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
      log["errors"].append(repr(error))
      connection.close()
      continue
    log["seconds"].append(time.monotonic() - start)
    if response.status != 200:
      log["errors"].append(text)
      continue
    if received(path, text) != (answer, documents):
      log["wrong"].append((request, answer, text))


def load(path: str, requests: list, clients: int, seconds: float) -> dict:
  """All clients at once, each in a thread."""
  log: dict = {"seconds": [], "errors": [], "wrong": []}
  until = time.monotonic() + seconds
  threads = [
    threading.Thread(target=client, args=(path, requests, random.Random(i), until, log))
    for i in range(clients)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  took = np.array(log["seconds"])
  return {
    "requests": len(took),
    "requests_per_second": round(len(took) / seconds, 1),
    "errors": len(log["errors"]),
    "wrong_answers": len(log["wrong"]),
    "p50_ms": round(1e3 * float(np.percentile(took, 50)), 1),
    "p99_ms": round(1e3 * float(np.percentile(took, 99)), 1),
    "examples": log["errors"][:2] + log["wrong"][:2],
  }


def served(workdir: str, batch: int):
  """`clara serve`, ready."""
  checkpoint, store = os.path.join(workdir, "stages", "joint"), os.path.join(workdir, "store")
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "clara_jax",
      "serve",
      "--checkpoint",
      checkpoint,
      "--store",
      store,
      "--port",
      str(PORT),
      "--max-batch",
      str(batch),
      "--max-new-tokens",
      "4",
    ]
  )
  while True:
    try:
      if httpx.get(f"http://127.0.0.1:{PORT}/healthz").status_code == 200:
        return process
      time.sleep(0.2)
    except httpx.TransportError:
      if process.poll() is not None:
        raise SystemExit("the server did not start") from None
      time.sleep(0.2)


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", required=True, help="of clara quickstart")
  parser.add_argument("--path", default="/answer", choices=("/answer", "/v1/chat/completions"))
  parser.add_argument("--seconds", type=float, default=60)
  parser.add_argument("--clients", type=int, default=64)
  options = parser.parse_args()
  requests = expected(options.workdir, 300)
  report = {"clients": options.clients, "seconds": options.seconds, "cores": os.cpu_count()}
  for batch in (1, 32):
    process = served(options.workdir, batch)
    load(
      options.path, requests, options.clients, 15
    )  # shapes that come up now and then are compiled
    report[f"batch {batch}"] = load(options.path, requests, options.clients, options.seconds)
    alone = load(options.path, requests, 1, 5)
    report[f"batch {batch}"]["alone_p50_ms"] = alone["p50_ms"]
    process.send_signal(signal.SIGTERM)
    report[f"batch {batch}"]["exit_status"] = process.wait()
    print(report, file=sys.stderr, flush=True)
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  main()
