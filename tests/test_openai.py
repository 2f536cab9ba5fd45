"""The protocol of chat clients, tried with OpenAI's own client."""

import dataclasses
import threading

import pytest

openai = pytest.importorskip("openai")

from clara_jax.inference.answer import Found  # noqa: E402
from clara_jax.serving import guard, server  # noqa: E402
from clara_jax.serving import openai as protocol  # noqa: E402
from clara_jax.serving.errors import RefusedError  # noqa: E402
from tests.helpers import question, running  # noqa: E402


@pytest.fixture(scope="module")
def chat(answerer):
  with running(answerer, server.Limits(batch=8)) as (client, _):
    yield openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def asked(text=None, *before):
  return [*before, {"role": "user", "content": question() if text is None else text}]


def test_models(chat):
  assert [model.id for model in chat.models.list()] == ["clara"]
  assert chat.models.retrieve("clara").object == "model"
  with pytest.raises(openai.NotFoundError) as error:
    chat.models.retrieve("gpt-4o")
  assert error.value.code == "model_not_found"


def test_a_completion(chat, answerer):
  (expected,) = answerer.answer(question())
  reply = chat.chat.completions.create(model="clara", messages=asked())
  (choice,) = reply.choices
  assert choice.message.role == "assistant"
  text, _, numbers = choice.message.content.rpartition(" ")
  assert text == expected.answer and numbers.startswith("[") and numbers.endswith("]")
  assert choice.finish_reason == ("stop" if expected.is_whole else "length")
  assert reply.usage.completion_tokens == expected.completion_tokens
  assert reply.usage.prompt_tokens == expected.prompt_tokens > 20
  assert reply.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens
  assert reply.documents == [dataclasses.asdict(d) for d in expected.documents]


def test_a_stream_is_the_completion(chat):
  for extra in ({}, {"citations": False}, {"k": 1}):
    arguments = {"model": "clara", "messages": asked(), "extra_body": extra}
    whole = chat.chat.completions.create(**arguments)
    chunks = list(
      chat.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    )
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant" and len(deltas) > 2
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    (last,) = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert last.documents == whole.documents
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1


def test_what_a_conversation_asks(chat, answerer):
  before = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": question(3)},
    {"role": "assistant", "content": "Nobody."},
  ]
  reply = chat.chat.completions.create(model="clara", messages=asked(None, *before))
  (joined,) = answerer.answer(f"{question(3)} {question()}")
  assert reply.documents == [dataclasses.asdict(d) for d in joined.documents]
  alone = chat.chat.completions.create(
    model="clara", messages=asked(None, *before), extra_body={"history": 0}
  )
  (expected,) = answerer.answer(question())
  assert alone.documents == [dataclasses.asdict(d) for d in expected.documents]
  parts = asked([{"type": "text", "text": question()}])
  assert chat.chat.completions.create(model="clara", messages=parts).documents == alone.documents


def test_a_stop_ends_the_answer(chat):
  arguments = {"model": "clara", "messages": asked(), "extra_body": {"citations": False}}
  text = chat.chat.completions.create(**arguments).choices[0].message.content
  stop = text[2:4]
  cut = chat.chat.completions.create(**arguments, stop=[stop])
  assert cut.choices[0].message.content == text[: text.index(stop)]
  assert cut.choices[0].finish_reason == "stop"
  chunks = chat.chat.completions.create(**arguments, stop=stop, stream=True)
  parts = [c.choices[0].delta.content or "" for c in chunks]
  assert "".join(parts) == text[: text.index(stop)]


def test_max_tokens_and_what_has_no_effect(chat, answerer):
  reply = chat.chat.completions.create(
    model="clara", messages=asked(), max_tokens=2, temperature=0.7, top_p=0.9, seed=1, user="me"
  )
  assert reply.usage.completion_tokens == 2 and reply.choices[0].finish_reason == "length"
  more = chat.chat.completions.create(model="clara", messages=asked(), max_completion_tokens=9999)
  assert more.usage.completion_tokens <= answerer.max_new_tokens


