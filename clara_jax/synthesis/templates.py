"""Prompt templates: Jinja files with a system text, a line `---` and a user text. A user's copies
take the place of ours."""

import hashlib
import importlib.resources
import json
import pathlib
import re
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from clara_jax.config import ConfigError

# The prompts' own tags: in a document they are text and close nothing.
_TAG = re.compile(
  r"<(/?(?:documents?|questions?|pairs|kept|new|missing|paraphrase|problems)\b[^<>]*)>",
  re.IGNORECASE,
)
_PAIRS = [("Who?", "Ada"), ("When?", "1912")]
# The steps, and values such as each one has.
EXAMPLES: dict[str, dict[str, Any]] = {
  "simple_questions": {"document": "Text."},
  "simple_supplement": {"document": "Text.", "pairs": _PAIRS, "missing": ["A fact."], "round": 2},
  "complex_questions": {"document": "Text."},
  "complex_supplement": {"document": "Text.", "pairs": _PAIRS, "missing": ["A fact."], "round": 2},
  "answers": {"document": "Text.", "questions": ["Who?", "When?"], "round": 1},
  "check": {"document": "Text.", "kept": _PAIRS, "pairs": _PAIRS, "kind": "complex", "round": 1},
  "verdict": {"document": "Text.", "pairs": _PAIRS, "kind": "simple"},
  "paraphrase": {"document": "Text.", "problems": ["lost: a fact"], "round": 2},
  "paraphrase_check": {"document": "Text.", "paraphrase": "Other text.", "round": 1},
  "teacher": {"documents": ["One.", "Two."], "question": "Who?"},
}
DEMONSTRATIONS = "demonstrations.json"


class Templates:
  """The prompts of a run.

  A document is a value, never a template: braces in it are text, and so are the prompts' own tags,
  whose brackets become &lt; and &gt;.

  Args:
    directory: `*.jinja` and `demonstrations.json` that take the place of the package's own; others
      stay.

  Attributes:
    sha256: of all that is used, for the manifest.

  Raises:
    ConfigError: a file that is not known, does not parse, uses a name that its step does not have,
      or lacks the line `---`.
  """

  def __init__(self, directory: str | None = None):
    self._files: dict[str, str] = {}
    package = importlib.resources.files("clara_jax.synthesis") / "prompts"
    texts = {
      name: (package / name).read_text(encoding="utf-8")
      for name in (*(f"{n}.jinja" for n in EXAMPLES), DEMONSTRATIONS)
    }
    if directory is not None:
      folder = pathlib.Path(directory)
      if not folder.is_dir():
        raise ConfigError(f"--prompts {directory}: no such directory")
      for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name.endswith(("~", ".md")):  # an editor's, a reader's
          continue
        if file.name not in texts:
          raise ConfigError(f"{file}: no known prompt; known: {', '.join(texts)}")
        try:
          texts[file.name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
          raise ConfigError(f"{file}: not UTF-8 text: {error}") from None
        self._files[file.name] = str(file)
    try:
      self._demonstrations = json.loads(texts[DEMONSTRATIONS])
    except json.JSONDecodeError as error:
      raise ConfigError(f"{self._file(DEMONSTRATIONS)}: {error}") from None
    environment = SandboxedEnvironment(
      undefined=jinja2.StrictUndefined,
      trim_blocks=True,
      lstrip_blocks=True,
      keep_trailing_newline=False,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    self._parts = {}
    for name in EXAMPLES:
      system, line, user = texts[f"{name}.jinja"].partition("\n---\n")
      if not line:
        raise ConfigError(
          f"{self._file(f'{name}.jinja')}: expected a system text, a line ---, and a user text"
        )
      parsed = []
      for part, first in ((system, 1), (user, system.count("\n") + 3)):
        try:
          parsed.append(environment.from_string(part))
        except jinja2.TemplateSyntaxError as error:
          raise ConfigError(
            f"{self._file(f'{name}.jinja')}:{first + error.lineno - 1}: {error.message}"
          ) from None
      self._parts[name] = tuple(parsed)
    for name, values in EXAMPLES.items():  # a template that fails does so now
      prompt_text = str(self.messages(name, **values))
      for key in ("document", "documents", "question"):
        if key in values and not all(
          text in prompt_text
          for text in ([values[key]] if isinstance(values[key], str) else values[key])
        ):
          raise ConfigError(f"{self._file(f'{name}.jinja')}: does not tell its {{{{ {key} }}}}")
    self.sha256 = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

  def messages(self, name: str, **values: Any) -> list[dict[str, str]]:
    """The chat of a step.

    Raises:
      ConfigError: the template uses a name that the step does not have.
    """
    system, user = self._parts[name]
    try:
      values = {
        "demonstrations": self._demonstrations,
        **{key: _as_text(value) for key, value in values.items()},
      }
      return [
        {"role": "system", "content": system.render(values).strip()},
        {"role": "user", "content": user.render(values).strip()},
      ]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise ConfigError(
        f"{self._file(f'{name}.jinja')}: {error}; it has: {', '.join(values)}"
      ) from None

  def _file(self, name: str) -> str:
    return self._files.get(name, name)


def _as_text(value: Any) -> Any:
  if isinstance(value, str):
    return _TAG.sub(r"&lt;\1&gt;", value)
  return [_as_text(v) for v in value] if isinstance(value, (list, tuple)) else value
