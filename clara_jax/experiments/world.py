"""A generated world: people, places, companies and works whose every fact is known.

It stands in for Wikipedia where experiments must be small and their answers certain. Each entity
has a document in varying words and order, simple questions (one fact), complex questions (two facts
of one document, or a fact that stands in the document of a related entity) and a paraphrase: what
SCP (paper §3.1) wants. Candidates for the joint stage contain hard distractors: documents that
share a first name, a last name or the very answer with the gold one.

Levels of difficulty:
  1  one fact a document;
  2  several facts a document (profiles);
  3  profiles, and questions that need the documents of two entities.

Everything is a function of the configuration and its seed; a person's text does not depend on how
many people there are.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clara_jax.config import ConfigError
from clara_jax.data import prompts

# A relation of a kind of entity: what holds its values, how documents tell it ({s} subject, {v}
# value), how questions ask for it. A person's first question repeats words of the documents, the
# second does not: retrieval has to learn what it means.
RELATIONS: dict[str, dict[str, dict[str, Any]]] = {
  "person": {
    "born": {
      "values": "place",
      "tell": (
        "{s} was born many years ago in the quiet town of {v}.",
        "{s} spent the early years of childhood in the town of {v}.",
        "The town in which {s} first saw the light of day is {v}.",
      ),
      "ask": (
        "In which town was {s} born?",
        "Which place is {s} a native of?",
        "Where did {s} first see the light?",
      ),
    },
    "profession": {
      "values": (
        "painter",
        "doctor",
        "baker",
        "pilot",
        "lawyer",
        "teacher",
        "miner",
        "singer",
        "farmer",
        "tailor",
        "sailor",
        "dentist",
        "plumber",
        "writer",
        "banker",
        "chemist",
        "dancer",
        "potter",
        "judge",
        "nurse",
        "actor",
        "printer",
        "weaver",
        "surgeon",
        "editor",
        "gardener",
        "butcher",
        "carpenter",
        "driver",
        "librarian",
      ),
      "tell": (
        "{s} has made a good living for many years as a {v}.",
        "{s} went to school for a long time to become a {v}.",
        "{s} is known to all of the neighbours as a skilful {v}.",
      ),
      "ask": (
        "How does {s} make a living?",
        "What is the profession of {s}?",
        "What is {s} known as?",
      ),
    },
    "employer": {
      "values": "company",
      "tell": (
        "{s} goes to the office every morning to work for {v}.",
        "{s} has had the same job for ten years at {v}.",
        "The money that {s} takes home every month comes from {v}.",
      ),
      "ask": (
        "Who does {s} work for?",
        "Which firm is {s} employed by?",
        "Who pays {s} every month?",
      ),
    },
    "instrument": {
      "values": (
        "violin",
        "cello",
        "flute",
        "piano",
        "drums",
        "harp",
        "guitar",
        "trumpet",
        "organ",
        "oboe",
        "clarinet",
        "banjo",
        "bassoon",
        "tuba",
        "lute",
        "zither",
        "accordion",
        "saxophone",
        "mandolin",
        "trombone",
        "horn",
        "viola",
        "harmonica",
        "ukulele",
      ),
      "tell": (
        "{s} likes to sit down in the evening and play the {v}.",
        "{s} took lessons for a long time to master the {v}.",
        "{s} is often asked by friends to bring along the {v}.",
      ),
      "ask": (
        "What does {s} play in the evening?",
        "Which musical instrument does {s} practise?",
        "What do friends ask {s} to bring?",
      ),
    },
    "pet": {
      "values": (
        "parrot",
        "turtle",
        "rabbit",
        "ferret",
        "hamster",
        "poodle",
        "gecko",
        "pony",
        "goat",
        "falcon",
        "python",
        "hedgehog",
        "canary",
        "beagle",
        "tortoise",
        "iguana",
        "goose",
        "donkey",
        "pigeon",
        "llama",
        "lizard",
        "otter",
        "raven",
        "terrier",
      ),
      "tell": (
        "{s} shares the house and the garden with a much loved {v}.",
        "{s} gets up early every day to feed a rather old {v}.",
        "{s} is seen in the park at noon with a {v}.",
      ),
      "ask": (
        "What does {s} share the house with?",
        "Which animal does {s} keep?",
        "What is {s} seen with in the park?",
      ),
    },
    "dish": {
      "values": (
        "soup",
        "goulash",
        "pancake",
        "risotto",
        "omelette",
        "stew",
        "dumpling",
        "pudding",
        "noodles",
        "salad",
        "curry",
        "pie",
        "waffle",
        "lentils",
        "herring",
        "trout",
        "porridge",
        "cabbage",
        "sausage",
        "mushrooms",
        "strudel",
        "spinach",
        "lobster",
        "muffin",
      ),
      "tell": (
        "{s} is always happy to come home to a plate of {v}.",
        "{s} will go a long way on foot for good {v}.",
        "On Sundays {s} cooks for the whole street a pot of {v}.",
      ),
      "ask": (
        "What is {s} happy to come home to?",
        "What is the favourite dish of {s}?",
        "What does {s} cook on Sundays?",
      ),
    },
  },
  "place": {
    "country": {
      "values": (
        "Ardonia",
        "Belmark",
        "Castovia",
        "Drumland",
        "Estoria",
        "Fenwick",
        "Garvania",
        "Holmark",
        "Istria",
        "Jorland",
        "Kelmar",
        "Lusania",
      ),
      "tell": (
        "{s} is one of the oldest towns in the country of {v}.",
        "{s} lies behind the hills in the middle of the land of {v}.",
        "On the map of the world {s} is to be found in {v}.",
      ),
      "ask": ("In which country is {s}?", "Which country does {s} belong to?"),
    },
    "river": {
      "values": (
        "Aven",
        "Brisa",
        "Corda",
        "Dellin",
        "Eskar",
        "Fosse",
        "Grell",
        "Hurn",
        "Ilva",
        "Jassa",
        "Korr",
        "Lenta",
      ),
      "tell": (
        "{s} stands on both banks of the wide and slow river {v}.",
        "{s} has a small harbour for boats on the river {v}.",
        "In spring {s} is often flooded by the cold river {v}.",
      ),
      "ask": ("Which river flows through {s}?", "On which river does {s} stand?"),
    },
    "product": {
      "values": (
        "cheese",
        "glass",
        "silk",
        "honey",
        "paper",
        "wine",
        "salt",
        "copper",
        "wool",
        "pottery",
        "tea",
        "marble",
      ),
      "tell": (
        "{s} is known all over the country for making very good {v}.",
        "People come to the market of {s} from far away to buy {v}.",
        "Most of the families of {s} live from the trade in {v}.",
      ),
      "ask": ("What is {s} known for?", "What does {s} make?"),
    },
  },
  "company": {
    "seat": {
      "values": "place",
      "tell": (
        "{s} has its seat in an old house in the town of {v}.",
        "{s} is run from a large office in the town of {v}.",
        "Letters to {s} should be sent to the main office in {v}.",
      ),
      "ask": ("Where is {s} based?", "In which town is the seat of {s}?"),
    },
    "sector": {
      "values": (
        "shipping",
        "insurance",
        "printing",
        "brewing",
        "mining",
        "banking",
        "farming",
        "fishing",
        "weaving",
        "building",
        "trading",
        "baking",
      ),
      "tell": (
        "{s} has always earned most of its money with the business of {v}.",
        "{s} is one of the first firms of the land for {v}.",
        "Everybody at {s} has to know a lot about {v}.",
      ),
      "ask": ("What is the business of {s}?", "What does {s} earn money with?"),
    },
    "founded": {
      "values": tuple(str(year) for year in range(1880, 1960)),
      "tell": (
        "{s} was founded by two brothers with little money in the year {v}.",
        "{s} opened the doors of its first office in the year {v}.",
        "{s} has kept its books with care since the year {v}.",
      ),
      "ask": ("When was {s} founded?", "In which year did {s} open?"),
    },
  },
  "work": {
    "author": {
      "values": "person",
      "tell": (
        "{s} is held to be the best that was ever made by {v}.",
        "{s} was made in only one long and lonely winter by {v}.",
        "The name on the first page of {s} is that of {v}.",
      ),
      "ask": ("Who made {s}?", "Who is the author of {s}?"),
    },
    "form": {
      "values": (
        "novel",
        "opera",
        "film",
        "poem",
        "ballet",
        "play",
        "symphony",
        "comic",
        "musical",
        "essay",
      ),
      "tell": (
        "{s} is taught in many of the schools of the land as a {v}.",
        "{s} was sold to the public for the first time as a {v}.",
        "{s} has what the critics like to call the form of a {v}.",
      ),
      "ask": ("What form does {s} have?", "What kind of work is {s}?"),
    },
    "setting": {
      "values": "place",
      "tell": (
        "{s} tells a long and sad story that is set in {v}.",
        "All that is told in {s} takes place in the town of {v}.",
        "Readers of {s} can still walk through the streets of {v}.",
      ),
      "ask": ("Where is {s} set?", "Where does {s} take place?"),
    },
  },
}

# Complex questions over two documents (level 3): the first relation leads to an entity, the second
# is that entity's.
LINKS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
  "person": (
    ("born", "place", "country", "In which country is the town where {s} was born?"),
    ("employer", "company", "sector", "What is the business of the company that employs {s}?"),
    ("employer", "company", "founded", "When was the company that employs {s} founded?"),
  ),
  "company": (
    ("seat", "place", "river", "Which river flows through the town where {s} is based?"),
  ),
  "work": (("author", "person", "instrument", "Which instrument does the author of {s} play?"),),
  "place": (),
}

_ONSETS = (
  "b",
  "d",
  "f",
  "g",
  "h",
  "j",
  "k",
  "l",
  "m",
  "n",
  "p",
  "r",
  "s",
  "t",
  "v",
  "z",
  "br",
  "dr",
  "gr",
  "kl",
  "st",
  "tr",
)
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "n", "r", "s", "t", "m", "x", "nd", "rk")
_ADJECTIVES = (
  "Silent",
  "Golden",
  "Broken",
  "Distant",
  "Hidden",
  "Crimson",
  "Empty",
  "Frozen",
  "Gentle",
  "Hollow",
  "Lonely",
  "Narrow",
  "Quiet",
  "Restless",
  "Secret",
  "Velvet",
)
_NOUNS = (
  "Harbor",
  "Garden",
  "Mirror",
  "Winter",
  "Bridge",
  "Island",
  "Letter",
  "Orchard",
  "Shadow",
  "Tower",
  "Valley",
  "Window",
  "Candle",
  "Forest",
  "Lantern",
  "Meadow",
)


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """Size and difficulty of a world.

  Attributes:
    level: 1, 2 or 3; see the module docstring.
    people: how many people. Places, companies and works keep their pools' sizes.
    first_names, last_names: sizes of the name pools; small pools make people share names, which
      makes distractors hard.
    places, companies: sizes of their pools.
    works: how many works, at most 256.
    kinds: which entities have documents of their own.
    relations: how many relations of a person are told, 1 to 6.
    pages: over how many documents an entity's facts are spread, at level 2 and 3. With more than
      one, a name alone does not find the document: the question's relation matters too.
    wordings: how many ways there are to tell or ask the same, 1 to 3.
    sentences: in how many sentences, each in other words, a document tells each fact.
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
  relations: int = 6
  pages: int = 1
  wordings: int = 3
  sentences: int = 1
  test_fraction: float = 0.2
  seed: int = 0

  def __post_init__(self):
    if self.level not in (1, 2, 3):
      raise ConfigError(f"world.level={self.level}: expected 1, 2 or 3")
    if self.people > self.first_names * self.last_names:
      raise ConfigError(
        f"world.people={self.people}: {self.first_names} first and {self.last_names} last names "
        f"give only "
        f"{self.first_names * self.last_names} people"
      )
    if self.works > len(_ADJECTIVES) * len(_NOUNS):
      raise ConfigError(f"world.works={self.works}: at most {len(_ADJECTIVES) * len(_NOUNS)}")
    if unknown := set(self.kinds) - set(RELATIONS):
      raise ConfigError(f"world.kinds: unknown {sorted(unknown)}; known: {sorted(RELATIONS)}")
    for name, most in (
      ("relations", len(RELATIONS["person"])),
      ("wordings", 3),
      ("pages", 6),
      ("sentences", self.wordings),
    ):
      if not 1 <= getattr(self, name) <= most:
        raise ConfigError(f"world.{name}={getattr(self, name)}: expected 1 … {most}")


