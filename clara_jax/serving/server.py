"""The HTTP server: Starlette routes over one `Answerer`; uvicorn runs them.

Bound to this machine unless told otherwise; `guard.py` says who may ask. Nothing that a client
sends is opened as a path, unpickled or used as a template.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import prometheus_client
import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import clara_jax
from clara_jax.config import ConfigError
from clara_jax.data.schemas import DataError
from clara_jax.errors import InputError
from clara_jax.evaluation import logit_lens
from clara_jax.inference.answer import Answer, Answerer, Found, Question
from clara_jax.serving import openai, schema, together
from clara_jax.serving.batcher import Batcher, OverloadedError
from clara_jax.serving.errors import RefusedError
from clara_jax.serving.guard import ANYBODY, Access, Guard, Protocol, page_policy
from clara_jax.serving.models import Model

log = logging.getLogger(__name__)

NAME = "clara"  # of the only model
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
    doubt_below: a score of the best document below which an answer is in doubt.
    upload: whether documents may be added.
    upload_bytes: of an added document, at most.
  """

  batch: int = 32
  wait_ms: float = 4.0
  waiting: int = 512
  seconds: float = 60.0
  body: int = 64 << 20
  bodies: int = 256 << 20
  read_seconds: float = 20.0
  connections: int = 1000
  doubt_below: float = 0.0
  upload: bool = False
  upload_bytes: int = 20 << 20


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
    self.documents = prometheus_client.Gauge(
      "documents", "Documents in the store.", ["model"], **common
    )


