"""Prompt templates: Jinja files with a system text, a line `---` and a user text. A user's copies take the place of ours."""

import hashlib
import importlib.resources
import json
import pathlib
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from clara_jax.config import ConfigError

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

  A document is a value, never a template: braces in it are text.

  Args:
    directory: `*.jinja` and `demonstrations.json` that take the place of the package's own; others stay.

  Attributes:
    sha256: of all that is used, for the manifest.

  Raises:
    ConfigError: a file that is not known, does not parse, uses a name that its step does not have, or lacks the line `---`.
  """

  def __init__(self, directory: str | None = None):
    package = importlib.resources.files("clara_jax.synthesis") / "prompts"
    texts = {name: (package / name).read_text(encoding="utf-8") for name in (*(f"{n}.jinja" for n in EXAMPLES), DEMONSTRATIONS)}
    if directory is not None:
      folder = pathlib.Path(directory)
      if not folder.is_dir():
        raise ConfigError(f"--prompts {directory}: no such directory")
      for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name.endswith(("~", ".md")):  # an editor's, a reader's
          continue
        if file.name not in texts:
          raise ConfigError(f"{file}: no known prompt; known: {', '.join(texts)}")
        texts[file.name] = file.read_text(encoding="utf-8")
    try:
      self._demonstrations = json.loads(texts[DEMONSTRATIONS])
    except json.JSONDecodeError as error:
      raise ConfigError(f"{DEMONSTRATIONS}: {error}") from None
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    self._parts = {}
    for name in EXAMPLES:
      system, line, user = texts[f"{name}.jinja"].partition("\n---\n")
      if not line:
        raise ConfigError(f"{name}.jinja: expected a system text, a line ---, and a user text")
      parsed = []
      for part, first in ((system, 1), (user, system.count("\n") + 3)):
        try:
          parsed.append(environment.from_string(part))
        except jinja2.TemplateSyntaxError as error:
          raise ConfigError(f"{name}.jinja:{first + error.lineno - 1}: {error.message}") from None
      self._parts[name] = tuple(parsed)
    for name, values in EXAMPLES.items():  # a template that fails does so now
      self.messages(name, **values)
    self.sha256 = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()

  def messages(self, name: str, **values: Any) -> list[dict[str, str]]:
    """The chat of a step.

    Raises:
      ConfigError: the template uses a name that the step does not have.
    """
    system, user = self._parts[name]
    try:
      values = {"demonstrations": self._demonstrations, **values}
      return [{"role": "system", "content": system.render(values).strip()}, {"role": "user", "content": user.render(values).strip()}]
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise ConfigError(f"{name}.jinja: {error}; it has: {', '.join(values)}") from None
