"""Chat templates of others: the prompt as it will be asked, and how an answer goes on from it.

    prompt    the template's own, with the generation prompt and with thinking off where the template knows it
    answer    the prompt, token for token, then the answer, then the end of the turn as the template writes it

How a template goes on is found by asking it (`_continuation`): what stands between the prompt and
an answer, and what ends the turn. Words there (the header of the assistant's turn, where a template
does not know `add_generation_prompt`) belong to the prompt, blanks (the one after Mistral's
`[/INST]`) to the answer.
"""  # noqa: E501

import ctypes
import datetime
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clara_jax.data.schemas import DataError

log = logging.getLogger(__name__)

# For tokenizers that bring none. It has no special token but those of the tokenizer.
PLAIN = (
  "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ "
  "message['content'] }}{{ '\\n\\n' }}"
  "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}{{ '\\n' }}"
  "{% else %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\\n' }}{% endif %}{% "
  "endfor %}"
  "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

SECONDS = 10.0  # that a template may take for a prompt

Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
  """The chat template of a tokenizer.

  Args:
    tokenizer: a Hugging Face tokenizer; `PLAIN` becomes its template where it has none.
    date: what a template is told that asks for the date; default: today's.

  Attributes:
    asks_date: whether the template asks for the date.
    date: the date that it is told.
    before: blanks between a prompt and its answer.
    after: what follows an answer in the template's words.

  Raises:
    DataError: the template cannot be used: it fails, has several variants without a default, or
      does not show what it is given.
  """

  def __init__(self, tokenizer: Any, date: datetime.date | None = None):
    self._tokenizer = tokenizer
    self.date = date or datetime.date.today()
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template:
      raise DataError(
        f"{self._name}: has the chat templates {sorted(template)}, none 'default'; give one with "
        f"--chat-template FILE"
      )
    if not template:
      log.warning(
        f"{self._name}: has no chat template; a plain one is used (User: … Assistant: …), "
        f"--chat-template FILE gives another"
      )
      tokenizer.chat_template = PLAIN
    text = (
      tokenizer.chat_template["default"]
      if isinstance(tokenizer.chat_template, dict)
      else tokenizer.chat_template
    )
    formats = {form for _, form in re.findall(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", text)}
    self.asks_date = bool(formats)
    self._source = (
      _with_date(text, {form: self.date.strftime(form) for form in formats}) if formats else text
    )
    self._folds = not self._shows_system()
    self._header, self.before, self.after = self._continuation()

  @property
  def _name(self) -> str:
    return self._tokenizer.name_or_path or "the tokenizer"

  def prompt(self, messages: Messages) -> str:
    """The prompt that asks for the assistant's next turn.

    Raises:
      DataError: the template fails on these messages.
    """
    return self._render(self._folded(messages), True) + self._header

  def _folded(self, messages: Messages) -> Messages:
    """Where the template has no place for a system message, its text goes in front of the user's,
    as in the released code."""
    if not self._folds or messages[0]["role"] != "system":
      return messages
    return [
      {"role": "user", "content": f"{messages[0]['content']}\n{messages[1]['content']}"},
      *messages[2:],
    ]

  def _render(self, messages: Messages, ask: bool) -> str:
    try:
      return _within(
        SECONDS,
        lambda: self._tokenizer.apply_chat_template(
          list(messages),
          chat_template=self._source,
          tokenize=False,
          add_generation_prompt=ask,
          enable_thinking=False,
        ),
      )
    except TimeoutError:
      raise DataError(
        f"{self._name}: its chat template takes longer than {SECONDS:g} s{_ANOTHER}"
      ) from None
    except Exception as error:  # jinja2's, and whatever a template raises
      raise DataError(
        f"{self._name}: its chat template fails: {' '.join(str(error).split())[:300]}"
      ) from None

  def _shows_system(self) -> bool:
    try:
      text = self._render(_SYSTEM + _USER, True)
    except DataError:
      return False
    return _SYSTEM[0]["content"] in text

  def _continuation(self) -> tuple[str, str, str]:
    """(what belongs to the prompt although the template writes it with the answer, blanks before an
    answer, what follows it)."""
    answer = _ANSWER[0]["content"]
    continuation = None
    # With the system text first; some templates put it into the last user turn, so that an answer
    # changes the prompt.
    for messages in (self._folded(_SYSTEM + _USER), _USER):
      prompt, whole = self._render(messages, True), self._render(messages + _ANSWER, False)
      for part in messages:
        if part["content"] not in prompt:
          raise DataError(
            f"{self._name}: its chat template does not show the {part['role']}'s message{_ANOTHER}"
          )
      before, shown, after = whole.rpartition(answer)
      if not shown:
        raise DataError(
          f"{self._name}: its chat template does not show the assistant's message{_ANOTHER}"
        )
      if before.startswith(prompt):
        before = before.removeprefix(prompt)
        blank = re.search(r"\s*$", before)[0] if not before.strip() else ""
        return before.removesuffix(blank), blank, after
      # A prompt that an answered turn does not repeat (a thinking block that is opened): the answer
      # follows it at once.
      continuation = "", "", after
    return continuation


class _Stopped(BaseException):
  """Raised within a template that takes too long."""


def _within(seconds: float, call: Callable[[], str]) -> str:
  """What a call returns. A template of others may hold loops without end: it runs in a thread of
  its own, which can be stopped.

  Raises:
    TimeoutError: it has not returned in time.
  """
  outcome: list[Any] = []

  def run():
    try:
      outcome.append((call(), None))
    except _Stopped:
      pass
    except Exception as error:
      outcome.append((None, error))

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  if thread.is_alive():
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
      ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped)
    )
    raise TimeoutError
  text, error = outcome[0]
  if error is not None:
    raise error
  return text


def _with_date(template: str, dates: Mapping[str, str]) -> str:
  """A template whose `strftime_now` gives one date, by its format: transformers' own gives that of
  the clock."""
  return (
    f"{{%- macro strftime_now(format) -%}}{{{{ {json.dumps(dates)}[format] }}}}{{%- endmacro "
    f"-%}}{template}"
  )


_ANOTHER = "; give another with --chat-template FILE"
_SYSTEM = [{"role": "system", "content": "Kwv system zqf."}]
_USER = [{"role": "user", "content": "Kwv user zqf?"}]
_ANSWER = [{"role": "assistant", "content": "Kwv answer zqf."}]
