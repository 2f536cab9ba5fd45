"""The HTTP server: Starlette routes over one `Answerer`; uvicorn runs them.

Bound to this machine unless told otherwise; `guard.py` says who may ask. Nothing that a client
sends is opened as a path, unpickled or used as a template.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import importlib.resources
import json
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import orjson
import prometheus_client
import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import clara_jax
from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError
from clara_jax.evaluation import logit_lens
from clara_jax.inference.answer import Answer, Answerer, Found, Question
from clara_jax.serving import schema, together
from clara_jax.serving.batcher import Batcher, OverloadedError
from clara_jax.serving.guard import ANYBODY, Access, Guard, Protocol, page_policy

log = logging.getLogger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server takes.

  Attributes:
    batch: questions a pass.
    wait_ms: how long the first question of a pass waits for others.
    waiting: requests that may wait; more are refused (429).
    seconds: that a request may take (503 beyond).
    body: bytes of a request, at most; a path that needs less takes less.
    bodies: bytes of all requests that are being read (503 beyond).
    read_seconds: for a client to send its request.
    connections: at most.
  """

  batch: int = 32
  wait_ms: float = 4.0
  waiting: int = 512
  seconds: float = 60.0
  body: int = 64 << 20
  bodies: int = 256 << 20
  read_seconds: float = 20.0
  connections: int = 1000


class _RefusedError(Exception):
  def __init__(self, status: int, text: str):
    super().__init__(text)
    self.status = status


