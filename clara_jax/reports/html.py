"""Self-contained HTML pages: tables with intervals, plots, examples. They work offline and on a
narrow screen.

All that is shown is escaped unless it is `Markup`; a Markup's `format` escapes what it is given.
The pages allow no script.
"""

import io
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from markupsafe import Markup

from clara_jax.config import ConfigError


@runtime_checkable
class Interval(Protocol):
  """A mean with its interval."""

  mean: float
  low: float
  high: float


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h1,h2,h3,p{overflow-wrap:anywhere}h2{font-size:1.2rem;margin-top:2rem}h3{font-size:1rem;margin-bottom:.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.95rem}
td,th{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem}
figure{margin:1rem 0}svg{max-width:100%;height:auto}.doc,.small{color:#555;font-size:.9rem}
.doc{margin:.2rem 0 .2rem 1rem;overflow-wrap:anywhere}.gold{border-left:3px solid #2a7a3b;padding-left:.5rem}
.answer{font-weight:600}.good{color:#1d6b2f}.bad{color:#a3261f}code{background:#f4f4f4;padding:0 .2rem}pre{overflow-x:auto}
.q{font-weight:600}.g{text-decoration:underline;text-decoration-color:#2a7a3b;text-decoration-thickness:2px}
"""  # noqa: E501


def figure(
  draw: Callable[[Any], None],
  width: float = 6.5,
  height: float = 3.6,
  panels: tuple[int, int] = (1, 1),
) -> Markup:
  """An SVG drawn by `draw(axes)`; of several panels (rows, columns), `axes` is the array of
  them."""
  try:
    import matplotlib
  except ImportError:
    raise ConfigError(
      "plots need matplotlib: pip install 'clara_jax[evaluate]'; what was computed is kept"
    ) from None
  matplotlib.use("svg")
  from matplotlib import pyplot

  with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
    fig, axes = pyplot.subplots(*panels, figsize=(width, height), layout="constrained")
    draw(axes)
    for one in fig.axes:
      one.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(fig)
  text = buffer.getvalue()
  # Matplotlib escapes what it writes.
  return Markup("<figure>{}</figure>").format(Markup(text[text.index("<svg") :]))


POLICY = (
  "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
  "form-action 'none'"
)
_PAGE = Markup(
  "<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
  'content="{policy}">'
  "<meta name=viewport "
  "content='width=device-width'><title>{title}</title><style>{style}</style><h1>{title}</h1><p>{intro}</p>"
  "{body}</html>"
)


def joined(parts: Iterable[str], between: str = "") -> Markup:
  """Parts one after another."""
  return Markup(between).join(parts)


def page(title: str, intro: str, sections: Sequence[tuple[str, str]]) -> Markup:
  """A whole page; sections are (heading, content)."""
  body = joined(Markup("<h2>{}</h2>{}").format(name, content) for name, content in sections)
  return _PAGE.format(
    policy=Markup(POLICY), title=title, style=Markup(STYLE), intro=intro, body=body
  )


def plots(figures: Iterable[str]) -> Markup:
  """Figures beside each other."""
  return Markup("<div class=plots>{}</div>").format(joined(figures))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
  """Numbers and means are right-aligned."""

  def cell(value):
    if isinstance(value, str):
      return Markup("<td>{}</td>").format(value)
    if isinstance(value, Interval):  # its interval below it: columns stay narrow
      return Markup("<td class=n>{:.3f}<br><span class=small>{:.3f}–{:.3f}</span></td>").format(
        value.mean, value.low, value.high
      )
    return Markup("<td class=n>{}</td>").format(number(value))

  lines = joined(Markup("<tr>{}</tr>").format(joined(map(cell, row))) for row in rows)
  heads = joined(Markup("<th>{}</th>").format(h) for h in header)
  return Markup("<div class=wide><table><tr>{}</tr>{}</table></div>").format(heads, lines)


def number(value: Any) -> str:
  """A number, or nothing."""
  if value is None:
    return ""
  return (
    f"{value:,}"
    if isinstance(value, int)
    else f"{value:.3g}"
    if abs(value) < 0.1
    else f"{value:.3f}"
  )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table for a document."""
  lines = [
    header,
    ["---"] * len(header),
    *[[v if isinstance(v, str) else number(v) for v in row] for row in rows],
  ]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(path: str | pathlib.Path, text: str) -> None:
  """Writes a page."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text, encoding="utf-8")