class Service:
  """The application's state: its models, one thread for their devices, and queues before them.

  Args:
    limits: what is taken.
    follow: seconds between two looks at the stores; 0 looks never.
  """

  def __init__(self, limits: Limits, follow: float = 0.0):
    self.limits, self.metrics, self._follow = limits, _Metrics(), follow
    self.models: dict[str, Model] = {}
    self.examples: list[str] = []  # questions that the page offers
    self.progress = "starting"  # until there are models
    self.stopping = False
    self._reading = 0
    self.devices = concurrent.futures.ThreadPoolExecutor(1, "devices")
    self._parser = concurrent.futures.ThreadPoolExecutor(1, "parser")
    self.batching = {
      "size": limits.batch,
      "wait_ms": limits.wait_ms,
      "waiting": limits.waiting,
      "sizes": self.metrics.sizes,
      "delays": self.metrics.delays,
    }
    # Whole batches come in one request; they are not joined.
    self.others = Batcher(
      lambda calls, _: [_attempt(call) for call in calls],
      self.devices,
      **{**self.batching, "size": 1, "wait_ms": 0},
    )
    self._loop: asyncio.AbstractEventLoop | None = None
    self._tasks: list[asyncio.Task] = []

  @contextlib.asynccontextmanager
  async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
    """Starts the queues; at the end, what waits is still answered."""
    del app
    self._loop = asyncio.get_running_loop()
    self.others.start()
    self._start()
    yield
    self.stopping = True
    for task in self._tasks:
      task.cancel()
    for batcher in (self.others, *self.models.values()):
      await batcher.stop()
    self.devices.shutdown()
    self._parser.shutdown()

  def open(self, answerers: Mapping[str, Answerer]) -> None:
    """Answers with these from now on; once."""
    self.models = {
      name: Model(name, answerer, self.devices, self.batching)
      for name, answerer in answerers.items()
    }
    if self._loop is not None:
      self._start()

  def open_from_thread(self, answerers: Mapping[str, Answerer]) -> None:
    """`open`, from another thread than the loop's."""
    while self._loop is None:
      time.sleep(0.01)
    self._loop.call_soon_threadsafe(self.open, answerers)

  def warm_up(self) -> None:
    """Compiles what the usual questions need."""
    for model in self.models.values():
      model.warm_up(self.limits.batch)

  def _start(self) -> None:
    for model in self.models.values():
      model.start()
      if self._follow:
        self._tasks.append(asyncio.create_task(model.follow(self._follow, self._count_documents)))
    self._count_documents()

  def _count_documents(self) -> None:
    for model in self.models.values():
      self.metrics.documents.labels(model.name).set(len(model.answerer.store))

  def model(self, name: str | None) -> Model:
    """The model of a name; None: the first one."""
    if not self.models:
      raise RefusedError(503, f"the server is not ready: {self.progress}")
    if name is None:
      return next(iter(self.models.values()))
    if name not in self.models:
      raise RefusedError(404, f"model: {name!r:.60} is not one of {list(self.models)}")
    return self.models[name]

  # ---- routes ------------------------------------------------------------------------------------

  async def answer(self, request: Request) -> Response:
    """POST /answer."""
    body = await self.read(request, schema.AnswerRequest)
    model = self.model(body.model)
    question = dataclasses.replace(
      self._question(model, body, body.max_new_tokens), expand=body.expand
    )
    if body.stream:
      return await self._stream_answer(model, question)
    answer = await self.within_time(model.answers.submit(question))
    return JSONResponse(self._whole(model, answer))

  async def search(self, request: Request) -> Response:
    """POST /search."""
    body = await self.read(request, schema.SearchRequest)
    model = self.model(body.model)
    documents = await self.within_time(model.searches.submit(self._question(model, body)))
    return JSONResponse(
      {"question": body.question, "documents": [dataclasses.asdict(f) for f in documents]}
    )

  async def queries(self, request: Request) -> Response:
    """POST /queries: the released code's protocol."""
    answerer = self.model(None).answerer
    width = answerer.store.whole.num_memory_tokens * answerer.store.whole.width
    # A number takes up to 25 characters.
    most = 4096 + schema.QUERIES * (width * 25 + 2)
    body, vectors = await self.read(request, schema.QueriesRequest, self._vectors, most)
    self.check_count(self.model(None), body.k)
    content = await self.within_time(
      self.others.submit(
        lambda: orjson.dumps(
          {"retrieved_embeddings": answerer.nearest_memories(vectors, body.k)},
          option=orjson.OPT_SERIALIZE_NUMPY,
        )
      )
    )
    return Response(content, media_type="application/json")

  def _vectors(self, body: schema.QueriesRequest) -> tuple[schema.QueriesRequest, np.ndarray]:
    """With its vectors as an array."""
    answerer = self.model(None).answerer
    whole, searched = answerer.store.whole, answerer.search_tokens
    dimension = whole.num_memory_tokens * whole.width
    lengths = {len(q) for q in body.queries}
    if len(lengths) > 1 or not lengths <= {dimension, searched * whole.width}:
      fewer = f", or of the first {searched}" if searched < whole.num_memory_tokens else ""
      raise RefusedError(
        422,
        f"queries: expected vectors of M·D = {whole.num_memory_tokens}·{whole.width} = "
        f"{dimension} numbers"
        f"{fewer}, got {sorted(lengths)}",
      )
    if not all(type(x) in (float, int) for q in body.queries for x in q):
      raise RefusedError(422, "queries: expected numbers")
    with np.errstate(over="ignore"):
      vectors = np.array(body.queries, np.float64).astype(np.float32)
    if not np.isfinite(vectors).all():
      raise RefusedError(422, "queries: a number is too large for float32")
    return body, vectors

  async def add(self, request: Request) -> Response:
    """POST /documents."""
    if not self.limits.upload:
      raise RefusedError(403, "documents may not be added: clara serve --allow-upload")
    most = self.limits.upload_bytes
    body = await self.read(request, schema.AddRequest, most=4096 + most * 4 // 3)
    model = self.model(body.model)
    try:
      content = base64.b64decode(body.content, validate=True)
    except ValueError:
      raise RefusedError(422, "content: expected base64") from None
    try:
      ids = await self.within_time(model.add(body.name, content))
    except (InputError, OSError) as error:
      raise RefusedError(422, str(error)) from None
    self._count_documents()
    return JSONResponse({"documents": len(ids), "ids": ids})

  async def lens(self, request: Request) -> Response:
    """POST /lens."""
    # Escaped text takes 6 bytes a character.
    body = await self.read(request, schema.LensRequest, most=4096 + 6 * schema.TEXT)
    answerer = self.model(body.model).answerer

    def lens():
      if isinstance(answerer, together.Leader):
        return answerer.lens(body.question, body.top)
      return logit_lens.queries(answerer.checkpoint, [body.question], body.top)[0]["tokens"]

    return JSONResponse({"tokens": await self.within_time(self.others.submit(lens))})

  async def health(self, request: Request) -> Response:
    """GET /healthz."""
    ready = bool(self.models) and not self.stopping
    status = {
      "status": "ok" if ready else "stopping" if self.stopping else "starting",
      "version": clara_jax.__version__,
    }
    if self.models:
      sizes = {name: len(model.answerer.store) for name, model in self.models.items()}
      status |= {
        "documents": next(iter(sizes.values())),
        "models": sizes,
        "upload": self.limits.upload,
        "examples": self.examples,
      }
    else:
      status["progress"] = self.progress
    return JSONResponse(status, 200 if ready else 503)

  async def metrics_page(self, request: Request) -> Response:
    """GET /metrics."""
    return Response(
      prometheus_client.generate_latest(self.metrics.registry),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )

  async def description(self, request: Request) -> Response:
    """GET /openapi.json."""
    return JSONResponse(schema.openapi(clara_jax.__version__, _OPENAI))

  async def page(self, request: Request) -> Response:
    """GET /."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

  # ---- parts of them -----------------------------------------------------------------------------

  async def read(
    self,
    request: Request,
    model: type[pydantic.BaseModel],
    then: Callable[[Any], Any] = lambda value: value,
    most: int = 4 << 20,
  ) -> Any:
    """The checked body; what is large is checked beside the loop, by `then` as well."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
      raise RefusedError(415, f"expected content-type application/json, got {kind or 'none'!r:.60}")
    most = min(self.limits.body, most)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
      raise RefusedError(413, f"the request is larger than {most} bytes")
    body = bytearray()
    try:
      async for part in request.stream():
        body += part
        self._reading += len(part)
        if len(body) > most:
          raise RefusedError(413, f"the request is larger than {most} bytes")
        if self._reading > self.limits.bodies:
          raise RefusedError(503, "too much is being sent; try again later")
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
      raise RefusedError(400, f"not JSON: {error}") from None
    try:
      return model.model_validate(values)
    except pydantic.ValidationError as error:
      problems = [
        f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}"
        for e in error.errors(include_url=False, include_input=False)[:5]
      ]
      raise RefusedError(422, "; ".join(problems)) from None

  def check_count(self, model: Model, k: int | None) -> None:
    """Refuses more documents than there are."""
    if k is not None and k > len(model.answerer.store):
      raise RefusedError(422, f"k: {k} documents of a store with {len(model.answerer.store)}")

  def _question(
    self, model: Model, body: schema.SearchRequest, max_new_tokens: int | None = None
  ) -> Question:
    self.check_count(model, body.k)
    if max_new_tokens is not None and max_new_tokens > model.answerer.max_new_tokens:
      raise RefusedError(422, f"max_new_tokens: at most {model.answerer.max_new_tokens} here")
    text = schema.joined(body.question, body.before or ())
    return Question(text, body.k, tuple(body.ids) if body.ids else None, max_new_tokens)

  async def within_time(self, result: Any) -> Any:
    try:
      async with asyncio.timeout(self.limits.seconds):
        return await result
    except TimeoutError:
      raise RefusedError(503, f"no result within {self.limits.seconds:g} s") from None
    except OverloadedError as error:
      raise RefusedError(429, f"{error}; try again later") from None
    except (ConfigError, DataError) as error:
      raise RefusedError(422, str(error)) from None

  def _whole(self, model: Model, answer: Answer) -> dict[str, Any]:
    return {
      **dataclasses.asdict(answer),
      "doubt": doubt(answer.documents, self.limits.doubt_below),
      "memory_tokens": model.answerer.store.manifest.num_memory_tokens,
    }

  async def _stream_answer(self, model: Model, question: Question) -> Response:
    """Lines of JSON: documents, then answers that grow, then the whole response with `done`. A
    refusal comes before the first line."""
    lines: asyncio.Queue = asyncio.Queue()
    task = asyncio.create_task(self.within_time(model.answers.submit(question, lines.put_nowait)))
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
        yield orjson.dumps({**self._whole(model, task.result()), "done": True}) + b"\n"
      except RefusedError as error:
        yield orjson.dumps({"error": str(error)}) + b"\n"

    return StreamingResponse(body(), media_type="application/x-ndjson")


