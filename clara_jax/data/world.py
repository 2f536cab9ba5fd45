"""A generated world: people, places, companies and works whose every fact is known.

It stands in for Wikipedia where experiments must be small and their answers certain. Each entity has a document in varying words and
order, simple questions (one fact), complex questions (two facts of one document, or a fact that stands in the document of a related
entity) and a paraphrase: what SCP (paper §3.1) wants. Candidates for the joint stage contain hard distractors: documents that share
a first name, a last name or the very answer with the gold one.

Levels of difficulty:
  1  one fact a document;
  2  several facts a document (profiles);
  3  profiles, and questions that need the documents of two entities.

Everything is a function of the configuration and its seed; an entity's text does not depend on how many others there are.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clara_jax.config import ConfigError
from clara_jax.data import prompts

# A relation of a kind of entity: what holds its values, how documents tell it ({s} subject, {v} value), how questions ask for it.
RELATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "person": {
        "born": {
            "values": "place",
            "tell": ("{s} was born in {v}.", "{s} comes from {v}.", "{s} grew up in {v}."),
            "ask": ("Where was {s} born?", "Which town does {s} come from?"),
        },
        "profession": {
            "values": ("painter", "doctor", "baker", "pilot", "lawyer", "teacher", "miner", "singer", "farmer", "tailor", "sailor",
                       "dentist", "plumber", "writer", "banker", "chemist", "dancer", "potter", "judge", "nurse", "actor",
                       "printer", "weaver", "surgeon", "editor", "gardener", "butcher", "carpenter", "driver", "librarian"),
            "tell": ("{s} is a {v}.", "{s} has become a {v}.", "{s} earns money as a {v}."),
            "ask": ("What is the profession of {s}?", "What does {s} do for a living?"),
        },
        "employer": {
            "values": "company",
            "tell": ("{s} works for {v}.", "{s} is employed at {v}.", "{s} has a job with {v}."),
            "ask": ("Who does {s} work for?", "Which company employs {s}?"),
        },
        "instrument": {
            "values": ("violin", "cello", "flute", "piano", "drums", "harp", "guitar", "trumpet", "organ", "oboe", "clarinet",
                       "banjo", "bassoon", "tuba", "lute", "zither", "accordion", "saxophone", "mandolin", "trombone", "horn",
                       "viola", "harmonica", "ukulele"),
            "tell": ("{s} plays the {v}.", "{s} practises the {v}.", "{s} has mastered the {v}."),
            "ask": ("Which instrument does {s} play?", "What instrument has {s} mastered?"),
        },
        "pet": {
            "values": ("parrot", "turtle", "rabbit", "ferret", "hamster", "poodle", "gecko", "pony", "goat", "falcon", "python",
                       "hedgehog", "canary", "beagle", "tortoise", "iguana", "goose", "donkey", "pigeon", "llama", "lizard",
                       "otter", "raven", "terrier"),
            "tell": ("{s} keeps a {v}.", "{s} owns a {v}.", "{s} lives with a {v}."),
            "ask": ("Which animal does {s} keep?", "What pet does {s} own?"),
        },
    },
    "place": {
        "country": {
            "values": ("Ardonia", "Belmark", "Castovia", "Drumland", "Estoria", "Fenwick", "Garvania", "Holmark", "Istria",
                       "Jorland", "Kelmar", "Lusania"),
            "tell": ("{s} lies in {v}.", "{s} is a town of {v}.", "{s} belongs to {v}."),
            "ask": ("In which country is {s}?", "Which country does {s} belong to?"),
        },
        "river": {
            "values": ("Aven", "Brisa", "Corda", "Dellin", "Eskar", "Fosse", "Grell", "Hurn", "Ilva", "Jassa", "Korr", "Lenta"),
            "tell": ("{s} stands on the river {v}.", "The river {v} flows through {s}.", "{s} has a harbour on the {v}."),
            "ask": ("Which river flows through {s}?", "On which river does {s} stand?"),
        },
        "product": {
            "values": ("cheese", "glass", "silk", "honey", "paper", "wine", "salt", "copper", "wool", "pottery", "tea", "marble"),
            "tell": ("{s} is known for its {v}.", "{s} makes {v}.", "People buy {v} from {s}."),
            "ask": ("What is {s} known for?", "What does {s} make?"),
        },
    },
    "company": {
        "seat": {
            "values": "place",
            "tell": ("{s} has its seat in {v}.", "{s} is based in {v}.", "{s} is run from {v}."),
            "ask": ("Where is {s} based?", "In which town is the seat of {s}?"),
        },
        "sector": {
            "values": ("shipping", "insurance", "printing", "brewing", "mining", "banking", "farming", "fishing", "weaving",
                       "building", "trading", "baking"),
            "tell": ("{s} earns money with {v}.", "{s} is a firm for {v}.", "The business of {s} is {v}."),
            "ask": ("What is the business of {s}?", "What does {s} earn money with?"),
        },
        "founded": {
            "values": tuple(str(year) for year in range(1880, 1960)),
            "tell": ("{s} was founded in {v}.", "{s} opened in {v}.", "{s} began its work in {v}."),
            "ask": ("When was {s} founded?", "In which year did {s} open?"),
        },
    },
    "work": {
        "author": {
            "values": "person",
            "tell": ("{s} was made by {v}.", "{v} is the author of {s}.", "{s} is by {v}."),
            "ask": ("Who made {s}?", "Who is the author of {s}?"),
        },
        "form": {
            "values": ("novel", "opera", "film", "poem", "ballet", "play", "symphony", "comic", "musical", "essay"),
            "tell": ("{s} is a {v}.", "{s} was sold as a {v}.", "{s} has the form of a {v}."),
            "ask": ("What form does {s} have?", "What kind of work is {s}?"),
        },
        "setting": {
            "values": "place",
            "tell": ("{s} is set in {v}.", "The story of {s} happens in {v}.", "{s} takes place in {v}."),
            "ask": ("Where is {s} set?", "Where does {s} take place?"),
        },
    },
}

# Complex questions over two documents (level 3): the first relation leads to an entity, the second is that entity's.
LINKS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "person": (
        ("born", "place", "country", "In which country is the town where {s} was born?"),
        ("employer", "company", "sector", "What is the business of the company that employs {s}?"),
        ("employer", "company", "founded", "When was the company that employs {s} founded?"),
    ),
    "company": (("seat", "place", "river", "Which river flows through the town where {s} is based?"),),
    "work": (("author", "person", "instrument", "Which instrument does the author of {s} play?"),),
    "place": (),
}

_ONSETS = ("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "gr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "n", "r", "s", "t", "m", "x", "nd", "rk")
_ADJECTIVES = ("Silent", "Golden", "Broken", "Distant", "Hidden", "Crimson", "Empty", "Frozen", "Gentle", "Hollow", "Lonely",
               "Narrow", "Quiet", "Restless", "Secret", "Velvet")
_NOUNS = ("Harbor", "Garden", "Mirror", "Winter", "Bridge", "Island", "Letter", "Orchard", "Shadow", "Tower", "Valley", "Window",
          "Candle", "Forest", "Lantern", "Meadow")


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """Size and difficulty of a world.

  Attributes:
    level: 1, 2 or 3; see the module docstring.
    people: how many people. Places, companies and works keep their pools' sizes.
    first_names, last_names: sizes of the name pools; small pools make people share names, which makes distractors hard.
    places, companies: sizes of their pools.
    works: how many works, at most 256.
    kinds: which entities have documents of their own.
    relations: how many relations of a person's profile are told, at level 2 and 3.
    wordings: how many ways there are to tell or ask the same, 1 to 3.
    test_fraction: share of the entities of each kind that belongs to the test side.
    seed: of everything.
  """

  level: int = 2
  people: int = 4000
  first_names: int = 80
  last_names: int = 80
  places: int = 40
  companies: int = 40
  works: int = 200
  kinds: tuple[str, ...] = ("person", "place", "company", "work")
  relations: int = 5
  wordings: int = 3
  test_fraction: float = 0.2
  seed: int = 0

  def __post_init__(self):
    if self.level not in (1, 2, 3):
      raise ConfigError(f"world.level={self.level}: expected 1, 2 or 3")
    if self.people > self.first_names * self.last_names:
      raise ConfigError(f"world.people={self.people}: {self.first_names} first and {self.last_names} last names give only "
                        f"{self.first_names * self.last_names} people")
    if self.works > len(_ADJECTIVES) * len(_NOUNS):
      raise ConfigError(f"world.works={self.works}: at most {len(_ADJECTIVES) * len(_NOUNS)}")
    if unknown := set(self.kinds) - set(RELATIONS):
      raise ConfigError(f"world.kinds: unknown {sorted(unknown)}; known: {sorted(RELATIONS)}")
    if not 1 <= self.relations <= 5:
      raise ConfigError(f"world.relations={self.relations}: expected 1 … 5")
    if not 1 <= self.wordings <= 3:
      raise ConfigError(f"world.wordings={self.wordings}: expected 1 … 3")


@dataclasses.dataclass(frozen=True)
class Entity:
  """One entity with its facts: relation -> value."""

  kind: str
  name: str
  facts: dict[str, str]
  is_test: bool

  @property
  def id(self) -> str:
    return f"{self.kind}/{self.name.replace(' ', '_')}"


class World:
  """The entities of a configuration and the rows made from them."""

  def __init__(self, config: WorldConfig = WorldConfig()):
    self.config = config
    rng = random.Random(f"world/{config.seed}")
    taken = {word.lower() for word in _template_words()}
    self.first_names = _coin(rng, config.first_names, taken, lambda r: _syllables(r, 2))
    self.last_names = _coin(rng, config.last_names, taken, lambda r: _syllables(r, 2) + r.choice(_CODAS))
    self._pools = {
        "place": _coin(rng, config.places, taken, lambda r: _syllables(r, 1) + r.choice(("ton", "burg", "ford", "dale", "wick"))),
        "company": _coin(rng, config.companies, taken, lambda r: _syllables(r, 1) + r.choice(("tex", "corp", "via", "dyne", "lux"))),
        "work": [f"The {a} {n}" for a, n in _sample(rng, itertools.product(_ADJECTIVES, _NOUNS), config.works)],
        "person": [f"{f} {l}" for f, l in _sample(rng, itertools.product(self.first_names, self.last_names), config.people)],
    }
    self.entities: dict[str, list[Entity]] = {
        kind: [self._entity(kind, name) for name in self._pools[kind]] for kind in config.kinds}
    self.by_name = {e.name: e for entities in self.entities.values() for e in entities}
    self._sharing: dict[tuple[str, str], list[Entity]] = {}
    for entity in self.by_name.values():
      for key in self._keys(entity):
        self._sharing.setdefault(key, []).append(entity)

  def _rng(self, *names: str) -> random.Random:
    return random.Random("/".join((str(self.config.seed), *names)))

  def _entity(self, kind: str, name: str) -> Entity:
    rng = self._rng("entity", kind, name)
    relations = list(RELATIONS[kind])[:self.config.relations]
    if self.config.level == 1:
      relations = [rng.choice(relations)]
    facts = {relation: rng.choice(self.values(kind, relation)) for relation in relations}
    return Entity(kind, name, facts, rng.random() < self.config.test_fraction)

  def values(self, kind: str, relation: str) -> Sequence[str]:
    """All values that a relation can take."""
    values = RELATIONS[kind][relation]["values"]
    return self._pools[values] if isinstance(values, str) else values

  def _keys(self, entity: Entity) -> list[tuple[str, str]]:
    names = list(zip(("first", "last"), entity.name.split(), strict=True)) if entity.kind == "person" else []
    return [*names, *entity.facts.items()]

  def select(self, test: bool, kinds: Iterable[str] | None = None) -> list[Entity]:
    """The entities of one side, people first."""
    return [e for kind in (kinds or self.config.kinds) for e in self.entities[kind] if e.is_test == test]

  # ---- texts ---------------------------------------------------------------------------------------------------------------

  def document(self, entity: Entity, version: int = 0) -> str:
    """The entity's document; other versions tell the same in other words and another order."""
    rng = self._rng("document", entity.id, str(version))
    relations = list(entity.facts)
    rng.shuffle(relations)
    pronoun = {"person": "She" if entity.name.split()[0][-1] in "aei" else "He"}.get(entity.kind, "It")
    told = []
    for index, relation in enumerate(relations):
      sentence = rng.choice(RELATIONS[entity.kind][relation]["tell"][:self.config.wordings])
      subject = entity.name if index == 0 else pronoun
      subject = subject if sentence.startswith("{s}") or index == 0 else pronoun.lower().replace("he", "him", 1)
      told.append(_capital(sentence.format(s=subject, v=entity.facts[relation])))
    return " ".join(told)

  def question(self, entity: Entity, relation: str, rng: random.Random) -> str:
    """A simple question for one fact."""
    return rng.choice(RELATIONS[entity.kind][relation]["ask"][:self.config.wordings]).format(s=entity.name)

  def complex_question(self, entity: Entity, rng: random.Random) -> tuple[str, str, list[Entity]] | None:
    """(question, answer, documents that are needed): two facts of one document, or at level 3 a fact of a related entity."""
    links = [link for link in LINKS[entity.kind] if link[0] in entity.facts and link[1] in self.config.kinds]
    if self.config.level == 3 and links and rng.random() < 0.5:
      relation, _, second, question = rng.choice(links)
      other = self.by_name[entity.facts[relation]]
      if second in other.facts:
        return question.format(s=entity.name), other.facts[second], [entity, other]
    if len(entity.facts) < 2:
      return None
    first, second = rng.sample(list(entity.facts), 2)
    ask = self.question(entity, second, rng)
    question = f"{self.question(entity, first, rng)[:-1]}, and {ask[0].lower()}{ask[1:]}"
    return question, f"{entity.facts[first]} and {entity.facts[second]}", [entity]

  def distractors(self, entity: Entity, relation: str, count: int, rng: random.Random, hard: float = 0.6) -> list[Entity]:
    """Other entities: about `hard` of them share a first name, a last name or the asked fact, the rest are drawn freely.

    All come from the entity's own side, so that test documents are never seen in training.
    """
    wanted = round(count * hard)
    keys = [key for key in self._keys(entity) if key[0] in ("first", "last", relation)]
    found: dict[str, Entity] = {}
    for key in itertools.chain.from_iterable(itertools.repeat(keys, wanted) if keys else ()):
      if len(found) >= wanted:
        break
      other = rng.choice(self._sharing[key])
      if other.is_test == entity.is_test and other.name != entity.name:
        found[other.name] = other
    pool = [e for kind in self.config.kinds for e in self.entities[kind]]
    while len(found) < count:
      other = rng.choice(pool)
      if other.is_test == entity.is_test and other.name != entity.name:
        found[other.name] = other
    return list(found.values())[:count]

  # ---- rows ----------------------------------------------------------------------------------------------------------------

  def documents(self, test: bool, limit: int | None = None) -> list[dict[str, str]]:
    """Corpus rows: id, title, text."""
    return [{"id": e.id, "title": e.name, "text": self.document(e)} for e in self.select(test)[:limit]]

  def scp_rows(self, test: bool = False, versions: int = 4, complex_share: float = 0.2) -> Iterator[dict[str, Any]]:
    """Two rows for each entity and version: all its questions with answers, and a paraphrase."""
    for entity in self.select(test):
      for version in range(versions):
        rng = self._rng("scp", entity.id, str(version))
        document = self.document(entity, version)
        pairs = [(self.question(entity, r, rng), v) for r, v in entity.facts.items()]
        compound = self.complex_question(entity, rng)
        if compound and compound[2] == [entity] and rng.random() < complex_share:
          pairs.append(compound[:2])
        rng.shuffle(pairs)
        yield {"data_type": "qa", "question": [q for q, _ in pairs], "answers": [a for _, a in pairs], "docs": [document]}
        yield {"data_type": "paraphrase", "question": "", "docs": [document],
               "answer": self.document(entity, versions + 1 + rng.randrange(versions))}

  def question_rows(self, documents: int, test: bool = False, limit: int | None = None, per_entity: int = 1,
                    hard: float = 0.6, complex_share: float = 0.0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One question with its gold document among `documents` candidates (instruct, joint, evaluation)."""
    entities = self.select(test)
    order = self._rng("question rows", str(seed))
    made = 0
    for turn in range(per_entity):
      order.shuffle(entities)
      for entity in entities:
        if limit is not None and made >= limit:
          return
        rng = self._rng("question", entity.id, str(turn), str(seed))
        relation = rng.choice(list(entity.facts))
        question, answer, gold = self.question(entity, relation, rng), entity.facts[relation], [entity]
        if rng.random() < complex_share and (compound := self.complex_question(entity, rng)):
          question, answer, gold = compound
        gold = gold[:documents]
        others = [e for e in self.distractors(entity, relation, documents, rng, hard) if e not in gold]
        chosen = gold + others[:documents - len(gold)]
        rng.shuffle(chosen)
        made += 1
        yield {"id": f"{entity.id}/{relation}/{turn}", "question": question, "answer": answer,
               "docs": [self.document(e) for e in chosen], "doc_ids": [e.id for e in chosen],
               "pos_index": [chosen.index(e) for e in gold], "relation": relation}

  def question_list_rows(self, documents: int, test: bool = False, questions: int = 8, limit: int | None = None,
                         hard: float = 0.6, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Several documents and a list of questions over all of them, in the form of SCP rows.

    One pass over the documents gives many answers to learn from, each of which needs the right document.
    """
    entities = self.select(test)
    order = self._rng("question lists", str(seed))
    order.shuffle(entities)
    for entity in entities[:limit]:
      rng = self._rng("question list", entity.id, str(seed))
      relation = rng.choice(list(entity.facts))
      chosen = [entity, *self.distractors(entity, relation, documents - 1, rng, hard)]
      rng.shuffle(chosen)
      facts = [(e, r) for e in chosen for r in e.facts]
      asked = rng.sample(facts, min(questions, len(facts)))
      yield {"data_type": "qa", "question": [self.question(e, r, rng) for e, r in asked],
             "answers": [e.facts[r] for e, r in asked], "docs": [self.document(e) for e in chosen]}

  # ---- words ---------------------------------------------------------------------------------------------------------------

  def words(self) -> list[str]:
    """Every word that a text of this world can contain, in a fixed order."""
    words = dict.fromkeys(_template_words())
    for names in (self.first_names, self.last_names, *self._pools.values()):
      words.update(dict.fromkeys(w for name in names for w in name.split()))
    return list(words)

  def tokenizer(self) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for this world, with a chat template that leaves the system message out."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *self.words()]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- ' ' + message['content'] + ' =' }}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- endif %}{%- endfor %}")


