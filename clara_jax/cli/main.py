"""`clara COMMAND …`: parse, build a configuration, call one library function.

Exit status: 0 done, 2 wrong usage or bad input (one clear line), 1 anything else. With `--json` exactly one JSON object goes to
standard output; progress and logs go to standard error.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence

from clara_jax.evaluation.settings import SETTINGS

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status."""
  parser = _parser()
  options, rest = parser.parse_known_args(arguments)
  if rest and options.command != "train":
    parser.error(f"unrecognized arguments: {' '.join(rest)}")
  # Logging of the libraries below would drown the progress.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  quiet_logs()
  for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only shows the rest as escapes
    if hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")
  from clara_jax.cli import commands
  try:
    with _kept_standard_output(options.json):
      run_command = getattr(commands, options.command)
      report = run_command(options, rest) if options.command == "train" else run_command(options)
  except KeyboardInterrupt:
    print("clara: interrupted", file=sys.stderr)
    return 130
  except commands.bad_input_errors() as error:
    print(f"clara {options.command}: {_one_line(error)}", file=sys.stderr)
    return EXIT_BAD_INPUT
  except OSError as error:
    if error.errno not in _DISK:
      raise
    print(f"clara {options.command}: {_one_line(error)}", file=sys.stderr)
    return 1
  if report is not None:
    value = dataclasses.asdict(report) if dataclasses.is_dataclass(report) else report
    if options.json:
      print(json.dumps(value, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower()))
    else:
      commands.show(options.command, value)
  return 0


@contextlib.contextmanager
def _kept_standard_output(keep: bool) -> Iterator[None]:
  """Keeps standard output for the one JSON object: what libraries print there, also from C++, goes to standard error."""
  if not keep:
    yield
    return
  sys.stdout.flush()
  out = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    sys.stdout.flush()
    os.dup2(out, 1)
    os.close(out)


# What is wrong with a disk, not with the program; what was done is kept.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ESTALE}


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split()) or type(error).__name__


