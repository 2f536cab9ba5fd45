"""`clara compress`: documents into a memory store."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from clara_jax.cli import arguments, inputs

if TYPE_CHECKING:
  from clara_jax.data.prompt_tokenizer import PromptTokenizer
  from clara_jax.data.schemas import Document, Malformed

HELP = "Documents through the compressor, once, into a store; resumes where it was stopped."


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's options."""
  arguments.checkpoint(parser)
  parser.add_argument(
    "--documents",
    required=True,
    nargs="+",
    metavar="PATH",
    help="JSONL (.gz; text, title, id), text, a Wikipedia extract, Markdown, HTML, PDF, Office "
    "files (extra documents), or folders of these",
  )
  parser.add_argument(
    "--split",
    choices=("auto", "always", "never"),
    default="auto",
    help="what is longer than doc_max_length tokens becomes pieces, on sentence bounds; auto: but "
    "not rows of JSONL, whose end is left out",
  )
  parser.add_argument(
    "--overlap",
    type=int,
    default=0,
    metavar="TOKENS",
    help="of the sentences before it that a piece repeats, at most; default 0",
  )
  parser.add_argument("--store", required=True, metavar="DIR")
  arguments.max_malformed(parser, "documents")
  arguments.memory_tokens(parser, "a new store gets the first m memory tokens of each document")
  parser.add_argument(
    "--encoding",
    "--form",
    choices=("float32", "bfloat16", "int8"),
    help="of a new store; default: the compute dtype",
  )
  parser.add_argument(
    "--no-text", action="store_true", help="a new store keeps ids and titles only"
  )
  parser.add_argument(
    "--replace",
    action="store_true",
    help="compresses documents anew whose title or text has changed",
  )
  parser.add_argument(
    "--delete-missing",
    action="store_true",
    help="deletes documents of the store that are not among these any more; those of a file that "
    "could not be read stay",
  )
  parser.add_argument(
    "--batch-size", type=arguments.positive, default=64, help="documents in a batch; default 64"
  )
  parser.add_argument(
    "--shard-size",
    type=arguments.positive,
    default=4096,
    help="documents a segment, what a kill can lose; default 4096",
  )
  parser.add_argument(
    "--workers", type=int, default=0, help="processes that tokenize ahead; default 0: a thread"
  )
  parser.add_argument(
    "--fsdp",
    type=arguments.positive,
    default=1,
    help="devices over which the compressor's weights are divided, as --mesh fsdp=; default 1",
  )
  arguments.ray(parser, "compresses")
  arguments.several_processes(parser)


def run(options: argparse.Namespace) -> Any:
  """Returns `inference.compress.CompressReport`."""
  import jax

  from clara_jax.config import ConfigError
  from clara_jax.data import schemas
  from clara_jax.inference.compress import compress_corpus

  malformed = schemas.Malformed(options.max_malformed)
  if options.ray_workers and not options.ray:
    raise ConfigError("--ray-workers: is for --ray")
  if options.mesh and options.fsdp > 1:
    raise ConfigError("--fsdp and --mesh: name one of them")
  if options.ray is not None:
    return _with_ray(options, malformed)
  if (options.process is None) != (options.processes is None) and not options.distributed:
    raise ConfigError("--process and --processes: name both, or neither")
  process, processes = options.process or 0, options.processes or 1
  if not 0 <= process < processes:
    raise ConfigError(f"--process {process}: expected 0 to {processes - 1}")
  joined = options.distributed or options.coordinator  # otherwise they know not of each other
  one_mesh = options.mesh is not None and joined
  if joined:
    inputs.join_processes(options)
    process, processes = jax.process_index(), jax.process_count()
  if not one_mesh:
    options.mesh = _local_mesh(options)
  checkpoint = inputs.opened_here(options, "compressor")
  report = compress_corpus(
    checkpoint,
    _documents(options, checkpoint.prompt_tokenizer, malformed),
    options.store,
    encoding=options.encoding,
    text=False if options.no_text else None,
    replace=options.replace,
    delete_missing=_is_missing(malformed) if options.delete_missing else None,
    batch_size=options.batch_size,
    shard_size=options.shard_size,
    workers=options.workers,
    process=0 if one_mesh else process,
    processes=1 if one_mesh else processes,
  )
  return inputs.main_only(report) if one_mesh else report


def _documents(
  options: argparse.Namespace, prompt_tokenizer: PromptTokenizer, malformed: Malformed
) -> Iterator[Document]:
  """--documents, in pieces where they are too long."""
  from clara_jax.config import ConfigError
  from clara_jax.documents import pieces, reading

  limit = prompt_tokenizer.config.doc_max_length
  if not 0 <= options.overlap <= limit // 4:
    raise ConfigError(
      f"--overlap {options.overlap}: expected 0 to {limit // 4}, a quarter of doc_max_length"
    )
  return pieces.documents(
    reading.read(options.documents, malformed),
    limit,
    lambda text: len(prompt_tokenizer.ids(text)),
    options.split,
    options.overlap,
  )


def _is_missing(malformed: Malformed) -> Callable[[str], bool]:
  """May a document that was not seen be deleted? Not if its file could not be read."""

  def is_missing(identifier: str) -> bool:
    rows = malformed.count - len(malformed.names)  # of these nobody knows which documents they are
    names = malformed.names
    return not (rows or identifier in names or identifier.rpartition("#")[0] in names)

  return is_missing


def _with_ray(options: argparse.Namespace, malformed: Malformed) -> Any:
  from clara_jax.checkpoints import formats
  from clara_jax.config import ConfigError
  from clara_jax.inference.compress import compress_corpus_with
  from clara_jax.workers import Pool

  if (
    options.distributed
    or options.coordinator
    or options.processes is not None
    or options.process is not None
  ):
    raise ConfigError("--ray: hands out the work itself; leave --processes and the others away")
  prompt_tokenizer = formats.open_checkpoint(
    options.checkpoint,
    options.base,
    options.dtype,
    chat_template=inputs.chat_template(options),
    allow=options.allow_config,
  ).prompt_tokenizer()
  documents = _documents(options, prompt_tokenizer, malformed)
  with Pool(options.ray, make_compressor, {"options": options}, options.ray_workers) as pool:
    return compress_corpus_with(
      pool,
      documents,
      options.store,
      encoding=options.encoding,
      text=False if options.no_text else None,
      replace=options.replace,
      delete_missing=_is_missing(malformed) if options.delete_missing else None,
      shard_size=options.shard_size,
    )


def make_compressor(options: argparse.Namespace) -> Any:
  """What a worker makes, once, of the command's options."""
  from clara_jax.inference.compress import Compressor

  options.mesh = _local_mesh(options)
  checkpoint = inputs.opened_here(options, "compressor")
  return Compressor(checkpoint, checkpoint.mesh, options.batch_size)


def _local_mesh(options: argparse.Namespace) -> Any:
  """Of this process's devices."""
  import jax

  from clara_jax import sharding
  from clara_jax.config import MeshConfig

  sizes = options.mesh or MeshConfig(data=-1, fsdp=options.fsdp)
  return sharding.make_mesh(sizes, jax.local_devices())