class _Metrics:
  """For Prometheus, in a registry of their own."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    common = {"registry": self.registry, "namespace": "clara"}
    self.requests = prometheus_client.Counter(
      "requests", "Requests by path and status.", ["path", "status"], **common
    )
    self.seconds = prometheus_client.Histogram(
      "request_seconds",
      "Time from a request to the end of its answer.",
      ["path"],
      buckets=_SECONDS,
      **common,
    )
    self.sizes = prometheus_client.Histogram(
      "batch_size", "Questions a pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **common
    )
    self.delays = prometheus_client.Histogram(
      "queue_seconds", "Time that a question waits for its pass.", buckets=_SECONDS, **common
    )
    self.documents = prometheus_client.Gauge("documents", "Documents in the store.", **common)


class Service:
  """The application's state: an answerer, one thread for its devices, and the queues before it."""

  def __init__(self, answerer: Answerer, limits: Limits):
    self.answerer, self.limits, self.metrics = answerer, limits, _Metrics()
    self.metrics.documents.set(len(answerer.store))
    self.stopping = False
    whole = answerer.store.whole
    self._dimension = whole.num_memory_tokens * whole.width
    # A number takes up to 25 characters, escaped text 6 bytes each.
    self._most_bytes = {
      schema.QueriesRequest: 4096 + schema.QUERIES * (self._dimension * 25 + 2),
      schema.LensRequest: 4096 + 6 * schema.TEXT,
    }
    self._reading = 0
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "devices")
    self._parser = concurrent.futures.ThreadPoolExecutor(1, "parser")
    options = {
      "size": limits.batch,
      "wait_ms": limits.wait_ms,
      "waiting": limits.waiting,
      "sizes": self.metrics.sizes,
      "delays": self.metrics.delays,
    }
    self.answers = Batcher(self._answer, self._thread, **options)
    self.searches = Batcher(self._search, self._thread, **options)
    # Whole batches come in one request; they are not joined.
    self.others = Batcher(
      lambda calls, _: [_attempt(call) for call in calls],
      self._thread,
      **{**options, "size": 1, "wait_ms": 0},
    )
    self._batchers = (self.answers, self.searches, self.others)

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    """Starts the queues; at the end, what waits is still answered."""
    del app
    for batcher in self._batchers:
      batcher.start()
    yield
    self.stopping = True
    for batcher in self._batchers:
      await batcher.stop()
    self._thread.shutdown()
    self._parser.shutdown()

  def warm_up(self) -> None:
    """Compiles every size of batch for questions and prompts of the usual length."""
    question, size = Question("Who is it?"), 1
    while True:
      self.answerer.answer([question] * size, on_text=lambda *_: None)
      if size >= self.limits.batch:
        break
      size = min(2 * size, self.limits.batch)

  def _answer(
    self, questions: Sequence[Question], emits: Sequence[Any]
  ) -> list[Answer | Exception]:
    streamed = any(emits)

    def emit(place, **line):
      if emits[place]:
        emits[place](line)

    on_text = (lambda place, text: emit(place, answer=text)) if streamed else None
    on_found = (
      (lambda place, documents: emit(place, documents=[dataclasses.asdict(f) for f in documents]))
      if streamed
      else None
    )
    try:
      return list(self.answerer.answer(questions, on_text, on_found))
    except (ConfigError, DataError) as error:
      if len(questions) == 1:
        return [error]
      # One that does not fit must not harm the others.
      return [self._answer([q], [e])[0] for q, e in zip(questions, emits, strict=True)]

  def _search(
    self, questions: Sequence[Question], emits: Sequence[Any]
  ) -> list[list[Found] | Exception]:
    try:
      return self.answerer.search(questions)
    except (ConfigError, DataError) as error:
      return [error] if len(questions) == 1 else [self._search([q], [None])[0] for q in questions]

  # ---- routes ------------------------------------------------------------------------------------

  async def answer(self, request: Request) -> Response:
    """POST /answer."""
    body = await self._read(request, schema.AnswerRequest)
    question = self._question(body, body.max_new_tokens)
    if body.stream:
      return await self._stream_answer(question)
    return JSONResponse(self._whole(await self._within_time(self.answers.submit(question))))

  async def search(self, request: Request) -> Response:
    """POST /search."""
    body = await self._read(request, schema.SearchRequest)
    documents = await self._within_time(self.searches.submit(self._question(body)))
    return JSONResponse(
      {"question": body.question, "documents": [dataclasses.asdict(f) for f in documents]}
    )

  async def queries(self, request: Request) -> Response:
    """POST /queries: the released code's protocol."""
    body, vectors = await self._read(request, schema.QueriesRequest, self._vectors)
    self._check_count(body.k)
    content = await self._within_time(
      self.others.submit(
        lambda: orjson.dumps(
          {"retrieved_embeddings": self.answerer.nearest_memories(vectors, body.k)},
          option=orjson.OPT_SERIALIZE_NUMPY,
        )
      )
    )
    return Response(content, media_type="application/json")

  def _vectors(self, body: schema.QueriesRequest) -> tuple[schema.QueriesRequest, np.ndarray]:
    """With its vectors as an array."""
    whole, searched = self.answerer.store.whole, self.answerer.search_tokens
    lengths = {len(q) for q in body.queries}
    if len(lengths) > 1 or not lengths <= {self._dimension, searched * whole.width}:
      fewer = f", or of the first {searched}" if searched < whole.num_memory_tokens else ""
      raise _RefusedError(
        422,
        f"queries: expected vectors of M·D = {whole.num_memory_tokens}·{whole.width} = "
        f"{self._dimension} numbers"
        f"{fewer}, got {sorted(lengths)}",
      )
    if not all(type(x) in (float, int) for q in body.queries for x in q):
      raise _RefusedError(422, "queries: expected numbers")
    with np.errstate(over="ignore"):
      vectors = np.array(body.queries, np.float64).astype(np.float32)
    if not np.isfinite(vectors).all():
      raise _RefusedError(422, "queries: a number is too large for float32")
    return body, vectors

  async def lens(self, request: Request) -> Response:
    """POST /lens."""
    body = await self._read(request, schema.LensRequest)
    tokens = await self._within_time(
      self.others.submit(lambda: self._lens(body.question, body.top))
    )
    return JSONResponse({"tokens": tokens})

  def _lens(self, question: str, top: int) -> list[tuple[str, float]]:
    if isinstance(self.answerer, together.Leader):
      return self.answerer.lens(question, top)
    return logit_lens.queries(self.answerer.checkpoint, [question], top)[0]["tokens"]

  async def health(self, request: Request) -> Response:
    """GET /healthz."""
    status = "stopping" if self.stopping else "ok"
    return JSONResponse(
      {"status": status, "documents": len(self.answerer.store), "version": clara_jax.__version__},
      503 if self.stopping else 200,
    )

  async def metrics_page(self, request: Request) -> Response:
    """GET /metrics."""
    return Response(
      prometheus_client.generate_latest(self.metrics.registry),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )

  async def description(self, request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(schema.openapi(clara_jax.__version__))

  async def page(self, request: Request) -> Response:
    """GET /."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

  # ---- parts of them -----------------------------------------------------------------------------

  async def _read(
    self,
    request: Request,
    model: type[pydantic.BaseModel],
    then: Callable[[Any], Any] = lambda value: value,
  ) -> Any:
    """The checked body; what is large is checked beside the loop, by `then` as well."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
      raise _RefusedError(
        415, f"expected content-type application/json, got {kind or 'none'!r:.60}"
      )
    most = min(self.limits.body, self._most_bytes.get(model, 4 << 20))
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
      raise _RefusedError(413, f"the request is larger than {most} bytes")
    body = bytearray()
    try:
      async for part in request.stream():
        body += part
        self._reading += len(part)
        if len(body) > most:
          raise _RefusedError(413, f"the request is larger than {most} bytes")
        if self._reading > self.limits.bodies:
          raise _RefusedError(503, "too much is being sent; try again later")
      if len(body) < _SMALL:
        return then(self._parsed(body, model))
      return await asyncio.get_running_loop().run_in_executor(
        self._parser, lambda: then(self._parsed(body, model))
      )
    finally:
      self._reading -= len(body)

  def _parsed(self, body: bytearray, model: type[pydantic.BaseModel]) -> Any:
    try:
      values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
      raise _RefusedError(400, f"not JSON: {error}") from None
    try:
      return model.model_validate(values)
    except pydantic.ValidationError as error:
      problems = [
        f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}"
        for e in error.errors(include_url=False, include_input=False)[:5]
      ]
      raise _RefusedError(422, "; ".join(problems)) from None

  def _check_count(self, k: int | None) -> None:
    if k is not None and k > len(self.answerer.store):
      raise _RefusedError(422, f"k: {k} documents of a store with {len(self.answerer.store)}")

  def _question(self, body: schema.SearchRequest, max_new_tokens: int | None = None) -> Question:
    self._check_count(body.k)
    if max_new_tokens is not None and max_new_tokens > self.answerer.max_new_tokens:
      raise _RefusedError(422, f"max_new_tokens: at most {self.answerer.max_new_tokens} here")
    return Question(body.question, body.k, tuple(body.ids) if body.ids else None, max_new_tokens)

  async def _within_time(self, result: Any) -> Any:
    try:
      async with asyncio.timeout(self.limits.seconds):
        return await result
    except TimeoutError:
      raise _RefusedError(503, f"no result within {self.limits.seconds:g} s") from None
    except OverloadedError as error:
      raise _RefusedError(429, f"{error}; try again later") from None
    except (ConfigError, DataError) as error:
      raise _RefusedError(422, str(error)) from None

  def _whole(self, answer: Answer) -> dict[str, Any]:
    return {
      **dataclasses.asdict(answer),
      "memory_tokens": self.answerer.store.manifest.num_memory_tokens,
    }

  async def _stream_answer(self, question: Question) -> Response:
    """Lines of JSON: documents, then answers that grow, then the whole response with `done`. A
    refusal comes before the first line."""
    lines: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(self._within_time(self.answers.submit(question, lines.put_nowait)))
    task.add_done_callback(lambda _: lines.put_nowait(None))
    first = await lines.get()
    if first is None:
      task.result()  # raises

    async def body():
      line = first
      while line is not None:
        yield orjson.dumps(line) + b"\n"
        line = await lines.get()
      try:
        yield orjson.dumps({**self._whole(task.result()), "done": True}) + b"\n"
      except _RefusedError as error:
        yield orjson.dumps({"error": str(error)}) + b"\n"

    return StreamingResponse(body(), media_type="application/x-ndjson")


