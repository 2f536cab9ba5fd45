"""The protocol that chat clients speak: OpenAI's `/v1/chat/completions` and `/v1/models`.

The last message of the user is the question. Up to `history` questions before it stand in front of
it, oldest first, so that "And where was she born?" finds her; the answers between are not read, nor
are system messages: the generator has its own instruction. Decoding is greedy: temperature, top_p,
seed and penalties have no effect. What would change the answer's form (tools, several choices, log
probabilities, JSON) is refused by name.

Beside OpenAI's fields a request may have `k`, `ids`, `history` and `citations`; a response has
`documents`. The documents in which the answer stands, else the best one, are cited behind it: [1].
"""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import pydantic
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clara_jax.evaluation.metrics import squad_normalize
from clara_jax.inference.answer import Answer, Found, Question
from clara_jax.serving import schema
from clara_jax.serving.errors import RefusedError

if TYPE_CHECKING:
  from clara_jax.serving.models import Model
  from clara_jax.serving.server import Service

MESSAGES = 1_000
_REFUSED = {  # what may be named, but only so
  "n": (1, None),
  "tools": ([], None),
  "functions": ([], None),
  "logprobs": (False, None),
  "top_logprobs": (0, None),
  "audio": (None,),
  "modalities": (["text"], None),
  "response_format": ({"type": "text"}, None),
}


class Part(pydantic.BaseModel):
  """Part of a message; only text is read."""

  type: str
  text: str | None = None


class Message(pydantic.BaseModel):
  """One turn of a conversation."""

  role: Literal["system", "developer", "user", "assistant", "tool", "function"]
  content: str | list[Part] | None = None


class StreamOptions(pydantic.BaseModel):
  """What a stream tells at its end."""

  include_usage: bool = False


class ChatRequest(pydantic.BaseModel):
  """A conversation; see `serving/openai.py` for what is read of it."""

  model_config = pydantic.ConfigDict(extra="allow")

  model: Annotated[str, Field(min_length=1, max_length=1_000)]
  messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  stop: str | Annotated[list[str], Field(max_length=4)] | None = None
  stream: bool | None = False
  stream_options: StreamOptions | None = None
  k: schema.Count | None = None
  ids: Annotated[list[schema.Id], Field(min_length=1, max_length=schema.IDS)] | None = None
  history: Annotated[int, Field(ge=0, le=16)] = 2
  citations: bool = True


class ChatResponse(pydantic.BaseModel):
  """OpenAI's chat completion, with `documents`."""

  id: str
  object: Literal["chat.completion"]
  created: int
  model: str
  choices: list[dict[str, Any]]
  usage: dict[str, int]
  documents: list[schema.ServedDocument]


def question_of(messages: Sequence[Message], history: int) -> str:
  """What is asked: the last message of the user, with up to `history` of those before it.

  Raises:
    RefusedError: the last message is not the user's, is not text, or is too long.
  """
  if messages[-1].role != "user":
    raise RefusedError(400, "messages: the last one has to be of the role 'user'", "messages")
  asked = [_text(m) for m in messages if m.role == "user"]
  question = asked[-1]
  if not question:
    raise RefusedError(400, "messages: the last one is empty", "messages")
  if len(question) > schema.TEXT:
    raise RefusedError(
      400, f"messages: the last one has more than {schema.TEXT} characters", "messages"
    )
  return schema.joined(question, asked[:-1][-history:] if history else [])


def _text(message: Message) -> str:
  if message.content is None or isinstance(message.content, str):
    return (message.content or "").strip()
  for part in message.content:
    if part.type != "text":
      raise RefusedError(400, f"messages: parts of type {part.type!r:.40} are not read", "messages")
  return "\n".join(part.text or "" for part in message.content).strip()


def cited(answer: str, documents: Sequence[Found]) -> list[int]:
  """Numbers, from 1, of the documents in which an answer stands; of the best one where it stands in
  none."""
  words = f" {squad_normalize(answer)} "
  if not documents or not words.strip():
    return []
  stands = [i for i, d in enumerate(documents, 1) if words in f" {squad_normalize(d.text)} "]
  return stands or [1]


class _Text:
  """The answer's text as the client gets it: up to a stop, with citations at its end."""

  def __init__(self, stops: Sequence[str]):
    self._stops = [stop for stop in stops if stop]
    self.sent = ""

  def visible(self, text: str) -> tuple[str, bool]:
    """The text before the first stop, and whether there was one."""
    places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)

  def more(self, text: str) -> str:
    """What can be sent of a text that still grows: not half a character, not half a stop."""
    shown, stopped = self.visible(text)
    held = 0 if stopped else max((len(stop) - 1 for stop in self._stops), default=0)
    return self._rest(shown[: len(shown) - held].rstrip("\N{REPLACEMENT CHARACTER}"))

  def end(self, text: str) -> str:
    """The rest."""
    return self._rest(self.visible(text)[0])

  def _rest(self, text: str) -> str:
    if not text.startswith(self.sent):
      return ""
    rest = text[len(self.sent) :]
    self.sent = text
    return rest


