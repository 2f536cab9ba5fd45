"""From rows to batches, through Grain: shards, shuffle, mix, tokenize, sort by length, batch, pad.

A batch of B rows has S = `data.shards` parts of B/S rows; part s is read from shard s of every
source. Each shard has its own endless shuffle, so that the rows of step t are a function of (seed,
S, t): nothing but t is saved, any number of processes that divides the parts sees the same batches,
and no process opens the files of another's shards.
"""

import bisect
import copy
import dataclasses
import functools
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from clara_jax.batch import GOLD, Batch, Prompt, Tokens
from clara_jax.config import DataConfig
from clara_jax.data.prompt_tokenizer import PromptTokenizer, PromptTokens
from clara_jax.data.schemas import DataError, Malformed, Row, place_of, require_one_question


class MemorySource(Protocol):
  """Documents of a store, by id or, where ids are empty, by text."""

  def __call__(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Memory tokens [n, M, D]."""

  def slots(self, texts: Sequence[str], ids: Sequence[str] = ()) -> np.ndarray:
    """Places among the documents of the store, [n]; -1 where there is none."""


_CACHED_DOCUMENTS = 200_000


def padded_length(length: int, bucket: int) -> int:
  """The next multiple of `bucket`: few different shapes, few compilations."""
  return -(-length // bucket) * bucket


def label_width(labels: int, data: DataConfig) -> int:
  """A of a batch whose longest row has that many labels."""
  return padded_length(max(1, labels), min(data.bucket, data.label_bucket))


def pad_tokens(rows: Sequence[np.ndarray], pad_id: int, bucket: int, at_least: int = 0) -> Tokens:
  """Right-pads rows of ids to one length, a multiple of `bucket`."""
  lengths = np.array([len(r) for r in rows], np.int32)
  ids = np.full(
    (len(rows), padded_length(max(int(lengths.max()), at_least), bucket)), pad_id, np.int32
  )
  for row, values in zip(ids, rows, strict=True):
    row[: len(values)] = values
  return Tokens(ids, lengths)


def pad_prompts(
  prompts: Sequence[PromptTokens], starts: Sequence[int], pad_id: int, length: int, width: int
) -> Prompt:
  """Prompts [B, length] with their label positions [B, width]; tokens before `starts` carry no
  loss."""
  tokens = pad_tokens([p.ids for p in prompts], pad_id, 1, length)
  positions, labels = np.zeros((2, len(prompts), width), np.int32)
  weights = np.zeros((len(prompts), width), np.float32)
  for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
    count = len(prompt.ids) - start
    positions[i, :count] = np.arange(start - 1, start - 1 + count)
    labels[i, :count] = prompt.ids[start:]
    weights[i, :count] = 1
  return Prompt(tokens, positions, labels, weights)


class RowEncoder:
  """Turns rows into tokens, for one kind of batch (`Stage.data`).

  Args:
    prompt_tokenizer: token layouts.
    kind: 'text', 'given' or 'candidates'.
    data: sizes.
    top_k: K, the documents in a prompt of 'candidates'.
    memories: memory tokens of documents; None to give the documents themselves.
    accumulate: micro-batches of a training batch, for rows that share documents.
  """

  def __init__(
    self,
    prompt_tokenizer: PromptTokenizer,
    kind: str,
    data: DataConfig,
    top_k: int,
    memories: MemorySource | None = None,
    accumulate: int = 1,
  ):
    self.prompt_tokenizer, self.kind, self.data, self.top_k, self.memories = (
      prompt_tokenizer,
      kind,
      data,
      top_k,
      memories,
    )
    self.accumulate = accumulate
    self._documents: dict[str, np.ndarray] = {}
    if kind == "candidates" and top_k > data.candidates:
      raise DataError(f"top_k={top_k} is more than data.candidates={data.candidates}")

  @property
  def together(self) -> int:
    """Rows that stay together in the shuffle: `data.share_documents` where rows bring documents."""
    brings = self.kind == "given" or self.kind == "candidates" and self.memories is None
    return self.data.share_documents if brings else 1

  def __getstate__(self):  # worker processes fill a cache of their own
    return {**self.__dict__, "_documents": {}}

  def _document(self, text: str) -> np.ndarray:
    if text not in self._documents:
      if len(self._documents) >= _CACHED_DOCUMENTS:
        self._documents.clear()
      self._documents[text] = self.prompt_tokenizer.document(text)
    return self._documents[text]

  def check(self, row: Row) -> None:
    """Refuses a row that this kind of batch cannot hold.

    Raises:
      DataError: naming the row.
    """
    if self.kind != "candidates":
      return
    if self.data.retrieve == "store":
      require_one_question(row)
      if len(row.gold) > GOLD:
        raise DataError(
          f"{row.identifier}: {len(row.gold)} gold documents, at most {GOLD} are counted with "
          f"data.retrieve='store'"
        )
      return
    if len(row.documents) < self.data.candidates:
      raise DataError(
        f"{row.identifier}: {len(row.documents)} documents, but "
        f"data.candidates={self.data.candidates}"
      )
    require_one_question(row)
    if any(p >= self.data.candidates for p in row.gold):
      raise DataError(
        f"{row.identifier}: pos_index={list(row.gold)}, but only the first "
        f"data.candidates={self.data.candidates} "
        "documents are read"
      )

  def encode(self, row: Row, rng: random.Random) -> dict:
    """One row as token arrays and its 'id'; `rng` picks among a row's variants.

    Raises:
      DataError: the row does not fit.
    """
    self.check(row)
    prompt_tokenizer = self.prompt_tokenizer
    encoded = {"id": row.identifier}
    if self.kind == "text":
      return encoded | {"prompt": prompt_tokenizer.row_prompt(row, None, rng.randrange(1 << 16))}
    if self.kind == "given":
      instruction = rng.randrange(1 << 16)
      shown = self._expanded(row, rng)
      documents = [d for i, d in enumerate(row.documents) if i not in shown]
      prompt = prompt_tokenizer.row_prompt(
        row, len(documents), instruction, [row.documents[i] for i in shown]
      )
      return encoded | {"prompt": prompt, "documents": [self._document(d) for d in documents]}
    encoded |= {
      "prompt": prompt_tokenizer.answer_prompt(
        row.questions[0], self.top_k, row.answers[0], row.identifier
      ),
      "question": prompt_tokenizer.training_query(row.questions[0]),
    }
    if self.data.retrieve == "store":
      return encoded | {"gold_slots": self._gold_slots(row)}
    documents = row.documents[: self.data.candidates]
    encoded["is_gold"] = np.isin(np.arange(len(documents)), row.gold)
    if self.memories is None:
      return encoded | {"documents": [self._document(d) for d in documents]}
    return encoded | {"memories": self.memories(documents, row.document_ids[: len(documents)])}

  def _expanded(self, row: Row, rng: random.Random) -> list[int]:
    """Places of the documents that the prompt has as text: `data.expand`."""
    if not self.data.expand or len(row.documents) < 2 or rng.random() >= self.data.expand:
      return []
    most = min(self.data.expand_documents, len(row.documents) - 1)
    return rng.sample(range(len(row.documents)), rng.randint(1, most))

  def first_tokens(self, m: int) -> "RowEncoder":
    """The same that writes the first m memory tokens only."""

    def memories(texts, ids=()):
      return self.memories(texts, ids)[:, :m]

    other = copy.copy(self)
    other.prompt_tokenizer, other._documents = self.prompt_tokenizer.first(m), {}
    if self.memories is not None:
      memories.slots = self.memories.slots
      other.memories = memories
    return other

  def first(self, row: dict, m: int) -> dict:
    """An encoded row with the first m of its texts' memory tokens."""
    keep, prompt = functools.partial(self.prompt_tokenizer.first_ids, m=m), row["prompt"]
    prompt_ids = keep(prompt.ids[: prompt.prompt_length])
    encoded_row = {
      **row,
      "prompt": PromptTokens(
        np.concatenate([prompt_ids, keep(prompt.ids[prompt.prompt_length :])]), len(prompt_ids)
      ),
    }
    if "documents" in row:
      encoded_row["documents"] = [keep(d) for d in row["documents"]]
    if "question" in row:
      encoded_row["question"] = keep(row["question"])
    if "memories" in row:
      encoded_row["memories"] = row["memories"][:, :m]
    return encoded_row

  def _gold_slots(self, row: Row) -> np.ndarray:
    """[GOLD] int32; -1 fills up."""
    slots = np.full(GOLD, -1, np.int32)
    texts, ids = (
      [values[p] for p in row.gold] if values else []
      for values in (row.documents, row.document_ids)
    )
    slots[: len(row.gold)] = self.memories.slots(texts, ids)
    if (slots[: len(row.gold)] < 0).any():
      raise DataError(f"{row.identifier}: a gold document is not in the store")
    return slots

  def sizes(self, rows: Sequence[dict], train: bool = True) -> np.ndarray:
    """How large a batch of these rows is: int32 [prompt length, labels, documents a row, document
    length, question length, different documents of a part's micro-batch where rows share them]."""

    def longest(field):
      return max((len(r[field]) for r in rows if field in r), default=0)

    documents = [d for r in rows for d in r.get("documents", ())]
    labels = max(len(r["prompt"].ids) - self._label_start(r["prompt"], train) for r in rows)
    different = self.different(rows, longest("documents")) if train else 0
    return np.array(
      [
        max(len(r["prompt"].ids) for r in rows),
        labels,
        longest("documents"),
        max(map(len, documents), default=0),
        longest("question"),
        different,
      ],
      np.int32,
    )

  def different(self, rows: Sequence[dict], most: int) -> int:
    """Different documents of a part's micro-batch, at most, where rows share them and are filled up
    to `most` documents; else 0."""
    if not self._shares(rows[0], True):
      return 0
    return max(
      len(_once([rows[i] for i in places], most)[0]) for places in self._micro_batches(len(rows))
    )

  def _shares(self, row: dict, train: bool) -> bool:
    return train and self.together > 1 and "documents" in row

  def _micro_batches(self, rows: int) -> list[np.ndarray]:
    """Places of the rows of each micro-batch of each part."""
    part = self.data.batch_size // self.data.shards
    return [
      np.arange(start + c, start + part, self.accumulate)
      for start in range(0, rows, part)
      for c in range(self.accumulate)
    ]

  def _shared(
    self, rows: Sequence[dict], parts: Sequence[int], most: int, different: int, length: int
  ) -> tuple[Tokens, np.ndarray]:
    """Documents [U, L], each once in its part's micro-batch, and their slots [B, K].

    Micro-batch c of C takes every C-th row from c on and, likewise, every C-th document; slots
    count among its own. A part has as many documents as any other: a quarter of its rows times K, a
    half, three quarters, or all.
    """
    count = self.accumulate
    quarter = len(self._micro_batches(len(rows))[0]) // 4
    each = padded_length(different, quarter)
    documents = [np.zeros(0, np.int32)] * (len(parts) * count * each)
    slots = np.zeros((len(rows), most), np.int32)
    for number, places in enumerate(self._micro_batches(len(rows))):
      part, c = divmod(number, count)
      unique_documents, of_rows = _once([rows[i] for i in places], most)
      for t, document in enumerate(unique_documents):
        documents[part * count * each + t * count + c] = document
      slots[places] = of_rows + parts[part] * each
    return pad_tokens(
      documents,
      self.prompt_tokenizer.pad_id,
      min(self.data.bucket, self.data.document_bucket),
      length,
    ), slots

  def _label_start(self, prompt: PromptTokens, train: bool) -> int:
    return 1 if train and self.data.label_documents else prompt.prompt_length

  def collate(
    self,
    rows: Sequence[dict],
    train: bool = True,
    sizes: np.ndarray | None = None,
    memory_tokens: int | None = None,
    parts: Sequence[int] = (0,),
  ) -> Batch:
    """Pads encoded rows into one batch; rows with fewer documents than others get ones of length 0.

    Labels are the answer's tokens; in training, with `data.label_documents`, every token of the
    row. `sizes` (see the method) pads further than these rows need, so that parts of a batch fit
    together. `memory_tokens` is what the rows have, by default the layout's; `parts` are the
    numbers of the batch's parts that these rows are.
    """
    pad, data = self.prompt_tokenizer.pad_id, self.data
    length, labels, most, document_length, question_length, different = (
      self.sizes(rows, train) if sizes is None else sizes
    )
    text_bucket = min(data.bucket, data.document_bucket)
    documents = memories = question = is_gold = gold_slots = document_slots = None
    if self._shares(rows[0], train):
      documents, document_slots = self._shared(rows, parts, most, different, document_length)
    elif "documents" in rows[0]:
      filler = np.zeros(0, np.int32)
      padded = [
        d for r in rows for d in [*r["documents"], *[filler] * (most - len(r["documents"]))]
      ]
      flat = pad_tokens(padded, pad, text_bucket, document_length)
      documents = Tokens(
        flat.ids.reshape(len(rows), most, -1), flat.lengths.reshape(len(rows), most)
      )
    if "memories" in rows[0]:
      memories = np.stack([r["memories"] for r in rows])
    if "question" in rows[0]:
      question = pad_tokens([r["question"] for r in rows], pad, text_bucket, question_length)
    if "is_gold" in rows[0]:
      is_gold = np.stack([r["is_gold"] for r in rows])
    if "gold_slots" in rows[0]:
      gold_slots = np.stack([r["gold_slots"] for r in rows])
    valid = np.array([r.get("valid", 1.0) for r in rows], np.float32)
    prompts = [r["prompt"] for r in rows]
    prompt = pad_prompts(
      prompts,
      [self._label_start(p, train) for p in prompts],
      pad,
      padded_length(length, data.bucket),
      label_width(labels, data),
    )
    return Batch(
      prompt,
      documents,
      memories,
      question,
      is_gold,
      gold_slots,
      valid,
      document_slots,
      memory_tokens or self.prompt_tokenizer.num_memory_tokens,
    )


def _once(rows: Sequence[dict], most: int) -> tuple[list[np.ndarray], np.ndarray]:
  """(documents of rows, each once; which each of a row's is [B, most], where it has fewer an empty
  one)."""
  index_by_content: dict[bytes, int] = {}
  documents = []
  slots = np.zeros((len(rows), most), np.int32)
  for n, row in enumerate(rows):
    for k, document in enumerate(
      [*row["documents"], *[np.zeros(0, np.int32)] * (most - len(row["documents"]))]
    ):
      key = document.tobytes()
      if key not in index_by_content:
        index_by_content[key] = len(documents)
        documents.append(document)
      slots[n, k] = index_by_content[key]
  return documents, slots


@dataclasses.dataclass(frozen=True)
class TrainingBatch:
  """Rows of one step that this process holds: `positions` of the whole batch, their `ids`, and the
  padded arrays."""

  batch: Batch
  positions: np.ndarray
  ids: list[str]


class TrainingBatches:
  """An endless iterator over a run's batches.

  Which rows step t sees, and in which order, is a function of the seed, `data.shards` and t alone:
  the state of the iterator is the number of the next step, and it means the same on any number of
  processes.

  Args:
    sources: each a sequence of shards (`open_sources`), each shard a sequence of rows.
    encoder: tokenizes.
    seed: of the run.
    positions: places in the batch that this process needs; None for all.
    agree: maximum of an int array over all processes, so that their parts are padded alike.

  Raises:
    DataError: fewer rows than a batch, or more malformed ones than `data.max_malformed`.
  """

  def __init__(
    self,
    sources: Sequence[Sequence[Sequence[Row]]],
    encoder: RowEncoder,
    seed: int,
    positions: np.ndarray | None = None,
    agree: Callable[[np.ndarray], np.ndarray] = lambda x: x,
  ):
    data = encoder.data
    self._encoder, self._agree, self._window = encoder, agree, data.length_window
    self._malformed = Malformed(data.max_malformed)
    rows = sum(len(shard) for source in sources for shard in source)
    if rows < data.batch_size:
      raise DataError(f"{rows} rows are fewer than one batch of {data.batch_size}")
    for shard in (shard for source in sources for shard in source if isinstance(shard, list)):
      for row in shard:  # what is in memory is checked before anything is spent on the run
        try:
          encoder.check(row)
        except DataError as error:
          self._malformed.add(str(error), place_of(row))
    part = data.batch_size // data.shards
    together = encoder.together
    if together > 1:
      if not all(isinstance(shard, list) for source in sources for shard in source):
        raise DataError(
          f"data.share_documents={together}: rows of clara records are in no order; name JSONL "
          f"files in data.rows"
        )
      if part // encoder.accumulate % 4 or part % encoder.accumulate or part % together:
        raise DataError(
          f"data.share_documents={together}: data.batch_size={data.batch_size} / "
          f"data.shards={data.shards} has to be a "
          f"multiple of it, and of 4 · train.accumulate={4 * encoder.accumulate}"
        )
    needed = (
      range(data.shards) if positions is None else sorted({int(p) // part for p in positions})
    )
    self._parts, self._seed = list(needed), seed
    self._sizes = encoder.prompt_tokenizer.config.nested_memory if encoder.kind != "text" else ()
    self._positions = np.concatenate([np.arange(s * part, (s + 1) * part) for s in needed])
    shards = [
      _shard_windows([source[s] for source in sources], encoder, seed, s, part) for s in needed
    ]
    self._dataset = lambda first: grain.MapDataset.source(_Windows(shards, first))
    self._step = 0
    self._iterator: Any = None
    self._waiting: list[tuple[list[dict], np.ndarray, int | None]] = []

  @property
  def malformed(self) -> int:
    """Bad rows that this process skipped."""
    return self._malformed.count

  def get_state(self) -> dict[str, int]:
    """{'step': number of the next batch}."""
    return {"step": self._step}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on with that step."""
    self._step, self._iterator, self._waiting = state["step"], None, []

  def __iter__(self) -> "TrainingBatches":
    return self

  def __next__(self) -> TrainingBatch:
    if self._iterator is None:
      self._iterator = self._open(self._step // self._window)
      self._next_window(self._step - self._step % self._window)
      del self._waiting[: self._step % self._window]
    elif not self._waiting:
      self._next_window(self._step)
    rows, sizes, m = self._waiting.pop(0)
    self._step += 1
    return TrainingBatch(
      self._encoder.collate(rows, sizes=sizes, memory_tokens=m, parts=self._parts),
      self._positions,
      [r["id"] for r in rows],
    )

  def memory_tokens(self, step: int) -> int | None:
    """m of a step, drawn from `clara.nested_memory`; a function of the seed and the step alone.
    None: all M."""
    return (
      int(np.random.default_rng([self._seed, step]).choice(self._sizes)) if self._sizes else None
    )

  def _open(self, first: int) -> Any:
    data = self._encoder.data
    dataset = self._dataset(first).to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(1, data.prefetch))
    )
    if data.workers:
      if not flags.FLAGS.is_parsed():  # Grain has flags of its own, which it reads here
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=data.workers, per_worker_buffer_size=max(1, data.prefetch)
        )
      )
    return iter(dataset)

  def _next_window(self, first: int) -> None:
    """The batches of the window that begins with step `first`."""
    batches = pickle.loads(next(self._iterator))
    for row in (r for rows in batches for r in rows):
      for problem, place in row.pop("problems", ()):
        self._malformed.add(problem, place)
    drawn = [self.memory_tokens(first + i) for i in range(len(batches))]
    batches = [
      rows if m is None else [self._encoder.first(r, m) for r in rows]
      for rows, m in zip(batches, drawn, strict=True)
    ]
    sizes = self._agree(np.stack([self._encoder.sizes(rows) for rows in batches]))
    # Once more: rows are filled up with empty documents to what all have agreed on.
    if self._encoder.together > 1:
      different = [
        [self._encoder.different(rows, int(size[2]))]
        for rows, size in zip(batches, sizes, strict=True)
      ]
      sizes = np.concatenate([sizes[:, :-1], self._agree(np.array(different, np.int32))], axis=1)
    self._waiting = list(zip(batches, sizes, drawn, strict=True))

  def close(self) -> None:
    """Stops the workers."""
    if hasattr(self._iterator, "close"):
      self._iterator.close()
    self._iterator = None


def _shard_windows(
  parts: Sequence[Sequence[Row]], encoder: RowEncoder, seed: int, shard: int, part: int
) -> grain.MapDataset:
  """Element w: the rows of one shard for the batches of window w, as a list of batches of `part`
  encoded rows."""
  data, window = encoder.data, encoder.data.length_window
  seed += 1_000_003 * shard  # shards do not shuffle alike
  groups = [[p] for p in parts] if data.weights else [parts]
  mixed = []
  for index, group in enumerate(groups):
    rows = _Joined(group)
    if not len(rows):
      raise DataError(f"shard {shard} of data.shards={data.shards} has no rows")
    dataset = (
      grain.MapDataset.source(range(-(-len(rows) // encoder.together)))
      .seed(seed + 7919 * index)
      .shuffle()
      .repeat(None)
    )
    mixed.append(dataset.random_map(_Encode(rows, encoder)))
  dataset = grain.MapDataset.mix(mixed, weights=data.weights) if data.weights else mixed[0]
  dataset = dataset.batch(part * window // encoder.together, drop_remainder=True, batch_fn=list)
  return dataset.map_with_index(functools.partial(_cut, window, data.batch_size))


def _cut(window: int, batch_size: int, index: int, runs: list[list[dict]]) -> list[list[dict]]:
  if window > 1:
    runs = sorted(runs, key=lambda run: max(len(r["prompt"].ids) for r in run))
  rows = [row for run in runs for row in run]
  if window == 1:
    return [rows]
  part = len(rows) // window
  # Every shard shuffles its batches alike: the long rows of all of them meet.
  order = np.random.default_rng([batch_size, index]).permutation(window)
  return [rows[i * part : (i + 1) * part] for i in order]


class _Joined(Sequence):
  """Sequences one after another."""

  def __init__(self, parts: Sequence[Sequence[Row]]):
    self._parts = parts
    self._ends = np.cumsum([len(p) for p in parts]).tolist()

  def __len__(self):
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index):
    part = bisect.bisect_right(self._ends, index)
    return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class _Encode:
  """Number of a run of rows that stay together -> the encoded rows; in place of one that does not
  fit, the next that does, with the 'problems' met."""

  def __init__(self, rows: Sequence[Row], encoder: RowEncoder):
    self._rows, self._encoder = rows, encoder

  def __call__(self, run: int, rng: np.random.Generator) -> list[dict]:
    random_ = random.Random(int(rng.integers(1 << 62)))
    together = self._encoder.together
    return [self._row(run * together + i, random_) for i in range(together)]

  def _row(self, index: int, random_: random.Random) -> dict:
    problems: list[tuple[str, bytes]] = []
    while True:
      row = self._rows[(index + len(problems)) % len(self._rows)]
      try:
        encoded = self._encoder.encode(row, random_)
        return encoded | ({"problems": problems} if problems else {})
      except DataError as error:
        problems.append((str(error), place_of(row)))
        if len(problems) > min(self._encoder.data.max_malformed, len(self._rows) - 1):
          raise DataError(problems[0][0]) from None


class _Windows:
  """Window w of every shard that this process needs, batch by batch."""

  def __init__(self, shards: Sequence[grain.MapDataset], first: int):
    self._shards, self._first = shards, first

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index):
    windows = [shard[self._first + index] for shard in self._shards]
    window = [[row for window in windows for row in window[i]] for i in range(len(windows[0]))]
    # As one array: between processes Grain gives every array a piece of shared memory of its own.
    return np.frombuffer(pickle.dumps(window), np.uint8)


def evaluation_batches(rows: Sequence[Row], encoder: RowEncoder, batch_size: int) -> list[Batch]:
  """All rows in order, once; the last batch is filled up with copies of its first row that do not
  count (`valid` = 0)."""
  for row in rows:
    encoder.check(row)
  batches = []
  for start in range(0, len(rows), batch_size):
    encoded = [
      encoder.encode(row, random.Random(start)) for row in rows[start : start + batch_size]
    ]
    filler = {**encoded[0], "valid": 0.0}
    filler["prompt"] = PromptTokens(filler["prompt"].ids, len(filler["prompt"].ids))  # no labels
    if "is_gold" in filler:
      filler["is_gold"] = np.zeros_like(filler["is_gold"])
    if "gold_slots" in filler:
      filler["gold_slots"] = np.full_like(filler["gold_slots"], -1)
    batches.append(encoder.collate(encoded + [filler] * (batch_size - len(encoded)), train=False))
  return batches
