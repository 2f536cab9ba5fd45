"""A stand-in for a language model: it knows the facts of a generated world, and errs on purpose at
given rates.

It understands the prompts by the name of the reply's schema and what stands between the tags; a
request always gets the same reply.
"""

import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clara_jax.experiments.world import Page, World
from clara_jax.synthesis.client import Usage


@dataclasses.dataclass(frozen=True)
class Faults:
  """How often a reply is wrong: an answer, a fact that questions or a paraphrase leave out, JSON
  that does not parse."""

  wrong_answer: float = 0.0
  missing_fact: float = 0.0
  broken_json: float = 0.0


class Offline:
  """Replies about the documents of a world; see `factory.Backend`.

  Args:
    world: whose documents are asked about.
    faults: how often it errs.
    seed: of the errors.
  """

  def __init__(self, world: World, faults: Faults = Faults(), seed: int = 0):
    self.world, self.faults, self._seed = world, faults, seed
    self.usage = Usage(in_flight=1)
    self._pages: dict[str, Page] = {}
    for side in (False, True):
      for page in world.side(side):
        self._pages[world.document(page)] = page

  async def chat(
    self,
    messages: Sequence[Mapping[str, str]],
    *,
    schema: Mapping[str, Any] | None = None,
    name: str = "reply",
    temperature: float = 0.0,
    max_tokens: int = 1024,
    seed: int | None = None,
  ) -> str:
    self.usage.requests += 1
    self.usage.answered += 1
    text = self.reply(messages, name, seed)
    self.usage.prompt_tokens += sum(len(m["content"].split()) for m in messages)
    self.usage.completion_tokens += len(text.split())
    return text

  def reply(self, messages: Sequence[Mapping[str, str]], name: str, seed: int | None = None) -> str:
    """The reply to a chat whose schema has this name."""
    rng = random.Random(
      hashlib.blake2b(
        json.dumps([self._seed, seed, name, list(messages)]).encode(), digest_size=8
      ).digest()
    )
    prompt = messages[1]["content"]
    text = json.dumps(getattr(self, f"_{name}")(prompt, rng), ensure_ascii=False)
    if len(messages) == 2 and rng.random() < self.faults.broken_json:
      return text[: rng.randrange(1, len(text))]
    return text

  def page(self, document: str) -> Page | None:
    """The page that a document is, with or without its title above it."""
    match = self._pages.get(document.strip())
    return match or self._pages.get(document.strip().partition("\n")[2])

  def facts(self, document: str) -> dict[str, str]:
    """Question -> answer, for every wording of every simple question of a document."""
    page = self.page(document)
    if page is None:
      return {}
    return {
      q: page.entity.facts[r] for r in page.relations for q in self.world.wordings(page.entity, r)
    }

  def truth(self, question: str, document: str) -> str | None:
    """The right answer to a simple or a complex question; None where it is no question about the
    document."""
    facts = self.facts(document)
    if question in facts:
      return facts[question]
    for a, b in itertools.permutations(facts, 2):
      if question == compound(a, b):
        return f"{facts[a]} and {facts[b]}"
    return None

  def relations(self, question: str, document: str) -> set[str]:
    """The facts that a question asks for."""
    page = self.page(document)
    relation_by_wording = (
      {q: r for r in page.relations for q in self.world.wordings(page.entity, r)} if page else {}
    )
    if question in relation_by_wording:
      return {relation_by_wording[question]}
    return next(
      (
        {relation_by_wording[a], relation_by_wording[b]}
        for a, b in itertools.permutations(relation_by_wording, 2)
        if question == compound(a, b)
      ),
      set(),
    )

  # ---- replies by schema -------------------------------------------------------------------------

  def _questions(self, prompt, rng):
    document = _last(prompt, "document")
    page = self.page(document)
    if page is None:
      return {"questions": []}
    missing = _listed(_last(prompt, "missing")) if "<missing>" in prompt else None
    relations = [
      r for r in page.relations if missing is None or r in missing or "everything" in missing
    ]
    is_complex = "complex questions" in prompt
    if is_complex and len(page.relations) < 2:
      return {"questions": []}
    chosen_relations = [
      r for r in relations if rng.random() >= self.faults.missing_fact
    ] or relations[:1]
    simple = {r: rng.choice(self.world.wordings(page.entity, r)) for r in page.relations}
    if not is_complex:
      return {"questions": [simple[r] for r in chosen_relations]}
    others = {r: rng.choice([x for x in page.relations if x != r]) for r in chosen_relations}
    return {"questions": [compound(simple[r], simple[others[r]]) for r in chosen_relations]}

  def _answers(self, prompt, rng):
    document = _last(prompt, "document")
    answers = []
    for question in _numbered(_last(prompt, "questions")):
      answer = self.truth(question, document) or "nobody knows"
      if rng.random() < self.faults.wrong_answer:
        answer = rng.choice(
          [w for w in document.replace(".", "").split() if w not in answer.split()]
        )
      answers.append(answer)
    return {"answers": answers}

  def _check(self, prompt, rng):
    document = _last(prompt, "document")
    kept, pairs = (self._pairs(_numbered(_last(prompt, tag)), document) for tag in ("kept", "new"))
    correct = [self.truth(q, document) == a for q, a in pairs]
    covered_relations = set().union(
      *(self.relations(q, document) for q, _ in kept),
      *(self.relations(q, document) for (q, _), c in zip(pairs, correct, strict=True) if c),
    )
    page = self.page(document)
    return {
      "correct": correct,
      "missing": [r for r in page.relations if r not in covered_relations]
      if page
      else ["everything"],
    }

  def _verdict(self, prompt, rng):
    document = _last(prompt, "document")
    page, pairs = self.page(document), self._pairs(_numbered(_last(prompt, "pairs")), document)
    right = all(self.truth(q, document) == a for q, a in pairs)
    covered = page is not None and set(page.relations) <= set().union(
      *(self.relations(q, document) for q, _ in pairs)
    )
    return {
      "correct": right,
      "covered": covered,
      "reason": "" if right and covered else "it is not",
    }

  def _paraphrase(self, prompt, rng):
    page = self.page(_last(prompt, "document"))
    if page is None:
      return {"paraphrase": ""}
    kept_relations = [
      r for r in page.relations if rng.random() >= self.faults.missing_fact
    ] or list(page.relations[:1])
    return {"paraphrase": self.world.document(page, 1 + rng.randrange(50), kept_relations)}

  def _paraphrase_check(self, prompt, rng):
    page, written = self.page(_last(prompt, "document")), _last(prompt, "paraphrase")
    return {
      "lost": [r for r in page.relations if page.entity.facts[r] not in written]
      if page
      else ["everything"],
      "added": [],
    }

  def _teacher(self, prompt, rng):
    question = _last(prompt, "question").strip()
    for document in re.split(r"^\[\d+\] ", _last(prompt, "documents"), flags=re.MULTILINE)[1:]:
      if (answer := self.truth(question, document)) is not None:
        return {"answer": answer}
    return {"answer": ""}

  def _pairs(self, lines, document):
    """Question and answer of lines `QUESTION ANSWER`: the question ends with its last question
    mark."""
    return [
      (line[: line.rindex("?") + 1], line[line.rindex("?") + 1 :].strip())
      for line in lines
      if "?" in line
    ]


def compound(a: str, b: str) -> str:
  """The world's complex question out of two simple ones."""
  return f"{a[:-1]}, and {b[0].lower()}{b[1:]}"


def _last(prompt: str, tag: str) -> str:
  return prompt.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip("\n")


def _numbered(text: str) -> list[str]:
  return [line.partition(". ")[2] for line in text.split("\n") if re.match(r"\d+\. ", line)]


def _listed(text: str) -> list[str]:
  return [line[2:] for line in text.split("\n") if line.startswith("- ")]