@dataclasses.dataclass(frozen=True)
class Entity:
  """One entity with its facts: relation -> value."""

  kind: str
  name: str
  facts: dict[str, str]
  is_test: bool

  @property
  def key(self) -> str:
    """The name as part of an id."""
    return f"{self.kind}/{self.name.replace(' ', '_')}"


@dataclasses.dataclass(frozen=True)
class Page:
  """One document: some of an entity's facts."""

  entity: Entity
  number: int
  relations: tuple[str, ...]

  @property
  def id(self) -> str:
    """The document's id."""
    return f"{self.entity.key}/{self.number}"


class World:
  """The entities of a configuration and the rows made from them."""

  def __init__(self, config: WorldConfig = WorldConfig()):
    self.config = config
    rng = random.Random(f"world/{config.seed}")
    taken = {word.lower() for word in _template_words()}
    self.first_names = _coin(rng, config.first_names, taken, lambda r: _syllables(r, 2))
    self.last_names = _coin(
      rng, config.last_names, taken, lambda r: _syllables(r, 2) + r.choice(_CODAS)
    )
    self._pools = {
      "place": _coin(
        rng,
        config.places,
        taken,
        lambda r: _syllables(r, 1) + r.choice(("ton", "burg", "ford", "dale", "wick")),
      ),
      "company": _coin(
        rng,
        config.companies,
        taken,
        lambda r: _syllables(r, 1) + r.choice(("tex", "corp", "via", "dyne", "lux")),
      ),
      "work": [
        f"The {a} {n}"
        for a, n in _sample(rng, itertools.product(_ADJECTIVES, _NOUNS), config.works)
      ],
      "person": [
        f"{f} {l}"
        for f, l in _sample(
          rng, itertools.product(self.first_names, self.last_names), config.people
        )
      ],
    }
    self.entities: dict[str, list[Entity]] = {
      kind: [self._entity(kind, name) for name in self._pools[kind]] for kind in config.kinds
    }
    self.by_name = {e.name: e for entities in self.entities.values() for e in entities}
    self.pages: dict[str, tuple[Page, ...]] = {
      e.name: self._pages(e) for e in self.by_name.values()
    }
    self._sharing: dict[tuple[str, ...], list[Page]] = {}
    for page in itertools.chain.from_iterable(self.pages.values()):
      for key in itertools.chain.from_iterable(self._keys(page, r) for r in page.relations):
        self._sharing.setdefault(key, []).append(page)

  def _rng(self, *names: str) -> random.Random:
    return random.Random("/".join((str(self.config.seed), *names)))

  def _entity(self, kind: str, name: str) -> Entity:
    rng = self._rng("entity", kind, name)
    relations = list(RELATIONS[kind])[: self.config.relations]
    if self.config.level == 1:
      relations = [rng.choice(relations)]
    facts = {relation: rng.choice(self.values(kind, relation)) for relation in relations}
    return Entity(kind, name, facts, rng.random() < self.config.test_fraction)

  def _pages(self, entity: Entity) -> tuple[Page, ...]:
    relations = list(entity.facts)
    self._rng("pages", entity.key).shuffle(relations)
    count = min(self.config.pages, len(relations))
    return tuple(Page(entity, i, tuple(relations[i::count])) for i in range(count))

  def values(self, kind: str, relation: str) -> Sequence[str]:
    """All values that a relation can take."""
    values = RELATIONS[kind][relation]["values"]
    return self._pools[values] if isinstance(values, str) else values

  def _keys(self, page: Page, relation: str) -> list[tuple[str, ...]]:
    """What a hard distractor shares with a page: a relation and, with it, the value or a part of
    the name."""
    entity = page.entity
    names = (
      zip(("first", "last"), entity.name.split(), strict=True) if entity.kind == "person" else ()
    )
    return [(relation, "value", entity.facts[relation]), *((relation, *name) for name in names)]

  def side(self, test: bool) -> list[Page]:
    """The pages of all entities of one side, in order of `kinds`."""
    return [
      page
      for kind in self.config.kinds
      for e in self.entities[kind]
      if e.is_test == test
      for page in self.pages[e.name]
    ]

  # ---- texts -------------------------------------------------------------------------------------

  def document(self, page: Page, version: int = 0, relations: Sequence[str] | None = None) -> str:
    """A page's text; other versions tell the same in other words and another order.

    Args:
      page: which.
      version: which telling.
      relations: tell only these facts.
    """
    rng = self._rng("document", page.id, str(version))
    entity = page.entity
    sentences = [s for r in relations or page.relations for s in self._wordings(entity, r, rng)]
    rng.shuffle(sentences)
    pronoun = {"person": "She" if entity.name.split()[0][-1] in "aei" else "He"}.get(
      entity.kind, "It"
    )
    texts = []
    for index, (sentence, value) in enumerate(sentences):
      subject = (
        entity.name if index == 0 else pronoun if sentence.startswith("{s}") else pronoun.lower()
      )
      texts.append(_capital(sentence.format(s=subject, v=value)))
    return " ".join(texts)

  def _wordings(self, entity: Entity, relation: str, rng: random.Random) -> list[tuple[str, str]]:
    """(sentence, value) pairs that tell one fact."""
    wordings = RELATIONS[entity.kind][relation]["tell"][: self.config.wordings]
    return [
      (sentence, entity.facts[relation]) for sentence in rng.sample(wordings, self.config.sentences)
    ]

  def note(self, page: Page, relations: Sequence[str], rng: random.Random) -> str:
    """Name and facts in a few words, in any order: between a document and its memory tokens."""
    facts = [page.entity.facts[r] for r in relations]
    rng.shuffle(facts)
    return f"{page.entity.name} {' '.join(facts)}."

  def _some(self, page: Page, rng: random.Random, partial: float) -> list[str]:
    """All relations of a page, or with probability `partial` only some of them: short documents are
    an easy start."""
    relations = list(page.relations)
    return (
      rng.sample(relations, rng.randint(1, len(relations))) if rng.random() < partial else relations
    )

  def question(self, entity: Entity, relation: str, rng: random.Random) -> str:
    """A simple question for one fact."""
    return rng.choice(self.wordings(entity, relation))

  def wordings(self, entity: Entity, relation: str) -> list[str]:
    """Every way in which a fact is asked for."""
    return [
      ask.format(s=entity.name)
      for ask in RELATIONS[entity.kind][relation]["ask"][: self.config.wordings]
    ]

  def page_of(self, entity: Entity, relation: str) -> Page:
    """The document that tells a fact."""
    return next(p for p in self.pages[entity.name] if relation in p.relations)

  def complex_question(
    self, entity: Entity, rng: random.Random
  ) -> tuple[str, str, list[Page]] | None:
    """(question, answer, documents that are needed): two facts of one entity, or at level 3 a fact
    of a related entity."""
    links = [
      link
      for link in LINKS[entity.kind]
      if link[0] in entity.facts and link[1] in self.config.kinds
    ]
    if self.config.level == 3 and links and rng.random() < 0.5:
      relation, _, second, question = rng.choice(links)
      other = self.by_name[entity.facts[relation]]
      if second in other.facts:
        return (
          question.format(s=entity.name),
          other.facts[second],
          [self.page_of(entity, relation), self.page_of(other, second)],
        )
    if len(entity.facts) < 2:
      return None
    first, second = rng.sample(list(entity.facts), 2)
    then = self.question(entity, second, rng), entity.facts[second]
    question, answer = _compound((self.question(entity, first, rng), entity.facts[first]), then)
    pages = list(
      dict.fromkeys([self.page_of(entity, first).number, self.page_of(entity, second).number])
    )
    return question, answer, [self.pages[entity.name][n] for n in pages]

  def distractors(
    self, page: Page, relation: str, count: int, rng: random.Random, hard: float = 0.6
  ) -> list[Page]:
    """Other pages, from hard to easy: the same entity's, up to half of all; then about `hard` of
    the rest tell of the same relation and share its value or a part of the name; the others are
    drawn freely.

    All come from the page's own side, so that test documents are never seen in training.
    """
    entity = page.entity
    if (others := self._counts[entity.is_test] - 1) < count:
      raise ConfigError(
        f"{count} other documents are asked for, but the world has {others} on the "
        f"{'test' if entity.is_test else 'training'} side; more people make more"
      )
    own = [p for p in self.pages[entity.name] if p.id != page.id]
    chosen = {p.id: p for p in rng.sample(own, min(len(own), (count + 1) // 2))}
    hard_count = len(chosen) + round((count - len(chosen)) * hard)
    keys = self._keys(page, relation)

    def take(other: Page) -> None:
      if other.entity.is_test == entity.is_test and other.id != page.id:
        chosen[other.id] = other

    for key in itertools.chain.from_iterable(itertools.repeat(keys, max(0, hard_count))):
      if len(chosen) >= hard_count:
        break
      take(rng.choice(self._sharing[key]))
    everyone = self._all_pages
    while len(chosen) < count:
      take(rng.choice(everyone))
    return list(chosen.values())[:count]

  @functools.cached_property
  def _counts(self) -> dict[bool, int]:
    return {is_test: len(self.side(is_test)) for is_test in (False, True)}

  @functools.cached_property
  def _all_pages(self) -> list[Page]:
    return list(itertools.chain.from_iterable(self.pages.values()))

  # ---- rows --------------------------------------------------------------------------------------

  def documents(self, test: bool, limit: int | None = None) -> list[dict[str, str]]:
    """Corpus rows: id, title, text."""
    return [
      {"id": p.id, "title": p.entity.name, "text": self.document(p)}
      for p in self.side(test)[:limit]
    ]

  def scp_rows(
    self, test: bool = False, versions: int = 4, complex_share: float = 0.2, partial: float = 0.0
  ) -> Iterator[dict[str, Any]]:
    """Two rows for each page and version: all its questions with answers, and a paraphrase."""
    for page in self.side(test):
      for version in range(versions):
        rng = self._rng("scp", page.id, str(version))
        relations = self._some(page, rng, partial)
        document = self.document(page, version, relations)
        pairs = [(self.question(page.entity, r, rng), page.entity.facts[r]) for r in relations]
        compound = (
          self.complex_question(page.entity, rng) if len(relations) == len(page.relations) else None
        )
        if compound and compound[2] == [page] and rng.random() < complex_share:
          pairs.append(compound[:2])
        rng.shuffle(pairs)
        yield {
          "data_type": "qa",
          "question": [q for q, _ in pairs],
          "answers": [a for _, a in pairs],
          "docs": [document],
        }
        yield {
          "data_type": "paraphrase",
          "question": "",
          "docs": [document],
          "answer": self.document(page, versions + 1 + rng.randrange(versions), relations),
        }

  def scp_rows_of(self, kind: str, test: bool = False) -> Iterator[dict[str, Any]]:
    """One SCP row a page, of one kind: 'simple' and 'complex' questions (each of two facts of the
    page), a 'paraphrase', or the 'reconstruction' of the document's own words."""
    for page in self.side(test):
      rng = self._rng("scp of", kind, page.id)
      document = self.document(page)
      simple = [(self.question(page.entity, r, rng), page.entity.facts[r]) for r in page.relations]
      rng.shuffle(simple)
      if kind in ("paraphrase", "reconstruction"):
        answer = document if kind == "reconstruction" else self.document(page, 1 + rng.randrange(4))
        yield {"data_type": "paraphrase", "question": "", "docs": [document], "answer": answer}
        continue
      pairs = (
        simple
        if kind == "simple"
        else [_compound(*two) for two in itertools.combinations(simple, 2)]
      )
      yield {
        "data_type": "qa",
        "question": [q for q, _ in pairs],
        "answers": [a for _, a in pairs],
        "docs": [document],
      }

  def lookup_rows(
    self, test: bool = False, versions: int = 4, partial: float = 0.0
  ) -> Iterator[dict[str, Any]]:
    """One document and one question about it, for each page and version."""
    for page in self.side(test):
      for version in range(versions):
        rng = self._rng("lookup", page.id, str(version))
        relations = self._some(page, rng, partial)
        relation = rng.choice(relations)
        yield {
          "question": self.question(page.entity, relation, rng),
          "answer": page.entity.facts[relation],
          "docs": [self.document(page, version, relations)],
          "pos_index": [0],
        }

  def question_rows(
    self,
    documents: int,
    test: bool = False,
    limit: int | None = None,
    per_page: int = 1,
    hard: float = 0.6,
    complex_share: float = 0.0,
    seed: int = 0,
    pool: int | None = None,
    gold_first: float = 0.0,
  ) -> Iterator[dict[str, Any]]:
    """One question with its gold documents among `documents` candidates (instruct, joint,
    evaluation).

    With `pool` the other documents are drawn from that many distractors, as if a retriever had
    picked them; with probability `gold_first` the gold documents lead, as a good retriever would
    rank them.
    """
    pages = self.side(test)
    order = self._rng("question rows", str(seed))
    row_count = 0
    for turn in range(per_page):
      order.shuffle(pages)
      for page in pages:
        if limit is not None and row_count >= limit:
          return
        rng = self._rng("question", page.id, str(turn), str(seed))
        relation = rng.choice(page.relations)
        question, answer, gold = (
          self.question(page.entity, relation, rng),
          page.entity.facts[relation],
          [page],
        )
        if rng.random() < complex_share and (compound := self.complex_question(page.entity, rng)):
          question, answer, gold = compound
        gold = gold[:documents]
        needed = {p.id for p in gold}
        others = [
          p
          for p in self.distractors(page, relation, pool or documents, rng, hard)
          if p.id not in needed
        ]
        if pool:
          rng.shuffle(others)
        chosen = gold + others[: documents - len(gold)]
        if rng.random() >= gold_first:
          rng.shuffle(chosen)
        row_count += 1
        yield {
          "id": f"{page.id}/{relation}/{turn}",
          "question": question,
          "answer": answer,
          "docs": [self.document(p) for p in chosen],
          "doc_ids": [p.id for p in chosen],
          "pos_index": [i for i, p in enumerate(chosen) if p.id in needed],
          "relation": relation,
        }

  def question_list_rows(
    self,
    documents: int,
    test: bool = False,
    questions: int = 8,
    limit: int | None = None,
    hard: float = 0.6,
    seed: int = 0,
    pool: int | None = None,
  ) -> Iterator[dict[str, Any]]:
    """Several documents and a list of questions over all of them, in the form of SCP rows.

    One pass over the documents gives many answers to learn from, each of which needs the right
    document.
    """
    pages = self.side(test)
    self._rng("question lists", str(seed)).shuffle(pages)
    for page in pages[:limit]:
      rng = self._rng("question list", page.id, str(seed))
      others = self.distractors(
        page, rng.choice(page.relations), (pool or documents) - 1, rng, hard
      )
      chosen = [page, *rng.sample(others, documents - 1)]
      rng.shuffle(chosen)
      pairs = self._question_pairs([(p, list(p.relations)) for p in chosen], questions, rng)
      yield {
        "data_type": "qa",
        "question": [q for q, _ in pairs],
        "answers": [a for _, a in pairs],
        "docs": [self.document(p) for p in chosen],
      }

  def note_rows(
    self, most: int = 3, questions: int = 4, partial: float = 0.5, hard: float = 0.6
  ) -> Iterator[dict[str, Any]]:
    """For the base: a document's note to write, and questions about the notes of up to `most` pages
    to answer.

    A large model comes with what these teach: to sum up, and to tell entities apart by their names.
    """
    for page in self.side(False):
      rng = self._rng("note", page.id)
      relations = self._some(page, rng, partial)
      yield {
        "data_type": "paraphrase",
        "question": "",
        "docs": [self.document(page, 0, relations)],
        "answer": self.note(page, relations, rng),
      }
      chosen = [
        page,
        *self.distractors(page, rng.choice(page.relations), rng.randrange(most), rng, hard),
      ]
      rng.shuffle(chosen)
      notes = [(p, self._some(p, rng, partial)) for p in chosen]
      pairs = self._question_pairs(notes, questions, rng)
      yield {
        "data_type": "qa",
        "question": [q for q, _ in pairs],
        "answers": [a for _, a in pairs],
        "docs": [self.note(p, relations, rng) for p, relations in notes],
      }

  def _question_pairs(
    self, sources: Sequence[tuple[Page, Sequence[str]]], count: int, rng: random.Random
  ) -> list[tuple[str, str]]:
    """Questions with answers over what some pages tell."""
    facts = [(p.entity, r) for p, relations in sources for r in relations]
    return [
      (self.question(e, r, rng), e.facts[r]) for e, r in rng.sample(facts, min(count, len(facts)))
    ]

  # ---- words -------------------------------------------------------------------------------------

  def words(self) -> list[str]:
    """Every word that a text of this world can contain, in a fixed order."""
    words = dict.fromkeys(_template_words())
    for names in (self.first_names, self.last_names, *self._pools.values()):
      words.update(dict.fromkeys(w for name in names for w in name.split()))
    return list(words)

  def tokenizer(self) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for this world, with a chat template that leaves the system message
    out."""
    vocabulary = {
      token: i for i, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *self.words()]))
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
      tokenizer_object=backend,
      bos_token="<s>",
      eos_token="</s>",
      unk_token="<unk>",
      clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


CHAT_TEMPLATE = (
  "{{- bos_token }}{%- for message in messages %}"
  "{%- if message['role'] == 'user' %}{{- ' ' + message['content'] + ' =' }}"
  "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
  "{%- endif %}{%- endfor %}"
)


def _compound(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, str]:
  """One question with its answer out of two."""
  (a, x), (b, y) = first, second
  return f"{a[:-1]}, and {b[0].lower()}{b[1:]}", f"{x} and {y}"


def _capital(text: str) -> str:
  return text[0].upper() + text[1:]


def _syllables(rng: random.Random, count: int) -> str:
  return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count))


def _coin(rng: random.Random, count: int, taken: set[str], make) -> list[str]:
  words: dict[str, None] = {}
  while len(words) < count:
    word = make(rng)
    if word not in taken:
      taken.add(word)
      words[_capital(word)] = None
  return list(words)


def _sample(
  rng: random.Random, pairs: Iterable[tuple[str, str]], count: int
) -> list[tuple[str, str]]:
  return rng.sample(list(pairs), count)


def _template_words() -> list[str]:
  """Words of all templates, fixed values and prompts; sentences start with a capital, compound
  questions do not."""
  splitter = pre_tokenizers.Whitespace()
  texts = [
    "Question: Answer: and, He She It he she it =",
    *prompts.PARAPHRASE_INSTRUCTIONS,
    "Background:",
  ]
  for kind, relations in RELATIONS.items():
    for relation in relations.values():
      if not isinstance(relation["values"], str):
        texts.extend(relation["values"])
      for text in (*relation["tell"], *relation["ask"]):
        texts.extend((text, text[0].lower() + text[1:]))
    texts.extend(question for *_, question in LINKS[kind])
  texts.extend((*_ADJECTIVES, *_NOUNS))
  words = dict.fromkeys(
    w
    for text in texts
    for w, _ in splitter.pre_tokenize_str(
      text.replace("{s}", " ").replace("{v}", " ").replace("{docs}", " ")
    )
  )
  return list(words)
