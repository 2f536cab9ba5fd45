"""What clients may send and what they get, as pydantic models; the OpenAPI description is made from
them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import Field

TEXT = 4_000  # characters of a question
IDS = 10_000
QUERIES = 256
MOST_DOCUMENTS = 100

Text = Annotated[str, Field(min_length=1, max_length=TEXT, description="a question")]
Id = Annotated[str, Field(min_length=1, max_length=1_000)]
ModelName = Annotated[str, Field(min_length=1, max_length=1_000, description="default: the first")]
Count = Annotated[int, Field(ge=1, le=MOST_DOCUMENTS, description="number of documents")]


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SearchRequest(_Strict):
  """Documents for a question."""

  question: Text
  k: Count | None = None
  ids: (
    Annotated[
      list[Id], Field(min_length=1, max_length=IDS, description="only these documents may be found")
    ]
    | None
  ) = None
  model: ModelName | None = None
  before: (
    Annotated[list[Text], Field(max_length=16, description="earlier questions, read in front")]
    | None
  ) = None


class AnswerRequest(SearchRequest):
  """An answer from the documents that a question finds; `stream`: as lines of JSON while it
  grows."""

  max_new_tokens: Annotated[int, Field(ge=1, le=4_096)] | None = None
  expand: Annotated[int, Field(ge=0, le=MOST_DOCUMENTS)] | None = None
  stream: bool = False


class LensRequest(_Strict):
  """The words that a question's memory tokens stand for."""

  question: Text
  top: Annotated[int, Field(ge=1, le=100)] = 20
  model: ModelName | None = None


class QueriesRequest(_Strict):
  """The released code's retrieval protocol: flattened query memory tokens, [B][M·D]."""

  # The numbers are checked as an array and not one by one: `server.Service._vectors`.
  queries: Annotated[
    list[list[Any]],
    Field(
      min_length=1,
      max_length=QUERIES,
      json_schema_extra={"items": {"type": "array", "items": {"type": "number"}}},
    ),
  ]
  k: Count


class ServedDocument(pydantic.BaseModel):
  """A document and its cosine; `tokens` of `whole_tokens` and `characters` of its text were read
  into memory tokens. `place`: where it stands in its file."""

  id: str
  score: float
  title: str
  text: str
  tokens: int
  whole_tokens: int
  characters: int
  place: str


class SearchResponse(pydantic.BaseModel):
  """Best first."""

  question: str
  documents: list[ServedDocument]


class AnswerResponse(SearchResponse):
  """`timings_ms` are those of the pass that the question shared with others."""

  answer: str
  memory_tokens: int
  timings_ms: dict[str, float]
  prompt_tokens: int
  completion_tokens: int
  is_whole: bool
  doubt: str


class AddRequest(_Strict):
  """A document for the store: its file's name and content; found as soon as this is answered. Only
  where the server was started with --allow-upload."""

  name: Annotated[str, Field(min_length=1, max_length=255)]
  content: Annotated[str, Field(min_length=1, description="base64")]
  model: ModelName | None = None


class AddResponse(pydantic.BaseModel):
  """How many pieces were added, and their ids."""

  documents: int
  ids: list[str]


class LensResponse(pydantic.BaseModel):
  """(word, logit), best first."""

  tokens: list[tuple[str, float]]


class QueriesResponse(pydantic.BaseModel):
  """[B][k][M·D]"""

  retrieved_embeddings: list[list[list[float]]]


class Error(pydantic.BaseModel):
  """What was wrong."""

  error: str


ENDPOINTS = {
  "/queries": (QueriesRequest, QueriesResponse),
  "/search": (SearchRequest, SearchResponse),
  "/answer": (AnswerRequest, AnswerResponse),
  "/lens": (LensRequest, LensResponse),
  "/documents": (AddRequest, AddResponse),
}
ERRORS = {
  400: "no JSON",
  403: "not allowed here",
  404: "no such model",
  401: "the server's token is missing or another",
  413: "too large",
  415: "another type than application/json",
  421: "another host's name",
  422: "a field is missing, unknown or out of bounds",
  429: "too many requests are waiting",
  503: "took longer than the server allows, or it is starting or stopping",
}


def joined(question: str, before: Sequence[str]) -> str:
  """A question with earlier ones in front of it, oldest first; the oldest are left out where they
  do not fit."""
  for text in reversed(before):
    if text and len(text) + len(question) < TEXT:
      question = f"{text} {question}"
  return question


def openapi(
  version: str, more: Mapping[str, tuple[type[pydantic.BaseModel], type[pydantic.BaseModel]]]
) -> dict[str, Any]:
  """The OpenAPI 3.1 description; `more`: endpoints beside ours, with request and response."""
  endpoints = {**ENDPOINTS, **more}
  models = [m for pair in endpoints.values() for m in pair] + [Error]
  _, definitions = pydantic.json_schema.models_json_schema(
    [(m, "validation") for m in models], ref_template="#/components/schemas/{model}"
  )

  def content(model):
    return {
      "content": {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
      }
    }

  paths: dict[str, Any] = {}
  for path, (request, response) in endpoints.items():
    responses = {
      str(status): {"description": text, **content(Error)} for status, text in ERRORS.items()
    }
    paths[path] = {
      "post": {
        "summary": request.__doc__,
        "requestBody": {"required": True, **content(request)},
        "responses": {"200": {"description": response.__doc__, **content(response)}, **responses},
      }
    }
  paths["/healthz"] = {
    "get": {
      "summary": "Whether the server takes requests.",
      "responses": {
        "200": {"description": "it does"},
        "503": {"description": "it is starting (with `progress`) or stopping"},
      },
    }
  }
  paths["/metrics"] = {
    "get": {"summary": "For Prometheus.", "responses": {"200": {"description": "metrics"}}}
  }
  return {
    "openapi": "3.1.0",
    "info": {"title": "clara_jax", "version": version},
    "paths": paths,
    "components": {"schemas": definitions["$defs"]},
  }