def _attempt(call: Any) -> Any:
  try:
    return call()
  except (ConfigError, DataError) as error:
    return error


_SMALL = 1 << 16  # bytes that the loop itself parses
_PAGE = (
  importlib.resources.files("clara_jax.serving")
  .joinpath("page/index.html")
  .read_text(encoding="utf-8")
)
_PAGE_POLICY = page_policy(_PAGE)


class _Counted:
  """Counts requests and their time, until the last byte of the answer."""

  def __init__(self, app: Any, service: Service):
    self._app, self._metrics = app, service.metrics

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    start, status = time.monotonic(), 500

    async def sent(message):
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    try:
      return await self._app(scope, receive, sent)
    finally:
      path = scope["path"] if scope["path"] in _PATHS else "other"
      self._metrics.requests.labels(path, str(status)).inc()
      self._metrics.seconds.labels(path).observe(time.monotonic() - start)


_PATHS = {*schema.ENDPOINTS, "/", "/healthz", "/metrics", "/openapi.json"}


def make_app(answerer: Answerer, limits: Limits = Limits(), access: Access = ANYBODY) -> Starlette:
  """The ASGI application; `app.state.service` is its `Service`."""
  service = Service(answerer, limits)

  async def refused(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": str(error)}, error.status, headers)

  async def gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)

  async def no_such(request: Request, error: Exception) -> Response:
    return JSONResponse(
      {
        "error": f"{error.status_code}: {request.method} {request.url.path:.100}; see /openapi.json"
      },
      error.status_code,
      error.headers,
    )

  def route(path, handler, method):
    return Route(path, handler, methods=[method])

  app = Starlette(
    routes=[
      route("/queries", service.queries, "POST"),
      route("/search", service.search, "POST"),
      route("/answer", service.answer, "POST"),
      route("/lens", service.lens, "POST"),
      route("/healthz", service.health, "GET"),
      route("/metrics", service.metrics_page, "GET"),
      route("/openapi.json", service.description, "GET"),
      route("/", service.page, "GET"),
    ],
    exception_handlers={_RefusedError: refused, ClientDisconnect: gone, 404: no_such, 405: no_such},
    lifespan=service.lifespan,
  )
  app.state.service = service
  app.add_middleware(Guard, access=access)
  app.add_middleware(_Counted, service=service)
  return app


