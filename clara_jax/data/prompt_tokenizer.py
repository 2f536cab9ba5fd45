"""Token layouts (as the released code has them): encoder inputs and prompts as token ids.

    encoder     <ENC> <s> text </s> <MEM0> … <MEM{M-1}>
    prompt      chat template around  Background:\\n <MEM0> … <MEM{M-1}> <SEP> …  Question:…

A tokenizer without `<s>` or `</s>` has nothing in its place. Text that is too long is cut on the
right before the memory tokens and then loses its `</s>`, as in the released code. Text of special
tokens in a document, a question or an answer is text (`tokenizer.Sealed`). Rows are padded on the
right later, in `pipeline.py`.
"""

import copy
import dataclasses
import datetime
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from clara_jax.config import ClaraConfig, check_memory_tokens
from clara_jax.data import prompts
from clara_jax.data.schemas import DataError, Row
from clara_jax.data.templates import ChatTemplate
from clara_jax.data.tokenizer import Sealed, first_free_id, load_tokenizer

# <ENC>, <s> and </s> stand beside the text's own tokens.
EXTRA_TOKENS = 3
# What a layout is tried with when it is made.
_TRIED = ("Paris", "42", "É. 中", "Yes, it is.\nNo.")


@dataclasses.dataclass(frozen=True)
class PromptTokens:
  """ids: all tokens, the answer's included; prompt_length: how many of them come before the
  answer."""

  ids: np.ndarray
  prompt_length: int


