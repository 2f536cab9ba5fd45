"""Requests to a real HTTP server on loopback that has its moods."""

import asyncio
import contextlib
import json
import threading

import pytest

from clara_jax.config import ConfigError
from clara_jax.evaluation import judge
from clara_jax.synthesis.client import BudgetError, Client, Endpoint, RequestError, ask_json, parse
from tests import tiny

web = pytest.importorskip("aiohttp.web")
SCHEMA = {"type": "object", "properties": {"answers": {"type": "array", "items": {"type": "string"}}}}


def reply(text):
  return web.json_response({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


@contextlib.contextmanager
def serving(handle):
  """`handle(body, number of the request)` is a coroutine that returns a response."""
  seen = []
  started, loop = threading.Event(), asyncio.new_event_loop()
  address = []

  async def one(request):
    body = await request.json()
    seen.append((body, request.headers.get("Authorization")))
    return await handle(body, len(seen))

  async def start():
    app = web.Application()
    app.router.add_post("/v1/chat/completions", one)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address.append(runner.addresses[0][1])
    started.set()

  def run():
    asyncio.set_event_loop(loop)
    loop.create_task(start())
    loop.run_forever()
  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  assert started.wait(10)
  yield f"http://127.0.0.1:{address[0]}/v1", seen
  loop.call_soon_threadsafe(loop.stop)
  thread.join()


def chat(url, count=1, work=None, **fields):
  async def run():
    async with Client(Endpoint(url, "m", **{"seconds": 0.5, **fields}), backoff=0.01) as client:
      work_ = work or (lambda: client.chat([{"role": "user", "content": "hello"}], seed=1))
      found = await asyncio.gather(*((work(client) if work else work_()) for _ in range(count)), return_exceptions=True)
      return found, client.usage
  return asyncio.run(run())


def test_what_may_pass_is_tried_again():
  async def handle(body, number):
    if number == 1:
      return web.Response(status=429, headers={"Retry-After": "0.05"})
    if number == 2:
      return web.Response(status=500)
    if number == 3:
      await asyncio.sleep(1)
    if number == 4:
      return web.Response(text="{not JSON")
    if number == 5:
      return web.json_response({"choices": []})
    return reply("done")
  with serving(handle) as (url, seen):
    (found,), usage = chat(url, api_key="k")
  assert found == "done" and usage.requests == 6 and usage.answered == 1
  assert usage.retries == {"429": 1, "5xx": 1, "timeout": 1, "reply": 2} and (usage.prompt_tokens, usage.completion_tokens) == (7, 3)
  body, key = seen[0]
  assert body["model"] == "m" and body["seed"] == 1 and key == "Bearer k" and usage.in_flight < 64


def test_what_will_not_pass_is_said():
  async def handle(body, number):
    return web.Response(status=400 if body["max_tokens"] == 5 else 503, text="no such model")
  with serving(handle) as (url, _):
    (refused,), _ = chat(url, work=lambda c: c.chat([], max_tokens=5))
    (tired,), usage = chat(url, attempts=3)
  assert isinstance(refused, RequestError) and "400: no such model" in str(refused)
  assert isinstance(tired, RequestError) and "no answer in 3 tries" in str(tired) and usage.requests == 3
  (nobody,), _ = chat("http://127.0.0.1:9/v1", attempts=2)
  assert isinstance(nobody, RequestError) and "connection" in str(nobody)
  with pytest.raises(ConfigError, match="expected http://"):
    Endpoint("localhost:8000", "m")


def test_no_more_in_flight_than_allowed_and_the_limit_adapts():
  flying, most = 0, 0

  async def handle(body, number):
    nonlocal flying, most
    flying += 1
    most = max(most, flying)
    await asyncio.sleep(0.02)
    flying -= 1
    return web.Response(status=429) if number <= 8 else reply("done")
  with serving(handle) as (url, _):
    found, usage = chat(url, count=60, in_flight=8)
  assert found == ["done"] * 60 and most == 8 and usage.retries == {"429": 8}
  assert 6 <= usage.in_flight <= 8  # shrunk once, grown again


def test_budgets():
  async def handle(body, number):
    return reply("done")
  with serving(handle) as (url, seen):
    found, _ = chat(url, count=10, max_requests=4, in_flight=2)
    assert found.count("done") == 4 == len(seen) and sum(isinstance(f, BudgetError) for f in found) == 6
    found, usage = chat(url, count=10, max_tokens=25, in_flight=1)
    assert found.count("done") == 3 and usage.prompt_tokens + usage.completion_tokens == 30


@pytest.mark.parametrize("text, wanted", [
    ('{"answers": ["a"]}', ["a"]), ('Sure!\n```json\n{"answers": []}\n```', []), ('{"answers": ["{"]} and more', ["{"]),
    ("nothing", "there is no JSON object"), ('{"answers": [', "not valid JSON"), ('{"answer": []}', "lacks 'answers'"),
    ('{"answers": [1]}', r"answers\[0\]: expected string, got int"), ('{"answers": "a"}', "expected array, got str")])
def test_replies_are_parsed(text, wanted):
  if isinstance(wanted, list):
    assert parse(text, SCHEMA)["answers"] == wanted
  else:
    with pytest.raises(ValueError, match=wanted):
      parse(text, SCHEMA)


def test_a_reply_that_does_not_parse_is_repaired_once():
  async def handle(body, number):
    repaired = len(body["messages"]) == 3
    return reply('{"answers": ["x"]}' if repaired and body["model"] == "m" and body["max_tokens"] == 9 else '{"answers": ')
  async def ask(client, tokens):
    return await ask_json(client, [{"role": "user", "content": "?"}], SCHEMA, "answers", max_tokens=tokens)
  with serving(handle) as (url, seen):
    (found,), _ = chat(url, work=lambda c: ask(c, 9))
    assert found == {"answers": ["x"]} and "corrected JSON" in seen[1][0]["messages"][2]["content"]
    assert seen[0][0]["response_format"]["json_schema"]["name"] == "answers"
    (lost,), usage = chat(url, work=lambda c: ask(c, 8))
    assert isinstance(lost, RequestError) and "nor does its repair" in str(lost) and usage.requests == 2


def test_a_judge_of_grounding():
  rows = tiny.rows("joint")[:6]
  predictions = [{"prediction": r.answers[0] if i % 2 else "zebra", "ranked": [*r.gold, *range(6)], "documents_read": 1 if i else 0}
                 for i, r in enumerate(rows)]

  async def handle(body, number):
    text = body["messages"][1]["content"]
    answer, documents = (text.split(f"<{name}>")[1].split(f"</{name}>")[0] for name in ("answer", "documents"))
    return reply(json.dumps({"grounded": answer in documents, "reason": "it stands there"}))
  with serving(handle) as (url, seen):
    usage = judge.grounding(rows, predictions, Endpoint(url, "m"))
    assert [p.get("grounded") for p in predictions] == [None, 1.0, 0.0, 1.0, 0.0, 1.0] and usage.answered == 5
    judge.grounding(rows, predictions, Endpoint(url, "m"))
    assert len(seen) == 5  # no verdict is asked for twice