class Protocol:
  """Routes over a service's models."""

  def __init__(self, service: "Service"):
    self._service = service

  async def models(self, request: Request) -> Response:
    """GET /v1/models."""
    self._service.model(None)  # or it is not ready
    return JSONResponse(
      {"object": "list", "data": [_described(m) for m in self._service.models.values()]}
    )

  async def model(self, request: Request) -> Response:
    """GET /v1/models/NAME."""
    return JSONResponse(_described(self._service.model(request.path_params["name"])))

  async def completions(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    service = self._service
    body: ChatRequest = await service.read(request, ChatRequest)
    for name, allowed in _REFUSED.items():
      value = (body.model_extra or {}).get(name)
      if value is not None and value not in allowed:
        raise RefusedError(400, f"{name}: not supported", name)
    model = service.model(body.model)
    service.check_count(model, body.k)
    question = Question(
      question_of(body.messages, body.history),
      body.k,
      tuple(body.ids) if body.ids else None,
      min(
        body.max_completion_tokens or body.max_tokens or model.answerer.max_new_tokens,
        model.answerer.max_new_tokens,
      ),
    )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    common = {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model.name,
    }
    if body.stream:
      return await self._stream(model, question, body, stops, common)
    answer = await service.within_time(model.answers.submit(question))
    text, stopped = _Text(stops).visible(answer.answer)
    message = {
      "role": "assistant",
      "content": text + _citations(text, answer, body.citations),
      "refusal": None,
    }
    reason = _reason(answer, stopped)
    return JSONResponse(
      {
        **common,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": _usage(answer),
        "documents": [dataclasses.asdict(d) for d in answer.documents],
      }
    )

  async def _stream(
    self,
    model: "Model",
    question: Question,
    body: ChatRequest,
    stops: Sequence[str],
    common: dict[str, Any],
  ) -> Response:
    """Server-sent events. A refusal comes before the first one."""
    lines: asyncio.Queue = asyncio.Queue()
    service = self._service
    task = asyncio.create_task(
      service.within_time(model.answers.submit(question, lines.put_nowait))
    )
    task.add_done_callback(lambda _: lines.put_nowait(None))
    first = await lines.get()
    if first is None:
      task.result()  # raises
    text = _Text(stops)
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
      choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
      usage = {"usage": None} if with_usage else {}
      return _event(
        {**common, "object": "chat.completion.chunk", "choices": [choice], **usage, **more}
      )

    async def events() -> AsyncIterator[bytes]:
      yield event({"role": "assistant", "content": ""})
      line = first
      while line is not None:
        if part := text.more(line.get("answer", "")):
          yield event({"content": part})
        line = await lines.get()
      try:
        answer = task.result()
      except RefusedError as error:
        yield _event(error_body(error))
        return
      shown, stopped = text.visible(answer.answer)
      if part := text.end(answer.answer) + _citations(shown, answer, body.citations):
        yield event({"content": part})
      documents = [dataclasses.asdict(d) for d in answer.documents]
      yield event({}, _reason(answer, stopped), documents=documents)
      if with_usage:
        usage = {"choices": [], "usage": _usage(answer)}
        yield _event({**common, "object": "chat.completion.chunk", **usage})
      yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> bytes:
  return b"data: " + orjson.dumps(value) + b"\n\n"


def _citations(text: str, answer: Answer, wanted: bool) -> str:
  numbers = cited(text, answer.documents) if wanted else []
  return " " + "".join(f"[{n}]" for n in numbers) if numbers else ""


def _reason(answer: Answer, stopped: bool) -> str:
  return "stop" if stopped or answer.is_whole else "length"


def _usage(answer: Answer) -> dict[str, int]:
  return {
    "prompt_tokens": answer.prompt_tokens,
    "completion_tokens": answer.completion_tokens,
    "total_tokens": answer.prompt_tokens + answer.completion_tokens,
  }


def _described(model: "Model") -> dict[str, Any]:
  return {"id": model.name, "object": "model", "created": model.created, "owned_by": "clara_jax"}


_TYPES = {
  401: "authentication_error",
  404: "not_found_error",
  429: "rate_limit_error",
  503: "server_error",
}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def error_status(status: int) -> int:
  """OpenAI's status for what is refused."""
  return 400 if status == 422 else status


def error_body(error: RefusedError) -> dict[str, Any]:
  """An error in OpenAI's form."""
  field = error.field or str(error).partition(":")[0]
  return {
    "error": {
      "message": str(error),
      "type": _TYPES.get(error.status, "invalid_request_error"),
      "param": field if field.replace("_", "").replace(".", "").isalnum() else None,
      "code": _CODES.get(error.status),
    }
  }
