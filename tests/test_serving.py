"""The server: right answers to everybody, clear refusals, nothing lost at the end."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clara_jax.config import ConfigError
from clara_jax.inference.answer import Answerer, Question
from clara_jax.retrieval import base
from clara_jax.serving import guard, schema, server
from tests.helpers import free_port, question, running

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def client(answerer):
  with running(answerer, server.Limits(batch=4)) as (client, _):
    yield client


def test_answers_are_those_of_the_command(client, answerer):
  expected = answerer.answer([question()])[0]
  given_ = client.post("/answer", json={"question": question()}).json()
  assert given_["answer"] == expected.answer and given_["question"] == question()
  assert [d["id"] for d in given_["documents"]] == [d.id for d in expected.documents]
  assert given_["memory_tokens"] == 2 and given_["documents"][0]["tokens"] > 2
  assert set(given_["timings_ms"]) == {"encode", "search", "generate"}
  one = client.post(
    "/answer",
    json={"question": question(), "k": 1, "max_new_tokens": 1, "ids": [expected.documents[1].id]},
  ).json()
  assert [d["id"] for d in one["documents"]] == [expected.documents[1].id]


def test_what_is_shared_is_read_once(answerer):
  """Several questions over the same documents, and a generator that is merged into the base, answer
  as one question does alone."""
  merged = Answerer(
    answerer.checkpoint, answerer.store, index=answerer._index, max_new_tokens=6, merge=True
  )
  ids = tuple(d.id for d in answerer.search([Question(question())])[0])
  requests = [Question(question(i), ids=ids) for i in (0, 1)]
  alone = [answerer.answer([q])[0].answer for q in requests]
  read, lengths = answerer._prefill_prefix, []
  answerer._prefill_prefix = lambda weights, tokens, memories: (
    lengths.append(len(tokens)) or read(weights, tokens, memories)
  )
  together = answerer.answer([dataclasses.replace(q, ids=ids[:1], top_k=1) for q in requests])
  answerer._prefill_prefix = read
  assert len(lengths) == 1  # the instruction was read before, the document for both
  assert [a.answer for a in together] == [
    answerer.answer([dataclasses.replace(q, ids=ids[:1], top_k=1)])[0].answer for q in requests
  ]
  assert (
    [a.answer for a in merged.answer(requests)]
    == [a.answer for a in answerer.answer(requests)]
    == alone
  )


def test_streamed_answers_grow(client):
  whole = client.post("/answer", json={"question": question(3)}).json()
  lines = [
    json.loads(line)
    for line in client.post(
      "/answer", json={"question": question(3), "stream": True}
    ).text.splitlines()
  ]
  assert (
    lines[0]["documents"] == whole["documents"]
    and lines[-1]["done"]
    and lines[-1]["answer"] == whole["answer"]
  )
  texts = [line["answer"] for line in lines[1:]]
  assert len(texts) >= 3 and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))


def test_the_released_protocol(client, answerer):
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(3, 32))
  embeddings = client.post("/queries", json={"queries": queries.tolist(), "k": 4}).json()[
    "retrieved_embeddings"
  ]
  assert np.shape(embeddings) == (3, 4, 32)
  everything = answerer.store.memories().reshape(-1, 32)
  order = np.argsort(-base.unit_vectors(queries) @ base.unit_vectors(everything).T, axis=1)[:, :4]
  np.testing.assert_allclose(embeddings, everything[order], rtol=1e-6)


def test_search_and_lens(client):
  results = client.post("/search", json={"question": question(), "k": 3}).json()
  scores = [d["score"] for d in results["documents"]]
  assert len(scores) == 3 and scores == sorted(scores, reverse=True)
  tokens = client.post("/lens", json={"question": question(), "top": 5}).json()["tokens"]
  assert len(tokens) >= 5 and isinstance(tokens[0][0], str)


def test_everybody_gets_his_own_answer(answerer):
  """Sixteen clients at once, in shared passes, streamed and not."""
  questions = [question(i) for i in range(16)]
  expected = {q: answerer.answer([q])[0] for q in questions}
  wrong = []
  with running(answerer, server.Limits(batch=8, wait_ms=20)) as (client, service):

    def ask(q, stream):
      response = client.post("/answer", json={"question": q, "stream": stream})
      got = json.loads(response.text.splitlines()[-1])
      if (got["question"], got["answer"], got["documents"][0]["id"]) != (
        q,
        expected[q].answer,
        expected[q].documents[0].id,
      ):
        wrong.append(got)

    for _ in range(3):
      threads = [
        threading.Thread(target=ask, args=(q, i % 3 == 0)) for i, q in enumerate(questions)
      ]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
    assert not wrong
    for _ in range(50):  # a request is counted when its last byte is sent
      if 'status="200"} 48.0' in (metrics := client.get("/metrics").text):
        break
      time.sleep(0.1)
    assert (
      'clara_requests_total{path="/answer",status="200"} 48.0' in metrics
      and 'clara_documents{model="clara"} 20.0' in metrics
    )
    passes = float(
      next(
        line.split()[-1]
        for line in metrics.splitlines()
        if line.startswith("clara_batch_size_count")
      )
    )
    assert passes < 48


def test_back_pressure_and_time_outs(answerer):
  with running(answerer, server.Limits(batch=1, waiting=2, seconds=5)) as (client, service):
    release = threading.Event()
    service.devices.submit(release.wait)  # a pass that takes long
    statuses = []

    def ask():
      statuses.append(client.post("/search", json={"question": question()}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
      t.start()
    time.sleep(0.5)
    assert statuses.count(429) >= 4 and 500 not in statuses
    release.set()
    for t in threads:
      t.join()
    assert statuses.count(200) >= 3 and set(statuses) == {200, 429}
    assert client.get("/healthz").status_code == 200
  with running(answerer, server.Limits(seconds=0.2)) as (client, service):
    release = threading.Event()
    service.devices.submit(release.wait)
    late = client.post("/search", json={"question": question()})
    assert late.status_code == 503 and "within 0.2 s" in late.json()["error"]
    release.set()
    service.devices.submit(lambda: None).result()  # the accelerator's thread is free again
  with running(answerer, server.Limits(seconds=60)) as (client, service):
    assert client.post("/search", json={"question": question()}).status_code == 200


BAD = [
  ("/answer", {"question": ""}, 422, "question"),
  ("/answer", {}, 422, "question: Field required"),
  ("/answer", {"question": "q", "k": 0}, 422, "k: "),
  ("/answer", {"question": "q", "k": True}, 422, "k: "),
  ("/answer", {"question": "q", "k": 90}, 422, "k: 90 documents of a store with 20"),
  ("/answer", {"question": "q", "unknown": 1}, 422, "unknown: "),
  ("/answer", {"question": "q", "ids": ["nobody"]}, 422, "none of the 1 ids"),
  ("/answer", {"question": "q", "ids": ["nobody"], "stream": True}, 422, "none of the 1 ids"),
  ("/answer", {"question": "q", "max_new_tokens": 7}, 422, "max_new_tokens: at most 6"),
  ("/answer", {"question": "word " * 500}, 422, "the window decoder_max_length"),
  ("/search", {"question": "q" * 5000}, 422, "question: "),
  (
    "/queries",
    {"queries": [[1.0] * 31], "k": 1},
    422,
    "expected vectors of M·D = 2·16 = 32 numbers",
  ),
  ("/queries", {"queries": [], "k": 1}, 422, "queries: "),
  ("/queries", {"queries": [[1.0] * 32], "k": 21}, 422, "k: 21"),
  ("/answer", [], 422, "body: "),
]


@pytest.mark.parametrize("path, body, status, message", BAD, ids=lambda v: str(v)[:30])
def test_bad_requests(client, path, body, status, message):
  response = client.post(path, json=body)
  assert response.status_code == status and message in response.json()["error"]


def test_bad_bodies_and_paths(client, answerer):
  for content, kind, status in (
    (b"{", "application/json", 400),
    (b"\xff", "application/json", 400),
    (b"{}", "text/plain", 415),
    (b'{"queries": [[NaN]], "k": 1}', "application/json", 400),
  ):
    response = client.post("/queries", content=content, headers={"content-type": kind})
    assert response.status_code == status and response.json()["error"]
  assert (
    client.get("/answer").status_code == 405 and client.get("/../../etc/passwd").status_code == 404
  )
  with running(answerer, server.Limits(body=1000)) as (small, _):
    assert small.post("/answer", json={"question": "q" * 2000}).status_code == 413


_json = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
  ),
  max_leaves=12,
)
_fields = st.fixed_dictionaries(
  {},
  optional={
    "question": _json | st.text(min_size=1, max_size=60),
    "k": _json | st.integers(-2, 200),
    "ids": _json | st.lists(st.text(), max_size=3),
    "queries": _json | st.lists(st.lists(st.floats(), max_size=40), max_size=3),
    "max_new_tokens": _json,
    "stream": _json,
    "top": _json,
  },
)


@settings(
  max_examples=1000,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
  path=st.sampled_from(sorted(schema.ENDPOINTS)), body=_json | _fields | st.binary(max_size=200)
)
def test_a_thousand_odd_requests(client, path, body):
  """Whatever comes: an answer or a clear refusal, never a fault of the server."""
  content = body if isinstance(body, bytes) else json.dumps(body).encode()
  response = client.post(path, content=content, headers={"content-type": "application/json"})
  assert response.status_code == 200 or (
    400 <= response.status_code < 500 and response.json()["error"]
  ), (response.status_code, body)


HOSTS = {
  "127.0.0.1:5004": True,
  "localhost": True,
  "LOCALHOST:1": True,
  "[::1]:80": True,
  "10.1.2.3": True,
  socket.gethostname(): True,
  "evil.example": False,
  "localhost.evil.example": False,
  "127.0.0.1.evil.example": False,
  "": False,
  "api.mine.example:443": True,
  "mine.example": False,
  "notmine.example": False,
  "other.example.": True,
}


def test_only_the_names_of_the_server_are_answered(answerer):
  with running(answerer, server.Limits(), guard.Access((".mine.example", "other.example"))) as (
    client,
    _,
  ):
    for host, is_ours in HOSTS.items():
      response = client.post("/search", json={"question": question()}, headers={"host": host})
      assert response.status_code == (200 if is_ours else 421), host
    assert (
      "--allowed-host adds one" in client.get("/", headers={"host": "evil.example"}).json()["error"]
    )
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
  assert guard.Access(("*",)).has_host("anything")


def test_a_token(answerer, tmp_path):
  file = tmp_path / "token"
  file.write_text("s3cret-token\n")
  with running(answerer, server.Limits(), guard.Access(token=guard.read_token(str(file)))) as (
    client,
    _,
  ):
    assert client.get("/").status_code == client.get("/healthz").status_code == 200
    for header in (
      {},
      {"authorization": "Bearer other"},
      {"authorization": "Basic s3cret-token"},
      {"authorization": "Bearer"},
    ):
      for path in ("/metrics", "/openapi.json", "/nothing"):
        assert client.get(path, headers=header).status_code == 401
      assert (
        client.post("/search", json={"question": question()}, headers=header).status_code == 401
      )
    assert (
      client.post(
        "/search", json={"question": question()}, headers={"authorization": "bearer s3cret-token"}
      ).status_code
      == 200
    )
  for content, message in (
    (b"", "one token"),
    (b"two tokens", "one token"),
    (b"\xff", "can't decode"),
    (None, "No such file"),
  ):
    bad = tmp_path / "bad"
    bad.unlink(missing_ok=True)
    if content is not None:
      bad.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--token-file .*{message}"):
      guard.read_token(str(bad))


def test_nothing_may_be_framed_and_scripts_are_ours(client):
  page = client.get("/")
  policy = page.headers["content-security-policy"]
  assert (
    "frame-ancestors 'none'" in policy
    and "script-src 'sha256-" in policy
    and "unsafe-inline" not in policy.split("script-src")[1]
  )
  for response in (
    page,
    client.get("/healthz"),
    client.get("/nothing"),
    client.post("/answer", json={}),
  ):
    assert (
      response.headers["x-frame-options"] == "DENY"
      and "frame-ancestors 'none'" in response.headers["content-security-policy"]
    )


def raw(port, content, half_close=False):
  connection = socket.create_connection(("127.0.0.1", port), timeout=30)
  connection.sendall(content)
  if half_close:
    connection.shutdown(socket.SHUT_WR)
  return connection


def posted(body, length=None):
  return (
    f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
    f"application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    f"{body}"
  ).encode()


def test_clients_that_are_slow_silent_or_half_closed(answerer):
  body = json.dumps({"question": question()})
  with running(answerer, server.Limits(read_seconds=1.5, connections=40)) as (client, _):
    port = client.base_url.port
    with raw(port, posted(body), half_close=True) as connection:
      answer = b"".join(iter(lambda: connection.recv(65536), b""))
      assert answer.startswith(b"HTTP/1.1 200") and question().encode() in answer
    start = time.monotonic()
    waiting = [
      raw(port, content)
      for content in (
        b"",
        b"POST /se",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nX: ",
        posted(body[:5], 100),
      )
    ]
    assert client.post("/search", json={"question": question()}).status_code == 200
    for connection in waiting:
      with contextlib.suppress(ConnectionResetError):
        assert connection.recv(100) == b""
    assert 1 < time.monotonic() - start < 8
    # One connection that is always busy for less than a second.
    with httpx.Client(base_url=client.base_url) as pooled:
      start = time.monotonic()
      while time.monotonic() - start < 3.5:
        assert pooled.get("/healthz").status_code == 200
        time.sleep(0.05)
    crowd = [raw(port, b"POST /se") for _ in range(60)]
    assert client.post("/search", json={"question": question()}).status_code == 200
    for connection in crowd:
      connection.close()


def test_a_body_larger_than_a_request_can_need(answerer):
  with running(answerer, server.Limits()) as (client, service):
    port = client.base_url.port
    with raw(port, posted("", 60 << 20)) as connection:  # refused before any of it comes
      assert connection.recv(1000).startswith(b"HTTP/1.1 413")

    def parts():
      for _ in range(100):
        yield b" " * (1 << 20)

    with contextlib.suppress(httpx.TransportError):
      assert (
        client.post(
          "/search", content=parts(), headers={"content-type": "application/json"}
        ).status_code
        == 413
      )
    assert service._reading == 0
    many = {"queries": [[0.5] * 32] * 256, "k": 1}
    assert client.post("/queries", json=many).status_code == 200
    assert (
      client.post("/queries", json={"queries": [[1.0] * 10_000] * 3, "k": 1}).status_code == 422
    )
    for value in ("1e39", "-1e300", '"1"', "true", "null", "[1]", "1" * 400):
      numbers = f'{{"queries": [[{value}{", 0.0" * 31}]], "k": 1}}'
      response = client.post(
        "/queries", content=numbers, headers={"content-type": "application/json"}
      )
      assert response.status_code in (400, 422) and response.json()["error"], value


def test_the_description_names_everything(client):
  described = client.get("/openapi.json").json()
  assert set(schema.ENDPOINTS) <= set(described["paths"])
  assert (
    described["components"]["schemas"]["QueriesRequest"]["properties"]["k"]["maximum"]
    == schema.MOST_DOCUMENTS
  )
  assert client.get("/healthz").json()["documents"] == 20


_SERVE = """
import sys
from clara_jax.cli.output import configure_logging
from clara_jax.inference.checkpoint import Checkpoint
from clara_jax.inference.answer import Answerer
from clara_jax.memory.store import MemoryStore
from clara_jax.model import Clara
from clara_jax.retrieval import index
from clara_jax.serving import server
from clara_jax.testing import tiny
configure_logging()
store = MemoryStore(sys.argv[1])
answerer = Answerer(Checkpoint(Clara(tiny.config()), tiny.prompt_tokenizer(), tiny.weights()), store, index=index.build(store, "exact"), max_new_tokens=6)
server.run(answerer, "127.0.0.1", int(sys.argv[2]), server.Limits(batch=4))
"""  # noqa: E501


def test_sigterm_under_load_loses_nothing(answerer):
  """Requests that the server has read are answered; others see that it is gone."""
  port = free_port()
  process = subprocess.Popen(
    [sys.executable, "-c", _SERVE, answerer.store.directory, str(port)],
    cwd=ROOT,
    text=True,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stderr=subprocess.PIPE,
  )
  address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
  while True:
    with contextlib.suppress(httpx.TransportError):
      if httpx.get(address + "/healthz").status_code == 200:
        break
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  complete, broken, gone = [], [], []

  def ask():
    while not gone:
      try:
        with httpx.stream(
          "POST", address + "/answer", json={"question": question()}, timeout=60
        ) as response:
          try:
            complete.append(json.loads(response.read())["answer"])
          except (httpx.TransportError, ValueError) as error:
            broken.append(error)
      except httpx.TransportError as error:  # no response has begun
        gone.append(error)

  threads = [threading.Thread(target=ask) for _ in range(8)]
  for thread in threads:
    thread.start()
  time.sleep(1.5)
  process.send_signal(signal.SIGTERM)
  for thread in threads:
    thread.join()
  _, err = process.communicate(timeout=60)
  counts = json.loads(err.rsplit("path and status: ", 1)[1])
  assert process.returncode == 0 and not broken
  # Every request that the server began has come back complete.
  assert counts["/answer 200"] == len(complete) > 8 and set(counts) <= {
    "/answer 200",
    "/healthz 200",
    "/healthz 503",  # while it started
  }