def write_rows(rows: Iterable[dict[str, Any]], path: str) -> int:
  """Writes JSONL; returns the number of rows."""
  count = 0
  with open(path, "w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
      count += 1
  return count


def _capital(text: str) -> str:
  return text[0].upper() + text[1:]


def _syllables(rng: random.Random, count: int) -> str:
  return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count))


def _coin(rng: random.Random, count: int, taken: set[str], make) -> list[str]:
  made: dict[str, None] = {}
  while len(made) < count:
    word = make(rng)
    if word not in taken:
      taken.add(word)
      made[_capital(word)] = None
  return list(made)


def _sample(rng: random.Random, pairs: Iterable[tuple[str, str]], count: int) -> list[tuple[str, str]]:
  return rng.sample(list(pairs), count)


def _template_words() -> list[str]:
  """Words of all templates, fixed values and prompts; sentences start with a capital, compound questions do not."""
  splitter = pre_tokenizers.Whitespace()
  texts = ["Question: Answer: and He She It him her it =", *prompts.PARAPHRASE_INSTRUCTIONS, "Background:"]
  for kind, relations in RELATIONS.items():
    for relation in relations.values():
      if not isinstance(relation["values"], str):
        texts.extend(relation["values"])
      for text in (*relation["tell"], *relation["ask"]):
        texts.extend((text, text[0].lower() + text[1:]))
    texts.extend(question for *_, question in LINKS[kind])
  texts.extend((*_ADJECTIVES, *_NOUNS))
  words = dict.fromkeys(w for text in texts for w, _ in splitter.pre_tokenize_str(text.replace("{s}", " ").replace("{v}", " ")
                                                                                 .replace("{docs}", " ")))
  return list(words)
