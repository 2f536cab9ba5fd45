"""Pages of the site that are made from the code: the README as home, the commands' options, the
configuration, the Python API."""

import argparse
import dataclasses
import importlib
import pathlib
import re

import clara_jax
from clara_jax.cli.main import COMMANDS, command_module
from clara_jax.config import ModelConfig, config_dict, field_meanings

CONTENTS = {
  "Guides": (
    "install",
    "quickstart",
    "training",
    "pods",
    "conversion",
    "corpus",
    "serving",
    "gradients",
    "evaluation",
    "synthesis",
    "reliability",
  ),
  "Results": ("joint_stage", "reproduction", "ratios", "real_language", "performance"),
  "Reference": (
    "commands",
    "reference/cli",
    "reference/configuration",
    "reference/api",
    "architecture",
  ),
}
ROOT = pathlib.Path(__file__).resolve().parents[1]


def write(folder: pathlib.Path) -> None:
  """Writes the generated pages below the folder of the sources; they are not kept."""
  (folder / "reference").mkdir(exist_ok=True)
  for name, text in {
    "index.md": home(),
    "reference/cli.md": commands(),
    "reference/configuration.md": configuration(),
    "reference/api.md": api(),
  }.items():
    if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
      (folder / name).write_text(text, encoding="utf-8")


def home() -> str:
  """The README, whose links are followed from here (files outside of the site are named only), and
  the table of contents."""
  text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
  text = re.sub(r"\[([^\]]+)\]\((?:[A-Z]+(?:\.md|\.cff)?|examples[^)]*)\)", r"`\1`", text)
  return text + "".join(
    f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
    for caption, names in CONTENTS.items()
  )


def commands() -> str:
  """Every command with its options, from the parsers."""
  lines = [
    "# Options of the commands",
    "",
    "Made from the parsers; `clara COMMAND --help` says the same.",
  ]
  for name in COMMANDS:
    parser = argparse.ArgumentParser(prog=f"clara {name}")
    command_module(name).add_arguments(parser)
    lines += [
      "",
      f"## clara {name}",
      "",
      _escape(command_module(name).HELP),
      "",
      "| option | default | meaning |",
      "|---|---|---|",
    ]
    for action in parser._actions:
      if "--help" in action.option_strings:
        continue
      shown = ", ".join(action.option_strings) or str(action.metavar or action.dest)
      default = (
        "required"
        if action.required and action.option_strings
        else (
          ""
          if action.default is None
          or action.default is False
          or action.default in ([], argparse.SUPPRESS)
          else f"`{action.default}`"
        )
      )
      choices = f"; one of {', '.join(f'`{c}`' for c in action.choices)}" if action.choices else ""
      lines.append(f"| `{shown}` | {default} | {_escape((action.help or '') + choices)} |")
    lines += ["", f"With `--json`: {_returned(command_module(name).run)}"]
  return "\n".join(lines) + "\n"


def _returned(run) -> str:
  """What a command returns, from its docstring, with the fields of a dataclass that it names."""
  text = " ".join(run.__doc__.split()).removeprefix("Returns ")
  for dotted in re.findall(r"`([a-z_.]+\.[A-Z]\w+)`", text):
    module, _, name = dotted.rpartition(".")
    report = getattr(importlib.import_module(f"clara_jax.{module}"), name)
    fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(report))
    text = text.replace(f"`{dotted}`", f"`{dotted}` ({fields})")
  return _escape(text)


def configuration() -> str:
  """Every field of `RunConfig` with its default and meaning."""
  meanings = field_meanings()
  lines = [
    "# Configuration",
    "",
    "Made from the dataclasses of `clara_jax/config.py`; `clara config FILE.py:STAGE` prints what "
    "a run would "
    "use. Fields of `clara.model` are the base's unless they are named.",
  ]

  def add(title, prefix, values):
    rows = {
      name: value for name, value in values.items() if not hasattr(value, "items") or not value
    }
    lines.extend(["", f"## {title}", "", "| field | default | meaning |", "|---|---|---|"])
    for name, value in rows.items():
      shown = (
        ""
        if value is None or prefix == "clara.model."
        else f"`{list(value) if isinstance(value, tuple) else value}`"
      )
      lines.append(f"| `{prefix}{name}` | {shown} | {_escape(meanings[prefix + name])} |")
    for name, value in values.items():
      if name not in rows:
        add(f"{prefix}{name}", f"{prefix}{name}.", value)

  values = config_dict().to_dict()
  values["clara"]["model"] = dict.fromkeys(f.name for f in dataclasses.fields(ModelConfig))
  add("The run", "", values)
  return "\n".join(lines) + "\n"


def api() -> str:
  """The public names, from their docstrings."""
  lines = ["# Python API", "", "`import clara_jax` imports nothing else before a name is used."]
  for name in clara_jax.__all__:
    value = getattr(clara_jax, name)
    kind = (
      "automodule"
      if name in ("estimators", "stages")
      else "autoclass"
      if isinstance(value, type)
      else "autofunction"
    )
    target = value.__name__ if kind == "automodule" else f"{value.__module__}.{value.__qualname__}"
    members = (
      ""
      if kind == "autofunction"
      else "\n   :members:\n   :imported-members:\n   :exclude-members: indices, rows, log_prob"
      if kind == "automodule"
      else "\n   :members:"
    )
    lines += [
      "",
      f"## clara_jax.{name}",
      "",
      "```{eval-rst}",
      f".. {kind}:: {target}{members}",
      "```",
    ]
  return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
  return text.replace("|", "\\|").replace("<", "&lt;").replace("%%", "%")
