"""Token layouts (SPEC §2): encoder inputs and prompts as token ids.

    encoder     <ENC> <s> text </s> <MEM0> … <MEM{M-1}>
    prompt      chat template around  Background:\\n <MEM0> … <MEM{M-1}> <SEP> …  Question:…

Text that is too long is cut on the right before the memory tokens and then loses its `</s>`, as in the released code. Rows are
padded on the right later, in `pipeline.py`.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clara_jax.config import ClaraConfig
from clara_jax.data import prompts
from clara_jax.data.schemas import DataError, Row

# <ENC>, <s> and </s> stand beside the text's own tokens.
EXTRA_TOKENS = 3


@dataclasses.dataclass(frozen=True)
class PromptTokens:
  """ids: all tokens, the answer's included; prompt_length: how many of them come before the answer."""

  ids: np.ndarray
  prompt_length: int


def load_tokenizer(directory: str) -> PreTrainedTokenizerFast:
  """The tokenizer of a directory. No code that lies there is ever run, whatever its config.json says."""
  if os.path.exists(os.path.join(directory, "tokenizer.json")):
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
  return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


class Layout:
  """Makes token ids for one tokenizer and one configuration.

  Args:
    tokenizer: a Hugging Face fast tokenizer, or the directory of one. Special tokens are appended to it.
    config: the method's configuration.

  Raises:
    DataError: the tokenizer's size is not the configuration's vocabulary, or it is not a fast tokenizer.
  """

  def __init__(self, tokenizer: PreTrainedTokenizerFast | str, config: ClaraConfig):
    if isinstance(tokenizer, str):
      tokenizer = load_tokenizer(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
      raise DataError(f"{tokenizer.name_or_path}: a fast tokenizer is needed, got {type(tokenizer).__name__}")
    self.tokenizer = tokenizer
    self.config = config
    self.memory_tokens = [f"<MEM{i}>" for i in range(config.num_memory_tokens)]
    special = [*self.memory_tokens, "<AE>", "<ENC>", "<SEP>"]
    # A checkpoint may bring its tokenizer with these tokens already in it.
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    first = tokenizer.convert_tokens_to_ids(special[0])
    expected = list(range(config.model.vocab_size, config.vocab_size))
    if tokenizer.convert_tokens_to_ids(special) != expected:
      raise DataError(
          f"{tokenizer.name_or_path}: {special[0]} became token {first}, expected {expected[0]}: the tokenizer does not have "
          f"the model's vocabulary of {config.model.vocab_size} tokens")
    self.eos_id = tokenizer.eos_token_id
    self.bos_id = tokenizer.bos_token_id
    self.pad_id = self.bos_id
    self._encode = tokenizer.backend_tokenizer.encode
    self._encode_batch = tokenizer.backend_tokenizer.encode_batch_fast

  def ids(self, text: str) -> list[int]:
    """Token ids of a text in which special tokens may stand as text."""
    return self._encode(text, add_special_tokens=False).ids

  def encoder_input(self, text: str, max_length: int) -> np.ndarray:
    """`<ENC> <s> text </s> MEM…`, [<= max_length + 3 + M] int32."""
    return self._with_memory_tokens(self.ids(self._wrapped(text)), max_length)

  def _wrapped(self, text: str) -> str:
    return f"<ENC>{self.tokenizer.bos_token}{text}{self.tokenizer.eos_token}"

  def _with_memory_tokens(self, ids: list[int], max_length: int) -> np.ndarray:
    first = self.config.model.vocab_size
    return np.array(ids[:max_length + EXTRA_TOKENS] + list(range(first, first + self.config.num_memory_tokens)), np.int32)

  def is_cut(self, encoder_input: np.ndarray) -> bool:
    """Whether an encoder input has lost the end of its text (and so its `</s>`)."""
    return bool(encoder_input[-1 - self.config.num_memory_tokens] != self.tokenizer.eos_token_id)

  def document(self, text: str) -> np.ndarray:
    """A document's encoder input."""
    return self.encoder_input(text, self.config.doc_max_length)

  def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encoder inputs of many documents, tokenised by all cores."""
    encoded = self._encode_batch([self._wrapped(t) for t in texts], add_special_tokens=False)
    return [self._with_memory_tokens(e.ids, self.config.doc_max_length) for e in encoded]

  def query(self, text: str) -> np.ndarray:
    """A question's encoder input."""
    return self.encoder_input(text, self.config.query_max_length)

  def prompt(self, messages: Sequence[dict[str, str]], answer: str | None = None, where: str = "prompt") -> PromptTokens:
    """Tokens of a chat prompt, with its answer for training.

    Raises:
      DataError: the prompt does not fit `decoder_max_length` (with room for one label token when there is an answer).
    """
    limit = self.config.decoder_max_length
    before = self.ids(prompts.render(self.tokenizer, messages))
    if len(before) + (answer is not None) > limit:
      raise DataError(f"{where}: the prompt has {len(before)} tokens, the window decoder_max_length={limit}")
    if answer is None:
      return PromptTokens(np.array(before, np.int32), len(before))
    whole = self.ids(prompts.render(self.tokenizer, messages, answer))[:limit]
    return PromptTokens(np.array(whole, np.int32), len(before))

  def slots(self, num_documents: int) -> str:
    """Memory slots of K documents, as text."""
    return prompts.slots(self.config.num_memory_tokens, num_documents)

  def answer_prompt(self, question: str, num_documents: int, answer: str | None = None, where: str = "prompt") -> PromptTokens:
    """The prompt that answers a question from K documents' memory tokens."""
    return self.prompt(prompts.answer_messages(self.slots(num_documents), question), answer, where)

  def row_prompt(self, row: Row, documents: str, instruction: int = 0) -> PromptTokens:
    """The training prompt of a row; `documents` are memory slots, or the documents' text."""
    if row.data_type == "paraphrase":
      return self.prompt(prompts.paraphrase_messages(documents, instruction), row.answers[0], row.identifier)
    if row.is_question_list:
      answer = prompts.question_list_answer(row.questions, row.answers)
      return self.prompt(prompts.question_list_messages(documents), answer, row.identifier)
    return self.prompt(prompts.answer_messages(documents, row.questions[0]), row.answers[0], row.identifier)

  def text(self, ids: Sequence[int]) -> str:
    """The text of generated ids, up to the end of the answer."""
    ids = [int(i) for i in ids]
    if self.eos_id in ids:
      ids = ids[:ids.index(self.eos_id)]
    return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
