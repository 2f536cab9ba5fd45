"""Prompt texts (paper appendix, as the released code has them).

The system and user texts are the input format of released checkpoints: change nothing in them. The
paraphrase instructions are the project's own words and only serve training.
"""

from collections.abc import Sequence

ANSWER_SYSTEM = (
  "You are a helpful assistant. Your task is to extract relevant information from provided "
  "documents and to answer to "
  "questions as briefly as possible."
)
QUESTIONS_SYSTEM = (
  "You are a helpful assistant. Given a document, your task is to generate some single questions "
  "to cover all key "
  "information of the document and answer them sequentially."
)
PARAPHRASE_SYSTEM = (
  "You are a helpful assistant. Your task is follow the instructions to "
  "paraphrase the background information."
)

PARAPHRASE_INSTRUCTIONS = (
  "Background: {docs} says the same as",
  "Background: {docs} Say this again in other words.",
  "Background: {docs} Please retell the text above.",
  "Background: {docs} can also be told like this:",
  "Another way to tell the background {docs} is:",
  "Background: {docs} Give a new version of the text above.",
)


def slots(num_memory_tokens: int, num_documents: int) -> str:
  """The memory slots of K documents: `<MEM0>…<MEM{M-1}><SEP>` each."""
  return ("".join(f"<MEM{i}>" for i in range(num_memory_tokens)) + "<SEP>") * num_documents


def answer_messages(documents: str, question: str) -> list[dict[str, str]]:
  """The prompt of `instruct`, `joint` and answering. `documents` are memory slots, or text."""
  return _chat(ANSWER_SYSTEM, f"Background:\n{documents}\n\nQuestion:{question}")


def question_list_messages(documents: str) -> list[dict[str, str]]:
  """The SCP prompt whose answer is a list of questions and answers."""
  return _chat(QUESTIONS_SYSTEM, f"Background:\n{documents}")


def question_list_answer(questions: Sequence[str], answers: Sequence[str]) -> str:
  """`Question: …\\nAnswer: …` lines."""
  return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in zip(questions, answers, strict=True))


def paraphrase_messages(documents: str, instruction: int) -> list[dict[str, str]]:
  """The SCP prompt whose answer is a paraphrase; `instruction` picks one of
  `PARAPHRASE_INSTRUCTIONS`, modulo their count."""
  return _chat(
    PARAPHRASE_SYSTEM,
    PARAPHRASE_INSTRUCTIONS[instruction % len(PARAPHRASE_INSTRUCTIONS)].format(docs=documents),
  )


def _chat(system: str, user: str) -> list[dict[str, str]]:
  return [{"role": "system", "content": system}, {"role": "user", "content": user}]
