"""One HTML file that holds everything: text, tables and pictures, for light and dark pages."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --faint: #59636e;
  --line: #d0d7de; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6edf3; --faint: #9aa4af;
  --line: #2f363e; --card: #1c2128; } }
body { background: var(--page); color: var(--ink); margin: 0 auto; max-width: 60rem;
  padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
p { margin: .4rem 0; } .faint { color: var(--faint); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; min-width: 8rem; }
.card b { display: block; font-size: 1.35rem; } .card span { color: var(--faint); }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.n, th.n { text-align: right; }
code { font: .85rem ui-monospace, monospace; overflow-wrap: anywhere; }
""".strip()


def page(title: str, lead: str, body: Sequence[str]) -> str:
    """The whole file."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            f'<h1>{html.escape(title)}</h1><p class="faint">{html.escape(lead)}</p>',
            *body,
            "</body></html>\n",
        ]
    )


def cards(values: Mapping[str, tuple[str, str]]) -> str:
    """A row of figures: label -> (value, remark)."""
    items = (
        f'<div class="card"><span>{html.escape(label)}</span><b>{html.escape(value)}</b>'
        f"<span>{html.escape(remark)}</span></div>"
        for label, (value, remark) in values.items()
    )
    return f'<div class="cards">{"".join(items)}</div>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def picture(light: bytes, dark: bytes, alt: str) -> str:
    """PNG bytes inline; the browser shows the one that fits the page."""
    return (
        f'<picture><source srcset="{_data(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{_data(light)}" alt="{html.escape(alt)}"></picture>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers (and strings that start with a digit) are set right-aligned."""

    def cell(tag: str, value: Any, number: bool) -> str:
        return f"<{tag}{' class=n' if number else ''}>{html.escape(str(value))}</{tag}>"

    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    head = "".join(cell("th", h, n) for h, n in zip(header, numeric, strict=True))
    body = (
        "<tr>" + "".join(cell("td", v, n) for v, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Two columns: name and value, the value as code."""
    rows = (
        f"<tr><th>{html.escape(str(k))}</th><td><code>{html.escape(str(v))}</code></td></tr>"
        for k, v in values.items()
    )
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _is_number(value: Any) -> bool:
    text = str(value)
    return text in ("", "-") or text.lstrip("-+")[:1].isdigit()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
