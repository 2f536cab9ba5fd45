"""What a model's reply says: its text, whatever form a server gives it, without its thought, and
the JSON object in it."""

import json
import re
from collections.abc import Mapping
from typing import Any

# How models mark thought: (what opens it, what closes it). A server may have cut the opening mark
# off, or hidden special tokens.
_MARKS = (
  (
    r"<(?:think|thinking|thought|reasoning|seed:think)>",
    r"</(?:think|thinking|thought|reasoning|seed:think)>",
  ),
  (r"\[THINK\]", r"\[/THINK\]"),
  (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
  (r"◁think▷", r"◁/think▷"),
  (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
)
_OPENS = re.compile("|".join(opens for opens, _ in _MARKS), re.IGNORECASE)
_CLOSES = re.compile("|".join(closes for _, closes in _MARKS), re.IGNORECASE)
# gpt-oss writes channels; the last "final" one is the answer.
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|\w+\|>[^<]*?)?<\|message\|>", re.IGNORECASE)
_BARE_FINAL = re.compile(r"^analysis\b.*assistantfinal", re.DOTALL)
_END = re.compile(r"<\|(?:end|return|call)\|>")

_TRIES = 2000  # opening brackets that are tried
_FENCE = re.compile(r"\A\s*(?:```(?:json)?\s*)?(\{.*\})\s*(?:```\s*)?\Z", re.DOTALL)


class ReplyTextError(ValueError):
  """A reply has no text that counts; the message says why, and which option helps."""


def text_of(choice: Mapping[str, Any]) -> str:
  """The text of one of a completion's `choices`.

  `content` may be a list of parts, or missing where a server that parses reasoning has put a
  finished reply, a JSON object from beginning to end, into `reasoning_content`.

  Args:
    choice: as the server sent it.

  Raises:
    ReplyTextError: the reply was cut, refused or withheld, or has no text.
  """
  message = choice.get("message")
  message = message if isinstance(message, dict) else {"content": choice.get("text")}
  content = message.get("content")
  if isinstance(content, list):
    parts = [
      p.get("text")
      for p in content
      if isinstance(p, dict) and p.get("type", "text") in ("text", "output_text")
    ]
    content = "".join(p for p in parts if isinstance(p, str))
  finish = choice.get("finish_reason")
  if finish == "length":
    raise ReplyTextError(
      "the reply was cut (finish_reason: length): it needs more tokens (synthesize: "
      "--max-reply-tokens)"
    )
  if isinstance(message.get("refusal"), str) and message["refusal"]:
    raise ReplyTextError(f"the model refuses: {message['refusal'][:200]}")
  if finish == "content_filter":
    raise ReplyTextError("the server withholds the reply (finish_reason: content_filter)")
  if not content:
    # A whole object is no thought.
    content = next(
      (
        match[1]
        for k in ("reasoning_content", "reasoning")
        if isinstance(message.get(k), str) and (match := _whole(message[k]))
      ),
      content,
    )
  if not isinstance(content, str):
    raise ReplyTextError("the reply has no text")
  return content.encode("utf-8", "replace").decode()  # half of a surrogate pair


def _whole(text: str) -> re.Match | None:
  """A text that is one JSON object, bare or in a code fence, from its beginning to its end."""
  if match := _FENCE.match(text):
    try:
      json.loads(match[1])
      return match
    except (ValueError, RecursionError):
      pass
  return None


def spoken(text: str) -> str:
  """A reply without its thought: what follows the last closing mark; nothing where a channel of
  thought is the last one."""
  if channels := list(_CHANNEL.finditer(text)):
    if channels[-1][1].lower() != "final":
      return ""
    return _END.split(text[channels[-1].end() :])[0]
  if match := _BARE_FINAL.match(text):
    return text[match.end() :]
  return text[max((closing.end() for closing in _CLOSES.finditer(text)), default=0) :]


def parse(text: str, schema: Mapping[str, Any]) -> Any:
  """The JSON object in a reply, checked: bare, in a code fence, or between other words. Of several,
  the last counts: drafts come first.

  Args:
    text: the reply; what a model thinks aloud is skipped (`spoken`).
    schema: of the types object, array, string, boolean, integer and number, with properties (all
      required) and items.

  Raises:
    ValueError: there is none, or it is not by the schema; with the place.
  """
  text = whole[1] if (whole := _whole(text)) else spoken(text)
  problem, result, end, tries = None, None, 0, 0
  thoughts = [opening.start() for opening in _OPENS.finditer(text)]
  for start in (match.start() for match in re.finditer(r"\{", text)):
    if start < end:
      continue
    if (tries := tries + 1) > _TRIES:
      raise ValueError(f"more than {_TRIES} opening brackets")
    try:
      value, after = json.JSONDecoder().raw_decode(text, start)
      json.dumps(value, ensure_ascii=False).encode()
      _check(value, schema, "the reply")
      thoughts = [t for t in thoughts if not start < t < after]  # a mark within the object is text
      result, end = [value], after
    except json.JSONDecodeError as error:
      problem = problem or f"not valid JSON: {error}"
    except (UnicodeEncodeError, RecursionError) as error:
      problem = problem or f"no text that can be kept: {type(error).__name__}"
    except ValueError as error:
      problem = problem or str(error)
  if thoughts:
    raise ValueError("the reply's thought does not end")
  if result is None:
    raise ValueError(problem or "there is no JSON object")
  return result[0]


_TYPES = {
  "object": dict,
  "array": list,
  "string": str,
  "boolean": bool,
  "integer": int,
  "number": (int, float),
}


def _check(value: Any, schema: Mapping[str, Any], where: str) -> None:
  kind = schema["type"]
  if (
    not isinstance(value, _TYPES[kind]) or kind in ("integer", "number") and isinstance(value, bool)
  ):
    raise ValueError(f"{where}: expected {kind}, got {type(value).__name__}")
  for name, inner in schema.get("properties", {}).items():
    if name not in value:
      raise ValueError(f"{where}: lacks {name!r}")
    _check(value[name], inner, f"{where}.{name}")
  if kind == "array":
    for i, item in enumerate(value):
      _check(item, schema["items"], f"{where}[{i}]")