def configured(app: Starlette, limits: Limits, **options: Any) -> uvicorn.Server:
  """The server that runs an application."""
  protocol = type(
    "Connection", (Protocol,), {"read_seconds": limits.read_seconds, "most": limits.connections}
  )
  return uvicorn.Server(
    uvicorn.Config(
      app,
      http=protocol,
      ws="none",
      log_level="error",
      backlog=2048,
      **{
        "timeout_keep_alive": int(limits.read_seconds),
        "timeout_graceful_shutdown": int(limits.seconds) + 5,
        **options,
      },
    )
  )


def run(
  answerer: Answerer, host: str, port: int, limits: Limits = Limits(), access: Access = ANYBODY
) -> None:
  """Serves until SIGTERM or SIGINT; what was accepted is answered first."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * limits.connections)), hard))
  with socket.socket(
    socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
  ) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind((host, port))  # before anything is compiled
    except OSError as error:
      raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
    _serve(answerer, listener, limits, dataclasses.replace(access, hosts=(*access.hosts, host)))


def _serve(answerer: Answerer, listener: socket.socket, limits: Limits, access: Access) -> None:
  app = make_app(answerer, limits, access)
  log.info("serve: compiling")
  app.state.service.warm_up()
  server = configured(app, limits)
  host, port = listener.getsockname()[:2]
  log.info(f"serve: http://{f'[{host}]' if ':' in host else host}:{port}")
  # Uvicorn, having stopped, raises the signal once more.
  signal.signal(signal.SIGTERM, lambda *_: None)
  with contextlib.suppress(KeyboardInterrupt):
    server.run(sockets=[listener])
  metrics = app.state.service.metrics.requests.collect()[0].samples
  counts = {
    f"{s.labels['path']} {s.labels['status']}": int(s.value)
    for s in metrics
    if s.name.endswith("_total")
  }
  log.info(f"serve: stopped; requests by path and status: {json.dumps(counts)}")
