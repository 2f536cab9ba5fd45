"""Answers over a store from Python: `python examples/answer.py CHECKPOINT STORE "question" …`"""

import sys

import clara_jax


def main(directory: str, store: str, questions: list[str]) -> None:
  """Prints answers with the documents that they were read from."""
  checkpoint = clara_jax.load(directory)
  answerer = clara_jax.Answerer(checkpoint, clara_jax.MemoryStore(store))
  for answer in answerer.answer(questions):
    print(f"{answer.question}\n  {answer.answer}")
    for document in answer.documents:
      print(f"    {document.score:.3f}  {document.id}  {document.title}")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