def doubt(documents: Sequence[Found], below: float) -> str:
  """Why an answer from these documents may be a guess; empty where nothing says so."""
  if documents and documents[0].score < below:
    return f"No document is near this question (the best score is {documents[0].score:.2f})."
  if len(documents) > 1 and documents[0].score - documents[-1].score < _CLOSE:
    return "All documents are equally near: the search could not tell them apart."
  return ""


def _attempt(call: Any) -> Any:
  try:
    return call()
  except (ConfigError, DataError) as error:
    return error


_CLOSE = 0.005  # scores that are so near say nothing
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


_OPENAI = {"/v1/chat/completions": (openai.ChatRequest, openai.ChatResponse)}
_PATHS = {*schema.ENDPOINTS, *_OPENAI, "/v1/models", "/", "/healthz", "/metrics", "/openapi.json"}


def make_app(
  answerers: Answerer | Mapping[str, Answerer] | None,
  limits: Limits = Limits(),
  access: Access = ANYBODY,
  follow: float = 0.0,
) -> Starlette:
  """The ASGI application; `app.state.service` is its `Service`.

  Args:
    answerers: by the names of the models; None: they come later, by `Service.open`.
    limits, access: what is taken, and from whom.
    follow: seconds between two looks at the stores; 0 looks never.
  """
  service = Service(limits, follow)
  if answerers is not None:
    service.open(answerers if isinstance(answerers, Mapping) else {NAME: answerers})

  async def refused(request: Request, error: Exception) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    if request.url.path.startswith("/v1/"):
      status = openai.error_status(error.status)
      return JSONResponse(openai.error_body(error), status, headers)
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

  chat = openai.Protocol(service)
  app = Starlette(
    routes=[
      route("/queries", service.queries, "POST"),
      route("/search", service.search, "POST"),
      route("/answer", service.answer, "POST"),
      route("/lens", service.lens, "POST"),
      route("/documents", service.add, "POST"),
      route("/v1/chat/completions", chat.completions, "POST"),
      route("/v1/models", chat.models, "GET"),
      route("/v1/models/{name}", chat.model, "GET"),
      route("/healthz", service.health, "GET"),
      route("/metrics", service.metrics_page, "GET"),
      route("/openapi.json", service.description, "GET"),
      route("/", service.page, "GET"),
    ],
    exception_handlers={
      RefusedError: refused,
      ClientDisconnect: gone,
      404: no_such,
      405: no_such,
    },
    lifespan=service.lifespan,
  )
  app.state.service = service
  if access.origins:
    app.add_middleware(
      CORSMiddleware,
      allow_origins=list(access.origins),
      allow_methods=["GET", "POST"],
      allow_headers=["authorization", "content-type"],
    )
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


