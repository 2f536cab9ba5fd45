"""Tokenizers of others, read as they are published, with one thing added: text is text.

A tokenizer takes the text of a special token (`</s>`, `<|im_start|>`, `<MEM0>`) for the token,
wherever it stands: a question that contains it could close its turn or forge a memory slot.
`Sealed` tokenizes with a copy in which every such token has a name that nobody can guess. What we
and the chat template write is renamed before (`control`), what a user writes is not (`quoted`), so
that the copy gives the very ids of the tokenizer, but never a special token for a user's text.
"""

import json
import os
import re
import secrets
from collections.abc import Sequence
from typing import Any

from etils import epath
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from clara_jax import buckets
from clara_jax.data.schemas import DataError

# Files of which one must be there; a tokenizer.json is read as it is, the others are converted by
# transformers.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
MEMORY_TOKEN = "<MEM0>"


def has_tokenizer(directory: str) -> bool:
  """Whether there are files of a tokenizer in a directory."""
  return any((epath.Path(directory) / name).exists() for name in _FILES)


def load_tokenizer(directory: str) -> PreTrainedTokenizerFast:
  """The tokenizer of a directory. No code that lies there is ever run, whatever its config.json
  says.

  Raises:
    DataError: there is none, it is damaged, or it is not one that the library `tokenizers` runs.
  """
  directory = buckets.local_copy(directory)
  if not has_tokenizer(directory):
    raise DataError(
      f"{directory}: no tokenizer here (expected tokenizer.json, or the files of an older one)"
    )
  for name in ("tokenizer.json", "tokenizer_config.json"):
    _check_object(os.path.join(directory, name))
  try:
    if os.path.exists(os.path.join(directory, "tokenizer.json")):
      return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(
      directory, local_files_only=True, trust_remote_code=False
    )
    if os.path.exists(model := os.path.join(directory, "tokenizer.model")) and isinstance(
      tokenizer, PreTrainedTokenizerFast
    ):
      _merge_by_scores(tokenizer, model)
  except Exception as error:  # of many kinds, from three libraries
    raise DataError(
      f"{directory}: its tokenizer cannot be read: {' '.join(str(error).split())[:300]}"
    ) from None
  if not isinstance(tokenizer, PreTrainedTokenizerFast):
    raise DataError(
      f"{directory}: a tokenizer.json is needed, got a {type(tokenizer).__name__}: transformers "
      f"writes one "
      "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)) where it can convert the tokenizer"
    )
  return tokenizer


def _check_object(path: str) -> None:
  """Refuses a file that is there and is no JSON object."""
  if not os.path.exists(path):
    return
  try:
    with open(path, encoding="utf-8") as file:
      value = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from None
  if not isinstance(value, dict):
    raise DataError(f"{path}: expected an object, got {type(value).__name__}")


def _merge_by_scores(tokenizer: PreTrainedTokenizerFast, model: str) -> None:
  """Puts the merges of a converted SentencePiece model into the order of its scores: transformers 5
  takes that of the ids, which splits runs of blanks otherwise than SentencePiece does."""
  import sentencepiece

  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  if spec["model"]["type"] != "BPE":
    return
  pieces = sentencepiece.SentencePieceProcessor(model)
  scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
  control = [
    p
    for i, p in enumerate(scores)
    if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i) or pieces.is_unused(i)
  ]
  vocabulary = spec["model"]["vocab"]
  spec["model"]["merges"] = generate_merges(
    vocabulary, {p: s for p, s in scores.items() if p in vocabulary}, control
  )
  tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))


def first_free_id(tokenizer: Tokenizer) -> int:
  """The id that the first token gets which is added to a tokenizer; that of `<MEM0>` where CLaRa's
  tokens are in it already.

  It can be less than the model's `vocab_size`: many models pad their embedding beyond the
  tokenizer.
  """
  memory_id = tokenizer.token_to_id(MEMORY_TOKEN)
  if memory_id is not None:
    return memory_id
  added = tokenizer.get_added_tokens_decoder()
  return max(tokenizer.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)


def count_words(directory: str) -> int | None:
  """`first_free_id` of the tokenizer in a directory, None where there is none.

  Raises:
    DataError: the tokenizer cannot be read.
  """
  # Not by tokenizer.json alone: tokenizer_config.json may add tokens.
  return (
    first_free_id(load_tokenizer(directory).backend_tokenizer) if has_tokenizer(directory) else None
  )


class Sealed:
  """A tokenizer in which only `control` text becomes special tokens.

  Args:
    tokenizer: all its added tokens are sealed, but for those that plain text makes too (by merges)
      and that are not special, such as runs of blanks: these are text.
  """

  def __init__(self, tokenizer: Tokenizer):
    spec = json.loads(tokenizer.to_str())
    products = _products(spec["model"])
    tokens = [t for t in spec["added_tokens"] if t["special"] or t["content"] not in products]
    key = secrets.token_hex(8)
    names = {t["content"]: f"{key}x{number}x" for number, t in enumerate(tokens)}
    self._control = names
    self._quoted = {content: f"{key}q{number}q" for number, content in enumerate(names)}
    self._unquoted = {name: content for content, name in self._quoted.items()}
    self._special = re.compile(
      "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
    )
    self._quotes = re.compile(f"{key}q[0-9]+q")
    self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(spec, names)))
    for content, name in names.items():
      if self._tokenizer.token_to_id(name) != tokenizer.token_to_id(content):
        raise DataError(
          f"the special token {content!r} cannot be told from text that looks like it: this "
          f"tokenizer is not supported"
        )

  def quoted(self, text: str) -> str:
    """Text of a user for a place in a text that `control` gets."""
    return self._special.sub(lambda match: self._quoted[match[0]], text)

  def control(self, text: str) -> str:
    """A text whose special tokens are meant, but for those in its `quoted` parts, as text for
    `ids`."""
    named = self._special.sub(lambda match: self._control[match[0]], text)
    return self._quotes.sub(lambda match: self._unquoted[match[0]], named)

  def ids(self, text: str) -> list[int]:
    """Token ids; special tokens only where `control` put them."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`ids` of many texts, by all cores."""
    return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _products(model: dict[str, Any]) -> set[str]:
  """Tokens that merges make."""
  pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or ())
  return {a + b for a, b in pairs}


def _renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
  """A tokenizer.json in which tokens have other names; they are not made from text any more."""
  model = dict(spec["model"])
  vocabulary = model["vocab"]
  if isinstance(vocabulary, dict):
    model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
  else:
    model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
  if model.get("merges"):
    parts = ((m, m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"])
    model["merges"] = [m for m, (a, b) in parts if not {a, b, a + b} & names.keys()]
  if isinstance(model.get("unk_token"), str):
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
  tokens = [{**t, "content": names.get(t["content"], t["content"])} for t in spec["added_tokens"]]
  # A file may ask for truncation, padding or BOS and EOS of its own: here nothing is done that was
  # not asked for.
  return {
    **spec,
    "model": model,
    "added_tokens": tokens,
    "truncation": None,
    "padding": None,
    "post_processor": None,
  }
