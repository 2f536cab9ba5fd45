"""Scores by hand, and means that add up."""

import jax.numpy as jnp
import pytest

from clara_jax.evaluation.metrics import (
  answer_scores,
  cover_em,
  exact_match,
  f1,
  normalize,
  retrieval_scores,
)
from clara_jax.training.metrics import Mean, values


@pytest.mark.parametrize(
  "text, wanted",
  [
    ("The  Cat's hat!", "cats hat"),
    ("A an the", ""),
    ("True", "yes"),
    ("False.", "no"),
    ("U.S.", "us"),
  ],
)
def test_normalise(text, wanted):
  assert normalize(text) == wanted


def test_answers():
  assert exact_match("the Eiffel Tower.", "Eiffel tower") == 1
  assert f1("Eiffel tower in Paris", "the Eiffel tower") == pytest.approx(2 * 2 / 6)
  assert f1("yes indeed", "yes") == 0 and f1("no", "No.") == 1
  assert (
    cover_em("it was tower Eiffel", "Eiffel Tower") == 1 and cover_em("tower", "Eiffel Tower") == 0
  )
  scores = answer_scores("Paris", ["London", "Paris"])
  assert scores["em"] == 1 and scores["em_first"] == 0


def test_retrieval():
  scores = retrieval_scores([4, 2, 0, 1, 3], [2, 3])
  assert scores["recall_at_1"] == 0 and scores["recall_at_3"] == 0.5 and scores["recall_at_5"] == 1
  assert scores["precision_at_3"] == pytest.approx(1 / 3) and scores[
    "precision_at_5"
  ] == pytest.approx(2 / 5)


def test_means_add_up():
  whole = Mean.of(jnp.array([1.0, 2.0, 6.0]))
  parts = Mean.of(jnp.array([1.0])) + Mean.of(jnp.array([2.0, 6.0]))
  assert float(whole.value) == float(parts.value) == 3
  assert values({"a": whole, "nothing": Mean.of(jnp.array([1.0]), jnp.array([0.0]))}) == {"a": 3.0}