Make = Callable[[Callable[[str], None]], Mapping[str, Answerer]]


def run(
  answerers: Answerer | Mapping[str, Answerer] | Make,
  host: str,
  port: int,
  limits: Limits = Limits(),
  access: Access = ANYBODY,
  follow: float = 0.0,
  examples: Sequence[str] = (),
) -> None:
  """Serves until SIGTERM or SIGINT; what was accepted is answered first.

  The port is open before there is anything to answer with; until then requests are refused (503)
  and /healthz says how far it has come.

  Args:
    answerers: one, or several by the names of their models, or a function that makes these while
      the port is open already; it is given a function that says what is being done.
    host, port: where.
    limits, access, follow: see `make_app`.
    examples: questions that the page offers.

  Raises:
    ConfigError: the port cannot be had.
    Exception: what such a function raises.
  """
  make: Make
  if callable(answerers):
    make = answerers
  else:
    named = answerers if isinstance(answerers, Mapping) else {NAME: answerers}
    make = functools.partial(_made, named)
  if not 0 <= port < 65536:
    raise ConfigError(f"--port {port}: expected 0 to 65535")
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  # Connections, and the files of stores that are kept open.
  resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  del soft
  with socket.socket(
    socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
  ) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind((host, port))
    except OSError as error:
      raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from None
    access = dataclasses.replace(access, hosts=(*access.hosts, host))
    _serve(make, listener, limits, access, follow, examples)


def _made(answerers: Mapping[str, Answerer], tell: Callable[[str], None]) -> Any:
  del tell
  return answerers


def _serve(
  make: Make,
  listener: socket.socket,
  limits: Limits,
  access: Access,
  follow: float,
  examples: Sequence[str],
) -> None:
  app = make_app(None, limits, access, follow)
  service, server = app.state.service, configured(app, limits)
  service.examples = list(examples)
  host, port = listener.getsockname()[:2]
  address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
  problem: list[BaseException] = []

  def tell(progress: str) -> None:
    service.progress = progress
    log.info("serve: %s", progress)

  def prepare() -> None:
    try:
      answerers = make(tell)
      for name, answerer in answerers.items():
        tell(f"compiling {name}")
        Model(name, answerer, service.devices, service.batching).warm_up(limits.batch)
      service.open_from_thread(answerers)
      log.info("serve: ready at %s", address)
    except BaseException as error:  # raised again in the main thread
      problem.append(error)
      server.should_exit = True

  preparing = threading.Thread(target=prepare, daemon=True)
  log.info("serve: starting at %s", address)
  preparing.start()
  # Uvicorn, having stopped, raises the signal once more.
  signal.signal(signal.SIGTERM, lambda *_: None)
  with contextlib.suppress(KeyboardInterrupt):
    server.run(sockets=[listener])
  if problem:
    raise problem[0]
  metrics = service.metrics.requests.collect()[0].samples
  counts = {
    f"{s.labels['path']} {s.labels['status']}": int(s.value)
    for s in metrics
    if s.name.endswith("_total")
  }
  log.info(f"serve: stopped; requests by path and status: {json.dumps(counts)}")
  if preparing.is_alive():  # a compiler cannot be stopped
    logging.shutdown()
    os._exit(0)
