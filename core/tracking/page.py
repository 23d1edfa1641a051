"""The building blocks of the report's HTML page: its style, sections, cards and tables."""

from collections.abc import Mapping, Sequence
from html import escape

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #222;
       font: 15px/1.5 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 6px; }
.what { color: #555; margin: 0 0 20px; overflow-wrap: anywhere; }
section, .card { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; }
section { padding: 18px 22px; margin: 0 0 18px; }
section p { margin: 0 0 10px; color: #444; max-width: 110ch; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px; }
.cards { margin: 0 0 18px; }
.card { padding: 14px 18px; }
.card h2 { font-size: 13px; font-weight: 600; color: #555; margin: 0; }
.card div { font-size: 13px; color: #555; overflow-wrap: anywhere; }
.card .big { font-size: 25px; font-weight: 600; color: #0b4f7d; white-space: nowrap; }
.arrow { color: #999; font-weight: 400; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
.phases { font-size: 14px; }
.phases th, .phases td { text-align: right; padding: 4px 8px; border-bottom: 1px solid #eceef0; }
.phases td { white-space: nowrap; }
.phases th { color: #555; font-size: 13px; vertical-align: bottom; border-bottom: 2px solid #c9ced4; }
.phases th:first-child, .phases td:first-child { text-align: left; }
.phases tr:last-child td { font-weight: 600; }
.phases small { color: #666; font-weight: 400; }
.seconds td { padding: 3px 14px 3px 0; white-space: nowrap; text-align: right; }
.seconds td:first-child { text-align: left; }
.seconds td:last-child { width: 60%; }
.seconds div { height: 12px; background: #0b4f7d; min-width: 1px; border-radius: 2px; }
.settings { columns: 2 420px; column-gap: 40px; margin-top: 10px; }
.settings table { margin: 0 0 14px; break-inside: avoid; font-size: 13px; }
.settings caption { text-align: left; font-weight: 600; color: #0b4f7d; padding: 2px 0; }
.settings td { vertical-align: top; padding: 2px 10px 2px 0; border-bottom: 1px solid #f0f1f3; }
.settings td { overflow-wrap: anywhere; }
.settings td:first-child { color: #555; width: 42%; }

pre { background: #f4f5f7; border-radius: 6px; padding: 10px 14px; font-size: 13px; margin: 4px 0 12px; }
pre { overflow-x: auto; }
summary { cursor: pointer; font-size: 18px; font-weight: 600; }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """Return a whole document.

    Args:
        title: Plain text.
        subtitle: Plain text.
        parts: HTML of the sections.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style>"
    )
    body = f'<h1>{escape(title)}</h1><p class="what">{escape(subtitle)}</p>' + "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>\n{body}\n</main></body></html>\n'
    )


def section(title: str, text: str, body: str) -> str:
    """Return a section with a heading, a paragraph of HTML ``text`` and the HTML ``body``."""
    paragraph = f"<p>{text}</p>" if text else ""
    return f'<section><h2>{escape(title)}</h2>{paragraph}<div class="wide">{body}</div></section>'


def cards(items: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """Return boxes with a heading, one large value (or two, with an arrow between) and a small text each."""
    arrow = ' <span class="arrow">→</span> '
    boxes = (
        f'<div class="card"><h2>{escape(title)}</h2><div class="big">{arrow.join(map(escape, values))}</div>'
        f"<div>{escape(text)}</div></div>"
        for title, values, text in items
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def phase_rows(columns: Mapping[str, Sequence[str]]) -> str:
    """Return a table with one column a header; what follows " ± " in a cell is set small."""
    head = "".join(f"<th>{_breakable(header)}</th>" for header in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_small_error(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    return f'<table class="phases"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _breakable(header: str) -> str:
    first, *rest = escape(header).split("\n")
    return "<br>".join([first.replace("_", "_<wbr>"), *rest])


def _small_error(cell: str) -> str:
    value, sign, error = escape(cell).partition(" ± ")
    return f"{value} <small>± {error}</small>" if sign else value


def bars(rows: Sequence[tuple[str, str, float]]) -> str:
    """Return a table of (name, value, share in [0, 1]) with a bar for the share."""
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{100 * share:.0f} %</td>"
        f'<td><div style="width:{100 * share:.1f}%"></div></td></tr>'
        for name, value, share in rows
    )
    return f'<table class="seconds"><tbody>{lines}</tbody></table>'


def code_blocks(blocks: Sequence[tuple[str, str]]) -> str:
    """Return a heading and preformatted text for each block."""
    return "".join(f"<div>{escape(title)}</div><pre>{escape(code)}</pre>" for title, code in blocks)


def details(title: str, tables: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return a closed section that opens on a click: a table of names and values for each caption."""
    body = "".join(
        f"<table><caption>{escape(caption)}</caption><tbody>"
        + "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
        + "</tbody></table>"
        for caption, rows in tables.items()
        if rows
    )
    body = f'<details><summary>{escape(title)}</summary><div class="settings">{body}</div></details>'
    return f"<section>{body}</section>"
