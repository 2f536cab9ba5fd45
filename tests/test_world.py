"""The generated world: deterministic, consistent, never mixing its two sides."""

import itertools

import pytest

from clara_jax.config import ConfigError
from clara_jax.data.schemas import parse_row
from clara_jax.experiments.world import RELATIONS, World, WorldConfig


@pytest.fixture(scope="module")
def world():
  return World(WorldConfig(level=3, people=300, pages=2))


def test_deterministic_and_independent_of_size():
  small, again = World(WorldConfig(people=50)), World(WorldConfig(people=50))
  assert list(small.question_rows(4)) == list(again.question_rows(4))
  assert list(small.question_rows(4)) != list(
    World(WorldConfig(people=50, seed=1)).question_rows(4)
  )
  large = World(WorldConfig(people=60))
  for name, entity in small.by_name.items():
    if name in large.by_name and entity.kind != "work":  # works have people as authors
      assert large.by_name[name] == entity and large.document(
        large.pages[name][0]
      ) == small.document(small.pages[name][0])


def test_documents_tell_their_facts(world):
  for page in world.side(False)[:200]:
    text = world.document(page)
    assert page.entity.name in text
    for relation in page.relations:
      assert page.entity.facts[relation] in text
  pages = world.side(False)
  assert sum(world.document(p, 1) != world.document(p) for p in pages) > 0.8 * len(pages)


def test_rows_are_valid_and_answers_stand_in_the_gold_documents(world):
  for number, value in enumerate(itertools.islice(world.question_rows(8, complex_share=0.5), 300)):
    row = parse_row(value, f"world:{number}")
    assert len(row.documents) == len(set(value["doc_ids"])) == 8
    gold = " ".join(row.documents[i] for i in row.gold)
    assert all(part in gold for part in row.answers[0].split(" and "))
  for maker in (
    world.scp_rows(versions=1),
    world.lookup_rows(versions=1),
    world.question_list_rows(3),
    world.note_rows(),
  ):
    for number, value in enumerate(itertools.islice(maker, 50)):
      parse_row(value, f"world:{number}")


def test_distractors_are_hard_and_of_the_same_side(world):
  for page in world.side(True)[:30]:
    rng = world._rng("test", page.id)
    relation = page.relations[0]
    others = world.distractors(page, relation, 10, rng, hard=0.6)
    assert len({p.id for p in others} | {page.id}) == 11
    assert all(p.entity.is_test for p in others)
    assert all(p in others for p in world.pages[page.entity.name] if p != page)


@pytest.mark.parametrize("hard, least, most", [(0.0, 0.0, 0.35), (1.0, 0.99, 1.0)])
def test_hardness_is_the_share_of_distractors_that_share_something(hard, least, most):
  world = World(WorldConfig(level=2, people=600, first_names=40, last_names=40, kinds=("person",)))
  shared = total = 0
  for page in world.side(False)[:40]:
    relation = page.relations[0]
    names, value = set(page.entity.name.split()), page.entity.facts[relation]
    for other in world.distractors(page, relation, 10, world._rng("test", page.id), hard):
      shared += bool(
        names & set(other.entity.name.split()) or other.entity.facts[relation] == value
      )
      total += 1
  assert least <= shared / total <= most


def test_levels():
  assert all(len(e.facts) == 1 for e in World(WorldConfig(level=1, people=50)).by_name.values())
  profiles = World(WorldConfig(level=2, people=50, relations=4, kinds=("person",)))
  assert all(len(e.facts) == 4 for e in profiles.by_name.values())
  linked = World(WorldConfig(level=3, people=200))
  assert any(
    len(r["pos_index"]) == 2 for r in linked.question_rows(6, complex_share=1.0, limit=100)
  )


def test_every_word_has_a_token(world):
  tokenizer = world.tokenizer()
  unknown = tokenizer.unk_token_id
  texts = [d["text"] for d in world.documents(False)] + [
    r["question"] for r in world.question_rows(3, complex_share=0.7)
  ]
  assert not any(
    unknown in tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
  )
  question = next(world.question_rows(1))["question"]
  assert tokenizer.decode(tokenizer(question, add_special_tokens=False)["input_ids"]) == question


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"people": 7000}, "only 6400 people"),
    ({"level": 4}, "world.level=4"),
    ({"kinds": ("animal",)}, "animal"),
    ({"relations": 7}, f"1 … {len(RELATIONS['person'])}"),
    ({"wordings": 0}, "world.wordings=0"),
  ],
)
def test_impossible_worlds(fields, message):
  with pytest.raises(ConfigError, match=message):
    WorldConfig(**fields)