class PromptTokenizer:
  """Makes token ids for one tokenizer and one configuration.

  Args:
    tokenizer: a Hugging Face fast tokenizer, or the directory of one. Special tokens are appended
      to it.
    config: the method's configuration.
    end_ids: tokens beside the tokenizer's `</s>` and the end of the template's turn that end an
      answer (a base's generation_config.json).
    chat_template: takes the place of the tokenizer's.

  Attributes:
    config: the configuration, with the date that the template was told if it asks for one.
    end_ids: all tokens that end an answer.
    pad_id: fills rows up; what it is does not matter.
    num_memory_tokens: m, how many of the M memory tokens it writes (`first`).

  Raises:
    DataError: the tokenizer's size is not the configuration's vocabulary, it is not a fast
      tokenizer, or its chat template cannot be used.
  """

  def __init__(
    self,
    tokenizer: PreTrainedTokenizerFast | str,
    config: ClaraConfig,
    *,
    end_ids: Iterable[int] = (),
    chat_template: str | None = None,
  ):
    if isinstance(tokenizer, str):
      tokenizer = load_tokenizer(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
      raise DataError(
        f"{tokenizer.name_or_path}: a fast tokenizer is needed, got {type(tokenizer).__name__}"
      )
    self.tokenizer = tokenizer
    special = [*(f"<MEM{i}>" for i in range(config.num_memory_tokens)), "<AE>", "<ENC>", "<SEP>"]
    words = first_free_id(tokenizer.backend_tokenizer)
    # A checkpoint may bring its tokenizer with these tokens already in it.
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    for token, number, expected in zip(
      special,
      tokenizer.convert_tokens_to_ids(special),
      range(config.model.vocab_size, config.vocab_size),
      strict=True,
    ):
      if number != expected:
        raise DataError(
          f"{tokenizer.name_or_path}: {token} became token {number}, expected {expected}: the "
          f"tokenizer has {words} tokens"
          f"{' and this one among them' if number < words else ''}, the model's vocabulary "
          f"{config.model.vocab_size}"
        )
    if chat_template is not None:
      tokenizer.chat_template = chat_template
    self._template = ChatTemplate(tokenizer, _date(config.prompt_date))
    if self._template.asks_date:
      config = dataclasses.replace(config, prompt_date=self._template.date.isoformat())
    self.config, self.num_memory_tokens = config, config.num_memory_tokens
    self._sealed = Sealed(tokenizer.backend_tokenizer)
    self._bos, self._eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    self._extra = 1 + bool(self._bos) + bool(self._eos)
    self.pad_id = next(
      (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    self._end, self.end_ids = self._ends(end_ids)
    self._check()

  def first(self, m: int | None) -> "PromptTokenizer":
    """The same with the first m memory tokens of every text (None: with all).

    Raises:
      ConfigError: m is not 1 to M.
    """
    check_memory_tokens(m, self.config)
    other = copy.copy(self)
    other.num_memory_tokens = m or self.config.num_memory_tokens
    return other

  def first_ids(self, ids: np.ndarray, m: int) -> np.ndarray:
    """An encoder input or prompt with all M memory tokens, [L] int32, as it is with the first m:
    [<= L]."""
    slot = ids - self.config.model.vocab_size
    return ids[(slot < m) | (slot >= self.config.num_memory_tokens)]

  def _ends(self, configured_ids: Iterable[int]) -> tuple[str, tuple[int, ...]]:
    """(what ends an answer in training, ids that end one)."""
    tokenizer, after = self.tokenizer, self._template.after
    # Of a config's ids only these: some name a word of another vocabulary.
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    # Blanks may be tokens, and end nothing.
    names = sorted((t.content for t in added.values() if t.content.strip()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)))
    ends = [
      i
      for i in (tokenizer.eos_token_id, *configured_ids)
      if i is not None and (i == tokenizer.eos_token_id or i in added)
    ]
    if match := special.search(after):
      text = after[: match.end()]
      ends.append(tokenizer.convert_tokens_to_ids(match[0]))
    elif ends:
      text = tokenizer.convert_ids_to_tokens(ends[0])
    else:
      raise DataError(
        f"{tokenizer.name_or_path}: nothing can end an answer: the tokenizer has no eos_token, "
        f"its chat template ends a turn "
        "without a special token, and the model's generation_config.json names no eos_token_id"
      )
    return text, tuple(sorted(set(ends)))

  def _check(self) -> None:
    """Tries the layout: the prompt begins the training text, what is decoded from the labels is the
    answer, slots are slots."""
    slots = self._sealed.ids(self._sealed.control(self.slots(1)))
    messages = prompts.answer_messages(self.slots(1), "Who?")
    for answer in _TRIED:
      example, prompt = (
        self._prompt(messages, a, self._name, limit=1 << 30) for a in (answer, None)
      )
      if example.ids[: example.prompt_length].tolist() != prompt.ids.tolist():
        raise DataError(
          f"{self._name}: with an answer its chat template gives another prompt; give another "
          f"with --chat-template FILE"
        )
      first, last = self.config.model.vocab_size, self.config.vocab_size
      if [i for i in prompt.ids if first <= i < last] != slots:
        raise DataError(
          f"{self._name}: its chat template changes the memory slots; give another with "
          f"--chat-template FILE"
        )
      labels = example.ids[example.prompt_length :]
      if labels[-1] not in self.end_ids:
        raise DataError(
          f"{self._name}: the labels of an answer end with "
          f"{self.tokenizer.decode(labels[-1:])!r}, which ends no answer"
        )
      answer_text, label_text = self.text(self.ids(answer)), self.text(labels)
      if label_text != answer_text:
        raise DataError(
          f"{self._name}: the labels of the answer {answer_text!r} say {label_text!r}; give "
          f"another template with --chat-template FILE"
        )

  @property
  def _name(self) -> str:
    return self.tokenizer.name_or_path or "the tokenizer"

  @property
  def unknown_id(self) -> int | None:
    """What stands for text that the tokenizer has no entry for; None where it has one for all."""
    return self.tokenizer.unk_token_id

  def ids(self, text: str) -> list[int]:
    """Token ids of a text; special tokens in it are text."""
    return self._sealed.ids(text)

  def encoder_input(self, text: str, max_length: int) -> np.ndarray:
    """`<ENC> <s> text </s> MEM…`, [<= max_length + 3 + M] int32."""
    return self._with_memory_tokens(self._sealed.ids(self._wrapped(text)), max_length)

  def _wrapped(self, text: str) -> str:
    return self._sealed.control(f"<ENC>{self._bos}{self._sealed.quoted(text)}{self._eos}")

  def _with_memory_tokens(self, ids: list[int], max_length: int) -> np.ndarray:
    first = self.config.model.vocab_size
    return np.array(
      ids[: max_length + self._extra] + list(range(first, first + self.num_memory_tokens)), np.int32
    )

  def is_cut(self, document: np.ndarray) -> bool:
    """Whether a document's encoder input has lost the end of its text (and so its `</s>`)."""
    count = len(document) - self.num_memory_tokens
    full = count == self.config.doc_max_length + self._extra
    return full and (not self._eos or bool(document[count - 1] != self.tokenizer.eos_token_id))

  def read_part(self, text: str, limit: int) -> tuple[int, int, int]:
    """How much of a document a compressor has read.

    Args:
      text: of the document.
      limit: `doc_max_length` of the compressor.

    Returns:
      (tokens that were read, tokens of all of it, characters that were read).
    """
    ids = self.ids(text)
    read = min(len(ids), limit + self._extra - (2 if self._bos else 1))
    if read == len(ids):
      return read, read, len(text)
    if self.tokenizer.is_fast:
      offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
      if len(offsets["input_ids"]) == len(ids):
        return read, len(ids), offsets["offset_mapping"][read - 1][1]
    return read, len(ids), min(len(text), len(self.tokenizer.decode(ids[:read])))

  def document(self, text: str) -> np.ndarray:
    """A document's encoder input."""
    return self.encoder_input(text, self.config.doc_max_length)

  def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encoder inputs of many documents, tokenized by all cores."""
    return [
      self._with_memory_tokens(ids, self.config.doc_max_length)
      for ids in self._sealed.batch([self._wrapped(t) for t in texts])
    ]

  def query(self, text: str) -> np.ndarray:
    """A question's encoder input, for answering."""
    return self.encoder_input(text, self.config.query_max_length)

  def training_query(self, text: str) -> np.ndarray:
    """A question's encoder input in training: cut at the decoder's maximum only, as in the released
    code."""
    return self.encoder_input(
      text, max(self.config.query_max_length, self.config.decoder_max_length)
    )

  def chat(self, messages: Sequence[Mapping[str, str]], where: str = "prompt") -> PromptTokens:
    """Tokens of a conversation that asks for the assistant's next turn; all of its text is text.

    Raises:
      DataError: it does not fit `decoder_max_length`.
    """
    return self._prompt(
      [{**m, "content": self._sealed.quoted(m["content"])} for m in messages], None, where
    )

  def _prompt(
    self,
    messages: Sequence[Mapping[str, str]],
    answer: str | None,
    where: str,
    limit: int | None = None,
  ) -> PromptTokens:
    """Tokens of a chat prompt, with its answer for training. Special tokens in the messages are
    meant."""
    limit = limit or self.config.decoder_max_length
    text = self._template.prompt(messages)
    before = self._sealed.ids(self._sealed.control(text))
    if len(before) + (answer is not None) > limit:
      raise DataError(
        f"{where}: the prompt has {len(before)} tokens, the window decoder_max_length={limit}"
      )
    if answer is None:
      return PromptTokens(np.array(before, np.int32), len(before))
    rest = f"{self._template.before}{self._sealed.quoted(answer)}{self._end}"
    whole = self._sealed.ids(self._sealed.control(text + rest))
    # The answer's beginning would melt into the prompt's last token, which is asked alone.
    if whole[: len(before)] != before:
      whole = before + self._sealed.ids(self._sealed.control(rest))
    return PromptTokens(np.array(whole[:limit], np.int32), len(before))

  def slots(self, num_documents: int) -> str:
    """Memory slots of K documents, as text."""
    return prompts.slots(self.num_memory_tokens, num_documents)

  def contents(self, num_documents: int, texts: Sequence[str] = ()) -> str:
    """What a prompt reads: documents as text, one a line, and behind them the memory slots of K
    others (REFRAG, arXiv 2509.01092, reads the best ones so)."""
    slots = self.slots(num_documents)
    return "\n".join([*map(self._sealed.quoted, texts), *([slots] if slots else [])])

  def answer_prompt(
    self,
    question: str,
    num_documents: int,
    answer: str | None = None,
    where: str = "prompt",
    texts: Sequence[str] = (),
  ) -> PromptTokens:
    """The prompt that answers a question from K documents' memory tokens, with its answer for
    training, and from other documents' `texts`.

    Raises:
      DataError: the prompt does not fit `decoder_max_length` (with room for one label token when
        there is an answer).
    """
    return self._prompt(
      prompts.answer_messages(self.contents(num_documents, texts), self._sealed.quoted(question)),
      answer,
      where,
    )

  def text_prompt(self, question: str, text: str, where: str = "prompt") -> PromptTokens:
    """The prompt that answers a question from documents' text; see `answer_prompt`."""
    return self._prompt(
      prompts.answer_messages(self._sealed.quoted(text), self._sealed.quoted(question)), None, where
    )

  def paraphrase_prompt(self) -> PromptTokens:
    """The prompt that asks for one document in other words."""
    return self._prompt(prompts.paraphrase_messages(self.slots(1), 0), None, "prompt")

  def row_prompt(
    self,
    row: Row,
    num_documents: int | None = None,
    instruction: int = 0,
    texts: Sequence[str] = (),
  ) -> PromptTokens:
    """The training prompt of a row: with the memory slots of so many documents, after the `texts`
    of others, or with its documents' text."""
    documents = (
      self._sealed.quoted("\n".join(row.documents))
      if num_documents is None
      else self.contents(num_documents, texts)
    )
    if row.data_type == "paraphrase":
      return self._prompt(
        prompts.paraphrase_messages(documents, instruction), row.answers[0], row.identifier
      )
    if row.is_question_list:
      answer = prompts.question_list_answer(row.questions, row.answers)
      return self._prompt(prompts.question_list_messages(documents), answer, row.identifier)
    return self._prompt(
      prompts.answer_messages(documents, self._sealed.quoted(row.questions[0])),
      row.answers[0],
      row.identifier,
    )

  def truncate_at_eos(self, ids: Sequence[int], with_end: bool = False) -> np.ndarray:
    """Generated ids up to the end of the answer."""
    ids = np.asarray(ids, np.int32)
    ends = np.flatnonzero(np.isin(ids, self.end_ids))
    return ids[: ends[0] + with_end] if len(ends) else ids

  def text(self, ids: Sequence[int]) -> str:
    """The text of generated ids, up to the end of the answer."""
    return self.tokenizer.decode(
      self.truncate_at_eos(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).strip()


def _date(text: str | None) -> datetime.date | None:
  return None if text is None else datetime.date.fromisoformat(text)