def quiet_logs() -> None:
  """Keeps the libraries below from drowning the progress."""
  import logging
  for name in ("absl", "jax", "orbax"):
    logging.getLogger(name).setLevel(logging.ERROR)
  import absl.logging
  absl.logging.set_verbosity(absl.logging.ERROR)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="clara", description="CLaRa: retrieval and answers in one space of memory tokens.")
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return sub

  def reading(sub: argparse.ArgumentParser, dtype: str) -> None:
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
    sub.add_argument("--chat-template", metavar="FILE", help="a Jinja template that takes the place of the tokenizer's")
    sub.add_argument("--allow-config", action="append", default=[], metavar="FIELD",
                     help="a field of config.json or adapter_config.json that is not known and changes nothing; any number of times")

  def checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", required=True, metavar="CKPT",
                     help="of clara train or convert, of the released code, or of PEFT; a plain Hugging Face model where no role is needed")
    sub.add_argument("--base", metavar="DIR", help="the base model, where the checkpoint's own record does not lead to it")
    reading(sub, "type of computation; default: the checkpoint's")

  def memory_tokens(sub: argparse.ArgumentParser, text: str = "writes, scores and reads the first m memory tokens of a document") -> None:
    sub.add_argument("--memory-tokens", type=positive, metavar="m", help=f"{text}; default: all")

  def positive(text: str) -> int:
    if (value := int(text)) < 1:
      raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value

  def max_malformed(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--max-malformed", type=int, default=0, metavar="N", help=f"bad {what} that are passed over and reported; default 0")

  def several_processes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--distributed", action="store_true", help="one of several processes, found by JAX (Cloud TPU, GKE, SLURM)")
    sub.add_argument("--coordinator", metavar="HOST:PORT", help="by hand: where process 0 is (compress does not need it)")
    sub.add_argument("--processes", type=int, metavar="N", help="by hand: how many there are")
    sub.add_argument("--process", type=int, metavar="I", help="by hand: which one this is, from 0")

  quickstart = command("quickstart", "The whole system on a generated corpus: train, compress, index, answer.")
  quickstart.add_argument("--workdir", default="quickstart", metavar="DIR")
  quickstart.add_argument("--from-scratch", action="store_true", help="train everything here, instead of from the shipped result")
  quickstart.add_argument("--seed", type=int, default=0)

  train = command("train", "Trains one stage; goes on by itself where a run was stopped.")
  train.add_argument("--config", required=True, metavar="FILE.py[:NAME]", help="ml_collections; override with --config.a.b=value")
  train.add_argument("--workdir", required=True, metavar="DIR")
  reading(train, "type of computation and of the frozen base; default: the configuration's, or the base's")
  several_processes(train)

  records = command("records", "JSONL rows as ArrayRecord files, which runs on many hosts read at random.")
  records.add_argument("--kind", choices=("scp", "instruct", "joint"), required=True, help="joint: for contrastive, too")
  records.add_argument("--rows", nargs="+", required=True, metavar="F", help="JSONL (.gz)")
  records.add_argument("--out", required=True, metavar="DIR", help="the dataset goes to DIR/KIND/VERSION")
  records.add_argument("--files", type=int, default=32, help="default 32; as many as data.shards of the runs, or more")
  max_malformed(records, "rows")

  compress = command("compress", "Documents through the compressor, once, into a store; goes on by itself where it was stopped.")
  checkpoint(compress)
  compress.add_argument("--documents", required=True, metavar="F", help="JSONL (.gz): id, text, title")
  compress.add_argument("--store", required=True, metavar="DIR")
  max_malformed(compress, "documents")
  memory_tokens(compress, "a new store gets the first m memory tokens of each document")
  compress.add_argument("--form", choices=("float32", "bfloat16", "int8"), help="of a new store; default: the type of the computation")
  compress.add_argument("--no-text", action="store_true", help="a new store keeps ids and titles only")
  compress.add_argument("--replace", action="store_true", help="compresses documents anew whose title or text has changed")
  compress.add_argument("--batch-size", type=positive, default=64, help="documents a pass; default 64")
  compress.add_argument("--shard-size", type=positive, default=4096, help="documents a segment, what a kill can lose; default 4096")
  compress.add_argument("--workers", type=int, default=0, help="processes that tokenise ahead; default 0: a thread")
  compress.add_argument("--fsdp", type=positive, default=1, help="devices over which the compressor's weights are divided; default 1")
  several_processes(compress)

  store = command("store", "Looks at a store or changes it.")
  store.add_argument("action", choices=("info", "verify", "delete", "compact", "quantise", "truncate", "repair"),
                     help="info: what it is and holds; verify: reads all of it, checks checksums, counts and ids; delete: documents by id; "
                          "compact: removes what was deleted or replaced from the files; quantise: copies it in another form; "
                          "truncate: copies the first m memory tokens of each document; repair: gives up segments that are damaged, so "
                          "that their documents can be compressed again")
  store.add_argument("--store", required=True, metavar="DIR")
  store.add_argument("--ids", metavar="F", help="delete: a file with one id a line; of *.jsonl, JSON strings or objects with an id")
  store.add_argument("--to", metavar="DIR", help="quantise, truncate: the new store")
  store.add_argument("--memory-tokens", type=positive, metavar="m", help="truncate: how many are kept")
  store.add_argument("--form", choices=("float32", "bfloat16", "int8", "pq"), help="quantise: its form")
  store.add_argument("--sub-width", type=positive, default=4, help="quantise: dimensions that share a byte of pq; default 4")

  index = command("index", "Builds the search index beside a store, or brings it up to date.")
  index.add_argument("--store", required=True, metavar="DIR")
  index.add_argument("--kind", choices=("scann", "exact"), help="default: that of the index which is there, else scann (millions, CPU)")
  index.add_argument("--memory-tokens", type=positive, metavar="m", help="searches with the first m memory tokens of a document, whatever "
                     "is read; default: as the index which is there, else all")
  index.add_argument("--dimensions", type=int, metavar="N", help="searches in so many (PCA), re-ranks on all; 0: in all; "
                     "default: as the index which is there, else all")

  def answerer(sub: argparse.ArgumentParser) -> None:
    checkpoint(sub)
    sub.add_argument("--store", required=True, metavar="DIR")
    memory_tokens(sub, "reads the first m memory tokens of each document (clara index says how many are searched with)")
    sub.add_argument("--top-k", type=positive, help="documents given to the generator; default: the checkpoint's")
    sub.add_argument("--merge", action="store_true", help="merge the generator into a copy of the base: faster, for a second base's memory")
    sub.add_argument("--max-new-tokens", type=positive, default=64, help="of the longest answer; default 64")

  ask = command("ask", "Retrieves documents and answers questions from their memory tokens.")
  answerer(ask)
  ask.add_argument("questions", nargs="+", metavar="QUESTION")

  serve = command("serve", "Answers over HTTP, with a page to ask on.")
  answerer(serve)
  serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
  serve.add_argument("--port", type=int, default=5004, help="default 5004")
  serve.add_argument("--allowed-host", action="append", default=[], metavar="NAME",
                     help="a name under which the server may be asked, besides addresses, localhost and this machine's; .example.com: all "
                     "below it; *: any; any number of times")
  serve.add_argument("--token-file", metavar="F", help="requests must bring the token in this file, as Authorization: Bearer")
  serve.add_argument("--max-batch", type=positive, default=32, help="questions a pass; default 32")
  serve.add_argument("--max-wait-ms", type=float, default=4.0, help="how long the first question of a pass waits for others; default 4")
  serve.add_argument("--max-waiting", type=positive, default=512, help="requests that may wait, more are refused (429); default 512")
  serve.add_argument("--timeout", type=float, default=60.0, help="seconds that a request may take; default 60")

  def rows(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--rows", required=True, metavar="F",
                     help="questions with documents: JSONL, or the published files of SQuAD, HotpotQA, 2Wiki, MuSiQue, PubMedQA, NQ")
    sub.add_argument("--limit", type=positive, help="only the first rows")
    max_malformed(sub, "rows")
    sub.add_argument("--max-new-tokens", type=positive, default=64, help="of the longest answer; default 64")

  candidates = command("candidates", "A first-stage retriever finds documents for questions.")
  candidates.add_argument("--questions", required=True, metavar="F", help="what evaluate reads, with or without documents")
  candidates.add_argument("--corpus", metavar="F", help="JSONL: id, text, title; default: the questions' own documents, all together")
  candidates.add_argument("--out", required=True, metavar="F", help="JSONL rows")
  candidates.add_argument("--count", type=positive, default=20, help="documents a question; default 20")
  candidates.add_argument("--setting", choices=("normal", "oracle"), default="normal",
                          help="oracle: the gold documents are always among them")
  candidates.add_argument("--retriever", default="bm25", metavar="NAME",
                          help="bm25 (default); a sentence-transformers model (extra dense): its directory, or an id in the hub's cache; "
                          "MODULE:FUNCTION: an encoder of your own")
  candidates.add_argument("--seed", type=int, default=0, help="of the order of oracle rows")
  max_malformed(candidates, "rows, and documents of the corpus,")

  evaluate = command("evaluate", "Answers every row of a file in one or more settings and scores the answers.")
  checkpoint(evaluate)
  memory_tokens(evaluate)
  rows(evaluate)
  evaluate.add_argument("--setting", choices=(*SETTINGS, "all"), required=True, nargs="+",
                        help="what the generator reads: " + "; ".join(f"{name}: {setting.says}" for name, setting in SETTINGS.items()))
  evaluate.add_argument("--also", action="append", default=[], metavar="NAME=CKPT",
                        help="another checkpoint in the setting joint, e.g. a contrastive one; with --report, any number of times")
  evaluate.add_argument("--report", metavar="DIR", help="writes predictions, report.json and report.html; goes on where it was stopped")
  evaluate.add_argument("--judge", metavar="URL", help="with --report: an OpenAI-compatible server, up to /v1, that says whether answers "
                        "are grounded in the documents that were read; its key in OPENAI_API_KEY")
  evaluate.add_argument("--judge-model", metavar="NAME", help="the judge's name there")
  evaluate.add_argument("--batch-size", type=positive, default=16, help="rows a pass; default 16")
  evaluate.add_argument("--predictions", metavar="F", help="one JSON a row, of one setting; goes on where it was stopped")

  compare = command("compare", "Two runs of evaluate on the same rows: differences with intervals.")
  compare.add_argument("a", metavar="A", help="a directory of evaluate --report, or a file of --predictions")
  compare.add_argument("b", metavar="B")
  compare.add_argument("--report", metavar="F.html", help="writes a page")

  explain = command("explain", "Why answers came out: lens words, attention, what each document did for the answer.")
  checkpoint(explain)
  memory_tokens(explain)
  rows(explain)
  explain.add_argument("--top", type=positive, default=50, help="words of the lens for each memory token; default 50")
  explain.add_argument("--report", metavar="F.html", help="writes a page")

  synthesize = command("synthesize", "SCP or instruct data, written and checked by a language model; goes on where it was stopped.")
  synthesize.add_argument("--out", required=True, metavar="DIR")
  synthesize.add_argument("--documents", metavar="F", help="JSONL (.gz), plain text, a Wikipedia extract, or a directory of these")
  synthesize.add_argument("--questions", metavar="F", help="instead: questions with documents (see evaluate); a teacher answers them")
  synthesize.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to /v1, its key in OPENAI_API_KEY; or "
                          "'checkpoint': the base of --model; or 'offline': a stand-in that knows the quickstart's world")
  synthesize.add_argument("--model", metavar="NAME", help="its name there")
  reading(synthesize, "of --endpoint checkpoint")
  synthesize.add_argument("--prompts", metavar="DIR", help="templates and demonstrations that take the place of the package's own")
  synthesize.add_argument("--tokens", type=positive, default=256, help="of a document, with its title; longer ones are cut; default 256")
  synthesize.add_argument("--tokenizer", metavar="DIR", help="that counts them; default: words")
  synthesize.add_argument("--rounds", type=positive, default=10, help="at most; default 10")
  synthesize.add_argument("--in-flight", type=positive, default=64, help="requests at once, at most; default 64")
  synthesize.add_argument("--timeout", type=float, default=120.0, help="seconds that a request may take; default 120")
  synthesize.add_argument("--temperature", type=float, default=0.7)
  synthesize.add_argument("--max-reply-tokens", type=positive, default=2048)
  synthesize.add_argument("--no-json-schema", action="store_true", help="for servers without response_format")
  synthesize.add_argument("--no-seed", action="store_true", help="for servers that refuse a seed")
  synthesize.add_argument("--max-requests", type=positive, help="budget of this start")
  synthesize.add_argument("--max-tokens", type=positive, help="budget of this start: prompts and replies; what is in flight when it "
                          "is spent comes on top")
  synthesize.add_argument("--price", type=float, nargs=2, default=(0.0, 0.0), metavar=("PROMPTS", "REPLIES"),
                          help="of a million tokens; the report then has the cost")
  synthesize.add_argument("--records", action="store_true",
                          help="also ArrayRecord, of all shards that are there, in DIR/records; alone, of what is there")
  synthesize.add_argument("--retry-rejected", nargs="?", const="", metavar="REASON",
                          help="documents that were rejected are tried again, with other seeds; only those whose reason begins so")
  synthesize.add_argument("--shard", type=int, default=0, metavar="I", help="this worker's part of the corpus")
  synthesize.add_argument("--shards", type=positive, default=1, metavar="N", help="how many workers there are")
  synthesize.add_argument("--limit", type=positive, help="only the first documents or questions")
  synthesize.add_argument("--report", action="store_true", help="writes DIR/report.html; alone, of what is there")

  paraphrase = command("paraphrase", "Documents written again from their memory tokens: what these keep (ROUGE, entities, BERTScore).")
  checkpoint(paraphrase)
  memory_tokens(paraphrase)
  paraphrase.add_argument("--documents", required=True, metavar="F", help="JSONL (.gz): id, text")
  paraphrase.add_argument("--limit", type=positive, help="only the first documents")
  max_malformed(paraphrase, "documents")
  paraphrase.add_argument("--batch-size", type=positive, default=16, help="documents a pass; default 16")
  paraphrase.add_argument("--max-new-tokens", type=positive, default=256, help="of the longest paraphrase; default 256")
  paraphrase.add_argument("--bertscore", metavar="MODEL[:LAYER]", help="also BERTScore with this Hugging Face model (extra bertscore)")
  paraphrase.add_argument("--predictions", metavar="F", help="writes one JSON a document")

  reproduce = command("reproduce", "The paper's claims as experiments on a generated world; goes on by itself where it was stopped.")
  reproduce.add_argument("--workdir", default="reproduction", metavar="DIR")
  reproduce.add_argument("--claims", nargs="+", metavar="LETTER",
                         help="a SCP beats reconstruction and none; b all kinds of data beat each; c the MSE term; d joint beats generator "
                         "only; e against labels; f a copied query reasoner; g ratios; h more or fewer documents; default: all")
  reproduce.add_argument("--seeds", type=positive, default=3, help="default 3")
  reproduce.add_argument("--scale", type=float, default=1.0, help="factor on steps and test rows; default 1: an hour on two cores")

  gradients = command("gradients", "Gradient estimators: against the exact gradient, or in training, side by side; one page of all.")
  gradients.add_argument("--out", required=True, metavar="DIR", help="results and DIR/gradients.html")
  gradients.add_argument("--estimators", nargs="+", metavar="E", help="NAME, NAME(argument=value, …) or FILE.py:FUNCTION; with "
                         "temperature=…, final_temperature=… (annealed) or learned=True, too; default: all")
  gradients.add_argument("--draws", type=positive, help="of an estimate; default 1000, with --checkpoint 32")
  gradients.add_argument("--vary", nargs="*", metavar="WHAT", choices=("temperature", "spread", "k", "n", "correlation", "loss"),
                         help="one at a time, of temperature, spread (of the scores), k, n, correlation (of memories), loss; "
                         "default: all; with nothing behind it, none")
  gradients.add_argument("--checkpoint", metavar="CKPT", help="the loss of its generator, on --rows, in place of synthetic losses")
  gradients.add_argument("--base", metavar="DIR", help="the checkpoint's base, where its own record does not lead to it")
  reading(gradients, "of the computations")
  gradients.add_argument("--rows", metavar="F", help="questions with candidates (the joint stage's rows)")
  gradients.add_argument("--limit", type=positive, default=16, help="rows of it; default 16")
  gradients.add_argument("--candidates", type=positive, default=6, help="N, the gold documents and others of each; default 6")
  gradients.add_argument("--train", action="store_true", help="trains the joint stage on the generated world with each of them")
  gradients.add_argument("--seeds", type=positive, default=5, help="of --train; default 5")
  gradients.add_argument("--scale", type=float, default=1.0, help="factor on steps and test rows of --train; default 1")
  gradients.add_argument("--workdir", metavar="DIR", help="of the trainings, also one of `clara reproduce`; default: OUT/trainings")

  loss = command("loss", "A stage's loss on rows, without update or dropout.")
  checkpoint(loss)
  memory_tokens(loss)
  loss.add_argument("--stage", required=True, choices=("scp", "instruct", "joint", "contrastive"))
  loss.add_argument("--rows", required=True, metavar="F")
  loss.add_argument("--batch-size", type=int, default=16)

  convert = command("convert", "Any checkpoint to any format, tensor by tensor.")
  convert.add_argument("source", metavar="SRC",
                       help="a checkpoint of ours, of the released code, of PEFT, a Hugging Face model (a directory, or an id in the hub's "
                       "cache), or a GGUF file")
  convert.add_argument("destination", metavar="DST", help="a directory that is not there yet")
  convert.add_argument("--to", required=True, choices=("clara", "upstream", "peft", "hf"))
  convert.add_argument("--role", help="for peft: only this role; for hf: the role that is merged into the model")
  convert.add_argument("--base", metavar="DIR", help="the source's base, where its own record does not lead to it")
  reading(convert, "the base's weights are written in it; default: their own")
  convert.add_argument("--verify", action="store_true", help="reload what was written and compare; writes DST/parity.json")

  lens = command("lens", "The words that a question's memory tokens stand for (logit lens).")
  checkpoint(lens)
  memory_tokens(lens)
  lens.add_argument("--top", type=int, default=20, help="words for each memory token, merged")
  lens.add_argument("questions", nargs="+", metavar="QUESTION")
  return parser


def run() -> None:
  """The console script."""
  sys.exit(main())


if __name__ == "__main__":
  run()