@pytest.mark.parametrize(
  "given, error, param",
  [
    ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
    ({"n": 2}, openai.BadRequestError, "n"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ({"logprobs": True}, openai.BadRequestError, "logprobs"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": asked("")}, openai.BadRequestError, "messages"),
    ({"messages": asked("q" * 5000)}, openai.BadRequestError, "messages"),
    (
      {"messages": [{"role": "assistant", "content": "I"}]},
      openai.BadRequestError,
      "messages",
    ),
    (
      {"messages": asked([{"type": "image_url", "image_url": {"url": "data:,"}}])},
      openai.BadRequestError,
      "messages",
    ),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"extra_body": {"k": 90}}, openai.BadRequestError, "k"),
    ({"extra_body": {"ids": ["nobody"]}}, openai.BadRequestError, None),
    ({"extra_body": {"ids": ["nobody"]}, "stream": True}, openai.BadRequestError, None),
  ],
)
def test_errors_have_their_form(chat, given, error, param):
  with pytest.raises(error) as raised:
    chat.chat.completions.create(**{"model": "clara", "messages": asked(), **given})
  assert raised.value.param == param and raised.value.type and str(raised.value)


def test_a_token(answerer):
  with running(answerer, server.Limits(), guard.Access(token="secret")) as (client, _):
    base = f"{client.base_url}/v1"
    with pytest.raises(openai.AuthenticationError) as raised:
      openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
    assert raised.value.code == "invalid_api_key"
    right = openai.OpenAI(base_url=base, api_key="secret")
    assert right.chat.completions.create(model="clara", messages=asked()).choices


def test_everybody_gets_his_own_completion(chat, answerer):
  questions = [question(i) for i in range(16)]
  expected = {q: answerer.answer(q)[0].answer for q in questions}
  wrong = []

  def ask(q, stream):
    arguments = {"model": "clara", "messages": asked(q), "extra_body": {"citations": False}}
    if stream:
      chunks = chat.chat.completions.create(**arguments, stream=True)
      got = "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
      got = chat.chat.completions.create(**arguments).choices[0].message.content
    if got != expected[q]:
      wrong.append((q, got))

  threads = [threading.Thread(target=ask, args=(q, i % 2 == 0)) for i, q in enumerate(questions)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


# In the form of Open WebUI's requests: a stream that asks for usage (open-webui/open-webui#27661).
OPEN_WEBUI = {
  "stream": True,
  "model": "clara",
  "messages": [
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "A baker. [1]"},
    {"role": "user", "content": "And where does he live?"},
  ],
  "stream_options": {"include_usage": True},
  "temperature": 0.8,
  "max_tokens": 4096,
}


def test_what_a_chat_front_end_sends(chat):
  response = chat.post("/chat/completions", body=OPEN_WEBUI, cast_to=object, stream=False)
  assert str(response).count("data: ") > 3 and "data: [DONE]" in str(response)


def test_which_documents_are_cited():
  documents = [
    Found(str(i), 0.5, "", text, 1, 1, 1)
    for i, text in enumerate(("He lives in Oslo.", "Nothing.", "Oslo, the town"))
  ]
  assert protocol.cited("oslo", documents) == [1, 3]
  assert protocol.cited("Bergen", documents) == [1]
  assert protocol.cited("slo", documents) == [1]  # a part of a word is none
  assert protocol.cited("", documents) == [] and protocol.cited("Oslo", []) == []


def test_a_text_that_grows():
  text = protocol._Text(["END"])
  grown = ["He", "He l\N{REPLACEMENT CHARACTER}", "He lives", "He lives. EN", "He lives. END. Yes"]
  parts = [text.more(t) for t in grown]
  assert "".join(parts) + text.end(grown[-1]) == "He lives. "
  assert text.end(grown[-1]) == ""


def test_a_question_that_is_too_long_with_its_history():
  messages = [protocol.Message(role="user", content="b" * 3990)] * 2
  messages.append(protocol.Message(role="user", content="q" * 3990))
  assert protocol.question_of(messages, 2) == "q" * 3990
  with pytest.raises(RefusedError, match="more than 4000 characters"):
    protocol.question_of([protocol.Message(role="user", content="q" * 4001)], 0)
